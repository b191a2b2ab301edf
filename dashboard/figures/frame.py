"""What all figures share: the look of axes, text from users, arrays from answers, and the figure without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dashboard.figures.palette import Palette

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


def without_data(text: str, palette: Palette, *, height: int) -> go.Figure:
    """The figure of a run that has nothing to draw yet: it says so."""
    return assemble(
        [],
        {
            "height": height,
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "annotations": [{"text": text, "showarrow": False, "font": {"size": 13, "color": palette.muted}}],
            "meta": {"caption": ""},
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
            "yaxis": axis,
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


def line_mode(steps: Ints) -> str:
    """A single point makes no line."""
    return "lines" if len(steps) > 1 else "markers"
