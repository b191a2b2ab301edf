"""Exact checks: channels without variance (NH-DEAD), ranks without rows (NH-MISSING), moving statistics that ranks do
not share (NH-BUFFERS), batches of unequal size (NH-UNEVEN).

Shape suffixes: T recorded steps, K ranks, L layers, J looks.
"""

from __future__ import annotations

import math

import numpy as np

from brn_core.wire import SCALAR_STEP_TIME
from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS, look_rows, spacing
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.looks import lasting, looks, of_layers, together, too_young, warm, worst_first
from service.diagnosis.outcome import Outcome, names, query
from service.diagnosis.ranks import SKEW_WARNING
from service.diagnosis.stream import SILENT_ROWS
from service.diagnosis.window import Floats, Ints, Window

DEAD_ROWS = 0.95
"""Share of rows in which a layer must have dead channels."""
DEAD_WARNING = 0.1
"""Share of a layer's channels from which dead ones are a warning."""
SILENT_SECONDS = 30.0
"""A rank is silent once it is behind by `SILENT_ROWS` and, as far as step times are known, this many seconds."""
LOST_SHARE = 0.05
SLOW_RATIO = 1.5
"""A rank is slow when its steps take so many times those of the rank in the middle."""
UNEVEN_SHARE = 0.1
UNEVEN_TINY = 4
"""Samples below which a small batch among larger ones is a warning."""
_SAME = 1e-2  # of the effect looked for: float32 rounding of the stored means stays far below


def dead(window: Window) -> Outcome:
    """NH-DEAD: which channels have no variance left?"""
    if (young := too_young(window, "NH-DEAD")) is not None:
        return Outcome(abstained=(young,))
    rows = window.rows
    dead_TKL = rows.columns["dead_channels"]
    columns = {"count": dead_TKL, "rows": np.where(np.isfinite(dead_TKL), dead_TKL >= 1, np.nan)}
    seen = looks(rows, columns, warm(window))
    held = lasting(seen.steps_J, seen.mean["rows"] >= DEAD_ROWS)
    if held is None:
        return Outcome()
    channels_L = np.array([layer.channels for layer in window.layers])
    share_L = seen.mean["count"][-1] / channels_L
    worst = worst_first(share_L, held.layers_L)
    i = worst[0]
    layer, share = window.layers[i], float(share_L[i])
    finding = Finding(
        code="NH-DEAD",
        severity="critical" if share > 0.99 else "warning" if share >= DEAD_WARNING else "info",
        summary=(
            f"{seen.mean['count'][-1][i]:.0f} of {layer.channels} channels of layer {layer.name} have no variance "
            f"(below 100 eps = {100 * layer.eps:.2g}): what they pass on is rounding or a constant"
            f"{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="channels whose batch variance is below 100 eps, share of the layer",
            value=share,
            threshold=DEAD_WARNING,
            steps_used=LOOK_ROWS,
            query=query(window.run, "heatmap", stat="dead_channels"),
        ),
        remedy=Remedy(
            text="Find what feeds them: weights at zero, activations that never fire, or a constant input. Where the "
            "scale is small by design, lower eps.",
            code=f"layer.eps = {layer.eps / 100:.2g}",
        ),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def missing(window: Window) -> Outcome:
    """NH-MISSING: does a rank send nothing, or only a part of its rows, or is it slower than the others?"""
    found = _absent(window)
    return found if found.findings else _slow(window)


def _absent(window: Window) -> Outcome:
    """Ranks that sent nothing lately, else those that lost rows."""
    steps_T, have_TK = _arrivals(window)
    if window.world_size < 2 or len(steps_T) <= SILENT_ROWS:
        return Outcome()
    have_TK = np.pad(have_TK, ((0, 0), (0, max(0, window.world_size - have_TK.shape[1]))))
    newest_K = np.where(have_TK.any(0), len(steps_T) - 1 - have_TK[::-1].argmax(0), -1)
    behind_K = len(steps_T) - 1 - newest_K
    silent = tuple(int(k) for k in np.flatnonzero(behind_K > _patience(window, steps_T)))
    if silent:
        k = silent[0]
        since = int(steps_T[newest_K[k]]) if newest_K[k] >= 0 else None
        told = (
            f"nothing since step {since}" if since is not None else f"nothing since step {int(steps_T[0])} or earlier"
        )
        return Outcome((_missing_finding(window, silent, f"sent {told}", 1.0, steps_T, since or int(steps_T[0])),))
    begin_K = have_TK.argmax(0)
    lost_K = np.array(
        [1 - have_TK[begin_K[k] : newest_K[k] + 1, k].mean() if newest_K[k] >= 0 else 0.0 for k in range(len(newest_K))]
    )
    lossy = tuple(int(k) for k in np.flatnonzero(lost_K > LOST_SHARE))
    if not lossy:
        return Outcome()
    share = float(lost_K.max())
    first = int(steps_T[min(int((~have_TK[begin_K[k] :, k]).argmax()) + begin_K[k] for k in lossy)])
    return Outcome((_missing_finding(window, lossy, f"lost up to {share:.0%} of their rows", share, steps_T, first),))


def _slow(window: Window) -> Outcome:
    """Ranks whose steps take longer than those of the rank in the middle, of two ranks the faster.

    Ranks that wait for each other in every step all measure the slowest one's time: then none is found.
    """
    times = window.step_times
    if times is None or times.seconds_TK.shape[1] < 2:
        return Outcome()
    ends = [row + 1 for row in look_rows(times.steps_T) if row + 1 >= LOOK_ROWS]
    if len(ends) < 2:
        return Outcome()
    typical_JK = np.array([_typical(times.seconds_TK[end - LOOK_ROWS : end]) for end in ends])
    with np.errstate(invalid="ignore"):
        ratio_JK = typical_JK / _middle(typical_JK)[:, None]
    held = lasting(times.steps_T[np.array(ends, np.int64) - 1], ratio_JK >= SLOW_RATIO)
    if held is None:
        return Outcome()
    slow = tuple(int(k) for k in np.flatnonzero(held.layers_L))
    worst = max(slow, key=lambda k: float(ratio_JK[-1, k]))
    own, ratio = float(typical_JK[-1, worst]), float(ratio_JK[-1, worst])
    finding = Finding(
        code="NH-MISSING",
        severity="warning",
        summary=(
            f"{names(slow).capitalize()} {'takes' if len(slow) == 1 else 'take up to'} {ratio:.2g} times as long for a "
            f"step as the rank in the middle ({1000 * own:.3g} against {1000 * own / ratio:.3g} ms): they drift "
            "apart, or the others wait."
        ),
        evidence=Evidence(
            statistic="median step time over that of the rank in the middle",
            value=ratio,
            threshold=SLOW_RATIO,
            steps_used=LOOK_ROWS,
            query=query(window.run, "scalars", name=SCALAR_STEP_TIME, rank=worst),
        ),
        remedy=Remedy(
            text="Look at that rank's data loading, its device's clock and temperature, and what else its host does.",
            code="nvidia-smi --query-gpu=index,clocks.sm,temperature.gpu,utilization.gpu --format=csv",
        ),
        ranks=slow,
        steps=held.steps,
    )
    return Outcome((finding,))


def _typical(seconds_WK: Floats) -> Floats:
    """(K,) median step time, which an evaluation or a checkpoint now and then does not move; NaN where too few came."""
    enough_K = np.isfinite(seconds_WK).sum(0) >= MIN_STEPS
    typical_K = np.full(seconds_WK.shape[1], np.nan)
    typical_K[enough_K] = np.nanmedian(seconds_WK[:, enough_K], axis=0)
    return typical_K


def _middle(typical_JK: Floats) -> Floats:
    """(J,) the middle rank's step time, the lower of two; NaN with fewer than two ranks."""
    known_J = np.isfinite(typical_JK).sum(1)
    middle_J = np.sort(typical_JK, axis=1)[np.arange(len(typical_JK)), np.maximum(known_J - 1, 0) // 2]
    return np.where(known_J >= 2, middle_J, np.nan)


def _arrivals(window: Window) -> tuple[Ints, np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
    """Recorded steps, and which ranks have a row of probe or layers there; of the table that reaches further back."""
    probe, rows = window.probe, window.rows
    if len(probe.steps_T) >= len(rows.steps_T):
        return probe.steps_T, np.asarray(np.isfinite(probe.samples_TK), np.bool_)
    return rows.steps_T, np.asarray(np.isfinite(rows.columns["samples"]).any(2), np.bool_)


def _patience(window: Window, steps_T: Ints) -> int:
    """Rows a rank may be behind: its batches travel on their own and may be seconds late, a finished run's may not."""
    if window.status != "running":
        return SILENT_ROWS
    times = window.scalars.get(SCALAR_STEP_TIME)
    if times is None or not np.isfinite(times.values_T).any():
        return SILENT_ROWS
    row_seconds = float(np.nanmedian(times.values_T)) * spacing(steps_T)
    return max(SILENT_ROWS, math.ceil(SILENT_SECONDS / max(row_seconds, 1e-6)))


def _missing_finding(
    window: Window, ranks: tuple[int, ...], what: str, share: float, steps_T: Ints, since: int
) -> Finding:
    return Finding(
        code="NH-MISSING",
        severity="warning",
        summary=f"{names(ranks).capitalize()} {what}, while others reached step {int(steps_T[-1])}: "
        "nothing is known of their part of the batch.",
        evidence=Evidence(
            statistic="share of a rank's rows that are missing",
            value=share,
            threshold=LOST_SHARE,
            steps_used=len(steps_T),
            query=query(window.run, "series", stat="samples", rank=ranks[0], from_=since),
        ),
        remedy=Remedy(
            text="Look whether the process lives and reaches the service; what it could not send waits in its spool.",
            code="python -m brn_core.spool .brn/spool --url URL",
        ),
        ranks=ranks,
        steps=(since, int(steps_T[-1])),
    )


def buffers(window: Window, shared: str | None, rank_effect: float | None) -> Outcome:
    """NH-BUFFERS: do moving statistics know what all ranks saw, or one?

    The moving mean's own step, mu' = mu + alpha (mu_B - mu), is linear, so its mean over channels tells whose mu_B was
    taken: the rank's own, rank 0's (DistributedDataParallel copies its buffers before each forward), or the mean.

    Args:
        window: the run.
        shared: what `shared_by` says.
        rank_effect: R of the probe, where known: with skewed ranks it matters whose statistics are kept.
    """
    if shared is None or shared == "all":
        return Outcome()
    skewed = rank_effect is not None and rank_effect >= SKEW_WARNING
    said = (
        "Every rank keeps moving statistics of its own, and a checkpoint holds those of one rank"
        if shared == "own"
        else "All ranks use the moving statistics of rank 0, copied to them before each step"
    )
    first = window.layers[0]
    batch_norm = any(layer.kind != "BatchRenorm" for layer in window.layers)
    finding = Finding(
        code="NH-BUFFERS",
        severity="warning" if skewed else "info",
        summary=f"{said}: what the other {window.world_size - 1} ranks saw is lost to inference"
        + (f", and the ranks differ (R = {rank_effect:.2g})." if skewed else "; ranks alike, it only adds noise."),
        evidence=Evidence(
            statistic="ranks whose batches reach the moving statistics that are kept",
            value=1.0,
            threshold=float(window.world_size),
            steps_used=len(window.rows.steps_T),
            query=query(window.run, "series", stat=("mu", "mu_b"), layer=first.index, rank=0),
        ),
        remedy=Remedy(
            text="Average the moving statistics over ranks, each step or before every evaluation and checkpoint.",
            code=(
                "for b in (b for b in model.buffers() if b.is_floating_point()): dist.all_reduce(b, dist.ReduceOp.AVG)"
                if batch_norm
                else "average_statistics(model)"
            ),
        ),
        layers=tuple(layer.name for layer in window.layers),
        steps=(int(window.rows.steps_T[0]), int(window.rows.steps_T[-1])),
    )
    return Outcome((finding,))


def shared_by(window: Window) -> str | None:
    """`own`, `rank 0` or `all`; None where it does not show: one rank, gaps between steps, or layers in step."""
    rows = window.rows
    if window.world_size < 2 or not window.layers or rows.columns["mu"].shape[1] < 2:
        return None
    own_L = together(window) == 1
    alpha_L = np.array([layer.momentum or math.nan for layer in window.layers])
    mu_TKL, batch_TKL = rows.columns["mu"], rows.columns["mu_b"]
    sigma_TL = rows.columns["sigma"].mean(1)
    step_TL = (mu_TKL[1:] - mu_TKL[:-1]).mean(1) + alpha_L * mu_TKL[:-1].mean(1)  # alpha times the mu_B taken
    apart_TL = np.abs(mu_TKL - mu_TKL[:, :1]).max(1) / sigma_TL
    if _known(apart_TL[:, own_L]) >= MIN_STEPS and np.nanmedian(apart_TL[:, own_L]) > 1e-4:
        return "own"
    good_TL = (np.diff(rows.steps_T) == 1)[:, None] & np.isfinite(step_TL) & own_L
    if good_TL.any(1).sum() < MIN_STEPS:
        return None
    # by how much a step would differ if rank 0 alone were taken, and by how much it did
    differ_TL = alpha_L * (batch_TKL[:-1, 0] - batch_TKL[:-1].mean(1))
    by_first_TL = step_TL - alpha_L * batch_TKL[:-1, 0]
    by_all_TL = step_TL - alpha_L * batch_TKL[:-1].mean(1)
    scale = _rms(differ_TL[good_TL])
    if _rms(by_first_TL[good_TL]) < _SAME * scale:
        return "rank 0"
    return "all" if _rms(by_all_TL[good_TL]) < _SAME * scale else None


def _known(values_TL: Floats) -> int:
    return int(np.isfinite(values_TL).any(1).sum())


def _rms(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.sqrt((finite**2).mean())) if len(finite) else math.inf


def uneven(window: Window) -> Outcome:
    """NH-UNEVEN: are some batches smaller than the others, over ranks or over steps?"""
    samples_TK = window.probe.samples_TK
    steps_T = window.probe.steps_T
    if not len(steps_T) and len(window.layers):
        samples_TK, steps_T = window.rows.columns["samples"][:, :, 0], window.rows.steps_T
    seen_TK = np.isfinite(samples_TK)
    if seen_TK.any(1).sum() < MIN_STEPS:
        return Outcome()
    usual = float(np.median(samples_TK[seen_TK]))
    complete_T = seen_TK.all(1)
    if samples_TK.shape[1] > 1 and complete_T.sum() >= MIN_STEPS:
        spread_T = samples_TK[complete_T].max(1) - samples_TK[complete_T].min(1)
        if np.median(spread_T) > UNEVEN_SHARE * usual:
            return Outcome((_uneven_ranks(window, samples_TK[complete_T], steps_T[complete_T]),))
    small_T = np.where(seen_TK, samples_TK, math.inf).min(1) < usual / 2
    if small_T.sum() < 2:  # one is an end of the data, not a habit
        return Outcome()
    least = int(np.where(seen_TK, samples_TK, math.inf).min())
    tiny = least < UNEVEN_TINY
    finding = Finding(
        code="NH-UNEVEN",
        severity="warning" if tiny else "info",
        summary=(
            f"{int(small_T.sum())} of {len(steps_T)} recorded batches hold less than half of the usual {usual:.0f} "
            f"samples, down to {least}: their statistics enter the moving ones with the same weight."
        ),
        evidence=Evidence(
            statistic="smallest batch, in samples",
            value=float(least),
            threshold=float(UNEVEN_TINY),
            steps_used=len(steps_T),
            query=query(window.run, "series", stat="samples"),
        ),
        remedy=Remedy(
            text="Leave the rest of an epoch out, or fill it up from the next one.",
            code=f"DataLoader(dataset, batch_size={usual:.0f}, shuffle=True, drop_last=True)",
        ),
        steps=(int(steps_T[small_T][0]), int(steps_T[small_T][-1])),
    )
    return Outcome((finding,))


def _uneven_ranks(window: Window, samples_TK: Floats, steps_T: Ints) -> Finding:
    """Some ranks have fewer samples (warning), or all have now more and now fewer (info): the same share in the end."""
    median_K = np.median(samples_TK, axis=0)
    most = float(median_K.max())
    fewer = tuple(int(k) for k in np.flatnonzero(median_K < (1 - UNEVEN_SHARE) * most))
    share = float(median_K.min() / most) if fewer else float(np.median(samples_TK.min(1) / samples_TK.max(1)))
    told = (
        f"{names(fewer).capitalize()} normalize {median_K.min():.0f} samples a step, others {most:.0f}"
        if fewer
        else f"In one step the smallest batch of a rank typically holds {share:.2g} times the samples of the largest"
    )
    return Finding(
        code="NH-UNEVEN",
        severity="warning" if fewer else "info",
        summary=f"{told}: means of gradients and of statistics over ranks weigh the samples of small batches more.",
        evidence=Evidence(
            statistic="samples of the smallest rank over those of the largest",
            value=share,
            threshold=1 - UNEVEN_SHARE,
            steps_used=len(steps_T),
            query=query(window.run, "series", stat="samples", rank=fewer[0] if fewer else None),
        ),
        remedy=Remedy(
            text="Give every rank the same batch size.",
            code=f"DataLoader(dataset, batch_size={round(float(median_K.mean()))}, "
            "sampler=DistributedSampler(dataset, drop_last=True), drop_last=True)",
        ),
        ranks=fewer,
        steps=(int(steps_T[0]), int(steps_T[-1])),
    )
