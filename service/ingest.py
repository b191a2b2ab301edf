"""Reading a batch: a request's body as tables of the wire schema, held against the run it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from brn_core.wire import MAX_SCALAR_NAME, PROBE_FEATURES, TABLES, RunCreate, WireError, decode_batch
from service.errors import Invalid, TooLarge, some

MAX_STEP: Final = 2**53
"""Steps must fit a JSON number."""

MAX_JSON_BYTES: Final = 4 * 2**20
"""Longest JSON body; it takes many times its size in memory. Arrow is for more."""

JSON_GROWTH: Final = 25
"""Bytes of memory a byte of JSON may take: `{},` becomes an object of 72."""

MAX_TEXT: Final = 2000
"""Most characters of an error text that repeats what was sent."""

_NON_FINITE: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def from_arrow(body: bytes) -> dict[str, pa.Table]:
    """The tables of an Arrow body. Takes `ipc.decoded_bytes(body)` of memory: ask before.

    Raises:
        Invalid: it does not follow the wire schema.
    """
    try:
        return decode_batch(body)
    except WireError as error:
        raise Invalid(str(error)[:MAX_TEXT]) from error


def from_json(body: bytes) -> dict[str, pa.Table]:
    """The tables of a JSON body, `{"tables": {"layers": [{row}, ...]}}`; a nullable column may be left out of a row.

    Takes up to `JSON_GROWTH` times the body of memory.

    Raises:
        TooLarge: it has more than `MAX_JSON_BYTES`.
        Invalid: it does not follow the wire schema.
    """
    if len(body) > MAX_JSON_BYTES:
        raise TooLarge(f"a JSON body may have {MAX_JSON_BYTES} bytes, got {len(body)}: send it in parts, or as Arrow")
    try:
        return _tables(json.loads(body))
    except ValueError as error:
        raise Invalid(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise Invalid("the body nests deeper than any batch does") from error


def _tables(content: Any) -> dict[str, pa.Table]:
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, dict) or len(content) != 1:
        raise Invalid('the body must be {"tables": {"layers": [{row}, ...], ...}}')
    found = {}
    for name, rows in tables.items():
        if name not in TABLES:
            raise Invalid(f"unknown table {name[:60]!r}; known: {', '.join(TABLES)}")
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
            shown = some([repr(column[:60]) for column in sorted(unknown)])
            raise Invalid(f"table {name!r}, row {number}: unknown columns {shown}; known: {some(schema.names)}")
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


def check(run: RunCreate, rank: int, tables: Mapping[str, pa.Table], max_rows: int) -> None:
    """Holds a batch of the right schema against its run.

    Raises:
        Invalid: it contradicts the run, holds no row, or more than `max_rows`.
    """
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
            if not 1 <= len(name) <= MAX_SCALAR_NAME:
                raise Invalid(
                    f"a scalar's name must have 1 to {MAX_SCALAR_NAME} characters, got {len(name)}: {name[:40]!r}"
                )


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
