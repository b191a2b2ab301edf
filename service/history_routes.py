"""The routes below /v1 for the history of findings, and for what people make of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from service import history
from service.history import FindingHistory, FindingMark, HistoryAnswer
from service.routes import RunPath, StoreOf, problems

router = APIRouter(prefix="/v1", tags=["queries"], responses=problems(401, 422, 503))

Code = Annotated[str, Path(description="Code of a finding, `NH-...`.")]


@router.get(
    "/runs/{run}/findings/history", summary="When findings appeared, grew, eased and ended", responses=problems(404)
)
def get_history(run: RunPath, store: StoreOf) -> HistoryAnswer:
    """Every finding the run ever had since it is diagnosed live, with what people made of it."""
    return history.of_run(store, run)


@router.put(
    "/runs/{run}/findings/{code}/mark", summary="Acknowledge or mute a finding", responses=problems(403, 404, 507)
)
def mark_finding(run: RunPath, code: Code, body: FindingMark, store: StoreOf) -> FindingHistory:
    """With a note. A marked finding stays in every answer and is not posted to the webhook; `open` takes it back."""
    return history.mark(store, run, code, body)
