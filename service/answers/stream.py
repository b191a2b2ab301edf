"""The input probe over steps, and what the rules make of it."""

from __future__ import annotations

from typing import Final

import numpy as np

from brn_core.wire import PROBE_FEATURES
from service.answers.buckets import Slice, part_of
from service.answers.records import known
from service.diagnosis.order import neighbour_ratio, neumann_ratio
from service.diagnosis.stream import cluster_ratio, stream
from service.diagnosis.window import Floats, ProbeRows
from service.schemas import Probe, ProbeWindow
from service.store import Store

VECTORS: Final = ("mean", "var", "adjacency")

WINDOW_STEPS: Final = 100
"""Recorded steps of a window: the narrowest that rules judge."""

WINDOWS: Final = 20
"""Most windows of an answer, the newest."""


def probe(
    store: Store,
    run_id: str,
    *,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    points: int = 200,
) -> Probe:
    """The input probe over steps: mean of each feature's columns over the bucket and, unless one is named, over ranks.

    Raises:
        NotFound: no such run.
        Invalid: an empty range.
    """
    state = known(store, run_id)
    part = part_of(state, points, rank=rank, from_step=from_step, to_step=to_step)
    table = store.engine.rows(
        f"""
        SELECT max(step) AS newest, avg(samples) AS samples_mean,
               {", ".join(f"avgForEach({name}) AS {name}_mean" for name in VECTORS)}
        FROM probe WHERE {part.where}
        GROUP BY intDiv(step, {{width:UInt64}}) ORDER BY newest
        """,
        **part.parameters,
    )

    def features(name: str) -> list[list[float | None]]:
        values_TF = table.column(f"{name}_mean").to_pylist()
        return [[row[feature] for row in values_TF] for feature in range(PROBE_FEATURES)]

    return Probe(
        run=run_id,
        rank=rank,
        bucket_steps=part.width,
        steps=table.column("newest").to_pylist(),
        samples=table.column("samples_mean").to_pylist(),
        mean=features("mean"),
        var=features("var"),
        adjacency=features("adjacency"),
        windows=windows(_rows(store, part)),
    )


def windows(rows: ProbeRows) -> list[ProbeWindow]:
    """Ratios of successive windows that end at the newest row; an incomplete one at the front is left out."""
    seen = stream(rows, rows.samples_TK.shape[1])
    found = []
    for begin in range(len(seen.steps_T) % WINDOW_STEPS, len(seen.steps_T), WINDOW_STEPS):
        end = begin + WINDOW_STEPS
        between, within = cluster_ratio(seen, begin, end), neighbour_ratio(seen, begin, end)
        order = neumann_ratio(seen, begin, end)
        found.append(
            ProbeWindow(
                first_step=int(seen.steps_T[begin]),
                last_step=int(seen.steps_T[end - 1]),
                between=None if between is None else between.value,
                within=None if within is None else within.value,
                order=None if order is None else order.value,
            )
        )
    return found


def _rows(store: Store, part: Slice) -> ProbeRows:
    """The newest recorded steps of a slice, oldest first, with the ranks that are in it."""
    table = store.engine.rows(
        f"""
        SELECT step, rank, samples, mean, var, adjacency FROM probe WHERE {part.where} AND step IN (
            SELECT DISTINCT step FROM probe WHERE {part.where} ORDER BY step DESC LIMIT {WINDOWS * WINDOW_STEPS}
        ) ORDER BY step, seq
        """,
        **part.parameters,
    )
    steps_T, at = np.unique(table.column("step").to_numpy().astype(np.int64), return_inverse=True)
    ranks_K, rank = np.unique(table.column("rank").to_numpy(), return_inverse=True)
    T, K = len(steps_T), len(ranks_K)

    def vectors(name: str) -> Floats:
        values_TKF = np.full((T, K, PROBE_FEATURES), np.nan)
        flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        values_TKF[at, rank] = flat.reshape(-1, PROBE_FEATURES)
        return values_TKF

    samples_TK = np.full((T, K), np.nan)
    samples_TK[at, rank] = table.column("samples").to_numpy()
    return ProbeRows(steps_T, samples_TK, vectors("mean"), vectors("var"), vectors("adjacency"))
