"""One optimizer step in all its forms: accumulated, in 16 bits, compiled, channels last, with averaged weights."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_service import FakeService
from torch import nn

from brn_core.layers import BatchRenorm, BatchRenorm2d
from brn_core.statistics import update_statistics
from brn_core.worker.data import Dataset, digits
from brn_core.worker.learner import Learner, keep_time_constant
from brn_core.worker.models import make_model, norm_factory
from brn_core.worker.precision import Precision
from brn_core.worker.ranks import Rank
from brn_core.worker.samplers import IidBatchSampler
from brn_core.worker.settings import UsageError, parse_settings
from brn_core.worker.train import cosine_lr, evaluate, train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits()


def learner_of(data: Dataset, *flags: str, norm: str = "brn", alpha: float = 0.1) -> Learner:
    torch.manual_seed(0)
    model = make_model("small", data.shape, data.classes, norm_factory(norm, alpha))
    return Learner(parse_settings(["--device", "cpu", *flags]), model, Rank(), CPU)


def batches(data: Dataset, count: int, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sampler = IidBatchSampler(len(data.train.labels_N), size)
    return [data.train.batch(next(sampler)) for _ in range(count)]


def learn(learner: Learner, steps: list[tuple[torch.Tensor, torch.Tensor]], lr: float = 0.05) -> list[float]:
    return [learner.step([batch], lr)[0].item() for batch in steps]


def test_the_gradients_of_accumulated_batches_are_those_of_one_batch(data: Dataset) -> None:
    whole, parts = learner_of(data, norm="gn"), learner_of(data, norm="gn")
    for images_BCHW, labels_B in batches(data, 3):
        loss, accuracy = whole.step([(images_BCHW, labels_B)], 0.05)
        of_parts = parts.step(list(zip(images_BCHW.split(8), labels_B.split(8), strict=True)), 0.05)
        torch.testing.assert_close(of_parts, (loss, accuracy))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["bn", "brn"])
def test_four_forwards_a_step_move_the_statistics_as_far_as_one(data: Dataset, norm: str) -> None:
    once, often = learner_of(data, norm=norm), learner_of(data, norm=norm)
    keep_time_constant(often.model, 4)
    (batch,) = batches(data, 1)
    once.step([batch], 1e-9)
    often.step([batch] * 4, 1e-9)
    for name, statistic in once.model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(often.model.get_buffer(name), statistic, rtol=1e-4, atol=1e-5, msg=name)


def test_averaged_weights_follow_their_definition(data: Dataset) -> None:
    learner = learner_of(data, "--weight-ema", "0.8")
    expected: torch.Tensor | None = None
    for batch in batches(data, 5):
        learn(learner, [batch])
        weight = learner.model.head.weight.detach().double()
        expected = weight.clone() if expected is None else 0.8 * expected + 0.2 * weight
    assert learner.average is not None
    assert expected is not None
    torch.testing.assert_close(learner.average.averaged.module.head.weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["bn", "brn"])
def test_averaged_statistics_are_the_average_of_what_each_step_measured(data: Dataset, norm: str) -> None:
    learner = learner_of(data, "--weight-ema", "0.8", norm=norm, alpha=0.05)
    spread = "running_std" if norm == "brn" else "running_var"
    expected: dict[str, torch.Tensor] = {}
    for images_BCHW, labels_B in batches(data, 6):
        x_BCHW = learner.model.conv1(images_BCHW).detach().double()  # the input of the first norm layer
        learn(learner, [(images_BCHW, labels_B)])
        biased = norm == "brn"
        var_C = x_BCHW.var((0, 2, 3), correction=0 if biased else 1)
        now = {"running_mean": x_BCHW.mean((0, 2, 3)), spread: (var_C + 1e-5).sqrt() if biased else var_C}
        if not expected:  # the average begins as the model it is of
            now = {name: learner.model.norm1.get_buffer(name).double() for name in now}
        expected = {name: now[name] if not expected else 0.8 * expected[name] + 0.2 * now[name] for name in now}
    assert learner.average is not None
    for name, value in expected.items():
        found = learner.average.averaged.module.norm1.get_buffer(name).double()
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=name)


def test_averaged_statistics_are_nearer_to_the_exact_ones_than_the_newest(data: Dataset) -> None:
    learner = learner_of(data, "--weight-ema", "0.97")
    learn(learner, batches(data, 120))
    assert learner.average is not None
    averaged = learner.average.averaged.module
    exact, newest = copy.deepcopy(averaged), copy.deepcopy(averaged)
    update_statistics(exact, [data.train.batch(torch.arange(len(data.train.labels_N)))[0]])
    for name, statistic in learner.model.named_buffers():
        newest.get_buffer(name).copy_(statistic)

    def distance(model: nn.Module) -> float:
        layers = [(m, e) for m, e in zip(model.modules(), exact.modules(), strict=True) if isinstance(m, BatchRenorm)]
        return sum(((m.running_mean - e.running_mean) / e.running_std).abs().mean().item() for m, e in layers)

    assert distance(averaged) < 0.7 * distance(newest)


def test_what_is_evaluated_and_handed_out_is_the_average(data: Dataset) -> None:
    flags = ["--device", "cpu", "--record-every", "0", "--steps", "12", "--eval-every", "0", "--norm", "bn"]
    averaged = train(parse_settings([*flags, "--weight-ema", "0.9"]), Rank(), None)
    plain = train(parse_settings(flags), Rank(), None)
    assert averaged.train_loss == plain.train_loss, "averaging changes nothing in training"
    assert averaged.evaluation != plain.evaluation
    assert evaluate(averaged.model, data.test, CPU, Rank()) == averaged.evaluation


@pytest.mark.parametrize("norm", ["bn", "brn"])
def test_bf16_computes_in_16_bits_and_keeps_weights_and_statistics_in_32(data: Dataset, norm: str) -> None:
    single, half = learner_of(data, norm=norm), learner_of(data, "--amp", "bf16", norm=norm)
    seen: list[torch.dtype] = []
    half.model.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    steps = batches(data, 10)
    for one, other in zip(learn(half, steps), learn(single, steps), strict=True):
        assert one == pytest.approx(other, rel=0.05)
        assert one != other
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.model.state_dict().values()} == {torch.float32, torch.int64}


def test_a_precision_the_device_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--amp fp16 needs a CUDA device, this is cpu: --amp bf16 runs here"):
        Precision("fp16", CPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(UsageError, match="--amp bf16: an old card has no bfloat16; --amp fp16 runs there"):
        Precision("bf16", torch.device("cuda"))


def test_channels_last_is_the_same_training_in_another_order_of_memory(data: Dataset) -> None:
    plain, last = learner_of(data), learner_of(data, "--channels-last")
    assert last.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    last.model.norm2.register_forward_hook(
        lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    steps = batches(data, 5)
    assert learn(last, steps) == pytest.approx(learn(plain, steps), rel=1e-4)
    assert all(seen)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, while it traces
def test_a_compiled_network_is_recorded_like_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the graph, without its compiler
    flags = ["--device", "cpu", "--steps", "6", "--bn-steps", "2", "--eval-every", "3", "--shadow-every", "2"]
    rows, losses = {}, {}
    with FakeService() as service:
        for run, more in (("plain", []), ("compiled", ["--compile"])):
            where = ["--url", service.url, "--spool", str(tmp_path), "--run-id", run]
            losses[run] = train(parse_settings([*flags, *where, *more]), Rank(), None).train_loss
            found = [tables["layers"].to_pylist() for key, tables in sorted(service.batches.items()) if key[0] == run]
            rows[run] = [row for part in found for row in part]
            names = [layer["name"] for layer in service.runs[run]["layers"]]
            assert names == ["norm1", "norm2", "norm3"]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)
    assert len(rows["compiled"]) == 18
    for compiled, plain in zip(rows["compiled"], rows["plain"], strict=True):
        assert compiled["mu_b"] == pytest.approx(plain["mu_b"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("device", "there", "variables", "needed"),
    [
        ("cpu", {}, {}, r"a C\+\+ compiler"),
        ("cpu", {"c++", "clang++"}, {}, r"a C\+\+ compiler"),  # torch takes these if CXX names them
        ("cpu", {"g++"}, {"CXX": "gone"}, r"a C\+\+ compiler"),
        ("cuda", {"g++"}, {}, "a C compiler"),
        ("cuda", {"gcc"}, {"CC": "gone"}, "a C compiler"),
        ("cpu", {"g++"}, {}, r"Python\.h in /no/headers"),
        ("cpu", {"clang++"}, {"CXX": "clang++"}, r"Python\.h in /no/headers"),
        ("cuda", {"gcc"}, {}, r"Python\.h in /no/headers"),
        ("cuda", {"clang"}, {}, r"Python\.h in /no/headers"),
        ("cuda", {"cc"}, {"CC": "cc"}, r"Python\.h in /no/headers"),
    ],
)
def test_compiling_without_a_compiler_is_refused_before_anything_runs(
    data: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    there: set[str],
    variables: dict[str, str],
    needed: str,
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/no/headers/{name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    model = make_model("small", data.shape, data.classes, norm_factory("brn", 0.1))
    settings = parse_settings(["--device", "cpu", "--compile"])
    with pytest.raises(UsageError, match=f"--compile needs {needed}.*, or leave --compile out"):
        Learner(settings, model, Rank(), torch.device(device))


def test_compiling_without_triton_is_refused_on_cuda(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = make_model("small", data.shape, data.classes, norm_factory("brn", 0.1))
    with pytest.raises(UsageError, match="--compile needs Triton"):
        Learner(parse_settings(["--device", "cpu", "--compile"]), model, Rank(), torch.device("cuda"))


def test_a_loss_scale_is_among_what_a_checkpoint_holds(data: Dataset) -> None:
    # fp16's scale as it would be on a GPU: it doubles after so many steps without an overflow
    def scaled() -> Learner:
        learner = learner_of(data)
        learner._precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        return learner

    first, second, steps = scaled(), scaled(), batches(data, 8)
    learn(first, steps[:4])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second._precision.scaler.get_scale() == 8.0
    assert learn(second, steps[4:]) == learn(first, steps[4:])
    assert second._precision.scaler.get_scale() == first._precision.scaler.get_scale() == 16.0


def test_the_learning_rate_rises_before_it_falls() -> None:
    rates = [cosine_lr(step, 50, 0.4, warmup_steps=4) for step in range(50)]
    assert rates[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_layers_that_average_nothing_need_no_time_constant() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=None), nn.GroupNorm(1, 2), BatchRenorm2d(2))
    keep_time_constant(model, 4)
    assert (model[0].momentum, model[2].accumulation_steps) == (None, 4)
