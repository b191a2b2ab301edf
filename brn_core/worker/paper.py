"""`brn-train --paper`: the paper's comparison in small. Regimes x normalizations x seeds, and a table of what came out.

Every run is an ordinary run of `brn-train`: the settings are the user's, except for what makes the regime, so learning
rate, length and schedule are the same under every normalization. The runs are dealt out to the ranks, on the CPU with
one thread each; those that are about ranks are trained by all of them together.

Shapes: B samples of a batch, C channels, H x W positions.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from brn_core.layers import BatchRenorm
from brn_core.worker.models import MovingAverageNorm2d
from brn_core.worker.paper_table import Regime, Result, chosen_regimes, markdown, to_json
from brn_core.worker.provenance import provenance
from brn_core.worker.ranks import Rank
from brn_core.worker.replica import choose_device
from brn_core.worker.settings import Settings
from brn_core.worker.train import load_dataset, make_sampler, train

_TEST_PASSES: Final = 4
"""How often as many images as the test split has are evaluated with batch statistics: which images share a batch is
chance, and this much of it is averaged out."""

_PATIENCE: Final = timedelta(days=30)
"""How long a rank waits for one that still trains. Of one that is dead the launcher knows, and ends the others."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the table."""

    regime: Regime
    norm: str
    seed: int
    settings: Settings


def run_paper(settings: Settings, rank: Rank, console: Console | None) -> None:
    """Trains the whole table as one rank; the first one prints it and writes it to `--output`.

    Args:
        settings: what all runs share. Recorded as runs of their own if a service was named with --url.
        rank: which process this is.
        console: where to show it; None on all ranks but the first.

    Raises:
        UsageError: files of the data set are missing, or the device is, or a sampler does not fit them.
    """
    regimes = chosen_regimes(settings, rank.world_size)
    torch.set_num_threads(1)  # so that several runs share the cores, and sums do not depend on how many there are
    _forget_ranks()
    started = time.monotonic()
    group = share(rank, "group", settings.run_id or f"paper-{datetime.now(UTC):%Y%m%d-%H%M%S}")[0]
    work = jobs(settings, regimes, group)
    for job in {job.regime.name: job for job in work}.values():  # what cannot be is said now, not in an hour
        dataset = load_dataset(job.settings)
        for split in (dataset.train, dataset.test):
            make_sampler(job.settings, split, dataset.classes, Rank(0, rank.world_size if job.regime.all_ranks else 1))
    alone = [job for job in work if not job.regime.all_ranks]
    together = [job for job in work if job.regime.all_ranks]
    mine = []
    for job in alone[rank.rank :: rank.world_size]:
        mine.append(_run(job, replace(rank, rank=0, world_size=1), 1))
        _report(mine[-1])
    share(rank, "alone", None)  # here the first waits for the last: training together, torch would wait half an hour
    for number, job in enumerate(together):
        result = _run(job, _rendezvous(rank, f"run-{number}"), rank.world_size)
        if rank.is_first:
            mine.append(result)
            _report(result)
    order = {(job.regime.name, job.norm, job.seed): place for place, job in enumerate(work)}
    results = [result for part in share(rank, "results", mine) for result in part]
    results.sort(key=lambda result: order[result.regime, result.norm, result.seed])
    if console is None:
        return
    headings = {regime.name: regime.heading(settings, rank.world_size) for regime in regimes}
    table = markdown(results, headings)
    console.print(f"\n{table}", markup=False, highlight=False, soft_wrap=True)
    seconds = time.monotonic() - started
    console.print(f"{len(results)} runs of {settings.steps} steps in {seconds / 60:.1f} minutes", highlight=False)
    if _is_recorded(settings):
        for line in links(settings.url, group, results):
            console.print(line, soft_wrap=True, highlight=False)
    if settings.output is not None:
        about = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "minutes": round(seconds / 60, 1),
            "ranks": rank.world_size,
            "provenance": provenance(choose_device(settings, rank, None)),
            "settings": settings.recorded(),
        }
        is_json = Path(settings.output).suffix == ".json"
        Path(settings.output).write_text(to_json(results, headings, about) if is_json else table)
        console.print(f"written to {settings.output}", soft_wrap=True, highlight=False)


def jobs(settings: Settings, regimes: tuple[Regime, ...], group: str) -> list[Job]:
    """All runs of the table; the seeds of a cell stand together, so dealing them out shares the work evenly."""
    shared: dict[str, Any] = {"paper": False, "summary": False}
    if not _is_recorded(settings):
        shared |= {"record_every": 0, "eval_every": 0}  # nobody sees the curve
    found = []
    for regime in regimes:
        for norm in regime.norms:
            for seed in range(settings.seed, settings.seed + settings.seeds):
                name = f"{regime.name} {norm}, seed {seed}"
                own = {
                    "run_id": f"{group}-{regime.name}-{norm}-{seed}".replace(" ", "-"),
                    "run_name": f"paper: {name}",
                    "tags": ",".join(["paper", group, regime.name, norm, f"seed {seed}"]),
                }
                changed = shared | own | regime.settings(settings, norm, seed)
                found.append(Job(regime, norm, seed, settings.model_copy(update=changed)))
    return found


def _is_recorded(settings: Settings) -> bool:
    return "url" in settings.model_fields_set and settings.record_every > 0


def _run(job: Job, rank: Rank, ranks: int) -> Result:
    outcome = train(job.settings, rank)
    return Result(
        regime=job.regime.name,
        norm=job.norm,
        seed=job.seed,
        moving=outcome.evaluation.accuracy,
        batch=batch_statistics_accuracy(outcome.model, job.settings, ranks) if rank.is_first else None,
        diverged=not math.isfinite(outcome.train_loss),
        seconds=round(outcome.seconds, 2),
        run_id=outcome.run_id,
    )


def _report(result: Result) -> None:
    """One line; every rank prints its own."""
    batch = "" if result.batch is None else f", {result.batch:.1%} with batch statistics"
    diverged = ", diverged" * result.diverged
    print(
        f"{result.regime} {result.norm}, seed {result.seed}: {result.moving:.1%}{batch}{diverged}, "
        f"{result.seconds:.1f} s",
        flush=True,
    )


@torch.no_grad()
def batch_statistics_accuracy(model: nn.Module, settings: Settings, ranks: int) -> float | None:
    """Accuracy on test batches drawn as the training batches were, normalized with mu_B and sigma_B alone.

    What the paper does for its 16 x 2 batches (section 4.3). Batch Renorm's r and d are left out (1 and 0),
    microbatches are as in training, and where training normalized over the ranks, so does this: over what each of them
    would draw.

    Args:
        model: trained; not changed.
        settings: it was trained with.
        ranks: it was trained on.

    Returns:
        The share of right answers; None for a normalization that never uses the batch.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, MovingAverageNorm2d) or getattr(module, "frozen", False):
            return None
        if isinstance(module, BatchRenorm):
            module.sync = "none"
            module.set_limits(1.0, 0.0)
        if isinstance(module, BatchRenorm | _BatchNorm):
            module.train()
    joined = settings.norm == "syncbn" or (settings.norm == "brn" and settings.norm_sync == "moments")
    device = next(model.parameters()).device
    dataset = load_dataset(settings)
    samplers = [make_sampler(settings, dataset.test, dataset.classes, Rank(r, ranks)) for r in range(ranks)]
    batches = math.ceil(_TEST_PASSES * len(dataset.test.labels_N) / (settings.batch_size * ranks))
    correct = torch.zeros((), device=device)
    for _ in range(batches):
        drawn = [next(sampler) for sampler in samplers]
        for indices_B in [torch.cat(drawn)] if joined else drawn:
            images_BCHW, labels_B = (part.to(device) for part in dataset.test.batch(indices_B))
            correct += (model(images_BCHW).argmax(1) == labels_B).sum()
    return correct.item() / (batches * settings.batch_size * ranks)


def links(url: str, group: str, results: list[Result]) -> Iterator[str]:
    """Where the dashboard shows the runs: all of them in its list, and each regime's beside each other."""
    root = url.rstrip("/")
    yield f"all runs: {root}/?tag={group}"
    by_regime: dict[str, list[str]] = {}
    for result in results:
        if result.run_id is not None:
            by_regime.setdefault(result.regime, []).append(result.run_id)
    for regime, run_ids in by_regime.items():
        yield f"{regime}: {root}/compare?runs={','.join(run_ids)}"


def share(rank: Rank, name: str, value: _T) -> list[_T]:
    """What each rank has, on every rank, in their order; a collective call."""
    values: list[Any] = [value] * rank.world_size
    if rank.world_size > 1:
        there = _rendezvous(rank, name)
        dist.init_process_group(
            "gloo", init_method=there.rendezvous, timeout=_PATIENCE, rank=rank.rank, world_size=rank.world_size
        )
        try:
            dist.all_gather_object(values, value)
        finally:
            dist.destroy_process_group()
    return values


def _rendezvous(rank: Rank, name: str) -> Rank:
    """The ranks meet anew for each run, each time in a file of its own."""
    return replace(rank, rendezvous=f"{rank.rendezvous}-{name}")


def _forget_ranks() -> None:
    """The runs of one process are runs of one rank: what the launcher said of it must not reach their recorder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
