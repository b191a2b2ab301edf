"""The dashboard in a real Chromium. Every test fails on a console error, an uncaught exception or a failed request."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import synthetic as made
from chromium import (
    LIMITS,
    NEEDS_AXE,
    NEEDS_CHROMIUM,
    PATIENCE_MS,
    Window,
    accessible,
    drawn,
    eventually,
    plot,
    wheel_of_time,
    write_more,
)
from fastapi import FastAPI
from playwright.sync_api import expect
from pydantic import SecretStr

from benchmarks.pages import serving as serving_rows
from brn_core import wire

pytestmark = NEEDS_CHROMIUM


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
    page.locator("#heatmap").scroll_into_view_if_needed()
    whole = plot(page, "heatmap", "[...gd._fullLayout.yaxis.range]")
    box = page.locator("#heatmap .nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    page.mouse.up()
    expect(page).to_have_url(re.compile("from="))
    assert plot(page, "heatmap", "[...gd._fullLayout.yaxis.range]") == whole  # no layer is cropped away

    page.locator("#from-step").fill("5")  # and by keyboard
    page.locator("#to-step").fill("15")
    page.keyboard.press("Enter")
    for figure in ("schedule", "heatmap"):  # one zoom is every figure's, and the address's
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        eventually(lambda name=figure: plot(page, name, "[...gd.layout.xaxis.range]") == [5, 15], f"zoomed {figure}")
    expect(page).to_have_url(re.compile(r"\?from=5&to=15$"))
    with wheel_of_time(page):
        write_more(client, run_id, 31, 47, seq=2)
        expect(page.locator(".steps")).to_contain_text("47", timeout=PATIENCE_MS)
    assert plot(page, "schedule", "[...gd.layout.xaxis.range]") == [5, 15]

    page.locator("#all-steps").click()
    newest = "gd._fullData.find((t) => t.name.startsWith('r:')).x.at(-1)"
    page.locator("#schedule").scroll_into_view_if_needed()
    eventually(lambda: plot(page, "schedule", newest) == 47, "the newest step in the schedule view")
    page.locator("#heatmap").scroll_into_view_if_needed()
    eventually(lambda: plot(page, "heatmap", "gd._fullData[0].x.at(-1)") == 47, "the newest step in the layer map")
    expect(page).not_to_have_url(re.compile("from="))
    client.patch(f"/v1/runs/{run_id}", json={"status": "finished"}).raise_for_status()
    expect(page.locator(".facts .state")).to_have_text("finished")


def test_the_whole_view_is_in_the_address_and_a_row_of_the_map_leads_to_its_layer(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, clip_r=[[0.1, 0.2, 0.3]], **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    page.locator("#heatmap").scroll_into_view_if_needed()
    page.locator("#stat").select_option("clip_r")
    eventually(lambda: plot(page, "heatmap", "gd._fullData[0].name") == "clip_r", "the other statistic")
    assert plot(page, "heatmap", "gd._fullData[0].customdata[2][0]") == pytest.approx(0.3)
    expect(page.locator("#heatmap .caption")).to_have_text(wire.METRIC["clip_r"].meaning)
    page.locator("#layer").scroll_into_view_if_needed()
    page.locator("#layer").select_option("1")
    expect(page.locator("#schedule .caption")).to_contain_text("(block1.bn)")
    expect(page).to_have_url(re.compile(r"\?stat=clip_r&layer=1$"))

    page.reload()  # the address is the view
    drawn(page)
    expect(page.locator("#stat")).to_have_value("clip_r")
    expect(page.locator("#layer")).to_have_value("1")
    expect(page.locator("#schedule .caption")).to_contain_text("(block1.bn)")
    assert plot(page, "heatmap", "gd._fullData[0].name") == "clip_r"

    page.locator("#heatmap").scroll_into_view_if_needed()
    page.locator("#heatmap .nsewdrag").first.hover()
    expect(page.locator("#heatmap .hovertext")).to_contain_text("channels with r clipped (share)")
    page.locator("#heatmap .nsewdrag").first.click()
    page.wait_for_url(f"**/runs/{run_id}/layers/1")
    drawn(page)
    assert {"moments", "schedule", "batch", "channels", "snapshot"} == set(
        page.evaluate("[...document.querySelectorAll('[data-state=ready]')].map((panel) => panel.id)")
    )
    expect(page.locator("#moments .caption")).to_contain_text("inference would use")


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
    page.goto(f"/runs/{run_id}/layers/1")
    drawn(page)
    expect(page.locator(".title h2")).to_have_text(f"{bad}1")
    for path, shown in (("ranks", "#rank-curves .caption"), ("advisor", "#advisor .caption")):
        page.goto(f"/runs/{run_id}/{path}?layer=1")
        drawn(page)
        assert page.locator(shown).count() == 1
        assert page.locator("main img, main a[href^='javascript'], main script").count() == 0
    made.create(client, made.run_record(f"{run_id}-2", name=bad)).raise_for_status()
    page.goto(f"/compare?runs={run_id},{run_id}-2")
    drawn(page)
    expect(page.locator(".compared th[scope=row] a").first).to_have_text(bad)
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

    page.locator(".card", has_text="NH-NONFINITE").locator("a.show").first.click()  # to the evidence
    drawn(page)
    expect(page).to_have_url(re.compile("finding=NH-NONFINITE"))
    assert plot(page, "evidence", "gd._fullData[0].name") == "nonfinite_channels"
    for figure in ("evidence", "schedule", "heatmap", "scalars"):
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        marked = "gd.layout.shapes.filter((s) => s.name === 'where it was seen').map((s) => s.x0)[0]"
        eventually(lambda name=figure, what=marked: plot(page, name, what) == 13, f"the mark in {figure}")
    page.go_back()
    expect(page.locator("#evidence")).to_be_hidden()


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


def test_a_service_down_is_said_on_a_run_page_and_forgotten_when_it_is_back(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    window = open_window(f"/runs/{run_id}")
    page = window.page
    drawn(page)
    client.patch(f"/v1/runs/{run_id}", json={"status": "finished"}).raise_for_status()
    expect(page.locator(".facts .state")).to_have_text("finished")
    page.route("**/figures/**", lambda route: route.abort())
    page.locator("#schedule").scroll_into_view_if_needed()
    page.locator("#layer").select_option("1")
    expect(page.locator("#banner")).to_contain_text("Connection lost, retrying")
    page.unroute("**/figures/**")
    expect(page.locator("#schedule .caption")).to_contain_text("(block1.bn)")  # it is asked for again by itself
    expect(page.locator("#banner")).to_be_hidden()
    assert window.wrong
    assert all("/figures/" in line or "ERR_FAILED" in line for line in window.wrong), window.wrong
    window.wrong.clear()


def test_tabs_that_nobody_looks_at_leave_the_connections_to_others(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    hide = """(hidden) => { Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange")); }"""
    tabs = []
    for _ in range(6):  # as many connections as a browser has to one host
        page = open_window(f"/runs/{run_id}/advisor").page
        expect(page.locator(".steps")).to_contain_text("10")
        page.evaluate(hide, True)
        tabs.append(page)
    seventh = open_window(f"/runs/{run_id}").page
    expect(seventh.locator("#schedule")).to_have_attribute("data-state", "ready")
    write_more(client, run_id, 11, 20, seq=2)
    expect(seventh.locator(".steps")).to_contain_text("20")
    expect(tabs[0].locator(".steps")).to_contain_text("10")
    tabs[0].evaluate(hide, False)  # who comes back sees what is
    expect(tabs[0].locator(".steps")).to_contain_text("20")


def test_a_page_for_which_no_stream_is_left_follows_by_asking(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    window = open_window("/")
    page = window.page
    page.route("**/events", lambda route: route.fulfill(status=503, headers={"retry-after": "1"}, body="{}"))
    page.goto(f"/runs/{run_id}")
    drawn(page)
    write_more(client, run_id, 11, 20, seq=2)
    expect(page.locator(".steps")).to_contain_text("20")
    newest = "gd._fullData.find((t) => t.name.startsWith('r:')).x.at(-1)"
    page.locator("#schedule").scroll_into_view_if_needed()
    eventually(lambda: plot(page, "schedule", newest) == 20, "the newest step in the schedule view")
    expect(page.locator("#banner")).to_be_hidden()
    assert window.wrong
    assert all("503" in line for line in window.wrong), window.wrong
    window.wrong.clear()


def test_ranks_layers_and_comparisons_keep_themselves_current(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, ranks=2, **LIMITS)
    made.write_run(client, f"{run_id}-2", layers=3, steps=10, **LIMITS)
    ranks = open_window(f"/runs/{run_id}/ranks").page
    layer = open_window(f"/runs/{run_id}/layers/1").page
    compared = open_window(f"/compare?runs={run_id},{run_id}-2").page
    drawn(ranks)
    drawn(layer)
    drawn(compared)
    newest = "gd._fullData.find((t) => t.yaxis === 'y').x.at(-1)"
    write_more(client, run_id, 11, 20, seq=2)
    for page in (ranks, layer):
        expect(page.locator(".steps")).to_contain_text("20")
    expect(ranks.locator("#ranks-live tbody tr").first).to_contain_text("20")
    expect(compared.locator(f"tr[data-part='{run_id}']")).to_contain_text("20")
    compared.locator("#compare").scroll_into_view_if_needed()
    eventually(lambda: plot(compared, "compare", newest) == 20, "the newest step in the comparison")


def test_an_edit_leaves_alone_what_somebody_else_changed_meanwhile(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    page = open_window(f"/runs/{run_id}#evidence").page
    client.patch(f"/v1/runs/{run_id}", json={"notes": "a colleague's"}).raise_for_status()
    page.locator("[data-dialog=edit]").click()
    expect(page.locator("#edit-dialog textarea")).to_have_value("a colleague's")
    client.patch(f"/v1/runs/{run_id}", json={"notes": "a later thought"}).raise_for_status()
    page.locator("#edit-dialog input[name=name]").fill("another name")
    page.locator("#edit-dialog [type=submit]").click()
    expect(page.locator("h1")).to_have_text("another name")
    assert client.get(f"/v1/runs/{run_id}").json()["notes"] == "a later thought"


def test_a_deletion_that_fails_half_way_goes_on_with_the_rest(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    for name in "abc":
        made.create(client, made.run_record(f"{run_id}-{name}", name=f"{run_id} {name}")).raise_for_status()
    window = open_window(f"/?search={run_id}")
    page = window.page
    for name in "abc":
        page.locator(f"input[value='{run_id}-{name}']").check()
    client.delete(f"/v1/runs/{run_id}-a").raise_for_status()  # somebody else was faster
    page.route(f"**/v1/runs/{run_id}-c", lambda route: route.abort())
    page.locator("#selection [data-dialog=delete]").click()
    page.locator("#delete-dialog [type=submit]").click()
    expect(page.locator("#delete-dialog .wrong")).not_to_be_empty()
    page.unroute(f"**/v1/runs/{run_id}-c")
    page.locator("#delete-dialog [type=submit]").click()
    expect(page.locator("#delete-dialog")).to_be_hidden()
    expect(page.locator("#runs-body tr")).to_have_count(0)
    assert [client.get(f"/v1/runs/{run_id}-{name}").status_code for name in "abc"] == [404, 404, 404]
    window.wrong.clear()  # the browser reports the requests that were refused


def test_a_narrow_screen_never_scrolls_sideways(
    app: FastAPI, client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    page = open_window("/", width=400, height=800).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    settings = app.state.settings
    app.state.settings = settings.model_copy(update={"token": SecretStr("correct horse")})
    try:
        page.goto("/login")
        expect(page.locator("input[name=token]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    finally:
        app.state.settings = settings
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
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        eventually(lambda name=figure: plot(page, name, color) != light, f"the dark {figure}")
    page.reload()
    drawn(page)
    assert plot(page, "heatmap", color) != light
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.evaluate("localStorage.clear()")


def test_runs_are_found_chosen_compared_edited_and_deleted(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    for name, norm in (("a", "bn"), ("b", "brn")):
        record = made.run_record(f"{run_id}-{name}", name=f"{run_id} {name}", config={"norm": norm}, tags=("sweep",))
        made.create(client, record).raise_for_status()
        rows = {"layers": made.layer_rows(range(1, 9), 3), "scalars": made.scalar_rows({"loss": [(1, 2.0), (8, 1.0)]})}
        made.send(client, record.id, rows).raise_for_status()
    page = open_window("/").page
    page.locator("input[type=search]").fill(f"{run_id} ")
    expect(page.locator("#runs-body tr")).to_have_count(2)
    expect(page).to_have_url(re.compile("search="))
    expect(page.locator("#runs-body .spark")).to_have_count(2)
    for box in page.locator("input[name=run]").all():
        box.check()
    page.locator("#compare").click()
    page.wait_for_url("**/compare?runs=**")
    drawn(page)
    expect(page.locator(".compared")).to_contain_text("brn")
    assert plot(page, "compare", "gd._fullData.length") == 4  # two runs, two panels
    page.locator("[data-view=group]").select_option("config.norm")
    eventually(lambda: plot(page, "compare", "gd._fullData[0].name") != f"{run_id} a", "groups")
    expect(page).to_have_url(re.compile(r"group=config\.norm$"))

    page.goto(f"/?search={run_id}")
    page.locator(f"input[value='{run_id}-b']").check()
    page.locator("#selection [data-dialog=edit]").click()
    page.locator("#edit-dialog input[name=name]").fill("renamed <b>")
    page.locator("#edit-dialog [type=submit]").click()
    expect(page.locator(f"tr[data-part='{run_id}-b'] th a").first).to_have_text("renamed <b>")
    page.locator("#selection [data-dialog=delete]").click()
    expect(page.locator("#delete-dialog")).to_contain_text("renamed <b>")
    page.locator("#delete-dialog [type=submit]").click()
    expect(page.locator("#runs-body tr")).to_have_count(1)
    assert client.get(f"/v1/runs/{run_id}-b").status_code == 404


def test_a_slider_of_the_advisor_moves_the_clip_rate_and_the_line_to_use(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    spread = {f"r_q{q:02d}": z for q, z in zip(wire.QUANTILES, (0.4, 0.5, 0.8, 1, 1.25, 2, 2.5), strict=True)}
    schedule = wire.Schedule(bn_steps=5, r_steps=10, d_steps=10, r_max=3.0, d_max=5.0)
    made.create(client, made.run_record(run_id, schedule=schedule, planned_steps=40)).raise_for_status()
    rows = {"layers": made.layer_rows(range(1, 31), 3, **spread, **LIMITS)}
    made.send(client, run_id, rows).raise_for_status()
    page = open_window(f"/runs/{run_id}/advisor").page
    drawn(page)
    clipped = "gd._fullData.find((t) => t.name === 'r clipped').y.at(-1)"
    before = plot(page, "advisor", clipped)
    page.locator("[data-mirror=r_max]").fill("1.2")
    eventually(lambda: plot(page, "advisor", clipped) > before + 0.2, "more is clipped")
    line = "RenormSchedule(bn_steps=5, r_steps=10, d_steps=10, r_max=1.2, d_max=5.0)"
    expect(page.locator("#line")).to_have_text(line)
    page.locator("[data-mirror=bn_steps]").fill("20")  # the others give way
    expect(page.locator("#line")).to_contain_text("bn_steps=20, r_steps=20, d_steps=20")
    page.locator("#fit").click()
    expect(page.locator("#line")).not_to_contain_text("r_max=1.2,")
    expect(page).to_have_url(re.compile("r_max="))


def test_a_report_opens_from_a_file_without_a_service(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window], tmp_path: Path
) -> None:
    bad = "</script><script>alert(1)</script>"
    made.create(client, made.run_record(run_id, name=bad)).raise_for_status()
    rows = {
        "layers": made.layer_rows(range(1, 9), 3, **LIMITS),
        "scalars": made.scalar_rows({bad: [(1, 1.0), (2, 2.0)]}),
    }
    made.send(client, run_id, rows).raise_for_status()
    file = tmp_path / "run.html"
    file.write_text(client.get(f"/runs/{run_id}/report").raise_for_status().text)
    page = open_window(file.as_uri()).page
    expect(page.locator("h1")).to_have_text(bad)
    for figure in ("schedule", "heatmap", "causes", "scalars"):
        expect(page.locator(f"#{figure}")).to_have_attribute("data-state", "ready")
        assert plot(page, figure, "gd._fullData.length") > 0
    assert page.evaluate("performance.getEntriesByType('resource').length") == 0


def test_a_plot_is_taken_as_csv_with_the_numbers_it_shows(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=2, steps=3, gap=[[0.5, 0.25]], **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    with page.expect_download() as download:
        page.locator("#heatmap [data-take=csv]").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[:2] == ["curve,x,y,value", "gap,1,block0.bn,0.5"]
    assert len(lines) == 1 + 2 * 3
    with page.expect_download() as download:
        page.locator("#schedule [data-take=csv]").click()
    with Path(download.value.path()).open(newline="") as table:
        curves = {row["curve"] for row in csv.DictReader(table)}
    assert {"r, 5–95 % of channels (upper)", "r, 5–95 % of channels (lower)", "limits in force"} <= curves
    with page.expect_download() as download:
        page.locator("#schedule [data-take=svg]").click()
    first = re.search(r"<rect[^>]*>", Path(download.value.path()).read_text())
    assert first is not None
    assert "fill: rgb(255, 255, 255); fill-opacity: 1" in first[0]  # opaque: readable wherever it is put


def test_a_million_rows_and_a_thousand_runs_are_drawn_at_once(
    open_window: Callable[..., Window], tmp_path: Path
) -> None:
    with serving_rows(str(tmp_path), 1_000_000) as url:
        page = open_window(f"{url}/").page
        expect(page.locator("#runs-body tr")).to_have_count(50)
        expect(page.locator(".pages")).to_contain_text("1,000 runs")
        took = []
        for _ in range(3):  # benchmarks/pages.py measures; the best of three fails only where something is badly slow
            page.goto(f"{url}/runs/bench")
            expect(page.locator("#schedule")).to_have_attribute("data-state", "ready")
            took.append(page.evaluate("performance.getEntriesByName('first-plot')[0].startTime"))
        page.goto("about:blank")
    assert min(took) < 3000, took


def test_the_page_follows_a_real_training(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "brn_core.worker", "--url", str(client.base_url), "--run-name", run_id]
    page = open_window(f"/?search={run_id}").page
    with subprocess.Popen([*command, "--steps", "60"], cwd=tmp_path, stdout=subprocess.DEVNULL) as training:
        page.locator("#runs-body th a").first.click()
        expect(page.locator("#schedule")).to_have_attribute("data-state", "ready")
        page.evaluate("document.querySelector('#schedule').dataset.witness = 'same'")
        assert training.wait(120) == 0
    expect(page.locator(".steps")).to_contain_text("60")
    expect(page.locator(".facts .state")).to_have_text("finished")
    expect(page.locator("#live")).to_be_hidden()
    newest = "gd._fullData.find((t) => t.name.startsWith('r:')).x.at(-1)"
    page.locator("#schedule").scroll_into_view_if_needed()
    eventually(lambda: plot(page, "schedule", newest) >= 59, "the last step in the schedule view")
    assert page.evaluate("document.querySelector('#schedule').dataset.witness") == "same"


@NEEDS_AXE
def test_axe_finds_nothing_serious_on_any_page_in_either_theme(
    client: httpx.Client, run_id: str, open_window: Callable[..., Window]
) -> None:
    made.write_run(client, run_id, layers=3, steps=20, ranks=3, gap=1.0, **LIMITS)
    made.write_run(client, f"{run_id}-2", layers=3, steps=20, **LIMITS)
    own = [f"/runs/{run_id}{path}" for path in ("", "/layers/1", "/ranks", "/advisor")]
    page = open_window("/").page
    for path in (*own, f"/compare?runs={run_id},{run_id}-2", "/"):
        page.goto(path)
        drawn(page)
        accessible(page)
