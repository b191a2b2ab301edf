"""Runs and findings in the words of a page; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from brn_core.wire import METRIC, METRICS, Layer, Metric
from service.diagnosis.finding import SEVERITIES, Diagnosis, Finding
from service.history import CODES, FindingHistory
from service.schemas import Run

DEFAULT_STATISTIC: Final = "gap"

GROUPS: Final = {
    "correction": "Correction: r, d, limits, clipping",
    "gap": "Train-inference gap",
    "noise": "Sampling noise",
    "statistics": "Batch and moving statistics",
    "health": "Health",
}
"""Heading of each group of METRICS in the selector, in order."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run in the words of a page."""

    run: Run
    norm: str
    batch: str
    progress: float | None

    @property
    def state(self) -> str:
        return self.run.state

    @property
    def href(self) -> str:
        return f"/runs/{quote(self.run.id)}"


def run_view(run: Run, layers: Sequence[Layer]) -> RunView:
    """What a page says of a run."""
    kinds = sorted({layer.kind for layer in layers})
    batch = "?" if run.batch_size is None else f"{run.batch_size:,}"
    return RunView(
        run=run,
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a finding's own question asks for: the last part of its path, and its parameters."""

    route: str
    stats: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    layer: int | None = None
    rank: int | None = None


def evidence_of(finding: Finding) -> Evidence | None:
    """The question behind a finding; None where it has none."""
    if finding.evidence is None:
        return None
    address = urlsplit(finding.evidence.query)
    asked = parse_qs(address.query)

    def whole(name: str) -> int | None:
        value = asked.get(name, [""])[0]
        return int(value) if value.isdecimal() else None

    return Evidence(
        route=address.path.rpartition("/")[2],
        stats=tuple(stat for stat in asked.get("stat", []) if stat in METRIC),
        names=tuple(asked.get("name", [])),
        layer=whole("layer"),
        rank=whole("rank"),
    )


def finding_keys(findings: Sequence[Finding]) -> list[str]:
    """A name for each finding that an address can hold: its code, numbered where there are several of one code."""
    keys: list[str] = []
    for finding in findings:
        again = sum(key.partition("~")[0] == finding.code for key in keys)
        keys.append(f"{finding.code}~{again + 1}" if again else finding.code)
    return keys


def finding_named(diagnosis: Diagnosis, key: str) -> Finding | None:
    """The finding of such a name, if it is still one."""
    return dict(zip(finding_keys(diagnosis.findings), diagnosis.findings, strict=True)).get(key)


def finding_view(finding: Finding, key: str, run: Run) -> str:
    """The query of the run page on which every plot shows a finding: its layer, its statistic, its steps marked."""
    evidence = evidence_of(finding)
    if evidence is None or run.last_step is None:
        return ""
    first, last = finding.steps
    around = max(20, (last - first) // 4)
    view: dict[str, object] = {"finding": key, "mark": f"{first}-{last}"}
    layer = evidence.layer
    names = [own.name for own in run.layers]
    if layer is None and finding.layers and finding.layers[0] in names:
        layer = names.index(finding.layers[0])
    if layer is not None:
        view["layer"] = layer
    if evidence.stats:
        view["stat"] = evidence.stats[0]
    if evidence.rank is not None:
        view["rank"] = evidence.rank
    if first - around > 0:
        view["from"] = first - around
    if last + around < run.last_step:
        view["to"] = last + around
    if "to" in view or "from" in view:  # an address names both ends or none
        view.setdefault("from", 0)
        view.setdefault("to", run.last_step)
    return urlencode(view)


ANSWERS: Final = {"critical": "Fix this", "warning": "Look at this", "info": "Not judged"}
"""Whether normalization hurts a run, in two words, by the severity of its verdict."""

GOOD_ANSWERS: Final = {"HEALTHY": "Healthy", "WARMUP": "Too early to say", "NO_DATA": "No rows yet"}
"""The same by the verdict's code, where nothing is wrong."""


SHOWN_EVENTS: Final = 10
"""Newest events of a finding that a page tells; REST has more."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A finding as a page shows it.

    Attributes:
        finding: the finding.
        key: its name on the page (`finding_keys`): an update puts it in the place of the one of that name.
        href: query of the run page on which every plot shows it; empty: none.
        says_more: whether it says something that the verdict above it does not.
        history: of its code; None for a code that has none, as it says what is unknown.
    """

    finding: Finding
    key: str
    href: str
    says_more: bool
    history: FindingHistory | None


def span_of(history: FindingHistory) -> str:
    """When a finding that is over was there, in words; the last time, where there were several."""
    if not history.events:
        return "not seen so far"
    appeared = [event for event in history.events if event.what == "appeared"]
    first = appeared[-1].step if history.since is None and appeared else history.since or 0
    again = "the last time " if len(appeared) > 1 else ""
    last = history.events[-1]
    return f"{again}steps {first:,} to {last.step:,}" if last.what == "ended" else f"from step {first:,}"


def findings_context(diagnosis: Diagnosis, run: Run, histories: Sequence[FindingHistory] = ()) -> dict[str, Any]:
    """What a page says of a run's findings: the verdict's own first, then the worst; and of those it does not have now.

    `histories` are what is known of the run's codes; one that is over, or that was marked before it came, is `earlier`.
    """
    verdict = diagnosis.verdict
    known = {own.code: own for own in histories}
    there = {finding.code for finding in diagnosis.findings}
    keys = dict(zip(map(id, diagnosis.findings), finding_keys(diagnosis.findings), strict=True))
    shown = [
        Shown(
            finding,
            keys[id(finding)],
            finding_view(finding, keys[id(finding)], run),
            bool(finding.evidence or finding.remedy) or not verdict.summary.startswith(finding.summary.rstrip(".")),
            (known.get(finding.code) or FindingHistory(code=finding.code, present=True))
            if finding.code in CODES
            else None,
        )
        for finding in sorted(by_severity(diagnosis.findings), key=lambda own: own.code != verdict.code)
    ]
    answer = GOOD_ANSWERS.get(verdict.code) or ANSWERS.get(verdict.severity, "Healthy")
    return {
        "diagnosis": diagnosis,
        "answer": answer,
        "findings": shown,
        "earlier": [own for own in histories if own.code not in there and (own.events or own.mark != "open")],
        "span_of": span_of,
        "shown_events": SHOWN_EVENTS,
    }
