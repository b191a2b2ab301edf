"""The data stream, judged from the input probe alone: are batches random samples of one population?

The probe is frozen and sees the raw input, so training cannot move it. Layers behind a normalization layer can not
say this: their batch means are pinned by the layers before them.

Shape suffixes: T recorded steps, K ranks, F probe features. A rank's batches are a stream of their own; ranks are
summed inside a step, and steps are the independent units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.diagnosis.estimate import (
    LOOK_ROWS,
    MAX_GAP_SHARE,
    MIN_STEPS,
    Ratio,
    look_rows,
    ratio_of_means,
    spacing,
    twice_in_a_row,
)
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.outcome import Abstention, Outcome, count, names, query
from service.diagnosis.window import Bools, Floats, Ints, ProbeRows, Window

WINDOWS = ((100, 1.2), (400, 1.15))
"""Rows of a window, and the F from which it speaks."""
Z_ALARM = 4.0
E_ALARM = 1e4
"""Evidence at which the e-detector speaks: mean time to a false alarm of at least as many blocks of two steps."""
E_MARGIN = 1.05
E_BETS = (0.3, 0.6, 0.95)
E_WARMUP_BLOCKS = 5
CRITICAL_SAMPLES = 5.0
CRITICAL_BATCH = 8
FIRST_ANSWER_ROWS = WINDOWS[0][0] + LOOK_ROWS
SILENT_ROWS = 100
"""Rows a rank may lag behind the newest before it counts as silent instead of late."""
_CONSTANT = 1e-6  # relative to the mean: below, a feature's fluctuation is float32 rounding


@dataclass(frozen=True, slots=True)
class Pooled:
    """A quantity of ranks, and its sum over them (nearly always all ranks are there, and the sum is at hand)."""

    each_TKF: Floats
    all_TF: Floats

    @classmethod
    def of(cls, each_TKF: Floats) -> Pooled:
        return cls(each_TKF, each_TKF.sum(1))

    def over(self, begin: int, end: int, ranks_K: Bools) -> Floats:
        """(rows, F) sum over some ranks."""
        return self.all_TF[begin:end] if ranks_K.all() else self.each_TKF[begin:end, ranks_K].sum(1)


@dataclass(frozen=True, slots=True)
class Stream:
    """The probe's rows that can be judged, and successive differences of its means.

    Attributes:
        steps_T: recorded steps up to the newest that every rank still sending has reached.
        samples: median batch size of a rank.
        good_TK: whether the row is there, finite, and of two samples or more.
        mean_TKF: mean of each feature over the batch, 0 where not good.
        noise: s²_y / N, the variance of that mean for i.i.d. batches; 0 where not good or constant.
        neighbour: the same from neighbouring samples; equal on average where the order within a batch is random.
        fast: (mean_t - mean_t-1)² / 2, 0 where unseen.
        pair_noise: (noise_t + noise_t-1) / 2, what i.i.d. batches would give on average; 0 where unseen.
        seen_TK: whether both rows of the difference are there.
        silent: ranks that have stopped (or never begun) sending the probe.
        spoiled_first: rank -> first step with non-finite probe values; such rows are left out.
        spoiled_rows: how many such rows.
    """

    steps_T: Ints
    samples: int
    good_TK: Bools
    mean_TKF: Floats
    noise: Pooled
    neighbour: Pooled
    fast: Pooled
    pair_noise: Pooled
    seen_TK: Bools
    silent: tuple[int, ...]
    spoiled_first: dict[int, int]
    spoiled_rows: int

    @property
    def spoiled(self) -> tuple[int, ...]:
        return tuple(self.spoiled_first)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows over which a lane saw the fault: row of its beginning, of the first and of the last alarm."""

    begin: int
    first: int
    last: int
    e_value: float | None


def stream(probe: ProbeRows, world_size: int) -> Stream:
    """Differences of the probe rows; rows that are missing, of one sample, or not finite are left out."""
    arrived_TK = np.isfinite(probe.samples_TK)
    finite_TK = np.isfinite(probe.mean_TKF).all(2) & np.isfinite(probe.var_TKF).all(2)
    single_TK = arrived_TK & (probe.samples_TK < 2)
    spoiled_TK = arrived_TK & ~single_TK & ~finite_TK
    good_TK = arrived_TK & ~single_TK & finite_TK

    n_rows, n_ranks = arrived_TK.shape
    newest_K = (
        np.where(arrived_TK.any(0), n_rows - 1 - arrived_TK[::-1].argmax(0), -1) if n_rows else np.full(n_ranks, -1)
    )
    alive_K = newest_K >= max(n_rows - 1 - SILENT_ROWS, 0)
    end = int(newest_K[alive_K].min()) + 1 if alive_K.any() else 0
    silent = tuple(int(k) for k in np.flatnonzero(~alive_K)) + tuple(range(n_ranks, world_size))

    steps_T, good_TK = probe.steps_T[:end], good_TK[:end]
    samples_TK = np.where(good_TK, probe.samples_TK[:end], 1.0)
    mean_TKF = np.where(good_TK[..., None], probe.mean_TKF[:end], 0.0)
    noise_TKF = np.where(good_TK[..., None], probe.var_TKF[:end], 0.0) / samples_TK[..., None]
    neighbour_TKF = np.where(good_TK[..., None], probe.adjacency_TKF[:end], 0.0) / samples_TK[..., None]
    seen_TK = np.zeros_like(good_TK)
    if end > 1:
        near_T = np.diff(steps_T) <= 2 * spacing(steps_T)
        seen_TK[1:] = good_TK[1:] & good_TK[:-1] & near_T[:, None]
    fast_TKF = np.zeros_like(mean_TKF)
    fast_TKF[1:] = (mean_TKF[1:] - mean_TKF[:-1]) ** 2 / 2
    pair_TKF = np.zeros_like(noise_TKF)
    pair_TKF[1:] = (noise_TKF[1:] + noise_TKF[:-1]) / 2

    # A feature that is constant inside batches and moves between them has no noise; the floor keeps F finite there.
    typical_KF = fast_TKF.sum(0, where=seen_TK[..., None]) / np.maximum(seen_TK.sum(0), 1)[:, None]
    pair_TKF = np.maximum(pair_TKF, 1e-6 * typical_KF)
    size_KF = (mean_TKF**2).max(0) if end else np.zeros(mean_TKF.shape[1:])
    moves_KF = (fast_TKF + pair_TKF).max(0, initial=0.0) > _CONSTANT**2 * size_KF
    keep_TKF = seen_TK[..., None] & moves_KF
    return Stream(
        steps_T=steps_T,
        samples=int(np.median(samples_TK[good_TK])) if good_TK.any() else 0,
        good_TK=good_TK,
        mean_TKF=mean_TKF,
        noise=Pooled.of(np.where(moves_KF, noise_TKF, 0.0)),
        neighbour=Pooled.of(np.where(moves_KF, neighbour_TKF, 0.0)),
        fast=Pooled.of(np.where(keep_TKF, fast_TKF, 0.0)),
        pair_noise=Pooled.of(np.where(keep_TKF, pair_TKF, 0.0)),
        seen_TK=seen_TK,
        silent=silent,
        spoiled_first={
            int(k): int(probe.steps_T[spoiled_TK[:, k].argmax()]) for k in np.flatnonzero(spoiled_TK.any(0))
        },
        spoiled_rows=int(spoiled_TK.sum()),
    )


def cluster_ratio(stream: Stream, begin: int, end: int, *, max_gap_share: float = MAX_GAP_SHARE) -> Ratio | None:
    """F over rows begin..end-1: fast variance between batch means over the sampling noise of independent batches.

    F = sum_f B_f / V_f over sum_f (s²_y / N)_f / V_f with B from first differences (drift does not matter) and V the
    window's mean noise of the feature. 1 for i.i.d. batches, also without replacement. Ranks with more than
    `max_gap_share` of the rows missing are left out.
    """
    seen_TK = stream.seen_TK[begin:end]
    full_K = full_ranks(seen_TK, max_gap_share=max_gap_share)
    if not full_K.any():
        return None
    seen_T = np.asarray(seen_TK[:, full_K].any(1), np.bool_)
    fast_TF = stream.fast.over(begin, end, full_K)
    noise_TF = stream.pair_noise.over(begin, end, full_K)
    weight_F = inverse(noise_TF.sum(0))
    return ratio_of_means(fast_TF @ weight_F, noise_TF @ weight_F, seen_T, order=1)


def effective_samples(samples: int, ratio: float) -> float:
    """Independent samples that say as much about the mean as the batch: 1 + (N - 1) / F."""
    return 1 + (samples - 1) / ratio if ratio > 1 else float(samples)


def inverse(noise: Floats) -> Floats:
    """1 / noise, and 0 for a feature without noise (constant, or unseen): it carries nothing."""
    return np.divide(1.0, noise, out=np.zeros_like(noise), where=noise > 0)


def full_ranks(good_TK: Bools, *, max_gap_share: float = MAX_GAP_SHARE) -> Bools:
    """(K,) which ranks have all but `max_gap_share` of these rows."""
    return np.asarray(good_TK.sum(0) >= (1 - max_gap_share) * len(good_TK), np.bool_)


def slow_lane(stream: Stream) -> tuple[Span | None, bool]:
    """Two windows in a row with F over its threshold and z >= 4, at 100 and at 400 rows.

    Returns:
        The span seen, if any, and whether two windows in a row could be judged at all.
    """
    span: Span | None = None
    judged = False
    for width, threshold in WINDOWS:
        rows = look_rows(stream.steps_T, max(LOOK_ROWS, width // 4))
        looks = [
            cluster_ratio(stream, max(0, row + 1 - width), row + 1) if row + 1 >= 0.95 * width else None for row in rows
        ]
        looks = [f if f is not None and f.steps >= 0.9 * width else None for f in looks]
        judged |= bool(twice_in_a_row([f is not None for f in looks]))
        fired = twice_in_a_row([f is not None and f.value >= threshold and f.z >= Z_ALARM for f in looks])
        if fired:
            begin = max(0, rows[fired[0] - 1] + 1 - width)
            span = _union(span, Span(begin, rows[fired[0]], rows[fired[-1]], None))
    return span, judged


def fast_lane(stream: Stream) -> Span | None:
    """Shiryaev-Roberts e-detector over disjoint blocks of two steps.

    u = (g - 1.05 h) / (g + 1.05 h) in [-1, 1], with feature weights from past blocks only, has mean <= 0 for i.i.d.
    batches: g has fewer degrees of freedom than h. R <- (R + 1)(1 + bet u), averaged over three bets, then crosses A
    by mistake once in A blocks or later on average.
    """
    if len(stream.steps_T) < 2:
        return None
    pair_T = stream.steps_T // (2 * spacing(stream.steps_T))
    same_T = np.append(False, pair_T[1:] == pair_T[:-1])
    blocks_B = np.flatnonzero(same_T & stream.seen_TK.any(1))
    if len(blocks_B) <= E_WARMUP_BLOCKS:
        return None
    fast_BF = stream.fast.all_TF[blocks_B]
    noise_BF = stream.pair_noise.all_TF[blocks_B]
    past_BF = np.cumsum(noise_BF, 0) - noise_BF
    weight_BF = inverse(past_BF)
    g_B = (fast_BF * weight_BF).sum(1)
    h_B = E_MARGIN * (noise_BF * weight_BF).sum(1)
    u_B = np.divide(g_B - h_B, g_B + h_B, out=np.zeros_like(g_B), where=g_B + h_B > 0)
    u_B[:E_WARMUP_BLOCKS] = 0.0

    alarms: list[tuple[int, int]] = []  # blocks: estimated beginning, alarm
    best = 0.0
    evidence = [0.0] * len(E_BETS)
    walk = lowest = 0.0
    lowest_at = 0
    for b, u in enumerate(u_B.tolist()):
        evidence = [(r + 1) * (1 + bet * u) for r, bet in zip(evidence, E_BETS, strict=True)]
        walk += math.log1p(0.6 * u)
        if walk < lowest:
            lowest, lowest_at = walk, b + 1
        e_value = sum(evidence) / len(evidence)
        if e_value >= E_ALARM:
            alarms.append((lowest_at, b))
            best = max(best, e_value)
            evidence, walk, lowest, lowest_at = [0.0] * len(E_BETS), 0.0, 0.0, b + 1
    if not alarms:
        return None
    begin = int(blocks_B[min(alarms[0][0], alarms[0][1])]) - 1
    return Span(begin, int(blocks_B[alarms[0][1]]), int(blocks_B[alarms[-1][1]]), best)


def _union(sharp: Span | None, wide: Span | None) -> Span | None:
    """One span from a sharp and a wide lane; the wide one begins early and fires until its window is past the fault."""
    if sharp is None or wide is None:
        return sharp or wide
    still = wide.last - WINDOWS[-1][0] >= sharp.last
    e_values = [s.e_value for s in (sharp, wide) if s.e_value is not None]
    return Span(
        begin=max(sharp.begin, wide.begin),
        first=min(sharp.first, wide.first),
        last=wide.last if still else sharp.last,
        e_value=max(e_values, default=None),
    )


def cluster(window: Window, stream: Stream, loss_gap: float | None) -> Outcome:
    """NH-CLUSTER: do the batches carry as much information as their size says?

    Args:
        window: the run.
        stream: its probe.
        loss_gap: mean shadow loss gap where it was measured and is harm.
    """
    withheld = _withheld(window, stream)
    slow, judged = slow_lane(stream)
    span = _union(fast_lane(stream), slow)
    if span is None:
        if not judged:
            return Outcome(abstained=withheld or (_too_short(stream),))
        newest = cluster_ratio(stream, max(0, len(stream.steps_T) - 400), len(stream.steps_T), max_gap_share=0.5)
        clear = (
            None
            if newest is None
            else (
                f"batches vary as independent samples do (F = {newest.value:.2f}, "
                f"{newest.low:.2f} to {newest.high:.2f}, over {newest.steps} steps)"
            )
        )
        return Outcome(abstained=withheld, clear=clear)

    begin = max(0, min(span.begin, span.last + 1 - MIN_STEPS - 1))
    ratio = cluster_ratio(stream, begin, span.last + 1, max_gap_share=0.5)
    if ratio is None:  # the detector saw steps that are too few and too scattered for an estimate
        return Outcome(abstained=(*withheld, _too_short(stream)))
    return Outcome((_cluster_finding(window, stream, span, ratio, loss_gap),), withheld)


def _cluster_finding(window: Window, stream: Stream, span: Span, ratio: Ratio, loss_gap: float | None) -> Finding:
    m_eff = effective_samples(stream.samples, ratio.value)
    starved = m_eff < CRITICAL_SAMPLES and stream.samples >= CRITICAL_BATCH
    steps = int(stream.steps_T[span.first]), int(stream.steps_T[span.last])
    ended = len(stream.steps_T) - 1 - span.last > 2 * WINDOWS[0][0]
    return Finding(
        code="NH-CLUSTER",
        severity="critical" if starved or loss_gap is not None else "warning",
        summary=(
            f"Batches are not independent samples: their means vary {ratio.value:.3g} times as much as random batches' "
            f"would (95 % CI {ratio.low:.3g} to {ratio.high:.3g}), so a batch of {stream.samples} carries the "
            f"information of {m_eff:.1f}." + (f" Not seen since step {steps[1]}." if ended else "")
        ),
        evidence=Evidence(
            statistic="F, fast variance between batch means over their sampling noise (input probe)",
            value=ratio.value,
            low=ratio.low,
            high=ratio.high,
            threshold=WINDOWS[0][1],
            z=ratio.z,
            e_value=span.e_value,
            steps_used=ratio.steps,
            query=query(
                window.run,
                "series",
                stat=("mean_diff1", "mean_noise"),
                layer=window.layers[0].index if window.layers else None,
            ),
        ),
        remedy=_cluster_remedy(window, stream.samples),
        steps=steps,
    )


def _cluster_remedy(window: Window, samples: int) -> Remedy:
    sampler = window.config.get("sampler")
    said = f" (this run says sampler = {sampler!r})" if isinstance(sampler, str) else ""
    text = (
        "Give every batch a random draw of all the data: shuffle, "
        f"and check the sampler{said} and augmentation that is drawn once a batch."
    )
    if any(layer.kind != "BatchRenorm" for layer in window.layers):
        text += (
            " Where the batch must stay as it is, convert the model: `model = convert_batchnorm(model)` (Batch Renorm)."
        )
    else:
        text += " Batch Renorm, already in use, recovers part of the loss, not all of it."
    if window.world_size > 1:
        code = f"DataLoader(dataset, batch_size={samples}, sampler=DistributedSampler(dataset, shuffle=True))"
    else:
        code = f"DataLoader(dataset, batch_size={samples}, shuffle=True)"
    return Remedy(text=text, code=code)


def _too_short(stream: Stream) -> Abstention:
    have = int(stream.seen_TK.any(1).sum()) + 1
    step = spacing(stream.steps_T)
    return Abstention(
        "NH-CLUSTER",
        f"it has {count(have, 'recorded step')} of the input probe in a row and needs {FIRST_ANSWER_ROWS}",
        more_steps=max(1, FIRST_ANSWER_ROWS - have) * step,
    )


def _withheld(window: Window, stream: Stream) -> tuple[Abstention, ...]:
    probe = window.probe
    if not np.isfinite(probe.samples_TK).any():
        if not len(window.rows.steps_T) and not len(probe.steps_T):
            return ()
        return (
            Abstention(
                "NH-CLUSTER",
                "no rows of the input probe arrived, and deep layers can not accuse the data",
                advice="Watch the whole model, so that its first input is seen.",
            ),
        )
    reasons: list[Abstention] = []
    if stream.samples == 0 and not stream.spoiled:
        reasons.append(
            Abstention(
                "NH-CLUSTER",
                "batches of one sample have no variance within, so F is undefined",
                advice="Use two samples a rank or more, or a normalization that does not look across the batch.",
            )
        )
    elif (
        stream.samples > 0
        and not stream.pair_noise.all_TF.any()
        and not stream.fast.all_TF.any()
        and stream.seen_TK.sum() >= MIN_STEPS
    ):
        reasons.append(Abstention("NH-CLUSTER", "every probe feature is constant: the input does not vary"))
    if stream.spoiled:
        reasons.append(
            Abstention(
                "NH-CLUSTER",
                f"{count(stream.spoiled_rows, 'row')} of the input probe on {names(stream.spoiled)} "
                "held NaN or infinite values and did not count",
                advice="Check the input: `assert torch.isfinite(x).all()`.",
                ranks=stream.spoiled,
                partial=True,
            )
        )
    if stream.silent and stream.samples > 0:
        reasons.append(
            Abstention(
                "NH-CLUSTER",
                f"{names(stream.silent)} sent no input probe in the newest {SILENT_ROWS} recorded steps; "
                "the other ranks alone were judged",
                advice="Check that every rank makes a Recorder with the same run id.",
                ranks=stream.silent,
                partial=True,
            )
        )
    return tuple(reasons)
