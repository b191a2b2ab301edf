"""Trainings that go wrong on purpose: `brn-train --fault NH-CLUSTER` provokes that finding, within seconds on a CPU.

Each fault is named after the finding it provokes: it brings settings of its own (what is given on the command line or
in the environment still wins) and, where settings cannot do it, reaches into batches, images or gradients. No torch is
imported here, so that `--help` can list the names without it.

Shapes: B samples of a batch, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from brn_core.worker.data import Split

FaultName = Literal[
    "NH-CLUSTER",
    "NH-PAIRED",
    "NH-ORDER",
    "NH-RANKSKEW",
    "NH-RANKDUP",
    "NH-SMALL",
    "NH-GAP",
    "NH-LAG",
    "NH-CLIP",
    "NH-SCHED-FAST",
    "NH-SCHED-SLOW",
    "NH-RUNAWAY",
    "NH-TAIL",
    "NH-COUPLED",
    "NH-POOLBIAS",
    "NH-BUFFERS",
    "NH-UNEVEN",
    "NH-DEAD",
    "NH-NONFINITE",
    "NH-MISSING",
    "NH-STRATIFIED",
    "NH-WITHHELD",
]

BREAKS_AT: Final = 60
"""Step from which on a fault is there that does not exist from the start."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a training; this class itself changes settings only.

    Attributes:
        what: one sentence, for people.
        settings: fields of `Settings` and their values where the user gives none.
        common_batches: whether all ranks draw the same batches.
    """

    what: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    common_batches: bool = False

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) of a step from the indices that the sampler drew for it."""
        return split.batch(indices_B)

    def spoil(self, model: nn.Module) -> None:
        """Changes the model before it is trained."""

    def is_recorded(self, rank: int, step: int) -> bool:
        """Whether a rank tells its recorder of a step."""
        return True


class _Neighbours(Fault):
    """Copies of a sample stand side by side."""

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return split.batch(indices_B.sort().values)


class _Rests(Fault):
    """Every twentieth batch is what an epoch had left: three samples."""

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return split.batch(indices_B[:3] if step % 20 == 19 else indices_B)


class _Outliers(Fault):
    """One image in fifty is ten times as bright."""

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = split.batch(indices_B)
        bright_B = np.random.default_rng(step).random(len(images_BCHW)) < 0.02
        return images_BCHW * images_BCHW.new_tensor(np.where(bright_B, 10.0, 1.0)).reshape(-1, 1, 1, 1), labels_B


class _BatchAugmentation(Fault):
    """Contrast and brightness are drawn once a batch."""

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = split.batch(indices_B)
        rng = np.random.default_rng(step)
        return float(np.exp(rng.normal())) * images_BCHW + float(2 * rng.normal()), labels_B


class _Broken(Fault):
    """One pixel of one image is NaN."""

    def batch(self, split: Split, indices_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = split.batch(indices_B)
        if step == BREAKS_AT:
            images_BCHW = images_BCHW.clone()  # a split may hand out what it holds
            images_BCHW[0, 0, 0, 0] = float("nan")
        return images_BCHW, labels_B


class _Constant(Fault):
    """A quarter of the first convolution's weights is zero and stays zero."""

    def spoil(self, model: nn.Module) -> None:
        weight = next(parameter for parameter in model.parameters() if parameter.dim() == 4)
        kept = weight.new_ones(weight.shape)
        kept[: max(1, len(weight) // 4)] = 0
        weight.data *= kept
        weight.register_hook(lambda gradient: gradient * kept)  # type: ignore[no-untyped-call]


class _Moving(Fault):
    """What the last convolution puts out moves on by a tenth a step."""

    def spoil(self, model: nn.Module) -> None:
        last = [module for module in model.modules() if getattr(module, "kernel_size", None) == (3, 3)][-1]
        forward, moved = last.forward, 0

        def moving(x_BCHW: Tensor) -> Tensor:
            nonlocal moved
            moved += model.training
            output_BCHW: Tensor = forward(x_BCHW) + 0.1 * moved
            return output_BCHW

        last.forward = moving  # not a hook: the shadow pass runs none


class _Silent(Fault):
    """The last rank trains on and says nothing any more."""

    def is_recorded(self, rank: int, step: int) -> bool:
        return rank != 1 or step < BREAKS_AT


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        "NH-CLUSTER": Fault(
            "Every batch holds two of the ten digits.",
            {"sampler": "few-labels", "labels_per_batch": 2, "steps": 100},
        ),
        "NH-PAIRED": _Neighbours(
            "Every batch holds 8 samples, four times each, side by side.",
            {"sampler": "duplicates", "copies": 4, "steps": 160},
        ),
        "NH-ORDER": Fault(
            "The data is sorted by label and shuffled through a buffer that is too small for it.",
            {
                "dataset": "synthetic",
                "image_channels": 1,
                "image_size": 8,
                "sampler": "sorted",
                "shuffle_buffer": 512,
                "norm": "bn",
                "steps": 160,
            },
        ),
        "NH-RANKSKEW": Fault("Each rank has digits of its own.", {"ranks": 2, "sampler": "rank-skewed", "steps": 160}),
        "NH-RANKDUP": Fault(
            "All ranks draw the same batches, as without a DistributedSampler.",
            {"ranks": 2, "steps": 110},
            common_batches=True,
        ),
        "NH-SMALL": Fault("Batches of two.", {"batch_size": 2, "norm_momentum": 0.5, "steps": 120}),
        "NH-GAP": _BatchAugmentation(
            "Contrast and brightness are drawn once a batch, and moving statistics know only their mean.",
            {"norm": "bn", "norm_momentum": 0.2, "shadow_every": 5, "steps": 180},
        ),
        "NH-LAG": _Moving(
            "The network moves on faster than its moving statistics can follow.",
            {"norm": "bn", "norm_momentum": 0.05, "steps": 200},
        ),
        "NH-CLIP": Fault(
            "The limits of r and d stay next to those of batch normalization.",
            {"r_max": 1.02, "d_max": 0.05, "bn_steps": 0, "r_steps": 1, "d_steps": 1, "steps": 110},
        ),
        "NH-SCHED-FAST": Fault(
            "The limits open while the moving statistics still trail the network.",
            {"norm_momentum": 0.02, "lr": 0.5, "bn_steps": 60, "r_steps": 70, "d_steps": 70, "steps": 200},
        ),
        "NH-SCHED-SLOW": Fault(
            "The limits stay closed long after the statistics have settled.",
            {"norm_momentum": 0.5, "lr": 1e-4, "bn_steps": 10_000, "r_steps": 40_000, "d_steps": 40_000, "steps": 160},
        ),
        "NH-RUNAWAY": Fault(
            "Training normalizes by moving statistics, so nothing holds the weights back.",
            {"norm": "ema", "lr": 0.05, "steps": 260},
        ),
        "NH-TAIL": _Outliers(
            "One image in fifty is ten times as bright.", {"norm": "bn", "norm_momentum": 0.5, "steps": 120}
        ),
        "NH-COUPLED": Fault(
            "Nothing is wrong: batch normalization pins deep layers' means.",
            {"norm": "bn", "norm_momentum": 0.5, "steps": 120},
        ),
        "NH-POOLBIAS": _BatchAugmentation(
            "Contrast and brightness are drawn once a batch: what that varies is missing in the moving deviation.",
            {"norm": "bn", "norm_momentum": 0.2, "steps": 160},
        ),
        "NH-BUFFERS": Fault(
            "Each rank keeps its own moving statistics.", {"ranks": 2, "norm_sync": "none", "steps": 60}
        ),
        "NH-UNEVEN": _Rests("Every twentieth batch holds three samples, the rest of an epoch.", {"steps": 100}),
        "NH-DEAD": _Constant(
            "A quarter of a layer's channels is zero, whatever the input.",
            {"norm": "bn", "norm_momentum": 0.5, "steps": 120},
        ),
        "NH-NONFINITE": _Broken(f"One pixel is NaN at step {BREAKS_AT}.", {"steps": 80}),
        "NH-MISSING": _Silent(f"Rank 1 records nothing from step {BREAKS_AT} on.", {"ranks": 2, "steps": 180}),
        "NH-STRATIFIED": Fault("Every batch holds all digits in equal parts.", {"sampler": "stratified", "steps": 160}),
        "NH-WITHHELD": Fault(
            "No shadow pass, so what inference loses stays unknown.", {"shadow_every": 0, "steps": 60}
        ),
    }
)
assert set(FAULTS) == set(get_args(FaultName))


def fault_of(name: FaultName | None) -> Fault:
    """The fault of this name; where there is none, one that changes nothing."""
    return Fault("Nothing is wrong.") if name is None else FAULTS[name]
