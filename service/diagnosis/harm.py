"""Harm itself, read from the shadow pass: the same batch and weights once as trained and once in inference mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from brn_core.wire import (
    SCALAR_SHADOW_DISAGREEMENT,
    SCALAR_SHADOW_EVAL_LOSS,
    SCALAR_SHADOW_TRAIN_LOSS,
    Layer,
)
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.layers import Shares, shares
from service.diagnosis.looks import time_constant
from service.diagnosis.outcome import Abstention, Outcome, count, query
from service.diagnosis.window import Bools, Floats, Ints, Window

PASSES = 10
_T_PASSES = 2.262  # Student's t, 97.5 %, PASSES - 1 degrees of freedom
SURE_PASSES = (10, 20, 40)
SURE = 0.01
"""Bound on the probability that chance makes the loss gaps of the newest 10, 20 or 40 passes, from which it is none."""
_STAKES = 2.0 ** np.arange(-2, 9)  # in units of 1 / root mean square: from the spread's own size to its smallest parts
SETTLING_TAUS = 25
"""Time constants of the moving statistics after which they are held to account."""
HARM_LOSS_GAP = 0.2
"""Loss gap that is harm: in nats where the loss is a classifier's, else at least that share of the training loss."""
NOISE_DISAGREEMENT = 0.1
NOISE_GAP = 0.05
"""Gap (in sigma²) of the worst layer above which disagreement may be normalization's doing; i.i.d. batches of 32 stay
below .02."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """Means over the newest `PASSES` shadow passes, P passes after settling.

    Attributes:
        steps_P: steps of all passes after settling.
        loss_gap, loss_gap_half_width: mean of L_eval - L_train and half its 95 % interval.
        limit: the loss gap from which it is harm.
        disagreement: mean share of samples whose prediction changes; None where it is not sent.
        first_step: first step of the unbroken stretch, up to now, in which the passes so far were harmful.
        lower: the newest ten are surely below 0: training is noisier than inference.
        harmful: the newest ten have a mean beyond the limit, and they or some more are surely above 0 (`by_chance`).
    """

    steps_P: Ints
    loss_gap: float
    loss_gap_half_width: float
    limit: float
    disagreement: float | None
    first_step: int
    lower: bool
    harmful: bool


def settling_steps(layers: tuple[Layer, ...]) -> int:
    """Steps until the moving statistics have forgotten their beginning: 25 time constants 1 / momentum."""
    return math.ceil(SETTLING_TAUS * max((time_constant(layer) for layer in layers), default=100.0))


def shadow(window: Window) -> Shadow | Abstention:
    """The newest shadow passes after settling, or why there are too few."""
    train = window.scalars.get(SCALAR_SHADOW_TRAIN_LOSS)
    evaluated = window.scalars.get(SCALAR_SHADOW_EVAL_LOSS)
    if train is None or evaluated is None:
        return Abstention(
            "NH-GAP",
            "no shadow pass was recorded, so nobody knows what inference makes of this model",
            advice="Pass the loss: `recorder.step(loss, shadow_loss=lambda output: criterion(output, targets))`.",
        )
    steps, in_train, in_eval = np.intersect1d(train.steps_T, evaluated.steps_T, return_indices=True)
    gap: Floats = evaluated.values_T[in_eval] - train.values_T[in_train]
    settled = settling_steps(window.layers)
    usable = np.isfinite(gap) & (steps >= settled)
    every = int(np.median(np.diff(steps))) if len(steps) > 1 else 50
    steps_P, gap_P, train_P = steps[usable], gap[usable], train.values_T[in_train][usable]
    if len(steps_P) < PASSES:
        begin = max(settled, window.last_step or 0)
        return Abstention(
            "NH-GAP",
            f"it has {count(len(steps_P), 'shadow pass').replace('passs', 'passes')} after step {settled} "
            f"({SETTLING_TAUS} time constants of the moving statistics) and needs {PASSES}",
            more_steps=max(1, begin - (window.last_step or 0) + (PASSES - len(steps_P)) * every),
        )
    disagreement = _disagreement(window, settled)
    # Without classes the loss has a unit of its own (a squared error of 100): only its own size says what is much.
    unit = 1.0 if disagreement is not None else max(1.0, abs(float(train_P[-PASSES:].mean())))
    limit = HARM_LOSS_GAP * unit
    harmful_P = _harmful(gap_P, limit)
    calm = np.flatnonzero(~harmful_P[PASSES - 1 :])
    since = int(calm[-1]) + PASSES if len(calm) else PASSES - 1
    newest = gap_P[-PASSES:]
    return Shadow(
        steps_P=steps_P,
        loss_gap=float(newest.mean()),
        loss_gap_half_width=_T_PASSES * float(newest.std(ddof=1)) / math.sqrt(PASSES),
        limit=limit,
        disagreement=disagreement,
        first_step=int(steps_P[min(since, len(steps_P) - 1)]),
        lower=by_chance(-newest) <= SURE,
        harmful=bool(harmful_P[-1]),
    )


def _harmful(gap_P: Floats, limit: float) -> Bools:
    """(P,) whether the ten passes up to each have a mean beyond the limit, and ten, 20 or 40 are surely above 0."""
    harmful_P = np.zeros(len(gap_P), np.bool_)
    harmful_P[PASSES - 1 :] = np.convolve(gap_P, np.full(PASSES, 1 / PASSES), mode="valid") > limit
    for end in np.flatnonzero(harmful_P) + 1:
        harmful_P[end - 1] = any(by_chance(gap_P[end - n : end]) <= SURE for n in SURE_PASSES if n <= end)
    return harmful_P


def by_chance(gap_W: Floats) -> float:
    """At most the probability of a sum of loss gaps as large as this, if each could as well have the other sign.

    Were training and inference alike, L_eval and L_train of a pass could change places: given their sizes |g|, gaps
    have random signs e, whatever their tails and however unequal. Then, for every s > 0, P(sum e |g| >= sum g) <=
    exp(-s sum g) prod cosh(s g) = prod (1 + exp(-2 s g)) / 2 (Chernoff); the least over a grid of s is returned.
    Student's t of harm that comes in bursts is never large, for the bursts are its spread; this is 2^-n whenever all n
    gaps are above 0.
    """
    size = math.sqrt(float((gap_W**2).mean()))
    if not size > 0:
        return 1.0
    log_S = (np.logaddexp(0.0, -2 * _STAKES[:, None] * gap_W / size) - math.log(2)).sum(1)
    return min(1.0, math.exp(float(log_S.min())))


def _disagreement(window: Window, settled: int) -> float | None:
    rows = window.scalars.get(SCALAR_SHADOW_DISAGREEMENT)
    if rows is None:
        return None
    values = rows.values_T[(rows.steps_T >= settled) & np.isfinite(rows.values_T)]
    return float(values[-PASSES:].mean()) if len(values) >= PASSES else None


def _worst_gap(window: Window, since: int) -> float:
    """Mean gap of the worst layer from step `since` on, when the passes were: before, it may have been larger."""
    gap_TKL = window.rows.columns["gap"][window.rows.steps_T >= since]
    seen_TKL = np.isfinite(gap_TKL)
    mean_L = np.where(seen_TKL, gap_TKL, 0.0).sum((0, 1)) / np.maximum(seen_TKL.sum((0, 1)), 1)
    return float(mean_L.max(initial=0.0))


def gap(window: Window, measured: Shadow | Abstention, rank_effect: float | None) -> Outcome:
    """NH-GAP: does inference lose what training has?

    Args:
        window: the run.
        measured: its shadow passes.
        rank_effect: persistent rank effect R of the probe, where known; tells rank skew from lag.
    """
    if isinstance(measured, Abstention):
        return Outcome(abstained=(measured,))
    parts = shares(window, rank_effect)
    noisy = (
        measured.lower
        and measured.disagreement is not None
        and measured.disagreement > NOISE_DISAGREEMENT
        and _worst_gap(window, int(measured.steps_P[-PASSES])) > NOISE_GAP
    )
    if not measured.harmful and not noisy:
        return Outcome(clear=f"inference agrees with training (loss difference {measured.loss_gap:+.2f})")
    return Outcome((_gap_finding(window, measured, parts),))


def _gap_finding(window: Window, measured: Shadow, parts: Shares | None) -> Finding:
    changed = (
        f", and {measured.disagreement:.0%} of the predictions change" if measured.disagreement is not None else ""
    )
    direction = "higher" if measured.loss_gap > 0 else "lower"
    summary = (
        f"On the same batch the loss in inference mode is {abs(measured.loss_gap):.2f} {direction} "
        f"than in training mode{changed}"
    )
    if not measured.harmful:
        summary += ": batch statistics are so noisy that training sees a different network"
    if parts is not None:
        summary += f"; {parts.dominant_share:.0%} of the gap at {parts.layer} is {parts.dominant_text}"
    steps_P = measured.steps_P
    first = measured.first_step if measured.harmful else int(steps_P[-PASSES])
    return Finding(
        code="NH-GAP",
        severity="critical" if measured.harmful else "warning",
        summary=summary + ".",
        evidence=Evidence(
            statistic="dL, loss in inference mode minus loss in training mode, same batch and weights",
            value=measured.loss_gap,
            low=measured.loss_gap - measured.loss_gap_half_width,
            high=measured.loss_gap + measured.loss_gap_half_width,
            threshold=measured.limit if measured.harmful else None,
            steps_used=PASSES,
            query=query(window.run, "scalars", name=(SCALAR_SHADOW_TRAIN_LOSS, SCALAR_SHADOW_EVAL_LOSS)),
        ),
        remedy=_gap_remedy(window, parts),
        layers=(parts.layer,) if parts is not None else (),
        steps=(first, int(steps_P[-1])),
    )


def _gap_remedy(window: Window, parts: Shares | None) -> Remedy:
    renorm = bool(window.layers) and all(layer.kind == "BatchRenorm" for layer in window.layers)
    convert = None if renorm else "model = convert_batchnorm(model)"
    kind = parts.dominant if parts is not None else "unknown"
    if kind == "clustered":
        code = f"DataLoader(dataset, batch_size={window.batch_size or 32}, shuffle=True)"
        return Remedy(
            text="Shuffle the data; where batches must stay as they are, use Batch Renorm.", code=convert or code
        )
    if kind == "rank":
        text = "Ranks see different data: normalize over all of them, or give every rank a share of all data."
        return Remedy(text=text, code="model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)")
    if kind == "sampling":
        text = (
            "The batch is too small for its statistics: normalize over all ranks or more samples, or use Batch Renorm."
        )
        return Remedy(text=text, code=convert or _open_limits(window))
    if kind == "slow":
        alphas = [layer.momentum for layer in window.layers if layer.momentum]
        text = (
            "The moving statistics run behind the network, or the data comes in an order: shuffle, let the statistics "
            "move faster, and re-estimate them before evaluating."
        )
        faster = min(10 * min(alphas, default=0.01), 0.2)
        return Remedy(text=text, code=f"for m in norm_layers: m.momentum = {faster:.2g}")
    text = "Look at the gap layer by layer, and re-estimate the moving statistics on training data before evaluating."
    return Remedy(text=text, code=convert)


def _open_limits(window: Window) -> str:
    final = window.schedule
    r_max, d_max = (max(final.r_max, 3.0), max(final.d_max, 5.0)) if final else (3.0, 5.0)
    return f"RenormSchedule(r_max={r_max:g}, d_max={d_max:g}).scaled(total_steps).apply(model, step)"
