"""The thread between training and the shipper: makes rows of recorded steps, several at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from brn_core.capture import Taken, Transfer, pack
from brn_core.complaints import Complaints
from brn_core.packer import (
    Block,
    Key,
    LayerGroup,
    LayerRows,
    ProbeGroup,
    ProbeRow,
    ScalarGroup,
    Singles,
    StepRows,
    block,
    layer_columns,
    snapshot,
)
from brn_core.shipper import Shipper
from brn_core.wire import PROBE_FEATURES, SCALAR_DROPPED

PENDING_STEPS: Final = 512
PENDING_BYTES: Final = 64 * 1024 * 1024
"""Recorded steps that may wait here, by number and by size; beyond either the newest is dropped and counted. One step
is taken whatever its size."""

_GATHER_BYTES: Final = 8 * 1024 * 1024
_GATHER_STEPS: Final = 32
_GATHER_SECONDS: Final = 0.25
"""Steps are gathered for so long, or until they are so large or so many, and reduced together: the interpreter's work,
which training would wait for, is done once for all of them. On a GPU each holds a page-locked buffer meanwhile."""

_LATEST: Final = ("r_max", "d_max", "clip_r", "clip_d")


class Frame(NamedTuple):
    """One recorded step on its way from the training thread.

    Attributes:
        step: its number.
        taken: by layer, what is on the host already and remains to be reduced.
        transfer: what was reduced on its device, the probe, and scalars that are tensors.
        scalars: numbers.
        snapshot: whether every channel is wanted.
        size_bytes: about how much memory it holds.
    """

    step: int
    taken: dict[int, Taken]
    transfer: Transfer
    scalars: dict[str, float]
    snapshot: bool
    size_bytes: int


class Reducer:
    """A thread that makes rows of frames, in order, and offers them to the shipper.

    Args:
        eps: of every layer, by index.
        every: steps between recorded steps.
        shipper: where rows go.
        dropped: steps of the whole recorder that were dropped so far, recorded with each step.
        flush_seconds: longest time to gather steps, as far as it is shorter than this module's own.
    """

    def __init__(
        self,
        eps: Sequence[float],
        every: int,
        shipper: Shipper[StepRows],
        dropped: Callable[[], int],
        *,
        flush_seconds: float,
    ) -> None:
        self._eps = tuple(eps)
        self._every = every
        self._shipper = shipper
        self._all_dropped = dropped
        self._gather_seconds = min(_GATHER_SECONDS, flush_seconds)
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._oldest_at = 0.0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._flushing = False
        self._passing_on = False  # frames were taken out of the queue and their rows are not offered yet
        self._closing = False
        self._ended = False
        self._deadline = float("inf")
        self._complaints = Complaints()
        self._past: list[Block] = []
        self.dropped = 0
        self.latest: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="brn-reducer", daemon=True)
        self._thread.start()

    def offer(self, frame: Frame) -> None:
        """Queue one step; a full queue drops it. Takes a lock that is only ever held for an instant."""
        size = frame.size_bytes
        with self._lock:  # of the condition, whose own with-statement is Python
            full = self._frames and (len(self._frames) >= PENDING_STEPS or self._bytes + size > PENDING_BYTES)
            if full or self._ended:
                self.dropped += 1
                frame.transfer.release()
                return
            if not self._frames:
                self._oldest_at = time.monotonic()
            self._frames.append(frame)
            before, self._bytes = self._bytes, self._bytes + size
            # not for the first: waking a thread is dear, and an idle one looks by itself before a gathering is over
            if len(self._frames) == _GATHER_STEPS or before < _GATHER_BYTES <= self._bytes:
                self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until the rows of every step queued so far are offered to the shipper; False if that took too long."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._frames and not self._passing_on, timeout_seconds)
            self._flushing = False
            return done

    def close(self, timeout_seconds: float) -> bool:
        """Reduce what waits until the deadline, drop the rest. Returns whether the thread has ended."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout_seconds
            self._changed.notify_all()
        self._thread.join(timeout_seconds + 1.0)
        return not self._thread.is_alive()

    # Everything below runs in the reducer's thread.

    def _run(self) -> None:
        try:
            while frames := self._next():
                self._reduce(frames)
        finally:
            with self._changed:
                self._ended = True
                self.dropped += len(self._frames)
                self._frames.clear()
                self._changed.notify_all()

    def _reduce(self, frames: Sequence[Frame]) -> None:
        landed = []
        for frame in frames:
            try:
                landed.append((frame, frame.transfer.arrays()))
            except Exception as error:
                self._lost(error)
        try:
            self._pass_on(landed)
        except Exception:  # the fault is one step's: find out whose, keep the others
            for one in landed:
                try:
                    self._pass_on([one])
                except Exception as error:
                    self._lost(error)

    def _lost(self, error: Exception) -> None:
        with self._changed:
            self.dropped += 1
        self._complaints.say("reducing", f"a recorded step is lost: {type(error).__name__}: {error}")

    def _next(self) -> list[Frame]:
        """The frames to work on now, in order; none when closed."""
        with self._changed:
            self._passing_on = False
            self._changed.notify_all()  # a flush may wait for it
            while True:
                now = time.monotonic()
                if self._closing and (now >= self._deadline or not self._frames):
                    return []
                if not self._frames:
                    self._changed.wait(self._gather_seconds)
                elif self._may_gather() and now < self._oldest_at + self._gather_seconds:
                    self._changed.wait(self._oldest_at + self._gather_seconds - now)
                elif frames := self._pop():
                    self._passing_on = True
                    return frames
                else:
                    self._changed.wait(0.001)  # polled: waiting for the device would need a blocking call

    def _may_gather(self) -> bool:
        return not (
            self._closing or self._flushing or self._bytes >= _GATHER_BYTES or len(self._frames) >= _GATHER_STEPS
        )

    def _pop(self) -> list[Frame]:
        """The oldest frames that have arrived on the host, up to about _GATHER_BYTES."""
        frames: list[Frame] = []
        taken = 0
        while self._frames and taken < _GATHER_BYTES:
            frame = self._frames[0]
            try:
                if not frame.transfer.ready():
                    break
            except Exception as error:  # of the device
                self._lost(error)
            else:
                frames.append(frame)
                taken += frame.size_bytes
            self._frames.popleft()
            self._bytes -= frame.size_bytes
        self._oldest_at = time.monotonic()
        return frames

    def _pass_on(self, landed: Sequence[tuple[Frame, list[tuple[Key, Singles]]]]) -> None:
        layers = [(key, values) for _, arrays in landed for key, values in arrays if isinstance(key, LayerGroup)]
        for segment in pack({frame.step: frame.taken for frame, _ in landed}):
            assert isinstance(segment.key, LayerGroup)
            layers.append((segment.key, segment.flat.numpy()))
        now = block(layers, self._eps)
        if now is None:
            made = [self._step_rows(frame, arrays) for frame, arrays in landed]
        else:
            columns, nulls = layer_columns(now, self._every, self._past)
            rows = LayerRows.of(columns, nulls)
            made = [
                self._with_layers(self._step_rows(frame, arrays), frame.snapshot, now, rows) for frame, arrays in landed
            ]
            newest = int(now.steps[-1])
            self._past = [
                b.since(newest - self._every) for b in (*self._past, now) if b.steps[-1] >= newest - self._every
            ]
            self.latest = {name: float(columns[name][now.span(newest)].mean()) for name in _LATEST}
        for step_rows in made:  # only now: what fails above is tried again, and nothing may be offered twice
            self._shipper.offer(step_rows)

    def _step_rows(self, frame: Frame, arrays: list[tuple[Key, Singles]]) -> StepRows:
        scalars = {**frame.scalars, SCALAR_DROPPED: float(self._all_dropped())}
        probe = None
        for key, values in arrays:
            match key:
                case ProbeGroup(samples):
                    probe = ProbeRow(samples, *values.reshape(3, PROBE_FEATURES))
                case ScalarGroup(names):
                    scalars.update(zip(names, values.copy().view("float64").tolist(), strict=True))
        return StepRows(frame.step, probe=probe, scalars=scalars)

    @staticmethod
    def _with_layers(step_rows: StepRows, wanted: bool, now: Block, rows: LayerRows) -> StepRows:
        span = now.span(step_rows.step)
        if span.start == span.stop:
            return step_rows
        return replace(
            step_rows,
            layers=now.layers[span],
            values=rows.values[:, span],
            nulls=rows.nulls[:, span],
            snapshot=snapshot(now, span) if wanted else None,
        )
