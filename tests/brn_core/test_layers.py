import copy
import io
import pickle
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from brn_core import fused
from brn_core.layers import (
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    convert_batchnorm,
    revert_batchrenorm,
)
from brn_core.schedule import RenormSchedule
from brn_core.statistics import average_statistics, update_statistics

torch.set_num_threads(1)

OPEN = {"r_max": 3.0, "d_max": 5.0}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _trained(layer, batches=3, shape=(8,)):
    for _ in range(batches):
        layer(torch.randn(16, layer.num_features, *shape) * 2 + 1)
    return layer


def _state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the paper's algorithm over many steps


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (BatchRenorm1d, ()),
        (BatchRenorm1d, (5,)),
        (BatchRenorm2d, (3, 4)),
        (BatchRenorm3d, (2, 3, 2)),
        (BatchRenorm, (2,) * 5),
    ],
)
def test_a_run_follows_algorithm_1_step_by_step(reference, make, shape):
    layer = make(3, momentum=0.2, dtype=torch.float64, **OPEN)
    mu, sigma = np.zeros(3), np.ones(3)
    for step in range(6):
        x = torch.randn(7, 3, *shape, dtype=torch.float64) * (1 + step) + step
        f = reference.forward(x.numpy(), np.ones(3), np.zeros(3), mu, sigma, np.float32(1 / 3), 3, 5, 0.2, 1e-5)
        np.testing.assert_allclose(layer(x).detach(), f.y, rtol=1e-9, atol=1e-9)
        mu, sigma = f.new_mu, f.new_sigma
        np.testing.assert_allclose(layer.running_mean, mu, rtol=1e-9)
        np.testing.assert_allclose(layer.running_std, sigma, rtol=1e-9)
    assert layer.num_batches_tracked == 6
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    np.testing.assert_allclose(
        layer.eval()(x).detach(),
        reference.inference(x.numpy(), np.ones(3), np.zeros(3), mu, sigma),
        rtol=1e-9,
        atol=1e-12,
    )


def test_stat_var_is_the_moving_variance_of_other_implementations():
    layer = BatchRenorm1d(4, momentum=0.1, stat="var", eps=0.0, dtype=torch.float64)
    variance = torch.ones(4, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(9, 4, dtype=torch.float64) * 3
        layer(x)
        variance += 0.1 * (x.var(0, correction=0) - variance)
    torch.testing.assert_close(layer.running_std, variance.sqrt())


def test_debias_makes_the_first_steps_a_plain_weighted_mean():
    layer = BatchRenorm1d(2, momentum=0.3, debias=True, dtype=torch.float64)
    batches = torch.randn(4, 8, 2, dtype=torch.float64) + 5
    for x in batches:
        layer(x)
    weights = torch.tensor([0.7**3, 0.7**2, 0.7, 1.0], dtype=torch.float64)
    expected = (weights[:, None] * batches.mean(1)).sum(0) / weights.sum()
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-6, atol=0)


def test_accumulation_steps_keep_the_time_constant_in_optimizer_steps():
    x = torch.randn(16, 3) + 4
    plain, accumulating = BatchRenorm1d(3, momentum=0.1), BatchRenorm1d(3, momentum=0.1, accumulation_steps=4)
    for _ in range(3):
        plain(x)
        for _ in range(4):
            accumulating(x)
    torch.testing.assert_close(accumulating.running_mean, plain.running_mean)
    torch.testing.assert_close(accumulating.running_std, plain.running_std)


def test_virtual_batches_are_normalized_apart_and_move_the_statistics_once(reference):
    layer = BatchRenorm1d(3, momentum=0.5, virtual_batch_size=4, dtype=torch.float64, **OPEN)
    layer.observe = True
    x = torch.randn(14, 3, 5, dtype=torch.float64) * 2 + 1  # 3 parts of 5, 5 and 4
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    one, zero = np.ones(3), np.zeros(3)
    parts = [slice(0, 5), slice(5, 10), slice(10, 14)]
    forwards = [
        reference.forward(x.detach()[p].numpy(), one, zero, zero, one, np.float32(1 / 3), 3, 5, 0.5, 1e-5)
        for p in parts
    ]
    for p, f in zip(parts, forwards, strict=True):
        np.testing.assert_allclose(y.detach()[p], f.y, rtol=1e-9, atol=1e-12)
        dx = reference.backward(dy[p].numpy(), x.detach()[p].numpy(), one, f)[0]
        np.testing.assert_allclose(x.grad[p], dx, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.running_std, 0.5 + 0.5 * np.mean([f.sigma_B for f in forwards], axis=0), rtol=1e-9)
    assert layer.observed.mean_NC.shape == (14, 3)
    assert layer.num_batches_tracked == 1


def test_a_batch_smaller_than_the_virtual_one_is_normalized_whole():
    x = torch.randn(3, 2, 6)
    assert torch.equal(BatchRenorm1d(2, virtual_batch_size=8)(x), BatchRenorm1d(2)(x))


def test_a_mask_works_through_the_layer_with_and_without_the_channel_dimension():
    x, mask = torch.randn(4, 3, 6), torch.rand(4, 6) > 0.4
    a, b = BatchRenorm1d(3, **OPEN), BatchRenorm1d(3, **OPEN)
    a.observe = True
    assert torch.equal(a(x, mask), b(x, mask[:, None].expand_as(x)))
    kept = x.transpose(1, 2)[mask].double()
    torch.testing.assert_close(a.observed.mu_B.double(), kept.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.observed.mean_NC[0], x[0][:, mask[0]].mean(1))


@pytest.mark.parametrize("shape", [(16, 5, 3), (8, 6, 3), (4, 6, 7, 3), (2, 4, 5, 6, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_channels_may_be_in_any_dimension(shape, masked, mode):
    x, mask = torch.randn(shape, requires_grad=True), torch.rand(shape[:-1]) > 0.4 if masked else None
    last = _trained(BatchRenorm(3, axis=-1, r_max=1.5, d_max=0.2).train(mode == "train"), shape=()).train(
        mode == "train"
    )
    second = BatchRenorm(3, r_max=1.5, d_max=0.2).train(mode == "train")
    second.load_state_dict(last.state_dict())
    dy = torch.randn(shape)
    y, y_second = last(x, mask), second(x.movedim(-1, 1), mask).movedim(1, -1)
    torch.testing.assert_close(y, y_second)
    assert y.is_contiguous()
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(y_second, x, dy))
    torch.testing.assert_close(last.state_dict(), second.state_dict())
    if masked and mode == "train":
        assert not y[~mask].any()


def test_channels_in_a_middle_dimension_may_be_masked_with_them_or_without():
    x, mask = torch.randn(4, 6, 3, 7), torch.rand(4, 6, 7) > 0.4
    layer = BatchRenorm(3, axis=2)
    want = BatchRenorm(3)(x.movedim(2, 1), mask).movedim(1, 2)
    torch.testing.assert_close(layer(x, mask), want)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x, mask.unsqueeze(2)), want)


def test_an_axis_that_cannot_be_the_channels_is_refused_in_words():
    with pytest.raises(ValueError, match="0 is that of the samples"):
        BatchRenorm(3, axis=0)
    for axis in (3, -3):  # -3 is the samples' here
        with pytest.raises(ValueError, match=rf"axis={axis} is not one of the channels in input of shape \(4, 5, 3\)"):
            BatchRenorm(3, axis=axis)(torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match=r"expected 3 channels in dimension -1, got shape \(4, 3, 5\)"):
        BatchRenorm(3, axis=-1)(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match="BatchNorm has its channels in dimension 1"):
        revert_batchrenorm(nn.Sequential(BatchRenorm(3, axis=-1)))


def test_update_statistics_finds_the_channels_at_their_axis():
    model, data = nn.Sequential(BatchRenorm(3, axis=-1)), torch.randn(40, 6, 3) * 2 + 1
    update_statistics(model, data.split(10))
    torch.testing.assert_close(model[0].running_mean, data.mean((0, 1)))


def test_masked_virtual_batches_use_each_its_own_mask():
    x, mask = torch.randn(8, 3, 6), torch.rand(8, 6) > 0.4
    whole = BatchRenorm1d(3, virtual_batch_size=4)(x, mask)
    torch.testing.assert_close(whole[4:], BatchRenorm1d(3)(x[4:], mask[4:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["(N, C)", "channels_last"])
def test_with_limits_1_and_0_forward_and_backward_are_batch_norms_to_rounding(layout, dtype):
    x = torch.randn(16, 5, 6, 6, dtype=dtype) * 3 + 2
    x = x[..., 0, 0].contiguous() if layout == "(N, C)" else x.contiguous(memory_format=torch.channels_last)
    ours, theirs = BatchRenorm(5), (nn.BatchNorm1d if layout == "(N, C)" else nn.BatchNorm2d)(5)
    ours.running_std.uniform_(0.1, 3)
    dy, xs = torch.randn_like(x), [x.clone().requires_grad_() for _ in range(2)]
    ys = [ours(xs[0]), theirs(xs[1])]
    for y in ys:
        y.backward(dy)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*ys, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=tolerance, atol=tolerance)


# --- observation


@pytest.mark.parametrize("shape", [(), (6,)])
def test_observed_holds_the_statistics_of_the_forward_before_its_update(shape):
    layer = _trained(BatchRenorm1d(3, **OPEN), shape=shape)
    mu, sigma = layer.running_mean.clone(), layer.running_std.clone()
    layer.observe = True
    x = torch.randn(5, 3, *shape, requires_grad=True) * 2
    layer(x)
    seen = layer.observed
    assert not any(value.requires_grad for value in seen if value is not None), "it would keep the graph"
    x = x.detach()
    flat = x if x.dim() == 2 else x.transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(seen.mu_B, flat.mean(0))
    torch.testing.assert_close(seen.sigma_B, (flat.var(0, correction=0) + 1e-5).sqrt())
    assert torch.equal(seen.mu, mu)
    assert torch.equal(seen.sigma, sigma)
    assert (seen.var_NC is None) == (not shape)
    assert (float(seen.r_max), float(seen.d_max)) == (3, 5)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (4, 3, 224, 224)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_observing_changes_nothing_and_is_off_by_default(shape, channels_last, dtype):
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    plain, observing = BatchRenorm2d(3), BatchRenorm2d(3)
    observing.observe = True
    assert torch.equal(plain(x), observing(x))
    assert plain.observed is None
    assert _same(plain.state_dict(), observing.state_dict())


def test_inference_leaves_no_observation():
    layer = BatchRenorm1d(3).eval()
    layer.observe = True
    layer(torch.randn(4, 3))
    assert layer.observed is None


# --- bad and odd input


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (BatchRenorm1d(3), (2, 3, 4, 5), "2-dimensional or 3-dimensional"),
        (BatchRenorm2d(3), (2, 3, 4), "4-dimensional"),
        (BatchRenorm3d(3), (2, 3, 4, 5), "5-dimensional"),
        (BatchRenorm(3), (3,), "at least 2-dimensional"),
        (BatchRenorm1d(3), (4, 2), "expected 3 channels"),
        (BatchRenorm1d(3), (1, 3), "more than 1 value per channel"),
        (BatchRenorm1d(3, virtual_batch_size=2), (1, 3), "more than 1 value per channel"),
    ],
)
def test_input_of_a_wrong_shape_is_refused_in_words(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))


def test_integer_input_is_refused_in_words():
    with pytest.raises(ValueError, match="floating-point"):
        BatchRenorm1d(2)(torch.ones(3, 2, dtype=torch.long))


def test_a_virtual_batch_of_one_value_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchRenorm1d(2, virtual_batch_size=1)(torch.randn(4, 2))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_features": 0},
        {"eps": -1e-5},
        {"momentum": 0.0},
        {"momentum": 1.5},
        {"r_max": 0.9},
        {"d_max": -1.0},
        {"r_min": 1.5},
        {"stat": "median"},
        {"sync": "all"},
        {"accumulation_steps": 0},
        {"virtual_batch_size": 0},
        {"virtual_batch_size": 4, "sync": "moments"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        BatchRenorm1d(**{"num_features": 3} | kwargs)


def test_an_empty_batch_passes_through_and_changes_nothing():
    layer = _trained(BatchRenorm2d(3, **OPEN), shape=(2, 2))
    before = _state(layer)
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert _same(layer.state_dict(), before)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_constant_channel_stays_finite(shape):
    layer = BatchRenorm1d(2, **OPEN)
    x = torch.randn(8, 2, *shape)
    x[:, 0] = 7.0
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert layer.running_std.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("stat", ["std", "var"])
def test_a_bad_sample_shows_in_the_output_but_never_enters_the_statistics(bad, stat):
    layer = _trained(BatchRenorm1d(2, momentum=0.5, stat=stat, **OPEN))
    before = _state(layer)
    x = torch.randn(6, 2, 4)
    x[1, 0, 2] = bad
    x[2, 0, 2] = -bad
    y = layer(x)
    assert not y[:, 0].isfinite().all() or bad == 3e38
    assert torch.equal(layer.running_std[0], before["running_std"][0])
    assert layer.running_mean.isfinite().all()
    assert not torch.equal(layer.running_std[1], before["running_std"][1])  # the other channel moves on


def test_a_step_that_the_grad_scaler_skips_leaves_usable_statistics():
    model = nn.Sequential(nn.Linear(3, 4), BatchRenorm1d(4, **OPEN))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    weights = _state(model[0])
    x = torch.randn(8, 3)
    x[0, 0] = torch.inf
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert _same(model[0].state_dict(), weights)
    assert model[1].running_mean.isfinite().all()
    assert model(torch.randn(8, 3)).isfinite().all()


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_and_exact_when_the_module_is_cast(dtype):
    layer = _trained(BatchRenorm1d(3, **OPEN))
    before = _state(layer)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    for name in ("running_mean", "running_std", "r_min", "r_max", "d_max"):
        assert torch.equal(getattr(layer, name), before[name])
        assert getattr(layer, name).dtype == torch.float32
    x = torch.randn(8, 3, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
    assert layer.eval()(x).dtype == dtype


def test_double_makes_the_statistics_double():
    layer = BatchRenorm1d(3).double()
    assert layer.running_std.dtype == torch.float64
    assert layer(torch.randn(4, 3, dtype=torch.float64)).dtype == torch.float64


def test_autocast_keeps_bfloat16_activations_and_float32_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4, **OPEN), nn.Conv2d(4, 2, 3))
    bn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inner = model[:2](x)
        assert inner.dtype == bn(x).dtype == torch.bfloat16
        model(x).float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32


# --- state


def test_a_batch_norm_checkpoint_loads_strictly_with_the_same_inference_output():
    bn = nn.BatchNorm2d(3)
    _trained(bn, shape=(4, 4))
    layer = BatchRenorm2d(3, **OPEN)
    state = bn.state_dict()
    layer.load_state_dict(state, strict=True)
    assert "running_var" in state  # the caller's checkpoint is left as it was
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x))
    assert layer.num_batches_tracked == 3
    assert float(layer.r_max) == 3


def test_a_16_bit_checkpoint_that_is_assigned_leaves_float32_statistics():
    layer = BatchRenorm2d(3)
    layer.load_state_dict(nn.BatchNorm2d(3).bfloat16().state_dict(), assign=True)
    assert layer.running_mean.dtype == layer.running_std.dtype == layer.r_max.dtype == torch.float32


def test_a_layer_inside_a_model_takes_a_batch_norm_checkpoint_too():
    bn = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    bn(torch.randn(8, 2))
    ours = nn.Sequential(nn.Linear(2, 3), BatchRenorm1d(3))
    ours.load_state_dict(bn.state_dict())
    x = torch.randn(4, 2)
    torch.testing.assert_close(ours.eval()(x), bn.eval()(x))


def test_training_resumed_from_a_checkpoint_is_bit_equal():
    batches = torch.randn(6, 16, 3) * 2 + 1
    layer = BatchRenorm1d(3, momentum=0.2)
    layer.set_limits(1.5, 0.7)
    for x in batches[:3]:
        layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    resumed = BatchRenorm1d(3, momentum=0.2)
    resumed.load_state_dict(torch.load(buffer))
    for x in batches[3:]:
        assert torch.equal(layer(x), resumed(x))
    assert _same(layer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_on_alike_and_share_nothing(copied):
    layer = _trained(BatchRenorm1d(3, **OPEN))
    layer.observe = True
    with torch.no_grad():
        layer(torch.randn(4, 3))
    twin = copied(layer)
    assert twin.observed is None
    x = torch.randn(5, 3)
    assert torch.equal(twin(x), layer(x))
    before = _state(layer)
    twin(x)
    assert _same(layer.state_dict(), before)


def test_meta_layers_materialize_to_a_fresh_layer():
    layer = BatchRenorm2d(3, device="meta", **OPEN)
    assert layer.running_std.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert _same(layer.state_dict(), BatchRenorm2d(3, **OPEN).state_dict())


def test_a_parametrized_gamma_is_used_and_trained():
    class Doubled(nn.Module):
        def forward(self, gamma):
            return 2 * gamma

    x = torch.randn(8, 3, 4, 4)
    plain, layer = BatchRenorm2d(3), BatchRenorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())  # moves it out of the layer's parameters
    torch.testing.assert_close(layer(x), 2 * plain(x))
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_functional_call_updates_the_buffers_it_is_given():
    layer = BatchRenorm1d(3)
    before = _state(layer)
    other = _state(_trained(BatchRenorm1d(3)))
    x = torch.randn(6, 3)
    mean = other["running_mean"].clone()
    y = torch.func.functional_call(layer, other, x)
    assert torch.equal(y, layer.eval()(x).new_tensor(y.tolist()))
    assert _same(layer.state_dict(), before)
    assert not torch.equal(other["running_mean"], mean)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_torch_func_are_those_of_autograd(masked):
    torch.manual_seed(0)
    layer = BatchRenorm1d(5, r_max=2.0, d_max=1.0, dtype=torch.float64)
    x, dy = torch.randn(2, 8, 5, 3, dtype=torch.float64).unbind()
    mask = torch.rand(8, 3) > 0.3 if masked else None
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters, x):
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        return (torch.func.functional_call(layer, (parameters, own), (x, mask)) * dy).sum()

    ours, dx = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    (layer(x, mask) * dy).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)
    torch.testing.assert_close(dx, x.grad)
    layer.virtual_batch_size = 4
    with pytest.raises(RuntimeError, match=r"torch\.func takes neither"):
        torch.func.grad(loss, argnums=1)(parameters, x.detach())


def test_frozen_layers_infer_and_track_nothing_even_in_training():
    layer = _trained(BatchRenorm1d(3, **OPEN))
    layer.frozen = True
    before, x = _state(layer), torch.randn(4, 3) * 9
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert _same(layer.state_dict(), before)


def test_repr_shows_what_differs_from_batch_norm():
    text = repr(BatchRenorm2d(7, r_max=2.0, sync="ema", affine=False, virtual_batch_size=4))
    for part in ("BatchRenorm2d(7", "r_max=2.0", "sync='ema'", "affine=False", "virtual_batch_size=4"):
        assert part in text


# --- backward in company


def test_two_forwards_before_a_backward_give_each_its_own_gradient():
    a, b = torch.randn(6, 3), torch.randn(6, 3) * 4
    layer = _trained(BatchRenorm1d(3, momentum=0.5, **OPEN))
    twin = copy.deepcopy(layer)
    xa, xb = a.clone().requires_grad_(), b.clone().requires_grad_()
    ya, yb = layer(xa), layer(xb)
    (ya.pow(3).sum() + yb.pow(3).sum()).backward()
    for x, leaf in ((a, xa), (b, xb)):
        alone = x.clone().requires_grad_()
        twin(alone).pow(3).sum().backward()
        assert torch.equal(leaf.grad, alone.grad)


def _operators_and_kernels(test):
    """Two cases of a test of checkpoints, which are computed by operators: what it compares with, to the bit, and what
    the kernels for the CPU make of the plain run, where the last bit may differ."""

    def check(own, their):
        assert torch.equal(own, their)

    def close(own, their):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-6)

    return pytest.mark.parametrize(("kernels", "same"), [(False, check), (True, close)], ids=["operators", "kernels"])(
        test
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("virtual", [None, 4])
@_operators_and_kernels
def test_activation_checkpointing_gives_the_same_gradients_and_statistics(
    monkeypatch, reentrant, virtual, kernels, same
):
    if not kernels:
        monkeypatch.setattr(fused, "fits", lambda x: False)

    def run(checkpointed):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(4, 6), BatchRenorm1d(6, momentum=0.3, virtual_batch_size=virtual, **OPEN), nn.Tanh(),
            nn.Linear(6, 5), BatchRenorm1d(5, momentum=0.3, **OPEN),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(4):
            x = torch.randn(12, 4, requires_grad=True)
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            optimizer.zero_grad()
            y.pow(3).mean().backward()
            optimizer.step()
        return _state(model), [p.grad.clone() for p in model.parameters()]

    (plain_state, plain_grads), (state, grads) = run(False), run(True)
    for own, their in zip((*state.values(), *grads), (*plain_state.values(), *plain_grads), strict=True):
        same(own, their)


@_operators_and_kernels
def test_checkpointed_forwards_interleaved_before_their_backwards_are_told_apart(monkeypatch, kernels, same):
    if not kernels:
        monkeypatch.setattr(fused, "fits", lambda x: False)

    def run(wrap):
        torch.manual_seed(2)
        layer = BatchRenorm1d(3, momentum=0.5, **OPEN)
        xs = [torch.randn(8, 3).mul(k + 1).requires_grad_() for k in range(3)]
        losses = [wrap(layer, x).pow(3).sum() for x in xs]
        for k in (1, 0, 2):
            losses[k].backward()
        return [x.grad for x in xs], layer.running_std

    plain, std = run(lambda layer, x: layer(x))
    recomputed, recomputed_std = run(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for own, their in zip((*recomputed, recomputed_std), (*plain, std), strict=True):
        same(own, their)


def test_nothing_is_kept_for_a_second_run_that_cannot_come():
    layer = BatchRenorm2d(3)
    for _ in range(2):
        layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert not layer._corrections


def test_a_bad_batch_does_not_spoil_the_checkpointed_batches_after_it():
    layer = BatchRenorm1d(3, **OPEN)
    twin = copy.deepcopy(layer)
    bad = torch.full((4, 3), torch.nan)
    x, x_twin = (torch.arange(12.0).view(4, 3).requires_grad_() for _ in range(2))
    checkpoint(layer, bad, use_reentrant=False)
    twin(bad)
    checkpoint(layer, x, use_reentrant=False).pow(3).sum().backward()
    twin(x_twin).pow(3).sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad, x_twin.grad)


def test_gradient_penalty_through_the_layer_matches_finite_differences():
    torch.manual_seed(3)
    layer = BatchRenorm1d(2, dtype=torch.float64)  # r = 1, d = 0: constant, as a finite difference needs

    def penalty(x):
        y = layer(x)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return grad.square().sum()

    assert torch.autograd.gradcheck(penalty, torch.randn(4, 2, dtype=torch.float64, requires_grad=True))


# --- neighbours


def test_torch_tools_for_batch_norm_leave_the_layer_alone():
    model = nn.Sequential(nn.Linear(3, 4), BatchRenorm1d(4, momentum=0.02))
    _trained(model[1])
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is BatchRenorm1d
    before = _state(model[1])
    update_bn([torch.randn(8, 3)], model)
    assert model[1].momentum == 0.02
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].num_batches_tracked == before["num_batches_tracked"]  # it is in eval mode: no reset, no update


def test_averaged_models_average_the_statistics_too():
    model = nn.Sequential(BatchRenorm1d(2))
    averaged = AveragedModel(model, use_buffers=True)
    model(torch.randn(8, 2) + 3)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[0].running_mean, model[0].running_mean)


# --- a whole model


def _network():
    shared = nn.BatchNorm1d(6)
    return nn.Sequential(
        nn.Linear(4, 6), shared, nn.ReLU(), nn.Linear(6, 6), shared, nn.BatchNorm1d(6, eps=1e-3, affine=False),
        nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.BatchNorm2d(6), nn.Flatten()),
    )  # fmt: skip


def test_convert_and_revert_keep_the_inference_output_and_everything_around_it():
    model = _network()
    for _ in range(3):
        model(torch.randn(16, 4) * 2)
    x = torch.randn(5, 4)
    expected = model.eval()(x).detach()
    keys, parameters = set(model.state_dict()), list(model.parameters())
    model[5].train()
    model[1].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))

    model = convert_batchnorm(model, r_max=2.0)
    assert {type(m) for m in model.modules() if "Batch" in type(m).__name__} == {BatchRenorm1d, BatchRenorm2d}
    assert model[1] is model[4]
    assert model[5].training
    assert not model[1].training
    assert model[5].eps == 1e-3
    assert model[5].weight is None
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[1].weight.requires_grad
    assert float(model[1].r_max) == 2
    torch.testing.assert_close(model.eval()(x), expected)
    assert len(calls) == 2

    model = revert_batchrenorm(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    assert model[1].num_batches_tracked == 6
    assert len(calls) == 4


def test_convert_keeps_dtype_and_turns_sync_batch_norm_into_synced_moments():
    half = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3).bfloat16()))[0]
    assert half.weight.dtype == torch.bfloat16
    assert half.running_mean.dtype == torch.float32
    synced = convert_batchnorm(nn.SyncBatchNorm(3))
    assert type(synced) is BatchRenorm
    assert synced.sync == "moments"
    assert type(revert_batchrenorm(synced)) is nn.SyncBatchNorm


def test_convert_leaves_instance_norm_alone():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    assert type(convert_batchnorm(model)[0]) is nn.InstanceNorm1d


class NormAct(nn.BatchNorm1d):
    """With its activation in it, as timm has them."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "no moving statistics"),
        (nn.LazyBatchNorm1d(), "no shape yet"),
        (NormAct(3), "NormAct has a forward of its own"),
    ],
)
def test_convert_refuses_what_has_no_inference_output_to_keep(layer, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn that they are experimental
        with pytest.raises(ValueError, match=message):
            convert_batchnorm(nn.Sequential(layer))


def test_debias_with_a_tiny_momentum_stays_finite():
    layer, x = BatchRenorm1d(2, momentum=1e-9, debias=True), torch.randn(8, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@pytest.mark.parametrize("limits", [(0.5, 0.0), (1.0, -1.0), (0.0, 0.0), (2.0, 1.0, 1.5), (float("nan"), 0.0)], ids=str)
def test_limits_out_of_range_are_refused_later_too(limits):
    layer = BatchRenorm1d(3)
    before = _state(layer)
    with pytest.raises(ValueError, match="must be"):
        layer.set_limits(*limits)
    assert _same(layer.state_dict(), before)


@pytest.mark.parametrize("mask", [torch.ones(4, 5), torch.ones(4, 3, dtype=torch.bool)], ids=["float", "wrong shape"])
def test_a_mask_that_is_none_is_refused_in_words(mask):
    with pytest.raises(ValueError, match="a mask must be bool"):
        BatchRenorm1d(3)(torch.randn(4, 3, 5), mask)


def test_update_statistics_gives_the_exact_statistics_of_the_data():
    data = torch.randn(50, 3, 4) * torch.tensor([1.0, 2.0, 5.0])[:, None] + 7
    data[25:] += 10  # a variance between batches, which a mean of batch variances would lose
    model = nn.Sequential(BatchRenorm1d(3, **OPEN), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model(data[:8])
    bn, before = _state(model[2]), _state(model[0])
    update_statistics(model, DataLoader(TensorDataset(data), batch_size=7))
    flat = data.transpose(1, 2).reshape(-1, 3).double()
    torch.testing.assert_close(model[0].running_mean.double(), flat.mean(0))
    torch.testing.assert_close(model[0].running_std.double(), (flat.var(0, correction=0) + 1e-5).sqrt())
    assert _same(model[2].state_dict(), bn)
    assert model.training
    assert model[1].training
    for name in ("r_min", "r_max", "d_max", "num_batches_tracked"):
        assert torch.equal(getattr(model[0], name), before[name])


def test_update_statistics_pools_masked_layers_by_their_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchRenorm1d(2)

        def forward(self, x):
            return self.norm(x, mask=x[:, 0] > 0)

    model, x = Masked(), torch.randn(20, 2, 6)
    update_statistics(model, [x[:10], x[10:]])
    kept = x.transpose(1, 2)[x[:, 0] > 0]
    torch.testing.assert_close(model.norm.running_mean, kept.mean(0))


def test_update_statistics_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(_trained(BatchRenorm1d(3)))
    before = _state(model)

    def broken():
        yield torch.randn(4, 3)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        update_statistics(model, broken())
    with pytest.raises(ValueError, match="fewer than 2 values"):
        update_statistics(model, [])
    assert _same(model.state_dict(), before)
    assert model[0].training


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_update_statistics_refuses_a_bad_sample_and_leaves_the_statistics(bad):
    model = nn.Sequential(_trained(BatchRenorm1d(3)))
    before, x = _state(model), torch.randn(8, 3)
    broken = x.clone()
    broken[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        update_statistics(model, [x, broken])
    assert _same(model.state_dict(), before)


def test_average_statistics_without_a_process_group_changes_nothing():
    model = nn.Sequential(_trained(BatchRenorm1d(3, sync="ema")))
    before = _state(model)
    average_statistics(model)
    assert _same(model.state_dict(), before)


# --- compiler and exporters


# torch's own: what it does while it traces
_TRACING_AN_AUTOGRAD_FUNCTION = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
_COPYING_A_TREE_SPEC = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _counting_compile(module):
    """torch.compile(fullgraph=True) and a list that grows by one a compiled graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(module, backend=backend, fullgraph=True), graphs


@_TRACING_AN_AUTOGRAD_FUNCTION
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_moving_schedule_compiles_to_one_graph_that_computes_the_same():
    eager = nn.Sequential(nn.Linear(4, 6), BatchRenorm1d(6, momentum=0.2), nn.Linear(6, 2), BatchRenorm1d(2))
    compiled_model = copy.deepcopy(eager)
    compiled, graphs = _counting_compile(compiled_model)
    schedule = RenormSchedule(2, 18, 12)
    for step in range(20):
        x = torch.randn(8, 4)
        results = []
        for model, call in ((eager, eager), (compiled_model, compiled)):
            schedule.apply(model, step)
            model.zero_grad()
            y = call(x)
            y.pow(3).sum().backward()
            results.append((y, model[0].weight.grad, model[1].weight.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch.testing.assert_close(compiled_model[1].running_std, eager[1].running_std)
    assert compiled_model[1].num_batches_tracked == 20


@_TRACING_AN_AUTOGRAD_FUNCTION
@pytest.mark.usefixtures("_fresh_compiler")
def test_aot_autograd_traces_forward_and_backward_with_buffer_updates():
    eager = BatchRenorm2d(3, momentum=0.2, **OPEN)
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) * 2 + 1
        xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        eager(xs[0]).pow(3).sum().backward()
        compiled(xs[1]).pow(3).sum().backward()
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-4, atol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled_model.state_dict()[name], value)


@_TRACING_AN_AUTOGRAD_FUNCTION
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("checkpoint_inside", [True, False])
def test_a_checkpoint_in_a_compiled_region_is_refused_rather_than_given_a_wrong_gradient(checkpoint_inside):
    body = nn.Sequential(nn.Linear(4, 6), BatchRenorm1d(6, **OPEN), nn.Tanh(), nn.Linear(6, 2))

    def once_more(x):
        return checkpoint(body, x, use_reentrant=False)

    compiled = torch.compile(once_more if checkpoint_inside else body, backend="aot_eager")
    x = torch.randn(8, 4)
    y = compiled(x) if checkpoint_inside else checkpoint(compiled, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="out of the checkpoint"):
        y.sum().backward()


def test_inference_exports_as_one_batch_norm_node():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4)).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in name for name in names) == 1
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), model(x))


@_COPYING_A_TREE_SPEC
def test_onnx_folds_the_layer_into_the_convolution_before_it(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4)).eval()
    with torch.no_grad():
        for tensor, spread in ((model[1].running_mean, 1.0), (model[1].running_std, 0.2), (model[1].weight, 0.5)):
            tensor.add_(spread * torch.rand(4))
    x = torch.randn(2, 3, 8, 8)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph] == ["Conv"]
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-5, atol=1e-5)


@_TRACING_AN_AUTOGRAD_FUNCTION
@_COPYING_A_TREE_SPEC
def test_training_exports_with_its_buffers_marked_as_mutated():
    program = torch.export.export(BatchRenorm1d(3, **OPEN), (torch.randn(4, 3),)).run_decompositions()
    assert set(program.graph_signature.buffers_to_mutate.values()) == {
        "running_mean", "running_std", "num_batches_tracked"
    }  # fmt: skip
