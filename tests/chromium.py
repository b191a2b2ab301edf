"""The browser that tests drive, how it is started without a screen, and what is asked of its pages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)


def _axe() -> Path | None:
    """axe-core's script, in a folder of npm packages beside the repository, of this user or of the machine."""
    roots = (Path(), Path.home(), Path("/usr/lib"), Path("/usr/local/lib"))
    found = [root / "node_modules" / "axe-core" / "axe.min.js" for root in roots]
    return next((path for path in found if path.is_file()), None)


AXE = _axe()


@dataclass
class Window:
    """A page and what went wrong in it."""

    page: Page
    wrong: list[str] = field(default_factory=list)


def drawn(page: Page) -> None:
    """Brings every figure into sight, which is when it is drawn, and waits for it; then back to the top."""
    for panel in page.locator(".panel[data-figure]:not([hidden])").all():
        panel.scroll_into_view_if_needed()
        expect(panel).to_have_attribute("data-state", "ready", timeout=PATIENCE_MS)
    page.evaluate("scrollTo(0, 0)")


def eventually(answer: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := answer():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def plot(page: Page, figure: str, expression: str) -> Any:
    """A value of the plot element `gd` of a figure."""
    return page.evaluate(f"(() => {{ const gd = document.querySelector('#{figure} .plot'); return {expression}; }})()")
