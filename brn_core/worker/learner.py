"""What learns: the network on its device, the optimizer, precision, accumulated gradients and averaged weights.

Shapes: B samples of a microbatch, C channels, H x W positions, K classes.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from brn_core.layers import BatchRenorm
from brn_core.worker.averaging import WeightAverage
from brn_core.worker.checkpoint import random_state, restore_random_state
from brn_core.worker.precision import Precision
from brn_core.worker.ranks import Rank
from brn_core.worker.replica import data_parallel, share_moving_statistics
from brn_core.worker.settings import Settings, UsageError


class Learner:
    """A model in training, on one rank.

    Args:
        settings: the whole configuration.
        model: on the CPU, the same on every rank; moved to the device.
        rank: which process of the run this is.
        device: of this rank.

    Attributes:
        model: the module itself: what is saved.
        network: what is called in training: the model, wrapped where there are several ranks, compiled if asked for.
        average: of the weights; None where none was asked for.

    Raises:
        UsageError: the device cannot do what the settings ask for.
    """

    def __init__(self, settings: Settings, model: nn.Module, rank: Rank, device: torch.device) -> None:
        if settings.compile:
            _require_compiler(device)
        self._precision = Precision(settings.amp, device)
        self._memory_format = torch.channels_last if settings.channels_last else torch.preserve_format
        self._device, self._rank = device, rank
        self.model = model.to(device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self.average = None if settings.weight_ema is None else WeightAverage(model, settings.weight_ema)
        self._replica = data_parallel(model, rank, device)
        self.network = self._replica
        if settings.compile:
            self.network = torch.compile(self._replica)  # type: ignore[assignment]  # of a module it is a module
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def settle_gradient_order(self, shape: Sequence[int]) -> None:
        """Has DDP group the gradients as it will for good; a collective call, before the first step or the resumed one.

        It does so after the first backward of a process, in their order of arrival. Three ranks or more sum another
        grouping in another order, so a resumed process that began with DDP's first guess would miss the last bit.

        Args:
            shape: (B, C, H, W) of a microbatch.
        """
        if not isinstance(self._replica, DistributedDataParallel):
            return
        before, random = copy.deepcopy(self.state_dict()), random_state()
        images_BCHW = torch.zeros(*shape, device=self._device).to(memory_format=self._memory_format)
        with self._precision.autocast():
            logits_BK = self.network(images_BCHW)
        logits_BK.sum().backward()
        self._optimizer.zero_grad()
        self.load_state_dict(before)
        restore_random_state(random)

    @property
    def evaluated(self) -> nn.Module:
        """The model that evaluation is about: the averaged one if there is one."""
        return self.model if self.average is None else self.average.averaged

    def step(self, microbatches: Sequence[tuple[Tensor, Tensor]], lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on images (B, C, H, W) and labels (B,); the gradient is the mean over microbatches.

        Returns:
            Loss and accuracy as trained, means over the microbatches, detached, on the device.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad()
        scaler, count = self._precision.scaler, len(microbatches)
        losses, accuracies = [], []
        for number, (images, labels) in enumerate(microbatches):
            images_BCHW = images.to(self._device, memory_format=self._memory_format)
            labels_B = labels.to(self._device)
            waits = number + 1 < count and isinstance(self._replica, DistributedDataParallel)
            with self._replica.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self._precision.autocast():
                    logits_BK = self.network(images_BCHW)
                loss = F.cross_entropy(logits_BK.float(), labels_B)
                scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            accuracies.append((logits_BK.detach().argmax(1) == labels_B).float().mean())
        scaler.step(self._optimizer)
        scaler.update()
        share_moving_statistics(self.model, self._rank)
        if self.average is not None:
            self.average.update()
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; the same on every rank."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._precision.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._precision.scaler.is_enabled():  # a disabled one has no state and takes none
            self._precision.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def keep_time_constant(model: nn.Module, accumulate: int) -> None:
    """Has the moving statistics of k forwards a step move as far as those of one: alpha' = 1 - (1 - alpha)^(1/k)."""
    for module in model.modules():
        if isinstance(module, BatchRenorm):
            module.accumulation_steps = accumulate
        elif isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** (1 / accumulate)


def _require_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for the CPU and Triton for CUDA, whose launcher is C; both include Python.h.

    Without one of these it fails late, and at length. Which compilers are looked for: torch 2.13's
    `_inductor/config.py` (cpp.cxx) and Triton 3's `runtime/build.py`.

    Raises:
        UsageError: something is not there.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UsageError("--compile needs Triton on a CUDA device: pip install triton, or leave --compile out")
        language, variable, usual = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, usual = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in (usual if named is None else [named])):
        raise UsageError(
            f"--compile needs a {language} compiler ({' or '.join(usual)}, or what {variable} names), "
            "or leave --compile out"
        )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise UsageError(
            f"--compile needs Python.h in {headers} (Debian: apt install python3-dev), or leave --compile out"
        )
