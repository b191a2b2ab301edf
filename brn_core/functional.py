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
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from brn_core import fused
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
    "batch_renorm",
    "correct_",
    "correction",
    "inference",
    "renormalize",
    "sample_moments",
]

# Not a packet, which finds its overload anew at each call; nothing in `torch` itself gives this one.
_NORMALIZE_BACKWARD: Final = torch.ops.aten.native_batch_norm_backward.default

Stat = Literal["std", "var"]
"""What the moving average is taken of: sigma_B (the paper) or sigma_B² (most other implementations)."""


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


Correct = Callable[[Moments, Tensor], tuple[Tensor, Tensor]]
"""(moments, sigma_B) -> (r, d), both shaped as sigma_B: (C,), or (G, C) with G microbatches. Called once a forward,
without gradients, and free to move mu and sigma then: backward needs no more of them than r and d."""


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
    return _clipped(mu_B - mu, sigma_B, sigma, r_min, r_max, d_max)


def _clipped(
    off: Tensor, sigma_B: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """The correction, where off = mu_B - mu is there."""
    d, r = torch._foreach_div((off, sigma_B), (sigma, sigma))
    return r.clamp_(r_min, r_max), d.clamp_(-d_max, d_max)


@torch.library.custom_op("brn::correction", mutates_args=())
def _opaque_correction(
    mu_B: Tensor, sigma_B: Tensor, mu: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """`correction` as one node of a compiled graph, which is saved for backward and never computed there again.

    torch's partitioner computes cheap pointwise work anew in backward; from mu and sigma, which the forward has moved
    by then, r and d come out wrong. It leaves alone what it does not know, except inside an activation checkpoint.
    """
    if in_backward():
        raise RuntimeError(
            "BatchRenorm runs a second time in backward, in a compiled region: an activation checkpoint would get "
            "r and d from moving statistics that the forward has moved, and wrong gradients. "
            "Keep the layer out of the checkpoint, or the checkpoint out of torch.compile"
        )
    return correction(mu_B, sigma_B, mu, sigma, r_min, r_max, d_max)


@_opaque_correction.register_fake
def _(
    mu_B: Tensor, sigma_B: Tensor, mu: Tensor, sigma: Tensor, r_min: Tensor, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu_B), torch.empty_like(mu_B)


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: a forward then is a checkpoint's second run."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(slots=True)  # not frozen: that would treble the cost of making one
class Moving:
    """A `Correct` of a layer that asks for nothing out of the ordinary: its work may be one kernel.

    Attributes:
        mu, sigma: (C,) float32, changed in place.
        limits: r_min, r_max, d_max, 0-dim.
        count_: 0-dim, batches so far.
        alpha: weight of a new batch.
        observe: is told the moments, sigma_B, and what mu and sigma were.
    """

    mu: Tensor
    sigma: Tensor
    limits: tuple[Tensor, Tensor, Tensor]
    count_: Tensor
    alpha: float
    observe: Callable[[Moments, Tensor, Tensor, Tensor], None] | None

    def __call__(self, moments: Moments, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        if self.observe is not None:
            self.observe(moments, sigma_B, *torch.stack((self.mu, self.sigma)).unbind())
        r_and_d = correct_(moments, sigma_B, self.mu, self.sigma, self.limits, self.alpha)
        self.count_.add_(1)
        return r_and_d

    def fused(self, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> fused.Vectors | None:
        """The same by one kernel, with all else that normalizing takes; None, and nothing done, where there is none."""
        done = fused.correct_(
            moments.mean_C, moments.var_C, self.mu, self.sigma, self.limits, self.count_, weight, bias,
            self.alpha, eps, self.observe is not None,
        )  # fmt: skip
        if done is None:
            return None
        vectors, before = done
        if before is not None and self.observe is not None:
            self.observe(moments, *before)
        return vectors


_Measured: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int | Tensor]
"""All that normalizing a batch depends on, beside the batch: mean, var, sigma = sqrt(var + eps), r, d, each (C,), and
the number of elements per channel that they are of."""


class _Ranks(NamedTuple):
    """That a batch is spread over ranks, and which; the default process group if None."""

    group: dist.ProcessGroup | None


_How: TypeAlias = "tuple[_Measured | Correct, Tensor | None, float, _Ranks | None, bool]"
"""What normalizing takes beside tensors with gradients: correct or what it answered, mask, eps, ranks, per_sample."""


class _Normalize(torch.autograd.Function):
    """y = z (gamma r) + (gamma d + beta) with z = (x - mean) / sigma; mean and sigma are functions of x in backward.

    Saves x and vectors only. gamma and r are saved beside their product, which a second derivative makes anew: it has
    to see gamma in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        how: _How,
    ) -> Tensor:
        # Not in setup_context: with one, torch inspects this signature at every call, at the cost of all the rest.
        # Measuring in here rather than before saves switching gradients off and on, a tenth of a small layer's cost.
        correct, mask, eps, ranks, per_sample = how
        vectors = None
        if isinstance(correct, tuple):
            measured = correct
        else:
            moments = _moments(x, mask, ranks, per_sample)
            if isinstance(correct, Moving):
                vectors = correct.fused(moments, weight, bias, eps)
            if vectors is None:
                measured = _corrected(moments, correct, eps)
        if vectors is not None:
            mean, var, elements, _, _ = moments
            inverse, r, d, scale, shift = vectors
        else:
            mean, var, sigma, r, d, elements = measured
            inverse, scale, shift, dtype = sigma.reciprocal(), r, d, mean.dtype
            if weight is not None:
                gamma = weight if weight.dtype == dtype else weight.to(dtype)
                scale = gamma * r
                shift = gamma * d if bias is None else torch.addcmul(as_dtype(bias, dtype), gamma, d)
            elif bias is not None:
                shift = d + as_dtype(bias, dtype)
        # torch's kernels where they can do it; the compiler makes better code of the plain formula.
        kernels = mask is None and x.numel() > 0 and (x.is_cpu or x.is_cuda) and not torch.compiler.is_compiling()
        ctx.save_for_backward(x, weight, mean, inverse, r, d, scale, mask)
        ctx.how = eps, ranks, elements, kernels
        if not kernels:
            y = (x - per_channel(mean, x)) * per_channel(scale * inverse, x) + per_channel(shift, x)
            y = y.to(x.dtype)
            return y if mask is None else torch.where(mask, y, torch.zeros((), dtype=y.dtype, device=y.device))
        if x.is_cuda:  # one kernel, any memory format; eval-mode native_batch_norm takes three here
            y = torch.batch_norm_elemt(x, scale, shift, mean, inverse, eps)
        else:
            y = torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, r, d, scale, mask = ctx.saved_tensors
        eps, ranks, elements, kernels = ctx.how
        if weight is not None and torch.is_grad_enabled():  # create_graph
            scale = as_dtype(weight, r.dtype) * r
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if ranks is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'sync="moments" has no second derivative: it would need collectives inside it; '
                'use sync="none" or sync="ema" where gradients of gradients are taken'
            )
        if kernels:
            synced = ranks is not None
            dx, dz, db = _NORMALIZE_BACKWARD(
                grad, x, scale, None, None, mean, inverse, True, eps,
                [need_x, need_weight or synced, need_weight or need_bias or synced],
            )  # fmt: skip
            if ranks is not None:
                dx = _of_all_ranks(dx, dz, db, x, scale, mean, inverse, elements, ranks)
        else:
            dx, dz, db = _backward(grad, x, scale, mean, inverse, mask, eps, elements, ranks)
        dweight = None
        if need_weight:  # xhat = z r + d, so sum(dy xhat) = r sum(dy z) + d sum(dy)
            if kernels and fused.fits(x) and not torch.is_grad_enabled():
                dweight = fused.weight_gradient(dz, db, r, d)
            if dweight is None:
                dweight = torch.addcmul(r * dz, d, db)
        return dx, dweight, db if need_bias else None, None


# `Function.apply` without its look for tensors that torch.func left behind, which takes as long as all else it does.
_normalize: Final[Callable[..., Tensor]] = super(torch.autograd.Function, _Normalize).apply


def _of_all_ranks(
    dx: Tensor | None,
    dz: Tensor,
    db: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
    elements: int | Tensor,
    ranks: _Ranks,
) -> Tensor | None:
    """The gradient dx by the sums over all ranks, from `dx` by this rank's own: they differ by a line in x.

    dx = (dy - db / m - z dz / m) scale / sigma, where the kernel took this rank's db, dz and m.
    """
    dz_all, db_all = sum_over_ranks((dz, db), ranks.group)  # every rank has to take part, whether it needs dx or not
    if dx is None:
        return None
    n, m = x.numel() // x.shape[1], elements
    by_x = scale * inverse
    slope = (dz / n - dz_all / m) * by_x * inverse
    offset = (db / n - db_all / m) * by_x - slope * mean
    return torch.addcmul(dx, x, per_channel(slope, x)).add_(per_channel(offset, x)).to(x.dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    inverse: Tensor,
    mask: Tensor | None,
    eps: float,
    elements: int | Tensor,
    ranks: _Ranks | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, sum(dy z) and sum(dy); the sums are this rank's own, as the gradients of gamma and beta are."""
    dims, dtype = reduced_dims(x), mean.dtype
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: a second derivative follows
        mean, sigma = _differentiable_moments(x.to(dtype), mask, eps)
        inverse = sigma.reciprocal()
    z = (x - per_channel(mean, x)) * per_channel(inverse, x)
    dy = grad.to(dtype)
    if mask is not None:
        zero = torch.zeros((), dtype=dtype, device=x.device)
        z, dy = torch.where(mask, z, zero), torch.where(mask, dy, zero)
    dz, db = (dy * z).sum(dims), dy.sum(dims)
    dz_all, db_all = (dz, db) if ranks is None else sum_over_ranks((dz, db), ranks.group)
    m = elements.clamp(min=1) if isinstance(elements, Tensor) else elements
    dx = (dy - per_channel(db_all / m, x) - z * per_channel(dz_all / m, x)) * per_channel(scale * inverse, x)
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
) -> Tensor:
    """The training forward: measure, correct, normalize. What moves mu and sigma is `correct`.

    Args:
        x: (N, C, *).
        weight: (C,) gamma, or None for 1.
        bias: (C,) beta, or None for 0.
        correct: (moments, sigma_B) -> (r, d), called once, without gradients.
        eps: added to the variance inside the root.
        mask: bool, broadcastable to x. Elements under False take no part, and come out as 0.
        microbatches: G; the batch is split along N into G parts, each normalized with its own statistics.
        synced: moments over all ranks of `group`. Every rank must call, a rank without samples too.
        group: the ranks; the default process group if None.
        per_sample: fill the per-sample moments that `correct` is given.

    Returns:
        y with x's shape, dtype and memory format.
    """
    functorch = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if functorch and (synced or microbatches > 1):
        raise RuntimeError('torch.func takes neither sync="moments" nor virtual_batch_size: leave them out under it')
    if microbatches > 1:
        assert not synced  # splitting a batch and joining it with others' contradict each other
        return _in_microbatches(x, weight, bias, correct, eps, mask, microbatches, per_sample)
    ranks = _Ranks(group) if synced else None
    if functorch:
        return _by_formula(x, weight, bias, correct, mask, eps, per_sample)
    if torch.compiler.is_compiling():  # which does not follow a change of buffers into an autograd.Function
        with torch.no_grad():
            measured = _corrected(_moments(x, mask, ranks, per_sample), correct, eps)
        y: Tensor = _Normalize.apply(x, weight, bias, (measured, mask, eps, ranks, False))  # type: ignore[no-untyped-call]
        return y
    strided = x.dim() == 3 and _strided_rows(x)
    if strided:
        x, mask = x.unsqueeze(-1), None if mask is None else mask.unsqueeze(-1)
    y = _normalize(x, weight, bias, (correct, mask, eps, ranks, per_sample))
    return y.squeeze(-1) if strided else y


def _strided_rows(x: Tensor) -> bool:
    """Whether `x` is a (N, C, L) view of (N, L, C) memory: the kernels are fast on it only as images of width 1."""
    return x.dim() == 3 and x.stride(1) == 1 and not x.is_contiguous()


def _moments(x: Tensor, mask: Tensor | None, ranks: _Ranks | None, per_sample: bool) -> Moments:
    moments = batch_moments(x, mask, per_sample=per_sample)
    return moments if ranks is None else merge_moments(moments, ranks.group)


def _corrected(moments: Moments, correct: Correct, eps: float) -> _Measured:
    mean_C, var_C, elements, _, _ = moments
    sigma_C = (var_C + eps).sqrt_()
    r, d = correct(moments, sigma_C)
    return mean_C, var_C, sigma_C, r, d, elements


def _by_formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    correct: Correct,
    mask: Tensor | None,
    eps: float,
    per_sample: bool,
) -> Tensor:
    """The same in operators that torch.func differentiates by itself: it takes no autograd.Function like ours."""
    dtype = statistics_dtype(x)
    wide = x.to(dtype)
    with torch.no_grad():
        _, _, _, r, d, _ = _corrected(_moments(x.detach(), mask, None, per_sample), correct, eps)
    mean, sigma = _differentiable_moments(wide, mask, eps)
    xhat = (wide - per_channel(mean, x)) / per_channel(sigma, x) * per_channel(r, x) + per_channel(d, x)
    if weight is not None:
        xhat = xhat * per_channel(weight.to(dtype), x)
    y = (xhat if bias is None else xhat + per_channel(bias.to(dtype), x)).to(x.dtype)
    return y if mask is None else torch.where(mask, y, torch.zeros((), dtype=y.dtype, device=y.device))


def _in_microbatches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    correct: Correct,
    eps: float,
    mask: Tensor | None,
    microbatches: int,
    per_sample: bool,
) -> Tensor:
    """`renormalize`, each part of the batch for itself."""
    parts = x.tensor_split(microbatches)
    require_spread(parts[-1])  # the smallest
    masks: Sequence[Tensor | None] = [None] * microbatches
    if mask is not None:
        masks = mask.expand(x.shape[0], *mask.shape[1:]).tensor_split(microbatches)
    with torch.no_grad():
        moments = [batch_moments(p, m, per_sample=per_sample) for p, m in zip(parts, masks, strict=True)]
        var_GC = torch.stack([m.var_C for m in moments])
        sigma_GC = (var_GC + eps).sqrt_()
        counts = [m.elements for m in moments if isinstance(m.elements, Tensor)]
        means = [m.mean_NC for m in moments if m.mean_NC is not None]
        variances = [m.var_NC for m in moments if m.var_NC is not None]
        r_GC, d_GC = correct(
            Moments(
                torch.stack([m.mean_C for m in moments]),
                var_GC,
                torch.stack(counts) if counts else parts[-1].numel() // parts[-1].shape[1],
                torch.cat(means) if means else None,
                torch.cat(variances) if variances else None,
            ),
            sigma_GC,
        )
    return torch.cat(
        [
            _Normalize.apply(  # type: ignore[no-untyped-call]
                part, weight, bias, ((m.mean_C, m.var_C, sigma, r, d, m.elements), part_mask, eps, None, False)
            )
            for part, part_mask, m, sigma, r, d in zip(parts, masks, moments, sigma_GC, r_GC, d_GC, strict=True)
        ]
    )


def correct_(
    moments: Moments,
    sigma_B: Tensor,
    mu: Tensor,
    sigma: Tensor,
    limits: tuple[Tensor, Tensor, Tensor],
    alpha: float | Tensor,
    stat: Stat = "std",
) -> tuple[Tensor, Tensor]:
    """The correction of a batch; then mu += alpha (mu_B - mu), sigma += alpha (sigma_B - sigma), in place.

    A channel with a NaN or an infinity in the batch keeps its statistics: one bad sample would otherwise
    stay in them for good. So does one with fewer than two elements. Microbatches enter with their mean.

    Args:
        moments: of the batch; (G, C) with G microbatches.
        sigma_B: sqrt(var + eps) of the batch.
        mu: (C,) changed in place.
        sigma: (C,) changed in place.
        limits: r_min, r_max, d_max, 0-dim. As tensors, so that moving them neither syncs nor recompiles.
        alpha: weight of the new batch, a number or a 0-dim tensor.
        stat: "var" averages sigma_B² instead and keeps its root, as implementations with a moving variance do.

    Returns:
        r and d, shaped as sigma_B. NaN stays NaN. Call it without gradients.
    """
    mu_B, _, elements, _, _ = moments
    steps = torch._foreach_sub((mu_B, sigma_B), (mu, sigma))
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        r, d = _opaque_correction(mu_B, sigma_B, as_dtype(mu, mu_B.dtype), as_dtype(sigma, mu_B.dtype), *limits)
    else:
        r, d = _clipped(steps[0], sigma_B, sigma, *limits)
        if r.dtype != mu_B.dtype:
            r, d = r.to(mu_B.dtype), d.to(mu_B.dtype)
    if stat == "var" or sigma_B.dim() > 1:
        if sigma_B.dim() > 1:
            mu_B, sigma_B = mu_B.mean(0), sigma_B.mean(0)
            elements = elements.amin(0) if isinstance(elements, Tensor) else elements
        if stat == "var":
            sigma_B = sigma_B.square()
            sigma.square_()
        steps = torch._foreach_sub((mu_B, sigma_B), (mu, sigma))
    for step in steps:
        step.nan_to_num_(0.0, 0.0, 0.0)
    if isinstance(elements, Tensor):
        torch._foreach_mul_(steps, [elements > 1] * 2)
    if isinstance(alpha, Tensor):
        torch._foreach_mul_(steps, [alpha] * 2)
        alpha = 1.0
    torch._foreach_add_((mu, sigma), steps, alpha=alpha)
    if stat == "var":
        sigma.sqrt_()
    return r, d


def inference(
    x: Tensor, running_mean: Tensor, running_std: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Inference, y = gamma (x - mu) / sigma + beta: one batch_norm node, which exporters fold into the layer before.

    sigma holds eps already (Algorithm 1), hence eps = 0 here.
    """
    dtype = statistics_dtype(x)
    strided = not torch.compiler.is_compiling() and _strided_rows(x)
    y = F.batch_norm(
        x.unsqueeze(-1) if strided else x,
        running_mean.to(dtype),
        running_std.to(dtype).square(),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        training=False,
        eps=0.0,
    )
    return y.squeeze(-1) if strided else y


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
        ValueError: training with one value per channel, limits outside their range, moving statistics of another
            length or of 16 bits, a mask that is not bool or does not broadcast to x.
    """
    for name, running in (("running_mean", running_mean), ("running_std", running_std)):
        if running.shape != x.shape[1:2] or running.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64 of shape ({x.shape[1]},), got {running.dtype} of shape "
                f"{tuple(running.shape)}"
            )
    if mask is not None:
        require_mask(mask, x)
    if not any(isinstance(limit, Tensor) for limit in (r_min, r_max, d_max)):  # reading a tensor would sync
        require_limits(1 / r_max if r_min is None and r_max else r_min, r_max, d_max)
    if not training or x.numel() == 0:
        return inference(x, running_mean, running_std, weight, bias)
    require_spread(x)
    r_min = 1 / r_max if r_min is None else r_min
    r_min, r_max, d_max = (
        torch.as_tensor(v, dtype=statistics_dtype(x), device=x.device) for v in (r_min, r_max, d_max)
    )
    limits = (r_min, r_max, d_max)

    def correct(moments: Moments, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        return correct_(moments, sigma_B, running_mean, running_std, limits, momentum)

    return renormalize(x, weight, bias, correct, eps, mask=mask)


def require_limits(r_min: Any, r_max: Any, d_max: Any) -> None:
    """Raise ValueError where limits, as numbers, are outside their range."""
    if not r_max >= 1:
        raise ValueError(f"r_max must be >= 1 (1 is batch normalization), got {r_max}")
    if not d_max >= 0:
        raise ValueError(f"d_max must be >= 0 (0 is batch normalization), got {d_max}")
    if not 0 <= r_min <= 1:
        raise ValueError(f"r_min must be in [0, 1], got {r_min}")


def require_mask(mask: Tensor, x: Tensor) -> None:
    """Raise ValueError if `mask` is not bool or does not broadcast to `x` (N, C, *)."""
    fits = mask.dim() == x.dim() and all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"a mask must be bool and broadcast to the input of shape {tuple(x.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def require_spread(x: Tensor) -> None:
    """Raise ValueError if `x` (N, C, *) has exactly one value per channel: it has no variance to normalize with."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"expected more than 1 value per channel when training, got input of shape {tuple(x.shape)}; "
            "use a larger (virtual) batch, or put the layer in eval mode to normalize with the moving statistics"
        )
