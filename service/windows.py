"""What the rules look at: the newest rows of a run, and those around what happened before; and what they say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brn_core.wire import PROBE_FEATURES, SCALAR_STEP_TIME
from service import history
from service.answers.records import State as _State
from service.answers.records import stored_run
from service.diagnosis.drift import AFTER_TAUS
from service.diagnosis.estimate import LOOK_ROWS
from service.diagnosis.finding import Diagnosis
from service.diagnosis.looks import WARM_TAUS, time_constant
from service.diagnosis.rules import diagnose
from service.diagnosis.window import (
    LAYER_COLUMNS,
    OPENING_COLUMNS,
    Floats,
    Ints,
    LayerRows,
    NonFinite,
    Opening,
    ProbeRows,
    ScalarRows,
    StepTimes,
    Window,
)
from service.recent import Newest, Recent
from service.store import Batch, Extent, Store

TABLES: Final = ("probe", "layers", "scalars")
"""Those that are looked at."""

PROBE_COLUMNS: Final = ("samples", "mean", "var", "adjacency")

PROBE_WINDOW_STEPS: Final = 2000
"""Newest recorded steps of the input probe that a diagnosis looks at (the evidence of a stream adds up slowly)."""

LAYER_WINDOW_STEPS: Final = 400
"""Newest recorded steps of the layer statistics that a diagnosis looks at."""

OPENING_STEPS: Final = 400
"""About how many recorded steps are looked at on either side of the opening of the limits, at most."""

FIRST_STEPS: Final = 5
"""Steps after the first one whose sigma_B is the scale a run began with."""

WINDOW_ROWS: Final = 200_000
"""Most rows of a table in a window: with many ranks and layers fewer steps are looked at."""

LEAST_STEPS: Final = 3 * LOOK_ROWS
"""Recorded steps that a window holds however many ranks and layers there are: with two looks in a row, wherever they
fall, no rule waits for ever."""

SCALAR_WINDOW_STEPS: Final = 2000
"""Newest recorded steps of each scalar that a diagnosis looks at."""


def diagnosis(store: Store, run_id: str) -> Diagnosis:
    """What the rules say of a run now, dated by its history.

    Computed once for what is stored; the verdict is kept for the list of runs. Of a running run that this process
    alone writes the rows stay in memory: from one diagnosis to the next only what came since is taken in.
    """
    state = _State(stored_run(store, run_id), store.extent(run_id))
    if state.stored.status == "running" and store.engine.embedded:
        recent = store.recent.of(run_id, (state.stored.created_at, state.stored.changed_at), *_places(state))
    else:
        store.recent.forget(run_id)
        recent = Recent(None, *_places(state))

    def compute() -> Diagnosis:
        with recent.lock:
            found = diagnose(_window(store, state, recent), recent.known)
        if found.verdict != state.stored.verdict:
            store.put_verdict(run_id, found.verdict)
        return found

    return history.known(store, store.diagnoses.get((run_id, *state.cursor, recent.version), compute))


def computed(store: Store, run_id: str) -> Diagnosis | None:
    """What `diagnosis` would answer, if that was computed already."""
    state = _State(stored_run(store, run_id), store.extent(run_id))
    found = store.diagnoses.peek((run_id, *state.cursor, store.recent.version(run_id)))
    return None if found is None else history.known(store, found)


def window(store: Store, run_id: str) -> Window:
    """The rows a diagnosis of a run looks at: the newest recorded steps, oldest first, as arrays."""
    state = _State(stored_run(store, run_id), store.extent(run_id))
    return _window(store, state, Recent(None, *_places(state)))


def _places(state: _State) -> tuple[int, int]:
    """Ranks and layers of a run."""
    run = state.stored.record
    return max(run.world_size, (state.extent.last_rank or 0) + 1), len(run.layers)


def _window(store: Store, state: _State, recent: Recent) -> Window:
    run, extent = state.stored.record, state.extent
    _bring_up_to_date(store, state, recent)
    assert recent.tables is not None
    probe, layers = recent.tables["probe"], recent.tables["layers"]
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
        probe=ProbeRows(probe.steps_T, *(probe.column(name) for name in PROBE_COLUMNS)),
        rows=LayerRows(layers.steps_T, {name: layers.column(name) for name in LAYER_COLUMNS}),
        scalars=_scalar_rows(recent, extent.last_step or 0),
        nonfinite=recent.nonfinite,
        first_sigma_L=recent.first_sigma_L,
        opening=recent.opening,
        step_times=_step_times(recent),
    )


# -------- the newest rows, kept current


def _bring_up_to_date(store: Store, state: _State, recent: Recent) -> None:
    """Takes in what came since the last time, or reads it all the first time; then looks back where it has to."""
    batches = recent.arrived()
    if recent.tables is None or batches is None:
        store.settle(state.stored.record.id)
        _read(store, state, recent)
        _look_back(store, state, recent, low=0, broken=True, fresh=False)
    else:
        tables = {name: pa.concat_tables(parts) for name in TABLES if (parts := list(_parts(batches, name, recent)))}
        for name, table in tables.items():
            _take(recent, name, table)
        low = min((pc.min(table.column("step")).as_py() for table in tables.values()), default=2**63)
        layers = tables.get("layers")
        broken = layers is not None and pc.any(pc.greater(layers.column("nonfinite_channels"), 0)).as_py()
        _look_back(store, state, recent, low, broken, fresh=True)
    recent.measure()


def _look_back(store: Store, state: _State, recent: Recent, low: int, broken: bool, *, fresh: bool) -> None:
    """Asks again what new rows can have changed of what lies outside the newest steps.

    Args:
        store: of the run.
        state: of the run.
        recent: is brought up to date.
        low: the new rows' first step.
        broken: whether any of them has a non-finite channel.
        fresh: whether the engine may lack some of them.
    """
    run_id, L, extent = state.stored.record.id, recent.layers, state.extent
    known, until = recent.nonfinite, _opening_end(state)
    ask_nonfinite = broken if known is None else low <= known.step
    ask_sigma = low <= (extent.first_step or 0) + FIRST_STEPS
    ask_opening = (
        until is not None
        and (extent.last_step or 0) >= until[0]
        and (recent.opening_step is None or recent.opening_step < until[1] or low <= until[1])
    )
    if fresh and (ask_nonfinite or ask_sigma or ask_opening):
        store.settle(run_id)
    if ask_nonfinite:
        recent.nonfinite = _first_nonfinite(store, run_id, L)
    if ask_sigma:
        recent.first_sigma_L = _first_sigma(store, run_id, extent, L)
    if ask_opening:
        recent.opening = _opening(store, state, recent.ranks, L)
        recent.opening_step = extent.last_step


def _read(store: Store, state: _State, recent: Recent) -> None:
    """All of the newest rows, from the store."""
    K, L, run_id = recent.ranks, recent.layers, state.stored.record.id
    features = dict.fromkeys(PROBE_COLUMNS[1:], (PROBE_FEATURES,))
    probe = Newest(_most_steps(PROBE_WINDOW_STEPS, K), (K,), {"samples": (), **features})
    layers = Newest(_most_steps(LAYER_WINDOW_STEPS, K * L), (K, L), dict.fromkeys(LAYER_COLUMNS, ()))
    recent.tables, recent.scalars = {"probe": probe, "layers": layers}, {}
    recent.opening = recent.opening_step = None
    for name, columns, steps, rows_a_step in (
        ("probe", PROBE_COLUMNS, PROBE_WINDOW_STEPS, K),
        ("layers", ("layer", *LAYER_COLUMNS), LAYER_WINDOW_STEPS, K * L),
    ):
        table = store.engine.rows(
            f"""
            SELECT step, rank, seq, {", ".join(columns)} FROM {name}
            WHERE run_id = {{run:String}} AND step >= {{begin:UInt64}} ORDER BY seq
            """,
            run=run_id,
            begin=_newest_from(store, state, name, steps, rows_a_step),
        )
        _take(recent, name, table)
    scalars = store.engine.rows(
        f"""
        SELECT step, rank, newest AS seq, name, value FROM (
            SELECT name, rank, step, max(seq) AS newest, argMax(value, seq) AS value FROM scalars
            WHERE run_id = {{run:String}} AND (
                startsWith(name, 'brn/shadow_')
                OR (startsWith(name, 'brn/') OR startsWith(name, 'loss')) AND step >= {{begin:UInt64}}
            )
            GROUP BY name, rank, step
        ) ORDER BY name, step DESC LIMIT {K * SCALAR_WINDOW_STEPS} BY name
        """,
        run=run_id,
        begin=_scalars_from(state.extent.last_step or 0),
    )
    _take(recent, "scalars", scalars)


def _parts(batches: Sequence[Batch], name: str, recent: Recent) -> Iterator[pa.Table]:
    """A table of some batches, as it is read from the store."""
    for batch in batches:
        table = batch.tables.get(name)
        if table is not None and batch.rank < recent.ranks:  # a later rank gets a place with the next diagnosis
            table = table.append_column("rank", pa.array(np.full(table.num_rows, batch.rank)))
            yield table.append_column("seq", pa.array(np.full(table.num_rows, batch.seq)))


def _take(recent: Recent, name: str, table: pa.Table) -> None:
    """Takes rows of a table in, which stand in the order of their batches."""
    assert recent.tables is not None
    if name == "layers":
        table = table.filter(pc.less(table.column("layer"), recent.layers))
    if name == "scalars":
        for own in pc.unique(table.column("name")).to_pylist():
            if own.startswith(("brn/", "loss")):
                series = recent.scalars.setdefault(own, Newest(SCALAR_WINDOW_STEPS, (recent.ranks,), {"value": ()}))
                _place(series, table.filter(pc.equal(table.column("name"), own)), ("value",))
        return
    _place(recent.tables[name], table, PROBE_COLUMNS if name == "probe" else LAYER_COLUMNS)


def _place(into: Newest, table: pa.Table, columns: Sequence[str]) -> None:
    whole = {name: table.column(name).to_numpy().astype(np.int64) for name in ("step", "rank", "seq")}
    place = [whole["rank"], table.column("layer").to_numpy()] if "layer" in table.column_names else [whole["rank"]]
    into.take(whole["step"], tuple(place), whole["seq"], {name: _values(table.column(name)) for name in columns})


def _values(column: pa.ChunkedArray) -> Floats:
    """(N,) of a column, or (N, F) of one of lists."""
    if pa.types.is_list(column.type):
        flat: Floats = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, PROBE_FEATURES)
    return np.asarray(column.to_numpy(), np.float64)


def _scalars_from(last_step: int) -> int:
    """The step before which no scalar is looked at, but those of the shadow pass."""
    return max(0, last_step - 20 * SCALAR_WINDOW_STEPS)


def _scalar_rows(recent: Recent, last_step: int) -> dict[str, ScalarRows]:
    """Our own scalars (`brn/...`) and the user's that begin with `loss`, mean over ranks."""
    found = {}
    for name, series in sorted(recent.scalars.items()):
        begin = 0
        if not name.startswith("brn/shadow_"):
            begin = int(np.searchsorted(series.steps_T, _scalars_from(last_step)))
        present_TK = series.present[begin:]
        if len(present_TK):
            total_T = np.where(present_TK, series.column("value")[begin:], 0.0).sum(1)
            found[name] = ScalarRows(series.steps_T[begin:], total_T / present_TK.sum(1))
    return found


def _step_times(recent: Recent) -> StepTimes | None:
    """Of as many steps as are looked at of the layers."""
    series = recent.scalars.get(SCALAR_STEP_TIME)
    if series is None:
        return None
    return StepTimes(series.steps_T[-LAYER_WINDOW_STEPS:], series.column("value")[-LAYER_WINDOW_STEPS:])


# -------- read from the store


def _newest_from(store: Store, state: _State, table: str, steps: int, rows_a_step: int) -> int:
    """The step from which on a table holds its `steps` newest recorded steps, fewer where a step has many rows."""
    first, end = state.extent.first_step or 0, (state.extent.last_step or 0) + 1
    found_T = _newest_steps(store, state.stored.record.id, table, _most_steps(steps, rows_a_step), first, end)
    return int(found_T[0]) if len(found_T) else 0


def _most_steps(steps: int, rows_a_step: int) -> int:
    return min(steps, max(LEAST_STEPS, WINDOW_ROWS // max(1, rows_a_step)))


def _newest_steps(store: Store, run_id: str, table: str, count: int, first: int, end: int) -> Ints:
    """The `count` newest recorded steps of a table from `first` on and before step `end`, oldest first.

    Looked for in spans that widen from the end, so that its cost does not grow with the run.
    """
    span = count
    while True:
        begin = max(first, end - span)
        found_T: Ints = (
            store.engine.rows(
                f"""
                SELECT DISTINCT step FROM {table}
                WHERE run_id = {{run:String}} AND step >= {{begin:UInt64}} AND step < {{end:UInt64}}
                ORDER BY step DESC LIMIT {count}
                """,
                run=run_id,
                begin=begin,
                end=end,
            )
            .column("step")
            .to_numpy()
            .astype(np.int64)[::-1]
        )
        if len(found_T) == count or begin == first:
            return found_T
        span *= 8


def _opening_rows(store: Store, run_id: str, K: int, L: int, only_T: Ints) -> LayerRows:
    """Rows of some steps; of a step sent twice (a run that went on from a checkpoint) the newer ones."""
    rows = Newest(max(1, len(only_T)), (K, L), dict.fromkeys(OPENING_COLUMNS, ()))
    if len(only_T):
        table = store.engine.rows(
            f"""
            SELECT step, rank, seq, layer, {", ".join(OPENING_COLUMNS)} FROM layers
            WHERE run_id = {{run:String}} AND layer < {{layers:UInt32}} AND step >= {{begin:UInt64}}
                AND step IN ({", ".join(map(str, only_T))})
            ORDER BY seq
            """,
            run=run_id,
            layers=L,
            begin=int(only_T[0]),
        )
        _place(rows, table, OPENING_COLUMNS)
    return LayerRows(rows.steps_T, {name: rows.column(name) for name in OPENING_COLUMNS})


def _first_sigma(store: Store, run_id: str, extent: Extent, L: int) -> Floats:
    """(L,) mean sigma_B of each layer over the first steps of the run, NaN where it has no row there."""
    first_L = np.full(L, np.nan)
    first = extent.first_step or 0
    table = store.engine.rows(
        """
        SELECT layer, avg(sigma) AS sigma FROM (
            SELECT layer, argMax(sigma_b, seq) AS sigma FROM layers
            WHERE run_id = {run:String} AND step <= {end:UInt64} AND layer < {layers:UInt32} GROUP BY step, rank, layer
        ) GROUP BY layer
        """,
        run=run_id,
        end=first + FIRST_STEPS,
        layers=L,
    )
    first_L[table.column("layer").to_numpy()] = table.column("sigma").to_numpy()
    return first_L


def _opening_end(state: _State) -> tuple[int, int] | None:
    """The step at which the schedule opens the limits, and the last one that is looked at because of it; None where it
    never does.
    """
    run = state.stored.record
    schedule = run.schedule
    if schedule is None or not any(layer.kind == "BatchRenorm" for layer in run.layers):
        return None
    if schedule.r_max <= 1 and schedule.d_max <= 0:
        return None
    return schedule.bn_steps, schedule.bn_steps + round(AFTER_TAUS * max(time_constant(layer) for layer in run.layers))


def _opening(store: Store, state: _State, K: int, L: int) -> Opening:
    """What is stored of the steps around which the schedule opened the limits, as it has."""
    run, newest, end = state.stored.record, state.extent.last_step, _opening_end(state)
    assert newest is not None
    assert end is not None
    opened, until = end
    tau = max(time_constant(layer) for layer in run.layers)
    begin, until = max(0, opened - round(WARM_TAUS * tau) - 100), min(newest, until)
    only_T = _around(store, state, opened, until, tau, _most_steps(OPENING_STEPS, K * L))
    loss = store.engine.rows(
        """
        SELECT step, avg(value) AS value FROM (
            SELECT rank, step, argMax(value, seq) AS value FROM scalars
            WHERE run_id = {run:String} AND name = 'loss' AND step >= {begin:UInt64} AND step <= {end:UInt64}
            GROUP BY rank, step
        ) GROUP BY step ORDER BY step
        """,
        run=run.id,
        begin=begin,
        end=until,
    )
    return Opening(
        step=opened,
        rows=_opening_rows(store, run.id, K, L, only_T),
        loss=ScalarRows(loss.column("step").to_numpy().astype(np.int64), loss.column("value").to_numpy()),
    )


def _around(store: Store, state: _State, opened: int, end: int, tau: float, most: int) -> Ints:
    """Recorded steps of the last time constant before the limits opened, at least 50, and of those after it.

    Where there are more than `most` every second, third, ... row is taken. Which ones does not depend on how far the
    run has come, so the answer stays the same.
    """
    run_id, first = state.stored.record.id, state.extent.first_step or 0
    before_T = _newest_steps(store, run_id, "layers", max(LOOK_ROWS, round(tau)), first, opened)
    within = int((before_T >= opened - tau).sum())
    before_T = before_T[-max(LOOK_ROWS, within) :]
    after_T = _newest_steps(store, run_id, "layers", end + 1 - opened, opened, end + 1)
    every = int(np.median(np.diff(before_T))) if len(before_T) > 1 else 1
    to_come = round(AFTER_TAUS * tau) // every
    return np.concatenate([before_T[:: _stride(len(before_T), most)], after_T[:: _stride(to_come, most)]])


def _stride(rows: int, most: int) -> int:
    return max(1, math.ceil(rows / most))


def _first_nonfinite(store: Store, run_id: str, L: int) -> NonFinite | None:
    """The first row with a non-finite channel that no later one replaced, as when a run went on from a checkpoint."""
    begin, most = 0, 100
    while True:
        broken = store.engine.rows(
            f"""
            SELECT DISTINCT step FROM layers
            WHERE run_id = {{run:String}} AND nonfinite_channels > 0 AND layer < {{layers:UInt32}}
                AND step >= {{begin:UInt64}}
            ORDER BY step LIMIT {most}
            """,
            run=run_id,
            layers=L,
            begin=begin,
        ).column("step")
        if not len(broken):
            return None
        begin, end = broken[0].as_py(), broken[-1].as_py()
        found = store.engine.rows(
            """
            SELECT step, layer, rank, argMax(nonfinite_channels, seq) AS channels FROM layers
            WHERE run_id = {run:String} AND layer < {layers:UInt32} AND step IN (
                SELECT step FROM layers
                WHERE run_id = {run:String} AND nonfinite_channels > 0
                    AND step >= {begin:UInt64} AND step <= {end:UInt64}
            )
            GROUP BY step, layer, rank HAVING channels > 0 ORDER BY step, layer, rank LIMIT 1
            """,
            run=run_id,
            layers=L,
            begin=begin,
            end=end,
        ).to_pylist()
        if found:
            row = found[0]
            return NonFinite(row["step"], row["layer"], row["rank"], int(row["channels"]))
        begin, most = end + 1, most * 8
