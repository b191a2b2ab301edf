"""Ending by a signal without losing what was recorded last.

Ctrl-C needs nothing: Python turns it into KeyboardInterrupt, and what atexit calls still runs. SIGTERM (of torchrun,
SLURM, Kubernetes, `kill`) and SIGHUP (a lost terminal) end a Python process on the spot instead. Where nobody handles
them,

    the signal --> a thread closes what is open, within a deadline --> the process ends by the same signal

so whoever sent it sees what they would have seen, a moment later. That holds while the main thread is stuck in a call
that does not return (a collective whose peers are gone): then the exit code is 128 + signal, as a shell has it. A
second signal does not wait.

A handler of the user's stays in charge, whether it was there before or comes later, also if it calls the one it
replaced: how the process ends is its affair, and an orderly end closes recordings anyhow. Forked processes get the
default back. Nothing is done outside the main thread, nor where signals are not POSIX.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

logger = logging.getLogger("brn_core")

DEADLINE_SECONDS: Final = 3.0
"""How long closing may take. Supervisors kill after 10 s (Docker) or 30 s (torchrun, SLURM, Kubernetes)."""

_STUCK_SECONDS: Final = 1.0
"""How long the main thread may take to see a signal before it counts as stuck."""

_ENOUGH: Final = b"\0"
"""Tells the thread that nothing is open any more."""


def on_termination(close: Callable[[float], object]) -> Callable[[], None]:
    """Have `close(seconds)` called, in a thread, when a signal that nobody handles would end the process.

    Args:
        close: ends something within so many seconds. Several are called one after the other.

    Returns:
        What undoes it, to be called when the thing has been closed: the process ends no earlier than that or the
        deadline.
    """
    return _termination.add(close)


class _Termination:
    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._begin()
        self._masks = threading.local()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._unblock, after_in_child=self._after_fork
            )

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, Callable[[float], object]] = {}
        self._taken: tuple[signal.Signals, ...] = ()
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._signalled = False
        self._closed = False

    def add(self, close: Callable[[float], object]) -> Callable[[], None]:
        with self._changed:
            number = next(self._numbers)
            self._open[number] = close
            if not self._taken and os.name == "posix" and threading.current_thread() is threading.main_thread():
                self._take()
        return lambda: self._remove(number)

    def _remove(self, number: int) -> None:
        with self._changed:
            self._open.pop(number, None)
            self._changed.notify_all()
            if self._open or self._signalled or threading.current_thread() is not threading.main_thread():
                return
            thread = self._give_back()
        if thread is not None:
            thread.join()

    def _take(self) -> None:
        free = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
        if not free:
            return
        reading, writing = self._pipe = os.pipe()
        os.set_blocking(writing, False)
        # The interpreter writes a signal's number there at once, even if the main thread is too busy to handle it.
        # There is one such place a process; where it is taken (asyncio), the handler writes, which may come later.
        other = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
        for number in free:
            signal.signal(number, self._handle)
        self._taken = tuple(free)
        self._thread = threading.Thread(target=self._wait, args=[reading], name="brn-signals", daemon=True)
        self._thread.start()

    def _give_back(self) -> threading.Thread | None:
        """Undo `_take`; returns the thread, which is about to end."""
        if self._pipe is None:
            return None
        self._restore(self._pipe[1])
        os.write(self._pipe[1], _ENOUGH)  # closing alone is no end of the file while a forked process has it open
        os.close(self._pipe[1])
        thread, self._thread = self._thread, None
        self._taken, self._pipe = (), None
        return thread

    def _restore(self, writing: int) -> None:
        for number in self._taken:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)
        other = signal.set_wakeup_fd(-1)
        if other not in (-1, writing):
            signal.set_wakeup_fd(other)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between any two of its instructions: takes no lock and waits for nothing."""
        if signal.getsignal(number) != self._handle:
            return  # called by a handler that replaced this one
        if self._signalled or self._closed:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self._pipe[1], bytes([number]))

    def _wait(self, reading: int) -> None:
        try:
            while (number := os.read(reading, 1)) not in (_ENOUGH, b""):
                if signal.getsignal(number[0]) == self._handle:
                    self._end(number[0])
        finally:
            os.close(reading)

    def _end(self, number: int) -> None:
        logger.warning("%s: closing what is recorded", signal.Signals(number).name)
        until = time.monotonic() + DEADLINE_SECONDS
        for close in list(self._open.values()):
            try:
                close(max(until - time.monotonic(), 0.0))
            except Exception as error:
                logger.warning("a recording could not be closed: %s: %s", type(error).__name__, error)
        with self._changed:  # the main thread may be closing something itself
            self._changed.wait_for(lambda: not self._open, max(until - time.monotonic(), 0.0))
        self._closed = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)
        time.sleep(_STUCK_SECONDS)
        os._exit(128 + number)

    def _before_fork(self) -> None:
        # until the child has its defaults back, a signal to it would be written to the pipe, which is its parent's
        if self._taken:
            self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)

    def _unblock(self) -> None:
        if (before := self._masks.__dict__.pop("before", None)) is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _after_fork(self) -> None:
        if self._pipe is not None:
            self._restore(self._pipe[1])
            for descriptor in self._pipe:
                with contextlib.suppress(OSError):  # forked while the thread was closing it
                    os.close(descriptor)
        self._begin()
        self._unblock()


_termination: Final = _Termination()
