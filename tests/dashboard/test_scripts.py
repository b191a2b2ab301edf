"""The page's own scripts, typed by JSDoc."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dashboard.templating import STATIC

TSC = Path(__file__).parents[2] / "node_modules" / ".bin" / "tsc"
STRICT = (
    "--noEmit", "--allowJs", "--checkJs", "--strict",
    "--target", "es2022", "--module", "es2022", "--lib", "es2023,dom,dom.iterable",
)  # fmt: skip


@pytest.mark.skipif(not TSC.is_file(), reason="typescript is not there (npm install --no-save typescript)")
def test_types_agree() -> None:
    found = subprocess.run([TSC, *STRICT, *sorted(STATIC.glob("*.js"))], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
