"""The dashboard in a real Chromium. Every test fails on a console error, an uncaught exception or a failed request."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import synthetic as made
from playwright.sync_api import BrowserContext, Page, Request, expect, sync_playwright

from brn_core import wire

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
PATIENCE_MS = 20_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def context(client: httpx.Client) -> Iterator[BrowserContext]:
    """One browser profile for all tests: it compiles plotly.js once."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(base_url=str(client.base_url), viewport={"width": 1440, "height": 900})
        context.set_default_timeout(PATIENCE_MS)
        yield context
        browser.close()


@dataclass
class Window:
    """A page and what went wrong in it."""

    page: Page
    wrong: list[str] = field(default_factory=list)


@pytest.fixture
def open_window(context: BrowserContext) -> Iterator[Callable[..., Window]]:
    """Opens a page of the session's service; looks at the end whether anything went wrong in it."""
    opened: list[Window] = []

    def failed(window: Window, request: Request) -> None:
        # the stream ends when its page is left; the tab's icon is the browser's own request, dropped at its will
        of_no_concern = request.url.endswith(("/events", "/icon.svg")) and request.failure == "net::ERR_ABORTED"
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


def drawn(page: Page) -> None:
    """Waits until all three figures are on the screen."""
    for figure in ("schedule", "heatmap", "scalars"):
        expect(page.locator(f"#{figure}")).to_have_attribute("data-state", "ready", timeout=PATIENCE_MS)


def eventually(answer: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := answer():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def plot(page: Page, figure: str, expression: str) -> Any:
    """A value of the plot element `gd` of a figure."""
    return page.evaluate(f"(() => {{ const gd = document.querySelector('#{figure} .plot'); return {expression}; }})()")


LIMITS = {"r_max": 3.0, "r_min": 1 / 3, "d_max": 5.0}


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


def test_a_run_page_draws_schedule_layer_map_and_loss(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    gap = np.geomspace(0.001, 10, 30)[:, None] * np.ones((1, 3))
    made.write_run(client, run_id, layers=3, steps=30, ranks=2, gap=gap, **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    assert plot(page, "schedule", "Math.min(...gd._fullData.map((trace) => trace.x.length))") > 0
    assert plot(page, "schedule", "gd.querySelectorAll('path.js-line').length") >= 8
    assert plot(page, "schedule", "gd.querySelectorAll('path.js-fill').length") == 4
    assert plot(page, "heatmap", "[gd._fullData[0].z.length, gd._fullData[0].z[0].length]") == [3, 30]
    assert plot(page, "heatmap", "gd.querySelector('.hm image').outerHTML.includes('data:image/png;base64,')")
    assert plot(page, "scalars", "gd.querySelectorAll('path.js-line').length") >= 1
    expect(page.locator("#schedule .caption")).to_contain_text("At step 30 (all layers)")
    expect(page.locator("#findings .verdict h2")).not_to_be_empty()
    expect(page.locator("#live")).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()
    buttons = plot(page, "heatmap", "[...gd.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert buttons
    assert not [title for title in buttons if "Share" in title]


def test_new_rows_move_the_page_and_the_zoom_stays(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=30, **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    expect(page.locator(".steps")).to_contain_text("30")
    page.evaluate("Plotly.relayout(document.querySelector('#schedule .plot'), {'xaxis.range': [5, 15]})")
    with wheel_of_time(page):
        write_more(client, run_id, 31, 47, seq=2)
        expect(page.locator(".steps")).to_contain_text("47", timeout=PATIENCE_MS)
        eventually(
            lambda: plot(page, "schedule", "gd._fullData.find((t) => t.name.startsWith('r:')).x.at(-1)") == 47,
            "the newest step in the schedule view",
        )
        eventually(lambda: plot(page, "heatmap", "gd._fullData[0].x.at(-1)") == 47, "the newest step in the layer map")
    assert plot(page, "schedule", "[...gd.layout.xaxis.range]") == [5, 15]
    client.patch(f"/v1/runs/{run_id}", json={"status": "finished"}).raise_for_status()
    expect(page.locator(".facts .state")).to_have_text("finished")


def test_the_selectors_change_the_figures_and_the_address(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, clip_r=[[0.1, 0.2, 0.3]], **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    page.locator("#stat").select_option("clip_r")
    eventually(lambda: plot(page, "heatmap", "gd._fullData[0].name") == "clip_r", "the other statistic")
    assert plot(page, "heatmap", "gd._fullData[0].customdata[2][0]") == pytest.approx(0.3)
    expect(page.locator("#heatmap .caption")).to_have_text(wire.METRIC["clip_r"].meaning)

    page.locator("#heatmap .nsewdrag").first.hover()
    expect(page.locator("#heatmap .hovertext")).to_contain_text("channels with r clipped (share)")
    page.locator("#heatmap .nsewdrag").first.click()
    expect(page.locator("#schedule .caption")).to_contain_text("(block1.bn)")
    expect(page.locator("#layer")).to_have_value("1")
    assert page.url.endswith("?layer=1&stat=clip_r")

    page.reload()  # the address is the view
    drawn(page)
    expect(page.locator("#stat")).to_have_value("clip_r")
    expect(page.locator("#layer")).to_have_value("1")
    expect(page.locator("#schedule .caption")).to_contain_text("(block1.bn)")
    assert plot(page, "heatmap", "gd._fullData[0].name") == "clip_r"


def test_names_from_users_stay_text(client: httpx.Client, run_id: str, open_window: Callable[..., Window]) -> None:
    bad = "<img src=/nowhere onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>x</a>"
    record = made.run_record(run_id, name=bad, config={bad: bad})
    layers = tuple(layer.model_copy(update={"name": f"{bad}{layer.index}"}) for layer in record.layers)
    made.create(client, record.model_copy(update={"layers": layers})).raise_for_status()
    scalars = made.scalar_rows({bad: [(1, 1.0), (2, 2.0)]})
    made.send(client, run_id, {"layers": made.layer_rows([1, 2], 3, **LIMITS), "scalars": scalars}).raise_for_status()
    page = open_window(f"/runs/{run_id}?layer=1").page
    drawn(page)
    expect(page.locator("h1")).to_have_text(bad)
    expect(page.locator("#schedule .caption")).to_contain_text(bad)
    assert page.locator("main img, main a[href^='javascript'], main script").count() == 0
    runs = open_window("/").page
    expect(runs.locator(f"tr[data-part='{run_id}'] a")).to_have_text(bad)
    assert runs.locator("main img, main script").count() == 0


def test_a_diverged_run_shows_where_it_began(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    r = np.ones((20, 3))
    r[12:, 2] = np.nan
    broken = {f"r_q{q:02d}": r for q in wire.QUANTILES}
    made.write_run(client, run_id, layers=3, steps=20, nonfinite_channels=np.isnan(r), gap=r, **broken, **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    assert plot(page, "schedule", "gd._fullData.some((t) => t.name === 'not finite from step 13')")
    assert plot(page, "heatmap", "gd._fullData.find((t) => t.name === 'first not finite').x[0]") == 13
    expect(page.locator("#findings .verdict")).to_contain_text("NH-NONFINITE")


def test_the_run_list_shows_new_runs_and_steps_by_itself(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    page = open_window("/").page
    row = page.locator(f"tr[data-part='{run_id}']")
    expect(row).to_have_count(0)
    made.write_run(client, run_id, layers=3, steps=12)
    expect(row.locator(".c-step")).to_contain_text("12")
    write_more(client, run_id, 13, 20, seq=2)
    expect(row.locator(".c-step")).to_contain_text("20")


def test_a_lost_service_is_said_and_what_was_shown_stays(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    window = open_window("/")
    page = window.page
    row = page.locator(f"tr[data-part='{run_id}']")
    expect(row).to_be_visible()
    page.context.set_offline(True)
    expect(page.locator("#banner")).to_contain_text("Connection lost, retrying")
    expect(page.locator("#live")).to_be_hidden()
    expect(row).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    assert window.wrong, "the browser itself reports the requests that failed"
    assert all("ERR_INTERNET_DISCONNECTED" in line for line in window.wrong), window.wrong
    window.wrong.clear()


def test_a_narrow_screen_never_scrolls_sideways(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    page = open_window("/", width=400, height=800).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.goto("/login")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.goto(f"/runs/{run_id}")
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_theme_button_redraws_the_figures_and_is_remembered(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    color = "gd._fullLayout.font.color"
    light = plot(page, "heatmap", color)
    page.locator("#theme").click()
    for figure in ("schedule", "heatmap", "scalars"):
        eventually(lambda name=figure: plot(page, name, color) != light, f"the dark {figure}")
    page.reload()
    drawn(page)
    assert plot(page, "heatmap", color) != light
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.evaluate("localStorage.clear()")
