"""Mean and variance of an activation: per channel over the batch, and per sample over its positions.

Tensor names end in their shape: N samples, C channels, `*` any number of positions, S their product.
Everything here is detached and in float32 (float64 for float64 input), whatever the activation's dtype.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

# Added to the variance by group_norm, which answers 1 / sqrt(var + eps): far below any float32 variance that counts.
_TINY: Final = 1e-30

_SIXTEEN_BITS: Final = (torch.bfloat16, torch.float16)

# Positions from and up to which products with a vector beat the kernels for rows, on CPU.
_FEW: Final = 8
_MANY: Final = 64


class Moments(NamedTuple):
    """Moments of one batch.

    Attributes:
        mean_C: mean over samples and positions.
        var_C: biased variance over samples and positions.
        elements: elements per channel, m in the paper; (C,) where a mask or ranks may give channels different counts.
        mean_NC: per-sample mean over positions, if asked for.
        var_NC: per-sample biased variance over positions, if asked for and there are positions.
    """

    mean_C: Tensor
    var_C: Tensor
    elements: int | Tensor
    mean_NC: Tensor | None = None
    var_NC: Tensor | None = None


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else: bfloat16 cannot hold a variance."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)` without the cost of a call where there is nothing to do, which is nearly always."""
    return t if t.dtype == dtype else t.to(dtype)


def reduced_dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the channels'."""
    return (0, *range(2, x.dim()))


def per_channel(v_C: Tensor, x: Tensor) -> Tensor:
    """`v_C` shaped to broadcast against `x` of shape (N, C, *)."""
    return v_C.view(-1, *([1] * (x.dim() - 2)))


def _kernel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel by batch norm's own statistics kernel, one read of `x`."""
    running_mean, running_var = None, None
    if x.is_cpu and x.dtype in _SIXTEEN_BITS:
        # On CPU the answer has the dtype of the running buffers (what they hold is unused), or of x without any.
        running_mean = running_var = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    return torch.batch_norm_update_stats(x, running_mean, running_var, 0.0)


def _has_rows(x: Tensor) -> bool:
    """Whether each (sample, channel) is one run of memory."""
    return x.dim() > 2 and x.is_contiguous()


def _samples_have(elements: int, x: Tensor) -> bool:
    """Whether each sample has so much work on CPU that the 10 us of a kernel call for it count for little."""
    return x.dim() > 2 and x.is_cpu and x.shape[1:].numel() >= elements


def _batch_from_samples_pays(x: Tensor) -> bool:
    """Whether batch moments from per-sample moments cost no more than batch norm's own statistics kernel.

    On CPU that kernel is not vectorised for contiguous float input: rows take half its time from some 30,000 elements
    on, a third at (8, 512, 7, 7), and lose where they have fewer than 8 elements. In other layouts large samples one by
    one cost .05 of the layer at (32, 64, 56, 56) and save .2 where it is observed. `benchmarks/layer.py` measures the
    layer as a whole.
    """
    if x.dim() == 2 or not x.is_cpu or x.dtype in _SIXTEEN_BITS or x.numel() < 1 << 15:
        return False
    return x.numel() >= 8 * x.shape[0] * x.shape[1] if _has_rows(x) else _samples_have(131_072, x)


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and biased variance of every sample over its positions; right for |mean| / sigma up to 1e4.

    Args:
        x: (N, C, *), at least one element.

    Returns:
        mean_NC and var_NC; var_NC is None for (N, C) input, where it would be zero.
    """
    return _sample_moments(x.detach())  # a tenth of what entering and leaving no_grad costs


def _sample_moments(x: Tensor) -> tuple[Tensor, Tensor | None]:
    dtype = statistics_dtype(x)
    if x.dim() == 2:
        return x.detach().to(dtype), None  # x itself would keep its whole graph
    if not torch.compiler.is_compiling() and _has_rows(x):
        N, C = x.shape[:2]
        S = x.numel() // (N * C)
        if x.is_cpu and S >= _FEW:
            if S <= _MANY:
                return _short_row_moments(x)
            if x.dtype not in _SIXTEEN_BITS:  # vectorised, where batch norm's kernel is not
                _, mean_NC, inverse_std_NC = torch.native_group_norm(x, None, None, N, C, S, C, _TINY)
                return mean_NC, inverse_std_NC.pow_(-2)
        mean, var = _kernel_moments(x.view(1, N * C, -1))  # N*C channels of one sample
        return mean.view(N, C), var.view(N, C)
    if not torch.compiler.is_compiling() and _samples_have(32_768, x):  # from there on faster than what follows
        means, variances = zip(*(_kernel_moments(sample) for sample in x.tensor_split(x.shape[0])), strict=True)
        return torch.stack(means), torch.stack(variances)
    positions = tuple(range(2, x.dim()))
    if torch.compiler.is_compiling() or not x.is_cpu:
        var_NC, mean_NC = torch.var_mean(x.to(dtype), positions, correction=0)
        return mean_NC, var_NC
    mean_NC = x.mean(positions, dtype=dtype)  # var_mean is slow on CPU (3-5 times this)
    off = x - mean_NC.view(*mean_NC.shape, *([1] * len(positions)))
    return mean_NC, off.square_().mean(positions)


def _short_row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample moments where there are few positions: the kernels for rows then spend their time between rows."""
    N, C = x.shape[:2]
    rows = as_dtype(x.view(N * C, -1), statistics_dtype(x))
    weights = rows.new_full((rows.shape[1],), 1 / rows.shape[1])
    mean = torch.mv(rows, weights)
    var = torch.mv((rows - mean.unsqueeze(1)).square_(), weights)
    return mean.view(N, C), var.view(N, C)


def _from_samples(mean_NC: Tensor, var_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Chan's formula for samples of equal size: within-sample plus between-sample variance."""
    mean_C, between_C = _kernel_moments(mean_NC)
    within_C, _ = _kernel_moments(var_NC)  # one kernel where mean() is three
    return mean_C, between_C.add_(within_C)


def _masked_moments(x: Tensor, mask: Tensor, per_sample: bool) -> Moments:
    dims, positions, dtype = reduced_dims(x), tuple(range(2, x.dim())), statistics_dtype(x)
    kept = mask.expand_as(x)
    zero = torch.zeros((), dtype=dtype, device=x.device)
    x = torch.where(kept, x.to(dtype), zero)  # a NaN under the mask takes no part
    count_C = kept.sum(dims)
    m_C = count_C.clamp(min=1)
    mean_C = x.sum(dims) / m_C
    var_C = torch.where(kept, x - per_channel(mean_C, x), zero).square_().sum(dims) / m_C
    if not per_sample:
        return Moments(mean_C, var_C, count_C)
    if not positions:
        return Moments(mean_C, var_C, count_C, torch.where(kept, x, mean_C), None)
    count_NC = kept.sum(positions)
    s_NC = count_NC.clamp(min=1)
    mean_NC = torch.where(count_NC > 0, x.sum(positions) / s_NC, mean_C)
    centred = torch.where(kept, x - mean_NC.view(*mean_NC.shape, *([1] * len(positions))), zero)
    return Moments(mean_C, var_C, count_C, mean_NC, centred.square_().sum(positions) / s_NC)


def batch_moments(x: Tensor, mask: Tensor | None = None, *, per_sample: bool = False) -> Moments:
    """Mean and biased variance of every channel, in the cheapest way that is right; call it without gradients.

    Args:
        x: (N, C, *); may be empty (zeros, count 0).
        mask: bool, broadcastable to x; only elements under True count.
        per_sample: also answer the per-sample moments. Where the batch moments are taken from them anyway that costs
            nothing; elsewhere one more read. The batch moments are the same to the bit either way.

    Returns:
        Moments. A sample without any element under the mask gets the batch mean as its mean.
    """
    if x.numel() == 0:
        dtype = statistics_dtype(x)
        zeros_C = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        zeros_NC = zeros_C.expand(x.shape[0], -1)
        return Moments(zeros_C, zeros_C, 0, zeros_NC if per_sample else None, zeros_NC if per_sample else None)
    if mask is not None:
        return _masked_moments(x, mask, per_sample)
    count = x.numel() // x.shape[1]
    if torch.compiler.is_compiling() or not (x.is_cpu or x.is_cuda):
        var_C, mean_C = torch.var_mean(x.to(statistics_dtype(x)), reduced_dims(x), correction=0)
        return Moments(mean_C, var_C, count, *(_sample_moments(x) if per_sample else (None, None)))
    if _batch_from_samples_pays(x):
        mean_NC, var_NC = _sample_moments(x)
        assert var_NC is not None  # there are positions
        return Moments(*_from_samples(mean_NC, var_NC), count, mean_NC, var_NC)
    return Moments(*_kernel_moments(x), count, *(_sample_moments(x) if per_sample else (None, None)))
