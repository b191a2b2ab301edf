"""Statistics and scalars over steps: series, heatmap, summary, scalars."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from brn_core.wire import METRICS
from service.answers.buckets import Slice, aggregates, checked_stats, numbers, part_of, recent_step
from service.answers.records import known
from service.errors import Invalid, some
from service.schemas import Buckets, Heatmap, LayerSummary, Scalars, ScalarSeries, Series, Summary
from service.store import Store


def series(
    store: Store,
    run_id: str,
    stats: Sequence[str],
    *,
    layer: int | None = None,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    points: int = 500,
    extremes: Collection[str] | None = None,
) -> Series:
    """Statistics over steps, of one layer or over all, of one rank or over all.

    Minimum and maximum cost as much as the mean: `extremes` names the statistics that they are wanted of (None: all),
    the others' are empty.

    Raises:
        NotFound: no such run.
        Invalid: no such statistic or layer, or an empty range.
    """
    stats = checked_stats(stats)
    part = part_of(known(store, run_id), points, layer=layer, rank=rank, from_step=from_step, to_step=to_step)
    steps, found = buckets_of(store, part, stats, extremes)
    return Series(run=run_id, layer=layer, rank=rank, bucket_steps=part.width, steps=steps, series=found)


def buckets_of(
    store: Store, part: Slice, stats: Sequence[str], extremes: Collection[str] | None = None
) -> tuple[list[int], dict[str, Buckets]]:
    """The steps of the buckets that have rows, and each (checked) statistic over them; `extremes` as of `series`."""
    whole = [stat for stat in stats if extremes is None or stat in extremes]
    asked = [aggregates(stat) if stat in whole else f"avg({stat}) AS {stat}_mean" for stat in stats]
    table = store.engine.rows(
        f"""
        SELECT max(step) AS newest, {", ".join(asked)}
        FROM layers WHERE {part.where}
        GROUP BY intDiv(step, {{width:UInt64}}) ORDER BY newest
        """,
        **part.parameters,
    )
    found = {
        stat: Buckets(
            min=numbers(table.column(f"{stat}_min")) if stat in whole else [],
            mean=numbers(table.column(f"{stat}_mean")),
            max=numbers(table.column(f"{stat}_max")) if stat in whole else [],
        )
        for stat in stats
    }
    return table.column("newest").to_pylist(), found


def heatmap(
    store: Store,
    run_id: str,
    stat: str,
    *,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    points: int = 300,
) -> Heatmap:
    """One statistic of all layers over steps: the mean over the bucket and, unless one is named, over ranks.

    Raises:
        NotFound: no such run.
        Invalid: no such statistic, or an empty range.
    """
    (stat,) = checked_stats([stat])
    state = known(store, run_id)
    part = part_of(state, points, rank=rank, from_step=from_step, to_step=to_step)
    names = [layer.name for layer in state.stored.record.layers]
    L = max(1, len(names))
    # Layer and bucket as one small integer: grouping by it takes a third of the time that two keys take, and by one of
    # 16 bits, which the engine looks up in an array, a tenth less. The range is closed, so that no row that arrives
    # meanwhile has a bucket beyond it.
    cells = (part.last // part.width - part.first // part.width + 1) * L
    kind = "UInt16" if cells <= 2**16 else "UInt32"
    table = store.engine.rows(
        f"""
        SELECT to{kind}((intDiv(step, {{width:UInt64}}) - {{bucket:UInt64}}) * {{layers:UInt64}} + layer) AS cell,
               max(step) AS newest, avg({stat}) AS value
        FROM layers WHERE {part.where} AND step >= {{first:UInt64}} AND step <= {{last:UInt64}}
            AND layer < {{layers:UInt64}}
        GROUP BY cell
        """,
        **part.parameters,
        first=part.first,
        last=part.last,
        bucket=part.first // part.width,
        layers=L,
    )
    cell = table.column("cell").to_numpy().astype(np.int64)
    buckets, at = np.unique(cell // L, return_inverse=True)
    steps = np.zeros(len(buckets), dtype=np.int64)
    np.maximum.at(steps, at, table.column("newest").to_numpy().astype(np.int64))
    known_LT = np.zeros((len(names), len(buckets)), dtype=bool)
    values_LT = np.full((len(names), len(buckets)), np.nan)
    if names:
        known_LT[cell % L, at] = table.column("value").is_valid().to_numpy()
        values_LT[cell % L, at] = table.column("value").to_numpy()
    values: list[list[float | None]] = values_LT.tolist()
    for layer, bucket in np.argwhere(~known_LT):
        values[layer][bucket] = None
    return Heatmap(
        run=run_id,
        stat=stat,
        rank=rank,
        bucket_steps=part.width,
        steps=steps.tolist(),
        layers=names,
        values=values,
    )


def summary(store: Store, run_id: str) -> Summary:
    """Every statistic of every layer at the layer's newest step, mean over ranks; layers without rows are left out."""
    state = known(store, run_id)
    names = [layer.name for layer in state.stored.record.layers]
    recent = _newest_rows(store, run_id, range(len(names)), recent_step(store, run_id, 1))
    # A layer that is no longer recorded has its newest row further back. The index knows those without any row.
    missing = sorted(set(range(len(names))) - {row.layer for row in recent})
    older = _newest_rows(store, run_id, missing, 0) if missing and recent else []
    rows = sorted(recent + older, key=lambda row: row.layer)
    return Summary(
        run=run_id,
        last_step=state.extent.last_step,
        layers=[row.model_copy(update={"name": names[row.layer]}) for row in rows],
    )


def _newest_rows(store: Store, run_id: str, layers: Sequence[int], from_step: int) -> list[LayerSummary]:
    """Rows of these layers at their newest step, mean over ranks, where it is `from_step` or later."""
    where = "run_id = {run:String} AND step >= {from:UInt64} AND layer IN {layers:Array(UInt16)}"
    table = store.engine.rows(
        f"""
        SELECT layer, step, {", ".join(f"avg({metric.name}) AS {metric.name}_mean" for metric in METRICS)}
        FROM layers
        WHERE {where} AND (layer, step) IN (SELECT layer, max(step) FROM layers WHERE {where} GROUP BY layer)
        GROUP BY layer, step ORDER BY layer
        """,
        run=run_id,
        layers=list(layers),
        **{"from": from_step},
    )
    return [
        LayerSummary(
            layer=row["layer"],
            name="",
            step=row["step"],
            values={metric.name: row[f"{metric.name}_mean"] for metric in METRICS},
        )
        for row in table.to_pylist()
    ]


def scalars(
    store: Store,
    run_id: str,
    names: Sequence[str] | None = None,
    *,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    points: int = 500,
) -> Scalars:
    """The user's scalars over steps, and ours (`brn/...`); all of them where none is named.

    Raises:
        NotFound: no such run.
        Invalid: no such scalar, or an empty range.
    """
    part = part_of(known(store, run_id), points, rank=rank, from_step=from_step, to_step=to_step)
    existing = scalar_names(store, run_id)
    wanted = existing if names is None else list(dict.fromkeys(names))
    for name in wanted:
        if name not in existing:
            raise Invalid(f"there is no scalar {name!r}; run {run_id!r} has: {some(existing)}")
    table = store.engine.rows(
        f"""
        SELECT name, groupArray(newest) AS steps, groupArray(value_min) AS min, groupArray(value_mean) AS mean,
               groupArray(value_max) AS max
        FROM (
            SELECT name, max(step) AS newest, {aggregates("value")}
            FROM scalars WHERE {part.where} AND name IN {{names:Array(String)}}
            GROUP BY name, intDiv(step, {{width:UInt64}}) ORDER BY name, newest
        ) GROUP BY name
        """,
        **part.parameters,
        names=wanted,
    )
    found = {row.pop("name"): ScalarSeries(**row) for row in table.to_pylist()}
    empty = ScalarSeries(steps=[], min=[], mean=[], max=[])
    return Scalars(
        run=run_id,
        names=existing,
        bucket_steps=part.width,
        series={name: found.get(name, empty) for name in wanted},
    )


def scalar_names(store: Store, run_id: str) -> list[str]:
    """The scalars a run has, in alphabetical order."""
    stored = store.rows("SELECT DISTINCT name FROM scalars WHERE run_id = {run:String} ORDER BY name", run=run_id)
    names: list[str] = stored.column("name").to_pylist()
    return names
