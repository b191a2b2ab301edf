"""The REST routes below /v1: what is asked for is read here, answered by query.py and ingest.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Path, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from brn_core import wire
from service import ingest, query
from service.diagnoser import Diagnoser
from service.errors import Invalid, NotFound, TooLarge, UnsupportedMedia
from service.schemas import (
    Accepted,
    Findings,
    Heatmap,
    Layers,
    Problem,
    Run,
    Runs,
    Scalars,
    Series,
    Statistic,
    Statistics,
    Summary,
)
from service.settings import Settings
from service.store import Store

JSON: Final = "application/json"

_TEXTS: Final = {
    401: "No token, or not ours.",
    404: "No such run.",
    413: "The body is over the limit.",
    415: "Neither Arrow nor JSON.",
    422: "The request contradicts the schema or the run; the text says what exists.",
    503: "The store does not answer: send it again later.",
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


StoreOf = Annotated[Store, Depends(_store)]
SettingsOf = Annotated[Settings, Depends(_settings)]
DiagnoserOf = Annotated[Diagnoser, Depends(_diagnoser)]
RunPath = Annotated[str, Path(alias="run", description="Run id.")]
Stat = Annotated[str, Query(description="Name of a statistic, see /v1/statistics.")]
Rank = Annotated[int | None, Query(ge=0, description="Global rank; left out: all ranks.")]
From = Annotated[int | None, Query(alias="from", ge=0, description="First step; left out: the run's first.")]
To = Annotated[int | None, Query(alias="to", ge=0, description="Last step; left out: the run's newest.")]
Points = Annotated[int, Query(ge=1, le=5000, description="Most buckets in the answer.")]


def _existing(run: RunPath, store: StoreOf) -> None:
    """Answers 404 while there still is a status to set: a stream has sent it before it looks."""
    query.stored_run(store, run)


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
        try:
            created_at = query.stored_run(store, body.id).created_at
            response.status_code = status.HTTP_200_OK
        except NotFound:
            created_at = datetime.now(UTC)
        store.put_run(body, "running", created_at)
        return query.run(store, body.id)


@router.get("/runs", tags=["runs"], summary="All runs", response_model_exclude={"runs": {"__all__": {"layers"}}})
def list_runs(store: StoreOf) -> Runs:
    """Newest first, each with its last verdict, without `layers` (see `/v1/runs/{run}/layers`)."""
    return Runs(runs=query.runs(store))


@router.get("/runs/{run}", tags=["runs"], summary="One run", responses=problems(404))
def get_run(run: RunPath, store: StoreOf) -> Run:
    return query.run(store, run)


@router.patch("/runs/{run}", tags=["runs"], summary="Change name, tags or status", responses=problems(404, 507))
def update_run(run: RunPath, body: wire.RunUpdate, store: StoreOf, diagnoser: DiagnoserOf) -> Run:
    """Only what is given changes."""
    with store.writing():
        known = query.stored_run(store, run)
        changes = body.model_dump(exclude_none=True, exclude={"status"})
        store.put_run(known.record.model_copy(update=changes), body.status or known.status, known.created_at)
        diagnoser.touch(run)
        return query.run(store, run)


@router.delete(
    "/runs/{run}",
    tags=["runs"],
    summary="Delete a run with all its rows",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(404),
)
def delete_run(run: RunPath, store: StoreOf, diagnoser: DiagnoserOf) -> None:
    with store.writing():
        query.stored_run(store, run)
        store.delete_run(run)
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
    responses=problems(404, 413, 415, 507),
    openapi_extra=_BATCH_BODY,
)
async def post_batch(
    request: Request,
    run: RunPath,
    rank: Annotated[int, Query(ge=0, lt=2**32, description="Global rank that recorded the rows.")],
    seq: Annotated[int, Query(ge=0, lt=2**64, description="Number of the batch, never used twice by a rank.")],
    store: StoreOf,
    settings: SettingsOf,
    diagnoser: DiagnoserOf,
) -> Accepted:
    """The answer comes when the rows are on disk. A repeat of a known (run, rank, seq) adds nothing."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (wire.MEDIA_TYPE, JSON):
        raise UnsupportedMedia(f"Content-Type must be {wire.MEDIA_TYPE} or {JSON}, got {media or 'none'!r}")
    body = await _body(request, settings.max_body_bytes)

    def work() -> Accepted:
        tables = ingest.from_arrow(body) if media == wire.MEDIA_TYPE else ingest.from_json(body)
        return ingest.accept(store, run, rank, seq, tables, settings.max_batch_rows)

    accepted = await run_in_threadpool(work)
    if not accepted.duplicate:
        diagnoser.touch(run)
    return accepted


async def _body(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"a body may have {limit} bytes (BRN_SERVICE_MAX_BODY_BYTES): send the batch in parts")
        parts.append(part)
    return b"".join(parts)


# -------- queries


@router.get("/statistics", tags=["queries"], summary="What can be asked for: the statistics of a layer")
def list_statistics() -> Statistics:
    """Name, label, formula and neutral value of every statistic."""
    return Statistics(
        statistics=[
            Statistic(
                name=metric.name,
                label=metric.label,
                group=metric.group,
                meaning=metric.meaning,
                neutral=metric.neutral,
                nullable=metric.nullable,
            )
            for metric in wire.METRICS
        ]
    )


@router.get("/runs/{run}/layers", tags=["queries"], summary="The run's normalization layers", responses=problems(404))
def get_layers(run: RunPath, store: StoreOf) -> Layers:
    return Layers(layers=query.layers(store, run))


@router.get(
    "/runs/{run}/summary", tags=["queries"], summary="Every statistic of every layer, now", responses=problems(404)
)
def get_summary(run: RunPath, store: StoreOf) -> Summary:
    return query.summary(store, run)


@router.get("/runs/{run}/series", tags=["queries"], summary="Statistics over steps", responses=problems(404))
def get_series(
    run: RunPath,
    store: StoreOf,
    stat: Annotated[list[str], Query(description="Names of statistics, see /v1/statistics.")],
    layer: Annotated[int | None, Query(ge=0, description="Index of a layer; left out: over all layers.")] = None,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 500,
) -> Series:
    """Minimum, mean and maximum a bucket of steps; the newest point is always in."""
    return query.series(store, run, stat, layer=layer, rank=rank, from_step=from_step, to_step=to_step, points=points)


@router.get("/runs/{run}/heatmap", tags=["queries"], summary="One statistic, layers x steps", responses=problems(404))
def get_heatmap(
    run: RunPath,
    store: StoreOf,
    stat: Stat,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 300,
) -> Heatmap:
    return query.heatmap(store, run, stat, rank=rank, from_step=from_step, to_step=to_step, points=points)


@router.get(
    "/runs/{run}/scalars", tags=["queries"], summary="Loss and other scalars over steps", responses=problems(404)
)
def get_scalars(
    run: RunPath,
    store: StoreOf,
    name: Annotated[list[str] | None, Query(description="Names of scalars; left out: all.")] = None,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 500,
) -> Scalars:
    return query.scalars(store, run, name, rank=rank, from_step=from_step, to_step=to_step, points=points)


@router.get("/runs/{run}/findings", tags=["queries"], summary="What is wrong, why, what to do", responses=problems(404))
def get_findings(run: RunPath, store: StoreOf) -> Findings:
    """Verdict and findings with evidence and remedy, for the rows stored now."""
    return query.diagnosis(store, run)


@router.get(
    "/runs/{run}/events",
    tags=["queries"],
    summary="News of a run as it comes (server-sent events)",
    response_class=EventSourceResponse,
    responses=problems(404),
    dependencies=[Depends(_existing)],
)
async def get_events(
    request: Request, run: RunPath, store: StoreOf, settings: SettingsOf, diagnoser: DiagnoserOf
) -> AsyncIterator[ServerSentEvent]:
    """Event `cursor` (`last_step`, `status`, `rows`) and event `findings` (a Diagnosis), at once and when changed."""
    closing: asyncio.Event = request.app.state.closing
    seen, cursor, sent, shown = -1, None, None, None
    while not closing.is_set():
        if (changes := store.changes(run)) != seen:
            seen = changes
            try:
                known = await run_in_threadpool(query.run, store, run)
                now = {"last_step": known.last_step, "status": known.status, "rows": known.rows}
                if now != cursor:
                    cursor = now
                    yield ServerSentEvent(event="cursor", data=cursor)
                if sent is None:
                    shown = diagnoser.latest(run)  # may be older than the one computed now, so it is not sent after it
                    sent = await run_in_threadpool(query.diagnosis, store, run)
                    yield ServerSentEvent(event="findings", data=sent)
            except NotFound:  # deleted while we looked
                return
        latest = diagnoser.latest(run)
        if latest is not None and latest is not shown:
            shown = latest
            if latest != sent:
                sent = latest
                yield ServerSentEvent(event="findings", data=sent)
        with suppress(TimeoutError):
            await asyncio.wait_for(closing.wait(), settings.events_seconds)
