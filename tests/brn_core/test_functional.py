import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from brn_core.functional import batch_renorm, renormalize, sample_moments
from brn_core.moments import batch_moments

torch.set_num_threads(1)

SHAPES = [(6, 3), (5, 4, 7), (4, 3, 5, 6), (3, 2, 3, 4, 2), (1, 3, 9), (16, 5, 1, 1)]
LAYOUTS = [*SHAPES, "channels_last", "large channels_last"]
LIMITS = {
    "batch norm": (1.0, 1.0, 0.0),
    "clipped": (1 / 1.1, 1.1, 0.1),
    "open": (1 / 3.0, 3.0, 5.0),
    "asymmetric": (0.9, 3.0, 0.3),
    "infinite": (0.0, np.inf, np.inf),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def _case(layout, dtype, seed=0, mean=0.0, spread=2.0):
    rng = np.random.default_rng(seed)
    shape = {"channels_last": (4, 3, 5, 6), "large channels_last": (3, 64, 16, 16)}.get(layout, layout)
    C = shape[1]
    x = torch.from_numpy(rng.normal(mean, spread, shape)).to(dtype)
    if isinstance(layout, str):
        x = x.contiguous(memory_format=torch.channels_last)
    arrays = {
        "gamma": rng.normal(1, 0.3, C),
        "beta": rng.normal(0, 1, C),
        "mu": rng.normal(mean, 1, C),
        "sigma": rng.uniform(0.5, 3, C),
    }
    dy = torch.from_numpy(rng.normal(0, 1, shape)).to(dtype)
    return x, dy, arrays


def _ours(x, dy, arrays, limits, dtype, **kwargs):
    t = {k: torch.tensor(v, dtype=dtype) for k, v in arrays.items()}
    x = x.detach().requires_grad_()
    gamma, beta = t["gamma"].requires_grad_(), t["beta"].requires_grad_()
    r_min, r_max, d_max = limits
    y = batch_renorm(
        x, t["mu"], t["sigma"], gamma, beta, r_min=r_min, r_max=r_max, d_max=d_max, momentum=0.07, eps=1e-5, **kwargs
    )
    y.backward(dy)
    return y.detach(), x.grad, gamma.grad, beta.grad, t["mu"], t["sigma"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_step_is_algorithm_1_and_its_gradient_equations(reference, layout, limits, dtype):
    x, dy, a = _case(layout, dtype)
    f = reference.forward(x.numpy(), a["gamma"], a["beta"], a["mu"], a["sigma"], *limits, 0.07, 1e-5)
    expected = (f.y, *reference.backward(dy.numpy(), x.numpy(), a["gamma"], f), f.new_mu, f.new_sigma)
    for ours, theirs in zip(_ours(x, dy, a, limits, dtype), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_inference_is_algorithm_1(reference, layout):
    x, _, a = _case(layout, torch.float64)
    t = {k: torch.from_numpy(v) for k, v in a.items()}
    y = batch_renorm(x, t["mu"], t["sigma"], t["gamma"], t["beta"], r_max=3, d_max=5, training=False)
    np.testing.assert_allclose(
        y, reference.inference(x.numpy(), a["gamma"], a["beta"], a["mu"], a["sigma"]), rtol=1e-12, atol=1e-14
    )
    np.testing.assert_array_equal(t["mu"], a["mu"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mean_of_1e4_with_sigma_1_loses_no_more_than_batch_norm_does(reference, layout):
    x, dy, a = _case(layout, torch.float32, mean=1e4, spread=1.0)
    limits = LIMITS["open"]
    f = reference.forward(x.numpy(), a["gamma"], a["beta"], a["mu"], a["sigma"], *limits, 0.07, 1e-5)
    y, dx, *_, mu, sigma = _ours(x, dy, a, limits, torch.float32)
    expected_dx = reference.backward(dy.numpy(), x.numpy(), a["gamma"], f)[0]
    np.testing.assert_allclose(y, f.y, atol=2e-2)  # 1e4 has 1e-3 between neighbours
    np.testing.assert_allclose(dx, expected_dx, atol=2e-2)
    np.testing.assert_allclose(sigma, f.new_sigma, rtol=1e-3)
    np.testing.assert_allclose(mu, f.new_mu, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sample_moments_are_those_of_each_sample(layout, dtype):
    x, _, _ = _case(layout, dtype, mean=3.0)
    mean_NC, var_NC = sample_moments(x)
    wide = x.double().flatten(2) if x.dim() > 2 else x.double()[..., None]
    torch.testing.assert_close(mean_NC.double(), wide.mean(2), rtol=1e-5, atol=1e-5)
    if x.dim() == 2:
        assert var_NC is None
    else:
        torch.testing.assert_close(var_NC.double(), wide.var(2, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout", [(8, 3, 16, 16), (8, 3, 2, 2), (8, 3, 5, 5), "channels_last", "large channels_last"], ids=str
)
def test_sample_moments_are_right_at_a_mean_of_1e4(layout):
    x, _, _ = _case(layout, torch.float32, mean=1e4, spread=1.0)
    mean_NC, var_NC = sample_moments(x)
    flat = x.double().flatten(2)
    torch.testing.assert_close(mean_NC.double(), flat.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(var_NC.double(), flat.var(2, correction=0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_per_sample_moments_do_not_change_the_batch_moments(layout):
    x, _, _ = _case(layout, torch.float64)
    plain, full = batch_moments(x), batch_moments(x, per_sample=True)
    torch.testing.assert_close(full.mean_C, plain.mean_C)
    torch.testing.assert_close(full.var_C, plain.var_C)
    assert plain.elements == full.elements == x.numel() // x.shape[1]
    assert full.mean_NC.shape == x.shape[:2]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [(4, 2), (3, 2, 4)], ids=str)
def test_first_and_second_derivatives_match_finite_differences(layout, masked):
    x, _, a = _case(layout, torch.float64, seed=3)
    mask = torch.arange(x.numel()).reshape(x.shape)[:, :1] % 5 != 0 if masked else None
    r, d = torch.tensor([1.3, 0.8], dtype=torch.float64), torch.tensor([0.2, -0.4], dtype=torch.float64)

    def f(x, gamma, beta):
        return renormalize(x, gamma, beta, lambda moments, sigma_B: (r, d), 1e-5, mask=mask)

    inputs = (x.requires_grad_(), *(torch.from_numpy(a[k]).requires_grad_() for k in ("gamma", "beta")))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_each_gradient_is_right_when_only_some_are_wanted(wanted):
    x, dy, a = _case((4, 3, 5), torch.float64)
    tensors = [x, *(torch.from_numpy(a[k]) for k in ("gamma", "beta"))]

    def run(indices):
        leaves = [t.detach().clone().requires_grad_(i in indices) for i, t in enumerate(tensors)]
        y = batch_renorm(leaves[0], torch.zeros(3), torch.ones(3), *leaves[1:], r_max=2, d_max=1)
        return torch.autograd.grad(y, [leaves[i] for i in indices], dy)

    everything = run((0, 1, 2))
    for i, grad in zip(wanted, run(wanted), strict=True):
        torch.testing.assert_close(grad, everything[i])


@pytest.mark.parametrize("affine", ["neither", "gamma", "beta"])
def test_gamma_and_beta_are_optional_one_by_one(reference, affine):
    x, dy, a = _case((5, 3, 4), torch.float64)
    gamma = torch.from_numpy(a["gamma"]) if affine == "gamma" else None
    beta = torch.from_numpy(a["beta"]) if affine == "beta" else None
    x.requires_grad_()
    y = batch_renorm(x, *(torch.from_numpy(a[k]).clone() for k in ("mu", "sigma")), gamma, beta, r_max=2, d_max=1)
    y.backward(dy)
    g, b = a["gamma"] if affine == "gamma" else np.ones(3), a["beta"] if affine == "beta" else np.zeros(3)
    f = reference.forward(x.detach().numpy(), g, b, a["mu"], a["sigma"], 0.5, 2, 1, 0.01, 1e-5)
    np.testing.assert_allclose(y.detach(), f.y, rtol=1e-9)
    np.testing.assert_allclose(x.grad, reference.backward(dy.numpy(), x.detach().numpy(), g, f)[0], atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bfloat16_gives_bfloat16_with_float32_statistics(reference, layout):
    x, dy, a = _case(layout, torch.bfloat16)
    a32 = {k: v.astype(np.float32).astype(np.float64) for k, v in a.items()}
    t = {k: torch.from_numpy(v).float() for k, v in a.items()}
    leaf = x.detach().requires_grad_()
    gamma = t["gamma"].requires_grad_()
    y = batch_renorm(leaf, t["mu"], t["sigma"], gamma, t["beta"], r_max=3, d_max=5, momentum=0.07)
    y.backward(dy)
    wide = x.double().numpy()
    f = reference.forward(wide, a32["gamma"], a32["beta"], a32["mu"], a32["sigma"], 1 / 3, 3, 5, 0.07, 1e-5)
    dx, dgamma, _ = reference.backward(dy.double().numpy(), wide, a32["gamma"], f)
    assert y.dtype == leaf.grad.dtype == torch.bfloat16
    assert gamma.grad.dtype == t["mu"].dtype == torch.float32
    np.testing.assert_allclose(y.detach().double(), f.y, rtol=8e-3, atol=1.6e-2)
    np.testing.assert_allclose(leaf.grad.double(), dx, rtol=1e-2, atol=1.6e-2)
    # torch's channels_last kernel sums in bfloat16; nn.BatchNorm has the same error
    np.testing.assert_allclose(gamma.grad, dgamma, rtol=1e-2 if isinstance(layout, str) else 1e-4, atol=2e-3)
    np.testing.assert_allclose(t["sigma"], f.new_sigma, rtol=1e-6)


def test_memory_format_is_kept_forward_and_backward():
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = batch_renorm(x, torch.zeros(3), torch.ones(3), r_max=3, d_max=5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.randn_like(y))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_masked_elements_take_no_part_even_if_they_are_nan(reference):
    rng = np.random.default_rng(0)
    dense, C = rng.normal(1, 2, (1, 3, 20)), 3
    mask = torch.zeros(1, 1, 32, dtype=torch.bool)
    mask[..., rng.permutation(32)[:20]] = True
    x = torch.full((1, C, 32), torch.nan, dtype=torch.float64)
    x[:, :, mask[0, 0]] = torch.from_numpy(dense)
    x.requires_grad_()
    mu, sigma, ones = torch.zeros(C).double(), torch.ones(C).double(), np.ones(C)
    y = batch_renorm(x, mu, sigma, r_max=1.5, d_max=0.5, mask=mask, momentum=0.1)
    dy = torch.from_numpy(rng.normal(size=y.shape))
    y.backward(dy)
    f = reference.forward(dense, ones, 0 * ones, 0 * ones, ones, 1 / 1.5, 1.5, 0.5, 0.1, 1e-5)
    kept = mask[0, 0]
    np.testing.assert_allclose(y.detach()[:, :, kept], f.y, rtol=1e-12)
    np.testing.assert_allclose(
        x.grad[:, :, kept], reference.backward(dy[:, :, kept].numpy(), dense, ones, f)[0], atol=1e-12
    )
    np.testing.assert_allclose(sigma, f.new_sigma, rtol=1e-12)
    assert (y[:, :, ~kept] == 0).all()
    assert (x.grad[:, :, ~kept] == 0).all()


def test_a_mask_that_keeps_everything_changes_nothing():
    x, dy, a = _case((5, 4, 7), torch.float64)
    with_mask = _ours(x, dy, a, LIMITS["open"], torch.float64, mask=torch.ones(5, 1, 7, dtype=torch.bool))
    for masked, plain in zip(with_mask, _ours(x, dy, a, LIMITS["open"], torch.float64), strict=True):
        torch.testing.assert_close(masked, plain)


def test_one_value_per_channel_is_an_error_that_names_the_shape():
    with pytest.raises(ValueError, match=r"more than 1 value per channel .* shape \(1, 3\)"):
        batch_renorm(torch.randn(1, 3), torch.zeros(3), torch.ones(3), r_max=1, d_max=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"running_mean": torch.zeros(3, dtype=torch.bfloat16)}, "running_mean must be float32"),
        ({"running_std": torch.ones(2)}, r"running_std must be .* shape \(3,\)"),
        ({"r_max": 0.5}, "r_max must be >= 1"),
        ({"d_max": -1.0}, "d_max must be >= 0"),
        ({"mask": torch.ones(4, 1)}, "a mask must be bool"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_words(change, message):
    good = {"running_mean": torch.zeros(3), "running_std": torch.ones(3), "r_max": 2.0, "d_max": 1.0}
    with pytest.raises(ValueError, match=message):
        batch_renorm(torch.randn(4, 3), **(good | change))


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES[:4]),
    r_max=st.floats(1, 4),
    d_max=st.floats(0, 6),
    scale=st.floats(0.01, 100),
)
@settings(max_examples=60, deadline=None)
def test_gradient_is_orthogonal_to_ones_and_without_eps_to_x(seed, shape, r_max, d_max, scale):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, scale, shape)).requires_grad_()
    C = shape[1]
    y = batch_renorm(x, torch.zeros(C).double(), torch.ones(C).double(), r_max=r_max, d_max=d_max, eps=0.0)
    y.backward(torch.from_numpy(rng.normal(0, 1, shape)))
    dims = (0, *range(2, len(shape)))
    size = x.grad.abs().sum(dims) + 1e-12
    assert (x.grad.sum(dims).abs() / size).max() < 1e-9
    assert ((x * x.grad).sum(dims).abs() / (size * scale)).max() < 1e-8


@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES[:4]))
@settings(max_examples=40, deadline=None)
def test_unclipped_training_output_is_inference_with_the_statistics_from_before(seed, shape):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(1, 2, shape))
    mu, sigma = torch.from_numpy(rng.normal(0, 1, shape[1])), torch.from_numpy(rng.uniform(0.3, 3, shape[1]))
    expected = batch_renorm(x, mu.clone(), sigma.clone(), r_max=1, d_max=0, training=False)
    got = batch_renorm(x, mu, sigma, r_min=0, r_max=torch.inf, d_max=torch.inf)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES[:4]), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40, deadline=None)
def test_limits_1_and_0_are_batch_norm_whatever_the_moving_statistics(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(1, 2, shape)).to(dtype)
    C = shape[1]
    gamma, beta = (torch.from_numpy(rng.normal(1, 1, C)).to(dtype) for _ in range(2))
    outputs = []
    for _ in range(2):
        mu, sigma = torch.from_numpy(rng.normal(0, 9, C)).to(dtype), torch.from_numpy(rng.uniform(0.01, 9, C)).to(dtype)
        outputs.append(batch_renorm(x, mu, sigma, gamma, beta, r_max=1, d_max=0))
    assert torch.equal(*outputs)
    bn = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True)
    torch.testing.assert_close(outputs[0], bn, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**32 - 1), a=st.floats(0.1, 10), b=st.floats(-10, 10))
@settings(max_examples=30, deadline=None)
def test_correction_does_not_depend_on_the_unit_of_the_input(seed, a, b):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, 1, (8, 3, 4)))
    assume(x.std() > 0.1)
    mu, sigma = torch.from_numpy(rng.normal(0, 1, 3)), torch.from_numpy(rng.uniform(0.5, 2, 3))
    plain = batch_renorm(x, mu.clone(), sigma.clone(), r_max=1.4, d_max=0.7, eps=0.0)
    moved = batch_renorm(a * x + b, a * mu + b, a * sigma, r_max=1.4, d_max=0.7, eps=0.0)
    torch.testing.assert_close(moved, plain, rtol=1e-7, atol=1e-7)
