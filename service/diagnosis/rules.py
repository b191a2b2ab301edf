"""`diagnose`: every rule over one window, and the one line that stands over all of them."""

from __future__ import annotations

from itertools import chain

from service.diagnosis import harm, layers, nonfinite, order, ranks, stream
from service.diagnosis.finding import SEVERITIES, Diagnosis, Finding, Remedy, Verdict
from service.diagnosis.outcome import Abstention, Outcome, count
from service.diagnosis.window import Window

CAUSES = ("NH-NONFINITE", "NH-RANKDUP", "NH-PAIRED", "NH-CLUSTER", "NH-RANKSKEW", "NH-ORDER", "NH-CLIP")
"""Codes that name a cause, the one to put right first first."""
CONSEQUENCE = "NH-GAP"
JUDGES = ("NH-CLUSTER", "NH-GAP")
"""Rules without whose answer a run is not called healthy while it can still come."""
CODES = (*CAUSES, CONSEQUENCE, "NH-WITHHELD", "NO_DATA", "WARMUP", "HEALTHY")
"""Every code `diagnose` can give."""


def diagnose(window: Window) -> Diagnosis:
    """Findings, most severe first, and the verdict over them.

    Pure: the same rows give the same answer, whatever the order or time they arrived in.
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

    outcomes = _outcomes(window)
    found = sorted(
        chain.from_iterable(outcome.findings for outcome in outcomes),
        key=lambda finding: (-SEVERITIES.index(finding.severity), CODES.index(finding.code)),
    )
    abstained = tuple(chain.from_iterable(outcome.abstained for outcome in outcomes))
    withheld = tuple(_withheld(window, abstention) for abstention in abstained)
    if any(finding.severity in ("warning", "critical") for finding in found):
        findings = (*found, *withheld)
        return Diagnosis(run=window.run, step=window.last_step, verdict=_verdict(found, abstained), findings=findings)
    neutral = _neutral(window, outcomes, abstained)
    findings = (*found, *withheld) if neutral is None else (neutral, *found, *withheld)
    return Diagnosis(run=window.run, step=window.last_step, verdict=_as_verdict(findings[0]), findings=findings)


def _outcomes(window: Window) -> tuple[Outcome, ...]:
    data = stream.stream(window.probe, window.world_size)
    shadow = harm.shadow(window)
    loss_gap = shadow.loss_gap if isinstance(shadow, harm.Shadow) and shadow.harmful else None
    skewed, rank_effect = ranks.skew(window, data)
    return (
        nonfinite.nonfinite(window, data),
        stream.cluster(window, data, loss_gap),
        order.paired(window, data),
        order.order(window, data),
        skewed,
        ranks.duplicates(window, data),
        harm.gap(window, shadow, rank_effect),
        layers.clip(window),
    )


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


def _withheld(window: Window, abstention: Abstention) -> Finding:
    last = window.last_step or 0
    wait = ""
    if abstention.more_steps is not None:
        wait = (
            f"; about {count(abstention.more_steps, 'more step')} to go"
            if window.status == "running"
            else f"; the run would have needed about {count(abstention.more_steps, 'more step')}"
        )
    return Finding(
        code="NH-WITHHELD",
        severity="info",
        summary=f"{abstention.code} is {'limited' if abstention.partial else 'withheld'}: {abstention.reason}{wait}.",
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
    elif cause.code != "NH-NONFINITE":
        measured = not any(a.code == CONSEQUENCE for a in abstained)
        text += (
            " - inference does not lose by it so far"
            if measured
            else " - what inference loses by it is not measured yet"
        )
    return Verdict(code=cause.code, severity=severity, summary=f"{text}.")


def _as_verdict(finding: Finding) -> Verdict:
    return Verdict(code=finding.code, severity=finding.severity, summary=finding.summary)
