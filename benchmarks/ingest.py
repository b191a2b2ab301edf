"""Does the service take what a large training job sends, and what does that cost? Beside what others take.

    python benchmarks/ingest.py [--seconds 20] [--save] [--peers /tmp/benchvenv/bin/python]

Eight rank processes send batches of 20 steps x 54 layers with every column, and the scalars and probe of these steps,
over HTTP on loopback to a service in a process of its own; each sends the next batch when the last is on disk. Every
batch is another one, drawn and encoded before the clock starts: what is measured is the service. Values are noise
around levels that differ by layer and statistic; those that stand still in training (limits, batch size) stand still.

Then one process logs 54 layers x 36 statistics a step, the same numbers each time, to this service and to other
tracking services where the Python given by --peers has them (they pin much: `pip install trackio mlflow tensorboard`
in an environment of its own), each for some seconds; and one statistic of all layers is read back.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa

from brn_core import wire

if __package__:
    from benchmarks.peers import PEERS
else:  # run as a script
    from peers import PEERS

RANKS, STEPS, LAYERS = 8, 20, 54
SPARE = 1.3
"""Batches are made for this many times the target; a measurement ends when a rank has none left."""
PEER_STEPS = 2000
TARGETS = {"rows_per_second": 150_000, "p99_ms": 250, "rss_mb": 1500, "bytes_per_number": 3.0}
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def layer_rows(rng: np.random.Generator, first_step: int) -> pa.Table:
    """20 steps of a training in its middle: noise of 5 % around levels that differ by layer and metric."""
    count = STEPS * LAYERS
    columns: dict[str, Any] = {
        "step": np.repeat(np.arange(first_step, first_step + STEPS, dtype=np.uint64), LAYERS),
        "layer": np.tile(np.arange(LAYERS, dtype=np.uint16), STEPS),
    }
    still = {
        "samples": 32.0,
        "r_min": 1 / 3,
        "r_max": 3.0,
        "d_max": 5.0,
        "dead_channels": 0.0,
        "nonfinite_channels": 0.0,
    }
    for number, metric in enumerate(wire.METRICS):
        level = np.tile(1 + np.sin(np.arange(LAYERS) + number), STEPS)
        if metric.name in still:
            values = np.full(count, still[metric.name])
        elif metric.name in ("clip_r", "clip_d"):  # shares of 256 channels, mostly none
            values = rng.binomial(256, 0.01, count) / 256
        else:
            values = level * (1 + 0.05 * rng.standard_normal(count))
        columns[metric.name] = values.astype(np.float32)
    schema = wire.TABLES["layers"]
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def tables(rng: np.random.Generator, first_step: int) -> dict[str, pa.Table]:
    steps = np.arange(first_step, first_step + STEPS, dtype=np.uint64)
    probe, scalars = wire.TABLES["probe"], wire.TABLES["scalars"]
    vectors = [list(rng.chisquare(1, (STEPS, wire.PROBE_FEATURES)).astype(np.float32)) for _ in range(3)]
    names = ["loss", wire.SCALAR_STEP_TIME]
    return {
        "layers": layer_rows(rng, first_step),
        "probe": pa.Table.from_arrays(
            [
                pa.array(values, field.type)
                for values, field in zip([steps, np.full(STEPS, 32), *vectors], probe, strict=True)
            ],
            schema=probe,
        ),
        "scalars": pa.Table.from_arrays(
            [
                pa.array(np.tile(steps, 2)),
                pa.array(np.repeat(names, STEPS)),
                pa.array(rng.standard_normal(2 * STEPS)),
            ],
            schema=scalars,
        ),
    }


def rank_process(url: str, rank: int, count: int, start: Any, stop: Any, answers: Any) -> None:
    """Sends until `stop`, or until it has sent all; puts (CPU seconds, [(seconds, status) a batch])."""
    rng = np.random.default_rng(rank)
    bodies = [wire.encode_batch(tables(rng, 1 + STEPS * i)) for i in range(count)]
    took: list[tuple[float, int]] = []
    address = urlsplit(url)
    # The plainest client there is: it shares the processors with the service.
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.connect()
    start.wait(600)
    cpu, seq = time.process_time(), 0
    while not stop.is_set() and seq < count:
        began = time.perf_counter()
        path = f"/v1/runs/bench/batches?rank={rank}&seq={seq}"
        connection.request("POST", path, bodies[seq], {"Content-Type": wire.MEDIA_TYPE})
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - began, answer.status))
        if answer.status == 200:
            seq += 1
        else:
            time.sleep(float(answer.headers.get("retry-after", 1)))
    stop.set()
    answers.put((time.process_time() - cpu, took))


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no VmRSS of process {pid}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def service() -> Iterator[tuple[str, int]]:
    """(URL, pid) of a service over a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0", "--store", f"chdb://{folder}/store"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[2], process.pid
        finally:
            process.terminate()
            process.wait(60)


def measure(seconds: float) -> dict[str, float]:
    """One run of the service under load."""
    with service() as (url, pid), httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return _load(client, url, pid, seconds)


def create(client: httpx.Client, world_size: int, run_id: str = "bench") -> None:
    layers = [
        {"index": i, "name": f"block{i}.bn", "kind": "BatchRenorm", "channels": 256, "eps": 1e-5, "momentum": 0.01}
        for i in range(LAYERS)
    ]
    run = {"id": run_id, "name": run_id, "world_size": world_size, "batch_size": 32, "layers": layers}
    client.post("/v1/runs", json=run).raise_for_status()


def _load(client: httpx.Client, url: str, pid: int, seconds: float) -> dict[str, float]:
    create(client, RANKS)
    count = 1 + round(SPARE * seconds * TARGETS["rows_per_second"] / (RANKS * STEPS * LAYERS))
    context = multiprocessing.get_context("spawn")
    start, stop, answers = context.Barrier(RANKS + 1), context.Event(), context.Queue()
    arguments = (count, start, stop, answers)
    ranks = [context.Process(target=rank_process, args=(url, k, *arguments)) for k in range(RANKS)]
    for process in ranks:
        process.start()
    start.wait(600)  # all have encoded their bodies
    began, peak, cpu = time.perf_counter(), 0.0, cpu_seconds(pid)
    while time.perf_counter() - began < seconds and not stop.wait(0.5):
        peak = max(peak, resident_mb(pid))
    stop.set()
    took: list[tuple[float, int]] = []
    client_cpu = 0.0
    for _ in ranks:
        used, sent = answers.get(timeout=120)
        client_cpu += used
        took += sent
    elapsed = time.perf_counter() - began
    cpu = cpu_seconds(pid) - cpu
    for process in ranks:
        process.join()
    stored = [duration for duration, status in took if status == 200]
    rows = client.get("/v1/runs/bench").json()["rows"]
    assert rows == len(stored) * STEPS * LAYERS, "acknowledged is stored, once"
    numbers = len(stored) * (STEPS * LAYERS * len(wire.METRICS) + STEPS * (3 * wire.PROBE_FEATURES + 1 + 2))
    return {
        "rows_per_second": rows / elapsed,
        "p50_ms": float(np.percentile(stored, 50)) * 1e3,
        "p99_ms": float(np.percentile(stored, 99)) * 1e3,
        "rss_mb": peak,
        "bytes_per_number": _settled_bytes(client) / numbers,
        "sent_away": len(took) - len(stored),
        "service_cpus": cpu / elapsed,
        "client_cpus": client_cpu / elapsed,
        "batches_a_group": _metric(client, "brn_ingest_group_batches_sum")
        / _metric(client, "brn_ingest_group_batches_count"),
        "points_per_second": numbers / elapsed,
    }


def _metric(client: httpx.Client, name: str) -> float:
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


def _settled_bytes(client: httpx.Client) -> float:
    """The store's size once the engine has merged what came last: the same twice, at most 10 s."""
    last = -1.0
    for _ in range(10):
        now = _metric(client, "brn_store_bytes")
        if now == last:
            break
        last = now
        time.sleep(1)
    return last


def report(found: dict[str, float], compared: list[str], seconds: float) -> str:
    lines = [
        f"# Ingest, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python benchmarks/ingest.py --seconds {seconds:g}`: {RANKS} rank processes, batches of {STEPS} steps x "
        f"{LAYERS} layers x {len(wire.METRICS)} statistics with probe and scalars, HTTP on loopback, acknowledged when "
        f"on disk; {os.cpu_count()} cores for all of them.",
        "",
        "| | measured | target |",
        "|---|---|---|",
    ]
    shown = {
        "rows_per_second": ("rows of `layers` a second, sustained", "{:,.0f}", ">= {:,.0f}"),
        "points_per_second": ("numbers a second, until durable", "{:,.0f}", ""),
        "p50_ms": ("one batch, median, ms", "{:.0f}", ""),
        "p99_ms": ("one batch, p99, ms", "{:.0f}", "<= {:.0f}"),
        "rss_mb": ("resident memory of the service, peak, MB", "{:.0f}", "<= {:.0f}"),
        "bytes_per_number": ("bytes a stored number", "{:.2f}", "<= {:.0f}"),
        "batches_a_group": ("batches written together, mean", "{:.1f}", ""),
        "sent_away": ("batches sent away (429)", "{:.0f}", ""),
        "service_cpus": ("processors that the service keeps busy", "{:.1f}", ""),
        "client_cpus": ("processors that the ranks keep busy", "{:.1f}", ""),
    }
    for name, (label, form, target) in shown.items():
        wanted = target.format(TARGETS[name]) if target else ""
        lines.append(f"| {label} | {form.format(found[name])} | {wanted} |")
    return "\n".join([*lines, "", *compared]) + "\n"


def compare(python: str, seconds: float) -> list[str]:
    """Lines of the table that has this service and its peers on the same numbers."""
    rng = np.random.default_rng(0)
    level_LS = 1 + np.sin(np.arange(LAYERS)[:, None] + np.arange(len(wire.METRICS)))
    noise_TLS = rng.standard_normal((PEER_STEPS, LAYERS, len(wire.METRICS)), dtype=np.float32)
    values_TLS = (level_LS * (1 + 0.05 * noise_TLS)).astype(np.float32)
    rows, missing = [_ours(values_TLS)], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.npy"
        np.save(path, values_TLS)
        for name in PEERS:
            own = Path(folder) / name
            own.mkdir()
            command = [python, str(Path(__file__).with_name("peers.py")), name, str(path), str(seconds), str(own)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as peer:
                try:
                    said, error = peer.communicate(timeout=300)
                except subprocess.TimeoutExpired:
                    peer.terminate()  # it stops its own server
                    said, error = peer.communicate()[0], "it took more than 300 s"
            lines = [line for line in said.splitlines() if line.startswith('{"')]
            if not lines:
                missing.append(f"{name} failed: {(error.strip().splitlines() or ['no word of why'])[-1]}")
            elif "missing" in (found := json.loads(lines[-1])):
                missing.append(found["missing"])
            else:
                rows.append(found)
    return [
        f"The same {LAYERS} x {len(wire.METRICS)} numbers a step from one process, {PEER_STEPS} steps or what "
        f"{seconds:g} s allow:",
        "",
        "| | steps | points/s until durable | bytes a point | one statistic of all layers, ms | us a point of it |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['shown']} | {row['steps']:,} | {row['points'] / row['seconds']:,.0f} "
            f"| {row['bytes'] / row['points']:.1f} | {1e3 * row['read_seconds']:,.0f} "
            f"| {1e6 * row['read_seconds'] / row['read_points']:.1f} |"
            for row in rows
        ),
        *(["", "Not measured: " + "; ".join(missing) + "."] if missing else []),
    ]


def _ours(values_TLS: Any) -> dict[str, Any]:
    """What `peers.py` measures of others: encoding, HTTP, and until the last batch is on disk."""
    T = len(values_TLS)
    schema = wire.TABLES["layers"]
    layer = pa.array(np.tile(np.arange(LAYERS, dtype=np.uint16), STEPS))
    with service() as (url, _), httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        create(client, 1)
        began = time.perf_counter()
        for first in range(0, T, STEPS):
            flat = values_TLS[first : first + STEPS].reshape(-1, len(wire.METRICS))
            columns = {metric.name: flat[:, i] for i, metric in enumerate(wire.METRICS)}
            step = np.repeat(np.arange(first, first + STEPS, dtype=np.uint64), LAYERS)
            given = {"step": step, "layer": layer} | columns
            rows = pa.Table.from_arrays([pa.array(given[f.name], f.type) for f in schema], schema=schema)
            client.post(
                f"/v1/runs/bench/batches?rank=0&seq={first}",
                content=wire.encode_batch({"layers": rows}),
                headers={"content-type": wire.MEDIA_TYPE},
            ).raise_for_status()
        took = time.perf_counter() - began
        size = _settled_bytes(client)
        began = time.perf_counter()
        points = min(T, 5000)  # at most; every step is a bucket of its own
        answer = client.get(
            f"/v1/runs/bench/heatmap?stat={wire.METRICS[0].name}&points={points}", headers={"accept": wire.MEDIA_TYPE}
        )
        read = pa.ipc.open_stream(answer.raise_for_status().content).read_all()
        read_seconds = time.perf_counter() - began
    assert read.num_rows == T, "every step in full resolution"
    return {
        "shown": "**brn-serve** (HTTP, Arrow)",
        "steps": T,
        "points": values_TLS.size,
        "seconds": took,
        "bytes": size,
        "read_points": T * LAYERS,
        "read_seconds": read_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="how long the ranks send, at most 40")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has trackio, mlflow, tensorboard, aim")
    parser.add_argument("--peer-seconds", type=float, default=10, help="how long each of them is logged to; 0: none")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    arguments = parser.parse_args()
    seconds = min(arguments.seconds, 40)
    found = measure(seconds)
    compared = compare(arguments.peers, arguments.peer_seconds) if arguments.peer_seconds else []
    text = report(found, compared, seconds)
    print(text)
    print(json.dumps(found))
    if arguments.save:
        path = RESULTS / f"ingest-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(text, encoding="utf-8")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
