"""Sending batches to the service from a background thread that training never waits for.

offer() -> bounded queue -> [thread] group, encode -> POST -> 2xx: stored
                                                        -> 404: register the run, POST again
                                                        -> 408, 425, 429, 5xx, 401, 403, no or no sensible answer:
                                                           spool, then back off (with jitter; Retry-After counts)
                                                        -> any other: refused; counted, set aside in the spool
"""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeVar

import httpx

from brn_core.spool import Spool, SpoolFolder
from brn_core.wire import MEDIA_TYPE, RunCreate, RunUpdate

logger = logging.getLogger("brn_core")

_THREAD_NAME: Final = "brn-shipper"
# httpx logs every request at INFO: a line a second in the log of a training that only asked to be watched
logging.getLogger("httpx").addFilter(lambda record: record.threadName != _THREAD_NAME)

Item = TypeVar("Item")

CAPACITY: Final = 4096
"""Recorded steps that may wait in memory; when it is full the newest is dropped, so what is kept has no holes."""

MAX_STEPS: Final = 256
"""Most recorded steps in one batch."""

MAX_BYTES: Final = 8 * 1024 * 1024
"""Largest body that is sent as it is; a larger one of several steps is parted (services limit the size of a body)."""

_FIRST_DELAY_SECONDS: Final = 0.5
_LONGEST_DELAY_SECONDS: Final = 30.0
_LONGEST_RETRY_AFTER_SECONDS: Final = 300.0
_RETRYABLE: Final = frozenset({401, 403, 408, 425, 429})
_DRAIN_SLICE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request: `stored` for good, `unavailable` (try again later) or `refused` (never try again)."""

    outcome: Literal["stored", "unavailable", "refused"]
    detail: str
    retry_after_seconds: float | None = None
    acknowledgement: Mapping[str, Any] | None = None


class Client:
    """The service's write side over one connection that is kept alive. Use from one thread.

    Args:
        url: root of the service, `http://host:port`.
        token: bearer token, or None.
        timeout_seconds: longest wait for each of connecting, writing and reading.

    Raises:
        ValueError: the url is not http(s) with a host, or the token cannot stand in a header.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float = 5.0) -> None:
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"url must look like http://127.0.0.1:8321, got {url!r}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url must look like http://127.0.0.1:8321, got {url!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("token must be printable ASCII, as it travels in a header")
        self.url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_seconds,
            # a proxy of the environment cannot reach this machine's loopback
            trust_env=parsed.host not in ("127.0.0.1", "localhost", "::1"),
        )

    def register(self, run: RunCreate, *, within_seconds: float | None = None) -> Answer:
        """Say what the run is. `unavailable` also where the address is no such service at all (404, 405)."""
        answer, _ = self._request(
            "POST", "/v1/runs", run.model_dump_json().encode(), "application/json", within_seconds=within_seconds
        )
        return answer

    def send(self, run: RunCreate, rank: int, seq: int, body: bytes, *, within_seconds: float | None = None) -> Answer:
        """Send one batch; a service that does not know the run is told of it first."""

        def post() -> tuple[Answer, int | None]:
            path = f"/v1/runs/{run.id}/batches"
            return self._request("POST", path, body, MEDIA_TYPE, {"rank": rank, "seq": seq}, within_seconds)

        answer, status = post()
        if status == 404:
            registered = self.register(run, within_seconds=within_seconds)
            if registered.outcome != "stored":
                return registered
            answer, _ = post()
        if answer.outcome == "stored" and not isinstance((answer.acknowledgement or {}).get("rows"), int):
            return Answer("unavailable", f"{self.url} answered a batch without an acknowledgement")
        return answer

    def update(self, run: RunCreate, update: RunUpdate, *, within_seconds: float | None = None) -> Answer:
        """Change the run; a service that does not know it is told of it first."""
        content = update.model_dump_json(exclude_unset=True).encode()
        path = f"/v1/runs/{run.id}"
        answer, status = self._request("PATCH", path, content, "application/json", within_seconds=within_seconds)
        if status == 404:
            registered = self.register(run, within_seconds=within_seconds)
            if registered.outcome != "stored":
                return registered
            answer, _ = self._request("PATCH", path, content, "application/json", within_seconds=within_seconds)
        return answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self,
        method: str,
        path: str,
        content: bytes,
        media_type: str,
        params: dict[str, int] | None = None,
        within_seconds: float | None = None,
    ) -> tuple[Answer, int | None]:
        timeout = self._timeout_seconds if within_seconds is None else min(self._timeout_seconds, within_seconds)
        if timeout <= 0:
            return Answer("unavailable", "no time left to send"), None
        try:
            response = self._http.request(
                method, path, content=content, params=params, headers={"Content-Type": media_type}, timeout=timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Answer("unavailable", f"no answer from {self.url}: {type(error).__name__} {error}".rstrip()), None
        return self._judge(response, path), response.status_code

    def _judge(self, response: httpx.Response, path: str) -> Answer:
        status = response.status_code
        if 200 <= status < 300:
            try:
                acknowledgement = response.json()
            except (json.JSONDecodeError, UnicodeDecodeError):
                acknowledgement = None
            if not isinstance(acknowledgement, dict):
                return Answer("unavailable", f"{self.url} answered {status} but not with JSON; is it the service?")
            return Answer("stored", "", acknowledgement=acknowledgement)
        detail = f"{self.url}{path} answered {status}: {_detail(response)}"
        wrong_address = status in (404, 405) and path == "/v1/runs"
        if status in _RETRYABLE or status >= 500 or status < 400 or wrong_address:
            return Answer("unavailable", detail, retry_after_seconds=_retry_after_seconds(response))
        return Answer("refused", detail)


def _detail(response: httpx.Response) -> str:
    try:
        problem = response.json()
        text = problem.get("detail") or problem.get("title") if isinstance(problem, dict) else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        text = None
    return " ".join(str(text or response.reason_phrase).split())[:300]


def _retry_after_seconds(response: httpx.Response) -> float | None:
    """`Retry-After` as seconds from now, either form of RFC 9110 section 10.2.3; None where absent or senseless."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


@dataclass(frozen=True, slots=True)
class Drained:
    """What draining one spool folder did, in batches (`steps`: recorded steps in those sent)."""

    sent: int
    steps: int
    refused: int
    refused_steps: int
    left: int
    problem: str | None
    retry_after_seconds: float | None = None


def drain(
    client: Client, folder: SpoolFolder, *, registration: RunCreate | None = None, until: float | None = None
) -> Drained:
    """Send a folder's batches, oldest first, then the run's undelivered end; stop where the service is unavailable.

    Args:
        client: where to.
        folder: what to send.
        registration: of the run; by default the folder's own.
        until: `time.monotonic()` at which to stop between two batches.
    """
    sent = steps = refused = refused_steps = 0
    problem: str | None = None
    run = registration or folder.registration()
    parcels = folder.parcels()
    if run is None:
        return Drained(0, 0, 0, 0, len(parcels), f"{folder.path}: run.json is missing or damaged; nothing was sent")
    for done, parcel in enumerate(parcels):
        if until is not None and time.monotonic() >= until:
            return Drained(sent, steps, refused, refused_steps, len(parcels) - done, problem)
        body = parcel.body()
        if body is None:
            continue
        answer = client.send(run, folder.rank, parcel.seq, body)
        if answer.outcome == "unavailable":
            left = len(parcels) - done
            return Drained(sent, steps, refused, refused_steps, left, answer.detail, answer.retry_after_seconds)
        if answer.outcome == "refused":
            refused, refused_steps, problem = refused + 1, refused_steps + parcel.steps, answer.detail
            parcel.set_aside()
        else:
            sent, steps = sent + 1, steps + parcel.steps
            parcel.remove()
    if (end := folder.end()) is not None:
        answer = client.update(run, end)
        if answer.outcome == "unavailable":
            return Drained(sent, steps, refused, refused_steps, 1, answer.detail, answer.retry_after_seconds)
        folder.remove_end()
    folder.tidy()
    return Drained(sent, steps, refused, refused_steps, 0, problem)


class Shipper(Generic[Item]):
    """Groups items (recorded steps) to batches and sends them from its own thread.

    Args:
        client: where to send; the shipper closes it.
        registration: the run.
        rank: global rank of this process. Rank 0 registers the run at once, and sends what earlier runs left behind.
        encode: a batch's body from items; runs in the shipper's thread.
        spool: where batches wait for a service that is away; None: such batches are dropped (and counted).
        flush_seconds: an item waits at most about this long before it is sent.
        capacity: items that may wait in memory.
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
        flush_seconds: float = 1.0,
        capacity: int = CAPACITY,
        on_acknowledged: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._client = client
        self._registration = registration
        self._rank = rank
        self._encode = encode
        self._spool = spool
        self._folder = spool.folder(registration.id, rank) if spool is not None else None
        self._flush_seconds = flush_seconds
        self._capacity = capacity
        self._on_acknowledged = on_acknowledged
        self._items: deque[Item] = deque()
        self._oldest_at = 0.0  # time.monotonic() of the oldest waiting item
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._end: RunUpdate | None = None
        self._dropped = 0
        # unix microseconds: a resumed process of the same run and rank never reuses a number
        self._seq = time.time_ns() // 1000
        self._registered = rank != 0
        self._spooled = self._folder is not None and bool(self._folder.parcels())
        self._leftovers = rank == 0 and spool is not None
        self._failures = 0
        self._retry_at = 0.0
        self._random = random.Random()  # its own: the global generator belongs to training
        self._complaints = Complaints()
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Recorded steps that will never be stored: queue full, spool full or absent, refused by the service."""
        return self._dropped

    def offer(self, item: Item) -> bool:
        """Queue one item. Never blocks on the service: a full queue drops the item, counts it and answers False."""
        with self._changed:
            if self._closing or len(self._items) >= self._capacity:
                self._dropped += 1
                return False
            if not self._items:
                self._oldest_at = time.monotonic()
            self._items.append(item)
            if len(self._items) in (1, MAX_STEPS):  # the moments the thread has something new to decide
                self._changed.notify()
        return True

    def close(self, *, timeout_seconds: float = 5.0, end: RunUpdate | None = None) -> bool:
        """Send what waits until the deadline, spool the rest, then say `end` of the run. Idempotent.

        Returns:
            Whether the thread has ended; False only where a connection hangs past the deadline.
        """
        with self._changed:
            if not self._closing:
                self._closing = True
                self._deadline = time.monotonic() + timeout_seconds
                self._end = end
                self._changed.notify()
        self._thread.join(timeout_seconds + 6.0)  # a request in flight ends by its own timeout
        return not self._thread.is_alive()

    # Everything below runs in the shipper's thread.

    def _drop(self, steps: int) -> None:
        with self._changed:
            self._dropped += steps

    def _run(self) -> None:
        try:
            while True:
                items, closing = self._collect()
                self._guarded(lambda items=items: self._ship(items), len(items))  # type: ignore[misc]
                self._guarded(self._catch_up, 0)
                if closing and not self._items:
                    break
            self._guarded(self._finish, 0)
        finally:
            self._client.close()

    def _guarded(self, act: Callable[[], None], steps: int) -> None:
        try:
            act()
        except Exception as error:
            self._drop(steps)
            self._complaints.say("sending", f"recording could not be sent: {type(error).__name__}: {error}")

    def _collect(self) -> tuple[list[Item], bool]:
        """Wait until a batch is due, the spool may be tried again, or the shipper is closing."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                due_at = float("inf")
                if self._items:
                    due_at = now if len(self._items) >= MAX_STEPS else self._oldest_at + self._flush_seconds
                if self._backlog():
                    due_at = min(due_at, max(self._retry_at, now))
                if due_at <= now:
                    break
                self._changed.wait(None if due_at == float("inf") else due_at - now)
            items = [self._items.popleft() for _ in range(min(len(self._items), MAX_STEPS))]
            self._oldest_at = time.monotonic()
            return items, self._closing

    def _backlog(self) -> bool:
        return not self._registered or self._spooled or self._leftovers

    def _seconds_left(self) -> float | None:
        return self._deadline - time.monotonic() if self._closing else None

    def _may_send(self) -> bool:
        left = self._seconds_left()
        if left is not None and left <= 0:
            return False
        return time.monotonic() >= self._retry_at

    def _ship(self, items: list[Item]) -> None:
        if not items:
            return
        body = self._encode(items)
        if not body:
            return
        if len(body) > MAX_BYTES and len(items) > 1:
            self._ship(items[: len(items) // 2])
            self._ship(items[len(items) // 2 :])
            return
        seq, self._seq = self._seq, self._seq + 1
        if self._may_send() and not self._spooled:
            answer = self._client.send(self._registration, self._rank, seq, body, within_seconds=self._seconds_left())
            if answer.outcome == "stored":
                self._recovered()
                self._registered = True
                self._guarded(lambda: self._acknowledged(answer), 0)
                return
            if answer.outcome == "refused":
                self._refused(seq, len(items), body, answer.detail)
                return
            self._unavailable(answer.detail, answer.retry_after_seconds)
        self._to_spool(seq, len(items), body)

    def _acknowledged(self, answer: Answer) -> None:
        if self._on_acknowledged is not None and answer.acknowledgement is not None:
            self._on_acknowledged(answer.acknowledgement)

    def _to_spool(self, seq: int, steps: int, body: bytes) -> None:
        if self._folder is None:
            self._drop(steps)
            return
        try:
            dropped = self._folder.put(self._registration, seq, steps, body)
        except OSError as error:
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

    def _unavailable(self, detail: str, retry_after_seconds: float | None) -> None:
        longest = min(_FIRST_DELAY_SECONDS * 2**self._failures, _LONGEST_DELAY_SECONDS)
        self._failures = min(self._failures + 1, 16)
        delay = retry_after_seconds if retry_after_seconds is not None else longest * self._random.uniform(0.5, 1.0)
        self._retry_at = time.monotonic() + delay
        where = f"kept in {self._folder.path}" if self._folder is not None else "DROPPED, there is no spool"
        self._complaints.say("unavailable", f"{detail}; training goes on, recorded steps are {where}")

    def _recovered(self) -> None:
        if self._failures:
            logger.info("%s answers again", self._client.url)
        self._failures = 0
        self._retry_at = 0.0
        self._complaints.forget("unavailable")

    def _catch_up(self) -> None:
        """A slice of what is overdue: registration, this run's spool, then what earlier runs left."""
        if not self._may_send() or not self._backlog():
            return
        if not self._registered:
            answer = self._client.register(self._registration, within_seconds=self._seconds_left())
            if answer.outcome == "unavailable":
                self._unavailable(answer.detail, answer.retry_after_seconds)
                return
            if answer.outcome == "refused":
                self._complaints.say("registration", f"the run could not be registered: {answer.detail}")
            self._registered = True
            self._recovered()
        until = min(time.monotonic() + _DRAIN_SLICE_SECONDS, self._deadline)
        if self._spooled and self._folder is not None:
            drained = self._drain(self._folder, until, self._registration)
            self._drop(drained.refused_steps)
            self._spooled = drained.left > 0
        elif self._leftovers and self._spool is not None and not self._closing:
            others = [folder for folder in self._spool.folders() if folder.run != self._registration.id]
            undrained = next((f for f in others if f.registration() is not None), None)
            if undrained is None:
                self._leftovers = False
                return
            drained = self._drain(undrained, until, None)
            if not drained.left:
                logger.info("sent what run %s had left in the spool: %d steps", undrained.run, drained.steps)

    def _drain(self, folder: SpoolFolder, until: float, registration: RunCreate | None) -> Drained:
        drained = drain(self._client, folder, registration=registration, until=until)
        if drained.refused:
            self._complaints.say("refused", f"{drained.problem} (set aside in {folder.path / 'refused'})")
        elif drained.problem is not None:
            self._unavailable(drained.problem, drained.retry_after_seconds)
        else:
            self._recovered()
        return drained

    def _finish(self) -> None:
        while self._spooled and self._may_send():
            self._catch_up()
        if self._end is None:
            return
        left = self._seconds_left()
        if not self._spooled and left is not None and left > 0:
            answer = self._client.update(self._registration, self._end, within_seconds=left)
            if answer.outcome == "stored":
                return
            self._complaints.say("end", answer.detail)
        if self._folder is not None:
            self._folder.put_end(self._registration, self._end)


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
