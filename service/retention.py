"""What is kept for how long: runs by age, old steps thinned out. One background thread, once an hour."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import Final

from service.errors import ServiceError
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)

KEEP_TAG: Final = "keep"
"""A run with this tag is neither deleted nor thinned out."""

INTERVAL_SECONDS: Final = 3600.0


def apply(store: Store, settings: Settings, now: datetime) -> None:
    """Deletes the runs that are too old, and thins out the steps that are."""
    extents = store.extents()
    old = []
    for run in store.records():
        if KEEP_TAG in run.record.tags:
            continue
        run_id = run.record.id
        extent = extents.get(run_id)
        newest = max(run.changed_at, extent.received_at) if extent and extent.received_at else run.changed_at
        if settings.keep_days is not None and newest < now - timedelta(days=settings.keep_days):
            old.append(run_id)
        elif settings.thin_days is not None and extent is not None:
            before = now - timedelta(days=settings.thin_days)
            if last_step := store.thin(run_id, before, settings.thin_every):
                log.info("run %s: one in %d steps up to %d is kept", run_id, settings.thin_every, last_step)
    if old:
        store.delete_runs(old)
        log.info("%d runs were deleted, to which nothing came for %g days: %s", len(old), settings.keep_days, old)


class Retention:
    """Applies the settings now and then; does nothing where none is set."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="retention", daemon=True)

    def start(self) -> None:
        if self._settings.keep_days is not None or self._settings.thin_days is not None:
            self._thread.start()

    def stop(self) -> None:
        """Waits for the pass that runs, no longer."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            try:
                apply(self._store, self._settings, datetime.now(UTC))
            except ServiceError as error:
                log.warning("old runs are still there: %s", error.detail)
            except Exception:
                log.exception("old runs are still there")
            self._stopping.wait(INTERVAL_SECONDS)
