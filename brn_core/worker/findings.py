"""What the service says of a run, fetched and shown in a terminal.

Only the fields that are shown are declared here: the service owns the whole answer (`GET /v1/runs/{run}/findings`), and
the training process shares no code with it but `brn_core.wire`.
"""

from __future__ import annotations

import time
from typing import Final

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from brn_core.wire import url_without_user

_POLL_SECONDS = 0.2

STYLES: Final = {"ok": "green", "info": "cyan", "warning": "yellow", "critical": "bold red"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Remedy(_Part):
    text: str
    code: str | None = None


class Finding(_Part):
    code: str
    severity: str
    summary: str
    remedy: Remedy | None = None


class Verdict(_Part):
    code: str
    severity: str
    summary: str


class Diagnosis(_Part):
    step: int | None
    verdict: Verdict
    findings: tuple[Finding, ...]


class FindingsUnavailableError(Exception):
    """The service did not give findings; the text says why, in one line."""


def run_url(url: str, run_id: str) -> str:
    """The run's page on the dashboard."""
    return f"{url_without_user(url).rstrip('/')}/runs/{run_id}"


def headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def fetch_diagnosis(
    url: str, run_id: str, *, token: str | None = None, through_step: int = 0, timeout_seconds: float = 15.0
) -> Diagnosis:
    """The findings of a run once the service has looked at `through_step`, or the newest at the deadline.

    Raises:
        FindingsUnavailableError: nothing listens there, or the answer is an error.
    """
    deadline = time.monotonic() + timeout_seconds
    shown = url_without_user(url)
    with httpx.Client(base_url=url, headers=headers(token), timeout=timeout_seconds) as client:
        while True:
            try:
                response = client.get(f"/v1/runs/{run_id}/findings")
                # 404: the run's own record is still on its way
                if response.status_code != httpx.codes.NOT_FOUND:
                    diagnosis = Diagnosis.model_validate_json(response.raise_for_status().content)
                    if (diagnosis.step is not None and diagnosis.step >= through_step) or time.monotonic() > deadline:
                        return diagnosis
            except httpx.HTTPStatusError as error:
                raise FindingsUnavailableError(f"{shown} answered {error.response.status_code} to findings") from error
            except httpx.HTTPError as error:
                raise FindingsUnavailableError(f"no service answers at {shown}") from error
            except ValidationError as error:
                raise FindingsUnavailableError(f"{shown} gave findings of an unknown form") from error
            if time.monotonic() > deadline:
                raise FindingsUnavailableError(f"the service at {shown} does not know run {run_id}")
            time.sleep(_POLL_SECONDS)


def finding_text(finding: Finding) -> RenderableType:
    """Severity, code and sentence; below it the remedy and its line of code."""
    style = STYLES.get(finding.severity, "")
    parts: list[RenderableType] = [
        Text.assemble((f"{finding.severity.upper()} ", style), (finding.code, "bold"), "  ", finding.summary)
    ]
    if finding.remedy is not None:
        parts.append(Padding(Text(f"→ {finding.remedy.text}"), (0, 0, 0, 2), expand=False))
        if finding.remedy.code is not None:
            parts.append(Padding(Text(finding.remedy.code, style="bold"), (0, 0, 0, 4), expand=False))
    return Group(*parts)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """The findings, most severe first."""
    order = list(STYLES)
    for finding in sorted(
        diagnosis.findings, key=lambda f: order.index(f.severity) if f.severity in order else -1, reverse=True
    ):
        console.print(finding_text(finding))
