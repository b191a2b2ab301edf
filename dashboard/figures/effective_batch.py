"""The effective batch size: how many independent samples a batch is worth."""

from __future__ import annotations

from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.frame import Floats, Part, assemble, finite, key, line_mode, rolling, short, title, without_data
from dashboard.figures.palette import PALETTES, Palette
from service.schemas import Probe, Series

STATISTICS: Final = ("samples", "mean_diff1", "mean_noise")
"""What `effective_batch` needs of `Series`."""

WINDOW_STEPS: Final = 100
"""Recorded steps over which ratios are formed: those of single steps are noise."""

HEIGHT: Final = 300


def effective_samples(samples: Floats, ratio: Floats) -> Floats:
    """1 + (N - 1) / F, F the variance between batch means over the sampling noise (docs/findings.md, NH-CLUSTER)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 + (samples - 1) / ratio


def effective_batch(
    series: Series, probe: Probe | None = None, *, compact: bool = False, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """How many independent samples is a batch worth, of those it has?

    m_eff = 1 + (N - 1) / F over steps, from the batch means of the layer and, where it is recorded, from the input
    probe, beside the nominal N. Behind a batch-normalized layer batch means are pinned: there the layer's own line
    flatters, and the probe's is to be believed.
    """
    samples = finite(series.series["samples"].mean) if series.steps else np.empty(0)
    if not series.steps or np.isnan(samples).all():
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=HEIGHT)
    steps = np.asarray(series.steps)
    points = max(1, round(WINDOW_STEPS / series.bucket_steps))
    fast, noise = (finite(series.series[name].mean) for name in STATISTICS[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        layer = effective_samples(samples, rolling(fast, points) / rolling(noise, points))
    layer[: min(points, len(layer) // 4)] = np.nan  # windows that are not full yet
    axes: Part = {"type": "scatter"}
    traces = [
        axes
        | {
            "x": steps,
            "y": short(samples),
            "mode": line_mode(steps),
            "line": {"color": palette.limit, "width": 1.4, "dash": "5px,3px"},
            "name": "samples in the batch",
            "hovertemplate": "nominal <b>%{y:.4~g}</b> samples<extra></extra>",
        },
        axes
        | {
            "x": steps,
            "y": short(layer),
            "mode": line_mode(steps),
            "line": {"color": palette.series[0], "width": 1.7},
            "name": "effective, by this layer",
            "hovertemplate": "by this layer worth <b>%{y:.3~g}</b> samples<extra></extra>",
        },
    ]
    keys = [
        key("nominal", palette.limit),
        key("by this layer" if compact else "by this layer's batch means", palette.series[0]),
    ]
    caption = _worth("this layer's batch means", layer, samples)
    windows = [] if probe is None else [w for w in probe.windows if w.between is not None and w.between > 0]
    if windows:
        at = np.array([window.last_step for window in windows])
        nominal = np.interp(at, steps[~np.isnan(samples)], samples[~np.isnan(samples)])
        ratio = np.array([window.between or np.nan for window in windows])
        known = effective_samples(nominal, ratio)
        traces.append(
            axes
            | {
                "x": at,
                "y": short(known),
                "mode": "lines+markers" if len(at) > 1 else "markers",
                "line": {"color": palette.series[1], "width": 1.7, "shape": "linear"},
                "marker": {"size": 5},
                "name": "effective, by the input probe",
                "hovertemplate": "by the input probe worth <b>%{y:.3~g}</b> samples<extra></extra>",
            }
        )
        keys.append(
            key("by the input" if compact else "by the input probe (100 recorded steps a point)", palette.series[1])
        )
        caption = f"{_worth('the input probe', known, nominal)} {caption}"
    top = 1.25 * float(np.nanmax(samples))
    layout = {
        "height": HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "samples"}, "range": [0, top], "nticks": 6},
        "annotations": [title("  ".join(keys), 1, palette)],
        "meta": {"caption": caption},
    }
    return assemble(traces, layout, palette)


def _worth(source: str, effective: Floats, nominal: Floats) -> str:
    there = np.flatnonzero(np.isfinite(effective))
    if not len(there):
        return f"By {source} nothing can be said yet."
    size = float(nominal[min(there[-1], len(nominal) - 1)])
    worth = min(float(effective[there[-1]]), size)
    return f"By {source} a batch of {size:.4g} is worth {worth:.3g} independent samples."
