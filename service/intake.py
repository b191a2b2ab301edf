"""The way of a batch through the process: bounded in memory, written in groups, acknowledged when it is on disk.

    request -> Room (memory set aside, or 429) -> decoder threads -> Writer's queue -> put_batches, a group at a time
            <- acknowledgement ------------------------------------------------------<- on disk

No request holds a thread while it waits, so however many ranks send at once, queries are answered.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from brn_core import wire
from service import answers, ingest, ipc
from service.diagnoser import Diagnoser
from service.errors import Busy, NotFound, ServiceError, TooLarge, Unavailable
from service.metrics import Metrics
from service.schemas import Accepted
from service.settings import Settings
from service.store import Batch, Outcome, Store

log = logging.getLogger(__name__)

GROUP_ROWS: Final = 100_000
"""Rows after which a group takes no further batch."""

RETRY_AFTER_SECONDS: Final = 1
"""When a rank that was sent away may try again."""


class Room:
    """Memory that batches may take at the same time, from the first byte read until they are on disk."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        return self._taken

    def change(self, held: int, new: int) -> None:
        """Replaces what one batch holds.

        Raises:
            Busy: there is no room for more, because of what others hold.
        """
        with self._lock:
            others = self._taken - held
            if new > held and others and others + new > self._limit:
                raise Busy(
                    f"batches of {others} bytes are on their way to the store and {self._limit} may be "
                    "(BRN_SERVICE_QUEUE_BYTES): send it again later"
                )
            self._taken = others + new


class _Hold:
    """What one batch holds of the room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._bytes = 0

    def grow(self, size: int) -> None:
        self._room.change(self._bytes, self._bytes + size)
        self._bytes += size

    def release(self) -> None:
        held, self._bytes = self._bytes, 0
        self._room.change(held, 0)


@dataclass(frozen=True, slots=True)
class _Waiting:
    batch: Batch
    since: float  # time.monotonic() of its last byte
    done: Future[Outcome] = field(default_factory=Future)


class Writer:
    """Writes batches from one thread: all that came while the last group was written are the next group."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes what waits, then ends."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, batch: Batch, since: float) -> Future[Outcome]:
        """Queues a batch; the answer comes when it is on disk. Cancelling it before its turn leaves it out."""
        waiting = _Waiting(batch, since)
        with self._changed:
            if self._stopping:
                raise Unavailable("the service is stopping; send the batch again later")
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.done

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def _loop(self) -> None:
        while group := self._next_group():
            self._write(group)

    def _next_group(self) -> list[_Waiting]:
        """Waits for batches; empty when it is time to end."""
        group: list[_Waiting] = []
        rows = 0
        with self._changed:
            while not group:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return []
                while self._queue and rows < GROUP_ROWS:
                    waiting = self._queue.popleft()
                    if waiting.done.set_running_or_notify_cancel():
                        group.append(waiting)
                        rows += waiting.batch.rows
        return group

    def _write(self, group: list[_Waiting]) -> None:
        try:
            outcomes = self._store.put_batches([waiting.batch for waiting in group])
        except Exception as error:
            if len(group) > 1 and not isinstance(error, ServiceError):  # one that the engine rejects fails alone
                for waiting in group:
                    self._write([waiting])
                return
            self._metrics.batches.labels("failed").inc(len(group))
            for waiting in group:
                waiting.done.set_exception(error)
            return
        now = time.monotonic()
        self._metrics.group.observe(len(group))
        for waiting, outcome in zip(group, outcomes, strict=True):
            self._metrics.batches.labels(outcome).inc()
            if outcome == "stored":
                self._metrics.lag.observe(now - waiting.since)
                for name, table in waiting.batch.tables.items():
                    self._metrics.rows.labels(name).inc(table.num_rows)
            waiting.done.set_result(outcome)


class Intake:
    """Takes batches in from requests."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics, diagnoser: Diagnoser) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._diagnoser = diagnoser
        self._room = Room(settings.queue_bytes)
        self._writer = Writer(store, metrics)
        # Threads of its own: those that queries wait in are not missed here, and the other way round.
        self._decoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decoder")
        metrics.held_bytes.set_function(lambda: self._room.taken)
        metrics.waiting.set_function(lambda: self._writer.waiting)

    def start(self) -> None:
        self._writer.start()

    def stop(self) -> None:
        """Waits until what was taken in is on disk."""
        self._decoders.shutdown()
        self._writer.stop()

    async def take(self, run_id: str, rank: int, seq: int, media: str, parts: AsyncIterator[bytes]) -> Accepted:
        """Stores the batch in a request's body unless `(run, rank, seq)` is stored; returns when its rows are on disk.

        Args:
            run_id: of a run that was created.
            rank: global rank that recorded the rows.
            seq: the batch's number.
            media: Arrow's or JSON's media type.
            parts: the body.

        Raises:
            Busy: more batches wait than there is room for.
            TooLarge, Invalid, NotFound: the batch will never be stored as it is.
            StoreFull, Unavailable: send it again later.
        """
        hold = _Hold(self._room)
        try:
            body = await self._read(parts, hold)
            since = time.monotonic()
            loop = asyncio.get_running_loop()
            batch = await loop.run_in_executor(self._decoders, self._decode, run_id, rank, seq, media, body, hold)
            del body
            done = self._writer.submit(batch, since)
        except BaseException as error:
            hold.release()
            if isinstance(error, Busy):
                self._metrics.batches.labels("busy").inc()
            raise
        done.add_done_callback(lambda _: hold.release())
        outcome = await asyncio.wrap_future(done)
        if outcome == "gone":
            raise NotFound(f"run {run_id!r} was deleted while the batch was on its way")
        if outcome == "stored":
            self._diagnoser.touch(run_id)
        return Accepted(
            rows=batch.rows if outcome == "stored" else 0,
            duplicate=outcome == "duplicate",
            verdict=batch.run.verdict or answers.NOT_YET,
            findings=self._diagnoser.warnings(run_id),
        )

    async def _read(self, parts: AsyncIterator[bytes], hold: _Hold) -> bytes:
        """The body, read no further than the limit."""
        limit = self._settings.max_body_bytes
        read, size = [], 0
        async for part in parts:
            size += len(part)
            if size > limit:
                raise TooLarge(f"a body may have {limit} bytes (BRN_SERVICE_MAX_BODY_BYTES): send the batch in parts")
            hold.grow(len(part))
            read.append(part)
        return b"".join(read)

    def _decode(self, run_id: str, rank: int, seq: int, media: str, body: bytes, hold: _Hold) -> Batch:
        run = answers.stored_run(self._store, run_id)
        if media == wire.MEDIA_TYPE:
            size = ipc.decoded_bytes(body)
            if size > self._settings.max_batch_bytes:
                raise TooLarge(
                    f"a batch may take {self._settings.max_batch_bytes} bytes when decompressed "
                    f"(BRN_SERVICE_MAX_BATCH_BYTES), got {size}: send it in parts"
                )
            hold.grow(size)
            tables = ingest.from_arrow(body)
        else:
            hold.grow(ingest.JSON_GROWTH * min(len(body), ingest.MAX_JSON_BYTES))
            tables = ingest.from_json(body)
        ingest.check(run.record, rank, tables, self._settings.max_batch_rows)
        # A table without rows says nothing.
        tables = {name: table for name, table in tables.items() if table.num_rows}
        return Batch(run, rank, seq, tables, body if media == wire.MEDIA_TYPE else None)
