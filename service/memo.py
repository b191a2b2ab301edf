"""Answers worth keeping while their inputs stand still."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """The newest `size` computed values by key.

    A value is computed once, however many ask for it at the same time; who asks for another one never waits for it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._computing: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of `key`, computed now if it is not there. What `compute` raises passes, and is not kept."""
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
                done = self._computing.get(key)
                if done is None:
                    self._computing[key] = mine = threading.Event()
                    break
            done.wait()
        try:
            value = compute()
            self.put(key, value)
            return value
        finally:
            with self._lock:
                del self._computing[key]
            mine.set()

    def peek(self, key: Hashable) -> T | None:
        """The value of `key` if it is known; computes nothing and waits for nobody."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Keeps a value that is known without computing it."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
