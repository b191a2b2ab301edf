"""`diagnose`: every rule over one window, and the one line that stands over all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from service.diagnosis import cluster, drift, harm, health, layers, noise, nonfinite, order, ranks, stream
from service.diagnosis.finding import SEVERITIES, Diagnosis, Finding, Remedy, Verdict
from service.diagnosis.outcome import Abstention, Outcome, count
from service.diagnosis.window import Window

CAUSES = (
    "NH-NONFINITE", "NH-RUNAWAY", "NH-RANKDUP", "NH-PAIRED", "NH-CLUSTER", "NH-RANKSKEW", "NH-ORDER", "NH-SCHED-FAST",
    "NH-TAIL", "NH-SMALL", "NH-LAG", "NH-DEAD", "NH-BUFFERS", "NH-UNEVEN", "NH-MISSING", "NH-CLIP",
)  # fmt: skip
"""Codes that name a cause, the one to put right first first."""
CONSEQUENCE = "NH-GAP"
NOTES = ("NH-SCHED-SLOW", "NH-POOLBIAS", "NH-COUPLED", "NH-STRATIFIED")
"""Codes that never are more than an info."""
WITHOUT_SHADOW = ("NH-NONFINITE", "NH-RUNAWAY", "NH-RANKDUP", "NH-DEAD", "NH-MISSING")
"""Causes whose harm does not show in the shadow pass: they are as severe as they are."""
JUDGES = ("NH-CLUSTER", "NH-GAP")
"""Rules without whose answer a run is not called healthy while it can still come."""
CODES = (*CAUSES, CONSEQUENCE, *NOTES, "NH-WITHHELD", "NO_DATA", "WARMUP", "HEALTHY")
"""Every code `diagnose` can give."""


def diagnose(window: Window, known: stream.Known | None = None) -> Diagnosis:
    """Findings, most severe first, and the verdict over them.

    Pure: the same rows give the same answer, whatever the order or time they arrived in.

    Args:
        window: the rows.
        known: what the last diagnosis of the run computed, which saves computing it again and changes no answer.
    """
    if window.last_step is None:
        empty = Finding(
            code="NO_DATA",
            severity="info" if window.status != "running" else "ok",
            summary="No rows have arrived for this run.",
            evidence=None,
            remedy=Remedy(
                text="Call the recorder once a step, and check that its URL is this service's.",
                code="recorder.step(loss)",
            ),
            steps=(0, 0),
        )
        return Diagnosis(run=window.run, step=None, verdict=_as_verdict(empty), findings=(empty,))

    outcomes = _outcomes(window, known)
    found = sorted(
        _by_consequence([finding for outcome in outcomes for finding in outcome.findings], outcomes),
        key=lambda finding: (-SEVERITIES.index(finding.severity), CODES.index(finding.code)),
    )
    abstained = tuple(chain.from_iterable(outcome.abstained for outcome in outcomes))
    withheld = tuple(_withheld(window, together) for together in _by_reason(abstained))
    if any(finding.severity in ("warning", "critical") for finding in found):
        findings = (*found, *withheld)
        return Diagnosis(run=window.run, step=window.last_step, verdict=_verdict(found, abstained), findings=findings)
    neutral = _neutral(window, outcomes, abstained)
    findings = (*found, *withheld) if neutral is None else (neutral, *found, *withheld)
    return Diagnosis(run=window.run, step=window.last_step, verdict=_as_verdict(findings[0]), findings=findings)


def _outcomes(window: Window, known: stream.Known | None) -> tuple[Outcome, ...]:
    data = stream.stream(window.probe, window.world_size, known)
    shadow = harm.shadow(window)
    loss_gap = shadow.loss_gap if isinstance(shadow, harm.Shadow) and shadow.harmful else None
    shared = health.shared_by(window)
    skewed, rank_effect = ranks.skew(window, data, kept_of_one=shared in ("own", "rank 0"))
    ordered = order.order(window, data)
    return (
        nonfinite.nonfinite(window, data),
        cluster.cluster(window, data, loss_gap),
        order.paired(window, data),
        ordered,
        skewed,
        ranks.duplicates(window, data),
        cluster.stratified(window, data),
        harm.gap(window, shadow, rank_effect),
        noise.small(window),
        noise.tail(window),
        noise.pool_bias(window),
        noise.coupled(window),
        drift.lag(window, explained=bool(ordered.findings or skewed.findings)),
        drift.runaway(window),
        drift.opened_early(window),
        drift.opened_late(window),
        health.dead(window),
        health.missing(window),
        health.buffers(window, shared, rank_effect),
        health.uneven(window),
        layers.clip(window),
    )


def _by_consequence(found: list[Finding], outcomes: tuple[Outcome, ...]) -> list[Finding]:
    """A cause whose consequence was measured and is none stays a warning."""
    measured = not any(a.code == CONSEQUENCE for outcome in outcomes for a in outcome.abstained)
    if not measured or any(finding.code == CONSEQUENCE for finding in found):
        return found
    return [
        finding.model_copy(update={"severity": "warning"})
        if finding.severity == "critical" and finding.code not in WITHOUT_SHADOW
        else finding
        for finding in found
    ]


def _neutral(window: Window, outcomes: tuple[Outcome, ...], abstained: tuple[Abstention, ...]) -> Finding | None:
    """WARMUP while an answer is still to come, HEALTHY where there is one, None where nothing could be judged."""
    last = window.last_step or 0
    clear = [outcome.clear for outcome in outcomes if outcome.clear is not None]
    waiting = [a for a in abstained if a.code in JUDGES and a.more_steps is not None]
    if window.status == "running" and waiting:
        more = max(a.more_steps or 0 for a in waiting)
        said = f" So far {' and '.join(clear)}." if clear else ""
        return Finding(
            code="WARMUP",
            severity="ok",
            summary=f"Too early to judge: about {count(more, 'more step')} until "
            f"{' and '.join(dict.fromkeys(a.code for a in waiting))} can answer.{said}",
            evidence=None,
            remedy=None,
            steps=(last, last),
        )
    if not clear:
        return None
    missing = [a.code for a in abstained if a.code in JUDGES and not a.partial]
    unknown = f" Not judged: {', '.join(dict.fromkeys(missing))}." if missing else ""
    return Finding(
        code="HEALTHY",
        severity="ok",
        summary=f"No sign that normalization hurts this run: {' and '.join(clear)}.{unknown}",
        evidence=None,
        remedy=None,
        steps=(last, last),
    )


def _by_reason(abstained: tuple[Abstention, ...]) -> tuple[Abstention, ...]:
    """Abstentions that differ in nothing but their code as one, `NH-SMALL, NH-TAIL and NH-LAG`."""
    codes: dict[Abstention, list[str]] = {}
    for abstention in abstained:
        codes.setdefault(replace(abstention, code=""), []).append(abstention.code)
    return tuple(replace(reason, code=_listed(list(dict.fromkeys(named)))) for reason, named in codes.items())


def _listed(codes: list[str]) -> str:
    return codes[0] if len(codes) == 1 else f"{', '.join(codes[:-1])} and {codes[-1]}"


def _withheld(window: Window, abstention: Abstention) -> Finding:
    last = window.last_step or 0
    wait = ""
    if abstention.more_steps is not None:
        wait = (
            f"; about {count(abstention.more_steps, 'more step')} to go"
            if window.status == "running"
            else f"; the run would have needed about {count(abstention.more_steps, 'more step')}"
        )
    verb = "are" if " and " in abstention.code else "is"
    extent = "limited" if abstention.partial else "withheld"
    return Finding(
        code="NH-WITHHELD",
        severity="info",
        summary=f"{abstention.code} {verb} {extent}: {abstention.reason}{wait}.",
        evidence=None,
        remedy=Remedy(text=abstention.advice) if abstention.advice else None,
        ranks=abstention.ranks,
        steps=(last, last),
    )


def _verdict(found: list[Finding], abstained: tuple[Abstention, ...]) -> Verdict:
    """Worst cause + consequence, one sentence; a cause without a known consequence says so."""
    consequence = next((f for f in found if f.code == CONSEQUENCE), None)
    cause = next((f for f in found if f.code in CAUSES and f.severity in ("warning", "critical")), None)
    if cause is None:
        assert consequence is not None
        return _as_verdict(consequence)
    severity = cause.severity
    text = cause.summary.rstrip(".")
    if consequence is not None:
        severity = max(severity, consequence.severity, key=SEVERITIES.index)
        text += f" - and it shows: {consequence.summary[0].lower()}{consequence.summary[1:].rstrip('.')}"
    elif cause.code not in WITHOUT_SHADOW:
        measured = not any(a.code == CONSEQUENCE for a in abstained)
        text += (
            " - inference does not lose by it so far"
            if measured
            else " - what inference loses by it is not measured yet"
        )
    return Verdict(code=cause.code, severity=severity, summary=f"{text}.")


def _as_verdict(finding: Finding) -> Verdict:
    return Verdict(code=finding.code, severity=finding.severity, summary=finding.summary)
