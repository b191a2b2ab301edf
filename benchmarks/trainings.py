"""Real trainings for benchmarks/verdicts.py: brn-train on digits, kept in spools, judged from a store of their own.

One process trains one after the other, for single ranks; two processes do those of two ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from brn_core.worker.ranks import Rank
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import train
from service import windows
from service.diagnosis.window import Window
from service.recordings import keep, recording
from service.store import Store

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # discard: nothing listens there, so everything is spooled


@dataclass(frozen=True)
class Training:
    """A kind of training: its flags, and the code that should be found.

    Attributes:
        name: for the table.
        flags: of brn-train.
        code: None where nothing should warn.
        within: steps after the onset by which it should be found.
        onset: step at which the fault begins, or from which on a rule may speak at all.
        verdict: code that the verdict should have; None: `code`.
        norms: to train with.
        ranks: processes.
    """

    name: str
    flags: str
    code: str | None = None
    within: int = 300
    onset: int = 0
    verdict: str | None = None
    norms: tuple[str, ...] = ("bn", "brn")
    ranks: int = 1


_LATE = "--bn-steps 250 --r-steps 400 --d-steps 350"  # earlier, the loss may really rise: NH-SCHED-FAST
# "within" counts from the step at which the moving statistics have forgotten their beginning (5 time constants) or,
# for NH-GAP, have settled (25): before, no rule that needs them speaks.
TRAININGS = (
    Training("i.i.d., N = 32, limits open after 25 time constants", f"--steps 600 {_LATE}"),
    Training(
        "i.i.d., 2 ranks x 16, limits open after 25 time constants", f"--steps 600 --batch-size 16 {_LATE}", ranks=2
    ),
    Training("i.i.d., N = 32, 100 classes (two digits an image)", f"--steps 600 --dataset digit-pairs {_LATE}"),
    Training("i.i.d., N = 32, a fifth of the learning rate", f"--steps 600 --lr 0.01 {_LATE}"),
    Training("2 labels a batch", "--steps 300 --sampler few-labels", "NH-CLUSTER", 150),
    Training("one label set a rank", "--steps 300 --batch-size 16 --sampler rank-skewed", "NH-RANKSKEW", 150, ranks=2),
    Training("microbatch 2", "--steps 300 --batch-size 2", "NH-SMALL", onset=50),
    Training("augmentation per batch", "--fault NH-GAP", "NH-GAP", onset=125, verdict="NH-CLUSTER", norms=("bn",)),
    Training(
        "augmentation per batch", "--fault NH-POOLBIAS", "NH-POOLBIAS", onset=25, verdict="NH-CLUSTER", norms=("bn",)
    ),
    Training("limits at 1.02 and .05", "--fault NH-CLIP", "NH-CLIP", norms=("brn",)),
    Training("limits stay closed", "--fault NH-SCHED-SLOW", "NH-SCHED-SLOW", onset=40, norms=("brn",)),
    Training("limits open on trailing statistics", "--fault NH-SCHED-FAST", "NH-SCHED-FAST", onset=60, norms=("brn",)),
    Training("moving statistics in training", "--fault NH-RUNAWAY", "NH-RUNAWAY", norms=("ema",)),
    Training("a quarter of the channels zero", "--fault NH-DEAD", "NH-DEAD"),
    Training("a NaN in the input", "--fault NH-NONFINITE", "NH-NONFINITE", onset=60),
    Training("2 % of images ten times as bright", "--fault NH-TAIL", "NH-TAIL"),
    Training("deep means pinned", "--steps 200", "NH-COUPLED", norms=("bn",)),
)


def recorded(training: Training, seeds: int, seeds_from: int, store: Store, folder: Path) -> Iterator[Window]:
    """What is stored of each seed and norm of a training; none is longer than a window.

    Those whose spools are in `folder` were done before; the others are done now, and left there.
    """
    slug = re.sub("[^a-z0-9]+", "-", f"{training.name} {training.code or ''}".lower()).strip("-")
    names = [f"{slug}-{norm}-{seed}" for norm in training.norms for seed in range(seeds_from, seeds_from + seeds)]
    missing = [name for name in names if not (folder / name).exists()]
    commands = []
    for name in missing:
        norm, seed = name.split("-")[-2:]
        spool = folder / f"{name}.partial"
        shutil.rmtree(spool, ignore_errors=True)
        flags = f"{training.flags} --norm {norm} --seed {seed} --run-id {name} --url {NOWHERE} --spool {spool}"
        commands.append(f"{flags} --device cpu --eval-every 0 --shadow-every 5".split())
    if training.ranks > 1 and commands:
        script = ROOT / "tests" / "trainings_of_ranks.py"
        done = subprocess.run(
            [sys.executable, str(script), *map(json.dumps, commands)],
            check=False,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the training {training.name!r} of {training.ranks} ranks failed:\n{done.stderr}")
    for name, command in zip(missing, commands, strict=True):
        if training.ranks == 1:
            torch.set_num_threads(1)
            train(parse_settings(command), Rank())
        (folder / f"{name}.partial").rename(folder / name)
    for name in names:
        found = recording(folder / name)
        keep(store, found)
        yield windows.window(store, found.record.id)
