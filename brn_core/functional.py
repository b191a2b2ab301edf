"""Batch Renormalization as functions: correction, normalization with its gradient, and the moving update.

Source: Ioffe 2017, "Batch Renormalization" (arXiv 1702.03275v2), Algorithm 1. r and d carry no gradient, so
    y = z (gamma r) + (gamma d + beta),   z = (x - mu_B) / sigma_B
is batch normalization with weight gamma r and bias gamma d + beta: torch's batch-norm kernels do all the work that
grows with the activation, forward and backward, and what this module adds is vectors of C numbers.

Names: mu_B, sigma_B are the batch's statistics, mu, sigma the moving ones; tensors end in their shape (N samples,
C channels, G microbatches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from brn_core.distributed import merge_moments, sum_over_ranks
from brn_core.moments import (
    Moments,
    as_dtype,
    batch_moments,
    per_channel,
    reduced_dims,
    sample_moments,
    statistics_dtype,
)

__all__ = [
    "Observation",
    "Stat",
    "Statistics",
    "batch_renorm",
    "correction",
    "inference",
    "renormalize",
    "sample_moments",
    "update_",
]

Stat = Literal["std", "var"]
"""What the moving average is taken of: sigma_B (the paper) or sigma_B² (most other implementations)."""

Correct = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(mu_B, sigma_B) -> (r, d), each (C,) or (G, C)."""


class Observation(NamedTuple):
    """Statistics of one training forward: detached, float32 (float64 for float64 input), on the input's device.

    Attributes:
        mean_NC: per-sample mean over positions.
        var_NC: per-sample biased variance over positions; None for (N, C) input.
        mu_B, sigma_B: (C,) what the batch was normalized with; sigma_B = sqrt(biased variance + eps).
            With microbatches, their mean.
        mu, sigma: (C,) moving statistics before the step's update; sigma holds eps.
        r_min, r_max, d_max: 0-dim, the limits in force at that forward.
    """

    mean_NC: Tensor
    var_NC: Tensor | None
    mu_B: Tensor
    sigma_B: Tensor
    mu: Tensor
    sigma: Tensor
    r_min: Tensor
    r_max: Tensor
    d_max: Tensor


class Statistics(NamedTuple):
    """What a training forward learned about its batch; for the moving update and for whoever watches.

    Attributes:
        mu_B, sigma_B: (C,), averaged over microbatches where there are several.
        valid: (C,) bool, where they may enter the moving statistics: finite, and from more than one element.
        mean_NC, var_NC: per-sample moments, where they were asked for.
    """

    mu_B: Tensor
    sigma_B: Tensor
    valid: Tensor
    mean_NC: Tensor | None
    var_NC: Tensor | None


def correction(
    mu_B: Tensor, sigma_B: Tensor, mu: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """The correction r = clip(sigma_B / sigma, r_min, r_max), d = clip((mu_B - mu) / sigma, -d_max, d_max).

    Args:
        mu_B: (C,) or (G, C) mean of the batch.
        sigma_B: like mu_B, standard deviation of the batch, eps in it.
        mu: (C,) moving mean from before the step's update.
        sigma: (C,) moving standard deviation from before the step's update.
        r_min: 0-dim. The limits are tensors so that moving them neither syncs nor recompiles.
        r_max: 0-dim.
        d_max: 0-dim.

    Returns:
        The pair r, d, shaped as mu_B. NaN stays NaN.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        opaque: tuple[Tensor, Tensor] = _opaque_correction(mu_B, sigma_B, mu, sigma, r_min, r_max, d_max)
        return opaque
    r = (sigma_B / sigma).clamp_(r_min, r_max)
    d = ((mu_B - mu) / sigma).clamp_(-d_max, d_max)
    return r, d


@torch.library.custom_op("brn::correction", mutates_args=())
def _opaque_correction(
    mu_B: Tensor, sigma_B: Tensor, mu: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """`correction` as one node of a compiled graph, which is saved for backward and never computed there again.

    torch's partitioner computes cheap pointwise work anew in backward; from mu and sigma, which the forward has moved
    by then, r and d come out wrong. It leaves alone what it does not know.
    """
    return correction(mu_B, sigma_B, mu, sigma, r_min, r_max, d_max)


@_opaque_correction.register_fake
def _(
    mu_B: Tensor, sigma_B: Tensor, mu: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu_B), torch.empty_like(mu_B)


class _Batch(NamedTuple):
    """What normalizing a batch depends on beside tensors of the graph.

    Attributes:
        eps: added to the variance inside the root.
        elements: m, elements per channel that mean and variance are of.
        synced: whether these are all ranks' elements.
        group: the ranks; the default process group if None.
    """

    eps: float
    elements: int | Tensor
    synced: bool
    group: dist.ProcessGroup | None


class _Normalize(torch.autograd.Function):
    """y = z (gamma r) + (gamma d + beta) with z = (x - mean) / sigma; mean and sigma are functions of x in backward.

    Saves x and vectors only. gamma and r are saved apart and multiplied in backward, which keeps the second
    derivative with respect to gamma right.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        sigma: Tensor,
        r: Tensor,
        d: Tensor,
        mask: Tensor | None,
        batch: _Batch,
    ) -> Tensor:
        # Not in setup_context: with one, torch inspects this signature at every call, at the cost of all the rest.
        ctx.save_for_backward(x, weight, mean, sigma, r, d, mask)
        ctx.batch = batch
        gamma = None if weight is None else as_dtype(weight, mean.dtype)
        beta = None if bias is None else as_dtype(bias, mean.dtype)
        scale = r if gamma is None else gamma * r
        if beta is None:
            shift = d if gamma is None else gamma * d
        else:
            shift = beta + d if gamma is None else torch.addcmul(beta, gamma, d)
        if not _kernels_apply(x, mask):
            y = (x - per_channel(mean, x)) * per_channel(scale / sigma, x) + per_channel(shift, x)
            y = y.to(x.dtype)
            return y if mask is None else torch.where(mask, y, torch.zeros((), dtype=y.dtype, device=y.device))
        if x.device.type == "cuda":  # one kernel, any memory format; eval-mode native_batch_norm takes three here
            y = torch.ops.aten.batch_norm_elemt(x, scale, shift, mean, sigma.reciprocal(), batch.eps)
        else:
            y = torch.ops.aten.native_batch_norm(x, scale, shift, mean, var, False, 0.0, batch.eps)[0]
        return y  # type: ignore[no-any-return]  # torch.ops is untyped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, sigma, r, d, mask = ctx.saved_tensors
        batch: _Batch = ctx.batch
        scale = r if weight is None else as_dtype(weight, r.dtype) * r
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if _kernels_apply(x, mask) and not batch.synced:
            dx, dz, db = torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, None, None, mean, sigma.reciprocal(), True, batch.eps,
                [need_x, need_weight, need_weight or need_bias],
            )  # fmt: skip
        else:
            dx, dz, db = _backward(grad, x, scale, mean, sigma, mask, batch)
        # xhat = z r + d, so sum(dy xhat) = r sum(dy z) + d sum(dy)
        dweight = torch.addcmul(r * dz, d, db) if need_weight else None
        return dx, dweight, db if need_bias else None, None, None, None, None, None, None, None


def _kernels_apply(x: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's batch-norm kernels can do it; the compiler makes better code of the plain formula."""
    return mask is None and x.device.type in ("cpu", "cuda") and x.numel() > 0 and not torch.compiler.is_compiling()


def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    batch: _Batch,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, sum(dy z) and sum(dy); the sums are this rank's own, as the gradients of gamma and beta are."""
    dims, dtype = reduced_dims(x), mean.dtype
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: a second derivative follows
        if batch.synced:
            raise RuntimeError(
                'sync="moments" has no second derivative: it would need collectives inside it; '
                'use sync="none" or sync="ema" where gradients of gradients are taken'
            )
        mean, sigma = _differentiable_moments(x.to(dtype), mask, batch.eps)
    z = (x - per_channel(mean, x)) / per_channel(sigma, x)
    dy = grad.to(dtype)
    if mask is not None:
        zero = torch.zeros((), dtype=dtype, device=x.device)
        z, dy = torch.where(mask, z, zero), torch.where(mask, dy, zero)
    dz, db = (dy * z).sum(dims), dy.sum(dims)
    dz_all, db_all = sum_over_ranks((dz, db), batch.group) if batch.synced else (dz, db)
    m = batch.elements.clamp(min=1) if isinstance(batch.elements, Tensor) else batch.elements
    dx = (dy - per_channel(db_all / m, x) - z * per_channel(dz_all / m, x)) * per_channel(scale / sigma, x)
    if mask is not None:
        dx = torch.where(mask, dx, zero)
    return dx.to(x.dtype), dz, db


def _differentiable_moments(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """mean_C and sigma_C = sqrt(var + eps) inside the autograd graph."""
    dims = reduced_dims(x)
    if mask is None:
        var_C, mean_C = torch.var_mean(x, dims, correction=0)
        return mean_C, (var_C + eps).sqrt()
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    m_C = mask.expand_as(x).sum(dims).clamp(min=1)
    mean_C = torch.where(mask, x, zero).sum(dims) / m_C
    var_C = torch.where(mask, x - per_channel(mean_C, x), zero).square().sum(dims) / m_C
    return mean_C, (var_C + eps).sqrt()


def renormalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    correct: Correct,
    eps: float,
    *,
    mask: Tensor | None = None,
    microbatches: int = 1,
    synced: bool = False,
    group: dist.ProcessGroup | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, Statistics]:
    """The training forward without its moving update: a pure function of its arguments.

    Args:
        x: (N, C, *).
        weight: (C,) gamma, or None for 1.
        bias: (C,) beta, or None for 0.
        correct: (mu_B, sigma_B) -> (r, d), called once without gradients; (G, C) tensors if microbatches > 1.
        eps: added to the variance inside the root.
        mask: bool, broadcastable to x. Elements under False take no part, and come out as 0.
        microbatches: G; the batch is split along N into G parts, each normalized with its own statistics.
        synced: moments over all ranks of `group`. Every rank must call, a rank without samples too.
        group: the ranks; the default process group if None.
        per_sample: fill the per-sample moments of the answer.

    Returns:
        y with x's shape, dtype and memory format, and the Statistics of the batch.
    """
    if microbatches > 1:
        assert not synced  # splitting a batch and joining it with others' contradict each other
        return _in_microbatches(x, weight, bias, correct, eps, mask, microbatches, per_sample)
    with torch.no_grad():
        moments = batch_moments(x, mask, per_sample=per_sample)
        if synced:
            moments = merge_moments(moments, group)
        sigma_B = (moments.var_C + eps).sqrt_()
        r, d = correct(moments.mean_C, sigma_B)
        statistics = Statistics(moments.mean_C, sigma_B, _valid(sigma_B, moments), moments.mean_NC, moments.var_NC)
    batch = _Batch(eps, moments.elements, synced, group)
    y = _Normalize.apply(x, weight, bias, moments.mean_C, moments.var_C, sigma_B, r, d, mask, batch)  # type: ignore[no-untyped-call]
    return y, statistics


def _in_microbatches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    correct: Correct,
    eps: float,
    mask: Tensor | None,
    microbatches: int,
    per_sample: bool,
) -> tuple[Tensor, Statistics]:
    """`renormalize`, each part of the batch for itself; the statistics are the mean of theirs."""
    parts = x.tensor_split(microbatches)
    require_spread(parts[-1])  # the smallest
    masks: Sequence[Tensor | None] = [None] * microbatches
    if mask is not None:
        masks = mask.expand(x.shape[0], *mask.shape[1:]).tensor_split(microbatches)
    with torch.no_grad():
        moments = [batch_moments(p, m, per_sample=per_sample) for p, m in zip(parts, masks, strict=True)]
        mu_GC = torch.stack([m.mean_C for m in moments])
        sigma_GC = torch.stack([(m.var_C + eps).sqrt_() for m in moments])
        r_GC, d_GC = correct(mu_GC, sigma_GC)
        valid_GC = torch.stack([_valid(sigma, m) for sigma, m in zip(sigma_GC, moments, strict=True)])
    y = torch.cat(
        [
            _Normalize.apply(  # type: ignore[no-untyped-call]
                part, weight, bias, m.mean_C, m.var_C, sigma, r, d, part_mask, _Batch(eps, m.elements, False, None)
            )
            for part, part_mask, m, sigma, r, d in zip(parts, masks, moments, sigma_GC, r_GC, d_GC, strict=True)
        ]
    )
    means = [m.mean_NC for m in moments if m.mean_NC is not None]
    variances = [m.var_NC for m in moments if m.var_NC is not None]
    return y, Statistics(
        mu_GC.mean(0),
        sigma_GC.mean(0),
        valid_GC.all(0),
        torch.cat(means) if means else None,
        torch.cat(variances) if variances else None,
    )


def _valid(sigma_B: Tensor, moments: Moments) -> Tensor:
    """Channels whose statistics are finite and of more than one element."""
    finite = sigma_B < torch.inf  # False for NaN too
    return finite & (moments.elements > 1) if isinstance(moments.elements, Tensor) else finite


@torch.no_grad()
def update_(
    running_mean: Tensor, running_std: Tensor, statistics: Statistics, alpha: float | Tensor, stat: Stat = "std"
) -> None:
    """Moving update mu += alpha (mu_B - mu), sigma += alpha (sigma_B - sigma), in place, in valid channels.

    A channel with a NaN or an infinity in the batch keeps its statistics: one bad sample would otherwise
    stay in them for good.

    Args:
        running_mean: (C,) mu, changed in place.
        running_std: (C,) sigma, changed in place.
        statistics: of the batch.
        alpha: weight of the new batch, a number or a 0-dim tensor.
        stat: "var" averages sigma_B² instead and keeps its root, as implementations with a moving variance do.
    """
    valid = statistics.valid
    mu_B = torch.where(valid, as_dtype(statistics.mu_B, running_mean.dtype), running_mean)
    sigma_B = torch.where(valid, as_dtype(statistics.sigma_B, running_std.dtype), running_std)
    running_mean.lerp_(mu_B, alpha)
    if stat == "std":
        running_std.lerp_(sigma_B, alpha)
    else:
        running_std.square_().lerp_(sigma_B.square(), alpha).sqrt_()


def inference(
    x: Tensor, running_mean: Tensor, running_std: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Inference, y = gamma (x - mu) / sigma + beta: one batch_norm node, which exporters fold into the layer before.

    sigma holds eps already (Algorithm 1), hence eps = 0 here.
    """
    dtype = statistics_dtype(x)
    return F.batch_norm(
        x,
        running_mean.to(dtype),
        running_std.to(dtype).square(),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        training=False,
        eps=0.0,
    )


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    r_min: float | Tensor | None = None,
    training: bool = True,
    momentum: float = 0.01,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch Renormalization of one batch, after `torch.nn.functional.batch_norm`.

    Training: y = gamma ((x - mu_B) / sigma_B r + d) + beta with r = clip(sigma_B / sigma, r_min, r_max) and
    d = clip((mu_B - mu) / sigma, -d_max, d_max) held constant in backward; then mu and sigma move, in place.
    Inference: y = gamma (x - mu) / sigma + beta.

    Source: Ioffe 2017, Algorithm 1.

    Args:
        x: (N, C, *).
        running_mean: (C,) mu, float32 or float64.
        running_std: (C,) sigma, a standard deviation that holds eps, float32 or float64.
        weight: (C,) gamma, or None for 1.
        bias: (C,) beta, or None for 0.
        r_max: upper limit of r, a number or a 0-dim tensor; r_max = 1 and d_max = 0 are batch normalization.
        d_max: limit of |d|, a number or a 0-dim tensor.
        r_min: lower limit of r, 1 / r_max if None.
        training: whether to normalize with the batch, corrected, and to move mu and sigma.
        momentum: alpha, the weight of the new batch in the moving statistics.
        eps: added to the variance inside the root.
        mask: bool, broadcastable to x; elements under False take no part, and come out as 0.

    Returns:
        y with x's shape and dtype.

    Raises:
        ValueError: training with one value per channel.
    """
    if not training or x.numel() == 0:
        return inference(x, running_mean, running_std, weight, bias)
    require_spread(x)
    r_min = 1 / r_max if r_min is None else r_min
    limits = [torch.as_tensor(v, dtype=statistics_dtype(x), device=x.device) for v in (r_min, r_max, d_max)]

    def correct(mu_B: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        return correction(mu_B, sigma_B, running_mean, running_std, *limits)

    y, statistics = renormalize(x, weight, bias, correct, eps, mask=mask)
    update_(running_mean, running_std, statistics, momentum)
    return y


def require_spread(x: Tensor) -> None:
    """Raise ValueError if `x` (N, C, *) has exactly one value per channel: it has no variance to normalize with."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {tuple(x.shape)}; "
            "use a larger (virtual) batch, or put the layer in eval mode to normalize with the moving statistics"
        )
