"""The training loop: data, model, limits, recording, evaluation; one function call a run and rank.

Shapes: B samples of a batch, C channels, H x W positions, K classes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from brn_core.distributed import average_
from brn_core.recorder import Recorder
from brn_core.schedule import RenormSchedule
from brn_core.statistics import average_statistics
from brn_core.worker.data import BatchSampler, Dataset, FewLabelsBatchSampler, IidBatchSampler, Split, digits, synthetic
from brn_core.worker.findings import run_url
from brn_core.worker.models import SmallConvNet, norm_factory
from brn_core.worker.progress import Progress
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import Settings, UsageError

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
        model: the trained network, the same on every rank.
        run_id: the run's id in the service; None where nothing was recorded.
        steps: optimizer steps done.
        train_loss: of the last batch.
        train_accuracy: mean over the last TRAIN_ACCURACY_STEPS batches, as trained (statistics of the batch).
        evaluation: of the test split, with moving statistics.
        seconds: time in the loop.
        last_recorded_step: newest step given to the recorder; None where nothing was recorded.
        dropped_steps: recorded steps that were lost.
    """

    model: nn.Module
    run_id: str | None
    steps: int
    train_loss: float
    train_accuracy: float
    evaluation: Evaluation
    seconds: float
    last_recorded_step: int | None
    dropped_steps: int


class LauncherLostError(Exception):
    """The process that started the ranks is gone; so this one ends as well."""


def choose_device(settings: Settings, rank: Rank, console: Console | None) -> torch.device:
    """The device of this rank: CUDA device `local_rank`, or the CPU.

    Raises:
        UsageError: CUDA was asked for where there is none, or fewer devices than ranks.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        if settings.device == "auto" and console is not None:
            console.print("no CUDA device found: training on the CPU")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; --device cpu trains without one")
    if rank.local_world_size > torch.cuda.device_count():
        raise UsageError(
            f"{rank.local_world_size} ranks on this host need as many CUDA devices, torch finds "
            f"{torch.cuda.device_count()}; use fewer ranks, or --device cpu"
        )
    return torch.device("cuda", rank.local_rank)


@contextmanager
def process_group(rank: Rank, device: torch.device) -> Iterator[None]:
    """torch.distributed for the time of a `with`: NCCL for CUDA tensors, gloo for those on the CPU."""
    if rank.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=rank.rendezvous,
        rank=rank.rank,
        world_size=rank.world_size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def load_dataset(settings: Settings) -> Dataset:
    if settings.dataset == "digits":
        return digits()
    return synthetic((settings.image_channels, settings.image_size, settings.image_size))


def make_sampler(settings: Settings, split: Split, rank: Rank) -> BatchSampler:
    """The training batches of this rank.

    Raises:
        UsageError: more labels a batch than the split has.
    """
    if settings.sampler == "iid":
        return IidBatchSampler(
            len(split.labels_N), settings.batch_size, rank=rank.rank, world_size=rank.world_size, seed=settings.seed
        )
    try:
        return FewLabelsBatchSampler(
            split.labels_N,
            settings.batch_size,
            settings.labels_per_batch,
            rank=rank.rank,
            world_size=rank.world_size,
            seed=settings.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def data_parallel(model: nn.Module, rank: Rank, device: torch.device) -> nn.Module:
    """The model as one of `world_size` replicas that average their gradients.

    DDP's default is switched off that copies rank 0's buffers over everyone's before each forward: of what the other
    ranks saw nothing would be left in the moving statistics. Under batch norm evaluation then knows rank 0's data only;
    under Batch Renorm, which uses them in every training forward, r and d would do so as well. Instead
    `share_moving_statistics` averages them over the ranks after each step, as the paper's workers shared theirs: all
    replicas stay the same to the last buffer.
    """
    if rank.world_size == 1:
        return model
    network = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    network.broadcast_buffers = False  # not as an argument: torch 2.13 warns of that one, torch 2.9 knows no other
    return network


def share_moving_statistics(model: nn.Module, rank: Rank) -> None:
    """Gives every rank the mean over ranks of the moving statistics; one small all-reduce for all layers."""
    if rank.world_size > 1:
        average_statistics(model)
        batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        average_([module.get_buffer(name) for module in batch_norms for name in ("running_mean", "running_var")])


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: torch.device, rank: Rank) -> Evaluation:
    """Mean loss and accuracy of the model in inference mode; each rank takes its share of the split."""
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, samples
    model.eval()
    for indices_B in torch.arange(rank.rank, len(split.labels_N), rank.world_size).split(_EVAL_BATCH_SIZE):  # type: ignore[no-untyped-call]
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


def cosine_lr(step: int, steps: int, lr: float) -> float:
    """Learning rate of a step (0 ... steps - 1): `lr` at first, towards zero at the end."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


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


def share_cores(rank: Rank) -> None:
    """Gives each rank of this host its part of the cores: more threads than cores only wait for each other."""
    torch.set_num_threads(max(1, torch.get_num_threads() // rank.local_world_size))


def train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images_BCHW: Tensor, labels_B: Tensor
) -> tuple[Tensor, Tensor]:
    """One optimizer step; loss and accuracy of the batch as trained, detached, on the device."""
    logits_BK = network(images_BCHW)
    loss = F.cross_entropy(logits_BK, labels_B)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach(), (logits_BK.detach().argmax(1) == labels_B).float().mean()


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
    batches = make_sampler(settings, dataset.train, rank)
    limits = planned_limits(settings) if settings.norm == "brn" else None
    model = SmallConvNet(dataset.shape[0], dataset.classes, norm_factory(settings.norm, settings.norm_momentum))
    model.to(device)
    with process_group(rank, device):
        network = data_parallel(model, rank, device)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        recent_accuracy: deque[Tensor] = deque(maxlen=TRAIN_ACCURACY_STEPS)
        with _recording(settings, model, limits) as recorder, Progress(console, settings.steps) as progress:
            if recorder is not None and console is not None:
                console.print(f"watch it at {run_url(settings.url, recorder.run_id)}", soft_wrap=True)
            started = time.monotonic()
            for step in range(settings.steps):
                if not rank.launcher_alive():
                    raise LauncherLostError("the process that started this rank is gone")
                lr = cosine_lr(step, settings.steps, settings.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if limits is not None:
                    limits.apply(model, step)
                images_BCHW, labels_B = dataset.train.batch(next(batches))
                images_BCHW, labels_B = images_BCHW.to(device), labels_B.to(device)
                loss, accuracy = train_step(network, optimizer, images_BCHW, labels_B)
                share_moving_statistics(model, rank)
                recent_accuracy.append(accuracy)
                scalars: dict[str, float | Tensor] = {"accuracy": accuracy, "lr": lr}
                is_last = step + 1 == settings.steps
                if is_last or (settings.eval_every and (step + 1) % settings.eval_every == 0):
                    evaluation = evaluate(model, dataset.test, device, rank)
                    scalars |= {"eval_loss": evaluation.loss, "eval_accuracy": evaluation.accuracy}
                if recorder is not None:
                    recorder.step(loss, shadow_loss=partial(F.cross_entropy, target=labels_B), **scalars)
                progress.update(step + 1, partial(_figures, loss, accuracy, recorder))
            seconds = time.monotonic() - started
        wait_for_all(rank)
    return Outcome(
        model=model,
        run_id=None if recorder is None else recorder.run_id,
        steps=settings.steps,
        train_loss=loss.item(),
        train_accuracy=torch.stack(list(recent_accuracy)).mean().item(),
        evaluation=evaluation,
        seconds=seconds,
        last_recorded_step=None
        if recorder is None
        else (settings.steps - 1) // settings.record_every * settings.record_every,
        dropped_steps=0 if recorder is None else recorder.dropped_steps,
    )


@contextmanager
def _recording(settings: Settings, model: nn.Module, limits: RenormSchedule | None) -> Iterator[Recorder | None]:
    if settings.record_every == 0:
        yield None
        return
    with Recorder(
        model,
        url=settings.url,
        run_name=settings.name,
        run_id=settings.run_id,
        token=settings.token,
        config=settings.recorded(),
        batch_size=settings.batch_size,
        planned_steps=settings.steps,
        schedule=limits,
        every=settings.record_every,
        shadow_every=settings.shadow_every,
        spool=settings.spool,
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


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone, as gloo and NCCL say it."""
    return (
        isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "reset by peer" in str(error)
    )


def wait_for_all(rank: Rank) -> None:
    """Returns when every rank has come here: all have sent their rows."""
    if rank.world_size > 1:
        dist.all_reduce(torch.zeros(1))
