"""A tiny HTTP server that takes runs and batches as the service does, and misbehaves when told to.

It speaks real HTTP from a thread of its own, so that a test of the sender tests sockets too.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from brn_core import wire

HEALTHY = {"code": "HEALTHY", "severity": "ok", "summary": "Nothing stands out."}


@dataclass(frozen=True)
class Fault:
    """What to answer instead of doing the work."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"detail": "broken on purpose"}'
    delay_seconds: float = 0.0
    hang_up: bool = False


class FakeService:
    """Stores what it is sent; `fault(method, path)` may answer with a Fault first.

    Attributes:
        runs: the registration of each run, as JSON.
        statuses: the last status each run was given.
        failures: why runs failed, as they said last.
        dropped: how many steps were dropped in the end, of those runs that said so.
        batches: the tables of each stored batch by (run, rank, seq).
        duplicates: how many batches came again.
        requests: (method, path, headers) of everything that arrived.
    """

    def __init__(self, fault: Callable[[str, str], Fault | None] | None = None, port: int = 0) -> None:
        self.fault = fault or (lambda method, path: None)
        self.findings: list[dict[str, str]] = []
        self.runs: dict[str, Any] = {}
        self.statuses: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.dropped: dict[str, int] = {}
        self._said_of_drops: dict[str, dict[tuple[int, int], int]] = {}  # by run, then by rank and process
        self.batches: dict[tuple[str, int, int], dict[str, Any]] = {}
        self.duplicates = 0
        self.connections = 0
        self.open: set[socket.socket] = set()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self.open):  # gone is gone: a connection kept alive would still be answered
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def rows(self, table: str, rank: int | None = None) -> list[dict[str, Any]]:
        """All stored rows of one table, in the order of their batches."""
        with self._lock:
            stored = sorted(self.batches.items())
        return [
            row
            for (_, from_rank, _), tables in stored
            if table in tables and rank in (None, from_rank)
            for row in tables[table].to_pylist()
        ]

    def steps(self) -> list[int]:
        """The steps for which a row of scalars arrived, once each, in order of arrival."""
        return list(dict.fromkeys(row["step"] for row in self.rows("scalars")))

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        with self._lock:
            parts = path.strip("/").split("/")
            if method == "POST" and path == "/v1/runs":
                run = wire.RunCreate.model_validate_json(body)
                known = run.id in self.runs
                self.runs[run.id] = json.loads(body)
                self.statuses[run.id] = "running"
                return (200 if known else 201), self.runs[run.id]
            if parts[:2] != ["v1", "runs"] or parts[2] not in self.runs:
                return 404, {"title": "Not Found", "detail": f"no run {parts[-1]!r}"}
            if method == "PATCH":
                update = wire.RunUpdate.model_validate_json(body)
                if update.status is not None:
                    self.statuses[parts[2]] = update.status
                if update.dropped_by_process:
                    said = self._said_of_drops.setdefault(parts[2], {})
                    said |= {
                        (rank, process): steps
                        for rank, own in update.dropped_by_process.items()
                        for process, steps in own.items()
                    }
                    self.dropped[parts[2]] = sum(said.values())
                if update.failure is not None:
                    self.failures[parts[2]] = update.failure
                return 200, self.runs[parts[2]]
            try:
                tables = wire.decode_batch(body)
            except wire.WireError as error:
                return 422, {"title": "Invalid", "detail": str(error)}
            key = (parts[2], int(query["rank"][0]), int(query["seq"][0]))
            duplicate = key in self.batches
            self.duplicates += duplicate
            self.batches.setdefault(key, tables)
            rows = sum(table.num_rows for table in tables.values())
            return 200, {"rows": rows, "duplicate": duplicate, "verdict": HEALTHY, "findings": self.findings}


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            service.connections += 1
            service.open.add(self.connection)

        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            url = urlsplit(self.path)
            service.requests.append((self.command, url.path, dict(self.headers)))
            fault = service.fault(self.command, url.path)
            if fault is None:
                status, answer = service.answer(self.command, url.path, parse_qs(url.query), body)
                self._say(status, {}, json.dumps(answer).encode())
                return
            if fault.delay_seconds:
                time.sleep(fault.delay_seconds)
            if fault.hang_up:
                self.close_connection = True
                self.connection.close()
                return
            self._say(fault.status, fault.headers, fault.body)

        do_PATCH = do_POST

        def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the sender did not wait

        def finish(self) -> None:
            service.open.discard(self.connection)
            with contextlib.suppress(OSError, ValueError):  # hung up
                super().finish()

    return Handler


def eventually(condition: Callable[[], object], within_seconds: float = 20.0) -> None:
    """Poll until `condition()` is true; fail after a deadline."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
