"""The browser that tests drive, how it is started without a screen, and what all tests of pages do with it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import synthetic as made
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

NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]
"""Marks of a file of browser tests."""


def _axe() -> Path | None:
    """axe-core's script, in a folder of npm packages beside the repository, of this user or of the machine."""
    roots = (Path(), Path.home(), Path("/usr/lib"), Path("/usr/local/lib"))
    found = [root / "node_modules" / "axe-core" / "axe.min.js" for root in roots]
    return next((path for path in found if path.is_file()), None)


AXE = _axe()
NEEDS_AXE = pytest.mark.skipif(AXE is None, reason="axe-core is not there (npm install axe-core; .ci/run does)")

LIMITS = {"r_max": 3.0, "r_min": 1 / 3, "d_max": 5.0}


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
    """The first true answer. It has to ask the page: what Playwright keeps of it, as `page.url`, stands still here."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := answer():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def plot(page: Page, figure: str, expression: str) -> Any:
    """A value of the plot element `gd` of a figure."""
    return page.evaluate(f"(() => {{ const gd = document.querySelector('#{figure} .plot'); return {expression}; }})()")


def barriers(page: Page, rules: str) -> list[tuple[str, list[Any]]]:
    """What axe-core, which the page has loaded, finds serious by these rules of its: the rule and the first places."""
    found = page.evaluate(f"axe.run(document, {{runOnly: {rules}}})")
    return [
        (violation["id"], [node["target"] for node in violation["nodes"]][:4])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


def accessible(page: Page) -> None:
    """Fails on what axe-core finds serious in the page as it is, in light and in dark."""
    assert AXE is not None
    page.evaluate(AXE.read_text())
    for theme, rules in (("light", "['wcag2a', 'wcag2aa', 'best-practice']"), ("dark", "['color-contrast']")):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert not (found := barriers(page, rules)), (page.url, theme, found)


def write_more(client: httpx.Client, run_id: str, first: int, last: int, seq: int) -> None:
    steps = range(first, last + 1)
    rows = {
        "layers": made.layer_rows(steps, 3, **LIMITS),
        "scalars": made.scalar_rows({"loss": [(step, 1 / step) for step in steps]}),
    }
    made.send(client, run_id, rows, seq=seq).raise_for_status()


@contextmanager
def wheel_of_time(page: Page) -> Iterator[None]:
    """Fails if an update rebuilt the page instead of the parts that changed."""
    page.evaluate("document.querySelector('h1').dataset.witness = 'same'; window.witness = 'same'")
    yield
    assert page.evaluate("[document.querySelector('h1').dataset.witness, window.witness]") == ["same", "same"]
