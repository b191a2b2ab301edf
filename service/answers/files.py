"""A table of a run as a file: parquet, csv or arrow, written while it is sent."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from brn_core.wire import TABLES
from service.answers.buckets import part_of
from service.answers.records import known
from service.errors import Invalid
from service.store import Store

FileFormat: TypeAlias = Literal["parquet", "csv", "arrow"]

MEDIA_TYPES: Final[dict[FileFormat, str]] = {
    "parquet": "application/vnd.apache.parquet",
    "csv": "text/csv; charset=utf-8",
    "arrow": "application/vnd.apache.arrow.stream",
}

RUN_KEY: Final = b"brn_run"
STATUS_KEY: Final = b"brn_status"
TABLE_KEY: Final = b"brn_table"
"""What a file's schema says in its metadata (csv has none): the run's record as JSON, its status, the table."""

CHUNK_ROWS: Final = 200_000
"""Rows that are in memory at a time, about; a snapshot row counts as many as it has channels."""


def export(
    store: Store,
    run_id: str,
    table: str,
    file_format: FileFormat,
    *,
    from_step: int | None = None,
    to_step: int | None = None,
) -> Iterator[bytes]:
    """The rows of a table, in full precision, ordered by step within chunks of steps that follow each other.

    A file in parquet or arrow says of which run and table it is, so that it can be diagnosed (`service.recordings`).

    What stands at the start is sent: rows of later steps that arrive meanwhile are not in. Between two chunks no
    connection of the store is held, however slowly the file is taken. In csv, null is an empty field, NaN is `nan`,
    and a vector is one field, `[1,2,nan]`.

    Raises:
        NotFound: no such run.
        Invalid: no such table or format, or an empty range.
    """
    if table not in TABLES:
        raise Invalid(f"there is no table {table!r}; known: {', '.join(TABLES)}")
    if file_format not in MEDIA_TYPES:
        raise Invalid(f"there is no format {file_format!r}; known: {', '.join(MEDIA_TYPES)}")
    state = known(store, run_id)
    part = part_of(state, 1, from_step=from_step, to_step=to_step)
    text = file_format == "csv"
    stored = state.stored
    about = {RUN_KEY: stored.record.model_dump_json(), STATUS_KEY: stored.status, TABLE_KEY: table}
    schema = _schema(table, text).with_metadata(about)
    columns = ", ".join(
        f"toString({field.name}) AS {field.name}" if text and pa.types.is_list(field.type) else field.name
        for field in _schema(table, False)
    )
    # Of a row that was sent twice the newer one stands last.
    order = [*(name for name in ("step", "rank", "layer", "name") if name in schema.names), "seq"]
    sql = f"""
        SELECT {columns} FROM {table}
        WHERE run_id = {{run:String}} AND step >= {{first:UInt64}} AND step <= {{last:UInt64}}
        ORDER BY {", ".join(order)}
        """
    return _written(store, run_id, sql, schema, file_format, _chunks(store, run_id, table, part.first, part.last))


def _schema(table: str, text: bool) -> pa.Schema:
    fields = [pa.field("rank", pa.uint32(), nullable=False), *TABLES[table]]
    return pa.schema([pa.field(f.name, pa.string()) if text and pa.types.is_list(f.type) else f for f in fields])


def _chunks(store: Store, run_id: str, table: str, first: int, last: int) -> list[tuple[int, int]]:
    """Ranges of steps, both ends included, in order: `CHUNK_ROWS` rows each, and what is left of the last step."""
    weight = "length(mu_b)" if table == "channels" else "1"
    ranges = store.engine.rows(
        f"""SELECT min(step) AS first, max(step) AS last FROM (
            SELECT step, intDiv(sum(rows) OVER (ORDER BY step) - rows, {{most:UInt64}}) AS chunk FROM (
                SELECT step, sum({weight}) AS rows FROM {table}
                WHERE run_id = {{run:String}} AND step >= {{first:UInt64}} AND step <= {{last:UInt64}}
                GROUP BY step
            )
        ) GROUP BY chunk ORDER BY chunk""",
        run=run_id,
        first=first,
        last=last,
        most=CHUNK_ROWS,
    )
    return [(row["first"], row["last"]) for row in ranges.to_pylist()]


def _written(
    store: Store, run_id: str, sql: str, schema: pa.Schema, file_format: FileFormat, chunks: list[tuple[int, int]]
) -> Iterator[bytes]:
    sink = _Sink()
    with _writer(sink, schema, file_format) as writer:
        for first, last in chunks:
            rows = store.engine.rows(sql, run=run_id, first=first, last=last)
            writer.write_table(rows.cast(schema))
            yield sink.taken()
    yield sink.taken()


def _writer(sink: _Sink, schema: pa.Schema, file_format: FileFormat) -> Any:
    if file_format == "parquet":
        return pa.parquet.ParquetWriter(sink, schema, compression="zstd")
    if file_format == "csv":
        return pa.csv.CSVWriter(sink, schema)
    return pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))


class _Sink(io.RawIOBase):
    """A file whose content is taken away while it is written."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def taken(self) -> bytes:
        """What was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
