"""Batch against moving statistics of one layer."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.frame import (
    Part,
    assemble,
    finite,
    key,
    line_and_band,
    line_mode,
    short,
    signed,
    stacked,
    title,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette
from service.schemas import Series

STATISTICS: Final = ("mu_b", "mu", "sigma_b", "sigma")
"""What `moments` needs of `Series`."""

_ROW: Final = 170
HEIGHT: Final = 2 * _ROW + 44 + 76
_ROWS: Final = (("mu_b", "mu", "μ", "mean"), ("sigma_b", "sigma", "σ", "deviation"))


def moments(series: Series, *, palette: Palette = PALETTES["light"]) -> go.Figure:
    """Do the moving statistics of this layer follow its batches?

    Two rows over steps, in units of the activations and means over channels: mu_B with its extremes against the moving
    mu, sigma_B against the moving sigma. Inference uses the moving ones, so what lies between the lines is what
    inference does differently.
    """
    if not series.steps:
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=HEIGHT)
    steps = np.asarray(series.steps)
    traces: list[Part] = []
    layout: Part = {
        "height": HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "annotations": [],
        "meta": {"caption": _caption(series)},
    }
    for row, ((batch, moving, symbol, noun), domain) in enumerate(zip(_ROWS, stacked((_ROW, _ROW)), strict=True), 1):
        axes = {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}"}
        color = palette.r if row == 2 else palette.d
        hover = f"{symbol}_B <b>%{{y:.4~g}}</b><extra></extra>"
        traces += line_and_band(steps, series.series[batch], color, axes, name=batch, hover=hover)
        traces.append(
            axes
            | {
                "x": steps,
                "y": short(finite(series.series[moving].mean)),
                "mode": line_mode(steps),
                "line": {"color": palette.limit, "width": 1.6, "dash": "5px,3px"},
                "name": moving,
                "hovertemplate": f"moving {symbol} <b>%{{y:.4~g}}</b><extra></extra>",
            }
        )
        number = "" if row == 1 else str(row)
        layout[f"xaxis{number}"] = {"anchor": f"y{number}", "title": {"text": "step" if row == 2 else ""}}
        if row == 2:
            layout["xaxis2"]["matches"] = "x"
        layout[f"yaxis{number}"] = {
            "domain": domain,
            "anchor": f"x{number}",
            "nticks": 6,
            "title": {"text": f"{noun} (activation)"},
            "uirevision": f"layer {series.layer}",
        }
        keys = f"{key(f'{symbol}_B of batches', color)}  {key(f'{symbol}, moving', palette.limit)}"
        layout["annotations"].append(title(keys, row, palette))
    return assemble(traces, layout, palette)


def _caption(series: Series) -> str:
    newest = {name: finite(series.series[name].mean) for name in STATISTICS}
    complete = np.flatnonzero(np.all([~np.isnan(column) for column in newest.values()], axis=0))
    if not len(complete):
        return "No step has finite statistics."
    i = int(complete[-1])
    mu_b, mu, sigma_b, sigma = (float(newest[name][i]) for name in STATISTICS)
    off = (mu_b - mu) / sigma if sigma else math.nan
    return (
        f"At step {series.steps[i]:,} batches have mean {signed(mu_b)}, deviation {sigma_b:.3g}; inference would use "
        f"{signed(mu)} and {sigma:.3g}: {signed(off)} σ off, at {sigma_b / sigma if sigma else math.nan:.3g} times "
        "the scale (means over channels; single channels may differ more, see the snapshots)."
    )
