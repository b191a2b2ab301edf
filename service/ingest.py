"""Taking a batch in: decoded, held against the run, stored once, acknowledged when it is on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from brn_core.wire import PROBE_FEATURES, TABLES, RunCreate, WireError, decode_batch
from service import query
from service.errors import Invalid, some
from service.schemas import Accepted
from service.store import Store

MAX_STEP: Final = 2**53
"""Steps must fit a JSON number."""

MAX_NAME: Final = 200
"""Most characters of a scalar's name."""

_NON_FINITE: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def accept(store: Store, run_id: str, rank: int, seq: int, tables: Mapping[str, pa.Table], max_rows: int) -> Accepted:
    """Stores a batch unless `(run, rank, seq)` is stored already; when this returns, its rows are on disk.

    Raises:
        NotFound: no such run; create it and send the batch again.
        Invalid: the batch contradicts the schema or the run.
    """
    with store.writing():  # between the look whether a batch is there and its writing nobody else may write it
        run = query.stored_run(store, run_id)
        _check(run.record, rank, tables, max_rows)
        duplicate = query.is_stored(store, run_id, rank, seq)
        if not duplicate:
            store.put_batch(run, rank, seq, tables)
    rows = 0 if duplicate else sum(table.num_rows for table in tables.values())
    return Accepted(rows=rows, duplicate=duplicate, verdict=run.verdict or query.NOT_YET)


def from_arrow(body: bytes) -> dict[str, pa.Table]:
    """The tables of an Arrow body.

    Raises:
        Invalid: it does not follow the wire schema.
    """
    try:
        return decode_batch(body)
    except WireError as error:
        raise Invalid(str(error)) from error


def from_json(body: bytes) -> dict[str, pa.Table]:
    """The tables of a JSON body, `{"tables": {"layers": [{row}, ...]}}`; a nullable column may be left out of a row.

    Raises:
        Invalid: it does not follow the wire schema.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the body is not JSON: {error}") from error
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, dict) or len(content) != 1:
        raise Invalid('the body must be {"tables": {"layers": [{row}, ...], ...}}')
    found = {}
    for name, rows in tables.items():
        if name not in TABLES:
            raise Invalid(f"unknown table {name!r}; known: {', '.join(TABLES)}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Invalid(f"table {name!r} must be a list of rows, each an object of columns")
        found[name] = _table(name, rows)
    return found


def _table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    schema = TABLES[name]
    columns = []
    for field in schema:
        values = []
        for number, row in enumerate(rows):
            value = row.get(field.name)
            if value is None and not field.nullable:
                raise Invalid(f"table {name!r}, row {number}: column {field.name!r} is missing or null")
            try:
                values.append(None if value is None else _value(field.type, value))
            except (TypeError, OverflowError) as error:
                raise Invalid(f"table {name!r}, row {number}: column {field.name!r} {error}") from error
        try:
            columns.append(pa.array(values, field.type))
        except (ValueError, OverflowError) as error:  # ArrowInvalid is a ValueError, so is a broken surrogate
            raise Invalid(f"table {name!r}, column {field.name!r}: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows):
        if unknown := row.keys() - set(schema.names):
            raise Invalid(f"table {name!r}, row {number}: unknown columns {sorted(unknown)}; known: {schema.names}")
    return pa.Table.from_arrays(columns, schema=schema)


def _value(kind: pa.DataType, value: Any) -> Any:
    """A JSON value as Arrow takes it. Arrow itself would cut 1.5 to 1 and take true for 1.

    Raises:
        TypeError: the value is not of this kind; the text goes on from the column's name.
    """
    if pa.types.is_list(kind):
        if isinstance(value, list):
            return [_value(kind.value_type, item) for item in value]
        raise TypeError(f"must be a list of numbers, got {value!r:.40}")
    if pa.types.is_string(kind):
        if isinstance(value, str):
            return value
        raise TypeError(f"must be a text, got {value!r:.40}")
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if pa.types.is_floating(kind) else value
    if pa.types.is_floating(kind):
        if isinstance(value, float):
            return value
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        raise TypeError(f'must be a number, "NaN", "Infinity" or "-Infinity", got {value!r:.40}')
    raise TypeError(f"must be a whole number, got {value!r:.40}")


def _check(run: RunCreate, rank: int, tables: Mapping[str, pa.Table], max_rows: int) -> None:
    """Holds a batch of the right schema against its run."""
    if rank >= run.world_size:
        raise Invalid(f"run {run.id!r} has world_size {run.world_size}: rank must be below it, got {rank}")
    rows = sum(table.num_rows for table in tables.values())
    if rows == 0:
        raise Invalid("the batch holds no row")
    if rows > max_rows:
        raise Invalid(f"a batch may hold {max_rows} rows, got {rows}: send it in parts")
    for name, table in tables.items():
        if table.num_rows == 0:
            continue
        step = pc.max(table.column("step")).as_py()
        if step > MAX_STEP:
            raise Invalid(f"table {name!r}: step must be at most 2**53, got {step}")
        if "layer" in table.schema.names:
            layer = pc.max(table.column("layer")).as_py()
            if layer >= len(run.layers):
                raise Invalid(
                    f"table {name!r}: there is no layer {layer}; run {run.id!r} has {len(run.layers)} layers: "
                    f"{some([known.name for known in run.layers])}"
                )
    if "probe" in tables:
        for vector in ("mean", "var", "adjacency"):
            _check_vectors("probe", vector, tables["probe"], pa.scalar(PROBE_FEATURES, pa.int32()))
    if "channels" in tables:
        table = tables["channels"]
        channels = pa.array([layer.channels for layer in run.layers], pa.int32())
        expected = channels.take(table.column("layer").combine_chunks())
        for field in table.schema:
            if pa.types.is_list(field.type):
                _check_vectors("channels", field.name, table, expected)
    if "scalars" in tables:
        names = tables["scalars"].column("name").unique().to_pylist()
        for name in names:
            if not 1 <= len(name) <= MAX_NAME:
                raise Invalid(f"a scalar's name must have 1 to {MAX_NAME} characters, got {len(name)}: {name[:40]!r}")


def _check_vectors(name: str, column: str, table: pa.Table, expected: pa.Scalar | pa.Array) -> None:
    vectors = table.column(column).combine_chunks()
    if vectors.flatten().null_count:
        raise Invalid(f"table {name!r}: {column!r} holds null inside a vector; a number that does not exist is NaN")
    lengths = pc.list_value_length(vectors)
    wrong = pc.not_equal(lengths, expected)
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        want = expected.as_py() if isinstance(expected, pa.Scalar) else expected[row].as_py()
        raise Invalid(f"table {name!r}, row {row}: {column!r} must have {want} entries, got {lengths[row].as_py()}")
