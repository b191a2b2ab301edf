"""The shadow pass: the batch that was just trained on, once more in inference mode, with training none the wiser.

The difference of the two outputs is what the moving statistics get wrong: harm is read from it, not from r and d.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from brn_core.probe import first_tensor


class Shadow(NamedTuple):
    """Both outputs of one batch, detached: as trained, and in inference mode with the same weights."""

    trained: Any
    inferred: Any

    def losses(self, loss: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of either output, 0-dim, without a gradient and without a draw from a global generator.

        Args:
            loss: maps the model's output to the batch's loss; floating outputs come as float32 (or float64).
        """
        device = _device_of(self.trained)
        with torch.no_grad(), _generators_kept([] if device is None else [device]):
            trained, inferred = (loss(tree_map(_single_precision, output)) for output in self)
            return trained.detach(), inferred.detach()

    def disagreement(self) -> Tensor | None:
        """Share of predictions (argmax over dimension 1) that differ; None unless the output is (N, K, ...), K > 1."""
        trained, inferred = first_tensor(self.trained), first_tensor(self.inferred)
        if trained is None or inferred is None or trained.shape != inferred.shape:
            return None
        if trained.dim() < 2 or trained.shape[1] < 2 or trained.numel() == 0:
            return None
        return (trained.argmax(1) != inferred.argmax(1)).float().mean()


def run_shadow(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Shadow:
    """Run `model` on the same input in inference mode under no_grad and put everything back.

    Put back, for every module: training flags, attributes, buffers; and the random state of torch (of the devices in
    use), numpy and Python. Hooks do not run (a hook that collects activations for the loss would collect these), the
    autocast cache is neither read nor written. Beyond reach: what a forward does to lists and to the world outside.

    Args:
        model: as called in training; data-parallel and compiled wrappers are looked through.
        args: `cloned` before it was called: a model may work in place on its input, then and now.
        kwargs: the same, of what it was called with by name.
        output: what it answered.
    """
    inner = unwrapped(model)
    devices = {t.device for t in (*inner.parameters(), *inner.buffers()) if t.device.type != "cpu"}
    cache_was_enabled = torch.is_autocast_cache_enabled()
    with torch.no_grad(), _generators_kept(sorted(devices, key=str)), _modules_kept(inner):
        torch.set_autocast_cache_enabled(False)
        try:
            inferred = inner(*args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(cache_was_enabled)
    return Shadow(tree_map(_detach, output), tree_map(_detach, inferred))


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` only runs another: DistributedDataParallel, DataParallel, or what torch.compile answers."""
    wrapped = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return wrapped or "_orig_mod" in module._modules


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside wrappers."""
    while is_wrapper(model):
        model = next(child for child in model._modules.values() if child is not None)
    return model


@contextmanager
def _modules_kept(model: nn.Module) -> Iterator[None]:
    """All modules in inference mode and without hooks; afterwards everything as it was."""
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    registered = [(module._buffers, dict(module._buffers)) for module in modules]
    contents = [(b, b._version, b.clone()) for b in model.buffers()]
    try:
        for module in modules:
            module.training = False
            module.__dict__["_forward_hooks"] = OrderedDict()
            module.__dict__["_forward_pre_hooks"] = OrderedDict()
        yield
    finally:
        for module, kept in zip(modules, attributes, strict=True):
            module.__dict__.clear()
            module.__dict__.update(kept)
        for buffers, kept_buffers in registered:
            buffers.clear()
            buffers.update(kept_buffers)
        for buffer, version, content in contents:
            if buffer._version != version:
                # .data: autograd may hold the buffer for backward, and its content is again what it was
                buffer.data.copy_(content)


@contextmanager
def _generators_kept(devices: list[torch.device]) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = [d for d in devices if d.type == "cuda"]
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _device_of(output: Any) -> torch.device | None:
    tensor = first_tensor(output)
    return None if tensor is None else tensor.device


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def cloned(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, its tensors copied; as plain containers."""
    args, kwargs = inputs
    return tree_map(_clone, args), tree_map(_clone, dict(kwargs))


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _single_precision(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value
