"""Colours of figures, one set for light and one for dark pages; the style sheet repeats the surface and text colours.

Blue and orange (Okabe and Ito 2008) stay apart under every common colour blindness; nothing is told by colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Theme = Literal["light", "dark"]
ColorScale: TypeAlias = list[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Palette:
    """Every colour a figure uses.

    Attributes:
        text, muted, grid, surface: of the page around the figure.
        r, d: the two corrections, wherever they are drawn.
        limit: limits in force.
        series: curves without a meaning of their own, in order.
        alarm: non-finite values.
        missing: heatmap cells without a row.
        neutral: heatmap cells at the value that means "no effect".
        below, above: from neutral to the extreme on each side, weak to strong.
        effect: from neutral to the strongest effect of a statistic that has one side.
        level: for statistics without a neutral value, low to high.
        phases: batch norm, ramp, full.
    """

    text: str
    muted: str
    grid: str
    surface: str
    r: str
    d: str
    limit: str
    series: tuple[str, ...]
    alarm: str
    missing: str
    neutral: str
    below: tuple[str, ...]
    above: tuple[str, ...]
    effect: tuple[str, ...]
    level: tuple[str, ...]
    phases: tuple[str, str, str]

    def diverging(self) -> ColorScale:
        return _even((*reversed(self.below), self.neutral, *self.above))

    def sequential(self) -> ColorScale:
        return _even((self.neutral, *self.effect))

    def levels(self) -> ColorScale:
        return _even(self.level)


def _even(colors: tuple[str, ...]) -> ColorScale:
    return [(i / (len(colors) - 1), color) for i, color in enumerate(colors)]


def translucent(color: str, alpha: float) -> str:
    """The colour `#rrggbb` with an opacity in [0, 1], as CSS."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


_CIVIDIS = ("#00224e", "#2a3f6d", "#575c6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")

PALETTES: Final[dict[Theme, Palette]] = {
    "light": Palette(
        text="#1c2430",
        muted="#5a6676",
        grid="#e6e9ee",
        surface="#ffffff",
        r="#0068ad",
        d="#b8500a",
        limit="#1c2430",
        series=("#0068ad", "#b8500a", "#00795c", "#9b3f7d", "#6b6f00"),
        alarm="#b0005c",
        missing="#d5dae2",
        neutral="#f4f6f8",
        below=("#b9d5ec", "#5fa2d3", "#1a6bab", "#083d70"),
        above=("#fbd6ae", "#f29a4c", "#c75f10", "#7a3203"),
        effect=("#fde3b5", "#f7b266", "#e07b25", "#ad4c0c", "#6b2703"),
        level=_CIVIDIS,
        phases=("#aab4c2", "#e3a35c", "#4d97cc"),
    ),
    "dark": Palette(
        text="#e4e8ee",
        muted="#98a3b3",
        grid="#262d38",
        surface="#151a21",
        r="#5db4f0",
        d="#f2a155",
        limit="#e4e8ee",
        series=("#5db4f0", "#f2a155", "#4fc9a4", "#e08cc4", "#d3d057"),
        alarm="#ff6fb0",
        missing="#39424f",
        neutral="#1d242d",
        below=("#1f4562", "#2f76ab", "#5db4f0", "#c3e4fb"),
        above=("#5f3a17", "#a8641f", "#f2a155", "#fde0bd"),
        effect=("#4a3016", "#80501d", "#bf7a2c", "#f2a855", "#fdebd0"),
        level=_CIVIDIS,
        phases=("#4d5868", "#a8702d", "#2f76ab"),
    ),
}
