"""Figures as JSON, for `Plotly.react`: what pages fetch besides themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Final

import plotly.graph_objects as go
from fastapi import APIRouter, Depends, Query, Request, Response

from brn_core.wire import Schedule
from dashboard import drawings
from dashboard.drawings import Look, store_of
from dashboard.figures.channels import ChannelStatistic
from dashboard.figures.frame import Steps
from dashboard.figures.palette import Theme
from dashboard.views import DEFAULT_STATISTIC
from service.access import require_token
from service.answers.comparison import Axis
from service.errors import Invalid, NotFound
from service.store import Store

router = APIRouter(include_in_schema=False, dependencies=[Depends(require_token)])

DRAWN: Final[dict[str, Callable[[Store, str, Look], go.Figure]]] = {
    "schedule": drawings.schedule,
    "heatmap": drawings.heatmap,
    "scalars": drawings.scalars,
    "causes": drawings.causes,
    "moments": drawings.moments,
    "batch": drawings.effective_batch,
    "ranks": drawings.rank_spread,
    "rank-curves": drawings.rank_curves,
}
"""By the name in its address, every figure of a run that needs no more than a look."""

StepQuery = Annotated[int | None, Query(ge=0, lt=2**53)]


def _look(
    theme: Theme = "light",
    compact: bool = False,
    columns: Annotated[int, Query(ge=1, le=4)] = 3,
    layer: Annotated[int | None, Query(ge=0)] = None,
    rank: Annotated[int | None, Query(ge=0)] = None,
    stat: str = DEFAULT_STATISTIC,
    smooth: Annotated[int, Query(ge=1, le=1000)] = 1,
    first: Annotated[int | None, Query(alias="from", ge=0, lt=2**53)] = None,
    last: Annotated[int | None, Query(alias="to", ge=0, lt=2**53)] = None,
    mark: str = "",
) -> Look:
    """What an address says of how to draw; of a range both ends count or none."""
    ends = re.fullmatch(r"(\d{1,15})-(\d{1,15})", mark)
    if first is not None and last is not None and first > last:
        raise Invalid(f"from must not be after to, got from={first} and to={last}")
    steps = Steps(
        first if last is not None else None,
        last if first is not None else None,
        (int(ends[1]), int(ends[2])) if ends else None,
    )
    return Look(theme, compact, columns, steps, layer, rank, stat, smooth)


LookOf = Annotated[Look, Depends(_look)]


@router.get("/runs/{run_id}/figures/evidence")
def evidence_figure(request: Request, run_id: str, look: LookOf, finding: str = "") -> Response:
    return _sent(drawings.finding_evidence(store_of(request), run_id, look, finding))


@router.get("/runs/{run_id}/figures/channels")
def channels_figure(request: Request, run_id: str, look: LookOf, of: ChannelStatistic = "gap") -> Response:
    return _sent(drawings.channels(store_of(request), run_id, look, of))


@router.get("/runs/{run_id}/figures/snapshot")
def snapshot_figure(request: Request, run_id: str, look: LookOf, snapshot: StepQuery = None) -> Response:
    return _sent(drawings.snapshot(store_of(request), run_id, look, snapshot))


@router.get("/runs/{run_id}/figures/advisor")
def advisor_figure(
    request: Request,
    run_id: str,
    look: LookOf,
    bn_steps: Annotated[int, Query(ge=0, lt=2**53)],
    r_steps: Annotated[int, Query(ge=0, lt=2**53)],
    d_steps: Annotated[int, Query(ge=0, lt=2**53)],
    r_max: Annotated[float, Query(ge=1, le=1e6)],
    d_max: Annotated[float, Query(ge=0, le=1e6)],
) -> Response:
    if bn_steps > min(r_steps, d_steps):
        raise Invalid(f"bn_steps must not be after r_steps or d_steps, got {bn_steps}, {r_steps} and {d_steps}")
    tried = Schedule(bn_steps=bn_steps, r_steps=r_steps, d_steps=d_steps, r_max=r_max, d_max=d_max)
    return _sent(drawings.advisor(store_of(request), run_id, look, tried, request.app.state.recorded))


@router.get("/runs/{run_id}/figures/{name}")
def run_figure(request: Request, run_id: str, name: str, look: LookOf) -> Response:
    draw = DRAWN.get(name)
    if draw is None:
        raise NotFound(f"there is no figure {name!r}; there are {', '.join(sorted(DRAWN))}")
    return _sent(draw(store_of(request), run_id, look))


@router.get("/figures/compare")
def compare_figure(
    request: Request, look: LookOf, runs: str, by: Axis = "step", scalar: str = "", group: str = ""
) -> Response:
    store = store_of(request)
    found, records = drawings.comparison_of(store, runs.split(","), [look.stat], by)
    return _sent(drawings.compared(store, found, records, look, by=by, scalar=scalar, group=group))


def _sent(figure: go.Figure) -> Response:
    return Response(figure.to_json(), media_type="application/json", headers={"Cache-Control": "no-store"})
