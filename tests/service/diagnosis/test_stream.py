"""Clustered batches, from the probe: calibrated on clean streams, quick on strong faults, silent without evidence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.diagnosis.cluster import fast_lane
from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.rules import diagnose
from service.diagnosis.stream import cluster_ratio, effective_samples, stream
from service.diagnosis.window import ProbeRows, Window

Streams = Any  # conftest.Streams
MakeWindow = Callable[..., Window]
LOUD = ("warning", "critical")


def cluster(diagnosis: Diagnosis) -> Finding | None:
    return next((f for f in diagnosis.findings if f.code == "NH-CLUSTER"), None)


def loud(diagnosis: Diagnosis) -> list[str]:
    return [f.code for f in diagnosis.findings if f.severity in LOUD]


def clean_streams(streams: Streams, n: int) -> list[ProbeRows]:
    makers = [
        lambda s: streams.iid(s, n=32),
        lambda s: streams.iid(s, n=8),
        lambda s: streams.iid(s, n=4),
        lambda s: streams.iid(s, n=2),
        lambda s: streams.iid(s, n=16, prior="long"),
        lambda s: streams.iid(s, n=16, tails="t3"),
        lambda s: streams.iid(s, n=2, tails="t3"),
        lambda s: streams.without_replacement(s, n=32),
        lambda s: streams.without_replacement(s, n=16, size=300),
        lambda s: streams.unlabelled_clusters(s, n=16),
        lambda s: streams.iid(s, n=8, ranks=2),
        lambda s: streams.iid(s, n=4, ranks=4),
    ]
    return [makers[i % len(makers)](20_000 + i) for i in range(n)]


def test_120_clean_streams_of_twelve_kinds_give_no_warning(streams: Streams, make_window: MakeWindow) -> None:
    warned = [i for i, probe in enumerate(clean_streams(streams, 120)) if loud(diagnose(make_window(probe=probe)))]

    assert warned == []


@pytest.mark.parametrize("labels", [1, 2, 4])
@pytest.mark.parametrize("onset", [0, 233])
def test_every_strong_fault_is_found_within_150_steps_of_its_onset(
    streams: Streams, make_window: MakeWindow, labels: int, onset: int
) -> None:
    for seed in range(8):
        probe = streams.few_labels(seed, labels=labels, onset=onset, steps=onset + 200)
        finding = cluster(diagnose(make_window(probe=probe)))
        assert finding is not None
        assert onset < finding.steps[0] <= onset + 150


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_strong_faults_are_found_by_the_60th_step(streams: Streams, make_window: MakeWindow, labels: int) -> None:
    probes = [streams.few_labels(30_000 + seed, labels=labels, steps=60) for seed in range(20)]

    assert sum(cluster(diagnose(make_window(probe=probe))) is not None for probe in probes) >= 18


def test_an_alarm_that_came_before_there_were_steps_for_an_estimate_is_said_as_soon_as_there_are(
    streams: Streams, make_window: MakeWindow
) -> None:
    probe = streams.few_labels(1, labels=1, steps=45)
    span = fast_lane(stream(probe, 1))
    finding = cluster(diagnose(make_window(probe=probe)))

    assert span is not None
    assert span.last < 35
    assert finding is not None
    assert finding.evidence is not None
    assert finding.evidence.steps_used >= 40


@pytest.mark.parametrize("n", [2, 3, 4, 8, 32])
def test_bets_on_independent_batches_do_not_win(streams: Streams, n: int) -> None:
    for seed in range(8):
        assert fast_lane(stream(streams.iid(40_000 + seed, n=n, steps=2000, tails="t3"), 1)) is None
        assert fast_lane(stream(streams.iid(40_000 + seed, n=n, steps=2000), 1)) is None


@pytest.mark.parametrize("batches", [2, 5, 10])
def test_few_batches_in_turn_draw_no_alarm_before_their_period_is_sure(
    streams: Streams, make_window: MakeWindow, batches: int
) -> None:
    for seed in range(12):
        for steps in (42, 60, 90):
            probe = streams.again_augmented(seed, batches=batches, steps=steps)
            assert cluster(diagnose(make_window(probe=probe))) is None


def test_a_mixture_of_random_samples_and_one_label_is_found_within_300_steps(
    streams: Streams, make_window: MakeWindow
) -> None:
    for seed in range(8):
        finding = cluster(diagnose(make_window(probe=streams.mixture(seed, share=0.25, steps=350))))
        assert finding is not None
        assert finding.steps[0] <= 300


def test_weak_clustering_that_the_fast_lane_misses_is_found_by_two_wide_windows(
    streams: Streams, make_window: MakeWindow
) -> None:
    probes = [streams.mixture(seed, share=0.13, steps=600) for seed in range(12)]
    found = [cluster(diagnose(make_window(probe=probe))) for probe in probes]

    assert sum(f is not None for f in found) >= 11
    assert any(fast_lane(stream(p, 1)) is None and f is not None for p, f in zip(probes, found, strict=True))


def test_the_95_percent_interval_of_f_covers_1_on_90_to_97_percent_of_clean_streams(streams: Streams) -> None:
    covered = []
    for seed in range(60):
        data = stream(streams.iid(seed, n=8, steps=1200), 1)
        for begin in range(0, 1200, 200):
            ratio = cluster_ratio(data, begin, begin + 200)
            assert ratio is not None
            covered.append(ratio.low <= 1 <= ratio.high)

    assert 0.90 <= np.mean(covered) <= 0.97


def test_f_is_the_formula_of_the_one_way_layout(streams: Streams) -> None:
    # An independent route: features with known between- and within-batch variance, F = 1 + N * between / within.
    rng = np.random.default_rng(5)
    n, between, within = 16, 0.5, 2.0
    x = rng.normal(size=(4000, 1, 1, 24)) * between**0.5 + rng.normal(size=(4000, 1, n, 24)) * within**0.5
    probe = ProbeRows(
        np.arange(4000), np.full((4000, 1), n, float), x.mean(2), x.var(2, ddof=1), np.zeros((4000, 1, 24))
    )
    ratio = cluster_ratio(stream(probe, 1), 0, 4000)

    assert ratio is not None
    assert ratio.value == pytest.approx(1 + n * between / within, rel=0.03)
    assert ratio.low < 1 + n * between / within < ratio.high


def test_the_effective_batch_size_is_n_when_independent_and_1_when_all_samples_agree() -> None:
    assert effective_samples(32, 1.0) == 32
    assert effective_samples(32, 0.9) == 32
    assert effective_samples(32, 1e9) == pytest.approx(1)
    assert effective_samples(32, 31.0) == pytest.approx(2)


def test_a_finding_carries_its_numbers(streams: Streams, make_window: MakeWindow) -> None:
    window = make_window(probe=streams.few_labels(3, labels=2), config={"sampler": "few_labels"})
    finding = cluster(diagnose(window))

    assert finding is not None
    evidence = finding.evidence
    assert evidence is not None
    assert evidence.low is not None
    assert evidence.high is not None
    assert evidence.z is not None
    assert evidence.e_value is not None
    assert 1.2 < evidence.low < evidence.value < evidence.high
    assert evidence.z > 4
    assert evidence.e_value >= 1e4
    assert evidence.query == "/v1/runs/run-1/probe?points=200"
    assert f"{effective_samples(32, evidence.value):.1f}" in finding.summary
    assert finding.severity == "critical"
    assert finding.remedy is not None
    assert "few_labels" in finding.remedy.text
    assert finding.remedy.code == "DataLoader(dataset, batch_size=32, shuffle=True)"


def test_the_remedy_names_a_distributed_sampler_with_ranks_and_no_conversion_with_batch_renorm(
    streams: Streams, make_window: MakeWindow
) -> None:
    probe = streams.few_labels(3, labels=2, ranks=2, n=8)
    finding = cluster(diagnose(make_window(probe=probe, kinds=("BatchRenorm",))))

    assert finding is not None
    assert finding.remedy is not None
    assert finding.remedy.code is not None
    assert "DistributedSampler" in finding.remedy.code
    assert "convert_batchnorm" not in finding.remedy.text


def test_a_batch_of_8_with_f_1_8_is_critical_but_one_of_32_is_a_warning(
    streams: Streams, make_window: MakeWindow
) -> None:
    few = cluster(diagnose(make_window(probe=streams.few_labels(1, labels=3, n=8))))
    many = cluster(diagnose(make_window(probe=streams.few_labels(1, labels=6, n=32))))

    assert few is not None
    assert many is not None
    assert (few.severity, many.severity) == ("critical", "warning")


def test_a_burst_in_the_middle_is_dated(streams: Streams, make_window: MakeWindow) -> None:
    finding = cluster(diagnose(make_window(probe=streams.few_labels(4, labels=1, onset=400, end=460, steps=1400))))

    assert finding is not None
    assert 400 < finding.steps[0] <= 460
    assert finding.steps[1] <= 460 + 150
    assert "Not seen since" in finding.summary


def test_a_linear_drift_of_the_population_is_not_clustering(streams: Streams, make_window: MakeWindow) -> None:
    data = stream(streams.drifting(2, per_step=0.02, steps=1000), 1)
    ratio = cluster_ratio(data, 0, 1000)

    assert ratio is not None
    assert ratio.value == pytest.approx(1, abs=0.1)
    found = diagnose(make_window(probe=streams.drifting(2, per_step=0.02, steps=1000)))
    assert loud(found) == ["NH-ORDER"]


def test_ranks_that_see_different_populations_are_not_clustered(streams: Streams, make_window: MakeWindow) -> None:
    left, right = streams.iid(1), streams.iid(2)
    both = {
        name: np.concatenate([getattr(left, name), getattr(right, name)], axis=1)
        for name in ("samples_TK", "mean_TKF", "var_TKF", "adjacency_TKF")
    }

    assert cluster(diagnose(make_window(probe=ProbeRows(left.steps_T, **both)))) is None


def test_looking_earlier_never_dates_a_fault_differently(streams: Streams, make_window: MakeWindow) -> None:
    whole = streams.few_labels(6, labels=4, onset=250, steps=600)
    dates = set()
    for end in (420, 477, 513, 600):
        part = ProbeRows(*(getattr(whole, name)[:end] for name in whole.__dataclass_fields__))
        finding = cluster(diagnose(make_window(probe=part)))
        assert finding is not None
        dates.add(finding.steps[0])

    assert len(dates) == 1


def holes(probe: ProbeRows, missing: np.ndarray[Any, Any]) -> ProbeRows:
    """The probe with the rows `missing` (T, K) never arrived."""
    return replace(
        probe,
        samples_TK=np.where(missing, np.nan, probe.samples_TK),
        mean_TKF=np.where(missing[..., None], np.nan, probe.mean_TKF),
        var_TKF=np.where(missing[..., None], np.nan, probe.var_TKF),
    )


def test_one_percent_missing_rows_change_no_verdict(streams: Streams, make_window: MakeWindow) -> None:
    gone = np.random.default_rng(0).random((600, 2)) < 0.01
    clean = diagnose(make_window(probe=holes(streams.iid(3, ranks=2, n=8), gone), status="finished"))
    fault = diagnose(make_window(probe=holes(streams.few_labels(3, labels=2, ranks=2, n=8), gone)))

    assert clean.verdict.code == "HEALTHY"
    assert fault.verdict.code == "NH-CLUSTER"


def test_a_stream_full_of_gaps_is_withheld(streams: Streams, make_window: MakeWindow) -> None:
    gone = np.random.default_rng(0).random((600, 1)) < 0.4
    diagnosis = diagnose(make_window(probe=holes(streams.iid(3), gone), status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"


def test_a_silent_rank_is_named_and_the_other_still_judged(streams: Streams, make_window: MakeWindow) -> None:
    gone = np.zeros((600, 2), bool)
    gone[250:, 1] = True
    diagnosis = diagnose(make_window(probe=holes(streams.few_labels(3, labels=2, ranks=2, n=8), gone)))
    withheld = [f for f in diagnosis.findings if f.code == "NH-WITHHELD" and f.ranks == (1,)]

    assert len(withheld) == 1
    assert "rank 1" in withheld[0].summary
    found = cluster(diagnosis)
    assert found is not None
    assert found.steps[1] > 500


def test_a_rank_that_never_sent_is_named(streams: Streams, make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(probe=streams.iid(3), world_size=2))

    assert any(f.ranks == (1,) for f in diagnosis.findings)


def test_a_rank_some_steps_behind_is_waited_for_not_accused(streams: Streams, make_window: MakeWindow) -> None:
    gone = np.zeros((600, 2), bool)
    gone[570:, 1] = True
    probe = streams.iid(3, ranks=2, n=8)

    late = diagnose(make_window(probe=holes(probe, gone)))
    level = diagnose(make_window(probe=ProbeRows(*(getattr(probe, n)[:570] for n in probe.__dataclass_fields__))))

    assert not any(f.ranks for f in late.findings)
    assert late.verdict.code == level.verdict.code
    assert len(stream(holes(probe, gone), 2).steps_T) == 570


def test_batches_of_one_sample_are_said_to_have_no_f(streams: Streams, make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(probe=streams.iid(3, n=1), status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"
    assert any("one sample" in f.summary for f in diagnosis.findings)


def test_a_constant_input_is_withheld_not_healthy(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.iid(3)
    flat = replace(probe, mean_TKF=np.full_like(probe.mean_TKF, 0.7), var_TKF=np.zeros_like(probe.var_TKF))
    diagnosis = diagnose(make_window(probe=flat, status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"
    assert "constant" in diagnosis.verdict.summary


def test_some_constant_features_change_nothing(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.iid(3)
    dark = np.arange(24) % 2 == 0
    half = replace(probe, mean_TKF=np.where(dark, 1e4, probe.mean_TKF), var_TKF=np.where(dark, 1e-12, probe.var_TKF))

    assert diagnose(make_window(probe=half, status="finished")).verdict.code == "HEALTHY"


def test_batches_of_copies_of_one_sample_carry_the_information_of_one(
    streams: Streams, make_window: MakeWindow
) -> None:
    probe = streams.iid(3, n=2)
    copies = replace(probe, samples_TK=np.full_like(probe.samples_TK, 32), var_TKF=np.zeros_like(probe.var_TKF))
    finding = cluster(diagnose(make_window(probe=copies)))

    assert finding is not None
    assert "information of 1.0" in finding.summary


def test_no_rows_all_missing_and_all_nan_are_answers(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.iid(3, steps=200)
    nan = np.full_like(probe.mean_TKF, np.nan)
    missing = holes(probe, np.ones((200, 1), bool))
    spoiled = replace(probe, mean_TKF=nan, var_TKF=nan)

    assert diagnose(make_window()).verdict.code == "NO_DATA"
    assert diagnose(make_window(probe=missing, status="finished")).verdict.code == "NH-WITHHELD"
    assert diagnose(make_window(probe=spoiled)).verdict.code == "NH-NONFINITE"


def test_a_young_run_is_warming_up_and_says_how_long(streams: Streams, make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(probe=streams.iid(3, steps=110)))

    assert diagnosis.verdict.code == "WARMUP"
    assert "40 more steps" in diagnosis.verdict.summary


def test_every_second_step_recorded_gives_the_same_finding_in_steps_of_the_run(
    streams: Streams, make_window: MakeWindow
) -> None:
    probe = streams.few_labels(3, labels=2)
    sparse = replace(probe, steps_T=probe.steps_T * 2)
    every, second = cluster(diagnose(make_window(probe=probe))), cluster(diagnose(make_window(probe=sparse)))

    assert every is not None
    assert second is not None
    assert abs(second.steps[0] - 2 * every.steps[0]) <= 2


def test_the_last_smaller_batch_of_an_epoch_is_no_fault(streams: Streams, make_window: MakeWindow) -> None:
    # Every tenth batch holds 4 samples instead of 32: its mean varies eight times as much, and may.
    large, small = streams.iid(9, n=32), streams.iid(9, n=4)
    pick = (np.arange(600) % 10 == 9)[:, None]
    probe = replace(
        large,
        samples_TK=np.where(pick, small.samples_TK, large.samples_TK),
        mean_TKF=np.where(pick[..., None], small.mean_TKF, large.mean_TKF),
        var_TKF=np.where(pick[..., None], small.var_TKF, large.var_TKF),
    )

    assert cluster(diagnose(make_window(probe=probe))) is None


def test_a_diagnosis_of_2000_steps_and_two_ranks_is_cheap_enough_for_every_refresh(
    streams: Streams, make_window: MakeWindow
) -> None:
    rng = np.random.default_rng(0)
    noise = {name: rng.random((400, 2, 54)) for name in ("gap", "mean_noise", "mean_diff2", "samples", "clip_r")}
    window = make_window(
        probe=streams.iid(0, steps=2000, ranks=2, n=4),
        columns=noise,
        kinds=("BatchNorm",) * 54,
        steps=np.arange(1600, 2000),
    )
    seconds = []
    for _ in range(5):
        begin = time.thread_time()
        diagnose(window)
        seconds.append(time.thread_time() - begin)

    assert min(seconds) < 0.25  # the budget is 0.05 on an idle core; test machines are shared and slow


def repeating(probe: ProbeRows, batches: int) -> ProbeRows:
    """The first `batches` batches in turn, again and again: an order that is never reshuffled."""
    at = np.arange(len(probe.steps_T)) % batches
    return replace(probe, mean_TKF=probe.mean_TKF[at], var_TKF=probe.var_TKF[at], adjacency_TKF=probe.adjacency_TKF[at])


@pytest.mark.parametrize("batches", [1, 3, 10, 42, 84])
def test_random_batches_that_come_again_in_the_same_order_are_no_new_evidence(
    streams: Streams, make_window: MakeWindow, batches: int
) -> None:
    for seed in range(6):
        for probe in (streams.iid(seed, n=4), streams.iid(seed, n=32), streams.iid(seed, n=8, ranks=3)):
            assert loud(diagnose(make_window(probe=repeating(probe, batches)))) == []


def test_clustered_batches_that_come_again_are_still_found(streams: Streams, make_window: MakeWindow) -> None:
    for seed in range(4):
        probe = repeating(streams.few_labels(seed, labels=2), 84)
        assert loud(diagnose(make_window(probe=probe))) == ["NH-CLUSTER"]


def test_too_few_different_batches_are_said_to_be_the_reason(streams: Streams, make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(probe=repeating(streams.iid(1), 1), status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"
    assert "only 1 different batch came in 600 recorded steps" in diagnosis.verdict.summary


def test_rounding_of_a_constant_input_is_not_a_pair_of_equal_samples(streams: Streams, make_window: MakeWindow) -> None:
    # Some features of a constant input are sums that nearly cancel: their rounding is large beside their own mean.
    probe = streams.iid(3)
    mean_F = np.where(np.arange(24) % 3 == 0, 1e-4, 0.8)
    rounding = 1e-7 * np.random.default_rng(0).normal(size=probe.mean_TKF.shape)
    flat = replace(
        probe,
        mean_TKF=mean_F + rounding,
        var_TKF=np.full_like(probe.var_TKF, 1e-14),
        adjacency_TKF=np.full_like(probe.var_TKF, 1e-18),
    )
    diagnosis = diagnose(make_window(probe=flat, status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"
    assert "constant" in diagnosis.verdict.summary


@pytest.mark.parametrize("batches", [5, 10, 20])
@pytest.mark.parametrize("strength", [0.05, 0.3])
def test_batches_that_come_again_with_new_augmentation_are_no_new_evidence(
    streams: Streams, make_window: MakeWindow, batches: int, strength: float
) -> None:
    for seed in range(12):
        probe = streams.again_augmented(seed, batches=batches, strength=strength)
        assert stream(probe, 1).distinct(0, 600) == batches
        diagnosis = diagnose(make_window(probe=probe))
        assert not [f.code for f in diagnosis.findings if f.severity in ("warning", "critical")]


@pytest.mark.parametrize(
    "kind", ["iid", "without_replacement", "stratified", "sorted_labels", "shuffle_buffer", "copies", "drifting"]
)
def test_batches_of_new_samples_have_no_period_and_never_count_as_repeated(streams: Streams, kind: str) -> None:
    for seed in range(12):
        assert (stream(getattr(streams, kind)(seed), 1).before_T < 0).all()
