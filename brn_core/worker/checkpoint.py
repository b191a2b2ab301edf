"""Checkpoints: everything that a killed training needs to go on as if nothing had happened, in one file.

    FOLDER/checkpoint.pt      the newest checkpoint, written by rank 0: whole or not at all
    FOLDER/journal-<rank>     which batch of rows that rank began to send last (`brn_core.journal`)

The file holds what is common to all ranks (weights, moving statistics, optimizer, averaged weights, loss scale, step,
run id, settings) once, and what differs (random generators, sampler, statistics of the last steps) for each rank. Every
rank reads it, so several hosts need a folder that they share.
"""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from brn_core.atomic import replacing
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import Settings, UsageError

logger = logging.getLogger("brn_core")

_FORMAT: Final = 1
_REPORTED: Final = 3
"""Most settings that are named where a checkpoint contradicts the command line."""


class Checkpoints:
    """The checkpoint folder of a run, as one of its ranks sees it.

    Args:
        settings: of this process; a checkpoint of a training with others is refused.
        rank: which process of the run this is; torch.distributed is initialized where there are several.

    Raises:
        UsageError: the folder cannot be written or read, its checkpoint is of another training, or there is one and
            `--resume` was not said.
    """

    def __init__(self, settings: Settings, rank: Rank) -> None:
        assert settings.checkpoint is not None
        self._settings, self._rank = settings, rank
        self._folder = Path(settings.checkpoint).expanduser()
        self._path = self._folder / "checkpoint.pt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission to write there")
        except OSError as error:
            raise UsageError(f"--checkpoint {self._folder}: {error.strerror or error}; name another folder") from None
        self.loaded = self._load()

    @property
    def journal(self) -> Path:
        """The journal for the recorder of this rank."""
        return self._folder / f"journal-{self._rank.rank}"

    @property
    def step(self) -> int:
        """Optimizer steps that are done; 0 in a new training."""
        return 0 if self.loaded is None else int(self.loaded["step"])

    @property
    def run_id(self) -> str | None:
        """Id of the run that goes on; None in a new training, or if it was not recorded."""
        return None if self.loaded is None else self.loaded["run_id"]

    @property
    def own(self) -> Mapping[str, Any]:
        """What this rank saved of its own; only where there is a checkpoint."""
        assert self.loaded is not None
        own: Mapping[str, Any] = self.loaded["ranks"][self._rank.rank]
        return own

    def restore_random_state(self) -> None:
        """Puts this rank's random generators where they were; nothing in a new training."""
        if self.loaded is not None:
            restore_random_state(self.own["random"])

    def save(
        self, step: int, run_id: str | None, common: Mapping[str, Any], own: Mapping[str, Any], *, put_off: bool = False
    ) -> None:
        """Replace the checkpoint, on every rank together; returns when it is on rank 0's disk.

        Syncs the device.

        Args:
            step: optimizer steps that are done.
            run_id: id of the run in the service.
            common: states that are the same on every rank.
            own: states of this rank.
            put_off: whether this rank cannot have one now; where any rank cannot, the one before stays.
        """
        ranks: list[Any] | None = [None] * self._rank.world_size if self._rank.is_first else None
        mine: dict[str, Any] = {**own, "random": random_state(), "put_off": put_off}
        if self._rank.world_size > 1:
            dist.gather_object(mine, ranks, dst=0)
        else:
            ranks = [mine]
        if ranks is not None and any(states.pop("put_off") for states in list(ranks)):
            logger.info("checkpoint at step %d is put off: rows of before the last kill are being repeated", step)
        elif self._rank.is_first:
            content = {
                "format": _FORMAT,
                "step": step,
                "run_id": run_id,
                "settings": self._settings.training(),
                "ranks": ranks,
                **common,
            }
            # in memory first: a disk that fills up while torch.save writes to it becomes torch's own RuntimeError
            packed = io.BytesIO()
            torch.save(content, packed)
            try:
                with replacing(self._path) as file:
                    file.write(packed.getbuffer())
            except OSError as error:
                if step == 0:  # it never will be
                    raise UsageError(f"--checkpoint {self._folder}: {error}; name another folder") from None
                logger.error(
                    "checkpoint at step %d could not be written: %s; the one before stays, training goes on",
                    step,
                    error,
                )

    def _load(self) -> dict[str, Any] | None:
        found = self._read() if self._path.exists() else None
        if found is not None and not self._settings.resume:
            raise UsageError(
                f"--checkpoint {self._folder} holds a checkpoint at step {found['step']} of run {found['run_id']}: "
                "--resume goes on with it; else name another folder"
            )
        steps: list[int | None] = [None] * self._rank.world_size
        if self._rank.world_size > 1:
            dist.all_gather_object(steps, None if found is None else found["step"])
            if len(set(steps)) > 1:
                raise UsageError(
                    f"--checkpoint {self._folder}: the ranks do not see the same checkpoint there (at steps {steps}): "
                    "name a folder that all hosts share"
                )
        return found

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise UsageError(f"{self._path} cannot be read: {type(error).__name__}: {text}") from None
        if found.get("format") != _FORMAT:
            raise UsageError(f"{self._path} is of another version of brn-train (format {found.get('format')})")
        if self._settings.resume:
            self._check_settings(found)
        return found

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        if len(found["ranks"]) != self._rank.world_size:
            raise UsageError(
                f"{self._path} is of a training with {len(found['ranks'])} ranks, this one has "
                f"{self._rank.world_size}: each rank has its own place in the data"
            )
        if self._settings.run_id not in (None, found["run_id"]):
            raise UsageError(
                f"{self._path} is of run {found['run_id']}, got --run-id {self._settings.run_id}: leave it out"
            )
        before, now = found["settings"], self._settings.training()
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if differing:
            told = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differing[:_REPORTED]]
            told += ["..."] * (len(differing) > _REPORTED)
            raise UsageError(f"--resume goes on with the same training, but {', '.join(told)}; see {self._path}")


def random_state() -> dict[str, Any]:
    """Every global random generator of this process, as plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave; generators of devices that are not there any more are left out."""
    torch.set_rng_state(state["torch"])
    for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
