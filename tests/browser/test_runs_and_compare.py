"""The list of runs, comparisons and reports in a real Chromium: live, shared by their address, reached by keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import synthetic as made
from chromium import AXE, CHROMIUM, NEEDS_AXE, Window, barriers, drawn, eventually, plot
from playwright.sync_api import Page, expect

from benchmarks.pages import serving as serving_rows
from dashboard.figures.palette import PALETTES, Theme

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]

THEMES: tuple[Theme, ...] = ("dark", "light")
BAD = "<script>alert(1)</script> " + "a-name-of-a-hundred-characters-without-any-space-in-it-" * 2


@pytest.fixture
def pair(client: httpx.Client, run_id: str) -> list[str]:
    """Two finished runs: one of clustered batches, one of independent samples with a name that is markup and long."""
    runs = [f"{run_id}-a", f"{run_id}-b"]
    made.create(client, made.run_record(runs[0], name="clustered", batch_size=32, planned_steps=400))
    made.send(client, runs[0], made.clustered_tables()).raise_for_status()
    made.create(client, made.run_record(runs[1], name=BAD[:100], planned_steps=400, tags=("<b>",), config={"lr": 1}))
    numbers = range(1, 201)
    scalars = made.scalar_rows({name: [(step, 1 / step) for step in numbers] for name in ("loss", "reward", "lr")})
    rows = {"layers": made.layer_rows(numbers, 3), "probe": made.probe_rows(numbers), "scalars": scalars}
    made.send(client, runs[1], rows).raise_for_status()
    for run in runs:
        client.patch(f"/v1/runs/{run}", json={"status": "finished"}).raise_for_status()
        client.get(f"/v1/runs/{run}/findings").raise_for_status()
    return runs


def shown(page: Page) -> list[str]:
    rows: list[str] = page.evaluate("[...document.querySelectorAll('#runs-body tr')].map((row) => row.dataset.part)")
    return rows


def test_of_a_thousand_runs_the_page_holds_fifty_and_an_update_touches_only_what_changed(
    open_window: Callable[..., Window], tmp_path: Path
) -> None:
    with serving_rows(str(tmp_path), 54 * 100) as url:
        page = open_window(f"{url}/").page
        expect(page.locator(".pages")).to_contain_text("1,000 runs")
        expect(page.locator("#runs-body tr")).to_have_count(50)
        assert page.evaluate("document.querySelectorAll('main *').length") < 50 * 45
        second = shown(page)[1]
        httpx.patch(f"{url}/v1/runs/{second}", json={"notes": "-"}).raise_for_status()  # has it diagnosed, once
        said = page.locator("#runs-body tr").nth(1).locator(".sentence")
        expect(said).not_to_have_text("No diagnosis was computed yet.")
        page.evaluate(
            """() => { window.added = []; new MutationObserver((changes) => {
                for (const change of changes)
                    for (const node of change.addedNodes) window.added.push(node.dataset?.part);
            }).observe(document.getElementById("runs-body"), {childList: true}); }"""
        )
        httpx.patch(f"{url}/v1/runs/{second}", json={"name": "renamed"}).raise_for_status()
        expect(page.locator("#runs-body tr").nth(1).locator("a").first).to_have_text("renamed")
        assert page.evaluate("window.added") == [second]

        page.locator("input[type=search]").press_sequentially("renam")
        expect(page.locator("#runs-body tr")).to_have_count(1)
        page.goto("about:blank")


def test_what_a_list_shows_is_in_its_address_and_comes_back(
    client: httpx.Client, pair: list[str], run_id: str, open_window: Callable[..., Window]
) -> None:
    page = open_window(f"/?search={run_id}").page
    page.locator("th a", has_text="Verdict").click()
    expect(page.locator("#runs-head th[aria-sort=descending]")).to_contain_text("Verdict")
    eventually(lambda: shown(page) == pair, "the worse verdict first")
    worse = client.get(f"/v1/runs/{pair[0]}").json()["verdict"]["severity"]
    page.locator(f"input[name=severity][value={worse}]").check()
    eventually(lambda: shown(page) == pair[:1], "only the worse one")
    expect(page).to_have_url(re.compile(rf"/\?search={run_id}&severity={worse}&sort=severity$"))
    page.reload()
    expect(page.locator(f"input[name=severity][value={worse}]")).to_be_checked()
    assert shown(page) == pair[:1]

    page.locator(f"input[name=severity][value={worse}]").uncheck()
    page.locator("select[name=tag]").select_option("<b>")
    eventually(lambda: shown(page) == pair[1:], "the one with the tag")
    expect(page.locator("[data-tag] span")).to_have_text("<b>")
    page.locator("[data-tag] input").click()  # which takes the chip away
    eventually(lambda: len(shown(page)) == 2, "both again")
    expect(page.locator("[data-tag]")).to_have_count(0)
    assert page.evaluate("document.activeElement.name") == "tag"  # the focus is not lost with the chip
    page.locator("th a", has_text="Created").click()
    page.go_back()
    expect(page.locator("#runs-head th[aria-sort]")).to_contain_text("Verdict")


def test_runs_are_chosen_and_compared_by_keyboard_alone(
    client: httpx.Client, pair: list[str], run_id: str, open_window: Callable[..., Window]
) -> None:
    page = open_window(f"/?search={run_id}").page
    page.locator("input[type=search]").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "run":
            break
    page.keyboard.press("Space")
    expect(page.locator("#chosen")).to_have_text("1 chosen")
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.name") != "run":
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")  # from any row to the bar
    expect(page.locator("#compare")).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/compare?runs={pair[1]},{pair[0]}")
    expect(page.locator("h1")).to_have_text("2 runs compared")


def test_a_comparison_says_who_has_which_finding_and_leads_to_its_evidence(
    client: httpx.Client, pair: list[str], open_window: Callable[..., Window]
) -> None:
    page = open_window(f"/compare?runs={','.join(pair)}").page
    clustered = page.locator(f"tr[data-part='found {pair[0]}']")
    column = page.locator("#found-head th").all_inner_texts()
    at = next(i for i, text in enumerate(column) if text.startswith("NH-CLUSTER"))
    expect(clustered.locator(":scope > *").nth(at)).to_contain_text("since step")
    other = page.locator(f"tr[data-part='found {pair[1]}']").locator(":scope > *").nth(at)
    expect(other).to_have_text("–")
    expect(page.locator("#live")).to_be_hidden()  # both have finished
    clustered.locator("a[href*='finding=NH-CLUSTER']").click()
    expect(page.locator("#evidence")).to_have_attribute("data-state", "ready")
    page.go_back()
    client.patch(f"/v1/runs/{pair[1]}", json={"status": "running"}).raise_for_status()
    expect(page.locator(f"tr[data-part='{pair[1]}'] .state")).to_have_text("running")
    expect(page.locator("#live")).to_be_visible()


def test_a_comparison_as_a_file_shows_what_its_page_shows_and_follows_the_theme(
    pair: list[str], open_window: Callable[..., Window], tmp_path: Path
) -> None:
    page = open_window(f"/compare?runs={','.join(pair)}").page
    drawn(page)
    page.locator("[data-view=by]").select_option("fraction")
    page.locator("[data-view=scalar]").select_option("reward")
    page.locator("#stat").select_option("clip_r")
    eventually(lambda: "clipped" in plot(page, "compare", "gd.layout.annotations[1].text"), "the statistic")
    with page.expect_download() as download:
        page.locator("a[download]").click()
    file = tmp_path / "comparison.html"
    download.value.save_as(file)

    text = "gd.layout.annotations.map((a) => a.text).join()"
    report = open_window(file.as_uri()).page
    expect(report.locator("#compare")).to_have_attribute("data-state", "ready")
    assert plot(report, "compare", text) == plot(page, "compare", text)
    assert plot(report, "compare", "gd.layout.xaxis2.title.text") == "share of the planned steps"
    expect(report.locator(".compared th .name").last).to_have_text(BAD[:100])
    assert report.locator("main a").count() == 0
    drawn_in = "gd._fullLayout.font.color"
    for theme in THEMES:
        report.emulate_media(color_scheme=theme)
        eventually(lambda color=PALETTES[theme].text: plot(report, "compare", drawn_in) == color, f"the {theme} one")
    assert report.evaluate("performance.getEntriesByType('resource').length") == 0


def test_a_narrow_screen_sorts_too_and_never_scrolls_sideways(
    client: httpx.Client, pair: list[str], run_id: str, open_window: Callable[..., Window], tmp_path: Path
) -> None:
    page = open_window(f"/?search={run_id}", width=390, height=800).page
    page.locator("#runs-head a", has_text="Verdict").click()
    eventually(lambda: shown(page) == pair, "the critical verdict first")
    page.locator("input[name=run]").first.check()
    expect(page.locator("#selection")).to_be_in_viewport()
    file = tmp_path / "run.html"
    file.write_text(client.get(f"/runs/{pair[1]}/report").raise_for_status().text)
    compared = f"/compare?runs={','.join(pair)}"
    for path in (f"/?search={run_id}", "/?search=no-run-is-called-this", compared, file.as_uri()):
        page.goto(path)
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path


def test_figures_of_a_report_are_laid_out_for_the_width_of_their_reader(
    client: httpx.Client, pair: list[str], open_window: Callable[..., Window], tmp_path: Path
) -> None:
    file = tmp_path / "run.html"
    file.write_text(client.get(f"/runs/{pair[1]}/report").raise_for_status().text)
    page = open_window(file.as_uri(), width=1400, height=900).page
    long, short = "r: median, 25–75 % and 5–95 % of channels", "r"
    names = "gd._fullData.map((trace) => trace.name)"
    for width, name, other in ((1400, long, short), (390, short, long)):
        page.set_viewport_size({"width": width, "height": 900})
        eventually(lambda own=name: own in plot(page, "schedule", names), f"the figure for {width} pixels")
        assert other not in plot(page, "schedule", names)
        eventually(lambda: plot(page, "schedule", "gd.clientWidth === gd._fullLayout.width"), "drawn at its width")
        assert page.evaluate("[...document.querySelectorAll('.plot')].every((own) => own.clientWidth <= innerWidth)")


@NEEDS_AXE
@pytest.mark.parametrize("width", [1400, 390])
def test_axe_finds_nothing_serious(
    client: httpx.Client,
    pair: list[str],
    run_id: str,
    open_window: Callable[..., Window],
    tmp_path: Path,
    width: int,
) -> None:
    assert AXE is not None
    compared = f"compare/report?runs={','.join(pair)}"
    for name, path in (("run", f"runs/{pair[0]}/report"), ("comparison", compared)):
        (tmp_path / f"{name}.html").write_text(client.get(f"/{path}").raise_for_status().text)
    page = open_window("/", width=width, height=900).page
    files = [(tmp_path / f"{name}.html").as_uri() for name in ("run", "comparison")]
    lists = [f"/?search={run_id}&severity=critical&tag=%3Cb%3E", f"/?search={run_id}&sort=severity"]
    for path in (*lists, f"/compare?runs={','.join(pair)}", *files):
        page.goto(path)
        drawn(page)
        if path == lists[1]:
            page.locator("input[name=run]").first.check()
        page.evaluate(AXE.read_text())
        for theme in THEMES[::-1]:
            rules = "['wcag2a', 'wcag2aa', 'best-practice']" if theme == "light" else "['color-contrast']"
            page.emulate_media(color_scheme=theme)
            assert not (found := barriers(page, rules)), (path, theme, found)
