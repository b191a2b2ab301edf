import copy
import io
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_service import FakeService, Fault, eventually
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint_sequential

from brn_core import wire
from brn_core.capture import host_bytes
from brn_core.layers import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from brn_core.recorder import Recorder, _scalar_segments, watch
from brn_core.schedule import RenormSchedule
from brn_core.spool import Spool

torch.set_num_threads(1)

DEAD_URL = "http://127.0.0.1:9"  # the discard port: nothing listens there


def _net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 6, 3), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def _train(model, steps=7, recorder=None, batch=8, after=lambda step: None):
    """Trains on noise with the global generator; returns the losses, exactly."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = torch.randn(batch, 1, 7, 7), torch.randint(3, (batch,))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(loss, shadow_loss=lambda output, y=y: F.cross_entropy(output, y), lr=0.1)
        losses.append(loss.item())
        after(step)
    return losses


@pytest.fixture
def service():
    with FakeService() as running:
        yield running


@pytest.fixture
def record(tmp_path):
    """Makes strict recorders that are closed at the end; the spool is `tmp_path`/spool."""
    made = []

    def make(model, url=DEAD_URL, **settings):
        settings = {"strict": True, "spool": tmp_path / "spool", "flush_seconds": 0.02, "run_name": "t"} | settings
        made.append(Recorder(model, url=url, **settings))
        return made[-1]

    yield make
    for recorder in made:
        recorder.close(timeout_seconds=1)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("brn-")]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
@pytest.mark.parametrize("state", ["up", "down", "broken"])
def test_a_watched_training_is_bit_equal_to_an_unwatched_one(record, norm, state):
    unwatched, model = _net(norm), _net(norm)
    expected = _train(unwatched, steps=12)
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with FakeService(lambda method, path: Fault(500) if state == "broken" else None) as service:
        recorder = record(model, DEAD_URL if state == "down" else service.url, shadow_every=2, channels_every=3)
        assert _train(model, steps=12, recorder=recorder) == expected
        assert torch.equal(torch.get_rng_state(), random_states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == random_states[1:]
        for (name, value), other in zip(model.state_dict().items(), unwatched.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
        recorder.close(timeout_seconds=2)
        assert recorder.dropped_steps == 0


def test_every_table_arrives_and_the_run_is_described(record, service):
    schedule = RenormSchedule(bn_steps=10, r_steps=30, d_steps=20)
    recorder = record(
        _net(), service.url, run_name="My run: no. 1", config={"lr": 0.1, "path": Path("x"), "sizes": (1, 2)},
        tags=["a"], batch_size=8, planned_steps=12, schedule=schedule, shadow_every=5, channels_every=4,
    )  # fmt: skip
    losses = _train(recorder._model, steps=12, recorder=recorder)
    recorder.close()
    assert recorder.run_id.startswith("my-run-no-1-")
    run = wire.RunCreate.model_validate(service.runs[recorder.run_id])
    assert (run.name, run.tags, run.batch_size, run.planned_steps, run.world_size) == (
        "My run: no. 1",
        ("a",),
        8,
        12,
        1,
    )
    assert run.config == {"lr": 0.1, "path": "x", "sizes": [1, 2]}
    assert run.schedule == wire.Schedule(bn_steps=10, r_steps=30, d_steps=20, r_max=3.0, d_max=5.0)
    assert [(layer.index, layer.name, layer.kind, layer.channels) for layer in run.layers] == [
        (0, "1", "BatchNorm", 4),
        (1, "5", "BatchNorm", 6),
    ]
    assert service.statuses[recorder.run_id] == "finished"
    assert [(row["step"], row["layer"]) for row in service.rows("layers")] == [
        (s, i) for s in range(12) for i in (0, 1)
    ]
    assert [row["step"] for row in service.rows("probe")] == list(range(12))
    assert [(r["step"], r["layer"], len(r["mu_b"])) for r in service.rows("channels")] == [
        (step, i, c) for step in (0, 4, 8) for i, c in ((0, 4), (1, 6))
    ]
    scalars = {}
    for row in service.rows("scalars"):
        scalars.setdefault(row["name"], {})[row["step"]] = row["value"]
    assert list(scalars["loss"].values()) == losses
    assert set(scalars["lr"].values()) == {0.1}
    assert list(scalars[wire.SCALAR_STEP_TIME]) == list(range(1, 12))
    assert set(scalars[wire.SCALAR_DROPPED].values()) == {0.0}
    for name in (wire.SCALAR_SHADOW_TRAIN_LOSS, wire.SCALAR_SHADOW_EVAL_LOSS, wire.SCALAR_SHADOW_DISAGREEMENT):
        assert list(scalars[name]) == [5, 10]
    # dropout is off in the shadow pass, so only the training loss is the one of the step
    assert scalars[wire.SCALAR_SHADOW_TRAIN_LOSS][5] == losses[5]
    assert scalars[wire.SCALAR_SHADOW_EVAL_LOSS][5] != losses[5]


NORMS = {
    "BatchNorm1d": (nn.BatchNorm1d, (9, 4)),
    "BatchNorm1d sequence": (nn.BatchNorm1d, (9, 4, 5)),
    "BatchNorm2d": (nn.BatchNorm2d, (9, 4, 5, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (9, 4, 2, 3, 2)),
    "BatchRenorm1d": (BatchRenorm1d, (9, 4)),
    "BatchRenorm2d": (BatchRenorm2d, (9, 4, 5, 3)),
    "BatchRenorm3d": (BatchRenorm3d, (9, 4, 2, 3, 2)),
}


@pytest.mark.parametrize(("norm", "shape"), NORMS.values(), ids=NORMS.keys())
def test_what_is_recorded_is_what_the_layer_saw(record, service, norm, shape):
    layer = norm(4, eps=1e-3, momentum=0.3)
    recorder = record(nn.Sequential(layer), service.url, channels_every=1)
    mu, sigma, variance = np.zeros(4), np.full(4, 1.0), np.ones(4)
    if norm.__name__.startswith("BatchRenorm"):
        sigma = layer.running_std.double().numpy().copy()
    else:
        sigma = np.sqrt(variance + 1e-3)
    expected = []
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float32) * 3 + 1
        recorder._model(x)
        recorder.step()
        values = x.double().numpy()
        axes = (0, *range(2, x.dim()))
        mu_b, var_b = values.mean(axes), values.var(axes)
        between = values.reshape(*shape[:2], -1).mean(2).var(0, ddof=1)
        expected.append((mu_b, np.sqrt(var_b + 1e-3), between, mu.copy(), sigma.copy()))
        mu += 0.3 * (mu_b - mu)
        if norm.__name__.startswith("BatchRenorm"):
            sigma += 0.3 * (np.sqrt(var_b + 1e-3) - sigma)
        else:
            m = values.size / 4
            variance += 0.3 * (var_b * m / (m - 1) - variance)
            sigma = np.sqrt(variance + 1e-3)
    recorder.close()
    rows, summaries = service.rows("channels"), service.rows("layers")
    assert len(rows) == len(summaries) == 4
    for row, summary, (mu_b, sigma_b, between, mu_before, sigma_before) in zip(rows, summaries, expected, strict=True):
        np.testing.assert_allclose(row["mu_b"], mu_b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["sigma_b"], sigma_b, rtol=1e-4)
        np.testing.assert_allclose(row["between_var"], between, rtol=1e-3)
        np.testing.assert_allclose(row["mu"], mu_before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["sigma"], sigma_before, rtol=1e-4)
        np.testing.assert_allclose(row["r"], sigma_b / sigma_before, rtol=1e-4)
        assert summary["samples"] == 9
        assert summary["mean_noise"] == pytest.approx((between / (9 * sigma_before**2)).mean(), rel=1e-3)


def test_the_limits_in_force_travel_with_the_statistics(record, service):
    model = _net(BatchRenorm2d)
    schedule = RenormSchedule(bn_steps=1, r_steps=3, d_steps=5, r_max=3.0, d_max=4.0)
    recorder = record(model, service.url)
    _train(model, steps=5, recorder=recorder, after=lambda step: schedule.apply(model, step + 1))
    assert recorder.run_id
    eventually(lambda: len(service.rows("layers")) == 10)
    recorded = [(row["r_max"], row["d_max"]) for row in service.rows("layers") if row["layer"] == 0]
    assert recorded[0] == (1.0, 0.0)
    assert recorded[1:] == [pytest.approx(schedule.limits(step)) for step in range(1, 5)]
    eventually(lambda: recorder.latest.get("r_max") == 3.0)
    assert set(recorder.latest) == {"r_max", "d_max", "clip_r", "clip_d", "dropped_steps"}


class Branches(nn.Module):
    """Two layers of which one runs at a time, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.frozen = nn.BatchNorm1d(3), BatchRenorm1d(3), nn.BatchNorm1d(3)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x, *, branch):
        return self.untracked(self.frozen(getattr(self, branch)(x)))


def test_layers_that_do_not_run_or_are_frozen_have_no_row(record, service):
    model = Branches()
    model.frozen.eval()
    recorder = record(model, service.url)
    for branch in ("left", "right", "left"):
        model(torch.randn(4, 3), branch=branch)
        recorder.step()
    recorder.close()
    assert [layer["name"] for layer in service.runs[recorder.run_id]["layers"]] == ["left", "right", "frozen"]
    rows = service.rows("layers")
    assert [(row["step"], row["layer"]) for row in rows] == [(0, 0), (1, 1), (2, 0)]
    assert rows[2]["mean_diff1"] is None


def test_forwards_in_inference_mode_are_not_recorded(record, service):
    model = _net()
    recorder = record(model, service.url, shadow_every=1)
    recorder.step(1.0)
    model.eval()
    model(torch.randn(4, 1, 7, 7))
    recorder.step(2.0)
    recorder.close()
    assert service.steps() == [0, 1]
    assert service.rows("layers") == service.rows("probe") == []
    assert wire.SCALAR_SHADOW_DISAGREEMENT not in {row["name"] for row in service.rows("scalars")}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_a_training_forward_without_gradients_moves_statistics_and_so_has_rows_but_no_input(record, service, norm):
    model = _net(norm)  # the target network of a pair that learns from itself
    recorder = record(model, service.url, shadow_every=1)
    for _ in range(2):
        with torch.no_grad():
            model(torch.randn(4, 1, 7, 7))
        recorder.step()
    recorder.close()
    assert len(service.rows("layers")) == 4
    assert service.rows("probe") == []
    assert wire.SCALAR_SHADOW_DISAGREEMENT not in {row["name"] for row in service.rows("scalars")}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_an_activation_checkpoint_runs_again_is_not_recorded_a_second_time(record, service, norm, reentrant):
    model = _net(norm)
    recorder = record(model, service.url, channels_every=1)
    for _ in range(2):
        before = [model[i].running_mean.clone() for i in (1, 5)]
        checkpoint_sequential(
            model, 2, torch.randn(8, 1, 7, 7, requires_grad=True), use_reentrant=reentrant
        ).sum().backward()
        recorder.step()
    recorder.close()
    rows = [row["mu"] for row in service.rows("channels") if row["step"] == 1]
    assert len(rows) == 2
    for row, moving in zip(rows, before, strict=True):
        np.testing.assert_allclose(row, moving, rtol=1e-6)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_every_thins_the_statistics_and_keeps_the_scalars(record, service, norm):
    model = _net(norm)
    recorder = record(model, service.url, every=3, start_step=7)
    _train(model, steps=12, recorder=recorder)
    recorder.close()
    assert service.steps() == list(range(7, 19))
    rows = [row for row in service.rows("layers") if row["layer"] == 1]
    assert [row["step"] for row in rows] == [9, 12, 15, 18]
    assert [row["mean_diff1"] is None for row in rows] == [True, False, False, False]
    assert [row["mean_diff2"] is None for row in rows] == [True, True, False, False]


def test_a_diverging_run_is_recorded_to_the_end(record, service):
    model = _net()

    def poison(step):
        if step == 1:
            with torch.no_grad():
                model[0].weight[0] = math.nan

    recorder = record(model, service.url)
    _train(model, steps=4, recorder=recorder, after=poison)
    recorder.close()
    rows = [row for row in service.rows("layers") if row["layer"] == 0]
    assert [row["nonfinite_channels"] for row in rows[:3]] == [0, 0, 1]
    assert math.isnan(rows[2]["gap"])
    losses = [row["value"] for row in service.rows("scalars") if row["name"] == "loss"]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, True]


def test_scalars_of_any_number_type_arrive_exactly(record, service):
    recorder = record(nn.Linear(1, 1), service.url)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    recorder.step(
        third, a=torch.tensor([2.5]), b=True, c=np.float32(0.5), d=torch.tensor(2**40), e=torch.tensor(-math.inf)
    )
    recorder.close()
    values = {row["name"]: row["value"] for row in service.rows("scalars")}
    del values[wire.SCALAR_DROPPED]
    assert values == {"loss": 1 / 3, "a": 2.5, "b": 1.0, "c": 0.5, "d": 2.0**40, "e": -math.inf}


def test_a_scalar_tensor_is_taken_when_step_is_called_not_later(record, service):
    recorder, loss = record(nn.Linear(1, 1), service.url), torch.tensor(1.0)
    recorder.step(loss)
    loss.fill_(99.0)
    recorder.close()
    assert [row["value"] for row in service.rows("scalars") if row["name"] == "loss"] == [1.0]


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


SYNCS = {"aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default", "aten.equal.default"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_a_step_reads_no_value_on_the_host_and_its_operations_do_not_grow_with_the_network(record, norm):
    def operations(layers):
        model = nn.Sequential(*(norm(3) for _ in range(layers)))
        recorder = record(model)
        forward, step = _Operations(), _Operations()
        with forward:
            model(torch.randn(4, 3, 2, 2))
        with step:
            recorder.step(1.0)
        recorder.close(timeout_seconds=0.2)
        return forward.names, step.names

    few, many = operations(2), operations(12)
    assert not SYNCS & {*many[0], *many[1]}
    assert len(many[1]) == len(few[1]) <= 12


VIEWS = {f"aten.{name}.default" for name in ("detach", "view", "unsqueeze")}  # no kernel


@pytest.mark.parametrize(
    ("size", "memory_format", "kernels", "views"),
    [
        (9, torch.contiguous_format, 2, 1),
        (8, torch.channels_last, 4, 2),
        (8, torch.contiguous_format, 5, 5),
        (2, torch.contiguous_format, 1, 4),
    ],
    ids=["contiguous", "channels last", "few positions", "very few positions"],
)
def test_a_watched_batch_norm_layer_has_few_operations_more_in_its_forward(record, size, memory_format, kernels, views):
    def operations(layers, watched):
        model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers)))
        recorder = record(model, shadow_every=0) if watched else None
        x = torch.randn(4, 3, size, size).contiguous(memory_format=memory_format)
        with _Operations() as forward:
            model(x)
        if recorder is not None:
            recorder.close(timeout_seconds=0.2)
        return np.array([sum((name in VIEWS) is view for name in forward.names) for view in (False, True)])

    with_it, without = (operations(12, watched) - operations(2, watched) for watched in (True, False))
    more = (with_it - without) / 10
    assert (more <= [kernels, views]).all()
    assert more[0] >= 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_on_a_gpu_training_never_waits_for_the_device_and_every_step_arrives(record, service, norm):
    model = _net(norm).cuda()
    recorder = record(model, service.url, shadow_every=0, channels_every=10)
    x, y = torch.randn(8, 1, 7, 7, device="cuda"), torch.randint(3, (8,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            recorder.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.close()
    assert recorder.dropped_steps == 0
    assert [row["step"] for row in service.rows("layers") if row["layer"] == 0] == list(range(100))
    assert len([row for row in service.rows("scalars") if row["name"] == "loss"]) == 100


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_the_memory_a_step_holds_is_known_without_looking_at_every_tensor_again(record, monkeypatch, norm):
    offered = []
    recorder = record(model := nn.Sequential(norm(3), norm(3)), shadow_every=0)
    monkeypatch.setattr(recorder._reducer, "offer", offered.append)
    for _ in range(2):  # gradient accumulation: the last forward is held
        model(torch.randn(4, 3, 2, 2))
    with monkeypatch.context() as only:
        if norm is nn.BatchNorm2d:
            only.setattr("brn_core.recorder.host_bytes", lambda taken: 1 / 0)
        recorder.step(1.0)
    (frame,) = offered
    assert frame.size_bytes - frame.transfer.size_bytes == host_bytes(frame.taken) == 2 * 2 * 4 * 3 * 4


def test_scalars_on_a_device_are_copied_together_and_read_on_the_host_later():
    # as it would be on a device: those on the CPU are read at once
    scalars = {"loss": torch.tensor(0.5), "accuracy": torch.tensor(0.25)}
    with _Operations() as operations:
        _scalar_segments(scalars)
    assert not SYNCS & {*operations.names}
    assert len(operations.names) <= 5


def test_what_breaks_inside_never_reaches_training(record, service, monkeypatch, caplog):
    model, expected = _net(), _train(_net(), steps=5)
    recorder = record(model, service.url, strict=False, shadow_every=1)
    monkeypatch.setattr(recorder._probe, "measure", lambda inputs: 1 / 0)
    monkeypatch.setattr("brn_core.recorder.run_shadow", lambda *args: 1 / 0)
    assert _train(model, steps=5, recorder=recorder) == expected
    recorder.step(torch.ones(2))
    recorder.step("text", **{"brn/mine": 1.0})
    recorder.close()
    lines = [r.getMessage() for r in caplog.records if "recording failed, training goes on" in r.getMessage()]
    assert len([line for line in lines if "ZeroDivisionError" in line]) == 1
    assert len(service.rows("layers")) == 10  # the rest of each step is recorded
    assert service.steps() == list(range(7))


def test_strict_raises_what_breaks_inside(record):
    recorder = record(nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"scalar 'loss' must be a number or a tensor of one element, got shape \(2,\)"
    ):
        recorder.step(torch.ones(2))
    with pytest.raises(ValueError, match="reserved"):
        recorder.step(**{"brn/mine": 1.0})
    with pytest.raises(ValueError, match="must have 1 to 200 characters, got 201: 'xxxx"):
        recorder.step(**{"x" * 201: 1.0})


def test_the_shadow_pass_sees_the_input_as_it_was_before_a_model_that_works_in_place(record, service):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.div_(255.0)

    recorder = record(InPlace(), service.url, shadow_every=1)
    for _ in range(2):
        recorder._model(torch.full((4, 3), 255.0))
        recorder.step(shadow_loss=lambda output: output.mean())
    recorder.close()
    values = {row["name"]: row["value"] for row in service.rows("scalars")}
    assert values[wire.SCALAR_SHADOW_EVAL_LOSS] == 1.0


@pytest.mark.parametrize("inputs", [{"a": torch.randn(4, 3)}, (None, [torch.randn(4, 3)]), "no tensor"])
def test_inputs_of_any_kind_are_fine(record, inputs):
    class Model(nn.Module):
        def forward(self, inputs):
            return torch.zeros(4, 2)

    recorder = record(Model(), shadow_every=1)
    for _ in range(3):
        recorder._model(inputs)
        recorder.step()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"every": 1.5}, "every must be an integer >= 1, got 1.5"),
        ({"shadow_every": -1}, "shadow_every must be an integer >= 0, got -1"),
        ({"channels_every": -1}, "channels_every must be an integer >= 0"),
        ({"start_step": -1}, "start_step must be an integer >= 0"),
        ({"flush_seconds": 0}, "flush_seconds must be > 0, got 0"),
        ({"url": "nowhere"}, "url must look like"),
        ({"run_id": "a b"}, "run id: .* got 'a b'"),
        ({"run_name": " "}, "run name: .*"),
        ({"batch_size": 0}, "run batch_size: .* got 0"),
        ({"tags": [""]}, "run tags"),
        ({"token": "é"}, "token must be printable"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing_running(settings, text):
    with pytest.raises(ValueError, match=text):
        Recorder(nn.BatchNorm1d(2), **{"url": DEAD_URL, "spool": None} | settings)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("brn-")]


def test_a_model_that_is_none_or_not_made_yet_is_refused():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        Recorder(None)
    with pytest.raises(ValueError, match="run one forward before it is watched"):
        Recorder(nn.LazyBatchNorm1d())


def test_a_model_without_normalization_still_has_its_input_and_scalars_recorded(record, service, caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    recorder = record(model, service.url)
    model(torch.randn(4, 3))
    recorder.step(0.5)
    recorder.close()
    assert len(service.rows("probe")) == 1
    assert "no normalization layer with moving statistics" in caplog.text


def test_copies_and_pickles_of_a_watched_model_work_and_are_not_watched(record, service):
    model = _net()
    recorder = record(model, service.url)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        other(torch.randn(4, 1, 7, 7))
        recorder.step()
    recorder.close()
    assert service.rows("layers") == service.rows("probe") == []


def test_closing_twice_and_stepping_afterwards_do_nothing(record, service):
    model = _net(BatchRenorm2d)
    recorder = record(model, service.url)
    recorder.close("failed")
    recorder.close("finished")
    recorder.step(1.0)
    model(torch.randn(4, 1, 7, 7))
    assert service.statuses[recorder.run_id] == "failed"
    assert not model[1].observe
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_with_block_says_how_it_ended(service, tmp_path):
    def run(fail):
        with watch(_net(), url=service.url, spool=tmp_path) as recorder:
            if fail:
                raise RuntimeError("diverged")
        return recorder

    assert service.statuses[run(False).run_id] == "finished"
    with pytest.raises(RuntimeError, match="diverged"):
        run(True)
    assert "failed" in service.statuses.values()


def test_each_finding_is_logged_once_by_its_severity(record, service, caplog):
    recorder = record(nn.Linear(1, 1), service.url)

    def found(*findings):
        service.findings = [
            dict(zip(("code", "severity", "summary", "since"), finding, strict=False)) for finding in findings
        ]
        known = len(service.batches)
        recorder.step(1.0)
        eventually(lambda: len(service.batches) > known)

    with caplog.at_level(logging.WARNING, "brn_core"):
        found()
        found(("NH-NOISE", "info", "Batches are small."))
        found(("NH-CLUSTER", "warning", "Batches are clustered."))
        found(("NH-CLUSTER", "warning", "Batches are clustered, still."))
        found(("NH-GAP", "critical", "Inference is worse."), ("NH-CLUSTER", "warning", "Batches are clustered, again."))
        found(("NH-GAP", "critical", "Inference is worse, again."), ("NH-LAG", "warning", "Statistics trail.", 7))
        found(("NH-CLUSTER", "critical", "Batches are clustered, and it costs."))
        recorder.close()
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if "NH-" in r.getMessage()]
    where = f"See {service.url}/runs/{recorder.run_id}"
    assert lines == [
        ("WARNING", f"NH-CLUSTER: Batches are clustered. {where}"),
        ("ERROR", f"NH-GAP: Inference is worse. {where}"),
        ("WARNING", f"NH-LAG since step 7: Statistics trail. {where}"),
        ("ERROR", f"NH-CLUSTER: Batches are clustered, and it costs. {where}"),
    ]


def test_a_process_forked_from_training_records_nothing_and_harms_nothing(record, service):
    model = _net()
    recorder = record(model, service.url)
    _train(model, steps=2, recorder=recorder)
    held, release = threading.Event(), threading.Event()

    def hold_the_lock():
        with recorder._reducer._changed:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    assert held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: fork in a process with threads
        child = os.fork()
    if child == 0:  # here the lock is held for ever, by a thread that does not exist
        signal.alarm(10)
        recorder.step(7.0)
        recorder.close()
        os._exit(0)
    release.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    recorder.step(1.0)
    recorder.close()
    assert service.steps() == [0, 1, 2]
    assert service.statuses[recorder.run_id] == "finished"


def test_what_waits_when_the_service_is_down_is_in_the_spool_for_the_next_run(record, tmp_path):
    with FakeService() as service:
        port, url = service.port, service.url
    model = _net()
    first = record(model, url)
    _train(model, steps=5, recorder=first)
    first.close(timeout_seconds=0.3)
    assert first.dropped_steps == 0
    with FakeService(port=port) as service:
        record(_net(), service.url)
        eventually(lambda: service.statuses.get(first.run_id) == "finished")
        assert service.steps() == list(range(5))
        eventually(lambda: not Spool(tmp_path / "spool").folders())


def test_a_step_too_many_is_dropped_counted_and_leaves_null_differences(record, service, monkeypatch):
    model = _net()
    recorder = record(model, service.url)
    reduce, go_on = recorder._reducer._pass_on, threading.Event()
    monkeypatch.setattr(recorder._reducer, "_pass_on", lambda frames: go_on.wait(30) and reduce(frames))
    _train(model, steps=1, recorder=recorder)
    eventually(lambda: not recorder._reducer._frames)  # the thread has the first
    monkeypatch.setattr("brn_core.reducer.PENDING_BYTES", 0)
    _train(model, steps=3, recorder=recorder)  # one step is taken whatever its size
    monkeypatch.undo()
    go_on.set()
    eventually(lambda: not recorder._reducer._frames)
    _train(model, steps=2, recorder=recorder)
    recorder.close()
    assert recorder.dropped_steps == 2
    assert service.steps() == [0, 1, 4, 5]
    rows = [row for row in service.rows("layers") if row["layer"] == 0]
    assert [row["mean_diff1"] is None for row in rows] == [True, False, True, False]
    assert [row["mean_diff2"] is None for row in rows] == [True, True, True, True]
    dropped = [row["value"] for row in service.rows("scalars") if row["name"] == wire.SCALAR_DROPPED]
    assert dropped[-2:] == [2.0, 2.0]


def test_ranks_without_a_process_group_need_a_run_id(record, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        record(nn.Linear(1, 1))
    recorder = record(nn.Linear(1, 1), run_id="shared")
    assert (recorder.rank, recorder.run_id) == (1, "shared")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must be integers"):
        record(nn.Linear(1, 1), run_id="shared")


_SCRIPT = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from brn_core.recorder import watch
url, store, spool, rank = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
recorder = watch(model, url=url, spool=spool, flush_seconds=60)
for step in range(5):
    model(torch.randn(4, 3)).sum().backward()
    recorder.step(float(rank))
dist.barrier()
dist.destroy_process_group()
raise SystemError("killed by the script") if rank == 0 else SystemExit(0)
"""


def test_a_training_that_raises_says_why_in_one_line(record, service):
    with pytest.raises(RuntimeError), record(_net(), service.url, run_id="r"):
        raise RuntimeError("boom\nand much more")
    assert service.statuses == {"r": "failed"}
    assert service.failures == {"r": "rank 0: RuntimeError: boom"}


def test_two_ranks_share_a_run_and_a_program_that_dies_still_delivers(service, tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [service.url, str(tmp_path / "store"), str(tmp_path / "spool")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *arguments, str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert "killed by the script" in errors[0]
    assert [process.returncode for process in processes] == [1, 0], errors
    (run_id,) = service.runs
    assert service.runs[run_id]["world_size"] == 2
    assert service.statuses == {run_id: "failed"}
    for rank in range(2):
        assert [row["step"] for row in service.rows("layers", rank)] == list(range(5))
        assert {r["value"] for r in service.rows("scalars", rank) if r["name"] == "loss"} == {float(rank)}
