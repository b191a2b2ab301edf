"""What the service answers: one pydantic model a response body.

Numbers in answers follow one rule: *missing* is null; NaN and the infinities are the strings "NaN", "Infinity" and
"-Infinity" (JSON has no such numbers, and a diverging run must not look like a gap).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, WithJsonSchema

from brn_core.wire import METRICS, Layer, RunCreate, RunStatus
from service.diagnosis.finding import Diagnosis, Verdict, Warned

DIGITS: Final = 6
"""Significant digits of numbers in JSON: a float32 has 7, a plot shows 3. Arrow and exports have all of them."""

_NUMBER: Final = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}, {"type": "null"}]}


def rounded(values: list[float | None]) -> list[float | None]:
    """Numbers with `DIGITS` significant digits, the shortest text of each; None, NaN and infinities stay."""
    with np.errstate(all="ignore"):
        given = np.array(values, dtype=np.float64)  # None is NaN here
        places = DIGITS - 1 - np.floor(np.log10(np.abs(given)))
        # Both ways exact: a whole number times or divided by a power of ten that float64 holds exactly.
        power = 10.0 ** np.abs(places)
        found = np.where(places >= 0, np.rint(given * power) / power, np.rint(given / power) * power)
    plain = ~np.isfinite(given) | (given == 0)
    found = np.where(plain, given, found)
    short: list[float | None] = found.tolist()
    for i in np.flatnonzero(~plain & ~(np.abs(places) <= 22)):
        short[i] = float(f"{given[i]:.{DIGITS}g}")
    if None in values:
        short = [None if value is None else number for value, number in zip(values, short, strict=True)]
    return short


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


Number = Annotated[
    float | None,
    PlainSerializer(_rounded, return_type=float | None, when_used="json"),
    WithJsonSchema(_NUMBER, mode="serialization"),
]
Numbers = Annotated[
    list[float | None],
    PlainSerializer(rounded, return_type=list[float | None], when_used="json"),
    WithJsonSchema({"type": "array", "items": _NUMBER}, mode="serialization"),
]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


RunState = Literal["running", "stalled", "crashed", "finished", "failed"]


class Run(RunCreate):
    """A run as the service knows it."""

    status: RunStatus = Field(description="What the run said last of itself.")
    state: RunState = Field(
        description="The status; a run that says it is running but is silent is `stalled` after a minute and "
        "`crashed` after half an hour. Its next rows revive it."
    )
    created_at: datetime
    updated_at: datetime = Field(description="When the last batch or change arrived.")
    last_step: int | None = Field(description="Newest step stored; null before the first row.")
    rows: int = Field(description="Rows stored of the `layers` table.")
    verdict: Verdict = Field(description="The verdict that was last computed.")


class Runs(_Answer):
    """A page of the list of runs."""

    runs: list[Run]
    total: int = Field(description="Runs that fit, on all pages.")
    next: str | None = Field(description="`cursor` of the page after this one; null on the last.")


class Layers(_Answer):
    layers: list[Layer]


class Statistic(_Answer):
    """One entry of the METRICS table, as `GET /v1/statistics` gives it."""

    name: str
    label: str
    group: str
    meaning: str
    neutral: float | None
    nullable: bool


class Statistics(_Answer):
    statistics: list[Statistic]


class LayerSummary(_Answer):
    layer: int
    name: str
    step: int = Field(description="Newest step stored of this layer.")
    values: dict[str, Number] = Field(description="Every statistic at that step, mean over ranks.")


class Summary(_Answer):
    run: str
    last_step: int | None
    layers: list[LayerSummary]

    def table(self) -> pa.Table:
        """One row a layer, one column a statistic."""
        schema = pa.schema(
            {"layer": pa.uint16(), "name": pa.string(), "step": pa.uint64()}
            | {metric.name: pa.float64() for metric in METRICS}
        )
        rows = [{"layer": own.layer, "name": own.name, "step": own.step} | own.values for own in self.layers]
        return pa.Table.from_pylist(rows, schema=schema)


class Buckets(_Answer):
    """A down-sampled statistic: parallel to the answer's `steps`; null where a bucket has no row."""

    min: Numbers
    mean: Numbers
    max: Numbers


class Series(_Answer):
    """Statistics over steps. A bucket covers `bucket_steps` steps and is named by the newest step in it."""

    run: str
    layer: int | None = Field(description="Null: over all layers.")
    rank: int | None = Field(description="Null: over all ranks.")
    bucket_steps: int
    steps: list[int]
    series: dict[str, Buckets]

    def table(self) -> pa.Table:
        """One row a step; columns `<stat>_min`, `<stat>_mean`, `<stat>_max`."""
        return pa.table({"step": pa.array(self.steps, pa.uint64())} | dict(_bucket_columns(self.series)))


def _bucket_columns(series: dict[str, Buckets]) -> Iterator[tuple[str, pa.Array]]:
    for stat, buckets in series.items():
        for part in ("min", "mean", "max"):
            yield f"{stat}_{part}", pa.array(getattr(buckets, part), pa.float64())


class Heatmap(_Answer):
    """One statistic, layers x steps: `values[i][j]` belongs to `layers[i]` at `steps[j]`, mean over ranks, bucket."""

    run: str
    stat: str
    rank: int | None
    bucket_steps: int
    steps: list[int]
    layers: list[str]
    values: list[Numbers]

    def table(self) -> pa.Table:
        """One row a step, one column a layer."""
        columns = {str(i): pa.array(row, pa.float64()) for i, row in enumerate(self.values)}
        return pa.table({"step": pa.array(self.steps, pa.uint64())} | columns)


class ScalarSeries(_Answer):
    steps: list[int]
    min: Numbers
    mean: Numbers
    max: Numbers


class Scalars(_Answer):
    """User scalars over steps, mean over ranks; each name has its own steps."""

    run: str
    names: list[str] = Field(description="All names stored for this run.")
    bucket_steps: int
    series: dict[str, ScalarSeries]

    def table(self) -> pa.Table:
        """One row a name and step."""
        series = self.series.values()
        names = [name for name, own in self.series.items() for _ in own.steps]
        columns = {"name": pa.array(names, pa.string())}
        columns["step"] = pa.array([step for own in series for step in own.steps], pa.uint64())
        for part in ("min", "mean", "max"):
            columns[part] = pa.array([value for own in series for value in getattr(own, part)], pa.float64())
        return pa.table(columns)


class Probe(_Answer):
    """The input probe over steps, mean over bucket and ranks. `mean[f][t]` is feature f at `steps[t]`; so are the rest.

    Over the samples n of a batch, y_n a feature: `mean` of y_n, `var` the unbiased variance of y_n, `adjacency` =
    sum_n (y_n+1 - y_n)² / (2 (N - 1)), which is `var` on average where the order in a batch says nothing.
    """

    run: str
    rank: int | None
    bucket_steps: int
    steps: list[int]
    samples: Numbers = Field(description="Samples in the batch of a rank.")
    mean: list[Numbers]
    var: list[Numbers]
    adjacency: list[Numbers]
    windows: list[ProbeWindow] = Field(
        description="What the rules make of windows of 100 recorded steps, the newest last; of all ranks together."
    )

    def table(self) -> pa.Table:
        """One row a step; vectors as lists of features."""
        columns = {"step": pa.array(self.steps, pa.uint64()), "samples": pa.array(self.samples, pa.float64())}
        for name in ("mean", "var", "adjacency"):
            features: list[list[float | None]] = getattr(self, name)
            columns[name] = pa.array(list(zip(*features, strict=True)), pa.list_(pa.float64()))
        return pa.table(columns)


class ProbeWindow(_Answer):
    """Ratios of a window; 1 is what batches of independent samples give. Null where too few rows are there."""

    first_step: int
    last_step: int
    between: Number = Field(description="F: variance between batch means over the sampling noise; above 1: clustered.")
    within: Number = Field(description="A: variance between neighbours in a batch over the batch's; below 1: paired.")
    order: Number = Field(description="O: von Neumann's ratio of the batch means; below 1: ordered.")


class RankHealth(_Answer):
    """What a rank has sent. Null: nothing (it is missing)."""

    rank: int
    last_step: int | None
    behind_steps: int | None = Field(description="Steps that the newest rank is ahead.")
    received_at: datetime | None = Field(description="When its newest batch arrived.")
    step_time_seconds: Number = Field(description="Mean time between two of its steps, as it measured it.")


class Outlier(_Answer):
    """The rank that stands apart from the others in most layers."""

    rank: int
    distance: Number = Field(description="Median over layers of its distance from the median rank.")
    others: Number = Field(description="The same of the rank in the middle of the others.")


class Ranks(_Answer):
    """How far ranks differ, by layer. Distances are in sigma_B (for mu_B) and in ln sigma_B; null: no rows."""

    run: str
    from_step: int
    to_step: int
    world_size: int
    layers: list[str]
    mu_spread: Numbers = Field(description="Standard deviation over ranks of mu_B, in sigma_B.")
    sigma_spread: Numbers = Field(description="Standard deviation over ranks of ln sigma_B.")
    farthest_rank: list[int | None] = Field(description="The rank farthest from the median rank; null: all alike.")
    farthest_distance: Numbers
    outlier: Outlier | None = Field(description="Null: no rank stands apart, or there are fewer than three.")
    ranks: list[RankHealth]

    def table(self) -> pa.Table:
        """One row a layer."""
        return pa.table(
            {
                "layer": pa.array(self.layers, pa.string()),
                "mu_spread": pa.array(self.mu_spread, pa.float64()),
                "sigma_spread": pa.array(self.sigma_spread, pa.float64()),
                "farthest_rank": pa.array(self.farthest_rank, pa.uint32()),
                "farthest_distance": pa.array(self.farthest_distance, pa.float64()),
            }
        )


class Channel(_Answer):
    layer: int
    name: str
    channel: int
    r: Number
    d: Number
    gap: Number = Field(description="(r - 1)² + d²")


class Channels(_Answer):
    """One snapshot of one rank. `values` has the channels of the layer asked for, null where none was."""

    run: str
    layer: int | None
    rank: int | None
    steps: list[int] = Field(description="Steps of all snapshots.")
    step: int | None = Field(description="The snapshot shown; null: there is none.")
    values: dict[str, Numbers] | None
    worst: list[Channel]

    def table(self) -> pa.Table:
        """One row a channel of the layer; without a layer one row a worst channel."""
        if self.values is not None:
            return pa.table({name: pa.array(values, pa.float64()) for name, values in self.values.items()})
        schema = pa.schema(
            {
                "layer": pa.uint16(),
                "name": pa.string(),
                "channel": pa.uint32(),
                "r": pa.float64(),
                "d": pa.float64(),
                "gap": pa.float64(),
            }
        )
        return pa.Table.from_pylist([channel.model_dump() for channel in self.worst], schema=schema)


class ExactClipping(_Answer):
    """Share of channels that the limits clip, counted channel by channel in snapshots."""

    steps: list[int]
    clip_r: Numbers
    clip_d: Numbers


class ScheduleFit(_Answer):
    """Arguments of a RenormSchedule."""

    bn_steps: int
    r_steps: int
    d_steps: int
    r_max: float
    d_max: float


class WhatIf(_Answer):
    """Clip rates that other limits would have given; null where a bucket has no row without NaN."""

    run: str
    layer: int | None
    rank: int | None
    r_max: float
    d_max: float
    rate: float
    bucket_steps: int
    sampled_every: int = Field(description="1: from every recorded step; else from one in so many.")
    steps: list[int]
    clip_r: Numbers
    clip_d: Numbers
    tightest_r_max: Numbers = Field(description="The smallest r_max that clips at most `rate` of the channels.")
    tightest_d_max: Numbers
    schedule: ScheduleFit | None = Field(
        description="The tightest schedule whose limits are nowhere below those; null: none is, or nothing to go by."
    )
    exact: ExactClipping

    def table(self) -> pa.Table:
        """One row a step."""
        names = ("clip_r", "clip_d", "tightest_r_max", "tightest_d_max")
        columns = {name: pa.array(getattr(self, name), pa.float64()) for name in names}
        return pa.table({"step": pa.array(self.steps, pa.uint64())} | columns)


class ComparedRun(_Answer):
    run: str
    name: str
    verdict: Verdict | None = Field(description="The verdict that was last computed.")
    bucket_steps: int
    total_steps: int | None = Field(description="Planned steps, else the newest; what a fraction is of.")
    x: Numbers = Field(description="Steps, or fractions of the total.")
    steps: list[int]
    series: dict[str, Buckets]


class Comparison(_Answer):
    """Runs on one axis. Lists in `config` and `final` have one entry a run, in the order of `runs`."""

    by: Literal["step", "fraction"]
    runs: list[ComparedRun]
    config: dict[str, list[JsonValue]] = Field(description="Settings in which the runs differ; null: not set.")
    final: dict[str, Numbers] = Field(description="Scalars at the newest step of each run; null: it has none.")

    def table(self) -> pa.Table:
        """One row a run and step."""
        parts = [
            pa.table(
                {
                    "run": pa.array([own.run] * len(own.steps), pa.string()),
                    "x": pa.array(own.x, pa.float64()),
                    "step": pa.array(own.steps, pa.uint64()),
                }
                | dict(_bucket_columns(own.series))
            )
            for own in self.runs
        ]
        return pa.concat_tables(parts)


class Accepted(_Answer):
    """The acknowledgement of a batch: it is durable."""

    rows: int
    duplicate: bool = Field(description="True where this (run, rank, seq) was stored before: nothing was added.")
    verdict: Verdict
    findings: tuple[Warned, ...] = Field(
        description="Every warning of the newest diagnosis, worst first; empty until this process has made one."
    )


class Problem(_Answer):
    """An error, RFC 9457 (`application/problem+json`)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = None


class Health(_Answer):
    status: Literal["ok"]
    version: str


Findings = Diagnosis
"""The answer of `GET /v1/runs/{run}/findings`."""
