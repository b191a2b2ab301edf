"""Watching a model: what its normalization layers do, step by step, without training noticing.

    recorder = watch(model, url="http://127.0.0.1:8321")     # any model with BatchRenorm, BatchNorm or SyncBatchNorm
    ...
    optimizer.step()
    recorder.step(loss)                                      # once an optimizer step
    ...
    recorder.close()

What a forward leaves is reduced to vectors of the layers' channels, packed and copied without waiting for the device;
a thread of the recorder's makes rows of it (`packer`), another sends them (`shipper`).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from brn_core import packer
from brn_core.functional import Observation, sample_moments
from brn_core.layers import BatchRenorm
from brn_core.packer import BatchNormMoments, Block, LayerGroup, Packer, PinnedRing, ProbeGroup, ScalarGroup, Segment
from brn_core.probe import InputProbe
from brn_core.shadow import Shadow, run_shadow
from brn_core.shipper import Client, Complaints, Shipper
from brn_core.spool import Spool
from brn_core.wire import (
    PROBE_FEATURES,
    SCALAR_DROPPED,
    SCALAR_SHADOW_DISAGREEMENT,
    SCALAR_SHADOW_EVAL_LOSS,
    SCALAR_SHADOW_TRAIN_LOSS,
    SCALAR_STEP_TIME,
    Layer,
    LayerKind,
    RunCreate,
    RunUpdate,
    Schedule,
    encode_batch,
)

if TYPE_CHECKING:
    from brn_core.schedule import RenormSchedule

logger = logging.getLogger("brn_core")

PENDING_STEPS: Final = 512
PENDING_BYTES: Final = 64 * 1024 * 1024
"""Packed steps that may wait to be reduced, by number and by size; beyond either the newest is dropped and counted."""


class Recorder:
    """Records a model's normalization layers, input and scalars, and ships them to the service.

    Recorded are BatchRenorm1d/2d/3d, BatchNorm1d/2d/3d and SyncBatchNorm with moving statistics, in training mode: a
    layer in inference mode (frozen) or that does not run in a step has no row for it. Where a layer or the model runs
    several times between two calls of `step` (gradient accumulation, shared layers), the last time counts. A
    SyncBatchNorm is recorded with this rank's own samples.

    Making one is a collective call where torch.distributed is initialized: rank 0 shares the run's id. Nothing that
    goes wrong afterwards reaches the training loop: it is logged once, then once a minute.

    Args:
        model: the model that is called in training, wrapped (DistributedDataParallel, torch.compile) or not.
        url: root of the service. It need not be up yet.
        run_name: shown to people; the run's id begins with it.
        run_id: continue this run, or choose its id; by default one is made.
        token: bearer token of the service; by default the environment's BRN_TOKEN.
        config: the run's settings, to be shown; what JSON does not know is shown as text.
        tags: short labels of the run.
        batch_size: samples a rank and step, for display and verdicts.
        planned_steps: length of the run in steps.
        schedule: planned limits of r and d.
        every: record layers and input of every so many steps; scalars given to `step` are always recorded.
        shadow_every: steps between shadow passes; 0 for none.
        channels_every: steps between snapshots of every channel (rank 0); 0 for none.
        flush_seconds: about how long a recorded step waits before it is sent.
        spool: directory for what cannot be sent; None: it is dropped and counted.
        strict: raise what goes wrong in the training thread (for tests).
        start_step: number of the first step, for a training that is resumed.

    Raises:
        ValueError: an argument that makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        url: str = "http://127.0.0.1:8321",
        run_name: str = "run",
        run_id: str | None = None,
        token: str | None = None,
        config: Mapping[str, object] | None = None,
        tags: Sequence[str] = (),
        batch_size: int | None = None,
        planned_steps: int | None = None,
        schedule: RenormSchedule | None = None,
        every: int = 1,
        shadow_every: int = 50,
        channels_every: int = 100,
        flush_seconds: float = 1.0,
        spool: str | Path | None = ".brn/spool",
        strict: bool = False,
        start_step: int = 0,
    ) -> None:
        _check_at_least(every=(every, 1), shadow_every=(shadow_every, 0), channels_every=(channels_every, 0))
        _check_at_least(start_step=(start_step, 0))
        if not flush_seconds > 0:
            raise ValueError(f"flush_seconds must be > 0, got {flush_seconds}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model = model
        self._watched = _find_layers(model)
        self._layers = tuple(_describe(i, name, layer) for i, (name, layer) in enumerate(self._watched))
        rank, world_size = _place()
        registration = _registration(
            id=_shared_run_id(run_id, run_name, rank, world_size),
            name=run_name,
            world_size=world_size,
            batch_size=batch_size,
            planned_steps=planned_steps,
            schedule=None if schedule is None else _wire_schedule(schedule),
            config=None if config is None else {str(k): _plain(v) for k, v in config.items()},
            tags=tuple(tags),
            layers=self._layers,
        )
        client = Client(url, token=token or os.environ.get("BRN_TOKEN"))
        self.run_id = registration.id
        self.rank = rank
        self._url = client.url
        self._every, self._shadow_every, self._channels_every = every, shadow_every, channels_every
        self._step = start_step
        self._strict = strict
        self._pid = os.getpid()
        self._closed = False
        self._complaints = Complaints()
        self._stepped_at: float | None = None
        self._verdict: tuple[str, str] | None = None
        self._dropped = 0

        self._probe = InputProbe()
        self._packer = Packer([layer.eps for layer in self._layers])
        self._rings: dict[torch.device, PinnedRing] = {}
        self._taken: dict[int, BatchNormMoments] = {}
        self._probed: Segment | None = None
        self._shadow: Shadow | None = None

        self._shipper: Shipper[packer.StepRows] = Shipper(
            client,
            registration,
            rank,
            lambda rows: encode_batch(packer.tables(rows)),
            spool=None if spool is None else Spool(spool),
            flush_seconds=flush_seconds,
            on_acknowledged=self._acknowledged if rank == 0 else None,
        )
        self._reducer = _Reducer(self._layers, every, self._shipper, lambda: self.dropped_steps)
        self._handles = self._hook()
        self._arm()
        atexit.register(_close_at_exit, weakref.ref(self))
        logger.info("recording run %s: %d normalization layers, to %s", self.run_id, len(self._layers), self._url)

    @property
    def latest(self) -> Mapping[str, float]:
        """Newest figures of this rank on the host, for a progress bar; may trail training by a few steps.

        Keys: r_max, d_max, clip_r, clip_d (means over the layers; absent before the first recorded step) and
        dropped_steps.
        """
        return {**self._reducer.latest, "dropped_steps": float(self.dropped_steps)}

    @property
    def dropped_steps(self) -> int:
        """Steps given to `step` that will never be stored."""
        return self._dropped + self._reducer.dropped + self._shipper.dropped

    def step(
        self,
        loss: float | Tensor | None = None,
        *,
        shadow_loss: Callable[[Any], Tensor] | None = None,
        **scalars: float | Tensor,
    ) -> None:
        """Record the step that ends; call it once after `optimizer.step()`.

        Does not wait for the device: tensors are copied along with the statistics. In a process forked from the one
        that made the recorder, and after `close`, it does nothing.

        Args:
            loss: the step's loss, a number or a tensor of one element.
            shadow_loss: maps an output of the model to this batch's loss; called only after a shadow pass.
            scalars: anything else to record, numbers or tensors of one element. Names beginning "brn/" are reserved.
        """
        if self._closed or os.getpid() != self._pid:
            return
        step, self._step = self._step, self._step + 1
        now = time.perf_counter()
        host: dict[str, float] = {}
        if self._stepped_at is not None:
            host[SCALAR_STEP_TIME] = now - self._stepped_at
        self._stepped_at = now
        device: dict[str, Tensor] = {}
        with self._border():
            for name, value in (scalars if loss is None else {"loss": loss, **scalars}).items():
                _sort_scalar(name, value, host, device)
        with self._border():
            self._shadow_scalars(shadow_loss, device)
        with self._border():
            self._hand_over(step, host, device)
        self._arm()

    def close(self, status: Literal["finished", "failed"] = "finished", *, timeout_seconds: float = 5.0) -> None:
        """Stop watching, send what waits, say how the run ended. Later calls do nothing.

        Args:
            status: how the training ended; rank 0's word counts.
            timeout_seconds: longest time to spend on sending; the rest goes to the spool.
        """
        if self._closed or os.getpid() != self._pid:
            return
        if status not in ("finished", "failed"):
            raise ValueError(f'status must be "finished" or "failed", got {status!r}')
        self._closed = True
        deadline = time.monotonic() + timeout_seconds
        for handle in self._handles:
            handle.remove()
        for _, layer in self._watched:
            if isinstance(layer, BatchRenorm):
                layer.observe, layer.observed = False, None
        with self._border():
            ended = self._reducer.close(timeout_seconds)
            left = max(deadline - time.monotonic(), 0.0)
            end = RunUpdate(status=status) if self.rank == 0 else None
            ended &= self._shipper.close(timeout_seconds=left, end=end)
            if not ended:
                logger.warning("run %s: a sending thread still hangs in a connection to %s", self.run_id, self._url)
        if self.dropped_steps:
            logger.warning("run %s: %d recorded steps were dropped", self.run_id, self.dropped_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    # --- around the forward pass ----------------------------------------------------------------------------------

    def _hook(self) -> list[RemovableHandle]:
        handles = [
            layer.register_forward_pre_hook(_Hook(self._batch_norm_hook(index)))
            for index, (_, layer) in enumerate(self._watched)
            if not isinstance(layer, BatchRenorm)
        ]
        handles.append(self._model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True))
        if self._shadow_every:
            handles.append(self._model.register_forward_hook(_Hook(self._after_forward), with_kwargs=True))
        return handles

    def _batch_norm_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before_batch_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._due or not module.training or not torch.is_grad_enabled():
                return
            with self._border(), torch.no_grad():
                running_mean, running_var = module.running_mean, module.running_var
                assert isinstance(running_mean, Tensor)
                assert isinstance(running_var, Tensor)
                mean_NC, var_NC = sample_moments(args[0].detach())
                if var_NC is None:
                    mean_NC = mean_NC.clone()  # without positions it may be the input itself, which may change
                self._taken[index] = BatchNormMoments(mean_NC, var_NC, running_mean.clone(), running_var.clone())

        return before_batch_norm

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._due and module.training and torch.is_grad_enabled():
            with self._border():
                self._probed = self._probe.measure((args, kwargs))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._shadow_due and module.training and torch.is_grad_enabled() and os.getpid() == self._pid:
            with self._border():
                self._shadow = run_shadow(module, args, kwargs, output)

    # --- at the end of a step -------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Say what the coming step is asked for, and forget what the last one left."""
        self._due = self._step % self._every == 0
        self._shadow_due = self._shadow_every > 0 and self._step > 0 and self._step % self._shadow_every == 0
        self._taken.clear()
        self._probed = self._shadow = None
        for _, layer in self._watched:
            if isinstance(layer, BatchRenorm):
                layer.observe, layer.observed = self._due, None

    def _shadow_scalars(self, loss: Callable[[Any], Tensor] | None, device: dict[str, Tensor]) -> None:
        if self._shadow is None:
            return
        if (disagreement := self._shadow.disagreement()) is not None:
            device[SCALAR_SHADOW_DISAGREEMENT] = disagreement
        if loss is not None:
            device[SCALAR_SHADOW_TRAIN_LOSS], device[SCALAR_SHADOW_EVAL_LOSS] = self._shadow.losses(loss)

    def _hand_over(self, step: int, host: dict[str, float], device: dict[str, Tensor]) -> None:
        taken: dict[int, Observation | BatchNormMoments] = {**self._taken}
        for index, (_, layer) in enumerate(self._watched):
            if isinstance(layer, BatchRenorm) and layer.observed is not None:
                taken[index] = layer.observed
        segments = self._packer.pack(taken)
        if self._probed is not None:
            segments.append(self._probed)
        segments.extend(_scalar_segments(device))
        transfer = packer.Transfer.start(segments, self._rings)
        if transfer is None:
            self._dropped += 1
            return
        snapshot = self.rank == 0 and self._channels_every > 0 and step % self._channels_every == 0
        self._reducer.offer(_Frame(step, transfer, host, snapshot))

    def _acknowledged(self, acknowledgement: Mapping[str, Any]) -> None:
        """Log the service's verdict when it becomes another one (in the shipper's thread, rank 0)."""
        verdict = acknowledgement.get("verdict")
        if not isinstance(verdict, Mapping):
            return
        news = (str(verdict.get("code")), str(verdict.get("severity")))
        if news == self._verdict:
            return
        self._verdict = news
        if news[1] in ("warning", "critical"):
            level = logging.ERROR if news[1] == "critical" else logging.WARNING
            logger.log(level, "%s: %s See %s/runs/%s", news[0], verdict.get("summary"), self._url, self.run_id)

    @contextmanager
    def _border(self) -> Iterator[None]:
        """The line that no error of recording crosses into training."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self._complaints.say(
                type(error).__name__, f"recording failed, training goes on: {type(error).__name__}: {error}"
            )


def watch(model: nn.Module, **settings: Any) -> Recorder:
    """Record what normalization does in `model`; the keyword arguments are those of `Recorder`."""
    return Recorder(model, **settings)


class _Hook:
    """A hook that stays with its module: copies and pickles of the module (averaged models, checkpoints) get none."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    def __call__(self, *args: Any) -> None:
        """Nothing: this module is not watched."""


class _Frame(NamedTuple):
    """One step on its way from the training thread to the reducer."""

    step: int
    transfer: packer.Transfer
    scalars: dict[str, float]
    snapshot: bool


class _Reducer:
    """The thread that makes rows of packed steps, in order, and offers them to the shipper."""

    def __init__(
        self, layers: tuple[Layer, ...], every: int, shipper: Shipper[packer.StepRows], dropped: Callable[[], int]
    ) -> None:
        self._eps = [layer.eps for layer in layers]
        self._every = every
        self._shipper = shipper
        self._all_dropped = dropped
        self._frames: deque[_Frame] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._complaints = Complaints()
        self._past: tuple[Block | None, Block | None] = (None, None)
        self.dropped = 0
        self.latest: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="brn-reducer", daemon=True)
        self._thread.start()

    def offer(self, frame: _Frame) -> None:
        """Queue one step; a full queue drops it. Takes a lock that is only ever held for an instant."""
        with self._changed:
            size = frame.transfer.size_bytes
            if len(self._frames) >= PENDING_STEPS or self._bytes + size > PENDING_BYTES:
                self.dropped += 1
                frame.transfer.release()
                return
            self._frames.append(frame)
            self._bytes += size
            self._changed.notify()

    def close(self, timeout_seconds: float) -> bool:
        """Reduce what waits until the deadline, drop the rest. Returns whether the thread has ended."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout_seconds
            self._changed.notify()
        self._thread.join(timeout_seconds + 1.0)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self._shipper.offer(self._rows(frame))
            except Exception as error:
                self.dropped += 1
                self._complaints.say("reducing", f"a recorded step is lost: {type(error).__name__}: {error}")

    def _next(self) -> _Frame | None:
        with self._changed:
            while True:
                if self._closing and time.monotonic() >= self._deadline:
                    self.dropped += len(self._frames)
                    return None
                if not self._frames:
                    if self._closing:
                        return None
                    self._changed.wait()
                elif self._frames[0].transfer.ready():
                    frame = self._frames.popleft()
                    self._bytes -= frame.transfer.size_bytes
                    return frame
                else:
                    self._changed.wait(0.001)  # polled: waiting for the device would need a blocking call

    def _rows(self, frame: _Frame) -> packer.StepRows:
        scalars = dict(frame.scalars)
        scalars[SCALAR_DROPPED] = float(self._all_dropped())
        groups: list[tuple[LayerGroup, Any]] = []
        probe = None
        for key, values in frame.transfer.arrays():
            match key:
                case LayerGroup():
                    groups.append((key, values))
                case ProbeGroup(samples):
                    probe = packer.ProbeRow(samples, *values.reshape(3, PROBE_FEATURES))
                case ScalarGroup(names):
                    scalars.update(zip(names, values.copy().view(np.float64).tolist(), strict=True))
        now = packer.block(frame.step, groups, self._eps)
        if now is None:
            return packer.StepRows(frame.step, probe=probe, scalars=scalars)
        before, before_that = (
            past if past is not None and past.step == now.step - back * self._every else None
            for back, past in enumerate(self._past, start=1)
        )
        columns, nulls = packer.layer_columns(now, before, before_that)
        self._past = (now, self._past[0])
        self.latest = {name: float(columns[name].mean()) for name in ("r_max", "d_max", "clip_r", "clip_d")}
        snapshot = now if frame.snapshot else None
        return packer.StepRows(frame.step, now.layers, columns, nulls, probe, scalars, snapshot)


# --- making a recorder --------------------------------------------------------------------------------------------


def _find_layers(model: nn.Module) -> list[tuple[str, BatchRenorm | _BatchNorm]]:
    found: list[tuple[str, BatchRenorm | _BatchNorm]] = []
    for name, module in model.named_modules():
        if isinstance(module, BatchRenorm) or (isinstance(module, _BatchNorm) and module.track_running_stats):
            if module.num_features < 1:
                raise ValueError(f"layer {name!r} has no channels yet; run one forward before it is watched")
            # the names of the user's module, whatever it is wrapped in
            clean = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
            found.append((clean or type(module).__name__, module))
    if not found:
        logger.warning(
            "the model has no normalization layer with moving statistics; its input and scalars are recorded"
        )
    return found


def _describe(index: int, name: str, layer: BatchRenorm | _BatchNorm) -> Layer:
    kind: LayerKind = (
        "BatchRenorm"
        if isinstance(layer, BatchRenorm)
        else "SyncBatchNorm"
        if isinstance(layer, nn.SyncBatchNorm)
        else "BatchNorm"
    )
    return Layer(index=index, name=name, kind=kind, channels=layer.num_features, eps=layer.eps, momentum=layer.momentum)


def _place() -> tuple[int, int]:
    """Global rank of this process, and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(world_size)
    except ValueError:
        raise ValueError(f"RANK and WORLD_SIZE must be integers, got {rank!r} and {world_size!r}") from None


def _shared_run_id(run_id: str | None, run_name: str, rank: int, world_size: int) -> str:
    made = run_id
    if made is None:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", run_name).strip("-").lower()[:60] or "run"
        made = f"{slug}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if dist.is_available() and dist.is_initialized() and world_size > 1:
        shared: list[str] = [made]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    if run_id is None and world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but torch.distributed is not initialized: initialize it before the recorder, "
            "or give every rank the same run_id"
        )
    return made


def _registration(**values: Any) -> RunCreate:
    try:
        return RunCreate(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"run {where}: {first['msg']}, got {first['input']!r}") from None


def _wire_schedule(schedule: RenormSchedule) -> Schedule:
    return Schedule(
        bn_steps=schedule.bn_steps,
        r_steps=schedule.r_steps,
        d_steps=schedule.d_steps,
        r_max=schedule.r_max,
        d_max=schedule.d_max,
    )


def _plain(value: object) -> object:
    """As JSON knows it; anything else as its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)


def _check_at_least(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _sort_scalar(name: str, value: float | Tensor, host: dict[str, float], device: dict[str, Tensor]) -> None:
    if name.startswith("brn/"):
        raise ValueError(f"scalar names beginning with 'brn/' are reserved, got {name!r}")
    if not isinstance(value, Tensor):
        host[name] = float(value)
    elif value.numel() == 1:
        device[name] = value.detach().reshape(())
    else:
        raise ValueError(f"scalar {name!r} must be a number or a tensor of one element, got shape {tuple(value.shape)}")


def _scalar_segments(scalars: dict[str, Tensor]) -> list[Segment]:
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in scalars.items():
        # elsewhere there may be no float64; such a scalar waits for its device
        near = value if value.device.type in ("cpu", "cuda") else value.cpu()
        by_device.setdefault(near.device, {})[name] = near
    return [
        # the bytes of float64 travel as float32: an exact loss in the same copy as the statistics
        Segment(ScalarGroup(tuple(group)), torch.stack([v.double() for v in group.values()]).view(torch.float32))
        for group in by_device.values()
    ]


def _close_at_exit(reference: weakref.ref[Recorder]) -> None:
    recorder = reference()
    if recorder is not None:
        # set by the interpreter when an exception ends the program
        recorder.close("failed" if hasattr(sys, "last_value") else "finished")
