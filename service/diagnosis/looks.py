"""The layers' rows at fixed looks: means over the newest 50 rows each time, and what has lasted for two looks in a row.

Shape suffixes: T recorded steps, K ranks, L layers, J looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from brn_core.wire import Layer
from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS, look_rows, spacing
from service.diagnosis.outcome import Abstention, count
from service.diagnosis.window import Bools, Floats, Ints, LayerRows, Window

WARM_TAUS = 5
"""Time constants after which less than 1 % of the moving statistics is where they began (1 and 0 for most layers)."""
_T_BLOCKS = 2.262  # Student's t, 97.5 %, 9 degrees of freedom


def time_constant(layer: Layer) -> float:
    """Tau = 1 / momentum in steps; a cumulative average has none and counts as 100."""
    return 1 / layer.momentum if layer.momentum else 100.0


@dataclass(frozen=True, slots=True)
class Looks:
    """Means over steps and ranks at each look; NaN for layers with fewer than `MIN_STEPS` usable steps.

    Attributes:
        steps_J: the step of each look.
        mean: by column, (J, L).
    """

    steps_J: Ints
    mean: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Lasting:
    """Layers (L,) held against at the newest look and the one before; since when that has been so for any of them."""

    layers_L: Bools
    steps: tuple[int, int]


def looks(rows: LayerRows, columns: Mapping[str, Floats], usable_TKL: Bools) -> Looks:
    """Means of columns (T, K, L) over the 50 rows before each look, of usable rows where all of them are finite."""
    at = np.array([row + 1 for row in look_rows(rows.steps_T) if row + 1 >= LOOK_ROWS], np.int64)

    def window_sums(values_TL: Floats) -> Floats:
        total_TL = np.vstack([np.zeros((1, values_TL.shape[1])), np.cumsum(values_TL, axis=0)])
        return np.asarray(total_TL[at] - total_TL[at - LOOK_ROWS])

    with np.errstate(invalid="ignore"):  # infinities of either sign
        total = {name: column.sum(1) for name, column in columns.items()}
    n_JL: Floats | float = float(LOOK_ROWS * next(iter(columns.values())).shape[1])
    # Nearly always all of them are finite, and then their sums over ranks are.
    if not all(np.isfinite(total_TL).all() for total_TL in total.values()) or not np.all(usable_TKL):
        seen_TKL = usable_TKL & np.logical_and.reduce([np.isfinite(column) for column in columns.values()])
        enough_JL = window_sums(seen_TKL.any(1).astype(np.float64)) >= MIN_STEPS
        n_JL = np.where(enough_JL, window_sums(seen_TKL.sum(1).astype(np.float64)), math.nan)
        total = {name: np.where(seen_TKL, column, 0.0).sum(1) for name, column in columns.items()}
    return Looks(rows.steps_T[at - 1], {name: window_sums(total_TL) / n_JL for name, total_TL in total.items()})


def lasting(steps_J: Ints, fired_JL: Bools) -> Lasting | None:
    """What holds at the newest two looks, and the unbroken stretch of looks in which it has held for some layer."""
    pairs_JL = fired_JL[1:] & fired_JL[:-1]
    if not len(pairs_JL) or not pairs_JL[-1].any():
        return None
    quiet = np.flatnonzero(~pairs_JL.any(1))
    first = int(quiet[-1]) + 2 if len(quiet) else 1
    return Lasting(pairs_JL[-1], (int(steps_J[first]), int(steps_J[-1])))


def ever(steps_J: Ints, excess_JL: Floats) -> Lasting | None:
    """What was above 0 in the mean of any two looks in a row, from the first such pair to the last: for what comes and
    goes by chance, and would be above 0 at both too seldom.
    """
    pairs_JL = excess_JL[1:] + excess_JL[:-1] > 0
    at = np.flatnonzero(pairs_JL.any(1)) + 1
    if not len(at):
        return None
    return Lasting(np.asarray(pairs_JL.any(0), np.bool_), (int(steps_J[at[0]]), int(steps_J[at[-1]])))


def warm(window: Window) -> Bools:
    """(T, 1, L) rows at which a layer's moving statistics have forgotten where they began."""
    tau_L = np.array([time_constant(layer) for layer in window.layers])
    return np.asarray(window.rows.steps_T[:, None, None] >= WARM_TAUS * tau_L, np.bool_)


def too_young(window: Window, code: str) -> Abstention | None:
    """Why no layer can be judged yet: no rows, or fewer than two looks after `WARM_TAUS` time constants."""
    steps_T = window.rows.steps_T
    if not window.layers:
        return None
    if not len(steps_T):
        return Abstention(
            code,
            "no normalization layer ran in training mode",
            advice="Call `model.train()` before training; layers that are frozen have nothing to judge.",
        )
    begin = math.ceil(WARM_TAUS * max(time_constant(layer) for layer in window.layers))
    usable = int((steps_T >= begin).sum())
    if usable >= 2 * LOOK_ROWS:
        return None
    last = int(steps_T[-1])
    return Abstention(
        code,
        f"{count(usable, 'recorded step')} came after step {begin} ({WARM_TAUS} time constants of the moving "
        f"statistics) and {2 * LOOK_ROWS} are needed",
        more_steps=max(1, max(begin - last, 0) + (2 * LOOK_ROWS - usable) * spacing(steps_T)),
    )


def interval(values_TK: Floats) -> tuple[float, float] | None:
    """95 % interval of the mean over steps, from the means of ten blocks of them; None with too few steps.

    Blocks, because successive steps of a training network are not independent.
    """
    seen_TK = np.isfinite(values_TK)
    rows = np.flatnonzero(seen_TK.any(1))
    if len(rows) < MIN_STEPS:
        return None
    step_R = np.where(seen_TK[rows], values_TK[rows], 0.0).sum(1) / seen_TK[rows].sum(1)
    means = np.array([block.mean() for block in np.array_split(step_R, 10)])
    half = _T_BLOCKS * float(means.std(ddof=1)) / math.sqrt(10)
    return float(means.mean()) - half, float(means.mean()) + half


def worst_first(value_L: Floats, layers_L: Bools) -> list[int]:
    """Indices of the layers held against, the largest value first."""
    return [int(i) for i in np.argsort(-np.nan_to_num(value_L, nan=-math.inf), kind="stable") if layers_L[i]]


def of_layers(n: int) -> str:
    """` (worst of 3 layers)`, or nothing for one."""
    return f" (worst of {n} layers)" if n > 1 else ""


def together(window: Window) -> Floats:
    """(L,) ranks that normalize together: all of them where their gaps are equal at every step, else 1.

    A layer that shares its statistics has one r and d for all ranks; different data never gives equal ones.
    """
    gap_TKL = window.rows.columns["gap"]
    n_ranks = gap_TKL.shape[1]
    if n_ranks < 2:
        return np.ones(len(window.layers))
    sync_L = np.array([layer.kind == "SyncBatchNorm" for layer in window.layers], np.bool_)
    if np.isfinite(gap_TKL[-1:]).all() and (gap_TKL[-1:] != gap_TKL[-1:, :1]).any(1).all():  # one row may say it all
        return np.where(sync_L, float(n_ranks), 1.0)
    seen_TL = np.isfinite(gap_TKL).all(1)
    equal_TL = (gap_TKL == gap_TKL[:, :1]).all(1)
    shared_L = (seen_TL & equal_TL).any(0) & ~(seen_TL & ~equal_TL).any(0)
    return np.where(shared_L | sync_L, float(n_ranks), 1.0)
