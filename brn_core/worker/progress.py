"""How far training is, on a terminal as a bar, elsewhere (a log file, CI) as ten lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

_REFRESH_SECONDS: Final = 0.25
_PLAIN_LINES: Final = 10

Figures = Callable[[], Mapping[str, float]]
"""Gives loss, accuracy, r_max, d_max and clip (a share); called only when something is about to be shown."""


class Progress:
    """Shows steps, figures, rate and time left; without a console it shows nothing (the other ranks).

    Getting the figures may wait for the device, so they are asked for at most four times a second.
    """

    def __init__(self, console: Console | None, steps: int) -> None:
        self._console, self._steps = console, steps
        self._started = self._shown_at = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._started = self._shown_at = time.monotonic()
        if self._console is not None and self._console.is_terminal:
            self._bar = RichProgress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                _RateColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                expand=True,
                refresh_per_second=1 / _REFRESH_SECONDS,
            )
            self._task = self._bar.add_task("training", total=self._steps, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, figures: Figures) -> None:
        """Says that `done` steps are done."""
        if self._console is None:
            return
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            if now - self._shown_at >= _REFRESH_SECONDS or done == self._steps:
                self._shown_at = now
                self._bar.update(self._task, completed=done, figures=figures_text(figures()))
        elif done * _PLAIN_LINES // self._steps > (done - 1) * _PLAIN_LINES // self._steps:
            rate = done / max(now - self._started, 1e-9)
            left = round((self._steps - done) / rate)
            self._console.print(
                f"step {done:>{len(str(self._steps))}}/{self._steps}  {figures_text(figures())}  {rate:.0f} it/s  "
                f"{left} s left",
                highlight=False,
                soft_wrap=True,
            )


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} it/s" if task.speed else "")


def figures_text(figures: Mapping[str, float]) -> str:
    """`loss 0.123  acc 0.97  r_max 1.40  d_max 0.80  clip 12%`; what is not known is left out."""
    formats = {"loss": "loss {:.3f}", "accuracy": "acc {:.2f}", "r_max": "r_max {:.2f}", "d_max": "d_max {:.2f}"}
    parts = [text.format(figures[name]) for name, text in formats.items() if name in figures]
    if "clip" in figures:
        parts.append(f"clip {figures['clip']:.0%}")
    return "  ".join(parts)
