"""Keeps verdicts and their history fresh while batches arrive, and tells of new warnings.

One background thread, which costs a bounded share of the processor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from service import history, windows
from service.diagnosis.finding import Diagnosis, Warned
from service.errors import NotFound
from service.store import Store
from service.webhook import news_of

log = logging.getLogger(__name__)

SHARE: Final = 0.05
"""Most of the time that is spent on the diagnoses of one run: one that takes 0.1 s comes every 2 s."""

KEPT: Final = 256
"""Runs whose newest diagnosis is kept in memory; others are diagnosed when someone looks."""


class Diagnoser:
    """Diagnoses the runs it is told of, each at most every `least_seconds`; an acknowledgement never waits for it.

    Args:
        store: of the runs.
        least_seconds: between two diagnoses of a run.
        tell: takes what `webhook.news_of` makes of a new warning, at once; None: nobody is told.
    """

    def __init__(
        self, store: Store, least_seconds: float, tell: Callable[[dict[str, object]], None] | None = None
    ) -> None:
        self._store = store
        self._tell = tell
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

    def warnings(self, run_id: str) -> tuple[Warned, ...]:
        """The warnings of the newest diagnosis that was computed here, worst first."""
        found = self.latest(run_id)
        return () if found is None else found.warnings()

    def latest(self, run_id: str) -> Diagnosis | None:
        """The newest diagnosis that was computed here."""
        return self._latest.get(run_id)

    def _loop(self) -> None:
        while (run_id := self._next()) is not None:
            began = time.monotonic()
            try:
                found = self._diagnosed(run_id)
                self._latest.pop(run_id, None)  # the newest stands last
                self._latest[run_id] = found
                if len(self._latest) > KEPT:
                    self._latest.pop(next(iter(self._latest)))
            except NotFound:  # deleted meanwhile
                self._latest.pop(run_id, None)
            except Exception:
                log.exception("run %s could not be diagnosed", run_id)
            now = time.monotonic()
            self._rest = {run: until for run, until in self._rest.items() if until > now}
            self._rest[run_id] = now + max(self._least_seconds, (now - began) * (1 / SHARE - 1))

    def _diagnosed(self, run_id: str) -> Diagnosis:
        found = windows.diagnosis(self._store, run_id)
        found, news = history.note(self._store, found)
        run = self._store.record(run_id)
        if self._tell is not None and run is not None:
            for code in news:
                self._tell(news_of(found, run.record.name, code))
        return found

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
