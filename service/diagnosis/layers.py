"""What the layers' own rows say: the parts of the train-inference gap, and what the limits leave of it.

Shape suffixes: T recorded steps, K ranks, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS, Ratio, ratio_of_means
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.looks import lasting, looks, of_layers, together, worst_first
from service.diagnosis.noise import RECTIFIED_KAPPA, tail_ratio, tail_threshold
from service.diagnosis.outcome import Outcome, query
from service.diagnosis.ranks import SKEW_WARNING
from service.diagnosis.window import Bools, Window

SHARE_ROWS = 400
CLIP_EXCESS = 0.05
RESIDUAL_SHARE = 0.02
CLIP_SOME = 0.01
"""Clip rate beyond the null without which, at the paper's limits, the residual is that of a few extreme rows."""
CLIP_BATCH = 8
"""Samples below which the paper's limits are not held against a batch: no null rate fits all that is independent."""
NORMAL_KAPPA = 2.0
"""kappa of normal samples of a fully connected layer."""
PAPER_R, PAPER_D = 2.999, 4.999
"""The paper's final limits 3 and 5, less their rounding."""

Part = Literal["sampling", "clustered", "rank", "slow"]
_PART_TEXT: dict[Part, str] = {
    "sampling": "sampling noise of small batches",
    "clustered": "batches that are not random samples",
    "rank": "ranks that see different data",
    "slow": "slow: moving statistics that lag, or ordered data",
}


@dataclass(frozen=True, slots=True)
class Shares:
    """The gap (r - 1)² + d² of the first normalization layer that trains, in parts that sum to 1.

    The first layer, because behind a batch-normalized layer the batch means are pinned and the gap is understated.

    Attributes:
        layer: name of that layer.
        gap: its mean gap, in sigma².
        parts: share of each part.
        ratio: F of that layer's batch means, from second differences.
    """

    layer: str
    gap: float
    parts: dict[Part, float]
    ratio: Ratio | None

    @property
    def dominant(self) -> Part:
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def dominant_share(self) -> float:
        return self.parts[self.dominant]

    @property
    def dominant_text(self) -> str:
        return _PART_TEXT[self.dominant]


def shares(window: Window, rank_effect: float | None) -> Shares | None:
    """The parts of the gap of the first layer with rows (frozen ones have none), newest rows; None with too few.

    sampling = min(fast, V) for mean and scale, clustered = the excess of both, slow = the rest, which is called rank
    where the probe shows a persistent rank effect of at least `SKEW_WARNING`. Where F's interval reaches 1 the excess
    is counted as sampling.
    """
    if not window.layers:
        return None
    columns = {name: column[-SHARE_ROWS:] for name, column in window.rows.columns.items()}
    parted = ("gap", "mean_diff2", "mean_noise", "scale_diff2", "scale_noise")
    seen_TKL = np.logical_and.reduce([np.isfinite(columns[name]) for name in parted])
    enough_L = seen_TKL.any(1).sum(0) >= MIN_STEPS
    if not enough_L.any():
        return None
    i = int(enough_L.argmax())
    first, seen_TK = {name: columns[name][:, :, i] for name in parted}, seen_TKL[:, :, i]
    ratio = ratio_of_means(
        np.where(seen_TK, first["mean_diff2"], 0.0).sum(1),
        np.where(seen_TK, first["mean_noise"], 0.0).sum(1),
        seen_TK.any(1),
        order=2,
    )
    mean = {name: float(column_TK[seen_TK].mean()) for name, column_TK in first.items()}
    excess = max(mean["mean_diff2"] - mean["mean_noise"], 0.0) + max(mean["scale_diff2"] - mean["scale_noise"], 0.0)
    sampling = min(mean["mean_diff2"], mean["mean_noise"]) + min(mean["scale_diff2"], mean["scale_noise"])
    if ratio is None or ratio.low <= 1:
        sampling, excess = sampling + excess, 0.0
    slow = max(mean["gap"] - sampling - excess, 0.0)
    total = sampling + excess + slow
    if not total > 0:
        return None
    skewed = rank_effect is not None and rank_effect >= SKEW_WARNING
    parts: dict[Part, float] = {
        "sampling": sampling / total,
        "clustered": excess / total,
        "rank": slow / total if skewed else 0.0,
        "slow": 0.0 if skewed else slow / total,
    }
    return Shares(window.layers[i].name, mean["gap"], parts, ratio)


@lru_cache(maxsize=4096)
def null_clip_rate(samples: int, r_max: float, d_max: float) -> float:
    """Share of channels that i.i.d. normal batches of `samples` clip once sigma has settled.

    N sigma_B² / sigma_true² is chi-squared with N - 1 degrees of freedom; the moving sigma is the mean of sigma_B, so r
    and d are relative to m = E sigma_B / sigma_true = sqrt(2 / N) Gamma(N/2) / Gamma((N-1)/2). Positions inside a
    sample only make the true rate smaller. Falls below .2 % from N = 8 on at the paper's limits 3 and 5.
    """
    if samples < 2:
        return 1.0
    m = math.sqrt(2 / samples) * math.exp(math.lgamma(samples / 2) - math.lgamma((samples - 1) / 2))
    low = _chi_squared_cdf(samples * (m / r_max) ** 2, samples - 1)
    high = 1 - _chi_squared_cdf(samples * (m * r_max) ** 2, samples - 1)
    beyond_d = math.erfc(d_max * m * math.sqrt(samples / 2))
    return 1 - (1 - low - high) * (1 - beyond_d)


@lru_cache(maxsize=4096)
def light_tailed_clip_rate(samples: int, r_max: float, d_max: float) -> float:
    """The same for the heaviest of light tails, rectified normal samples, to within 1 % from N = 6 on.

    Var d = rho / N has no kappa. Var r = kappa / 4N has: N samples with kappa = 4.41 fix sigma_B as well as 2 N / 4.41
    normal ones.
    """
    by_r = null_clip_rate(max(2, round(samples * NORMAL_KAPPA / RECTIFIED_KAPPA)), r_max, math.inf)
    return 1 - (1 - by_r) * (1 - null_clip_rate(samples, math.inf, d_max))


def _chi_squared_cdf(x: float, degrees: int) -> float:
    # Regularized lower incomplete gamma function P(degrees / 2, x / 2) by its power series; all terms are positive.
    a, half = degrees / 2, x / 2
    if half <= 0:
        return 0.0
    if half > a + 40 * math.sqrt(a) + 40:
        return 1.0
    term = math.exp(a * math.log(half) - half - math.lgamma(a + 1))
    total, k = term, 0
    while term > 1e-16 * total:
        k += 1
        term *= half / (a + k)
        total += term
    return min(total, 1.0)


def clip(window: Window) -> Outcome:
    """NH-CLIP: do the limits, now final, still leave a part of the gap uncorrected?"""
    rows = window.rows
    renorm_L = np.array([layer.kind == "BatchRenorm" for layer in window.layers], np.bool_)
    if not renorm_L.any() or not len(rows.steps_T):
        return Outcome()
    names = ("samples", "clip_r", "clip_d", "residual", "gap", "r_max", "d_max")
    tail_TKL = np.nan_to_num(tail_ratio(rows))  # unknown ones count as light
    columns = {name: rows.columns[name] for name in names} | {"tail": tail_TKL}
    seen = looks(rows, columns, _limits_are_final(window))
    mean = seen.mean
    samples_JL = mean["samples"] * together(window)
    null_JL = np.reshape(
        [
            light_tailed_clip_rate(round(n), round(r_max, 6), round(d_max, 6)) if math.isfinite(n) else math.nan
            for n, r_max, d_max in zip(samples_JL.flat, mean["r_max"].flat, mean["d_max"].flat, strict=True)
        ],
        samples_JL.shape,
    )
    rate_JL = np.maximum(mean["clip_r"], mean["clip_d"])
    left_JL = np.divide(mean["residual"], mean["gap"], out=np.zeros_like(mean["gap"]), where=mean["gap"] > 0)
    # A tiny batch and sparse samples clip at any limits, and wider ones are no remedy: NH-SMALL and NH-TAIL say that.
    light_JL = (samples_JL >= CLIP_BATCH) & (mean["tail"] <= tail_threshold(mean["samples"]))
    narrow_JL = (mean["r_max"] < PAPER_R) | (mean["d_max"] < PAPER_D)
    left_much_JL = (left_JL > RESIDUAL_SHARE) & (narrow_JL | (rate_JL > null_JL + CLIP_SOME))
    fired_JL = ((rate_JL > null_JL + CLIP_EXCESS) | left_much_JL) & (narrow_JL | light_JL) & renorm_L
    held = lasting(seen.steps_J, fired_JL)
    if held is None:
        return Outcome()
    excess_L = np.fmax((rate_JL[-1] - null_JL[-1]) / CLIP_EXCESS, left_JL[-1] / RESIDUAL_SHARE)
    worst = worst_first(excess_L, held.layers_L)
    i = worst[0]
    layer = window.layers[i]
    rate, null, left = float(rate_JL[-1, i]), float(null_JL[-1, i]), float(left_JL[-1, i])
    r_max, d_max = float(mean["r_max"][-1, i]), float(mean["d_max"][-1, i])
    by_residual = left > RESIDUAL_SHARE
    finding = Finding(
        code="NH-CLIP",
        severity="warning",
        summary=(
            f"At its final limits r_max = {r_max:.3g}, d_max = {d_max:.3g} layer {layer.name} still clips {rate:.1%} "
            f"of its channels (independent batches: {null:.1%}), which leaves {left:.1%} of the gap"
            f"{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="residual / gap, share that clipping leaves" if by_residual else "share of channels clipped",
            value=left if by_residual else rate,
            threshold=RESIDUAL_SHARE if by_residual else null + CLIP_EXCESS,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("clip_r", "clip_d", "residual", "gap"), layer=layer.index),
        ),
        remedy=_clip_remedy(window, r_max, d_max),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def _limits_are_final(window: Window) -> Bools:
    r_max_TKL, d_max_TKL = window.rows.columns["r_max"], window.rows.columns["d_max"]
    if window.schedule is not None:
        r_final, d_final = window.schedule.r_max, window.schedule.d_max
        return (r_max_TKL >= r_final * (1 - 1e-5)) & (d_max_TKL >= d_final * (1 - 1e-5))
    # Without a schedule the limits count as final once they rest at the highest values of the window.
    r_final_L, d_final_L = (np.nanmax(np.nan_to_num(c), axis=(0, 1)) for c in (r_max_TKL, d_max_TKL))
    opened_L = (r_final_L > 1) | (d_final_L > 0)
    final_TKL: Bools = (r_max_TKL == r_final_L) & (d_max_TKL == d_final_L) & opened_L
    return final_TKL


def _clip_remedy(window: Window, r_max: float, d_max: float) -> Remedy:
    if r_max < PAPER_R or d_max < PAPER_D:
        return Remedy(
            text="Open the limits further, to the paper's 3 and 5, once the moving statistics have settled.",
            code=(
                f"RenormSchedule(r_max={max(r_max, 3.0):g}, d_max={max(d_max, 5.0):g})"
                ".scaled(total_steps).apply(model, step)"
            ),
        )
    return Remedy(
        text=(
            "The limits are wide enough for independent batches, so look for the cause: channels with outliers (draw "
            "r_q100 and d_q100), batches that are not random samples, or ranks that see different data."
        ),
        code=f"GET {query(window.run, 'heatmap', stat='r_q100')}",
    )
