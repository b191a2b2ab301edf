"""Moving statistics of a whole model: their mean over ranks, and their exact re-estimation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brn_core.distributed import average_, merge_moments
from brn_core.layers import BatchRenorm
from brn_core.moments import Moments, batch_moments


def average_statistics(model: nn.Module) -> None:
    """Average mu and sigma of all `sync="ema"` layers over the ranks, in place: one packed all-reduce.

    Call it on every rank once a step, after the forward; before `optimizer.step()` it overlaps nothing it needs.
    Every rank normalizes its own batch, as the paper's workers did, and all move the same statistics:
    mean_k(mu + alpha (mu_B,k - mu)) = mu + alpha (mean_k(mu_B,k) - mu). Without a process group it does nothing.

    Args:
        model: the same on every rank.
    """
    by_group: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for layer in model.modules():
        if isinstance(layer, BatchRenorm) and layer.sync == "ema":
            layer.forwards_since_average = 0
            by_group.setdefault(layer.process_group, []).extend((layer.running_mean, layer.running_std))
    if dist.is_available() and dist.is_initialized():
        for group, tensors in by_group.items():
            average_(tensors, group)


class _Pool:
    """Moments of everything one layer was fed, merged batch by batch in float64 (Chan et al.)."""

    def __init__(self, layer: BatchRenorm) -> None:
        zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.total = Moments(zeros, zeros, zeros)

    @torch.no_grad()
    def see(self, layer: BatchRenorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        x = args[0] if args else kwargs["x"]
        mask: Tensor | None = args[1] if len(args) > 1 else kwargs.get("mask")
        x, mask = layer.channels_second(x, mask)
        batch = batch_moments(x, mask)
        n_C, m_C = torch.as_tensor(self.total.elements), torch.as_tensor(batch.elements)
        all_C = (n_C + m_C).clamp(min=1)
        delta_C = batch.mean_C - self.total.mean_C
        mean_C = self.total.mean_C + delta_C * (m_C / all_C)
        var_C = (self.total.var_C * n_C + batch.var_C * m_C + delta_C.square() * (n_C * m_C / all_C)) / all_C
        self.total = Moments(mean_C, var_C, n_C + m_C)


def update_statistics(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> None:
    """Set mu and sigma of every BatchRenorm to the exact statistics of a data set under the present weights.

    One pass over `loader`: BatchRenorm layers normalize with their batch (r = 1, d = 0), everything else runs in eval
    mode, and what each layer is fed is pooled in float64, variance between batches included. With a process group,
    layers with sync="moments" or "ema" pool over the ranks; sync="moments" also joins the ranks' batches at every
    forward, so all ranks have to give equally many. Frozen layers stay as they are. Afterwards modes, limits
    and the batch counter are as before; if the loader or the model raises, the statistics are too.

    Args:
        model: called with each batch.
        loader: yields inputs, or tuples or lists that have the input first.
        device: where to put the inputs; where they are if None.

    Raises:
        ValueError: the loader was empty, a layer got fewer than two values per channel from all of it or one from a
            single batch (a last batch of one sample: build the loader with drop_last=True), or a NaN or an infinity.
    """
    layers = {m: _Pool(m) for m in model.modules() if isinstance(m, BatchRenorm) and not m.frozen}
    modes = {m: m.training for m in model.modules()}
    saved = {m: {name: buffer.clone() for name, buffer in m.named_buffers(recurse=False)} for m in layers}
    observing = {m: m.observe for m in layers}
    hooks = [m.register_forward_pre_hook(pool.see, with_kwargs=True) for m, pool in layers.items()]
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.observe = False
            layer.set_limits(1.0, 0.0)
        with torch.no_grad():
            for batch in loader:
                x = batch[0] if isinstance(batch, tuple | list) else batch
                model(x if device is None else x.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for layer, buffers in saved.items():
                layer.observe = observing[layer]
                for name, before in buffers.items():
                    layer.get_buffer(name).copy_(before)
    _set(layers)


def _set(layers: dict[BatchRenorm, _Pool]) -> None:
    distributed = dist.is_available() and dist.is_initialized()
    new: dict[BatchRenorm, Moments] = {}
    for layer, pool in layers.items():
        total = pool.total
        if distributed and layer.sync != "none":
            total = merge_moments(total, layer.process_group)
        if not bool((torch.as_tensor(total.elements) > 1).all()):  # host sync
            raise ValueError(
                f"a BatchRenorm of {layer.num_features} channels was fed fewer than 2 values per channel: "
                "give a loader with data, and leave out layers that the model does not use (layer.frozen = True)"
            )
        if not bool((total.mean_C.isfinite() & total.var_C.isfinite()).all()):  # host sync
            raise ValueError(
                f"a BatchRenorm of {layer.num_features} channels was fed a NaN or an infinity: "
                "its statistics would be none; look for it in the data and in the layers before"
            )
        new[layer] = total
    with torch.no_grad():
        for layer, total in new.items():
            layer.running_mean.copy_(total.mean_C)
            layer.running_std.copy_((total.var_C + layer.eps).sqrt())
