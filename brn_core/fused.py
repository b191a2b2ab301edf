"""The work on C numbers of a layer's training step as one kernel forward and one backward.

As operators it is some 15 calls, each of which takes longer to be called than to do its work, on CUDA and on the CPU.
`fused_triton` has the kernels for CUDA and `fused_host` those for the CPU; both are compiled where they run. Where that
fails these functions answer None, and the operators of `brn_core.functional` do the work.

The kernels compute what those operators do, with exact division and root, not the fast ones, and NaN passes every
limit; the last bit of a product and sum may differ.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from brn_core import fused_host, fused_triton


class Vectors(NamedTuple):
    """What normalizing a batch takes, each (C,) float32.

    Attributes:
        inverse: 1 / sigma_B.
        r, d: the correction.
        scale, shift: gamma r and gamma d + beta.
    """

    inverse: Tensor
    r: Tensor
    d: Tensor
    scale: Tensor
    shift: Tensor


class Before(NamedTuple):
    """What a step was corrected from, each (C,) float32: sigma_B, and mu and sigma before they moved."""

    sigma_B: Tensor
    mu: Tensor
    sigma: Tensor


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
    observed: bool,
) -> tuple[Vectors, Before | None] | None:
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
        observed: also answer what was before.
    """
    done = _kernels_for(mean).correct(mean, var, mu, sigma, limits, count, weight, bias, alpha, eps, observed)
    if done is None:
        return None
    made, before = done
    return Vectors(*made), None if before is None else Before(*before)


def weight_gradient(dz: Tensor, db: Tensor, r: Tensor, d: Tensor) -> Tensor | None:
    """(C,) r dz + d db, maybe in place of `dz`; None, and nothing done, if it cannot."""
    made: Tensor | None = _kernels_for(dz).weight_gradient(dz, db, r, d)
    return made


def fits(x: Tensor) -> bool:
    """Whether there are kernels for the statistics of `x`; a compiler makes its own."""
    return x.dtype != torch.float64 and not torch.compiler.is_compiling() and bool(_kernels_for(x).fits(x))


def _kernels_for(x: Tensor) -> ModuleType:
    return fused_host if x.is_cpu else fused_triton
