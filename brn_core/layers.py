"""Batch Renormalization layers, and the way there from a BatchNorm model and back.

They derive from `nn.Module`, not from `_BatchNorm`: `convert_sync_batchnorm`, `swa_utils.update_bn` and the fusing
passes treat every subclass of that as plain batch normalization and would silently undo the correction.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brn_core import fused
from brn_core.functional import (
    Moving,
    Observation,
    Stat,
    correct_,
    in_backward,
    inference,
    renormalize,
    require_limits,
    require_mask,
    require_spread,
)
from brn_core.moments import Moments

Sync = Literal["none", "moments", "ema"]

# Forwards whose correction is kept for an activation checkpoint's second run: C numbers each.
_KEPT_CORRECTIONS: Final = 64

# Forwards after which a layer with sync="ema" warns that nobody averages.
_EMA_PATIENCE: Final = 100

_STATISTICS: Final = ("running_mean", "running_std")
_LIMITS: Final = ("r_min", "r_max", "d_max")


class BatchRenorm(nn.Module):
    """Batch Renormalization over an input of shape (N, C, *): batch normalization, corrected to moving statistics.

    Training, with the moving mu, sigma from before this step:
        y = gamma ((x - mu_B) / sigma_B * r + d) + beta
        r = stop_gradient(clip(sigma_B / sigma, r_min, r_max))
        d = stop_gradient(clip((mu_B - mu) / sigma, -d_max, d_max))
        mu += alpha (mu_B - mu),  sigma += alpha (sigma_B - sigma)
    where sigma_B = sqrt(biased variance + eps). r_max = 1, d_max = 0 (the default) is batch normalization;
    `brn_core.schedule.RenormSchedule` relaxes them. Unclipped, the training output is the inference output.

    Inference:
        y = gamma (x - mu) / sigma + beta

    `BatchRenorm1d`, `2d` and `3d` are this class with a check of the number of dimensions.

    Buffers: `running_mean`, `running_std` (C,) hold mu and sigma, `num_batches_tracked` counts updates, and `r_min`,
    `r_max`, `d_max` are 0-dim. They stay float32 when the module is cast to a 16-bit type: a moving average with
    alpha = 0.01 stalls in bfloat16. A BatchNorm state_dict loads as is.

    Source: Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    arXiv 1702.03275, Algorithm 1.

    Args:
        num_features: C.
        eps: added to the variance inside the root.
        momentum: alpha, the weight of the new batch, in (0, 1]. The time constant is 1 / alpha steps.
        affine: whether there are gamma and beta.
        bias: whether there is beta, where affine.
        r_max: upper limit of r, >= 1, may be infinite.
        d_max: limit of |d|, >= 0, may be infinite.
        r_min: lower limit of r in [0, 1]; 1 / r_max if None, as in the paper.
        stat: "std" averages sigma_B as the paper does; "var" averages sigma_B², for checkpoints trained that way.
        debias: whether the zero-start bias of the moving average is taken out: alpha / (1 - (1 - alpha)^t) is the
            weight of batch t.
        accumulation_steps: k, forwards per optimizer step; each moves the statistics by 1 - (1 - alpha)^(1/k), which
            keeps the time constant in optimizer steps.
        virtual_batch_size: normalize microbatches of at least this many samples each with its own statistics; the
            moving statistics take their mean, once.
        sync: "none": every rank for itself. "moments": mu_B, sigma_B over the whole batch of all ranks. "ema": every
            rank normalizes its own batch, as the paper's workers did, and `brn_core.statistics.average_statistics`
            averages mu, sigma over ranks once a step.
        process_group: the ranks of sync="moments"; the default group if None.
        axis: the dimension of the channels, counted from the end if negative, never 0. Everything here that is said of
            inputs (N, C, *) holds for the input with that dimension moved to 1; -1 takes (N, *, C), without a copy.
        device, dtype: of the parameters.

    Attributes:
        observe: set it, and a training forward leaves its statistics in `observed`.
        observed: the last training forward's `Observation`; the reader sets it back to None.
        frozen: set it, and the layer computes inference in training too, and tracks nothing.
        forwards_since_average: training forwards since `average_statistics`, for sync="ema".

    Raises:
        ValueError: an argument outside its range; in training, one value per channel; a wrong shape.
    """

    _version = 1
    _allowed_dims: tuple[int, ...] = ()  # any from 2 up

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor
    r_min: Tensor
    r_max: Tensor
    d_max: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        bias: bool = True,
        r_max: float = 1.0,
        d_max: float = 0.0,
        r_min: float | None = None,
        stat: Stat = "std",
        debias: bool = False,
        accumulation_steps: int = 1,
        virtual_batch_size: int | None = None,
        sync: Sync = "none",
        process_group: dist.ProcessGroup | None = None,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        r_min = 1 / r_max if r_min is None and r_max else r_min
        _check(num_features >= 1, f"num_features must be >= 1, got {num_features}")
        _check(eps >= 0, f"eps must be >= 0, got {eps}")
        _check(0 < momentum <= 1, f"momentum is the weight of the new batch, in (0, 1], got {momentum}")
        require_limits(r_min, r_max, d_max)
        _check(stat in get_args(Stat), f"stat must be one of {get_args(Stat)}, got {stat!r}")
        _check(sync in get_args(Sync), f"sync must be one of {get_args(Sync)}, got {sync!r}")
        _check(accumulation_steps >= 1, f"accumulation_steps must be >= 1, got {accumulation_steps}")
        _check(
            virtual_batch_size is None or virtual_batch_size >= 1,
            f"virtual_batch_size must be >= 1 or None, got {virtual_batch_size}",
        )
        _check(
            virtual_batch_size is None or sync != "moments",
            'virtual_batch_size splits a batch and sync="moments" joins batches: choose one',
        )
        _check(axis != 0, "axis is the dimension of the channels; 0 is that of the samples")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.stat: Stat = stat
        self.debias = debias
        self.accumulation_steps = accumulation_steps
        self.virtual_batch_size = virtual_batch_size
        self.sync: Sync = sync
        self.process_group = process_group
        self.axis = axis
        self.frozen = False
        self.observe = False
        self.observed: Observation | None = None
        self._initial_limits = (r_min, r_max, d_max)
        self._corrections: deque[tuple[Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=_KEPT_CORRECTIONS)
        self._ranks_checked = False
        self.forwards_since_average = 0

        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name in _STATISTICS:
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        for name in _LIMITS:
            self.register_buffer(name, torch.empty((), device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Back to mu = 0, sigma = 1, no batch seen."""
        self.running_mean.zero_()
        self.running_std.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """The state after construction: gamma = 1, beta = 0, moving statistics and limits as at the start."""
        self.reset_running_stats()
        for name, limit in zip(_LIMITS, self._initial_limits, strict=True):
            getattr(self, name).fill_(limit)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_limits(self, r_max: float, d_max: float, r_min: float | None = None) -> None:
        """Put limits in force from the next forward on; r_min is 1 / r_max if None."""
        if r_min is None:
            r_min = 1 / r_max if r_max else 0.0
        require_limits(r_min, r_max, d_max)
        self.r_min.fill_(r_min)
        self.r_max.fill_(r_max)
        self.d_max.fill_(d_max)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`.

        Args:
            x: (N, C, *), or with the channels at `axis`.
            mask: bool, broadcastable to `x`, or of its shape without the channels. In training, elements under
                False take no part in the statistics and come out as 0; inference ignores it.

        Returns:
            y, with the shape, dtype and memory format of `x`.
        """
        moved = self.axis != 1
        if moved or mask is not None:
            x, mask = self.channels_second(x, mask)
        self._check_input(x)
        local, elements = self.sync != "moments", x.numel()
        if not self.training or self.frozen or (elements == 0 and local):
            y = inference(x, self.running_mean, self.running_std, self.weight, self.bias)
            return y.movedim(1, self.axis) if moved else y
        if elements == self.num_features and local:
            require_spread(x)
        if (not self._ranks_checked or self.sync == "ema") and not torch.compiler.is_compiling():
            self._check_ranks()
        if mask is not None:
            require_mask(mask, x)
        size = self.virtual_batch_size
        moving = self._moving() if mask is None and fused.fits(x) else None
        y = renormalize(
            x,
            self.weight,
            self.bias,
            # asked here: inside the autograd function gradients are always off
            self._correct_and_keep if _may_run_again() else moving or self._correct,
            self.eps,
            mask=mask,
            microbatches=1 if size is None else max(1, x.shape[0] // size),
            synced=not local,
            group=self.process_group,
            per_sample=self.observe,
        )
        return y.movedim(1, self.axis) if moved else y

    def channels_second(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Views of a forward's arguments with the channels in dimension 1, as the functions take them."""
        if not -x.dim() < self.axis < x.dim():
            raise ValueError(f"axis={self.axis} is not one of the channels in input of shape {tuple(x.shape)}")
        if mask is not None and mask.dim() == x.dim() - 1:
            mask = mask.unsqueeze(self.axis)
        if mask is not None:
            mask = mask.movedim(self.axis, 1)
        return x.movedim(self.axis, 1), mask

    def _moving(self) -> Moving | None:
        """`_correct` for the fused kernels, where this layer asks for nothing that they lack."""
        if self.sync == "moments" or self.stat == "var" or self.debias or self.virtual_batch_size:
            return None
        buffers = cast("dict[str, Tensor]", self._buffers)
        if self._corrections and in_backward():  # it may be a checkpoint's second run
            return None
        if any(buffers[name].dtype != torch.float32 for name in (*_STATISTICS, *_LIMITS)):
            return None
        alpha = self._alpha()
        assert isinstance(alpha, float)  # without debias
        mu, sigma = (buffers[name] for name in _STATISTICS)
        r_min, r_max, d_max = (buffers[name] for name in _LIMITS)
        observe = self._keep_observation if self.observe else None
        return Moving(mu, sigma, (r_min, r_max, d_max), buffers["num_batches_tracked"], alpha, observe)

    def _correct(self, moments: Moments, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        """The correction of this batch; then mu and sigma move, unless an activation checkpoint runs again."""
        # Not as attributes: each is a call of Module.__getattr__, and six of them a tenth of a small layer's forward.
        buffers: dict[str, Any] = self._buffers
        mu, sigma = buffers["running_mean"], buffers["running_std"]
        limits = buffers["r_min"], buffers["r_max"], buffers["d_max"]
        if self._corrections and in_backward():
            recorded = self._recorded_correction(moments.mean_C, sigma_B)
            if recorded is None:  # not one of this layer's kept forwards, so not its statistics to move
                return correct_(moments, sigma_B, mu.clone(), sigma.clone(), limits, 0.0)
            return recorded
        if self.observe:
            self._keep_observation(moments, sigma_B, *torch.stack((mu, sigma)).unbind())  # one copy of both
        r, d = correct_(moments, sigma_B, mu, sigma, limits, self._alpha(), self.stat)
        buffers["num_batches_tracked"].add_(1)
        return r, d

    def _correct_and_keep(self, moments: Moments, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        """`_correct`, and the answer kept for an activation checkpoint's second run."""
        r, d = self._correct(moments, sigma_B)
        if not (self._corrections and in_backward()):
            self._corrections.appendleft((moments.mean_C, sigma_B, r, d))
        return r, d

    def _recorded_correction(self, mu_B: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor] | None:
        """The r and d of the forward that an activation checkpoint repeats now, before mu and sigma moved.

        Which one it was is told by its batch statistics, without a host sync; the latest of equals. None if no
        recorded forward can be it.
        """
        kept = [entry for entry in self._corrections if entry[0].shape == mu_B.shape and entry[0].dtype == mu_B.dtype]
        if not kept:
            return None
        mu_K, sigma_K, r_K, d_K = (torch.stack(column) for column in zip(*kept, strict=True))
        distance_K = ((mu_K - mu_B).abs() + (sigma_K - sigma_B).abs()).flatten(1).sum(1)
        nearest = distance_K.nan_to_num_(torch.inf).argmin().view(1)  # argmin takes a NaN for the least
        return r_K.index_select(0, nearest)[0], d_K.index_select(0, nearest)[0]

    def _alpha(self) -> float | Tensor:
        if self.accumulation_steps == 1 and not self.debias:
            return self.momentum
        alpha: float = 1 - (1 - self.momentum) ** (1 / self.accumulation_steps)
        if not self.debias:
            return alpha
        # 1 - (1 - alpha)^t, which is 0 in floating point where alpha is small
        per_batch = math.log1p(-alpha) if alpha < 1 else -math.inf
        return alpha / -torch.expm1((self.num_batches_tracked + 1).to(self.running_mean.dtype) * per_batch)

    def _keep_observation(self, moments: Moments, sigma_B: Tensor, mu: Tensor, sigma: Tensor) -> None:
        mu_B, _, _, mean_NC, var_NC = moments
        assert mean_NC is not None  # asked for by per_sample
        if sigma_B.dim() > 1:  # microbatches
            mu_B, sigma_B = mu_B.mean(0), sigma_B.mean(0)
        buffers = cast("dict[str, Tensor]", self._buffers)  # get_buffer costs more than the copy
        limits = torch.stack([buffers[name] for name in _LIMITS]).unbind()
        self.observed = Observation(mean_NC, var_NC, mu_B, sigma_B, mu, sigma, *limits)

    def _check_input(self, x: Tensor) -> None:
        dims, dim = self._allowed_dims, x.dim()
        if (dims and dim not in dims) or dim < 2:
            wanted = " or ".join(f"{n}-dimensional" for n in dims) or "at least 2-dimensional"
            raise ValueError(f"{type(self).__name__} takes {wanted} input (N, C, *), got shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension {self.axis}, "
                f"got shape {tuple(x.movedim(1, self.axis).shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point input, got {x.dtype}")

    def _check_ranks(self) -> None:
        """Say, once, what is missing for several ranks to train with the same moving statistics."""
        if self._ranks_checked:
            if self.sync == "ema":
                self._check_averaged()
            return
        self._ranks_checked = True
        connected = dist.is_available() and dist.is_initialized()
        if self.sync == "moments" and not connected:
            self._ranks_checked = False
            raise RuntimeError(
                'sync="moments" needs a process group: call torch.distributed.init_process_group, or use sync="none"'
            )
        if self.sync == "none" and connected and dist.get_world_size() > 1:
            warnings.warn(
                'BatchRenorm trains with its moving statistics, and with sync="none" each rank has its own; '
                "DistributedDataParallel replaces them by rank 0's at every forward, unless told not to broadcast "
                "buffers. "
                'Use sync="ema" with average_statistics(model) once a step, or sync="moments".',
                stacklevel=3,
            )

    def _check_averaged(self) -> None:
        self.forwards_since_average += 1
        if self.forwards_since_average == _EMA_PATIENCE and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f'sync="ema", but {_EMA_PATIENCE} forwards without an average over the ranks: '
                "call brn_core.statistics.average_statistics(model) once a step",
                stacklevel=4,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchRenorm:
        wide = {name: self.get_buffer(name) for name in (*_STATISTICS, *_LIMITS)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
            after = self.get_buffer(name)
            if after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        variance = state_dict.get(prefix + "running_var")
        if variance is not None and prefix + "running_std" not in state_dict:
            # A BatchNorm checkpoint: same inference output. `state_dict` is load_state_dict's own shallow copy.
            del state_dict[prefix + "running_var"]
            wide = variance.to(torch.promote_types(variance.dtype, torch.float32))
            state_dict[prefix + "running_std"] = (wide + self.eps).sqrt()
            for name in ("num_batches_tracked", *_LIMITS):
                state_dict.setdefault(prefix + name, self.get_buffer(name).clone())
        for name in (*_STATISTICS, *_LIMITS):  # with assign=True they would become the layer's as they are
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype in (torch.bfloat16, torch.float16):
                state_dict[prefix + name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the layer, not what a forward in progress left behind."""
        return {**self.__dict__, "observed": None, "_corrections": deque(maxlen=_KEPT_CORRECTIONS)}

    def extra_repr(self) -> str:
        """Constructor arguments, as far as they are not the defaults."""
        _, r_max, d_max = self._initial_limits
        parts = [str(self.num_features), f"eps={self.eps}", f"momentum={self.momentum}"]
        parts += [f"r_max={r_max}, d_max={d_max}"]
        parts += [f"axis={self.axis}"] if self.axis != 1 else []
        parts += ["affine=False"] if self.weight is None else []
        parts += [f"sync={self.sync!r}"] if self.sync != "none" else []
        parts += [f"virtual_batch_size={self.virtual_batch_size}"] if self.virtual_batch_size else []
        return ", ".join(parts)


class BatchRenorm1d(BatchRenorm):
    """Batch Renormalization of (N, C) or (N, C, L) input; see `BatchRenorm`."""

    _allowed_dims = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """Batch Renormalization of (N, C, H, W) input; see `BatchRenorm`."""

    _allowed_dims = (4,)


class BatchRenorm3d(BatchRenorm):
    """Batch Renormalization of (N, C, D, H, W) input; see `BatchRenorm`."""

    _allowed_dims = (5,)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _may_run_again() -> bool:
    """Whether this forward may be an activation checkpoint's first run.

    The reentrant kind runs it without gradients, the other under saved-tensor hooks.
    """
    return not torch.compiler.is_compiling() and (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def convert_batchnorm(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Replace every BatchNorm of a model by Batch Renormalization, with the same inference output.

    Parameters are the same objects (an optimizer over them stays valid); moving statistics, eps, training mode,
    dtype, device and hooks are taken over; a module used in several places stays shared. SyncBatchNorm becomes
    `BatchRenorm(sync="moments")`. momentum is not: BatchNorm's 0.1 is too fast for statistics that training uses.

    Args:
        model: changed in place, unless it is a BatchNorm itself.
        **kwargs: constructor arguments of the new layers (momentum, r_max, d_max, sync, ...).

    Returns:
        The model, or the new layer if `model` is a BatchNorm.

    Raises:
        ValueError: a BatchNorm without moving statistics (it has no inference output to keep), a lazy one that has
            not seen its first batch, or a subclass with a forward of its own.
    """
    return _replace(
        model, lambda m: _from_batchnorm(m, kwargs) if isinstance(m, nn.modules.batchnorm._BatchNorm) else None
    )


def revert_batchrenorm(model: nn.Module) -> nn.Module:
    """Replace every Batch Renormalization of a model by the BatchNorm with the same inference output.

    Args:
        model: changed in place, unless it is a BatchRenorm itself. Layers of the any-dimensional class become
            SyncBatchNorm, the only BatchNorm that takes any number of dimensions.

    Raises:
        ValueError: a layer with its channels elsewhere than in dimension 1, which no BatchNorm takes.

    Returns:
        The model, or the new layer if `model` is a BatchRenorm.
    """
    return _replace(model, lambda m: _to_batchnorm(m) if isinstance(m, BatchRenorm) else None)


def _replace(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            new = replacement(module)
            done[module] = module if new is None else new
            if new is None:
                for name, child in module._modules.items():
                    if child is not None:
                        module._modules[name] = visit(child)
        return done[module]

    return visit(model)


_BATCHNORM_OF: Final[dict[type[BatchRenorm], type[nn.modules.batchnorm._BatchNorm]]] = {
    BatchRenorm1d: nn.BatchNorm1d,
    BatchRenorm2d: nn.BatchNorm2d,
    BatchRenorm3d: nn.BatchNorm3d,
    BatchRenorm: nn.SyncBatchNorm,
}


def _from_batchnorm(old: nn.modules.batchnorm._BatchNorm, kwargs: dict[str, Any]) -> BatchRenorm | None:
    if isinstance(old, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{type(old).__name__} has no shape yet: run one batch through the model, then convert it")
    kind = next((new for new, bn in _BATCHNORM_OF.items() if isinstance(old, bn)), None)
    if kind is None:
        return None  # someone's own kind of batch normalization
    if type(old).forward not in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(
            f"{type(old).__name__} has a forward of its own, which may do more than normalize (timm's applies an "
            "activation): replace it by hand, by BatchRenorm and what it does besides"
        )
    if old.running_mean is None or old.running_var is None:
        raise ValueError(
            f"{old} keeps no moving statistics, so there is no inference output to keep; "
            "build it with track_running_stats=True, or replace it by hand"
        )
    if isinstance(old, nn.SyncBatchNorm):
        kwargs = {"sync": "moments", "process_group": old.process_group} | kwargs
    new = kind(old.num_features, **({"eps": old.eps, "affine": False} | kwargs), device=old.running_mean.device)
    wide = torch.promote_types(old.running_mean.dtype, torch.float32)
    new.running_mean = old.running_mean.detach().to(wide, copy=True)
    new.running_std = (old.running_var.detach().to(wide) + old.eps).sqrt()
    _take_over(old, new)
    return new


def _to_batchnorm(old: BatchRenorm) -> nn.Module:
    if old.axis != 1:
        raise ValueError(
            f"BatchNorm has its channels in dimension 1, {old} in {old.axis}: keep it, or replace it by hand"
        )
    new = _BATCHNORM_OF[next(kind for kind in type(old).__mro__ if kind in _BATCHNORM_OF)](
        old.num_features, eps=old.eps, momentum=old.momentum, affine=False, device=old.running_mean.device
    )
    if isinstance(new, nn.SyncBatchNorm):
        new.process_group = old.process_group
    new.running_mean = old.running_mean.detach().clone()
    new.running_var = (old.running_std.detach().square() - old.eps).clamp_(min=0)
    _take_over(old, new)
    return new


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Parameters, counter, mode and hooks of `old`, as the same objects where there is identity to keep."""
    new.weight, new.bias = old.weight, old.bias
    if isinstance(old.num_batches_tracked, Tensor):
        new.num_batches_tracked = old.num_batches_tracked.clone()
    new.training = old.training
    for name, value in vars(old).items():
        if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_hooks_always_called"):
            setattr(new, name, copy.copy(value))
