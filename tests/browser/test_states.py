"""What a person reads when things are not as usual, where the first screen leads, and what an update leaves alone.

As in all browser tests here, a console error fails the test. Where the browser itself reports a request that was
refused, the test says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import synthetic as made
from chromium import (
    LIMITS,
    NEEDS_AXE,
    NEEDS_CHROMIUM,
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

from benchmarks.query import service
from brn_core import wire
from service.answers import records

pytestmark = NEEDS_CHROMIUM

Open = Callable[..., Window]


def refused(window: Window, reason: str) -> None:
    """The browser has reported requests that failed, all for this reason; they are forgiven."""
    assert window.wrong
    assert all(reason in line for line in window.wrong), window.wrong
    window.wrong.clear()


# -------------------------------------------------------------------------------------------- nothing there, no longer


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/runs/nobody", "There is no run 'nobody'"),
        ("/runs/{run}/layers/7", "has 3 layers, numbered from 0: there is no layer 7."),
        ("/nowhere", "There is no page at /nowhere."),
    ],
)
def test_what_does_not_exist_is_said_and_leads_back(
    client: httpx.Client, run_id: str, open_window: Open, path: str, said: str
) -> None:
    made.write_run(client, run_id, layers=3, steps=5)
    window = open_window(path.format(run=run_id))
    expect(window.page.locator("h1")).to_have_text("Not found")
    expect(window.page.locator("main")).to_contain_text(said)
    refused(window, "404")
    window.page.get_by_role("link", name="All runs").click()
    expect(window.page.locator("#runs-body")).to_be_attached()


def test_a_run_that_is_deleted_while_somebody_looks_is_said_and_stays_readable(
    client: httpx.Client, run_id: str, open_window: Open
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    window = open_window(f"/runs/{run_id}")
    page = window.page
    drawn(page)
    client.delete(f"/v1/runs/{run_id}").raise_for_status()
    expect(page.locator("#banner")).to_have_text("This run no longer exists. What you see is its last state.")
    assert plot(page, "schedule", "gd._fullData.length") > 0
    refused(window, "404")


def test_a_run_without_rows_says_what_is_missing_and_fills_itself(
    client: httpx.Client, run_id: str, open_window: Open
) -> None:
    made.create(client, made.run_record(run_id)).raise_for_status()
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    expect(page.locator("#findings .answer")).to_have_text("No rows yet")
    expect(page.locator(".card code")).to_have_text("recorder.step(loss)")
    for figure in ("schedule", "heatmap", "causes"):
        expect(page.locator(f"#{figure} .caption")).to_have_text(
            "No rows yet: the first recorded step will appear here."
        )
        expect(page.locator(f"#{figure} .plot")).to_be_hidden()  # no blank canvas
        expect(page.locator(f"#{figure} .tools")).to_be_hidden()
    with wheel_of_time(page):
        write_more(client, run_id, 1, 20, seq=1)
        expect(page.locator(".steps")).to_contain_text("20")
        for figure in ("schedule", "heatmap", "causes", "scalars"):
            page.locator(f"#{figure}").scroll_into_view_if_needed()
            expect(page.locator(f"#{figure} .plot .main-svg").first).to_be_visible()
        assert plot(page, "schedule", "gd.clientWidth === gd._fullLayout.width")  # drawn at the width it has


@pytest.mark.parametrize(
    ("constant", "state", "said"),
    [
        ("STALLED_SECONDS", "stalled", "It may be evaluating, paused, or cut off."),
        ("CRASHED_SECONDS", "crashed", "It is taken for crashed; its next rows would revive it."),
    ],
)
def test_a_run_that_fell_silent_says_so_above_what_it_left(
    client: httpx.Client,
    run_id: str,
    open_window: Open,
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    state: str,
    said: str,
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    monkeypatch.setattr(records, constant, -1)
    page = open_window(f"/runs/{run_id}").page
    expect(page.locator(".facts .state")).to_have_text(state)
    expect(page.locator("#head .note")).to_contain_text(said)
    expect(page.locator("#head .note")).to_contain_text("sends it")  # the spool has what did not arrive
    drawn(page)
    assert plot(page, "schedule", "gd._fullData.length") > 0
    monkeypatch.undo()
    write_more(client, run_id, 11, 20, seq=2)
    expect(page.locator(".facts .state")).to_have_text("running")
    expect(page.locator("#head .note")).to_have_count(0)


def test_a_service_that_goes_down_and_comes_back_is_told_and_caught_up_with(
    run_id: str, open_window: Open, tmp_path: Path
) -> None:
    store = f"chdb://{tmp_path}/store"
    with service(store, "dashboard") as url:
        with httpx.Client(base_url=url, timeout=30) as own:
            made.write_run(own, run_id, layers=3, steps=10, **LIMITS)
        window = open_window(f"{url}/runs/{run_id}?layer=1")
        page = window.page
        drawn(page)
    expect(page.locator("#banner")).to_have_text("Connection lost, retrying. What you see is the last state received.")
    expect(page.locator("#live")).to_be_hidden()
    expect(page.locator(".steps")).to_contain_text("10")
    assert plot(page, "schedule", "gd._fullData.length") > 0
    with service(store, "dashboard", int(url.rpartition(":")[2])) as again, wheel_of_time(page):
        assert again == url
        with httpx.Client(base_url=url, timeout=30) as own:
            write_more(own, run_id, 11, 20, seq=2)
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#live")).to_be_visible()
        expect(page.locator(".steps")).to_contain_text("20")
        page.locator("#schedule").scroll_into_view_if_needed()
        newest = "gd._fullData.find((t) => t.name.startsWith('r:')).x.at(-1)"
        eventually(lambda: plot(page, "schedule", newest) == 20, "the newest step in the schedule view")
        expect(page).to_have_url(re.compile(r"\?layer=1$"))
        expect(page.locator("#layer")).to_have_value("1")
    page.goto("about:blank")
    refused(window, "ERR_")


def test_a_token_is_asked_for_and_a_wrong_one_is_told(
    app: FastAPI, client: httpx.Client, run_id: str, open_window: Open
) -> None:
    made.write_run(client, run_id, layers=3, steps=10, **LIMITS)
    window = open_window(f"/runs/{run_id}")
    page = window.page
    drawn(page)
    settings = app.state.settings
    app.state.settings = settings.model_copy(update={"token": SecretStr("correct horse")})
    try:
        page.locator("#layer").select_option("1")  # whoever has a page open is led to the login, too
        page.wait_for_url("**/login?to=**")
        expect(page.locator("h1")).to_have_text("Sign in")
        expect(page.locator("main")).to_contain_text("BRN_SERVICE_TOKEN")
        window.wrong.clear()  # the browser reports what was refused
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type("wrong horse")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("That is not the token of this service.")
        expect(page.get_by_label("Token")).to_have_attribute("aria-invalid", "true")
        refused(window, "401")
        page.get_by_label("Token").fill("correct horse")
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/runs/{run_id}?layer=1")  # where one wanted to go
        expect(page.locator("#layer")).to_have_value("1")
        drawn(page)
    finally:
        app.state.settings = settings
        page.context.clear_cookies()


@NEEDS_AXE
def test_axe_finds_nothing_serious_in_any_state_in_either_theme(
    app: FastAPI, client: httpx.Client, run_id: str, open_window: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.create(client, made.run_record(f"{run_id}-empty")).raise_for_status()
    made.create(client, made.run_record(run_id, world_size=2)).raise_for_status()
    made.send(client, run_id, made.clustered_tables()).raise_for_status()
    window = open_window("/nowhere")
    accessible(window.page)
    refused(window, "404")
    for path in (f"/runs/{run_id}-empty", f"/runs/{run_id}-empty/ranks", f"/runs/{run_id}-empty/layers/1"):
        window.page.goto(path)
        drawn(window.page)
        accessible(window.page)
    monkeypatch.setattr(records, "CRASHED_SECONDS", -1)
    window.page.goto(f"/runs/{run_id}")
    window.page.locator("a.show").first.click()
    drawn(window.page)
    accessible(window.page)
    settings = app.state.settings
    app.state.settings = settings.model_copy(update={"token": SecretStr("correct horse")})
    try:
        window.page.goto("/login")
        accessible(window.page)
    finally:
        app.state.settings = settings


# --------------------------------------------------------------------------------------------- the answer, and evidence


def clustered(client: httpx.Client, run_id: str) -> None:
    made.create(client, made.run_record(run_id, config={"sampler": "few-labels"})).raise_for_status()
    made.send(client, run_id, made.clustered_tables()).raise_for_status()


def test_the_first_screen_has_verdict_finding_since_when_where_and_remedy(
    client: httpx.Client, run_id: str, open_window: Open
) -> None:
    clustered(client, run_id)
    page = open_window(f"/runs/{run_id}", width=1400, height=900).page
    expect(page.locator("#findings .verdict h2")).to_contain_text("Batches are not independent samples")
    card = page.locator(".card").first
    expect(card).to_contain_text("NH-CLUSTER")
    expect(card.locator(".since")).to_contain_text("since step")
    expect(card.locator(".where")).not_to_be_empty()
    expect(card.locator(".remedy code")).not_to_be_empty()
    shown = ["#findings .verdict h2", ".card >> nth=0", ".card .since", ".card .where", ".card .copy", ".card a.show"]
    bottoms = {}
    for part in shown:
        box = page.locator(part).first.bounding_box()
        assert box is not None, part
        bottoms[part] = box["y"] + box["height"]
    assert max(bottoms.values()) <= 900, bottoms
    below = page.locator("#schedule").bounding_box()
    assert below is not None
    assert below["y"] < 900, "the first plot begins on the first screen"
    card.locator(".copy").click()
    code = card.locator(".remedy code").text_content()
    assert page.evaluate("getSelection().toString()") == code


def tables_that_lose_by_inference() -> dict[str, object]:
    """600 steps of one rank with independent batches, and a loss that is 1 higher in inference mode."""
    steps = range(1, 601)
    shadow = range(1, 601, 20)
    return {
        "probe": made.probe_rows(steps),
        "layers": made.layer_rows(steps, 3, **LIMITS),
        "scalars": made.scalar_rows(
            {
                "loss": [(step, 1 / step) for step in steps],
                wire.SCALAR_SHADOW_TRAIN_LOSS: [(step, 0.1 + 0.001 * (step % 3)) for step in shadow],
                wire.SCALAR_SHADOW_EVAL_LOSS: [(step, 1.1 + 0.001 * (step % 7)) for step in shadow],
                wire.SCALAR_SHADOW_DISAGREEMENT: [(step, 0.4) for step in shadow],
            }
        ),
    }


def of_a_layer(client: httpx.Client, run_id: str) -> None:
    broken = {f"r_q{q:02d}": [[1, 1, 1]] * 12 + [[1, 1, float("nan")]] * 8 for q in wire.QUANTILES}
    counts = [[0, 0, 0]] * 12 + [[0, 0, 4]] * 8
    made.write_run(client, run_id, layers=3, steps=20, nonfinite_channels=counts, **broken, **LIMITS)


def of_the_shadow_pass(client: httpx.Client, run_id: str) -> None:
    record = made.run_record(run_id)
    layers = tuple(layer.model_copy(update={"momentum": 0.1}) for layer in record.layers)  # settled after 250 steps
    made.create(client, record.model_copy(update={"layers": layers})).raise_for_status()
    made.send(client, run_id, tables_that_lose_by_inference()).raise_for_status()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "code", "drawn_as", "layer"),
    [
        (of_a_layer, "NH-NONFINITE", "nonfinite_channels", "2"),
        (clustered, "NH-CLUSTER", "F of the input probe", ""),
        (of_the_shadow_pass, "NH-GAP", "inference", "0"),
    ],
)
def test_a_click_on_a_finding_moves_every_plot_to_its_evidence(
    client: httpx.Client,
    run_id: str,
    open_window: Open,
    make: Callable[[httpx.Client, str], None],
    code: str,
    drawn_as: str,
    layer: str,
) -> None:
    make(client, run_id)
    page = open_window(f"/runs/{run_id}").page
    drawn(page)
    page.locator(".card", has=page.locator(".badge", has_text=code)).locator("a.show").first.click()
    expect(page.locator("#evidence h2")).to_be_focused()
    drawn(page)
    expect(page).to_have_url(re.compile(f"finding={code}"))
    expect(page.locator("#layer")).to_have_value(layer)
    names = plot(page, "evidence", "gd._fullData.map((trace) => trace.name)")
    assert any(drawn_as in name for name in names), names
    first, last = (int(end) for end in re.findall(r"mark=(\d+)-(\d+)", page.url)[0])
    for figure in ("evidence", "schedule", "heatmap", "causes", "scalars"):
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        marks = "gd.layout.shapes.filter((s) => s.name === 'where it was seen').map((s) => [s.x0, s.x1])[0]"
        eventually(lambda name=figure, what=marks: plot(page, name, what) == [first, last], f"the mark in {figure}")
    page.locator("#all-steps").click()
    expect(page.locator("#evidence")).to_be_hidden()


# ------------------------------------------------------------------------------------------------ what an update leaves


def test_an_update_shows_every_finding_once(client: httpx.Client, run_id: str, open_window: Open) -> None:
    made.write_run(client, run_id, layers=3, steps=120, **LIMITS)
    page = open_window(f"/runs/{run_id}").page
    cards = page.locator(".card")
    before = cards.all_text_contents()
    assert len([text for text in before if "NH-WITHHELD" in text]) >= 2  # of one code
    write_more(client, run_id, 121, 130, seq=2)
    expect(page.locator(".verdict")).to_contain_text("judged at step 130")
    fragment = client.get(f"/runs/{run_id}/fragment").text
    expect(cards).to_have_count(fragment.count("<article"))
    for text in cards.all_text_contents():
        assert "step 120" not in text


def test_an_update_leaves_zoom_choices_scroll_and_what_was_opened(
    client: httpx.Client, run_id: str, open_window: Open
) -> None:
    made.write_run(client, run_id, layers=3, steps=30, **LIMITS)
    run = open_window(f"/runs/{run_id}?layer=1&from=5&to=15").page
    layer = open_window(f"/runs/{run_id}/layers/1?from=5&to=15").page
    kept = {}
    place = "gd.getBoundingClientRect().top"  # on the screen: what is read does not move, whatever grows above it
    for page, figure in ((run, "schedule"), (layer, "schedule")):
        drawn(page)
        page.locator("#head summary").click()
        page.locator(f"#{figure}").scroll_into_view_if_needed()
        eventually(lambda p=page: plot(p, "schedule", "[...gd.layout.xaxis.range]") == [5, 15], "the zoom")
        page.locator(f"#{figure} .legendtoggle").last.click()  # d is put aside
        hidden = "gd._fullData.filter((t) => t.visible === 'legendonly').map((t) => t.name)"
        eventually(lambda p=page, what=hidden: plot(p, "schedule", what), "a trace put aside")
        assert page.evaluate("scrollY") > 0
        kept[page] = (plot(page, "schedule", hidden), plot(page, "schedule", place))
    run.locator("#heatmap").evaluate("(panel) => panel.querySelector('#stat').focus({preventScroll: true})")
    write_more(client, run_id, 31, 40, seq=2)
    for page in (run, layer):
        expect(page.locator(".steps")).to_contain_text("40")
        page.wait_for_timeout(1500)  # figures follow the text within a second
        assert plot(page, "schedule", "[...gd.layout.xaxis.range]") == [5, 15]
        assert plot(page, "schedule", hidden) == kept[page][0]
        assert plot(page, "schedule", place) == pytest.approx(kept[page][1], abs=1)
        assert page.locator("#head details").evaluate("(details) => details.open")
        expect(page).to_have_url(re.compile(r"from=5&to=15$"))
    expect(run.locator("#layer")).to_have_value("1")
    expect(run.locator("#stat")).to_be_focused()


@pytest.mark.parametrize("path", ["", "/layers/1"])
def test_every_plot_is_taken_by_keyboard_as_svg_png_and_csv(
    client: httpx.Client, run_id: str, open_window: Open, path: str
) -> None:
    made.write_run(client, run_id, layers=3, steps=30, **LIMITS)
    page = open_window(f"/runs/{run_id}{path}").page
    drawn(page)
    begins = {"svg": b"<svg", "png": b"\x89PNG", "csv": b"curve,x,y,value\r\n"}
    taken = 0
    panels = page.locator(".panel[data-figure]:not([hidden]):not([data-empty])")
    for name in [panel.get_attribute("id") for panel in panels.all()]:
        page = open_window(f"/runs/{run_id}{path}").page  # Chromium lets a page that nobody watches have ten downloads
        drawn(page)
        panel = page.locator(f"#{name}")
        panel.scroll_into_view_if_needed()
        for what, begin in begins.items():
            with page.expect_download() as download:
                panel.locator(f"[data-take={what}]").press("Enter")  # focuses it first
            data = Path(download.value.path()).read_bytes()
            assert data.startswith(begin), (name, what, data[:40])
            assert download.value.suggested_filename == f"{run_id}-{name}.{what}"
            if what == "csv":
                assert data.count(b"\r\n") > 30, name
            taken += 1
    assert taken >= 9
