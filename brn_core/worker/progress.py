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

    def __init__(self, console: Console | None, steps: int, first_step: int = 0) -> None:
        self._console, self._steps, self._first_step = console, steps, first_step
        self._shown_at = time.monotonic()
        self._begun: tuple[int, float] | None = None  # steps done and the time, after the first step
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._shown_at = time.monotonic()
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
            self._task = self._bar.add_task("training", total=self._steps, completed=self._first_step, figures="")
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
        if self._begun is None:  # the first step takes longer, much longer where it compiles
            self._begun = done, now
        if self._bar is not None and self._task is not None:
            if now - self._shown_at >= _REFRESH_SECONDS or done == self._steps:
                self._shown_at = now
                self._bar.update(self._task, completed=done, figures=figures_text(figures()))
        elif done * _PLAIN_LINES // self._steps > (done - 1) * _PLAIN_LINES // self._steps:
            parts = [f"step {done:>{len(str(self._steps))}}/{self._steps}", figures_text(figures())]
            if done > self._begun[0]:
                rate = (done - self._begun[0]) / max(now - self._begun[1], 1e-9)
                parts += [rate_text(rate), f"{time_text((self._steps - done) / rate)} left"]
            self._console.print("  ".join(parts), highlight=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed) if task.speed else "")


def rate_text(steps_per_second: float) -> str:
    """`120 it/s`, `3.4 it/s`, `2.5 s/it`."""
    if 0 < steps_per_second < 1:
        return f"{1 / steps_per_second:.1f} s/it"
    return f"{steps_per_second:.{0 if steps_per_second >= 10 else 1}f} it/s"


def time_text(seconds: float) -> str:
    """`4.2 s`, `3:07`, `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


def figures_text(figures: Mapping[str, float]) -> str:
    """`loss 0.123  acc 0.97  r_max 1.40  d_max 0.80  clip 12%`; what is not known is left out."""
    formats = {"loss": "loss {:.3f}", "accuracy": "acc {:.2f}", "r_max": "r_max {:.2f}", "d_max": "d_max {:.2f}"}
    parts = [text.format(figures[name]) for name, text in formats.items() if name in figures]
    if "clip" in figures:
        parts.append(f"clip {figures['clip']:.0%}")
    return "  ".join(parts)
