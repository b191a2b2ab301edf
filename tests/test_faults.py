"""`brn-train --fault NAME`: each goes through recorder, spool and store, and the service finds what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from brn_core.worker.faults import BREAKS_AT, FAULTS, FaultName
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import SamplerKind, UsageError, parse_settings
from brn_core.worker.train import train
from service import windows
from service.diagnosis.finding import Diagnosis, Finding
from service.diagnosis.rules import CAUSES, CODES
from service.recordings import keep, recording
from service.store import Store

ROOT = Path(__file__).parents[1]
ALONE = tuple(name for name, fault in FAULTS.items() if fault.settings.get("ranks", 1) == 1)
TOGETHER = tuple(name for name in FAULTS if name not in ALONE)
WITH_ITS_CAUSE = {"NH-GAP": "NH-CLUSTER", "NH-POOLBIAS": "NH-CLUSTER"}
"""Faults that provoke a consequence by way of a cause, which the verdict then names."""
WHERE = {
    "NH-NONFINITE": {"steps": (BREAKS_AT, 79), "layers": ("norm1",), "ranks": (0,)},
    "NH-DEAD": {"layers": ("norm1",)},
    "NH-LAG": {"layers": ("norm3",)},
    "NH-MISSING": {"steps": (BREAKS_AT - 1, 179), "ranks": (1,)},
    "NH-RANKDUP": {"ranks": (0, 1)},
}
"""What a finding must say of its place, where the fault has one."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of this small a network more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """A URL at which nothing listens, so that all is spooled."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def spool_of_ranks(nowhere: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spool = tmp_path_factory.mktemp("ranks")
    trainings = [json.dumps(flags_of(name, nowhere, spool / name)) for name in TOGETHER]
    command = [sys.executable, str(Path(__file__).with_name("trainings_of_ranks.py")), *trainings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return spool


def flags_of(name: str, url: str, spool: Path) -> list[str]:
    flags = ["--fault", name, "--run-id", name, "--url", url, "--spool", str(spool)]
    return [*flags, "--eval-every", "0", "--device", "cpu"]


def diagnosed(store: Store, spool: Path) -> Diagnosis:
    found = recording(spool)
    keep(store, found)
    return windows.diagnosis(store, found.record.id)


def check(name: str, diagnosis: Diagnosis) -> None:
    found: Finding | None = next((f for f in diagnosis.findings if f.code == name), None)
    assert found is not None, diagnosis.findings
    if name in (*CAUSES, *WITH_ITS_CAUSE) and found.severity in ("warning", "critical"):
        assert diagnosis.verdict.code == WITH_ITS_CAUSE.get(name, name)
    for part, expected in WHERE.get(name, {}).items():
        assert getattr(found, part) == expected


@pytest.mark.parametrize("name", ALONE)
def test_a_fault_of_one_rank_is_found(name: str, nowhere: str, store: Store, tmp_path: Path) -> None:
    train(parse_settings(flags_of(name, nowhere, tmp_path)), Rank())

    check(name, diagnosed(store, tmp_path))


@pytest.mark.parametrize("name", TOGETHER)
def test_a_fault_between_ranks_is_found(name: str, spool_of_ranks: Path, store: Store) -> None:
    check(name, diagnosed(store, spool_of_ranks / name))


SAMPLERS = dict(
    re.findall(r"^\| `([a-z-]+)` \| .+ \| (`[A-Z].+) \|$", (ROOT / "docs/worker.md").read_text(), re.MULTILINE)
)


def test_the_documentation_says_of_every_sampler_how_it_is_found() -> None:
    assert set(SAMPLERS) == set(get_args(SamplerKind))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"rank-skewed"}))  # needs ranks: that is --fault NH-RANKSKEW
def test_a_sampler_is_found_as_the_documentation_says(name: str, nowhere: str, store: Store, tmp_path: Path) -> None:
    flags = ["--sampler", name, "--run-id", f"sampler-{name}", "--url", nowhere, "--spool", str(tmp_path)]
    train(parse_settings([*flags, "--steps", "600", "--eval-every", "0", "--device", "cpu"]), Rank())
    verdict, *others = re.findall("`([A-Z-]+)`", SAMPLERS[name])

    diagnosis = diagnosed(store, tmp_path)

    assert diagnosis.verdict.code == verdict
    assert set(others) <= {finding.code for finding in diagnosis.findings}


def test_every_code_but_the_neutral_ones_has_a_fault() -> None:
    assert set(get_args(FaultName)) == set(FAULTS) == set(CODES) - {"NO_DATA", "WARMUP", "HEALTHY"}


def test_what_is_given_wins_over_what_a_fault_brings() -> None:
    settings = parse_settings(["--fault", "NH-CLUSTER", "--labels-per-batch", "1"])

    assert (settings.labels_per_batch, settings.sampler, settings.steps) == (1, "few-labels", 100)
    assert settings.recorded()["fault"] == "NH-CLUSTER"
    with pytest.raises(UsageError, match="--fault"):
        parse_settings(["--fault", "NH-NONSENSE"])


def test_the_documentation_says_what_each_fault_does() -> None:
    text = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--fault (\S+)` \| (.+) \|$", text, flags=re.MULTILINE)

    assert rows == [(name, fault.what) for name, fault in FAULTS.items()]
