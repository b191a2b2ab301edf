"""What `brn-train --paper` compares, and its table: means and spreads over seeds, and in words who wins. No torch.

Accuracies are shares inside and percent in the table; differences are percentage points.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from brn_core.worker.settings import Settings, UsageError

NORMS: Final[Mapping[str, Mapping[str, str]]] = {
    "bn": {"norm": "bn"},
    "brn": {"norm": "brn", "norm_sync": "ema"},
    "sync bn": {"norm": "syncbn"},
    "sync brn": {"norm": "brn", "norm_sync": "moments"},
    "ema": {"norm": "ema"},
}
"""The settings of each normalization of the table."""

_MANY_CLASSES: Final = {"digits": "digit-pairs", "cifar10": "cifar100"}
"""The data set of the same kind with a hundred classes: 16 labels a batch are few of them."""

_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to make batches.

    Attributes:
        name: for `--regimes`.
        title: in the table; {batch} is the batch size, {half} half of it, {ranks} the number of ranks.
        norms: what is compared there, of NORMS.
        changes: settings that make the regime.
        many_classes: whether it is of the data set with a hundred classes.
        all_ranks: whether all ranks train one run together.
        lr_factor: multiplies the learning rate.
        paper: accuracies in percent that the paper reports, by normalization; "-" where it has none.
    """

    name: str
    title: str
    norms: tuple[str, ...] = ("bn", "brn")
    changes: Mapping[str, Any] = field(default_factory=dict)
    many_classes: bool = False
    all_ranks: bool = False
    lr_factor: float = 1.0
    paper: Mapping[str, str] = field(default_factory=dict)

    def settings(self, base: Settings, norm: str, seed: int) -> dict[str, Any]:
        """What one run of the regime changes in the user's settings."""
        dataset = {"dataset": _MANY_CLASSES[base.dataset]} if self.many_classes else {}
        return {**dataset, **self.changes, **NORMS[norm], "lr": base.lr * self.lr_factor, "seed": seed}

    def heading(self, base: Settings, ranks: int) -> str:
        return self.title.format(batch=base.batch_size, half=base.batch_size // 2, ranks=ranks)


# Source of the numbers: Ioffe 2017, sections 4.1 to 4.3; ImageNet top-1 of Inception-v3, 50 workers x 32.
REGIMES: Final = (
    Regime("iid", "i.i.d., {batch}", ("bn", "brn", "ema"), paper={"bn": "78.3", "brn": "78.5", "ema": "blows up"}),
    Regime("microbatch-4", "microbatches of 4", changes={"virtual_batch_size": 4}, paper={"bn": "74.2", "brn": "76.5"}),
    Regime("microbatch-2", "microbatches of 2", changes={"virtual_batch_size": 2}),
    Regime("pairs", "{half} x 2", changes={"sampler": "label-groups", "group_size": 2}),
    Regime("many-class-iid", "100 classes, i.i.d., {batch}", many_classes=True),
    Regime(
        "many-class-pairs",
        "100 classes, {half} x 2",
        changes={"sampler": "label-groups", "group_size": 2},
        many_classes=True,
        paper={"bn": "67.0 (76.5 with batch statistics)", "brn": "78.5"},
    ),
    Regime("two-labels", "2 labels a batch", changes={"sampler": "few-labels", "labels_per_batch": 2}),
    Regime("one-label", "1 label a batch", changes={"sampler": "few-labels", "labels_per_batch": 1}),
    Regime(
        "rank-labels",
        "one label set per rank, {ranks} x {batch}",
        ("bn", "brn", "sync bn", "sync brn"),
        {"sampler": "rank-skewed", "own_share": 1.0},
        all_ranks=True,
    ),
    Regime("high-lr", "i.i.d., {batch}, learning rate x 10", ("bn", "brn", "ema"), lr_factor=10.0),
)


def check_table(base: Settings, ranks: int) -> None:
    """Says early what the table cannot be made with.

    Raises:
        UsageError: one line that says it.
    """
    chosen_regimes(base, ranks)
    if base.output is not None:
        path = Path(base.output)
        if path.suffix not in (".json", ".md"):
            raise UsageError(f"--output must end in .json or .md, got {path}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"--output {path}: no file can be written there; name one in a folder that exists")


def chosen_regimes(base: Settings, ranks: int) -> tuple[Regime, ...]:
    """The regimes of `--regimes` in the order of the table; of "all" those that data set and ranks allow.

    Raises:
        UsageError: one that was named does not exist, or data set or ranks do not allow it.
    """
    names = [name.strip() for name in base.regimes.split(",")]
    known = [regime.name for regime in REGIMES]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise UsageError(f"--regimes: there is no {unknown[0]!r}; there are all, {', '.join(known)}")
    found = []
    for regime in REGIMES:
        problem = None
        if regime.many_classes and base.dataset not in _MANY_CLASSES:
            problem = f"is for --dataset {' or '.join(_MANY_CLASSES)}, got {base.dataset}"
        if regime.all_ranks and ranks < 2:
            problem = "is about ranks: give --ranks 2"
        if regime.name in names and problem is not None:
            raise UsageError(f"--regimes {regime.name} {problem}")
        if problem is None and ("all" in names or regime.name in names):
            found.append(regime)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run came to, on the test split.

    Attributes:
        moving: accuracy with moving statistics, as inference has it.
        batch: accuracy of batches drawn as in training that are normalized with their own statistics alone; None for
            a normalization that never does that.
        diverged: whether the loss ended non-finite.
    """

    regime: str
    norm: str
    seed: int
    moving: float
    batch: float | None
    diverged: bool
    seconds: float
    run_id: str | None = None

    @property
    def gap(self) -> float | None:
        """How much better batch statistics do than moving ones."""
        return None if self.batch is None else self.batch - self.moving


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation (of a sample: n - 1) of so many values; of a single one there is no spread."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))

    def text(self, signed: bool = False) -> str:
        """In percent, `97.3 ± 0.4`."""
        mean = f"{100 * self.mean:{'+' if signed else ''}z.1f}"
        return mean if math.isnan(self.sd) else f"{mean} ± {100 * self.sd:.1f}"

    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean, by Student's t; NaN for a single value."""
        from scipy.stats import t  # type: ignore[import-untyped]  # scikit-learn brings it; a second to import

        return float(t.ppf((1 + _CONFIDENCE) / 2, self.count - 1)) * self.sd / math.sqrt(self.count)


def select(results: Iterable[Result], regime: str, norm: str) -> list[Result]:
    return sorted((r for r in results if (r.regime, r.norm) == (regime, norm)), key=lambda result: result.seed)


def paired_difference(results: Iterable[Result], regime: str, norm: str, against: str) -> Spread | None:
    """Accuracy with moving statistics, `norm` less `against`, seed by seed; None where no seed has both."""
    results = list(results)
    other = {result.seed: result.moving for result in select(results, regime, against)}
    differences = [r.moving - other[r.seed] for r in select(results, regime, norm) if r.seed in other]
    return Spread.of(differences) if differences else None


def markdown(results: Sequence[Result], headings: Mapping[str, str]) -> str:
    """The table, and below it who wins in words.

    Args:
        results: of all runs.
        headings: what a regime is called, by its name; only regimes named here are shown, in this order.
    """
    rows = [["regime", "norm", "seeds", "moving statistics", "batch statistics", "gap", "the paper, ImageNet"]]
    for regime in REGIMES:
        for norm in regime.norms if regime.name in headings else ():
            if found := select(results, regime.name, norm):
                rows.append(_row(headings[regime.name], norm, found, regime.paper.get(norm, "–")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in verdicts(results, headings)), ""])


def _row(heading: str, norm: str, found: Sequence[Result], paper: str) -> list[str]:
    batch = [result.batch for result in found if result.batch is not None]
    gaps = [result.gap for result in found if result.gap is not None]
    diverged = sum(result.diverged for result in found)
    moving = Spread.of([result.moving for result in found]).text()
    return [
        heading,
        norm,
        str(len(found)),
        f"{moving} ({diverged} diverged)" if diverged else moving,
        Spread.of(batch).text() if batch else "–",
        Spread.of(gaps).text(signed=True) if gaps else "–",
        paper,
    ]


_CONTRASTS: Final = (("brn", "bn"), ("sync bn", "bn"), ("sync brn", "sync bn"), ("sync bn", "brn"), ("ema", "bn"))


def verdicts(results: Sequence[Result], headings: Mapping[str, str]) -> list[str]:
    """One sentence for each pair of normalizations of a regime that is worth comparing."""
    sentences = []
    for regime, heading in headings.items():
        for norm, against in _CONTRASTS:
            difference = paired_difference(results, regime, norm, against)
            if difference is not None:
                sentences.append(f"{heading}: {verdict(difference, norm, against)}")
    return sentences


def verdict(difference: Spread, norm: str, against: str) -> str:
    """Whether one normalization wins: the 95 % confidence interval of the paired difference says."""
    said = f"{norm} − {against} = {difference.text(signed=True)} points"
    if difference.count < 2:
        return f"{said} in one seed, which says nothing of chance."
    margin = difference.half_width()
    if abs(difference.mean) <= margin:
        return f"{said}: no difference that {difference.count} seeds can show, so {norm} does not win."
    if difference.mean > 0:
        return f"{said}: {norm} wins."
    return f"{said}: {norm} does not win, {against} does."


def to_json(results: Sequence[Result], headings: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """All of it, a line a result."""
    head = json.dumps({**about, "headings": headings}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(asdict(result)) for result in results)
    return f'{head},\n "results": [\n  {lines}\n ]\n}}\n'


def from_json(path: Path) -> tuple[list[Result], dict[str, str], dict[str, Any]]:
    """What `to_json` wrote: results, headings and the rest."""
    content: dict[str, Any] = json.loads(path.read_text())
    return [Result(**result) for result in content.pop("results")], content.pop("headings"), content
