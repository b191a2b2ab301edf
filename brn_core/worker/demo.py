"""`make demo`: the service, two short runs on real images, and what the service found in each.

Both runs are the same network on the same images with the same Batch Renormalization, on two ranks. One gets i.i.d.
batches; in the other every batch holds two of the ten digits. Nothing is hard-coded: the findings are asked for over
REST, as anybody would.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import httpx
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from brn_core.worker.findings import Diagnosis, FindingsUnavailableError, fetch_diagnosis, print_diagnosis, run_url
from brn_core.worker.ranks import EXIT_FAILED, EXIT_INTERRUPTED

DEFAULT_PORT: Final = 8321
STEPS: Final = 500
RANKS: Final = 2
_READY_SECONDS: Final = 60.0
_FINDINGS_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Regime:
    """One of the demo's runs."""

    name: str
    title: str
    flags: tuple[str, ...]


REGIMES: Final = (
    Regime("iid", "digits, i.i.d. batches", ("--sampler", "iid")),
    Regime("few-labels", "digits, 2 labels a batch", ("--sampler", "few-labels", "--labels-per-batch", "2")),
)


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m brn_core.worker.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the findings instead of serving on")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the dashboard (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="store, spool, log (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        demo(console, options.folder, options.port, once=options.once)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        console.print("ended")
        return EXIT_INTERRUPTED
    return 0


def demo(console: Console, folder: Path, wanted_port: int, *, once: bool) -> None:
    """Serves, trains twice, prints what was found; then serves on until Ctrl-C, or ends (`once`).

    Raises:
        DemoError: the service or a training run failed.
    """
    port = free_port(wanted_port)
    if wanted_port not in (0, port):
        console.print(f"port {wanted_port} is taken: using {port}", highlight=False)
    started = time.monotonic()
    with service(folder, port) as (url, process):
        console.print(Text.assemble("dashboard: ", (url, "bold cyan")))
        # new ids at each start: the store remembers earlier demos
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        runs = {regime: f"{regime.name}-{stamp}" for regime in REGIMES}
        for regime, run_id in runs.items():
            console.print(Rule(regime.title, align="left"))
            _train(regime, run_id, url, folder / "spool")
        for regime, run_id in runs.items():
            _show(console, regime, url, run_id)
        console.print(f"\n{time.monotonic() - started:.0f} s", highlight=False)
        if once:
            return
        console.print(Text.assemble("still serving at ", (url, "bold cyan"), ", Ctrl-C ends it"))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            return
        raise DemoError(f"the service ended by itself with exit code {code}: see {folder / 'service.log'}")


def free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else a free one (of 127.0.0.1)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a server that just ended is free
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service(folder: Path, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`brn-serve` as a process of its own for the time of a `with`, ready to answer; yields its URL.

    Raises:
        DemoError: it ended or did not get ready in time; with the last line it wrote.
    """
    log = folder / "service.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror}; name another --folder") from error
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BRN_")}
    environment |= {
        "BRN_SERVICE_STORE": f"chdb://{folder / 'store'}",
        "BRN_SERVICE_HOST": "127.0.0.1",
        "BRN_SERVICE_PORT": str(port),
    }
    with output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dashboard"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C ends training first; the service is ended below, after its last rows
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
            raise DemoError(f"the service did not start: {lines[-1]}")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.1)
    raise DemoError(f"the service was not ready after {_READY_SECONDS:.0f} s: see {log}")


def training_flags(regime: Regime, run_id: str, url: str, spool: Path) -> list[str]:
    """What `brn-train` is told for a regime."""
    return [
        *("--dataset", "digits", "--norm", "brn", "--ranks", str(RANKS), "--steps", str(STEPS), "--device", "cpu"),
        *("--shadow-every", "20"),  # the train-inference gap is judged on 10 passes after 25 time constants
        *("--url", url, "--spool", str(spool), "--run-id", run_id, "--run-name", regime.title, "--no-summary"),
        *regime.flags,
    ]


def _train(regime: Regime, run_id: str, url: str, spool: Path) -> None:
    """Runs `brn-train` on this terminal.

    Raises:
        DemoError: it failed.
    """
    command = [sys.executable, "-m", "brn_core.worker", *training_flags(regime, run_id, url, spool)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BRN_")}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # where only this process was interrupted; on a terminal it was as well
        process.wait()
        raise
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        raise DemoError(f"training {regime.title!r} failed with exit code {code}")


def _show(console: Console, regime: Regime, url: str, run_id: str) -> None:
    """Accuracy and findings of a finished run.

    Raises:
        DemoError: the service does not give them.
    """
    try:
        diagnosis = fetch_diagnosis(url, run_id, through_step=STEPS - 1, timeout_seconds=_FINDINGS_SECONDS)
        accuracy = _last_accuracy(url, run_id)
    except (FindingsUnavailableError, httpx.HTTPError) as error:
        raise DemoError(f"no findings of {regime.title!r}: {error}") from error
    show(console, regime.title, accuracy, diagnosis)
    console.print(Text(run_url(url, run_id), style="dim"))


def show(console: Console, title: str, accuracy: float, diagnosis: Diagnosis) -> None:
    console.print()
    console.print(Rule(f"{title}: test accuracy {accuracy:.1%}, {diagnosis.verdict.code}", align="left"))
    print_diagnosis(console, diagnosis)


def _last_accuracy(url: str, run_id: str) -> float:
    answer = httpx.get(f"{url}/v1/runs/{run_id}/scalars", params={"name": "eval_accuracy"}).raise_for_status().json()
    return float(answer["series"]["eval_accuracy"]["mean"][-1])


if __name__ == "__main__":
    sys.exit(main())
