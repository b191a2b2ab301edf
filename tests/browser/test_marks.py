"""Marks of findings, and what a page tells of their past: by keyboard, over updates, and where writing is not allowed.

As in all browser tests here, a console error fails the test.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import synthetic as made
from chromium import NEEDS_AXE, NEEDS_CHROMIUM, Window, accessible, eventually
from fastapi import FastAPI
from playwright.sync_api import Locator, Page, expect
from pydantic import SecretStr

from service import history, windows
from service.store import Store

pytestmark = NEEDS_CHROMIUM

Open = Callable[..., Window]

CODE = "NH-CLUSTER"
NOTE = "the sampler is on purpose <b>here</b>"


@pytest.fixture
def clustered(client: httpx.Client, store: Store, run_id: str) -> str:
    """A run whose batches are clustered, that was diagnosed once, and again when they seemed less so."""
    made.create(client, made.run_record(run_id, config={"sampler": "few-labels"})).raise_for_status()
    made.send(client, run_id, made.clustered_tables()).raise_for_status()
    eventually(lambda: changes(client, run_id, CODE), "the diagnosis")
    seen = windows.diagnosis(store, run_id)
    milder = [f.model_copy(update={"severity": "info"}) if f.code == CODE else f for f in seen.findings]
    history.note(store, seen.model_copy(update={"findings": tuple(milder)}))
    return run_id


def changes(client: httpx.Client, run_id: str, code: str) -> list[str]:
    """What happened to a finding, by the service's answer."""
    found = client.get(f"/v1/runs/{run_id}/findings/history").raise_for_status().json()["findings"]
    return [event["what"] for own in found if own["code"] == code for event in own["events"]]


def mark(client: httpx.Client, run_id: str, code: str, said: str, note: str = "") -> None:
    client.put(f"/v1/runs/{run_id}/findings/{code}/mark", json={"mark": said, "note": note}).raise_for_status()


def card_of(page: Page) -> Locator:
    return page.locator(f".card[data-part='{CODE}']")


def more_of_the_same(client: httpx.Client, run_id: str) -> None:
    """Rows that move the numbers of the finding."""
    steps = range(200, 260)
    made.send(
        client, run_id, {"probe": made.probe_rows(steps, samples=4, seed=1), "layers": made.layer_rows(steps, 3)}, seq=2
    ).raise_for_status()


def test_a_finding_is_marked_by_keyboard_and_stays_so_over_an_update_and_a_reload(
    client: httpx.Client, clustered: str, open_window: Open
) -> None:
    page = open_window(f"/runs/{clustered}").page
    card, dialog = card_of(page), page.locator("#mark-dialog")
    button = card.locator("button[data-mark]")
    button.focus()
    page.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    expect(dialog.locator("h2")).to_have_text(f"Mark {CODE}")
    expect(dialog.locator("input[value=open]")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.type(NOTE)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(dialog.get_by_role("button", name="Save")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(card.locator(".tag")).to_have_text("acknowledged")
    expect(card.locator(".words")).to_have_text(f"Note: {NOTE}")
    expect(button).to_be_focused()

    card.evaluate("(card) => { card.dataset.witness = 'old'; }")
    more_of_the_same(client, clustered)
    expect(page.locator(".verdict")).to_contain_text("judged at step 259")
    expect(card).not_to_have_attribute("data-witness", "old")  # its numbers are new
    expect(card.locator(".tag")).to_have_text("acknowledged")
    page.reload()
    expect(card.locator(".tag")).to_have_text("acknowledged")
    expect(card.locator(".words")).to_have_text(f"Note: {NOTE}")

    button.press("Enter")  # and taken back
    expect(dialog.locator("input[value=acknowledged]")).to_be_focused()
    expect(dialog.locator("textarea")).to_have_value(NOTE)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(card.locator(".tag")).to_have_count(0)
    expect(button).to_be_focused()


def test_an_update_leaves_a_dialog_that_is_open_and_the_past_that_was_opened(
    client: httpx.Client, clustered: str, open_window: Open
) -> None:
    page = open_window(f"/runs/{clustered}").page
    card, dialog = card_of(page), page.locator("#mark-dialog")
    card.locator(".past summary").click()
    expect(card.locator(".course li").nth(1)).to_contain_text("eased at step 199")
    button = card.locator("button[data-mark]")
    button.press("Enter")
    expect(dialog.locator("input[value=open]")).to_be_focused()
    page.keyboard.press("ArrowDown")
    dialog.locator("textarea").fill("half a sen")
    card.evaluate("(card) => { card.dataset.witness = 'old'; }")
    more_of_the_same(client, clustered)
    expect(card).not_to_have_attribute("data-witness", "old")
    expect(dialog).to_be_visible()
    expect(dialog.locator("textarea")).to_have_value("half a sen")
    expect(dialog.locator("textarea")).to_be_focused()
    expect(dialog.locator("input[value=acknowledged]")).to_be_checked()
    assert card.locator(".past").evaluate("(details) => details.open")
    page.keyboard.press("Escape")
    expect(button).to_be_focused()  # another one than that which opened it
    expect(card.locator(".tag")).to_have_count(0)  # nothing was saved


def test_what_is_over_has_a_line_that_stays_open_and_can_be_marked(
    client: httpx.Client, store: Store, clustered: str, open_window: Open
) -> None:
    seen = windows.diagnosis(store, clustered)
    lag = next(f for f in seen.findings if f.code == CODE).model_copy(
        update={"code": "NH-LAG", "summary": "It lagged.", "steps": (12, 150), "since": 12}
    )
    history.note(store, seen.model_copy(update={"findings": (*seen.findings, lag)}))
    history.note(store, seen)
    page = open_window(f"/runs/{clustered}").page
    line = page.locator("details[data-part='earlier NH-LAG']")
    expect(line.locator("summary")).to_have_text("Earlier: NH-LAG, steps 12 to 199")
    line.locator("summary").press("Enter")
    expect(line).to_contain_text("It lagged.")
    line.locator("button[data-mark]").press("Enter")
    page.locator("#mark-dialog input[value=muted]").check()
    page.locator("#mark-dialog [type=submit]").click()
    expect(line.locator(".tag")).to_have_text("muted")
    assert line.evaluate("(details) => details.open")
    expect(line.locator("button[data-mark]")).to_be_focused()


def test_the_list_of_runs_says_what_was_made_of_a_verdict_and_a_muted_badge_steps_back(
    client: httpx.Client, store: Store, clustered: str, open_window: Open
) -> None:
    windows.diagnosis(store, clustered)
    page = open_window(f"/?search={clustered}").page
    cell = page.locator(f"tr[data-part='{clustered}'] .c-verdict")
    badge, chip = cell.locator(".badge"), cell.locator(".tag")
    code = str(client.get(f"/v1/runs/{clustered}").json()["verdict"]["code"])
    expect(badge).to_contain_text(code)
    expect(chip).to_have_count(0)

    def colour() -> str:
        return str(badge.evaluate("(badge) => getComputedStyle(badge).color"))

    loud = colour()
    for said in ("acknowledged", "muted"):
        mark(client, clustered, code, said)
        expect(chip).to_have_text(said)  # the page keeps itself current
        assert (colour() == loud) == (said == "acknowledged")
    placed, beside = badge.bounding_box(), chip.bounding_box()
    assert placed is not None
    assert beside is not None
    assert beside["x"] > placed["x"] + placed["width"]
    assert abs(beside["y"] + beside["height"] / 2 - placed["y"] - placed["height"] / 2) < 4, "on one line"
    mark(client, clustered, code, "open")
    expect(chip).to_have_count(0)
    assert colour() == loud


def test_who_may_only_read_is_told_so_in_the_dialog(
    app: FastAPI, client: httpx.Client, clustered: str, open_window: Open
) -> None:
    settings = app.state.settings
    tokens = {"token": SecretStr("correct horse"), "read_token": SecretStr("curious horse")}
    app.state.settings = settings.model_copy(update=tokens)
    try:
        window = open_window(f"/login?to=/runs/{clustered}")
        page = window.page
        page.get_by_label("Token").fill("curious horse")
        page.keyboard.press("Enter")
        card_of(page).locator("button[data-mark]").press("Enter")
        dialog = page.locator("#mark-dialog")
        dialog.locator("input[value=muted]").check()
        dialog.locator("[type=submit]").click()
        expect(dialog.get_by_role("alert")).to_contain_text("this token may only read")
        expect(dialog).to_be_visible()
        assert window.wrong
        assert all("403" in line for line in window.wrong), window.wrong  # the browser reports what was refused
        window.wrong.clear()
        page.keyboard.press("Escape")
        card_of(page).locator("button[data-mark]").press("Enter")  # a new try begins without the old complaint
        expect(dialog.get_by_role("alert")).to_have_count(0)
        expect(dialog.locator("input[value=open]")).to_be_checked()
    finally:
        app.state.settings = settings
        page.context.clear_cookies()


@NEEDS_AXE
@pytest.mark.parametrize("width", [1400, 390])
def test_axe_finds_nothing_serious_in_marks_their_past_and_their_dialog(
    client: httpx.Client, clustered: str, open_window: Open, width: int
) -> None:
    mark(client, clustered, CODE, "muted", NOTE)
    mark(client, clustered, "NH-LAG", "acknowledged", NOTE)
    page = open_window(f"/runs/{clustered}", width=width, height=900).page
    expect(page.locator(".quieter .tag")).to_have_text("muted")
    for summary in page.locator(".past summary").all():
        summary.click()
    accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    card_of(page).locator("button[data-mark]").press("Enter")
    expect(page.locator("#mark-dialog")).to_be_visible()
    accessible(page)
    page.goto(f"/?search={clustered}")
    expect(page.locator(".quieter .tag")).to_have_text("muted")
    accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
