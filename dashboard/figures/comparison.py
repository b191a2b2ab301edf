"""Runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboard.figures.frame import (
    Floats,
    Part,
    assemble,
    band,
    key,
    plain,
    short,
    stacked,
    title,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette, translucent

_ROW: Final = 230
_DASHES: Final = ("solid", "5px,3px", "2px,2px")
_GRID: Final = 200


@dataclass(frozen=True, slots=True)
class Curve:
    """One run in one panel; `group` is what it is averaged with, None for a line of its own."""

    run: str
    name: str
    group: str | None
    x: Floats
    y: Floats


@dataclass(frozen=True, slots=True)
class Panel:
    """What is compared, with its unit, and whether its axis is logarithmic."""

    title: str
    curves: tuple[Curve, ...]
    log: bool = False


def style(index: int, palette: Palette) -> Part:
    """The line of the run at this place: five colours, then the same dashed, then dotted."""
    colors = palette.series
    return {"color": colors[index % len(colors)], "dash": _DASHES[index // len(colors) % len(_DASHES)]}


def comparison(
    panels: Sequence[Panel], *, by_fraction: bool, compact: bool = False, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """Which of these runs goes better, and does its normalization differ?

    One panel a quantity over steps, or over the share of the planned steps; a line a run in the order given, or, where
    runs have groups, a line for the mean of a group with a band of its extremes. A compact one has no room for names.
    """
    filled = [panel for panel in panels if any(len(curve.x) for curve in panel.curves)]
    if not filled:
        return without_data("None of these runs has rows of this yet.", palette, height=_ROW)
    layout: Part = {
        "height": len(filled) * _ROW + (len(filled) - 1) * 44 + 76,
        "margin": {"l": 64, "r": 20, "t": 32, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "annotations": [],
        "meta": {"caption": ""},
    }
    traces: list[Part] = []
    for row, (panel, domain) in enumerate(zip(filled, stacked([_ROW] * len(filled)), strict=True), 1):
        number = "" if row == 1 else str(row)
        axes = {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}"}
        groups = list(dict.fromkeys(curve.group for curve in panel.curves if curve.group is not None))
        if groups:
            for i, group in enumerate(groups):
                own = [curve for curve in panel.curves if curve.group == group and len(curve.x)]
                traces += [axes | part for part in _group(group, own, style(i, palette), by_fraction)]
            keys = "  ".join(key(plain(g, 24), style(i, palette)["color"]) for i, g in enumerate(groups[:6]))
        else:
            few = panel.curves if row == 1 and len(panel.curves) <= 6 and not compact else ()  # the table has them too
            keys = "  ".join(key(plain(c.name, 24), style(i, palette)["color"]) for i, c in enumerate(few))
            traces += [
                axes | _line(curve, style(i, palette), by_fraction, thin=len(panel.curves) > 8)
                for i, curve in enumerate(panel.curves)
            ]
        heading = plain(panel.title, 60) + (f": {keys}" if keys else "")
        layout["annotations"].append(title(heading, row, palette))
        axis: Part = {"anchor": f"y{number}"}
        if row > 1:
            axis["matches"] = "x"
        if by_fraction:
            axis |= {"tickformat": ".0%", "hoverformat": ".1%"}
        if row == len(filled):
            axis["title"] = {"text": "share of the planned steps" if by_fraction else "step"}
        layout[f"xaxis{number}"] = axis
        layout[f"yaxis{number}"] = {"domain": domain, "anchor": f"x{number}", "nticks": 6}
        if panel.log:
            layout[f"yaxis{number}"] |= {"type": "log", "tickformat": "~g", "dtick": _log_ticks(panel)}
    return assemble(traces, layout, palette)


def _log_ticks(panel: Panel) -> str | int | None:
    """1, 2 and 5 of each decade where there are few, else one tick in so many decades: all nine would overlap.

    None, plotly's own choice, within half a decade.
    """
    y = np.concatenate([curve.y for curve in panel.curves])
    y = y[np.isfinite(y) & (y > 0)]
    decades = float(np.log10(y.max() / y.min())) if len(y) else 0.0
    if decades < 0.5:
        return None
    return "D2" if decades <= 3 else int(np.ceil(decades / 6))


def _line(curve: Curve, look: Part, by_fraction: bool, *, thin: bool) -> Part:
    at = "%{x:.1%} of the steps" if by_fraction else "step %{x:,}"
    return {
        "x": curve.x,
        "y": short(curve.y),
        "mode": "lines" if len(curve.x) > 1 else "markers",
        "line": look | {"width": 1.2 if thin else 1.7},
        "name": plain(curve.name, 60),
        "hovertemplate": f"{plain(curve.name, 60)}<br>{at}<br><b>%{{y:.4~g}}</b><extra></extra>",
    }


def _group(group: str, curves: Sequence[Curve], look: Part, by_fraction: bool) -> list[Part]:
    """Mean and extremes over runs, where at least half of them are."""
    if not curves:
        return []
    low, high = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)
    grid = np.linspace(low, high, _GRID) if high > low else np.array([low])
    each = np.array([np.interp(grid, c.x, c.y, left=np.nan, right=np.nan) for c in curves])
    enough = np.sum(~np.isnan(each), 0) * 2 >= len(curves)
    grid, each = grid[enough], each[:, enough]
    if not len(grid):
        return []
    extremes = band(grid, np.nanmin(each, 0), np.nanmax(each, 0)) if len(curves) > 1 else None
    fill = {"fill": "toself", "mode": "none", "fillcolor": translucent(look["color"], 0.13), "hoverinfo": "skip"}
    name = f"{plain(group, 60)} ({len(curves)} run{'' if len(curves) == 1 else 's'})"
    line = _line(Curve("", "", None, grid, np.nanmean(each, 0)), look, by_fraction, thin=False)
    line["name"] = name
    line["hovertemplate"] = line["hovertemplate"].replace("<br>", f"{name}<br>", 1)
    return [*([extremes | fill | {"name": f"{name}, extremes"}] if extremes else []), line]
