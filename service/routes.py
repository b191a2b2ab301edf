"""The routes below /v1 that create, list, change and fill runs, and what all routes share.

Questions are in `query_routes`, event streams in `events`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Query, Request, Response, status

from brn_core import wire
from service import answers
from service.answers.records import RunOrder
from service.diagnoser import Diagnoser
from service.diagnosis.finding import Severity
from service.errors import Invalid, UnsupportedMedia
from service.intake import Intake
from service.schemas import Accepted, Problem, Run, Runs, RunState
from service.settings import Settings
from service.store import Store

JSON: Final = "application/json"

_TEXTS: Final = {
    401: "No token, or not ours.",
    403: "The token may only read, or another site's page sent this.",
    404: "No such run.",
    413: "The body is over the limit.",
    415: "Neither Arrow nor JSON.",
    429: "More batches wait than memory is set aside for, or this client asks too often: try after `Retry-After`.",
    422: "The request contradicts the schema or the run; the text says what exists.",
    503: "The store does not answer, or too many event streams are open: try again later.",
    507: "The disk is full: nothing was stored.",
}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for the OpenAPI document."""
    return {code: {"model": Problem, "description": _TEXTS[code]} for code in codes}


router = APIRouter(prefix="/v1", responses=problems(401, 422, 503))


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _diagnoser(request: Request) -> Diagnoser:
    diagnoser: Diagnoser = request.app.state.diagnoser
    return diagnoser


def _intake(request: Request) -> Intake:
    intake: Intake = request.app.state.intake
    return intake


StoreOf = Annotated[Store, Depends(_store)]
SettingsOf = Annotated[Settings, Depends(_settings)]
DiagnoserOf = Annotated[Diagnoser, Depends(_diagnoser)]
IntakeOf = Annotated[Intake, Depends(_intake)]
RunPath = Annotated[str, Path(alias="run", description="Run id.")]
Stat = Annotated[str, Query(description="Name of a statistic, see /v1/statistics.")]
Rank = Annotated[int | None, Query(ge=0, description="Global rank; left out: all ranks.")]
From = Annotated[int | None, Query(alias="from", ge=0, description="First step; left out: the run's first.")]
To = Annotated[int | None, Query(alias="to", ge=0, description="Last step; left out: the run's newest.")]
Points = Annotated[int, Query(ge=1, le=5000, description="Most buckets in the answer.")]


# -------- runs


@router.post(
    "/runs",
    tags=["runs"],
    summary="Create a run, or say again what it is",
    status_code=status.HTTP_201_CREATED,
    responses={
        200: {"model": Run, "description": "The run was known; what it says of itself is now this."},
        **problems(507),
    },
)
def create_run(body: wire.RunCreate, response: Response, store: StoreOf) -> Run:
    """Idempotent: the client names the id. A known run takes the new record, keeps its rows and is running again."""
    for position, layer in enumerate(body.layers):
        if layer.index != position:
            raise Invalid(f"layers must be numbered 0, 1, 2, ... in order; layers[{position}] has index {layer.index}")
    with store.writing():
        known = store.record(body.id)
        if known is not None:
            response.status_code = status.HTTP_200_OK
            # A run that goes on does not know what people wrote to it meanwhile, nor what its processes have dropped.
            said = wire.RunUpdate(
                notes=body.notes or known.record.notes, dropped_by_process=known.record.dropped_by_process
            )
            body = wire.updated(body, said)
        store.put_run(body, "running", known.created_at if known else datetime.now(UTC))
        return answers.run(store, body.id)


@router.get("/runs", tags=["runs"], summary="Runs, a page at a time", response_model=Runs)
def list_runs(
    store: StoreOf,
    search: Annotated[str, Query(max_length=200, description="Text in id, name, notes or a tag, in any case.")] = "",
    tag: Annotated[list[str], Query(description="Tags that a run must all have.")] = [],  # noqa: B006 FastAPI copies it
    state: Annotated[list[RunState], Query(description="States of which a run must have one.")] = [],  # noqa: B006
    severity: Annotated[list[Severity], Query(description="Severities of which its verdict must have one.")] = [],  # noqa: B006
    sort: Annotated[RunOrder, Query(description="What to order by.")] = "created",
    ascending: Annotated[bool, Query(description="Smallest, oldest first.")] = False,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most runs of a page.")] = 100,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    """Newest first unless said otherwise, each with its last verdict, without `layers` (`/v1/runs/{run}/layers`)."""
    found = answers.page(
        store,
        search=search,
        tags=tag,
        states=state,
        severities=severity,
        sort=sort,
        descending=not ascending,
        limit=limit,
        cursor=cursor,
    )
    # Made here and not by FastAPI, which would check every run once more.
    return Response(found.model_dump_json(exclude={"runs": {"__all__": {"layers"}}}), media_type=JSON)


@router.get("/runs/{run}", tags=["runs"], summary="One run", responses=problems(404))
def get_run(run: RunPath, store: StoreOf) -> Run:
    return answers.run(store, run)


@router.patch("/runs/{run}", tags=["runs"], summary="Change name, tags, notes or status", responses=problems(404, 507))
def update_run(run: RunPath, body: wire.RunUpdate, store: StoreOf, diagnoser: DiagnoserOf) -> Run:
    """Only what is given changes."""
    with store.writing():
        known = answers.stored_run(store, run)
        store.put_run(wire.updated(known.record, body), body.status or known.status, known.created_at)
        diagnoser.touch(run)
        return answers.run(store, run)


@router.delete(
    "/runs/{run}",
    tags=["runs"],
    summary="Delete a run with all its rows",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(404),
)
def delete_run(run: RunPath, store: StoreOf, diagnoser: DiagnoserOf) -> None:
    answers.stored_run(store, run)
    store.delete_runs([run])
    diagnoser.touch(run)


# -------- ingest


_BATCH_BODY: Final = {
    "requestBody": {
        "required": True,
        "description": "The tables of one batch: Arrow IPC streams one after the other, each with its name in the "
        "schema metadata (`table`, `version`), or the same rows as JSON.",
        "content": {
            wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["tables"],
                    "additionalProperties": False,
                    "properties": {
                        "tables": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                name: {"type": "array", "items": {"type": "object"}} for name in wire.TABLES
                            },
                        }
                    },
                },
                "example": {"tables": {"scalars": [{"step": 1, "name": "loss", "value": 2.3}]}},
            },
        },
    }
}


@router.post(
    "/runs/{run}/batches",
    tags=["ingest"],
    summary="Store a batch of rows, once",
    responses=problems(404, 413, 415, 429, 507),
    openapi_extra=_BATCH_BODY,
)
async def post_batch(
    request: Request,
    run: RunPath,
    rank: Annotated[int, Query(ge=0, lt=2**32, description="Global rank that recorded the rows.")],
    seq: Annotated[int, Query(ge=0, lt=2**64, description="Number of the batch, never used twice by a rank.")],
    intake: IntakeOf,
) -> Accepted:
    """The answer comes when the rows are on disk. A repeat of a known (run, rank, seq) adds nothing."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (wire.MEDIA_TYPE, JSON):
        raise UnsupportedMedia(f"Content-Type must be {wire.MEDIA_TYPE} or {JSON}, got {media or 'none'!r}")
    return await intake.take(run, rank, seq, media, request.stream())
