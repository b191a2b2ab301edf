"""The average model: an exponential moving average of the weights, with the moving statistics that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from brn_core.layers import BatchRenorm


class WeightAverage:
    """Averages a model's weights over steps: w̄ += (1 - decay) (w - w̄). The paper evaluates such a model.

    Neither the newest moving statistics belong to averaged weights (they are ahead of them, by 1 / (1 - decay) steps
    less 1 / alpha) nor an average of the moving statistics (which is behind by 1 / alpha). What belongs to them is the
    same average of what each step has measured, which is in the moving statistics of two steps:
    mu_B = (mu_t - (1 - alpha) mu_t-1) / alpha. On digits (120 steps, alpha = 0.1, decay = 0.97) it is less than half as
    far from the exact statistics of the averaged weights as the newest are; where decay = 1 - alpha both are the same.

    Args:
        model: what is trained; its weights and statistics are the start.
        decay: in (0, 1); the average reaches back 1 / (1 - decay) steps.

    Attributes:
        averaged: the average model; called like the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        self._model, self._decay = model, decay
        self._names: list[str] = []
        self._alphas: list[float] = []
        for name, module in model.named_modules():
            if isinstance(module, BatchRenorm | _BatchNorm) and module.momentum and module.running_mean is not None:
                spread = "running_std" if isinstance(module, BatchRenorm) else "running_var"
                self._names += [f"{name}.running_mean", f"{name}.{spread}"]
                self._alphas += [module.momentum] * 2
        self._last = [model.get_buffer(name).clone() for name in self._names]

    @torch.no_grad()
    def update(self) -> None:
        """Take in a step, after its optimizer step and after ranks have shared their moving statistics."""
        newest = [self._model.get_buffer(name) for name in self._names]
        first = self.averaged.n_averaged == 0
        averages = [self.averaged.module.get_buffer(name).clone() for name in self._names]
        self.averaged.update_parameters(self._model)  # buffers become the newest
        if self._names and not first:
            measured = torch._foreach_sub(newest, torch._foreach_mul(self._last, [1 - alpha for alpha in self._alphas]))
            torch._foreach_mul_(measured, [(1 - self._decay) / alpha for alpha in self._alphas])
            torch._foreach_mul_(averages, self._decay)
            torch._foreach_add_(averages, measured)
            torch._foreach_copy_([self.averaged.module.get_buffer(name) for name in self._names], averages)
        self._last = [statistic.clone() for statistic in newest]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.averaged.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the model has been loaded before."""
        self.averaged.load_state_dict(state)
        self._last = [self._model.get_buffer(name).clone() for name in self._names]
