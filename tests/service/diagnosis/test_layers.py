"""Clipping at the final limits: called beyond its null, only for Batch Renorm, only once the limits are final."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from brn_core.wire import Schedule
from service.diagnosis.finding import Finding
from service.diagnosis.layers import light_tailed_clip_rate, null_clip_rate
from service.diagnosis.rules import diagnose
from service.diagnosis.window import Window
from tests.streams import layer_rows

MakeWindow = Callable[..., Window]
SCHEDULE = Schedule(bn_steps=100, r_steps=400, d_steps=300, r_max=3.0, d_max=5.0)


def columns(
    *, clip_r: float = 0.0, left: float = 0.0, r_max: float = 3.0, d_max: float = 5.0, n: int = 32, layers: int = 2
) -> dict[str, np.ndarray[Any, Any]]:
    """400 rows; only the last layer clips."""
    shape = (400, 1, layers)
    last = np.arange(layers) == layers - 1
    return {
        "samples": np.full(shape, float(n)),
        "clip_r": np.full(shape, 1.0) * np.where(last, clip_r, 0.0),
        "clip_d": np.zeros(shape),
        "gap": np.full(shape, 0.2),
        "residual": np.full(shape, 0.2) * np.where(last, left, 0.0),
        "r_max": np.full(shape, r_max),
        "d_max": np.full(shape, d_max),
    }


def clip_finding(window: Window) -> Finding | None:
    return next((f for f in diagnose(window).findings if f.code == "NH-CLIP"), None)


def renorm(make_window: MakeWindow, given: dict[str, np.ndarray[Any, Any]], **more: Any) -> Window:
    defaults: dict[str, Any] = {"schedule": SCHEDULE, "steps": np.arange(1000, 1400), "kinds": ("BatchRenorm",) * 2}
    return make_window(columns=given, **(defaults | more))


@pytest.mark.parametrize("n", [2, 3, 4, 8, 32])
@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.5, 0.5)])
def test_the_null_clip_rate_is_that_of_simulated_normal_batches(n: int, r_max: float, d_max: float) -> None:
    x = np.random.default_rng(n).normal(size=(100_000, n))
    sigma_b = x.std(1)
    sigma = sigma_b.mean()
    r, d = sigma_b / sigma, x.mean(1) / sigma
    clipped = (r > r_max) | (r < 1 / r_max) | (np.abs(d) > d_max)

    assert null_clip_rate(n, r_max, d_max) == pytest.approx(clipped.mean(), abs=0.004)


@pytest.mark.parametrize(("n", "within"), [(6, 0.01), (8, 0.01), (16, 0.003), (32, 0.001)])
def test_the_null_clip_rate_covers_rectified_batches(n: int, within: float) -> None:
    x = np.maximum(np.random.default_rng(n).normal(size=(200_000, n)), 0)
    sigma_b = x.std(1)
    sigma = sigma_b.mean()
    r, d = sigma_b / sigma, (x.mean(1) - x.mean()) / sigma
    clipped = (r > 3) | (r < 1 / 3) | (np.abs(d) > 5)

    assert light_tailed_clip_rate(n, 3.0, 5.0) == pytest.approx(clipped.mean(), abs=within)


def test_the_chi_squared_cdf_is_scipys() -> None:
    from service.diagnosis.layers import _chi_squared_cdf

    for degrees in (1, 2, 7, 31, 1023):
        for x in (0.0, 0.01, 0.5, degrees / 2, degrees, 2.0 * degrees, 20.0 * degrees):
            assert _chi_squared_cdf(x, degrees) == pytest.approx(stats.chi2.cdf(x, degrees), abs=1e-9)


def test_no_clipping_is_no_finding(make_window: MakeWindow) -> None:
    assert clip_finding(renorm(make_window, columns())) is None


def test_a_residual_above_two_percent_of_the_gap_names_the_layer_and_its_numbers(make_window: MakeWindow) -> None:
    finding = clip_finding(renorm(make_window, columns(clip_r=0.02, left=0.08)))

    assert finding is not None
    assert finding.severity == "warning"
    assert finding.layers == ("bn2",)
    assert "8.0%" in finding.summary
    assert finding.evidence is not None
    assert finding.evidence.value == pytest.approx(0.08)
    assert finding.evidence.query.endswith("&layer=1")
    assert 1000 < finding.steps[0] < 1150
    assert finding.steps[1] == 1399


def test_the_clip_rate_is_held_against_its_null(make_window: MakeWindow) -> None:
    # Batches of two clip 22.6 % of their channels at the paper's limits; batches of 32 none.
    pair = clip_finding(renorm(make_window, columns(clip_r=0.24, n=2)))
    many = clip_finding(renorm(make_window, columns(clip_r=0.24, n=32)))

    assert pair is None
    assert many is not None


def test_limits_that_are_still_opening_are_not_judged(make_window: MakeWindow) -> None:
    assert clip_finding(renorm(make_window, columns(clip_r=0.5, left=0.5, r_max=2.0))) is None


def test_without_a_schedule_resting_open_limits_are_final_and_closed_ones_are_batch_norm(
    make_window: MakeWindow,
) -> None:
    resting = columns(clip_r=0.5, left=0.5, r_max=1.5, d_max=0.5)
    closed = columns(clip_r=1.0, left=1.0, r_max=1.0, d_max=0.0)
    finding = clip_finding(renorm(make_window, resting, schedule=None))

    assert finding is not None
    assert finding.remedy is not None
    assert finding.remedy.code is not None
    assert "r_max=3, d_max=5" in finding.remedy.code
    assert clip_finding(renorm(make_window, closed, schedule=None)) is None


def test_batch_norm_layers_have_no_limits_to_judge(make_window: MakeWindow) -> None:
    given = columns(clip_r=1.0, left=1.0)

    assert clip_finding(renorm(make_window, given, kinds=("BatchNorm", "BatchNorm"))) is None


def test_a_single_bad_stretch_of_50_rows_is_not_a_finding(make_window: MakeWindow) -> None:
    given = columns()
    given["residual"][350:400] = 0.1

    assert clip_finding(renorm(make_window, given)) is None


def test_missing_rows_and_ranks_do_not_hide_a_fault(make_window: MakeWindow) -> None:
    given = {name: np.repeat(c, 2, axis=1) for name, c in columns(clip_r=0.3, left=0.1).items()}
    for column in given.values():
        column[::7, 0] = np.nan
        column[200:, 1] = np.nan

    assert clip_finding(renorm(make_window, given)) is not None


def rectified(seed: int, n: int, *, r_max: float = 3.0, d_max: float = 5.0) -> dict[str, Any]:
    """One fully connected rectified layer, its r and d clipped channel by channel."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(400, n, 16)), 0)
    mu_b, sigma_b = x.mean(1), np.sqrt(x.var(1) + 1e-5)
    mu, sigma = np.empty_like(mu_b), np.empty_like(mu_b)
    mu[0], sigma[0] = mu_b.mean(0), sigma_b.mean(0)
    for t in range(1, 400):
        mu[t] = mu[t - 1] + 0.1 * (mu_b[t - 1] - mu[t - 1])
        sigma[t] = sigma[t - 1] + 0.1 * (sigma_b[t - 1] - sigma[t - 1])
    r, d = sigma_b / sigma, (mu_b - mu) / sigma
    r_left, d_left = r - np.clip(r, 1 / r_max, r_max), d - np.clip(d, -d_max, d_max)
    given = {"clip_r": r_left != 0, "clip_d": d_left != 0, "gap": (r - 1) ** 2 + d**2}
    given |= {"residual": r_left**2 + d_left**2, "samples": np.full_like(r, n)}
    given |= {"r_max": np.full_like(r, r_max), "d_max": np.full_like(r, d_max)}
    return {name: values.mean(1)[:, None, None] for name, values in given.items()}


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 16, 32])
def test_independent_rectified_batches_of_any_size_are_no_finding_at_the_papers_limits(
    make_window: MakeWindow, n: int
) -> None:
    for seed in range(8):
        assert clip_finding(renorm(make_window, rectified(seed, n), kinds=("BatchRenorm",))) is None


@pytest.mark.parametrize("n", [3, 4, 8, 32])
def test_narrow_limits_are_named_at_any_batch_size(make_window: MakeWindow, n: int) -> None:
    narrow = Schedule(bn_steps=100, r_steps=400, d_steps=300, r_max=1.1, d_max=0.1)
    for seed in range(4):
        given = rectified(seed, n, r_max=1.1, d_max=0.1)
        finding = clip_finding(renorm(make_window, given, kinds=("BatchRenorm",), schedule=narrow))
        assert finding is not None
        assert finding.remedy is not None
        assert "r_max=3, d_max=5" in str(finding.remedy.code)


@pytest.mark.parametrize("tails", ["sparse", "t3"])
@pytest.mark.parametrize("n", [8, 16, 32])
def test_heavy_tails_of_independent_batches_are_not_held_against_the_papers_limits(
    make_window: MakeWindow, tails: str, n: int
) -> None:
    for seed in range(4):
        given = layer_rows(seed, n=n, tails=tails, r_max=3.0, d_max=5.0)
        assert clip_finding(make_window(columns=given, kinds=("BatchRenorm",))) is None

    narrow = layer_rows(0, n=n, tails=tails, r_max=1.2, d_max=0.3)
    assert clip_finding(make_window(columns=narrow, kinds=("BatchRenorm",))) is not None
