"""Batches against independent draws, from the input probe: do they vary more (NH-CLUSTER)?

Two lanes: an e-detector that is quick on strong faults, and two wide windows in a row that are patient with weak ones.
Shape suffixes: T recorded steps, B blocks of two steps, K ranks, F probe features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS, Ratio, look_rows, spacing, twice_in_a_row
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.outcome import Abstention, Outcome, count, names, query
from service.diagnosis.stream import SILENT_ROWS, Stream, cluster_ratio, effective_samples, inverse
from service.diagnosis.window import Window

WINDOWS = ((100, 1.2), (400, 1.15))
"""Rows of a window, and the F from which it speaks."""
STRATIFIED_WINDOWS = ((100, 0.8), (400, 0.87))
"""The same for batches more alike than random ones: about 1 / F."""
Z_ALARM = 4.0
E_ALARM = 1e4
"""Evidence at which the e-detector speaks: mean time to a false alarm of at least as many blocks of two steps."""
E_MARGIN = 1.05
E_BETS = (0.05, 0.15, 0.4, 0.8)
E_BET_SEEN = 0.4
"""The bet whose winnings date the beginning."""
E_CURB = (0.125, 2.0)
"""k, what curbs the winnings of a pair: at least the first, and the second over the batch size."""
CRITICAL_SAMPLES = 5.0
CRITICAL_BATCH = 8
FIRST_ANSWER_ROWS = WINDOWS[0][0] + LOOK_ROWS


@dataclass(frozen=True, slots=True)
class Span:
    """Rows over which a lane saw the fault: row of its beginning, of the first and of the last alarm."""

    begin: int
    first: int
    last: int
    e_value: float | None


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

    v = (g - 1.05 h) / (k g + 1.05 h), from -1 to 1 / k, with feature weights from past blocks only, has mean <= 0 for
    i.i.d. batches. R <- (R + 1)(1 + bet v), averaged over four bets, then crosses A by mistake once in A blocks or
    later on average.

    Why <= 0: let g and h have mean 1 and, as chi-squared variables over their degrees of freedom do, variances 2 / a
    and 2 / b. To second order E v = 2 (1 / b - k / a) / (1 + k)², without the margin of 1.05, so k >= a / b will do,
    and normal samples have a / b = 1 / 2 (N - 1): one difference of means against 2 (N - 1) within. Heavier tails make
    h less sure, hence k = 2 / N, four times as much, at least 1 / 8 and at most 1. The smaller k, the more a pair wins.
    """
    if len(stream.steps_T) < 2:
        return None
    pair_T = stream.steps_T // (2 * spacing(stream.steps_T))
    same_T = np.append(False, pair_T[1:] == pair_T[:-1])
    blocks_B = np.flatnonzero(same_T & stream.seen_TK.any(1) & stream.new_T)
    if len(blocks_B) < 2:
        return None
    fast_BF = stream.fast.all_TF[blocks_B]
    noise_BF = stream.pair_noise.all_TF[blocks_B]
    past_BF = np.cumsum(noise_BF, 0) - noise_BF
    weight_BF = inverse(past_BF)
    g_B = (fast_BF * weight_BF).sum(1)
    h_B = E_MARGIN * (noise_BF * weight_BF).sum(1)
    curb = min(1.0, max(E_CURB[0], E_CURB[1] / stream.samples))
    v_B = np.divide(g_B - h_B, curb * g_B + h_B, out=np.zeros_like(g_B), where=g_B + h_B > 0)

    alarms: list[tuple[int, int]] = []  # blocks: estimated beginning, alarm
    best = 0.0
    evidence = [0.0] * len(E_BETS)
    walk = lowest = 0.0
    lowest_at = 0
    for b, v in enumerate(v_B.tolist()):
        evidence = [(r + 1) * (1 + bet * v) for r, bet in zip(evidence, E_BETS, strict=True)]
        walk += math.log1p(E_BET_SEEN * v)
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
            return Outcome(abstained=withheld or (_repeating(stream) or _too_short(stream),))
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
    ends = (max(span.last, begin + MIN_STEPS) + 1, len(stream.steps_T))  # the detector may need fewer than an estimate
    ratios = (cluster_ratio(stream, begin, end, max_gap_share=0.5) for end in ends if end <= len(stream.steps_T))
    ratio = next((ratio for ratio in ratios if ratio is not None), None)
    if ratio is None:
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
        evidence=_evidence(window, ratio, WINDOWS[0][1], span.e_value),
        remedy=_cluster_remedy(window, stream.samples),
        steps=steps,
    )


def _evidence(window: Window, ratio: Ratio, threshold: float, e_value: float | None = None) -> Evidence:
    return Evidence(
        statistic="F, fast variance between batch means over their sampling noise (input probe)",
        value=ratio.value,
        low=ratio.low,
        high=ratio.high,
        threshold=threshold,
        z=ratio.z if math.isfinite(ratio.z) else None,
        e_value=e_value,
        steps_used=ratio.steps,
        query=query(window.run, "probe", points=200),
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


def stratified(window: Window, stream: Stream) -> Outcome:
    """NH-STRATIFIED: do batches resemble each other more than random ones would?"""
    found: list[tuple[int, int, Ratio]] = []
    for width, threshold in STRATIFIED_WINDOWS:
        rows = [r for r in look_rows(stream.steps_T, max(LOOK_ROWS, width // 4)) if r + 1 >= 0.95 * width]
        looks = [cluster_ratio(stream, max(0, row + 1 - width), row + 1) for row in rows]
        fired = twice_in_a_row([f is not None and f.value <= threshold and f.z <= -Z_ALARM for f in looks])
        if fired and (newest := looks[fired[-1]]) is not None:
            found.append((rows[fired[0]], rows[fired[-1]], newest))
    if not found:
        return Outcome()
    ratio = found[-1][2]
    finding = Finding(
        code="NH-STRATIFIED",
        severity="info",
        summary=(
            f"Batches resemble each other more than random ones would: their means vary {ratio.value:.2g} times as "
            f"much (95 % CI {ratio.low:.2g} to {ratio.high:.2g}), as with a fixed mix of labels or a large part of "
            "the data in each."
        ),
        evidence=_evidence(window, ratio, STRATIFIED_WINDOWS[0][1]),
        remedy=Remedy(
            text="Nothing to mend: moving statistics profit. Where batches at inference have another mix, theirs "
            "differ from these."
        ),
        steps=(int(stream.steps_T[min(f[0] for f in found)]), int(stream.steps_T[max(f[1] for f in found)])),
    )
    return Outcome((finding,))


def _repeating(stream: Stream) -> Abstention | None:
    """Why a stream that is long enough still says nothing: its few batches come again and again."""
    rows = len(stream.steps_T)
    distinct = stream.distinct(0, rows)
    if rows < FIRST_ANSWER_ROWS or distinct >= MIN_STEPS:
        return None
    return Abstention(
        "NH-CLUSTER",
        f"only {count(distinct, 'different batch').replace('batchs', 'batches')} came in {rows} recorded steps, "
        f"and fewer than {MIN_STEPS} do not show how batches vary",
        advice="Draw new batches every epoch (`shuffle=True`; with ranks `sampler.set_epoch(epoch)`).",
    )


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
