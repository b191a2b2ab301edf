"""The input probe: fixed random features of the model's input, the one signal of the data that training cannot move.

Layers drift while they learn, and under batch normalization deep layers follow the batch; the raw input does neither.
So whether batches are independent draws is asked of it: 8 linear features and 16 rectified ones, the same for all ranks
and runs. Shape suffixes: N samples, C channels, F features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brn_core.capture import Segment
from brn_core.packer import ProbeGroup
from brn_core.wire import PROBE_FEATURES

LINEAR_FEATURES: Final = 8
_RECTIFIED_FEATURES: Final = PROBE_FEATURES - LINEAR_FEATURES
_SEED: Final = 20170330
_GRID: Final = {2: 16, 3: 8}
"""About how many positions a side of an image or volume are looked at: bounds the cost on large inputs."""
_DENSE: Final = 64
"""Positions of a sequence that are all looked at; of as many that follow, every second one, and so on."""
_LONGEST_SEQUENCE: Final = 2**20
_POSITIONS: Final = _DENSE + _DENSE // 2 * (_LONGEST_SEQUENCE // _DENSE).bit_length() - _DENSE // 2
_LONGEST_VECTOR: Final = 4096
_KERNEL: Final = 3
_BUCKETS: Final = 4096
_EMBEDDING: Final = 16
_HASH: Final = 2654435761  # Knuth's multiplicative hash, 2^32 / golden ratio


class InputProbe:
    """Maps a batch of inputs to the statistics of its probe features.

    Inputs: vectors (N, D), sequences (N, C, T), images (N, C, H, W), volumes (N, C, D, H, W); integers of shape (N,)
    or (N, T) are tokens and go through a fixed random embedding. The weights are made for the first input; inputs of
    another size in space give comparable features, inputs of another kind or number of channels give none.

    A sequence's features are sums over its own positions, the same however long the batch was padded for the longest
    of it: repeats of the last position count as padding. (Images are stretched to the first one's grid, padding and
    all.)

    Never draws from a global generator. Large inputs are looked at on a coarse grid.
    """

    def __init__(self) -> None:
        self._kind: tuple[int, int] | None = None  # spatial dimensions, channels
        self._grid: tuple[int, ...] = ()
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._embedding: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def measure(self, inputs: object) -> Segment | None:
        """Mean, unbiased variance and adjacency of each feature over the samples of a batch.

        Args:
            inputs: what the model is called with; its first tensor is taken, in order, through tuples and mappings.

        Returns:
            A segment of 3 x PROBE_FEATURES numbers (see wire.TABLES["probe"]); None for no tensor, an empty batch or
            an input unlike the first. Of a single sample, variance and adjacency are NaN.
        """
        x = first_tensor(inputs)
        if x is None or x.dim() == 0 or x.numel() == 0 or x.is_complex():
            return None
        with torch.autocast(x.device.type, enabled=False):
            y_NF = self.features(x.detach())
            if y_NF is None:
                return None
            samples = y_NF.shape[0]
            mean_F = y_NF.mean(0)
            var_F = (y_NF - mean_F).square_().sum(0) / (samples - 1)
            adjacency_F = (y_NF[1:] - y_NF[:-1]).square_().sum(0) / (2 * (samples - 1))
            return Segment(ProbeGroup(samples), torch.cat([mean_F, var_F, adjacency_F]))

    def features(self, x: Tensor) -> Tensor | None:
        """The features y of shape (N, PROBE_FEATURES), float32; None for an input unlike the first."""
        x = self._dense(x)
        spatial = x.dim() - 2
        if self._kind is None:
            self._build(x)
        if self._kind != (spatial, x.shape[1]):
            return None
        linear_w, rectified_w = self._weights_on(x.device)
        if spatial == 0:
            return torch.cat([x @ linear_w, F.relu(x @ rectified_w)], dim=1)
        if spatial == 1:
            return _of_sequences(x, linear_w, rectified_w)
        stride = _stride(tuple(x.shape[2:]))
        coarse = x[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
        if tuple(coarse.shape[2:]) != self._grid:
            coarse = _POOL[spatial](coarse, self._grid)
        linear_NF = coarse.flatten(1) @ linear_w
        rectified = F.relu(_CONVOLUTION[spatial](x, rectified_w, stride=stride, padding=1))
        return torch.cat([linear_NF, rectified.flatten(2).mean(2)], dim=1)

    def _dense(self, x: Tensor) -> Tensor:
        """A float32 tensor of shape (N, C, *space) with at most three spatial dimensions, or (N, C)."""
        if not x.is_floating_point() and x.dim() <= 2 and x.dtype != torch.bool:
            if x.device not in self._embedding:
                self._embedding[x.device] = _normal((_BUCKETS, _EMBEDDING), seed=_SEED + 1).to(x.device)
            index = (x.long() * _HASH).bitwise_right_shift(8).remainder(_BUCKETS)
            embedded = self._embedding[x.device][index]
            return embedded if x.dim() == 1 else embedded.transpose(1, 2)
        x = x.float()
        if x.dim() == 1:
            return x[:, None]
        if x.dim() > 5:
            x = x.flatten(1)
        if x.dim() == 2 and x.shape[1] > _LONGEST_VECTOR:
            x = x[:, :: math.ceil(x.shape[1] / _LONGEST_VECTOR)]
        return x

    def _build(self, x: Tensor) -> None:
        spatial, channels = x.dim() - 2, x.shape[1]
        self._kind = (spatial, channels)
        if spatial == 1:
            self._grid = (_POSITIONS,)  # not those of the first batch: ranks see others first
        else:
            stride = _stride(tuple(x.shape[2:]))
            self._grid = tuple(math.ceil(size / s) for size, s in zip(x.shape[2:], stride, strict=True))
        inputs = channels * math.prod(self._grid)
        linear_w = _normal((inputs, LINEAR_FEATURES), seed=_SEED) / math.sqrt(inputs)
        taps = channels * _KERNEL**spatial
        shape = (
            (channels, _RECTIFIED_FEATURES) if spatial == 0 else (_RECTIFIED_FEATURES, channels, *(_KERNEL,) * spatial)
        )
        self._weights = {torch.device("cpu"): (linear_w, _normal(shape, seed=_SEED + 2) / math.sqrt(taps))}

    def _weights_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._weights:
            linear_w, rectified_w = self._weights[torch.device("cpu")]
            self._weights[device] = (linear_w.to(device), rectified_w.to(device))
        return self._weights[device]


def first_tensor(value: object) -> Tensor | None:
    """The first tensor of nested tuples, lists and mappings, depth first; None where there is none."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def model_inputs(model: nn.Module, kwargs: Mapping[str, object]) -> dict[str, object]:
    """The keyword arguments in the order of the model's signature (a loader may give labels first), without labels."""
    order = {name: place for place, name in enumerate(inspect.signature(model.forward).parameters)}
    names = sorted(kwargs, key=lambda name: order.get(name, len(order)))
    return {name: kwargs[name] for name in names if not name.startswith("label")}


def _of_sequences(x_NCT: Tensor, linear_w: Tensor, rectified_w: Tensor) -> Tensor:
    """Features of sequences; a sample's do not depend on what it was batched with.

    So nothing is a mean over the batch's T or stretched to it, and the positions looked at, thinning out to the end
    (0, 1, ..., 63, 64, 66, ..., 126, 128, 132, ...), are the same for every T.
    """
    last_NC1 = x_NCT[:, :, -1:]
    begin, step, parts = _DENSE, 2, [x_NCT[:, :, :_DENSE]]
    while begin < min(x_NCT.shape[2], _LONGEST_SEQUENCE):
        parts.append(x_NCT[:, :, begin : 2 * begin : step])
        begin, step = 2 * begin, 2 * step
    coarse_NCP = torch.cat(parts, dim=2)
    repeats_NP = (coarse_NCP == last_NC1).all(1).int().flip(1).cumprod(1).flip(1).bool()
    # the first of the repeats stays: it may be the sample's own end
    padding_N1P = F.pad(repeats_NP[:, :-1], (1, 0)).logical_and_(repeats_NP)[:, None]
    coarse_NCP = coarse_NCP.masked_fill(padding_N1P, 0)
    positions = coarse_NCP.shape[2]
    linear_w = linear_w.reshape(-1, _POSITIONS, LINEAR_FEATURES)[:, :positions].reshape(-1, LINEAR_FEATURES)
    rectified_NFP = F.relu(F.conv1d(coarse_NCP, rectified_w, padding=1)).masked_fill(padding_N1P, 0)
    return torch.cat([coarse_NCP.flatten(1) @ linear_w, rectified_NFP.sum(2) / _DENSE], dim=1)


def _stride(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(side / _GRID[len(size)]) for side in size)


def _normal(shape: tuple[int, ...], *, seed: int) -> Tensor:
    # drawn on the CPU, so that every device and rank has the same numbers
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


_POOL: Final[dict[int, Callable[..., Tensor]]] = {
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_CONVOLUTION = {2: F.conv2d, 3: F.conv3d}
