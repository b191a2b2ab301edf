"""The webhook: news arrive in order, whatever the URL answers at first, and nobody waits for them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

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
