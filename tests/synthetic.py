"""Synthetic runs and rows of the wire schema, for tests of the service and the dashboard."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from brn_core import wire


def run_record(run_id: str, layers: int = 3, channels: int = 4, **changes: Any) -> wire.RunCreate:
    """What a trainer would say of a run with some layers."""
    return wire.RunCreate(
        id=run_id,
        name=changes.pop("name", "a run"),
        layers=tuple(
            wire.Layer(index=i, name=f"block{i}.bn", kind="BatchRenorm", channels=channels, eps=1e-5, momentum=0.01)
            for i in range(layers)
        ),
        **changes,
    )


def layer_rows(steps: Any, layers: int, **columns: Any) -> pa.Table:
    """Rows of the table `layers`, step by step; a column given is broadcast to (T, L), the rest is plausible noise."""
    steps_T = np.asarray(steps, dtype=np.uint64)
    T = len(steps_T)
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {
        "step": np.repeat(steps_T, layers),
        "layer": np.tile(np.arange(layers, dtype=np.uint16), T),
    }
    for metric in wire.METRICS:
        if metric.name in columns:
            values = np.broadcast_to(np.asarray(columns.pop(metric.name), dtype=np.float32), (T, layers)).ravel()
        elif metric.name in ("dead_channels", "nonfinite_channels"):
            values = np.zeros(T * layers, dtype=np.float32)
        else:
            values = (1.0 if metric.neutral is None else metric.neutral) + 0.01 * rng.standard_normal(
                T * layers
            ).astype(np.float32)
        made[metric.name] = values
    assert not columns, f"no such columns: {sorted(columns)}"
    schema = wire.TABLES["layers"]
    return pa.Table.from_arrays([pa.array(made[field.name], field.type) for field in schema], schema=schema)


def probe_rows(steps: Any, samples: int = 32, seed: int = 0) -> pa.Table:
    """Rows of the table `probe` as i.i.d. batches would give them."""
    steps_T = np.asarray(steps, dtype=np.uint64)
    rng = np.random.default_rng(seed)
    shape = (len(steps_T), wire.PROBE_FEATURES)
    mean = rng.standard_normal(shape) / np.sqrt(samples)
    var = rng.chisquare(samples - 1, shape) / (samples - 1)
    adjacency = rng.chisquare(samples - 1, shape) / (samples - 1)
    columns = [steps_T, np.full(len(steps_T), samples, np.uint32), list(mean), list(var), list(adjacency)]
    schema = wire.TABLES["probe"]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def scalar_rows(values: dict[str, list[tuple[int, float]]]) -> pa.Table:
    """Rows of the table `scalars` from (step, value) pairs by name."""
    rows = [{"step": step, "name": name, "value": value} for name, pairs in values.items() for step, value in pairs]
    return pa.Table.from_pylist(rows, schema=wire.TABLES["scalars"])


def clustered_tables() -> dict[str, pa.Table]:
    """200 steps of one rank: batches of 32 whose means vary as those of 4 independent samples do."""
    steps = range(200)
    probe = probe_rows(steps, samples=4)
    samples = pa.array([32] * len(steps), pa.uint32())
    return {
        "probe": probe.set_column(1, probe.schema.field("samples"), samples),
        "layers": layer_rows(steps, 3),
        "scalars": scalar_rows({"loss": [(step, 1.0) for step in steps]}),
    }


def create(client: httpx.Client, record: wire.RunCreate) -> httpx.Response:
    """Posts a run."""
    return client.post("/v1/runs", content=record.model_dump_json(), headers={"content-type": "application/json"})


def send(
    client: httpx.Client, run_id: str, tables: dict[str, pa.Table], *, rank: int = 0, seq: int = 1
) -> httpx.Response:
    """Posts one Arrow batch."""
    return client.post(
        f"/v1/runs/{run_id}/batches",
        params={"rank": rank, "seq": seq},
        content=wire.encode_batch(tables),
        headers={"content-type": wire.MEDIA_TYPE},
    )


def write_run(
    client: httpx.Client, run_id: str, *, layers: int = 3, steps: int = 20, ranks: int = 1, **columns: Any
) -> wire.RunCreate:
    """Writes a run with rows of `layers`, `probe` and the scalar `loss` at steps 1 to `steps` through the real ingest.

    A column is what broadcasts to (steps, layers), for example `gap=np.nan`.
    """
    record = run_record(run_id, layers, world_size=ranks)
    create(client, record).raise_for_status()
    numbers = np.arange(1, steps + 1)
    for rank in range(ranks):
        tables = {
            "layers": layer_rows(numbers, layers, **columns),
            "probe": probe_rows(numbers, seed=rank),
            "scalars": scalar_rows({"loss": [(int(step), 1.0 / step) for step in numbers]}),
        }
        send(client, run_id, tables, rank=rank).raise_for_status()
    return record
