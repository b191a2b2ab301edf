"""What every request passes: a limit on its body, headers that keep browsers safe, a count of its time, a log line."""

from __future__ import annotations

import json
import logging
import time
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics

log = logging.getLogger("service.access")

HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    # Answers are data; the pages say themselves what they load.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Set on every answer that does not set them itself."""


class Guard:
    """Wraps an application. No header, query or body is ever logged: a secret may stand in any of them."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, access_log: bool, metrics: Metrics) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._access_log = access_log
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, streams, received = time.perf_counter(), 0, False, 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(
                    413, f"a body may have {self._max_body_bytes} bytes (BRN_SERVICE_MAX_BODY_BYTES): send less at once"
                )
            return message

        async def completed(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                streams = headers.get("content-type", "").startswith("text/event-stream")
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, limited, completed)
        finally:
            seconds = time.perf_counter() - began
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"  # the template: no run's name, few of them
            if not streams:  # an event stream lasts as long as its reader
                self._metrics.query_seconds.labels(scope["method"], path).observe(seconds)
            if self._access_log:
                log.info("%s", self._line(scope, status, seconds, received))

    def _line(self, scope: Scope, status: int, seconds: float, received: int) -> str:
        client = scope.get("client")
        return json.dumps(
            {
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,  # 0: the connection ended first
                "seconds": round(seconds, 4),
                "body_bytes": received,
            }
        )
