"""Pages over a real service: what they say, to whom, and what they never do with a user's text."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import plotly
import pytest
import synthetic as made
from fastapi import FastAPI
from pydantic import SecretStr

from brn_core import wire
from dashboard import login, templating, views
from dashboard.pages import Asked
from service import answers
from service.access import COOKIE
from service.diagnosis.finding import Diagnosis, Finding
from service.schemas import Run, Runs

TOKEN = "correct horse battery"
BROWSER = {"accept": "text/html,application/xhtml+xml"}


def _handlers(page: str) -> list[str]:
    """The attributes of a page that a browser would run as scripts. Text like them, in a value, is none."""
    found: list[str] = []

    class Attributes(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(name for name, _ in attrs if name.startswith("on"))

    Attributes().feed(page)
    return found


@pytest.fixture
def locked(app: FastAPI, client: httpx.Client) -> Iterator[httpx.Client]:
    """A client without cookies, of the session's service with a token set. chDB allows no second service."""
    open_settings = app.state.settings
    app.state.settings = open_settings.model_copy(update={"token": SecretStr(TOKEN)})
    try:
        with httpx.Client(base_url=client.base_url, timeout=30) as fresh:
            yield fresh
    finally:
        app.state.settings = open_settings


class TestRunList:
    def test_shows_each_run_with_status_verdict_step_norm_and_batch(self, client: httpx.Client, run_id: str) -> None:
        record = made.run_record(run_id, layers=2, name="list me", batch_size=32, planned_steps=40, tags=("t1",))
        made.create(client, record)
        rows = {"layers": made.layer_rows(range(1, 11), 2), "probe": made.probe_rows(range(1, 11))}
        made.send(client, run_id, rows).raise_for_status()
        verdict = client.get(f"/v1/runs/{run_id}/findings").json()["verdict"]  # computed now, and kept for the list
        page = client.get("/").text
        row = re.search(rf'<tr data-part="{run_id}".*?</tr>', page, re.DOTALL)
        assert row is not None
        text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row[0]))
        for part in ("list me", run_id, "t1", "running", "10 / 40", "BatchRenorm × 2", "32 × 1 rank"):
            assert part in text
        assert verdict["code"] in text

    def test_says_whether_somebody_has_looked_at_the_verdict_of_a_run(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id)).raise_for_status()
        made.send(client, run_id, made.clustered_tables()).raise_for_status()
        code = client.get(f"/v1/runs/{run_id}/findings").json()["verdict"]["code"]

        def verdict() -> str:
            row = re.search(rf'<tr data-part="{run_id}".*?</tr>', client.get("/").text, re.DOTALL)
            assert row is not None
            cell = re.search(r'<td class="c-verdict.*?</td>', row[0], re.DOTALL)
            assert cell is not None
            return cell[0]

        def mark(code: str, said: str) -> None:
            client.put(f"/v1/runs/{run_id}/findings/{code}/mark", json={"mark": said}).raise_for_status()

        mark("NH-LAG", "muted")  # not what the verdict is about
        assert code in verdict()
        assert 'class="tag"' not in verdict()
        for said in ("acknowledged", "muted"):
            mark(code, said)
            assert f'<span class="tag">{said}</span>' in verdict()
            assert ('class="c-verdict quieter"' in verdict()) == (said == "muted")
        mark(code, "open")
        assert 'class="tag"' not in verdict()

    def test_newest_first(self, client: httpx.Client, run_id: str) -> None:
        for name in ("a-older", "b-newer"):
            made.create(client, made.run_record(f"{run_id}-{name}"))
        page = client.get("/").text
        assert page.index(f"{run_id}-b-newer") < page.index(f"{run_id}-a-older")

    def test_fragment_is_the_part_that_changes(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id))
        fragment = client.get("/fragment").text
        assert f'data-part="{run_id}"' in fragment
        assert "<html" not in fragment

    def test_without_runs_shows_three_lines_that_start_one(self) -> None:
        nothing = Asked("", (), (), (), "created", ascending=False, cursor=None)
        html = templating.templates.get_template("runs_live.html").render(
            views=[], filtered=False, asked=nothing, sort_href={}, page=answers_page(), root="http://127.0.0.1:9999"
        )
        code = re.search(r"<code>(.*?)</code>", html, re.DOTALL)
        assert code is not None
        assert len(code[1].splitlines()) == 3
        assert 'url="http://127.0.0.1:9999"' in code[1].replace("&#34;", '"')


class TestRunPage:
    def test_names_the_run_its_config_and_every_statistic(self, client: httpx.Client, run_id: str) -> None:
        record = made.run_record(run_id, name="my run", config={"lr": 0.1, "data": {"name": "digits"}}, schedule=None)
        made.create(client, record)
        page = client.get(f"/runs/{run_id}").text
        assert '<h1 data-part="name">my run</h1>' in page
        assert "<dt>lr</dt><dd>0.1</dd>" in page
        assert "<dd>{&#34;name&#34;: &#34;digits&#34;}</dd>" in page
        for metric in wire.METRICS:
            assert f'<option value="{metric.name}"' in page
        for layer in record.layers:
            assert f'<option value="{layer.index}"' in page

    def test_text_from_users_is_never_markup(self, client: httpx.Client, run_id: str) -> None:
        bad = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
        record = made.run_record(run_id, name=bad, config={bad: bad}, tags=("<i>tag</i>",))
        layer = record.layers[0].model_copy(update={"name": bad})
        made.create(client, record.model_copy(update={"layers": (layer,)}))
        said = {"mark": "muted", "note": bad}
        client.put(f"/v1/runs/{run_id}/findings/NH-LAG/mark", json=said).raise_for_status()
        for address in ("/", f"/runs/{run_id}", f"/runs/{run_id}/fragment", f"/runs/{run_id}/report"):
            page = client.get(address).text
            assert "<script>alert" not in page
            assert "<img src=x" not in page
            assert "<i>tag" not in page
            assert "&lt;script&gt;alert(1)" in page

    def test_an_unknown_run_is_a_page_for_people_and_a_problem_for_scripts(self, client: httpx.Client) -> None:
        page = client.get("/runs/nobody", headers=BROWSER)
        assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert "nobody" in page.text
        for address in ("/runs/nobody/fragment", "/runs/nobody/figures/schedule", "/v1/runs/nobody"):
            answer = client.get(address)
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"

    def test_what_a_run_does_not_have_leads_back_to_the_run(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id, name="<b>mine</b>", layers=2))
        for path, link in (
            (f"/runs/{run_id}/layers/7", f'<a class="primary" href="/runs/{run_id}">To the run</a>'),
            (f"/runs/{run_id}/figures/nonsense", f'<a class="primary" href="/runs/{run_id}">To the run</a>'),
            (f"/runs/{run_id}/nowhere", f'<a class="primary" href="/runs/{run_id}">To the run</a>'),
            (f"/runs/{run_id}/nowhere/at/all", f'<a class="primary" href="/runs/{run_id}">To the run</a>'),
            ("/runs/nobody/layers/0", '<a class="primary" href="/">All runs</a>'),
            ("/runs/nobody/nowhere", '<a class="primary" href="/">All runs</a>'),
            ("/runs/nobody", '<a class="primary" href="/">All runs</a>'),
        ):
            page = client.get(path, headers=BROWSER)
            assert page.status_code == 404
            assert link in page.text, path
            assert ("&lt;b&gt;mine&lt;/b&gt;</a>" in page.text) == (run_id in path)
            assert 'href="/">All runs</a>' in page.text

    def test_an_unknown_page_is_a_page(self, client: httpx.Client) -> None:
        page = client.get("/nowhere", headers=BROWSER)
        assert page.status_code == 404
        assert "There is no page at /nowhere." in page.text

    def test_pages_run_no_scripts_but_ours(self, client: httpx.Client, run_id: str) -> None:
        assert _handlers('<p onclick="x()" title="&lt;p onload=1&gt;">') == ["onclick"]
        made.write_run(client, run_id, layers=2)
        for path in (
            "/",
            "/login",
            f"/runs/{run_id}",
            f"/runs/{run_id}/layers/1",
            f"/compare?runs={run_id}",
            "/nowhere",
        ):
            page = client.get(path, headers=BROWSER, follow_redirects=True)
            policy = dict(
                part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == "'self'", path
            assert not policy.keys() & {"script-src", "script-src-elem", "script-src-attr"}
            assert not re.search(r"<script(?![^>]*\bsrc=\"/)", page.text), path
            assert not _handlers(page.text), path


class TestFigures:
    def test_every_figure_of_a_run_is_drawn_with_its_data(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id, layers=3, steps=20, r_max=3.0, d_max=5.0)
        base = f"/runs/{run_id}/figures"
        for address, title in (
            ("schedule?layer=1", "r = σ_B / σ (ratio)"),
            ("heatmap?stat=r_q50", None),
            ("scalars", ""),
        ):
            figure = client.get(f"{base}/{address}").raise_for_status().json()
            assert figure["data"]
            assert title is None or figure["layout"]["yaxis"].get("title", {}).get("text", "") == title

    def test_a_drag_over_a_figure_chooses_steps_and_crops_nothing(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id)
        for name in ("schedule", "heatmap", "scalars", "causes", "moments", "batch"):
            layout = client.get(f"/runs/{run_id}/figures/{name}").raise_for_status().json()["layout"]
            axes = [axis for key, axis in layout.items() if key.startswith("yaxis")]
            assert all(axis["fixedrange"] for axis in axes), name

    def test_a_slider_that_moves_reads_nothing_anew_until_rows_come(
        self, client: httpx.Client, run_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made.write_run(client, run_id)
        asked: list[str] = []
        for name in ("series", "recorded"):
            question = getattr(answers, name)
            said = lambda *given, name=name, ask=question, **more: (asked.append(name), ask(*given, **more))[1]  # noqa: E731
            monkeypatch.setattr(answers, name, said)

        def slide(r_max: float) -> list[str]:
            asked.clear()
            limits = {"bn_steps": 1, "r_steps": 5, "d_steps": 5, "r_max": r_max, "d_max": 5}
            client.get(f"/runs/{run_id}/figures/advisor", params=limits).raise_for_status()
            return asked.copy()

        assert slide(2.0) == ["series", "recorded"]
        assert [slide(2.1), slide(2.2)] == [[], []]
        made.send(client, run_id, {"layers": made.layer_rows([21], 3)}, seq=2).raise_for_status()
        assert slide(2.2) == ["series", "recorded"]

    def test_theme_changes_the_colours(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id)
        light, dark = (client.get(f"/runs/{run_id}/figures/scalars?theme={t}").text for t in ("light", "dark"))
        assert light != dark

    @pytest.mark.parametrize(
        "address", ["heatmap?stat=nonsense", "schedule?layer=99", "schedule?layer=-1", "scalars?theme=pink"]
    )
    def test_what_does_not_exist_is_refused_with_a_reason(
        self, client: httpx.Client, run_id: str, address: str
    ) -> None:
        made.write_run(client, run_id)
        answer = client.get(f"/runs/{run_id}/figures/{address}")
        assert answer.status_code == 422
        assert answer.json()["detail"]

    def test_a_run_without_rows_has_figures_that_say_so(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id))
        for name in ("schedule", "heatmap", "scalars"):
            figure = client.get(f"/runs/{run_id}/figures/{name}").raise_for_status().json()
            assert re.match(r"No (rows|scalars) yet", figure["layout"]["annotations"][0]["text"])


class TestStatic:
    def test_plotly_comes_from_the_wheel_compressed_and_is_kept(self, client: httpx.Client) -> None:
        with client.stream("GET", f"/static/{templating.PLOTLY_NAME}", headers={"accept-encoding": "gzip"}) as answer:
            assert answer.headers["content-encoding"] == "gzip"
            assert "immutable" in answer.headers["cache-control"]
            sent = b"".join(answer.iter_raw())
        wheel = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        assert len(sent) < wheel.stat().st_size / 2
        assert gzip.decompress(sent) == wheel.read_bytes()

    def test_pages_name_no_other_host(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id))
        for page in ("/", f"/runs/{run_id}"):
            assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*', client.get(page).text)

    def test_the_event_stream_is_not_compressed(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id))
        with client.stream("GET", f"/v1/runs/{run_id}/events", headers={"accept-encoding": "gzip"}) as stream:
            assert "content-encoding" not in stream.headers
            assert next(stream.iter_lines()).startswith("event: cursor")

    def test_addresses_of_static_files_hold_their_content(self, client: httpx.Client) -> None:
        address = re.search(r'src="(/static/[0-9a-f]{12}/page\.js)"', client.get("/").text)
        assert address is not None
        answer = client.get(address[1])
        assert answer.text == (templating.STATIC / "page.js").read_text()
        assert "immutable" in answer.headers["cache-control"]


class TestLogin:
    def test_pages_lead_to_the_login_and_back(self, locked: httpx.Client) -> None:
        answer = locked.get("/runs/a?layer=1", headers=BROWSER)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?to=/runs/a%3Flayer%3D1")
        form = locked.get(answer.headers["location"]).text
        assert 'action="/login?to=/runs/a%3Flayer%3D1"' in form

    def test_a_page_that_does_not_exist_tells_nothing_of_its_run_without_the_token(
        self, client: httpx.Client, locked: httpx.Client, run_id: str
    ) -> None:
        token = {"authorization": f"Bearer {TOKEN}"}
        record = made.run_record(run_id, name="a secret plan").model_dump()
        client.post("/v1/runs", json=record, headers=token).raise_for_status()
        page = locked.get(f"/runs/{run_id}/nowhere", headers=BROWSER)
        assert page.status_code == 404
        assert "a secret plan" not in page.text
        assert "a secret plan" in locked.get(f"/runs/{run_id}/nowhere", headers=BROWSER | token).text

    def test_scripts_get_401(self, locked: httpx.Client) -> None:
        for address in ("/fragment", "/runs/a/figures/schedule", "/v1/runs"):
            assert locked.get(address).status_code == 401

    def test_a_wrong_token_opens_nothing(self, locked: httpx.Client) -> None:
        for body in ("token=wrong", "", f"token={'x' * 5000}", "token=%ff"):
            answer = locked.post("/login", content=body)
            assert answer.status_code == 401
            assert "set-cookie" not in answer.headers
            assert "not the token" in answer.text

    def test_the_right_token_opens_pages_and_rest_with_a_cookie_scripts_cannot_read(self, locked: httpx.Client) -> None:
        answer = locked.post("/login?to=/runs", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/runs")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"{COOKIE}=")
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert TOKEN not in cookie
        assert locked.get("/", headers=BROWSER).status_code == 200
        assert locked.get("/v1/runs").status_code == 200

    def test_without_a_token_the_login_leads_to_the_runs(self, client: httpx.Client) -> None:
        page = client.get("/login?to=/runs/a", headers=BROWSER)
        assert (page.status_code, page.headers["location"]) == (303, "/")
        answer = client.post("/login?to=/", content="token=anything")
        assert answer.status_code == 303
        assert "set-cookie" not in answer.headers

    @pytest.mark.parametrize(
        "target", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x", ""]
    )
    def test_never_leads_to_another_site(self, target: str) -> None:
        assert login.local_path(target) == "/"

    @pytest.mark.parametrize("target", ["/\t/evil.example", "/\n/evil.example", "/a\r\nSet-Cookie: b=c"])
    def test_signs_that_browsers_drop_stay_part_of_the_path(self, locked: httpx.Client, target: str) -> None:
        answer = locked.post("/login", params={"to": target}, data={"token": TOKEN})
        assert answer.headers["location"].startswith(("/%", "/a%0D%0A"))

    def test_leads_back_to_a_page_of_ours(self) -> None:
        assert login.local_path("/runs/a?layer=1") == "/runs/a?layer=1"


NOW = datetime(2026, 1, 1, tzinfo=UTC)


def answers_page() -> Runs:
    return Runs(runs=[], total=0, next=None)


def a_run(**changes: Any) -> Run:
    fields = made.run_record("r", planned_steps=100).model_dump() | {
        "status": "running",
        "state": "running",
        "created_at": NOW,
        "updated_at": NOW,
        "last_step": 25,
        "rows": 1,
        "verdict": {"code": "HEALTHY", "severity": "ok", "summary": "-"},
    }
    return Run.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("changes", "progress"),
    [({}, 0.25), ({"last_step": None}, 0.0), ({"last_step": 300}, 1.0), ({"planned_steps": None}, None)],
)
def test_progress_is_the_share_of_the_planned_steps(changes: dict[str, Any], progress: float | None) -> None:
    assert views.run_view(a_run(**changes), []).progress == progress


def test_a_mixed_network_names_all_its_norms() -> None:
    layers = [a_run().layers[0], a_run().layers[1].model_copy(update={"kind": "BatchNorm"})]
    assert views.run_view(a_run(), layers).norm == "BatchNorm + BatchRenorm × 2"


def test_the_worst_finding_stands_first() -> None:
    def finding(code: str, severity: str) -> Finding:
        fields = {"code": code, "severity": severity, "summary": "", "evidence": None, "remedy": None, "steps": (1, 2)}
        return Finding.model_validate(fields)

    given = (finding("a", "info"), finding("b", "critical"), finding("c", "warning"), finding("d", "critical"))
    assert [f.code for f in views.by_severity(given)] == ["b", "d", "c", "a"]


def test_a_finding_is_shown_with_evidence_where_when_and_remedy(run_id: str) -> None:
    fields = {
        "code": "NH-CLUSTER",
        "severity": "critical",
        "summary": "One sentence.",
        "layers": [f"layer{i}" for i in range(9)],
        "ranks": [1],
        "steps": (1200, 3000),
        "evidence": {
            "statistic": "F <ratio>",
            "value": 3.4,
            "low": 2.9,
            "high": 4.1,
            "threshold": 1.2,
            "z": 8.0,
            "steps_used": 400,
            "query": "v1/runs/r/series?stat=gap",
        },
        "remedy": {"text": "Shuffle.", "code": "DataLoader(shuffle=True)"},
    }
    verdict = {"code": "NH-CLUSTER", "severity": "critical", "summary": "One sentence - and it shows."}
    diagnosis = Diagnosis.model_validate({"run": "r", "verdict": verdict, "step": 3000, "findings": [fields]})
    view = views.run_view(a_run(), [])
    context = views.findings_context(diagnosis, view.run)
    html = templating.templates.get_template("run_live.html").render(view=view, run=view.run, **context)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for part in (
        "Fix this", "NH-CLUSTER", "since step 1,200", "One sentence - and it shows.", "layer5", "and 3 more layers",
        "rank 1", "3.4", "95 % CI 2.9 to 4.1", "F &lt;ratio&gt;", "threshold 1.2", "z = 8", "400 steps", "Shuffle.",
        "DataLoader(shuffle=True)",
    ):  # fmt: skip
        assert part in text
    assert "layer6<" not in html
    assert 'href="/v1/runs/r/series?stat=gap"' in html


@pytest.mark.parametrize(
    ("path", "href"), [("v1/a", "/v1/a"), ("/v1/a", "/v1/a"), ("//evil", "/evil"), ("javascript:x", "/javascript:x")]
)
def test_an_evidence_link_stays_on_this_service(path: str, href: str) -> None:
    assert templating.evidence_href(path) == href


@pytest.mark.parametrize(
    ("value", "text"), [(3.0, "3"), (-0.12345, "−0.1235"), (12345.6, "12,346"), (None, "–"), (float("nan"), "nan")]
)
def test_numbers_are_short_and_have_a_true_minus(value: float | None, text: str) -> None:
    assert templating.number(value) == text
