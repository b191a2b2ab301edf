"""The work on C numbers of a layer's training step on CUDA, as one kernel forward and one backward.

As operators it is some 15 launches, each of which takes the host longer than the device. Triton comes with torch's
builds for CUDA; where it is missing or cannot compile (it needs a C compiler and a directory to write to) these
functions answer None, say so once in the log, and the operators of `brn_core.functional` do the work.

The kernels compute what those operators do, with exact division and root, not the fast ones, and NaN passes every
limit. The tests run them in Triton's interpreter, which needs no device.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_BLOCK: Final = 256
"""Channels a program works on."""

_broken: Final = threading.Event()


class Vectors(NamedTuple):
    """What normalizing a batch takes, each (C,) float32."""

    inverse: Tensor
    r: Tensor
    d: Tensor
    scale: Tensor
    shift: Tensor


def correct_(
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
) -> Vectors | None:
    """The correction of a batch and the move of mu, sigma and count, in place; None, and nothing done, if it cannot.

    Args:
        mean: (C,) of the batch, float32 like the other statistics.
        var: (C,) biased variance of the batch.
        mu: (C,) moving mean, changed in place.
        sigma: (C,) moving standard deviation, changed in place.
        limits: r_min, r_max, d_max, 0-dim.
        count: 0-dim, batches so far; grows by 1.
        weight: (C,) gamma of any floating type, or None for 1.
        bias: (C,) beta, or None for 0.
        alpha: weight of the new batch.
        eps: added to the variance inside the root.

    Returns:
        1 / sigma_B, r, d, gamma r, and gamma d + beta.
    """
    if not (mu.is_contiguous() and sigma.is_contiguous()):
        return None
    made = Vectors(*(torch.empty_like(mean) for _ in Vectors._fields))
    gamma = mean if weight is None else weight.contiguous()
    beta = mean if bias is None else bias.contiguous()
    done = _launch(
        "correct",
        (mean, var, mu, sigma, *limits, count, gamma, beta),
        made,
        (alpha, eps),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
    )
    return made if done else None


def weight_gradient(dz: Tensor, db: Tensor, r: Tensor, d: Tensor) -> Tensor | None:
    """(C,) r dz + d db; None if it cannot."""
    made = torch.empty_like(dz)
    return made if _launch("weight_gradient", (dz, db, r, d), (made,), ()) else None


def fits(x: Tensor) -> bool:
    """Whether the kernels are there for the statistics of `x`; a compiler makes its own."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and not torch.compiler.is_compiling()
        and not _broken.is_set()
        and _kernels() is not None
    )


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
