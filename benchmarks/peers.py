"""Other tracking services on the numbers that `benchmarks/ingest.py` sends: one of them, in the Python that has it.

    python benchmarks/peers.py NAME VALUES.npy SECONDS FOLDER

VALUES.npy holds (T, L, S) numbers; every step of it is logged, one call a step, until SECONDS have passed. Prints one
line of JSON: steps and points that were logged, seconds until they were durable (the peer's own end of a run), bytes
they take on disk, and seconds to read one statistic of all layers back, as a page that draws it would. Prints
{"missing": ...} where the peer is not installed.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Logged = tuple[int, float]
"""Steps that were logged, seconds until durable."""


def names(values_TLS: Any) -> list[list[str]]:
    """(L, S) a name a layer and statistic."""
    _, layers, stats = values_TLS.shape
    return [[f"layer{layer}/stat{stat}" for stat in range(stats)] for layer in range(layers)]


def steps_of(values_TLS: Any, seconds: float) -> Iterable[tuple[int, dict[str, float]]]:
    """(step, numbers by name) until the time is over."""
    flat = [name for own in names(values_TLS) for name in own]
    began = time.perf_counter()
    for step, values in enumerate(values_TLS):
        if step and time.perf_counter() - began > seconds:
            return
        yield step, dict(zip(flat, values.ravel().tolist(), strict=True))


def trackio(values_TLS: Any, seconds: float, folder: Path) -> tuple[Logged, Callable[[], int]]:
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio as peer
    from trackio.sqlite_storage import SQLiteStorage

    peer.init(project="bench", name="bench", embed=False, auto_log_cpu=False, auto_log_gpu=False)
    began, count = time.perf_counter(), 0
    for step, numbers in steps_of(values_TLS, seconds):
        peer.log(numbers, step=step)
        count += 1
    peer.finish()
    took = time.perf_counter() - began

    def read() -> int:
        return sum(len(SQLiteStorage.get_metric_values("bench", "bench", own[0])) for own in names(values_TLS))

    return (count, took), read


def mlflow(values_TLS: Any, seconds: float, folder: Path) -> tuple[Logged, Callable[[], int]]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{folder}/mlflow.db"
    arguments = ["server", "--backend-store-uri", store, "--port", str(port), "--workers", "1"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments, "--default-artifact-root", str(folder / "artifacts")],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # dozens of processes, for evaluations
        )
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    _stop_at_exit(server)
    client = MlflowClient(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 120
    while True:
        try:
            experiment = client.create_experiment("bench")
            break
        except Exception:
            if time.monotonic() > deadline or server.poll() is not None:
                raise
            time.sleep(1)
    run = client.create_run(experiment).info.run_id
    began, count = time.perf_counter(), 0
    for step, numbers in steps_of(values_TLS, seconds):
        metrics = [Metric(name, value, 0, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), 1000):  # its limit
            client.log_batch(run, metrics=metrics[first : first + 1000])
        count += 1
    took = time.perf_counter() - began

    def read() -> int:
        return sum(len(client.get_metric_history(run, own[0])) for own in names(values_TLS))

    return (count, took), read


def tensorboard(values_TLS: Any, seconds: float, folder: Path) -> tuple[Logged, Callable[[], int]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    began, count = time.perf_counter(), 0
    for step, numbers in steps_of(values_TLS, seconds):
        for name, value in numbers.items():  # one event a number, as SummaryWriter.add_scalar does
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=0.0, summary=summary))
        count += 1
    writer.close()
    took = time.perf_counter() - began

    def read() -> int:
        loaded = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
        loaded.Reload()
        return sum(len(loaded.Scalars(own[0])) for own in names(values_TLS))

    return (count, took), read


def aim(values_TLS: Any, seconds: float, folder: Path) -> tuple[Logged, Callable[[], int]]:
    from aim import Repo, Run

    repo = Repo.from_path(str(folder), init=True)
    run = Run(repo=repo, system_tracking_interval=None, capture_terminal_logs=False)
    began, count = time.perf_counter(), 0
    for step, numbers in steps_of(values_TLS, seconds):
        run.track(numbers, step=step)
        count += 1
    run.close()
    took = time.perf_counter() - began

    def read() -> int:
        wanted = " or ".join(f"metric.name == {own[0]!r}" for own in names(values_TLS))
        found = repo.query_metrics(wanted, report_mode=0)
        return sum(len(metric.values.tolist()) for part in found.iter_runs() for metric in part)

    return (count, took), read


PEERS = {"trackio": trackio, "mlflow": mlflow, "tensorboard": tensorboard, "aim": aim}

SHOWN = {
    "trackio": "trackio {} (SQLite, local)",
    "mlflow": "MLflow {} (its server, SQLite)",
    "tensorboard": "TensorBoard {} (event files)",
    "aim": "Aim {} (local)",
}


def _stop_at_exit(server: subprocess.Popen[bytes]) -> None:
    def stop() -> None:
        os.killpg(server.pid, signal.SIGTERM)  # a session of its own: the server and its workers
        server.wait(30)

    atexit.register(stop)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def main() -> None:
    name, path, seconds, folder = sys.argv[1:]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(json.dumps({"missing": f"{name} is not installed"}))
        return
    values_TLS = np.load(path)
    (count, took), read = PEERS[name](values_TLS, float(seconds), Path(folder))
    began = time.perf_counter()
    found = read()
    read_seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    answer = {
        "shown": SHOWN[name].format(version),
        "steps": count,
        "points": count * values_TLS[0].size,
        "seconds": took,
        "bytes": size,
        "read_points": found,
        "read_seconds": read_seconds,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
