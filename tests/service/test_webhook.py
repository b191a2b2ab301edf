"""The webhook: news arrive in order, whatever the URL answers at first, and nobody waits for them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from synthetic import clustered_tables, create, run_record, scalar_rows, send

from service import webhook
from service.webhook import Webhook


class Receiver:
    """An HTTP server that keeps what it is sent and answers by a list of status codes, then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.got: list[dict[str, object]] = []
        waiting = list(statuses)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(waiting.pop(0) if waiting else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    receiver = Receiver(*statuses)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()


@contextmanager
def started(url: str) -> Iterator[Webhook]:
    made = Webhook(url, first_wait_seconds=0.001)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_refused_for_now_is_sent_again_and_order_is_kept() -> None:
    with receiving(503, 429, 500) as receiver, started(receiver.url) as hook:
        for number in range(3):
            hook.offer({"run": "r", "number": number})
        wait_for(lambda: len(receiver.got) == 6)

    assert [news["number"] for news in receiver.got] == [0, 0, 0, 0, 1, 2]


def test_what_is_refused_for_good_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    with receiving(404) as receiver, started(receiver.url) as hook:
        hook.offer({"run": "first"})
        hook.offer({"run": "second"})
        wait_for(lambda: len(receiver.got) == 2)

    assert [news["run"] for news in receiver.got] == ["first", "second"]
    assert "did not take news of run first: status 404" in caplog.text


def test_a_redirect_is_no_delivery_and_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    with receiving(302, 200) as receiver, started(receiver.url) as hook:
        hook.offer({"run": "first"})
        hook.offer({"run": "second"})
        wait_for(lambda: len(receiver.got) == 2)

    assert "did not take news of run first: status 302" in caplog.text


def test_nothing_is_waited_for_after_the_last_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TRIES", 1)
    with receiving(503) as receiver:
        hook = Webhook(receiver.url, first_wait_seconds=3600)
        hook.start()
        hook.offer({"run": "first"})
        hook.offer({"run": "second"})
        wait_for(lambda: len(receiver.got) == 2)  # an hour would pass between them
        hook.stop()


def test_without_an_answer_it_gives_up_after_some_tries_and_says_nothing_of_the_url(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with receiving() as receiver:
        url = f"{receiver.url}/secret"
        with started(url) as hook:
            hook.offer({"run": "taken"})
            wait_for(lambda: len(receiver.got) == 1)
    with started(url) as hook:
        hook.offer({"run": "r"})
        wait_for(lambda: "did not take news of run r: ConnectError" in caplog.text)

    assert "secret" not in caplog.text


def test_an_offer_never_waits_and_a_stop_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "QUEUE", 2)
    with receiving() as receiver:
        url = receiver.url
    hook = Webhook(url, first_wait_seconds=3600)  # nothing listens: the first try fails, the second comes in an hour
    for number in range(5):  # not started: the queue fills up
        hook.offer({"run": "r", "number": number})
    hook.start()
    hook.stop()  # returns, though an hour is to be waited


@contextmanager
def service(store: Path, hook: str) -> Iterator[httpx.Client]:
    """A service in a process of its own, stopped as a supervisor stops it."""
    command = [sys.executable, "-m", "service", "--port", "0", "--store", f"chdb://{store}"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "BRN_SERVICE_WEBHOOK": hook, "BRN_SERVICE_DIAGNOSIS_SECONDS": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with httpx.Client(base_url=process.stdout.readline().split()[2], timeout=30) as client:
            yield client
        process.terminate()
        assert process.wait(60) == 0


def diagnosed(client: httpx.Client, tables: dict[str, pa.Table], first_seq: int) -> None:
    """Sends rows, and a loss after another until the warnings of a diagnosis come back."""
    send(client, "a", tables, seq=first_seq).raise_for_status()
    deadline, seq = time.monotonic() + 60, first_seq + 1
    while not send(client, "a", {"scalars": scalar_rows({"loss": [(199 + seq, 1.0)]})}, seq=seq).json()["findings"]:
        assert time.monotonic() < deadline
        seq += 1


def test_a_service_that_is_started_again_posts_no_warning_a_second_time(tmp_path: Path) -> None:
    with receiving() as receiver:
        with service(tmp_path / "store", receiver.url) as client:
            create(client, run_record("a")).raise_for_status()
            diagnosed(client, clustered_tables(), 1)
            wait_for(lambda: "NH-CLUSTER" in {news["code"] for news in receiver.got})
            known = {entry["code"] for entry in client.get("/v1/runs/a/findings/history").json()["findings"]}
        first = [news["code"] for news in receiver.got]
        with service(tmp_path / "store", receiver.url) as client:
            diagnosed(client, {"scalars": scalar_rows({"loss": [(5000, 1.0)]})}, 10_000)

    assert "NH-CLUSTER" in known
    assert [news["code"] for news in receiver.got].count("NH-CLUSTER") == 1
    assert [news["code"] for news in receiver.got] == first
