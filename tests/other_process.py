"""Stores in a process of their own: chDB allows one a process, and that of the tests has the session's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code that has `open_store()`, over the path that is the first argument, and `batch(seq)` of its run `a`."""
    prelude = """
import sys, pyarrow as pa
from datetime import UTC, datetime
from service.errors import CannotStart
from service.settings import Settings
from service.store import Batch, Store
from synthetic import layer_rows, run_record, scalar_rows
open_store = lambda: Store(Settings(store=f"chdb://{sys.argv[1]}"))
def batch(seq, layers=2, run="a", rank=0):
    tables = {"layers": layer_rows([seq], layers), "scalars": scalar_rows({"loss": [(seq, 1.0)]})}
    return Batch(store.record(run), rank, seq, tables)
"""
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
