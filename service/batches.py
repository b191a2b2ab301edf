"""Batches on their way into the engine, each stored once.

`batches` holds one row for every batch that is complete; it is written last, so a batch that is not in it is not
stored, whatever its other tables hold.

Embedded, where this process is the only writer, a batch is acknowledged when it is in the journal. The engine gets it
a moment later, with all that came meanwhile in one insert a table, and before anyone reads what it is asked for. What
the journal holds after a sudden end is written when the store is opened; which of its tables were written already is
looked up, as every insert is one block, so there or not.

On a server, which may have other writers and is durable itself, every batch is inserted by itself before it is
acknowledged, and every insert carries a token made of run, rank, seq and table, of which the engine drops repeats.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brn_core import wire
from brn_core.wire import TABLES
from service import ingest
from service.engine import Engine, first_line, is_full
from service.errors import CannotStart, Invalid, ServiceError, StoreFull, Unavailable, some
from service.journal import Entry, Journal
from service.runs import Runs, StoredRun, milliseconds

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 32 * 2**20
"""What waits is written once it takes so much memory, some 100,000 rows of `layers`, ..."""

BLOCK_SECONDS: Final = 0.5
"""... or has waited so long."""

WAITING_BYTES: Final = 96 * 2**20
"""Most that waits: beyond it acknowledgements wait for the engine."""

INSERT_ROWS: Final = 300_000
"""Rows after which an insert takes no further batch. With one more batch, and `WAITING_BYTES` or the largest body, it
stays below the 1,048,449 rows and 256 MB at which the engine would part it into two blocks."""

RETRY_SECONDS: Final = 1.0
"""Between two attempts to write what the engine did not take."""

BatchKey = tuple[str, int, int]
"""Run id, rank, seq."""

Outcome = Literal["stored", "duplicate", "gone"]
"""What became of a batch; `gone`: its run was deleted (and perhaps made anew) meanwhile."""

_OWN: Final = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("rank", pa.uint32(), nullable=False),
        pa.field("seq", pa.uint64(), nullable=False),
    ]
)
_BATCHES: Final = pa.schema(
    {
        "run_id": pa.string(),
        "rank": pa.uint32(),
        "seq": pa.uint64(),
        "layer_rows": pa.uint32(),
        "first_step": pa.uint64(),
        "last_step": pa.uint64(),
        "received_at": pa.timestamp("ms", tz="UTC"),
    }
)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one rank that were sent together, checked against the run as it was when they came.

    Attributes:
        run: as it was.
        rank: global rank.
        seq: the batch's number.
        tables: by name; none is empty.
        body: the tables as Arrow, where they came so; else they are encoded when they are written down.
    """

    run: StoredRun
    rank: int
    seq: int
    tables: Mapping[str, pa.Table]
    body: bytes | None = None

    @property
    def key(self) -> BatchKey:
        return (self.run.record.id, self.rank, self.seq)

    @property
    def rows(self) -> int:
        return sum(table.num_rows for table in self.tables.values())


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A batch that is acknowledged and that the engine lacks."""

    entry: Entry
    tables: Mapping[str, pa.Table]
    row: dict[str, Any]  # of the table `batches`
    size_bytes: int  # in memory

    @classmethod
    def of(cls, entry: Entry, tables: Mapping[str, pa.Table]) -> _Waiting:
        size = len(entry.body) + sum(int(table.get_total_buffer_size()) for table in tables.values())
        return cls(entry, tables, _row(entry, tables), size)

    @property
    def key(self) -> BatchKey:
        return (self.entry.run_id, self.entry.rank, self.entry.seq)

    @property
    def rows(self) -> int:
        return sum(table.num_rows for table in self.tables.values())


class Batches:
    """Takes batches, and sees to it that the engine gets them: whatever fails is tried again, and meanwhile kept.

    Locks: `Engine.writing` before `Engine.taking` before `_changed`. Putting a batch takes the last two alone, so that
    acknowledgements do not wait for an insert that runs.

    Args:
        engine: its tables exist.
        runs: whose rows these are.
        journal: of an embedded store; None on a server.
    """

    def __init__(self, engine: Engine, runs: Runs, journal: Journal | None) -> None:
        self._engine = engine
        self._runs = runs
        self._journal = journal
        self._newest_seq: dict[str, dict[int, int]] = {}  # by run and rank: most batches are newer, so none repeats
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[BatchKey, _Waiting] = {}
        self._waiting_bytes = 0
        self._oldest = 0.0  # time.monotonic() at which the first of them came
        self._failure: Exception | None = None
        self._stopping = False
        self._unclear: set[BatchKey] = set()  # of which some tables may be written; under `Engine.writing`
        self._inserters = ThreadPoolExecutor(len(TABLES), thread_name_prefix="inserter")
        self._thread = threading.Thread(target=self._loop, name="settler", daemon=True)

    def start(self) -> None:
        """Has the engine take what the last process left in the journal, and from now on what waits."""
        if self._journal is not None:
            self._take_up(self._journal)
            self._thread.start()

    def close(self) -> None:
        """Has the engine take what waits. What it does not take stays in the journal, for the next process."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
            try:
                self.settle()
            except Exception as error:
                log.error("batches stay in the journal until the store is opened again: %s", error)
        self._inserters.shutdown()
        if self._journal is not None:
            self._journal.close()

    # -------- taking

    def put(self, batches: Sequence[Batch]) -> list[Outcome]:
        """Stores batches, each once; when this returns they are on disk, and readers see them.

        Raises:
            StoreFull, Unavailable: none of them is acknowledged; sent again they are stored, each once.
        """
        if self._journal is None:
            return self._put_at_once(batches)
        self._wait_for_room()
        with self._engine.taking():
            outcomes = self._outcomes(batches)
            fresh = [batch for batch, outcome in zip(batches, outcomes, strict=True) if outcome == "stored"]
            if fresh:
                waiting = [_waiting(batch) for batch in fresh]
                with _disk_errors():
                    self._journal.append([own.entry for own in waiting])
                self._wait(waiting)
        return outcomes

    def _wait(self, waiting: Sequence[_Waiting]) -> None:
        for own in waiting:
            run_id, rank, seq = own.key
            newest = self._newest_seq[run_id]
            newest[rank] = max(seq, newest.get(rank, -1))
            row = own.row
            extent = self._runs.extent(run_id).with_batch(
                rank, row["layer_rows"], row["first_step"], row["last_step"], row["received_at"]
            )
            self._runs.extend(run_id, extent)
        with self._changed:
            if not self._waiting:
                self._oldest = time.monotonic()
            self._waiting |= {own.key: own for own in waiting}
            self._waiting_bytes += sum(own.size_bytes for own in waiting)
            self._changed.notify_all()

    def _wait_for_room(self) -> None:
        """Waits until the engine has taken enough of what waits.

        Raises:
            ServiceError: it takes nothing.
        """
        with self._changed:
            while self._waiting_bytes > WAITING_BYTES and not self._stopping:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()

    def _outcomes(self, batches: Sequence[Batch]) -> list[Outcome]:
        seen = self._stored({batch.key for batch in batches})
        outcomes: list[Outcome] = []
        for batch in batches:
            run = self._runs.record(batch.run.record.id)
            if run is None or run.created_at != batch.run.created_at:
                outcomes.append("gone")
            elif batch.key in seen:
                outcomes.append("duplicate")
            else:
                seen.add(batch.key)
                outcomes.append("stored")
        return outcomes

    def _stored(self, keys: set[BatchKey]) -> set[BatchKey]:
        """Which of these are stored already."""
        if self._journal is None:
            return self._keys_in("batches", keys)
        self._look_up_newest({run_id for run_id, _, _ in keys})
        keys = {key for key in keys if key[2] <= self._newest_seq[key[0]].get(key[1], -1)}
        with self._changed:  # first: what is written meanwhile is then found in the engine
            waiting = keys & self._waiting.keys()
        return waiting | self._keys_in("batches", keys - waiting)

    def _look_up_newest(self, run_ids: Collection[str]) -> None:
        """Reads the newest seq of every rank that the engine has, of runs not asked about so far."""
        for run_id in set(run_ids) - self._newest_seq.keys():
            sql = "SELECT rank, max(seq) AS seq FROM batches WHERE run_id = {run:String} GROUP BY rank"
            newest = self._engine.rows(sql, run=run_id).to_pylist()
            self._newest_seq[run_id] = {row["rank"]: row["seq"] for row in newest}

    def _keys_in(self, table: str, keys: Iterable[BatchKey]) -> set[BatchKey]:
        """Those of the keys that have rows in a table of the engine."""
        if not (keys := list(keys)):
            return set()
        sql = f"""SELECT DISTINCT run_id, rank, seq FROM {table}
            WHERE (run_id, rank, seq) IN {{keys:Array(Tuple(String, UInt32, UInt64))}}"""
        return {(row["run_id"], row["rank"], row["seq"]) for row in self._engine.rows(sql, keys=keys).to_pylist()}

    def forget(self, run_ids: Collection[str]) -> None:
        """Marks runs as deleted and drops what waits of them: from then on none of their batches is taken or written.

        The caller holds `Engine.writing`, so no insert runs.
        """
        with self._engine.taking():
            self._runs.mark_deleted(run_ids)
            with self._changed:
                for key in [key for key in self._waiting if key[0] in run_ids]:
                    self._drop(key)
            for run_id in run_ids:
                self._newest_seq.pop(run_id, None)
        self._unclear = {key for key in self._unclear if key[0] not in run_ids}

    def _drop(self, key: BatchKey) -> None:
        self._waiting_bytes -= self._waiting.pop(key).size_bytes
        self._changed.notify_all()

    # -------- writing

    def settle(self, run_id: str | None = None) -> None:
        """Returns when the engine has what was put before, of one run or of all. Takes the write lock if it lacks any.

        Raises:
            StoreFull, Unavailable: the engine does not take it now; it goes on waiting.
        """
        with self._changed:
            asked = [key for key in self._waiting if run_id is None or key[0] == run_id]
        if not asked:
            return
        with self._engine.writing():  # who waited here may find that another one wrote it meanwhile
            if any(key in self._waiting for key in asked):
                self._write_waiting()

    def _loop(self) -> None:
        """Writes what waits when there is enough of it, or for long enough."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                due = self._oldest + BLOCK_SECONDS
                while not self._stopping and self._waiting and self._waiting_bytes < BLOCK_BYTES:
                    if (left := due - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                if self._stopping:
                    return
            try:
                self.settle()
            except Exception as error:
                level = logging.DEBUG if self._failure is not None else logging.ERROR
                log.log(level, "the engine does not take what is in the journal, it is tried again: %s", error)
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopping, RETRY_SECONDS)
            else:
                with self._changed:
                    self._failure = None

    def _write_waiting(self) -> None:
        """Writes all that waits, and cuts the journal. The caller holds `Engine.writing`."""
        assert self._journal is not None
        with self._engine.taking():  # whatever is appended from here on is on another page
            page = self._journal.turn()
            with self._changed:
                waiting = list(self._waiting.values())
                self._oldest = time.monotonic()
        rejected: list[_Waiting] = []
        for group in _groups(waiting):
            try:
                self._write(group)
            except ServiceError:
                raise
            except Exception:  # one that the engine rejects must not hold up the others
                rejected += [own for own in group if not self._is_written(own)]
        if rejected:
            with self._engine.taking(), _disk_errors():
                self._journal.append([own.entry for own in rejected])
        self._journal.cut(page)
        if rejected:
            shown = [f"{own.entry.run_id}/{own.entry.rank}/{own.entry.seq}" for own in rejected]
            raise Unavailable(f"the engine rejects batches, which stay in the journal: {some(shown)}")

    def _is_written(self, own: _Waiting) -> bool:
        """Writes one batch by itself; whether the engine takes it."""
        try:
            self._write([own])
        except ServiceError:
            raise
        except Exception as error:
            log.error("the engine rejects batch %d of rank %d of run %s: %s", *own.key[::-1], first_line(error))
            return False
        return True

    def _write(self, group: Sequence[_Waiting]) -> None:
        """One insert a table, `batches` last."""
        keys = [own.key for own in group]
        skip = self._tables_written(self._unclear.intersection(keys))
        self._unclear.update(keys)
        self._insert(group, skip)
        self._unclear.difference_update(keys)
        with self._changed:
            for key in keys:
                self._drop(key)

    def _tables_written(self, keys: Collection[BatchKey]) -> dict[BatchKey, set[str]]:
        """Which tables of batches that broke off are written."""
        with_rows = {table: self._keys_in(table, keys) for table in (*TABLES, "batches")}  # a scan each, for all keys
        return {key: {table for table, written in with_rows.items() if key in written} for key in keys}

    def _insert(self, group: Sequence[_Waiting], skip: Mapping[BatchKey, set[str]], token: str | None = None) -> None:
        # Each insert waits for the disk a dozen times: the tables do it side by side. All end before one may fail.
        inserts = [self._inserters.submit(self._insert_table, table, group, skip, token) for table in TABLES]
        wait(inserts)
        for insert in inserts:
            insert.result()
        rows = [own.row for own in group if "batches" not in skip.get(own.key, ())]
        if rows:
            self._engine.insert("batches", pa.Table.from_pylist(rows, schema=_BATCHES), token)

    def _insert_table(
        self, table: str, group: Sequence[_Waiting], skip: Mapping[BatchKey, set[str]], token: str | None
    ) -> None:
        parts = [
            (own.key, own.tables[table]) for own in group if table in own.tables and table not in skip.get(own.key, ())
        ]
        if parts:
            self._engine.insert(table, _with_keys(parts), token)

    def _put_at_once(self, batches: Sequence[Batch]) -> list[Outcome]:
        with self._engine.writing():
            outcomes = self._outcomes(batches)
            for batch, outcome in zip(batches, outcomes, strict=True):
                if outcome == "stored":
                    life = f"{batch.run.created_at.timestamp():.3f}"  # made anew after a deletion: other tokens
                    self._insert([_waiting(batch)], {}, f"{'/'.join(map(str, batch.key))}/{life}")
            return outcomes

    # -------- after a sudden end

    def _take_up(self, journal: Journal) -> None:
        """Writes what the last process acknowledged and the engine lacks."""
        found: dict[BatchKey, _Waiting] = {}
        for entry in journal.entries():
            run = self._runs.record(entry.run_id)
            if run is None or run.created_at != entry.created_at:  # deleted since
                continue
            try:
                own = _of_entry(entry)
            except Invalid as error:
                raise CannotStart(
                    "the store's journal holds batches of another version of brn-diagnostics: start and stop that one "
                    f"first, so that they are stored ({error})"
                ) from error
            found.setdefault(own.key, own)
        missing = found.keys() - self._keys_in("batches", found)
        if missing:
            log.info("%d batches that the last process acknowledged are written", len(missing))
        self._unclear.update(missing)
        self._look_up_newest({run_id for run_id, _, _ in missing})
        self._wait([found[key] for key in sorted(missing)])
        with self._engine.writing(), suppress(ServiceError):  # it goes on waiting, and the journal has it
            self._write_waiting()


def _waiting(batch: Batch) -> _Waiting:
    run_id, rank, seq = batch.key
    body = wire.encode_batch(batch.tables) if batch.body is None else batch.body
    received_at = milliseconds(datetime.now(UTC))
    entry = Entry(run_id, batch.run.created_at, rank, seq, received_at, body)
    return _Waiting.of(entry, batch.tables)


def _of_entry(entry: Entry) -> _Waiting:
    tables = {name: table for name, table in ingest.from_arrow(entry.body).items() if table.num_rows}
    return _Waiting.of(entry, tables)


def _row(entry: Entry, tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    ends = [pc.min_max(table.column("step")).as_py() for table in tables.values()]
    return {
        "run_id": entry.run_id,
        "rank": entry.rank,
        "seq": entry.seq,
        "layer_rows": tables["layers"].num_rows if "layers" in tables else 0,
        "first_step": min(end["min"] for end in ends),
        "last_step": max(end["max"] for end in ends),
        "received_at": entry.received_at,
    }


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A disk that is full, as our own error."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StoreFull(
                "the store's disk is full: nothing was stored; free some space and send it again"
            ) from error
        raise


def _groups(waiting: Iterable[_Waiting]) -> Iterable[list[_Waiting]]:
    """In order, as many together as one insert takes."""
    group: list[_Waiting] = []
    rows = size = 0
    for own in waiting:
        if group and (rows >= INSERT_ROWS or size >= WAITING_BYTES):
            yield group
            group, rows, size = [], 0, 0
        group.append(own)
        rows += own.rows
        size += own.size_bytes
    if group:
        yield group


def _with_keys(parts: Sequence[tuple[BatchKey, pa.Table]]) -> pa.Table:
    """The rows of several batches as one table of one chunk, each with its run, rank and seq."""
    rows = pa.concat_tables([table for _, table in parts]).combine_chunks()
    counts = [table.num_rows for _, table in parts]
    at = pa.array(np.repeat(np.arange(len(parts)), counts))
    own = [pa.array([key[i] for key, _ in parts], field.type).take(at) for i, field in enumerate(_OWN)]
    return pa.Table.from_arrays([*own, *rows.columns], schema=pa.schema([*_OWN, *rows.schema]))
