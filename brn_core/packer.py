"""From the layers' last forwards to rows of the wire schema: a few kernels and one copy, the rest on the host.

Training thread:    Packer.pack(all layers) -> Segments (flat device tensors)        ~20 small kernels for the model
                    Transfer.start(segments)    -> one copy a device, no host synchronisation
Background thread:  Transfer.ready(), arrays()  -> Block (numpy)
                    layer_columns(block, previous blocks) -> every METRICS column, pure
                    tables(rows)                -> Arrow tables of one batch

Shape suffixes: N samples, C channels of all layers in a group end to end, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from brn_core.functional import Observation
from brn_core.wire import METRICS, QUANTILES, TABLES

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

VECTORS: Final = ("mu_b", "sigma_b", "between_var", "scale_var", "adjacency", "mu", "sigma")
"""What travels per channel, in this order. Over the N samples of the batch, y_n the sample's mean over positions and
q_n its mean of (x - mu_B)²: between_var = unbiased variance of y_n (s²_y); scale_var = unbiased variance of q_n;
adjacency = sum_n (y_n+1 - y_n)² / (2 (N - 1))."""

LIMITS: Final = ("r_min", "r_max", "d_max")

DEAD_VARIANCE: Final = 100.0
"""A channel is dead where its batch variance is below this many eps."""


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


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Which part of a step a segment holds: these layers ran on one device with the same number of samples."""

    layers: tuple[int, ...]
    channels: tuple[int, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class ProbeGroup:
    """A segment with the input probe: mean, var, adjacency end to end."""

    samples: int


@dataclass(frozen=True, slots=True)
class ScalarGroup:
    """A segment with scalars: float64 values, their bytes seen as float32."""

    names: tuple[str, ...]


Key: TypeAlias = LayerGroup | ProbeGroup | ScalarGroup


class Segment(NamedTuple):
    """A flat float32 tensor on its device, and how to read it."""

    key: Key
    flat: Tensor


# --- in the training thread ---------------------------------------------------------------------------------------


class Packer:
    """Reduces what the layers left to a flat tensor for each group of layers.

    The work is done for all layers of a group at once, so the number of kernels does not grow with the network
    (beyond the inputs of the concatenations).

    Args:
        eps: of every layer, by index.
    """

    def __init__(self, eps: Sequence[float]) -> None:
        self._eps = tuple(eps)
        self._constants: dict[tuple[torch.device, LayerGroup], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def pack(self, taken: Mapping[int, Observation | BatchNormMoments]) -> list[Segment]:
        """The segments of one step.

        Args:
            taken: by layer index, what its last training forward left. Layers that did not run are absent.
        """
        groups: dict[tuple[torch.device, int, bool], list[int]] = {}
        for layer, sample in sorted(taken.items()):
            key = (sample.mean_NC.device, sample.mean_NC.shape[0], isinstance(sample, BatchNormMoments))
            groups.setdefault(key, []).append(layer)
        segments = []
        for (_, samples, _), layers in groups.items():
            if samples == 0:  # a rank may get an empty batch; there is nothing to say of it
                continue
            group = LayerGroup(tuple(layers), tuple(taken[i].mean_NC.shape[1] for i in layers), samples)
            moments = [m for i in layers if isinstance(m := taken[i], BatchNormMoments)]
            if moments:
                flat = self._pack_moments(group, moments)
            else:
                flat = _pack_observations([o for i in layers if isinstance(o := taken[i], Observation)])
            segments.append(Segment(group, flat))
        return segments

    def _pack_moments(self, group: LayerGroup, moments: list[BatchNormMoments]) -> Tensor:
        mean_NC, var_NC = _joined([(m.mean_NC, m.var_NC) for m in moments])
        eps_C, limits = self._constants_of(group, mean_NC.device)
        # every sample has the same number of positions, so the batch's moments are those of its samples, merged
        mu_b_C = mean_NC.mean(0)
        power_NC = (mean_NC - mu_b_C).square_()
        q_NC = power_NC if var_NC is None else power_NC + var_NC
        spread = _spread(mean_NC, power_NC, q_NC)
        sigma_b_C = (q_NC.mean(0) + eps_C).sqrt_()
        mu_C = torch.cat([m.running_mean_C for m in moments]).float()
        sigma_C = (torch.cat([m.running_var_C for m in moments]).float() + eps_C).sqrt_()
        return torch.cat([mu_b_C, sigma_b_C, *spread, mu_C, sigma_C, limits])

    def _constants_of(self, group: LayerGroup, device: torch.device) -> tuple[Tensor, Tensor]:
        """The eps of every channel, and the limits of plain batch normalization: made once, as a copy would wait."""
        key = (device, LayerGroup(group.layers, group.channels, 0))
        if key not in self._constants:
            eps_C = torch.tensor(
                [self._eps[i] for i, c in zip(group.layers, group.channels, strict=True) for _ in range(c)]
            )
            limits = torch.tensor((1.0, 1.0, 0.0)).repeat_interleave(len(group.layers))
            self._constants[key] = (eps_C.to(device, torch.float32), limits.to(device))
        return self._constants[key]


def _pack_observations(observations: list[Observation]) -> Tensor:
    mean_NC, var_NC = _joined([(o.mean_NC, o.var_NC) for o in observations])
    mu_b_C = torch.cat([o.mu_B for o in observations]).float()
    # mu_B may come from more samples than these (synchronized or virtual batches): the spread of y_n is about its own
    # mean, q_n is about mu_B
    power_NC = (mean_NC - mean_NC.mean(0)).square()
    q_NC = (mean_NC - mu_b_C).square()
    if var_NC is not None:
        q_NC = q_NC + var_NC
    return torch.cat(
        [
            mu_b_C,
            *[o.sigma_B.float() for o in observations],
            *_spread(mean_NC, power_NC, q_NC),
            *[o.mu.float() for o in observations],
            *[o.sigma.float() for o in observations],
            torch.stack([limit for name in LIMITS for limit in map(attrgetter(name), observations)]).float(),
        ]
    )


def _joined(pairs: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """All layers side by side, float32; var_NC is None where no layer has positions."""
    mean_NC = torch.cat([mean for mean, _ in pairs], dim=1).float()
    if all(var is None for _, var in pairs):
        return mean_NC, None
    return mean_NC, torch.cat([torch.zeros_like(m) if v is None else v for m, v in pairs], dim=1).float()


def _spread(mean_NC: Tensor, power_NC: Tensor, q_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    others = max(mean_NC.shape[0] - 1, 1)  # a single sample has no spread: the row's columns become null
    between_C = power_NC.sum(0) / others
    scale_C = (q_NC - q_NC.mean(0)).square_().sum(0) / others
    adjacency_C = (mean_NC[1:] - mean_NC[:-1]).square_().sum(0) / (2 * others)
    return between_C, scale_C, adjacency_C


class PinnedRing:
    """Page-locked host buffers for copies from one device, at most `buffers` in use at a time."""

    def __init__(self, buffers: int = 32) -> None:
        self._free: list[Tensor] = []
        self._unmade = buffers

    def take(self, size: int) -> Tensor | None:
        """A float32 buffer of at least `size` elements, or None where all are in use."""
        buffer = None
        try:
            buffer = self._free.pop()
        except IndexError:
            if self._unmade == 0:
                return None
            self._unmade -= 1
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, pin_memory=True)  # allocates: first steps only
        return buffer

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Transfer:
    """Segments of one step on their way to the host: one copy a device, and an event where the device runs ahead.

    Raises nothing where a ring is exhausted: `start` answers None and the step counts as dropped.
    """

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    @classmethod
    def start(cls, segments: Sequence[Segment], rings: dict[torch.device, PinnedRing]) -> Transfer | None:
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
            if buffer is None:
                cls(parts).release()
                return None
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


# --- in the background thread -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The per-channel statistics of the layers that ran in one step, on the host.

    Attributes:
        step: the step.
        layers: indices of the layers, (L,).
        starts: where each layer's channels begin in the vectors, (L + 1,); the last entry is the length C.
        samples: N of each layer, (L,).
        eps: of each layer, (L,).
        limits: r_min, r_max, d_max in force, (L,) each.
        vectors: VECTORS, (C,) each.
    """

    step: int
    layers: Ints
    starts: Ints
    samples: Ints
    eps: Floats
    limits: Mapping[str, Floats]
    vectors: Mapping[str, Floats]

    def of_layer(self, position: int, name: str) -> Floats:
        """One vector of the layer at `position` in `layers`."""
        return self.vectors[name][self.starts[position] : self.starts[position + 1]]


def block(step: int, arrays: Sequence[tuple[LayerGroup, NDArray[np.float32]]], eps: Sequence[float]) -> Block | None:
    """One block from the groups of a step; None where no layer ran."""
    if not arrays:
        return None
    parts: list[tuple[int, int, int, Floats, Floats]] = []  # layer, channels, samples, vectors (7, c), limits (3,)
    for group, flat in arrays:
        values = flat.astype(np.float64)
        width = sum(group.channels)
        vectors = values[: len(VECTORS) * width].reshape(len(VECTORS), width)
        limits = values[len(VECTORS) * width :].reshape(len(LIMITS), len(group.layers))
        if len(arrays) == 1:  # the usual case needs no taking apart
            return _block(step, group.layers, group.channels, [group.samples] * len(group.layers), eps, vectors, limits)
        edges = np.cumsum((0, *group.channels))
        for i, layer in enumerate(group.layers):
            part = vectors[:, edges[i] : edges[i + 1]]
            parts.append((layer, group.channels[i], group.samples, part, limits[:, i]))
    parts.sort(key=lambda part: part[0])
    layers, channels, samples, vectors_of, limits_of = zip(*parts, strict=True)
    return _block(step, layers, channels, samples, eps, np.concatenate(vectors_of, 1), np.stack(limits_of, 1))


def _block(
    step: int,
    layers: Sequence[int],
    channels: Sequence[int],
    samples: Sequence[int],
    eps: Sequence[float],
    vectors: Floats,
    limits: Floats,
) -> Block:
    return Block(
        step,
        np.asarray(layers, np.int64),
        np.cumsum((0, *channels)),
        np.asarray(samples, np.int64),
        np.asarray([eps[i] for i in layers], np.float64),
        dict(zip(LIMITS, limits, strict=True)),
        dict(zip(VECTORS, vectors, strict=True)),
    )


Columns: TypeAlias = dict[str, NDArray[np.float64]]


def layer_columns(
    now: Block, before: Block | None, before_that: Block | None
) -> tuple[Columns, dict[str, NDArray[np.bool_]]]:
    """Every column of the METRICS table for the layers of one step.

    Args:
        now: the step.
        before: the recorded step before it, None where there is none (or it was dropped): the difference columns of
            its layers are null then, as they are for a layer that did not run in it.
        before_that: the one before that.

    Returns:
        By column: the values, (L,) each; and by nullable column: where it is null.
    """
    starts, width = now.starts[:-1], np.diff(now.starts)
    vectors = now.vectors

    def mean(values_C: Floats) -> Floats:
        return np.asarray(np.add.reduceat(values_C, starts) / width)

    def spread(values_L: Floats) -> Floats:
        return np.repeat(values_L, width)

    with np.errstate(all="ignore"):  # NaN, infinities and zero divisors are data here
        mu_b, sigma_b, sigma = vectors["mu_b"], vectors["sigma_b"], vectors["sigma"]
        variance = sigma**2
        r = sigma_b / sigma
        d = (mu_b - vectors["mu"]) / sigma
        r_min, r_max, d_max = (spread(now.limits[name]) for name in LIMITS)
        samples = spread(now.samples.astype(np.float64))
        d_squared = mean(d**2)
        columns: Columns = {
            "samples": now.samples.astype(np.float64),
            "mu_b": mean(mu_b),
            "sigma_b": mean(sigma_b),
            "mu": mean(vectors["mu"]),
            "sigma": mean(sigma),
            **_quantiles("r", r, now.starts),
            **_quantiles("d", d, now.starts),
            **now.limits,
            # written so that NaN, which is within no limits, counts as clipped
            "clip_r": mean((~((r >= r_min) & (r <= r_max))).astype(np.float64)),
            "clip_d": mean((~(np.abs(d) <= d_max)).astype(np.float64)),
            "gap": mean((r - 1) ** 2) + d_squared,
            "residual": mean((r - np.clip(r, r_min, r_max)) ** 2 + (d - np.clip(d, -d_max, d_max)) ** 2),
            "d_squared": d_squared,
            "log_r": mean(np.log(r)),
            "mean_noise": mean(vectors["between_var"] / (samples * variance)),
            "scale_noise": mean(vectors["scale_var"] / (4 * samples * variance**2)),
            "adjacency_noise": mean(vectors["adjacency"] / (samples * variance)),
            "dead_channels": mean((sigma_b**2 < (DEAD_VARIANCE + 1) * spread(now.eps)).astype(np.float64)) * width,
            "nonfinite_channels": mean((~(np.isfinite(mu_b) & np.isfinite(sigma_b))).astype(np.float64)) * width,
        }
        mu_1, known_1 = _aligned(now, before, "mu_b")
        mu_2, known_2 = _aligned(now, before_that, "mu_b")
        log_0 = np.log(sigma_b)
        log_1, log_2 = (np.log(_aligned(now, other, "sigma_b")[0]) for other in (before, before_that))
        columns["mean_diff1"] = mean((mu_b - mu_1) ** 2 / (2 * variance))
        columns["mean_diff2"] = mean((mu_b - 2 * mu_1 + mu_2) ** 2 / (6 * variance))
        columns["scale_diff2"] = mean((log_0 - 2 * log_1 + log_2) ** 2 / 6)
    single = now.samples < 2
    nulls = {
        **dict.fromkeys(("mean_noise", "scale_noise", "adjacency_noise"), single),
        "mean_diff1": ~known_1,
        **dict.fromkeys(("mean_diff2", "scale_diff2"), ~(known_1 & known_2)),
    }
    return columns, nulls


def _quantiles(symbol: str, values_C: Floats, starts: Ints) -> Columns:
    """Percentiles over each layer's channels, linear between neighbours; NaN where a channel is NaN."""
    width = np.diff(starts)
    position = np.asarray(QUANTILES)[:, None] / 100 * (width - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, width - 1)
    weight = position - low
    ordered = np.empty_like(values_C)
    for a, b in pairwise(starts):
        ordered[a:b] = np.sort(values_C[a:b])
    below, above = ordered[starts[:-1] + low], ordered[starts[:-1] + high]
    # not below + weight * (above - below): that is NaN between equal infinities
    quantiles = np.where((weight == 0) | (below == above), below, (1 - weight) * below + weight * above)
    quantiles[:, np.isnan(ordered[starts[1:] - 1])] = np.nan  # NaN sorts last
    return {f"{symbol}_q{q:02d}": row for q, row in zip(QUANTILES, quantiles, strict=True)}


def _aligned(now: Block, other: Block | None, name: str) -> tuple[Floats, NDArray[np.bool_]]:
    """Another step's vector laid out as `now`'s, and which layers it knows (the rest is NaN)."""
    if other is not None and np.array_equal(now.layers, other.layers):
        return other.vectors[name], np.ones(len(now.layers), bool)
    aligned = np.full(now.starts[-1], np.nan)
    known = np.zeros(len(now.layers), bool)
    positions = {} if other is None else {int(layer): i for i, layer in enumerate(other.layers)}
    for i, layer in enumerate(now.layers):
        if other is not None and (position := positions.get(int(layer))) is not None:
            aligned[now.starts[i] : now.starts[i + 1]] = other.of_layer(position, name)
            known[i] = True
    return aligned, known


class ProbeRow(NamedTuple):
    """The input probe at one step; vectors of PROBE_FEATURES entries."""

    samples: int
    mean: NDArray[np.float32]
    var: NDArray[np.float32]
    adjacency: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of one recorded step. Everything but the step may be absent."""

    step: int
    layers: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: Columns = field(default_factory=dict)
    nulls: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    probe: ProbeRow | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    snapshot: Block | None = None


def tables(steps: Sequence[StepRows]) -> dict[str, pa.Table | pa.RecordBatch]:
    """The tables of one batch from the rows of its steps, ready for `wire.encode_batch`."""
    return {
        "layers": _layers_table([s for s in steps if len(s.layers)]),
        "probe": _probe_table([(s.step, s.probe) for s in steps if s.probe is not None]),
        "scalars": _scalars_table(steps),
        "channels": _channels_table([s.snapshot for s in steps if s.snapshot is not None]),
    }


def _layers_table(steps: Sequence[StepRows]) -> pa.RecordBatch:
    schema = TABLES["layers"]
    if not steps:
        return schema.empty_table()
    arrays = [
        pa.array(np.repeat([s.step for s in steps], [len(s.layers) for s in steps]), pa.uint64()),
        pa.array(np.concatenate([s.layers for s in steps]), pa.uint16()),
    ]
    with np.errstate(over="ignore"):  # beyond float32's range is infinite
        for metric in METRICS:
            values = np.concatenate([s.columns[metric.name] for s in steps]).astype(np.float32)
            mask = np.concatenate([s.nulls[metric.name] for s in steps]) if metric.nullable else None
            arrays.append(pa.array(values, pa.float32(), mask=mask, from_pandas=False))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _probe_table(rows: Sequence[tuple[int, ProbeRow]]) -> pa.RecordBatch:
    arrays = [pa.array([step for step, _ in rows], pa.uint64()), pa.array([r.samples for _, r in rows], pa.uint32())]
    arrays += [_lists([getattr(r, name) for _, r in rows]) for name in ("mean", "var", "adjacency")]
    return pa.RecordBatch.from_arrays(arrays, schema=TABLES["probe"])


def _scalars_table(steps: Sequence[StepRows]) -> pa.RecordBatch:
    rows = [(s.step, name, value) for s in steps for name, value in s.scalars.items()]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([step for step, _, _ in rows], pa.uint64()),
            pa.array([name for _, name, _ in rows], pa.string()),
            pa.array(np.asarray([value for _, _, value in rows], np.float64), pa.float64(), from_pandas=False),
        ],
        schema=TABLES["scalars"],
    )


def _channels_table(blocks: Sequence[Block]) -> pa.RecordBatch:
    steps: list[int] = []
    layers: list[int] = []
    vectors: dict[str, list[NDArray[np.float32]]] = {}
    for now in blocks:
        with np.errstate(all="ignore"):
            full = {
                **now.vectors,
                "r": now.vectors["sigma_b"] / now.vectors["sigma"],
                "d": (now.vectors["mu_b"] - now.vectors["mu"]) / now.vectors["sigma"],
            }
            cut = {name: full[name].astype(np.float32) for name in TABLES["channels"].names[2:]}
        for i, layer in enumerate(now.layers):
            steps.append(now.step)
            layers.append(int(layer))
            for name, vector in cut.items():
                # the unbiased variance of one sample is not 0 but undefined
                part = vector[now.starts[i] : now.starts[i + 1]]
                undefined = name == "between_var" and now.samples[i] < 2
                vectors.setdefault(name, []).append(np.full_like(part, math.nan) if undefined else part)
    names = TABLES["channels"].names[2:]
    arrays = [pa.array(steps, pa.uint64()), pa.array(layers, pa.uint16())]
    arrays += [_lists(vectors.get(name, [])) for name in names]
    return pa.RecordBatch.from_arrays(arrays, schema=TABLES["channels"])


def _lists(vectors: Sequence[NDArray[np.float32]]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, vectors)]).astype(np.int32)
    values = np.concatenate(vectors) if vectors else np.zeros(0, np.float32)
    item = pa.field("item", pa.float32(), nullable=False)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values, pa.float32(), from_pandas=False), type=pa.list_(item)
    )
