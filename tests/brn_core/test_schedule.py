import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brn_core.layers import BatchRenorm1d
from brn_core.schedule import PAPER_STEPS, SHORTEST_PHASE, RenormSchedule


@pytest.mark.parametrize(
    ("step", "limits"),
    [
        (0, (1, 0)),
        (5_000, (1, 0)),
        (15_000, (1 + 2 * 10 / 35, 2.5)),
        (25_000, (1 + 2 * 20 / 35, 5)),
        (40_000, (3, 5)),
        (10**9, (3, 5)),
    ],
)
def test_defaults_are_the_papers_schedule(step, limits):
    assert RenormSchedule().limits(step) == pytest.approx(limits, rel=1e-12)


@given(
    bn=st.integers(0, 50),
    r=st.integers(0, 50),
    d=st.integers(0, 50),
    step=st.integers(-5, 200),
    length=st.integers(1, 20),
)
def test_limits_never_close_again_and_stay_in_range(bn, r, d, step, length):
    schedule = RenormSchedule(bn, bn + r, bn + d, r_max=2.0, d_max=4.0)
    r_max, d_max = schedule.limits(step)
    later_r, later_d = schedule.limits(step + length)
    assert 1 <= r_max <= later_r <= 2
    assert 0 <= d_max <= later_d <= 4
    if step < bn:
        assert (r_max, d_max) == (1, 0)


def test_scaled_keeps_the_shape_of_a_long_run():
    assert RenormSchedule().scaled(PAPER_STEPS) == RenormSchedule()
    assert RenormSchedule().scaled(2 * PAPER_STEPS) == RenormSchedule(10_000, 80_000, 50_000)


@pytest.mark.parametrize("momentum", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("total", [10, 1_000, 20_000])
def test_scaled_gives_every_phase_of_a_short_run_time_for_the_moving_statistics(total, momentum):
    schedule = RenormSchedule().scaled(total, momentum)
    shortest = SHORTEST_PHASE / momentum
    assert schedule.bn_steps >= shortest
    assert schedule.d_steps - schedule.bn_steps >= shortest
    assert schedule.r_steps - schedule.bn_steps >= shortest


def test_scaled_leaves_out_what_the_schedule_leaves_out():
    assert RenormSchedule(0, 0, 0, r_max=2.0).scaled(100).limits(0) == (2.0, 5.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bn_steps": -1}, "bn_steps"),
        ({"bn_steps": 30_000}, "bn_steps"),
        ({"r_max": 0.5}, "r_max"),
        ({"r_max": math.inf}, "infinite limits"),
        ({"d_max": -1.0}, "d_max"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RenormSchedule(**kwargs)


@pytest.mark.parametrize(("total", "momentum"), [(0, 0.01), (10, 0.0), (10, 1.5)])
def test_scaled_refuses_what_it_cannot_scale_by(total, momentum):
    with pytest.raises(ValueError, match="got"):
        RenormSchedule().scaled(total, momentum)


def test_apply_sets_every_layer_of_the_model_and_only_of_the_part_it_is_given():
    model = nn.Sequential(BatchRenorm1d(3), nn.ReLU(), nn.Sequential(BatchRenorm1d(2)))
    schedule = RenormSchedule(0, 100, 100)
    schedule.apply(model, 100)
    schedule.apply(model[2], 50)
    assert [float(model[0].r_min), float(model[0].r_max), float(model[0].d_max)] == pytest.approx([1 / 3, 3, 5])
    assert [float(model[2][0].r_max), float(model[2][0].d_max)] == [2, 2.5]


def test_apply_replaces_infinite_limits_too():
    layer = BatchRenorm1d(3, r_max=math.inf, d_max=math.inf)
    RenormSchedule(10, 10, 10).apply(layer, 0)
    assert torch.stack([layer.r_min, layer.r_max, layer.d_max]).tolist() == [1, 1, 0]


def test_apply_to_a_model_without_the_layer_says_how_to_get_one():
    with pytest.raises(ValueError, match="convert_batchnorm"):
        RenormSchedule().apply(nn.Linear(2, 2), 0)


def test_limits_survive_in_the_state_dict_and_a_resumed_run_goes_on():
    schedule = RenormSchedule(0, 10, 10)
    torch.manual_seed(0)
    batches = torch.randn(10, 16, 4) * 3 + 1
    whole, half = BatchRenorm1d(4, momentum=0.3), BatchRenorm1d(4, momentum=0.3)
    for step in range(10):
        schedule.apply(whole, step)
        last = whole(batches[step])
    for step in range(5):
        schedule.apply(half, step)
        half(batches[step])
    resumed = BatchRenorm1d(4, momentum=0.3)
    resumed.load_state_dict(half.state_dict())
    assert torch.equal(resumed.r_max, half.r_max)
    for step in range(5, 10):
        schedule.apply(resumed, step)
        resumed_last = resumed(batches[step])
    assert torch.equal(last, resumed_last)
