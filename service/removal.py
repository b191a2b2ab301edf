"""What leaves a store: deleted runs, with all their rows, and old steps. Batches are written meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from datetime import datetime
from typing import Final

import pyarrow as pa

from brn_core.wire import TABLES
from service.engine import Engine
from service.runs import Runs
from service.tables import RUN_TABLES

WHOLE_STEPS: Final = 2000
"""Newest recorded steps of a run that are never thinned out: as many as a diagnosis looks at."""

_THINNED: Final = pa.schema(
    {"run_id": pa.string(), "version": pa.uint64(), "last_step": pa.uint64(), "kept_every": pa.uint64()}
)


class Removal:
    """Removes rows; one removal at a time.

    Args:
        engine: its tables exist.
        runs: whose rows they are.
    """

    def __init__(self, engine: Engine, runs: Runs) -> None:
        self._engine = engine
        self._runs = runs
        self._lock = threading.Lock()
        self._deleted = set(runs.deleted())  # runs that are marked as deleted, some of whose rows may be left

    def finish(self) -> None:
        """Goes on with what the last process left half done."""
        self.remove(list(self._deleted))

    def expect(self, run_ids: Collection[str]) -> None:
        """Says that runs are marked as deleted."""
        self._deleted.update(run_ids)

    def remove(self, run_ids: Collection[str]) -> None:
        """Removes what is left of deleted runs. However many they are, the engine goes through each table once.

        Takes a lock only where something may be left: a removal may take long, and nobody else waits for it.
        """
        if self._engine.embedded and self._deleted.isdisjoint(run_ids):
            return
        with self._lock:
            if not self._engine.embedded:  # another replica may have broken off half-way
                self._deleted.update(self._runs.deleted())
            left = [run_id for run_id in run_ids if run_id in self._deleted]
            if not left:
                return
            for table in (*RUN_TABLES, "runs"):
                self._engine.remove(f"DELETE FROM {table} WHERE run_id IN {{runs:Array(String)}}", runs=left)
            self._free_space()
            self._deleted.difference_update(left)

    def thin(self, run_id: str, before: datetime, every: int) -> int | None:
        """Keeps one in `every` recorded steps of what came before a moment, and the rows of non-finite layers.

        Which ones is told by a hash of the step, so that it does not matter which steps were recorded (every tenth, or
        the odd ones), nor into how many rounds of thinning they fall.

        The newest steps, which a diagnosis looks at, stay whole, and so do scalars and snapshots.

        Returns:
            The newest step up to which it was done now; None where there was nothing to do.
        """
        last = self._last_to_thin(run_id, before)
        if last is None:
            return None
        sql = "SELECT last_step, kept_every FROM thinned FINAL WHERE run_id = {run:String}"
        done = self._engine.rows(sql, run=run_id).to_pylist()
        # With another setting, what was thinned out before is looked at again.
        first = done[0]["last_step"] + 1 if done and done[0]["kept_every"] == every else 0
        if first > last:
            return None
        with self._lock:
            for table, also in (("layers", " AND nonfinite_channels = 0"), ("probe", "")):
                self._engine.remove(
                    f"""DELETE FROM {table} WHERE run_id = {{run:String}} AND intHash64(step) % {{every:UInt64}} != 0
                    AND step BETWEEN {{first:UInt64}} AND {{last:UInt64}}{also}""",
                    run=run_id,
                    first=first,
                    last=last,
                    every=every,
                )
            self._free_space()
        row = {"run_id": run_id, "version": time.time_ns(), "last_step": last, "kept_every": every}
        with self._engine.writing():
            if self._runs.record(run_id) is not None:
                self._engine.insert("thinned", pa.Table.from_pylist([row], schema=_THINNED))
            self._runs.changed(run_id)
        return last

    def _last_to_thin(self, run_id: str, before: datetime) -> int | None:
        """The newest step that came before a moment and is not among the newest; None: there is none."""
        sql = """
            SELECT max(last_step) AS last FROM batches
            WHERE run_id = {run:String} AND toUnixTimestamp64Milli(received_at) < {before:Int64} HAVING count() > 0"""
        came = self._engine.rows(sql, run=run_id, before=int(before.timestamp() * 1000)).to_pylist()
        sql = f"""
            SELECT min(step) AS first FROM (
                SELECT DISTINCT step FROM layers WHERE run_id = {{run:String}} ORDER BY step DESC LIMIT {WHOLE_STEPS}
            ) HAVING count() = {WHOLE_STEPS}"""
        whole = self._engine.rows(sql, run=run_id).to_pylist()
        return int(min(came[0]["last"], whole[0]["first"] - 1)) if came and whole else None

    def _free_space(self) -> None:
        """Lets the engine write anew, in the background, the files of which rows were removed."""
        for table in TABLES:
            self._engine.remove(f"ALTER TABLE {table} APPLY DELETED MASK")
