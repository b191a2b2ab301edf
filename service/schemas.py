"""What the service answers: one pydantic model a response body.

Numbers in answers follow one rule: *missing* is null; NaN and the infinities are the strings "NaN", "Infinity" and
"-Infinity" (JSON has no such numbers, and a diverging run must not look like a gap).
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from brn_core.wire import Layer, RunCreate, RunStatus
from service.diagnosis.finding import Diagnosis, Verdict


def _json_number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


Number = Annotated[float | None, PlainSerializer(_json_number, return_type=float | str | None, when_used="json")]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Run(RunCreate):
    """A run as the service knows it."""

    status: RunStatus
    created_at: datetime
    updated_at: datetime = Field(description="When the last batch or change arrived.")
    last_step: int | None = Field(description="Newest step stored; null before the first row.")
    rows: int = Field(description="Rows stored of the `layers` table.")
    verdict: Verdict = Field(description="The verdict that was last computed.")


class Runs(_Answer):
    runs: list[Run]


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


class Buckets(_Answer):
    """A down-sampled statistic: parallel to the answer's `steps`; null where a bucket has no row."""

    min: list[Number]
    mean: list[Number]
    max: list[Number]


class Series(_Answer):
    """Statistics over steps. A bucket covers `bucket_steps` steps and is named by the newest step in it."""

    run: str
    layer: int | None = Field(description="Null: over all layers.")
    rank: int | None = Field(description="Null: over all ranks.")
    bucket_steps: int
    steps: list[int]
    series: dict[str, Buckets]


class Heatmap(_Answer):
    """One statistic, layers x steps: `values[i][j]` belongs to `layers[i]` at `steps[j]`, mean over ranks, bucket."""

    run: str
    stat: str
    rank: int | None
    bucket_steps: int
    steps: list[int]
    layers: list[str]
    values: list[list[Number]]


class ScalarSeries(_Answer):
    steps: list[int]
    min: list[Number]
    mean: list[Number]
    max: list[Number]


class Scalars(_Answer):
    """User scalars over steps, mean over ranks; each name has its own steps."""

    run: str
    names: list[str] = Field(description="All names stored for this run.")
    bucket_steps: int
    series: dict[str, ScalarSeries]


class Accepted(_Answer):
    """The acknowledgement of a batch: it is durable."""

    rows: int
    duplicate: bool = Field(description="True where this (run, rank, seq) was stored before: nothing was added.")
    verdict: Verdict


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
