"""What the rules look at: the newest rows of a run, and those around what happened before; and what they say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow.compute as pc

from brn_core.wire import PROBE_FEATURES
from service.answers.records import State as _State
from service.answers.records import known as _known
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
    Window,
)
from service.store import Extent, Store

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
    """What the rules say of a run now. Computed once for what is stored; the verdict is kept for the list of runs."""
    state = _known(store, run_id)

    def compute() -> Diagnosis:
        found = diagnose(_window(store, state))
        if found.verdict != state.stored.verdict:
            store.put_verdict(run_id, found.verdict)
        return found

    return store.diagnoses.get((run_id, *state.cursor), compute)


def computed(store: Store, run_id: str) -> Diagnosis | None:
    """What `diagnosis` would answer, if that was computed already."""
    return store.diagnoses.peek((run_id, *_known(store, run_id).cursor))


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
        probe=_probe_rows(store, state, K),
        rows=_layer_rows(store, run.id, K, L, _newest_from(store, state, "layers", LAYER_WINDOW_STEPS, K * L)),
        scalars=_scalar_rows(store, state),
        nonfinite=_first_nonfinite(store, run.id, L),
        first_sigma_L=_first_sigma(store, run.id, extent, L),
        opening=_opening(store, state, K, L),
    )


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


def _probe_rows(store: Store, state: _State, K: int) -> ProbeRows:
    table = store.engine.rows(
        """
        SELECT step, rank, samples, mean, var, adjacency FROM probe
        WHERE run_id = {run:String} AND step >= {begin:UInt64} ORDER BY step, seq
        """,
        run=state.stored.record.id,
        begin=_newest_from(store, state, "probe", PROBE_WINDOW_STEPS, K),
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


def _layer_rows(
    store: Store,
    run_id: str,
    K: int,
    L: int,
    begin: int,
    only_T: Ints | None = None,
    names: Sequence[str] = LAYER_COLUMNS,
) -> LayerRows:
    """Rows of the steps from `begin` on, or `only_T` of them.

    Later batches come last, so that a step sent twice (a run that went on from a checkpoint) ends up with its
    newer rows.
    """
    some = "" if only_T is None else f"AND step IN ({', '.join(map(str, only_T))})"
    table = store.engine.rows(
        f"""
        SELECT step, rank, layer, {", ".join(names)} FROM layers
        WHERE run_id = {{run:String}} AND step >= {{begin:UInt64}} {some}
        ORDER BY step, seq
        """,
        run=run_id,
        begin=begin,
    )
    table = table.filter(pc.less(table.column("layer"), L))
    steps_T, at = np.unique(table.column("step").to_numpy().astype(np.int64), return_inverse=True)
    rank, layer = table.column("rank").to_numpy(), table.column("layer").to_numpy()
    columns = {}
    for name in names:
        values_TKL = np.full((len(steps_T), K, L), np.nan)
        values_TKL[at, rank, layer] = table.column(name).to_numpy()
        columns[name] = values_TKL
    return LayerRows(steps_T, columns)


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


def _opening(store: Store, state: _State, K: int, L: int) -> Opening | None:
    """What is stored of the steps around which the schedule opened the limits; None before, or where it never does."""
    run, newest = state.stored.record, state.extent.last_step
    schedule = run.schedule
    renorm = any(layer.kind == "BatchRenorm" for layer in run.layers)
    if schedule is None or not renorm or newest is None or newest < schedule.bn_steps:
        return None
    if schedule.r_max <= 1 and schedule.d_max <= 0:
        return None
    tau = max(time_constant(layer) for layer in run.layers)
    opened = schedule.bn_steps
    begin = max(0, opened - round(WARM_TAUS * tau) - 100)
    end = min(newest, opened + round(AFTER_TAUS * tau))
    only_T = _around(store, state, opened, end, tau, _most_steps(OPENING_STEPS, K * L))
    rows = _layer_rows(store, run.id, K, L, int(only_T[0]) if len(only_T) else newest + 1, only_T, OPENING_COLUMNS)
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
        end=end,
    )
    return Opening(
        step=opened,
        rows=rows,
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


def _scalar_rows(store: Store, state: _State) -> dict[str, ScalarRows]:
    """Our own scalars (`brn/...`) and the user's that begin with `loss`, mean over ranks."""
    table = store.engine.rows(
        f"""
        SELECT name, groupArray(step) AS steps, groupArray(value) AS values FROM (
            SELECT name, step, avg(value) AS value FROM (
                SELECT name, rank, step, argMax(value, seq) AS value FROM scalars
                WHERE run_id = {{run:String}} AND (
                    startsWith(name, 'brn/shadow_')
                    OR (startsWith(name, 'brn/') OR startsWith(name, 'loss')) AND step >= {{begin:UInt64}}
                )
                GROUP BY name, rank, step
            ) GROUP BY name, step ORDER BY name, step DESC LIMIT {SCALAR_WINDOW_STEPS} BY name
        ) GROUP BY name ORDER BY name
        """,
        run=state.stored.record.id,
        begin=max(0, (state.extent.last_step or 0) - 20 * SCALAR_WINDOW_STEPS),
    )
    found = {}
    for row in table.to_pylist():
        steps_T = np.asarray(row["steps"], dtype=np.int64)
        order = np.argsort(steps_T)
        found[row["name"]] = ScalarRows(steps_T[order], np.asarray(row["values"], dtype=np.float64)[order])
    return found


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
