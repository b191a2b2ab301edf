"""When each finding of a run appeared, grew, eased and ended, as the diagnoser saw it; and what people said of it.

A diagnosis is a pure function of rows and knows no yesterday. This is its diary: kept by the one thread that diagnoses
in the background, and changed by requests only to mark a finding as acknowledged or muted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from brn_core.wire import Notes
from service.diagnosis.finding import SEVERITIES, Diagnosis, Finding, Severity
from service.diagnosis.rules import CAUSES, CONSEQUENCE, NOTES
from service.errors import Invalid, NotFound
from service.store import Store

CODES: Final = (*CAUSES, CONSEQUENCE, *NOTES)
"""Codes that have a history: what is wrong, not what is unknown."""

EVENTS: Final = 100
"""Newest events of a code that are kept."""

GROWTH: Final = 2.0
"""A statistic has grown when it is this many times as far from its threshold, on a log scale, as at the last event."""

What = Literal["appeared", "grew", "eased", "ended"]
Mark = Literal["open", "acknowledged", "muted"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Event(_Part):
    """A change of one finding."""

    at: datetime
    step: int = Field(description="Newest step of the run when it was seen.")
    what: What
    severity: Severity = Field(description="Afterwards; of an end, before.")
    value: float | None = Field(description="The statistic of its evidence.")
    distance: float | None = Field(description="|ln(value / threshold)|, where both are positive.")


class FindingHistory(_Part):
    """One code over the course of a run."""

    code: str
    present: bool = Field(description="Whether the newest diagnosis has it.")
    summary: str = Field(default="", description="Its newest sentence.")
    first_step: int | None = Field(default=None, description="First step at which it was ever seen.")
    mark: Mark = Field(
        default="open", description="What people made of it: `muted` findings send no webhook. It stays over an end."
    )
    note: str = ""
    marked_at: datetime | None = None
    events: tuple[Event, ...] = Field(default=(), description=f"Oldest first, the newest {EVENTS}.")


class FindingMark(_Part):
    """What someone says of a finding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mark: Mark
    note: Notes = ""


class HistoryAnswer(_Part):
    """Every finding that a run ever had, or that someone has marked."""

    run: str
    findings: tuple[FindingHistory, ...] = Field(description="In the order in which they first appeared.")


History: TypeAlias = dict[str, FindingHistory]
_HISTORY: Final[TypeAdapter[History]] = TypeAdapter(History)


def advanced(history: Mapping[str, FindingHistory], diagnosis: Diagnosis, at: datetime) -> History:
    """The history after one more diagnosis; equal to the one given where nothing changed but a sentence."""
    found = {finding.code: finding for finding in diagnosis.findings if finding.code in CODES}
    after = dict(history)
    for code in dict.fromkeys((*history, *found)):
        before = history.get(code) or FindingHistory(code=code, present=False)
        event = _event(before, found.get(code), diagnosis.step or 0, at)
        if event is None:
            continue
        update: dict[str, object] = {"present": event.what != "ended", "events": (*before.events, event)[-EVENTS:]}
        if (finding := found.get(code)) is not None:
            first = finding.steps[0] if before.first_step is None else min(before.first_step, finding.steps[0])
            update |= {"summary": finding.summary, "first_step": first}
        after[code] = before.model_copy(update=update)
    return after


def _event(before: FindingHistory, finding: Finding | None, step: int, at: datetime) -> Event | None:
    last = before.events[-1] if before.events else None
    if finding is None:
        if not before.present or last is None:
            return None
        return Event(at=at, step=step, what="ended", severity=last.severity, value=None, distance=None)
    evidence = finding.evidence
    value = None if evidence is None else evidence.value
    distance = _distance(finding)
    what: What
    if not before.present or last is None:
        what = "appeared"
    elif finding.severity != last.severity:
        what = "grew" if SEVERITIES.index(finding.severity) > SEVERITIES.index(last.severity) else "eased"
    elif distance is not None and last.distance is not None and distance > GROWTH * last.distance:
        what = "grew"
    else:
        return None
    return Event(at=at, step=step, what=what, severity=finding.severity, value=value, distance=distance)


def _distance(finding: Finding) -> float | None:
    evidence = finding.evidence
    if evidence is None or evidence.threshold is None or not (evidence.threshold > 0 and evidence.value > 0):
        return None
    return abs(math.log(evidence.value / evidence.threshold))


def news(before: Mapping[str, FindingHistory], after: Mapping[str, FindingHistory]) -> list[str]:
    """Codes that warn now and did not before, and that nobody muted."""

    def warns(entry: FindingHistory | None) -> bool:
        return entry is not None and entry.present and entry.events[-1].severity in ("warning", "critical")

    return [
        code for code, entry in after.items() if warns(entry) and not warns(before.get(code)) and entry.mark != "muted"
    ]


# -------- stored


def of_run(store: Store, run_id: str) -> HistoryAnswer:
    """The history of a run.

    Raises:
        NotFound: no such run.
    """
    if store.record(run_id) is None:
        raise NotFound(f"there is no run {run_id!r}")
    return HistoryAnswer(run=run_id, findings=tuple(_read(store, run_id).values()))


def beginnings(store: Store, run_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """By run and code the first step of a finding that is there and never ended; of all the runs by one query."""
    found = store.engine.rows(
        "SELECT run_id, history FROM histories FINAL WHERE run_id IN {runs:Array(String)}", runs=list(run_ids)
    )
    return {
        row["run_id"]: {
            code: entry.first_step
            for code, entry in _HISTORY.validate_json(row["history"]).items()
            if entry.present and entry.first_step is not None and all(event.what != "ended" for event in entry.events)
        }
        for row in found.to_pylist()
    }


def note(store: Store, diagnosis: Diagnosis) -> list[str]:
    """Takes a new diagnosis into the history of its run; the codes that are news (see `news`)."""
    at = datetime.now(UTC)
    before = _read(store, diagnosis.run)
    if advanced(before, diagnosis, at) == before:  # as nearly always: holds up no writer
        return []
    with store.writing():
        before = _read(store, diagnosis.run)  # someone may have marked one just now
        after = advanced(before, diagnosis, at)
        _write(store, diagnosis.run, after)
    return news(before, after)


def mark(store: Store, run_id: str, code: str, said: FindingMark) -> FindingHistory:
    """Marks a finding of a run, one that is there or one that may come.

    Raises:
        NotFound: no such run.
        Invalid: a code that no finding has.
    """
    if code not in CODES:
        raise Invalid(f"there is no finding {code!r}; known: {', '.join(CODES)}")
    with store.writing():
        if store.record(run_id) is None:
            raise NotFound(f"there is no run {run_id!r}")
        found = _read(store, run_id)
        entry = found.get(code) or FindingHistory(code=code, present=False)
        found[code] = entry.model_copy(update={"mark": said.mark, "note": said.note, "marked_at": datetime.now(UTC)})
        _write(store, run_id, found)
        return found[code]


def _read(store: Store, run_id: str) -> History:
    text = store.history(run_id)
    return {} if text is None else _HISTORY.validate_json(text)


def _write(store: Store, run_id: str, history: History) -> None:
    store.put_history(run_id, _HISTORY.dump_json(history).decode())
