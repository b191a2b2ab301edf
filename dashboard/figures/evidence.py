"""The statistics a finding rests on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import METRIC
from dashboard.figures.frame import Part, assemble, key, line_and_band, plain, stacked, title, without_data
from dashboard.figures.palette import PALETTES, Palette
from service.schemas import Series

_ROW: Final = 150


def rows_by_unit(stats: Sequence[str]) -> list[list[str]]:
    """Statistics that share an axis: those of one unit, as their label has it in brackets."""
    rows: dict[str, list[str]] = {}
    for stat in stats:
        unit = re.search(r"\(([^()]*)\)$", METRIC[stat].label)
        own = {"mu_b": "mu", "mu": "mu", "sigma_b": "sigma", "sigma": "sigma"}
        noise = METRIC[stat].group in ("gap", "noise") and "ln" not in METRIC[stat].label
        kind = "sigma²" if noise else unit[1] if unit else own.get(stat, stat)
        rows.setdefault(kind, []).append(stat)
    return list(rows.values())


def evidence(series: Series, *, compact: bool = False, palette: Palette = PALETTES["light"]) -> go.Figure:
    """What does the finding rest on?

    The statistics of the finding's own question over steps, those of one unit in one panel: means over buckets of
    steps, bands are their extremes.
    """
    if not series.steps:
        return without_data("No rows in these steps.", palette, height=_ROW + 76)
    steps = np.asarray(series.steps)
    rows = rows_by_unit(list(series.series))
    layout: Part = {
        "height": len(rows) * _ROW + (len(rows) - 1) * 44 + 76,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "annotations": [],
        "meta": {"caption": ""},
    }
    traces: list[Part] = []
    for row, (stats, domain) in enumerate(zip(rows, stacked([_ROW] * len(rows)), strict=True), 1):
        number = "" if row == 1 else str(row)
        axes = {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}"}
        for stat, color in zip(stats, palette.series, strict=False):
            hover = f"{stat} <b>%{{y:.4~g}}</b><extra></extra>"
            traces += line_and_band(steps, series.series[stat], color, axes, name=stat, hover=hover)
        keys = [
            key(stat if compact else f"{stat}: {plain(METRIC[stat].label)}", color)
            for stat, color in zip(stats, palette.series, strict=False)
        ]
        layout["annotations"].append(title("  ".join(keys), row, palette))
        layout[f"xaxis{number}"] = {"anchor": f"y{number}", "title": {"text": "step" if row == len(rows) else ""}}
        if row > 1:
            layout[f"xaxis{number}"]["matches"] = "x"
        layout[f"yaxis{number}"] = {"domain": domain, "anchor": f"x{number}", "nticks": 5}
    return assemble(traces, layout, palette)
