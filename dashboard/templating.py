"""Templates, and the words that they turn values into."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from fastapi import Request, Response
from fastapi.templating import Jinja2Templates
from plotly.offline import get_plotlyjs_version

from brn_core import __version__
from dashboard.views import run_view
from service.schemas import Run

HERE: Final = Path(__file__).parent
STATIC: Final = HERE / "static"
PLOTLY_NAME: Final = f"plotly-{get_plotlyjs_version()}.min.js"

MARKS: Final = {"ok": "✓", "info": "i", "warning": "!", "critical": "✕"}
"""A sign for each severity, so that none is told by colour alone."""

_HEADERS: Final = {
    # Only scripts of ours run. Plotly sets styles on elements, hence unsafe-inline for those.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def number(value: float | None) -> str:
    """Four digits, with a true minus sign: `−0.1234`, `1,235`, `12,346`."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")


def setting(value: object) -> str:
    """A value of a run's configuration as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def evidence_href(path: str) -> str:
    """A link below this service's root, whatever the path says."""
    return "/" + path.lstrip("/\\")


@cache
def static_version() -> str:
    """Changes with the content of any static file: modules import each other, so they are of one version together."""
    digest = hashlib.sha256()
    for file in sorted(STATIC.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def asset(name: str) -> str:
    """Address of a static file, with the version of all of them in it: a browser never mixes two versions."""
    return f"/static/{static_version()}/{name}"


templates = Jinja2Templates(directory=HERE / "templates")
templates.env.filters |= {"number": number, "setting": setting, "evidence_href": evidence_href}
templates.env.globals |= {"marks": MARKS, "plotly_name": PLOTLY_NAME, "version": __version__, "asset": asset}
templates.env.trim_blocks = templates.env.lstrip_blocks = True


def render(request: Request, name: str, context: dict[str, Any], status: int = 200) -> Response:
    return templates.TemplateResponse(request, name, context, status_code=status, headers=_HEADERS)


def message(request: Request, status: int, title: str, text: str, run: Run | None = None) -> Response:
    """A page that says why there is no other, and leads to the run it would have been about."""
    said = {"title": title, "text": f"{text[:1].upper()}{text[1:].rstrip('.')}."}
    return render(request, "message.html", said | {"view": run_view(run, run.layers) if run else None}, status)
