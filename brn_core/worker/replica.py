"""One rank's copy of the network: its device, its process group, and what the copies share each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from brn_core.distributed import average_
from brn_core.statistics import average_statistics
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import Settings, UsageError


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


def share_cores(rank: Rank) -> None:
    """Gives each rank of this host its part of the cores: more threads than cores only wait for each other."""
    torch.set_num_threads(max(1, torch.get_num_threads() // rank.local_world_size))


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
        batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        average_([module.get_buffer(name) for module in batch_norms for name in ("running_mean", "running_var")])


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone, as gloo and NCCL say it."""
    return (
        isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "reset by peer" in str(error)
    )


def wait_for_all(rank: Rank) -> None:
    """Returns when every rank has come here: all have sent their rows."""
    if rank.world_size > 1:
        dist.all_reduce(torch.zeros(1))
