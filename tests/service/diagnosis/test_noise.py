"""Batches too small, tails too heavy: called where samples say so, silent on large and on clustered batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.rules import diagnose
from service.diagnosis.window import Window
from tests.streams import layer_rows, network_rows

MakeWindow = Callable[..., Window]


def named(diagnosis: Diagnosis, code: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.code == code), None)


def one_layer(make_window: MakeWindow, rows: dict[str, Any], **more: Any) -> Diagnosis:
    return diagnose(make_window(columns=rows, kinds=more.pop("kinds", ("BatchNorm",)), **more))


@pytest.mark.parametrize(("n", "rho", "severity"), [(2, 0.3, "critical"), (4, 0.3, "warning"), (8, 1.0, "critical")])
def test_small_batches_are_named_with_their_noise(make_window: MakeWindow, n: int, rho: float, severity: str) -> None:
    for seed in range(5):
        finding = named(one_layer(make_window, layer_rows(seed, n=n, rho=rho)), "NH-SMALL")
        assert finding is not None
        assert finding.severity == severity
        assert f"A batch of {n} is too small" in finding.summary
        evidence = finding.evidence
        assert evidence is not None
        assert evidence.low is not None
        assert evidence.high is not None
        assert evidence.low < evidence.value < evidence.high


def test_batches_of_32_are_large_enough_clustered_or_not(make_window: MakeWindow) -> None:
    for seed in range(4):
        for clustered in (0.0, 0.5):
            diagnosis = one_layer(make_window, layer_rows(seed, n=32, rho=0.3, clustered=clustered))
            assert named(diagnosis, "NH-SMALL") is None


def test_a_rectified_fully_connected_layer_is_a_note_from_16_samples_on(make_window: MakeWindow) -> None:
    for seed in range(5):
        severities = {}
        for n in (64, 32, 16, 8):
            finding = named(one_layer(make_window, layer_rows(seed, n=n, tails="relu")), "NH-SMALL")
            severities[n] = finding and finding.severity
        assert severities == {64: None, 32: "info", 16: "info", 8: "critical"}


def test_a_tail_is_the_cause_and_does_not_make_a_large_batch_small(make_window: MakeWindow) -> None:
    for seed in range(5):
        diagnosis = one_layer(make_window, layer_rows(seed, n=32, outliers=0.01))
        small = named(diagnosis, "NH-SMALL")
        assert diagnosis.verdict.code == "NH-TAIL"
        assert small is None or small.severity == "info"


def test_ranks_that_normalize_together_count_together(make_window: MakeWindow) -> None:
    rows = layer_rows(0, n=8, ranks=8)
    apart = named(one_layer(make_window, rows, world_size=8), "NH-SMALL")
    shared = rows | {"gap": np.broadcast_to(rows["gap"][:, :1], rows["gap"].shape).copy()}

    assert apart is not None
    assert apart.remedy is not None
    assert apart.remedy.code is not None
    assert "sync_batchnorm" in apart.remedy.code
    assert named(one_layer(make_window, shared, world_size=8), "NH-SMALL") is None


def test_the_noise_is_the_gap_that_independent_batches_have(make_window: MakeWindow) -> None:
    # An independent route to G_iid: the mean gap itself, once the moving statistics have settled.
    rows = layer_rows(1, n=4, momentum=0.01, steps=3000)
    newest = {name: values[-400:] for name, values in rows.items()}
    finding = named(one_layer(make_window, newest, steps=np.arange(2600, 3000), momentum=0.01), "NH-SMALL")

    assert finding is not None
    assert finding.evidence is not None
    assert finding.evidence.value == pytest.approx(float(newest["gap"].mean()), rel=0.15)


def test_outliers_are_tails_and_not_small_batches(make_window: MakeWindow) -> None:
    for seed in range(5):
        clean = layer_rows(seed, n=32, rho=0.3)
        diagnosis = diagnose(make_window(columns=network_rows(clean, layer_rows(seed, n=32, rho=0.3, outliers=0.01))))
        finding = named(diagnosis, "NH-TAIL")
        assert finding is not None
        assert finding.layers == ("bn2",)


@pytest.mark.parametrize("tails", ["normal", "relu"])
def test_normal_and_rectified_samples_have_no_heavy_tails(make_window: MakeWindow, tails: str) -> None:
    for seed in range(4):
        for n in (8, 16, 32):
            rows = layer_rows(seed, n=n, tails=tails)
            assert named(one_layer(make_window, rows), "NH-TAIL") is None


def test_one_broken_batch_is_no_tail(make_window: MakeWindow) -> None:
    rows = layer_rows(3)
    rows["scale_noise"][370] = 1e6

    assert named(one_layer(make_window, rows), "NH-TAIL") is None


def test_batches_below_eight_have_no_fourth_moment_to_speak_of(make_window: MakeWindow) -> None:
    assert named(one_layer(make_window, layer_rows(3, n=4, outliers=0.02)), "NH-TAIL") is None


def test_the_variance_between_small_batches_is_missing_from_the_moving_one(make_window: MakeWindow) -> None:
    small = named(one_layer(make_window, layer_rows(0, n=4)), "NH-POOLBIAS")
    large = named(one_layer(make_window, layer_rows(0, n=32)), "NH-POOLBIAS")

    assert small is not None
    assert small.severity == "info"
    assert small.evidence is not None
    # sigma_B² of a batch of 4 lacks a quarter of the variance, the mean of sigma_B (.798)² instead of 1 more than that
    assert small.evidence.value == pytest.approx(0.25 / (0.25 + 0.798**2), abs=0.04)
    assert large is None


def test_a_pinned_deep_layer_is_a_note(make_window: MakeWindow) -> None:
    free, pinned = layer_rows(0), layer_rows(1)
    pinned["mean_diff2"] = 0.15 * pinned["mean_diff2"]
    finding = named(diagnose(make_window(columns=network_rows(free, pinned))), "NH-COUPLED")

    assert finding is not None
    assert finding.severity == "info"
    assert finding.layers == ("bn2",)
    assert finding.evidence is not None
    assert finding.evidence.value == pytest.approx(0.85, abs=0.05)
    assert named(diagnose(make_window(columns=network_rows(free, layer_rows(1)))), "NH-COUPLED") is None


def test_before_five_time_constants_the_layers_abstain_together(make_window: MakeWindow) -> None:
    diagnosis = one_layer(make_window, layer_rows(0, n=4, steps=120), momentum=0.1)
    withheld = [f.summary for f in diagnosis.findings if f.summary.startswith("NH-SMALL")]

    assert len(withheld) == 1
    assert withheld[0].startswith("NH-SMALL, NH-TAIL, NH-LAG and NH-DEAD are withheld: 70 recorded steps came after ")
    assert "about 30 more steps" in withheld[0]


def test_a_harmless_shadow_pass_keeps_a_small_batch_a_warning(make_window: MakeWindow) -> None:
    rows, steps = layer_rows(0, n=2), np.arange(40) * 20
    shadow = {"brn/shadow_train_loss": (steps, np.ones(40)), "brn/shadow_eval_loss": (steps, np.ones(40))}

    assert one_layer(make_window, rows).verdict.severity == "critical"
    assert one_layer(make_window, rows, scalars=shadow).verdict.severity == "warning"


def test_outliers_too_rare_to_show_at_every_look_are_found_within_300_steps(make_window: MakeWindow) -> None:
    rows = [layer_rows(seed, n=32, rho=0.3, outliers=0.007, steps=300) for seed in range(7000, 7030)]

    assert sum(named(one_layer(make_window, columns), "NH-TAIL") is not None for columns in rows) >= 27
