"""The layer on a CUDA device: the same numbers from other kernels, and nothing that waits for the device."""

import copy

import numpy as np
import pytest
import torch

from brn_core.functional import sample_moments
from brn_core.layers import BatchRenorm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = [(16, 5), (6, 4, 9), (4, 3, 8, 8), "channels_last"]


def _input(layout, dtype):
    torch.manual_seed(0)
    x = torch.randn((4, 3, 8, 8) if layout == "channels_last" else layout, dtype=dtype, device="cuda") * 2 + 1
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_training_step_on_the_device_is_algorithm_1(reference, layout, dtype, tolerance):
    x = _input(layout, dtype).requires_grad_()
    C = x.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = BatchRenorm(C, momentum=0.1, r_max=2.0, d_max=0.5, device="cuda", dtype=wide)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    one, zero, x64 = np.ones(C), np.zeros(C), x.detach().double().cpu().numpy()
    f = reference.forward(x64, one, zero, zero, one, 0.5, 2.0, 0.5, 0.1, 1e-5)
    dx, dgamma, dbeta = reference.backward(dy.double().cpu().numpy(), x64, one, f)
    pairs = [(y, f.y), (x.grad, dx), (layer.weight.grad, dgamma), (layer.bias.grad, dbeta)]
    pairs += [(layer.running_mean, f.new_mu), (layer.running_std, f.new_sigma)]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.detach().double().cpu(), theirs, rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sample_moments_on_the_device_are_those_of_the_host(layout):
    x = _input(layout, torch.float32)
    for ours, theirs in zip(sample_moments(x), sample_moments(x.cpu()), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_a_training_step_never_synchronizes():
    layer = BatchRenorm(3, r_max=3.0, d_max=5.0, debias=True, device="cuda")
    layer.observe = True
    x = _input("channels_last", torch.float32).requires_grad_()
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_move_with_the_module_between_devices():
    layer = BatchRenorm(3)
    layer(torch.randn(8, 3))
    there = copy.deepcopy(layer).cuda().bfloat16()
    assert there.running_std.is_cuda
    assert there.running_std.dtype == torch.float32
    assert torch.equal(there.running_std.cpu(), layer.running_std)


def test_a_training_step_is_six_launches():
    pytest.importorskip("triton")
    layer = BatchRenorm(64, r_max=3.0, d_max=5.0, device="cuda")
    x = torch.randn(8, 64, 16, 16, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    layer(x).backward(dy)  # compiles
    x.grad = layer.weight.grad = layer.bias.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) <= 6, kernels


def test_the_fused_kernels_do_what_the_operators_do(monkeypatch):
    pytest.importorskip("triton")
    layer = BatchRenorm(300, momentum=0.1, r_max=1.2, d_max=0.3, device="cuda")
    plain = copy.deepcopy(layer)
    monkeypatch.setattr(plain, "_moving", lambda: None)
    for _ in range(3):
        x = torch.randn(6, 300, 4, 4, device="cuda") * 2 + 1
        own, their = x.clone().requires_grad_(), x.clone().requires_grad_()
        for each, given in ((layer, own), (plain, their)):
            each(given).square().sum().backward()
        torch.testing.assert_close(own.grad, their.grad)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
