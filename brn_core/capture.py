"""What the layers left, on its way to the host: a few kernels for the whole model, one copy, no synchronisation.

    pack(samples of all layers) -> Segments (flat device tensors)       ~20 kernels, however many layers there are
    Transfer.start(segments)    -> one copy a device, without waiting for it
    Transfer.ready(), arrays()  -> numpy arrays, for `packer.block`

Shape suffixes: N samples, C channels of all layers in a group end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brn_core.functional import Observation
from brn_core.packer import LIMITS, Key, LayerGroup, Row


class BatchNormMoments(NamedTuple):
    """What is taken of a BatchNorm layer before a training forward (a BatchRenorm layer gives an Observation).

    Attributes:
        mean_NC: mean over positions of each sample.
        var_NC: biased variance over positions of each sample; None for (N, C) inputs.
        running_mean_C: moving mean before the step's update, a copy.
        running_var_C: moving variance before the step's update, a copy.
    """

    mean_NC: Tensor
    var_NC: Tensor | None
    running_mean_C: Tensor
    running_var_C: Tensor


class Moving(NamedTuple):
    """Copies of a layer's moving statistics, made when the model's forward began.

    Attributes:
        mean_C, var_C: the copies.
        mean, var: what they are copies of.
        versions: of the two, as autograd counts what is written in place.
    """

    mean_C: Tensor
    var_C: Tensor
    mean: Tensor
    var: Tensor
    versions: tuple[int, int]

    def still(self, mean: Tensor, var: Tensor) -> bool:
        """Whether these are the layer's statistics, and hold what was copied."""
        return self.mean is mean and self.var is var and self.versions == (mean._version, var._version)


def copies_of_moving(layers: Mapping[int, Mapping[str, Tensor | None]]) -> dict[int, Moving]:
    """The moving statistics of all layers in one copy a device: as two copies a layer they would be half the kernels
    of recording it.

    Args:
        layers: by index, each layer's buffers.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor, Tensor]]] = {}
    for index, buffers in layers.items():
        mean, var = buffers["running_mean"], buffers["running_var"]
        assert mean is not None
        assert var is not None
        by_device.setdefault(mean.device, []).append((index, mean, var))
    made: dict[int, Moving] = {}
    for members in by_device.values():
        flat = [tensor for _, *both in members for tensor in both]
        copies = torch.cat(flat).split_with_sizes([tensor.numel() for tensor in flat])
        for (index, mean, var), mean_C, var_C in zip(members, copies[::2], copies[1::2], strict=True):
            made[index] = Moving(mean_C, var_C, mean, var, (mean._version, var._version))
    return made


Taken: TypeAlias = Observation | BatchNormMoments
"""What one layer's last training forward left."""


class Segment(NamedTuple):
    """A flat float32 tensor on its device, and how to read it."""

    key: Key
    flat: Tensor


def host_bytes(taken: Mapping[int, Taken]) -> int | None:
    """About how much memory is held by what was taken; None where some of it is on another device.

    The two tables of the samples outweigh everything else. Each attribute costs, and training waits for this.
    """
    size = 0
    for sample in taken.values():
        table = sample.mean_NC
        if not table.is_cpu:
            return None
        size += table.nbytes
    return 2 * size


@torch.no_grad()
def pack(steps: Mapping[int, Mapping[int, Taken]]) -> list[Segment]:
    """Reduce what the layers left to a flat tensor for each group of layers alike.

    The work is done for all layers of a group at once, so the number of kernels does not grow with the network
    (beyond the inputs of the concatenations).

    Args:
        steps: by step and layer index, what the layer's last training forward left. Layers that did not run are
            absent.
    """
    groups: dict[tuple[torch.device, int, type[Taken]], list[tuple[Row, Taken]]] = {}
    for step, taken in steps.items():
        for layer, sample in taken.items():
            alike = (sample.mean_NC.device, sample.mean_NC.shape[0], type(sample))
            groups.setdefault(alike, []).append((Row(step, layer), sample))
    segments = []
    for (_, samples, kind), members in groups.items():
        if samples == 0:  # a rank may get an empty batch; there is nothing to say of it
            continue
        rows = tuple(row for row, _ in members)
        channels = tuple(sample.mean_NC.shape[1] for _, sample in members)
        group = LayerGroup(rows, channels, samples, batch_norm=kind is BatchNormMoments)
        moments = [sample for _, sample in members if isinstance(sample, BatchNormMoments)]
        observations = [sample for _, sample in members if isinstance(sample, Observation)]
        segments.append(Segment(group, _pack_moments(moments) if moments else _pack_observations(observations)))
    return segments


def _pack_moments(moments: list[BatchNormMoments]) -> Tensor:
    mean_NC, var_NC = _joined(moments)
    # every sample has the same number of positions, so the batch's moments are those of its samples, merged
    mu_b_C = mean_NC.mean(0)
    power_NC = (mean_NC - mu_b_C).square_()
    q_NC = power_NC if var_NC is None else power_NC + var_NC
    var_b_C = q_NC.mean(0)
    spread = _spread(mean_NC, power_NC, q_NC, var_b_C)
    running = [m.running_mean_C for m in moments] + [m.running_var_C for m in moments]
    return torch.cat([mu_b_C, var_b_C, *spread, *_floats(running)])


def _pack_observations(observations: list[Observation]) -> Tensor:
    mean_NC, var_NC = _joined(observations)
    mu_b_C = torch.cat([o.mu_B for o in observations]).float()
    # mu_B may come from more samples than these (synchronized or virtual batches): the spread of y_n is about its own
    # mean, q_n is about mu_B
    power_NC = (mean_NC - mean_NC.mean(0)).square_()
    q_NC = (mean_NC - mu_b_C).square_()
    if var_NC is not None:
        q_NC += var_NC
    spread = _spread(mean_NC, power_NC, q_NC, q_NC.mean(0))
    moving = [getattr(o, name) for name in ("mu", "sigma") for o in observations]
    limits = torch.stack([limit for name in LIMITS for limit in map(attrgetter(name), observations)]).float()
    return torch.cat([mu_b_C, *_floats([o.sigma_B for o in observations]), *spread, *_floats(moving), limits])


def _joined(samples: Sequence[Taken]) -> tuple[Tensor, Tensor | None]:
    """All layers side by side, float32; var_NC is None where no layer has positions."""
    mean_NC = torch.cat([s.mean_NC for s in samples], dim=1).float()
    if all(s.var_NC is None for s in samples):
        return mean_NC, None
    return mean_NC, torch.cat(
        [torch.zeros_like(s.mean_NC) if s.var_NC is None else s.var_NC for s in samples], 1
    ).float()


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.float32 else t.float() for t in tensors]


def _spread(mean_NC: Tensor, power_NC: Tensor, q_NC: Tensor, mean_q_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """between_var, scale_var and adjacency (see packer.VECTORS). Overwrites q_NC."""
    others = max(mean_NC.shape[0] - 1, 1)  # a single sample has no spread: the row's columns become null
    between_C = power_NC.sum(0) / others
    scale_C = q_NC.sub_(mean_q_C).square_().sum(0) / others
    adjacency_C = (mean_NC[1:] - mean_NC[:-1]).square_().sum(0) / (2 * others)
    return between_C, scale_C, adjacency_C


class PinnedRing:
    """Page-locked host buffers for copies from one device - one a step under way, which `reducer` bounds."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A float32 buffer of at least `size` elements."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = None
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, pin_memory=True)  # allocates: first steps only
        return buffer

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Transfer:
    """Segments of one step on their way to the host: one copy a device, and an event where the device runs ahead."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    @classmethod
    def start(cls, segments: Sequence[Segment], rings: dict[torch.device, PinnedRing]) -> Transfer:
        if len(segments) == 1 and segments[0].flat.is_cpu:  # most often on a CPU; training waits for this
            only = segments[0]
            return cls([_Part([(only.key, only.flat.numel())], only.flat, None, None)])
        by_device: dict[torch.device, list[Segment]] = {}
        for segment in segments:
            by_device.setdefault(segment.flat.device, []).append(segment)
        parts: list[_Part] = []
        for device, group in by_device.items():
            flat = group[0].flat if len(group) == 1 else torch.cat([s.flat for s in group])
            keys = [(s.key, s.flat.numel()) for s in group]
            if device.type != "cuda":
                # a CPU tensor is there already; other accelerators have no pinned copy: this line waits for them
                parts.append(_Part(keys, flat.cpu(), None, None))
                continue
            ring = rings.setdefault(device, PinnedRing())
            buffer = ring.take(flat.numel())
            buffer[: flat.numel()].copy_(flat, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            parts.append(_Part(keys, buffer, event, ring))
        return cls(parts)

    @property
    def size_bytes(self) -> int:
        return sum(4 * size for part in self._parts for _, size in part.keys)

    def release(self) -> None:
        """Give the pinned buffers back unread; a copy still under way goes before the next one into them."""
        for part in self._parts:
            part.release()

    def ready(self) -> bool:
        """Whether every copy has arrived. Does not wait."""
        return all(p.event is None or p.event.query() for p in self._parts)  # type: ignore[no-untyped-call]

    def arrays(self) -> list[tuple[Key, NDArray[np.float32]]]:
        """The segments on the host, once `ready`; gives the pinned buffers back."""
        arrays: list[tuple[Key, NDArray[np.float32]]] = []
        for part in self._parts:
            host = part.host.numpy()
            start = 0
            for key, size in part.keys:
                view = host[start : start + size]
                arrays.append((key, view if part.ring is None else view.copy()))
                start += size
        self.release()
        return arrays


class _Part(NamedTuple):
    keys: list[tuple[Key, int]]
    host: Tensor
    event: torch.cuda.Event | None
    ring: PinnedRing | None

    def release(self) -> None:
        if self.ring is not None:
            self.ring.give(self.host)
