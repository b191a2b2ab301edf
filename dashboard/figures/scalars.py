"""Loss, accuracy and all other scalars, one panel each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import (
    SCALAR_DROPPED,
    SCALAR_SHADOW_DISAGREEMENT,
    SCALAR_SHADOW_EVAL_LOSS,
    SCALAR_SHADOW_TRAIN_LOSS,
    SCALAR_STEP_TIME,
)
from dashboard.figures.frame import (
    Part,
    assemble,
    band,
    finite,
    line_mode,
    nonfinite,
    plain,
    rolling,
    short,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette, translucent
from service.schemas import Scalars, ScalarSeries

_SHADOW: Final = ((SCALAR_SHADOW_TRAIN_LOSS, "training"), (SCALAR_SHADOW_EVAL_LOSS, "inference"))
_OWN: Final = (
    (SCALAR_SHADOW_DISAGREEMENT, "predictions that differ by mode (share)", 1.0),
    (SCALAR_STEP_TIME, "step time (ms)", 1000.0),
    (SCALAR_DROPPED, "steps dropped by the recorder", 1.0),
)
_OURS: Final = {name for name, *_ in (*_SHADOW, *_OWN)}

_PLOT, _BETWEEN, _TOP, _BOTTOM = 176, 56, 32, 44  # heights in pixels
_GUTTER: Final = 0.07  # between columns, in shares of the width


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: a title and its curves as (scalar's name, curve's label).

    Attributes:
        factor: from the stored unit to the drawn one.
        from_zero: whether the y axis begins at 0.
    """

    title: str
    curves: tuple[tuple[str, str], ...]
    factor: float = 1.0
    from_zero: bool = False


def panels(names: Sequence[str]) -> list[Panel]:
    """Which scalars are drawn together, in reading order: loss, accuracy, the user's others, the recorder's own."""

    def rank(name: str) -> tuple[int, int, str]:
        lower = name.lower()
        # the shorter name first: loss, then eval_loss
        return (0 if "loss" in lower else 1 if "acc" in lower else 2, len(lower), lower)

    found = [Panel(name, ((name, name),)) for name in sorted(set(names) - _OURS, key=rank)]
    shadow = tuple(curve for curve in _SHADOW if curve[0] in names)
    if shadow:
        found.append(Panel("loss by mode", shadow))
    found += [Panel(title, ((name, title),), factor, True) for name, title, factor in _OWN if name in names]
    return found


def scalar_panels(
    answer: Scalars, *, columns: int = 2, smooth: int = 1, palette: Palette = PALETTES["light"]
) -> go.Figure:
    """Does the training itself go well: loss, accuracy and whatever else was reported?

    One panel a scalar; the shadow losses (one batch, once as trained and once in inference mode) share a panel, since
    their distance is the answer. A line is the mean over ranks and a bucket's steps, its band the bucket's extremes.

    Args:
        answer: the scalars.
        columns: panels beside each other.
        smooth: points that a line is averaged over; the points themselves stay, faint. 1: none.
        palette: colours.
    """
    wanted = panels(sorted(name for name, curve in answer.series.items() if curve.steps))
    if not wanted:
        return without_data("No scalars yet: recorder.step(loss, accuracy=...) sends them.", palette, height=220)
    columns = max(1, min(columns, len(wanted)))
    rows = math.ceil(len(wanted) / columns)
    inner = rows * _PLOT + (rows - 1) * _BETWEEN
    width = (1 - _GUTTER * (columns - 1)) / columns
    layout: Part = {
        "height": inner + _TOP + _BOTTOM,
        "margin": {"l": 56, "r": 20, "t": _TOP, "b": _BOTTOM},
        "hovermode": "x unified",
        "showlegend": False,
        "annotations": [],
    }
    traces: list[Part] = []
    broken: list[str] = []
    for i, panel in enumerate(wanted):
        row, column = divmod(i, columns)
        left, top = column * (width + _GUTTER), 1 - row * (_PLOT + _BETWEEN) / inner
        number = str(i + 1) if i else ""
        last = i + columns >= len(wanted)
        layout[f"xaxis{number}"] = {
            "domain": [left, left + width],
            "anchor": f"y{number}",
            "nticks": 5,
            "title": {"text": "step" if last else ""},
        } | ({"matches": "x"} if i else {})
        layout[f"yaxis{number}"] = {
            "domain": [max(0, top - _PLOT / inner), top],
            "anchor": f"x{number}",
            "nticks": 5,
            "rangemode": "tozero" if panel.from_zero else "normal",
        }
        layout["annotations"].append(
            {
                "text": _title(panel, palette),
                "x": left,
                "xref": "paper",
                "xanchor": "left",
                "y": top,
                "yref": "paper",
                "yanchor": "bottom",
                "yshift": 6,
                "showarrow": False,
                "font": {"size": 12, "color": palette.text},
            }
        )
        for (name, label), color in zip(panel.curves, palette.series, strict=False):
            curve, axes = answer.series[name], {"type": "scatter", "xaxis": f"x{number}", "yaxis": f"y{number}"}
            traces += [axes | part for part in _curve(curve, label, panel, color, palette, smooth)]
            if (bad := _first_nonfinite(curve)) is not None:
                what = panel.title if len(panel.curves) == 1 else f"{panel.title} ({label})"
                broken.append(f"{what}: NaN or infinite from step {curve.steps[bad]:,} on.")
    layout["meta"] = {"caption": " ".join([*broken, *_buckets(answer, smooth)])}
    return assemble(traces, layout, palette)


def _title(panel: Panel, palette: Palette) -> str:
    if len(panel.curves) == 1:
        return plain(panel.title, 48)
    keys = [
        f'<span style="color:{color}">━ {plain(label)}</span>'
        for (_, label), color in zip(panel.curves, palette.series, strict=False)
    ]
    return f"{plain(panel.title, 48)}: {' '.join(keys)}"


def _curve(curve: ScalarSeries, label: str, panel: Panel, color: str, palette: Palette, smooth: int) -> list[Part]:
    steps = np.asarray(curve.steps)
    mean, low, high = (panel.factor * finite(values) for values in (curve.mean, curve.min, curve.max))
    parts: list[Part] = []
    if np.nanmax(high - low, initial=0) > 0:
        fill = {"fill": "toself", "mode": "none", "fillcolor": translucent(color, 0.16), "hoverinfo": "skip"}
        parts.append(band(steps, low, high) | fill)
    if smooth > 1:
        faint = {"line": {"color": translucent(color, 0.3), "width": 1}, "hoverinfo": "skip"}
        parts.append({"x": steps, "y": short(mean), "mode": line_mode(steps), "name": "as recorded"} | faint)
    parts.append(
        {
            "x": steps,
            "y": short(rolling(mean, smooth)),
            "mode": line_mode(steps),
            "line": {"color": color, "width": 1.6},
            "name": plain(label, 40),
            "hovertemplate": "<b>%{y:.5~g}</b>" + (f" {label}" if len(panel.curves) > 1 else "") + "<extra></extra>",
        }
    )
    bad = _first_nonfinite(curve)
    if bad is not None:
        before = mean[:bad][~np.isnan(mean[:bad])]
        parts.append(
            {
                "x": [curve.steps[bad]],
                "y": [float(before[-1]) if len(before) else 0.0],
                "mode": "markers",
                "name": "not finite",
                "marker": {"symbol": "x", "size": 10, "color": palette.alarm},
                "hovertemplate": "NaN or infinite since step %{x:,}<extra></extra>",
            }
        )
    return parts


def _first_nonfinite(curve: ScalarSeries) -> int | None:
    found = np.flatnonzero(nonfinite(curve.mean))
    return int(found[0]) if len(found) else None


def _buckets(answer: Scalars, smooth: int) -> list[str]:
    said = []
    if answer.bucket_steps > 1:
        said.append(f"Each point is the mean of {answer.bucket_steps:,} steps; bands show their extremes.")
    if smooth > 1:
        said.append(f"Lines are means over {smooth} points.")
    return said
