"""Order in the data stream, from the input probe: between batches (NH-ORDER) and within them (NH-PAIRED).

Both are invisible to F: a sorted data set gives batches that differ little from their neighbours, and pairs of equal
samples may be spread evenly. Shape suffixes: T recorded steps, K ranks, F probe features, W rows of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.diagnosis.estimate import MIN_STEPS, Ratio, Watch, ratio_of_means
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.outcome import Outcome, query
from service.diagnosis.stream import Stream, full_ranks, inverse, of_a_window
from service.diagnosis.window import Window

_ORDER_Z = 2.576  # permutation z for p = .005, one-sided
ORDER_WATCHES = (
    Watch(50, 50, 0.6, 5.0, 1),
    Watch(100, 50, 0.6, 5.0, 1),
    Watch(100, 50, 0.7, _ORDER_Z, 2),
    Watch(100, 50, 0.8, 4.0, 2),
    Watch(200, 100, 0.8, _ORDER_Z, 2),
    Watch(200, 100, 0.9, 4.0, 2),
    Watch(400, 200, 0.9, _ORDER_Z, 2),
)
"""Their thresholds are O, from which downwards they speak."""
LEAST_DISTINCT = 5
"""Different batches below which an order says nothing: three of them in turn always do the same."""
PAIRED_WATCHES = (Watch(50, 50, 0.85, 6.0, 1), Watch(100, 50, 0.9, 4.0, 2), Watch(400, 200, 0.95, 4.0, 2))
"""Their thresholds are A, from which downwards they speak."""


@dataclass(frozen=True, slots=True)
class Neumann:
    """von Neumann ratio of the batch means: 1 for any order that is random, near 0 for a slow wander.

    `z` is the distance from the mean over all permutations of the window's steps, in their standard deviations.
    """

    value: float
    z: float
    steps: int


@of_a_window
def neumann_ratio(stream: Stream, begin: int, end: int, below: float = math.inf) -> Neumann | None:
    """O over rows begin..end-1, all full ranks together; None with too few rows or features that do not move.

    With z_t the centred means of a step over the root of their noise, S = sum_t z_t . z_t+1 and Q = sum_t |z_t|²,
    O = 1 - S / Q up to the ends of the window, with mean 1. Over all permutations of the steps, S has mean -Q / W
    and, to leading order, variance (W - 1) times the mean square of z_s . z_t, s != t: no permutation is drawn.
    Batches that come again are permuted together, so only the different ones count. The variance costs: `z` is left at
    infinity where O is not `below` what the caller asks about.
    """
    full_K = full_ranks(stream.good_TK[begin:end])
    good_T = stream.good_TK[begin:end, full_K].all(1)
    n = int(good_T.sum())
    distinct = min(n, stream.distinct(begin, end))
    if not full_K.any() or n < MIN_STEPS or distinct < LEAST_DISTINCT:
        return None
    mean_WKF, noise_WKF = stream.mean_TKF[begin:end], stream.noise.each_TKF[begin:end]
    if not full_K.all() or n < end - begin:
        mean_WKF, noise_WKF = mean_WKF[good_T][:, full_K], noise_WKF[good_T][:, full_K]
    noise_KF = noise_WKF.mean(0)
    z_WX = ((mean_WKF - mean_WKF.mean(0)) * np.sqrt(inverse(noise_KF))).reshape(n, -1)
    square_W = np.einsum("wx,wx->w", z_WX, z_WX)
    total = float(square_W.sum())
    if not total > 0:
        return None
    along = float(np.einsum("wx,wx->", z_WX[1:], z_WX[:-1]))
    ends = float(square_W[0] + square_W[-1]) / 2
    value = (total - ends - along) / total
    if value >= below:
        return Neumann(value, math.inf, n)
    gram = z_WX @ z_WX.T if n < z_WX.shape[1] else z_WX.T @ z_WX  # both have the same sum of squares
    variance = (float((gram**2).sum()) - float((square_W**2).sum())) / n
    z = (along + total / n) / math.sqrt(variance * n / distinct) if variance > 0 else 0.0
    return Neumann(value, -z, n)


@of_a_window
def neighbour_ratio(stream: Stream, begin: int, end: int) -> Ratio | None:
    """A over rows begin..end-1: variance between neighbours in a batch over the batch's variance.

    1 for any exchangeable order within the batch, below where neighbours resemble each other.
    """
    full_K = full_ranks(stream.good_TK[begin:end])
    if not full_K.any():
        return None
    good_T = np.asarray(stream.good_TK[begin:end, full_K].any(1), np.bool_)
    neighbour_TF = stream.neighbour.over(begin, end, full_K)
    noise_TF = stream.noise.over(begin, end, full_K)
    weight_F = inverse(noise_TF.sum(0))
    return ratio_of_means(
        neighbour_TF @ weight_F, noise_TF @ weight_F, good_T, order=0, distinct=stream.distinct(begin, end)
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    first: int
    last: int
    watch: Watch

    @property
    def newest(self) -> tuple[int, int]:
        """(begin, end) rows of the newest window that spoke."""
        return max(0, self.last + 1 - self.watch.rows), self.last + 1


def _looks(stream: Stream, watches: tuple[Watch, ...], fires: Callable[[int, int, Watch], bool]) -> _Seen | None:
    """First and last row at which a watch spoke; the one that did last, the narrowest of several."""
    found: list[_Seen] = []
    for watch in watches:
        windows = watch.windows(stream.steps_T)
        if spoke := watch.spoke([fires(begin, end, watch) for begin, end in windows]):
            found.append(_Seen(windows[spoke[0]][1] - 1, windows[spoke[-1]][1] - 1, watch))
    if not found:
        return None
    newest = max(found, key=lambda seen: (seen.last, -seen.watch.rows))
    return _Seen(min(seen.first for seen in found), newest.last, newest.watch)


def order(window: Window, stream: Stream) -> Outcome:
    """NH-ORDER: does the order in which batches come carry information?"""
    below = max(watch.threshold for watch in ORDER_WATCHES)

    def fires(begin: int, end: int, watch: Watch) -> bool:
        ratio = neumann_ratio(stream, begin, end, below)
        return ratio is not None and ratio.value < watch.threshold and ratio.z <= -watch.z

    seen = _looks(stream, ORDER_WATCHES, fires)
    if seen is None:
        return Outcome()
    ratio = neumann_ratio(stream, *seen.newest)
    assert ratio is not None
    finding = Finding(
        code="NH-ORDER",
        severity="warning",
        summary=(
            f"Successive batches resemble each other: from one to the next their means vary only {ratio.value:.2g} "
            f"times as much as in a random order ({ratio.steps} steps); the data is sorted, barely shuffled, or drifts."
        ),
        evidence=Evidence(
            statistic="O, von Neumann ratio of the batch means (input probe)",
            value=ratio.value,
            threshold=seen.watch.threshold,
            z=ratio.z,
            steps_used=ratio.steps,
            query=query(window.run, "series", stat="mu_b", layer=window.layers[0].index if window.layers else None),
        ),
        remedy=Remedy(
            text=(
                "Shuffle over the whole data set every epoch; a shuffle buffer must be about as large as the data set, "
                "or the shards must be shuffled too. No normalization layer repairs an order."
            ),
            code=f"DataLoader(dataset, batch_size={stream.samples}, shuffle=True)",
        ),
        steps=(int(stream.steps_T[seen.first]), int(stream.steps_T[seen.last])),
    )
    return Outcome((finding,))


def paired(window: Window, stream: Stream) -> Outcome:
    """NH-PAIRED: do neighbours within a batch resemble each other?"""

    def fires(begin: int, end: int, watch: Watch) -> bool:
        ratio = neighbour_ratio(stream, begin, end)
        return ratio is not None and ratio.value < watch.threshold and ratio.z <= -watch.z

    seen = _looks(stream, PAIRED_WATCHES, fires)
    if seen is None:
        return Outcome()
    ratio = neighbour_ratio(stream, *seen.newest)
    assert ratio is not None
    finding = Finding(
        code="NH-PAIRED",
        severity="warning",
        summary=(
            f"Neighbours in a batch resemble each other: they vary {ratio.value:.2g} times as much as random pairs of "
            f"the batch (95 % CI {ratio.low:.2g} to {ratio.high:.2g}), so it holds pairs, copies or sorted runs."
        ),
        evidence=Evidence(
            statistic="A, variance between neighbours over variance within the batch (input probe)",
            value=ratio.value,
            low=ratio.low,
            high=ratio.high,
            threshold=seen.watch.threshold,
            z=ratio.z if math.isfinite(ratio.z) else None,
            steps_used=ratio.steps,
            query=query(
                window.run,
                "series",
                stat=("adjacency_noise", "mean_noise"),
                layer=window.layers[0].index if window.layers else None,
            ),
        ),
        remedy=Remedy(
            text=(
                "Where copies or several views of a sample are meant (metric learning, repeated augmentation), put "
                "them into different normalization batches or use Batch Renorm; otherwise look for a repeating sampler."
            ),
            code=f"views = views.view({max(stream.samples // 2, 1)}, 2, *shape).transpose(0, 1)  # one view a forward",
        ),
        steps=(int(stream.steps_T[seen.first]), int(stream.steps_T[seen.last])),
    )
    return Outcome((finding,))
