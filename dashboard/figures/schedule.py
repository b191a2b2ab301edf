"""The schedule view: r and d inside their limits over steps, and what is clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import Layer, Schedule
from dashboard.figures.frame import (
    Bools,
    Floats,
    Ints,
    Part,
    assemble,
    band,
    finite,
    line_mode,
    nonfinite,
    short,
    signed,
    without_data,
)
from dashboard.figures.palette import PALETTES, Palette, translucent
from service.schemas import Series

_CORRECTIONS: Final = tuple(f"{symbol}_q{q:02d}" for symbol in "rd" for q in (5, 25, 50, 75, 95))
STATISTICS: Final = (*_CORRECTIONS, "r_min", "r_max", "d_max", "clip_r", "clip_d", "gap")
"""What `schedule_view` needs of `Series`."""

EXTREMES: Final = ("clip_r", "clip_d", "gap")
"""Of which it needs the extremes too: they are half of what the question costs."""

HEIGHT: Final = 560
"""In pixels."""

_ROWS: Final = ((0.64, 1.0), (0.26, 0.6), (0.0, 0.2))
"""Domains of the three rows, from the top, in shares of the height."""

_TOLERANCE: Final = 1e-6  # limits are float32, and a bucket's mean of equal floats may differ in the last digit
_PHASES: Final = ("batch norm", "ramp", "full")


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps in which the limits do one thing; `end` is the start of the next phase."""

    name: str
    start: int
    end: int


def phases(steps: Sequence[int], r_max: Floats, d_max: Floats, planned: Schedule | None) -> list[Phase]:
    """What the limits did: `batch norm` at 1 and 0, `full` at their last values, `ramp` between.

    The last values are the planned ones; without a plan, those at which the limits have come to rest.
    """
    if planned is not None:
        last_r, last_d = planned.r_max, planned.d_max
    elif len(steps) > 1 and _same(r_max[-1], r_max[-2]) and _same(d_max[-1], d_max[-2]):
        last_r, last_d = float(r_max[-1]), float(d_max[-1])
    else:
        last_r = last_d = math.inf

    def name(i: int) -> str:
        if r_max[i] <= 1 + _TOLERANCE and d_max[i] <= _TOLERANCE:
            return _PHASES[0]
        reached = r_max[i] >= last_r * (1 - _TOLERANCE) and d_max[i] >= last_d * (1 - _TOLERANCE)
        return _PHASES[2] if reached else _PHASES[1]

    known = [i for i in range(len(steps)) if not math.isnan(r_max[i]) and not math.isnan(d_max[i])]
    starts = [(phase, steps[next(group)]) for phase, group in groupby(known, key=name)]
    ends = [start for _, start in starts[1:]] + [steps[-1]] * bool(starts)
    return [Phase(phase, start, end) for (phase, start), end in zip(starts, ends, strict=True)]


def schedule_view(
    series: Series,
    *,
    layers: Sequence[Layer] = (),
    planned: Schedule | None = None,
    compact: bool = False,
    palette: Palette = PALETTES["light"],
) -> go.Figure:
    """Do r and d stay inside the limits of the schedule, and how much is clipped?

    Three rows over steps: r with r_max and its lower limit, d with ±d_max, and the share of channels that is clipped
    (for a run that never opens its limits: the train-inference gap). Bands are percentiles over channels; over several
    layers or ranks they are means of the percentiles. `layout.meta["caption"]` says the same in words.

    Args:
        series: `STATISTICS` of one layer or of all.
        layers: the run's layers, for the caption.
        planned: the run's schedule, where it has one.
        compact: short texts, for a narrow screen.
        palette: colours.
    """
    if not series.steps:
        return without_data("No rows yet: the first recorded step will appear here.", palette, height=HEIGHT)
    steps = np.asarray(series.steps)
    mean = _means(series)
    opened = bool(np.nanmax(mean["r_max"], initial=1) > 1 + _TOLERANCE) or bool(
        np.nanmax(mean["d_max"], initial=0) > _TOLERANCE
    )
    bottom, bottom_axis = _clip_rates(steps, series, mean, palette) if opened else _gap(steps, series, palette)
    found = phases(series.steps, mean["r_max"], mean["d_max"], planned)
    alarm, alarm_line = _nonfinite_marks(series, palette)
    r_range = _r_range(mean)
    # Another layer is another view: its y axes start afresh, while the x axis keeps its zoom.
    y = [{"domain": domain, "uirevision": f"layer {series.layer}"} for domain in _ROWS]
    x = [{"matches": "x", "showticklabels": False, "anchor": anchor} for anchor in ("y", "y2", "y3")]
    x[0].pop("matches")
    layout = {
        "height": HEIGHT,
        "xaxis": x[0],
        "xaxis2": x[1],
        "xaxis3": x[2] | {"showticklabels": True, "title": {"text": "step"}},
        "yaxis": y[0]
        | {
            "type": "log",
            "range": r_range,
            "tickvals": _ratio_ticks(r_range),
            "tickformat": ".3~g",
            "title": {"text": "r = σ_B / σ (ratio)"},
        },
        "yaxis2": y[1]
        | {"anchor": "x2", "range": _d_range(mean), "nticks": 6, "title": {"text": "d = (μ_B − μ) / σ (σ)"}},
        "yaxis3": y[2] | {"anchor": "x3", "nticks": 4} | bottom_axis,
        "margin": {"l": 64, "r": 52, "t": 64, "b": 44},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.062, "yanchor": "bottom"},
        "hovermode": "x unified",
        "shapes": [*_phase_shapes(found, palette), *alarm_line],
        "annotations": [
            *_phase_names(found, palette, shortest=0.25 if compact else 0.08),
            *_limit_names(1, "r", mean, palette),
            *_limit_names(2, "d", mean, palette),
        ],
        "meta": {"caption": caption(series, layers=layers, planned=planned)},
    }
    traces = [
        *_correction(1, "r", steps, mean, palette, compact),
        *_correction(2, "d", steps, mean, palette, compact),
        *bottom,
        *alarm,
    ]
    return assemble(traces, layout, palette)


def caption(series: Series, *, layers: Sequence[Layer] = (), planned: Schedule | None = None) -> str:
    """The schedule view in words, at its newest finite point."""
    mean = _means(series)
    complete = np.flatnonzero(np.all([~np.isnan(column) for column in mean.values()], axis=0))
    broken = _first_nonfinite(series)
    alarm = "" if broken is None else f"From step {broken:,} on r or d is NaN or infinite. "
    if not len(complete):
        return alarm or "No rows yet."
    i = int(complete[-1])
    now = {name: float(column[i]) for name, column in mean.items()}
    where = layers[series.layer].name if series.layer is not None and series.layer < len(layers) else "all layers"
    half = (
        f"half of all channels have r between {now['r_q25']:.3g} and {now['r_q75']:.3g} "
        f"and d between {signed(now['d_q25'])} and {signed(now['d_q75'])}"
    )
    at = f"At step {series.steps[i]:,} ({where})"
    kinds = {layer.kind for layer in layers}
    if kinds and "BatchRenorm" not in kinds:
        return (
            f"{alarm}This run uses {' and '.join(sorted(kinds))}: limits are r = 1 and d = 0, nothing is corrected. "
            f"{at} {half}. The bands are what Batch Renorm would correct."
        )
    if now["r_max"] <= 1 + _TOLERANCE and now["d_max"] <= _TOLERANCE:
        waits = planned is not None and planned.bn_steps > series.steps[i]
        opens = f"; the limits open at step {planned.bn_steps:,}" if planned is not None and waits else ""
        return f"{alarm}{at} the layers still work as batch norm (r = 1, d = 0){opens}. Measured, {half}."
    return (
        f"{alarm}{at} r may move in {now['r_min']:.3g} to {now['r_max']:.3g} and d in ±{now['d_max']:.3g}; {half}. "
        f"Clipped: {100 * now['clip_r']:.2g} % of r, {100 * now['clip_d']:.2g} % of d."
    )


def _means(series: Series) -> dict[str, Floats]:
    return {name: finite(series.series[name].mean) for name in STATISTICS}


def _limits(symbol: str, mean: dict[str, Floats]) -> tuple[Floats, Floats]:
    return (mean["r_min"], mean["r_max"]) if symbol == "r" else (-mean["d_max"], mean["d_max"])


def _shut(symbol: str, mean: dict[str, Floats]) -> Bools:
    """Where the limit lets nothing through."""
    return mean["r_max"] <= 1 + _TOLERANCE if symbol == "r" else mean["d_max"] <= _TOLERANCE


def _correction(
    row: int, symbol: str, steps: Ints, mean: dict[str, Floats], palette: Palette, compact: bool
) -> list[Part]:
    axes = {"type": "scatter", "xaxis": f"x{row}", "yaxis": f"y{row}"}
    color = palette.r if symbol == "r" else palette.d
    quantile = {q: mean[f"{symbol}_q{q:02d}"] for q in (5, 25, 50, 75, 95)}
    limits = _limits(symbol, mean)
    bands = [
        axes
        | band(steps, quantile[low], quantile[high])
        | {
            "fill": "toself",
            "mode": "none",
            "fillcolor": translucent(color, alpha),
            "name": f"{symbol}, {low}–{high} % of channels",
            "hoverinfo": "skip",
            "legendgroup": symbol,
            "showlegend": False,
        }
        for low, high, alpha in ((5, 95, 0.16), (25, 75, 0.3))
    ]
    median = axes | {
        "x": steps,
        "y": short(quantile[50]),
        "mode": line_mode(steps),
        "line": {"color": color, "width": 1.8},
        "name": symbol if compact else f"{symbol}: median, 25–75 % and 5–95 % of channels",
        "legendgroup": symbol,
        "customdata": short(np.column_stack([quantile[5], quantile[25], quantile[75], quantile[95], *limits])),
        "hovertemplate": f"{symbol} median <b>%{{y:.4~g}}</b>{' σ' if symbol == 'd' else ''}"
        "<br>half of channels %{customdata[1]:.3~g} to %{customdata[2]:.3~g}"
        "<br>90 % of channels %{customdata[0]:.3~g} to %{customdata[3]:.3~g}"
        "<br>limits %{customdata[4]:.3~g} to %{customdata[5]:.3~g}<extra></extra>",
    }
    borders = [
        axes
        | {
            "x": steps,
            "y": short(limit),
            "mode": line_mode(steps),
            "line": {"color": palette.limit, "width": 1.4, "dash": "5px,3px"},
            "name": "limits" if compact else "limits in force",
            "hoverinfo": "skip",
            "legendgroup": "limits",
            "showlegend": row == 1 and i == 0,
        }
        for i, limit in enumerate(limits)
    ]
    return [*bands, median, *borders]


def _limit_names(row: int, symbol: str, mean: dict[str, Floats], palette: Palette) -> list[Part]:
    """At the right end of each limit its name; one name where both are one line."""
    lower, upper = (float(limit[-1]) for limit in _limits(symbol, mean))
    if _same(lower, upper):
        labels = [(upper, f"{symbol} = {upper:g}")]
    else:
        labels = [(lower, "r_min"), (upper, "r_max")] if symbol == "r" else [(lower, "−d_max"), (upper, "d_max")]
    return [
        {
            "x": 1,
            "xref": "x domain",
            "xanchor": "left",
            "xshift": 4,
            "y": math.log10(value) if symbol == "r" else value,
            "yref": f"y{row}" if row > 1 else "y",
            "showarrow": False,
            "text": text,
            "font": {"color": palette.muted, "size": 11},
        }
        for value, text in labels
        if not math.isnan(value)
    ]


def _clip_rates(steps: Ints, series: Series, mean: dict[str, Floats], palette: Palette) -> tuple[list[Part], Part]:
    traces: list[Part] = []
    top = 0.05
    for symbol, color in (("r", palette.r), ("d", palette.d)):
        name = f"clip_{symbol}"
        # While a limit is shut (batch norm) every channel is "clipped": that is the phase, not a finding.
        shut = _shut(symbol, mean)
        average = np.where(shut, np.nan, mean[name])
        worst = np.where(shut, np.nan, finite(series.series[name].max))
        top = max(top, float(np.nanmax(worst, initial=0)))
        axes = {"type": "scatter", "xaxis": "x3", "yaxis": "y3", "x": steps, "showlegend": False}
        traces += [
            axes
            | {
                "y": short(worst),
                "mode": "lines",
                "line": {"color": color, "width": 1, "dash": "1px,2px"},
                "name": f"{symbol} clipped, highest",
                "hoverinfo": "skip",
            },
            axes
            | {
                "y": short(average),
                "mode": line_mode(steps),
                "line": {"color": color, "width": 1.8},
                "name": f"{symbol} clipped",
                "customdata": short(worst),
                "hovertemplate": f"{symbol} clipped <b>%{{y:.2~%}}</b> of channels, highest %{{customdata:.2~%}}"
                "<extra></extra>",
            },
        ]
    axis = {
        "title": {"text": "clipped (share)"},
        "tickformat": ".3~%",
        "range": [-0.03 * top, min(1.03, 1.12 * top)],
    }
    return traces, axis


def _gap(steps: Ints, series: Series, palette: Palette) -> tuple[list[Part], Part]:
    average, worst = finite(series.series["gap"].mean), finite(series.series["gap"].max)
    trace = {
        "type": "scatter",
        "xaxis": "x3",
        "yaxis": "y3",
        "x": steps,
        "y": short(average),
        "mode": line_mode(steps),
        "line": {"color": palette.series[2], "width": 1.8},
        "showlegend": False,
        "name": "train-inference gap",
        "customdata": short(worst),
        "hovertemplate": "gap <b>%{y:.3~g} σ²</b>, highest %{customdata:.3~g} σ²<extra></extra>",
    }
    top = _high(average, 1) if not np.all(np.isnan(average)) else 0.0
    return [trace], {"title": {"text": "gap (σ²)"}, "range": [-0.03 * top, 1.3 * top or 1.0]}


def _phase_shapes(found: Sequence[Phase], palette: Palette) -> list[Part]:
    """A strip above the rows, and a dotted line where a phase ends."""
    shapes: list[Part] = []
    for i, phase in enumerate(found):
        color = palette.phases[_PHASES.index(phase.name)]
        strip = {"type": "rect", "xref": "x", "yref": "paper", "x0": phase.start, "x1": phase.end}
        shapes.append(strip | {"y0": 1.008, "y1": 1.02, "fillcolor": color, "line": {"width": 0}, "name": phase.name})
        if i:
            line = {"color": color, "width": 1, "dash": "1px,3px"}
            shapes.append(strip | {"type": "line", "x1": phase.start, "y0": 0, "y1": 1.02, "line": line})
    return shapes


def _phase_names(found: Sequence[Phase], palette: Palette, *, shortest: float) -> list[Part]:
    """The names of phases that cover at least a share `shortest` of the steps: others have no room for theirs."""
    span = max(found[-1].end - found[0].start, 1) if found else 1
    return [
        {
            "x": phase.start,
            "xref": "x",
            "xanchor": "left",
            "y": 1.022,
            "yref": "paper",
            "yanchor": "bottom",
            "showarrow": False,
            "text": phase.name,
            "font": {"size": 11, "color": palette.muted},
        }
        for phase in found
        if (phase.end - phase.start) / span >= shortest or len(found) == 1
    ]


def _first_nonfinite(series: Series) -> int | None:
    found = (np.flatnonzero(nonfinite(series.series[name].mean)) for name in _CORRECTIONS)
    first = [int(index[0]) for index in found if len(index)]
    return series.steps[min(first)] if first else None


def _nonfinite_marks(series: Series, palette: Palette) -> tuple[list[Part], list[Part]]:
    """A line and an ✕ where r or d first is NaN or infinite: a diverged run must not look like an ended one."""
    step = _first_nonfinite(series)
    if step is None:
        return [], []
    mark = {
        "type": "scatter",
        "xaxis": "x",
        "yaxis": "y",
        "x": [step],
        "y": [1.0],
        "mode": "markers",
        "cliponaxis": False,
        "name": f"not finite from step {step:,}",
        "marker": {"symbol": "x", "size": 10, "color": palette.alarm},
        "hovertemplate": "r or d is NaN or infinite here for the first time<extra></extra>",
    }
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1}
    return [mark], [line | {"line": {"color": palette.alarm, "width": 1.5}}]


def _r_range(mean: dict[str, Floats]) -> list[float]:
    low = min(_low(mean["r_q05"], 1), _low(mean["r_min"], 0), 0.95)
    high = max(_high(mean["r_q95"], 1), _high(mean["r_max"], 0), 1.05)
    return _padded(math.log10(max(low, 1e-3)), math.log10(high))


def _d_range(mean: dict[str, Floats]) -> list[float]:
    limit = _high(mean["d_max"], 0)
    return _padded(min(_low(mean["d_q05"], 1), -limit, -0.05), max(_high(mean["d_q95"], 1), limit, 0.05))


def _padded(low: float, high: float) -> list[float]:
    pad = 0.08 * (high - low)
    return [low - pad, high + pad]


def _low(values: Floats, ignored_percent: float) -> float:
    """Near the minimum: the first steps, with moving statistics still at 0 and 1, must not set the scale."""
    return math.inf if np.all(np.isnan(values)) else float(np.nanpercentile(values, ignored_percent))


def _high(values: Floats, ignored_percent: float) -> float:
    return -math.inf if np.all(np.isnan(values)) else float(np.nanpercentile(values, 100 - ignored_percent))


def _ratio_ticks(log_range: list[float]) -> list[float]:
    """Round ratios, each with its inverse: few on a wide axis, many on a narrow one."""
    width = log_range[1] - log_range[0]
    rungs = (
        (0.2, (1.02, 1.05, 1.1, 1.2)),
        (0.6, (1.1, 1.25, 1.5, 2.0)),
        (1.2, (1.5, 2.0, 3.0, 5.0)),
        (2.5, (2.0, 5.0, 10.0, 20.0)),
        (math.inf, (10.0, 100.0, 1000.0)),
    )
    above = next(ratios for limit, ratios in rungs if width < limit)
    return [*(1 / ratio for ratio in reversed(above)), 1.0, *above]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
