"""How fast one client may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request

from service.__main__ import _config
from service.rates import CLIENTS, Rates
from service.settings import Settings


def test_a_bucket_lets_a_burst_through_and_then_what_comes_in() -> None:
    now = 0.0
    rates = Rates(10, clock=lambda: now)
    assert [rates.take("a") for _ in range(21)] == [True] * 20 + [False]
    now = 0.35  # three and a half more
    assert [rates.take("a") for _ in range(4)] == [True] * 3 + [False]
    now = 0.4  # the half is not lost
    assert rates.take("a")
    now = 1000.0  # and no more than a burst is saved up
    assert sum(rates.take("a") for _ in range(100)) == 20


def test_a_rate_below_one_a_second_lets_one_through_now_and_then() -> None:
    now = 0.0
    rates = Rates(0.1, clock=lambda: now)
    assert [rates.take("a"), rates.take("a")] == [True, False]
    now = 11.0
    assert [rates.take("a"), rates.take("a")] == [True, False]


def test_clients_are_counted_apart_and_memory_is_bounded() -> None:
    rates = Rates(0.5, clock=lambda: 0.0)
    assert [rates.take(str(client)) for client in range(2 * CLIENTS)] == [True] * 2 * CLIENTS
    assert len(rates._buckets) == CLIENTS
    assert not rates.take(str(2 * CLIENTS - 1))


@pytest.fixture
def rates(app: FastAPI) -> Iterator[Rates]:
    """Two requests an address, of the session's service, and never more."""
    before = app.state.rates
    app.state.rates = Rates(1, clock=lambda: 0.0)
    yield app.state.rates
    app.state.rates = before


def test_a_client_that_asks_too_often_is_sent_away_and_others_are_not(client: httpx.Client, rates: Rates) -> None:
    assert [client.get("/v1/runs").status_code for _ in range(3)] == [200, 200, 429]
    answer = client.get("/v1/runs", headers={"authorization": "Bearer any token"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["content-type"] == "application/problem+json"
    assert "BRN_SERVICE_CLIENT_REQUESTS_PER_SECOND" in answer.json()["detail"]
    page = client.get("/", headers={"accept": "text/html"})
    assert (page.status_code, "Too many requests" in page.text) == (429, True)
    assert client.post("/login", data={"token": "guess"}).status_code == 429
    assert client.get("/healthz").status_code == 200, "the process still says that it lives"
    assert rates.take("192.0.2.1")
    for address in ("/readyz", "/login"):
        assert client.get(address).status_code == 429


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ("", "192.0.2.7", "127.0.0.1"),  # anybody can send the header
        ("127.0.0.1", "192.0.2.7", "192.0.2.7"),
        (
            "127.0.0.1, 10.0.0.0/8",
            "198.51.100.1, 192.0.2.7, 10.1.2.3",
            "192.0.2.7",
        ),  # what the client added is not believed
        ("10.0.0.0/8", "192.0.2.7", "127.0.0.1"),
    ],
)
def test_only_a_trusted_proxy_says_who_the_client_is(trusted: str, forwarded: str, client: str) -> None:
    app = FastAPI()

    @app.get("/")
    def whom(request: Request) -> str:
        assert request.client is not None
        return request.client.host

    config = _config(app, Settings(trusted_proxies=trusted))
    config.load()

    async def ask() -> str:
        transport = httpx.ASGITransport(config.loaded_app, client=("127.0.0.1", 5000))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
            answer: str = (await asking.get("/", headers={"X-Forwarded-For": forwarded})).json()
            return answer

    assert asyncio.run(ask()) == client
