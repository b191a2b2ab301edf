"""How long do questions take over ten million rows? Through HTTP, p50 and p95, beside the targets.

Builds a store of its own in a temporary folder, which is removed at the end: one run of `rows` rows of `layers` (54
layers, one rank, all columns filled by SQL inside the engine with slow waves and noise), and 999 runs that have only a
record and a batch each. Then asks one question after the other, each several times, over one kept connection.

    python benchmarks/query.py                 # 10 M rows: 185,186 steps of 54 layers
    python benchmarks/query.py --rows 1000000  # a minute
    python benchmarks/query.py --ingest 80000  # while so many rows a second arrive for another run (half the peak)
    python benchmarks/query.py --live 100000   # instead: how long does it take to refresh the diagnosis of a live run?
    python benchmarks/query.py --save          # also to benchmarks/results/query-DATE.md

A refresh is what the diagnoser does when batches have come: 20 steps of each of 8 ranks and 54 layers are put into the
store, and then `windows.diagnosis` is timed, in this process and with no HTTP. Its target is 50 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np

from brn_core import wire
from brn_core.wire import METRICS, Layer, RunCreate, Schedule
from service import windows
from service.__main__ import give_freed_memory_back
from service.settings import Settings
from service.store import Batch, Store

if __package__:
    from benchmarks import ingest
else:  # run as a script
    import ingest

ROOT = Path(__file__).parents[1]
LAYERS = 54
RUNS = 1000
BATCH_STEPS = 20
LIVE_RANKS = 8
ARRIVING = "arriving"
"""The run that batches arrive for while questions are asked about another one."""


class Question(NamedTuple):
    name: str
    address: str
    p50_target_ms: float | None
    p95_target_ms: float | None
    arrow: bool = False


QUESTIONS = (
    Question("series, one layer, 1,000 buckets", "/v1/runs/bench/series?stat=r_q95&layer=20&points=1000", 60, 120),
    Question("series, all layers, 1,000 buckets", "/v1/runs/bench/series?stat=r_q95&points=1000", None, None),
    Question("heatmap, 54 layers x 1,000 buckets", "/v1/runs/bench/heatmap?stat=gap&points=1000", 200, 400),
    Question("the same in Arrow", "/v1/runs/bench/heatmap?stat=gap&points=1000", None, None, True),
    Question("summary", "/v1/runs/bench/summary", 150, 300),
    Question("list of 1,000 runs", f"/v1/runs?limit={RUNS}", 50, 100),
    Question("page of 50 runs, searched", "/v1/runs?limit=50&search=run+7&sort=updated", None, None),
    Question("ranks", "/v1/runs/bench/ranks", None, None),
    Question("schedule, all layers", "/v1/runs/bench/schedule?r_max=1.5&d_max=1", None, None),
    Question("schedule, one layer", "/v1/runs/bench/schedule?r_max=1.5&d_max=1&layer=20", None, None),
)

ON_ARRIVING = tuple(
    question._replace(
        name=f"of the run that arrives: {question.name}", address=question.address.replace("bench", ARRIVING)
    )
    for question in QUESTIONS
    if "/bench/" in question.address and question.p50_target_ms is not None
)
"""Each of these has what came since the last one written into the engine first, for which the others need not wait."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table `layers`")
    parser.add_argument("--repeats", type=int, default=30, help="times each question is asked")
    parser.add_argument("--ingest", type=int, default=0, help="rows a second that arrive meanwhile, for another run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/query-DATE.md too")
    parser.add_argument("--live", type=int, default=0, metavar="STEPS", help="refresh a run of so many steps instead")
    given = parser.parse_args()
    if given.live:
        live(given.live, given.repeats, save=given.save)
        return
    steps = -(-given.rows // LAYERS)
    with tempfile.TemporaryDirectory(prefix="brn-query-") as folder:
        store = f"chdb://{folder}/store"
        began = time.perf_counter()
        # In a process of its own: an engine that just wrote ten million rows holds memory a service would not.
        code = f"from benchmarks.query import build; build({store!r}, {steps})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_environment(), check=True)
        built = time.perf_counter() - began
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        with service(store) as url, arriving(url, given.ingest) as arrived:
            slack = 2 if given.ingest else 1
            questions = QUESTIONS + ON_ARRIVING if given.ingest else QUESTIONS
            lines = [measured(url, question, given.repeats, slack) for question in questions]
            arriving_rows = arrived()
    report = "\n".join(
        [
            f"# Questions over {steps * LAYERS:,} rows ({steps:,} steps x {LAYERS} layers), {RUNS:,} runs",
            "",
            f"`python benchmarks/query.py --rows {given.rows} --repeats {given.repeats}"
            f"{f' --ingest {given.ingest}' if given.ingest else ''}`, "
            f"{datetime.now(UTC):%Y-%m-%d}; "
            f"{os.cpu_count()} cores, Python {platform.python_version()}. Built in {built:.0f} s; "
            f"{stored / 1e6:,.0f} MB on disk ({stored / (steps * LAYERS * len(METRICS)):.1f} bytes a number)."
            + (f" {arriving_rows:,.0f} rows a second arrived meanwhile; targets are doubled." if given.ingest else ""),
            "",
            "| question | p50 ms | p95 ms | target | kB | |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )
    print(report)
    if given.save:
        kind = "query-while-ingesting" if given.ingest else "query"
        path = ROOT / "benchmarks" / "results" / f"{kind}-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(f"{report}\n")
        print(f"\nsaved {path.relative_to(ROOT)}")


def build(address: str, steps: int) -> None:
    """Fills an empty store."""
    store = Store(Settings(store=address))
    now = datetime.now(UTC)
    layers = tuple(
        Layer(index=i, name=f"block{i}.bn", kind="BatchRenorm", channels=256, eps=1e-5, momentum=0.01)
        for i in range(LAYERS)
    )
    store.put_run(RunCreate(id="bench", name="bench", layers=layers), "finished", now)
    columns = ", ".join(metric.name for metric in METRICS)
    values = ", ".join(
        f"{metric.neutral or 0} + sin(step / {3000 + 500 * i} + layer) / 4 + rand({i}) / {2**32 * 20}"
        for i, metric in enumerate(METRICS)
    )
    command = store.engine.command
    for first in range(0, steps, 20_000):  # parts of a million rows, as merges of a live run would leave them
        count = min(20_000, steps - first)
        command(
            f"""INSERT INTO layers (run_id, rank, seq, step, layer, {columns})
            SELECT 'bench', 0, intDiv(step, {BATCH_STEPS}), step, layer, {values} FROM (
                SELECT {first} + number % {count} AS step, intDiv(number, {count}) AS layer
                FROM numbers({count * LAYERS})
            )"""
        )
    command(
        f"""INSERT INTO batches (run_id, rank, seq, layer_rows, first_step, last_step, received_at)
        SELECT 'bench', 0, number, {BATCH_STEPS * LAYERS}, number * {BATCH_STEPS},
            least(number * {BATCH_STEPS} + {BATCH_STEPS - 1}, {steps - 1}), now()
        FROM numbers({-(-steps // BATCH_STEPS)})"""
    )
    config = {"model": "resnet50", "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "epochs": 90}
    record = RunCreate(id="x", name="x", batch_size=32, planned_steps=1000, config=config, tags=("sweep",))
    text = record.model_dump_json(exclude={"id", "name", "layers"})
    command(
        """INSERT INTO runs (run_id, version, record, layers, status, created_at, changed_at)
        SELECT concat('run-', toString(number)), 1,
            concat('{"id":"run-', toString(number), '","name":"run ', toString(number), '",',
                substring({text:String}, 2)),
            {layers:String}, 'finished', now() - number, now() - number FROM numbers({runs:UInt32})""",
        text=text,
        layers=json.dumps({"layers": [layer.model_dump() for layer in layers]}),
        runs=RUNS - 1,
    )
    command(
        f"""INSERT INTO batches (run_id, rank, seq, layer_rows, first_step, last_step, received_at)
        SELECT concat('run-', toString(number)), 0, 1, 54, 1, 1, now() FROM numbers({RUNS - 1})"""
    )
    store.close()


def live(steps: int, repeats: int, *, save: bool) -> None:
    """Refreshes of a short and of a long run, each measured in a process that built nothing."""
    lines = []
    for length in (2000, steps):
        with tempfile.TemporaryDirectory(prefix="brn-query-") as folder:
            store = f"chdb://{folder}/store"
            for code in (f"build_live({store!r}, {length})", f"refresh({store!r}, {repeats})"):
                command = [sys.executable, "-c", f"from benchmarks.query import *; {code}"]
                done = subprocess.run(command, cwd=ROOT, env=_environment(), check=True, stdout=subprocess.PIPE)
            lines.append(f"| {length:,} | {done.stdout.decode().strip()} |")
    report = "\n".join(
        [
            f"# Refreshing the diagnosis of a live run ({LAYERS} layers, {LIVE_RANKS} ranks)",
            "",
            f"`python benchmarks/query.py --live {steps} --repeats {repeats}`, {datetime.now(UTC):%Y-%m-%d}; "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, Python {platform.python_version()}. "
            f"Each refresh takes in {BATCH_STEPS} steps of every rank ({BATCH_STEPS * LIVE_RANKS * LAYERS:,} rows of "
            "`layers`). Processor time is that of the thread that diagnoses; the engine has threads of its own, which "
            "nothing is asked of where the number of queries is 0. Target: 50 ms.",
            "",
            "| steps stored | first, from the store, ms | p50 ms | p95 ms | processor ms | of it the rules | queries |",
            "|---|---|---|---|---|---|---|",
            *lines,
        ]
    )
    print(report)
    if save:
        path = ROOT / "benchmarks" / "results" / f"refresh-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(f"{report}\n")
        print(f"\nsaved {path.relative_to(ROOT)}")


def build_live(address: str, steps: int) -> None:
    """A run that goes on: layers, probe and scalars of every step and rank, past the opening of its limits."""
    store = Store(Settings(store=address))
    layers = tuple(
        Layer(index=i, name=f"block{i}.bn", kind="BatchRenorm", channels=256, eps=1e-5, momentum=0.01)
        for i in range(LAYERS)
    )
    schedule = Schedule(bn_steps=500, r_steps=1500, d_steps=1500, r_max=3, d_max=5)
    record = RunCreate(id="bench", name="bench", layers=layers, world_size=LIVE_RANKS, batch_size=32, schedule=schedule)
    store.put_run(record, "running", datetime.now(UTC))
    counts = {"dead_channels": "0", "nonfinite_channels": "0", "samples": "32"}
    columns = ", ".join(metric.name for metric in METRICS)
    values = ", ".join(
        counts.get(metric.name, f"{metric.neutral or 0} + rand({i}) / {2**32 * 20}") for i, metric in enumerate(METRICS)
    )

    def feature(number: int, middle: float, width: float) -> str:
        drawn = f"cityHash64(step, rank, i, {number}) % 1000003 / 1000003 - 0.5"
        return f"arrayMap(i -> toFloat32({middle} + {width} * ({drawn})), range({wire.PROBE_FEATURES}))"

    command = store.engine.command
    for first in range(0, steps, 5000):  # parts of some million rows, as merges of a live run would leave them
        count = min(5000, steps - first)
        place = f"{first} + number % {count} AS step, intDiv(number, {count})"
        ranks = f"(SELECT {place} AS rank FROM numbers({count * LIVE_RANKS}))"
        command(
            f"""INSERT INTO layers (run_id, rank, seq, step, layer, {columns})
            SELECT 'bench', rank, intDiv(step, {BATCH_STEPS}), step, layer, {values} FROM (
                SELECT {place} % {LAYERS} AS layer, intDiv(number, {count * LAYERS}) AS rank
                FROM numbers({count * LAYERS * LIVE_RANKS})
            )"""
        )
        command(
            f"""INSERT INTO probe (run_id, rank, seq, step, samples, mean, var, adjacency)
            SELECT 'bench', rank, intDiv(step, {BATCH_STEPS}), step, 32,
                {feature(1, 0, (12 / 32) ** 0.5)}, {feature(2, 1, 0.5)}, {feature(3, 1, 0.5)} FROM {ranks}"""
        )
        command(
            f"""INSERT INTO scalars (run_id, rank, seq, step, name, value)
            SELECT 'bench', rank, intDiv(step, {BATCH_STEPS}), step, name, 1 + rand(1) / {2**34} FROM (
                SELECT step, rank, arrayJoin(['loss', '{wire.SCALAR_STEP_TIME}']) AS name FROM {ranks}
            )"""
        )
        command(
            f"""INSERT INTO scalars (run_id, rank, seq, step, name, value)
            SELECT 'bench', 0, intDiv(step, {BATCH_STEPS}), step, name, 1 + rand(1) / {2**34} FROM (
                SELECT {first} + 100 * number AS step,
                    arrayJoin(['{wire.SCALAR_SHADOW_TRAIN_LOSS}', '{wire.SCALAR_SHADOW_EVAL_LOSS}']) AS name
                FROM numbers({count // 100})
            )"""
        )
    command(
        f"""INSERT INTO batches (run_id, rank, seq, layer_rows, first_step, last_step, received_at)
        SELECT 'bench', number % {LIVE_RANKS}, intDiv(number, {LIVE_RANKS}) AS seq, {BATCH_STEPS * LAYERS},
            seq * {BATCH_STEPS}, seq * {BATCH_STEPS} + {BATCH_STEPS - 1}, now()
        FROM numbers({steps // BATCH_STEPS * LIVE_RANKS})"""
    )
    store.close()


def refresh(address: str, repeats: int) -> None:
    """Prints the cells of a line of the table: milliseconds, and how often a table of rows was asked."""
    give_freed_memory_back()
    store = Store(Settings(store=address))
    run = store.record("bench")
    assert run is not None
    diagnose, ask = windows.diagnose, store.engine.rows
    rules: list[float] = []
    asked: list[str] = []

    def judged(window: Any, known: Any) -> Any:
        began = time.thread_time()
        try:
            return diagnose(window, known)
        finally:
            rules.append(time.thread_time() - began)

    def asking(sql: str, **parameters: Any) -> Any:
        asked.append(sql)
        return ask(sql, **parameters)

    windows.diagnose, store.engine.rows = judged, asking  # type: ignore[method-assign]
    took: list[tuple[float, float]] = []
    for _ in range(repeats + 3):  # the first reads the store; two more make room
        step = (store.extent("bench").last_step or 0) + 1
        tables = [ingest.tables(np.random.default_rng(rank), step) for rank in range(LIVE_RANKS)]
        store.put_batches([Batch(run, rank, step, own) for rank, own in enumerate(tables)])
        asked.clear()
        began, worked = time.perf_counter(), time.thread_time()
        windows.diagnosis(store, "bench")
        took.append((time.perf_counter() - began, time.thread_time() - worked))
        queries = sum(bool(re.search(r"FROM (layers|probe|scalars)\b", sql)) for sql in asked)
    wall, worked_s = 1000 * np.array(took[3:]).T
    p50, p95 = np.percentile(wall, (50, 95))
    own = 1000 * float(np.median(rules[3:]))
    cells = (1000 * took[0][0], p50, p95, float(np.median(worked_s)), own)
    print(" | ".join(f"{cell:.0f}" for cell in cells), queries, sep=" | ")
    store.close()


@contextmanager
def service(store: str, module: str = "service", port: int = 0) -> Iterator[str]:
    """A service over the store, in a process of its own; `dashboard` as the module has the pages, too."""
    command = [sys.executable, "-m", module, "--port", str(port), "--store", store]
    with subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None, "the service did not start"
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@contextmanager
def arriving(url: str, rows_per_second: int) -> Iterator[Callable[[], float]]:
    """Batches arrive from a process of their own, for a run of their own; gives rows a second that did so far."""
    if not rows_per_second:
        yield lambda: 0.0
        return
    with httpx.Client(base_url=url, timeout=60) as client:
        ingest.create(client, ingest.RANKS, ARRIVING)
        context = multiprocessing.get_context("spawn")
        ready, stop = context.Event(), context.Event()
        sender = context.Process(target=send, args=(url, rows_per_second, ready, stop))
        sender.start()
        ready.wait(120)
        began = time.perf_counter()
        try:
            yield lambda: client.get(f"/v1/runs/{ARRIVING}").json()["rows"] / (time.perf_counter() - began)
        finally:
            stop.set()
            sender.join(60)


def send(url: str, rows_per_second: int, ready: Any, stop: Any) -> None:
    """Sends for all ranks, each from a thread, at a steady pace; a batch that is late is not caught up with."""

    @lru_cache(maxsize=16)
    def body(seq: int) -> bytes:  # every rank sends the same, one after another
        return wire.encode_batch(ingest.tables(np.random.default_rng(seq), 1 + ingest.STEPS * seq))

    pause = ingest.RANKS * ingest.STEPS * ingest.LAYERS / rows_per_second
    address = urlsplit(url)

    def work(rank: int) -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        seq, due = 0, time.monotonic() + pause * rank / ingest.RANKS
        while not stop.wait(max(0.0, due - time.monotonic())):
            path = f"/v1/runs/{ARRIVING}/batches?rank={rank}&seq={seq}"
            connection.request("POST", path, body(seq), {"Content-Type": wire.MEDIA_TYPE})
            answer = connection.getresponse()
            answer.read()
            seq += answer.status == 200
            due = max(due + pause, time.monotonic())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ingest.RANKS)]
    ready.set()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measured(url: str, question: Question, repeats: int, slack: int = 1) -> str:
    """A line of the table. The first two answers warm caches up and do not count."""
    accept = "application/vnd.apache.arrow.stream" if question.arrow else "application/json"
    took = []
    with httpx.Client(base_url=url, timeout=60, headers={"accept": accept}) as client:
        for _ in range(repeats + 2):
            began = time.perf_counter()
            answer = client.get(question.address)
            took.append(1000 * (time.perf_counter() - began))
            answer.raise_for_status()
    p50, p95 = np.percentile(took[2:], (50, 95))
    target, verdict = "", ""
    if question.p50_target_ms is not None and question.p95_target_ms is not None:
        p50_target, p95_target = slack * question.p50_target_ms, slack * question.p95_target_ms
        target = f"{p50_target:.0f} / {p95_target:.0f}"
        verdict = "met" if p50 <= p50_target and p95 <= p95_target else "missed"
    return f"| {question.name} | {p50:.0f} | {p95:.0f} | {target} | {len(answer.content) / 1000:,.0f} | {verdict} |"


if __name__ == "__main__":
    main()
