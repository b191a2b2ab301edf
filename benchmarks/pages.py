"""How long until a page of the dashboard draws its first plot, over a million and ten million rows? In a real browser.

Builds the store of benchmarks/query.py (one run of `rows` rows of `layers`, 999 runs that have only a record), serves
it with the dashboard, and opens pages in a Chromium with a profile on disk, as people have. The very first visit, which
loads and compiles plotly.js (4.8 MB), has a line of its own; after two more the browser keeps the compiled script, and
each page is opened several times in a tab of its own. Times are the browser's own (Performance API), from the start of
the navigation: first paint, the mark `first-plot` that the page sets once a figure is drawn, and the last figure in
sight.

The list of runs has no figure, and a table of its own: when its rows are painted; how long after a search is put in
the rows are those that fit; and whether it stays smooth, the longest frame and the longest task of the page's script
while it is scrolled from top to bottom and everything it shows is changed, over REST, so that updates replace its rows.

    python benchmarks/pages.py                  # 1 M and 10 M rows
    python benchmarks/pages.py --rows 1000000   # a minute
    python benchmarks/pages.py --save           # also to benchmarks/results/pages-DATE.md
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
from playwright.sync_api import BrowserContext, Page, sync_playwright

if __package__:
    from benchmarks.query import LAYERS, RUNS, service
else:  # run as a script
    from query import LAYERS, RUNS, service

ROOT = Path(__file__).parents[1]
TARGETS = {1_000_000: 1000.0, 10_000_000: 2000.0}
"""First plot of the run page by rows, milliseconds."""

PAGES = {"run": "/runs/bench", "layer": "/runs/bench/layers/20", "ranks": "/runs/bench/ranks"}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

TIMES = """() => {
    const at = (name) => performance.getEntriesByName(name)[0]?.startTime ?? null;
    return [at("first-contentful-paint"), at("first-plot")];
}"""
IN_SIGHT_READY = """() => performance.getEntriesByName("first-plot").length > 0 &&
    [...document.querySelectorAll("[data-figure]:not([hidden])")].every((panel) =>
        panel.getBoundingClientRect().top > innerHeight || panel.dataset.state === "ready")"""

PAGE_RUNS = 50
SEARCH = "run 77"
SCROLL_MS = 8000
"""The list is brought up to date every two seconds: some four times meanwhile."""

ROWS_PAINTED = f"""requestAnimationFrame(function look() {{
    if (document.querySelectorAll("#runs-body tr").length < {PAGE_RUNS}) return void requestAnimationFrame(look);
    requestAnimationFrame(() => performance.mark("rows-painted")); // the frame after the one that painted them
}})"""
LISTED = """() => ["first-contentful-paint", "rows-painted"].map(
    (name) => performance.getEntriesByName(name)[0]?.startTime)"""
WATCH_SEARCH = f"""() => {{
    const body = document.querySelector("#runs-body");
    let typed = 0;
    document.querySelector("#filters").addEventListener("input", () => {{ typed = performance.now(); }}, true);
    new MutationObserver((_, observer) => {{
        if (![...body.children].every((row) => row.dataset.name.includes("{SEARCH}"))) return;
        observer.disconnect();
        const tell = () => performance.measure("searched", {{ start: typed, end: performance.now() }});
        requestAnimationFrame(() => requestAnimationFrame(tell));
    }}).observe(body, {{ childList: true }});
}}"""
SCROLLED = f"""async () => {{
    let replaced = 0, task = 0, frame = 0;
    new MutationObserver((all) => {{ for (const each of all) replaced += each.addedNodes.length; }})
        .observe(document.querySelector("#runs-body"), {{ childList: true }});
    new PerformanceObserver((list) => {{ for (const own of list.getEntries()) task = Math.max(task, own.duration); }})
        .observe({{ type: "longtask" }});
    const began = await new Promise(requestAnimationFrame);
    for (let last = began; last - began < {SCROLL_MS};) {{
        const now = await new Promise(requestAnimationFrame);
        frame = Math.max(frame, now - last);
        last = now;
        scrollTo(0, (document.body.scrollHeight - innerHeight) * (now - began) / {SCROLL_MS});
    }}
    return [frame, task, replaced];
}}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(TARGETS), help="rows of the table `layers`")
    parser.add_argument("--repeats", type=int, default=5, help="times each page is opened")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pages-DATE.md too")
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium on the PATH: install it (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    lines, lists, version = [], [], "?"
    with sync_playwright() as playwright:
        for rows in given.rows:
            with tempfile.TemporaryDirectory(prefix="brn-pages-") as folder, serving(folder, rows) as url:
                context = playwright.chromium.launch_persistent_context(
                    Path(folder) / "profile",
                    executable_path=chromium,
                    args=FLAGS,
                    base_url=url,
                    viewport={"width": 1440, "height": 900},
                )
                lines.append(measured(context, rows, "run, first visit", PAGES["run"], 1))
                measured(context, rows, "run", PAGES["run"], 2)
                lines += [measured(context, rows, name, path, given.repeats) for name, path in PAGES.items()]
                lists.append(list_measured(context, url, rows, given.repeats))
                version = context.browser.version if context.browser is not None else "?"
                context.close()
    report = "\n".join(
        [
            "# How long pages of the dashboard take",
            "",
            f"`python benchmarks/pages.py --rows {' '.join(map(str, given.rows))} --repeats {given.repeats}`, "
            f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"Chromium {version}. Median milliseconds from the start of the navigation.",
            "",
            "| rows | page | first paint | first plot | all plots in sight | target | |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"## The list of {RUNS:,} runs, of which a page holds {PAGE_RUNS}",
            "",
            "Medians, too, from the start of the navigation or from the input of the search; of frames and tasks the "
            f"longest of all {given.repeats} times that the page was scrolled for {SCROLL_MS / 1000:.0f} s. "
            "A browser calls a task long from 50 ms on.",
            "",
            "| rows | first paint | rows painted | search | longest frame | longest task | rows replaced meanwhile |",
            "|---|---|---|---|---|---|---|",
            *lists,
        ]
    )
    print(report)
    if given.save:
        path = ROOT / "benchmarks" / "results" / f"pages-{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(f"{report}\n")
        print(f"\nsaved {path.relative_to(ROOT)}")
    return 0


@contextmanager
def serving(folder: str, rows: int) -> Iterator[str]:
    """The dashboard over a store of so many rows, in a process of its own."""
    store = f"chdb://{folder}/store"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = f"from benchmarks.query import build; build({store!r}, {-(-rows // LAYERS)})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    with service(store, "dashboard") as url:
        yield url


def wait_until(page: Page, expression: str, seconds: float = 120) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's security policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{page.url} did not get ready within {seconds} s")
        page.wait_for_timeout(10)


def measured(context: BrowserContext, rows: int, name: str, path: str, repeats: int) -> str:
    """A line of the table."""
    paint, plot, ready = [], [], []
    for _ in range(repeats):
        page = context.new_page()
        began = time.perf_counter()
        page.goto(path)
        wait_until(page, IN_SIGHT_READY)
        ready.append(1000 * (time.perf_counter() - began))
        first_paint, first_plot = page.evaluate(TIMES)
        paint.append(first_paint or np.nan)
        plot.append(first_plot or np.nan)
        page.close()
    target = TARGETS.get(rows) if name == "run" else None
    met = "" if target is None else "met" if np.median(plot) <= target else "missed"
    shown = [
        "–" if not values or np.isnan(values).all() else f"{np.nanmedian(values):,.0f}"
        for values in (paint, plot, ready)
    ]
    return f"| {rows:,} | {name} | {' | '.join(shown)} | {'' if target is None else f'{target:,.0f}'} | {met} |"


def list_measured(context: BrowserContext, url: str, rows: int, repeats: int) -> str:
    """A line of the table of the list of runs."""
    times, frames = [], []
    for _ in range(repeats):
        page = context.new_page()
        page.add_init_script(ROWS_PAINTED)
        page.goto("/")
        wait_until(page, f"({LISTED})().every((time) => time !== undefined)")
        first, rows_there = page.evaluate(LISTED)
        page.evaluate(WATCH_SEARCH)
        page.locator("[type=search]").focus()
        page.keyboard.insert_text(SEARCH)
        wait_until(page, "performance.getEntriesByName('searched').length > 0")
        # A paint is told when it is on the screen, a frame when it begins: rows are painted by the later of the two.
        times.append(
            [first, max(first, rows_there), page.evaluate("performance.getEntriesByName('searched')[0].duration")]
        )
        page.locator("[type=search]").fill("")
        wait_until(page, f"document.querySelectorAll('#runs-body tr').length === {PAGE_RUNS}")
        with changing(url, page.locator("#runs-body tr").evaluate_all("(all) => all.map((row) => row.dataset.part)")):
            frames.append(page.evaluate(SCROLLED))
        page.close()
    task = max(task for _, task, _ in frames)
    shown = [
        *(f"{middle:,.0f}" for middle in np.median(times, axis=0)),
        f"{max(frame for frame, _, _ in frames):,.0f}",
        f"{task:,.0f}" if task else "none long",
        f"{np.median([replaced for _, _, replaced in frames]):,.0f}",
    ]
    return f"| {rows:,} | {' | '.join(shown)} |"


@contextmanager
def changing(url: str, runs: list[str]) -> Iterator[None]:
    """Gives each of these runs another tag, again and again, about once between two updates of the list."""
    stop = threading.Event()

    def change() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for tag in itertools.count():
                for run in runs:
                    if stop.wait(2 / len(runs)):
                        return
                    client.patch(f"/v1/runs/{run}", json={"tags": ["sweep", f"round {tag}"]}).raise_for_status()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
