"""The whole web application: the service with the pages in front of it, in one process."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ExceptionHandler

from dashboard import figure_routes, login, pages
from dashboard.drawings import store_of
from dashboard.glance import Glances
from dashboard.templating import STATIC, message, static_version
from service import answers
from service import app as service_app
from service.access import require_token
from service.errors import NotFound, ServiceError, Unauthorized
from service.memo import Memo
from service.schemas import Run
from service.settings import Settings

_BELOW_A_RUN: Final = re.compile(r"/runs/(?P<run>[^/]+)/")


def create_app(settings: Settings) -> FastAPI:
    """The service and its pages.

    Raises:
        CannotStart: the store cannot be opened.
    """
    app = service_app.create_app(settings)
    app.state.known_layers = pages.known_layers()
    app.state.glances = Glances()
    app.state.recorded = Memo(4)  # what the schedule advisor reads of a run
    for part in (login, pages, figure_routes):
        app.include_router(part.router)
    app.mount(f"/static/{static_version()}", _Forever(directory=STATIC))
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)  # leaves event streams alone
    for kind in (ServiceError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _as_page(app.exception_handlers[kind]))
    return app


class _Forever(StaticFiles):
    """Files whose address changes with their content: browsers keep them and never ask again."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers.update(login.FOREVER)
        return answer


def _as_page(answer: ExceptionHandler) -> ExceptionHandler:
    """The service's answer to an error, as a page where a browser navigates; scripts and /v1 keep getting JSON."""

    async def handler(request: Request, error: Exception) -> Response:
        if request.url.path.startswith("/v1/") or "text/html" not in request.headers.get("accept", ""):
            plain: Response = await answer(request, error)  # type: ignore[arg-type, misc]
            return plain
        if isinstance(error, Unauthorized):
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?to={quote(here)}", status_code=303)
        if isinstance(error, ServiceError):
            run = await run_in_threadpool(_run_of, request) if isinstance(error, NotFound) else None
            return message(request, error.status, error.title, error.detail, run)
        if isinstance(error, HTTPException) and error.status_code == 404:
            run = await run_in_threadpool(_run_of, request)
            return message(request, 404, "Not found", f"There is no page at {request.url.path}.", run)
        if isinstance(error, HTTPException | RequestValidationError):
            status = error.status_code if isinstance(error, HTTPException) else 422
            return message(request, status, "That did not work", "The address asks for something unknown.")
        await answer(request, error)  # type: ignore[arg-type, misc]  # it logs the error
        return message(request, 500, "The service failed on this page", "Its log says why. Try again later.")

    return handler


def _run_of(request: Request) -> Run | None:
    """The run below whose address something was not found, if that exists and the one who asks may see it."""
    below = _BELOW_A_RUN.match(request.url.path)
    if below is None:
        return None
    try:
        require_token(request)  # an address that no route has was not asked for one
        return answers.run(store_of(request), below["run"])
    except ServiceError:
        return None
