"""Benchmarks that can be trusted: what `make bench` runs, and what the soak counts and promises."""

from __future__ import annotations

import queue
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from streams import Streams, layer_rows, make_window

from benchmarks import soak, verdicts
from service.diagnosis.rules import diagnose

ROOT = Path(__file__).parent.parent
REFUSED_SECONDS = 0.25


def test_make_bench_runs_every_benchmark_and_saves_its_table(tmp_path: Path) -> None:
    """The recipe itself, with a python that only writes down what it was told to run."""
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n', encoding="utf-8")
    python.chmod(0o755)
    recipe = ["make", "--assume-old", ".venv/.installed", "bench", f"BIN={tmp_path}"]
    subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True)
    ran = log.read_text(encoding="utf-8").splitlines()
    assert all(line.endswith(" --save") for line in ran)
    files = {ROOT / line.split()[0] for line in ran}
    scripts = {
        file
        for file in (ROOT / "benchmarks").glob("*.py")
        if re.search(r'add_argument\("--save"', file.read_text(encoding="utf-8"))
    }
    assert files == scripts - {ROOT / "benchmarks" / "soak.py"}, "what has a table to save"


class _Refusing(BaseHTTPRequestHandler):
    """Sends the first two requests away, takes the third."""

    seen: list[str]
    stop: threading.Event
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if len(self.seen) <= 2:
            self.close_connection = True  # without a word, as one that is killed
            return
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(self.path)
        if len(self.seen) > 2:
            self.stop.set()
        self._answer(200 if len(self.seen) > 2 else 429)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("retry-after", str(REFUSED_SECONDS))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[tuple[type[_Refusing], int]]:
    """A service that refuses twice, and its port."""
    handler = type("Handler", (_Refusing,), {"seen": [], "stop": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield handler, server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_a_batch_of_the_soak_waits_from_when_it_was_due_until_it_is_taken(
    refusing: tuple[type[_Refusing], int],
) -> None:
    handler, port = refusing
    begin, answers = threading.Event(), queue.SimpleQueue[soak.Sent]()
    begin.set()
    soak.rank_process(port, 0, begin, handler.stop, answers)
    sent = answers.get_nowait()
    assert handler.seen == ["/v1/runs/bench/batches?rank=0&seq=0"] * 3
    assert (sent.batches, sent.again) == (1, 2)
    assert sent.waited[0] >= sent.took[0] + 2 * REFUSED_SECONDS, "the time of both refusals is in it"


def test_a_reader_of_the_soak_waits_from_when_it_first_asked_until_it_has_an_answer(
    refusing: tuple[type[_Refusing], int],
) -> None:
    handler, port = refusing
    reader = soak.Reader(f"http://127.0.0.1:{port}")
    with httpx.Client(base_url=reader.url, trust_env=False) as client:
        reader.ask(client, "/")
    assert handler.seen == ["/"] * 3
    assert reader.failed == []
    assert len(reader.waited) == 1
    assert reader.waited[0] >= reader.took[0] + 2 * soak.RETRY_SECONDS, "the time of both outages is in it"


KEPT: dict[str, Any] = {
    "lost": 0,
    "doubled": 0,
    "failed": [],
    "events": 9,
    "exit_code": 0,
    "rss_mb": 900.0,
    "slope_life": 0.5,
    "slope_lives": None,
}


def test_a_soak_that_keeps_every_promise_has_nothing_to_say() -> None:
    assert soak.broken(KEPT) == []


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"lost": 1}, "1 rows lost"),
        ({"doubled": 3}, "3 doubled"),
        ({"failed": ["/runs/bench: 500"]}, "/runs/bench: 500"),
        ({"events": 0}, "no event"),
        ({"exit_code": -9}, "exit code -9"),
        ({"rss_mb": 1501.0}, "1501 MB"),
        ({"slope_life": 400.0}, "400.0 MB a minute in its last life"),
        ({"slope_lives": 400.0}, "400.0 MB a minute from life to life"),
    ],
)
def test_a_soak_says_which_promise_is_broken(measured: dict[str, Any], says: str) -> None:
    (said,) = soak.broken(KEPT | measured)
    assert says in said


def test_the_reader_of_the_soak_asks_for_pages_that_there_are(client: httpx.Client) -> None:
    soak.create(client, 1)
    try:
        assert {page: client.get(page).status_code for page in soak.PAGES} == dict.fromkeys(soak.PAGES, 200)
    finally:
        client.delete("/v1/runs/bench").raise_for_status()


def test_the_soak_takes_its_slopes_where_memory_has_settled() -> None:
    long = soak.SETTLED_SECONDS + soak.WINDOW_SECONDS + 1

    def life(seconds: float, mb: Callable[[float], float]) -> list[tuple[float, float]]:
        return [(float(age), mb(age)) for age in range(round(seconds))]

    filling = life(100, lambda age: 100 + 5 * age)  # as any young one
    warm = life(long, lambda age: 100.0 if age < soak.SETTLED_SECONDS else 500.0)
    rising = life(long, lambda age: 500 + age / 60)  # 1 MB a minute
    assert soak._slopes([filling, warm]) == (pytest.approx(0), None)
    assert soak._slopes([filling] * 4 + [rising]) == (pytest.approx(1), pytest.approx(0))
    more = [life(120, lambda age, number=number: 400.0 + 2 * number) for number in range(4)]
    assert soak._slopes([*more, warm])[1] == pytest.approx(1, rel=0.02), "2 MB from life to life of two minutes"
    empty = life(120, lambda age: 50.0)
    assert soak._slopes([empty, *[filling] * 3, filling]) == (None, pytest.approx(0)), "from the second life on"


# -------- verdicts


def test_a_run_cut_off_is_judged_as_it_was_then() -> None:
    window = make_window(
        probe=Streams().few_labels(1, labels=2),
        columns=layer_rows(1, steps=600),
        kinds=("BatchNorm",),
        scalars={"loss": (range(600), [1.0] * 600)},
    )
    cut = verdicts.until(window, 230)
    assert cut.last_step == cut.probe.steps_T[-1] == cut.rows.steps_T[-1] == cut.scalars["loss"].steps_T[-1] == 229
    before = diagnose(cut)
    assert before.step == 229
    assert all(finding.steps[1] < 230 for finding in before.findings)
    assert verdicts.until(verdicts.opening(1, 0.03), 200).opening is None, "the limits are closed until step 200"


def test_a_delay_is_what_a_reader_of_the_live_run_waits() -> None:
    """Not the first step of what the finished run says, which is the onset itself for a silent rank."""
    silent = verdicts.silent_rank(1)
    window = make_window(probe=silent)
    (finding,) = [f for f in diagnose(window).findings if f.code == "NH-MISSING"]
    assert finding.steps[0] <= verdicts.ONSET
    waited = verdicts.waited(window, "NH-MISSING", verdicts.ONSET)
    assert waited is not None
    assert waited > 100, "a rank may lag by 100 rows"
    assert verdicts.waited(window, "NH-CLUSTER", verdicts.ONSET) is None


def test_a_clean_run_that_warned_on_its_way_counts_as_a_false_alarm() -> None:
    first, then = (layer_rows(1, n=n, steps=300, rho=0.3) for n in (2, 32))
    columns = {name: np.concatenate([first[name], then[name]]) for name in first}
    columns["samples"][:] = 32  # the finished run would warn of uneven batches
    window = make_window(columns=columns, kinds=("BatchNorm",))
    assert not verdicts.loud(window), "NH-SMALL is over"
    done = verdicts.Tally()
    done.add(window, None, 0, 0, None)
    assert (done.found, done.others) == (1, {"NH-SMALL": 1})
