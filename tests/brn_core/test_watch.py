"""What `watch(model)` promises to people who already have a model and a loop, one promise a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_service import FakeService
from torch import nn
from torch.utils.checkpoint import checkpoint

from brn_core.layers import BatchRenorm2d
from brn_core.recorder import watch

torch.set_num_threads(1)

DEAD_URL = "http://127.0.0.1:9"  # the discard port: nothing listens there
NORMS = {"BatchNorm": nn.BatchNorm2d, "BatchRenorm": lambda channels: BatchRenorm2d(channels, r_max=3.0, d_max=5.0)}


class Block(nn.Module):
    def __init__(self, channels, width, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, 2, bias=False), norm(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """Named as torchvision names them."""

    def __init__(self, norm=nn.BatchNorm2d, *, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), norm(8)
        self.layer1, self.layer2 = Block(8, 12, norm), Block(12, 16, norm)
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(16, 5)
        self.checkpointed = checkpointed

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for layer in (self.layer1, self.layer2):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.fc(self.dropout(x.mean((2, 3))))


LAYERS = ["bn1", *(f"layer{i}.{name}" for i in (1, 2) for name in ("bn1", "bn2", "downsample.1"))]


def _train(model, recorder=None, *, steps=4, accumulate=1, autocast=False, channels_last=False):
    """Trains on noise with the global generator; returns the losses, exactly."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            x, y = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if recorder is not None:
            recorder.step(loss, shadow_loss=lambda output, y=y: F.cross_entropy(output, y))
        losses.append(loss.item())
    return losses


@pytest.fixture
def service():
    with FakeService() as running:
        yield running


def _watch(model, service, tmp_path, **settings):
    return watch(model, url=service.url, spool=tmp_path / "spool", strict=True, flush_seconds=0.05, **settings)


WAYS = {
    "float32": {},
    "bfloat16 autocast": {"autocast": True},
    "channels_last": {"channels_last": True},
    "two backward passes a step": {"accumulate": 2},
    "activation checkpoints": {"checkpointed": True},
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_resnet_trains_to_the_same_bits_and_every_layer_has_a_row_for_every_step(service, tmp_path, norm, way):
    way = dict(way)
    checkpointed = way.pop("checkpointed", False)
    unwatched, model = ResNet(norm, checkpointed=checkpointed), ResNet(norm, checkpointed=checkpointed)
    expected = _train(unwatched, **way)
    generator = torch.get_rng_state()
    recorder = _watch(model, service, tmp_path, shadow_every=2, channels_every=2)
    assert _train(model, recorder, **way) == expected
    recorder.close()
    assert torch.equal(torch.get_rng_state(), generator)
    for (name, value), other in zip(model.state_dict().items(), unwatched.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert [layer["name"] for layer in service.runs[recorder.run_id]["layers"]] == LAYERS
    rows = service.rows("layers")
    assert [(row["step"], row["layer"]) for row in rows] == [(s, i) for s in range(4) for i in range(len(LAYERS))]
    assert {row["samples"] for row in rows} == {8}
    assert len(service.rows("probe")) == 4
    assert sorted({row["step"] for row in service.rows("channels")}) == [0, 2]
    assert recorder.dropped_steps == 0


def test_a_synchronized_batch_norm_trains_to_the_same_bits_and_has_the_rows_of_this_ranks_samples(service, tmp_path):
    """As far as a CPU goes: alone it needs no exchange, which torch has for accelerators only."""
    unwatched, model = (nn.SyncBatchNorm.convert_sync_batchnorm(ResNet(nn.BatchNorm2d)) for _ in range(2))
    recorder = _watch(model, service, tmp_path)
    assert _train(model, recorder) == _train(unwatched)
    recorder.close()
    for value, other in zip(model.state_dict().values(), unwatched.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert {layer["kind"] for layer in service.runs[recorder.run_id]["layers"]} == {"SyncBatchNorm"}
    rows = service.rows("layers")
    assert [(row["step"], row["layer"]) for row in rows] == [(s, i) for s in range(4) for i in range(len(LAYERS))]
    assert {row["samples"] for row in rows} == {8}


def test_of_two_backward_passes_a_step_the_last_one_is_recorded_with_the_statistics_that_it_found(service, tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3))
    recorder = _watch(model, service, tmp_path, channels_every=1)
    first, last = torch.randn(4, 3, 2, 2), torch.randn(6, 3, 2, 2) + 5
    model(first).sum().backward()
    found = model[0].running_mean.clone()
    model(last).sum().backward()
    recorder.step()
    recorder.close()
    (row,), (channels,) = service.rows("layers"), service.rows("channels")
    assert row["samples"] == 6
    np.testing.assert_allclose(channels["mu_b"], last.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(channels["mu"], found, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_layer_in_two_places_is_one_layer_and_has_the_row_of_its_last_call(service, tmp_path, norm):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.here = self.there = norm(3)

        def forward(self, x):
            return self.there(self.here(x) + 4)

    model = Shared()
    recorder = _watch(model, service, tmp_path)
    x = torch.randn(5, 3, 2, 2)
    model(x - x.mean((0, 2, 3), keepdim=True)).sum().backward()
    recorder.step()
    recorder.close()
    assert [layer["name"] for layer in service.runs[recorder.run_id]["layers"]] == ["here"]
    (row,) = service.rows("layers")
    assert row["mu_b"] == pytest.approx(4, abs=1e-4)


def test_the_moving_statistics_are_those_that_the_layer_finds(service, tmp_path):
    """Not those that the model's forward began with, where somebody writes in between or calls the layer alone."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.written, self.replaced = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            self.written.running_mean.fill_(2.0)
            self.replaced.running_mean = torch.full((3,), 3.0)
            return self.replaced(self.written(self.plain(x)))

    model = Written()
    recorder = _watch(model, service, tmp_path)
    model(torch.randn(5, 3, 2, 2)).sum().backward()
    recorder.step()
    model.plain.running_mean.fill_(4.0)
    model.plain(torch.randn(5, 3, 2, 2))
    recorder.step()
    recorder.close()
    assert [(row["step"], row["layer"], row["mu"]) for row in service.rows("layers")] == [
        (0, 0, 0.0), (0, 1, 2.0), (0, 2, 3.0), (1, 0, 4.0),
    ]  # fmt: skip


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_frozen_layers_have_no_row_and_layers_that_thaw_have_one_from_then_on(service, tmp_path, norm):
    model = ResNet(norm)
    recorder = _watch(model, service, tmp_path)
    for frozen in (True, False):
        model.train()
        if frozen:
            model.bn1.eval()
        _train(model, recorder, steps=1)
    recorder.close()
    assert [(row["step"], row["layer"]) for row in service.rows("layers") if row["layer"] == 0] == [(1, 0)]
    assert len(service.rows("layers")) == 2 * len(LAYERS) - 1


def _graphs():
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_compiled_model_stays_one_graph(service, tmp_path, norm, fresh_compiler):
    model = torch.compile(ResNet(norm), backend="aot_eager", fullgraph=True)
    recorder = _watch(model, service, tmp_path, shadow_every=3)
    _train(model, recorder, steps=5)
    recorder.close()
    assert _graphs() == 1
    assert [layer["name"] for layer in service.runs[recorder.run_id]["layers"]] == LAYERS
    assert len(service.rows("layers")) == 5 * len(LAYERS)
    assert len(service.rows("probe")) == 5
    assert "brn/shadow_eval_loss" in {row["name"] for row in service.rows("scalars")}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
def test_a_model_that_is_compiled_after_it_was_watched_is_recorded_too(service, tmp_path, fresh_compiler):
    model = ResNet()
    recorder = _watch(model, service, tmp_path, shadow_every=3)
    _train(torch.compile(model, backend="aot_eager"), recorder, steps=5)
    recorder.close()
    assert _graphs() == 1
    assert len(service.rows("layers")) == 5 * len(LAYERS)
    assert len(service.rows("probe")) == 5


def test_a_model_watched_too_late_to_see_its_layers_says_so(service, tmp_path, fresh_compiler, caplog):
    model = torch.compile(ResNet(), backend="aot_eager")
    _train(model, steps=1)
    recorder = _watch(model, service, tmp_path)
    _train(model, recorder, steps=3)
    recorder.close()
    assert service.rows("layers") == []
    assert len([r for r in caplog.records if "none of its 7 normalization layers was seen" in r.getMessage()]) == 1


def test_wrappers_do_not_show_in_names_and_the_users_own_names_do():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self._orig = nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

    for wrapped in (Model(), nn.DataParallel(Model()), torch.compile(nn.DataParallel(Model()), backend="eager")):
        with watch(wrapped, url=DEAD_URL, spool=None) as recorder:
            assert [layer.name for layer in recorder._layers] == ["module.0", "_orig"]
    with watch(torch.compile(nn.BatchNorm2d(3), backend="eager"), url=DEAD_URL, spool=None) as recorder:
        assert [layer.name for layer in recorder._layers] == ["BatchNorm2d"]


def test_a_layer_called_by_keyword_or_with_an_empty_batch_is_fine(service, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(input=x)

    model = Model()
    recorder = _watch(model, service, tmp_path)
    for samples in (4, 0):
        model(torch.randn(samples, 3, 2, 2))
        recorder.step()
    recorder.close()
    assert [row["step"] for row in service.rows("layers")] == [0]


def test_a_scalar_that_is_none_does_not_take_the_others_with_it(service, tmp_path):
    recorder = watch(nn.Linear(1, 1), url=service.url, spool=tmp_path)
    recorder.step(0.5, per_class=torch.zeros(3), accuracy=0.25)
    recorder.close()
    values = {row["name"]: row["value"] for row in service.rows("scalars")}
    assert (values["loss"], values["accuracy"]) == (0.5, 0.25)
    assert "per_class" not in values


_SCRIPT = """
import json, os, sys, torch, torch.distributed as dist, torch.nn.functional as F
from datetime import timedelta
from torch import nn
from brn_core.recorder import watch
url, store, spool, rank = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 3))
model = nn.parallel.DistributedDataParallel(net)
recorder = None if url == "none" else watch(model, url=url, spool=spool, strict=True, shadow_every=2)
torch.manual_seed(rank)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
losses = []
for step in range(5):
    loss = F.cross_entropy(model(torch.randn(6, 1, 5, 5)), torch.randint(3, (6,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if recorder is not None:
        recorder.step(loss)
    losses.append(loss.item())
if recorder is not None:
    recorder.close()
dist.barrier()
dist.destroy_process_group()
print(json.dumps([losses, net[1].running_mean.tolist()]), flush=True)
os._exit(0)  # the group's threads outlive it under DDP: at the interpreter's end they may abort it, recorded or not
"""


def _two_ranks(url, folder):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
    folder.mkdir()
    arguments = [url, str(folder / "store"), str(folder / "spool")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *arguments, str(rank)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    return [json.loads(out) for out, _ in answers]


def test_two_data_parallel_ranks_train_to_the_same_bits_and_each_has_its_own_rows(service, tmp_path):
    assert _two_ranks(service.url, tmp_path / "watched") == _two_ranks("none", tmp_path / "unwatched")
    (run,) = service.runs.values()
    assert (run["world_size"], [layer["name"] for layer in run["layers"]]) == (2, ["1"])
    for rank in range(2):
        assert [row["step"] for row in service.rows("layers", rank)] == list(range(5))
        assert [row["step"] for row in service.rows("probe", rank)] == list(range(5))
    # rank 0's buffers, which every rank gets at the start of its forward, and its forward moves
    moving = [[row["mu"] for row in service.rows("layers", rank)] for rank in range(2)]
    assert moving[0] == moving[1]
    assert len({*moving[0]}) == 5


def test_every_statistic_of_a_verdict_follows_from_stored_rows(service, tmp_path):
    """What the diagnosis needs of a layer and step, from the stored columns and by definition from the data."""
    layer = nn.BatchNorm2d(4, eps=1e-3)
    recorder = _watch(nn.Sequential(layer), service, tmp_path)
    history, N = [], 6
    for _ in range(3):
        x = torch.randn(N, 4, 3, 3) * 2 + 1
        mu, sigma = layer.running_mean.double().numpy().copy(), (layer.running_var.double() + 1e-3).sqrt().numpy()
        recorder._model(x)
        recorder.step()
        y, values = x.double().mean((2, 3)).numpy(), x.double().numpy()
        mu_b = y.mean(0)
        q = ((values - mu_b[:, None, None]) ** 2).mean((2, 3))
        history.append((y, mu_b, q, np.sqrt(q.mean(0) + 1e-3)))
    recorder.close()
    row = service.rows("layers")[2]
    (_, m1, _, s1), (_, m2, _, s2) = history[1], history[0]
    y, m0, q, s0 = history[2]
    r, d = s0 / sigma, (m0 - mu) / sigma
    V, kappa = y.var(0, ddof=1) / (N * sigma**2), q.var(0, ddof=1) / sigma**4
    steps = ((y[1:] - y[:-1]) ** 2).sum(0) / (2 * (N - 1) * N * sigma**2)
    expected = {
        "N": (row["samples"], N),
        "d²": (row["d_squared"], (d**2).mean()),
        "(r-1)²": (row["gap"] - row["d_squared"], ((r - 1) ** 2).mean()),
        "ln r": (row["log_r"], np.log(r).mean()),
        "max |d|": (max(abs(row["d_q00"]), abs(row["d_q100"])), abs(d).max()),
        "max |ln r|": (max(abs(np.log(row["r_q00"])), abs(np.log(row["r_q100"]))), abs(np.log(r)).max()),
        "residual of batch norm": (row["residual"], ((r - 1) ** 2 + d**2).mean()),
        "V": (row["mean_noise"], V.mean()),
        "kappa/4N": (row["scale_noise"], kappa.mean() / (4 * N)),
        "kappa/N": (4 * row["scale_noise"], kappa.mean() / N),
        "F, first differences": (
            row["mean_diff1"] / row["mean_noise"],
            ((m0 - m1) ** 2 / 2 / sigma**2).mean() / V.mean(),
        ),
        "F, second differences": (
            row["mean_diff2"] / row["mean_noise"],
            ((m0 - 2 * m1 + m2) ** 2 / 6 / sigma**2).mean() / V.mean(),
        ),
        "the same of ln sigma": (
            row["scale_diff2"],
            ((np.log(s0) - 2 * np.log(s1) + np.log(s2)) ** 2 / 6).mean(),
        ),
        "A": (row["adjacency_noise"] / row["mean_noise"], steps.mean() / V.mean()),
        "dead and non-finite channels": (row["dead_channels"] + row["nonfinite_channels"], 0),
        "limits": (row["r_max"] + row["d_max"], 1),
        "clip rates": (row["clip_r"] + row["clip_d"], 2),
    }
    for name, (stored, by_definition) in expected.items():
        assert stored == pytest.approx(by_definition, rel=2e-3, abs=1e-6), name
