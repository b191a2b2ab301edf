"""How far the ranks of a run differ, and which of them stands apart, is behind or is missing.

Shape suffixes: L layers, K ranks.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import SCALAR_STEP_TIME
from service.answers.buckets import part_of, recent_step
from service.answers.records import State, known
from service.schemas import Outlier, RankHealth, Ranks
from service.store import Store

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEWEST_STEPS: Final = 100
"""Recorded steps that are looked at where no range is asked for."""

APART: Final = 3.0
"""A rank is named when its median distance over layers is so many times that of the median rank."""


def ranks(store: Store, run_id: str, *, from_step: int | None = None, to_step: int | None = None) -> Ranks:
    """Spread of mu_B and sigma_B between ranks in every layer, from each rank's means over the steps.

    With `m_k` the rank's mean of mu_B and `s_k` that of sigma_B: distance_mu = (m_k - median m) / median s, and
    distance_sigma = ln(s_k / median s). A spread is the standard deviation of these over ranks; it is 0 for one rank.

    Raises:
        NotFound: no such run.
        Invalid: an empty range.
    """
    state = known(store, run_id)
    if from_step is None:
        from_step = min(_newest_from(store, state), to_step if to_step is not None else 2**63 - 1)
    part = part_of(state, 1, from_step=from_step, to_step=to_step)
    names = [layer.name for layer in state.stored.record.layers]
    K = max(state.stored.record.world_size, (state.extent.last_rank or 0) + 1)
    table = store.engine.rows(
        f"""
        SELECT layer, rank, avg(mu_b) AS mu, avg(sigma_b) AS sigma
        FROM layers WHERE {part.where} AND layer < {{layers:UInt32}} AND rank < {{ranks:UInt32}} GROUP BY layer, rank
        """,
        **part.parameters,
        layers=len(names),
        ranks=K,
    )
    mu_LK, sigma_LK = np.full((2, len(names), K), np.nan)
    at = table.column("layer").to_numpy(), table.column("rank").to_numpy()
    mu_LK[at], sigma_LK[at] = table.column("mu").to_numpy(), table.column("sigma").to_numpy()
    sent_LK = np.zeros(mu_LK.shape, bool)
    sent_LK[at] = True
    with np.errstate(all="ignore"):  # non-finite statistics are data here
        scale_L = _median(sigma_LK)
        mu_LK = (mu_LK - _median(mu_LK)[:, None]) / scale_L[:, None]
        sigma_LK = np.log(sigma_LK / scale_L[:, None])
    # What is not a number is farther than any number; a rank without rows is nowhere.
    far_LK = np.hypot(mu_LK, sigma_LK)
    far_LK = np.where(sent_LK, np.nan_to_num(far_LK, nan=np.inf, posinf=np.inf), -1.0)
    farthest = [int(np.argmax(row)) if row.max(initial=0) > 0 and (row >= 0).sum() > 1 else None for row in far_LK]
    return Ranks(
        run=run_id,
        from_step=from_step,
        to_step=part.last,
        world_size=state.stored.record.world_size,
        layers=names,
        mu_spread=_spread(mu_LK, sent_LK),
        sigma_spread=_spread(sigma_LK, sent_LK),
        farthest_rank=farthest,
        farthest_distance=[None if k is None else float(far_LK[layer, k]) for layer, k in enumerate(farthest)],
        outlier=_outlier(far_LK[sent_LK.any(1)], np.flatnonzero(sent_LK.any(0))),
        ranks=_health(store, state, K, part.where, part.parameters),
    )


def _newest_from(store: Store, state: State) -> int:
    """The first of the newest recorded steps of the table `layers`."""
    run = state.stored.record
    rows = NEWEST_STEPS * run.world_size * max(1, len(run.layers))
    found = store.engine.rows(
        f"""
        SELECT min(step) AS step FROM (
            SELECT DISTINCT step FROM layers WHERE run_id = {{run:String}} AND step >= {{from:UInt64}}
            ORDER BY step DESC LIMIT {NEWEST_STEPS}
        )""",
        run=run.id,
        **{"from": recent_step(store, run.id, rows)},
    )
    return int(found.column("step")[0].as_py() or 0)


def _median(values_LK: Floats) -> Floats:
    """(L,) median of what is there; NaN where nothing is."""
    median_L = np.full(len(values_LK), np.nan)
    there_L = ~np.isnan(values_LK).all(1)
    median_L[there_L] = np.nanmedian(values_LK[there_L], axis=1)
    return median_L


def _spread(distance_LK: Floats, sent_LK: Bools) -> list[float | None]:
    with np.errstate(invalid="ignore"):
        return [
            float(np.std(row[sent])) if sent.any() else None for row, sent in zip(distance_LK, sent_LK, strict=True)
        ]


def _outlier(far_LK: Floats, ranks: Ints) -> Outlier | None:
    """Which of these ranks stands apart in most layers; None with fewer than three, where none is in the majority."""
    if len(ranks) < 3:
        return None
    typical_K = np.median(far_LK[:, ranks], axis=0)
    worst = int(np.argmax(typical_K))
    others = float(np.median(np.delete(typical_K, worst)))
    if not typical_K[worst] > APART * others:
        return None
    return Outlier(rank=int(ranks[worst]), distance=float(typical_K[worst]), others=others)


def _health(store: Store, state: State, K: int, where: str, parameters: dict[str, Any]) -> list[RankHealth]:
    sent = store.engine.rows(
        """SELECT rank, max(last_step) AS last_step, max(received_at) AS received_at
        FROM batches WHERE run_id = {run:String} GROUP BY rank""",
        run=state.stored.record.id,
    )
    times = store.engine.rows(
        f"SELECT rank, avg(value) AS seconds FROM scalars WHERE {where} AND name = {{name:String}} GROUP BY rank",
        **parameters,
        name=SCALAR_STEP_TIME,
    )
    seconds = {row["rank"]: row["seconds"] for row in times.to_pylist()}
    found = {row["rank"]: row for row in sent.to_pylist()}
    newest = state.extent.last_step or 0
    return [
        RankHealth(
            rank=rank,
            last_step=found[rank]["last_step"] if rank in found else None,
            behind_steps=newest - found[rank]["last_step"] if rank in found else None,
            received_at=found[rank]["received_at"] if rank in found else None,
            step_time_seconds=seconds.get(rank),
        )
        for rank in range(K)
    ]
