"""The FastAPI application: routes, errors as problem+json, the token, and what starts and stops with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from brn_core import __version__
from service import events, history_routes, query_routes, routes
from service.access import require_pace, require_token
from service.diagnoser import Diagnoser
from service.errors import Busy, Crowded, Invalid, ServiceError, TooLarge, TooOften, Unauthorized, Unavailable
from service.guard import Guard
from service.intake import RETRY_AFTER_SECONDS, Intake
from service.metrics import CONTENT_TYPE, Metrics
from service.rates import Rates
from service.retention import Retention
from service.routes import problems
from service.schemas import Health, Problem
from service.settings import Settings
from service.store import Store
from service.webhook import Webhook

log = logging.getLogger(__name__)

_PROBLEM: Final = "application/problem+json"


def create_app(settings: Settings) -> FastAPI:
    """The service over its store, which is opened here and closed when the application shuts down.

    Raises:
        CannotStart: the store cannot be opened.
    """
    store = Store(settings)
    metrics = Metrics()
    webhook = None if settings.webhook is None else Webhook(settings.webhook.get_secret_value())
    diagnoser = Diagnoser(store, settings.diagnosis_seconds, None if webhook is None else webhook.offer)
    retention = Retention(store, settings)
    intake = Intake(store, settings, metrics, diagnoser)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.closing = asyncio.Event()  # set when event streams should end
        if webhook is not None:
            webhook.start()
        diagnoser.start()
        intake.start()
        retention.start()
        yield
        retention.stop()
        intake.stop()
        diagnoser.stop()
        if webhook is not None:
            webhook.stop()
        store.close()

    app = _Service(
        title="Batch Renormalization diagnostics",
        version=__version__,
        description="What normalization does to a training run: statistics of every normalization layer, and findings.",
        lifespan=lifespan,
        docs_url=None,  # the bundled pages load scripts from a CDN
        redoc_url=None,
        openapi_tags=[
            {"name": "runs", "description": "What is recorded, and what it says of itself."},
            {"name": "ingest", "description": "Rows from the ranks of a run."},
            {"name": "queries", "description": "Statistics over steps and layers, and what they mean."},
            {"name": "process", "description": "For what watches this process."},
        ],
    )
    app.state.settings = settings
    app.state.store = store
    app.state.diagnoser = diagnoser
    app.state.intake = intake
    app.state.metrics = metrics
    app.state.event_streams = 0  # open now
    metrics.event_streams.set_function(lambda: app.state.event_streams)
    app.state.rates = Rates(settings.client_requests_per_second)
    for part in (routes, query_routes, history_routes, events):
        app.include_router(part.router, dependencies=[Depends(require_token)], responses=problems(429))
    app.include_router(_process)
    app.include_router(_metrics, dependencies=[Depends(require_token)], responses=problems(429))
    app.add_middleware(Guard, max_body_bytes=settings.max_body_bytes, access_log=settings.access_log, metrics=metrics)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unexpected_error)
    return app


class _Service(FastAPI):
    """FastAPI, whose OpenAPI document says of every error that it is problem+json."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for methods in document["paths"].values():
            for route in methods.values():
                for status, answer in route["responses"].items():
                    if int(status) >= 400:
                        answer["content"] = {_PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        return document


# -------- process

_process = APIRouter(tags=["process"])


@_process.get("/healthz", summary="The process answers")
async def healthz() -> Health:
    return Health(status="ok", version=__version__)


@_process.get(
    "/readyz",
    summary="The process answers and so does its store",
    responses=problems(429, 503),
    dependencies=[Depends(require_pace)],
)
def readyz(request: Request) -> Health:
    store: Store = request.app.state.store
    try:
        store.engine.rows("SELECT 1")  # not store.rows: whether the engine answers does not hang on what waits for it
    except Exception as error:
        raise Unavailable("the store does not answer") from error
    return Health(status="ok", version=__version__)


_metrics = APIRouter(tags=["process"], responses=problems(401, 503))


@_metrics.get("/metrics", summary="Numbers for Prometheus", response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Rows taken in and how long they took, what waits, what was sent away, queries, streams, the store's size."""
    store: Store = request.app.state.store
    numbers: Metrics = request.app.state.metrics
    numbers.store_bytes.set(store.size_bytes())
    return Response(numbers.text(), media_type=CONTENT_TYPE)


# -------- errors


def _problem(
    status: int,
    title: str,
    detail: str,
    errors: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body = Problem(type="about:blank", title=title, status=status, detail=detail, errors=errors)
    return JSONResponse(
        body.model_dump(mode="json", exclude_none=True),
        status_code=status,
        headers=headers,
        media_type=_PROBLEM,
    )


async def _on_service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    headers = None
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    elif isinstance(error, Busy | TooOften | Crowded):
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return _problem(error.status, error.title, error.detail, headers=headers)


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [
        {"where": ".".join(str(part) for part in entry["loc"]), "message": entry["msg"]} for entry in error.errors()
    ]
    detail = "; ".join(f"{entry['where']}: {entry['message']}" for entry in found[:5])
    return _problem(Invalid.status, Invalid.title, detail, errors=found)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == TooLarge.status:
        return _problem(TooLarge.status, TooLarge.title, error.detail)
    if error.status_code == 400:  # FastAPI's answer to a body that is no UTF-8 or nested too deep
        return _problem(Invalid.status, Invalid.title, "body: cannot be read as JSON; send it as UTF-8, not too deep")
    detail = f"{request.method} {request.url.path}: {error.detail}; the routes are listed in /openapi.json"
    return _problem(error.status_code, error.detail, detail, headers=dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody hears it; but it is no failure of ours to log


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback and closes the connection, which the client must hear to open another one.
    log.error("%s %s failed: %r", request.method, request.url.path, error)
    detail = "the service failed on this request; its log says why"
    return _problem(500, ServiceError.title, detail, headers={"Connection": "close"})
