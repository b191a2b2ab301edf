from __future__ import annotations

import math
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import create, layer_rows, probe_rows, run_record, scalar_rows, send, write_run

from brn_core import wire
from service import answers, windows
from service.diagnosis.window import LAYER_COLUMNS, OPENING_COLUMNS, NonFinite
from service.errors import Invalid, NotFound
from service.store import Store


@given(first=st.integers(0, 10**9), span=st.integers(0, 10**9), points=st.integers(1, 5000))
def test_bucket_width_is_the_smallest_of_1_2_5_that_fits(first: int, span: int, points: int) -> None:
    last = first + span
    width = answers.bucket_width(first, last, points)

    def buckets(w: int) -> int:
        return last // w - first // w + 1

    ladder = [factor * 10**power for power in range(12) for factor in (1, 2, 5)]
    assert width == next(w for w in ladder if buckets(w) <= points)


def test_series_agrees_with_numpy_over_every_bucket(client: httpx.Client, store: Store, run_id: str) -> None:
    T, L, ranks, points = 137, 3, 2, 20
    gap = np.random.default_rng(1).standard_normal((T, L)).astype(np.float32)
    write_run(client, run_id, layers=L, steps=T, ranks=ranks, gap=gap)
    found = answers.series(store, run_id, ["gap"], points=points)
    assert found.bucket_steps == 10
    steps = np.arange(1, T + 1)
    for position, bucket in enumerate(np.unique(steps // 10)):
        inside = gap[steps // 10 == bucket]
        assert found.steps[position] == steps[steps // 10 == bucket].max()
        assert found.series["gap"].min[position] == pytest.approx(inside.min(), rel=1e-6)
        assert found.series["gap"].max[position] == pytest.approx(inside.max(), rel=1e-6)
        assert found.series["gap"].mean[position] == pytest.approx(inside.mean(dtype=np.float64), rel=1e-5, abs=1e-7)
    assert len(found.steps) <= points


def test_one_layer_and_one_rank_are_told_from_the_rest(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2, world_size=2))
    for rank in (0, 1):
        send(client, run_id, {"layers": layer_rows([1], 2, gap=[[10 * rank, 10 * rank + 1]])}, rank=rank)
    assert answers.series(store, run_id, ["gap"], layer=1, rank=1).series["gap"].mean == [11]
    assert answers.series(store, run_id, ["gap"], layer=1).series["gap"].mean == [6]
    assert answers.series(store, run_id, ["gap"], rank=0).series["gap"].mean == [0.5]
    assert answers.heatmap(store, run_id, "gap", rank=1).values == [[10], [11]]
    assert answers.heatmap(store, run_id, "gap").values == [[5], [6]]


@pytest.mark.parametrize("points", [1, 2, 7, 100, 5000])
def test_the_newest_point_is_in_every_answer(client: httpx.Client, store: Store, run_id: str, points: int) -> None:
    write_run(client, run_id, layers=2, steps=101)
    assert answers.series(store, run_id, ["gap"], points=points).steps[-1] == 101
    assert answers.heatmap(store, run_id, "gap", points=points).steps[-1] == 101
    assert answers.scalars(store, run_id, points=points).series["loss"].steps[-1] == 101


def test_a_range_of_steps_is_inclusive_and_gets_narrower_buckets(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    write_run(client, run_id, layers=1, steps=100)
    found = answers.series(store, run_id, ["gap"], from_step=40, to_step=49, points=10)
    assert found.bucket_steps == 1
    assert found.steps == list(range(40, 50))
    assert answers.series(store, run_id, ["gap"], from_step=101, points=10).steps == []


def test_buckets_of_old_steps_stand_still_while_new_steps_arrive(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    write_run(client, run_id, layers=2, steps=25)
    before = answers.series(store, run_id, ["gap", "mu"], points=10)
    send(client, run_id, {"layers": layer_rows(range(26, 41), 2)}, seq=2)
    after = answers.series(store, run_id, ["gap", "mu"], points=10)
    assert before.bucket_steps == after.bucket_steps == 5
    complete = before.steps.index(24) + 1
    for stat in ("gap", "mu"):
        assert after.series[stat].mean[:complete] == before.series[stat].mean[:complete]


def test_nan_poisons_the_mean_but_not_the_extremes(client: httpx.Client, store: Store, run_id: str) -> None:
    gap = [[1.0], [math.nan], [3.0], [math.nan], [math.inf], [5.0]]  # buckets 1 | 2-3 | 4-5 | 6
    write_run(client, run_id, layers=1, steps=6, gap=gap)
    buckets = answers.series(store, run_id, ["gap"], points=4).series["gap"]
    np.testing.assert_array_equal(np.array(buckets.mean), [1, math.nan, math.nan, 5])
    assert buckets.min == [1, 3, math.inf, 5]
    assert buckets.max == [1, 3, math.inf, 5]


def test_a_bucket_of_nothing_but_nan_is_nan_and_not_missing(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=1, steps=2, gap=[[math.nan], [1.0]])
    buckets = answers.series(store, run_id, ["gap"]).series["gap"]
    for values in (buckets.min, buckets.mean, buckets.max):
        assert values[0] is not None
        assert math.isnan(values[0])
    assert math.isnan(answers.heatmap(store, run_id, "gap").values[0][0] or 0)


def test_missing_is_null_and_never_zero(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2))
    table = layer_rows([1, 2], 1)  # layer 1 has no rows at all
    position = table.schema.get_field_index("mean_noise")
    table = table.set_column(position, table.schema.field("mean_noise"), pa.array([None, 2.0], pa.float32()))
    send(client, run_id, {"layers": table})
    buckets = answers.series(store, run_id, ["mean_noise"]).series["mean_noise"]
    assert buckets.min == buckets.mean == buckets.max == [None, 2.0]
    assert answers.heatmap(store, run_id, "mean_noise").values == [[None, 2.0], [None, None]]
    assert answers.series(store, run_id, ["gap"], layer=1).steps == []
    (only,) = answers.summary(store, run_id).layers
    assert (only.layer, only.step, only.values["mean_noise"]) == (0, 2, 2.0)


def test_a_heatmap_of_more_cells_than_16_bits_number_has_every_one_in_its_place(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=20))
    steps, gap_TL = [0, 2500, 4999], np.arange(60, dtype=np.float32).reshape(3, 20)
    send(client, run_id, {"layers": layer_rows(steps, 20, gap=gap_TL)})
    found = answers.heatmap(store, run_id, "gap", points=5000)
    assert (found.bucket_steps, found.steps) == (1, steps)
    np.testing.assert_array_equal(np.array(found.values), gap_TL.T)


def test_heatmap_agrees_with_the_series_of_each_layer(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=4, steps=60, ranks=2)
    found = answers.heatmap(store, run_id, "r_q50", points=10)
    assert found.layers == ["block0.bn", "block1.bn", "block2.bn", "block3.bn"]
    for layer, values in enumerate(found.values):
        series = answers.series(store, run_id, ["r_q50"], layer=layer, points=10)
        assert series.steps == found.steps
        assert values == series.series["r_q50"].mean


def test_summary_is_the_newest_step_of_each_layer_over_ranks(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2, world_size=2))
    for rank in (0, 1):
        send(client, run_id, {"layers": layer_rows([1, 2], 2, gap=[[9, 9], [rank, rank + 4]])}, rank=rank)
    found = answers.summary(store, run_id)
    assert found.last_step == 2
    assert [(layer.name, layer.step, layer.values["gap"]) for layer in found.layers] == [
        ("block0.bn", 2, 0.5),
        ("block1.bn", 2, 4.5),
    ]
    assert found.layers[0].values.keys() == wire.METRIC.keys()


def test_scalars_have_their_own_steps_and_keep_full_precision(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id))
    value = 1234567890.125
    send(client, run_id, {"scalars": scalar_rows({"loss": [(1, 2.0), (2, math.nan)], "acc/x": [(2, value)]})})
    found = answers.scalars(store, run_id)
    assert found.names == ["acc/x", "loss"]
    assert found.series["acc/x"].steps == [2]
    assert found.series["acc/x"].mean == [value]
    assert found.series["loss"].steps == [1, 2]
    assert math.isnan(found.series["loss"].mean[1] or 0)
    assert list(answers.scalars(store, run_id, ["loss"]).series) == ["loss"]


def test_unknown_names_are_refused_with_what_exists(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=2)
    with pytest.raises(Invalid, match="no statistic 'gab'; known: samples, mu_b"):
        answers.series(store, run_id, ["gab"])
    with pytest.raises(Invalid, match="no statistic 'gap; DROP TABLE runs'"):
        answers.heatmap(store, run_id, "gap; DROP TABLE runs")
    with pytest.raises(Invalid, match="at least one statistic"):
        answers.series(store, run_id, [])
    with pytest.raises(Invalid, match=r"no layer 2; run '.*' has layers 0 to 1"):
        answers.series(store, run_id, ["gap"], layer=2)
    with pytest.raises(Invalid, match=r"no scalar 'lozz'; run '.*' has: loss"):
        answers.scalars(store, run_id, ["lozz"])
    with pytest.raises(Invalid, match="from must not be after to"):
        answers.series(store, run_id, ["gap"], from_step=2, to_step=1)


def test_every_question_about_an_unknown_run_names_the_newest_ones(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id))
    for ask in (
        lambda: answers.run(store, "nope"),
        lambda: answers.layers(store, "nope"),
        lambda: answers.summary(store, "nope"),
        lambda: answers.series(store, "nope", ["gap"]),
        lambda: answers.heatmap(store, "nope", "gap"),
        lambda: answers.scalars(store, "nope"),
        lambda: windows.window(store, "nope"),
        lambda: windows.diagnosis(store, "nope"),
    ):
        with pytest.raises(NotFound, match=f"no run 'nope'; newest runs: .*{run_id}"):
            ask()


def test_a_run_without_rows_has_empty_answers(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2))
    assert answers.run(store, run_id).last_step is None
    assert answers.series(store, run_id, ["gap"]).steps == []
    assert answers.heatmap(store, run_id, "gap").values == [[], []]
    assert answers.summary(store, run_id).layers == []
    assert answers.scalars(store, run_id).names == []
    assert windows.window(store, run_id).probe.mean_TKF.shape == (0, 1, wire.PROBE_FEATURES)
    assert windows.diagnosis(store, run_id).verdict.code == "NO_DATA"


# -------- window


def test_window_has_every_row_in_its_place(client: httpx.Client, store: Store, run_id: str) -> None:
    T, K, L = 5, 2, 3
    gap_TL = np.arange(T * L, dtype=np.float32).reshape(T, L)
    write_run(client, run_id, layers=L, steps=T, ranks=K, gap=gap_TL)
    window = windows.window(store, run_id)
    assert window.last_step == T
    assert window.rows.columns.keys() == set(LAYER_COLUMNS)
    np.testing.assert_array_equal(window.rows.steps_T, np.arange(1, T + 1))
    for rank in range(K):
        np.testing.assert_array_equal(window.rows.columns["gap"][:, rank], gap_TL)
        probe = probe_rows(np.arange(1, T + 1), seed=rank)
        for name, found_TKF in (
            ("mean", window.probe.mean_TKF),
            ("var", window.probe.var_TKF),
            ("adjacency", window.probe.adjacency_TKF),
        ):
            np.testing.assert_array_equal(found_TKF[:, rank], np.array(probe.column(name).to_pylist()))
    np.testing.assert_array_equal(window.probe.samples_TK, np.full((T, K), 32))
    np.testing.assert_allclose(window.scalars["loss"].values_T, 1 / np.arange(1, T + 1))
    assert window.nonfinite is None


def test_window_leaves_nan_where_a_rank_sent_nothing(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, world_size=3))
    send(client, run_id, {"layers": layer_rows([1, 2], 1, gap=1.0), "probe": probe_rows([2])}, rank=1)
    window = windows.window(store, run_id)
    np.testing.assert_array_equal(window.rows.columns["gap"][:, :, 0], [[math.nan, 1, math.nan]] * 2)
    np.testing.assert_array_equal(window.probe.samples_TK, [[math.nan, 32, math.nan]])


def test_window_takes_the_newer_row_of_a_step_recorded_twice(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1))
    send(
        client, run_id, {"layers": layer_rows([1, 2], 1, gap=7.0), "scalars": scalar_rows({"loss": [(2, 7.0)]})}, seq=20
    )
    send(
        client, run_id, {"layers": layer_rows([2, 3], 1, gap=8.0), "scalars": scalar_rows({"loss": [(2, 8.0)]})}, seq=30
    )
    window = windows.window(store, run_id)
    assert window.rows.columns["gap"].ravel().tolist() == [7, 8, 8]
    assert window.scalars["loss"].values_T.tolist() == [8]


def test_window_holds_only_the_newest_steps(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(client, run_id, layers=1, steps=60)
    monkeypatch.setattr(windows, "PROBE_WINDOW_STEPS", 30)
    monkeypatch.setattr(windows, "LAYER_WINDOW_STEPS", 20)
    monkeypatch.setattr(windows, "SCALAR_WINDOW_STEPS", 10)
    window = windows.window(store, run_id)
    assert window.probe.steps_T.tolist() == list(range(31, 61))
    assert window.rows.steps_T.tolist() == list(range(41, 61))
    assert window.scalars["loss"].steps_T.tolist() == list(range(51, 61))


def test_window_shortens_rather_than_grow_with_ranks_and_layers(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(client, run_id, layers=2, steps=260)
    monkeypatch.setattr(windows, "WINDOW_ROWS", 400)
    assert len(windows.window(store, run_id).rows.steps_T) == 200


def test_a_run_of_many_ranks_and_layers_is_judged_however_few_steps_a_window_should_hold(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_ROWS", 100)
    create(client, run_record(run_id, layers=2, world_size=2))
    numbers = np.arange(0, 1200)
    for rank in (0, 1):
        send(client, run_id, {"layers": layer_rows(numbers, 2, mean_noise=0.2, scale_noise=0.2)}, rank=rank)
    for more in (1, 2, 30, 50):  # looks are at fixed steps: the window holds two wherever it ends
        numbers = numbers[-1] + 1 + np.arange(more)
        for rank in (0, 1):
            rows = layer_rows(numbers, 2, mean_noise=0.2, scale_noise=0.2)
            send(client, run_id, {"layers": rows}, rank=rank, seq=int(numbers[0]))
        assert "NH-SMALL" in {f.code for f in windows.diagnosis(store, run_id).findings}


def test_window_has_our_scalars_and_losses_and_no_others(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, world_size=2))
    for rank in (0, 1):
        names = {name: [(2, 1.0 + rank), (1, 3.0)] for name in ("loss", "loss/val", "brn/dropped_steps", "acc")}
        send(client, run_id, {"scalars": scalar_rows(names)}, rank=rank)
    scalars = windows.window(store, run_id).scalars
    assert scalars.keys() == {"loss", "loss/val", "brn/dropped_steps"}
    assert scalars["loss"].steps_T.tolist() == [1, 2]
    assert scalars["loss"].values_T.tolist() == [3.0, 1.5]


def test_the_first_non_finite_row_is_by_step_then_layer_then_rank(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=3, world_size=2))
    send(client, run_id, {"layers": layer_rows([1, 2, 3], 3, nonfinite_channels=[[0] * 3, [0, 0, 4], [4] * 3])}, rank=0)
    send(client, run_id, {"layers": layer_rows([1, 2, 3], 3, nonfinite_channels=[[0] * 3, [0, 2, 3], [4] * 3])}, rank=1)
    found = windows.window(store, run_id).nonfinite
    assert found is not None
    assert (found.step, found.layer, found.rank, found.channels) == (2, 1, 1, 2)


def test_a_non_finite_row_that_a_restarted_run_replaced_is_none(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    broken = np.where(np.arange(1000) >= 500, 4, 0)[:, None]
    send(client, run_id, {"layers": layer_rows(range(1000), 1, nonfinite_channels=broken)}, seq=1)
    assert windows.window(store, run_id).nonfinite == NonFinite(500, 0, 0, 4)
    send(client, run_id, {"layers": layer_rows(range(400, 980), 1)}, seq=2)
    assert windows.window(store, run_id).nonfinite == NonFinite(980, 0, 0, 4), "not replaced yet"
    send(client, run_id, {"layers": layer_rows(range(980, 1100), 1)}, seq=3)
    assert windows.window(store, run_id).nonfinite is None


def test_the_scale_a_run_began_with_is_that_of_its_newest_start(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    send(client, run_id, {"layers": layer_rows(range(10), 1, sigma_b=100.0)}, seq=1)
    send(client, run_id, {"layers": layer_rows(range(10), 1, sigma_b=2.0)}, seq=2)
    assert windows.window(store, run_id).first_sigma_L.tolist() == [2.0]


# -------- diagnosis


@pytest.mark.parametrize("every", [1, 10])
def test_limits_that_opened_early_are_named_whenever_one_asks(
    client: httpx.Client, store: Store, run_id: str, every: int
) -> None:
    """Momentum .01, the layers' own default: 10 time constants after the opening are 1000 steps."""
    schedule = wire.Schedule(bn_steps=600, r_steps=1500, d_steps=1500, r_max=3, d_max=5)
    create(client, run_record(run_id, layers=1, schedule=schedule))
    rng = np.random.default_rng(0)
    energies = []
    for seq, (begin, end) in enumerate(((0, 800), (800, 1300), (1300, 2000), (2000, 6000)), start=1):
        numbers = np.arange(begin, end, every)
        noise = 0.02 * rng.random((len(numbers), 1))
        losses = np.where(np.arange(begin, end) < 600, 1.0, 2.0) * rng.gamma(20, 1 / 20, end - begin)
        rows = layer_rows(numbers, 1, d_squared=np.where(numbers < 600, 0.45, 0.1)[:, None] + noise, mean_diff2=0.02)
        loss = [(step, float(value)) for step, value in zip(range(begin, end), losses, strict=True)]
        send(client, run_id, {"layers": rows, "scalars": scalar_rows({"loss": loss})}, seq=seq)
        found = [f for f in windows.diagnosis(store, run_id).findings if f.code == "NH-SCHED-FAST"]
        assert len(found) == 1, f"at step {end}"
        assert found[0].evidence is not None
        energies.append((found[0].evidence.value, found[0].evidence.low, found[0].evidence.steps_used))
    assert len(set(energies)) == 1, "the same answer live and afterwards"
    assert energies[0][2] == (100 if every == 1 else 50)


def test_limits_that_opened_before_enough_rows_were_known_are_not_judged_and_it_is_said(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    schedule = wire.Schedule(bn_steps=30, r_steps=100, d_steps=100, r_max=3, d_max=5)
    create(client, run_record(run_id, layers=1, schedule=schedule))
    send(client, run_id, {"layers": layer_rows(range(1, 300), 1)})
    said = [f.summary for f in windows.diagnosis(store, run_id).findings if f.code == "NH-WITHHELD"]
    assert any("NH-SCHED-FAST" in text and "29 of the 40 rows" in text for text in said), said


def test_a_diagnosis_is_computed_once_for_what_is_stored(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(client, run_id, layers=1, steps=5)
    calls: Counter[tuple[int | None, str]] = Counter()  # the background diagnoses too, at cursors of its own
    diagnose = windows.diagnose

    def counting(window: Any, known: Any) -> Any:
        if window.run == run_id:
            calls[window.last_step, window.status] += 1
        return diagnose(window, known)

    monkeypatch.setattr(windows, "diagnose", counting)
    send(client, run_id, {"layers": layer_rows([6], 1)}, seq=2)
    first = windows.diagnosis(store, run_id)
    assert windows.diagnosis(store, run_id) is first
    assert first.step == 6
    assert calls[6, "running"] == 1
    client.patch(f"/v1/runs/{run_id}", json={"status": "finished"})
    windows.diagnosis(store, run_id)
    windows.diagnosis(store, run_id)
    assert calls[6, "running"] == calls[6, "finished"] == 1


def test_the_list_of_runs_has_the_verdict_last_computed(client: httpx.Client, store: Store, run_id: str) -> None:
    nan = np.zeros((3, 1))
    nan[1:] = 4
    write_run(client, run_id, layers=1, steps=3, nonfinite_channels=nan)
    verdict = windows.diagnosis(store, run_id).verdict
    assert verdict.code == "NH-NONFINITE"
    (listed,) = [run for run in answers.runs(store) if run.id == run_id]
    assert listed.verdict == verdict == answers.run(store, run_id).verdict


def test_runs_are_listed_newest_first_with_their_extent(client: httpx.Client, store: Store, run_id: str) -> None:
    for name in ("a", "b"):
        create(client, run_record(f"{run_id}-{name}", layers=2))
    send(client, f"{run_id}-a", {"layers": layer_rows([3, 9], 2)})
    send(client, f"{run_id}-a", {"scalars": scalar_rows({"loss": [(11, 1.0)]})}, seq=2)
    listed = [run for run in answers.runs(store) if run.id.startswith(run_id)]
    assert [(run.id, run.last_step, run.rows) for run in listed] == [(f"{run_id}-b", None, 0), (f"{run_id}-a", 11, 4)]
    assert listed[0].updated_at <= listed[1].updated_at
    assert listed[0].created_at > listed[1].created_at


def test_window_keeps_the_scale_a_run_began_with_and_the_steps_around_its_opening(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "LAYER_WINDOW_STEPS", 50)
    monkeypatch.setattr(windows, "WINDOW_ROWS", 120)
    schedule = wire.Schedule(bn_steps=300, r_steps=400, d_steps=400, r_max=3, d_max=5)
    create(client, run_record(run_id, layers=2, schedule=schedule))
    sigma_TL = np.repeat(np.arange(1.0, 701.0)[:, None], 2, axis=1)
    numbers = np.arange(1, 701)
    loss = scalar_rows({"loss": [(int(step), float(step)) for step in numbers]})
    send(client, run_id, {"layers": layer_rows(numbers, 2, sigma_b=sigma_TL), "scalars": loss})

    window = windows.window(store, run_id)

    assert window.rows.steps_T.tolist() == list(range(651, 701))
    assert window.first_sigma_L.tolist() == [3.5, 3.5], "the mean of steps 1 to 6"
    assert window.opening is not None
    assert window.opening.step == 300
    assert window.opening.rows.columns.keys() == set(OPENING_COLUMNS)
    before = [step for step in window.opening.rows.steps_T if step < 300]
    assert before == list(range(200, 300)), "the last time constant, every row"
    assert window.opening.rows.steps_T[len(before) :].tolist() == list(range(300, 701, 7)), "1000 are to come"
    assert window.opening.loss.steps_T.tolist() == list(range(1, 701))
