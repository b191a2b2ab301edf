"""Pages and the figures' JSON: what the browser asks for besides `/v1`.

A page is rendered once; then the page script keeps it current. It fetches the page's `fragment` (the same template
without the frame) and replaces the parts that changed, and it fetches figures as JSON for `Plotly.react`.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, quote

import plotly
import plotly.graph_objects as go
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.templating import Jinja2Templates
from plotly.offline import get_plotlyjs_version

from brn_core import __version__
from brn_core.wire import METRICS, Layer, Metric
from dashboard.figures import layer_map as layer_maps
from dashboard.figures import schedule as schedules
from dashboard.figures.palette import PALETTES, Theme
from dashboard.figures.scalars import scalar_panels
from service import query
from service.app import COOKIE, cookie_value, require_token
from service.diagnosis.finding import SEVERITIES, Finding
from service.memo import Memo
from service.schemas import Run
from service.settings import Settings
from service.store import Store

HERE: Final = Path(__file__).parent
PLOTLY_NAME: Final = f"plotly-{get_plotlyjs_version()}.min.js"
DEFAULT_STATISTIC: Final = "gap"
STALLED_SECONDS: Final = 60
"""A running run that sent nothing for this long is shown as stalled."""

GROUPS: Final = {
    "correction": "Correction: r, d, limits, clipping",
    "gap": "Train-inference gap",
    "noise": "Sampling noise",
    "statistics": "Batch and moving statistics",
    "health": "Health",
}
"""Heading of each group of METRICS in the selector, in order."""

MARKS: Final = {"ok": "✓", "info": "i", "warning": "!", "critical": "✕"}
"""A sign for each severity, so that none is told by colour alone."""

templates = Jinja2Templates(directory=HERE / "templates")
public = APIRouter(include_in_schema=False)
router = APIRouter(include_in_schema=False, dependencies=[Depends(require_token)])

_HEADERS: Final = {
    # Only scripts of ours run. Plotly sets styles on elements, hence unsafe-inline for those.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class RunView:
    """A run in the words of a page."""

    run: Run
    state: str
    norm: str
    batch: str
    progress: float | None

    @property
    def href(self) -> str:
        return f"/runs/{quote(self.run.id)}"


def run_view(run: Run, layers: Sequence[Layer], now: datetime) -> RunView:
    """What a page says of a run at the time `now`."""
    silent = (now - run.updated_at).total_seconds()
    kinds = sorted({layer.kind for layer in layers})
    batch = "?" if run.batch_size is None else f"{run.batch_size:,}"
    return RunView(
        run=run,
        state="stalled" if run.status == "running" and silent > STALLED_SECONDS else run.status,
        norm=f"{' + '.join(kinds)} × {len(layers)}" if kinds else "no layers",
        batch=f"{batch} × {run.world_size} rank{'' if run.world_size == 1 else 's'}",
        progress=None if not run.planned_steps else min(1.0, (run.last_step or 0) / run.planned_steps),
    )


def by_severity(findings: tuple[Finding, ...]) -> list[Finding]:
    """The worst first; equal ones in the order given."""
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))


def statistic_groups() -> list[tuple[str, list[Metric]]]:
    """METRICS for a selector: (heading, statistics) in reading order."""
    return [(title, [metric for metric in METRICS if metric.group == group]) for group, title in GROUPS.items()]


def evidence_href(path: str) -> str:
    """A link below this service's root, whatever the path says."""
    return "/" + path.lstrip("/\\")


def number(value: float | None) -> str:
    """Four digits, with a true minus sign: `−0.1234`, `1,235`, `12,346`."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")


@cache
def asset(name: str) -> str:
    """Address of a static file, with its content in it: a browser never mixes files of two versions."""
    digest = hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


templates.env.filters |= {"number": number, "evidence_href": evidence_href}
templates.env.globals |= {"marks": MARKS, "plotly_name": PLOTLY_NAME, "version": __version__, "asset": asset}
templates.env.trim_blocks = templates.env.lstrip_blocks = True


# ------------------------------------------------------------------------------------------------------------ pages


@router.get("/")
def runs_page(request: Request) -> Response:
    return _render(request, "runs.html", _runs_context(request))


@router.get("/fragment")
def runs_fragment(request: Request) -> Response:
    return _render(request, "runs_live.html", _runs_context(request))


@router.get("/runs/{run_id}")
def run_page(request: Request, run_id: str) -> Response:
    context = _run_context(request, run_id)
    return _render(request, "run.html", context | {"groups": statistic_groups(), "default_stat": DEFAULT_STATISTIC})


@router.get("/runs/{run_id}/fragment")
def run_fragment(request: Request, run_id: str) -> Response:
    return _render(request, "run_live.html", _run_context(request, run_id))


def _runs_context(request: Request) -> dict[str, Any]:
    now = datetime.now(UTC)
    views = [run_view(run, _layers(request, run), now) for run in query.runs(_store(request))]
    return {"views": views, "root": str(request.base_url).rstrip("/")}


def known_layers() -> Memo[list[Layer]]:
    """What `app.state.known_layers` holds."""
    return Memo(5000)


def _layers(request: Request, run: Run) -> list[Layer]:
    """The layers of a run in the list, which come without; asked for again when the run's own record changes."""
    known: Memo[list[Layer]] = request.app.state.known_layers
    record = run.model_dump_json(exclude={"layers", "updated_at", "last_step", "rows", "verdict"})
    return known.get(record, lambda: query.layers(_store(request), run.id))


def _run_context(request: Request, run_id: str) -> dict[str, Any]:
    store = _store(request)
    run = query.run(store, run_id)
    diagnosis = query.diagnosis(store, run_id)
    return {
        "view": run_view(run, run.layers, datetime.now(UTC)),
        "run": run,
        "diagnosis": diagnosis,
        "findings": by_severity(diagnosis.findings),
        "heights": {"schedule": schedules.HEIGHT, "heatmap": layer_maps.height(len(run.layers))},
        "config": {key: _config_text(value) for key, value in run.config.items()},
    }


def _config_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _render(request: Request, name: str, context: dict[str, Any], status: int = 200) -> Response:
    return templates.TemplateResponse(request, name, context, status_code=status, headers=_HEADERS)


def message(request: Request, status: int, title: str, text: str) -> Response:
    """A page that says why there is no other."""
    return _render(request, "message.html", {"title": title, "text": text}, status)


# ---------------------------------------------------------------------------------------------------------- figures

ThemeQuery = Annotated[Theme, Query()]
LayerQuery = Annotated[int | None, Query(ge=0)]


@router.get("/runs/{run_id}/figures/schedule")
def schedule_figure(
    request: Request, run_id: str, layer: LayerQuery = None, compact: bool = False, theme: ThemeQuery = "light"
) -> Response:
    store = _store(request)
    run = query.run(store, run_id)
    answer = query.series(store, run_id, schedules.STATISTICS, layer=layer)
    return _figure(
        schedules.schedule_view(
            answer, layers=run.layers, planned=run.schedule, compact=compact, palette=PALETTES[theme]
        )
    )


@router.get("/runs/{run_id}/figures/heatmap")
def heatmap_figure(
    request: Request,
    run_id: str,
    stat: str = DEFAULT_STATISTIC,
    layer: LayerQuery = None,
    compact: bool = False,
    theme: ThemeQuery = "light",
) -> Response:
    answer = query.heatmap(_store(request), run_id, stat)
    return _figure(layer_maps.layer_map(answer, selected=layer, compact=compact, palette=PALETTES[theme]))


@router.get("/runs/{run_id}/figures/scalars")
def scalars_figure(
    request: Request,
    run_id: str,
    columns: Annotated[int, Query(ge=1, le=4)] = 2,
    theme: ThemeQuery = "light",
) -> Response:
    answer = query.scalars(_store(request), run_id)
    return _figure(scalar_panels(answer, columns=columns, palette=PALETTES[theme]))


def _figure(figure: go.Figure) -> Response:
    return Response(figure.to_json(), media_type="application/json", headers={"Cache-Control": "no-store"})


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


# ------------------------------------------------------------------------------------------------------------ login


@public.get("/login")
def login_page(request: Request, to: str = "/") -> Response:
    return _render(request, "login.html", {"to": local_path(to), "wrong": False})


@public.post("/login")
async def login(request: Request, to: str = "/") -> Response:
    """Takes the token from the form and leaves the browser a cookie made from it."""
    settings: Settings = request.app.state.settings
    if settings.token is None:
        return RedirectResponse(local_path(to), status_code=303)
    token = settings.token.get_secret_value()
    if not hmac.compare_digest((await _form_value(request, "token")).encode(), token.encode()):
        return _render(request, "login.html", {"to": local_path(to), "wrong": True}, status=401)
    response = RedirectResponse(local_path(to), status_code=303)
    response.set_cookie(COOKIE, cookie_value(token), max_age=30 * 86_400, httponly=True, samesite="strict", path="/")
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


# ------------------------------------------------------------------------------------------------------------ plotly


@public.get(f"/static/{PLOTLY_NAME}")
def plotly_script(request: Request) -> Response:
    """plotly.js as the wheel ships it. Its name holds the version, so browsers keep it for good."""
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(_plotly_source(), media_type="text/javascript", headers=headers)
    return Response(_plotly_gzip(), media_type="text/javascript", headers=headers | {"Content-Encoding": "gzip"})


def _plotly_source() -> bytes:
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()


@cache
def _plotly_gzip() -> bytes:
    return gzip.compress(_plotly_source(), compresslevel=6, mtime=0)
