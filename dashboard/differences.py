"""In what compared runs differ: results, settings, findings; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboard.views import by_severity, finding_keys, finding_view, run_view
from service.diagnosis.finding import SEVERITIES, Diagnosis, Severity
from service.diagnosis.rules import CODES
from service.history import CODES as WRONG
from service.schemas import Comparison, Run


@dataclass(frozen=True, slots=True)
class Seen:
    """A finding of one run, in a cell.

    Attributes:
        value, low, high: the statistic that it rests on, with its interval; None where it has none.
        since: the step from which on it was seen.
        summary: its sentence.
        view: query of the run's page that shows its evidence, "" without any.
        more: findings of the same code besides this one, the worst.
    """

    severity: Severity
    value: float | None
    low: float | None
    high: float | None
    since: int
    summary: str
    view: str
    more: int


@dataclass(frozen=True, slots=True)
class FindingColumn:
    """One code in every run; `statistic` says what its numbers are, None stands for a run without it."""

    code: str
    statistic: str
    cells: tuple[Seen | None, ...]


def finding_columns(runs: Sequence[Run], diagnoses: Sequence[Diagnosis | None]) -> list[FindingColumn]:
    """What is wrong in any of the runs, a column a code: the most severe first, then what most runs have.

    Args:
        runs: in the order of the rows.
        diagnoses: of each run; None where there is none yet.
    """
    seen: dict[str, dict[int, Seen]] = {}
    statistics: dict[str, str] = {}
    for row, (run, diagnosis) in enumerate(zip(runs, diagnoses, strict=True)):
        if diagnosis is None:
            continue
        keys = dict(zip(map(id, diagnosis.findings), finding_keys(diagnosis.findings), strict=True))
        for finding in by_severity(diagnosis.findings):
            if finding.code not in WRONG:
                continue
            cells = seen.setdefault(finding.code, {})
            if row in cells:
                continue
            evidence = finding.evidence
            statistics.setdefault(finding.code, evidence.statistic if evidence else "")
            cells[row] = Seen(
                severity=finding.severity,
                value=evidence.value if evidence else None,
                low=evidence.low if evidence else None,
                high=evidence.high if evidence else None,
                since=finding.since,
                summary=finding.summary,
                view=finding_view(finding, keys[id(finding)], run),
                more=sum(own.code == finding.code for own in diagnosis.findings) - 1,
            )
    columns = [
        FindingColumn(code, statistics[code], tuple(cells.get(row) for row in range(len(runs))))
        for code, cells in seen.items()
    ]

    def place(column: FindingColumn) -> tuple[int, int, int]:
        found = [cell for cell in column.cells if cell is not None]
        worst = max(SEVERITIES.index(cell.severity) for cell in found)
        return -worst, -len(found), CODES.index(column.code)

    return sorted(columns, key=place)


def compare_context(found: Comparison, runs: Sequence[Run], diagnoses: Sequence[Diagnosis | None]) -> dict[str, Any]:
    """What the tables of a comparison say, one entry a run in the order of `runs`."""
    names = sorted((name for name in found.final if not name.startswith("brn/")), key=_metric_rank)
    results = [name for name in names if not is_setting(name)]
    moved = [name for name in names if is_setting(name)]
    # Trainers repeat in their config what the record of a run says anyway.
    settings = [
        key
        for key, values in found.config.items()
        if "." in key and found.config.get(key.removeprefix("config.")) != values
    ]
    settings += [key for key in found.config if "." not in key]
    return {
        "views": [run_view(run, run.layers) for run in runs],
        "verdicts": [run.verdict if own is None else own.verdict for run, own in zip(runs, diagnoses, strict=True)],
        "pending": [own is None for own in diagnoses],
        "findings": finding_columns(runs, diagnoses),
        "results": [(name, found.final[name]) for name in results],
        "settings": [
            *((key.removeprefix("config."), found.config[key]) for key in settings),
            *((f"{name} at the newest step", found.final[name]) for name in moved if len(set(found.final[name])) > 1),
        ],
        "scalars": [*results, *moved],
        "scalar": next(iter([*results, *moved]), ""),
        "group_keys": [key for key in settings if key.startswith("config.")],
    }


def is_setting(name: str) -> bool:
    """Whether a scalar says what the training was told and not what came of it, as a learning rate does."""
    lower = name.lower()
    if "loss" in lower or "acc" in lower:
        return False
    words = re.split(r"[^a-z]+", lower)
    return not {"lr", "momentum", "epoch"}.isdisjoint(words) or bool(re.search(r"learning.?rate|weight.?decay", lower))


def _metric_rank(name: str) -> tuple[int, str]:
    lower = name.lower()
    return (0 if "acc" in lower else 1 if "loss" in lower else 2), lower
