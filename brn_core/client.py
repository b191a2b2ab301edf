"""The service's write side over HTTP: what is sent, and what an answer means.

2xx with the service's own words                stored
404 of a batch or an update                     register the run, send again
408, 425, 429, 5xx, 401, 403, no answer, an     unavailable: try again later (`Retry-After` counts)
answer that makes no sense
any other                                       refused: never try again
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final, Literal, Self

import httpx

from brn_core.wire import MEDIA_TYPE, RunCreate, RunUpdate, text_without_secrets, url_without_user

SENDER_THREAD: Final = "brn-shipper"
# httpx logs every request at INFO: a line a second in the log of a training that only asked to be watched
logging.getLogger("httpx").addFilter(lambda record: record.threadName != SENDER_THREAD)

MAX_ANSWER_BYTES: Final = 1024 * 1024
"""Most bytes of an answer that are read; what says more is not the service."""

_LONGEST_RETRY_AFTER_SECONDS: Final = 300.0
_RETRYABLE: Final = frozenset({401, 403, 408, 425, 429})
_IDLE_SECONDS: Final = 4.0
"""An idle connection is used again for so long: less than the 5 s after which uvicorn closes its end of one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request: `stored` for good, `unavailable` (try again later) or `refused` (never try again)."""

    outcome: Literal["stored", "unavailable", "refused"]
    detail: str
    status: int | None = None
    retry_after_seconds: float | None = None
    acknowledgement: Mapping[str, Any] | None = None


class Client:
    """The service's write side over one connection that is kept alive. Use from one thread.

    Args:
        url: root of the service, `http://host:port`.
        token: bearer token, or None.
        timeout_seconds: longest wait for connecting, for a piece to be written or read, and for the whole answer once
            it has begun.

    Raises:
        ValueError: the url is not http(s) with a host, or the token cannot stand in a header.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float = 5.0) -> None:
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            raise ValueError(
                f"url must look like http://127.0.0.1:8321, got {text_without_secrets(str(url))!r}"
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url must look like http://127.0.0.1:8321, got {text_without_secrets(url)!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("token must be printable ASCII, as it travels in a header")
        self.url = url_without_user(url).rstrip("/")  # what logs and answers show
        self._timeout_seconds = timeout_seconds
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=_IDLE_SECONDS),
            # a proxy of the environment cannot reach this machine's loopback
            trust_env=parsed.host not in ("127.0.0.1", "localhost", "::1"),
        )

    def register(self, run: RunCreate, *, within_seconds: float | None = None) -> Answer:
        """Say what the run is. `unavailable` also where the address is no such service at all (404, 405)."""
        content = run.model_dump_json().encode()
        return self._request("POST", "/v1/runs", content, "application/json", within_seconds=within_seconds)

    def send(self, run: RunCreate, rank: int, seq: int, body: bytes, *, within_seconds: float | None = None) -> Answer:
        """Send one batch; a service that does not know the run is told of it first."""
        path, params = f"/v1/runs/{run.id}/batches", {"rank": rank, "seq": seq}
        answer = self._to_known(
            run, lambda: self._request("POST", path, body, MEDIA_TYPE, params, within_seconds), within_seconds
        )
        if answer.outcome == "stored" and not isinstance((answer.acknowledgement or {}).get("rows"), int):
            return Answer("unavailable", f"{self.url} answered a batch without an acknowledgement")
        return answer

    def update(self, run: RunCreate, update: RunUpdate, *, within_seconds: float | None = None) -> Answer:
        """Change the run; a service that does not know it is told of it first."""
        content = update.model_dump_json(exclude_unset=True).encode()
        path = f"/v1/runs/{run.id}"
        return self._to_known(
            run,
            lambda: self._request("PATCH", path, content, "application/json", within_seconds=within_seconds),
            within_seconds,
        )

    def _to_known(self, run: RunCreate, ask: Callable[[], Answer], within_seconds: float | None) -> Answer:
        answer = ask()
        if answer.status != 404:
            return answer
        registered = self.register(run, within_seconds=within_seconds)
        if registered.outcome != "stored":
            return registered
        answer = ask()
        # registered and still unknown: another copy of the service answered, or someone deleted the run just now
        return replace(answer, outcome="unavailable") if answer.status == 404 else answer

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
    ) -> Answer:
        timeout = self._timeout_seconds if within_seconds is None else min(self._timeout_seconds, within_seconds)
        if timeout <= 0:
            return Answer("unavailable", "no time left to send")
        headers = {"Content-Type": media_type}
        try:
            with self._http.stream(
                method, path, content=content, params=params, headers=headers, timeout=timeout
            ) as response:
                return self._judge(response, _read(response, timeout), path)
        except Exception as error:  # whatever a stranger's bytes, a name server or a proxy make of it: no answer
            return Answer("unavailable", f"no answer from {self.url}: {type(error).__name__} {error}".rstrip())

    def _judge(self, response: httpx.Response, answered: object, path: str) -> Answer:
        status = response.status_code
        if 200 <= status < 300:
            if not isinstance(answered, dict):
                text = f"{self.url} answered {status} but not with JSON; is it the service?"
                return Answer("unavailable", text, status)
            return Answer("stored", "", status, acknowledgement=answered)
        said = (answered.get("detail") or answered.get("title")) if isinstance(answered, dict) else None
        text = " ".join(str(said or response.reason_phrase).split())[:300]
        detail = f"{self.url}{path} answered {status}: {text}"
        wrong_address = status in (404, 405) and path == "/v1/runs"
        if status in _RETRYABLE or status >= 500 or status < 400 or wrong_address:
            return Answer("unavailable", detail, status, _retry_after_seconds(response))
        return Answer("refused", detail, status)


def _read(response: httpx.Response, within_seconds: float) -> object:
    """The answer's JSON, or None where it is none.

    Raises:
        ValueError: it is too long.
        TimeoutError: it trickles in.
    """
    until = time.monotonic() + within_seconds
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > until:
            raise TimeoutError(f"the answer took more than {within_seconds:.3g} s")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


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
