"""Takes the screenshots of docs/screenshots from a running `brn-serve`: every page, light and dark, wide and narrow.

    brn-serve &                 # or `make demo`
    python docs/screenshots.py http://127.0.0.1:8321 RUN [RUN ...]

Needs the `dev` extra and a Chromium. The runs are what is on the pages: take them from a real training.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

FOLDER = Path(__file__).parent / "screenshots"
SIZES = {"wide": (1440, 900), "narrow": (400, 800)}
THEMES = ("light", "dark")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the dashboard is, for example http://127.0.0.1:8321")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="ids of runs whose pages are taken")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the PNG files go (default: %(default)s)")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium on the PATH: install it (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pages = {"runs": "/"} | {f"run-{run}": f"/runs/{run}" for run in arguments.runs}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            for name, path in pages.items():
                for theme in THEMES:
                    for size in SIZES:
                        file = arguments.folder / f"{name}-{theme}-{size}.png"
                        take(browser, arguments.url.rstrip("/") + path, theme, size, file)
                        print(file)
        except Error as error:
            print(f"{arguments.url} could not be taken: {error.message.splitlines()[0]}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    return 0


def take(browser: Browser, address: str, theme: str, size: str, file: Path) -> None:
    """One full page, once all its figures are drawn."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if theme == "dark" else "light"
    )
    page = context.new_page()
    answer = page.goto(address)
    if answer is None or not answer.ok:
        raise Error(f"{address} answered {answer.status if answer else 'nothing'}")
    for panel in page.locator(".panel").all():
        panel.and_(page.locator("[data-state=ready]")).wait_for(timeout=30_000)
    page.screenshot(path=file, full_page=True)
    context.close()


if __name__ == "__main__":
    sys.exit(main())
