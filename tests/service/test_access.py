"""Who may do what, and what every answer carries."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError
from synthetic import create, layer_rows, run_record, send

from service.access import COOKIE, cookie_value
from service.guard import Guard
from service.metrics import Metrics
from service.settings import Settings

WRITE, READ = "may do everything", "may only read"


@pytest.fixture
def two_tokens(app: FastAPI, client: httpx.Client) -> Iterator[httpx.Client]:
    """A client without a token, of the session's service with both."""
    before = app.state.settings
    app.state.settings = before.model_copy(update={"token": SecretStr(WRITE), "read_token": SecretStr(READ)})
    try:
        with httpx.Client(base_url=client.base_url, timeout=30) as fresh:
            yield fresh
    finally:
        app.state.settings = before


def test_the_reading_token_reads_and_never_writes(two_tokens: httpx.Client, client: httpx.Client, run_id: str) -> None:
    two_tokens.headers["authorization"] = f"Bearer {WRITE}"
    assert create(two_tokens, run_record(run_id, layers=1)).status_code == 201
    for name, value in (("authorization", f"Bearer {READ}"), ("cookie", f"{COOKIE}={cookie_value(READ)}")):
        two_tokens.headers.pop("authorization", None)
        two_tokens.headers[name] = value
        assert two_tokens.get(f"/v1/runs/{run_id}").status_code == 200
        assert two_tokens.get("/metrics").status_code == 200
        for answer in (
            create(two_tokens, run_record(run_id, layers=1)),
            send(two_tokens, run_id, {"layers": layer_rows([1], 1)}),
            two_tokens.patch(f"/v1/runs/{run_id}", json={"status": "finished"}),
            two_tokens.delete(f"/v1/runs/{run_id}"),
        ):
            assert answer.status_code == 403
            assert "BRN_SERVICE_READ_TOKEN" in answer.json()["detail"]


def test_numbers_for_prometheus_want_the_token(two_tokens: httpx.Client) -> None:
    assert two_tokens.get("/metrics").status_code == 401


def test_either_token_logs_a_browser_in_and_no_other_does(two_tokens: httpx.Client) -> None:
    for token, status in ((WRITE, 303), (READ, 303), (WRITE + "x", 401), ("", 401)):
        assert two_tokens.post("/login", data={"token": token}).status_code == status


@pytest.mark.parametrize("changes", [{"read_token": READ}, {"read_token": READ, "token": READ}])
def test_a_reading_token_wants_another_one_that_writes(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="BRN_SERVICE_TOKEN"):
        Settings(**changes)


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 201), (None, 201)]
)
def test_pages_of_other_sites_cannot_write(client: httpx.Client, run_id: str, site: str | None, status: int) -> None:
    headers = {"sec-fetch-site": site} if site else {}
    assert client.post("/v1/runs", json={"id": run_id, "name": "x"}, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8321", 403),
        ("evil.example.:8321", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.1", 403),
        ("other.internal:8321", 403),
        ("host.docker.internal.evil.example", 403),
        ("host.docker.internal:8321", 201),
        ("host.containers.internal:8321", 201),
        ("127.0.0.1:8321", 201),
        ("192.0.2.7", 201),
        ("[::1]:8321", 201),
        ("localhost:8321", 201),
        ("brn.localhost", 201),
        ("service:8321", 201),
    ],
)
def test_without_a_token_a_page_whose_name_leads_here_is_refused(
    client: httpx.Client, run_id: str, host: str, status: int
) -> None:
    headers = {"host": host, "sec-fetch-site": "same-origin"}
    answer = client.post("/v1/runs", json={"id": run_id, "name": "x"}, headers=headers)
    assert answer.status_code == status
    for address in ("/v1/runs", "/", "/metrics"):
        assert client.get(address, headers=headers).status_code == (403 if status == 403 else 200), address
    if status == 403:
        assert "set BRN_SERVICE_TOKEN=" in answer.json()["detail"]
        assert repr(host) in answer.json()["detail"]


def test_with_a_token_any_name_will_do(two_tokens: httpx.Client) -> None:
    headers = {"host": "brn.example.com", "authorization": f"Bearer {READ}"}
    assert two_tokens.get("/v1/runs", headers=headers).status_code == 200


def test_every_answer_tells_browsers_to_take_it_for_nothing_else(client: httpx.Client) -> None:
    for address in ("/v1/runs", "/v1/runs/nobody", "/healthz", "/", "/nowhere"):
        headers = client.get(address).headers
        assert headers["x-content-type-options"] == "nosniff", address
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


def test_the_access_log_is_one_json_object_a_request_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    async def hello(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body"})  # type: ignore[operator]

    guarded = Guard(hello, max_body_bytes=10, access_log=True, metrics=Metrics())  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "service.access"):

        async def ask() -> None:
            transport = httpx.ASGITransport(guarded)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.get(
                    "/login?token=hunter22", headers={"authorization": "Bearer hunter22", "user-agent": "hunter22"}
                )

        asyncio.run(ask())
    (record,) = (record for record in caplog.records if record.name == "service.access")
    line = json.loads(record.getMessage())
    assert (line["method"], line["path"], line["status"]) == ("GET", "/login", 204)
    assert "hunter22" not in record.getMessage()
