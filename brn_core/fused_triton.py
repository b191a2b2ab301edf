"""The kernels of `brn_core.fused` for CUDA, which Triton compiles when a layer first trains.

Triton comes with torch's builds for CUDA; it needs a C compiler and a directory to write to and run code from. Where it
is missing or fails, that is said once in the log, and the operators do the work.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_BLOCK: Final = 256
"""Channels a program works on."""

_broken: Final = threading.Event()


def fits(x: Tensor) -> bool:
    """Whether there are kernels for the device of `x`."""
    return x.is_cuda and not _broken.is_set() and _kernels() is not None


def correct(
    mean: Tensor,
    var: Tensor,
    mu: Tensor,
    sigma: Tensor,
    limits: tuple[Tensor, Tensor, Tensor],
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    eps: float,
    observed: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None] | None:
    """The fields of what `fused.correct_` answers."""
    if not (mu.is_contiguous() and sigma.is_contiguous()):
        return None
    made = [torch.empty_like(mean) for _ in range(5)]
    before = [torch.empty_like(mean) for _ in range(3)] if observed else None
    gamma = mean if weight is None else weight.contiguous()
    beta = mean if bias is None else bias.contiguous()
    launched = _launch(
        "correct",
        (mean, var, mu, sigma, *limits, count, gamma, beta),
        (*made, *(made[:3] if before is None else before)),
        (alpha, eps),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        OBSERVED=observed,
    )
    return (made, before) if launched else None


def weight_gradient(dz: Tensor, db: Tensor, r: Tensor, d: Tensor) -> Tensor | None:
    """`fused.weight_gradient`."""
    made = torch.empty_like(dz)
    return made if _launch("weight_gradient", (dz, db, r, d), (made,), ()) else None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from brn_core import fused_kernels
    except ImportError:  # torch for another device
        return None
    return fused_kernels


def _launch(
    name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], numbers: tuple[float, ...], **flags: bool
) -> bool:
    """Runs a kernel over all channels; False where it could not be compiled, and then none is tried again."""
    C = outputs[0].numel()
    kernel: Callable[..., Any] = getattr(_kernels(), name)[(-(-C // _BLOCK),)]
    try:
        # Triton launches on the current device, whatever it is given.
        with torch.cuda.device_of(outputs[0]):  # type: ignore[no-untyped-call]
            kernel(*inputs, *outputs, *numbers, C, BLOCK=_BLOCK, **flags)
    except Exception as error:  # whatever keeps Triton from compiling, training goes on without it
        _broken.set()
        log.warning("Batch Renorm goes on in single operators, as Triton cannot compile its kernels here: %s", error)
        return False
    return True
