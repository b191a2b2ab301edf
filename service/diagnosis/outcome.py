"""What one rule answers: findings, or why it abstains, or what it found in order."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode

from service.diagnosis.finding import Finding


@dataclass(frozen=True, slots=True)
class Abstention:
    """A rule that lacks its input says so.

    Attributes:
        code: the finding it cannot judge.
        reason: a clause: what is missing.
        more_steps: training steps after which it could judge; None where waiting does not help.
        advice: what the user can do; None where waiting is all.
        ranks: global ranks concerned.
        partial: whether it judged all the same, on the rows it had.
    """

    code: str
    reason: str
    more_steps: int | None = None
    advice: str | None = None
    ranks: tuple[int, ...] = ()
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one rule. `clear` is a clause for the healthy verdict: what was looked at and found in order."""

    findings: tuple[Finding, ...] = ()
    abstained: tuple[Abstention, ...] = ()
    clear: str | None = None


def query(run: str, route: str, **parameters: object) -> str:
    """REST path below the service's root; a sequence repeats its parameter, a trailing underscore is dropped."""
    pairs = {name.rstrip("_"): value for name, value in parameters.items() if value is not None}
    return f"/v1/runs/{run}/{route}?{urlencode(pairs, doseq=True, safe='/')}"


def count(n: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def names(ranks: tuple[int, ...]) -> str:
    """`rank 0`, `ranks 0, 1`."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
