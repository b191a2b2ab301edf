"""The store: tables in ClickHouse's dialect, embedded (chDB) or on a server, behind one class that writes and reads.

Tables of rows are generated from `brn_core.wire.TABLES`; every row also says which run, rank and batch (`seq`) it
came with. docs/storage.md shows the tables to users. Only names from the wire schema ever become SQL; everything
else travels as a bound parameter.

Each batch is stored once. `batches` holds one row for every batch that is complete; it is written last, so a batch
that is not in it is simply sent again. What such a repeat finds already written is dropped by the engine, because
every insert carries a token made of run, rank, seq and table.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import clickhouse_connect
import pyarrow as pa
import pyarrow.compute as pc
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

from brn_core.wire import TABLES, RunCreate, RunStatus
from service.diagnosis.finding import Diagnosis, Verdict
from service.errors import CannotStart, StoreFull, Unavailable
from service.memo import Memo
from service.settings import Settings

log = logging.getLogger(__name__)

STORE_VERSION: Final = 1
"""Version of the tables. Columns that METRICS gains are added on opening and need no new version."""

DATABASE: Final = "brn"

DEDUPLICATION_WINDOW: Final = 1000
"""Inserts of a table whose tokens the engine remembers. It only has to cover batches that broke off half-way."""

_NOT_ENOUGH_SPACE: Final = 243  # ClickHouse's error code

_ROW_ORDER: Final[Mapping[str, str]] = {
    "layers": "run_id, layer, rank, step",
    "probe": "run_id, rank, step",
    "scalars": "run_id, name, rank, step",
    "channels": "run_id, layer, rank, step",
}
assert _ROW_ORDER.keys() == TABLES.keys()

_DURABLE: Final = (
    f"non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}, fsync_after_insert = 1, fsync_part_directory = 1"
)

_RUN_TABLES: Final = {
    # One row a change of a run; the newest version is the run. `record` is RunCreate without its layers, as JSON.
    "runs": f"""
        run_id String, version UInt64, record String CODEC(ZSTD), layers String CODEC(ZSTD),
        status LowCardinality(String), created_at DateTime64(3, 'UTC'), changed_at DateTime64(3, 'UTC')
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id SETTINGS {_DURABLE}""",
    # The verdict that was last computed, as JSON. Derived from the rows, so losing one costs nothing.
    "verdicts": """
        run_id String, version UInt64, verdict String CODEC(ZSTD)
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id""",
    # One row a complete batch. `layer_rows` counts its rows of the table `layers`.
    "batches": f"""
        run_id LowCardinality(String), rank UInt32, seq UInt64, layer_rows UInt32,
        first_step UInt64, last_step UInt64, received_at DateTime64(3, 'UTC')
        ) ENGINE = MergeTree ORDER BY (run_id, rank, seq) SETTINGS {_DURABLE}""",
}


def _column(field: pa.Field) -> str:
    """`name type codec` of a column, from its Arrow field."""
    if pa.types.is_list(field.type):
        return f"{field.name} Array(Float32) CODEC(ZSTD)"
    if pa.types.is_string(field.type):
        return f"{field.name} LowCardinality(String)"
    if field.name == "step":
        return "step UInt64 CODEC(DoubleDelta, ZSTD)"
    names = {
        pa.uint16(): "UInt16",
        pa.uint32(): "UInt32",
        pa.uint64(): "UInt64",
        pa.float32(): "Float32",
        pa.float64(): "Float64",
    }
    base = names[field.type]
    return f"{field.name} {f'Nullable({base})' if field.nullable else base} CODEC(ZSTD)"


def _columns(table: str) -> dict[str, str]:
    own = {
        "run_id": "run_id LowCardinality(String)",
        "rank": "rank UInt32",
        "seq": "seq UInt64 CODEC(DoubleDelta, ZSTD)",
    }
    return own | {field.name: _column(field) for field in TABLES[table]}


def _create_statements() -> Iterator[str]:
    for table in TABLES:
        # The first non-finite row is looked for in every diagnosis; the index skips the blocks that hold none.
        index = ", INDEX nonfinite nonfinite_channels TYPE minmax GRANULARITY 1" if table == "layers" else ""
        yield (
            f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(_columns(table).values())}{index}) "
            f"ENGINE = MergeTree ORDER BY ({_ROW_ORDER[table]}) SETTINGS {_DURABLE}"
        )
    for table, rest in _RUN_TABLES.items():
        yield f"CREATE TABLE IF NOT EXISTS {table} ({rest}"
    yield "CREATE TABLE IF NOT EXISTS store_version (version UInt32) ENGINE = MergeTree ORDER BY version"


_RECORDS: Final = """
    SELECT run_id, record, {layers}, status, created_at, changed_at, verdict
    FROM (SELECT * FROM runs FINAL {where}) AS run
    LEFT JOIN (SELECT run_id, verdict FROM verdicts FINAL {where}) AS verdict USING run_id
    ORDER BY created_at DESC, run_id
    """

_EXTENTS: Final = """
    SELECT run_id, count() AS batches, sum(layer_rows) AS layer_rows, max(rank) AS last_rank,
           min(first_step) AS first_step, max(last_step) AS last_step, max(received_at) AS received_at
    FROM batches {where} GROUP BY run_id
    """


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
        content = json.loads(row["record"])
        if row["layers"]:
            content |= json.loads(row["layers"])
        verdict = Verdict.model_validate_json(row["verdict"]) if row["verdict"] else None
        record = RunCreate.model_validate(content)
        return cls(record, row["status"], row["created_at"], row["changed_at"], verdict)


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


class Store:
    """The rows of all runs. Safe to use from many threads: one connection writes, a few others read.

    Raises:
        CannotStart: on opening, when the store is locked, not writable, not reachable, or of a newer version.
    """

    def __init__(self, settings: Settings) -> None:
        self._lock_file = _lock(settings.store_path) if settings.store_path is not None else None
        self._readers: queue.LifoQueue[Client] = queue.LifoQueue()
        self._write_lock = threading.RLock()
        self._clients: list[Client] = []
        self._record_changes: Counter[str] = Counter()
        self._row_changes: Counter[str] = Counter()
        # An embedded store has no other writer, so what was read of a run holds until this process changes it.
        self._sole_writer = settings.store_path is not None
        self._records: Memo[StoredRun | None] = Memo(size=256)
        self._extents: Memo[Extent] = Memo(size=256)
        self.diagnoses: Memo[Diagnosis] = Memo(size=256)
        try:
            self._writer = self._connect(settings)
            self._prepare()
            for _ in range(settings.readers):
                self._readers.put(self._connect(settings))
        except (ClickHouseError, OSError) as error:
            self.close()
            raise CannotStart(f"the store {settings.store_shown} cannot be opened: {_first_line(error)}") from error
        except CannotStart:
            self.close()
            raise

    def close(self) -> None:
        """Waits for the statements that run, then lets go of the store and its lock."""
        with self._write_lock:
            while self._clients:
                self._clients.pop().close()
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None

    # -------- reading

    def rows(self, sql: str, **parameters: Any) -> pa.Table:
        """The answer to a query; `{name:Type}` in it stands for the parameter `name`."""
        with self._reader() as client, _store_errors():
            return client.query_arrow(sql, parameters=parameters)

    def record(self, run_id: str) -> StoredRun | None:
        """What a run says of itself, and its last verdict; None where there is no such run."""

        def read() -> StoredRun | None:
            where = "WHERE run_id = {run:String}"
            found = self.rows(_RECORDS.format(where=where, layers="layers"), run=run_id).to_pylist()
            return StoredRun.of_row(found[0]) if found else None

        if not self._sole_writer:
            return read()
        return self._records.get((run_id, self._record_changes[run_id]), read)

    def records(self) -> list[StoredRun]:
        """All runs, newest first, without their layers, which may be many."""
        found = self.rows(_RECORDS.format(where="", layers="'' AS layers")).to_pylist()
        return [StoredRun.of_row(row) for row in found]

    def extent(self, run_id: str) -> Extent:
        """How far a run's rows reach."""

        def read() -> Extent:
            found = self.rows(_EXTENTS.format(where="WHERE run_id = {run:String}"), run=run_id).to_pylist()
            return Extent.of_row(found[0]) if found else Extent()

        if not self._sole_writer:
            return read()
        return self._extents.get((run_id, self._row_changes[run_id]), read)

    def extents(self) -> dict[str, Extent]:
        """How far the rows of every run that has any reach."""
        return {row["run_id"]: Extent.of_row(row) for row in self.rows(_EXTENTS.format(where="")).to_pylist()}

    def changes(self, run_id: str) -> int:
        """Counts what this process stored about a run: a number that differs from the last one means news."""
        return self._record_changes[run_id] + self._row_changes[run_id]

    @contextmanager
    def _reader(self) -> Iterator[Client]:
        client = self._readers.get()
        try:
            yield client
        finally:
            self._readers.put(client)

    # -------- writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds off other writers, for what reads, decides and then writes."""
        with self._write_lock:
            yield

    def put_run(self, record: RunCreate, status: RunStatus, created_at: datetime) -> None:
        """Stores a run's record; the newest one stands."""
        row = {
            "run_id": record.id,
            "version": time.time_ns(),
            "record": record.model_dump_json(exclude={"layers"}),
            "layers": record.model_dump_json(include={"layers"}),
            "status": status,
            "created_at": created_at,
            "changed_at": datetime.now(UTC),
        }
        with self._write_lock:
            self._insert("runs", pa.Table.from_pylist([row], schema=_RUNS))
            self._record_changes[record.id] += 1

    def put_verdict(self, run_id: str, verdict: Verdict) -> None:
        """Stores the verdict that was just computed."""
        row = {"run_id": run_id, "version": time.time_ns(), "verdict": verdict.model_dump_json()}
        with self._write_lock:
            self._insert("verdicts", pa.Table.from_pylist([row], schema=_VERDICTS))
            self._record_changes[run_id] += 1

    def put_batch(self, run: StoredRun, rank: int, seq: int, tables: Mapping[str, pa.Table]) -> None:
        """Stores one batch; when this returns it is on disk. The caller has made sure that it is not stored yet."""
        run_id = run.record.id
        steps = [step for table in tables.values() for step in _ends(table)]
        done = {
            "run_id": run_id,
            "rank": rank,
            "seq": seq,
            "layer_rows": tables["layers"].num_rows if "layers" in tables else 0,
            "first_step": min(steps),
            "last_step": max(steps),
            "received_at": datetime.now(UTC),
        }
        # A run that was deleted and made anew takes the same batches again: its second life has other tokens.
        key = f"{run_id}/{run.created_at.timestamp():.3f}/{rank}/{seq}"
        with self._write_lock:
            for name, table in tables.items():
                own = [
                    pa.repeat(pa.scalar(value, field.type), table.num_rows)
                    for field, value in zip(_OWN, (run_id, rank, seq), strict=True)
                ]
                rows = pa.Table.from_arrays([*own, *table.columns], schema=pa.schema([*_OWN, *table.schema]))
                self._insert(name, rows, token=f"{key}/{name}")
            self._insert("batches", pa.Table.from_pylist([done], schema=_BATCHES), token=f"{key}/batches")
            self._row_changes[run_id] += 1

    def delete_run(self, run_id: str) -> None:
        """Deletes a run and all its rows. The record goes first: without it nothing of the run can be seen or added."""
        with self._write_lock, _store_errors():
            for table in ("runs", "batches", "verdicts", *TABLES):
                self._writer.command(f"DELETE FROM {table} WHERE run_id = {{run:String}}", parameters={"run": run_id})
            self._record_changes[run_id] += 1
            self._row_changes[run_id] += 1

    def _insert(self, table: str, rows: pa.Table, token: str | None = None) -> None:
        settings = None if token is None else {"insert_deduplication_token": token}
        with self._write_lock, _store_errors():
            self._writer.insert_arrow(table, rows, settings=settings)

    # -------- opening

    def _connect(self, settings: Settings) -> Client:
        options: dict[str, Any] = {
            "settings": {
                "output_format_arrow_string_as_string": 1,
                "output_format_arrow_compression_method": "none",
                "join_use_nulls": 1,  # a run without batches has null for its last step, not 0
            },
            "autogenerate_session_id": False,
        }
        path = settings.store_path
        if path is not None:
            options.pop("autogenerate_session_id")
            dsn, database = f"chdb://{path.resolve()}", DATABASE
        else:
            dsn, _, database = settings.store.rpartition("/")
            options["secure"] = settings.store.startswith("clickhouses://")
        if not self._clients:
            with clickhouse_connect.get_client(dsn=dsn) as first:
                first.command(f"CREATE DATABASE IF NOT EXISTS `{_identifier(database)}`")
        client = clickhouse_connect.get_client(dsn=dsn, database=database, **options)
        self._clients.append(client)
        return client

    def _prepare(self) -> None:
        for statement in _create_statements():
            self._writer.command(statement)
        versions = self._writer.query_arrow(
            "SELECT max(version) AS version, count() AS n FROM store_version"
        ).to_pylist()
        if versions[0]["n"] == 0:
            self._insert("store_version", pa.table({"version": pa.array([STORE_VERSION], pa.uint32())}))
        elif versions[0]["version"] > STORE_VERSION:
            raise CannotStart(
                f"the store was written by a newer version ({versions[0]['version']}, this one knows {STORE_VERSION}): "
                "update brn-diagnostics, or name another store with --store"
            )
        present = self._writer.query_arrow(
            "SELECT table, name FROM system.columns WHERE database = currentDatabase()"
        ).to_pylist()
        known = {(row["table"], row["name"]) for row in present}
        for table in TABLES:
            for name, definition in _columns(table).items():
                if (table, name) not in known:
                    self._writer.command(f"ALTER TABLE {table} ADD COLUMN {definition}")


_OWN: Final = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("rank", pa.uint32(), nullable=False),
        pa.field("seq", pa.uint64(), nullable=False),
    ]
)
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
_BATCHES: Final = pa.schema(
    {
        "run_id": pa.string(),
        "rank": pa.uint32(),
        "seq": pa.uint64(),
        "layer_rows": pa.uint32(),
        "first_step": pa.uint64(),
        "last_step": pa.uint64(),
        "received_at": _MOMENT,
    }
)


def _ends(table: pa.Table) -> tuple[int, int]:
    ends = pc.min_max(table.column("step")).as_py()
    return ends["min"], ends["max"]


def _lock(path: Path) -> IO[str]:
    """Takes the lock beside an embedded store, so that a second process gets a clear line, not the engine's."""
    file = path.resolve().with_name(f"{path.name}.lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {path}")
        handle = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise CannotStart(
            f"cannot write the store at {path}: {error.strerror or error}; name another folder with --store chdb://PATH"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read(20).strip() or "unknown"
        handle.close()
        raise CannotStart(
            f"the store at {path} is in use by process {holder}: stop it, or name another with --store chdb://PATH"
        ) from error
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def _identifier(name: str) -> str:
    if not name.replace("_", "").isalnum():
        raise CannotStart(f"the store's address must end in /DATABASE (letters, digits, _), got {name!r}")
    return name


@contextmanager
def _store_errors() -> Iterator[None]:
    """The engine's errors as ours. A statement the engine rejects is our mistake and passes through (500)."""
    try:
        yield
    except DatabaseError as error:
        if error.code == _NOT_ENOUGH_SPACE:
            raise StoreFull(
                "the store's disk is full: nothing was stored; free some space and send it again"
            ) from error
        if isinstance(error, OperationalError):
            log.error("the store does not answer: %s", _first_line(error))
            raise Unavailable("the store does not answer; try again later") from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
