"""NaN and infinity: where they appeared first."""

from __future__ import annotations

import numpy as np

from brn_core.wire import SCALAR_SHADOW_EVAL_LOSS, SCALAR_SHADOW_TRAIN_LOSS
from service.diagnosis.drift import lower_rate
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.outcome import Outcome, count, names, query
from service.diagnosis.stream import Stream
from service.diagnosis.window import Window

LOSSES = ("loss", SCALAR_SHADOW_TRAIN_LOSS, SCALAR_SHADOW_EVAL_LOSS)
_LOSS_TEXT = {
    "loss": "the loss",
    SCALAR_SHADOW_TRAIN_LOSS: "the loss in training mode",
    SCALAR_SHADOW_EVAL_LOSS: "the loss in inference mode",
}


def nonfinite(window: Window, stream: Stream) -> Outcome:
    """NH-NONFINITE: which came first, a layer's statistics, a loss, or the input?"""
    losses = _losses(window)
    first = window.nonfinite
    if first is not None:
        return Outcome((_layer_finding(window, stream, losses),))
    if losses:
        return Outcome((_loss_finding(window, losses),))
    if stream.spoiled:
        return Outcome((_input_finding(window, stream),))
    return Outcome()


def _losses(window: Window) -> list[tuple[int, str, int]]:
    """(first step, name, how many) of each loss with non-finite values, earliest first."""
    found = []
    for name in LOSSES:
        rows = window.scalars.get(name)
        if rows is not None and len(bad := np.flatnonzero(~np.isfinite(rows.values_T))):
            found.append((int(rows.steps_T[bad[0]]), name, len(bad)))
    return sorted(found)


def _layer_finding(window: Window, stream: Stream, losses: list[tuple[int, str, int]]) -> Finding:
    first = window.nonfinite
    assert first is not None
    names_by_index = {layer.index: layer for layer in window.layers}
    layer = names_by_index.get(first.layer)
    name = layer.name if layer else f"#{first.layer}"
    channels = f"{first.channels} of {layer.channels} channels" if layer else f"{first.channels} channels"
    input_at = stream.spoiled_first.get(first.rank)
    if input_at is not None and input_at <= first.step:
        origin = f"; the input itself was not finite at step {input_at}"
        remedy = Remedy(
            text="Stop such samples before they reach the model.", code="assert torch.isfinite(x).all(), 'input'"
        )
    elif losses and losses[0][0] < first.step:
        origin = f"; {_LOSS_TEXT[losses[0][1]]} was not finite before, at step {losses[0][0]}"
        remedy = _diverged(window)
    elif first.layer == min(names_by_index, default=0):
        origin = (
            f": its input comes from weights that the update after step {first.step - 1} left non-finite"
            if first.step
            else ""
        )
        remedy = _diverged(window)
    else:
        before = [other.name for other in window.layers if other.index < first.layer]
        origin = f", between {before[-1]} (still finite) and it" if before else ""
        remedy = _diverged(window)
    return Finding(
        code="NH-NONFINITE",
        severity="critical",
        summary=(
            f"Layer {name} on rank {first.rank} was the first to become NaN or infinite, at step {first.step} "
            f"({channels}){origin}."
        ),
        evidence=Evidence(
            statistic="channels whose mu_B or sigma_B is not finite",
            value=float(first.channels),
            threshold=0.0,
            steps_used=1,
            query=query(window.run, "heatmap", stat="nonfinite_channels", from_=max(0, first.step - 100)),
        ),
        remedy=remedy,
        ranks=(first.rank,),
        layers=(name,),
        steps=(first.step, max(first.step, window.last_step or first.step)),
    )


def _loss_finding(window: Window, losses: list[tuple[int, str, int]]) -> Finding:
    step, name, times = losses[0]
    text = _LOSS_TEXT[name]
    return Finding(
        code="NH-NONFINITE",
        severity="critical",
        summary=f"{text[0].upper()}{text[1:]} is NaN or infinite from step {step} on ({count(times, 'value')}), "
        "while every layer's batch statistics are finite.",
        evidence=Evidence(
            statistic=f"values of {name} that are not finite",
            value=float(times),
            threshold=0.0,
            steps_used=len(window.scalars[name].steps_T),
            query=query(window.run, "scalars", name=name),
        ),
        remedy=Remedy(
            text="The moving statistics are at fault: look for NaN or zero in a layer's sigma and start them anew.",
            code="for m in norm_layers: m.reset_running_stats()",
        )
        if name == SCALAR_SHADOW_EVAL_LOSS
        else _diverged(window),
        steps=(step, max(step, window.last_step or step)),
    )


def _input_finding(window: Window, stream: Stream) -> Finding:
    step = min(stream.spoiled_first.values())
    return Finding(
        code="NH-NONFINITE",
        severity="warning",
        summary=f"The model's input holds NaN or infinite values on {names(stream.spoiled)} "
        f"({count(stream.spoiled_rows, 'row')} of the probe, first at step {step}); the layers stayed finite.",
        evidence=Evidence(
            statistic="batches whose input probe is not finite",
            value=float(stream.spoiled_rows),
            threshold=0.0,
            steps_used=len(window.probe.steps_T),
            query=query(window.run, "heatmap", stat="nonfinite_channels", from_=max(0, step - 100)),
        ),
        remedy=Remedy(
            text="Stop such samples before they reach the model.", code="assert torch.isfinite(x).all(), 'input'"
        ),
        ranks=stream.spoiled,
        steps=(step, max(step, window.last_step or step)),
    )


def _diverged(window: Window) -> Remedy:
    schedule = window.schedule
    first = window.nonfinite
    renorm = any(layer.kind == "BatchRenorm" for layer in window.layers)
    if renorm and schedule is not None and first is not None and schedule.bn_steps <= first.step <= schedule.r_steps:
        text = (
            "Training diverged while the limits of Batch Renorm opened: open them later and slower, "
            "or lower the learning rate."
        )
        code = (
            f"RenormSchedule(bn_steps={2 * max(schedule.bn_steps, 1)}, r_steps={2 * schedule.r_steps}, "
            f"d_steps={2 * schedule.d_steps}, r_max={schedule.r_max:g}, d_max={schedule.d_max:g})"
        )
        return Remedy(text=text, code=code)
    return Remedy(
        text="Training diverged: lower the learning rate or clip gradients, and restart from a checkpoint before.",
        code=lower_rate(window),
    )
