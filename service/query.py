"""Questions to the store: what is drawn, listed and diagnosed. Down-sampling happens in SQL.

Down-sampling. A bucket holds `w` consecutive steps, `intDiv(step, w)`, where `w` is the smallest of 1, 2, 5, 10, 20,
50, ... that needs no more buckets than the points asked for. So buckets are aligned to absolute steps and depend on
steps only: the same question over the same rows always has the same answer, and every statistic shares its buckets.
A bucket is drawn at the newest step in it, hence the newest point is always in.

Numbers. Missing is null. `mean` is the plain mean: a NaN in the bucket makes it NaN, so that a single bad step cannot
hide. `min` and `max` are over the numbers that are not NaN (infinities count), so that the band stays readable; a
bucket of nothing but NaN has NaN for all three. Statistics are stored as float32 and given to 7 significant digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brn_core.wire import METRIC, METRICS, PROBE_FEATURES, Layer, RunCreate
from service.diagnosis.finding import Diagnosis, Verdict
from service.diagnosis.rules import diagnose
from service.diagnosis.window import LAYER_COLUMNS, Floats, LayerRows, NonFinite, ProbeRows, ScalarRows, Window
from service.errors import Invalid, NotFound, some
from service.schemas import Buckets, Heatmap, LayerSummary, Run, Scalars, ScalarSeries, Series, Summary
from service.store import Extent, Store, StoredRun

PROBE_WINDOW_STEPS: Final = 2000
"""Newest recorded steps of the input probe that a diagnosis looks at (the evidence of a stream adds up slowly)."""

LAYER_WINDOW_STEPS: Final = 400
"""Newest recorded steps of the layer statistics that a diagnosis looks at."""

WINDOW_ROWS: Final = 200_000
"""Most rows of a table in a window: with many ranks and layers fewer steps are looked at, at least 50."""

SCALAR_WINDOW_STEPS: Final = 2000
"""Newest recorded steps of each scalar that a diagnosis looks at."""

NOT_YET: Final = Verdict(code="NO_DATA", severity="info", summary="No diagnosis was computed yet.")
"""The verdict of a run before its first diagnosis."""


# -------- runs


@dataclass(frozen=True, slots=True)
class _State:
    """A run as stored now: its record and how far its rows reach."""

    stored: StoredRun
    extent: Extent

    @property
    def run(self) -> Run:
        stored, extent = self.stored, self.extent
        return Run(
            **{name: getattr(stored.record, name) for name in RunCreate.model_fields},
            status=stored.status,
            created_at=stored.created_at,
            updated_at=max(stored.changed_at, extent.received_at or stored.changed_at),
            last_step=extent.last_step,
            rows=extent.layer_rows,
            verdict=stored.verdict or NOT_YET,
        )

    @property
    def cursor(self) -> tuple[object, ...]:
        """Differs whenever a batch arrived or the run changed, and not when its verdict did."""
        return (self.stored.created_at, self.stored.changed_at, self.extent.batches, self.extent.received_at)


def _known(store: Store, run_id: str) -> _State:
    return _State(stored_run(store, run_id), store.extent(run_id))


def stored_run(store: Store, run_id: str) -> StoredRun:
    """The record of a run.

    Raises:
        NotFound: there is none of this id.
    """
    found = store.record(run_id)
    if found is None:
        newest = store.rows("SELECT run_id FROM runs FINAL ORDER BY created_at DESC LIMIT 21").column(0).to_pylist()
        raise NotFound(f"there is no run {run_id!r}; newest runs: {some(newest)}")
    return found


def runs(store: Store) -> list[Run]:
    """All runs, newest first, each with its last computed verdict; without their layers (see `layers`)."""
    extents = store.extents()
    return [_State(stored, extents.get(stored.record.id, Extent())).run for stored in store.records()]


def run(store: Store, run_id: str) -> Run:
    """One run.

    Raises:
        NotFound: there is none of this id.
    """
    return _known(store, run_id).run


def layers(store: Store, run_id: str) -> list[Layer]:
    """The normalization layers of a run, in the network's order."""
    return list(stored_run(store, run_id).record.layers)


def is_stored(store: Store, run_id: str, rank: int, seq: int) -> bool:
    """Whether this batch is completely stored."""
    sql = "SELECT count() FROM batches WHERE run_id = {run:String} AND rank = {rank:UInt32} AND seq = {seq:UInt64}"
    return bool(store.rows(sql, run=run_id, rank=rank, seq=seq).column(0)[0].as_py())


# -------- down-sampling


def bucket_width(first: int, last: int, points: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that covers the steps `first` to `last` in at most `points` buckets."""
    width, factors = 1, (2, 5, 10)
    while True:
        for factor in (1, *factors[:2]):
            if last // (width * factor) - first // (width * factor) < points:
                return width * factor
        width *= 10


@dataclass(frozen=True, slots=True)
class _Slice:
    """The rows a question is about: a WHERE clause with its parameters, and the width of its buckets."""

    where: str
    parameters: dict[str, Any]
    width: int


def _slice(
    state: _State,
    points: int,
    *,
    rank: int | None,
    from_step: int | None,
    to_step: int | None,
    layer: int | None = None,
) -> _Slice:
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
    for clause, name, value in (
        ("layer = {layer:UInt16}", "layer", layer),
        ("rank = {rank:UInt32}", "rank", rank),
        ("step >= {from:UInt64}", "from", from_step),
        ("step <= {to:UInt64}", "to", to_step),
    ):
        if value is not None:
            clauses.append(clause)
            parameters[name] = value
    first = max(extent.first_step or 0, from_step or 0)
    last = extent.last_step or 0
    last = max(first, last if to_step is None else min(last, to_step))
    width = bucket_width(first, last, points)
    return _Slice(" AND ".join(clauses), parameters | {"width": width}, width)


def _checked_stats(stats: Sequence[str]) -> list[str]:
    """The statistics asked for, once each. From here on they are names of the schema, fit to stand in SQL."""
    if not stats:
        raise Invalid(f"name at least one statistic with stat=; known: {', '.join(METRIC)}")
    for stat in stats:
        if stat not in METRIC:
            raise Invalid(f"there is no statistic {stat!r}; known: {', '.join(METRIC)}")
    return list(dict.fromkeys(stats))


def _aggregates(column: str, prefix: str) -> str:
    """SQL for min, mean and max of a bucket, by the rule for NaN at the top of this file."""

    def extreme(name: str) -> str:
        value = f"ifNull({name}OrNullIf({column}, NOT isNaN({column})), nan)"
        return f"if(count({column}) = 0, NULL, {value}) AS {prefix}_{name}"

    return f"{extreme('min')}, avg({column}) AS {prefix}_mean, {extreme('max')}"


def _numbers(column: pa.ChunkedArray) -> list[float | None]:
    return [_rounded(value) for value in column.to_pylist()]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


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
) -> Series:
    """Statistics over steps, of one layer or over all, of one rank or over all.

    Raises:
        NotFound: no such run.
        Invalid: no such statistic or layer, or an empty range.
    """
    stats = _checked_stats(stats)
    part = _slice(_known(store, run_id), points, layer=layer, rank=rank, from_step=from_step, to_step=to_step)
    table = store.rows(
        f"""
        SELECT max(step) AS newest, {", ".join(_aggregates(stat, stat) for stat in stats)}
        FROM layers WHERE {part.where}
        GROUP BY intDiv(step, {{width:UInt64}}) ORDER BY newest
        """,
        **part.parameters,
    )
    return Series(
        run=run_id,
        layer=layer,
        rank=rank,
        bucket_steps=part.width,
        steps=table.column("newest").to_pylist(),
        series={
            stat: Buckets(
                min=_numbers(table.column(f"{stat}_min")),
                mean=_numbers(table.column(f"{stat}_mean")),
                max=_numbers(table.column(f"{stat}_max")),
            )
            for stat in stats
        },
    )


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
    (stat,) = _checked_stats([stat])
    state = _known(store, run_id)
    part = _slice(state, points, rank=rank, from_step=from_step, to_step=to_step)
    names = [layer.name for layer in state.stored.record.layers]
    table = store.rows(
        f"""
        SELECT layer, intDiv(step, {{width:UInt64}}) AS bucket, max(step) AS newest, avg({stat}) AS value
        FROM layers WHERE {part.where} AND layer < {{layers:UInt32}}
        GROUP BY layer, bucket ORDER BY bucket, layer
        """,
        **part.parameters,
        layers=len(names),
    )
    buckets, position = np.unique(table.column("bucket").to_numpy(), return_inverse=True)
    steps = np.zeros(len(buckets), dtype=np.int64)
    np.maximum.at(steps, position, table.column("newest").to_numpy().astype(np.int64))
    values: list[list[float | None]] = [[None] * len(buckets) for _ in names]
    for layer, at, value in zip(
        table.column("layer").to_pylist(), position.tolist(), _numbers(table.column("value")), strict=True
    ):
        values[layer][at] = value
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
    state = _known(store, run_id)
    names = [layer.name for layer in state.stored.record.layers]
    table = store.rows(
        f"""
        SELECT layer, step, {", ".join(f"avg({metric.name}) AS {metric.name}_mean" for metric in METRICS)}
        FROM layers
        WHERE run_id = {{run:String}} AND layer < {{layers:UInt32}} AND (layer, step) IN (
            SELECT layer, max(step) FROM layers WHERE run_id = {{run:String}} GROUP BY layer
        )
        GROUP BY layer, step ORDER BY layer
        """,
        run=run_id,
        layers=len(names),
    )
    return Summary(
        run=run_id,
        last_step=state.extent.last_step,
        layers=[
            LayerSummary(
                layer=row["layer"],
                name=names[row["layer"]],
                step=row["step"],
                values={metric.name: _rounded(row[f"{metric.name}_mean"]) for metric in METRICS},
            )
            for row in table.to_pylist()
        ],
    )


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
    state = _known(store, run_id)
    part = _slice(state, points, rank=rank, from_step=from_step, to_step=to_step)
    stored = store.rows("SELECT DISTINCT name FROM scalars WHERE run_id = {run:String} ORDER BY name", run=run_id)
    existing: list[str] = stored.column("name").to_pylist()
    wanted = existing if names is None else list(dict.fromkeys(names))
    for name in wanted:
        if name not in existing:
            raise Invalid(f"there is no scalar {name!r}; run {run_id!r} has: {some(existing)}")
    table = store.rows(
        f"""
        SELECT name, max(step) AS newest, {_aggregates("value", "value")}
        FROM scalars WHERE {part.where} AND name IN {{names:Array(String)}}
        GROUP BY name, intDiv(step, {{width:UInt64}}) ORDER BY name, newest
        """,
        **part.parameters,
        names=wanted,
    )
    found: dict[str, ScalarSeries] = {name: ScalarSeries(steps=[], min=[], mean=[], max=[]) for name in wanted}
    for row in table.to_pylist():
        target = found[row["name"]]
        target.steps.append(row["newest"])
        target.min.append(row["value_min"])
        target.mean.append(row["value_mean"])
        target.max.append(row["value_max"])
    return Scalars(run=run_id, names=existing, bucket_steps=part.width, series=found)


# -------- diagnosis


def diagnosis(store: Store, run_id: str) -> Diagnosis:
    """What the rules say of a run now. Computed once for what is stored; the verdict is kept for the list of runs."""
    state = _known(store, run_id)

    def compute() -> Diagnosis:
        found = diagnose(_window(store, state))
        if found.verdict != state.stored.verdict:
            store.put_verdict(run_id, found.verdict)
        return found

    return store.diagnoses.get((run_id, *state.cursor), compute)


def window(store: Store, run_id: str) -> Window:
    """The rows a diagnosis of a run looks at: the newest recorded steps, oldest first, as arrays."""
    return _window(store, _known(store, run_id))


def _window(store: Store, state: _State) -> Window:
    run, extent = state.stored.record, state.extent
    K = max(run.world_size, (extent.last_rank or 0) + 1)
    L = len(run.layers)
    return Window(
        run=run.id,
        status=state.stored.status,
        world_size=run.world_size,
        batch_size=run.batch_size,
        planned_steps=run.planned_steps,
        schedule=run.schedule,
        config=dict(run.config),
        layers=run.layers,
        last_step=extent.last_step,
        probe=_probe_rows(store, run.id, K),
        rows=_layer_rows(store, run.id, K, L),
        scalars=_scalar_rows(store, run.id),
        nonfinite=_first_nonfinite(store, run.id, L),
    )


def _newest_steps(table: str, steps: int, rows_a_step: int) -> str:
    """SQL: the rows of the newest recorded steps of a table.

    Later batches come last, so that a step sent twice (a run that went on from a checkpoint) ends up with its
    newer rows.
    """
    count = min(steps, max(50, WINDOW_ROWS // max(1, rows_a_step)))
    return f"""
        FROM {table} WHERE run_id = {{run:String}} AND step >= (
            SELECT min(step) FROM (
                SELECT DISTINCT step FROM {table} WHERE run_id = {{run:String}} ORDER BY step DESC LIMIT {count}
            )
        ) ORDER BY step, seq"""


def _probe_rows(store: Store, run_id: str, K: int) -> ProbeRows:
    table = store.rows(
        f"SELECT step, rank, samples, mean, var, adjacency {_newest_steps('probe', PROBE_WINDOW_STEPS, K)}", run=run_id
    )
    steps_T, at = np.unique(table.column("step").to_numpy().astype(np.int64), return_inverse=True)
    rank = table.column("rank").to_numpy()

    def vectors(name: str) -> Floats:
        values_TKF = np.full((len(steps_T), K, PROBE_FEATURES), np.nan)
        flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        values_TKF[at, rank] = flat.reshape(-1, PROBE_FEATURES)
        return values_TKF

    samples_TK = np.full((len(steps_T), K), np.nan)
    samples_TK[at, rank] = table.column("samples").to_numpy()
    return ProbeRows(steps_T, samples_TK, vectors("mean"), vectors("var"), vectors("adjacency"))


def _layer_rows(store: Store, run_id: str, K: int, L: int) -> LayerRows:
    table = store.rows(
        f"SELECT step, rank, layer, {', '.join(LAYER_COLUMNS)} {_newest_steps('layers', LAYER_WINDOW_STEPS, K * L)}",
        run=run_id,
    )
    table = table.filter(pc.less(table.column("layer"), L))
    steps_T, at = np.unique(table.column("step").to_numpy().astype(np.int64), return_inverse=True)
    rank, layer = table.column("rank").to_numpy(), table.column("layer").to_numpy()
    columns = {}
    for name in LAYER_COLUMNS:
        values_TKL = np.full((len(steps_T), K, L), np.nan)
        values_TKL[at, rank, layer] = table.column(name).to_numpy()
        columns[name] = values_TKL
    return LayerRows(steps_T, columns)


def _scalar_rows(store: Store, run_id: str) -> dict[str, ScalarRows]:
    """Our own scalars (`brn/...`) and the user's that begin with `loss`, mean over ranks."""
    table = store.rows(
        f"""
        SELECT name, groupArray(step) AS steps, groupArray(value) AS values FROM (
            SELECT name, step, avg(value) AS value FROM (
                SELECT name, rank, step, argMax(value, seq) AS value FROM scalars
                WHERE run_id = {{run:String}} AND (startsWith(name, 'brn/') OR startsWith(name, 'loss'))
                GROUP BY name, rank, step
            ) GROUP BY name, step ORDER BY name, step DESC LIMIT {SCALAR_WINDOW_STEPS} BY name
        ) GROUP BY name ORDER BY name
        """,
        run=run_id,
    )
    found = {}
    for row in table.to_pylist():
        steps_T = np.asarray(row["steps"], dtype=np.int64)
        order = np.argsort(steps_T)
        found[row["name"]] = ScalarRows(steps_T[order], np.asarray(row["values"], dtype=np.float64)[order])
    return found


def _first_nonfinite(store: Store, run_id: str, L: int) -> NonFinite | None:
    found = store.rows(
        """
        SELECT step, layer, rank, nonfinite_channels FROM layers
        WHERE run_id = {run:String} AND nonfinite_channels > 0 AND layer < {layers:UInt32}
        ORDER BY step, layer, rank LIMIT 1
        """,
        run=run_id,
        layers=L,
    ).to_pylist()
    if not found:
        return None
    row = found[0]
    return NonFinite(row["step"], row["layer"], row["rank"], int(row["nonfinite_channels"]))
