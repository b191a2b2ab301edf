"""The network against its moving statistics: lag, schedules, runaway."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from brn_core.wire import Schedule
from service.diagnosis.drift import loss_rise, slow_energy
from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.rules import diagnose
from service.diagnosis.window import LAYER_COLUMNS, LayerRows, Opening, ScalarRows, Window
from tests.streams import Streams, layer_rows

MakeWindow = Callable[..., Window]
SCHEDULE = Schedule(bn_steps=200, r_steps=1000, d_steps=800, r_max=3.0, d_max=5.0)


def named(diagnosis: Diagnosis, code: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.code == code), None)


def one_layer(make_window: MakeWindow, rows: dict[str, Any], **more: Any) -> Window:
    return make_window(columns=rows, kinds=more.pop("kinds", ("BatchNorm",)), **more)


@pytest.mark.parametrize(("n", "momentum"), [(4, 0.1), (32, 0.1), (32, 0.02), (8, 0.5)])
def test_the_slow_energy_of_a_network_that_moves_v_a_step_is_v_over_alpha_squared(
    make_window: MakeWindow, n: int, momentum: float
) -> None:
    for velocity in (0.0, 0.5 * momentum):
        rows = layer_rows(0, n=n, momentum=momentum, drift=velocity, steps=900)
        window = one_layer(make_window, rows, momentum=momentum)
        sigma = float(rows["sigma"][300:].mean())
        expected = (velocity / momentum / sigma) ** 2

        assert np.nanmean(slow_energy(window, window.rows)[300:]) == pytest.approx(expected, rel=0.15, abs=0.02)


def test_a_trailing_moving_mean_is_named_and_a_faster_one_is_the_remedy(make_window: MakeWindow) -> None:
    for seed in range(5):
        rows = layer_rows(seed, momentum=0.02, drift=0.014, steps=600)
        finding = named(diagnose(one_layer(make_window, rows, momentum=0.02)), "NH-LAG")
        assert finding is not None
        assert finding.evidence is not None
        assert finding.evidence.low is not None
        assert 0.25 < finding.evidence.low < finding.evidence.value
        assert finding.remedy is not None
        assert finding.remedy.code == "for m in norm_layers: m.momentum = 0.1"


@pytest.mark.parametrize("settings", [{"n": 2}, {"clustered": 1.0}, {"tails": "relu"}, {"drift": 0.01}, {"n": 4}])
def test_noise_clustering_and_a_slow_network_are_no_lag(make_window: MakeWindow, settings: dict[str, Any]) -> None:
    for seed in range(5):
        assert named(diagnose(one_layer(make_window, layer_rows(seed, **settings))), "NH-LAG") is None


@pytest.mark.parametrize(
    ("n", "tails", "momentum"),
    [
        *((2, "relu", momentum) for momentum in (0.1, 0.3)),
        *((n, "sparse", momentum) for n in (2, 3, 4, 8) for momentum in (0.02, 0.1, 0.3)),
    ],
)
def test_a_sigma_that_few_rectified_samples_move_is_no_lag(
    make_window: MakeWindow, n: int, tails: str, momentum: float
) -> None:
    for seed in range(8):
        rows = layer_rows(seed, n=n, tails=tails, momentum=momentum, steps=600)
        assert named(diagnose(one_layer(make_window, rows, momentum=momentum)), "NH-LAG") is None


@pytest.mark.parametrize("n", [4, 8, 32])
def test_rectified_batches_do_not_hide_a_mean_that_trails(make_window: MakeWindow, n: int) -> None:
    for seed in range(5):
        rows = layer_rows(seed, n=n, tails="relu", momentum=0.1, drift=0.08, steps=600)
        assert named(diagnose(one_layer(make_window, rows)), "NH-LAG") is not None


def test_ordered_data_explains_its_own_distance(make_window: MakeWindow, streams: Streams) -> None:
    rows = layer_rows(0, momentum=0.02, drift=0.014, steps=600)
    window = one_layer(make_window, rows, momentum=0.02, probe=streams.sorted_labels(0))

    assert named(diagnose(window), "NH-ORDER") is not None
    assert named(diagnose(window), "NH-LAG") is None


def test_a_scale_that_doubles_every_70_steps_is_a_runaway_with_its_doubling_time(make_window: MakeWindow) -> None:
    rows = layer_rows(0, growth=0.01, steps=400)
    window = one_layer(make_window, rows, first_sigma_L=np.array([1.0]))
    finding = named(diagnose(window), "NH-RUNAWAY")

    assert finding is not None
    assert finding.severity == "warning"
    doubling = re.search(r"doubling every (\d+) steps", finding.summary)
    assert doubling is not None
    assert int(doubling[1]) == pytest.approx(np.log(2) / 0.01, abs=3)


def test_a_runaway_with_a_rising_loss_is_critical(make_window: MakeWindow) -> None:
    steps = np.arange(400)
    loss = np.where(steps < 250, 1.0, 1.0 + (steps - 250) * 0.02)
    window = one_layer(
        make_window, layer_rows(0, growth=0.01), first_sigma_L=np.array([1.0]), scalars={"loss": (steps, loss)}
    )

    assert diagnose(window).verdict.code == "NH-RUNAWAY"
    assert diagnose(window).verdict.severity == "critical"


def test_tenfold_growth_and_layers_that_began_without_variance_are_no_runaway(make_window: MakeWindow) -> None:
    tenfold = one_layer(make_window, layer_rows(0, growth=0.0055), first_sigma_L=np.array([1.0]))
    zero_start = one_layer(make_window, layer_rows(0), first_sigma_L=np.array([1e-5**0.5]))

    assert named(diagnose(tenfold), "NH-RUNAWAY") is None
    assert named(diagnose(zero_start), "NH-RUNAWAY") is None


def test_a_jump_of_half_the_channels_is_called_at_its_second_row_and_one_broken_batch_is_not(
    make_window: MakeWindow,
) -> None:
    once, twice = layer_rows(0), layer_rows(0)
    once["r_q50"][300] = 40.0
    twice["r_q50"][300:302] = 40.0
    finding = named(diagnose(one_layer(make_window, twice)), "NH-RUNAWAY")

    assert named(diagnose(one_layer(make_window, once)), "NH-RUNAWAY") is None
    assert finding is not None
    assert finding.steps == (301, 301)


def opening(*, drift: float, loss_after: float, gap_after: float = 1.0, seed: int = 0, before: int = 50) -> Opening:
    """Rows from `before` steps before step 200 to 100 after it; momentum .1."""
    rows = layer_rows(seed, drift=drift, steps=300)
    begin = 200 - before
    rows["gap"][200:] *= gap_after
    rng = np.random.default_rng(seed)
    steps = np.arange(begin, 300)
    loss = np.where(steps < 200, 1.0, loss_after) + 0.1 * rng.normal(size=len(steps))
    columns = {name: rows[name][begin:] for name in LAYER_COLUMNS}
    return Opening(200, LayerRows(steps, columns), ScalarRows(steps, loss))


def opened(make_window: MakeWindow, at: Opening) -> Diagnosis:
    return diagnose(
        make_window(
            columns=layer_rows(0, n=32),
            steps=np.arange(2000, 2400),
            kinds=("BatchRenorm",),
            schedule=SCHEDULE,
            opening=at,
        )
    )


def test_limits_that_opened_on_a_trailing_mean_with_a_rising_loss_are_named_long_afterwards(
    make_window: MakeWindow,
) -> None:
    for seed in range(5):
        finding = named(opened(make_window, opening(drift=0.03, loss_after=1.6, seed=seed)), "NH-SCHED-FAST")
        assert finding is not None
        assert finding.steps[0] == 200
        assert "the loss rose to 1." in finding.summary
        assert finding.remedy is not None
        assert finding.remedy.code is not None
        assert "bn_steps=400" in finding.remedy.code


def test_a_gap_that_grows_threefold_counts_as_suffering_too(make_window: MakeWindow) -> None:
    finding = named(opened(make_window, opening(drift=0.03, loss_after=1.0, gap_after=6.0)), "NH-SCHED-FAST")

    assert finding is not None
    assert "the gap grew" in finding.summary


def test_a_small_gap_may_grow_threefold_once_the_limits_no_longer_pin_the_means(make_window: MakeWindow) -> None:
    at = opening(drift=0.03, loss_after=1.0, gap_after=3.5)
    at.rows.columns["gap"] *= 0.02 / at.rows.columns["gap"][:50].mean()

    assert named(opened(make_window, at), "NH-SCHED-FAST") is None


@pytest.mark.parametrize(
    "calm", [{"drift": 0.0, "loss_after": 1.6}, {"drift": 0.03, "loss_after": 1.05}, {"drift": 0.0, "loss_after": 1.0}]
)
def test_a_settled_mean_or_a_steady_loss_is_no_hasty_schedule(make_window: MakeWindow, calm: dict[str, float]) -> None:
    for seed in range(5):
        assert named(opened(make_window, opening(**calm, seed=seed)), "NH-SCHED-FAST") is None


def test_a_recording_that_began_after_the_opening_says_so(make_window: MakeWindow) -> None:
    diagnosis = opened(make_window, opening(drift=0.03, loss_after=1.6, before=5))

    assert named(diagnosis, "NH-SCHED-FAST") is None
    assert any("from before step 200, when the limits opened" in f.summary for f in diagnosis.findings)


def test_a_falling_noisy_loss_never_rises() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        loss = np.exp(-np.arange(1000) / 150) * rng.gamma(2, 0.5, size=1000) + 0.02 * rng.gamma(1, size=1000)
        assert loss_rise(ScalarRows(np.arange(1000), loss)) is None


def test_a_loss_that_rises_by_half_is_measured_against_its_best(make_window: MakeWindow) -> None:
    steps = np.arange(400)
    rise = loss_rise(ScalarRows(steps, np.where(steps < 200, 1.0, 1.5)))

    assert rise == pytest.approx(1.5)
    assert loss_rise(ScalarRows(steps[:60], np.ones(60))) is None
    assert loss_rise(None) is None


def test_settled_statistics_behind_closed_limits_are_a_note(make_window: MakeWindow) -> None:
    def slow(rows: dict[str, Any], **more: Any) -> Finding | None:
        window = one_layer(
            make_window, rows, steps=np.arange(1000, 1400), kinds=("BatchRenorm",), schedule=SCHEDULE, **more
        )
        return named(diagnose(window), "NH-SCHED-SLOW")

    finding = slow(layer_rows(0))
    assert finding is not None
    assert finding.severity == "info"
    assert slow(layer_rows(0, drift=0.03)) is None
    final = layer_rows(0)
    assert slow(final | {"r_max": final["r_max"] * 3, "d_max": final["d_max"] + 5}) is None
    assert slow(final | {"residual": final["gap"] * 0.05}) is None
