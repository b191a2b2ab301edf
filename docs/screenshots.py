"""Takes the screenshots of docs/screenshots from a running `brn-serve`: every page, light and dark; the page of a
run in a narrow window too, and with the evidence of its first finding; its report; and the states: a run that does not
exist there, and from a service of its own, with a token and without runs, the login, the empty list and a run that fell
silent before its first row (which takes a minute).

    brn-serve &                 # or `make demo`
    python docs/screenshots.py http://127.0.0.1:8321 RUN [RUN ...]

The pages of the first run, and a comparison of all: take them from real trainings. Needs the `dev` extra and a
Chromium; with Pillow installed pictures have 256 colours and a third of the size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

FOLDER = Path(__file__).parent / "screenshots"
SIZES = {"wide": (1440, 900), "narrow": (400, 800)}
VIEWS = {"run": "", "layer": "/layers/1", "ranks": "/ranks", "advisor": "/advisor", "report": "/report"}
STATES = {"login": "/login", "empty": "/", "stalled": "/runs/silent"}
"""Pages of a service that has a token and one run, which never sent a row; the list is taken before that run begins."""

TOKEN = "only-for-these-pictures"
THEMES = ("light", "dark")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the dashboard is, for example http://127.0.0.1:8321")
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="ids of runs: the first one's pages are taken, all are compared"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only pictures with this in their name")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the PNG files go (default: %(default)s)")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium on the PATH: install it (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pages = pages_of(arguments.runs)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            for name, path in pages.items():
                for theme in THEMES:
                    for size in SIZES if name == "run" else ["wide"]:
                        parts = [name, *["dark"] * (theme == "dark"), *["narrow"] * (size == "narrow")]
                        file = arguments.folder / f"{'-'.join(parts)}.png"
                        if arguments.only not in file.name:
                            continue
                        take(browser, arguments.url.rstrip("/") + path, theme, size, file)
                        print(file)
            take_states(browser, arguments.folder, arguments.only)
        except Error as error:
            print(f"{arguments.url} could not be taken: {error.message.splitlines()[0]}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    return 0


def pages_of(runs: Sequence[str]) -> dict[str, str]:
    """Path of each page by the name of its picture."""
    found = {"runs": "/", "missing": "/runs/no-such-run"}
    if runs:
        found |= {view: f"/runs/{runs[0]}{path}" for view, path in VIEWS.items()} | {"evidence": f"/runs/{runs[0]}"}
    if len(runs) > 1:
        found["compare"] = f"/compare?runs={','.join(runs)}"
    return found


def take_states(browser: Browser, folder: Path, only: str) -> None:
    """What a service of its own shows before there is anything to see."""
    wanted = [
        (path, theme, folder / f"{name}{'-dark' * (theme == 'dark')}.png")
        for name, path in STATES.items()
        for theme in THEMES
        if only in f"{name}{'-dark' * (theme == 'dark')}.png"
    ]
    if not wanted:
        return
    with service_with_a_token() as url:
        for path, theme, file in wanted:
            if file.name.startswith("stalled"):
                wait_for_silence(browser, url)
            take(browser, url + path, theme, "wide", file, token="" if path == "/login" else TOKEN)
            print(file)


@contextmanager
def service_with_a_token() -> Iterator[str]:
    """`brn-serve` over an empty store."""
    with tempfile.TemporaryDirectory(prefix="brn-pictures-") as folder:
        command = [sys.executable, "-m", "dashboard", "--port", "0", "--store", f"chdb://{folder}/store"]
        environment = os.environ | {"BRN_SERVICE_TOKEN": TOKEN}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = re.search(r"http://\S+", process.stdout.readline())
                if found is None:
                    raise Error("the service for the pictures of states did not start")
                yield found[0]
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def wait_for_silence(browser: Browser, url: str) -> None:
    """Begins a run, unless it is there, and waits until the service calls it stalled."""
    context = browser.new_context(extra_http_headers={"authorization": f"Bearer {TOKEN}"})
    layers = [{"index": 0, "name": "norm1", "kind": "BatchRenorm", "channels": 16, "eps": 1e-5, "momentum": 0.01}]
    record = {"id": "silent", "name": "a run that fell silent", "planned_steps": 1000, "layers": layers}
    headers = {"content-type": "application/json"}
    begun = context.request.post(f"{url}/v1/runs", data=json.dumps(record), headers=headers)
    deadline = time.monotonic() + 120
    while begun.ok and context.request.get(f"{url}/v1/runs/silent").json()["state"] != "stalled":
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    context.close()
    if not begun.ok or time.monotonic() > deadline:
        raise Error(f"no stalled run could be made: {begun.text()}")


def take(browser: Browser, address: str, theme: str, size: str, file: Path, *, token: str = "") -> None:
    """One full page, once all its figures are drawn."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if theme == "dark" else "light",
        extra_http_headers={"authorization": f"Bearer {token}"} if token else {},
    )
    page = context.new_page()
    if file.name.startswith("report"):  # a file to keep: opened as one
        answer = context.request.get(address)
        with tempfile.NamedTemporaryFile(suffix=".html", delete=False) as report:
            report.write(answer.body())
        page.goto(Path(report.name).as_uri())
        page.locator(".panel[data-state=loading]").first.wait_for(state="detached", timeout=60_000)
        Path(report.name).unlink()
    else:
        answer = page.goto(address)  # type: ignore[assignment]
    if answer is None or (answer.status != 404 if file.name.startswith("missing") else not answer.ok):
        raise Error(f"{address} answered {answer.status if answer else 'nothing'}")
    if file.name.startswith("evidence"):
        page.locator("a.show").first.click()
    for panel in page.locator(".panel[data-figure]:not([hidden])").all():
        panel.scroll_into_view_if_needed()  # figures are drawn when they come into sight
        panel.and_(page.locator("[data-state=ready]")).wait_for(timeout=60_000)
    if page.locator("#runs-body").count():
        page.locator("#runs-body tr:not(:has(.spark))").first.wait_for(state="detached", timeout=60_000)
    page.wait_for_timeout(1500)  # a window that has just opened may be sized once more: then figures are drawn again
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=file, full_page=True)
    context.close()
    with suppress(ImportError):
        from PIL import Image

        Image.open(file).convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
        ).save(file, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
