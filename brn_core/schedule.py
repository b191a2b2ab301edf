"""When the limits of the correction open: step -> (r_max, d_max)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from brn_core.layers import BatchRenorm

PAPER_STEPS: Final = 130_000
"""Length of the run the default steps belong to: there the paper's Inception-v3 reaches its accuracy (section 4.1)."""

SHORTEST_PHASE: Final = 5
"""Time constants 1 / alpha of the moving statistics that a phase of a scaled schedule lasts at the least. After 5, less
than 1 % of the statistics is older than the phase; limits that open earlier correct to statistics not there yet."""


@dataclass(frozen=True)
class RenormSchedule:
    """Limits that are batch normalization first and relax linearly from there; a pure function of the step.

    r_max(t) = 1 + (r_max - 1) * ramp((t - bn_steps) / (r_steps - bn_steps)), ramp clipped to [0, 1];
    d_max(t) = d_max * ramp((t - bn_steps) / (d_steps - bn_steps)); r_min is 1 / r_max.

    The defaults are the paper's, for a run of `PAPER_STEPS`; "gradually relaxed" is read as linearly.
    Nothing to save: a resumed run goes on with `apply(model, step)`.

    Source: Ioffe 2017, section 4.

    Attributes:
        bn_steps: steps of batch normalization, limits (1, 0).
        r_steps: the step at which r_max is reached.
        d_steps: the step at which d_max is reached.
        r_max: final upper limit of r, finite, >= 1.
        d_max: final limit of |d|, finite, >= 0.

    Raises:
        ValueError: an attribute outside its range.
    """

    bn_steps: int = 5_000
    r_steps: int = 40_000
    d_steps: int = 25_000
    r_max: float = 3.0
    d_max: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.bn_steps <= min(self.r_steps, self.d_steps):
            raise ValueError(
                "need 0 <= bn_steps <= r_steps and bn_steps <= d_steps, "
                f"got bn_steps={self.bn_steps}, r_steps={self.r_steps}, d_steps={self.d_steps}"
            )
        if not (1 <= self.r_max < math.inf and 0 <= self.d_max < math.inf):
            raise ValueError(
                f"need finite r_max >= 1 and d_max >= 0, got r_max={self.r_max}, d_max={self.d_max}; "
                "for no limit at all, give infinite limits to the layer itself"
            )

    def limits(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) in force at a step; steps count optimizer steps from 0."""

        def opened(until: int) -> float:
            if step < self.bn_steps:
                return 0.0
            return 1.0 if step >= until else (step - self.bn_steps) / (until - self.bn_steps)

        return 1 + (self.r_max - 1) * opened(self.r_steps), self.d_max * opened(self.d_steps)

    def scaled(self, total_steps: int, momentum: float = 0.01) -> RenormSchedule:
        """The same shape for a run of `total_steps` instead of `PAPER_STEPS`.

        The moving statistics do not speed up because a run is short. So no phase (batch normalization, either ramp)
        becomes shorter than `SHORTEST_PHASE` time constants 1 / momentum: in a run shorter than that the limits open
        late or never, which is right; raise momentum to have them open.

        Args:
            total_steps: planned optimizer steps.
            momentum: alpha of the layers.

        Returns:
            A schedule with the same limits and other steps.

        Raises:
            ValueError: total_steps < 1, or momentum outside (0, 1].
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is the weight of the new batch, in (0, 1], got {momentum}")
        shortest = math.ceil(SHORTEST_PHASE / momentum)

        def length(steps: int) -> int:
            # A phase that is already shorter is the user's choice; one the user left out stays out.
            return max(round(steps * total_steps / PAPER_STEPS), min(shortest, steps))

        bn_steps = length(self.bn_steps)
        return RenormSchedule(
            bn_steps,
            bn_steps + length(self.r_steps - self.bn_steps),
            bn_steps + length(self.d_steps - self.bn_steps),
            self.r_max,
            self.d_max,
        )

    @torch.no_grad()
    def apply(self, model: nn.Module, step: int) -> None:
        """Put the limits of `step` in force in every BatchRenorm of `model` (or of a part of it), before its forward.

        Neither syncs the device nor recompiles; two launches a limit, however many layers.
        """
        layers = [m for m in model.modules() if isinstance(m, BatchRenorm)]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no BatchRenorm layer; convert_batchnorm(model) makes them")
        r_max, d_max = self.limits(step)
        for name, limit in (("r_min", 1 / r_max), ("r_max", r_max), ("d_max", d_max)):
            tensors = [layer.get_buffer(name) for layer in layers]
            torch._foreach_zero_(tensors)
            torch._foreach_add_(tensors, limit)
