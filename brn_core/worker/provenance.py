"""Where a run comes from: the revision of the user's code, the versions below it, the device. Stored with the run."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import brn_core

_GIT_SECONDS: Final = 5.0


def provenance(device: torch.device) -> dict[str, Any]:
    """Code revision of the working directory, library versions and device, as JSON has them.

    `git_revision` and `git_dirty` are None where the working directory is in no git repository.
    """
    revision = _git("rev-parse", "HEAD")
    changes = None if revision is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": revision,
        "git_dirty": None if changes is None else bool(changes),
        "brn_version": brn_core.__version__,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "cuda_version": torch.version.cuda,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    # a lock that `status` takes to refresh its index would disturb the user's own git
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return named or platform.processor() or platform.machine()
