"""The rows a question is about, and the buckets of steps they are put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from brn_core.wire import METRIC
from service.answers.records import State
from service.errors import Invalid
from service.store import Store


def bucket_width(first: int, last: int, points: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that covers the steps `first` to `last` in at most `points` buckets."""
    decade = 1
    while True:
        for width in (decade, 2 * decade, 5 * decade):
            if last // width - first // width < points:
                return width
        decade *= 10


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows a question is about: a WHERE clause with its parameters, and the width of its buckets.

    `{width:UInt64}` is among the parameters. `first` and `last` are the steps it can reach.
    """

    where: str
    parameters: dict[str, Any]
    width: int
    first: int
    last: int


def part_of(
    state: State,
    points: int,
    *,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    layer: int | None = None,
    width: int | None = None,
) -> Slice:
    """The rows of a run between two steps, both included; of one layer or rank where it is named.

    Buckets have the `width` given, else the narrowest that makes at most `points` of them.

    Raises:
        Invalid: an empty range, or a layer the run does not have.
    """
    if points < 1:
        raise Invalid(f"points must be >= 1, got {points}")
    for name, value in (("from", from_step), ("to", to_step)):
        if value is not None and not 0 <= value < 2**63:
            raise Invalid(f"{name} must be a step >= 0, got {value}")
    if from_step is not None and to_step is not None and from_step > to_step:
        raise Invalid(f"from must not be after to, got from={from_step} and to={to_step}")
    if rank is not None and not 0 <= rank < 2**32:
        raise Invalid(f"rank must be >= 0, got {rank}")
    run, extent = state.stored.record, state.extent
    count = len(run.layers)
    if layer is not None and not 0 <= layer < count:
        exists = f"layers 0 to {count - 1}" if count else "no layers"
        raise Invalid(f"there is no layer {layer}; run {run.id!r} has {exists}")

    clauses = ["run_id = {run:String}"]
    parameters: dict[str, Any] = {"run": run.id}
    for clause, name, bound in (
        ("layer = {layer:UInt16}", "layer", layer),
        ("rank = {rank:UInt32}", "rank", rank),
        ("step >= {from:UInt64}", "from", from_step),
        ("step <= {to:UInt64}", "to", to_step),
    ):
        if bound is not None:
            clauses.append(clause)
            parameters[name] = bound
    first = max(extent.first_step or 0, from_step or 0)
    last = extent.last_step or 0
    last = max(first, last if to_step is None else min(last, to_step))
    if width is None:
        width = bucket_width(first, last, points)
    return Slice(" AND ".join(clauses), parameters | {"width": width}, width, first, last)


def checked_stats(stats: Sequence[str]) -> list[str]:
    """The statistics asked for, once each. From here on they are names of the schema, fit to stand in SQL.

    Raises:
        Invalid: none, or one that does not exist.
    """
    if not stats:
        raise Invalid(f"name at least one statistic with stat=; known: {', '.join(METRIC)}")
    for stat in stats:
        if stat not in METRIC:
            raise Invalid(f"there is no statistic {stat!r}; known: {', '.join(METRIC)}")
    return list(dict.fromkeys(stats))


def aggregates(column: str) -> str:
    """SQL for min, mean and max of a bucket, by the rule for NaN at the top of this package."""

    def extreme(name: str) -> str:
        value = f"ifNull({name}OrNullIf({column}, NOT isNaN({column})), nan)"
        return f"if(count({column}) = 0, NULL, {value}) AS {column}_{name}"

    return f"{extreme('min')}, avg({column}) AS {column}_mean, {extreme('max')}"


def recent_step(store: Store, run_id: str, rows: int) -> int:
    """A step from which on at least `rows` rows of the table `layers` are stored, if there are as many.

    From the list of batches, which is thousands of times shorter: what asks for the newest rows need not look for
    them among all.
    """
    found = store.engine.rows(
        """
        SELECT min(first_step) AS step FROM (
            SELECT first_step, sum(layer_rows) OVER (ORDER BY last_step DESC, rank, seq) - layer_rows AS newer
            FROM batches WHERE run_id = {run:String} AND layer_rows > 0
        ) WHERE newer < {rows:UInt64}
        """,
        run=run_id,
        rows=rows,
    )
    return int(found.column("step")[0].as_py() or 0)


def numbers(column: pa.ChunkedArray) -> list[float | None]:
    """A column's numbers; null is None."""
    values: list[float | None] = column.to_pylist()
    return values
