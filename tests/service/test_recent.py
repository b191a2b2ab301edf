"""A diagnosis of a live run: what is in memory is what the store has, and a refresh takes in no more than what came."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from synthetic import layer_rows, probe_rows, run_record, scalar_rows

from brn_core.wire import SCALAR_SHADOW_EVAL_LOSS, SCALAR_SHADOW_TRAIN_LOSS, RunCreate, Schedule
from service import recent, windows
from service.diagnosis.finding import Diagnosis
from service.diagnosis.rules import diagnose
from service.diagnosis.window import LAYER_COLUMNS, Window
from service.recent import Newest
from service.recordings import Part, Recording, keep
from service.store import Batch, Store

RANKS, LAYERS, STEPS, BROKEN = 2, 3, 700, 640


@pytest.fixture
def live(store: Store, run_id: str) -> Iterator[str]:
    """Two runs without rows, `live` and `live-after`, which the session's own diagnoser is not told of."""
    for name in (run_id, f"{run_id}-after"):
        keep(store, Recording(a_run(name), "running", []))
    yield run_id
    store.delete_runs([run_id, f"{run_id}-after"])


def a_run(run_id: str) -> RunCreate:
    schedule = Schedule(bn_steps=120, r_steps=400, d_steps=400, r_max=3, d_max=5)
    return run_record(run_id, LAYERS, world_size=RANKS, schedule=schedule)


def parts_of_a_run(seed: int) -> list[Part]:
    """Batches of uneven length; tables travel apart; rank 1 goes on from a checkpoint and sends 60 steps anew."""
    rng = np.random.default_rng(seed)
    parts = []

    def add(rank: int, seq: int, begin: int, end: int) -> None:
        steps = np.arange(begin, end)
        shape = (len(steps), LAYERS)
        rows = {name: 1 + rng.random(shape) for name in LAYER_COLUMNS if name not in ("dead_channels", "samples")}
        rows["nonfinite_channels"] = np.repeat(steps == BROKEN, LAYERS).reshape(shape)
        tables = {
            "layers": layer_rows(steps, LAYERS, **rows),
            "probe": probe_rows(steps, samples=4, seed=int(rng.integers(2**32))),
            "scalars": scalar_rows(
                {name: [(int(s), float(rng.random())) for s in steps] for name in ("loss", "brn/lr", "accuracy")}
                | {name: [(int(s), 1.0) for s in steps if s % 50 == 0] for name in shadow}
            ),
        }
        tables = {name: table for name, table in tables.items() if table.num_rows}
        parts.append(Part(rank, 10 * seq, {"probe": tables.pop("probe")}))
        parts.append(Part(rank, 10 * seq + 1, tables))

    shadow = (SCALAR_SHADOW_TRAIN_LOSS, SCALAR_SHADOW_EVAL_LOSS)
    for rank in range(RANKS):
        ends = np.unique([0, *rng.integers(1, STEPS, 25), STEPS]).tolist()
        for seq, (begin, end) in enumerate(pairwise(ends), start=1):
            add(rank, seq, begin, end)
    add(1, 100, 600, 660)
    return parts


def put(store: Store, run_id: str, parts: Sequence[Part]) -> None:
    run = store.record(run_id)
    assert run is not None
    store.put_batches([Batch(run, part.rank, part.seq, part.tables) for part in parts])


def said(diagnosis: Diagnosis) -> str:
    return diagnosis.model_dump_json().replace(f"{diagnosis.run}-after", diagnosis.run).replace("-after", "")


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_the_same_live_and_afterwards_whatever_order_batches_arrived_in(
    store: Store, live: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "PROBE_WINDOW_STEPS", 300)
    monkeypatch.setattr(windows, "LAYER_WINDOW_STEPS", 200)
    monkeypatch.setattr(windows, "SCALAR_WINDOW_STEPS", 250)
    parts = parts_of_a_run(seed)
    shuffled = [parts[i] for i in np.random.default_rng(seed).permutation(len(parts))]
    put(store, f"{live}-after", parts)
    expected = diagnose(windows.window(store, f"{live}-after"))
    for begin in range(0, len(shuffled), 7):
        put(store, live, shuffled[begin : begin + 7])
        now = windows.diagnosis(store, live)

        assert said(now) == said(diagnose(windows.window(store, live))), "in memory as in the store"
    assert said(now) == said(expected)
    assert "NH-NONFINITE" in {finding.code for finding in now.findings}
    assert_newest(windows.window(store, live), parts)


def assert_newest(window: Window, parts: Sequence[Part]) -> None:
    """What is looked at are the newest steps, each row as the batch with the larger seq has it."""
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    losses: dict[int, dict[int, float]] = {}
    for part in sorted(parts, key=lambda part: part.seq):
        for row in part.tables["layers"].to_pylist() if "layers" in part.tables else []:
            rows[row["step"], part.rank, row["layer"]] = row
        for row in part.tables["scalars"].to_pylist() if "scalars" in part.tables else []:
            if row["name"] == "loss":
                losses.setdefault(row["step"], {})[part.rank] = row["value"]
    assert window.rows.steps_T.tolist() == list(range(STEPS - 200, STEPS))
    assert window.probe.steps_T.tolist() == list(range(STEPS - 300, STEPS))
    for name in ("gap", "r_q50", "mu_b"):
        for t, step in enumerate(window.rows.steps_T.tolist()):
            expected = [[rows[step, k, layer][name] for layer in range(LAYERS)] for k in range(RANKS)]
            assert window.rows.columns[name][t].tolist() == expected
    assert window.scalars["loss"].steps_T.tolist() == list(range(STEPS - 250, STEPS))
    means = [np.mean(list(losses[step].values())) for step in range(STEPS - 250, STEPS)]
    assert window.scalars["loss"].values_T == pytest.approx(means)
    assert "accuracy" not in window.scalars


@pytest.mark.parametrize("steps", [150, 3000])
def test_a_refresh_takes_in_what_came_and_asks_the_store_for_no_row_however_long_the_run_is(
    store: Store, live: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(first: int, count: int, seq: int) -> list[Part]:
        numbers = range(first, first + count)
        tables = {
            "layers": layer_rows(numbers, LAYERS),
            "probe": probe_rows(numbers),
            "scalars": scalar_rows({"loss": [(step, 1.0) for step in numbers]}),
        }
        return [Part(rank, seq, tables) for rank in range(RANKS)]

    put(store, live, batches(0, steps, 1))
    windows.diagnosis(store, live)
    past = 120 + 10 * 100 + 1  # the opening of the limits is read anew for 10 time constants
    put(store, live, batches(steps, max(20, past - steps), 2))
    first = windows.diagnosis(store, live).step
    assert first is not None
    asked: list[str] = []
    taken: list[int] = []
    rows, take = store.engine.rows, Newest.take

    def counting(sql: str, **parameters: Any) -> pa.Table:
        if parameters.get("run") == live:
            asked.append(sql)
        return rows(sql, **parameters)

    def counted(self: Newest, step_N: Any, *rest: Any) -> None:
        taken.append(len(step_N))
        take(self, step_N, *rest)

    monkeypatch.setattr(store.engine, "rows", counting)
    monkeypatch.setattr(Newest, "take", counted)
    for refresh in range(3):
        put(store, live, batches(first + 1 + 20 * refresh, 20, 10 + refresh))
        asked.clear()
        taken.clear()
        assert windows.diagnosis(store, live).step == first + 20 * (refresh + 1)
        assert [sql for sql in asked if re.search(r"FROM (layers|probe|scalars)\b", sql)] == []
        assert len(asked) <= 2  # of what the run says of itself, where its verdict has changed
        assert sorted(taken) == [20 * RANKS, 20 * RANKS, 20 * RANKS * LAYERS]


def test_what_waits_too_long_for_a_diagnosis_is_read_from_the_store(
    store: Store, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of_a_run(0)
    put(store, live, parts[:10])
    windows.diagnosis(store, live)
    put(store, f"{live}-after", parts[:10])
    windows.diagnosis(store, f"{live}-after")
    monkeypatch.setattr(recent, "WAITING_ROWS", 100)
    put(store, f"{live}-after", parts[10:11])
    put(store, live, parts[10:])

    other, own = (store.recent._runs[name].waiting_rows for name in (f"{live}-after", live))
    assert own == 0
    assert 0 < other <= 100, "of the run with most"
    assert said(windows.diagnosis(store, live)) == said(diagnose(windows.window(store, live)))


def test_runs_that_nobody_asks_about_give_way_and_come_back(
    store: Store, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "KEPT_BYTES", 0)
    parts = parts_of_a_run(0)
    for name in (live, f"{live}-after"):
        put(store, name, parts[:20])
        windows.diagnosis(store, name)
    put(store, live, parts[20:])

    assert said(windows.diagnosis(store, live)) == said(diagnose(windows.window(store, live)))


def test_a_run_that_ends_leaves_no_rows_in_memory(client: httpx.Client, store: Store, live: str) -> None:
    put(store, live, parts_of_a_run(0)[:20])
    windows.diagnosis(store, live)
    held = store.recent.of(live, None, 0, 0)
    client.patch(f"/v1/runs/{live}", json={"status": "finished"}).raise_for_status()

    assert windows.diagnosis(store, live).step is not None
    assert store.recent.of(live, None, 0, 0) is not held
