"""Keeps verdicts fresh while batches arrive, in one background thread that costs a bounded share of the processor."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from service import query
from service.diagnosis.finding import Diagnosis
from service.errors import NotFound
from service.store import Store

log = logging.getLogger(__name__)

SHARE: Final = 0.05
"""Most of the time that is spent on the diagnoses of one run: one that takes 0.1 s comes every 2 s."""


class Diagnoser:
    """Diagnoses the runs it is told of, each at most every `least_seconds`; an acknowledgement never waits for it."""

    def __init__(self, store: Store, least_seconds: float) -> None:
        self._store = store
        self._least_seconds = least_seconds
        self._wake = threading.Condition()
        self._due: dict[str, float] = {}  # runs to diagnose, and when
        self._rest: dict[str, float] = {}  # runs diagnosed lately, and until when they rest
        self._latest: dict[str, Diagnosis] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="diagnoser", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the diagnosis that is being computed, no longer."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def touch(self, run_id: str) -> None:
        """Says that there is news of a run."""
        with self._wake:
            self._due.setdefault(run_id, max(time.monotonic(), self._rest.get(run_id, 0.0)))
            self._wake.notify()

    def latest(self, run_id: str) -> Diagnosis | None:
        """The newest diagnosis that was computed here."""
        return self._latest.get(run_id)

    def _loop(self) -> None:
        while (run_id := self._next()) is not None:
            began = time.monotonic()
            try:
                self._latest[run_id] = query.diagnosis(self._store, run_id)
            except NotFound:  # deleted meanwhile
                self._latest.pop(run_id, None)
            except Exception:
                log.exception("run %s could not be diagnosed", run_id)
            now = time.monotonic()
            self._rest = {run: until for run, until in self._rest.items() if until > now}
            self._rest[run_id] = now + max(self._least_seconds, (now - began) * (1 / SHARE - 1))

    def _next(self) -> str | None:
        """The run whose turn it is, when its turn comes; None when it is time to stop."""
        with self._wake:
            while not self._stopping:
                if not self._due:
                    self._wake.wait()
                    continue
                run_id = min(self._due, key=self._due.__getitem__)
                wait = self._due[run_id] - time.monotonic()
                if wait <= 0:
                    del self._due[run_id]
                    return run_id
                self._wake.wait(wait)
            return None
