"""The training loop: data, model, limits, recording, evaluation; one function call a run and rank.

Shapes: B samples of a batch, C channels, H x W positions, K classes.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from brn_core.recorder import Recorder
from brn_core.schedule import RenormSchedule
from brn_core.worker.checkpoint import Checkpoints
from brn_core.worker.data import Dataset, Split, digit_pairs, digits, synthetic
from brn_core.worker.faults import fault_of
from brn_core.worker.findings import run_url
from brn_core.worker.images import DatasetNotFoundError, cifar10, cifar100, image_folder
from brn_core.worker.learner import Learner, keep_time_constant
from brn_core.worker.models import make_model, norm_factory
from brn_core.worker.progress import Progress
from brn_core.worker.provenance import provenance
from brn_core.worker.ranks import Rank
from brn_core.worker.replica import choose_device, process_group, share_cores, wait_for_all
from brn_core.worker.samplers import (
    BatchSampler,
    DirichletBatchSampler,
    DuplicatesBatchSampler,
    FewLabelsBatchSampler,
    IidBatchSampler,
    LabelGroupsBatchSampler,
    RankSkewedBatchSampler,
    SortedBatchSampler,
)
from brn_core.worker.settings import Settings, UsageError

logger = logging.getLogger("brn_core")

TRAIN_ACCURACY_STEPS: Final = 50
"""The training accuracy that is reported is the mean over so many last batches."""

_EVAL_BATCH_SIZE: Final = 256


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss and share of right answers over a split, in inference mode."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to, on this rank.

    Attributes:
        model: the trained network, with averaged weights if they were asked for; the same on every rank.
        run_id: the run's id in the service; None where nothing was recorded.
        first_step: where this process began: 0, or the step of the checkpoint that it went on from.
        steps: optimizer steps done, those before the checkpoint included.
        train_loss: of the last batch.
        train_accuracy: mean over the last TRAIN_ACCURACY_STEPS batches, as trained (statistics of the batch).
        evaluation: of the test split, with moving statistics.
        seconds: time in the loop.
        last_recorded_step: newest step given to the recorder; None where nothing was recorded.
        dropped_steps: recorded steps that were lost.
    """

    model: nn.Module
    run_id: str | None
    first_step: int
    steps: int
    train_loss: float
    train_accuracy: float
    evaluation: Evaluation
    seconds: float
    last_recorded_step: int | None
    dropped_steps: int


class _Where(TypedDict):
    rank: int
    world_size: int
    seed: int


class LauncherLostError(Exception):
    """The process that started the ranks is gone; so this one ends as well."""


def load_dataset(settings: Settings) -> Dataset:
    """The data set of a run.

    Raises:
        UsageError: its files are not there.
    """
    folder = Path(settings.data).expanduser()
    try:
        match settings.dataset:
            case "digits":
                return digits()
            case "digit-pairs":
                return digit_pairs()
            case "synthetic":
                return synthetic((settings.image_channels, settings.image_size, settings.image_size))
            case "cifar10":
                return cifar10(folder)
            case "cifar100":
                return cifar100(folder)
            case "imagefolder":
                return image_folder(folder, settings.image_size)
    except DatasetNotFoundError as error:
        raise UsageError(f"--dataset {settings.dataset}: {error}") from None


def make_sampler(settings: Settings, split: Split, classes: int, rank: Rank) -> BatchSampler:
    """The training batches of this rank.

    Raises:
        UsageError: a sampler that this split or these ranks do not allow.
    """
    labels_N, size = split.labels_N, settings.batch_size
    where: _Where = {"rank": rank.rank, "world_size": rank.world_size, "seed": settings.seed}
    try:
        match settings.sampler:
            case "iid":
                return IidBatchSampler(len(labels_N), size, **where)
            case "few-labels":
                return FewLabelsBatchSampler(labels_N, size, settings.labels_per_batch, **where)
            case "label-groups":
                return LabelGroupsBatchSampler(labels_N, size, settings.group_size, **where)
            case "stratified":
                return FewLabelsBatchSampler(labels_N, size, min(classes, size), **where)
            case "sorted":
                return SortedBatchSampler(labels_N, size, settings.shuffle_buffer, **where)
            case "dirichlet":
                return DirichletBatchSampler(labels_N, size, settings.concentration, **where)
            case "rank-skewed":
                return RankSkewedBatchSampler(labels_N, size, settings.own_share, **where)
            case "duplicates":
                return DuplicatesBatchSampler(len(labels_N), size, settings.copies, **where)
    except ValueError as error:
        raise UsageError(str(error)) from None


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: torch.device, rank: Rank) -> Evaluation:
    """Mean loss and accuracy of the model in inference mode; each rank takes its share of the split."""
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, samples
    model.eval()
    mine_N = torch.arange(len(split.labels_N))[rank.rank :: rank.world_size]  # none, where there are more ranks
    for indices_B in mine_N.split(_EVAL_BATCH_SIZE) if len(mine_N) else ():  # type: ignore[no-untyped-call]
        images_BCHW, labels_B = (part.to(device) for part in split.batch(indices_B))
        logits_BK = model(images_BCHW)
        totals[0] += F.cross_entropy(logits_BK, labels_B, reduction="sum")
        totals[1] += (logits_BK.argmax(1) == labels_B).sum()
        totals[2] += len(labels_B)
    model.train()
    if rank.world_size > 1:
        dist.all_reduce(totals)
    loss, correct, samples = totals.tolist()
    return Evaluation(loss / samples, correct / samples)


def cosine_lr(step: int, steps: int, lr: float, warmup_steps: int = 0) -> float:
    """Learning rate of a step (0 ... steps - 1): linear up to `lr`, then along a cosine towards zero."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def planned_limits(settings: Settings) -> RenormSchedule:
    """The schedule of r_max and d_max: what the user set, else the paper's shape for a run of this length.

    The paper's proportions alone would open the limits of a 1,000-step run after 38 steps. `scaled` waits for 5 time
    constants of the moving statistics, which is why alpha is 0.1 here and not the paper's 0.01: on digits (1,000 steps,
    3 seeds) opening after 5 of them left the loss's fall undisturbed at alpha = 0.1 (x0.9 of the loss before, worst 20
    steps), while at alpha = 0.05 the later opening met a network that had fitted already and the loss rose x3 to x7.

    Raises:
        UsageError: steps that are not in order.
    """
    default = RenormSchedule().scaled(settings.steps, settings.norm_momentum)
    bn_steps = default.bn_steps if settings.bn_steps is None else settings.bn_steps
    r_steps = max(default.r_steps, bn_steps) if settings.r_steps is None else settings.r_steps
    d_steps = max(default.d_steps, bn_steps) if settings.d_steps is None else settings.d_steps
    try:
        return RenormSchedule(bn_steps, r_steps, d_steps, settings.r_max, settings.d_max)
    except ValueError as error:
        raise UsageError(str(error)) from None


def train(settings: Settings, rank: Rank, console: Console | None = None) -> Outcome:
    """Trains one rank's replica to the end and records it.

    A loss that turns NaN does not end training: the rows that show how are the ones people look for.

    Args:
        settings: the whole configuration, the same on all ranks.
        rank: which process of the run this is.
        console: where to show progress; None shows nothing (every rank but one).

    Raises:
        UsageError: settings that this machine or data set cannot follow.
        LauncherLostError: the process that started this rank is gone.
    """
    device = choose_device(settings, rank, console)
    if device.type == "cpu":
        share_cores(rank)
    torch.manual_seed(settings.seed)
    dataset = load_dataset(settings)
    fault = fault_of(settings.fault)
    batches = make_sampler(settings, dataset.train, dataset.classes, Rank() if fault.common_batches else rank)
    limits = planned_limits(settings) if settings.norm == "brn" else None
    norm = norm_factory(
        settings.norm,
        settings.norm_momentum,
        virtual_batch_size=settings.virtual_batch_size,
        sync=settings.norm_sync,
        world_size=rank.world_size,
    )
    model = make_model(settings.model, dataset.shape, dataset.classes, norm)
    fault.spoil(model)
    if rank.world_size > 1:  # the weights are the same everywhere; how images are augmented, and dropout, is not
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, rank.rank)).generate_state(1, np.uint64)[0]))
    # The loop is a function of its own so that nothing of the replica outlives the process group: torch may hang then.
    with process_group(rank, device):
        return _train(settings, rank, device, dataset, batches, limits, model, console)


def _train(
    settings: Settings,
    rank: Rank,
    device: torch.device,
    dataset: Dataset,
    batches: BatchSampler,
    limits: RenormSchedule | None,
    model: nn.Module,
    console: Console | None,
) -> Outcome:
    """The steps of a training, from the first or from the checkpoint to the last."""
    fault = fault_of(settings.fault)
    checkpoints = None if settings.checkpoint is None else Checkpoints(settings, rank)
    first_step = 0 if checkpoints is None else checkpoints.step
    learner = Learner(settings, model, rank, device)
    learner.settle_gradient_order((settings.batch_size, *dataset.shape))
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=TRAIN_ACCURACY_STEPS)  # loss, accuracy
    if checkpoints is not None and (saved := checkpoints.loaded) is not None:
        learner.load_state_dict(saved)
        batches.load_state_dict(checkpoints.own["sampler"])
        recent.extend(checkpoints.own["recent"])
    evaluation: Evaluation | None = None
    with (
        _recording(settings, learner.network, limits, checkpoints, device) as recorder,
        Progress(console, settings.steps, first_step) as progress,
    ):
        if recorder is not None:
            rank.announce(recorder.run_id)
        if recorder is not None and console is not None:
            console.print(f"watch it at {run_url(settings.url, recorder.run_id)}", soft_wrap=True)
        if settings.accumulate > 1:  # only now: what is recorded is the time constant in optimizer steps
            keep_time_constant(model, settings.accumulate)

        def save(step: int) -> None:
            assert checkpoints is not None
            settled = recorder is None or recorder.flush()
            put_off = recorder is not None and step > first_step and recorder.repeating
            if not settled and not put_off:
                logger.warning("checkpoint at step %d: some rows before it are still on their way", step)
            own = {"sampler": batches.state_dict(), "recent": [tuple(map(Tensor.cpu, pair)) for pair in recent]}
            run_id = None if recorder is None else recorder.run_id
            checkpoints.save(step, run_id, learner.state_dict(), own, put_off=put_off)

        if checkpoints is not None and checkpoints.loaded is None:
            save(0)  # from here on the run has an id that survives
        if checkpoints is not None:
            checkpoints.restore_random_state()
        started = time.monotonic()
        for step in range(first_step, settings.steps):
            if not rank.launcher_alive():
                raise LauncherLostError("the process that started this rank is gone")
            lr = cosine_lr(step, settings.steps, settings.lr, settings.warmup_steps)
            if limits is not None:
                limits.apply(model, step)
            microbatches = [fault.batch(dataset.train, next(batches), step) for _ in range(settings.accumulate)]
            loss, accuracy = learner.step(microbatches, lr)
            recent.append((loss, accuracy))
            scalars: dict[str, float | Tensor] = {"accuracy": accuracy, "lr": lr}
            is_last = step + 1 == settings.steps
            if is_last or (settings.eval_every and (step + 1) % settings.eval_every == 0):
                evaluation = evaluate(learner.evaluated, dataset.test, device, rank)
                scalars |= {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy}
            if recorder is not None and fault.is_recorded(rank.rank, step):
                labels_B = microbatches[-1][1].to(device)  # the recorder sees the last forward of a step
                recorder.step(loss, shadow_loss=partial(F.cross_entropy, target=labels_B), **scalars)
            progress.update(step + 1, partial(_figures, loss, accuracy, recorder))
            if checkpoints is not None and (is_last or (step + 1) % settings.checkpoint_every == 0):
                save(step + 1)
        seconds = time.monotonic() - started
        if evaluation is None:  # resumed at its end
            evaluation = evaluate(learner.evaluated, dataset.test, device, rank)
    wait_for_all(rank)
    return Outcome(
        model=learner.evaluated,
        run_id=None if recorder is None else recorder.run_id,
        first_step=first_step,
        steps=settings.steps,
        train_loss=recent[-1][0].item(),
        train_accuracy=torch.stack([accuracy for _, accuracy in recent]).mean().item(),
        evaluation=evaluation,
        seconds=seconds,
        last_recorded_step=None
        if recorder is None
        else (settings.steps - 1) // settings.record_every * settings.record_every,
        dropped_steps=0 if recorder is None else recorder.dropped_steps,
    )


@contextmanager
def _recording(
    settings: Settings,
    network: nn.Module,
    limits: RenormSchedule | None,
    checkpoints: Checkpoints | None,
    device: torch.device,
) -> Iterator[Recorder | None]:
    if settings.record_every == 0:
        yield None
        return
    with Recorder(
        network,
        url=settings.url,
        run_name=settings.name,
        run_id=(checkpoints and checkpoints.run_id) or settings.run_id,
        token=settings.token,
        config=settings.recorded() | provenance(device),
        tags=[tag.strip() for tag in settings.tags.split(",") if tag.strip()],
        batch_size=settings.batch_size,
        planned_steps=settings.steps,
        schedule=limits,
        every=settings.record_every,
        shadow_every=settings.shadow_every,
        spool=settings.spool,
        start_step=0 if checkpoints is None else checkpoints.step,
        journal=None if checkpoints is None else checkpoints.journal,
    ) as recorder:
        yield recorder


def _figures(loss: Tensor, accuracy: Tensor, recorder: Recorder | None) -> dict[str, float]:
    """What the progress bar shows. Syncs the device."""
    figures = {"loss": loss.item(), "accuracy": accuracy.item()}
    if recorder is not None:
        latest = recorder.latest
        figures |= {name: latest[name] for name in ("r_max", "d_max") if name in latest}
        if latest.get("d_max"):  # under batch norm's limits every channel counts as clipped
            figures["clip"] = max(latest["clip_r"], latest["clip_d"])
    return figures
