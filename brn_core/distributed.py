"""Statistics over ranks: the moments of the whole batch, sums for its gradient, and the mean of moving statistics.

None of these waits on the device: an empty rank takes part with weight zero instead of being masked out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from brn_core.moments import Moments


def merge_moments(moments: Moments, group: dist.ProcessGroup | None = None) -> Moments:
    """Moments of the union of all ranks' batches, the same on every rank; one all-gather of 3C numbers.

    m = sum_k m_k;  mean = sum_k m_k mean_k / m;  var = sum_k m_k (var_k + (mean_k - mean)^2) / m  (Chan et al.).

    Args:
        moments: this rank's; a count of 0 is allowed on any rank.
        group: the process group, the default one if None.

    Returns:
        Moments with a (C,) count; the per-sample moments stay this rank's own.
    """
    mean_C, var_C, count = moments.mean_C, moments.var_C, moments.elements
    count_C = count.to(mean_C.dtype) if isinstance(count, Tensor) else torch.full_like(mean_C, count)
    local_3C = torch.stack((mean_C, var_C, count_C))
    gathered = [torch.empty_like(local_3C) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local_3C, group=group)
    mean_KC, var_KC, count_KC = torch.stack(gathered, 1)
    total_C = count_KC.sum(0)
    m_C = total_C.clamp(min=1)
    whole_mean_C = (count_KC * mean_KC).sum(0) / m_C
    whole_var_C = (count_KC * (var_KC + (mean_KC - whole_mean_C).square())).sum(0) / m_C
    return Moments(whole_mean_C, whole_var_C, total_C, moments.mean_NC, moments.var_NC)


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Sum of each (C,) tensor over the ranks, in one all-reduce."""
    packed = torch.stack(list(tensors))
    dist.all_reduce(packed, group=group)
    return list(packed.unbind(0))


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor, in place, by its mean over the ranks: one packed all-reduce for all of them.

    Args:
        tensors: of one device, any float dtypes and shapes; the same list on every rank.
        group: the process group, the default one if None.
    """
    if not tensors:
        return
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    packed = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(packed, group=group)
    packed /= dist.get_world_size(group)
    start = 0
    for tensor in tensors:
        tensor.copy_(packed[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
