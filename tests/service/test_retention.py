from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
from synthetic import create, layer_rows, probe_rows, run_record, scalar_rows, send

from service import removal, retention
from service.settings import Settings
from service.store import Store

NOW = datetime.now(UTC)


def steps(store: Store, table: str, run_id: str) -> list[int]:
    sql = f"SELECT DISTINCT step FROM {table} WHERE run_id = {{r:String}} ORDER BY step"
    found: list[int] = store.rows(sql, r=run_id).column("step").to_pylist()
    return found


def written(
    client: httpx.Client, run_id: str, count: int = 30, *, every: int = 1, first: int = 1, **changes: object
) -> None:
    create(client, run_record(run_id, layers=1, **changes)).raise_for_status()
    numbers = first + every * np.arange(count)
    bad = np.zeros((count, 1))
    bad[6] = 1.0  # step 7
    tables = {
        "layers": layer_rows(numbers, 1, nonfinite_channels=bad),
        "probe": probe_rows(numbers),
        "scalars": scalar_rows({"loss": [(int(step), 1.0) for step in numbers]}),
    }
    send(client, run_id, tables).raise_for_status()


def test_runs_to_which_nothing_came_are_deleted_and_those_tagged_keep_are_not(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    written(client, f"{run_id}-old")
    written(client, f"{run_id}-kept", tags=("keep",))
    settings = Settings(keep_days=7)
    retention.apply(store, settings, NOW + timedelta(days=6))
    assert store.record(f"{run_id}-old") is not None
    retention.apply(store, settings, NOW + timedelta(days=8))
    assert store.record(f"{run_id}-old") is None
    assert steps(store, "layers", f"{run_id}-old") == []
    assert len(steps(store, "layers", f"{run_id}-kept")) == 30


def test_old_steps_are_thinned_out_but_for_the_newest_and_those_that_went_wrong(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "WHOLE_STEPS", 5)
    written(client, run_id)
    written(client, f"{run_id}-kept", tags=("keep",))
    settings = Settings(thin_days=7, thin_every=10)
    retention.apply(store, settings, NOW + timedelta(days=6))
    assert len(steps(store, "layers", run_id)) == 30
    retention.apply(store, settings, NOW + timedelta(days=8))
    left = steps(store, "probe", run_id)
    assert left[-5:] == [26, 27, 28, 29, 30]
    assert len(left) < 15
    assert steps(store, "layers", run_id) == sorted({7, *left})
    assert len(steps(store, "scalars", run_id)) == 30
    assert len(steps(store, "layers", f"{run_id}-kept")) == 30


def test_steps_are_thinned_out_once_and_again_for_another_setting(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "WHOLE_STEPS", 5)
    written(client, run_id)
    later = NOW + timedelta(days=8)
    assert store.thin(run_id, later, 10) == 25
    assert store.thin(run_id, later, 10) is None
    by_ten = set(steps(store, "layers", run_id))
    assert store.thin(run_id, later, 20) == 25
    by_twenty = set(steps(store, "layers", run_id))
    assert {7, 26, 27, 28, 29, 30} <= by_twenty <= by_ten


@pytest.mark.parametrize(("every", "first"), [(10, 1), (10, 10), (2, 1), (1, 0)])
def test_one_in_ten_recorded_steps_is_kept_whichever_steps_were_recorded(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch, every: int, first: int
) -> None:
    monkeypatch.setattr(removal, "WHOLE_STEPS", 5)
    written(client, run_id, count=1005, every=every, first=first)
    assert store.thin(run_id, NOW + timedelta(days=8), 10) is not None
    assert 70 <= len(steps(store, "probe", run_id)) - 5 <= 130, "100 expected, with a standard deviation of 9.5"


def test_without_settings_nothing_is_removed(client: httpx.Client, store: Store, run_id: str) -> None:
    written(client, run_id)
    retention.apply(store, Settings(), NOW + timedelta(days=10_000))
    assert len(steps(store, "layers", run_id)) == 30
