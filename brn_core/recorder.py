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
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from brn_core.capture import (
    BatchNormMoments,
    Moving,
    PinnedRing,
    Segment,
    Taken,
    Transfer,
    copies_of_moving,
    host_bytes,
    pack,
)
from brn_core.client import Client
from brn_core.complaints import Complaints
from brn_core.functional import Observation, in_backward
from brn_core.journal import Journal
from brn_core.layers import BatchRenorm
from brn_core.moments import sample_moments
from brn_core.packer import ScalarGroup, StepRows, tables
from brn_core.probe import InputProbe, model_inputs
from brn_core.reducer import Frame, Reducer
from brn_core.shadow import Shadow, cloned, is_wrapper, run_shadow, unwrapped
from brn_core.shipper import Shipper
from brn_core.spool import Spool
from brn_core.termination import on_termination
from brn_core.wire import (
    MAX_FAILURE,
    MAX_SCALAR_NAME,
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


class Recorder:
    """Records a model's normalization layers, input and scalars, and ships them to the service.

    Recorded are BatchRenorm1d/2d/3d, BatchNorm1d/2d/3d and SyncBatchNorm with moving statistics, in training mode: a
    layer in inference mode (frozen) or that does not run in a step has no row for it. Where a layer or the model runs
    several times between two calls of `step` (gradient accumulation, shared layers), the last time counts, with the
    moving statistics that it found. What an activation checkpoint runs again in backward does not count. A
    SyncBatchNorm is recorded with this rank's own samples; over several ranks, which torch has for accelerators only,
    that has not been measured.

    Watch the model as it is trained: after `convert_sync_batchnorm` or `convert_batchnorm`, before the first forward of
    a compiled model (a compiled forward does not notice hooks that come later), and what torch.compile answers rather
    than what it was given, if it is to be one graph. nn.DataParallel and CUDA graphs are out: the former runs copies
    of the layers, the latter none.

    Memory, at most: 64 MiB of steps that wait to be reduced (or a single larger one); about three times 8 MiB of steps
    (or a single larger one) while they are reduced; 64 MiB of reduced steps that wait to be sent, 170 bytes a layer and
    28 bytes a channel in a snapshot. A shadow pass holds a copy of the input and of the buffers.

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
        journal: file in which this rank notes what it sends, one a rank, beside the checkpoint. With `run_id`,
            `start_step` and the same file a resumed training repeats steps, and their rows are stored once; call
            `flush` before each checkpoint, and write none while `repeating`.

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
        journal: str | Path | None = None,
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
        self._logged: set[tuple[str, str]] = set()  # codes and severities of findings

        self._probe = InputProbe()
        self._rings: dict[torch.device, PinnedRing] = {}
        # the layers' own dictionaries: setting an attribute of a Module takes a microsecond, each step, each layer
        self._observing = [
            (i, vars(layer)) for i, (_, layer) in enumerate(self._watched) if isinstance(layer, BatchRenorm)
        ]
        self._batch_norms = {
            i: layer._buffers for i, (_, layer) in enumerate(self._watched) if not isinstance(layer, BatchRenorm)
        }
        self._moving: dict[int, Moving] = {}
        self._taken: dict[int, Taken] = {}
        self._held_bytes = 0  # about how much memory is held by what was taken
        self._sized = False  # whether that is known, and all of it is on the host
        self._probed: Segment | None = None
        self._shadow: Shadow | None = None
        self._shadow_input: tuple[tuple[Any, ...], dict[str, Any]] | None = None

        self._shipper: Shipper[StepRows] = Shipper(
            client,
            registration,
            rank,
            lambda rows: encode_batch(tables(rows)),
            spool=None if spool is None else Spool(spool),
            journal=None if journal is None else Journal(Path(journal), registration.id, start_step),
            sends_leftovers=os.environ.get("LOCAL_RANK", str(rank)) == "0",
            flush_seconds=flush_seconds,
            on_acknowledged=self._acknowledged if rank == 0 else None,
        )
        self._reducer = Reducer(
            [layer.eps for layer in self._layers],
            every,
            self._shipper,
            lambda: self.dropped_steps,
            flush_seconds=flush_seconds,
        )
        self._handles = self._hook()
        self._arm()
        atexit.register(_close_at_exit, weakref.ref(self))
        self._settled = on_termination(partial(_close_on_signal, weakref.ref(self)))
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
        return self._reducer.dropped + self._shipper.dropped

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
        for name, value in (scalars if loss is None else {"loss": loss, **scalars}).items():
            try:  # one that is no number does not take the others with it
                _sort_scalar(name, value, host, device)
            except Exception as error:
                self._went_wrong(error)
        if self._shadow is not None:
            with self._border():
                self._shadow_scalars(self._shadow, shadow_loss, device)
        try:  # not the border's with-statement, which costs as much as the rest
            self._hand_over(step, host, device)
        except Exception as error:
            self._went_wrong(error)
        self._arm()

    @property
    def repeating(self) -> bool:
        """Whether a resumed training still repeats the batch in its journal: a checkpoint now would lose a part of it.

        That ends after a step or so more than lay between two checkpoints before.
        """
        return self._shipper.repeating

    def flush(self, *, timeout_seconds: float = 10.0) -> bool:
        """Wait until every step given to `step` is stored, in the spool, or counted as dropped: before a checkpoint.

        Returns:
            Whether that is so; False after the timeout, and where the journal's last batch is being repeated.
        """
        if self._closed or os.getpid() != self._pid:
            return True
        until = time.monotonic() + timeout_seconds
        reduced = self._reducer.flush(timeout_seconds)
        return reduced and self._shipper.flush(max(until - time.monotonic(), 0.0))

    def close(
        self,
        status: Literal["finished", "failed"] = "finished",
        *,
        failure: str | None = None,
        timeout_seconds: float = 5.0,
    ) -> None:
        """Stop watching, send what waits, say how the run ended. Later calls do nothing.

        Args:
            status: how the training ended; rank 0's word counts.
            failure: why it failed, for people; rank 0's word counts.
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
        for _, layer in self._observing:
            layer["observe"], layer["observed"] = False, None
        with self._border():
            ended = self._reducer.close(timeout_seconds)
            left = max(deadline - time.monotonic(), 0.0)
            said: dict[str, Any] = {} if failure is None else {"failure": failure[:MAX_FAILURE]}
            end = RunUpdate(status=status, **said)
            ended &= self._shipper.close(timeout_seconds=left, end=end, dropped_steps=self._reducer.dropped)
            if not ended:
                logger.warning("run %s: a sending thread still hangs in a connection to %s", self.run_id, self._url)
        if self.dropped_steps:
            logger.warning("run %s: %d recorded steps were dropped", self.run_id, self.dropped_steps)
        self._settled()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            text = str(error).partition("\n")[0]
            self.close("failed", failure=f"rank {self.rank}: {type(error).__name__}" + (f": {text}" if text else ""))

    # --- around the forward pass ----------------------------------------------------------------------------------

    def _hook(self) -> list[RemovableHandle]:
        handles = [
            layer.register_forward_pre_hook(_Hook(self._batch_norm_hook(index)), with_kwargs=True)
            for index, (_, layer) in enumerate(self._watched)
            if not isinstance(layer, BatchRenorm)
        ]
        # not compiled where the model is compiled after it was watched; the layers' hooks are, without a graph break
        before, after = map(torch.compiler.disable, (self._before_forward, self._after_forward))
        handles.append(self._model.register_forward_pre_hook(_Hook(before), with_kwargs=True))
        inner = unwrapped(self._model)
        # inside the wrappers, as DistributedDataParallel first sends rank 0's buffers, and not where it is further down
        if self._batch_norms and not any(map(is_wrapper, inner.modules())):
            handles.append(inner.register_forward_pre_hook(_Hook(self._copy_moving)))
        if self._shadow_every:
            handles.append(self._model.register_forward_hook(_Hook(after), with_kwargs=True))
        return handles

    def _batch_norm_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_batch_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._due or not module.training or in_backward():
                return
            try:  # not the border's with-statement, which costs as much as the rest
                self._take_moments(index, module, args[0] if args else kwargs["input"])
            except Exception as error:
                self._went_wrong(error)

        return before_batch_norm

    def _take_moments(self, index: int, module: nn.Module, x: Tensor) -> None:
        # not as attributes: each is a call of Module.__getattr__
        running_mean, running_var = module._buffers["running_mean"], module._buffers["running_var"]
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        if x.numel() == 0:  # there is nothing to say of an empty batch
            return
        mean_NC, var_NC = sample_moments(x)
        if var_NC is None:
            mean_NC = mean_NC.clone()  # without positions it may be the input itself, which may change
        compiling = torch.compiler.is_compiling()
        if compiling or not mean_NC.is_cpu:
            self._sized = False
        elif index not in self._taken:  # now, while the tensor is in the caches: after the step it is dearer
            self._held_bytes += 2 * mean_NC.nbytes
        moving = None if compiling else self._moving.pop(index, None)
        if moving is not None and moving.still(running_mean, running_var):
            self._taken[index] = BatchNormMoments(mean_NC, var_NC, moving.mean_C, moving.var_C)
        else:  # compiled, the layer's second time in this forward, or called outside of the model's
            self._taken[index] = BatchNormMoments(mean_NC, var_NC, running_mean.clone(), running_var.clone())

    def _copy_moving(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not self._due or not module.training or in_backward():
            return
        with self._border():
            self._moving = copies_of_moving(self._batch_norms)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._due and module.training and torch.is_grad_enabled():
            with self._border():
                self._probed = self._probe.measure((args, model_inputs(unwrapped(module), kwargs)))
        if self._shadow_due and module.training and torch.is_grad_enabled() and os.getpid() == self._pid:
            with self._border():  # now: the model may work in place on its input
                self._shadow_input = cloned((args, kwargs))

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._shadow_due and module.training and torch.is_grad_enabled() and os.getpid() == self._pid:
            with self._border():
                if self._shadow_input is not None:
                    self._shadow = run_shadow(module, *self._shadow_input, output)
                    self._shadow_input = None

    # --- at the end of a step -------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Say what the coming step is asked for, and forget what the last one left."""
        self._due = self._step % self._every == 0
        self._shadow_due = self._shadow_every > 0 and self._step > 0 and self._step % self._shadow_every == 0
        self._taken, self._moving = {}, {}
        self._held_bytes, self._sized = 0, not self._observing
        self._probed = self._shadow = self._shadow_input = None
        for _, layer in self._observing:
            layer["observe"], layer["observed"] = self._due, None

    @staticmethod
    def _shadow_scalars(shadow: Shadow, loss: Callable[[Any], Tensor] | None, device: dict[str, Tensor]) -> None:
        if (disagreement := shadow.disagreement()) is not None:
            device[SCALAR_SHADOW_DISAGREEMENT] = disagreement
        if loss is not None:
            device[SCALAR_SHADOW_TRAIN_LOSS], device[SCALAR_SHADOW_EVAL_LOSS] = shadow.losses(loss)

    def _hand_over(self, step: int, host: dict[str, float], device: dict[str, Tensor]) -> None:
        taken = self._all_taken()
        segments = _scalar_segments(device) if device else []
        if self._probed is not None:
            segments.append(self._probed)
            if not taken and any(layer.training for _, layer in self._watched):
                self._complaints.say(
                    "unseen",
                    f"the model ran, but none of its {len(self._watched)} normalization layers was seen to: "
                    "watch a compiled model before its first forward, and no nn.DataParallel or CUDA graph",
                )
        size = self._held_bytes if self._sized else host_bytes(taken)
        if size is None:
            # on its own device and stream, where a few kernels more do not make training wait
            segments, taken, size = pack({step: taken}) + segments, {}, 0
        transfer = Transfer.start(segments, self._rings)
        snapshot = self.rank == 0 and self._channels_every > 0 and step % self._channels_every == 0
        self._reducer.offer(Frame(step, taken, transfer, host, snapshot, size + transfer.size_bytes))

    def _all_taken(self) -> dict[int, Taken]:
        taken = self._taken
        for index, layer in self._observing:
            observation: Observation | None = layer["observed"]
            if observation is None or observation.mean_NC.shape[0] == 0:
                continue
            if observation.var_NC is None:  # it may be the layer's input itself, which may change
                observation = observation._replace(mean_NC=observation.mean_NC.clone())
            taken[index] = observation
        return taken

    def _acknowledged(self, acknowledgement: Mapping[str, Any]) -> None:
        """Log each finding of the service once, and again where it got worse (in the shipper's thread, rank 0)."""
        findings = acknowledgement.get("findings")
        for finding in findings if isinstance(findings, list) else []:
            if not isinstance(finding, Mapping):
                continue
            code, severity = str(finding.get("code")), str(finding.get("severity"))
            if (code, severity) in self._logged or severity not in ("warning", "critical"):
                continue
            self._logged.add((code, severity))
            level = logging.ERROR if severity == "critical" else logging.WARNING
            since = f" since step {finding['since']}" if "since" in finding else ""  # an older service does not say
            logger.log(level, "%s%s: %s See %s/runs/%s", code, since, finding.get("summary"), self._url, self.run_id)

    @contextmanager
    def _border(self) -> Iterator[None]:
        """The line that no error of recording crosses into training."""
        try:
            yield
        except Exception as error:
            self._went_wrong(error)

    def _went_wrong(self, error: Exception) -> None:
        """Call it while `error` is handled."""
        if self._strict:
            raise error
        kind = type(error).__name__
        self._complaints.say(kind, f"recording failed, training goes on: {kind}: {error}")


def watch(model: nn.Module, **settings: Any) -> Recorder:
    """Record what normalization does in `model`; the keyword arguments are those of `Recorder`.

    A step is what lies between two calls of the recorder's `step`, one an optimizer step. With gradient accumulation,
    or where the model runs several times a step, each layer and the input have one row a step: that of the last
    training forward, whose samples alone it counts, so `batch_size` is that of one forward. What the forwards before
    it did to the moving statistics is in those that it found; else they are not seen.
    """
    return Recorder(model, **settings)


class _Hook(partial[None]):
    """A hook that stays with its module: copies and pickles of the module (averaged models, checkpoints) get none."""

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    def __call__(self, *args: Any) -> None:
        """Nothing: this module is not watched."""


# --- making a recorder --------------------------------------------------------------------------------------------


def _find_layers(model: nn.Module) -> list[tuple[str, BatchRenorm | _BatchNorm]]:
    found: list[tuple[str, BatchRenorm | _BatchNorm]] = []
    own_name = {"": ""}  # the name in the user's module, whatever it is wrapped in
    for name, module in model.named_modules():
        if name:
            parent, _, part = name.rpartition(".")
            part = "" if is_wrapper(model.get_submodule(parent)) else part
            own_name[name] = ".".join(filter(None, (own_name[parent], part)))
        if isinstance(module, BatchRenorm) or (isinstance(module, _BatchNorm) and module.running_mean is not None):
            if module.num_features < 1:
                raise ValueError(f"layer {name!r} has no channels yet; run one forward before it is watched")
            found.append((own_name[name] or type(module).__name__, module))
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
    if not 1 <= len(name) <= MAX_SCALAR_NAME:  # the service would refuse the whole batch
        raise ValueError(f"a scalar's name must have 1 to {MAX_SCALAR_NAME} characters, got {len(name)}: {name[:40]!r}")
    if not isinstance(value, Tensor):
        host[name] = float(value)
    elif value.numel() == 1 and value.is_cpu:
        host[name] = value.item()  # waits for nothing, and costs a tenth of what a copy does
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


def _close_on_signal(reference: weakref.ref[Recorder], seconds: float) -> None:
    recorder = reference()
    if recorder is not None:
        recorder.close("failed", timeout_seconds=seconds)
