"""News of a run as server-sent events, whichever process stored them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service import answers, windows
from service.answers.records import known
from service.errors import Crowded, NotFound
from service.routes import DiagnoserOf, RunPath, SettingsOf, StoreOf, problems

router = APIRouter(prefix="/v1", tags=["queries"], responses=problems(401, 422, 503))


def _existing(run: RunPath, store: StoreOf) -> None:
    """Answers 404 while there still is a status to set: a stream has sent it before it looks."""
    answers.stored_run(store, run)


async def _counted(request: Request, settings: SettingsOf) -> AsyncIterator[None]:
    """One of so many streams, for as long as it is open. On the event loop alone, so it takes no lock."""
    state = request.app.state
    if state.event_streams >= settings.event_streams:
        state.metrics.event_streams_refused.inc()
        raise Crowded(
            f"{settings.event_streams} event streams are open (BRN_SERVICE_EVENT_STREAMS): ask for the run itself, or "
            "for its stream again later"
        )
    state.event_streams += 1
    try:
        yield
    finally:
        state.event_streams -= 1


@router.get(
    "/runs/{run}/events",
    summary="News of a run as it comes (server-sent events)",
    response_class=EventSourceResponse,
    responses=problems(404),
    dependencies=[Depends(_existing), Depends(_counted)],
)
async def get_events(
    request: Request, run: RunPath, store: StoreOf, settings: SettingsOf, diagnoser: DiagnoserOf
) -> AsyncIterator[ServerSentEvent]:
    """Event `cursor` (`last_step`, `status`, `rows`) and event `findings` (a Diagnosis), at once and when changed."""
    closing: asyncio.Event = request.app.state.closing
    seen, at, cursor, sent, shown = None, None, None, None, None
    while not closing.is_set():
        if (changes := store.changes(run)) != seen:
            seen = changes
            try:
                state = await run_in_threadpool(known, store, run)
                if at not in (None, state.cursor):
                    diagnoser.touch(run)  # what another process stored nobody has told it
                at = state.cursor
                now = state.run(datetime.now(UTC))
                news = {"last_step": now.last_step, "status": now.status, "rows": now.rows}
                if news != cursor:
                    cursor = news
                    yield ServerSentEvent(event="cursor", data=cursor)
                if sent is None:
                    shown = diagnoser.latest(run)  # may be older than the one computed now, so it is not sent after it
                    sent = await run_in_threadpool(windows.diagnosis, store, run)
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
