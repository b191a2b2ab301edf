"""Single channels of a layer, from snapshots."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import METRIC
from dashboard.figures.frame import Part, assemble, finite, key, short, signed, title, without_data
from dashboard.figures.palette import PALETTES, Palette, translucent
from dashboard.figures.scales import scale
from service.answers import History
from service.schemas import Channels

ChannelStatistic = Literal["gap", "r", "d"]

HEIGHT: Final = 360
_NONE: Final = "No snapshot of single channels yet: the recorder takes one every `channels_every` steps."
_SCALES: Final = {"gap": "gap", "r": "r_q50", "d": "d_q50"}
_SAYS: Final = {
    "gap": "(r − 1)² + d² of every channel: how far inference is from batch normalization on this batch.",
    "r": "r = σ_B / σ of every channel; 1 is no effect.",
    "d": "d = (μ_B − μ) / σ of every channel; 0 is no effect.",
}
_LABELS: Final = {"gap": "gap (σ²)", "r": "r (ratio)", "d": "d (σ)"}


def channel_map(
    history: History, statistic: ChannelStatistic = "gap", *, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """Which channels of this layer are off, and since when?

    One row a channel, one column a snapshot; the colours mean what they mean in the layer map. Cells that are NaN or
    infinite have the alarm colour.
    """
    if not history.steps:
        return without_data(_NONE, palette, height=HEIGHT)
    r_CT, d_CT = history.r_CT, history.d_CT
    with np.errstate(all="ignore"):
        values_CT = {"gap": (r_CT - 1) ** 2 + d_CT**2, "r": r_CT, "d": d_CT}[statistic]
    broken_CT = ~np.isfinite(values_CT)
    shown = scale(METRIC[_SCALES[statistic]], np.where(broken_CT, np.nan, values_CT), palette)
    # Snapshots as categories: their steps may be far apart, and a cell each is what there is to see.
    cells: Part = {"type": "heatmap", "x": [f"{step:,}" for step in history.steps], "y": list(range(len(r_CT)))}
    colorbar = {
        "thickness": 10,
        "outlinewidth": 0,
        "tickvals": shown.ticks,
        "ticktext": shown.labels,
        "tickfont": {"size": 11, "color": palette.muted},
        "len": 1,
    }
    traces = [
        cells
        | {
            "z": short(shown.z),
            "zmin": shown.low,
            "zmax": shown.high,
            "colorscale": shown.colors,
            "customdata": short(values_CT),
            "hoverongaps": False,
            "name": statistic,
            "hovertemplate": f"channel %{{y}}<br>step %{{x}}<br>{_LABELS[statistic]}: <b>%{{customdata:.4~g}}</b>"
            "<extra></extra>",
            "colorbar": colorbar,
        }
    ]
    if broken_CT.any():
        traces.append(
            cells
            | {
                "z": np.where(broken_CT, 1.0, np.nan).astype(np.float32),
                "colorscale": [(0, palette.alarm), (1, palette.alarm)],
                "showscale": False,
                "hoverongaps": False,
                "name": "not finite",
                "hovertemplate": "channel %{y}<br>step %{x}<br><b>NaN or infinite</b><extra></extra>",
            }
        )
    layout = {
        "height": HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 12, "b": 44},
        "plot_bgcolor": palette.missing,
        "xaxis": {"type": "category", "nticks": 8, "showgrid": False, "title": {"text": "step of the snapshot"}},
        "yaxis": {"autorange": "reversed", "showgrid": False, "title": {"text": "channel"}, "tickformat": "d"},
        "meta": {"caption": _SAYS[statistic]},
    }
    return assemble(traces, layout, palette)


def channel_scatter(
    channels: Channels, r_max: float, d_max: float, *, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """Which channels lie outside the limits, by scale or by mean?

    Every channel of the layer at one snapshot, d against r, with the limits in force as a box: what lies outside is
    clipped. Batch normalization's box is the point r = 1, d = 0.
    """
    if channels.values is None or channels.step is None:
        return without_data(_NONE, palette, height=HEIGHT)
    r, d = finite(channels.values["r"]), finite(channels.values["d"])
    inside = (r >= 1 / r_max - 1e-6) & (r <= r_max + 1e-6) & (np.abs(d) <= d_max + 1e-6)
    known = ~(np.isnan(r) | np.isnan(d))
    lost = int(np.sum(~known))
    closed = r_max <= 1 and d_max <= 0
    groups = [("inside", inside & known, palette.r, "circle"), ("clipped", ~inside & known, palette.d, "diamond")]
    traces: list[Part] = [
        {
            "type": "scatter",
            "x": short(d[chosen]),
            "y": short(r[chosen]),
            "customdata": np.flatnonzero(chosen),
            "mode": "markers",
            "name": name if not closed else "channel",
            "marker": {
                "size": 7,
                "symbol": "circle" if closed else symbol,
                "color": translucent(palette.r if closed else color, 0.6),
                "line": {"width": 0.5, "color": palette.surface},
            },
            "hovertemplate": "channel %{customdata}<br>r <b>%{y:.4~g}</b><br>d <b>%{x:.4~g}</b> σ<extra></extra>",
        }
        for name, chosen, color, symbol in groups
        if chosen.any()
    ]
    box = {
        "type": "rect",
        "x0": -d_max,
        "x1": d_max,
        "y0": 1 / r_max,
        "y1": r_max,
        "line": {"color": palette.limit, "width": 1.4, "dash": "5px,3px"},
        "name": "limits",
    }
    reach_d = max(1.15 * float(np.nanmax(np.abs(d), initial=0.05)), 0.05)
    reach_r = max(float(np.nanmax(np.abs(np.log2(np.maximum(r, 1e-6))), initial=0.1)), 0.1) * 1.15
    outside = int(np.sum(~inside))
    where = "the limits are shut (r = 1, d = 0): nothing is corrected" if closed else f"{outside:,} outside the limits"
    alarm = f", {lost:,} of them NaN or infinite" if lost else ""
    keys = f"{key('inside', palette.r)}  {key('clipped', palette.d)}"
    if d_max < reach_d or np.log2(r_max) < reach_r:
        keys += "  ┄ limits"
    layout = {
        "height": HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "showlegend": False,
        "xaxis": {
            "title": {"text": "d = (μ_B − μ) / σ (σ)"},
            "range": [-reach_d, reach_d],
            "tickformat": ".3~g",
            "hoverformat": ".3~g",
            "uirevision": channels.step,
        },
        "yaxis": {
            "title": {"text": "r = σ_B / σ (ratio)"},
            "type": "log",
            "range": [-reach_r * float(np.log10(2)), reach_r * float(np.log10(2))],
            "tickformat": ".3~g",
            "nticks": 6,
            "uirevision": channels.step,
        },
        "shapes": [] if closed else [box],
        "annotations": [] if closed else [title(keys, 1, palette)],
        "meta": {"caption": f"{len(r):,} channels at step {channels.step:,}: {where}{alarm}.{_farthest(channels)}"},
    }
    return assemble(traces, layout, palette)


def _farthest(channels: Channels) -> str:
    if not channels.worst:
        return ""
    first = channels.worst[0]
    r, d = ("–" if value is None else signed(value) for value in (first.r, first.d))
    return f" Farthest: channel {first.channel}, r = {r}, d = {d} σ."
