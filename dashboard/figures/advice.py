"""Another schedule tried on what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from brn_core.wire import Schedule
from dashboard.figures.frame import finite
from dashboard.figures.palette import PALETTES, Palette
from dashboard.figures.schedule import schedule_view
from service.answers import Recorded
from service.answers.what_if import limits
from service.schemas import Buckets, Series


def tried_on(series: Series, recorded: Recorded, tried: Schedule) -> Series:
    """The series of a run as they would have been, had the limits moved as in `tried`: r and d as recorded."""
    steps = np.asarray(series.steps, dtype=np.int64)
    clip_r, clip_d = recorded.clip_rates(tried)
    by_bucket = {int(step) // series.bucket_steps: i for i, step in enumerate(recorded.steps_B)}
    at = [by_bucket.get(int(step) // series.bucket_steps) for step in steps]
    r_max, d_max = limits(tried, steps)
    changed = {
        "r_max": r_max.tolist(),
        "r_min": (1 / r_max).tolist(),
        "d_max": d_max.tolist(),
        "clip_r": [None if i is None else clip_r[i] for i in at],
        "clip_d": [None if i is None else clip_d[i] for i in at],
    }
    flat = {name: Buckets(min=values, mean=values, max=values) for name, values in changed.items()}
    return series.model_copy(update={"series": series.series | flat})


def advice(
    series: Series,
    recorded: Recorded,
    tried: Schedule,
    *,
    compact: bool = False,
    palette: Palette = PALETTES["light"],
) -> go.Figure:
    """What would these limits have clipped?

    The schedule view with the limits of `tried` in the place of those in force, and the clip rates they would have
    given. It describes the run as it was: with other limits it would have trained a little differently.

    Args:
        series: `schedule.STATISTICS` of one layer or of all.
        recorded: the same run's percentiles, which clip rates are computed from.
        tried: the schedule to try.
        compact: short texts, for a narrow screen.
        palette: colours.
    """
    replayed = tried_on(series, recorded, tried)
    figure = schedule_view(replayed, planned=tried, compact=compact, palette=palette)
    for trace in figure.data:
        if trace.name == "limits in force":
            trace.name = "limits to try"
    if series.steps:
        figure.layout.meta = {"caption": said(series.steps, replayed, tried)}
    return figure


def said(steps: Sequence[int], replayed: Series, tried: Schedule) -> str:
    """The clip rates in words."""
    parts = []
    for symbol in "rd":
        share = finite(replayed.series[f"clip_{symbol}"].mean)
        if np.isnan(share).all():
            parts.append(f"the limit of {symbol} stays shut")
            continue
        worst = int(np.nanargmax(share))
        full = share[np.asarray(steps) >= (tried.r_steps if symbol == "r" else tried.d_steps)]
        rest = f"{100 * float(np.nanmean(full)):.2g} %" if np.isfinite(full).any() else "not reached in this run"
        parts.append(
            f"of {symbol} at most {100 * float(share[worst]):.2g} % (step {steps[worst]:,}), at its final limit {rest}"
        )
    return f"These limits would have clipped, mean over channels: {'; '.join(parts)}."
