"""The FastAPI application: routes, errors as problem+json, the token, and what starts and stops with it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from brn_core import __version__
from service.diagnoser import Diagnoser
from service.errors import Invalid, ServiceError, Unauthorized, Unavailable
from service.routes import problems, router
from service.schemas import Health, Problem
from service.settings import Settings
from service.store import Store

log = logging.getLogger(__name__)

_PROBLEM: Final = "application/problem+json"

COOKIE: Final = "brn_token"
"""Name of the browser's cookie; its value is `cookie_value(token)`."""


def create_app(settings: Settings) -> FastAPI:
    """The service over its store, which is opened here and closed when the application shuts down.

    Raises:
        CannotStart: the store cannot be opened.
    """
    store = Store(settings)
    diagnoser = Diagnoser(store, settings.diagnosis_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.closing = asyncio.Event()  # set when event streams should end
        diagnoser.start()
        yield
        diagnoser.stop()
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
    app.include_router(router, dependencies=[Depends(require_token)])
    app.include_router(_process)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
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


# -------- token


def cookie_value(token: str) -> str:
    """What the browser's cookie holds: made from the token, but not the token itself."""
    return hmac.new(token.encode(), b"brn cookie", hashlib.sha256).hexdigest()


def is_authorized(request: Request) -> bool:
    """Whether a request carries the token, as `Authorization: Bearer` or as the cookie; true where none is set."""
    settings: Settings = request.app.state.settings
    if settings.token is None:
        return True
    token = settings.token.get_secret_value()
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    bearer = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
    cookie = hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), cookie_value(token).encode())
    return bearer or cookie


def require_token(request: Request) -> None:
    """Lets authorized requests through.

    Raises:
        Unauthorized: for all others.
    """
    if not is_authorized(request):
        raise Unauthorized("send the service's token as `Authorization: Bearer <BRN_SERVICE_TOKEN>`")


# -------- process

_process = APIRouter(tags=["process"])


@_process.get("/healthz", summary="The process answers")
async def healthz() -> Health:
    return Health(status="ok", version=__version__)


@_process.get("/readyz", summary="The process answers and so does its store", responses=problems(503))
def readyz(request: Request) -> Health:
    store: Store = request.app.state.store
    try:
        store.rows("SELECT 1")
    except Exception as error:
        raise Unavailable("the store does not answer") from error
    return Health(status="ok", version=__version__)


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
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
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
    detail = f"{request.method} {request.url.path}: {error.detail}; the routes are listed in /openapi.json"
    return _problem(error.status_code, error.detail, detail, headers=dict(error.headers or {}))


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback and closes the connection, which the client must hear to open another one.
    log.error("%s %s failed: %r", request.method, request.url.path, error)
    detail = "the service failed on this request; its log says why"
    return _problem(500, ServiceError.title, detail, headers={"Connection": "close"})
