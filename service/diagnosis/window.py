"""The rows a diagnosis looks at, as arrays. Built by `service.windows.window`; rules never see the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import Layer, RunStatus, Schedule

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

# Shape suffixes: T recorded steps, K ranks, L layers, F probe features. NaN in these arrays means *missing*, except in
# `LayerRows`, where a stored NaN is a NaN as well; `nonfinite` tells those apart.

LAYER_COLUMNS = (
    "samples", "gap", "residual", "d_squared", "log_r", "clip_r", "clip_d", "r_max", "d_max",
    "mean_noise", "scale_noise", "mean_diff1", "mean_diff2", "scale_diff2", "adjacency_noise", "dead_channels",
    "mu", "mu_b", "sigma", "r_q50",
)  # fmt: skip
"""The statistics of the `layers` table that rules use."""

OPENING_COLUMNS = ("gap", "d_squared", "mean_diff2")
"""Those of them that are looked at around the opening of the limits."""


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """The input probe of the newest recorded steps, oldest first."""

    steps_T: Ints
    samples_TK: Floats
    mean_TKF: Floats
    var_TKF: Floats
    adjacency_TKF: Floats


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The layer statistics of the newest recorded steps, oldest first: `columns[name]` has shape (T, K, L)."""

    steps_T: Ints
    columns: dict[str, Floats]


@dataclass(frozen=True, slots=True)
class ScalarRows:
    """One scalar, mean over ranks, oldest first. A NaN or infinity here is a stored value, not a gap."""

    steps_T: Ints
    values_T: Floats


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds between two of each rank's steps, as it measured them, oldest first; NaN where it sent none."""

    steps_T: Ints
    seconds_TK: Floats


@dataclass(frozen=True, slots=True)
class Opening:
    """The rows and losses around the step at which the limits of Batch Renorm opened, thinned where they are many.

    Of the rows before it those of the last time constant, at least 50 where there are so many.
    """

    step: int
    rows: LayerRows
    loss: ScalarRows


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first row with a non-finite channel: smallest step, then smallest layer, then smallest rank."""

    step: int
    layer: int
    rank: int
    channels: int


@dataclass(frozen=True, slots=True)
class Window:
    """Everything the rules may look at for one run.

    `first_sigma_L` is each layer's mean sigma_B over the first recorded steps, NaN where it has no row there; `opening`
    is None where no schedule opens limits or the run has not come so far; `step_times` where no rank sent any.
    """

    run: str
    status: RunStatus
    world_size: int
    batch_size: int | None
    planned_steps: int | None
    schedule: Schedule | None
    config: dict[str, object]
    layers: tuple[Layer, ...]
    last_step: int | None
    probe: ProbeRows
    rows: LayerRows
    scalars: dict[str, ScalarRows]
    nonfinite: NonFinite | None
    first_sigma_L: Floats
    opening: Opening | None
    step_times: StepTimes | None = None
