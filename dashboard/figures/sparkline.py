"""A curve of the size of a word, as SVG: lists of runs hold many, so they are not Plotly's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from dashboard.figures.frame import finite

WIDTH, HEIGHT = 96, 24
_LOW, _HIGH = -3.0, 1.0
"""Ends of the axis, as powers of ten: those of the layer map's colours for the gap."""
_PAD: Final = 2


def sparkline(values: Sequence[float | None]) -> str:
    """Does the train-inference gap of this run rise or fall, and is it worth a look?

    A line over buckets of steps on the axis 0.001 to 10 sigma², the same for every run, so that rows can be compared;
    a dot at the newest value, and an ✕ where values are NaN or infinite. It has the colour of the text around it.
    """
    gap = finite(values)
    if not np.isfinite(gap).any():
        return ""
    x = np.linspace(_PAD, WIDTH - _PAD, len(gap)) if len(gap) > 1 else np.array([WIDTH / 2])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.clip(np.log10(np.maximum(gap, 1e-30)), _LOW, _HIGH) - _LOW) / (_HIGH - _LOW)
    y = HEIGHT - _PAD - share * (HEIGHT - 2 * _PAD)
    path, pen = "", "M"
    for at, up in zip(x, y, strict=True):
        if math.isnan(up):
            pen = "M"
            continue
        path += f"{pen}{at:.1f} {up:.1f}"
        pen = "L"
    newest = int(np.flatnonzero(np.isfinite(y))[-1])
    end = f'<circle cx="{x[newest]:.1f}" cy="{y[newest]:.1f}" r="1.8"/>'
    if any(value is not None and not math.isfinite(value) for value in values):
        end = f'<path class="alarm" d="M{WIDTH - 9} 8l6 6m0-6l-6 6"/>'
    return (
        f'<svg class="spark" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="train-inference gap, newest {gap[newest]:.2g} sigma squared"><path d="{path}"/>{end}</svg>'
    )
