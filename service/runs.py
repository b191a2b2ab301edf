"""The runs of a store: what each says of itself, its verdict, and how far its rows reach.

An embedded store has no other writer, so what was read of a run holds until this process changes it: the list of runs
is read once, when the store is opened, and kept. On a server, which may have other writers, every look is a query.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import pyarrow as pa
from pydantic_core import PydanticSerializationError

from brn_core.wire import RunCreate, RunStatus
from service.diagnosis.finding import Verdict
from service.engine import Engine, first_line
from service.errors import Invalid
from service.memo import Memo

_RECORDS: Final = """
    SELECT run_id, record, {layers}, status, created_at, changed_at, verdict
    FROM (SELECT * FROM runs FINAL {where}) AS run
    LEFT JOIN (SELECT run_id, verdict FROM verdicts FINAL {where}) AS verdict USING run_id
    WHERE status != 'deleted'
    ORDER BY created_at DESC, run_id
    """

_EXTENTS: Final = """
    SELECT run_id, count() AS batches, sum(layer_rows) AS layer_rows, max(rank) AS last_rank,
           min(first_step) AS first_step, max(last_step) AS last_step, max(received_at) AS received_at
    FROM batches {where} GROUP BY run_id
    """

_MOMENT: Final = pa.timestamp("ms", tz="UTC")
_RUNS: Final = pa.schema(
    {
        "run_id": pa.string(),
        "version": pa.uint64(),
        "record": pa.string(),
        "layers": pa.string(),
        "status": pa.string(),
        "created_at": _MOMENT,
        "changed_at": _MOMENT,
    }
)
_VERDICTS: Final = pa.schema({"run_id": pa.string(), "version": pa.uint64(), "verdict": pa.string()})
_HISTORIES: Final = pa.schema({"run_id": pa.string(), "version": pa.uint64(), "history": pa.string()})


@lru_cache(maxsize=4096)  # a list of runs is asked for again and again, and few of them have changed
def _parsed_record(record: str, layers: str) -> RunCreate:
    return RunCreate.model_validate(json.loads(record) | (json.loads(layers) if layers else {}))


@lru_cache(maxsize=4096)
def _parsed_verdict(text: str) -> Verdict:
    return Verdict.model_validate_json(text)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run's record, and the verdict that was last computed (None before the first)."""

    record: RunCreate
    status: RunStatus
    created_at: datetime
    changed_at: datetime
    verdict: Verdict | None

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> StoredRun:
        verdict = _parsed_verdict(row["verdict"]) if row["verdict"] else None
        record = _parsed_record(row["record"], row["layers"])
        return cls(record, row["status"], row["created_at"], row["changed_at"], verdict)

    def without_layers(self) -> StoredRun:
        return replace(self, record=self.record.model_copy(update={"layers": ()}))


@dataclass(frozen=True, slots=True)
class Extent:
    """How far the rows of a run reach, over all its tables; nothing stored: zero batches and no steps."""

    batches: int = 0
    layer_rows: int = 0
    last_rank: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    received_at: datetime | None = None

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Extent:
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def with_batch(self, rank: int, layer_rows: int, first_step: int, last_step: int, received_at: datetime) -> Extent:
        """With one more batch."""
        return Extent(
            batches=self.batches + 1,
            layer_rows=self.layer_rows + layer_rows,
            last_rank=rank if self.last_rank is None else max(rank, self.last_rank),
            first_step=first_step if self.first_step is None else min(first_step, self.first_step),
            last_step=last_step if self.last_step is None else max(last_step, self.last_step),
            received_at=received_at if self.received_at is None else max(received_at, self.received_at),
        )


class Runs:
    """What is known of the runs. Changes are made under `Engine.writing`, and those of extents by one thread at a time.

    Args:
        engine: its tables exist.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._records: Memo[StoredRun | None] = Memo(size=256)
        self._histories: Memo[str] = Memo(size=256)  # empty: there is none
        self._changes: dict[str, int] = {}  # of what a run says of itself
        self._listed: dict[str, StoredRun] = {}  # without layers
        self._extents: dict[str, Extent] = {}
        if engine.embedded:
            self._listed = {run.record.id: run for run in self._read_list()}
            # A deleted run may have rows that are not removed yet.
            self._extents = {run: extent for run, extent in self._read_extents().items() if run in self._listed}

    # -------- what a run says of itself

    def record(self, run_id: str) -> StoredRun | None:
        """What a run says of itself, and its last verdict; None where there is no such run."""

        def read() -> StoredRun | None:
            where = "WHERE run_id = {run:String}"
            found = self._engine.rows(_RECORDS.format(where=where, layers="layers"), run=run_id).to_pylist()
            return StoredRun.of_row(found[0]) if found else None

        if not self._engine.embedded:
            return read()
        if run_id not in self._listed:
            return None
        return self._records.get((run_id, self._changes.get(run_id, 0)), read)

    def records_of(self, run_ids: Collection[str]) -> dict[str, StoredRun]:
        """What these runs say of themselves, by id; those that there are, read by one query."""
        keys = {run_id: (run_id, self._changes.get(run_id, 0)) for run_id in run_ids}
        found: dict[str, StoredRun] = {}
        if self._engine.embedded:
            keys = {run_id: key for run_id, key in keys.items() if run_id in self._listed}
            found = {run_id: known for run_id, key in keys.items() if (known := self._records.peek(key)) is not None}
        missing = [run_id for run_id in keys if run_id not in found]
        if missing:
            sql = _RECORDS.format(where="WHERE run_id IN {runs:Array(String)}", layers="layers")
            for stored in map(StoredRun.of_row, self._engine.rows(sql, runs=missing).to_pylist()):
                found[stored.record.id] = stored
                if self._engine.embedded:
                    self._records.put(keys[stored.record.id], stored)
        return found

    def records(self) -> list[StoredRun]:
        """All runs, newest first, without their layers, which may be many."""
        if not self._engine.embedded:
            return self._read_list()
        found = sorted(self._listed.copy().values(), key=lambda run: run.record.id)
        return sorted(found, key=lambda run: run.created_at, reverse=True)

    def _read_list(self) -> list[StoredRun]:
        found = self._engine.rows(_RECORDS.format(where="", layers="'' AS layers")).to_pylist()
        return [StoredRun.of_row(row) for row in found]

    def deleted(self) -> list[str]:
        """Runs that are marked as deleted, and of which rows may be left."""
        found = self._engine.rows("SELECT run_id FROM runs FINAL WHERE status = 'deleted'")
        names: list[str] = found.column("run_id").to_pylist()
        return names

    def changes(self, run_id: str) -> int:
        """Differs from the last one when there may be news of a run; embedded stores only."""
        extent = self._extents.get(run_id)
        return self._changes.get(run_id, 0) + (extent.batches if extent else 0)

    def changed(self, run_id: str) -> None:
        """Says that there is news of a run that no batch brought."""
        self._changes[run_id] = self._changes.get(run_id, 0) + 1

    def put(self, record: RunCreate, status: RunStatus, created_at: datetime) -> None:
        """Stores a run's record; the newest one stands.

        Raises:
            Invalid: a text in it is no Unicode.
            StoreFull, Unavailable: nothing was stored.
        """
        known = self.record(record.id)
        verdict = known.verdict if known is not None else None
        stored = StoredRun(record, status, milliseconds(created_at), milliseconds(datetime.now(UTC)), verdict)
        try:
            row = _run_row(stored)
        except PydanticSerializationError as error:
            raise Invalid(f"the run holds what cannot be written as UTF-8: {first_line(error)}") from error
        self._engine.insert("runs", pa.Table.from_pylist([row], schema=_RUNS))
        self._keep(stored)

    def put_verdict(self, run_id: str, verdict: Verdict) -> None:
        """Stores the verdict that was just computed, unless its run was deleted meanwhile."""
        known = self.record(run_id)
        if known is None:
            return
        row = {"run_id": run_id, "version": time.time_ns(), "verdict": verdict.model_dump_json()}
        self._engine.insert("verdicts", pa.Table.from_pylist([row], schema=_VERDICTS))
        self._keep(replace(known, verdict=verdict))

    def history(self, run_id: str) -> str | None:
        """The history of a run's findings, as it was put; None where there is none."""
        return self.histories_of([run_id]).get(run_id)

    def histories_of(self, run_ids: Collection[str]) -> dict[str, str]:
        """The histories of these runs' findings, by id; of those that have one, read by one query."""
        keys = {run_id: (run_id, self._changes.get(run_id, 0)) for run_id in run_ids}
        found: dict[str, str] = {}
        if self._engine.embedded:
            found = {run_id: text for run_id, key in keys.items() if (text := self._histories.peek(key)) is not None}
        missing = [run_id for run_id in keys if run_id not in found]
        if missing:
            sql = "SELECT run_id, history FROM histories FINAL WHERE run_id IN {runs:Array(String)}"
            read = {row["run_id"]: row["history"] for row in self._engine.rows(sql, runs=missing).to_pylist()}
            for run_id in missing:
                found[run_id] = read.get(run_id, "")
                if self._engine.embedded:
                    self._histories.put(keys[run_id], found[run_id])
        return {run_id: text for run_id, text in found.items() if text}

    def put_history(self, run_id: str, history: str) -> None:
        """Stores the history of a run's findings in place of the one before, unless its run was deleted meanwhile."""
        if self.record(run_id) is not None:
            row = {"run_id": run_id, "version": time.time_ns(), "history": history}
            self._engine.insert("histories", pa.Table.from_pylist([row], schema=_HISTORIES))
            self.changed(run_id)

    def mark_deleted(self, run_ids: Collection[str]) -> None:
        """From here on these runs do not exist."""
        known = [record for run_id in run_ids if (record := self.record(run_id)) is not None]
        if known:
            gone = {"record": "", "layers": "", "status": "deleted"}
            rows = [_run_row(record) | gone for record in known]
            self._engine.insert("runs", pa.Table.from_pylist(rows, schema=_RUNS))
        for run_id in run_ids:
            self._listed.pop(run_id, None)
            # One with as many changes as batches were counted: the sum never stands still, nor goes back.
            gone_extent = self._extents.pop(run_id, Extent())
            self._changes[run_id] = self._changes.get(run_id, 0) + 1 + gone_extent.batches

    def _keep(self, stored: StoredRun) -> None:
        if not self._engine.embedded:
            return
        run_id = stored.record.id
        self.changed(run_id)
        self._records.put((run_id, self._changes[run_id]), stored)
        self._listed[run_id] = stored.without_layers()

    # -------- how far its rows reach

    def extent(self, run_id: str) -> Extent:
        """How far a run's rows reach."""
        if self._engine.embedded:
            return self._extents.get(run_id, Extent())
        return self._read_extents("WHERE run_id = {run:String}", run=run_id).get(run_id, Extent())

    def extents_of(self, run_ids: Collection[str]) -> dict[str, Extent]:
        """How far the rows of these runs reach, by id; of those that have any."""
        if self._engine.embedded:
            return {run_id: extent for run_id in run_ids if (extent := self._extents.get(run_id)) is not None}
        return self._read_extents("WHERE run_id IN {runs:Array(String)}", runs=list(run_ids))

    def extents(self) -> dict[str, Extent]:
        """How far the rows of every run that has any reach."""
        return self._extents.copy() if self._engine.embedded else self._read_extents()

    def _read_extents(self, where: str = "", **parameters: Any) -> dict[str, Extent]:
        rows = self._engine.rows(_EXTENTS.format(where=where), **parameters).to_pylist()
        return {row["run_id"]: Extent.of_row(row) for row in rows}

    def extend(self, run_id: str, extent: Extent) -> None:
        """Takes it that a run's rows now reach this far."""
        if self._engine.embedded:
            self._extents[run_id] = extent


def _run_row(stored: StoredRun) -> dict[str, Any]:
    return {
        "run_id": stored.record.id,
        "version": time.time_ns(),
        "record": stored.record.model_dump_json(exclude={"layers"}),
        "layers": stored.record.model_dump_json(include={"layers"}),
        "status": stored.status,
        "created_at": stored.created_at,
        "changed_at": stored.changed_at,
    }


def milliseconds(moment: datetime) -> datetime:
    """As the store keeps it."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
