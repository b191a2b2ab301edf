"""The train-inference gap, what it is made of, and what it costs."""

from __future__ import annotations

from typing import Final

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import SCALAR_SHADOW_EVAL_LOSS, SCALAR_SHADOW_TRAIN_LOSS
from dashboard.figures.frame import (
    Floats,
    Part,
    assemble,
    finite,
    key,
    line_mode,
    rolling,
    short,
    stacked,
    title,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette, translucent
from service.schemas import Scalars, Series

STATISTICS: Final = ("gap", "residual", "mean_diff2", "mean_noise", "scale_diff2", "scale_noise")
"""What `causes` needs of `Series`."""

SHADOW: Final = ((SCALAR_SHADOW_TRAIN_LOSS, "training mode"), (SCALAR_SHADOW_EVAL_LOSS, "inference mode"))
"""The scalars it draws above, where they are recorded."""

WINDOW_STEPS: Final = 100
CLUSTERED_FROM: Final = 1.2
"""Excess over the sampling noise below this ratio is taken for chance, as NH-CLUSTER does."""

_LOSS, _GAP, _SHARES = 150, 130, 150  # heights in pixels
HEIGHT: Final = _LOSS + _GAP + _SHARES + 2 * 44 + 76

PARTS: Final = ("sampling", "clustered", "rank", "slow")
_MEANING: Final = {
    "sampling": "sampling noise of the batch",
    "clustered": "batches that are no random samples",
    "rank": "ranks that see different data",
    "slow": "moving statistics that lag, or ordered data",
}


def parts(series: Series, skewed_from: int | None = None) -> dict[str, Floats]:
    """Shares of the gap by cause at each step, summing to 1; NaN where a statistic is missing.

    With means over `WINDOW_STEPS`: sampling = min(fast, expected) for means and scales, clustered = the excess of both
    where it is `CLUSTERED_FROM` times the expected, slow = what is left of the gap, called rank from the step on from
    which ranks are known to see different data. The same decomposition as the rule NH-GAP's (docs/findings.md).
    """
    points = max(1, round(WINDOW_STEPS / series.bucket_steps))
    mean = {name: rolling(finite(series.series[name].mean), points) for name in STATISTICS}
    with np.errstate(divide="ignore", invalid="ignore"):
        fast, noise = mean["mean_diff2"] + mean["scale_diff2"], mean["mean_noise"] + mean["scale_noise"]
        sampling = np.minimum(mean["mean_diff2"], mean["mean_noise"]) + np.minimum(
            mean["scale_diff2"], mean["scale_noise"]
        )
        excess = np.maximum(fast - sampling, 0)
        chance = mean["mean_diff2"] < CLUSTERED_FROM * mean["mean_noise"]
        sampling, excess = np.where(chance, sampling + excess, sampling), np.where(chance, 0.0, excess)
        slow = np.maximum(mean["gap"] - sampling - excess, 0)
        total = sampling + excess + slow + 0 * noise
        found = np.array([sampling, excess, np.zeros_like(slow), slow]) / np.where(total > 0, total, np.nan)
    if skewed_from is not None:
        skewed = np.asarray(series.steps) >= skewed_from
        found[2], found[3] = np.where(skewed, found[3], 0), np.where(skewed, 0, found[3])
    found[:, np.isnan(found).any(0)] = np.nan
    return dict(zip(PARTS, found, strict=True))


def causes(
    series: Series,
    shadow: Scalars | None = None,
    *,
    layer: str = "",
    skewed_from: int | None = None,
    compact: bool = False,
    palette: Palette = PALETTES["light"],
) -> go.Figure:
    """Does inference lose what training has, by how much, and what makes the difference?

    Rows over steps: the loss of the same batch in training and in inference mode, where a shadow pass is recorded; the
    gap of a layer with what the limits leave of it; the gap's causes as shares (`parts`).

    Args:
        series: `STATISTICS` of one layer, best of the first: behind a normalized layer the gap is understated.
        shadow: the two losses of the shadow pass.
        layer: its name, for the caption.
        skewed_from: the step from which on ranks are known to see different data.
        compact: short texts, for a narrow screen.
        palette: colours.
    """
    if not series.steps:
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=HEIGHT)
    steps = np.asarray(series.steps)
    losses = [(name, label) for name, label in SHADOW if shadow and name in shadow.series and shadow.series[name].steps]
    heights = (*((_LOSS,) if losses else ()), _GAP, _SHARES)
    layout: Part = {
        "height": sum(heights) + 44 * (len(heights) - 1) + 76,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "annotations": [],
    }
    traces: list[Part] = []
    row = 0
    if losses and shadow is not None:
        row += 1
        for (name, label), color in zip(losses, palette.series, strict=False):
            curve = shadow.series[name]
            traces.append(
                {"type": "scatter", "xaxis": "x1", "yaxis": "y1", "x": curve.steps, "y": short(finite(curve.mean))}
                | {"mode": line_mode(np.asarray(curve.steps)), "line": {"color": color, "width": 1.7}, "name": label}
                | {"hovertemplate": f"loss in {label} <b>%{{y:.4~g}}</b><extra></extra>"}
            )
        keys = "  ".join(key(label, color) for (_, label), color in zip(losses, palette.series, strict=False))
        layout["annotations"].append(title(keys if compact else f"Loss of the same batch: {keys}", row, palette))
    row += 1
    gap, left = (finite(series.series[name].mean) for name in ("gap", "residual"))
    for values, name, color in ((gap, "gap", palette.series[2]), (left, "left after clipping", palette.series[3])):
        traces.append(
            {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}", "x": steps, "y": short(_positive(values))}
            | {"mode": line_mode(steps), "line": {"color": color, "width": 1.6}, "name": name}
            | {"hovertemplate": f"{name} <b>%{{y:.3~g}}</b> σ²<extra></extra>"}
        )
    keys = f"{key('gap', palette.series[2])}  {key('what clipping leaves of it', palette.series[3])}"
    layout["annotations"].append(title(keys, row, palette))
    gap_row, row = row, row + 1
    colors = dict(zip(PARTS, (palette.series[0], palette.series[1], palette.series[3], palette.phases[0]), strict=True))
    shares = parts(series, skewed_from)
    there = ~np.isnan(shares["sampling"])
    for name in PARTS:
        traces.append(
            {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}", "x": steps[there]}
            | {"y": short(shares[name][there]), "mode": "lines", "stackgroup": "shares", "name": name}
            | {"line": {"width": 0.5, "color": colors[name]}, "fillcolor": translucent(colors[name], 0.75)}
            | {"hovertemplate": f"{name} <b>%{{y:.1%}}</b><extra></extra>"}
        )
    keys = "  ".join(f'<span style="color:{colors[name]}">■</span> {name}' for name in PARTS)
    layout["annotations"].append(title(keys if compact else f"Causes of the gap: {keys}", row, palette))
    for i, domain in enumerate(stacked(heights), 1):
        number = "" if i == 1 else str(i)
        layout[f"xaxis{number}"] = {"anchor": f"y{number}", "title": {"text": "step" if i == row else ""}}
        if i > 1:
            layout[f"xaxis{number}"]["matches"] = "x"
        layout[f"yaxis{number}"] = {"domain": domain, "anchor": f"x{number}", "nticks": 5}
        layout[f"yaxis{number}"]["uirevision"] = f"layer {series.layer}"
        if i == gap_row:
            layout[f"yaxis{number}"] |= {
                "type": "log",
                "title": {"text": "gap (σ²)"},
                "dtick": "D1",
                "tickformat": "~g",
            }
            layout[f"yaxis{number}"] |= _decades(gap, left)
        elif i == row:
            layout[f"yaxis{number}"] |= {"tickformat": ".0%", "range": [0, 1], "title": {"text": "share of the gap"}}
        else:
            layout[f"yaxis{number}"]["title"] = {"text": "loss"}
    layout["meta"] = {"caption": _caption(series, shares, gap, left, layer)}
    return assemble(traces, layout, palette)


def _positive(values: Floats) -> Floats:
    """For a logarithmic axis: zero is drawn at its lower end instead of nowhere."""
    return np.where(values <= 0, 1e-6, values)


def _decades(gap: Floats, left: Floats) -> Part:
    both = np.concatenate([gap, left])
    both = both[np.isfinite(both) & (both > 1e-4)]
    low, high = (np.percentile(both, 1), np.percentile(both, 99)) if len(both) else (1e-3, 1.0)
    bottom, top = float(np.floor(np.log10(low))), float(np.ceil(np.log10(high)))
    decades = [10.0**k for k in range(int(bottom), int(max(top, bottom + 1)) + 1)]
    return {
        "range": [bottom - 0.15, max(top, bottom + 1) + 0.05],
        "tickvals": decades,
    }  # no label beside the x axis's 0


def _caption(series: Series, shares: dict[str, Floats], gap: Floats, left: Floats, layer: str) -> str:
    at = np.flatnonzero(~np.isnan(shares["sampling"]) & np.isfinite(gap))
    if not len(at):
        return "What the gap is made of can be said after a few recorded steps."
    i = int(at[-1])
    worst = max(PARTS, key=lambda part: shares[part][i])
    points = max(1, round(WINDOW_STEPS / series.bucket_steps))
    size, rest = (float(rolling(values, points)[i]) for values in (gap, left))
    kept = ""
    if size > 0 and np.isfinite(rest):
        left_of_it = min(rest / size, 1)
        kept = f", of which clipping leaves {left_of_it:.0%}" if left_of_it < 0.995 else ", which nothing corrects"
    return (
        f"Up to step {series.steps[i]:,}{f' {layer}' if layer else ''} has a gap of {size:.2g} σ²{kept}; "
        f"{shares[worst][i]:.0%} of it is {_MEANING[worst]}."
    )
