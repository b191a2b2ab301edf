"""A training of a few milliseconds a step, watched or not, for tests that run it in processes of its own."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brn_core.layers import BatchRenorm1d
from brn_core.recorder import Recorder, watch

LAYERS = 2  # that are recorded

torch.set_num_threads(1)


def losses_of(
    steps: int,
    *,
    poisoned: bool = False,
    record: dict[str, Any] | None = None,
    after: Callable[[int, Recorder | None], bool] = lambda step, recorder: True,
) -> tuple[list[str], int]:
    """Trains a small network; its losses to the last bit, as text, and how many recorded steps were dropped.

    Args:
        steps: optimizer steps.
        poisoned: whether NaN and infinity are among the input.
        record: settings of the recorder; None: unwatched.
        after: called after each step; whether to go on.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), BatchRenorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recorder = None if record is None else watch(model, **record)
    losses = []
    for step in range(steps):
        x_NC = torch.randn(16, 4)
        if poisoned:
            x_NC[step % 16, step % 4] = (torch.nan, torch.inf, -torch.inf)[step % 3]
        loss = model(x_NC).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if recorder is not None:
            recorder.step(loss, **({"bad": float("inf")} if poisoned else {}))
        losses.append(loss.item().hex())
        if not after(step, recorder):
            break
    if recorder is not None:
        recorder.close(timeout_seconds=2.0)
    return losses, 0 if recorder is None else recorder.dropped_steps


def run(
    result: str,
    steps: int,
    record: dict[str, Any],
    *,
    poisoned: bool = False,
    step_seconds: float = 0.0,
    file_bytes: int | None = None,
    room_again: str | None = None,
    stop: str | None = None,
    forks_at: int | None = None,
    jumping_clock: bool = False,
    rank: tuple[int, int] | None = None,
) -> None:
    """Trains, watched, and writes losses and drops to the file `result`.

    Args:
        result: path of a JSON file.
        steps: optimizer steps.
        record: settings of the recorder.
        poisoned: whether NaN and infinity are among the input.
        step_seconds: time a step takes at least, so that something can happen meanwhile.
        file_bytes: largest file this process can write: what is longer finds a full disk. Half-way, when steps were
            lost to that, the disk has room again as soon as the file `room_again` is there; until then the process
            waits, and says so by the file `room_again`.waiting.
        stop: path of a file that ends the training when it appears.
        forks_at: step after which a copy of this process trains on, and ends.
        jumping_clock: whether the time of day jumps by hours.
        rank: global rank and number of ranks.
    """
    if rank is not None:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = map(str, rank)
    if jumping_clock:
        _let_the_clock_jump()
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    parent = os.getpid()

    def after(step: int, recorder: Recorder | None) -> bool:
        assert recorder is not None
        time.sleep(step_seconds)
        if step == forks_at:
            os.fork()
        if room_again is not None and step == steps // 2:
            while not recorder.dropped_steps:
                time.sleep(0.01)
            Path(f"{room_again}.waiting").touch()
            while not Path(room_again).exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return stop is None or not Path(stop).exists()

    losses, dropped = losses_of(steps, poisoned=poisoned, record=record, after=after)
    if os.getpid() != parent:
        sys.exit(0)
    beside = Path(f"{result}.partial")
    beside.write_text(json.dumps({"losses": losses, "dropped": dropped}))
    beside.replace(result)
    if forks_at is not None:
        os.wait()


def _let_the_clock_jump() -> None:
    real, jumps = time.time_ns, random.Random(0)

    def time_ns() -> int:
        return real() + jumps.randrange(-10, 10) * 3_600_000_000_000

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    run(**json.loads(sys.argv[1]))
