from __future__ import annotations

import base64
import io
import json
import math
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from synthetic import create, layer_rows, probe_rows, run_record, scalar_rows, send, write_run

from brn_core import wire
from service import answers, windows
from service.answers import what_if
from service.answers.comparison import Axis
from service.answers.records import CRASHED_SECONDS, STALLED_SECONDS, state_of
from service.answers.spread import NEWEST_STEPS
from service.diagnosis.finding import Verdict
from service.errors import Invalid, NotFound
from service.memo import Memo
from service.schemas import rounded
from service.settings import Settings
from service.store import Store

ARROW = {"accept": wire.MEDIA_TYPE}


def arrow(answer: httpx.Response) -> pa.Table:
    """The table of an answer."""
    answer.raise_for_status()
    assert answer.headers["content-type"] == wire.MEDIA_TYPE
    with pa.ipc.open_stream(answer.content) as reader:
        return reader.read_all()


def channel_rows(step: int, r_LC: list[list[float]], d_LC: list[list[float]]) -> pa.Table:
    """A snapshot with these r and d."""
    rows = [
        {"step": step, "layer": layer, "r": r_C, "d": d_C}
        | {name: [1.0] * len(r_C) for name in ("mu_b", "sigma_b", "between_var", "mu", "sigma")}
        for layer, (r_C, d_C) in enumerate(zip(r_LC, d_LC, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=wire.TABLES["channels"])


def percentiles(symbol: str, values_TLC: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Columns of `layers` for channels with these values."""
    return {f"{symbol}_q{q:02d}": np.percentile(values_TLC, q, axis=2) for q in wire.QUANTILES}


# -------- numbers


@given(st.lists(st.none() | st.floats(width=32)))
def test_rounding_gives_the_shortest_text_of_six_digits(values: list[float | None]) -> None:
    expected = [v if v is None or not math.isfinite(v) else float(f"{v:.6g}") for v in values]
    assert repr(rounded(values)) == repr(expected)


def test_json_has_six_digits_and_arrow_has_all(client: httpx.Client, run_id: str) -> None:
    gap = np.float32(1 / 3)
    write_run(client, run_id, layers=1, steps=2, gap=gap)
    address = f"/v1/runs/{run_id}/series?stat=gap"
    assert client.get(address).json()["series"]["gap"]["mean"] == [0.333333] * 2
    table = arrow(client.get(address, headers=ARROW))
    assert table.schema.names == ["step", "gap_min", "gap_mean", "gap_max"]
    assert table.column("gap_mean").to_pylist() == [float(gap)] * 2


def test_every_table_can_be_had_in_arrow(client: httpx.Client, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=5, ranks=2)
    send(client, run_id, {"channels": channel_rows(5, [[1.0] * 4] * 2, [[0.0] * 4] * 2)}, seq=2)
    create(client, run_record(f"{run_id}-b"))
    rows = {
        f"runs/{run_id}/series?stat=gap": 5,
        f"runs/{run_id}/heatmap?stat=gap": 5,
        f"runs/{run_id}/summary": 2,
        f"runs/{run_id}/scalars": 5,
        f"runs/{run_id}/probe": 5,
        f"runs/{run_id}/ranks": 2,
        f"runs/{run_id}/channels": 8,
        f"runs/{run_id}/channels?layer=1": 4,
        f"runs/{run_id}/schedule": 5,
        f"compare?run={run_id}&run={run_id}-b&stat=gap": 5,
    }
    for address, count in rows.items():
        assert arrow(client.get(f"/v1/{address}", headers=ARROW)).num_rows == count, address


def test_missing_and_nan_stay_apart_in_arrow(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=2))
    send(client, run_id, {"layers": layer_rows([1, 2], 1, gap=[[math.nan], [1.0]])})
    table = arrow(client.get(f"/v1/runs/{run_id}/heatmap?stat=gap", headers=ARROW))
    assert str(table.column("0").to_pylist()) == "[nan, 1.0]"
    assert table.column("1").to_pylist() == [None, None]


def test_the_same_question_has_the_same_answer(client: httpx.Client, run_id: str) -> None:
    write_run(client, run_id, layers=3, steps=97, ranks=2)
    for path in ("series?stat=mu&points=7", "heatmap?stat=mu&points=7", "schedule?points=7", "probe?points=7", "ranks"):
        first = client.get(f"/v1/runs/{run_id}/{path}").content
        assert all(client.get(f"/v1/runs/{run_id}/{path}").content == first for _ in range(3)), path


# -------- summary


def test_extremes_are_had_where_they_are_wanted_and_means_are_the_same(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    write_run(client, run_id, steps=20, gap=[[1.0, math.nan, 3.0]])
    stats = ("gap", "clip_r", "r_q50")
    whole = answers.series(store, run_id, stats, points=5)
    some = answers.series(store, run_id, stats, points=5, extremes=("clip_r",))
    assert some.steps == whole.steps
    assert some.series["clip_r"] == whole.series["clip_r"]
    for stat in ("gap", "r_q50"):
        np.testing.assert_allclose(some.series[stat].mean, whole.series[stat].mean)  # NaN is NaN
        assert some.series[stat].min == some.series[stat].max == []


def test_a_layer_that_is_no_longer_recorded_keeps_its_newest_row(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=3))
    send(client, run_id, {"layers": layer_rows([1, 2], 2, gap=[[1, 2], [3, 4]])}, seq=1)
    send(client, run_id, {"layers": layer_rows([7], 1, gap=9)}, seq=2)
    send(client, run_id, {"scalars": scalar_rows({"loss": [(99, 1.0)]})}, seq=3)
    found = answers.summary(store, run_id).layers
    assert [(row.layer, row.name, row.step, row.values["gap"]) for row in found] == [
        (0, "block0.bn", 7, 9),
        (1, "block1.bn", 2, 4),
    ]


def test_a_batch_of_old_steps_that_comes_late_does_not_hide_the_newest(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    send(client, run_id, {"layers": layer_rows([50, 51], 1, gap=5)}, seq=1)
    send(client, run_id, {"layers": layer_rows([1, 2], 1, gap=1)}, seq=2)
    (row,) = answers.summary(store, run_id).layers
    assert (row.step, row.values["gap"]) == (51, 5)


# -------- list of runs


@pytest.fixture
def several(client: httpx.Client, run_id: str) -> str:
    """Five runs whose ids begin with the test's; only odd ones have rows, up to step 10 times their number."""
    for i in range(5):
        name = f"{run_id} {'EVEN' if i % 2 == 0 else 'odd'} {4 - i}"
        create(client, run_record(f"{run_id}-{i}", layers=1, name=name, tags=("a", "b") if i < 2 else ("a",)))
        if i % 2:
            send(client, f"{run_id}-{i}", {"layers": layer_rows([1, 10 * i], 1)})
    return run_id


def listed(client: httpx.Client, search: str, **params: Any) -> list[int]:
    """Last characters of the ids found, page by page."""
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = client.get("/v1/runs", params={"search": search, **params, **cursor}).json()
        found += [run["id"] for run in page["runs"]]
        if page["next"] is None:
            assert page["total"] == len(found)
            return [int(run_id[-1]) for run_id in found]
        assert len(page["runs"]) == params["limit"]
        cursor = {"cursor": page["next"]}


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_pages_hold_every_run_once_in_every_order(client: httpx.Client, several: str, limit: int) -> None:
    assert listed(client, several, limit=limit) == [4, 3, 2, 1, 0]
    assert listed(client, several, limit=limit, ascending=True) == [0, 1, 2, 3, 4]
    assert listed(client, several, limit=limit, sort="last_step") == [3, 1, 4, 2, 0]
    assert listed(client, several, limit=limit, sort="name", ascending=True) == [4, 2, 0, 3, 1]
    assert sorted(listed(client, several, limit=limit, sort="updated")) == [0, 1, 2, 3, 4]


def test_runs_are_found_by_text_tag_and_state(client: httpx.Client, several: str) -> None:
    assert listed(client, f"{several} even") == [4, 2, 0]
    assert listed(client, several, tag=["a", "b"]) == [1, 0]
    assert listed(client, several, tag="nope") == []
    client.patch(f"/v1/runs/{several}-2", json={"status": "finished", "notes": f"{several} Lucky"})
    assert listed(client, f"{several} lucky") == [2]
    assert listed(client, several, state="finished") == [2]
    assert listed(client, several, state=["finished", "running"]) == [4, 3, 2, 1, 0]


def test_runs_are_ordered_and_chosen_by_the_severity_of_their_verdict(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    verdicts = ("HEALTHY ok", "NH-GAP critical", "NO_DATA ok", "NH-SMALL critical", "NH-LAG warning")
    for i, (code, severity) in enumerate(map(str.split, verdicts)):
        create(client, run_record(f"{run_id}-{i}"))
        store.put_verdict(f"{run_id}-{i}", Verdict.model_validate({"code": code, "severity": severity, "summary": "-"}))
    for limit in (1, 2, 5):
        assert listed(client, run_id, limit=limit, sort="severity") == [3, 1, 4, 2, 0]  # equal ones: the newest first
        assert listed(client, run_id, limit=limit, sort="severity", ascending=True) == [0, 2, 4, 1, 3]
    assert listed(client, run_id, severity="critical") == [3, 1]
    assert listed(client, run_id, severity=["ok", "warning"]) == [4, 0]
    assert listed(client, run_id, severity="info") == [2]  # what is still to come is no good news
    assert client.get("/v1/runs?severity=terrible").status_code == 422


def test_a_run_that_goes_away_between_two_pages_hides_no_other(client: httpx.Client, several: str) -> None:
    first = client.get("/v1/runs", params={"search": several, "limit": 2}).json()
    client.delete(f"/v1/runs/{several}-3")
    create(client, run_record(f"{several}-5"))
    rest = client.get("/v1/runs", params={"search": several, "limit": 5, "cursor": first["next"]}).json()
    assert [run["id"][-1] for run in rest["runs"]] == ["2", "1", "0"]


@pytest.mark.parametrize(
    "cursor",
    [
        *["x", "e30=", "WzFd", "WyJuYW1lIiwgMSwgImEiXQ==", "WyJjcmVhdGVkIiwgbnVsbCwgImEiXQ==", "é", "MQ==", "bnVsbA=="],
        base64.urlsafe_b64encode(b"[" * 5000).decode(),
    ],
)
def test_a_cursor_that_is_none_of_ours_is_refused(client: httpx.Client, cursor: str) -> None:
    answer = client.get("/v1/runs", params={"cursor": cursor})
    assert answer.status_code == 422
    assert "cursor" in answer.json()["detail"]


def test_silence_turns_a_running_run_into_a_stalled_and_then_a_crashed_one() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def after(seconds: float) -> str:
        return state_of("running", now - timedelta(seconds=seconds), now)

    assert [after(0), after(STALLED_SECONDS + 1), after(CRASHED_SECONDS + 1)] == ["running", "stalled", "crashed"]
    assert state_of("finished", now - timedelta(days=9), now) == "finished"
    assert state_of("failed", now, now) == "failed"


def test_notes_stay_when_the_run_goes_on(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    client.patch(f"/v1/runs/{run_id}", json={"notes": "the good one"})
    assert create(client, run_record(run_id)).json()["notes"] == "the good one"


# -------- ranks


def test_ranks_agree_with_numpy_and_the_outlier_is_named(client: httpx.Client, store: Store, run_id: str) -> None:
    T, L, K = 4, 3, 4
    rng = np.random.default_rng(2)
    mu_KTL = rng.standard_normal((K, T, L)) * 0.01
    mu_KTL[2] += 5
    sigma_KTL = 2 + 0.01 * rng.standard_normal((K, T, L))
    create(client, run_record(run_id, layers=L, world_size=K + 1))
    for rank in range(K):
        send(
            client,
            run_id,
            {
                "layers": layer_rows(range(1, T + 1), L, mu_b=mu_KTL[rank], sigma_b=sigma_KTL[rank]),
                "scalars": scalar_rows({wire.SCALAR_STEP_TIME: [(1, rank), (2, rank + 2)]}),
            },
            rank=rank,
        )
    send(client, run_id, {"scalars": scalar_rows({"loss": [(9, 1.0)]})}, rank=0, seq=2)
    found = answers.ranks(store, run_id)
    mu_KL, sigma_KL = mu_KTL.mean(1), sigma_KTL.mean(1)
    scale_L = np.median(sigma_KL, axis=0)
    np.testing.assert_allclose(found.mu_spread, (mu_KL / scale_L).std(0), rtol=1e-4)
    np.testing.assert_allclose(found.sigma_spread, np.log(sigma_KL).std(0), rtol=1e-3)
    assert found.farthest_rank == [2] * L
    assert found.outlier is not None
    assert found.outlier.rank == 2
    assert [(rank.last_step, rank.behind_steps, rank.step_time_seconds) for rank in found.ranks] == [
        (9, 0, 1.0),
        (4, 5, 2.0),
        (4, 5, 3.0),
        (4, 5, 4.0),
        (None, None, None),
    ]


def test_equal_ranks_have_no_spread_and_no_outlier(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=3, ranks=3)
    found = answers.ranks(store, run_id)
    assert found.mu_spread == found.sigma_spread == [0, 0]
    assert found.farthest_rank == [None, None]
    assert found.outlier is None


def test_ranks_look_at_the_newest_steps_unless_told(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=1, steps=NEWEST_STEPS + 30)
    assert (answers.ranks(store, run_id).from_step, answers.ranks(store, run_id).to_step) == (31, NEWEST_STEPS + 30)
    assert answers.ranks(store, run_id, from_step=5, to_step=9).from_step == 5


def test_a_rank_of_nan_hides_neither_the_others_nor_itself(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, world_size=3))
    for rank, mu in enumerate((1.0, math.nan, 1.0)):
        send(client, run_id, {"layers": layer_rows([1], 1, mu_b=mu, sigma_b=2.0)}, rank=rank)
    found = answers.ranks(store, run_id)
    assert math.isnan(found.mu_spread[0] or 0)
    assert found.farthest_rank == [1]


# -------- channels


def test_a_snapshot_is_of_the_rank_that_is_named_or_else_of_the_lowest_one(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, channels=2, world_size=2))
    for rank in (1, 0):
        send(client, run_id, {"channels": channel_rows(10, [[1.0 + rank] * 2], [[0.0] * 2])}, rank=rank)
    for query, rank in (("", 0), ("&rank=0", 0), ("&rank=1", 1)):
        found = client.get(f"/v1/runs/{run_id}/channels?layer=0{query}").raise_for_status().json()
        assert (found["rank"], found["values"]["r"]) == (rank, [1.0 + rank] * 2)


def test_snapshots_are_listed_and_the_worst_channels_lead(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2, channels=3))
    send(client, run_id, {"channels": channel_rows(10, [[1, 1, 1]] * 2, [[0, 0, 0]] * 2)}, seq=1)
    r_LC, d_LC = [[1, 3, 1], [math.nan, 1, math.inf]], [[0, 0, -1], [0, 0, 0]]
    send(client, run_id, {"channels": channel_rows(20, r_LC, d_LC)}, seq=2)
    found = answers.channels(store, run_id, worst=4)
    assert (found.steps, found.step, found.rank, found.values) == ([10, 20], 20, 0, None)
    assert [(c.layer, c.channel) for c in found.worst] == [(1, 0), (1, 2), (0, 1), (0, 2)]
    assert found.worst[2].gap == 4
    one = answers.channels(store, run_id, layer=0, step=10)
    assert one.values is not None
    assert one.values["r"] == [1, 1, 1]
    assert one.values.keys() == {"mu_b", "sigma_b", "between_var", "mu", "sigma", "r", "d"}
    assert {c.layer for c in one.worst} == {0}
    with pytest.raises(Invalid, match="no snapshot of step 15; snapshots: 10, 20"):
        answers.channels(store, run_id, step=15)


def test_the_later_of_two_snapshots_of_a_step_counts(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, channels=1))
    send(client, run_id, {"channels": channel_rows(1, [[9.0]], [[0.0]])}, seq=2)
    send(client, run_id, {"channels": channel_rows(1, [[5.0]], [[0.0]])}, seq=1)
    found = answers.channels(store, run_id, layer=0)
    assert found.values is not None
    assert found.values["r"] == [9.0]


# -------- schedule


def spread(values: Any, channels: int = 100) -> what_if.Spread:
    """One row in one bucket."""
    return what_if.Spread.of(np.array([values], dtype=float), np.array([channels]), np.array([0]), 1)


def clipped(values: Any, limit: float, channels: int = 100) -> float:
    return float(spread(values, channels).clipped(np.array([limit]))[0])


@pytest.mark.parametrize("seed", range(20))
def test_wider_limits_never_clip_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.choice([rng.normal(0, 9), -np.inf, 0.0, 3.0, *rng.normal(0, 9, 9)], 7))
    shares = np.array([clipped(values, limit) for limit in np.linspace(0, 40, 200)])
    assert np.all(np.diff(shares) <= 1e-12)
    assert 0 <= shares.min() <= shares.max() <= 1 + 1e-12


@pytest.mark.parametrize("k", range(1, 6))
def test_a_limit_on_a_percentile_clips_exactly_the_channels_beyond(k: int) -> None:
    values = [100.0, 101, 102, 103, 104, 105, 106]
    assert clipped(values, values[k]) == pytest.approx(1 - wire.QUANTILES[k] / 100)


def test_a_value_on_the_limit_is_not_clipped() -> None:
    assert clipped([3.0] * 7, 3.0) == clipped([-3.0] * 7, 3.0) == 0
    assert clipped([3.0] * 7, 2.9) == clipped([-3.0] * 7, 2.9) == 1


def test_infinite_percentiles_are_outside_every_limit() -> None:
    assert clipped([-np.inf, 0, 0, 0, 0, 0, np.inf], 1e300) == pytest.approx(0.1)
    assert spread([-np.inf, 0, 0, 0, 0, 0, np.inf]).tightest(0.05, 1e6) == np.inf


@pytest.mark.parametrize("limit", [0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("count", [256, 2048, 100_000])
def test_tails_of_bell_shaped_channels_are_met_within_a_fifth(limit: float, count: int) -> None:
    channels = norm.ppf((np.arange(count) + 0.5) / count)
    found = clipped(np.percentile(channels, wire.QUANTILES), limit, len(channels))
    assert found == pytest.approx(2 * norm.sf(limit), rel=0.2)


def test_what_if_agrees_with_channels_counted_one_by_one(client: httpx.Client, store: Store, run_id: str) -> None:
    T, L, C = 40, 2, 400
    rng = np.random.default_rng(3)
    r_TLC, d_TLC = np.exp(0.3 * rng.standard_normal((T, L, C))), rng.standard_normal((T, L, C))
    record = run_record(run_id, layers=L, channels=C)
    create(client, record)
    steps = range(1, T + 1)
    columns = percentiles("r", r_TLC) | percentiles("d", d_TLC)
    snapshot = channel_rows(T, r_TLC[-1].tolist(), d_TLC[-1].tolist())
    send(client, run_id, {"layers": layer_rows(steps, L, **columns), "channels": snapshot})
    found = answers.schedule(store, run_id, r_max=1.5, d_max=1.0, points=4)
    assert found.bucket_steps == 20
    for i, bucket in enumerate([range(1, 20), range(20, 40), range(40, 41)]):
        at = [step - 1 for step in bucket]
        r, d = r_TLC[at], d_TLC[at]
        assert found.clip_r[i] == pytest.approx(np.mean((r > 1.5) | (r < 1 / 1.5)), abs=0.03)
        assert found.clip_d[i] == pytest.approx(np.mean(np.abs(d) > 1), abs=0.03)
    assert found.exact.steps == [T]
    assert found.exact.clip_r[0] == pytest.approx(np.mean((r_TLC[-1] > 1.5) | (r_TLC[-1] < 1 / 1.5)))
    assert found.exact.clip_d[0] == pytest.approx(np.mean(np.abs(d_TLC[-1]) > 1))


def test_the_tightest_limits_keep_the_rate_and_tighter_ones_do_not(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    rng = np.random.default_rng(4)
    r_TLC, d_TLC = np.exp(0.3 * rng.standard_normal((1, 1, 500))), rng.standard_normal((1, 1, 500))
    write_run(client, run_id, layers=1, steps=1, **percentiles("r", r_TLC), **percentiles("d", d_TLC))
    need = answers.schedule(store, run_id, r_max=1, d_max=0, rate=0.1)
    (r_max,), (d_max,) = need.tightest_r_max, need.tightest_d_max
    assert r_max is not None
    assert d_max is not None
    at = answers.schedule(store, run_id, r_max=r_max, d_max=d_max)
    below = answers.schedule(store, run_id, r_max=0.99 * r_max, d_max=0.99 * d_max)
    for kept, broken in ((at.clip_r[0], below.clip_r[0]), (at.clip_d[0], below.clip_d[0])):
        assert kept is not None
        assert broken is not None
        assert kept <= 0.1 + 1e-6 < broken


def test_the_fitted_schedule_is_nowhere_below_the_need_and_touches_it() -> None:
    steps = np.array([5, 10, 20, 30, 40])
    need_r, need_d = np.array([9.0, 1.1, 1.5, 2.0, 1.2]), np.array([9.0, 0.0, 0.0, 0.0, 0.0])
    found = what_if.fitted(steps, need_r, need_d, bn_steps=5)
    assert found is not None
    assert (found.bn_steps, found.r_steps, found.r_max, found.d_steps, found.d_max) == (5, 30, 2.0, 5, 0.0)
    line = 1 + (found.r_max - 1) * np.clip((steps - 5) / (found.r_steps - 5), 0, 1)
    assert np.all(line[1:] >= need_r[1:])


def test_no_schedule_is_fitted_to_nothing_or_to_infinity() -> None:
    steps, need = np.array([5, 10]), np.array([1.0, np.inf])
    assert what_if.fitted(steps, need, np.zeros(2), bn_steps=0) is None
    assert what_if.fitted(steps, np.ones(2), np.zeros(2), bn_steps=10) is None


def test_a_bucket_of_nan_percentiles_is_null_and_not_clipped(client: httpx.Client, store: Store, run_id: str) -> None:
    nan = {f"r_q{q:02d}": [[1.0], [math.nan]] for q in wire.QUANTILES}
    write_run(client, run_id, layers=1, steps=2, **nan)
    found = answers.schedule(store, run_id, r_max=2, d_max=9)
    assert found.clip_r == [0, None]
    assert found.tightest_r_max == [1, None]


def test_a_long_run_is_sampled_and_says_so(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(client, run_id, layers=2, steps=64)
    monkeypatch.setattr(what_if, "MOST_ROWS", 40)
    found = answers.schedule(store, run_id, r_max=2, d_max=2)
    assert found.sampled_every == 4
    assert len(found.steps) < 40
    assert found.steps[-1] == 64


# -------- probe


def test_the_probe_agrees_with_numpy_and_is_judged_in_windows(client: httpx.Client, store: Store, run_id: str) -> None:
    T = 230
    create(client, run_record(run_id, world_size=2))
    sent = [probe_rows(range(1, T + 1), seed=rank) for rank in (0, 1)]
    for rank in (0, 1):
        send(client, run_id, {"probe": sent[rank]}, rank=rank)
    found = answers.probe(store, run_id, points=3)
    assert (found.bucket_steps, found.steps) == (100, [99, 199, 230])
    var_KTF = np.array([table.column("var").to_pylist() for table in sent])
    np.testing.assert_allclose(np.array(found.var)[:, 1], var_KTF[:, 99:199].mean((0, 1)), rtol=1e-5)
    only = answers.probe(store, run_id, rank=1, points=3)
    np.testing.assert_allclose(np.array(only.var)[:, 1], var_KTF[1, 99:199].mean(0), rtol=1e-5)
    assert [(w.first_step, w.last_step) for w in found.windows] == [(31, 130), (131, 230)]
    for window in found.windows:  # independent samples
        for ratio in (window.between, window.within, window.order):
            assert ratio == pytest.approx(1, abs=0.2)


def test_a_probe_without_rows_is_empty(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id))
    found = answers.probe(store, run_id)
    assert found.steps == found.windows == []
    assert found.mean == [[]] * wire.PROBE_FEATURES


# -------- compare


def test_runs_are_compared_on_one_axis(client: httpx.Client, run_id: str) -> None:
    for name, steps, lr in (("a", 10, 0.1), ("b", 40, 0.2)):
        config = {"opt": {"lr": lr, "name": "sgd"}, **({"extra": 1} if name == "b" else {})}
        create(client, run_record(f"{run_id}-{name}", layers=1, planned_steps=2 * steps, config=config))
        rows = {"layers": layer_rows(range(1, steps + 1), 1, gap=lr)}
        rows["scalars"] = scalar_rows({"loss": [(1, 5.0), (steps, lr)], **({"acc": [(1, 1.0)]} if name == "b" else {})})
        send(client, f"{run_id}-{name}", rows)
    params = {"run": [f"{run_id}-a", f"{run_id}-b"], "stat": "gap", "points": 8}
    found = client.get("/v1/compare", params=params).json()
    assert [run["bucket_steps"] for run in found["runs"]] == [10, 10]
    assert found["runs"][0]["x"] == found["runs"][0]["steps"] == [9, 10]
    assert found["config"] == {"planned_steps": [20, 80], "config.opt.lr": [0.1, 0.2], "config.extra": [None, 1]}
    assert found["final"] == {"acc": [None, 1], "loss": [0.1, 0.2]}
    by = client.get("/v1/compare", params=params | {"by": "fraction"}).json()
    assert [run["x"][-1] for run in by["runs"]] == [0.5, 0.5]


@pytest.mark.parametrize("runs", [[], ["a"], ["a", "a"], [f"r{i}" for i in range(21)]])
def test_comparing_wants_two_to_twenty_runs(store: Store, runs: list[str]) -> None:
    with pytest.raises(Invalid, match="2 to 20"):
        answers.compare(store, runs, ["gap"])


def test_six_runs_are_compared_by_as_many_queries_as_two(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [f"{run_id}-{i}" for i in range(6)]
    for i, run in enumerate(runs):
        create(client, run_record(run, layers=1, planned_steps=10 * (i + 1)))
        rows = {"layers": layer_rows(range(1, 31 + i), 1, gap=i), "scalars": scalar_rows({"loss": [(1, i), (2, 2.0)]})}
        send(client, run, rows).raise_for_status()
    client.get("/v1/compare", params={"run": runs, "stat": "gap"}).raise_for_status()  # the engine has all rows
    ask, asking, asked = store.engine.rows, threading.get_ident(), 0

    def counted(sql: str, **parameters: Any) -> pa.Table:
        nonlocal asked
        asked += threading.get_ident() == asking  # a diagnosis runs beside this
        return ask(sql, **parameters)

    monkeypatch.setattr(store.engine, "rows", counted)
    axes: tuple[Axis, ...] = ("step", "fraction")
    for by in axes:
        queries = []
        for some in (runs[:2], runs):
            store._runs._records = Memo(256)  # as after a start: not even the records are known
            asked = 0
            found = answers.compare(store, some, ["gap", "clip_r"], by=by, points=8)
            loss = answers.scalar_of(store, found, "loss")
            queries.append(asked)
            for i, own in enumerate(found.runs):
                newest = {step // own.bucket_steps: step for step in range(1, 31 + i)}  # the last of each bucket stands
                assert own.steps == list(newest.values())
                assert own.series["gap"].mean == [i] * len(newest)
                assert (min(loss[i].min), max(loss[i].max), loss[i].steps[-1]) == (min(i, 2), max(i, 2), 2)
        assert queries == [4, 4]  # records, statistics, final scalars, one scalar's curve


# -------- while rows arrive


def test_an_answer_has_what_waits_written_once_not_before_each_of_its_questions(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(client, run_id, layers=2, steps=3)
    settle, asking = store._taken.settle, threading.get_ident()
    settled: list[str | None] = []

    def counted(run: str | None = None) -> None:
        if threading.get_ident() == asking:  # a diagnosis runs beside this
            settled.append(run)
        settle(run)

    monkeypatch.setattr(store._taken, "settle", counted)
    assert len(answers.summary(store, run_id).layers) == 2
    assert windows.window(store, run_id).last_step == 3
    assert settled == [run_id, run_id]


# -------- export


@pytest.mark.parametrize("table", ["layers", "probe", "scalars", "channels"])
@pytest.mark.parametrize("chunk_rows", [7, 10**6])
def test_every_row_and_digit_is_exported(
    client: httpx.Client, run_id: str, table: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.answers.files.CHUNK_ROWS", chunk_rows)
    create(client, run_record(run_id, layers=2, channels=2))
    sent = {
        "layers": layer_rows(range(1, 12), 2, gap=[[math.nan, math.inf]] * 11),
        "probe": probe_rows(range(1, 12)),
        "scalars": scalar_rows({"loss": [(step, 1 / step) for step in range(1, 12)]}),
        "channels": channel_rows(3, [[1.0, math.nan]] * 2, [[0.5, -0.25]] * 2),
    }
    position = sent["layers"].schema.get_field_index("mean_noise")
    missing = pa.array([None] + [0.5] * 21, pa.float32())
    sent["layers"] = sent["layers"].set_column(position, sent["layers"].schema.field("mean_noise"), missing)
    send(client, run_id, sent).raise_for_status()
    address = f"/v1/runs/{run_id}/export?table={table}"
    exported = pa.parquet.read_table(io.BytesIO(client.get(f"{address}&format=parquet").content))
    assert exported.column("rank").to_pylist() == [0] * sent[table].num_rows
    assert repr(exported.drop_columns("rank").to_pylist()) == repr(sent[table].to_pylist())
    stream = client.get(f"{address}&format=arrow")
    assert stream.headers["content-disposition"] == f'attachment; filename="{run_id}-{table}.arrow"'
    with pa.ipc.open_stream(stream.content) as reader:
        assert repr(reader.read_all().to_pylist()) == repr(exported.to_pylist())
    only_empty = pa.csv.ConvertOptions(null_values=[""])  # by default nan is read as null
    text = pa.csv.read_csv(io.BytesIO(client.get(f"{address}&format=csv").content), convert_options=only_empty)
    assert text.column_names == exported.column_names
    assert text.num_rows == exported.num_rows
    if table == "layers":
        assert text.column("mean_noise").to_pylist() == sent["layers"].column("mean_noise").to_pylist()
        assert repr(text.column("gap")[0].as_py()) == "nan"
    if table == "channels":
        assert text.column("r").to_pylist() == ["[1,nan]"] * 2


def test_an_export_is_read_in_parts_of_like_size_however_far_apart_the_steps_are(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.answers.files.CHUNK_ROWS", 10)
    create(client, run_record(run_id, layers=3))
    steps = [*range(100), 2**50]  # one step far from the others
    send(client, run_id, {"layers": layer_rows(steps, 3)}).raise_for_status()
    parts: list[list[int]] = []
    ask = store.engine.rows

    def seen(sql: str, **parameters: Any) -> pa.Table:
        answer = ask(sql, **parameters)
        if sql.split()[:2] == ["SELECT", "rank,"]:  # not a question of the diagnosis, which runs beside this
            parts.append(answer.column("step").to_pylist())
        return answer

    monkeypatch.setattr(store.engine, "rows", seen)
    assert b"".join(answers.export(store, run_id, "layers", "arrow"))
    assert [step for part in parts for step in part] == [step for step in steps for _ in range(3)]
    assert max(map(len, parts)) <= 10 + 2, "rows at a time, and what is left of the last step"


def test_an_export_of_nothing_has_columns_and_no_rows(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    found = pa.parquet.read_table(io.BytesIO(client.get(f"/v1/runs/{run_id}/export").content))
    assert (found.num_rows, found.column_names) == (0, ["rank", *wire.TABLES["layers"].names])


def test_a_slow_reader_of_an_export_holds_no_connection(
    client: httpx.Client, store: Store, settings: Settings, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.answers.files.CHUNK_ROWS", 1)
    write_run(client, run_id, layers=1, steps=5)
    exports = [answers.export(store, run_id, "layers", "csv") for _ in range(settings.readers + 1)]
    for parts in exports:
        next(parts)  # waits for ever if the others held their connections
    assert sum(len(list(parts)) for parts in exports) > 0


# -------- unknown runs and input


def test_every_answer_about_an_unknown_run_is_a_404(store: Store) -> None:
    for ask in (
        lambda: answers.ranks(store, "nope"),
        lambda: answers.channels(store, "nope"),
        lambda: answers.probe(store, "nope"),
        lambda: answers.schedule(store, "nope", r_max=1, d_max=0),
        lambda: answers.compare(store, ["nope", "no"], ["gap"]),
        lambda: answers.export(store, "nope", "layers", "csv"),
    ):
        with pytest.raises(NotFound, match="no run 'nope'"):
            ask()


@pytest.mark.parametrize("evil", ["gap) FROM runs --", "1; DROP TABLE runs", "' OR 1 = 1 --", "{run:String}"])
def test_no_text_of_a_request_becomes_sql(client: httpx.Client, run_id: str, evil: str) -> None:
    write_run(client, run_id, layers=1, steps=2)
    base = f"/v1/runs/{run_id}"
    for path, params in (
        (f"{base}/series", {"stat": evil}),
        (f"{base}/heatmap", {"stat": evil}),
        (f"{base}/scalars", {"name": evil}),
        (f"{base}/export", {"table": evil}),
        (f"{base}/export", {"format": evil}),
        ("/v1/compare", {"run": [run_id, "b"], "stat": evil}),
        ("/v1/runs", {"sort": evil}),
    ):
        assert client.get(path, params=params).status_code == 422, path
    assert client.get("/v1/compare", params={"run": [run_id, evil], "stat": "gap"}).status_code == 404
    assert client.get("/v1/runs", params={"search": evil, "tag": evil}).json()["runs"] == []
    send(client, run_id, {"scalars": scalar_rows({evil: [(3, 1.0)]})}, seq=2)
    assert client.get(f"{base}/scalars", params={"name": evil}).json()["series"][evil]["mean"] == [1]
    assert json.loads(client.get(base).content)["rows"] == 2
