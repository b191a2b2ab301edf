"""Colour scales fixed by meaning: the same colour says the same thing in every run and at every update.

A statistic with a neutral value has that value in the neutral colour, always. Ends of a scale are taken from a short
list of round numbers, so a live heatmap does not change its colours from one step to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import Metric
from dashboard.figures.palette import ColorScale, Palette

Floats: TypeAlias = NDArray[np.float64]

_ENERGY_FLOOR: Final = 1e-3
"""In sigma²: a shift of 0.03 sigma. What is below has no effect and is drawn so."""
_ENERGY_TOP: Final = 10.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How the values of one statistic become colours.

    Attributes:
        z: the values on the axis of the colour bar; NaN where there is no finite value.
        low, high: ends of the colour bar; what lies beyond has the end's colour.
        colors: the colour scale.
        ticks, labels: of the colour bar, on the axis of z.
        number: d3 format of a value in hover text.
    """

    z: Floats
    low: float
    high: float
    colors: ColorScale
    ticks: list[float]
    labels: list[str]
    number: str = ".4~g"


def scale(metric: Metric, values: Floats, palette: Palette) -> Scale:
    """The scale of a statistic; `values` may hold NaN where there is nothing to draw."""
    if metric.neutral == 1.0:
        return _ratio(values, palette)
    if metric.name.startswith("clip_"):
        return _share(values, palette)
    if metric.name.startswith("d_q") or metric.name == "log_r":
        return _signed(values, palette)
    if metric.group in ("gap", "noise"):
        return _energy(values, palette)
    if metric.neutral == 0.0 or metric.name == "samples":
        return _count(values, palette)
    return _positive_level(values, palette) if metric.name.startswith("sigma") else _level(values, palette)


def _ratio(values: Floats, palette: Palette) -> Scale:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.clip(np.log2(values), -20, 20)
    span = _first_above(_high_percentile(np.abs(z)), (0.25, 0.5, 1, 2, 3, 4))
    ticks = [-span, -span / 2, 0.0, span / 2, span]
    return Scale(z, -span, span, palette.diverging(), ticks, _ends([f"{2**t:.2g}" for t in ticks]))


def _signed(values: Floats, palette: Palette) -> Scale:
    span = _first_above(_high_percentile(np.abs(values)), (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50))
    ticks = [-span, -span / 2, 0.0, span / 2, span]
    return Scale(values, -span, span, palette.diverging(), ticks, _ends([_signed_text(t) for t in ticks]))


def _share(values: Floats, palette: Palette) -> Scale:
    # The square root: the difference between 0 % and 5 % matters more than that between 90 % and 95 %.
    shares = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
    labels = [f"{100 * share:g} %" for share in shares]
    z = np.sqrt(np.maximum(values, 0))
    return Scale(z, 0, 1, palette.sequential(), [share**0.5 for share in shares], labels, ".2~%")


def _energy(values: Floats, palette: Palette) -> Scale:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(np.isnan(values), np.nan, np.log10(np.maximum(values, _ENERGY_FLOOR)))
    low, high = np.log10(_ENERGY_FLOOR), np.log10(_ENERGY_TOP)
    ticks = [float(t) for t in np.arange(low, high + 1)]
    return Scale(
        z,
        float(low),
        float(high),
        palette.sequential(),
        ticks,
        _ends([f"{10**t:g}" for t in ticks]),
    )


def _count(values: Floats, palette: Palette) -> Scale:
    top = _first_above(_high_percentile(values), (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000))
    ticks = [0.0, top / 2, top]
    labels = [f"{t:g}" for t in ticks]
    return Scale(values, 0, top, palette.sequential(), ticks, [*labels[:-1], f"≥ {labels[-1]}"])


def _level(values: Floats, palette: Palette) -> Scale:
    low, high = _round_interval(values)
    ticks = [low, (low + high) / 2, high]
    return Scale(values, low, high, palette.levels(), ticks, _ends([_signed_text(t) for t in ticks]))


def _positive_level(values: Floats, palette: Palette) -> Scale:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(values)
    z = np.where(np.isfinite(z), z, np.nan)
    low, high = 0.0, 1.0
    if not np.all(np.isnan(z)):
        # to thirds of a decade, near the round numbers 1, 2, 5, 10
        low, high = np.floor(3 * np.nanmin(z)) / 3, np.ceil(3 * np.nanmax(z)) / 3
        high = max(high, low + 1 / 3)
    ticks = [float(t) for t in np.linspace(low, high, 4)]
    return Scale(z, float(low), float(high), palette.levels(), ticks, [f"{10**t:.2g}" for t in ticks])


def _high_percentile(values: Floats) -> float:
    return 0.0 if np.all(np.isnan(values)) else float(np.nanpercentile(values, 98))


def _first_above(value: float, rungs: tuple[float, ...]) -> float:
    return next((rung for rung in rungs if rung >= value), rungs[-1])


def _round_interval(values: Floats) -> tuple[float, float]:
    if np.all(np.isnan(values)):
        return 0.0, 1.0
    low, high = (float(v) for v in np.nanpercentile(values, (1, 99)))
    unit = 10.0 ** np.floor(np.log10(max(high - low, 1e-9)))
    low, high = float(np.floor(low / unit) * unit), float(np.ceil(high / unit) * unit)
    return low, max(high, low + float(unit))


def _signed_text(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _ends(labels: list[str]) -> list[str]:
    return [f"≤ {labels[0]}", *labels[1:-1], f"≥ {labels[-1]}"]
