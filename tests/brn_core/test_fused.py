"""The fused kernels without a device: in Triton's interpreter, and where they cannot be compiled."""

import copy
import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from brn_core import fused
from brn_core.layers import BatchRenorm

C = 300  # more than one program's


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as numpy runs them, for tensors of the host; the names of those that ran."""
    if not os.environ.get("BRN_TEST_INTEGRATIONS"):
        pytest.importorskip("triton", exc_type=ImportError)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted", Path(fused.__file__).with_name("fused_kernels.py"))
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    ran, launch = [], fused._launch

    def launched(name, *args, **flags):
        ran.append(name)
        return launch(name, *args, **flags)

    monkeypatch.setattr(fused, "_launch", launched)
    monkeypatch.setattr(fused, "_kernels", lambda: kernels)
    monkeypatch.setattr(fused, "fits", lambda x: x.dtype != torch.float64)
    return ran


def _layer(**more):
    torch.manual_seed(0)
    layer = BatchRenorm(C, momentum=0.1, r_max=1.2, d_max=0.3, **more)
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_std.uniform_(0.5, 2)
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def _step(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [y, x.grad, *gradients, layer.running_mean, layer.running_std, layer.num_batches_tracked]


def test_the_fused_kernels_are_algorithm_1(reference, interpreted):
    layer = _layer()
    gamma, beta, mu, sigma = (
        t.detach().double().numpy().copy() for t in (layer.weight, layer.bias, layer.running_mean, layer.running_std)
    )
    x, dy = torch.randn(2, 6, C, 4, 4)
    y, dx, dgamma, dbeta, new_mu, new_sigma, count = _step(layer, x, dy)
    x64, dy64 = x.double().numpy(), dy.double().numpy()
    f = reference.forward(x64, gamma, beta, mu, sigma, 1 / 1.2, 1.2, 0.3, 0.1, 1e-5)
    theirs = [f.y, *reference.backward(dy64, x64, gamma, f), f.new_mu, f.new_sigma]
    for own, their in zip((y, dx, dgamma, dbeta, new_mu, new_sigma), theirs, strict=True):
        np.testing.assert_allclose(own.detach().double(), their, rtol=2e-4, atol=2e-4)
    assert count == 1
    assert interpreted == ["correct", "weight_gradient"]


@pytest.mark.parametrize("more", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernels_do_what_the_operators_do(monkeypatch, interpreted, dtype, more):
    layer = _layer(**more).to(dtype)
    plain = copy.deepcopy(layer)
    monkeypatch.setattr(plain, "_moving", lambda: None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # where the last bit of a sum may round the other way
    for seed in range(3):
        torch.manual_seed(seed)
        x, dy = torch.randn(2, 6, C, 4, 4).to(dtype)
        if seed == 1:
            x[0, 5, 1, 1], x[3, 7] = torch.nan, torch.inf
        layer.observe = plain.observe = seed == 2
        for own, their in zip(_step(layer, x, dy), _step(plain, x, dy), strict=True):
            torch.testing.assert_close(own, their, rtol=tolerance, atol=tolerance, equal_nan=True)
    for own, their in zip(layer.observed, plain.observed, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-5)
    assert layer.running_mean.isfinite().all()
    assert layer.running_std.isfinite().all()
    assert interpreted.count("correct") == 3


@pytest.mark.parametrize(
    "more", [{"debias": True}, {"stat": "var"}, {"virtual_batch_size": 3}, {"dtype": torch.float64}], ids=str
)
def test_what_the_kernels_lack_is_left_to_the_operators(interpreted, more):
    layer = _layer(**more)
    layer(torch.randn(6, C, 4, 4, dtype=layer.weight.dtype))
    assert "correct" not in interpreted


def test_a_second_derivative_is_that_of_the_operators(monkeypatch, interpreted):
    second = []
    for fits in (fused.fits, lambda x: False):
        monkeypatch.setattr(fused, "fits", fits)
        torch.manual_seed(1)
        layer, x = _layer(), torch.randn(4, C, 3, 3).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), (x, layer.weight)))
    assert "correct" in interpreted
    for own, their in zip(*second, strict=True):
        torch.testing.assert_close(own, their)


class Broken:
    """Kernels that do not compile."""

    def __getattr__(self, name):
        def launch(*args, **flags):
            raise RuntimeError("Failed to find C compiler")

        return dict.fromkeys(((1,), (2,)), launch)


def test_training_goes_on_where_the_kernels_do_not_compile(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_kernels", Broken)
    monkeypatch.setattr(fused, "_broken", type(fused._broken)())
    monkeypatch.setattr(fused, "fits", lambda x: not fused._broken.is_set())
    layer = _layer()
    plain = copy.deepcopy(layer)
    monkeypatch.setattr(plain, "_moving", lambda: None)
    x, dy = torch.randn(2, 6, C, 4, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert all(map(torch.equal, _step(layer, x, dy), _step(plain, x, dy)))
    assert [record.message for record in caplog.records] == [
        "Batch Renorm goes on in single operators, as Triton cannot compile its kernels here: Failed to find C compiler"
    ]


@pytest.mark.filterwarnings("ignore")
def test_the_kernels_compile_for_a_device_with_exact_division_and_root():
    if not os.environ.get("BRN_TEST_INTEGRATIONS"):
        pytest.importorskip("triton", exc_type=ImportError)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from brn_core import fused_kernels

    def code(kernel, **constants):
        kinds = {"C": "i32", "count_ptr": "*i64", "alpha": "fp32", "eps": "fp32"} | dict.fromkeys(
            constants, "constexpr"
        )
        signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]

    correct = code(fused_kernels.correct, BLOCK=256, HAS_WEIGHT=True, HAS_BIAS=True)
    assert "div.rn.f32" in correct
    assert "sqrt.rn.f32" in correct
    assert "approx" not in correct + code(fused_kernels.weight_gradient, BLOCK=256)
