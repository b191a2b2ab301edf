"""A real Chromium. Every test fails on a console error, an uncaught exception or a failed request."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from chromium import CHROMIUM, FLAGS, PATIENCE_MS, Window
from playwright.sync_api import BrowserContext, Request, expect, sync_playwright

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def context(client: httpx.Client) -> Iterator[BrowserContext]:
    """One browser profile for all tests: it compiles plotly.js once."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(base_url=str(client.base_url), viewport={"width": 1440, "height": 900})
        context.set_default_timeout(PATIENCE_MS)
        yield context
        browser.close()


@pytest.fixture
def open_window(context: BrowserContext) -> Iterator[Callable[..., Window]]:
    """Opens a page of the session's service; looks at the end whether anything went wrong in it."""
    opened: list[Window] = []

    def failed(window: Window, request: Request) -> None:
        # what a page was asking for ends when it is left; the tab's icon is the browser's own, dropped at its will
        ends = request.url.endswith(("/events", "/icon.svg")) or "/figures/" in request.url or "fragment" in request.url
        of_no_concern = ends and request.failure == "net::ERR_ABORTED"
        if not of_no_concern:
            window.wrong.append(f"{request.url}: {request.failure}")

    def open_it(path: str, **viewport: int) -> Window:
        page = context.new_page()
        window = Window(page)
        page.on("console", lambda m: window.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: window.wrong.append(str(error)))
        page.on("requestfailed", lambda request: failed(window, request))
        page.on("dialog", lambda dialog: (window.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        if viewport:
            page.set_viewport_size({"width": viewport["width"], "height": viewport["height"]})
        page.goto(path)
        opened.append(window)
        return window

    yield open_it
    wrong = [list(window.wrong) for window in opened]  # before closing, which breaks off requests
    for window in opened:
        window.page.close()
    assert not any(wrong), wrong
