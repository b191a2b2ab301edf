"""Snapshots of single channels: when they were taken, what they hold, which channels are worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import TABLES
from service.answers.buckets import part_of
from service.answers.records import known
from service.errors import Invalid, some
from service.schemas import Channel, Channels
from service.store import Store

VECTORS: Final = tuple(field.name for field in TABLES["channels"] if field.name not in ("step", "layer"))


def channels(
    store: Store,
    run_id: str,
    *,
    layer: int | None = None,
    step: int | None = None,
    rank: int | None = None,
    worst: int = 20,
) -> Channels:
    """One snapshot of one rank: the values of a layer where it is named, and the worst channels of it or of all layers.

    Without a step it is the newest snapshot, without a rank that of the lowest rank that took it. The worst channels
    have the largest gap, (r - 1)² + d²; those whose gap is NaN come before all others.

    Raises:
        NotFound: no such run.
        Invalid: no such layer, or no snapshot of this step and rank.
    """
    state = known(store, run_id)
    part = part_of(state, 1, layer=layer, rank=rank)
    taken = store.engine.rows(
        f"SELECT step, min(rank) AS lowest FROM channels WHERE {part.where} GROUP BY step ORDER BY step",
        **part.parameters,
    )
    steps: list[int] = taken.column("step").to_pylist()
    if step is not None and step not in steps:
        raise Invalid(f"there is no snapshot of step {step}; snapshots: {some([str(s) for s in steps])}")
    names = [layer.name for layer in state.stored.record.layers]
    if not steps:
        return Channels(run=run_id, layer=layer, rank=rank, steps=[], step=None, values=None, worst=[])
    step = steps[-1] if step is None else step
    rank = taken.column("lowest")[steps.index(step)].as_py()
    # Of a step that was recorded twice the later batch counts.
    rows = store.engine.rows(
        f"""
        SELECT layer, {", ".join(VECTORS)} FROM channels
        WHERE {part.where} AND rank = {{only:UInt32}} AND step = {{at:UInt64}} AND layer < {{layers:UInt32}}
        ORDER BY layer, seq DESC LIMIT 1 BY layer
        """,
        **part.parameters,
        only=rank,
        at=step,
        layers=len(names),
    ).to_pylist()
    return Channels(
        run=run_id,
        layer=layer,
        rank=rank,
        steps=steps,
        step=step,
        values={name: rows[0][name] for name in VECTORS} if layer is not None else None,
        worst=[
            Channel(layer=index, name=names[index], channel=channel, r=r, d=d, gap=gap)
            for index, channel, r, d, gap in _worst(rows, worst)
        ],
    )


MOST_SNAPSHOTS: Final = 100
"""Snapshots that `history` reads; of more, evenly spaced ones with the newest."""


@dataclass(frozen=True, slots=True)
class History:
    """Channels of a layer (C) over its snapshots (T)."""

    layer: int
    steps: list[int]
    r_CT: NDArray[np.float64]
    d_CT: NDArray[np.float64]


def history(store: Store, run_id: str, layer: int, *, rank: int | None = None) -> History:
    """Every channel's r and d in a layer at each of its snapshots, of the lowest rank that took one or of `rank`.

    Raises:
        NotFound: no such run.
        Invalid: no such layer.
    """
    part = part_of(known(store, run_id), 1, layer=layer, rank=rank)
    taken = store.engine.rows(f"SELECT DISTINCT step FROM channels WHERE {part.where} ORDER BY step", **part.parameters)
    steps: list[int] = taken.column("step").to_pylist()
    if not steps:
        return History(layer, [], np.empty((0, 0)), np.empty((0, 0)))
    every = -(-len(steps) // MOST_SNAPSHOTS)
    table = store.engine.rows(
        f"""
        SELECT step, r, d FROM channels WHERE {part.where} AND step IN {{steps:Array(UInt64)}}
        ORDER BY step, rank, seq DESC LIMIT 1 BY step
        """,
        **part.parameters,
        steps=steps[::-1][::every][::-1],
    )
    shown = table.column("step").to_pylist()
    r_TC, d_TC = (np.array(table.column(name).to_pylist(), dtype=np.float64).reshape(len(shown), -1) for name in "rd")
    return History(layer, shown, r_TC.T, d_TC.T)


def _worst(rows: list[dict[str, list[float]]], count: int) -> list[tuple[int, int, float, float, float]]:
    """(layer, channel, r, d, gap) of the channels with the largest gap."""
    if not rows:
        return []
    layer_C = np.concatenate([np.full(len(row["r"]), row["layer"]) for row in rows])
    channel_C = np.concatenate([np.arange(len(row["r"])) for row in rows])
    r_C, d_C = (np.concatenate([np.asarray(row[name]) for row in rows]) for name in "rd")
    gap_C = (r_C - 1) ** 2 + d_C**2
    order = np.lexsort((-gap_C, ~np.isnan(gap_C)))[:count]
    return [(int(layer_C[i]), int(channel_C[i]), float(r_C[i]), float(d_C[i]), float(gap_C[i])) for i in order]
