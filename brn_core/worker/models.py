"""Networks to train, with the normalization as a parameter.

Shapes: N samples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from brn_core.layers import BatchRenorm2d

Norm: TypeAlias = Callable[[int], nn.Module]
"""Makes the normalization layer of a map with so many channels."""


def norm_factory(kind: Literal["bn", "brn"], momentum: float) -> Norm:
    """The factory of a normalization layer; `momentum` is the weight of the new batch in the moving statistics."""
    if kind == "bn":
        return partial(nn.BatchNorm2d, momentum=momentum)
    # "ema": each rank normalizes its own batch, and the loop averages the moving statistics over the ranks
    return partial(BatchRenorm2d, momentum=momentum, sync="ema")


class SmallConvNet(nn.Module):
    """conv16-N-ReLU, conv32-N-ReLU-max pool, conv32-N-ReLU, mean over positions, linear: (N, C, H, W) -> (N, K).

    Big enough to read 8x8 digits (99 %), small enough to train in seconds on one core. Convolutions are 3x3 with
    padding and without bias (the normalization after each brings its own).

    Args:
        channels: C of the images; H and W may be any number >= 2.
        classes: K.
        norm: makes the normalization layers.
    """

    def __init__(self, channels: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm1 = norm(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = norm(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm3 = norm(32)
        self.head = nn.Linear(32, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x_NCHW)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x)))
        logits_NK: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits_NK
