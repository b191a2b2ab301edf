"""The shadow pass: harm is called when inference loses, named by its largest part, not before the run has settled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from brn_core.wire import SCALAR_SHADOW_DISAGREEMENT, SCALAR_SHADOW_EVAL_LOSS, SCALAR_SHADOW_TRAIN_LOSS
from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.harm import Shadow, by_chance, settling_steps, shadow
from service.diagnosis.rules import diagnose
from service.diagnosis.window import Window

MakeWindow = Callable[..., Window]
Streams = Any  # conftest.Streams


def passes(loss_gap: Any, *, disagreement: float | None = None, every: int = 50, n: int = 40) -> dict[str, Any]:
    """Shadow scalars of `n` passes with noise of .05 in the loss."""
    rng = np.random.default_rng(1)
    steps = np.arange(n) * every
    train = 1 + 0.05 * rng.normal(size=n)
    rows: dict[str, Any] = {
        SCALAR_SHADOW_TRAIN_LOSS: (steps, train),
        SCALAR_SHADOW_EVAL_LOSS: (steps, train + loss_gap + 0.05 * rng.normal(size=n)),
    }
    if disagreement is not None:
        rows[SCALAR_SHADOW_DISAGREEMENT] = (steps, np.full(n, disagreement))
    return rows


def gap_columns(
    *, sampling: float = 0.0, clustered: float = 0.0, slow: float = 0.0, steps: int = 400
) -> dict[str, np.ndarray[Any, Any]]:
    """Layer rows whose gap has these parts, in the mean and not in the scale."""
    rng = np.random.default_rng(2)
    noise = sampling * rng.gamma(16, 1 / 16, size=(steps, 1, 2))
    fast = (sampling + clustered) * rng.gamma(4, 1 / 4, size=(steps, 1, 2))
    zero = np.zeros((steps, 1, 2))
    return {
        "mean_noise": noise,
        "mean_diff2": fast,
        "scale_noise": zero,
        "scale_diff2": zero,
        "gap": fast + slow,
    }


def gap_finding(diagnosis: Diagnosis) -> Finding | None:
    return next((f for f in diagnosis.findings if f.code == "NH-GAP"), None)


def test_a_loss_gap_above_a_fifth_is_critical_and_carries_its_interval(make_window: MakeWindow) -> None:
    finding = gap_finding(diagnose(make_window(scalars=passes(1.65))))

    assert finding is not None
    assert finding.severity == "critical"
    evidence = finding.evidence
    assert evidence is not None
    assert evidence.low is not None
    assert evidence.high is not None
    assert evidence.low < 1.65 < evidence.high
    assert evidence.high - evidence.low < 0.3
    assert evidence.query == ("/v1/runs/run-1/scalars?name=brn/shadow_train_loss&name=brn/shadow_eval_loss")


def losses(train: Any, gap: Any, *, disagreement: float | None = None) -> dict[str, Any]:
    steps = np.arange(len(train)) * 50
    rows: dict[str, Any] = {
        SCALAR_SHADOW_TRAIN_LOSS: (steps, train),
        SCALAR_SHADOW_EVAL_LOSS: (steps, train + gap),
    }
    if disagreement is not None:
        rows[SCALAR_SHADOW_DISAGREEMENT] = (steps, np.full(len(train), disagreement))
    return rows


@pytest.mark.parametrize(
    ("size", "spread", "disagreement"), [(100.0, 3.0, None), (10.0, 1.0, None), (2.0, 0.5, 0.05), (0.5, 1.0, 0.05)]
)
def test_a_noisy_loss_whose_mean_is_the_same_in_inference_is_no_harm(
    make_window: MakeWindow, size: float, spread: float, disagreement: float | None
) -> None:
    called = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        train = size * (1 + 0.1 * rng.normal(size=40))
        window = make_window(scalars=losses(train, spread * rng.normal(size=40), disagreement=disagreement))
        measured = shadow(window)
        assert isinstance(measured, Shadow)
        called += measured.harmful

    assert called <= 5  # the bound is .01 for each of three widths, and twice to five times what really happens


def test_the_bound_on_chance_holds_for_all_signs_and_is_no_more_than_a_few_times_their_share() -> None:
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    rng = np.random.default_rng(0)
    for gap in (*(rng.normal(0.5, 1, size=10) for _ in range(20)), *(rng.gamma(0.5, 2, size=10) for _ in range(20))):
        exact = float((signs @ np.abs(gap) >= gap.sum() - 1e-12).mean())

        assert exact <= by_chance(gap) * (1 + 1e-9)
        assert by_chance(gap) <= max(8 * exact, 0.02)

    assert by_chance(np.full(10, 0.3)) == pytest.approx(2.0**-10)
    assert by_chance(np.zeros(10)) == 1


@pytest.mark.parametrize("shape", [1.0, 0.5])  # a spread of once and of 1.4 times the mean: contrast drawn once a batch
def test_harm_that_comes_in_bursts_is_called_by_ten_passes(make_window: MakeWindow, shape: float) -> None:
    called = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gap = rng.gamma(shape, 1.4 / shape, size=15)
        measured = shadow(make_window(scalars=losses(1 + 0.05 * rng.normal(size=15), gap, disagreement=0.4)))
        assert isinstance(measured, Shadow)
        called += measured.harmful

    assert called >= 95


def test_harm_that_a_third_of_the_batches_shows_is_called_by_forty_passes(make_window: MakeWindow) -> None:
    called = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gap = np.where(rng.random(45) < 1 / 3, 3.0, 0.0) + 0.1 * rng.normal(size=45)
        measured = shadow(make_window(scalars=losses(1 + 0.05 * rng.normal(size=45), gap, disagreement=0.4)))
        assert isinstance(measured, Shadow)
        called += measured.harmful

    assert called >= 95


def test_without_classes_harm_is_measured_by_the_size_of_the_loss(make_window: MakeWindow) -> None:
    rng = np.random.default_rng(0)
    train = 100 * (1 + 0.1 * rng.normal(size=40))
    tenth = gap_finding(diagnose(make_window(scalars=losses(train, 10 + rng.normal(size=40)))))
    half = gap_finding(diagnose(make_window(scalars=losses(train, 50 + rng.normal(size=40)))))

    assert tenth is None
    assert half is not None
    assert half.evidence is not None
    assert half.evidence.threshold == pytest.approx(20, rel=0.1)


def test_a_frozen_first_layer_leaves_the_gap_to_the_first_that_trains(make_window: MakeWindow) -> None:
    columns = gap_columns(sampling=0.12)
    for column in columns.values():
        column[:, :, 0] = np.nan
    finding = gap_finding(diagnose(make_window(scalars=passes(-0.25, disagreement=0.16, every=10), columns=columns)))

    assert finding is not None
    assert finding.layers == ("bn2",)


def test_inference_that_agrees_is_healthy(make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(scalars=passes(-0.02, disagreement=0.06), status="finished"))

    assert diagnosis.verdict.code == "HEALTHY"
    assert "inference agrees" in diagnosis.verdict.summary
    assert "Not judged: NH-CLUSTER" in diagnosis.verdict.summary


def test_before_25_time_constants_nothing_is_called_and_the_wait_is_said(make_window: MakeWindow) -> None:
    # momentum .01: settled from step 2500 on; 30 passes reach step 1450; 10 passes after 2500 end at step 2950.
    window = make_window(scalars=passes(1.0, n=30), momentum=0.01)
    diagnosis = diagnose(window)

    assert gap_finding(diagnosis) is None
    assert diagnosis.verdict.code == "WARMUP"
    withheld = next(f for f in diagnosis.findings if f.summary.startswith("NH-GAP"))
    assert "after step 2500" in withheld.summary
    assert "1550 more steps" in withheld.summary


def test_settling_follows_the_slowest_layer_and_has_a_value_for_cumulative_averages(make_window: MakeWindow) -> None:
    assert settling_steps(make_window(momentum=0.1).layers) == 250
    assert settling_steps(make_window(momentum=None).layers) == 2500


def test_a_gap_that_batch_renorm_has_closed_is_not_reported(make_window: MakeWindow) -> None:
    closing = np.where(np.arange(40) < 20, 1.0, 0.0)

    assert gap_finding(diagnose(make_window(scalars=passes(closing)))) is None


def test_a_gap_that_opened_later_is_dated_to_its_tenth_pass(make_window: MakeWindow) -> None:
    opening = np.where(np.arange(40) < 20, 0.0, 5.0)
    finding = gap_finding(diagnose(make_window(scalars=passes(opening))))

    assert finding is not None
    assert 20 * 50 <= finding.steps[0] <= 30 * 50
    assert finding.steps[1] == 39 * 50


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"sampling": 0.3, "clustered": 0.0, "slow": 0.05}, "sampling noise"),
        ({"sampling": 0.01, "clustered": 0.3, "slow": 0.02}, "not random samples"),
        ({"sampling": 0.01, "clustered": 0.0, "slow": 0.3}, "slow"),
    ],
)
def test_the_largest_part_of_the_gap_is_named_and_its_remedy_given(
    make_window: MakeWindow, parts: dict[str, float], named: str
) -> None:
    finding = gap_finding(diagnose(make_window(scalars=passes(0.8), columns=gap_columns(**parts))))

    assert finding is not None
    assert named in finding.summary
    assert finding.layers == ("bn1",)
    assert finding.remedy is not None
    assert finding.remedy.code is not None


def test_sampling_noise_is_not_called_clustered_while_f_can_be_1(make_window: MakeWindow) -> None:
    finding = gap_finding(
        diagnose(make_window(scalars=passes(0.8), columns=gap_columns(sampling=0.1, clustered=0.002)))
    )

    assert finding is not None
    assert "100% of the gap at bn1 is sampling noise" in finding.summary


def test_disagreement_warns_only_where_the_layers_show_a_gap_that_could_cause_it(make_window: MakeWindow) -> None:
    scalars = passes(-0.25, disagreement=0.16, every=10)
    noisy = gap_finding(diagnose(make_window(scalars=scalars, columns=gap_columns(sampling=0.12))))
    calm = gap_finding(diagnose(make_window(scalars=scalars, columns=gap_columns(sampling=0.004))))

    assert noisy is not None
    assert noisy.severity == "warning"
    assert "16%" in noisy.summary
    assert calm is None


def test_a_network_that_has_just_slowed_down_is_not_called_noisy(make_window: MakeWindow) -> None:
    # 100 classes, N = 32: the gap was large while the network moved fast, and predictions still change. dL is nothing.
    columns = gap_columns(sampling=0.02)
    columns["gap"][:250] += 0.2
    early = passes(-0.25, disagreement=0.24, every=10)
    alike = passes(-0.01, disagreement=0.24, every=10)

    assert gap_finding(diagnose(make_window(scalars=early, columns=columns))) is None
    assert gap_finding(diagnose(make_window(scalars=alike, columns=gap_columns(sampling=0.12)))) is None


def test_a_run_without_a_shadow_pass_is_told_how_to_get_one(make_window: MakeWindow, streams: Streams) -> None:
    diagnosis = diagnose(make_window(probe=streams.iid(1), status="finished"))
    withheld = next(f for f in diagnosis.findings if f.code == "NH-WITHHELD")

    assert diagnosis.verdict.code == "HEALTHY"
    assert withheld.remedy is not None
    assert "shadow_loss" in withheld.remedy.text


def test_passes_are_paired_by_step_and_non_finite_ones_left_out(make_window: MakeWindow) -> None:
    scalars = passes(0.5)
    steps, evaluated = scalars[SCALAR_SHADOW_EVAL_LOSS]
    scalars[SCALAR_SHADOW_EVAL_LOSS] = (steps[3:], evaluated[3:])  # three rows are missing at the start
    train_steps, train = scalars[SCALAR_SHADOW_TRAIN_LOSS]
    scalars[SCALAR_SHADOW_TRAIN_LOSS] = (train_steps, np.where(train_steps == 1900, np.nan, train))
    measured = shadow(make_window(scalars=scalars))

    assert isinstance(measured, Shadow)
    assert measured.loss_gap == pytest.approx(0.5, abs=0.08)
    assert 1900 not in measured.steps_P


def test_a_cause_becomes_critical_by_its_consequence_and_the_verdict_says_both(
    make_window: MakeWindow, streams: Streams
) -> None:
    probe = streams.few_labels(1, labels=6)
    alone = diagnose(make_window(probe=probe, scalars=passes(0.0)))
    harmed = diagnose(make_window(probe=probe, scalars=passes(1.2)))

    assert (alone.verdict.code, alone.verdict.severity) == ("NH-CLUSTER", "warning")
    assert "inference does not lose" in alone.verdict.summary
    assert (harmed.verdict.code, harmed.verdict.severity) == ("NH-CLUSTER", "critical")
    assert "inference mode is 1.2" in harmed.verdict.summary
