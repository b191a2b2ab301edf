"""`brn-serve --diagnose RUN|PATH`: the findings of one run, printed, and an exit code that a script can act on.

0  judged, and no warning
1  could not look: no such run, no such file, a store that cannot be opened
2  usage
3  nothing could be judged (NO_DATA, WARMUP, NH-WITHHELD)
4  a warning
5  a critical finding
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from service import windows
from service.diagnosis.finding import Diagnosis, Finding, Severity
from service.diagnosis.outcome import names
from service.errors import CannotStart, NotFound, ServiceError, StoreInUse
from service.recordings import recording, stored
from service.settings import Settings
from service.store import Store

EXIT_HEALTHY: Final = 0
EXIT_NOT_JUDGED: Final = 3
EXIT_WARNING: Final = 4
EXIT_CRITICAL: Final = 5

NOT_JUDGED: Final = ("NO_DATA", "WARMUP", "NH-WITHHELD")
"""Verdicts that say nothing of a run yet."""

_STYLES: Final[dict[Severity, str]] = {"ok": "green", "info": "cyan", "warning": "yellow", "critical": "bold red"}
_TIMEOUT_SECONDS: Final = 30.0


def checkup(settings: Settings, subject: str, console: Console) -> int:
    """Prints the findings of a run of the store, of a recorder's spool, or of exported tables.

    Args:
        settings: which store; where it is open in a service of this machine, that is asked.
        subject: a path that exists, else a run id.
        console: where to print.

    Returns:
        The exit code.

    Raises:
        CannotStart: there is nothing to look at; says why.
    """
    diagnosis = of_path(Path(subject)) if Path(subject).exists() else of_run(settings, subject)
    print_diagnosis(console, diagnosis)
    return exit_code(diagnosis)


def exit_code(diagnosis: Diagnosis) -> int:
    """What a script is told; see the head of this file."""
    verdict = diagnosis.verdict
    if verdict.severity == "critical":
        return EXIT_CRITICAL
    if verdict.severity == "warning":
        return EXIT_WARNING
    return EXIT_NOT_JUDGED if verdict.code in NOT_JUDGED else EXIT_HEALTHY


def of_path(path: Path) -> Diagnosis:
    """The findings of the run that a file or folder holds.

    Raises:
        CannotStart: it holds none.
    """
    found = recording(path)
    with stored(found) as store:
        return windows.diagnosis(store, found.record.id)


def of_run(settings: Settings, run_id: str) -> Diagnosis:
    """The findings of a run of the store.

    Raises:
        CannotStart: no such run, or the store can neither be opened nor asked.
    """
    try:
        store = Store(settings)
    except StoreInUse as error:
        return _asked(settings, run_id, error)
    try:
        return windows.diagnosis(store, run_id)
    except NotFound as error:
        raise CannotStart(f"{error.detail}; and there is no such file or folder") from error
    except ServiceError as error:
        raise CannotStart(error.detail) from error
    finally:
        store.close()


def _asked(settings: Settings, run_id: str, in_use: StoreInUse) -> Diagnosis:
    path = f"/v1/runs/{quote(run_id, safe='')}/findings"
    try:
        return Diagnosis.model_validate_json(answer_of_service(settings, path, in_use).content)
    except ValidationError as error:
        raise CannotStart(f"{in_use}; what answers {path} is no such service") from error


def answer_of_service(settings: Settings, path: str, in_use: StoreInUse) -> httpx.Response:
    """The answer of the service that has the store open, at the address that the settings name.

    Raises:
        CannotStart: it refuses, or none answers; says why.
    """
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}{path}"
    token = settings.read_token or settings.token
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token is not None else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=_TIMEOUT_SECONDS)
        if answer.is_error:
            raise CannotStart(str(answer.json()["detail"]))
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise CannotStart(f"{in_use}; nor does a service answer at {url} ({error})") from error
    return answer


# -------- printing


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """The verdict, then every finding with its numbers and what to do."""
    verdict = diagnosis.verdict
    at = "" if diagnosis.step is None else f", step {diagnosis.step}"
    console.print(Text.assemble((f"{diagnosis.run}{at}: ", "bold"), (verdict.code, _STYLES[verdict.severity])))
    console.print(Padding(Text(verdict.summary), (0, 0, 0, 2), expand=False))
    for finding in diagnosis.findings:
        console.print()
        console.print(_finding_text(finding))


def _finding_text(finding: Finding) -> RenderableType:
    parts: list[RenderableType] = [
        Text.assemble((f"{finding.severity.upper()} ", _STYLES[finding.severity]), (finding.code, "bold")),
        Padding(Text(finding.summary), (0, 0, 0, 2), expand=False),
    ]
    if finding.evidence is not None:
        parts.append(Padding(Text(_where(finding), style="dim"), (0, 0, 0, 2), expand=False))
        parts.append(Padding(Text(_numbers(finding), style="dim"), (0, 0, 0, 2), expand=False))
    if finding.remedy is not None:
        parts.append(Padding(Text(f"-> {finding.remedy.text}"), (0, 0, 0, 2), expand=False))
        if finding.remedy.code is not None:
            parts.append(Padding(Text(finding.remedy.code, style="bold"), (0, 0, 0, 5), expand=False))
    return Group(*parts)


def _where(finding: Finding) -> str:
    first, last = finding.steps
    told = [f"since step {finding.since}"] if finding.since < first else []
    told += [f"step {first}" if first == last else f"steps {first} to {last}"]
    told += [names(finding.ranks)] if finding.ranks else []
    told += [f"layers {', '.join(finding.layers)}"] if finding.layers else []
    return "; ".join(told)


def _numbers(finding: Finding) -> str:
    evidence = finding.evidence
    assert evidence is not None
    text = f"{evidence.statistic} = {evidence.value:.3g}"
    if evidence.low is not None and evidence.high is not None:
        text += f" ({evidence.low:.3g} to {evidence.high:.3g})"
    if evidence.threshold is not None:
        text += f", threshold {evidence.threshold:.3g}"
    return f"{text}, {evidence.steps_used} steps"
