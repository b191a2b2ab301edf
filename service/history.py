"""When each finding of a run appeared, grew, eased and ended, as the diagnoser saw it; and what people said of it.

A diagnosis is a pure function of rows and knows no yesterday. This is its diary: kept by the one thread that diagnoses
in the background, and changed by requests only to mark a finding as acknowledged or muted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
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
    since: int | None = Field(
        default=None, description="First step of the stretch in which it has held without an end, or of the last one."
    )
    mark: Mark = Field(
        default="open",
        description="What people made of it: only what is `open` is posted to the webhook. Outlasts an end.",
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
        before, finding = history.get(code) or FindingHistory(code=code, present=False), found.get(code)
        event = _event(before, finding, diagnosis.step or 0, at)
        update: dict[str, object] = {}
        if event is not None:
            update = {"present": event.what != "ended", "events": (*before.events, event)[-EVENTS:]}
        if finding is not None and (event is not None or _since(before, finding) != before.since):
            first = finding.steps[0] if before.first_step is None else min(before.first_step, finding.steps[0])
            update |= {"summary": finding.summary, "first_step": first, "since": _since(before, finding)}
        if update:
            after[code] = before.model_copy(update=update)
    return after


def _since(before: FindingHistory | None, finding: Finding) -> int:
    """The first step of a finding that is there now, by what was known of it before."""
    if before is None or not before.present:  # it begins, maybe once more
        return finding.steps[0]
    known = before.first_step if before.since is None else before.since  # older stores have no `since`
    return finding.steps[0] if known is None else min(known, finding.steps[0])


def dated(history: Mapping[str, FindingHistory], diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with the first step of each finding, which its rows alone, the newest ones, may not show."""
    times = Counter(finding.code for finding in diagnosis.findings)  # of several of one code nobody knows whose it is
    since = [_since(history.get(own.code) if times[own.code] == 1 else None, own) for own in diagnosis.findings]
    if since == [finding.since for finding in diagnosis.findings]:
        return diagnosis
    findings = tuple(
        finding.model_copy(update={"since": first}) for finding, first in zip(diagnosis.findings, since, strict=True)
    )
    return diagnosis.model_copy(update={"findings": findings})


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
    """Codes that warn now and did not before, and that nobody has acknowledged or muted."""

    def warns(entry: FindingHistory | None) -> bool:
        return entry is not None and entry.present and entry.events[-1].severity in ("warning", "critical")

    return [
        code for code, entry in after.items() if warns(entry) and not warns(before.get(code)) and entry.mark == "open"
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


def marks(store: Store, codes: Mapping[str, str]) -> dict[str, Mark]:
    """What people made of one finding of each of these runs, by run, of those that are marked: one query for all.

    Args:
        store: of the runs.
        codes: the code of the finding, by run.
    """
    stored = store.histories_of([run for run, code in codes.items() if code in CODES])
    said = {run: entry.mark for run, text in stored.items() if (entry := _parsed(text).get(codes[run])) is not None}
    return {run: mark for run, mark in said.items() if mark != "open"}


def known(store: Store, diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis as what is stored dates it, see `dated`."""
    return dated(_read(store, diagnosis.run), diagnosis)


def note(store: Store, diagnosis: Diagnosis) -> tuple[Diagnosis, list[str]]:
    """Takes a new diagnosis into the history of its run; the diagnosis dated, and the codes that are news."""
    at = datetime.now(UTC)
    before = _read(store, diagnosis.run)
    if advanced(before, diagnosis, at) == before:  # as nearly always: holds up no writer
        return dated(before, diagnosis), []
    with store.writing():
        before = _read(store, diagnosis.run)  # someone may have marked one just now
        after = advanced(before, diagnosis, at)
        _write(store, diagnosis.run, after)
    return dated(after, diagnosis), news(before, after)


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
    return {} if text is None else _parsed(text).copy()


@lru_cache(maxsize=256)  # asked for with every diagnosis, and seldom changed
def _parsed(text: str) -> History:
    return _HISTORY.validate_json(text)


def _write(store: Store, run_id: str, history: History) -> None:
    store.put_history(run_id, _HISTORY.dump_json(history).decode())
