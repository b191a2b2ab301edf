"""The layer map: one statistic as a heatmap, layers x steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import METRIC
from dashboard.figures.frame import Bools, Part, assemble, finite, nonfinite, plain, short, without_data
from dashboard.figures.palette import PALETTES, Palette
from dashboard.figures.scales import scale
from service.schemas import Heatmap

_MOST_NAMES: Final = 60
"""Layer names that fit beside the tallest map; of more layers every second, third, ... is named."""


def height(layers: int) -> int:
    """Of the map, in pixels."""
    row = 26 if layers <= 12 else 20 if layers <= 30 else 14
    return min(940, 92 + max(3, layers) * row)


def layer_map(
    heatmap: Heatmap, *, selected: int | None = None, compact: bool = False, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """Which layers does it happen in, and since when?

    One row a layer in the order of the network, one column a bucket of steps. The colour scale is fixed by what the
    statistic means (`dashboard.figures.scales`). A cell with NaN or infinity has the alarm colour, and its layer an ✕
    where that began; a cell without rows shows the background.

    Args:
        heatmap: one statistic.
        selected: index of the layer to outline.
        compact: short layer names, for a narrow screen.
        palette: colours.
    """
    metric = METRIC[heatmap.stat]
    count = len(heatmap.layers)
    if not heatmap.steps or not count:
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=height(count))
    values = np.array([finite(row) for row in heatmap.values])
    broken = np.array([nonfinite(row) for row in heatmap.values])
    shown = scale(metric, values, palette)
    names = _distinct(heatmap.layers)
    cells = {"type": "heatmap", "x": heatmap.steps, "y": names, "ygap": 1 if count <= _MOST_NAMES else 0}
    trace = cells | {
        "z": short(shown.z),
        "zmin": shown.low,
        "zmax": shown.high,
        "colorscale": shown.colors,
        "customdata": short(values),
        "hoverongaps": False,
        "name": metric.name,
        "hovertemplate": "%{y}<br>step %{x:,}<br>"
        f"{plain(metric.label)}: <b>%{{customdata:{shown.number}}}</b><extra></extra>",
        "colorbar": {
            "orientation": "h",
            "x": 0,  # plotly's buttons appear at the right
            "xanchor": "left",
            "y": 1,
            "yref": "container",  # relative to the plot it would push the top margin open
            "yanchor": "top",
            "ypad": 2,
            "len": 0.98 if compact else 0.5,
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": shown.ticks,
            "ticktext": shown.labels,
            "tickfont": {"size": 11, "color": palette.muted},
        },
    }
    outline = {
        "type": "rect",
        "xref": "x domain",
        "x0": 0,
        "x1": 1,
        "yref": "y",
        "line": {"color": palette.text, "width": 2},
        "name": "selected layer",
    }
    every = math.ceil(count / _MOST_NAMES)
    layout = {
        "height": height(count),
        "margin": {"l": 40, "r": 20, "t": 38, "b": 44},
        "plot_bgcolor": palette.missing,
        "xaxis": {"title": {"text": "step"}, "showgrid": False},
        "yaxis": {
            "type": "category",
            "autorange": "reversed",
            "automargin": True,
            "showgrid": False,
            "ticks": "outside",
            "ticklen": 6,
            "tickcolor": "rgba(0,0,0,0)",
            "tickvals": names[::every],
            "ticktext": [plain(name, 14 if compact else 28) for name in heatmap.layers[::every]],
        },
        "shapes": [outline | {"y0": selected - 0.5, "y1": selected + 0.5}]
        if selected is not None and selected < count
        else [],
        "meta": {"caption": metric.meaning},
    }
    return assemble([trace, *_nonfinite_cells(cells, broken, palette)], layout, palette)


def _nonfinite_cells(cells: Part, broken: Bools, palette: Palette) -> list[Part]:
    rows = [i for i in range(len(broken)) if broken[i].any()]
    if not rows:
        return []
    overlay = cells | {
        "z": np.where(broken, 1.0, np.nan).astype(np.float32),
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "colorscale": [(0, palette.alarm), (1, palette.alarm)],
        "hoverongaps": False,
        "name": "not finite",
        "hovertemplate": "%{y}<br>step %{x:,}<br><b>NaN or infinite</b><extra></extra>",
    }
    marks = {
        "type": "scatter",
        "x": [cells["x"][int(np.argmax(broken[i]))] for i in rows],
        "y": [cells["y"][i] for i in rows],
        "mode": "markers",
        "name": "first not finite",
        "showlegend": False,
        "marker": {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": palette.surface}},
        "hovertemplate": "%{y}<br>NaN or infinite since step %{x:,}<extra></extra>",
    }
    return [overlay, marks]


def _distinct(names: Sequence[str]) -> list[str]:
    """Escaped names as axis categories; equal ones would share a row."""
    return [
        plain(name) if names.count(name) == 1 else f"{plain(name)} (layer {index})" for index, name in enumerate(names)
    ]
