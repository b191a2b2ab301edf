"""How fast one client may ask: a bucket of tokens for each address, filled at a steady rate."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

BURST_SECONDS: Final = 2.0
"""A bucket holds what comes in so long: a page asks for a dozen figures at once."""

CLIENTS: Final = 4096
"""Addresses that are remembered; of more, those that asked longest ago start anew."""


class Rates:
    """Counts requests by client. Thread-safe; its memory is bounded.

    Args:
        per_second: requests that a client may send for good.
        clock: seconds that only grow.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second * BURST_SECONDS)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many
        self._lock = threading.Lock()

    def take(self, client: str) -> bool:
        """Whether the client may ask now; if so, it has."""
        now = self._clock()
        with self._lock:
            tokens, at = self._buckets.pop(client, (self._most, now))
            tokens = min(self._most, tokens + (now - at) * self._per_second)
            allowed = tokens >= 1
            self._buckets[client] = (tokens - allowed, now)
            if len(self._buckets) > CLIENTS:
                self._buckets.popitem(last=False)
            return allowed
