"""Networks: shapes, and one mechanism that puts any normalization into any of them."""

import copy
import sys
import types
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brn_core.layers import BatchRenorm2d
from brn_core.worker.models import CifarResNet, MovingAverageNorm2d, make_model, norm_factory, replace_norms
from brn_core.worker.settings import NormKind, UsageError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS = {
    "bn": nn.BatchNorm2d,
    "brn": BatchRenorm2d,
    "syncbn": nn.BatchNorm2d,
    "gn": nn.GroupNorm,
    "frozen": BatchRenorm2d,
    "ema": MovingAverageNorm2d,
}


def test_every_norm_kind_is_tried() -> None:
    assert set(KINDS) == set(get_args(NormKind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "norms"), [("small", 3), ("resnet8", 7)])
def test_every_norm_goes_into_every_network(name: str, norms: int, kind: NormKind) -> None:
    model = make_model(name, (3, 8, 8), 5, norm_factory(kind, 0.1))
    found = [type(module) for module in model.modules() if isinstance(module, tuple(KINDS.values()))]
    assert found == [KINDS[kind]] * norms
    logits_NK = model(torch.randn(4, 3, 8, 8))
    assert logits_NK.shape == (4, 5)
    F.cross_entropy(logits_NK, torch.zeros(4, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (56, 0.85), (110, 1.7)])
def test_the_residual_networks_for_cifar_are_as_large_as_the_paper_says(depth: int, parameters: float) -> None:
    # He et al. 2015, table 6: 0.27 M, 0.85 M and 1.7 M parameters
    with torch.device("meta"):
        model = CifarResNet(depth, 3, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    with_weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(with_weights) == depth
    assert model.blocks(torch.empty(2, 16, 32, 32, device="meta")).shape == (2, 64, 8, 8)


def test_a_shortcut_keeps_every_second_position_and_adds_empty_channels() -> None:
    model = CifarResNet(8, 3, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)  # every block is its shortcut then
    x_NCHW = torch.rand(2, 16, 8, 8)
    y_NCHW = model.blocks(x_NCHW)
    torch.testing.assert_close(y_NCHW[:, :16], x_NCHW[:, :, ::4, ::4])
    assert y_NCHW[:, 16:].abs().max() == 0


def test_batch_renorm_with_closed_limits_is_the_batch_norm_it_replaces() -> None:
    torch.manual_seed(0)
    plain = CifarResNet(8, 3, 4)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # as in networks that begin as the identity, or have another eps
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
            module.eps = 0.01
    renormed = replace_norms(copy.deepcopy(plain), norm_factory("brn", 0.1))
    x_NCHW = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(renormed(x_NCHW), plain(x_NCHW), rtol=1e-4, atol=1e-4)


def test_a_norm_in_two_places_stays_one() -> None:
    shared = nn.BatchNorm2d(4)
    model = replace_norms(nn.Sequential(shared, nn.ReLU(), shared), norm_factory("brn", 0.1))
    assert isinstance(model[0], BatchRenorm2d)
    assert model[0] is model[2]


class NormAct(nn.BatchNorm2d):
    """Normalization with its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x_NCHW)))


def test_a_norm_with_its_activation_keeps_the_activation() -> None:
    model = replace_norms(nn.Sequential(NormAct(4)), norm_factory("brn", 0.1))
    x_NCHW = torch.randn(8, 4, 3, 3)
    expected = F.relu(F.batch_norm(x_NCHW, None, None, training=True))
    torch.testing.assert_close(model(x_NCHW), expected, rtol=1e-4, atol=1e-4)


def test_groups_fit_any_number_of_channels() -> None:
    assert [norm_factory("gn", 0.1)(channels).num_groups for channels in (64, 12, 7)] == [8, 4, 1]


def test_what_is_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norm_factory("bn", 0.1)
    with pytest.raises(UsageError, match="must be small, resnet20, resnet56, torchvision:NAME or timm:NAME, got 'big'"):
        make_model("big", (3, 8, 8), 5, norm)
    with pytest.raises(UsageError, match=r"depth must be 6n \+ 2 .* got 18; ImageNet's are torchvision:resnet18"):
        make_model("resnet18", (3, 8, 8), 5, norm)
    with pytest.raises(UsageError, match="Sequential has no BatchNorm2d"):
        replace_norms(nn.Sequential(nn.Conv2d(3, 4, 3)), norm)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not installed
    monkeypatch.setitem(sys.modules, "timm", None)
    for package in ("torchvision", "timm"):
        with pytest.raises(UsageError, match=rf"--model {package}:x needs .*{package}.*pip install"):
            make_model(f"{package}:x", (3, 8, 8), 5, norm)


def test_other_packages_networks_are_asked_for_by_name_and_get_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def network(name: str, **arguments: object) -> nn.Module:
        asked.append((name, arguments))
        if name == "unknown":
            raise ValueError("no such network")
        return nn.Sequential(nn.BatchNorm2d(3))

    torchvision, timm = types.ModuleType("torchvision"), types.ModuleType("timm")
    torchvision.models = types.SimpleNamespace(get_model=network)  # type: ignore[attr-defined]
    timm.create_model = network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "timm", timm)
    norm = norm_factory("brn", 0.1)
    for package in ("torchvision", "timm"):
        assert isinstance(make_model(f"{package}:a", (3, 8, 8), 5, norm)[0], BatchRenorm2d)
        with pytest.raises(UsageError, match=f"--model {package}:unknown: no such network; .*lists them"):
            make_model(f"{package}:unknown", (3, 8, 8), 5, norm)
    assert asked[0] == ("a", {"weights": None, "num_classes": 5})
    assert asked[2] == ("a", {"pretrained": False, "num_classes": 5, "in_chans": 3})
    for name in ("inception_v3", "googlenet"):
        make_model(f"torchvision:{name}", (3, 8, 8), 5, norm)
        assert asked[-1] == (name, {"weights": None, "num_classes": 5, "aux_logits": False})
    with pytest.raises(UsageError, match="takes images of 3 channels, these have 1"):
        make_model("torchvision:a", (1, 8, 8), 5, norm)


def test_torchvisions_own_networks_train_with_batch_renorm() -> None:
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    _trains("torchvision:resnet18", 20)


def test_timms_own_networks_train_with_batch_renorm() -> None:
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    _trains("timm:efficientnet_lite0", 49)  # its BatchNorm2d have activations in them


def _trains(name: str, norms: int) -> None:
    model = make_model(name, (3, 32, 32), 5, norm_factory("brn", 0.1))
    assert sum(isinstance(m, BatchRenorm2d) for m in model.modules()) == norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.zeros(4, dtype=torch.int64)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
