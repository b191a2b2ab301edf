"""The kinds of data that are not i.i.d., told apart: order, pairs, skewed ranks, equal ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.order import neighbour_ratio, neumann_ratio
from service.diagnosis.ranks import copies, rank_effect
from service.diagnosis.rules import diagnose
from service.diagnosis.stream import stream
from service.diagnosis.window import ProbeRows, Window
from tests.streams import INPUTS, World

MakeWindow = Callable[..., Window]
Streams = Any  # conftest.Streams


def loud(diagnosis: Diagnosis) -> set[str]:
    return {f.code for f in diagnosis.findings if f.severity in ("warning", "critical")}


def named(diagnosis: Diagnosis, code: str) -> Finding:
    return next(f for f in diagnosis.findings if f.code == code)


@pytest.mark.parametrize("kind", ["sorted_labels", "shuffle_buffer", "drifting"])
def test_ordered_data_is_named_as_such_and_nothing_else(streams: Streams, make_window: MakeWindow, kind: str) -> None:
    for seed in range(5):
        diagnosis = diagnose(make_window(probe=getattr(streams, kind)(seed, steps=300)))
        assert loud(diagnosis) == {"NH-ORDER"}
        assert named(diagnosis, "NH-ORDER").steps[0] <= 150


@pytest.mark.parametrize("kind", ["paired", "copies"])
def test_pairs_and_copies_are_the_named_cause_of_their_clustering(
    streams: Streams, make_window: MakeWindow, kind: str
) -> None:
    for seed in range(5):
        diagnosis = diagnose(make_window(probe=getattr(streams, kind)(seed, steps=300)))
        assert loud(diagnosis) == {"NH-PAIRED", "NH-CLUSTER"}
        assert diagnosis.verdict.code == "NH-PAIRED"


@pytest.mark.parametrize(
    ("code", "steps", "kind", "how"),
    [
        ("NH-PAIRED", 50, "copies", {}),
        ("NH-PAIRED", 50, "paired", {}),
        ("NH-ORDER", 50, "drifting", {}),
        ("NH-ORDER", 100, "shuffle_buffer", {}),
        ("NH-ORDER", 100, "sorted_labels", {}),  # the second label comes at step 60
        ("NH-RANKSKEW", 50, "skewed_ranks", {"own": 1.0}),
        ("NH-RANKSKEW", 50, "skewed_ranks", {"own": 1.0, "ranks": 2, "n": 16}),
        ("NH-RANKDUP", 20, "equal_ranks", {}),
    ],
)
def test_what_is_plain_is_said_at_the_first_look(
    streams: Streams, make_window: MakeWindow, code: str, steps: int, kind: str, how: dict[str, Any]
) -> None:
    for seed in range(12):
        whole = getattr(streams, kind)(31_000 + seed, **how)
        probe = ProbeRows(*(getattr(whole, name)[:steps] for name in whole.__dataclass_fields__))
        diagnosis = diagnose(make_window(probe=probe))

        assert named(diagnosis, code).steps[1] == steps - 1
        assert diagnosis.verdict.code == code


def test_a_mix_that_swings_slowly_is_ordered_within_300_steps(streams: Streams, make_window: MakeWindow) -> None:
    found = 0
    for seed in range(32_000, 32_020):
        rng = np.random.default_rng(seed)
        low = rng.random((300, 1, 32)) < 0.5 + 0.45 * np.sin(np.arange(300) / 15)[:, None, None]
        labels = np.where(low, rng.integers(5, size=low.shape), rng.integers(5, 10, size=low.shape))
        found += loud(diagnose(make_window(probe=World.make(rng).observe(labels, rng)))) == {"NH-ORDER"}

    assert found >= 19


def test_few_batches_that_two_ranks_now_and_then_share_are_not_equal_ranks(
    streams: Streams, make_window: MakeWindow
) -> None:
    for seed in range(12):
        pool = streams.iid(seed, steps=3)
        pick = np.random.default_rng(seed).integers(3, size=(300, 2))
        probe = ProbeRows(
            np.arange(300),
            np.full((300, 2), 32.0),
            *(getattr(pool, name)[pick, 0] for name in ("mean_TKF", "var_TKF", "adjacency_TKF")),
        )
        assert "NH-RANKDUP" not in loud(diagnose(make_window(probe=probe)))


@pytest.mark.parametrize(("own", "severity"), [(1.0, "critical"), (0.5, "warning")])
def test_skewed_ranks_are_named_by_their_degree(
    streams: Streams, make_window: MakeWindow, own: float, severity: str
) -> None:
    for seed in range(4):
        diagnosis = diagnose(make_window(probe=streams.skewed_ranks(seed, own=own, steps=300)))
        assert loud(diagnosis) == {"NH-RANKSKEW"}
        finding = named(diagnosis, "NH-RANKSKEW")
        assert finding.steps[0] <= 150
        assert finding.remedy is not None
        assert finding.remedy.code is not None
        assert "sync" in finding.remedy.code
        if seed == 0:
            assert finding.severity == severity


def test_a_rank_with_another_contrast_is_skewed_though_its_mean_is_not(
    streams: Streams, make_window: MakeWindow
) -> None:
    for seed in range(4):
        probe = streams.iid(seed, ranks=4, n=8)
        loud_rank = replace(probe, var_TKF=probe.var_TKF * np.array([1.0, 1.0, 1.0, 2.5])[:, None])
        finding = named(diagnose(make_window(probe=loud_rank)), "NH-RANKSKEW")
        assert "batch variances" in finding.summary
        assert "rank 3 is furthest" in finding.summary


def test_ranks_that_differ_in_contrast_first_and_in_their_means_later_are_found_from_the_beginning(
    streams: Streams, make_window: MakeWindow
) -> None:
    probe = streams.iid(0, ranks=4, n=8)
    noise_F = np.sqrt(probe.var_TKF.mean((0, 1)) / 8)
    moved = (np.arange(600) >= 300)[:, None, None] * np.array([0.0, 0.0, 0.0, 2.0])[:, None] * noise_F
    loud_rank = replace(
        probe,
        var_TKF=probe.var_TKF * np.array([1.0, 1.0, 1.0, 2.5])[:, None],
        mean_TKF=probe.mean_TKF + moved,
    )
    finding = named(diagnose(make_window(probe=loud_rank)), "NH-RANKSKEW")

    assert "batch means" in finding.summary
    assert finding.steps == (49, 599)


def test_equal_ranks_are_named_one_by_one(streams: Streams, make_window: MakeWindow) -> None:
    for seed in range(4):
        finding = named(diagnose(make_window(probe=streams.equal_ranks(seed, steps=200))), "NH-RANKDUP")
        assert finding.ranks == (0, 1)
        assert finding.severity == "critical"
        assert finding.steps[0] < 100


def of_ranks(seed: int, *, sizes: tuple[int, ...] = (8,) * 4, contrast: tuple[float, ...] = (1.0,) * 4) -> ProbeRows:
    """i.i.d. ranks with batches of different sizes and contrasts, 200 steps."""
    rng = np.random.default_rng(seed)
    world = World.make(rng)
    parts = []
    for n, gain in zip(sizes, contrast, strict=True):
        labels = rng.integers(10, size=(200, 1, n))
        x = (world.centres_LD[labels] + rng.normal(size=(*labels.shape, INPUTS))) @ world.mixing_DD
        parts.append(world.project(gain * x))
    fields = ("samples_TK", "mean_TKF", "var_TKF", "adjacency_TKF")
    return ProbeRows(parts[0].steps_T, *(np.concatenate([getattr(p, f) for p in parts], 1) for f in fields))


def heavy_ranks(seed: int, *, n: int = 8, df: float | None = 1.2) -> ProbeRows:
    """i.i.d. ranks whose samples have a heavy-tailed scale, or one in a thousand is 30 times as large."""
    rng = np.random.default_rng(seed)
    shape = (400, 4, n, 1)
    scale = rng.standard_t(df, size=shape) if df is not None else np.where(rng.random(shape) < 0.001, 30.0, 1.0)
    return World.make(rng).project(scale * rng.normal(size=(400, 4, n, INPUTS)))


@pytest.mark.parametrize(
    "ranks",
    [
        lambda s: of_ranks(s, sizes=(64, 64, 64, 8)),
        lambda s: of_ranks(s, sizes=(32, 32, 32, 4)),
        lambda s: of_ranks(s, contrast=(1.0, 1.0, 1.0, 3.0)),
        heavy_ranks,
        lambda s: heavy_ranks(s, n=2),
        lambda s: heavy_ranks(s, df=None),
    ],
    ids=["64 and 8", "32 and 4", "contrast", "heavy tails", "heavy tails, pairs", "outliers"],
)
def test_calm_large_and_heavy_tailed_ranks_are_not_equal_ones(
    make_window: MakeWindow, ranks: Callable[[int], ProbeRows]
) -> None:
    for seed in range(8):
        probe = ranks(seed)
        assert "NH-RANKDUP" not in loud(diagnose(make_window(probe=probe)))
        steps = len(probe.steps_T)
        data = stream(probe, 4)
        found = [copies(data, at, at + 50) for at in range(0, steps, 50)]
        assert min(float(f[0].min()) for f in found if f is not None) > 0.5


def test_equal_ranks_among_noisy_ones_are_named(make_window: MakeWindow) -> None:
    for seed in range(4):
        probe = of_ranks(seed, sizes=(32, 32, 32, 4), contrast=(1.0, 1.0, 3.0, 1.0))
        for values in (probe.mean_TKF, probe.var_TKF, probe.adjacency_TKF):
            values[:, 1] = values[:, 0]
        assert named(diagnose(make_window(probe=probe)), "NH-RANKDUP").ranks == (0, 1)


def test_clustered_ranks_are_neither_skewed_nor_equal(streams: Streams, make_window: MakeWindow) -> None:
    for seed in range(4):
        probe = streams.few_labels(seed, labels=1, ranks=3, n=8, steps=400)
        assert loud(diagnose(make_window(probe=probe))) == {"NH-CLUSTER"}


def test_a_fault_that_begins_is_clustered_not_ordered(streams: Streams, make_window: MakeWindow) -> None:
    for seed in range(4):
        assert loud(diagnose(make_window(probe=streams.few_labels(seed, labels=2, onset=300)))) == {"NH-CLUSTER"}


def test_the_permutation_z_of_o_agrees_with_drawn_permutations(streams: Streams) -> None:
    # An autocorrelated stream, so that z is far from 0; the reference permutes its steps 4000 times.
    rows = streams.drifting(3, per_step=0.004, steps=200)
    ratio = neumann_ratio(stream(rows, 1), 0, 200)
    assert ratio is not None

    scale_F = np.sqrt(rows.var_TKF[:, 0].mean(0))
    z_TF = (rows.mean_TKF[:, 0] - rows.mean_TKF[:, 0].mean(0)) / scale_F

    def neumann(order: Any) -> float:
        return float((np.diff(z_TF[order], axis=0) ** 2).sum() / (2 * (z_TF**2).sum()))

    rng = np.random.default_rng(0)
    drawn = np.array([neumann(rng.permutation(200)) for _ in range(4000)])
    assert ratio.value == pytest.approx(neumann(np.arange(200)), rel=1e-6)
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert ratio.z == pytest.approx((ratio.value - drawn.mean()) / drawn.std(), rel=0.06)


def test_o_does_not_depend_on_which_gram_matrix_is_smaller(streams: Streams) -> None:
    # 24 features x 3 ranks exceed 60 steps, 24 x 1 do not; three equal copies of a rank change neither O nor z.
    rows = streams.drifting(3, steps=60)
    thrice = ProbeRows(
        rows.steps_T,
        *(np.repeat(getattr(rows, n), 3, axis=1) for n in ("samples_TK", "mean_TKF", "var_TKF", "adjacency_TKF")),
    )
    one, three = neumann_ratio(stream(rows, 1), 0, 60), neumann_ratio(stream(thrice, 3), 0, 60)

    assert one is not None
    assert three is not None
    assert three.value == pytest.approx(one.value)
    assert three.z == pytest.approx(one.z)


def test_a_is_1_for_any_random_order_and_exactly_1_for_pairs_of_samples(streams: Streams) -> None:
    clustered = neighbour_ratio(stream(streams.few_labels(1, labels=2), 1), 0, 600)
    two = neighbour_ratio(stream(streams.iid(1, n=2), 1), 0, 600)

    assert clustered is not None
    assert clustered.low < 1 < clustered.high
    assert two is not None
    assert two.value == pytest.approx(1, abs=1e-6)


def test_batches_of_two_are_never_called_paired(streams: Streams, make_window: MakeWindow) -> None:
    assert loud(diagnose(make_window(probe=streams.paired(1, n=2)))) == {"NH-CLUSTER"}


def test_r_measures_the_share_of_variance_that_stays_with_a_rank() -> None:
    # Known truth: rank offsets of variance 0.3 / N, within-batch variance 1, no clustering: R = 0.3 on average.
    rng = np.random.default_rng(0)
    n, ranks, steps = 16, 40, 400
    offsets = rng.normal(size=(1, ranks, 1, 24)) * np.sqrt(0.3 / n)
    x = offsets + rng.normal(size=(steps, ranks, n, 24))
    probe = ProbeRows(
        np.arange(steps), np.full((steps, ranks), float(n)), x.mean(2), x.var(2, ddof=1), np.zeros((steps, ranks, 24))
    )
    effect = rank_effect(stream(probe, ranks), 0, steps)

    assert effect is not None
    assert effect.value == pytest.approx(float(offsets.var(axis=1, ddof=1).mean() * n), rel=0.05)
    assert effect.z > 20


def test_independent_ranks_have_a_pair_ratio_around_1_and_no_rank_effect(streams: Streams) -> None:
    data = stream(streams.iid(5, ranks=4, n=8), 4)
    pairs = copies(data, 0, 600)
    effect = rank_effect(data, 0, 600)

    assert pairs is not None
    finite = pairs[0][np.isfinite(pairs[0])]
    assert 0.8 < finite.min() < finite.max() < 1.2
    assert effect is not None
    assert abs(effect.value) < 0.05


def test_one_rank_alone_has_nothing_to_compare(streams: Streams) -> None:
    data = stream(streams.iid(5), 1)

    assert copies(data, 0, 600) is None
    assert rank_effect(data, 0, 600) is None


def test_missing_rows_do_not_look_like_order_or_rank_effects(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.iid(5, ranks=3, n=8)
    gone = np.random.default_rng(1).random((600, 3)) < 0.02
    torn = replace(
        probe,
        samples_TK=np.where(gone, np.nan, probe.samples_TK),
        mean_TKF=np.where(gone[..., None], np.nan, probe.mean_TKF),
        var_TKF=np.where(gone[..., None], np.nan, probe.var_TKF),
        adjacency_TKF=np.where(gone[..., None], np.nan, probe.adjacency_TKF),
    )

    assert loud(diagnose(make_window(probe=torn))) == set()


def test_skewed_ranks_name_the_slow_part_of_the_gap(streams: Streams, make_window: MakeWindow) -> None:
    shape = (400, 4, 2)
    columns = {
        "gap": np.full(shape, 0.5),
        "mean_noise": np.full(shape, 0.05),
        "mean_diff2": np.full(shape, 0.05),
        "scale_noise": np.zeros(shape),
        "scale_diff2": np.zeros(shape),
    }
    steps = np.arange(20) * 30
    scalars = {"brn/shadow_train_loss": (steps, np.ones(20)), "brn/shadow_eval_loss": (steps, np.full(20, 1.8))}
    window = make_window(
        probe=streams.skewed_ranks(1, own=1.0), columns=columns, steps=np.arange(200, 600), scalars=scalars
    )
    diagnosis = diagnose(window)

    assert diagnosis.verdict.code == "NH-RANKSKEW"
    assert "90% of the gap at bn1 is ranks that see different data" in named(diagnosis, "NH-GAP").summary
