"""How long until a page of the dashboard draws its first plot, over a million and ten million rows? In a real browser.

Builds the store of benchmarks/query.py (one run of `rows` rows of `layers`, 999 runs that have only a record), serves
it with the dashboard, and opens pages in a Chromium with a profile on disk, as people have. The very first visit, which
loads and compiles plotly.js (4.8 MB), has a line of its own; after two more the browser keeps the compiled script, and
each page is opened several times in a tab of its own. Times are the browser's own (Performance API), from the start of
the navigation: first paint, the mark `first-plot` that the page sets once a figure is drawn, and the last figure in
sight.

    python benchmarks/pages.py                  # 1 M and 10 M rows
    python benchmarks/pages.py --rows 1000000   # a minute
    python benchmarks/pages.py --save           # also to benchmarks/results/pages-DATE.md
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from playwright.sync_api import BrowserContext, Page, sync_playwright

if __package__:
    from benchmarks.query import LAYERS, service
else:  # run as a script
    from query import LAYERS, service

ROOT = Path(__file__).parents[1]
TARGETS = {1_000_000: 1000.0, 10_000_000: 2000.0}
"""First plot of the run page by rows, milliseconds."""

PAGES = {"runs": "/", "run": "/runs/bench", "layer": "/runs/bench/layers/20", "ranks": "/runs/bench/ranks"}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

TIMES = """() => {
    const at = (name) => performance.getEntriesByName(name)[0]?.startTime ?? null;
    return [at("first-contentful-paint"), at("first-plot")];
}"""
IN_SIGHT_READY = """() => performance.getEntriesByName("first-plot").length > 0 &&
    [...document.querySelectorAll("[data-figure]:not([hidden])")].every((panel) =>
        panel.getBoundingClientRect().top > innerHeight || panel.dataset.state === "ready")"""


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
    lines, version = [], "?"
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
                version = context.browser.version if context.browser is not None else "?"
                context.close()
    report = "\n".join(
        [
            "# First plot of the dashboard's pages",
            "",
            f"`python benchmarks/pages.py --rows {' '.join(map(str, given.rows))} --repeats {given.repeats}`, "
            f"{datetime.now(UTC):%Y-%m-%d}; {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"Chromium {version}. Median milliseconds from the start of the navigation.",
            "",
            "| rows | page | first paint | first plot | all plots in sight | target | |",
            "|---|---|---|---|---|---|---|",
            *lines,
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
        if name != "runs":
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


if __name__ == "__main__":
    sys.exit(main())
