"""Does the service hold up for long, killed again and again? Memory, lost rows, and how long ranks and readers wait.

    python benchmarks/soak.py [--minutes 30] [--kill-seconds 120] [--save]

Eight rank processes each send a batch of 20 steps x 54 layers with every column once a second, and after an outage what
is due since, as fast as it is taken; one that was not acknowledged is sent again. A reader asks what a browser asks of
a run's pages and their figures, over and over, and holds an event stream open. For two thirds of the time the service
is killed (SIGKILL) at regular intervals and started again on the same store; its last life then lasts a third. At the
end, each acknowledged row is looked for.

What ranks and readers wait counts from when a batch was due, or a page first asked for, until it was taken or answered:
outages, refusals and what queued up behind them are in it. The last request alone says how fast the service is.

Memory is the resident one of the service, and must be flat in two ways: from the end of one life to the end of the
next, while the store grows, and within the last life once that is some minutes old. Not within lives of two minutes,
which says nothing: what merges and queries hold for a moment moves readings by 150 to 230 MB, so slopes of ten such
lives over their last 40 s lay between -96 and +236 MB a minute (standard deviation 115), and the median of fourteen was
+60 in one soak and -4 in the next one, of the same code.

The exit code is 1 if a promise of the table's last column is broken; stderr says which.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from brn_core import wire
from service.settings import Settings
from service.store import Store

if __package__:
    from benchmarks.ingest import LAYERS, RANKS, STEPS, TARGETS, create, resident_mb, tables
else:  # run as a script
    from ingest import LAYERS, RANKS, STEPS, TARGETS, create, resident_mb, tables

PERIOD_SECONDS = 1.0
"""Between two batches of a rank: 20 recorded steps a second."""
READ_SECONDS = 1.0
"""Between two rounds of the reader."""
RETRY_SECONDS = 0.2
"""Before a page is asked for again, or a batch sent again, that met no service."""
KILLED = 2 / 3
"""Share of the time for which the service is killed; its last life lasts for the rest."""
SETTLED_SECONDS = 180.0
"""Age at which a life has filled its caches."""
WINDOW_SECONDS = 240.0
"""Least time over which a slope says something."""
FLAT = {"slope_life": 20.0, "slope_lives": 5.0}
"""MB a minute that memory may rise and count as flat: a slope over seven minutes is uncertain by some 4."""
PAGES = (
    "/",
    "/runs/bench",
    "/runs/bench/fragment",
    *(f"/runs/bench/figures/{name}?theme=light" for name in ("schedule", "heatmap", "causes", "scalars")),
    "/runs/bench/ranks",
    *(f"/runs/bench/figures/{name}?theme=light" for name in ("ranks", "rank-curves")),
    "/v1/runs",
    "/v1/runs/bench/findings",
    "/v1/runs/bench/series?stat=r_q95&stat=clip_r&layer=0&points=400",
)
"""What a browser fetches of a run and of its ranks, and a script besides."""
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Sent:
    """What one rank has to say at the end."""

    batches: int
    waited: list[float]
    """Seconds from when a batch was due until it was acknowledged."""
    took: list[float]
    """Seconds of the request that was acknowledged."""
    again: int
    """Requests that were not."""


def rank_process(port: int, rank: int, begin: Any, stop: Any, answers: Any) -> None:
    """Sends until `stop`, and the last batch until it is acknowledged; puts a `Sent`."""
    rng = np.random.default_rng(rank)
    waited: list[float] = []
    took: list[float] = []
    seq, again = 0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begin.wait(600)
    began = time.monotonic()
    while not stop.wait(max(0.0, (due := began + seq * PERIOD_SECONDS) - time.monotonic())):
        body = wire.encode_batch(tables(rng, 1 + STEPS * seq))
        path = f"/v1/runs/bench/batches?rank={rank}&seq={seq}"
        while True:
            sent = time.monotonic()
            try:
                connection.request("POST", path, body, {"Content-Type": wire.MEDIA_TYPE})
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                again += 1
                time.sleep(RETRY_SECONDS)
                continue
            if answer.status == 200:
                now = time.monotonic()
                took.append(now - sent)
                waited.append(now - due)
                break
            if answer.status not in (429, 503, 507):
                raise RuntimeError(f"rank {rank}, batch {seq}: {answer.status} {answer.reason}")
            again += 1
            time.sleep(float(answer.headers.get("retry-after", 1)))
        seq += 1
    connection.close()
    answers.put(Sent(seq, waited, took, again))


@dataclass
class Reader:
    """A browser on the run's pages: asks for each in turn, again where nobody answers, and follows the events."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    waited: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    events: int = 0

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._listen)]
        for thread in threads:
            thread.start()
        return threads

    def _read(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self.stop.wait(READ_SECONDS):
                for page in PAGES:
                    self.ask(client, page)

    def ask(self, client: httpx.Client, page: str) -> None:
        """Asks until there is an answer or the soak is over; one that is no success counts as failed."""
        first = time.monotonic()
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                answer = client.get(page)
            except httpx.TransportError:  # the service was killed
                self.stop.wait(RETRY_SECONDS)
                continue
            now = time.monotonic()
            self.took.append(now - began)
            self.waited.append(now - first)
            if not answer.is_success:
                self.failed.append(f"{page}: {answer.status_code}")
            return

    def _listen(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self.stop.wait(READ_SECONDS):
                with suppress(httpx.TransportError), client.stream("GET", "/v1/runs/bench/events") as stream:
                    for line in stream.iter_lines():
                        self.events += line.startswith("event:")
                        if self.stop.is_set():
                            break


@dataclass
class Service:
    """`brn-serve` on one port and store, life after life; keeps (seconds of its life, MB) of each."""

    store: Path
    port: int
    lives: list[list[tuple[float, float]]] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "dashboard", "--port", str(self.port), "--store", f"chdb://{self.store}"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        if not process.stdout.readline().startswith("serving on"):
            raise RuntimeError("the service did not start")
        self.start_seconds.append(time.perf_counter() - began)
        return process

    def watch(self, process: subprocess.Popen[str], seconds: float) -> None:
        """Reads its memory until a life is over."""
        began, life = time.monotonic(), []
        while (age := time.monotonic() - began) < seconds:
            if process.poll() is not None:
                raise RuntimeError(f"the service ended by itself, exit code {process.returncode}")
            life.append((age, resident_mb(process.pid)))
            time.sleep(min(1.0, seconds - age))
        self.lives.append(life)


def soak(minutes: float, kill_seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        service = Service(Path(folder) / "store", port)
        return _soak(service, minutes * 60, kill_seconds)


def _soak(service: Service, seconds: float, kill_seconds: float) -> dict[str, Any]:
    url = f"http://127.0.0.1:{service.port}"
    context = multiprocessing.get_context("spawn")
    begin, stop, answers = context.Event(), context.Event(), context.Queue()
    ranks = [context.Process(target=rank_process, args=(service.port, k, begin, stop, answers)) for k in range(RANKS)]
    reader = Reader(url)
    process = service.start()
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            create(client, RANKS)
        for rank in ranks:
            rank.start()
        threads = reader.start()
        begin.set()
        began = time.monotonic()
        while time.monotonic() - began + kill_seconds <= seconds * KILLED:
            service.watch(process, kill_seconds)
            process.kill()
            process.wait()
            process = service.start()
        service.watch(process, max(began + seconds - time.monotonic(), 1.0))
        stop.set()
        reports: list[Sent] = [answers.get(timeout=300) for _ in ranks]
        for rank in ranks:
            rank.join()
        reader.stop.set()
        process.send_signal(signal.SIGTERM)
        ended = process.wait(120)
        for thread in threads:
            thread.join(120)
    finally:
        stop.set()
        process.kill()
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
    batches = sum(sent.batches for sent in reports)
    lost, doubled, disk = _compare(service.store, batches)
    settled, across = _slopes(service.lives)
    return {
        "minutes": seconds / 60,
        "kills": len(service.lives) - 1,
        "acknowledged": batches * STEPS * LAYERS,
        "lost": lost,
        "doubled": doubled,
        "again": sum(sent.again for sent in reports),
        "batch_waited_ms": _quantiles_ms([t for sent in reports for t in sent.waited]),
        "batch_took_ms": _quantiles_ms([t for sent in reports for t in sent.took]),
        "read_waited_ms": _quantiles_ms(reader.waited),
        "read_took_ms": _quantiles_ms(reader.took),
        "reads": len(reader.took),
        "failed": reader.failed,
        "events": reader.events,
        "rss_mb": max(mb for life in service.lives for _, mb in life),
        "last_seconds": service.lives[-1][-1][0],
        "slope_life": settled,
        "slope_lives": across,
        "start_seconds": max(service.start_seconds),
        "disk_mb": disk / 2**20,
        "exit_code": ended,
    }


def _quantiles_ms(seconds: list[float]) -> tuple[float, float, float]:
    """Median, p99 and the longest, in ms."""
    median, p99, longest = 1e3 * np.percentile(seconds, (50, 99, 100))
    return float(median), float(p99), float(longest)


def _compare(path: Path, batches: int) -> tuple[int, int, int]:
    """(rows of `layers` that were acknowledged and are not there, rows there twice, bytes on disk)."""
    store = Store(Settings(store=f"chdb://{path}"))
    try:
        found = store.rows(
            "SELECT count() AS n, uniqExact(rank, step, layer) AS once FROM layers WHERE run_id = 'bench'"
        )
        (row,) = found.to_pylist()
        return batches * STEPS * LAYERS - row["once"], row["n"] - row["once"], store.size_bytes()
    finally:
        store.close()


def _slopes(lives: list[list[tuple[float, float]]]) -> tuple[float | None, float | None]:
    """MB a minute within the last life once it has settled, and from last quarter to last quarter of those before it.

    The first is None where the last life is too short. The second is without the first life, whose store was empty, and
    None with fewer than three others.
    """
    within = across = None
    age, mb = np.array(lives[-1]).T
    if age[-1] >= SETTLED_SECONDS + WINDOW_SECONDS:
        late = age >= SETTLED_SECONDS
        within = float(np.polyfit(age[late] / 60, mb[late], 1)[0])
    killed = [np.array(life).T for life in lives[:-1]]
    if len(killed) >= 4:
        ends = [float(np.median(mb[age >= age[-1] * 3 / 4])) for age, mb in killed]
        minutes = np.cumsum([age[-1] for age, _ in killed]) / 60
        across = float(np.polyfit(minutes[1:], ends[1:], 1)[0])
    return within, across


def broken(found: dict[str, Any]) -> list[str]:
    """The promises that this soak did not keep, a sentence each."""
    said = []
    if found["lost"] or found["doubled"]:
        said.append(f"{found['lost']:,} rows lost, {found['doubled']:,} doubled; not one may be")
    if found["failed"]:
        said.append(f"{len(found['failed'])} answers to the reader failed, the first: {found['failed'][0]}")
    if not found["events"]:
        said.append("the reader was told of no event")
    if found["exit_code"] != 0:
        said.append(f"the clean stop ended with exit code {found['exit_code']}, not 0")
    if found["rss_mb"] > TARGETS["rss_mb"]:
        said.append(f"memory reached {found['rss_mb']:.0f} MB, more than {TARGETS['rss_mb']:.0f}")
    for name, where in (("slope_life", "in its last life"), ("slope_lives", "from life to life")):
        if found[name] is not None and found[name] > FLAT[name]:
            said.append(f"memory rose by {found[name]:.1f} MB a minute {where}, more than {FLAT[name]:g}")
    return said


def _slope(mb_a_minute: float | None) -> str:
    return "too short to say" if mb_a_minute is None else f"{mb_a_minute:+.1f}"


def report(found: dict[str, Any], kill_seconds: float) -> str:
    waits = [
        (f"{what}, {of}: median, p99, longest, ms", " / ".join(f"{ms:,.0f}" for ms in found[name]), "")
        for what, of, name in (
            ("one batch", "from when it was due", "batch_waited_ms"),
            ("one batch", "its last request alone", "batch_took_ms"),
            ("one answer to the reader", "from when it first asked", "read_waited_ms"),
            ("one answer to the reader", "its last request alone", "read_took_ms"),
        )
    ]
    rows = [
        ("rows of `layers` acknowledged", f"{found['acknowledged']:,}", ""),
        ("rows lost", f"{found['lost']:,}", "0"),
        ("rows doubled", f"{found['doubled']:,}", "0"),
        ("times the service was killed", f"{found['kills']}", ""),
        ("batches sent again", f"{found['again']:,}", ""),
        *waits,
        ("answers to the reader", f"{found['reads']:,}", ""),
        ("of them failed", f"{len(found['failed'])}", "0"),
        ("events it was told", f"{found['events']:,}", "> 0"),
        ("resident memory, peak, MB", f"{found['rss_mb']:.0f}", f"<= {TARGETS['rss_mb']}"),
        ("its slope from life to life, MB a minute", _slope(found["slope_lives"]), f"<= {FLAT['slope_lives']:g}"),
        (
            f"its slope in the last life, from {SETTLED_SECONDS:g} to {found['last_seconds']:.0f} s, MB a minute",
            _slope(found["slope_life"]),
            f"<= {FLAT['slope_life']:g}",
        ),
        ("slowest start, s", f"{found['start_seconds']:.1f}", ""),
        ("store on disk, MB", f"{found['disk_mb']:,.0f}", ""),
        ("exit code of the clean stop", f"{found['exit_code']}", "0"),
    ]
    return "\n".join(
        [
            f"# Soak, {datetime.now(UTC):%Y-%m-%d}",
            "",
            f"`python benchmarks/soak.py --minutes {found['minutes']:g} --kill-seconds {kill_seconds:g}`: {RANKS} "
            f"ranks, each {STEPS} steps x {LAYERS} layers x {len(wire.METRICS)} statistics every {PERIOD_SECONDS:g} s, "
            f"one reader, {os.cpu_count()} cores for all of them.",
            "",
            "| | measured | wanted |",
            "|---|---|---|",
            *(f"| {what} | {value} | {wanted} |" for what, value, wanted in rows),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30, help="length of the soak")
    parser.add_argument("--kill-seconds", type=float, default=120, help="between two kills")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    options = parser.parse_args()
    found = soak(options.minutes, options.kill_seconds)
    text = report(found, options.kill_seconds)
    print(text)
    if options.save:
        (RESULTS / f"soak-{datetime.now(UTC):%Y-%m-%d}.md").write_text(text, encoding="utf-8")
    for promise in broken(found):
        print(f"broken: {promise}", file=sys.stderr)
    return int(bool(broken(found)))


if __name__ == "__main__":
    sys.exit(main())
