"""Runs: what they say of themselves, how far their rows reach, which of them are listed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from brn_core.wire import Layer, RunStatus
from service.diagnosis.finding import SEVERITIES, Severity, Verdict
from service.errors import Invalid, NotFound, some
from service.schemas import Run, Runs, RunState
from service.store import Extent, Store, StoredRun

NOT_YET: Final = Verdict(code="NO_DATA", severity="info", summary="No diagnosis was computed yet.")
"""The verdict of a run before its first diagnosis."""

STALLED_SECONDS: Final = 60
"""A run that says it is running and has been silent for so long is stalled. Recorders send every second or so."""

CRASHED_SECONDS: Final = 1800
"""... and after so long it is taken for crashed: longer than an evaluation between two epochs. Rows revive it."""


def state_of(status: RunStatus, updated_at: datetime, now: datetime) -> RunState:
    """What a run is doing, by what it said last and how long ago that was."""
    if status != "running":
        return status
    silent = (now - updated_at).total_seconds()
    return "crashed" if silent > CRASHED_SECONDS else "stalled" if silent > STALLED_SECONDS else "running"


@dataclass(frozen=True, slots=True)
class State:
    """A run as stored now: its record and how far its rows reach."""

    stored: StoredRun
    extent: Extent

    @property
    def updated_at(self) -> datetime:
        return max(self.stored.changed_at, self.extent.received_at or self.stored.changed_at)

    def run(self, now: datetime) -> Run:
        stored, extent = self.stored, self.extent
        return Run.model_construct(  # everything in it was checked when it came
            **dict(stored.record),
            status=stored.status,
            state=state_of(stored.status, self.updated_at, now),
            created_at=stored.created_at,
            updated_at=self.updated_at,
            last_step=extent.last_step,
            rows=extent.layer_rows,
            verdict=stored.verdict or NOT_YET,
        )

    @property
    def cursor(self) -> tuple[object, ...]:
        """Differs whenever a batch arrived or the run changed, and not when its verdict did."""
        return (self.stored.created_at, self.stored.changed_at, self.extent.batches, self.extent.received_at)


def known(store: Store, run_id: str) -> State:
    """A run as stored now, with which an answer begins: the engine has all its rows, and may be asked for them.

    Once for an answer, and not before each of its questions: of a run that rows arrive for, each would write a few.

    Raises:
        NotFound: there is none of this id.
    """
    state = State(stored_run(store, run_id), store.extent(run_id))
    store.settle(run_id)
    return state


def known_runs(store: Store, run_ids: Sequence[str]) -> list[State]:
    """Several runs as stored now, in this order, as `known` gives one; a server is asked for all of them at once.

    Raises:
        NotFound: there is none of one of these ids.
    """
    records, extents = store.records_of(run_ids), store.extents_of(run_ids)
    states = [State(records.get(run) or stored_run(store, run), extents.get(run, Extent())) for run in run_ids]
    for run in run_ids:
        store.settle(run)
    return states


def stored_run(store: Store, run_id: str) -> StoredRun:
    """The record of a run.

    Raises:
        NotFound: there is none of this id.
    """
    found = store.record(run_id)
    if found is None:
        newest = [stored.record.id for stored in store.records()]
        raise NotFound(f"there is no run {run_id!r}; newest runs: {some(newest)}")
    return found


def run(store: Store, run_id: str) -> Run:
    """One run.

    Raises:
        NotFound: there is none of this id.
    """
    return State(stored_run(store, run_id), store.extent(run_id)).run(datetime.now(UTC))


def layers(store: Store, run_id: str) -> list[Layer]:
    """The normalization layers of a run, in the network's order."""
    return list(stored_run(store, run_id).record.layers)


def is_stored(store: Store, run_id: str, rank: int, seq: int) -> bool:
    """Whether this batch is completely stored."""
    sql = "SELECT count() FROM batches WHERE run_id = {run:String} AND rank = {rank:UInt32} AND seq = {seq:UInt64}"
    return bool(store.rows(sql, run=run_id, rank=rank, seq=seq).column(0)[0].as_py())


# -------- the list


RunOrder = Literal["created", "updated", "name", "last_step", "severity"]

_SORTS: Final[dict[RunOrder, Callable[[State], float | str]]] = {
    "created": lambda state: state.stored.created_at.timestamp(),
    "updated": lambda state: state.updated_at.timestamp(),
    "name": lambda state: state.stored.record.name.casefold(),
    "last_step": lambda state: -1 if state.extent.last_step is None else state.extent.last_step,
    # of the severest the newest first: severity counts for more than any date
    "severity": lambda state: 1e11 * SEVERITIES.index(severity_of(state.stored)) + state.stored.created_at.timestamp(),
}


def severity_of(stored: StoredRun) -> Severity:
    """How severe the verdict of a run is; one that is still to come is no good news: it counts as info."""
    verdict = stored.verdict or NOT_YET
    return "info" if verdict.code in ("WARMUP", "NO_DATA") else verdict.severity


def runs(store: Store) -> list[Run]:
    """All runs, newest first, each with its last computed verdict; without their layers (see `layers`)."""
    now = datetime.now(UTC)
    return [_listed(store, state, now) for state in _states(store)]


def page(
    store: Store,
    *,
    search: str = "",
    tags: Collection[str] = (),
    states: Collection[RunState] = (),
    severities: Collection[Severity] = (),
    sort: RunOrder = "created",
    descending: bool = True,
    limit: int = 100,
    cursor: str | None = None,
) -> Runs:
    """Runs that fit, in an order, a page at a time; without their layers.

    A page begins after the run that `cursor` names by its place in the order, so runs that come or go between two
    pages neither repeat nor hide others.

    A run fits if `search` is in its id, name, notes or one of its tags (in either case), if it has all `tags`, one
    of the `states` unless none is named, and a verdict of one of the `severities` (see `severity_of`) likewise. Orders
    are created, updated, name, last_step (runs without rows count as -1) and severity (equal ones by creation); equal
    ones stand by id.

    Raises:
        Invalid: a cursor that is not from a page of this order.
    """
    now = datetime.now(UTC)
    wanted = search.casefold()

    def fits(state: State) -> bool:
        record = state.stored.record
        if wanted and not any(
            wanted in text.casefold() for text in (record.id, record.name, record.notes, *record.tags)
        ):
            return False
        if not set(tags) <= set(record.tags):
            return False
        if severities and severity_of(state.stored) not in severities:
            return False
        return not states or state_of(state.stored.status, state.updated_at, now) in states

    def place(state: State) -> tuple[float | str, str]:
        return _SORTS[sort](state), state.stored.record.id

    found = sorted((state for state in _states(store) if fits(state)), key=place, reverse=descending)
    rest = found
    if cursor is not None:
        after = _place_of(cursor, sort)
        rest = [state for state in found if (place(state) < after if descending else place(state) > after)]
    shown = rest[:limit]
    return Runs.model_construct(
        runs=[_listed(store, state, now) for state in shown],
        total=len(found),
        next=_cursor(sort, place(shown[-1])) if len(rest) > limit else None,
    )


def tags(store: Store) -> list[str]:
    """Every tag that a run has, in alphabetical order."""
    return sorted({tag for stored in store.records() for tag in stored.record.tags}, key=str.casefold)


def _states(store: Store) -> list[State]:
    """Every run, newest first."""
    extents = store.extents()
    return [State(stored, extents.get(stored.record.id, Extent())) for stored in store.records()]


def _listed(store: Store, state: State, now: datetime) -> Run:
    """The run, made once for what is known of it: most of a long list stand still."""
    doing = state_of(state.stored.status, state.updated_at, now)
    # The value keeps the state, so no other object can take its parts' ids meanwhile.
    key = (id(state.stored), id(state.extent), doing)
    found: Run = store.listed.get(key, lambda: (state, state.run(now)))[1]
    return found


def _cursor(sort: str, place: tuple[float | str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([sort, *place]).encode()).decode()


def _place_of(cursor: str, sort: str) -> tuple[float | str, str]:
    try:
        order, value, run_id = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError, RecursionError) as error:  # no base64, no JSON, no three of them, or far too deep
        raise Invalid("cursor must be `next` of the page before") from error
    if order != sort or not isinstance(run_id, str) or isinstance(value, str) != (sort == "name"):
        raise Invalid(f"cursor belongs to another order than {sort!r}: begin again without it")
    if not isinstance(value, (str, int, float)):
        raise Invalid("cursor must be `next` of the page before")
    return value, run_id
