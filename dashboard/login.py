"""Signing in with the service's token, and the files that need no token: plotly.js and our own."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

import plotly
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from dashboard.templating import PLOTLY_NAME, render
from service.access import COOKIE, cookie_value, require_pace, right_of_token
from service.settings import Settings

router = APIRouter(include_in_schema=False)

FOREVER: Final = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
"""For files whose address changes with their content."""


@router.get("/login", dependencies=[Depends(require_pace)])
def login_page(request: Request, to: str = "/") -> Response:
    settings: Settings = request.app.state.settings
    if settings.token is None:  # nothing to log in to
        return RedirectResponse("/", status_code=303)
    return render(request, "login.html", {"to": local_path(to), "wrong": False})


@router.post("/login", dependencies=[Depends(require_pace)])
async def login(request: Request, to: str = "/") -> Response:
    """Takes the token from the form and leaves the browser a cookie made from it."""
    settings: Settings = request.app.state.settings
    if settings.token is None:
        return RedirectResponse(local_path(to), status_code=303)
    token = await _form_value(request, "token")
    if right_of_token(settings, token) is None:
        return render(request, "login.html", {"to": local_path(to), "wrong": True}, status=401)
    response = RedirectResponse(local_path(to), status_code=303)
    response.set_cookie(COOKIE, cookie_value(token), max_age=30 * 86_400, httponly=True, samesite="lax", path="/")
    return response


async def _form_value(request: Request, name: str, longest: int = 4096) -> str:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > longest:
            return ""
    return parse_qs(body.decode("utf-8", "replace")).get(name, [""])[0]


def local_path(target: str) -> str:
    """The path if it is one of ours, else the front page: a login link must not lead to another site."""
    return target if target.startswith("/") and not target.startswith(("//", "/\\")) else "/"


@router.get(f"/static/{PLOTLY_NAME}", dependencies=[Depends(require_pace)])
def plotly_script(request: Request) -> Response:
    """plotly.js as the wheel ships it. Its name holds the version, so browsers keep it for good."""
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(plotly_source(), media_type="text/javascript", headers=FOREVER)
    return Response(_plotly_gzip(), media_type="text/javascript", headers=FOREVER | {"Content-Encoding": "gzip"})


def plotly_source() -> bytes:
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()


@cache
def _plotly_gzip() -> bytes:
    return gzip.compress(plotly_source(), compresslevel=6, mtime=0)
