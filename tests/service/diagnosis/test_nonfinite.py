"""NaN and infinity: the first place is named, and what made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from brn_core.wire import SCALAR_SHADOW_EVAL_LOSS, Schedule
from service.diagnosis.rules import diagnose
from service.diagnosis.window import NonFinite, Window

MakeWindow = Callable[..., Window]
Streams = Any  # conftest.Streams

AT_SECOND_LAYER = NonFinite(step=312, layer=1, rank=1, channels=7)


def test_the_first_layer_rank_and_step_are_named_and_stand_over_all_else(
    make_window: MakeWindow, streams: Streams
) -> None:
    probe = streams.few_labels(1, labels=2, ranks=2, n=8)
    diagnosis = diagnose(make_window(probe=probe, nonfinite=AT_SECOND_LAYER))
    finding = diagnosis.findings[0]

    assert (finding.code, finding.severity) == ("NH-NONFINITE", "critical")
    assert diagnosis.verdict.code == "NH-NONFINITE"
    assert (finding.ranks, finding.layers, finding.steps[0]) == ((1,), ("bn2",), 312)
    assert "7 of 16 channels" in finding.summary
    assert "between bn1 (still finite) and it" in finding.summary
    assert any(f.code == "NH-CLUSTER" for f in diagnosis.findings)


def test_a_loss_that_failed_before_the_layers_is_said_to(make_window: MakeWindow) -> None:
    loss = np.where(np.arange(400) >= 300, np.nan, 1.0)
    summary = (
        diagnose(make_window(nonfinite=AT_SECOND_LAYER, scalars={"loss": (np.arange(400), loss)})).findings[0].summary
    )

    assert "the loss was not finite before, at step 300" in summary


def test_an_input_that_failed_first_is_said_to(make_window: MakeWindow, streams: Streams) -> None:
    probe = streams.iid(1, ranks=2, n=8)
    spoiled = replace(probe, mean_TKF=probe.mean_TKF.copy())
    spoiled.mean_TKF[312, 1, 5] = np.inf
    finding = diagnose(make_window(probe=spoiled, nonfinite=AT_SECOND_LAYER)).findings[0]

    assert "the input itself was not finite at step 312" in finding.summary
    assert finding.remedy is not None
    assert finding.remedy.code is not None
    assert "isfinite" in finding.remedy.code


def test_a_non_finite_loss_alone_is_critical(make_window: MakeWindow) -> None:
    loss = np.where(np.arange(100) == 60, np.inf, 1.0)
    finding = diagnose(make_window(scalars={"loss": (np.arange(100), loss)}, config={"lr": 0.3})).findings[0]

    assert (finding.code, finding.severity, finding.steps[0]) == ("NH-NONFINITE", "critical", 60)
    assert finding.remedy is not None
    assert finding.remedy.code == "lr = 0.1"


def test_a_loss_that_fails_only_in_inference_blames_the_moving_statistics(make_window: MakeWindow) -> None:
    scalars = {SCALAR_SHADOW_EVAL_LOSS: (np.arange(5) * 50, np.array([1, 1, np.nan, np.nan, np.nan]))}
    finding = diagnose(make_window(scalars=scalars)).findings[0]

    assert finding.steps[0] == 100
    assert finding.remedy is not None
    assert "moving statistics" in finding.remedy.text


def test_non_finite_input_that_the_model_survives_is_a_warning_and_does_not_spoil_f(
    make_window: MakeWindow, streams: Streams
) -> None:
    probe = streams.iid(1)
    spoiled = replace(probe, var_TKF=probe.var_TKF.copy())
    spoiled.var_TKF[[100, 250], 0, 3] = np.nan
    diagnosis = diagnose(make_window(probe=spoiled))

    assert (diagnosis.findings[0].code, diagnosis.findings[0].severity) == ("NH-NONFINITE", "warning")
    assert "2 rows" in diagnosis.findings[0].summary
    assert not any(f.code == "NH-CLUSTER" for f in diagnosis.findings)


def test_divergence_while_the_limits_open_is_answered_by_a_slower_schedule(make_window: MakeWindow) -> None:
    schedule = Schedule(bn_steps=100, r_steps=800, d_steps=500, r_max=3.0, d_max=5.0)
    finding = diagnose(
        make_window(nonfinite=AT_SECOND_LAYER, schedule=schedule, kinds=("BatchRenorm",) * 2, last_step=400)
    ).findings[0]

    assert finding.remedy is not None
    assert finding.remedy.code == "RenormSchedule(bn_steps=200, r_steps=1600, d_steps=1000, r_max=3, d_max=5)"
