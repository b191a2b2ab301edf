"""How far ranks differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.frame import (
    Part,
    assemble,
    finite,
    key,
    line_mode,
    plain,
    short,
    stacked,
    title,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette, translucent
from service.schemas import Ranks, Series

CURVES: Final = 8
"""Ranks of which a layer's curves are drawn."""

STATISTICS: Final = ("mu_b", "sigma_b")
_ROW: Final = 160
CURVES_HEIGHT: Final = 2 * _ROW + 44 + 76


def shown_ranks(world_size: int, always: Sequence[int] = ()) -> list[int]:
    """The ranks to draw of so many, in order: those that it is about, and the first others, `CURVES` in all."""
    others = [rank for rank in range(world_size) if rank not in always]
    about = sorted(always)[:CURVES]
    return sorted([*about, *others[: CURVES - len(about)]])


def height(layers: int) -> int:
    """Of the spread, in pixels."""
    return min(900, 110 + max(3, layers) * (26 if layers <= 16 else 15))


def rank_spread(ranks: Ranks, *, compact: bool = False, palette: Palette = PALETTES["light"]) -> go.Figure:
    """Do ranks see the same data, in which layers do they not, and which rank stands apart?

    Two panels with one row a layer in the network's order: the standard deviation over ranks of their mean mu_B, in
    sigma_B, and of their ln sigma_B. The farthest rank of each layer is named.
    """
    mu, sigma = finite(ranks.mu_spread), finite(ranks.sigma_spread)
    tall = height(len(ranks.layers))
    if ranks.world_size < 2 and len(ranks.ranks) < 2:
        return without_data("This run has one rank: there is nothing to compare.", palette, height=160)
    if not len(mu) or (np.isnan(mu).all() and np.isnan(sigma).all()):
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=160)
    rows = list(range(len(ranks.layers)))
    hover = "%{text}<br>spread %{x:.3~g}<br>farthest: rank %{customdata[0]}, at %{customdata[1]:.3~g}<extra></extra>"
    far = np.array(
        [
            [-1 if who is None else who, 0 if much is None else much]
            for who, much in zip(ranks.farthest_rank, ranks.farthest_distance, strict=True)
        ]
    )
    traces: list[Part] = []
    for i, (values, color) in enumerate(((mu, palette.d), (sigma, palette.r)), 1):
        traces.append(
            {"type": "bar", "orientation": "h", "xaxis": f"x{i}", "yaxis": f"y{i}", "y": rows, "x": short(values)}
            | {"marker": {"color": translucent(color, 0.75)}, "customdata": far, "hovertemplate": hover, "width": 0.7}
            | {"text": [plain(name) for name in ranks.layers], "textposition": "none", "name": STATISTICS[i - 1]}
        )
    apart = ranks.outlier.rank if ranks.outlier is not None else None
    named = len(ranks.ranks) > 2 and len(rows) <= 40  # of two, both are equally far from their middle
    names = [
        {
            "x": float(np.nan_to_num(sigma[i])),
            "y": i,
            "xref": "x2",
            "yref": "y2",
            "xanchor": "left",
            "xshift": 4,
            "showarrow": False,
            "text": f"rank {who}",
            "font": {"size": 11, "color": palette.alarm if who == apart else palette.muted},
        }
        for i, who in enumerate(ranks.farthest_rank)
        if who is not None and named
    ]
    every = max(1, len(rows) // 60)
    common = {"autorange": "reversed", "showgrid": False, "tickvals": rows[::every], "zeroline": False}
    common |= {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
    labels = [plain(name, 12 if compact else 28) for name in ranks.layers][::every]
    top = [1.25 * max(float(np.nanmax(values, initial=0)), 1e-3) for values in (mu, sigma)]
    axis = {"tickformat": ".2~g", "hoverformat": ".3~g", "nticks": 5, "rangemode": "tozero"}
    layout = {
        "height": tall,
        "margin": {"l": 20, "r": 24, "t": 32, "b": 44},
        "bargap": 0.3,
        "showlegend": False,
        "xaxis": axis | {"domain": [0, 0.47], "anchor": "y", "title": {"text": "σ_B"}, "range": [0, top[0]]},
        "xaxis2": axis | {"domain": [0.53, 1], "anchor": "y2", "title": {"text": "ln σ_B"}, "range": [0, top[1]]},
        "yaxis": common | {"anchor": "x", "automargin": True, "ticktext": labels},
        "yaxis2": common | {"anchor": "x2", "showticklabels": False, "matches": "y"},
        "annotations": [
            title("Spread of μ_B" if compact else "Spread of batch means μ_B over ranks", 1, palette),
            title("Spread of σ_B" if compact else "Spread of batch deviations σ_B over ranks", 2, palette),
            *names,
        ],
        "meta": {"caption": _caption(ranks)},
    }
    return assemble(traces, layout, palette)


def _caption(ranks: Ranks) -> str:
    steps = f"Steps {ranks.from_step:,} to {ranks.to_step:,}: "
    if ranks.outlier is None:
        few = sum(rank.last_step is not None for rank in ranks.ranks) < 3
        return steps + ("with fewer than three ranks none is in the majority." if few else "no rank stands apart.")
    other = f", the others' is {ranks.outlier.others:.2g}" if ranks.outlier.others is not None else ""
    return (
        f"{steps}rank {ranks.outlier.rank} stands apart in most layers: "
        f"its median distance is {ranks.outlier.distance:.2g}{other}."
    )


def rank_curves(curves: Sequence[Series], *, compact: bool = False, palette: Palette = PALETTES["light"]) -> go.Figure:
    """Since when does a rank see other data than the rest?

    Batch mean and deviation of one layer over steps, one line a rank (of `shown_ranks`), means over buckets.
    """
    drawn = [series for series in curves if series.steps]
    if not drawn:
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=CURVES_HEIGHT)
    layout: Part = {
        "height": CURVES_HEIGHT,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "hovermode": "x unified",
        "showlegend": False,
        "meta": {"caption": ""},
    }
    traces: list[Part] = []
    colors = palette.series
    for i, series in enumerate(drawn):
        steps = np.asarray(series.steps)
        line = {"color": colors[i % len(colors)], "width": 1.5, "dash": "solid" if i < len(colors) else "4px,2px"}
        for row, stat in enumerate(STATISTICS, 1):
            traces.append(
                {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}", "x": steps, "line": line}
                | {"y": short(finite(series.series[stat].mean)), "mode": line_mode(steps)}
                | {
                    "name": f"rank {series.rank}",
                    "hovertemplate": f"rank {series.rank} <b>%{{y:.4~g}}</b><extra></extra>",
                }
            )
    keys = "  ".join(
        key(f"{s.rank}" if compact else f"rank {s.rank}", colors[i % len(colors)]) for i, s in enumerate(drawn)
    )
    for row, (text, domain) in enumerate(zip((f"μ_B: {keys}", "σ_B"), stacked((_ROW, _ROW)), strict=True), 1):
        number = "" if row == 1 else str(row)
        layout[f"xaxis{number}"] = {"anchor": f"y{number}", "title": {"text": "step" if row == 2 else ""}}
        layout[f"yaxis{number}"] = {"domain": domain, "anchor": f"x{number}", "nticks": 5}
        layout.setdefault("annotations", []).append(title(text, row, palette))
        layout[f"yaxis{number}"]["title"] = {"text": "activation"}
    layout["xaxis2"]["matches"] = "x"
    return assemble(traces, layout, palette)
