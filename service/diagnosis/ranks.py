"""Ranks against each other, from the input probe: different populations (NH-RANKSKEW), the same data (NH-RANKDUP).

Shape suffixes: T recorded steps, B blocks of steps, K ranks, F probe features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS, Watch, ratio_of_means
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.outcome import Outcome, names, query
from service.diagnosis.stream import Stream, full_ranks, inverse, of_a_window
from service.diagnosis.window import Floats, Ints, Window

BLOCK_ROWS = 5
SKEW_WARNING = 0.2
SKEW_CRITICAL = 1.0
SKEW_WATCHES = (
    Watch(50, 50, 0.3, 6.0, 1),
    Watch(100, 50, SKEW_WARNING, 4.0, 2),
    Watch(400, 200, SKEW_WARNING, 4.0, 2),
)
"""Their thresholds are R, from which upwards they speak."""
COPY_WATCHES = (Watch(LOOK_ROWS, LOOK_ROWS, 0.5, 0.0, 2), Watch(20, 20, 1e-4, 0.0, 1))
"""Their thresholds are the ratio below which ranks see the same batches. The second means equal, as a forgotten sampler
makes them: that is no chance, even where few different batches come and now and then two ranks have the same."""
MIN_PAIRS = 15
"""Pairs of successive blocks below which no rank effect is given: 95 of 100 rows, or, in shorter blocks, 35 of 50."""


@dataclass(frozen=True, slots=True)
class RankEffect:
    """R and its 95 % interval: the variance of what is constant in a rank's means, over the noise of a batch mean."""

    value: float
    standard_error: float
    steps: int
    extreme: int

    @property
    def z(self) -> float:
        return self.value / max(self.standard_error, 1e-12)


@of_a_window
def rank_effect(stream: Stream, begin: int, end: int, *, scale: bool = False) -> RankEffect | None:
    """R over rows begin..end-1: mean over features of cov_k(block b, block b + 1) / (s²_y / N), blocks of 5 steps (2 in
    windows below 100 rows, for as many pairs).

    0 where all ranks draw from one population, clustered or not: what moves from block to block averages out. None
    with fewer than two full ranks or `MIN_PAIRS` pairs of blocks. With `scale` the same of the variance within batches
    instead of their mean (unbiased at any N), its noise from successive steps: ranks may differ in contrast alone.
    """
    ranks, (mean_WKF, noise_WKF, var_WKF) = _complete(stream, begin, end)
    block = BLOCK_ROWS if end - begin >= 95 else 2
    blocks = len(mean_WKF) // block
    if len(ranks) < 2 or blocks < 2 or stream.distinct(begin, end) < MIN_STEPS:
        return None
    if scale:
        mean_WKF, noise_WKF = _scales(var_WKF)
    shape = (blocks, block, len(ranks), -1)
    used = slice(blocks * block)
    mean_BKF = np.einsum("bskf->bkf", mean_WKF[used].reshape(shape)) / block
    noise_BF = np.einsum("bskf->bf", noise_WKF[used].reshape(shape)) / (block * len(ranks))
    weight_F = inverse(noise_BF.mean(0))
    apart_BKF = mean_BKF - mean_BKF.mean(1, keepdims=True)
    kept_B = (apart_BKF[1:] * apart_BKF[:-1]).sum(1) @ weight_F / (len(ranks) - 1)
    noise_B = (noise_BF[1:] + noise_BF[:-1]) @ weight_F / 2
    ratio = ratio_of_means(kept_B, noise_B, np.ones(blocks - 1, np.bool_), order=1, least=MIN_PAIRS)
    if ratio is None:
        return None
    extreme = int(ranks[int((apart_BKF.mean(0) ** 2 @ weight_F).argmax())])
    return RankEffect(ratio.value, ratio.standard_error, blocks * block, extreme)


def _scales(var_WKF: Floats) -> tuple[Floats, Floats]:
    """Each feature's variance relative to its mean over ranks and steps, and the noise of that from step to step."""
    relative_WKF = var_WKF * inverse(var_WKF.mean((0, 1)))
    noise_F = (np.diff(relative_WKF, axis=0) ** 2 / 2).mean((0, 1))
    return relative_WKF, np.broadcast_to(noise_F, var_WKF.shape)


def _complete(stream: Stream, begin: int, end: int) -> tuple[Ints, tuple[Floats, Floats, Floats]]:
    """The full ranks, and their means, noises and variances (W, K, F) at the rows that all of them have."""
    good_WK = stream.good_TK[begin:end]
    full_K = full_ranks(good_WK)
    ranks = np.flatnonzero(full_K)
    noise_WKF = stream.noise.each_TKF[begin:end]
    parts = (stream.mean_TKF[begin:end], noise_WKF, noise_WKF * stream.samples_TK[begin:end, :, None])
    if not good_WK.all():
        rows = np.flatnonzero(good_WK[:, full_K].all(1))
        mean_WKF, noise_WKF, var_WKF = (part[rows][:, ranks] for part in parts)
        return ranks, (mean_WKF, noise_WKF, var_WKF)
    return ranks, parts


@of_a_window
def copies(stream: Stream, begin: int, end: int) -> tuple[Floats, Ints] | None:
    """Half the squared difference of each pair of ranks' means over its expectation for independent batches.

    1 for ranks with data of their own, 0 for ranks that see the same batches. The expectation is (s²_i / N_i +
    s²_j / N_j) / 2 of that pair at that step, and the mean is over the steps' ratios: a pair of calm or large batches
    is not held against the noise of other ranks, nor a quiet step against an outlier in another. A ratio of two
    estimates has a mean of 1 or more, so what this costs can only hide a pair, not accuse one. None with fewer than
    two full ranks.

    Returns:
        The ratios (K, K) of the full ranks, with infinity on the diagonal, and those ranks.
    """
    ranks, (mean_WKF, noise_WKF, _) = _complete(stream, begin, end)
    if len(ranks) < 2 or len(mean_WKF) < 0.9 * (end - begin):
        return None
    weight_F = inverse(np.einsum("wkf->f", noise_WKF))
    z_WKF = (mean_WKF - mean_WKF.mean(1, keepdims=True)) * np.sqrt(weight_F)
    products_WKK = z_WKF @ z_WKF.transpose(0, 2, 1)
    square_WK = np.einsum("wkf,wkf->wk", z_WKF, z_WKF)
    noise_WK = noise_WKF @ weight_F
    apart_WKK = square_WK[:, :, None] + square_WK[:, None] - 2 * products_WKK
    expected_WKK = noise_WK[:, :, None] + noise_WK[:, None]
    known_WKK = expected_WKK > 0
    if not known_WKK.any(0).all():
        return None
    ratio_WKK = np.divide(apart_WKK, expected_WKK, out=np.zeros_like(apart_WKK), where=known_WKK)
    ratio_KK = ratio_WKK.sum(0) / known_WKK.sum(0)
    np.fill_diagonal(ratio_KK, np.inf)
    return ratio_KK, ranks


def skew(window: Window, stream: Stream, kept_of_one: bool) -> tuple[Outcome, float | None]:
    """NH-RANKSKEW: do ranks draw from different populations?

    Args:
        window: the run.
        stream: its probe.
        kept_of_one: whether the moving statistics that are kept are those of one rank: what it never saw is lost.

    Returns:
        The outcome, and R now, where it is known (NH-GAP uses it to tell skewed ranks from lag).
    """
    if stream.good_TK.shape[1] < 2:
        return Outcome(), None
    in_means, now = _effects(stream, False)
    in_variances, _ = _effects(stream, True)
    found = [*in_means, *in_variances]
    if not found:
        return Outcome(), now
    first, last = min(f[0] for f in found), max(f[1] for f in found)
    scale = not in_means
    effect = (in_means or in_variances)[-1][2]
    half = 1.96 * effect.standard_error
    moment = "variances" if scale else "means"
    finding = Finding(
        code="NH-RANKSKEW",
        severity="critical" if effect.value >= SKEW_CRITICAL or kept_of_one else "warning",
        summary=(
            f"Ranks see different populations: what is constant in a rank's batch {moment} has {effect.value:.2g} "
            f"times the variance of their sampling noise (95 % CI {effect.value - half:.2g} to "
            f"{effect.value + half:.2g}); "
            f"rank {effect.extreme} is furthest from the others."
        ),
        evidence=Evidence(
            statistic=f"R, covariance over ranks of successive blocks of batch {moment}, over noise (input probe)",
            value=effect.value,
            low=effect.value - half,
            high=effect.value + half,
            threshold=SKEW_WARNING,
            z=effect.z,
            steps_used=effect.steps,
            query=query(window.run, "probe", points=200),
        ),
        remedy=Remedy(
            text=(
                "Normalize over all ranks, or give every rank a random share of all data; never evaluate with one "
                "rank's moving statistics (DDP broadcasts rank 0's)."
            ),
            code=_skew_code(window, stream.samples),
        ),
        steps=(int(stream.steps_T[first]), int(stream.steps_T[last])),
    )
    return Outcome((finding,)), now


def _effects(stream: Stream, scale: bool) -> tuple[list[tuple[int, int, RankEffect]], float | None]:
    """First and last row at which a watch spoke, with the newest effect that made it, by watch; and R now."""
    found: list[tuple[int, int, RankEffect]] = []
    now: float | None = None
    for watch in SKEW_WATCHES[:2] if scale else SKEW_WATCHES:
        windows = watch.windows(stream.steps_T)
        effects = [rank_effect(stream, begin, end, scale=scale) for begin, end in windows]
        spoke = watch.spoke([e is not None and e.value >= watch.threshold and e.z >= watch.z for e in effects])
        if effects and effects[-1] is not None and (watch.in_a_row == 2 or spoke):
            now = effects[-1].value
        if spoke and (effect := effects[spoke[-1]]) is not None:
            found.append((windows[spoke[0]][1] - 1, windows[spoke[-1]][1] - 1, effect))
    return found, now


def _skew_code(window: Window, samples: int) -> str:
    if any(layer.kind == "BatchNorm" for layer in window.layers):
        return "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
    return f"DataLoader(dataset, batch_size={samples}, sampler=DistributedSampler(dataset, shuffle=True))"


def duplicates(window: Window, stream: Stream) -> Outcome:
    """NH-RANKDUP: do two ranks see the same batches?"""
    if stream.good_TK.shape[1] < 2:
        return Outcome()
    found: list[tuple[int, int, Watch, Floats, Ints]] = []
    for watch in COPY_WATCHES:
        windows = watch.windows(stream.steps_T)
        pairs = [_pairs_below(stream, begin, end, watch) for begin, end in windows]
        if (spoke := watch.spoke([one is not None for one in pairs])) and (newest := pairs[spoke[-1]]) is not None:
            found.append((windows[spoke[0]][1] - 1, windows[spoke[-1]][1] - 1, watch, *newest))
    if not found:
        return Outcome()
    _, last, watch, ratio_KK, ranks = max(found, key=lambda seen: (seen[1], seen[2].rows))
    first = min(seen[0] for seen in found)
    same = tuple(int(k) for k in ranks[(ratio_KK < watch.threshold).any(1)])
    lowest = float(ratio_KK.min())
    finding = Finding(
        code="NH-RANKDUP",
        severity="critical",
        summary=(
            f"{names(same).capitalize()} see the same data: at the same step their batch means differ "
            f"{max(lowest, 0.0):.2g} times as much as independent batches' would, so {len(same)} ranks do the work of "
            "fewer."
        ),
        evidence=Evidence(
            statistic="F_rank, variance between two ranks at one step over sampling noise (input probe)",
            value=max(lowest, 0.0),
            threshold=watch.threshold,
            steps_used=watch.rows,
            query=query(window.run, "probe", points=200),
        ),
        remedy=Remedy(
            text="Give every rank its own part of the data: a DistributedSampler, or a seed that depends on the rank.",
            code=f"DataLoader(dataset, batch_size={stream.samples}, sampler=DistributedSampler(dataset, shuffle=True))",
        ),
        ranks=same,
        steps=(int(stream.steps_T[first]), int(stream.steps_T[last])),
    )
    return Outcome((finding,))


def _pairs_below(stream: Stream, begin: int, end: int, watch: Watch) -> tuple[Floats, Ints] | None:
    """`copies`, where some pair is below the threshold and chance does not make it so for want of different batches."""
    found = copies(stream, begin, end)
    if found is None or not (found[0] < watch.threshold).any():
        return None
    return found if watch.in_a_row == 1 or stream.distinct(begin, end) >= MIN_STEPS else None
