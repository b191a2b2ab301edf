"""Telling one URL of new warnings, from a thread of its own: nobody waits for it, an outage costs no more than news.

The body is JSON; its `text` is one line, which chat services show as it is.
"""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress
from typing import Final

import httpx

from service.diagnosis.finding import Diagnosis

log = logging.getLogger(__name__)

THREAD: Final = "webhook"
# httpx logs every request with its URL, which may hold a secret
logging.getLogger("httpx").addFilter(lambda record: record.threadName != THREAD)

QUEUE: Final = 1000
"""News that may wait while the URL does not answer; what comes beyond is dropped, and logged."""

TRIES: Final = 8
FIRST_WAIT_SECONDS: Final = 1.0
"""Before the second try; it doubles from try to try, so the last comes after two minutes; none follows the last."""

TIMEOUT_SECONDS: Final = 10.0


class Webhook:
    """Posts what it is offered, in order, each until it is taken or `TRIES` times.

    Args:
        url: takes JSON by POST; an answer of 200 to 299 is an acknowledgement, another below 500 a refusal for good
            (a redirect too: it would carry the news to an address nobody set).
        first_wait_seconds: before the second try.
    """

    def __init__(self, url: str, *, first_wait_seconds: float = FIRST_WAIT_SECONDS) -> None:
        self._url = url
        self._first_wait_seconds = first_wait_seconds
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue(QUEUE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=THREAD, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leaves what waits; returns when the try that runs is over."""
        self._stopping.set()
        with suppress(queue.Full):  # then the thread does not wait for news, and sees that it is to stop
            self._queue.put_nowait(None)
        if self._thread.is_alive():
            self._thread.join()

    def offer(self, news: dict[str, object]) -> None:
        """Puts news into the queue, or drops it where the queue is full. Never waits."""
        try:
            self._queue.put_nowait(news)
        except queue.Full:
            log.warning("the webhook is %d news behind: dropped one of run %s", QUEUE, news["run"])

    def _loop(self) -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
            while not self._stopping.is_set() and (news := self._queue.get()) is not None:
                self._deliver(client, news)

    def _deliver(self, client: httpx.Client, news: dict[str, object]) -> None:
        wait, said = self._first_wait_seconds, ""
        for attempt in range(TRIES):
            try:
                answer = client.post(self._url, json=news)
            except httpx.HTTPError as error:
                said = type(error).__name__  # its text may hold the URL, and that a secret
            else:
                if answer.is_success:
                    return
                said = f"status {answer.status_code}"
                if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                    break
            if attempt < TRIES - 1:
                if self._stopping.wait(wait):
                    return
                wait *= 2
        log.warning("the webhook did not take news of run %s: %s", news["run"], said)


def news_of(diagnosis: Diagnosis, name: str, code: str) -> dict[str, object]:
    """What is posted of one finding."""
    finding = next(finding for finding in diagnosis.findings if finding.code == code)
    remedy = finding.remedy
    return {
        "text": f"{name} ({diagnosis.run}), step {diagnosis.step}: {finding.severity} {code}. {finding.summary}",
        "run": diagnosis.run,
        "name": name,
        "step": diagnosis.step,
        "code": code,
        "severity": finding.severity,
        "summary": finding.summary,
        "since": finding.since,
        "steps": list(finding.steps),
        "remedy": None if remedy is None else {"text": remedy.text, "code": remedy.code},
        "findings": f"/v1/runs/{diagnosis.run}/findings",
    }
