"""What a diagnosis says: findings, each with evidence and remedy, and one verdict over them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Severity = Literal["ok", "info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("ok", "info", "warning", "critical")
"""From least to most severe."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Evidence(_Part):
    """The numbers a finding rests on."""

    statistic: str = Field(description="What was measured, with its symbol: `F, between-batch over sampling variance`.")
    value: float
    low: float | None = Field(default=None, description="Lower end of the 95 % confidence interval.")
    high: float | None = Field(default=None, description="Upper end of the 95 % confidence interval.")
    threshold: float | None = Field(default=None, description="The value at which the finding begins.")
    z: float | None = Field(default=None, description="Standard errors from the null hypothesis.")
    e_value: float | None = Field(default=None, description="Anytime-valid evidence against the null hypothesis.")
    steps_used: int = Field(description="Recorded steps the statistic was computed from.")
    query: str = Field(description="REST path that draws the evidence, below the service's root.")


class Remedy(_Part):
    text: str = Field(description="What to do, in one or two sentences.")
    code: str | None = Field(default=None, description="The line to write, for this run's own settings.")


class Finding(_Part):
    code: str = Field(description="Stable name, `NH-...`; documented in docs/findings.md.")
    severity: Severity
    summary: str = Field(description="One plain sentence with the numbers.")
    evidence: Evidence | None
    remedy: Remedy | None
    ranks: tuple[int, ...] = Field(default=(), description="Global ranks concerned; empty: all.")
    layers: tuple[str, ...] = Field(default=(), description="Layer names concerned; empty: none in particular.")
    steps: tuple[int, int] = Field(
        description="First and last step at which it was seen, among the newest that are looked at (2000 recorded "
        "steps of the input probe, 400 of the layers): it may be older, see `since`."
    )
    since: int = Field(
        default_factory=lambda given: given["steps"][0],
        description="First step of the stretch in which it has held without an end, as the run's history knows it; "
        "where it has none, as for a run that was never seen live, the first of `steps`.",
    )


class Verdict(_Part):
    """One line for a whole run: worst cause and consequence."""

    code: str
    severity: Severity
    summary: str


class Warned(Verdict):
    """A finding that warns, in one line."""

    since: int = Field(description="As in the finding.")


class Diagnosis(_Part):
    """All there is to say of a run at `step`; `findings` is never empty (HEALTHY, WARMUP, NO_DATA are answers)."""

    run: str
    step: int | None = Field(description="Newest step looked at.")
    verdict: Verdict
    findings: tuple[Finding, ...]

    def warnings(self) -> tuple[Warned, ...]:
        """Its findings that warn, each in a line, worst first."""
        return tuple(
            Warned(code=finding.code, severity=finding.severity, summary=finding.summary, since=finding.since)
            for severity in ("critical", "warning")
            for finding in self.findings
            if finding.severity == severity
        )
