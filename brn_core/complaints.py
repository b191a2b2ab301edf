"""Saying what goes wrong without filling the training's log."""

from __future__ import annotations

import logging
import time
from typing import Final

logger = logging.getLogger("brn_core")


class Complaints:
    """Logs a repeated problem once, then once a minute with the count."""

    INTERVAL_SECONDS: Final = 60.0

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def say(self, subject: str, text: str, *, level: int = logging.WARNING) -> None:
        now = time.monotonic()
        self._count[subject] = self._count.get(subject, 0) + 1
        if subject not in self._last:
            logger.log(level, "%s", text)
        elif now - self._last[subject] >= self.INTERVAL_SECONDS:
            logger.log(level, "%s (%d times so far)", text, self._count[subject])
        else:
            return
        self._last[subject] = now

    def forget(self, subject: str) -> None:
        """The problem is over: the next one is news again."""
        self._last.pop(subject, None)
        self._count.pop(subject, None)
