"""What all figures share: the look of axes, text from users, arrays from answers, and the figure without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dashboard.figures.palette import Palette, translucent
from service.schemas import Buckets

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Part: TypeAlias = dict[str, Any]
"""A trace, shape, annotation or axis in Plotly's own words; `assemble` validates them all at once."""

FONT: Final = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'


def assemble(traces: Sequence[Part], layout: Part, palette: Palette) -> go.Figure:
    """A figure in our look.

    `uirevision` never changes, so that an update keeps zoom and selection; an axis to start afresh has its own.
    """
    return go.Figure(data=list(traces), layout={"template": _template(palette), "uirevision": "keep", **layout})


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps a page looks at.

    Attributes:
        first, last: ends of the x axes; None: all there are.
        marked: first and last step to shade.
    """

    first: int | None = None
    last: int | None = None
    marked: tuple[int, int] | None = None


def in_view(figure: go.Figure, steps: Steps, palette: Palette) -> go.Figure:
    """A figure over steps with its x axes at the steps a page looks at, and the marked ones shaded.

    Another range is another `uirevision`, so that it takes the place of a zoom by hand; the same one leaves that alone.
    """
    layout = figure.layout.to_plotly_json()
    axes = [(name, axis) for name, axis in layout.items() if name.startswith("xaxis")]
    for name in layout:
        if name.startswith("yaxis"):  # a drag chooses steps: a page has no way back from a cropped y axis
            figure.layout[name].fixedrange = True
    shapes: list[Part] = []
    for name, axis in axes:
        if axis.get("visible") is False:
            continue
        if steps.first is not None and steps.last is not None:
            figure.layout[name].range = [steps.first, steps.last]
        figure.layout[name].uirevision = f"{steps.first}-{steps.last}"
        if steps.marked is not None:
            shapes.append(
                {
                    "type": "rect",
                    "layer": "below",
                    "xref": name.replace("axis", ""),
                    "x0": steps.marked[0],
                    "x1": steps.marked[1],
                    "yref": f"{axis.get('anchor', 'y')} domain",
                    "y0": 0,
                    "y1": 1,
                    "fillcolor": translucent(palette.alarm, 0.09),
                    "line": {"width": 1, "color": translucent(palette.alarm, 0.5)},
                    "name": "where it was seen",
                }
            )
    for text in figure.layout.annotations:
        if steps.first is not None and text.xref == "x" and text.x is not None and text.x < steps.first:
            text.x = steps.first  # the name of a phase that began before
    if shapes:
        figure.layout.shapes = (*figure.layout.shapes, *shapes)
    return figure


def rolling(values: Floats, points: int) -> Floats:
    """Mean over the newest `points` of the finite values up to each; NaN where the value itself is none."""
    if points <= 1 or not len(values):
        return values
    there = np.isfinite(values)
    total = np.cumsum(np.where(there, values, 0.0))
    count = np.cumsum(there)
    total[points:], count[points:] = total[points:] - total[:-points], count[points:] - count[:-points]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, total / count, np.nan)


def stacked(heights: Sequence[int], between: int = 44) -> list[tuple[float, float]]:
    """Domains, in shares of the whole, of rows of these heights in pixels, from the top."""
    inner = sum(heights) + between * (len(heights) - 1)
    tops = [sum(heights[:i]) + between * i for i in range(len(heights))]
    return [(max(0.0, 1 - (top + own) / inner), 1 - top / inner) for top, own in zip(tops, heights, strict=True)]


def title(text: str, axis: int, palette: Palette) -> Part:
    """A heading above a panel, at its left."""
    number = "" if axis == 1 else str(axis)
    return {
        "text": text,
        "x": 0,
        "xref": f"x{number} domain",
        "xanchor": "left",
        "y": 1,
        "yref": f"y{number} domain",
        "yanchor": "bottom",
        "yshift": 6,
        "showarrow": False,
        "font": {"size": 12, "color": palette.text},
    }


def key(label: str, color: str) -> str:
    """An entry of a legend that stands in a heading. The label is ours, or escaped."""
    return f'<span style="color:{color}">━ {label}</span>'


def without_data(text: str, palette: Palette, *, height: int) -> go.Figure:
    """The figure of a run that has nothing to draw yet: it says so. A page says `meta.empty` and draws nothing."""
    return assemble(
        [],
        {
            "height": height,
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "annotations": [{"text": text, "showarrow": False, "font": {"size": 13, "color": palette.muted}}],
            "meta": {"caption": "", "empty": text},
        },
        palette,
    )


@cache
def _template(palette: Palette) -> go.layout.Template:
    axis = {
        "gridcolor": palette.grid,
        "linecolor": palette.grid,
        "zeroline": False,
        "tickfont": {"size": 11, "color": palette.muted},
        "title": {"font": {"size": 12, "color": palette.muted}, "standoff": 8},
    }
    font = {"family": FONT, "size": 12, "color": palette.text}
    return go.layout.Template(
        layout={
            "font": font,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 64, "r": 20, "t": 36, "b": 44},
            "xaxis": {**axis, "tickformat": ",d", "hoverformat": ",d", "nticks": 8},
            "yaxis": {
                **axis,
                "ticks": "outside",
                "ticklen": 5,
                "tickcolor": "rgba(0,0,0,0)",
            },  # no 0 beside the x axis's 0
            "hoverlabel": {"bgcolor": palette.surface, "bordercolor": palette.muted, "font": font},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": palette.muted, "activecolor": palette.text},
        }
    )


def plain(text: str, longest: int | None = None) -> str:
    """A user's text for a place where Plotly reads markup; cut in the middle to `longest` characters."""
    if longest is not None and len(text) > longest:
        head = (longest - 1) // 2
        text = f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%&#123;")


def signed(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def finite(values: Sequence[float | None]) -> Floats:
    """As an array; NaN where missing or not finite."""
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def nonfinite(values: Sequence[float | None]) -> Bools:
    """True where a stored value is NaN or infinite; a missing one is not."""
    return np.array([value is not None and not math.isfinite(value) for value in values], dtype=np.bool_)


def short(values: Floats) -> NDArray[np.float32]:
    """For drawing: half the bytes, and more digits than a screen has."""
    return values.astype(np.float32)


def band(steps: Ints, low: Floats, high: Floats) -> Part:
    """X and y of closed polygons around a band: one a stretch without gaps, NaN between them."""
    xs: list[Floats] = []
    ys: list[Floats] = []
    present = ~(np.isnan(low) | np.isnan(high))
    for there, group in groupby(range(len(steps)), key=lambda i: bool(present[i])):
        if there:
            part = np.fromiter(group, dtype=np.int64)
            forth = steps[part].astype(np.float64)
            xs += [forth, forth[::-1], forth[:1], np.array([np.nan])]
            ys += [high[part], low[part][::-1], high[part[:1]], np.array([np.nan])]
    if not xs:
        return {"x": [], "y": []}
    return {"x": np.concatenate(xs), "y": short(np.concatenate(ys))}


def line_and_band(
    steps: Ints, buckets: Buckets, color: str, axes: Part, *, name: str, hover: str, factor: float = 1.0
) -> list[Part]:
    """A line of means over buckets, and a band of their extremes where there is one."""
    mean, low, high = (factor * finite(values) for values in (buckets.mean, buckets.min, buckets.max))
    parts: list[Part] = []
    if np.nanmax(high - low, initial=0) > 0:
        fill = {"fill": "toself", "mode": "none", "fillcolor": translucent(color, 0.15), "hoverinfo": "skip"}
        parts.append(axes | band(steps, low, high) | fill | {"name": f"{name}, extremes", "showlegend": False})
    line = {"x": steps, "y": short(mean), "mode": line_mode(steps), "line": {"color": color, "width": 1.7}}
    return [*parts, axes | line | {"name": name, "hovertemplate": hover, "showlegend": False}]


def line_mode(steps: Ints) -> str:
    """A single point makes no line."""
    return "lines" if len(steps) > 1 else "markers"
