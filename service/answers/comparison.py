"""Runs beside each other: one statistic over steps or over the share of the schedule, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import JsonValue

from service.answers.buckets import aggregates, bucket_width, checked_stats, numbers, part_of
from service.answers.records import State, known_runs
from service.errors import Invalid
from service.schemas import Buckets, ComparedRun, Comparison, ScalarSeries
from service.store import Store

MOST_RUNS: Final = 20
"""Runs that a caller may compare unless it asks for more."""

Axis = Literal["step", "fraction"]


def compare(
    store: Store,
    run_ids: Sequence[str],
    stats: Sequence[str],
    *,
    by: Axis = "step",
    layer: int | None = None,
    rank: int | None = None,
    points: int = 300,
    most: int = MOST_RUNS,
) -> Comparison:
    """Statistics of several runs on one axis, with the differences of their configuration and their final scalars.

    By step, all runs share their buckets. By fraction, a run's own buckets stand at step / total, the total being the
    planned steps or, without a plan, the newest step. However many runs there are, each table is asked once. Without
    `stats` it is about differences alone, and the runs have no steps.

    Raises:
        NotFound: one of the runs does not exist.
        Invalid: fewer than two runs or too many, no such statistic, a layer that one of them lacks.
    """
    run_ids = list(dict.fromkeys(run_ids))
    if not 2 <= len(run_ids) <= most:
        raise Invalid(f"name 2 to {most} different runs with run=, got {len(run_ids)}")
    stats = checked_stats(stats) if stats else []
    states = known_runs(store, run_ids)
    firsts = [s.extent.first_step for s in states if s.extent.first_step is not None]
    lasts = [s.extent.last_step for s in states if s.extent.last_step is not None]
    shared = bucket_width(min(firsts), max(lasts), points) if by == "step" and firsts else None
    widths = {
        state.stored.record.id: part_of(state, points, layer=layer, rank=rank, width=shared).width for state in states
    }
    only = {"layer = {layer:UInt16}": ("layer", layer), "rank = {rank:UInt32}": ("rank", rank)}
    where = [clause for clause, (_, value) in only.items() if value is not None]
    named = {name: value for name, value in only.values() if value is not None}
    parts = _by_run(_bucketed(store, "layers", stats, widths, where=where, **named)) if stats else {}
    runs = []
    for state in states:
        run_id, total = state.stored.record.id, _total(state)
        part = parts.get(run_id)
        steps: list[int] = [] if part is None else part.column("newest").to_pylist()
        runs.append(
            ComparedRun(
                run=run_id,
                name=state.stored.record.name,
                verdict=state.stored.verdict,
                bucket_steps=widths[run_id],
                total_steps=total,
                x=[step / total for step in steps] if by == "fraction" and total else list(steps),
                steps=steps,
                series={stat: _buckets(part, stat) for stat in stats},
            )
        )
    return Comparison(by=by, runs=runs, config=differences(states), final=finals(store, run_ids))


def scalar_of(store: Store, found: Comparison, name: str) -> list[ScalarSeries]:
    """One scalar of the runs that were compared, in their order, in the same buckets; empty where a run lacks it."""
    widths = {own.run: own.bucket_steps for own in found.runs}
    parts = _by_run(_bucketed(store, "scalars", ["value"], widths, where=["name = {name:String}"], name=name))
    curves = []
    for own in found.runs:
        part = parts.get(own.run)
        steps: list[int] = [] if part is None else part.column("newest").to_pylist()
        buckets = _buckets(part, "value")
        curves.append(ScalarSeries(steps=steps, min=buckets.min, mean=buckets.mean, max=buckets.max))
    return curves


def _bucketed(
    store: Store, table: str, columns: Sequence[str], widths: dict[str, int], *, where: Sequence[str], **named: Any
) -> pa.Table:
    """Columns of several runs in buckets, each run's of its own width: one row a run and bucket, by run and step."""
    width = (
        "{width:UInt64}"
        if len(set(widths.values())) == 1
        else "transform(run_id, {runs:Array(String)}, {widths:Array(UInt64)}, 1)"
    )
    return store.engine.rows(
        f"""
        SELECT run_id, max(step) AS newest, {", ".join(aggregates(column) for column in columns)}
        FROM {table} WHERE {" AND ".join(["run_id IN {runs:Array(String)}", *where])}
        GROUP BY run_id, intDiv(step, {width}) ORDER BY run_id, newest
        """,
        runs=list(widths),
        widths=list(widths.values()),
        width=next(iter(widths.values())),
        **named,
    )


def _by_run(table: pa.Table) -> dict[str, pa.Table]:
    """The rows of each run, of a table that is ordered by run."""
    found: dict[str, pa.Table] = {}
    begin = 0
    ids = table.column("run_id").to_pylist()
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[begin]:
            found[ids[begin]] = table.slice(begin, end - begin)
            begin = end
    return found


def _buckets(part: pa.Table | None, column: str) -> Buckets:
    if part is None:
        return Buckets(min=[], mean=[], max=[])
    low, mean, high = (numbers(part.column(f"{column}_{what}")) for what in ("min", "mean", "max"))
    return Buckets(min=low, mean=mean, max=high)


def _total(state: State) -> int | None:
    return state.stored.record.planned_steps or state.extent.last_step or None


def _settings(state: State) -> dict[str, JsonValue]:
    """What was set for a run: its config with dots between nested keys, and what the record itself says."""
    record = state.stored.record
    found: dict[str, JsonValue] = {
        "world_size": record.world_size,
        "batch_size": record.batch_size,
        "planned_steps": record.planned_steps,
        "layers": len(record.layers),
    }
    if record.schedule is not None:
        found |= {f"schedule.{name}": value for name, value in record.schedule}
    pending: list[tuple[str, Any]] = [(f"config.{key}", value) for key, value in record.config.items()]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict) and value:
            pending += [(f"{key}.{inner}", part) for inner, part in value.items()]
        else:
            found[key] = value
    return found


def differences(states: Sequence[State]) -> dict[str, list[JsonValue]]:
    """By key the value of each run (null where it has none), for settings in which they are not all alike."""
    settings = [_settings(state) for state in states]
    keys = sorted(set().union(*settings))
    missing = object()
    return {
        key: [own.get(key) for own in settings]
        for key in keys
        if any(own.get(key, missing) != settings[0].get(key, missing) for own in settings)
    }


def finals(store: Store, run_ids: Sequence[str]) -> dict[str, list[float | None]]:
    """By scalar its value at the newest step of each run, mean over ranks; null where a run lacks it."""
    table = store.engine.rows(
        """
        SELECT run_id, name, any(mean) AS value FROM (
            SELECT run_id, name, step, avg(value) AS mean FROM scalars
            WHERE run_id IN {runs:Array(String)} AND (run_id, name, step) IN (
                SELECT run_id, name, max(step) FROM scalars WHERE run_id IN {runs:Array(String)} GROUP BY run_id, name
            )
            GROUP BY run_id, name, step
        ) GROUP BY run_id, name
        """,
        runs=list(run_ids),
    )
    found = {(row["name"], row["run_id"]): row["value"] for row in table.to_pylist()}
    return {name: [found.get((name, run)) for run in run_ids] for name in sorted({name for name, _ in found})}
