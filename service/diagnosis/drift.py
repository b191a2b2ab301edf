"""The network against its moving statistics: trailing them (NH-LAG), limits opened too early or too late
(NH-SCHED-FAST, NH-SCHED-SLOW), a scale that runs away (NH-RUNAWAY).

Slow energy. d² is fast noise plus what is slow: with moving weight alpha, independent batches have
E d² = v 2 / (2 - alpha), v the variance of mu_B / sigma that second differences measure whatever the drift. What d²
has beyond that is the squared distance of the moving mean from where the network is: the lag energy, where neither
order in the data nor skewed ranks explain it.

That formula takes the moving sigma as given, and it is not: sigma_t contains sigma_B of t-1 and t-2, so a batch with a
large mean of a rectified channel is divided by a sigma it raised itself, while mu_t, new, is not. Second differences
are five sixths old means, so they fall short of the variance in d², the more the smaller the batch and the sparser the
channel. s²_y / N of the batch itself is new as mu_t is, and for independent batches it has the same mean over the same
sigma_t. NH-LAG takes the larger of the two for v: the second difference where batches are clustered, the noise where
sigma fluctuates. What the second order leaves stays below a tenth of the noise, hence the limit in `lag`.

Shape suffixes: T recorded steps, K ranks, L layers, J looks.
"""

from __future__ import annotations

import math

import numpy as np

from service.diagnosis.estimate import LOOK_ROWS, MIN_STEPS
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.looks import (
    interval,
    lasting,
    looks,
    of_layers,
    time_constant,
    together,
    too_young,
    warm,
    worst_first,
)
from service.diagnosis.outcome import Abstention, Outcome, query
from service.diagnosis.window import Bools, Floats, LayerRows, Opening, ScalarRows, Window

LAG_WARNING = 0.25
LAG_CALM = 0.02
"""Lag energy up to which limits may open."""
LAG_SETTLED = 0.01
SLOW_TAUS = 20
SLOW_SHARE = 0.2
LOSS_RISE = 1.3
LOSS_STEPS = 50
GAP_RISE = 3.0
AFTER_TAUS = 10
GROWTH = 16.0
EVENT_RATIO = 4.0


def slow_energy(window: Window, rows: LayerRows) -> Floats:
    """(T, K, L) d² beyond what batch-to-batch variance explains, in sigma²; NaN where either is missing."""
    alpha_L = np.array([layer.momentum or 0.0 for layer in window.layers])
    return np.asarray(rows.columns["d_squared"] - rows.columns["mean_diff2"] * 2 / (2 - alpha_L))


def lag(window: Window, explained: bool) -> Outcome:
    """NH-LAG: do the moving statistics trail the network?

    Args:
        window: the run.
        explained: whether ordered data or skewed ranks, found in the probe, keep the means away already.
    """
    if (young := too_young(window, "NH-LAG")) is not None:
        return Outcome(abstained=(young,))
    rows = window.rows
    alpha_L = np.array([layer.momentum or 0.0 for layer in window.layers])
    noise_TKL = rows.columns["mean_noise"] / together(window)
    parts = {"energy": slow_energy(window, rows), "fast": rows.columns["mean_diff2"], "noise": noise_TKL}
    seen = looks(rows, parts, warm(window))
    short_JL = np.maximum(seen.mean["noise"] - seen.mean["fast"], 0.0) * 2 / (2 - alpha_L)
    energy_JL = seen.mean["energy"] - short_JL
    held = lasting(seen.steps_J, energy_JL > LAG_WARNING * np.maximum(1.0, seen.mean["noise"]))
    if held is None or explained:
        return Outcome()
    energy_L = energy_JL[-1]
    # Step by step the noise follows d² where sigma is small, so its own series makes the sharper interval.
    own_TKL = rows.columns["d_squared"] - np.where(short_JL[-1] > 0, noise_TKL, parts["fast"]) * 2 / (2 - alpha_L)
    worst = [at for at in worst_first(energy_L, held.layers_L) if _low(own_TKL[-2 * LOOK_ROWS :, :, at]) > 0]
    if not worst:
        return Outcome()
    i = worst[0]
    layer = window.layers[i]
    bounds = interval(own_TKL[-LOOK_ROWS:, :, i])
    tau = time_constant(layer)
    finding = Finding(
        code="NH-LAG",
        severity="warning",
        summary=(
            f"The moving mean of layer {layer.name} trails the network by {math.sqrt(energy_L[i]):.2g} sigma (squared "
            f"{energy_L[i]:.2g}, time constant {tau:g} steps): inference normalizes with statistics of a network that "
            f"is no more{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="lag energy, d² beyond the variance between batches",
            value=float(energy_L[i]),
            low=bounds[0] if bounds else None,
            high=bounds[1] if bounds else None,
            threshold=LAG_WARNING * max(1.0, float(seen.mean["noise"][-1, i])),
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("d_squared", "mean_diff2", "mean_noise"), layer=layer.index),
        ),
        remedy=_faster(window, 1 / tau),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def _faster(window: Window, alpha: float) -> Remedy:
    if alpha < 0.1:
        return Remedy(
            text="Let the statistics move faster, and keep limits of Batch Renorm closed until they have caught up.",
            code=f"for m in norm_layers: m.momentum = {min(10 * alpha, 0.1):.2g}",
        )
    return Remedy(
        text="The network moves faster than a few steps' statistics can follow: lower the learning rate or warm it up.",
        code=lower_rate(window),
    )


def lower_rate(window: Window) -> str:
    """A code line for a third of the learning rate, the run's own where its config says it."""
    rate = window.config.get("lr")
    if isinstance(rate, int | float) and not isinstance(rate, bool):
        return f"lr = {rate / 3:.2g}"
    return "for g in optimizer.param_groups: g['lr'] /= 3"


def runaway(window: Window) -> Outcome:
    """NH-RUNAWAY: does the scale of the activations grow without end?"""
    rows = window.rows
    if not window.layers or not len(rows.steps_T):
        return Outcome()
    eps_L = np.array([layer.eps for layer in window.layers])
    alive_L = window.first_sigma_L**2 > 100 * eps_L  # a layer that began at zero has no scale to grow from
    with np.errstate(divide="ignore", invalid="ignore"):
        growth_TKL = np.where(alive_L, rows.columns["sigma"] / window.first_sigma_L, np.nan)
    seen = looks(rows, {"growth": growth_TKL}, warm(window))
    held = lasting(seen.steps_J, seen.mean["growth"] > GROWTH)
    rising = loss_rise(window.scalars.get("loss"))
    if held is None:
        return _jump(window, rising)
    growth_JL = seen.mean["growth"]
    worst = worst_first(growth_JL[-1], held.layers_L)
    i = worst[0]
    layer = window.layers[i]
    rate = float(np.log(growth_JL[-1, i] / growth_JL[-2, i])) / int(seen.steps_J[-1] - seen.steps_J[-2])
    doubling = f", doubling every {math.log(2) / rate:.0f} steps" if rate > 1e-6 else ""
    finding = Finding(
        code="NH-RUNAWAY",
        severity="critical" if rising is not None else "warning",
        summary=(
            f"The scale of layer {layer.name} has grown {growth_JL[-1][i]:.3g} times since the start{doubling}"
            f"{f', and the loss is {rising:.2g} times its best' if rising else ''}; healthy runs stay below "
            f"{GROWTH:g}{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="moving sigma over sigma_B of the first steps",
            value=float(growth_JL[-1][i]),
            threshold=GROWTH,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("sigma", "sigma_b", "log_r"), layer=layer.index),
        ),
        remedy=_slower(window),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def _jump(window: Window, rising: float | None) -> Outcome:
    """sigma_B beyond 4 sigma on half of a layer's channels, in two recorded rows in a row."""
    rows = window.rows
    r_TL = np.where(warm(window), rows.columns["r_q50"], np.nan)
    r_TL = np.nan_to_num(r_TL, nan=0.0, posinf=0.0).max(1, initial=0.0)
    at = np.flatnonzero(((r_TL[1:] > EVENT_RATIO) & (r_TL[:-1] > EVENT_RATIO)).any(1)) + 1
    if not len(at):
        return Outcome()
    first, last = int(at[0]), int(at[-1])
    worst = [int(i) for i in np.flatnonzero(np.minimum(r_TL[first], r_TL[first - 1]) > EVENT_RATIO)]
    i = max(worst, key=lambda layer: float(r_TL[first, layer]))
    layer = window.layers[i]
    finding = Finding(
        code="NH-RUNAWAY",
        severity="critical" if rising is not None else "warning",
        summary=(
            f"At step {int(rows.steps_T[first])} half of the channels of layer {layer.name} had a batch deviation of "
            f"more than {r_TL[first, i]:.3g} times the moving one: the activations jump{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="median over channels of r = sigma_B / sigma",
            value=float(r_TL[first, i]),
            threshold=EVENT_RATIO,
            steps_used=2,
            query=query(window.run, "series", stat=("r_q50", "sigma_b", "sigma"), layer=layer.index),
        ),
        remedy=_slower(window),
        layers=tuple(window.layers[at].name for at in worst),
        steps=(int(rows.steps_T[first]), int(rows.steps_T[last])),
    )
    return Outcome((finding,))


def _slower(window: Window) -> Remedy:
    return Remedy(
        text="Lower the learning rate or warm it up; normalize by the batch, not by moving averages, while the scale "
        "grows (limits of Batch Renorm closed).",
        code=lower_rate(window),
    )


def loss_rise(loss: ScalarRows | None, since: int = 0) -> float | None:
    """How many times its best 50-step mean the loss is at its worst 50-step mean after it; None unless it rose.

    It rose where that is beyond `LOSS_RISE` and the difference beyond three standard errors of two such means.

    Args:
        loss: recorded losses; non-finite ones are left out.
        since: the worst mean must lie wholly at or after this step.
    """
    if loss is None:
        return None
    finite = np.isfinite(loss.values_T)
    values_T, steps_T = loss.values_T[finite], loss.steps_T[finite]
    if len(values_T) < 2 * LOSS_STEPS:
        return None
    total_T = np.concatenate([[0.0], np.cumsum(values_T)])
    square_T = np.concatenate([[0.0], np.cumsum(values_T**2)])
    mean_M = (total_T[LOSS_STEPS:] - total_T[:-LOSS_STEPS]) / LOSS_STEPS
    var_M = np.maximum((square_T[LOSS_STEPS:] - square_T[:-LOSS_STEPS]) / LOSS_STEPS - mean_M**2, 0.0) / LOSS_STEPS
    # M means; the one at m covers values m ... m + 49. Compare each with the best that ended before it began.
    best_M = np.minimum.accumulate(mean_M)[:-LOSS_STEPS]
    at_M = np.array([0, *np.flatnonzero(np.diff(best_M) < 0) + 1])
    best_at_M = at_M[np.searchsorted(at_M, np.arange(len(best_M)), side="right") - 1]
    later_M, error_M = mean_M[LOSS_STEPS:], np.sqrt(var_M[LOSS_STEPS:] + var_M[best_at_M])
    rose_M = (best_M > 0) & (later_M > LOSS_RISE * best_M) & (later_M - best_M > 3 * error_M)
    rose_M &= steps_T[LOSS_STEPS : LOSS_STEPS + len(rose_M)] >= since
    return float((later_M[rose_M] / best_M[rose_M]).max()) if rose_M.any() else None


def opened_early(window: Window) -> Outcome:
    """NH-SCHED-FAST: did the limits open while the moving statistics still trailed, and did training suffer?"""
    opening = window.opening
    if opening is None:
        return Outcome()
    tau = max(time_constant(layer) for layer in window.layers)
    before_T = opening.rows.steps_T < opening.step
    after_T = (opening.rows.steps_T >= opening.step) & (opening.rows.steps_T <= opening.step + AFTER_TAUS * tau)
    energy_TKL = slow_energy(window, opening.rows)[before_T]
    known = int(np.isfinite(energy_TKL).any((1, 2)).sum())
    if known < MIN_STEPS:
        if (window.last_step or 0) < opening.step:
            return Outcome()
        reason = (
            f"{known} of the {MIN_STEPS} rows that it takes are known from before step {opening.step}, when the "
            "limits opened"
        )
        return Outcome(abstained=(Abstention("NH-SCHED-FAST", reason),))
    seen_TKL = np.isfinite(energy_TKL)
    lag_L = np.where(seen_TKL, energy_TKL, 0.0).sum((0, 1)) / np.maximum(seen_TKL.sum((0, 1)), 1)
    late_L = lag_L > LAG_CALM
    for at in np.flatnonzero(late_L):
        late_L[at] = _low(energy_TKL[:, :, at]) > LAG_CALM / 2
    if not late_L.any() or not after_T.any():
        return Outcome()
    i = int(np.argmax(np.where(late_L, lag_L, -math.inf)))
    gap_TKL = opening.rows.columns["gap"]
    gap_rise = _gap_rise(gap_TKL[before_T], gap_TKL[after_T], late_L)
    rise = loss_rise(opening.loss, opening.step)
    if rise is None and gap_rise is None:
        return Outcome()
    suffered = [f"the loss rose to {rise:.2g} times its best"] if rise is not None else []
    suffered += [f"the gap grew {gap_rise:.2g} times"] if gap_rise is not None else []
    layer = window.layers[i]
    finding = Finding(
        code="NH-SCHED-FAST",
        severity="warning",
        summary=(
            f"The limits opened at step {opening.step} while the moving mean of layer {layer.name} still trailed the "
            f"network (lag energy {lag_L[i]:.2g}, {LAG_CALM:g} is calm); within {AFTER_TAUS * tau:.0f} steps "
            f"{' and '.join(suffered)}."
        ),
        evidence=Evidence(
            statistic="lag energy before the limits opened, d² beyond the variance between batches",
            value=float(lag_L[i]),
            low=_low(energy_TKL[:, :, i]),
            threshold=LAG_CALM,
            steps_used=known,
            query=query(
                window.run,
                "series",
                stat=("r_max", "d_max", "d_squared", "mean_diff2", "gap"),
                layer=layer.index,
                to=int(opening.step + AFTER_TAUS * tau),
            ),
        ),
        remedy=_later(opening, window, tau),
        layers=tuple(window.layers[at].name for at in np.flatnonzero(late_L)),
        steps=(opening.step, int(opening.rows.steps_T[after_T][-1])),
    )
    return Outcome((finding,))


def _low(values_TK: Floats) -> float:
    """Lower end of the interval of a layer's mean; NaN where too little is known."""
    bounds = interval(values_TK)
    return math.nan if bounds is None else bounds[0]


def _gap_rise(before_TKL: Floats, after_TKL: Floats, late_L: Bools) -> float | None:
    """How many times the mean gap before the largest 20-row mean after is, beyond `GAP_RISE`, of a gap that matters.

    Once the limits are open nothing pins the means of deep layers, and a small gap may grow threefold without harm:
    what matters is one that NH-LAG would warn of.
    """
    before_L = np.nanmean(np.where(np.isfinite(before_TKL), before_TKL, np.nan)[-LOOK_ROWS:], axis=(0, 1))
    parts = [part for part in np.array_split(after_TKL, max(1, len(after_TKL) // 20)) if np.isfinite(part).any()]
    if not parts:
        return None
    after_L = np.max([np.where(np.isfinite(p), p, 0.0).mean((0, 1)) for p in parts], axis=0)
    grown_L = late_L & (before_L > 0) & (after_L > LAG_WARNING)
    rise = float(np.max(np.where(grown_L, after_L / np.where(before_L > 0, before_L, 1), 0.0)))
    return rise if rise > GAP_RISE else None


def _later(opening: Opening, window: Window, tau: float) -> Remedy:
    schedule = window.schedule
    assert schedule is not None
    shift = max(opening.step, math.ceil(25 * tau) - opening.step)
    return Remedy(
        text=f"Open the limits later, after 25 time constants (here {25 * tau:.0f} steps), or let the statistics "
        "move faster.",
        code=(
            f"RenormSchedule(bn_steps={opening.step + shift}, r_steps={schedule.r_steps + shift}, "
            f"d_steps={schedule.d_steps + shift}, r_max={schedule.r_max:g}, d_max={schedule.d_max:g})"
        ),
    )


def opened_late(window: Window) -> Outcome:
    """NH-SCHED-SLOW: could the limits be wider already?"""
    rows, schedule = window.rows, window.schedule
    if schedule is None or not len(rows.steps_T) or all(layer.kind != "BatchRenorm" for layer in window.layers):
        return Outcome()
    tau = max(time_constant(layer) for layer in window.layers)
    spans = rows.steps_T[-1] - rows.steps_T[0] >= min(SLOW_TAUS * tau, 7 * LOOK_ROWS)
    if not spans or rows.steps_T[-1] < SLOW_TAUS * tau:
        return Outcome()
    renorm_L = np.array([layer.kind == "BatchRenorm" for layer in window.layers])
    columns = {
        "energy": slow_energy(window, rows),
        "residual": rows.columns["residual"],
        "gap": rows.columns["gap"],
        "r_max": rows.columns["r_max"],
        "d_max": rows.columns["d_max"],
    }
    seen = looks(rows, columns, warm(window)).mean
    if not len(seen["gap"]) or not np.isfinite(seen["energy"]).all():
        return Outcome()
    with np.errstate(divide="ignore", invalid="ignore"):
        left_JL = np.where(seen["gap"] > 0, seen["residual"] / seen["gap"], 0.0)
    below_final_L = (seen["r_max"][-1] < schedule.r_max * (1 - 1e-5)) | (
        seen["d_max"][-1] < schedule.d_max * (1 - 1e-5)
    )
    calm = bool((seen["energy"] <= LAG_SETTLED).all())
    slow_L = (left_JL > SLOW_SHARE).all(0) & renorm_L & below_final_L
    if not calm or not slow_L.any():
        return Outcome()
    worst = worst_first(left_JL[-1], slow_L)
    layer = window.layers[worst[0]]
    finding = Finding(
        code="NH-SCHED-SLOW",
        severity="info",
        summary=(
            f"The moving statistics have been settled for {rows.steps_T[-1] - rows.steps_T[0]} steps (lag energy at "
            f"most {max(float(seen['energy'].max()), 0.0):.2g}), and the limits still leave "
            f"{left_JL[-1][worst[0]]:.0%} of the gap of layer {layer.name}{of_layers(len(worst))}; "
            "they could open now."
        ),
        evidence=Evidence(
            statistic="residual / gap, share that the limits leave",
            value=float(left_JL[-1][worst[0]]),
            threshold=SLOW_SHARE,
            steps_used=len(rows.steps_T),
            query=query(window.run, "series", stat=("residual", "gap", "r_max", "d_max"), layer=layer.index),
        ),
        remedy=Remedy(
            text="Start the ramp now; i.i.d. batches need no more than the percentiles of r and d that the run shows.",
            code=f"RenormSchedule(bn_steps={int(rows.steps_T[-1])}, r_steps={2 * int(rows.steps_T[-1])}, "
            f"d_steps={2 * int(rows.steps_T[-1])}, r_max={schedule.r_max:g}, d_max={schedule.d_max:g})",
        ),
        layers=tuple(window.layers[at].name for at in worst),
        steps=(int(rows.steps_T[0]), int(rows.steps_T[-1])),
    )
    return Outcome((finding,))
