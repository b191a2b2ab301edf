"""Sending batches to the service from a background thread that training never waits for.

offer() -> bounded queue -> [thread] group, encode -> POST -> stored
                                                        -> unavailable: spool, then back off (with jitter;
                                                           Retry-After counts)
                                                        -> refused: counted, set aside in the spool
                                                        -> too large: sent again in parts
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Generic, Protocol, TypeVar

from brn_core.client import SENDER_THREAD, Answer, Client
from brn_core.complaints import Complaints
from brn_core.drain import Drained, drain
from brn_core.journal import Journal
from brn_core.leftovers import Leftovers
from brn_core.spool import Spool, SpoolFolder
from brn_core.wire import RunCreate, RunUpdate

logger = logging.getLogger("brn_core")


class Recorded(Protocol):
    """A recorded step that knows its number and how much memory it takes."""

    @property
    def step(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Recorded)

CAPACITY: Final = 4096
CAPACITY_BYTES: Final = 64 * 1024 * 1024
"""Recorded steps that may wait in memory, by number and by size; beyond either the newest is dropped, so what is kept
has no holes."""

MAX_STEPS: Final = 256
"""Most recorded steps in one batch."""

MAX_BYTES: Final = 8 * 1024 * 1024
"""Largest body that is sent as it is; a larger one of several steps is parted (services limit the size of a body)."""

_FIRST_DELAY_SECONDS: Final = 0.5
_LONGEST_DELAY_SECONDS: Final = 30.0
_DRAIN_SLICE_SECONDS: Final = 0.5
_GRACE_SECONDS: Final = 1.0
"""How far beyond its deadline a close may go: for spooling what is left."""


class Shipper(Generic[Item]):
    """Groups items (recorded steps) to batches and sends them from its own thread.

    Args:
        client: where to send; the shipper closes it.
        registration: the run.
        rank: global rank of this process. Rank 0 registers the run at once.
        encode: a batch's body from items; runs in the shipper's thread.
        spool: where batches wait for a service that is away; None: such batches are dropped (and counted).
        journal: where each batch is noted before it is sent, for a resumed process; steps that an earlier process has
            settled are not sent again.
        sends_leftovers: whether to send what earlier runs left in the spool for the same url; one a host.
        flush_seconds: an item waits at most about this long before it is sent.
        on_acknowledged: called in the shipper's thread with each acknowledgement.
    """

    def __init__(
        self,
        client: Client,
        registration: RunCreate,
        rank: int,
        encode: Callable[[Sequence[Item]], bytes],
        *,
        spool: Spool | None,
        journal: Journal | None = None,
        sends_leftovers: bool = False,
        flush_seconds: float = 1.0,
        on_acknowledged: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._client = client
        self._registration = registration
        self._rank = rank
        self._encode = encode
        self._folder = spool.folder(registration.id, rank) if spool is not None else None
        if self._folder is not None:
            self._folder.url = client.url
        self._journal = journal
        self._repeated = None if journal is None else journal.repeated
        self._flush_seconds = flush_seconds
        self._on_acknowledged = on_acknowledged
        self._items: deque[Item] = deque()
        self._waiting_bytes = 0
        self._oldest_at = 0.0  # time.monotonic() of the oldest waiting item
        self._changed = threading.Condition()
        self._flushing = False
        self._shipping = False  # items were taken out of the queue and are not settled yet
        self._closing = False
        self._deadline = float("inf")
        self._end: RunUpdate | None = None
        self._dropped = self._dropped_before = 0
        # unix microseconds: a resumed process of the same run and rank never reuses a number
        after = 0 if self._repeated is None else self._repeated.seq + 1  # whatever the clock says
        self._process = max(time.time_ns() // 1000, after)
        self._seq = itertools.count(self._process)
        self._max_bytes = MAX_BYTES
        self._registered = rank != 0
        self._spooled = False
        self._leftovers = Leftovers(spool, registration.id, client.url) if sends_leftovers and spool else None
        self._failures = 0
        self._retry_at = 0.0
        self._told_to_wait = False
        self._asking = False
        self._asked: tuple[int, int, bytes] | None = None  # the batch on its way: seq, steps, body
        self._abandoned = False  # the closing thread has taken over what is left
        self._rescued = False  # it has also taken the batch of the last request
        self._random = random.Random()  # its own: the global generator belongs to training
        self._complaints = Complaints()
        self._thread = threading.Thread(target=self._run, name=SENDER_THREAD, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Recorded steps that will never be stored: queue full, spool full or absent, refused by the service."""
        return self._dropped

    @property
    def repeating(self) -> bool:
        """Whether the journal's last batch is still to be sent again, as a whole."""
        return self._repeated is not None

    def offer(self, item: Item) -> bool:
        """Queue one item. Never blocks on the service: a full queue drops the item, counts it and answers False."""
        size = item.size_bytes
        with self._changed:
            if self._repeated is not None and item.step < self._repeated.first:
                return True  # an earlier process has settled it
            full = len(self._items) >= CAPACITY or self._waiting_bytes + size > CAPACITY_BYTES
            if self._closing or full:
                self._dropped += 1
                return False
            if not self._items:
                self._oldest_at = time.monotonic()
            self._items.append(item)
            self._waiting_bytes += size
            # the moments the thread has something new to decide
            if len(self._items) in (1, MAX_STEPS) or self._repeated is not None:
                self._changed.notify_all()
        return True

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything offered so far is settled: stored, spooled or given up and counted.

        Returns:
            False where that took too long, or where part of a repeated batch waits for its last steps.
        """

        def settled() -> bool:
            return not self._shipping and (not self._items or self._held())

        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(settled, timeout_seconds)
            self._flushing = False
            return done and not self._items

    def close(self, *, timeout_seconds: float = 5.0, end: RunUpdate | None = None, dropped_steps: int = 0) -> bool:
        """Send what waits until the deadline, spool the rest, then say `end` of the run. Idempotent.

        With it is said how many steps were dropped, here and before they came here (`dropped_steps`). Of ranks other
        than 0 only that is said, where they dropped any.

        Where the thread hangs in a request past the deadline (a name server that does not answer, an answer without
        end), the caller spools what is left; the batch on its way may then be sent twice, and is stored once.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            if not self._closing:
                self._closing = True
                self._deadline = time.monotonic() + timeout_seconds
                self._end, self._dropped_before = end, dropped_steps
                if not self._told_to_wait:
                    self._retry_at = 0.0  # the last chance: the service may be back since the last try
                self._changed.notify_all()
        self._thread.join(timeout_seconds + _GRACE_SECONDS)
        if self._thread.is_alive() and self._asking:
            self._guarded(self._rescue)
        elif self._thread.is_alive():
            self._thread.join(5 * _GRACE_SECONDS)  # it is spooling
        ended = not self._thread.is_alive()
        if ended and self._folder is not None:
            self._folder.release()
        return ended

    def _rescue(self) -> None:
        """Spool what is left in memory, from the closing thread."""
        with self._changed:
            if self._abandoned:
                return
            self._abandoned = True
            asked = self._asked  # under one lock with the line above: either this thread has the batch or the other
            batches = []
            while self._items:
                batches.append(self._take())
        if asked is not None:
            self._to_spool(*asked)
        for items, seq in batches:
            self._ship(items, seq)
        if self._folder is not None and (last_word := self._last_word()) is not None:
            self._folder.put_end(self._registration, last_word)

    # Everything below runs in the shipper's thread (and, for `_rescue`, in the closing one).

    def _drop(self, steps: int) -> None:
        with self._changed:
            self._dropped += steps

    def _run(self) -> None:
        try:
            self._guarded(self._look_into_spool)
            self._guarded(self._catch_up)  # the run first, then its rows
            while True:
                items, seq, closing = self._collect()
                self._guarded(lambda items=items, seq=seq: self._ship(items, seq))  # type: ignore[misc]
                self._guarded(self._catch_up)
                if closing and not self._items:
                    break
            if not self._abandoned:
                self._guarded(self._finish)
        finally:
            self._client.close()

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._complaints.say("sending", f"sending what was recorded failed: {type(error).__name__}: {error}")
            self._retry_at = time.monotonic() + _FIRST_DELAY_SECONDS  # whatever it is, it does not become a busy loop

    def _look_into_spool(self) -> None:
        if self._folder is None:
            return
        self._folder.reopen(self._registration)
        self._spooled = bool(self._folder.parcels()) or self._folder.end() is not None

    def _collect(self) -> tuple[list[Item], int | None, bool]:
        """Wait until a batch is due, the spool may be tried again, or the shipper is closing.

        Returns:
            The batch, its number if it is one that is repeated, and whether the shipper is closing.
        """
        with self._changed:
            self._shipping = False
            self._changed.notify_all()  # a flush may wait for it
            while not self._closing:
                now = time.monotonic()
                due_at = self._due_at(now)
                if self._backlog():
                    due_at = min(due_at, max(self._retry_at, now))
                if due_at <= now:
                    break
                self._changed.wait(None if due_at == float("inf") else due_at - now)
            items, seq = self._take()
            self._shipping = bool(items)
            return items, seq, self._closing

    def _due_at(self, now: float) -> float:
        """When a batch of the waiting items is to be sent."""
        if not self._items or self._held():
            return float("inf")
        if len(self._items) >= MAX_STEPS or self._flushing or self._repeated is not None:
            return now
        return self._oldest_at + self._flush_seconds

    def _held(self) -> bool:
        """Whether the first items belong to a batch that is repeated and whose last steps are still to come."""
        return self._repeated is not None and bool(self._items) and self._items[-1].step < self._repeated.last

    def _take(self) -> tuple[list[Item], int | None]:
        """The next batch out of the queue, and its number if it is repeated. The lock is held."""
        if self._held():
            if self._closing:
                # Perhaps it is stored as a whole, and a part under its number would take the whole's place. Whoever
                # goes on from the last checkpoint sends all of it.
                self._items.clear()
                self._waiting_bytes = 0
            return [], None
        repeated, seq, count = self._repeated, None, min(len(self._items), MAX_STEPS)
        if repeated is not None and self._items:
            if within := sum(item.step <= repeated.last for item in self._items):
                seq, count = repeated.seq, within
            self._repeated = None
        items = [self._items.popleft() for _ in range(count)]
        self._waiting_bytes -= sum(item.size_bytes for item in items)
        self._oldest_at = time.monotonic()
        return items, seq

    def _backlog(self) -> bool:
        return not self._registered or self._spooled or self._leftovers is not None

    def _seconds_left(self) -> float | None:
        return self._deadline - time.monotonic() if self._closing else None

    def _may_send(self) -> bool:
        left = self._seconds_left()
        if self._abandoned or (left is not None and left <= 0):
            return False
        return time.monotonic() >= self._retry_at

    @contextmanager
    def _request(self, seq: int = 0, steps: int = 0, body: bytes = b"") -> Iterator[None]:
        """Marks the time in which the thread may hang in a connection, with the batch that would then be lost."""
        with self._changed:
            self._asked = (seq, steps, body) if body else None
            self._asking = True
        try:
            yield
        finally:
            with self._changed:
                self._asking, self._asked = False, None
                self._rescued = self._abandoned

    def _ship(self, items: Sequence[Item], repeated_seq: int | None = None) -> None:
        if not items:
            return
        try:
            body = self._encode(items)
        except Exception as error:
            if len(items) > 1:  # the others are not to blame
                self._ship_halves(items)
                return
            self._drop(1)
            self._complaints.say("encoding", f"a recorded step is lost: {type(error).__name__}: {error}")
            return
        if not body:
            return
        if len(body) > self._max_bytes and len(items) > 1 and repeated_seq is None:
            self._ship_halves(items)
            return
        seq = next(self._seq) if repeated_seq is None else repeated_seq
        self._begin(seq, items)
        if self._may_send() and not self._spooled:
            with self._request(seq, len(items), body):
                answer = self._client.send(
                    self._registration, self._rank, seq, body, within_seconds=self._seconds_left()
                )
            if self._rescued:
                return
            if answer.outcome == "stored":
                self._recovered()
                self._registered = True
                self._acknowledged(answer.acknowledgement)
                return
            if answer.status == 413 and len(items) > 1:  # a proxy on the way takes less than the service does
                self._max_bytes = len(body) // 2
                self._ship_halves(items)
                return
            if answer.outcome == "refused":
                self._refused(seq, len(items), body, answer.detail)
                return
            self._unavailable(answer)
        self._to_spool(seq, len(items), body)

    def _begin(self, seq: int, items: Sequence[Item]) -> None:
        if self._journal is None:
            return
        try:
            self._journal.begin(seq, items[0].step, items[-1].step)
        except OSError as error:
            text = f"what is sent cannot be noted: {error}; a training resumed now would store some rows twice"
            self._complaints.say("journal", text)

    def _ship_halves(self, items: Sequence[Item]) -> None:
        self._ship(items[: len(items) // 2])
        self._ship(items[len(items) // 2 :])

    def _acknowledged(self, acknowledgement: Mapping[str, Any] | None) -> None:
        if self._on_acknowledged is not None and acknowledgement is not None:
            try:
                self._on_acknowledged(acknowledgement)
            except Exception as error:
                self._complaints.say("acknowledgement", f"an acknowledgement could not be read: {error!r}")

    def _to_spool(self, seq: int, steps: int, body: bytes) -> None:
        if self._folder is None:
            self._drop(steps)
            return
        try:
            dropped = self._folder.put(self._registration, seq, steps, body)
        except Exception as error:
            self._drop(steps)
            self._complaints.say("spool", f"recorded steps are lost, the spool cannot be written: {error}")
            return
        self._spooled = True
        if dropped:
            self._drop(dropped)
            self._complaints.say("spool full", f"the spool {self._folder.path} is full; its oldest steps are dropped")

    def _refused(self, seq: int, steps: int, body: bytes, detail: str) -> None:
        self._drop(steps)
        self._complaints.say("refused", f"{detail} (set aside in the spool's refused/)")
        if self._folder is not None:
            try:
                self._folder.put_aside(self._registration, seq, steps, body)
            except OSError as error:
                self._complaints.say("spool", f"a refused batch could not be kept: {error}")

    def _unavailable(self, answer: Answer) -> None:
        delay = min(_FIRST_DELAY_SECONDS * 2**self._failures, _LONGEST_DELAY_SECONDS) * self._random.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 16)
        self._told_to_wait = answer.retry_after_seconds is not None
        if answer.retry_after_seconds is not None:  # and not all ranks at that very moment
            delay = answer.retry_after_seconds + self._random.uniform(0.0, _FIRST_DELAY_SECONDS)
        self._retry_at = time.monotonic() + delay
        where = f"kept in {self._folder.path}" if self._folder is not None else "DROPPED, there is no spool"
        self._complaints.say("unavailable", f"{answer.detail}; training goes on, recorded steps are {where}")

    def _recovered(self) -> None:
        if self._failures:
            logger.info("%s answers again", self._client.url)
        self._failures = 0
        self._retry_at = 0.0
        self._told_to_wait = False
        self._complaints.forget("unavailable")

    def _catch_up(self) -> None:
        """A slice of what is overdue: registration, this run's spool, then what earlier runs left."""
        if not self._may_send() or not self._backlog():
            return
        if not self._registered:
            with self._request():
                answer = self._client.register(self._registration, within_seconds=self._seconds_left())
            if answer.outcome == "unavailable":
                self._unavailable(answer)
                return
            if answer.outcome == "refused":
                self._complaints.say("registration", f"the run could not be registered: {answer.detail}")
            self._registered = True
            self._recovered()
        if self._spooled and self._folder is not None:
            drained = self._drain(self._folder, self._registration)
            self._drop(drained.refused_steps)
            self._acknowledged(drained.acknowledgement)
            # what cannot be read or removed here waits for the next process
            self._spooled = drained.left > 0 and not drained.stuck
        elif self._leftovers is not None and not self._closing:
            if (folder := self._leftovers.next()) is None:
                self._leftovers = None
            else:
                self._leftovers.note(folder, self._drain(folder, None))

    def _drain(self, folder: SpoolFolder, registration: RunCreate | None) -> Drained:
        until = min(time.monotonic() + _DRAIN_SLICE_SECONDS, self._deadline)
        deadline = self._deadline if self._closing else None
        with self._request():
            drained = drain(self._client, folder, registration=registration, until=until, deadline=deadline)
        if drained.sent:
            self._recovered()
        if drained.refused:
            self._complaints.say("refused", f"{drained.refusal} (set aside in {folder.path / 'refused'})")
        if drained.unavailable is not None:
            self._unavailable(drained.unavailable)
        elif drained.stuck:
            assert drained.problem is not None
            self._complaints.say(f"spool {folder.path}", drained.problem)
        return drained

    def _finish(self) -> None:
        while self._spooled and self._may_send():
            self._catch_up()
        if (last_word := self._last_word()) is None:
            return
        left = self._seconds_left()
        if not self._spooled and left is not None and left > 0:
            with self._request():
                answer = self._client.update(self._registration, last_word, within_seconds=left)
            if answer.outcome == "stored":
                self._acknowledged(answer.acknowledgement)
                return
            self._complaints.say("end", answer.detail)
        if self._folder is not None and not self._abandoned:
            self._folder.put_end(self._registration, last_word)

    def _last_word(self) -> RunUpdate | None:
        """The end, with what this process dropped; None where there is nothing to say."""
        if self._end is None:
            return None
        dropped = self._dropped_before + self._dropped
        drops = {self._rank: {self._process: dropped}} if dropped else None
        if self._rank != 0:
            return RunUpdate(dropped_by_process=drops) if drops else None
        return self._end.model_copy(update={"dropped_by_process": drops}) if drops else self._end
