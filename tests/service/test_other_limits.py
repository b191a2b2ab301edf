"""What the pages ask beyond REST: a whole schedule tried on a run, and channels over snapshots."""

from __future__ import annotations

import httpx
import numpy as np
import pyarrow as pa
import pytest
import synthetic as made

from brn_core import wire
from brn_core.schedule import RenormSchedule
from service import answers
from service.answers.what_if import limits
from service.store import Store

SPREAD = {f"r_q{q:02d}": np.exp(z) for q, z in zip(wire.QUANTILES, (-0.9, -0.6, -0.3, 0, 0.3, 0.6, 0.9), strict=True)}
SPREAD |= {f"d_q{q:02d}": z for q, z in zip(wire.QUANTILES, (-3.0, -2.0, -0.8, 0, 0.8, 2.0, 3.0), strict=True)}


def test_limits_that_are_open_all_along_clip_what_constant_ones_do(
    client: httpx.Client, run_id: str, store: Store
) -> None:
    made.write_run(client, run_id, steps=20, **SPREAD)
    constant = answers.schedule(store, run_id, r_max=1.5, d_max=1.0, points=20)
    planned = wire.Schedule(bn_steps=0, r_steps=0, d_steps=0, r_max=1.5, d_max=1.0)
    recorded = answers.recorded(store, run_id, points=20)
    assert recorded.steps_B.tolist() == constant.steps
    assert recorded.clip_rates(planned) == (constant.clip_r, constant.clip_d)
    assert 0.1 < (constant.clip_r[0] or 0) < 0.5


def test_a_shut_limit_clips_nothing_and_an_opening_one_less_and_less(
    client: httpx.Client, run_id: str, store: Store
) -> None:
    made.write_run(client, run_id, steps=20, **SPREAD)
    planned = wire.Schedule(bn_steps=5, r_steps=15, d_steps=10, r_max=3.0, d_max=5.0)
    clip_r, clip_d = answers.recorded(store, run_id, points=20).clip_rates(planned)
    assert clip_r[:5] == clip_d[:5] == [None] * 5
    shares = [share for share in clip_r[5:] if share is not None]
    assert len(shares) == 15
    assert shares == sorted(shares, reverse=True)
    assert clip_r[-1] == pytest.approx(0, abs=1e-9)


def test_limits_are_those_of_the_schedule_that_trains() -> None:

    planned = wire.Schedule(bn_steps=5, r_steps=15, d_steps=5, r_max=3.0, d_max=5.0)
    expected = [RenormSchedule(5, 15, 5, 3.0, 5.0).limits(step) for step in range(20)]
    assert list(zip(*(found.tolist() for found in limits(planned, np.arange(20))), strict=True)) == expected


def test_history_has_each_snapshot_as_the_route_gives_it(client: httpx.Client, run_id: str, store: Store) -> None:
    made.write_run(client, run_id, layers=2, steps=3)
    vectors = [name for name in wire.TABLES["channels"].names if name not in ("step", "layer")]
    rows = [
        {"step": step, "layer": layer} | {name: [step + layer, 1.0, float("nan"), -2.0] for name in vectors}
        for step in (1, 3)
        for layer in (0, 1)
    ]
    made.send(client, run_id, {"channels": pa.Table.from_pylist(rows, wire.TABLES["channels"])}, seq=2)
    found = answers.history(store, run_id, 1)
    assert found.steps == [1, 3]
    for at, step in enumerate(found.steps):
        values = answers.channels(store, run_id, layer=1, step=step).values
        assert values is not None
        np.testing.assert_array_equal(found.r_CT[:, at], values["r"])
        np.testing.assert_array_equal(found.d_CT[:, at], values["d"])


def test_a_layer_without_snapshots_has_an_empty_history(client: httpx.Client, run_id: str, store: Store) -> None:
    made.write_run(client, run_id)
    assert answers.history(store, run_id, 0).steps == []
