"""The fused kernels: those for CUDA in Triton's interpreter, those for the CPU compiled; and where neither can be."""

import copy
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from brn_core import fused, fused_host, fused_triton
from brn_core.layers import BatchRenorm

C = 300  # more than one program's

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian: apt-get install gcc)")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels as numpy runs them, for tensors of the host; the names of those that ran."""
    if not os.environ.get("BRN_TEST_INTEGRATIONS"):
        pytest.importorskip("triton", exc_type=ImportError)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted", Path(fused.__file__).with_name("fused_kernels.py"))
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(fused, "_kernels_for", lambda x: fused_triton)
    monkeypatch.setattr(fused_triton, "_kernels", lambda: kernels)
    monkeypatch.setattr(fused_triton, "fits", lambda x: True)
    return _names_of_those_that_run(monkeypatch, fused_triton)


@pytest.fixture(params=["triton", pytest.param("host", marks=NEEDS_COMPILER)])
def kernels(request, monkeypatch):
    """Either kind; the names of the kernels that ran."""
    if request.param == "triton":
        return request.getfixturevalue("interpreted")
    return _names_of_those_that_run(monkeypatch, fused_host)


def _names_of_those_that_run(monkeypatch, module):
    ran = []

    def noting(name, run):
        def noted(*args):
            done = run(*args)
            if done is not None:
                ran.append(name)
            return done

        return noted

    for name in ("correct", "weight_gradient"):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
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


def test_the_fused_kernels_are_algorithm_1(reference, kernels):
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
    assert kernels == ["correct", "weight_gradient"]


@pytest.mark.parametrize("more", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernels_do_what_the_operators_do(monkeypatch, kernels, dtype, more):
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
    assert kernels.count("correct") == 3


@pytest.mark.parametrize(
    "more", [{"debias": True}, {"stat": "var"}, {"virtual_batch_size": 3}, {"dtype": torch.float64}], ids=str
)
def test_what_the_kernels_lack_is_left_to_the_operators(kernels, more):
    layer = _layer(**more)
    layer(torch.randn(6, C, 4, 4, dtype=layer.weight.dtype))
    assert "correct" not in kernels


def test_a_second_derivative_is_that_of_the_operators(monkeypatch, kernels):
    second = []
    for fits in (fused.fits, lambda x: False):
        monkeypatch.setattr(fused, "fits", fits)
        torch.manual_seed(1)
        layer, x = _layer(), torch.randn(4, C, 3, 3).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), (x, layer.weight)))
    assert "correct" in kernels
    for own, their in zip(*second, strict=True):
        torch.testing.assert_close(own, their)


class Broken:
    """Kernels that do not compile."""

    def __getattr__(self, name):
        def launch(*args, **flags):
            raise RuntimeError("Failed to find C compiler")

        return dict.fromkeys(((1,), (2,)), launch)


def test_training_goes_on_where_triton_does_not_compile(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_kernels_for", lambda x: fused_triton)
    monkeypatch.setattr(fused_triton, "_kernels", Broken)
    monkeypatch.setattr(fused_triton, "_broken", type(fused_triton._broken)())
    monkeypatch.setattr(fused_triton, "fits", lambda x: not fused_triton._broken.is_set())
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
def test_triton_compiles_the_kernels_for_a_device_with_exact_division_and_root():
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

    correct = code(fused_kernels.correct, BLOCK=256, HAS_WEIGHT=True, HAS_BIAS=True, OBSERVED=True)
    assert "div.rn.f32" in correct
    assert "sqrt.rn.f32" in correct
    assert "approx" not in correct + code(fused_kernels.weight_gradient, BLOCK=256)


# --- the CPU's own


@NEEDS_COMPILER
def test_a_step_on_the_cpu_is_a_handful_of_operators():
    layer, x = BatchRenorm(64, r_max=3.0, d_max=5.0), torch.randn(8, 64, 16, 16)
    x, dy = x.contiguous(memory_format=torch.channels_last).requires_grad_(), torch.randn_like(x)
    layer(x).backward(dy)
    x.grad = layer.weight.grad = layer.bias.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).backward(dy)
    called = [
        event.name
        for event in profile.events()
        if event.name.startswith("aten::") and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))
    ]
    no_work = ("aten::empty", "aten::empty_like", "aten::unbind", "aten::detach")
    assert sorted(name for name in called if name not in no_work) == [
        "aten::batch_norm_update_stats",
        "aten::native_batch_norm",
        "aten::native_batch_norm_backward",
    ]


@NEEDS_COMPILER
def test_what_the_host_kernel_changes_is_known_to_have_changed():
    layer = BatchRenorm(3)
    loss = (layer.running_mean * torch.ones(3, requires_grad=True)).sum()  # which keeps running_mean for its backward
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _strided(value):
    return torch.full((6,), value)[::2]


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_mean", _strided(0.0)),
        ("running_std", _strided(1.0)),
        ("weight", nn.Parameter(_strided(1.0))),
        ("num_batches_tracked", torch.tensor(0, dtype=torch.int32)),
        ("running_mean", torch.zeros(3).as_subclass(type("Other", (torch.Tensor,), {}))),
    ],
)
def test_a_buffer_that_the_host_kernel_cannot_read_is_left_to_the_operators(monkeypatch, name, value):
    ran = _names_of_those_that_run(monkeypatch, fused_host)
    layer, plain = BatchRenorm(3, r_max=3.0, d_max=5.0), BatchRenorm(3, r_max=3.0, d_max=5.0)
    setattr(layer, name, value)
    x = torch.randn(5, 3)
    y = layer(x)
    assert ran == []
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(layer.running_std, plain.running_std)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["running_mean", "running_std", "r_max", "weight", "bias"])
def test_a_tensor_on_another_device_is_never_read(name):
    layer = BatchRenorm(3)
    there = getattr(layer, name).to("meta")
    setattr(layer, name, nn.Parameter(there) if name in ("weight", "bias") else there)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):  # what torch says of it
        layer(torch.randn(4, 3))  # a pointer into nothing would end the process


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_for_new_tensors_are_not_taken_for_the_answers(monkeypatch, dtype):
    ran = _names_of_those_that_run(monkeypatch, fused_host)
    layer = BatchRenorm(300, r_max=3.0, d_max=5.0)
    plain = copy.deepcopy(layer)
    x, dy = torch.randn(2, 6, 300).to(dtype)
    expected = _step(plain, x, dy)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device does it; a pointer into nothing would end the process
            done = _step(layer, x, dy)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, done, expected))
    assert ran == ["correct", "weight_gradient"] * 2


@NEEDS_COMPILER
def test_who_watches_operators_sees_them(monkeypatch):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    ran = _names_of_those_that_run(monkeypatch, fused_host)
    layer, x = BatchRenorm(3, r_max=3.0, d_max=5.0), torch.randn(5, 3)
    with Watching():
        layer(x)
    assert ran == []
    layer(x)
    assert ran == ["correct"]


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """A cache of compiled kernels of the test's own, empty; and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused_host.library.cache_clear()
    yield tmp_path / "brn"
    fused_host.library.cache_clear()


@NEEDS_COMPILER
def test_the_host_kernels_are_compiled_once_a_machine(afresh, monkeypatch):
    assert fused_host.library() is not None
    (made,) = afresh.iterdir()
    assert made.suffix == ".so"
    assert not stat.S_IMODE(made.stat().st_mode) & 0o022  # nobody else may write what will be run
    fused_host.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert fused_host.library() is not None


@NEEDS_COMPILER
def test_processes_that_compile_at_once_all_have_kernels(afresh):
    command = [sys.executable, "-c", "from brn_core import fused_host as f; print(f.library() is not None)"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["True"] * 3
    assert len(list(afresh.iterdir())) == 1


@pytest.mark.parametrize("missing", ["compiler", "place", "home", "sense"])
def test_training_goes_on_where_the_host_kernels_cannot_be_had(afresh, monkeypatch, caplog, missing):
    if missing == "compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    elif missing == "place":
        afresh.write_text("a file where the folder should be")
    elif missing == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    else:
        monkeypatch.setattr(fused_host, "_compiled", lambda: Path(__file__))  # not a library
    layer = BatchRenorm(3, r_max=3.0, d_max=5.0)
    with caplog.at_level(logging.DEBUG, "brn_core.fused_host"):
        for _ in range(2):
            layer(torch.randn(4, 3)).sum().backward()
    assert layer.num_batches_tracked == 2
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG  # it is as right, and on a CPU hardly slower
    assert record.message.startswith("Batch Renorm runs in single operators")


def _no_home():
    raise RuntimeError("Could not determine home directory.")
