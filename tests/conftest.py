"""Fixtures that need a running service: one server over one embedded store for the whole session, one run id a test.

chDB holds one engine a process, hence one store; a test that needs a second one starts a process of its own. Rows to
send are made by `synthetic.py` beside this file.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from dashboard.app import create_app
from service.settings import Settings
from service.store import Store

_counter = itertools.count()


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the session's service: a temporary store, and no waiting between looks for news."""
    path = tmp_path_factory.mktemp("service") / "store"
    return Settings(store=f"chdb://{path}", events_seconds=0.02, diagnosis_seconds=0.0, max_body_bytes=2**20)


@pytest.fixture(scope="session")
def app(settings: Settings) -> FastAPI:
    """The whole web application, as `brn-serve` has it: the service with the pages. `client` starts it."""
    return create_app(settings)


@pytest.fixture(scope="session")
def client(app: FastAPI) -> Iterator[httpx.Client]:
    """An HTTP client of the session's service, which listens on a free port of this machine."""
    with serving(app) as base_url, httpx.Client(base_url=base_url, timeout=30) as client:
        yield client


@pytest.fixture
def store(client: httpx.Client, app: FastAPI) -> Store:
    """The session's store, for tests below HTTP."""
    found: Store = app.state.store
    return found


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    """A run id of this test's own."""
    return f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower())[:60].strip('-')}-{next(_counter)}"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serves an application from a thread; gives its base URL."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # says TCP: no delayed answers
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server took too long to start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
