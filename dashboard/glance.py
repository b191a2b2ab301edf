"""What the list of runs shows of each run besides its record: the course of its gap, and its pace."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from brn_core.wire import SCALAR_STEP_TIME
from dashboard.figures.sparkline import sparkline
from service import answers
from service.errors import Invalid, NotFound
from service.memo import Memo
from service.schemas import Run
from service.store import Store

POINTS: Final = 60
BUDGET_SECONDS: Final = 0.3
"""A list waits no longer for glances that are not known yet: they come with its next refresh."""


@dataclass(frozen=True, slots=True)
class Glance:
    """A sparkline as SVG, empty without numbers, and steps a second, None where they are not recorded."""

    svg: str = ""
    steps_per_second: float | None = None


class Glances:
    """The glance of each run, computed anew when the run has moved on by a bucket of its sparkline."""

    def __init__(self) -> None:
        self._known: Memo[Glance] = Memo(5000)

    def of(self, store: Store, runs: Sequence[Run]) -> dict[str, Glance]:
        """Of these runs, by id; of those that there is no time for, the newest one known or none."""
        deadline = time.monotonic() + BUDGET_SECONDS
        found: dict[str, Glance] = {}
        for run in runs:
            if run.last_step is None:
                continue
            width = answers.bucket_width(0, run.last_step, POINTS)
            key = (run.id, run.created_at, width, run.last_step // width)
            known = self._known.peek(key)
            if known is None and time.monotonic() < deadline:
                known = self._known.get(key, lambda run=run: _glance(store, run))  # type: ignore[misc]
                self._known.put(run.id, known)
            found[run.id] = known or self._known.peek(run.id) or Glance()
        return found


def _glance(store: Store, run: Run) -> Glance:
    try:
        gap = answers.series(store, run.id, ["gap"], points=POINTS).series["gap"].mean
        last = run.last_step or 0
        took = answers.scalars(store, run.id, [SCALAR_STEP_TIME], from_step=max(0, last - 100), points=1)
        seconds = [value for value in took.series[SCALAR_STEP_TIME].mean if value and math.isfinite(value)]
    except Invalid:  # no step time is recorded
        return Glance(sparkline(gap))
    except NotFound:  # deleted while we looked
        return Glance()
    return Glance(sparkline(gap), 1 / seconds[-1] if seconds else None)
