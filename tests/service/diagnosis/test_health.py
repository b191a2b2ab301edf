"""Exact checks: dead channels, missing ranks, moving statistics of one rank, batches of unequal size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brn_core.wire import SCALAR_STEP_TIME
from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.rules import diagnose
from service.diagnosis.window import ProbeRows, StepTimes, Window
from tests.streams import Streams, layer_rows

MakeWindow = Callable[..., Window]


def named(diagnosis: Diagnosis, code: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.code == code), None)


@pytest.mark.parametrize(("dead", "severity"), [(1, "info"), (4, "warning"), (16, "critical")])
def test_dead_channels_are_counted_and_weighed(make_window: MakeWindow, dead: int, severity: str) -> None:
    rows = layer_rows(0)
    rows["dead_channels"][:] = dead
    finding = named(diagnose(make_window(columns=rows, kinds=("BatchNorm",))), "NH-DEAD")

    assert finding is not None
    assert finding.severity == severity
    assert f"{dead} of 16 channels" in finding.summary


def test_channels_that_rest_for_some_batches_are_not_dead(make_window: MakeWindow) -> None:
    rows = layer_rows(0)
    rows["dead_channels"][::2] = 3

    assert named(diagnose(make_window(columns=rows, kinds=("BatchNorm",))), "NH-DEAD") is None


def without(probe: ProbeRows, gone_TK: Any) -> ProbeRows:
    return replace(
        probe,
        samples_TK=np.where(gone_TK, np.nan, probe.samples_TK),
        mean_TKF=np.where(gone_TK[..., None], np.nan, probe.mean_TKF),
        var_TKF=np.where(gone_TK[..., None], np.nan, probe.var_TKF),
    )


def test_a_rank_that_fell_silent_is_named_with_its_last_step(streams: Streams, make_window: MakeWindow) -> None:
    gone = np.zeros((600, 3), bool)
    gone[250:, 1] = True
    finding = named(diagnose(make_window(probe=without(streams.iid(3, ranks=3, n=8), gone))), "NH-MISSING")

    assert finding is not None
    assert finding.ranks == (1,)
    assert "nothing since step 249" in finding.summary


def test_a_rank_that_never_sent_is_named(streams: Streams, make_window: MakeWindow) -> None:
    finding = named(diagnose(make_window(probe=streams.iid(3), world_size=2)), "NH-MISSING")

    assert finding is not None
    assert finding.ranks == (1,)


def test_a_fast_run_waits_thirty_seconds_for_a_late_batch_and_a_finished_run_does_not(
    streams: Streams, make_window: MakeWindow
) -> None:
    gone = np.zeros((600, 2), bool)
    gone[400:, 1] = True
    probe = without(streams.iid(3, ranks=2, n=8), gone)
    steps = np.arange(600)

    def found(step_seconds: float, status: str) -> bool:
        scalars = {SCALAR_STEP_TIME: (steps, np.full(600, step_seconds))}
        return named(diagnose(make_window(probe=probe, scalars=scalars, status=status)), "NH-MISSING") is not None

    assert not found(0.01, "running")  # 200 rows are 2 seconds
    assert found(0.5, "running")  # 100 seconds
    assert found(0.01, "finished")


def test_a_rank_that_loses_a_tenth_of_its_rows_is_named_and_one_percent_is_not(
    streams: Streams, make_window: MakeWindow
) -> None:
    for share, called in ((0.1, True), (0.01, False)):
        gone = np.random.default_rng(0).random((600, 2)) < np.array([0.0, share])
        finding = named(diagnose(make_window(probe=without(streams.iid(3, ranks=2, n=8), gone))), "NH-MISSING")
        assert (finding is not None) is called
        assert finding is None or finding.ranks == (1,)


@pytest.mark.parametrize(("kept", "said"), [("rank 0", "statistics of rank 0"), ("own", "of its own"), ("all", None)])
def test_whose_batches_reach_the_moving_statistics_is_read_from_their_steps(
    make_window: MakeWindow, kept: str, said: str | None
) -> None:
    for seed in range(5):
        rows = layer_rows(seed, ranks=3, n=8, buffers=kept)
        single = {name: values.astype(np.float32).astype(np.float64) for name, values in rows.items()}
        finding = named(diagnose(make_window(columns=single, kinds=("BatchNorm",), world_size=3)), "NH-BUFFERS")
        if said is None:
            assert finding is None
        else:
            assert finding is not None
            assert said in finding.summary
            assert finding.severity == "info"


def step_times(seed: int, steps: int = 300, ranks: int = 4, *, waits: bool, slow: float = 2.0) -> StepTimes:
    """Work of 100 ms a step, of rank 2 `slow` times as much from step 100 on; rank 0 evaluates for 3 s now and then.

    With `waits` no step ends before the slowest rank's does.
    """
    rng = np.random.default_rng(seed)
    seconds_TK = 0.1 * rng.lognormal(0, 0.1, (steps, ranks))
    seconds_TK[100:, 2] *= slow
    seconds_TK[::20, 0] += 3
    if waits:
        seconds_TK = seconds_TK.max(1, keepdims=True) + 1e-4 * rng.random((steps, ranks))
    seconds_TK[0] = np.nan
    return StepTimes(np.arange(steps), seconds_TK)


@pytest.mark.parametrize("ranks", [3, 4, 9])
def test_a_rank_that_is_slow_and_that_nobody_waits_for_is_named(make_window: MakeWindow, ranks: int) -> None:
    finding = named(
        diagnose(make_window(step_times=step_times(0, ranks=ranks, waits=False), last_step=299)), "NH-MISSING"
    )

    assert finding is not None
    assert finding.severity == "warning"
    assert finding.ranks == (2,)
    assert finding.evidence is not None
    assert finding.evidence.value == pytest.approx(2.0, rel=0.1)
    assert 149 <= finding.steps[0] <= 249


@pytest.mark.parametrize("seed", range(20))
def test_ranks_that_wait_for_each_other_are_not_called_slow_nor_are_those_that_differ_a_little(
    make_window: MakeWindow, seed: int
) -> None:
    for times in (step_times(seed, waits=True), step_times(seed, waits=False, slow=1.3)):
        assert named(diagnose(make_window(step_times=times, last_step=299)), "NH-MISSING") is None


@pytest.mark.parametrize("steps", [0, 1, 40, 60, 99])
def test_before_two_looks_no_rank_is_called_slow(make_window: MakeWindow, steps: int) -> None:
    times = StepTimes(np.arange(steps), np.tile([0.1, 0.1, 1.0], (steps, 1)))

    assert named(diagnose(make_window(step_times=times, last_step=steps)), "NH-MISSING") is None


def test_of_two_ranks_the_slower_is_named_and_not_before_two_looks(make_window: MakeWindow) -> None:
    times = step_times(0, ranks=3, waits=False)
    two = StepTimes(times.steps_T, times.seconds_TK[:, 1:])
    early = StepTimes(two.steps_T[:180], two.seconds_TK[:180])

    finding = named(diagnose(make_window(step_times=two, last_step=299)), "NH-MISSING")
    assert finding is not None
    assert finding.ranks == (1,)
    assert named(diagnose(make_window(step_times=early, last_step=299)), "NH-MISSING") is None


def test_buffers_of_one_rank_make_skewed_ranks_critical(streams: Streams, make_window: MakeWindow) -> None:
    severities = {}
    for kept in ("rank 0", "all"):
        rows = layer_rows(0, ranks=4, n=8, buffers=kept)
        window = make_window(columns=rows, kinds=("BatchNorm",), probe=streams.skewed_ranks(0, own=0.5, steps=400))
        diagnosis = diagnose(window)
        skew, buffers = named(diagnosis, "NH-RANKSKEW"), named(diagnosis, "NH-BUFFERS")
        assert skew is not None
        severities[kept] = (skew.severity, buffers.severity if buffers else None)

    assert severities == {"rank 0": ("critical", "warning"), "all": ("warning", None)}


def test_steps_recorded_now_and_then_do_not_show_whose_batches_were_taken(make_window: MakeWindow) -> None:
    rows = {name: values[::5] for name, values in layer_rows(0, ranks=3, steps=2000, buffers="rank 0").items()}
    window = make_window(columns=rows, steps=np.arange(0, 2000, 5), kinds=("BatchNorm",), world_size=3)

    assert named(diagnose(window), "NH-BUFFERS") is None


def sized(probe: ProbeRows, samples_TK: Any) -> ProbeRows:
    return replace(probe, samples_TK=np.broadcast_to(samples_TK, probe.samples_TK.shape).astype(float))


def test_a_tiny_rest_of_every_epoch_is_a_warning_and_a_larger_one_a_note(
    streams: Streams, make_window: MakeWindow
) -> None:
    last = (np.arange(600) % 40 == 39)[:, None]
    tiny = named(diagnose(make_window(probe=sized(streams.iid(0), np.where(last, 3, 32)))), "NH-UNEVEN")
    small = named(diagnose(make_window(probe=sized(streams.iid(0), np.where(last, 11, 32)))), "NH-UNEVEN")
    once = named(
        diagnose(make_window(probe=sized(streams.iid(0), np.where(np.arange(600)[:, None] == 9, 3, 32)))), "NH-UNEVEN"
    )

    assert tiny is not None
    assert tiny.severity == "warning"
    assert tiny.remedy is not None
    assert tiny.remedy.code is not None
    assert "drop_last=True" in tiny.remedy.code
    assert small is not None
    assert small.severity == "info"
    assert once is None


def test_ranks_of_unequal_batch_size_are_named(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.iid(0, ranks=3, n=16)
    finding = named(diagnose(make_window(probe=sized(probe, np.array([16, 8, 16])))), "NH-UNEVEN")

    assert finding is not None
    assert finding.severity == "warning"
    assert finding.ranks == (1,)
    assert named(diagnose(make_window(probe=probe)), "NH-UNEVEN") is None


def test_stratified_batches_are_a_note(streams: Streams, make_window: MakeWindow) -> None:
    for seed in range(5):
        finding = named(diagnose(make_window(probe=streams.stratified(seed))), "NH-STRATIFIED")
        assert finding is not None
        assert finding.severity == "info"
        assert named(diagnose(make_window(probe=streams.iid(seed))), "NH-STRATIFIED") is None


def test_ranks_whose_batches_are_now_larger_and_now_smaller_are_noted_and_none_is_accused(
    make_window: MakeWindow, streams: Streams
) -> None:
    probe = streams.iid(0, ranks=2, n=16)
    sizes = np.random.default_rng(0).integers(10, 32, size=probe.samples_TK.shape)
    window = make_window(probe=replace(probe, samples_TK=sizes.astype(float)))
    finding = next(f for f in diagnose(window).findings if f.code == "NH-UNEVEN")

    assert finding.severity == "info"
    assert finding.ranks == ()
    assert finding.evidence is not None
    assert finding.evidence.threshold is not None
    assert finding.evidence.value < finding.evidence.threshold
    assert "the smallest batch of a rank" in finding.summary
