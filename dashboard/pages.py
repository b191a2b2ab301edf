"""The pages. Each is rendered once; then its script keeps it current.

It fetches the page's `fragment` (the same template without the frame) and replaces the parts that changed, and it
fetches figures as JSON (`figure_routes`). What a page shows is in its address.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse

from brn_core.wire import Layer, Schedule
from dashboard import drawings
from dashboard.differences import compare_context
from dashboard.drawings import store_of
from dashboard.figures import causes as cause_views
from dashboard.figures import channels as channel_views
from dashboard.figures import effective_batch as batch_views
from dashboard.figures import layer_map as layer_maps
from dashboard.figures import moments as moment_views
from dashboard.figures import rank_spread as rank_views
from dashboard.figures import schedule as schedules
from dashboard.glance import Glances
from dashboard.report import Shown, comparison_report, run_report
from dashboard.templating import render
from dashboard.views import (
    DEFAULT_STATISTIC,
    by_severity,
    findings_context,
    run_view,
    statistic_groups,
)
from service import answers, history, windows
from service.access import require_token
from service.answers.comparison import Axis
from service.answers.records import RunOrder
from service.diagnosis.finding import SEVERITIES, Severity
from service.diagnosis.health import SLOW_RATIO
from service.errors import Invalid, NotFound
from service.memo import Memo
from service.schemas import Ranks, Run, RunState

router = APIRouter(include_in_schema=False, dependencies=[Depends(require_token)])

PAGE_RUNS: Final = 50
STATES: Final[tuple[RunState, ...]] = ("running", "stalled", "crashed", "finished", "failed")
WORST_CHANNELS: Final = 12
COMPARE_SECONDS: Final = 1.0
"""A comparison waits no longer for diagnoses that nobody asked for yet: they come with its next refresh."""


# ---------------------------------------------------------------------------------------------------------- all runs

Words = Annotated[list[str], Query()]


@dataclass(frozen=True, slots=True)
class Asked:
    """Which runs a list is to show, and in which order: what its address says."""

    search: str
    tags: tuple[str, ...]
    states: tuple[RunState, ...]
    severities: tuple[Severity, ...]
    sort: RunOrder
    ascending: bool
    cursor: str | None

    def filters(self) -> list[tuple[str, str]]:
        """The parameters that choose."""
        return [
            *[("search", self.search)] * bool(self.search),
            *[("tag", tag) for tag in self.tags],
            *[("state", state) for state in self.states],
            *[("severity", severity) for severity in self.severities],
        ]

    def order(self) -> list[tuple[str, str]]:
        """The parameters that order."""
        return [("sort", self.sort)] * (self.sort != "created") + [("ascending", "true")] * self.ascending


def _asked(
    search: Annotated[str, Query(max_length=200)] = "",
    tag: Words = [],  # noqa: B006 FastAPI copies it
    state: Annotated[list[RunState], Query()] = [],  # noqa: B006
    severity: Annotated[list[Severity], Query()] = [],  # noqa: B006
    sort: RunOrder = "created",
    ascending: bool = False,
    cursor: str | None = None,
) -> Asked:
    tags = tuple(dict.fromkeys(filter(None, tag)))  # the form's choice of one more tag may be none
    return Asked(search, tags, tuple(state), tuple(severity), sort, ascending, cursor)


AskedOf = Annotated[Asked, Depends(_asked)]


@router.get("/")
def runs_page(request: Request, asked: AskedOf) -> Response:
    return render(request, "runs.html", _runs_context(request, asked))


@router.get("/fragment")
def runs_fragment(request: Request, asked: AskedOf) -> Response:
    return render(request, "runs_live.html", _runs_context(request, asked))


def _runs_context(request: Request, asked: Asked) -> dict[str, Any]:
    store = store_of(request)
    page = answers.page(
        store,
        search=asked.search,
        tags=asked.tags,
        states=asked.states,
        severities=asked.severities,
        sort=asked.sort,
        descending=not asked.ascending,
        limit=PAGE_RUNS,
        cursor=asked.cursor,
    )
    glances: Glances = request.app.state.glances
    filters, order = asked.filters(), asked.order()

    def address(pairs: Sequence[tuple[str, str]]) -> str:
        return f"/?{urlencode(pairs)}" if pairs else "/"

    return {
        "views": [run_view(run, _layers(request, run)) for run in page.runs],
        "glances": glances.of(store, page.runs),
        "marked": history.marks(store, {run.id: run.verdict.code for run in page.runs}),
        "page": page,
        "asked": asked,
        "filtered": bool(filters),
        "states": STATES,
        "severities": SEVERITIES[::-1],
        "all_tags": answers.tags(store),
        "first_href": address([*filters, *order]) if asked.cursor else None,
        "next_href": address([*filters, *order, ("cursor", page.next)]) if page.next else None,
        "sort_href": {
            name: address([*filters, *[("sort", name)] * (name != "created"), *_turned(name, asked)])
            for name in get_args(RunOrder)
        },
        "tag_href": lambda tag: address([*filters, *[("tag", tag)] * (tag not in asked.tags), *order]),
        "root": str(request.base_url).rstrip("/"),
    }


def _turned(name: str, asked: Asked) -> list[tuple[str, str]]:
    """A second click on a heading turns the order round; names begin with a."""
    up = not asked.ascending if name == asked.sort else name == "name"
    return [("ascending", "true")] if up else []


def known_layers() -> Memo[list[Layer]]:
    """What `app.state.known_layers` holds."""
    return Memo(5000)


def _layers(request: Request, run: Run) -> list[Layer]:
    """The layers of a run in the list, which come without; asked for again when the run's own record changes."""
    known: Memo[list[Layer]] = request.app.state.known_layers
    record = run.model_dump_json(exclude={"layers", "updated_at", "last_step", "rows", "verdict", "state"})
    return known.get(record, lambda: answers.layers(store_of(request), run.id))


# ----------------------------------------------------------------------------------------------------------- one run


@router.get("/runs/{run_id}")
def run_page(request: Request, run_id: str) -> Response:
    context = _run_context(request, run_id)
    return render(request, "run.html", context | {"groups": statistic_groups(), "default_stat": DEFAULT_STATISTIC})


@router.get("/runs/{run_id}/fragment")
def run_fragment(request: Request, run_id: str) -> Response:
    return render(request, "run_live.html", _run_context(request, run_id))


@router.get("/runs/{run_id}/layers")
def first_layer_page(request: Request, run_id: str) -> Response:
    return RedirectResponse(f"{run_view(answers.run(store_of(request), run_id), []).href}/layers/0", status_code=303)


@router.get("/runs/{run_id}/layers/{layer}")
def layer_page(request: Request, run_id: str, layer: int, snapshot: int | None = None) -> Response:
    return render(request, "layer.html", _layer_context(request, run_id, layer, snapshot))


@router.get("/runs/{run_id}/layers/{layer}/fragment")
def layer_fragment(request: Request, run_id: str, layer: int, snapshot: int | None = None) -> Response:
    return render(request, "layer_fragment.html", _layer_context(request, run_id, layer, snapshot))


def _layer_context(request: Request, run_id: str, layer: int, snapshot: int | None) -> dict[str, Any]:
    store = store_of(request)
    context = _head_context(request, run_id)
    run: Run = context["run"]
    if not 0 <= layer < len(run.layers):
        raise NotFound(f"run {run_id!r} has {len(run.layers)} layers, numbered from 0: there is no layer {layer}")
    found = answers.channels(store, run_id, layer=layer, worst=WORST_CHANNELS)
    if snapshot in found.steps and snapshot != found.step:
        found = answers.channels(store, run_id, layer=layer, step=snapshot, worst=WORST_CHANNELS)
    heights = {
        "moments": moment_views.HEIGHT,
        "schedule": schedules.HEIGHT,
        "batch": batch_views.HEIGHT,
        "channels": channel_views.HEIGHT,
    }
    return context | {"layer": run.layers[layer], "channels": found, "heights": heights}


RANK_CODES: Final = ("NH-RANKSKEW", "NH-RANKDUP", "NH-MISSING", "NH-BUFFERS", "NH-UNEVEN")
"""Findings that are about ranks."""


FirstStep = Annotated[int | None, Query(alias="from", ge=0, lt=2**53)]
LastStep = Annotated[int | None, Query(alias="to", ge=0, lt=2**53)]


@router.get("/runs/{run_id}/ranks")
def ranks_page(request: Request, run_id: str, first: FirstStep = None, last: LastStep = None) -> Response:
    return render(request, "ranks.html", _ranks_context(request, run_id, first, last))


@router.get("/runs/{run_id}/ranks/fragment")
def ranks_fragment(request: Request, run_id: str, first: FirstStep = None, last: LastStep = None) -> Response:
    return render(request, "ranks_fragment.html", _ranks_context(request, run_id, first, last))


def _ranks_context(request: Request, run_id: str, first: int | None, last: int | None) -> dict[str, Any]:
    context = _head_context(request, run_id)
    found = answers.ranks(store_of(request), run_id, from_step=first, to_step=last)
    diagnosis = windows.diagnosis(store_of(request), run_id)
    said = [finding for finding in by_severity(diagnosis.findings) if finding.code in RANK_CODES]
    heights = {"ranks": rank_views.height(len(found.layers)), "curves": rank_views.CURVES_HEIGHT}
    return context | {"ranks": rank_rows(found), "found": found, "said": said, "heights": heights}


def rank_rows(found: Ranks) -> list[dict[str, Any]]:
    """Each rank with a word for how it is: missing (none is before the first row), behind, slow, apart or fine."""
    times = sorted(rank.step_time_seconds for rank in found.ranks if rank.step_time_seconds)
    middle = times[(len(times) - 1) // 2] if times else None  # of two the faster: a slow one is seen
    begun = any(rank.last_step is not None for rank in found.ranks)
    rows = []
    for rank in found.ranks:
        words = []
        if rank.last_step is None and not begun:
            words.append(("nothing yet", "info"))
        elif rank.last_step is None:
            words.append(("missing", "critical"))
        elif (rank.behind_steps or 0) > 100:
            words.append(("behind", "warning"))
        if middle and rank.step_time_seconds and len(times) > 1 and rank.step_time_seconds > SLOW_RATIO * middle:
            words.append(("slow", "warning"))
        if found.outlier is not None and found.outlier.rank == rank.rank:
            words.append(("apart", "warning"))
        rows.append({"rank": rank, "words": words or [("fine", "ok")]})
    return rows


@router.get("/runs/{run_id}/advisor")
def advisor_page(request: Request, run_id: str) -> Response:
    context = _head_context(request, run_id)
    run: Run = context["run"]
    longest = max(run.planned_steps or 0, run.last_step or 0, 100)
    tenth = longest // 20
    planned = run.schedule or Schedule(bn_steps=tenth, r_steps=6 * tenth, d_steps=4 * tenth, r_max=3, d_max=5)
    own = {"planned": planned, "longest": longest, "step": max(1, longest // 500), "height": schedules.HEIGHT}
    return render(request, "advisor.html", context | own)


@router.get("/runs/{run_id}/report")
def run_report_file(request: Request, run_id: str) -> Response:
    return _file(run_report(store_of(request), run_id), f"{run_id}.html")


def _file(html: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-Content-Type-Options": "nosniff"}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


def _head_context(request: Request, run_id: str) -> dict[str, Any]:
    run = answers.run(store_of(request), run_id)
    return {"view": run_view(run, run.layers), "run": run}


def _run_context(request: Request, run_id: str) -> dict[str, Any]:
    context = _head_context(request, run_id)
    run: Run = context["run"]
    store = store_of(request)
    diagnosis = windows.diagnosis(store, run_id)
    return (
        context
        | findings_context(diagnosis, run, history.of_run(store, run_id).findings)
        | {
            "heights": {
                "schedule": schedules.HEIGHT,
                "heatmap": layer_maps.height(len(run.layers)),
                "causes": cause_views.HEIGHT,
            },
        }
    )


# -------------------------------------------------------------------------------------------------------- comparison


@router.get("/compare")
def compare_page(
    request: Request,
    runs: str = "",
    run: Words = [],  # noqa: B006
) -> Response:
    if run:  # a form without scripts repeats its field
        return RedirectResponse(f"/compare?{urlencode({'runs': ','.join(run)}, safe=',')}", status_code=303)
    return render(request, "compare.html", _compare_context(request, runs) | {"groups": statistic_groups()})


@router.get("/compare/fragment")
def compare_fragment(request: Request, runs: str) -> Response:
    return render(request, "compare_fragment.html", _compare_context(request, runs))


def _compare_context(request: Request, runs: str) -> dict[str, Any]:
    ids = [own for own in dict.fromkeys(runs.split(",")) if own]
    if len(ids) < 2:
        raise Invalid("choose two or more runs in the list of runs to compare them")
    store = store_of(request)
    found, records = drawings.comparison_of(store, ids, [])
    deadline = time.monotonic() + COMPARE_SECONDS
    diagnoses = [
        windows.diagnosis(store, own) if time.monotonic() < deadline else windows.computed(store, own) for own in ids
    ]
    return compare_context(found, records, diagnoses) | {"ids": ids}


@router.get("/compare/report")
def compare_report_file(
    request: Request, runs: str, by: Axis = "step", stat: str = DEFAULT_STATISTIC, scalar: str = "", group: str = ""
) -> Response:
    ids = [own for own in runs.split(",") if own]
    return _file(comparison_report(store_of(request), ids, Shown(by, stat, scalar, group)), "comparison.html")
