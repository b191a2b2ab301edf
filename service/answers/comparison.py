"""Runs beside each other: one statistic over steps or over the share of the schedule, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import JsonValue

from service.answers.buckets import bucket_width, checked_stats, part_of
from service.answers.curves import buckets_of
from service.answers.records import State, known
from service.errors import Invalid
from service.schemas import ComparedRun, Comparison
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
    planned steps or, without a plan, the newest step.

    Raises:
        NotFound: one of the runs does not exist.
        Invalid: fewer than two runs or too many, no such statistic, a layer that one of them lacks.
    """
    run_ids = list(dict.fromkeys(run_ids))
    if not 2 <= len(run_ids) <= most:
        raise Invalid(f"name 2 to {most} different runs with run=, got {len(run_ids)}")
    stats = checked_stats(stats)
    states = [known(store, run_id) for run_id in run_ids]
    firsts = [s.extent.first_step for s in states if s.extent.first_step is not None]
    lasts = [s.extent.last_step for s in states if s.extent.last_step is not None]
    shared = bucket_width(min(firsts), max(lasts), points) if by == "step" and firsts else None
    runs = []
    for state in states:
        part = part_of(state, points, layer=layer, rank=rank, width=shared)
        steps, found = buckets_of(store, part, stats)
        total = _total(state)
        runs.append(
            ComparedRun(
                run=state.stored.record.id,
                name=state.stored.record.name,
                verdict=state.stored.verdict,
                bucket_steps=part.width,
                total_steps=total,
                x=[step / total for step in steps] if by == "fraction" and total else list(steps),
                steps=steps,
                series=found,
            )
        )
    finals = [_final(store, run_id) for run_id in run_ids]
    names = sorted(set().union(*finals))
    return Comparison(
        by=by,
        runs=runs,
        config=_differences([_settings(state) for state in states]),
        final={name: [final.get(name) for final in finals] for name in names},
    )


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


def _differences(settings: Sequence[dict[str, JsonValue]]) -> dict[str, list[JsonValue]]:
    """By key the value of each run (null where it has none), for keys in which they are not all alike."""
    keys = sorted(set().union(*settings))
    missing = object()
    return {
        key: [own.get(key) for own in settings]
        for key in keys
        if any(own.get(key, missing) != settings[0].get(key, missing) for own in settings)
    }


def _final(store: Store, run_id: str) -> dict[str, float]:
    """Each scalar at its newest step, mean over ranks."""
    table = store.engine.rows(
        """
        SELECT name, any(mean) AS value FROM (
            SELECT name, step, avg(value) AS mean FROM scalars
            WHERE run_id = {run:String} AND (name, step) IN (
                SELECT name, max(step) FROM scalars WHERE run_id = {run:String} GROUP BY name
            )
            GROUP BY name, step
        ) GROUP BY name
        """,
        run=run_id,
    )
    return {row["name"]: row["value"] for row in table.to_pylist()}
