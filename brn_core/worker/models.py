"""Networks to train. Each is built with batch normalization, which `replace_norms` then replaces, whatever the kind.

Shapes: N samples, C channels, H x W positions, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brn_core.layers import BatchRenorm2d, Sync
from brn_core.worker.settings import NormKind, UsageError

_GROUPS: Final = 8

Norm: TypeAlias = Callable[[int], nn.Module]
"""Makes the normalization layer of a map with so many channels."""


def norm_factory(
    kind: NormKind,
    momentum: float,
    *,
    virtual_batch_size: int | None = None,
    sync: Sync = "ema",
    world_size: int = 1,
) -> Norm:
    """The factory of a normalization layer.

    Args:
        kind: bn: batch normalization; brn: Batch Renormalization; syncbn: batch normalization of all ranks' samples
            together; gn: group normalization, which knows no batch; frozen: statistics that never move from their
            start, a scale and a shift; ema: moving statistics in training too (`MovingAverageNorm2d`).
        momentum: alpha, the weight of the new batch in the moving statistics.
        virtual_batch_size: samples that bn or brn normalize together, if fewer than the batch.
        sync: of brn over the ranks. With "ema" and "none" each rank normalizes its own batch.
        world_size: ranks of the run.
    """
    sync = "none" if world_size == 1 else sync
    if kind == "brn":
        return partial(BatchRenorm2d, momentum=momentum, virtual_batch_size=virtual_batch_size, sync=sync)
    if kind == "syncbn" and world_size > 1:  # torch's own has no CPU path; with limits closed this is the same
        return partial(BatchRenorm2d, momentum=momentum, sync="moments")
    if kind == "bn" and virtual_batch_size is not None:
        return partial(BatchRenorm2d, momentum=momentum, virtual_batch_size=virtual_batch_size, sync=sync)
    if kind == "gn":
        return lambda channels: nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
    if kind == "frozen":
        return _frozen
    return partial(MovingAverageNorm2d if kind == "ema" else nn.BatchNorm2d, momentum=momentum)


def _frozen(channels: int) -> nn.Module:
    layer = BatchRenorm2d(channels)
    layer.frozen = True
    return layer


def replace_norms(model: nn.Module, norm: Norm) -> nn.Module:
    """Replaces every BatchNorm2d of a model by what `norm` makes; weight, bias and eps are taken over.

    A BatchNorm2d that does more than normalize (timm's with an activation in it) keeps the rest, after the new layer.
    The model is freshly made: its moving statistics start anew. It is changed in place.

    Raises:
        UsageError: there is none.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for path, old in list(model.named_modules(remove_duplicate=False)):
        if isinstance(old, nn.BatchNorm2d):
            if old not in replaced:
                replaced[old] = _replacement(old, norm)
            model.set_submodule(path, replaced[old])
    if not replaced:
        raise UsageError(
            f"{type(model).__name__} has no BatchNorm2d, so there is no normalization to choose or to watch"
        )
    return model


def _replacement(old: nn.BatchNorm2d, norm: Norm) -> nn.Module:
    new = norm(old.num_features)
    setattr(new, "eps", old.eps)  # noqa: B010  # nn.Module declares its attributes to be tensors
    new.weight, new.bias = old.weight, old.bias  # some start at zero, to begin as the identity
    after = [part for part in old.children() if not isinstance(part, nn.Identity)]
    return nn.Sequential(new, *after) if after else new


class MovingAverageNorm2d(nn.BatchNorm2d):
    """Normalizes by the moving statistics in training as well, with no gradient through them.

    What one would like to do and cannot: nothing in the gradient knows of the normalization, so the weights may grow
    without effect and the model blow up. Source: Ioffe 2017, section 2.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        mean_C, var_C = self.get_buffer("running_mean"), self.get_buffer("running_var")
        y: Tensor = F.batch_norm(x_NCHW, mean_C.clone(), var_C.clone(), self.weight, self.bias, False, 0.0, self.eps)
        if self.training:
            with torch.no_grad():  # for its statistics
                F.batch_norm(x_NCHW, mean_C, var_C, None, None, True, self.momentum or 0.0, self.eps)
        return y


class SmallConvNet(nn.Module):
    """conv16-N-ReLU, conv32-N-ReLU-max pool, conv32-N-ReLU, mean over positions, linear: (N, C, H, W) -> (N, K).

    Big enough to read 8x8 digits (99 %), small enough to train in seconds on one core. Convolutions are 3x3 with
    padding and without bias (the normalization after each brings its own).

    Args:
        channels: C of the images; H and W may be any number >= 2.
        classes: K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x_NCHW)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x)))
        logits_NK: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits_NK


class CifarResNet(nn.Module):
    """The residual network for CIFAR: a 3x3 convolution, 3 stages of n basic blocks, mean over positions, linear.

    Stages have 16, 32 and 64 channels; the second and third begin with stride 2. Shortcuts have no parameters: where
    the shape changes, every second position and zeros for the new channels. (N, C, H, W) -> (N, K).
    Source: He et al. 2015, "Deep Residual Learning" (arXiv 1512.03385), section 4.2; weights start as in He et al.
    2015 (arXiv 1502.01852).

    Args:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56 and 110 in the paper.
        channels: C of the images.
        classes: K.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, channels: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, 110), got {depth}")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.blocks = nn.Sequential(
            *(
                _BasicBlock(before if i == 0 else after, after, stride if i == 0 else 1)
                for before, after, stride in stages
                for i in range(blocks)
            )
        )
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x_NCHW))))
        logits_NK: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits_NK


class _BasicBlock(nn.Module):
    """conv-N-ReLU-conv-N, plus its input, ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x_NCHW)))
        y = self.norm2(self.conv2(y))
        shortcut = x_NCHW[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return F.relu(y + shortcut)


def make_model(name: str, shape: tuple[int, int, int], classes: int, norm: Norm) -> nn.Module:
    """A network by name, with random weights.

    Args:
        name: "small"; "resnet20" and so on (`CifarResNet`); "torchvision:NAME" or "timm:NAME", a classifier of theirs.
        shape: (C, H, W) of the images.
        classes: K.
        norm: makes the normalization layers.

    Raises:
        UsageError: no such network, its package is not installed, or it does not take these images.
    """
    package, _, inner = name.rpartition(":")
    if package == "torchvision":
        return replace_norms(_torchvision(inner, shape[0], classes), norm)
    if package == "timm":
        return replace_norms(_timm(inner, shape[0], classes), norm)
    if name == "small":
        return replace_norms(SmallConvNet(shape[0], classes), norm)
    if not package and (depth := re.fullmatch(r"resnet(\d+)", name)):
        try:
            return replace_norms(CifarResNet(int(depth[1]), shape[0], classes), norm)
        except ValueError as error:
            raise UsageError(f"--model {name}: {error}; ImageNet's are torchvision:{name} and timm:{name}") from None
    raise UsageError(f"--model must be small, resnet20, resnet56, torchvision:NAME or timm:NAME, got {name!r}")


def _torchvision(name: str, channels: int, classes: int) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UsageError(
            f"--model torchvision:{name} needs torchvision, of the release that fits torch {torch.__version__}: "
            f"pip install 'brn-diagnostics[vision]' ({error})"
        ) from None
    if channels != 3:
        raise UsageError(f"--model torchvision:{name} takes images of 3 channels, these have {channels}")
    # these two would give their auxiliary classifiers' logits as well, to be weighed in a loss of their own
    only_logits = {"aux_logits": False} if name in ("inception_v3", "googlenet") else {}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **only_logits)
    except ValueError as error:
        raise UsageError(f"--model torchvision:{name}: {error}; torchvision.models.list_models() lists them") from None
    return model


def _timm(name: str, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"--model timm:{name} needs timm, and a torchvision that fits torch {torch.__version__}: "
            f"pip install 'brn-diagnostics[vision]' ({error})"
        ) from None
    arguments: dict[str, Any] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--model timm:{name}: {error}; timm.list_models() lists them") from None
    return model
