"""The input probe: what of the data itself the rules look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.frame import Part, assemble, finite, key, line_mode, short, title, without_data
from dashboard.figures.palette import PALETTES, Palette
from service.schemas import Probe

HEIGHT: Final = 236


def clustering(probe: Probe, *, palette: Palette = PALETTES["light"]) -> go.Figure:
    """Are batches random draws of the data?

    F of the input probe, the variance between batch means over their sampling noise, one point a window of 100
    recorded steps; 1, the dashed line, is what independent samples give.
    """
    there = [window for window in probe.windows if window.between is not None]
    if not there:
        return without_data("The input probe has no window of 100 recorded steps here.", palette, height=HEIGHT)
    at = np.array([window.last_step for window in there])
    line = {"color": palette.series[0], "width": 1.7}
    traces: list[Part] = [
        {"type": "scatter", "x": at, "y": short(finite([window.between for window in there])), "line": line}
        | {"mode": "lines+markers" if len(at) > 1 else "markers", "name": "F of the input probe"}
        | {"hovertemplate": "F <b>%{y:.4~g}</b>, 1 is independent<extra></extra>"}
    ]
    layout = _layout("F of the input probe (ratio)", "ratio", palette)
    layout["shapes"] = [
        {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": 1, "y1": 1}
        | {"line": {"color": palette.limit, "width": 1.5, "dash": "5px,3px"}, "name": "independent samples"}
    ]
    layout["yaxis"]["rangemode"] = "tozero"
    return assemble(traces, layout, palette)


def inputs_of_ranks(probes: Sequence[Probe], *, palette: Palette = PALETTES["light"]) -> go.Figure:
    """Do ranks draw the same data?

    The mean over a rank's batch of the probe's feature in which these ranks differ most, a line a rank, means over
    buckets of steps: lines that keep apart are ranks with other data, lines that coincide are ranks with the same.
    """
    drawn = [probe for probe in probes if probe.steps]
    if not drawn:
        return without_data("The input probe has no rows here.", palette, height=HEIGHT)
    means_KF = np.array([[np.nanmean(finite(values)) for values in probe.mean] for probe in drawn])
    feature = int(np.argmax(np.ptp(means_KF, axis=0)))
    colors = palette.series
    traces: list[Part] = []
    for i, probe in enumerate(drawn):
        steps = np.asarray(probe.steps)
        line = {"color": colors[i % len(colors)], "width": 1.5, "dash": "solid" if i < len(colors) else "4px,2px"}
        traces.append(
            {"type": "scatter", "x": steps, "y": short(finite(probe.mean[feature])), "mode": line_mode(steps)}
            | {"line": line, "name": f"rank {probe.rank}"}
            | {"hovertemplate": f"rank {probe.rank} <b>%{{y:.4~g}}</b><extra></extra>"}
        )
    keys = "  ".join(key(f"rank {probe.rank}", colors[i % len(colors)]) for i, probe in enumerate(drawn))
    return assemble(traces, _layout(f"Batch mean of probe feature {feature}: {keys}", "feature", palette), palette)


def _layout(heading: str, unit: str, palette: Palette) -> Part:
    return {
        "height": HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": unit}, "nticks": 5},
        "annotations": [title(heading, 1, palette)],
        "meta": {"caption": ""},
    }
