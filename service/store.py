"""The store: what is written and read, behind one class.

engine     connections to ClickHouse's dialect, embedded (chDB) or on a server
tables     their statements, and the way from older versions
runs       what each run says of itself, and how far its rows reach
journal    batches on disk before the engine has them (embedded)
batches    taken, each once, and brought into the engine
recent     the newest rows of live runs, kept in memory for their diagnosis
removal    deleted runs, old steps
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import pyarrow as pa

from brn_core.wire import RunCreate, RunStatus
from service.batches import Batch, Batches, Outcome
from service.diagnosis.finding import Diagnosis, Verdict
from service.engine import Engine, beside, cannot_start
from service.errors import ServiceError, StoreFull
from service.journal import Journal
from service.memo import Memo
from service.recent import RecentRuns
from service.removal import Removal
from service.runs import Extent, Runs, StoredRun
from service.settings import Settings
from service.tables import bring_up_to_date

__all__ = ["Batch", "Extent", "Outcome", "Store", "StoredRun"]


class Store:
    """The rows of all runs. Safe to use from many threads.

    What is read has all that was written before, also where the engine gets it a moment later: see `service.batches`.

    Raises:
        CannotStart: on opening, when the store is locked, not writable, not reachable, or of a newer version.
    """

    def __init__(self, settings: Settings) -> None:
        self.engine = Engine(settings)
        self.diagnoses: Memo[Diagnosis] = Memo(size=256)
        self.recent = RecentRuns()
        self.listed: Memo[Any] = Memo(size=2048)  # runs as they are listed, see `answers.records`
        self._path = settings.store_path
        self._min_free_bytes = settings.min_free_bytes
        self._batches: Batches | None = None
        try:
            with cannot_start(settings):
                bring_up_to_date(self.engine, None if self._path is None else beside(self._path, "unfinished"))
                self._runs = Runs(self.engine)
                self._removal = Removal(self.engine, self._runs)
                self._removal.finish()
                journal = None if self._path is None else Journal(beside(self._path, "journal"))
                self._batches = Batches(self.engine, self._runs, journal)
                self._batches.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Waits for the statements that run, then lets go of the store and its lock."""
        if self._batches is not None:
            self._batches.close()
        self.engine.close()

    # -------- reading

    def rows(self, sql: str, **parameters: Any) -> pa.Table:
        """The answer to a query; `{name:Type}` in it stands for the parameter `name`.

        With a parameter `run` it is about this run alone.
        """
        self.settle(parameters.get("run"))
        return self.engine.rows(sql, **parameters)

    def settle(self, run_id: str | None = None) -> None:
        """Has the engine take what was put so far, of a run or of all: `engine.rows` then finds it."""
        with suppress(ServiceError):  # a full disk does not keep anyone from reading what the engine has
            self._taken.settle(run_id)

    def record(self, run_id: str) -> StoredRun | None:
        """What a run says of itself, and its last verdict; None where there is no such run."""
        return self._runs.record(run_id)

    def records_of(self, run_ids: Collection[str]) -> dict[str, StoredRun]:
        """What these runs say of themselves, by id; those that there are."""
        return self._runs.records_of(run_ids)

    def records(self) -> list[StoredRun]:
        """All runs, newest first, without their layers, which may be many."""
        return self._runs.records()

    def extent(self, run_id: str) -> Extent:
        """How far a run's rows reach."""
        return self._runs.extent(run_id)

    def extents_of(self, run_ids: Collection[str]) -> dict[str, Extent]:
        """How far the rows of these runs reach, by id; of those that have any."""
        return self._runs.extents_of(run_ids)

    def extents(self) -> dict[str, Extent]:
        """How far the rows of every run that has any reach."""
        return self._runs.extents()

    def changes(self, run_id: str) -> int:
        """A number that differs from the last one means that there may be news of a run."""
        if not self.engine.embedded:  # others may have written: look once a second
            return int(time.monotonic())
        return self._runs.changes(run_id)

    def size_bytes(self) -> int:
        """Bytes of all rows on disk, compressed."""
        sql = "SELECT sum(bytes_on_disk) AS n FROM system.parts WHERE active AND database = currentDatabase()"
        return int(self.rows(sql).column("n")[0].as_py())

    # -------- writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds off other writers, for what reads, decides and then writes. Takes a lock."""
        with self.engine.writing():
            yield

    def put_run(self, record: RunCreate, status: RunStatus, created_at: datetime) -> None:
        """Stores a run's record; the newest one stands.

        Raises:
            Invalid: a text in it is no Unicode.
            StoreFull, Unavailable: nothing was stored.
        """
        self._check_space()
        self._removal.remove([record.id])  # else the rows of its former life would be its own
        with self.writing():
            self._runs.put(record, status, created_at)

    def put_verdict(self, run_id: str, verdict: Verdict) -> None:
        """Stores the verdict that was just computed, unless its run was deleted meanwhile."""
        with self.writing():
            self._runs.put_verdict(run_id, verdict)

    def history(self, run_id: str) -> str | None:
        """The history of a run's findings, as it was put; None where there is none."""
        return self._runs.history(run_id)

    def histories_of(self, run_ids: Collection[str]) -> dict[str, str]:
        """The histories of these runs' findings, by id; of those that have one, read by one query."""
        return self._runs.histories_of(run_ids)

    def put_history(self, run_id: str, history: str) -> None:
        """Stores the history of a run's findings, unless its run was deleted meanwhile. Call it within `writing()`."""
        self._runs.put_history(run_id, history)

    def put_batches(self, batches: Sequence[Batch]) -> list[Outcome]:
        """Stores batches, each once; when this returns they are on disk.

        Raises:
            StoreFull, Unavailable: none of them is acknowledged; sent again they are stored, each once.
        """
        self._check_space()
        outcomes = self._taken.put(batches)
        self.recent.offer([batch for batch, outcome in zip(batches, outcomes, strict=True) if outcome == "stored"])
        return outcomes

    def delete_runs(self, run_ids: Collection[str]) -> None:
        """Deletes runs and all their rows. From the first moment on nothing of them can be seen or added.

        Should the process end half-way, the next one that opens the store goes on.
        """
        with self.writing():
            self._removal.expect(run_ids)
            self._taken.forget(run_ids)
        for run_id in run_ids:
            self.recent.forget(run_id)
        self._removal.remove(run_ids)

    def thin(self, run_id: str, before: datetime, every: int) -> int | None:
        """Keeps one in `every` steps of what came before a moment; see `Removal.thin`."""
        self._taken.settle(run_id)
        return self._removal.thin(run_id, before, every)

    @property
    def _taken(self) -> Batches:
        assert self._batches is not None, "the store is open"
        return self._batches

    def _check_space(self) -> None:
        if self._path is None:
            return
        free = shutil.disk_usage(self._path).free
        if free < self._min_free_bytes:
            raise StoreFull(
                f"the store's disk has {free} bytes left and {self._min_free_bytes} are kept free "
                "(BRN_SERVICE_MIN_FREE_BYTES): nothing was stored; free some space and send it again"
            )
