"""Ratios of means over steps with their standard error, and the grid of steps at which rules look.

Steps are the independent units: whatever is correlated inside a step (channels, features, ranks) is averaged first,
so no model of that correlation is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.diagnosis.window import Bools, Floats, Ints

MIN_STEPS = 40
"""Steps below which no ratio is given: its standard error would be a guess."""
MAX_GAP_SHARE = 0.05
"""Share of a window's rows that may be missing."""
LOOK_ROWS = 50
"""Rows between two looks at a stream."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """mean(g) / mean(h) over `steps` steps. Its interval and its test are on the log scale, where 1 means no effect."""

    value: float
    standard_error: float
    steps: int

    @property
    def low(self) -> float:
        return self.value * math.exp(-1.96 * self.standard_error / self.value) if self.value > 0 else 0.0

    @property
    def high(self) -> float:
        return self.value * math.exp(1.96 * self.standard_error / self.value) if self.value > 0 else 0.0

    @property
    def z(self) -> float:
        """Standard errors of ln(value) above 0; infinite where numerator or error are zero throughout."""
        if self.value <= 0:
            return -math.inf
        log = math.log(self.value)
        return log * self.value / self.standard_error if self.standard_error > 0 else math.copysign(math.inf, log)


def ratio_of_means(
    g_T: Floats,
    h_T: Floats,
    seen_T: Bools,
    order: int,
    *,
    least: int = MIN_STEPS,
    distinct: int | None = None,
) -> Ratio | None:
    """The ratio and its standard error by the delta method, from the series e_t = g_t - ratio * h_t itself.

    Differences of order p make e_t and e_t+p dependent, so the variance adds twice the autocovariances up to lag
    `order`; noise can push that sum too low, hence the floor at half the lag-0 value.

    Args:
        g_T: numerator of each step, 0 where unseen.
        h_T: denominator of each step, 0 where unseen.
        seen_T: which steps count.
        order: order of the differences g is made of.
        least: steps below which no ratio is given.
        distinct: how many of the steps are different, where they may repeat; the others add no evidence.

    Returns:
        None with fewer than `least` different steps or without any noise in the denominator.
    """
    n = int(seen_T.sum())
    total = float(h_T.sum())
    independent = n if distinct is None else min(n, distinct)
    if independent < least or not total > 0:
        return None
    value = float(g_T.sum()) / total
    e_T = np.where(seen_T, g_T - value * h_T, 0.0)
    lag0 = float(e_T @ e_T)
    long_run = lag0 + 2 * sum(float(e_T[:-lag] @ e_T[lag:]) for lag in range(1, order + 1))
    error = math.sqrt(max(long_run, lag0 / 2) * n / independent) / total
    return Ratio(value, error, n)


def spacing(steps_T: Ints) -> int:
    """Steps between two recorded rows, typically (the recorder's `every`)."""
    return max(1, int(np.median(np.diff(steps_T)))) if len(steps_T) > 1 else 1


def look_rows(steps_T: Ints, every_rows: int = LOOK_ROWS) -> list[int]:
    """Row indices at which rules look: the last row before each multiple of `every_rows` recorded steps.

    The grid is fixed to step numbers, not to where the window happens to begin or end, so looking again later gives
    the same looks and a few more.
    """
    if not len(steps_T):
        return []
    step = spacing(steps_T)
    following_T = np.append(steps_T[1:], steps_T[-1] + step)
    bucket = every_rows * step
    return [int(i) for i in np.flatnonzero(steps_T // bucket != following_T // bucket)]


@dataclass(frozen=True, slots=True)
class Watch:
    """A lane of a rule: windows of `rows` rows, one every `every` rows, with a threshold and a z that speaks.

    Strong faults need one window with a z far beyond what many looks give by chance, weak ones two in a row.
    """

    rows: int
    every: int
    threshold: float
    z: float
    in_a_row: int

    def windows(self, steps_T: Ints) -> list[tuple[int, int]]:
        """(begin, end) rows of each look at which the window is full, or as good as full."""
        ends = [row + 1 for row in look_rows(steps_T, self.every)]
        return [(max(0, end - self.rows), end) for end in ends if end >= 0.95 * self.rows]

    def spoke(self, fired: list[bool]) -> list[int]:
        """Positions of the looks at which enough in a row had fired."""
        return twice_in_a_row(fired) if self.in_a_row == 2 else [i for i, one in enumerate(fired) if one]


def twice_in_a_row(fired: list[bool]) -> list[int]:
    """Positions at which the rule had fired at this look and at the one before."""
    return [i for i in range(1, len(fired)) if fired[i] and fired[i - 1]]
