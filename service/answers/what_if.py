"""What other limits would have clipped: clip rates for any (r_max, d_max), and the tightest schedule under a rate.

The rows hold percentiles over channels of the unclipped r and d. Between two of them the normal score of the share is
taken to be linear in d and in ln r, which is exact where channels are normally distributed (linear shares would put far
too many channels into the tails); so the share of channels beyond a limit follows for every row. Snapshots hold every
channel and give it exactly. Both describe the run as it was: with other limits it would have trained differently.

Shape suffixes: N rows, Q percentiles, B buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import QUANTILES, Schedule
from service.answers.buckets import Slice, part_of
from service.answers.records import State, known
from service.errors import Invalid
from service.schemas import ExactClipping, ScheduleFit, WhatIf
from service.store import Store

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_ROWS: Final = 40_000
"""Rows that are read for one answer; of more, every 2nd, 4th, 8th, ... step (by a hash of the step) is taken."""

_R: Final = tuple(f"r_q{q:02d}" for q in QUANTILES)
_D: Final = tuple(f"d_q{q:02d}" for q in QUANTILES)
_WIDEST_D: Final = 1e6
_WIDEST_LN_R: Final = float(np.log(1e6))
"""Limits beyond these are not looked for."""


def schedule(
    store: Store,
    run_id: str,
    *,
    r_max: float,
    d_max: float,
    rate: float = 0.01,
    bn_steps: int | None = None,
    layer: int | None = None,
    rank: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    points: int = 200,
) -> WhatIf:
    """Clip rates that constant limits would have given over steps, and the tightest limits that keep them at `rate`.

    Rates are means over the rows of a bucket: over layers and ranks, unless one is named. A row with a NaN among its
    percentiles says nothing and is left out; a bucket of such rows has null. The schedule that is fitted begins with
    `bn_steps` of batch normalization: those planned for the run, or 0, where they are not given.

    Raises:
        NotFound: no such run.
        Invalid: limits or a rate outside their range, no such layer, an empty range.
    """
    if not (r_max >= 1 and d_max >= 0):  # NaN is neither
        raise Invalid(f"limits must be r_max >= 1 and d_max >= 0, got r_max={r_max:g} and d_max={d_max:g}")
    if not 0 < rate < 1:
        raise Invalid(f"rate is a share of channels, above 0 and below 1; got {rate:g}")
    state = known(store, run_id)
    part = part_of(state, points, layer=layer, rank=rank, from_step=from_step, to_step=to_step)
    every, found = _recorded(store, state, part)
    steps_B, ln_r, d = found.steps_B, found.ln_r, found.d
    need_r, need_d = np.exp(ln_r.tightest(rate, _WIDEST_LN_R)), d.tightest(rate, _WIDEST_D)
    if bn_steps is None:
        planned = state.stored.record.schedule
        bn_steps = planned.bn_steps if planned is not None else 0
    return WhatIf(
        run=run_id,
        layer=layer,
        rank=rank,
        r_max=r_max,
        d_max=d_max,
        rate=rate,
        bucket_steps=part.width,
        sampled_every=every,
        steps=steps_B.tolist(),
        clip_r=_nullable(ln_r.clipped(np.full(len(steps_B), np.log(r_max)))),
        clip_d=_nullable(d.clipped(np.full(len(steps_B), d_max))),
        tightest_r_max=_nullable(need_r),
        tightest_d_max=_nullable(need_d),
        schedule=fitted(steps_B, need_r, need_d, bn_steps),
        exact=_exact(store, part, r_max, d_max),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles over channels of d or ln r, row by row, and which bucket each row belongs to.

    Attributes:
        values_NQ: ascending, without NaN; infinities are outside every limit.
        channels_N: channels of the row's layer.
        at_N: bucket of the row.
        buckets: how many buckets there are.
    """

    values_NQ: Floats
    channels_N: Ints
    at_N: Ints
    buckets: int

    @classmethod
    def of(cls, values_NQ: Floats, channels_N: Ints, at_N: Ints, buckets: int) -> Spread:
        """Of the rows that have no NaN."""
        whole_N = ~np.isnan(values_NQ).any(1)
        return cls(values_NQ[whole_N], channels_N[whole_N], at_N[whole_N], buckets)

    def clipped(self, limit_B: Floats) -> Floats:
        """(B,) mean over rows of the share of channels beyond ± the bucket's limit; NaN for a bucket without rows."""
        limit_N = limit_B[self.at_N]
        inside_N = below(self.values_NQ, limit_N, self.channels_N)
        inside_N += below(-self.values_NQ[:, ::-1], limit_N, self.channels_N) - 1
        total_B = np.bincount(self.at_N, weights=1 - inside_N, minlength=self.buckets)
        with np.errstate(invalid="ignore"):
            return np.asarray(total_B / np.bincount(self.at_N, minlength=self.buckets))

    def tightest(self, rate: float, widest: float) -> Floats:
        """(B,) smallest limit that clips at most `rate`; infinite where `widest` clips more, NaN without rows.

        By bisection, for all buckets at once: the share that is clipped falls as the limit rises.
        """
        low_B, high_B = np.zeros(self.buckets), np.full(self.buckets, np.log1p(widest))
        none_B, all_B = self.clipped(np.expm1(low_B)), self.clipped(np.expm1(high_B))
        for _ in range(16):  # to 0.02 %
            middle_B = (low_B + high_B) / 2
            fits_B = self.clipped(np.expm1(middle_B)) <= rate
            high_B, low_B = np.where(fits_B, middle_B, high_B), np.where(fits_B, low_B, middle_B)
        found_B = np.where(none_B <= rate, 0.0, np.where(all_B > rate, np.inf, np.expm1(high_B)))
        return np.where(np.isnan(none_B), np.nan, found_B)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The percentiles of a run, read once, to try any number of schedules on.

    Attributes:
        steps_B: newest step of each bucket.
        ln_r, d: their percentiles.
    """

    steps_B: Ints
    ln_r: Spread
    d: Spread

    def clip_rates(self, tried: Schedule) -> tuple[list[float | None], list[float | None]]:
        """The share of channels with r and with d clipped, had the limits moved as in `tried`.

        None where a limit is still shut (batch normalization corrects nothing, which is no clipping), and for a bucket
        without a row to go by.
        """
        r_max_B, d_max_B = limits(tried, self.steps_B)
        r_B = np.where(r_max_B > 1, self.ln_r.clipped(np.log(r_max_B)), np.nan)
        d_B = np.where(d_max_B > 0, self.d.clipped(d_max_B), np.nan)
        return _nullable(r_B), _nullable(d_B)


def recorded(store: Store, run_id: str, *, layer: int | None = None, points: int = 500) -> Recorded:
    """What `Recorded.clip_rates` needs of a run: of one layer, or of all.

    Raises:
        NotFound: no such run.
        Invalid: no such layer.
    """
    state = known(store, run_id)
    return _recorded(store, state, part_of(state, points, layer=layer))[1]


def limits(planned: Schedule, steps_B: Ints) -> tuple[Floats, Floats]:
    """(r_max, d_max) in force at each step: 1 and 0 until `bn_steps`, from there linearly to the final ones."""

    def opened(until: int) -> Floats:
        ramp_B = (steps_B - planned.bn_steps) / max(until - planned.bn_steps, 1)
        return np.where(steps_B >= until, 1.0, np.clip(ramp_B, 0, 1)) * (steps_B >= planned.bn_steps)

    return 1 + (planned.r_max - 1) * opened(planned.r_steps), planned.d_max * opened(planned.d_steps)


def below(values_NQ: Floats, limit_N: Floats, channels_N: Ints) -> Floats:
    """(N,) share of channels at most `limit`, from percentiles over so many channels.

    Nothing is known between an infinite percentile and its neighbour: the channels between lie beyond the limit.
    """
    if not len(limit_N):
        return np.zeros(0)
    at_N = (values_NQ <= limit_N[:, None]).sum(1) - 1  # the last percentile at or below the limit
    k_N = np.clip(at_N, 0, len(QUANTILES) - 2)
    row_N = np.arange(len(limit_N))
    low_N, high_N = values_NQ[row_N, k_N], values_NQ[row_N, k_N + 1]
    with np.errstate(all="ignore"):
        part_N = (limit_N - low_N) / (high_N - low_N)
    part_N = np.where(np.isfinite(low_N) & np.isfinite(high_N), np.clip(part_N, 0, 1), 0.0)
    score_CQ = _scores(int(channels_N.max()))
    lower_N, upper_N = score_CQ[channels_N, k_N], score_CQ[channels_N, k_N + 1]
    share_N = _share(lower_N + part_N * (upper_N - lower_N))
    return np.where(at_N < 0, 0.0, np.where(at_N == len(QUANTILES) - 1, 1.0, share_N))


@lru_cache(maxsize=16)
def _scores(most: int) -> Floats:
    """(C, Q) normal scores of the percentiles over 0, 1, ..., `most` channels.

    The smallest of C channels stands for the lowest 1 / C of the distribution, so for the share 1 / 2C.
    """
    share_CQ = np.tile(np.asarray(QUANTILES) / 100, (most + 1, 1))
    share_CQ[:, 0] = np.minimum(0.5 / np.maximum(np.arange(most + 1), 1), share_CQ[:, 1] / 2)
    share_CQ[:, -1] = 1 - share_CQ[:, 0]
    return _score(share_CQ)


# The normal distribution function is 1 / (1 + exp(-(a z + b z³))) within 0.0002; its inverse is that cubic's real root.
_A: Final = 1.5976
_B: Final = 0.070566


def _share(score: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-(_A * score + _B * score**3))))


def _score(share: Floats) -> Floats:
    p = _A / _B
    q = np.log(share / (1 - share)) / _B
    return np.asarray(2 * np.sqrt(p / 3) * np.sinh(np.arcsinh(1.5 * q / p * np.sqrt(3 / p)) / 3))


def fitted(steps_B: Ints, need_r: Floats, need_d: Floats, bn_steps: int) -> ScheduleFit | None:
    """The tightest RenormSchedule whose limits are nowhere below those needed after `bn_steps`.

    Each ramp is a line from its neutral value at `bn_steps`. Its end is the largest limit needed; it is as flat as the
    needs before allow. None where nothing was recorded after `bn_steps`, or no finite limit does.
    """
    after_B = (steps_B > bn_steps) & ~np.isnan(need_r) & ~np.isnan(need_d)
    if not after_B.any() or not (np.isfinite(need_r[after_B]).all() and np.isfinite(need_d[after_B]).all()):
        return None

    def ramp(excess_B: Floats) -> tuple[int, float]:
        end = float(excess_B.max())
        if end == 0:
            return bn_steps, 0.0
        slope = float((excess_B / (steps_B[after_B] - bn_steps)).max())
        return bn_steps + int(end / slope), end

    r_steps, r_excess = ramp(need_r[after_B] - 1)
    d_steps, d_max = ramp(need_d[after_B])
    return ScheduleFit(bn_steps=bn_steps, r_steps=r_steps, d_steps=d_steps, r_max=1 + r_excess, d_max=d_max)


def _recorded(store: Store, state: State, part: Slice) -> tuple[int, Recorded]:
    """The percentiles of every `every`-th step of a part."""
    channels_L = np.array([layer.channels for layer in state.stored.record.layers])
    every, rows = _rows(store, part, state.extent.layer_rows, len(channels_L))
    bucket_N, newest_N, layer_N, r_NQ, d_NQ = rows
    buckets, at_N = np.unique(bucket_N, return_inverse=True)
    steps_B = np.zeros(len(buckets), np.int64)
    np.maximum.at(steps_B, at_N, newest_N)
    with np.errstate(all="ignore"):
        ln_r = Spread.of(np.log(r_NQ), channels_L[layer_N], at_N, len(buckets))
    return every, Recorded(steps_B, ln_r, Spread.of(d_NQ, channels_L[layer_N], at_N, len(buckets)))


def _rows(
    store: Store, part: Slice, stored_rows: int, layers: int
) -> tuple[int, tuple[Ints, Ints, Ints, Floats, Floats]]:
    """Of every `every`-th step (1, 2, 4, ...): bucket, step and layer (N,), percentiles of r and of d (N, Q)."""
    every = 1
    if stored_rows > MOST_ROWS:  # of all layers and ranks; the slice may have fewer
        sql = f"SELECT count() AS n FROM layers WHERE {part.where}"
        count = store.engine.rows(sql, **part.parameters).column("n")[0].as_py()
        while count > MOST_ROWS * every:
            every *= 2
    table = store.engine.rows(
        f"""
        SELECT intDiv(step, {{width:UInt64}}) AS bucket, step, layer, {", ".join((*_R, *_D))}
        FROM layers
        WHERE {part.where} AND layer < {{layers:UInt32}}
            AND (intHash64(step) % {{every:UInt64}} = 0 OR step = {{last:UInt64}})
        """,
        **part.parameters,
        every=every,
        last=part.last,
        layers=layers,
    )

    def columns(names: tuple[str, ...]) -> Floats:
        return np.stack([table.column(name).to_numpy().astype(np.float64) for name in names], axis=1)

    steps = (table.column(name).to_numpy().astype(np.int64) for name in ("bucket", "step", "layer"))
    return every, (*steps, columns(_R), columns(_D))


def _exact(store: Store, part: Slice, r_max: float, d_max: float) -> ExactClipping:
    """From snapshots; NaN is within no limits, so it counts as clipped."""
    table = store.engine.rows(
        f"""
        SELECT step,
               avg(arrayAvg(x -> NOT (x >= 1 / {{r_max:Float64}} AND x <= {{r_max:Float64}}), r)) AS clip_r,
               avg(arrayAvg(x -> NOT (abs(x) <= {{d_max:Float64}}), d)) AS clip_d
        FROM channels WHERE {part.where} GROUP BY step ORDER BY step
        """,
        **part.parameters,
        r_max=r_max,
        d_max=d_max,
    )
    return ExactClipping(
        steps=table.column("step").to_pylist(),
        clip_r=table.column("clip_r").to_pylist(),
        clip_d=table.column("clip_d").to_pylist(),
    )


def _nullable(values_B: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_B]
