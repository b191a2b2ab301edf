"""From the layers' per-channel statistics to rows of the wire schema: numpy, off the training thread.

    block(arrays of `capture`)        -> Block: the vectors of all layers and steps at hand, end to end
    layer_columns(block, those before) -> every METRICS column, pure
    tables(rows of steps)              -> Arrow tables of one batch

Several steps are worked on at once: the work of numpy then outweighs the work around it, small networks included.
Shape suffixes: R rows (a layer at a step), C channels of all rows end to end, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brn_core.wire import METRICS, PROBE_FEATURES, QUANTILES, TABLES

Floats: TypeAlias = NDArray[np.float64]
Singles: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]

VECTORS: Final = ("mu_b", "sigma_b", "between_var", "scale_var", "adjacency", "mu", "sigma")
"""What is known of each channel, in this order. Over the N samples of the batch, y_n the sample's mean over positions
and q_n its mean of (x - mu_B)²: between_var = unbiased variance of y_n (s²_y); scale_var = unbiased variance of q_n;
adjacency = sum_n (y_n+1 - y_n)² / (2 (N - 1))."""

LIMITS: Final = ("r_min", "r_max", "d_max")
_BATCH_NORM_LIMITS: Final = (1.0, 1.0, 0.0)

DEAD_VARIANCE: Final = 100.0
"""A channel is dead where its batch variance is below this many eps."""

_NULLABLE: Final = tuple(metric.name for metric in METRICS if metric.nullable)
_SNAPSHOT: Final = tuple(TABLES["channels"].names[2:])


class Row(NamedTuple):
    """One layer at one step."""

    step: int
    layer: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """How to read an array of layers that normalized the same number of samples.

    Attributes:
        rows: the layers, one after the other in every vector.
        channels: of each.
        samples: N.
        batch_norm: whether variances (without eps) stand where VECTORS has standard deviations, and no limits follow.
    """

    rows: tuple[Row, ...]
    channels: tuple[int, ...]
    samples: int
    batch_norm: bool


@dataclass(frozen=True, slots=True)
class ProbeGroup:
    """An array with the input probe: mean, var, adjacency end to end."""

    samples: int


@dataclass(frozen=True, slots=True)
class ScalarGroup:
    """An array with scalars: float64 values, their bytes seen as float32."""

    names: tuple[str, ...]


Key: TypeAlias = LayerGroup | ProbeGroup | ScalarGroup


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The per-channel statistics of the layers that ran in some steps, in the order of (step, layer).

    Attributes:
        steps: the step of each row, (R,).
        layers: the layer of each row, (R,).
        starts: where each row's channels begin in the vectors, (R + 1,); the last entry is the length C.
        samples: N of each row, (R,).
        eps: of each row, (R,).
        limits: LIMITS in force, (R,) each.
        vectors: VECTORS, (C,) each.
    """

    steps: Ints
    layers: Ints
    starts: Ints
    samples: Ints
    eps: Floats
    limits: Mapping[str, Floats]
    vectors: Mapping[str, Floats]

    def span(self, step: int) -> slice:
        """The rows of a step."""
        first, last = np.searchsorted(self.steps, (step, step + 1))
        return slice(int(first), int(last))

    def since(self, step: int) -> Block:
        """The rows of `step` and later."""
        first = int(np.searchsorted(self.steps, step))
        if first == 0:
            return self
        edge = self.starts[first]
        return Block(
            self.steps[first:],
            self.layers[first:],
            self.starts[first:] - edge,
            self.samples[first:],
            self.eps[first:],
            {name: values[first:] for name, values in self.limits.items()},
            {name: values[edge:].copy() for name, values in self.vectors.items()},
        )


def block(arrays: Sequence[tuple[LayerGroup, Singles]], eps: Sequence[float]) -> Block | None:
    """One block from the arrays of some steps; None where no layer ran.

    Args:
        arrays: what `capture` brought to the host, in any order.
        eps: of every layer, by index.
    """
    if not arrays:
        return None
    vectors, limits = zip(*(_read(group, flat, eps) for group, flat in arrays), strict=True)
    groups = [group for group, _ in arrays]
    steps, layers = np.array([row for group in groups for row in group.rows], np.int64).T
    return _in_order(
        steps,
        layers,
        np.array([c for group in groups for c in group.channels], np.int64),
        np.repeat([group.samples for group in groups], [len(group.rows) for group in groups]),
        np.array(eps, np.float64)[layers],
        limits[0] if len(groups) == 1 else np.concatenate(limits, 1),
        vectors[0] if len(groups) == 1 else np.concatenate(vectors, 1),
    )


def _read(group: LayerGroup, flat: Singles, eps: Sequence[float]) -> tuple[Floats, Floats]:
    """Vectors (7, C) and limits (3, R) of one group."""
    width = sum(group.channels)
    vectors = flat[: len(VECTORS) * width].astype(np.float64).reshape(len(VECTORS), width)
    if not group.batch_norm:
        return vectors, flat[len(VECTORS) * width :].astype(np.float64).reshape(len(LIMITS), len(group.rows))
    eps_C = np.repeat([eps[row.layer] for row in group.rows], group.channels)
    with np.errstate(invalid="ignore"):
        for name in ("sigma_b", "sigma"):
            variance = vectors[VECTORS.index(name)]
            np.sqrt(variance + eps_C, out=variance)
    return vectors, np.repeat(np.array(_BATCH_NORM_LIMITS)[:, None], len(group.rows), axis=1)


def _in_order(
    steps: Ints, layers: Ints, width: Ints, samples: Ints, eps: Floats, limits: Floats, vectors: Floats
) -> Block:
    starts = np.cumsum(width) - width
    order = np.lexsort((layers, steps))
    if (order[1:] < order[:-1]).any():
        steps, layers, samples, eps, limits = steps[order], layers[order], samples[order], eps[order], limits[:, order]
        vectors = vectors[:, _channels(starts[order], width[order])]
        width = width[order]
    return Block(
        steps,
        layers,
        np.concatenate(([0], np.cumsum(width))),
        samples,
        eps,
        dict(zip(LIMITS, limits, strict=True)),
        dict(zip(VECTORS, vectors, strict=True)),
    )


def _channels(starts: Ints, width: Ints) -> Ints:
    """The indices start, start + 1, ... of each row, end to end."""
    ends = np.cumsum(width)
    return np.repeat(starts - (ends - width), width) + np.arange(ends[-1])


Columns: TypeAlias = dict[str, Floats]


def layer_columns(now: Block, every: int, past: Sequence[Block]) -> tuple[Columns, dict[str, Flags]]:
    """Every column of the METRICS table.

    Args:
        now: the rows.
        every: steps between recorded steps. The difference columns compare a row with the same layer at the one and
            the two recorded steps before it; they are null where it did not run then, or the step is not known.
        past: what was recorded before `now`, oldest first; two recorded steps suffice.

    Returns:
        By column: the values, (R,) each; and by nullable column: where it is null.
    """
    starts, width = now.starts[:-1], np.diff(now.starts)
    vectors = now.vectors

    def mean(values_C: NDArray[np.generic]) -> Floats:
        return np.asarray(np.add.reduceat(values_C, starts, dtype=np.float64) / width)

    def spread(values_R: Floats) -> Floats:
        return np.repeat(values_R, width)

    with np.errstate(all="ignore"):  # NaN, infinities and zero divisors are data here
        mu_b, sigma_b, sigma = vectors["mu_b"], vectors["sigma_b"], vectors["sigma"]
        variance = sigma**2
        r = sigma_b / sigma
        d = (mu_b - vectors["mu"]) / sigma
        r_min, r_max, d_max = (spread(now.limits[name]) for name in LIMITS)
        samples = now.samples.astype(np.float64)
        d_squared = mean(d**2)
        columns: Columns = {
            "samples": samples,
            "mu_b": mean(mu_b),
            "sigma_b": mean(sigma_b),
            "mu": mean(vectors["mu"]),
            "sigma": mean(sigma),
            **_quantiles("r", r, now.starts),
            **_quantiles("d", d, now.starts),
            **now.limits,
            # written so that NaN, which is within no limits, counts as clipped
            "clip_r": mean(~((r >= r_min) & (r <= r_max))),
            "clip_d": mean(~(np.abs(d) <= d_max)),
            "gap": mean((r - 1) ** 2) + d_squared,
            "residual": mean((r - np.clip(r, r_min, r_max)) ** 2 + (d - np.clip(d, -d_max, d_max)) ** 2),
            "d_squared": d_squared,
            "log_r": mean(np.log(r)),
            "mean_noise": mean(vectors["between_var"] / variance) / samples,
            "scale_noise": mean(vectors["scale_var"] / variance**2) / (4 * samples),
            "adjacency_noise": mean(vectors["adjacency"] / variance) / samples,
            "dead_channels": mean(sigma_b**2 < (DEAD_VARIANCE + 1) * spread(now.eps)) * width,
            "nonfinite_channels": mean(~(np.isfinite(mu_b) & np.isfinite(sigma_b))) * width,
        }
        history = _History.of((*past, now))
        (mu_1, log_sigma_1), known_1 = history.earlier(now, every)
        (mu_2, log_sigma_2), known_2 = history.earlier(now, 2 * every)
        columns["mean_diff1"] = mean((mu_b - mu_1) ** 2 / variance) / 2
        columns["mean_diff2"] = mean((mu_b - 2 * mu_1 + mu_2) ** 2 / variance) / 6
        columns["scale_diff2"] = mean((np.log(sigma_b) - 2 * log_sigma_1 + log_sigma_2) ** 2) / 6
    single = now.samples < 2
    nulls = {
        **dict.fromkeys(("mean_noise", "scale_noise", "adjacency_noise"), single),
        "mean_diff1": ~known_1,
        **dict.fromkeys(("mean_diff2", "scale_diff2"), ~(known_1 & known_2)),
    }
    return columns, nulls


def _quantiles(symbol: str, values_C: Floats, starts: Ints) -> Columns:
    """Percentiles over each row's channels, linear between neighbours; NaN where a channel is NaN."""
    width = np.diff(starts)
    position = np.asarray(QUANTILES)[:, None] / 100 * (width - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, width - 1)
    weight = position - low
    ordered = values_C.copy()
    for a, b in pairwise(starts.tolist()):
        ordered[a:b].sort()
    below, above = ordered[starts[:-1] + low], ordered[starts[:-1] + high]
    # not below + weight * (above - below): that is NaN between equal infinities
    quantiles = np.where((weight == 0) | (below == above), below, (1 - weight) * below + weight * above)
    quantiles[:, np.isnan(ordered[starts[1:] - 1])] = np.nan  # NaN sorts last
    return {f"{symbol}_q{q:02d}": row for q, row in zip(QUANTILES, quantiles, strict=True)}


class _History(NamedTuple):
    """mu_B and ln sigma_B of several blocks, oldest first: rows by ascending key, channels end to end."""

    keys: Ints
    starts: Ints
    mu_b: Floats
    log_sigma_b: Floats

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> _History:
        return cls(
            np.concatenate([_keys(b.steps, b.layers) for b in blocks]),
            np.cumsum([0, *(width for b in blocks for width in np.diff(b.starts).tolist())]),
            np.concatenate([b.vectors["mu_b"] for b in blocks]),
            np.log(np.concatenate([b.vectors["sigma_b"] for b in blocks])),
        )

    def earlier(self, now: Block, steps: int) -> tuple[tuple[Floats, Floats], Flags]:
        """Both vectors so many steps earlier, laid out as `now`'s (NaN where not known), and which rows are known."""
        wanted = _keys(now.steps - steps, now.layers)
        found = np.searchsorted(self.keys, wanted)  # never the end: the row itself has a larger key
        known = self.keys[found] == wanted
        if known.all() and found[-1] - found[0] == len(found) - 1:  # as usual, one run of rows: no need to gather
            run = slice(self.starts[found[0]], self.starts[found[-1] + 1])
            return (self.mu_b[run], self.log_sigma_b[run]), known
        width = np.diff(now.starts)
        unknown = ~np.repeat(known, width)
        index = _channels(self.starts[found], width)
        index[unknown] = 0
        mu, log_sigma = self.mu_b[index], self.log_sigma_b[index]
        mu[unknown] = log_sigma[unknown] = np.nan
        return (mu, log_sigma), known


def _keys(steps: Ints, layers: Ints) -> Ints:
    return steps * 2**16 + layers  # the wire has 16 bits for a layer


class ProbeRow(NamedTuple):
    """The input probe at one step; vectors of PROBE_FEATURES entries."""

    samples: int
    mean: Singles
    var: Singles
    adjacency: Singles


class Snapshot(NamedTuple):
    """Every channel of the layers of one step: vectors (7, C) in the order of the `channels` table's columns."""

    layers: Ints
    starts: Ints
    vectors: Singles


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of one recorded step. Everything but the step may be absent.

    Attributes:
        step: the step.
        layers: which layers have a row, (R,).
        values: METRICS in their order, (M, R).
        nulls: where the nullable ones of METRICS are null, one row each.
        probe: the input's.
        scalars: by name.
        snapshot: every channel, where it was asked for.
    """

    step: int
    layers: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    values: Singles = field(default_factory=lambda: np.zeros((len(METRICS), 0), np.float32))
    nulls: Flags = field(default_factory=lambda: np.zeros((len(_NULLABLE), 0), np.bool_))
    probe: ProbeRow | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        size = 1024 + self.values.nbytes + self.nulls.nbytes + 128 * len(self.scalars)
        return size if self.snapshot is None else size + self.snapshot.vectors.nbytes


class LayerRows(NamedTuple):
    """The columns of a block as the wire has them; `StepRows` takes its share of them."""

    values: Singles
    nulls: Flags

    @classmethod
    def of(cls, columns: Columns, nulls: Mapping[str, Flags]) -> LayerRows:
        with np.errstate(over="ignore"):  # beyond float32's range is infinite
            values = np.stack([columns[metric.name] for metric in METRICS]).astype(np.float32)
        return cls(values, np.stack([nulls[name] for name in _NULLABLE]))


def snapshot(now: Block, rows: slice) -> Snapshot:
    """Every channel of some rows."""
    starts = now.starts[rows.start : rows.stop + 1]
    part = {name: values[starts[0] : starts[-1]] for name, values in now.vectors.items()}
    with np.errstate(all="ignore"):
        part["r"] = part["sigma_b"] / part["sigma"]
        part["d"] = (part["mu_b"] - part["mu"]) / part["sigma"]
        vectors = np.stack([part[name] for name in _SNAPSHOT]).astype(np.float32)
    # the unbiased variance of one sample is not 0 but undefined
    vectors[_SNAPSHOT.index("between_var"), np.repeat(now.samples[rows] < 2, np.diff(starts))] = math.nan
    return Snapshot(now.layers[rows], starts - starts[0], vectors)


def tables(steps: Sequence[StepRows]) -> dict[str, pa.Table | pa.RecordBatch]:
    """The tables of one batch from the rows of its steps, ready for `wire.encode_batch`."""
    return {
        "layers": _layers_table([s for s in steps if len(s.layers)]),
        "probe": _probe_table([(s.step, s.probe) for s in steps if s.probe is not None]),
        "scalars": _scalars_table(steps),
        "channels": _channels_table([(s.step, s.snapshot) for s in steps if s.snapshot is not None]),
    }


def _layers_table(steps: Sequence[StepRows]) -> pa.RecordBatch:
    schema = TABLES["layers"]
    if not steps:
        return schema.empty_table()
    values = np.concatenate([s.values for s in steps], axis=1)
    nulls = dict(zip(_NULLABLE, np.concatenate([s.nulls for s in steps], axis=1), strict=True))
    arrays = [
        pa.array(np.repeat([s.step for s in steps], [len(s.layers) for s in steps]), pa.uint64()),
        pa.array(np.concatenate([s.layers for s in steps]), pa.uint16()),
    ]
    arrays += [
        pa.array(column, pa.float32(), mask=nulls.get(metric.name), from_pandas=False)
        for metric, column in zip(METRICS, values, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _probe_table(rows: Sequence[tuple[int, ProbeRow]]) -> pa.RecordBatch:
    arrays = [pa.array([step for step, _ in rows], pa.uint64()), pa.array([r.samples for _, r in rows], pa.uint32())]
    offsets = np.arange(len(rows) + 1) * PROBE_FEATURES
    for name in ("mean", "var", "adjacency"):
        arrays.append(_lists(np.concatenate([np.zeros(0, np.float32), *(getattr(r, name) for _, r in rows)]), offsets))
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


def _channels_table(snapshots: Sequence[tuple[int, Snapshot]]) -> pa.RecordBatch:
    layers = [now.layers for _, now in snapshots]
    lengths = [np.diff(now.starts) for _, now in snapshots]
    empty = [np.zeros((len(_SNAPSHOT), 0), np.float32)]
    vectors = np.concatenate([*empty, *(now.vectors for _, now in snapshots)], axis=1)
    offsets = np.concatenate(([0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))))
    arrays = [
        pa.array([step for step, now in snapshots for _ in now.layers], pa.uint64()),
        pa.array(np.concatenate([np.zeros(0, np.int64), *layers]), pa.uint16()),
    ]
    arrays += [_lists(vector, offsets) for vector in vectors]
    return pa.RecordBatch.from_arrays(arrays, schema=TABLES["channels"])


def _lists(values: Singles, offsets: Ints) -> pa.Array:
    item = pa.field("item", pa.float32(), nullable=False)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.float32(), from_pandas=False), type=pa.list_(item)
    )
