"""What the newer pages say: the list of runs, layer, ranks, comparison, reports; and findings as addresses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import synthetic as made

from brn_core import wire
from dashboard import report, templating, views
from dashboard.figures.palette import PALETTES
from dashboard.figures.probe import inputs_of_ranks
from dashboard.figures.rank_spread import shown_ranks
from dashboard.pages import rank_rows
from service.diagnosis.finding import Diagnosis, Finding, Verdict
from service.history import Event, FindingHistory
from service.schemas import Probe, RankHealth, Ranks, Run
from service.settings import Settings
from service.store import Store


def finding(
    code: str = "NH-SMALL", query: str = "/v1/runs/r/series?stat=gap&stat=mean_noise&layer=2", **more: object
) -> Finding:
    evidence = {"statistic": "G", "value": 1.0, "steps_used": 50, "query": query}
    fields = {"code": code, "severity": "warning", "summary": "-", "evidence": evidence, "remedy": None}
    return Finding.model_validate(fields | {"steps": (400, 500)} | more)


def a_run(**changes: object) -> Run:
    verdict = {"code": "HEALTHY", "severity": "ok", "summary": "-"}
    fields = made.run_record("r").model_dump() | {
        "status": "running",
        "state": "running",
        "rows": 1,
        "verdict": verdict,
    }
    return Run.model_validate(
        fields | {"created_at": "2026-01-01T00:00Z", "updated_at": "2026-01-01T00:00Z", "last_step": 1000} | changes
    )


class TestFindingsAsAddresses:
    def test_a_finding_shows_its_layer_statistic_and_steps(self) -> None:
        found = parse_qs(views.finding_view(finding(), "NH-SMALL", a_run()))
        assert found == {
            "finding": ["NH-SMALL"], "mark": ["400-500"], "layer": ["2"], "stat": ["gap"],
            "from": ["375"], "to": ["525"],
        }  # fmt: skip

    def test_a_finding_that_lasts_shows_everything_up_to_now(self) -> None:
        lasting = finding(steps=(10, 990), layers=("block1.bn",), query="/v1/runs/r/scalars?name=loss")
        found = parse_qs(views.finding_view(lasting, "NH-SMALL", a_run()))
        assert found == {"finding": ["NH-SMALL"], "mark": ["10-990"], "layer": ["1"]}

    def test_two_findings_of_one_code_have_two_names(self) -> None:
        pair = (finding(), finding(steps=(1, 2)), finding("NH-LAG"))
        assert views.finding_keys(pair) == ["NH-SMALL", "NH-SMALL~2", "NH-LAG"]
        verdict = Verdict(code="-", severity="ok", summary="-")
        diagnosis = Diagnosis(run="r", step=1, verdict=verdict, findings=pair)
        assert views.finding_named(diagnosis, "NH-SMALL~2") is pair[1]
        assert views.finding_named(diagnosis, "NH-GONE") is None

    def test_statistics_that_do_not_exist_are_left_out(self) -> None:
        odd = finding(query="/v1/runs/r/series?stat=nonsense&layer=x")
        assert views.evidence_of(odd) == views.Evidence("series")


class TestWhatAPageSaysOfFindings:
    def context(self, *findings: Finding, code: str = "NH-SMALL") -> Any:
        verdict = Verdict(code=code, severity=findings[0].severity, summary="- and it shows.")
        diagnosis = Diagnosis(run="r", step=500, verdict=verdict, findings=findings)
        return views.findings_context(diagnosis, a_run())

    def test_the_verdicts_own_finding_stands_first_and_nothing_is_said_twice(self) -> None:
        worse, own = finding("NH-GAP", severity="critical"), finding("NH-SMALL")
        shown = self.context(worse, own)["findings"]
        assert [each.finding.code for each in shown] == ["NH-SMALL", "NH-GAP"]
        healthy = finding("HEALTHY", severity="ok", summary="All is well.", evidence=None)
        verdict = Verdict(code="HEALTHY", severity="ok", summary="All is well.")
        diagnosis = Diagnosis(run="r", step=500, verdict=verdict, findings=(healthy,))
        assert [each.says_more for each in views.findings_context(diagnosis, a_run())["findings"]] == [False]

    @pytest.mark.parametrize(
        ("code", "severity", "answer"),
        [
            ("NH-CLUSTER", "critical", "Fix this"), ("NH-CLUSTER", "warning", "Look at this"),
            ("HEALTHY", "ok", "Healthy"), ("WARMUP", "ok", "Too early to say"), ("NO_DATA", "info", "No rows yet"),
            ("NH-WITHHELD", "info", "Not judged"),
        ],
    )  # fmt: skip
    def test_the_answer_comes_in_two_words(self, code: str, severity: str, answer: str) -> None:
        assert self.context(finding(code, severity=severity), code=code)["answer"] == answer


def past(code: str, *events: tuple[str, int], **more: object) -> FindingHistory:
    """The history of a code that had these changes at these steps."""
    at = "2026-01-01T00:00Z"
    fields = [
        {"at": at, "step": step, "what": what, "severity": "warning", "value": 2.5, "distance": 0.5}
        for what, step in events
    ]
    return FindingHistory(code=code, events=tuple(map(Event.model_validate, fields)), **({"present": False} | more))  # type: ignore[arg-type]


class TestMarksAndHistory:
    def html(self, *histories: FindingHistory, findings: tuple[Finding, ...] = (), report: bool = False) -> str:
        worst = findings[0] if findings else finding("HEALTHY", severity="ok")
        verdict = Verdict(code=worst.code, severity=worst.severity, summary="- and it shows.")
        diagnosis = Diagnosis(run="r", step=500, verdict=verdict, findings=findings or (worst,))
        context = views.findings_context(diagnosis, a_run(), histories) | {"run": a_run(), "report": report}
        return templating.templates.get_template("findings.html").render(view=views.run_view(a_run(), []), **context)

    def text(self, html: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))

    @pytest.mark.parametrize("mark", ["acknowledged", "muted"])
    def test_a_marked_finding_says_so_with_its_note_and_when_on_page_and_in_report(self, mark: str) -> None:
        said = past("NH-SMALL", ("appeared", 450), mark=mark, note="it fits <no> more", marked_at="2026-01-02T03:04Z")
        for report_ in (False, True):
            html = self.html(said, findings=(finding(),), report=report_)
            assert f"{mark} 2026-01-02 03:04" in self.text(html)
            assert "it fits &lt;no&gt; more" in html
            assert "<no>" not in html
            assert (" quieter" in html) == (mark == "muted")
            assert html.count("<button") == (0 if report_ else 1)

    def test_every_finding_that_can_be_marked_offers_it_and_no_other_does(self) -> None:
        html = self.html(findings=(finding(), finding("NH-GAP"), finding("NH-WITHHELD")))
        assert re.findall(r'data-mark="([^"]+)"', html) == ["NH-SMALL", "NH-GAP"]

    def test_a_finding_tells_its_changes_where_there_is_more_than_that_it_appeared(self) -> None:
        now = finding()
        assert "<details" not in self.html(past("NH-SMALL", ("appeared", 450), present=True), findings=(now,))
        grown = past("NH-SMALL", ("appeared", 1450), ("grew", 1800), present=True)
        text = self.text(self.html(grown, findings=(now,)))
        assert "appeared at step 1,450 · warning · value 2.5" in text
        assert "grew at step 1,800" in text

    def test_of_many_changes_the_newest_ten_are_told(self) -> None:
        flickering = past("NH-SMALL", *((("appeared", "ended")[i % 2], i) for i in range(41)), present=True)
        html = self.html(flickering, findings=(finding(),))
        assert re.findall(r"at step (\d+) ·", html) == [str(step) for step in range(31, 41)]
        assert "The newest 10 of 41 changes" in html

    @pytest.mark.parametrize(
        ("history", "said"),
        [
            (past("NH-LAG", ("appeared", 1250), ("ended", 3400), since=1200), "Earlier: NH-LAG , steps 1,200 to 3,400"),
            (
                past(
                    "NH-LAG", ("appeared", 10), ("ended", 20), ("appeared", 70), ("ended", 90), since=60, first_step=5
                ),
                "Earlier: NH-LAG , the last time steps 60 to 90",
            ),
            (past("NH-LAG", ("appeared", 1250), ("ended", 3400)), "Earlier: NH-LAG , steps 1,250 to 3,400"),
            (past("NH-LAG", ("appeared", 1250), since=1200, present=True), "Earlier: NH-LAG , from step 1,200"),
            (past("NH-LAG", mark="muted"), "Marked: NH-LAG , not seen so far muted"),
        ],
    )
    def test_what_is_over_or_marked_beforehand_has_a_line_from_which_it_can_be_marked(
        self, history: FindingHistory, said: str
    ) -> None:
        html = self.html(history)
        assert said in self.text(html)
        assert 'data-mark="NH-LAG"' in html
        assert "Earlier" not in self.html(history, findings=(finding("NH-LAG"),))

    def test_nothing_is_said_of_a_code_that_was_opened_again_before_it_came(self) -> None:
        assert "NH-LAG" not in self.html(past("NH-LAG", mark="open"))


def rows_of(page: str) -> list[str]:
    return re.findall(r'<tr data-part="([^"]+)"', page)[1:]  # the first is the heading


class TestRunList:
    @pytest.fixture
    def three(self, client: httpx.Client, run_id: str) -> list[str]:
        for name, tags in (("b", ("t",)), ("a", ("t", "u")), ("c", ())):
            made.create(client, made.run_record(f"{run_id}-{name}", name=f"{run_id} {name}", tags=tags))
        client.patch(f"/v1/runs/{run_id}-c", json={"status": "finished", "notes": "a <b>note</b>"})
        return [f"{run_id}-{name}" for name in "abc"]

    def test_is_searched_filtered_and_sorted_by_its_address(
        self, client: httpx.Client, store: Store, run_id: str, three: list[str]
    ) -> None:
        a, b, c = three
        store.put_verdict(a, Verdict(code="HEALTHY", severity="ok", summary="-"))
        store.put_verdict(b, Verdict(code="NH-GAP", severity="critical", summary="-"))
        for query, expected in (
            ("sort=name&ascending=true", [a, b, c]),
            ("", [c, a, b]),
            ("tag=t", [a, b]),
            ("tag=t&tag=u", [a]),
            ("state=finished", [c]),
            ("severity=critical&sort=severity", [b]),
            ("sort=severity", [b, c, a]),
            ("sort=severity&ascending=true&tag=", [a, c, b]),
        ):
            assert rows_of(client.get(f"/?search={run_id}&{query}").text) == expected, query

    def test_what_it_was_asked_for_is_in_the_form_and_in_every_link(
        self, client: httpx.Client, run_id: str, three: list[str]
    ) -> None:
        page = client.get(f"/?search={run_id}&state=finished&severity=ok&severity=info&tag=").text
        assert f'value="{run_id}"' in page
        assert re.search(r'value="finished"\s+checked', page)
        for name in ("ok", "info"):
            assert re.search(rf'name="severity" value="{name}"\s+checked', page)
        asked = f"search={run_id}&amp;state=finished&amp;severity=ok&amp;severity=info"
        assert f"{asked}&amp;sort=name&amp;ascending=true" in page
        assert f"{asked}&amp;sort=severity" in page
        tagged = client.get(f"/?search={run_id}&tag=t&sort=name").text
        assert re.search(r'name="tag" value="t"\s+checked', tagged)
        assert f'"/?search={run_id}&amp;tag=t&amp;tag=u&amp;sort=name"' in tagged  # a click on another tag narrows it

    def test_says_when_a_run_began_and_orders_by_it(self, client: httpx.Client, run_id: str, three: list[str]) -> None:
        page = client.get(f"/?search={run_id}").text
        assert re.search(
            r'aria-sort="descending"><a href="/\?search=[^"]*&amp;ascending=true" data-order>Created', page
        )
        began = client.get(f"/v1/runs/{three[0]}").json()["created_at"].replace("000Z", "+00:00")
        assert page.count(f'data-label="created"><time datetime="{began}"') == 1

    def test_no_run_fits_is_said(self, client: httpx.Client) -> None:
        assert "No run fits" in client.get("/?search=nothing-is-called-this").text

    def test_notes_are_text(self, client: httpx.Client, three: list[str]) -> None:
        assert "a &lt;b&gt;note&lt;/b&gt;" in client.get(f"/runs/{three[2]}").text
        assert "<b>note" not in client.get(f"/runs/{three[2]}").text

    def test_a_cursor_of_another_order_is_refused(self, client: httpx.Client) -> None:
        assert client.get("/?cursor=nonsense").status_code == 422


@pytest.mark.parametrize(("state", "said"), [("stalled", "It may be evaluating"), ("crashed", "taken for crashed")])
def test_a_run_that_fell_silent_says_since_when_and_what_to_do(state: str, said: str) -> None:
    run = a_run(state=state)
    html = templating.templates.get_template("run_head.html").render(view=views.run_view(run, []), run=run)
    assert said in html
    assert "python -m brn_core.spool DIR --url URL" in html
    assert html.count('datetime="2026-01-01T00:00:00.000+00:00"') == 2


def test_a_run_that_failed_says_why() -> None:
    said = {"failure": "rank 1 of 2 ended with <SIGKILL>", "dropped_steps": 7, "dropped_by_rank": {0: 3, 1: 4}}
    run = a_run(state="failed").model_copy(update=said)
    html = templating.templates.get_template("run_head.html").render(view=views.run_view(run, []), run=run)
    assert "Training failed: rank 1 of 2 ended with &lt;SIGKILL&gt;" in html
    assert "The recorder dropped 7 steps of 2 ranks, counted together:" in html


class TestLayerPage:
    def test_says_what_the_layer_is_and_leads_to_its_neighbours(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id, layers=3)
        page = client.get(f"/runs/{run_id}/layers/1").text
        assert "<h2>block1.bn</h2>" in page
        for neighbour in (0, 2):
            assert f'href="/runs/{run_id}/layers/{neighbour}"' in page

    @pytest.mark.parametrize("layer", [3, -1])
    def test_a_layer_that_does_not_exist_is_not_found(self, client: httpx.Client, run_id: str, layer: int) -> None:
        made.write_run(client, run_id, layers=3)
        answer = client.get(f"/runs/{run_id}/layers/{layer}", headers={"accept": "text/html"})
        assert answer.status_code == 404
        assert "there is no layer" in answer.text


def test_ranks_that_are_missing_behind_slow_or_apart_are_called_so() -> None:
    def rank(number: int, last: int | None, behind: int | None, seconds: float | None) -> RankHealth:
        return RankHealth(rank=number, last_step=last, behind_steps=behind, received_at=None, step_time_seconds=seconds)

    found = Ranks(
        run="r",
        from_step=1,
        to_step=9,
        world_size=4,
        layers=[],
        mu_spread=[],
        sigma_spread=[],
        farthest_rank=[],
        farthest_distance=[],
        outlier={"rank": 0, "distance": 3.0, "others": 0.1},
        ranks=[rank(0, 500, 0, 0.1), rank(1, 500, 0, 0.3), rank(2, 100, 400, 0.1), rank(3, None, None, None)],
    )
    words = [[word for word, _ in row["words"]] for row in rank_rows(found)]
    assert words == [["apart"], ["slow"], ["behind"], ["missing"]]


def test_of_two_ranks_one_is_slow() -> None:
    def rank(number: int, took: float) -> RankHealth:
        return RankHealth(
            rank=number, last_step=500, behind_steps=0, received_at="2026-01-01T00:00Z", step_time_seconds=took
        )

    found = Ranks(
        run="r", from_step=0, to_step=500, world_size=2, layers=[], mu_spread=[], sigma_spread=[], farthest_rank=[],
        farthest_distance=[], outlier=None, ranks=[rank(0, 0.1), rank(1, 0.5)],
    )  # fmt: skip
    assert [[word for word, _ in row["words"]] for row in rank_rows(found)] == [["fine"], ["slow"]]


def test_a_verdict_still_to_come_has_no_check_mark() -> None:
    tone = templating.templates.get_template("parts.html").module.tone
    for code in ("WARMUP", "NO_DATA"):
        assert tone(Verdict(code=code, severity="ok", summary="-")) == "info"
    assert tone(Verdict(code="HEALTHY", severity="ok", summary="-")) == "ok"


class TestWhatStaysCurrent:
    def test_every_page_has_a_fragment_of_its_live_parts(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id, layers=2, steps=5, ranks=2)
        made.write_run(client, f"{run_id}-2", layers=2, steps=5)
        for address in ("", "/layers/1", "/ranks"):
            page = client.get(f"/runs/{run_id}{address}").raise_for_status().text
            own = re.search(r'data-fragment="([^"]+)"', page)
            assert own is not None
            fragment = client.get(own[1]).raise_for_status().text
            live = re.findall(r'id="([a-z-]+)"[^>]* data-live', page)
            assert len(live) >= 2
            assert set(live) == set(re.findall(r'id="([a-z-]+)"[^>]* data-live', fragment))
            assert "<html" not in fragment
        fragment = client.get(f"/compare/fragment?runs={run_id},{run_id}-2").raise_for_status().text
        assert re.findall(r'<tr data-part="([^"]+)"', fragment)[-2:] == [run_id, f"{run_id}-2"]

    def test_with_two_ranks_nothing_is_said_of_the_others(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id, layers=2, steps=5, ranks=2)
        assert "three times the others" not in client.get(f"/runs/{run_id}/ranks").text


class TestEvidenceOfTheProbe:
    def test_clustered_batches_are_shown_by_the_probes_ratio(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id)).raise_for_status()
        made.send(client, run_id, made.clustered_tables()).raise_for_status()
        figure = client.get(f"/runs/{run_id}/figures/evidence?finding=NH-CLUSTER").raise_for_status().json()
        assert [trace["name"] for trace in figure["data"]] == ["F of the input probe"]
        assert figure["layout"]["shapes"][0]["y0"] == 1

    def test_ranks_are_lines_of_the_feature_in_which_they_differ_most(self) -> None:
        probes = []
        for rank in range(2):
            mean = [[0.1, 0.1], [float(rank), float(rank)], [0.2, 0.2]]
            probes.append(
                Probe(
                    run="r", rank=rank, bucket_steps=1, steps=[1, 2], samples=[8, 8], mean=mean, var=mean,
                    adjacency=mean, windows=[],
                )
            )  # fmt: skip
        figure = inputs_of_ranks(probes)
        assert [(trace.name, list(trace.y)) for trace in figure.data] == [("rank 0", [0, 0]), ("rank 1", [1, 1])]
        assert "feature 1" in figure.layout.annotations[0].text

    @pytest.mark.parametrize(
        ("world", "always", "shown"),
        [(3, (), [0, 1, 2]), (32, (20,), [0, 1, 2, 3, 4, 5, 6, 20]), (32, (1,), [0, 1, 2, 3, 4, 5, 6, 7])],
    )
    def test_of_many_ranks_the_one_apart_is_among_those_drawn(
        self, world: int, always: tuple[int, ...], shown: list[int]
    ) -> None:
        assert shown_ranks(world, always) == shown


class TestComparison:
    def test_needs_two_runs_and_says_so(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id)
        answer = client.get(f"/compare?runs={run_id}", headers={"accept": "text/html"})
        assert answer.status_code == 422
        assert "Choose two or more runs" in answer.text

    def test_a_form_without_scripts_leads_there_too(self, client: httpx.Client) -> None:
        answer = client.get("/compare?run=a&run=b")
        assert (answer.status_code, answer.headers["location"]) == (303, "/compare?runs=a,b")

    def test_more_runs_than_the_route_answers_are_compared(self, client: httpx.Client, run_id: str) -> None:
        ids = [f"{run_id}-{i}" for i in range(21)]
        for i, own in enumerate(ids):
            made.create(client, made.run_record(own, config={"lr": i}))
        assert client.get(f"/compare?runs={','.join(ids)}").status_code == 200
        assert client.get("/v1/compare", params={"run": ids, "stat": "gap"}).status_code == 422


class TestReport:
    def test_loads_nothing_and_holds_everything(self, client: httpx.Client, run_id: str) -> None:
        made.write_run(client, run_id, ranks=2)
        answer = client.get(f"/runs/{run_id}/report").raise_for_status()
        assert answer.headers["content-disposition"] == f'attachment; filename="{run_id}.html"'
        head = answer.text.partition("<script>")[0]
        assert not re.findall(r'(?:src|href)="', head)
        figures = re.findall(r'<script type="application/json">(.*?)</script>', answer.text, re.DOTALL)
        assert len(figures) == 5
        for figure in map(json.loads, figures):  # for either theme and width
            for theme, palette in PALETTES.items():
                for width in ("", " narrow"):
                    assert palette.text in json.dumps(figure[theme + width]["layout"])
            assert PALETTES["light"].text not in json.dumps([figure["dark"], figure["dark narrow"]])

    def test_says_what_people_made_of_findings(self, client: httpx.Client, run_id: str) -> None:
        made.create(client, made.run_record(run_id, config={"sampler": "few-labels"})).raise_for_status()
        made.send(client, run_id, made.clustered_tables()).raise_for_status()
        for code, mark in (("NH-CLUSTER", "acknowledged"), ("NH-LAG", "muted")):
            said = {"mark": mark, "note": f"{code} is known"}
            client.put(f"/v1/runs/{run_id}/findings/{code}/mark", json=said).raise_for_status()
        page = client.get(f"/runs/{run_id}/report").raise_for_status().text.partition("<script")[0]
        for code, mark in (("NH-CLUSTER", "acknowledged"), ("NH-LAG", "muted")):
            assert f'<span class="tag">{mark}</span>' in page
            assert f"{code} is known" in page
        assert "data-mark" not in page.partition("</style>")[2]

    def test_of_several_runs_is_a_comparison(self, client: httpx.Client, run_id: str) -> None:
        for own in (run_id, f"{run_id}-2"):
            made.write_run(client, own)
        page = client.get(f"/compare/report?runs={run_id},{run_id}-2").raise_for_status().text
        assert "2 runs compared" in page

    def test_text_in_it_cannot_end_its_script(self, client: httpx.Client, run_id: str) -> None:
        bad = "</script><script>alert(1)</script>"
        made.create(client, made.run_record(run_id, name=bad))
        made.send(client, run_id, {"scalars": made.scalar_rows({bad: [(1, 1.0)]})})
        page = client.get(f"/runs/{run_id}/report").text
        assert "<script>alert(1)" not in page

    def test_is_written_by_the_command_without_serving(self, tmp_path: Path) -> None:
        store = f"chdb://{tmp_path}/store"
        fill = (
            "import sys; from datetime import UTC, datetime; from brn_core.wire import RunCreate;"
            "from service.settings import Settings; from service.store import Store;"
            "s = Store(Settings(store=sys.argv[1]));"
            "s.put_run(RunCreate(id='r', name='a run'), 'finished', datetime.now(UTC)); s.close()"
        )
        subprocess.run([sys.executable, "-c", fill, store], check=True, timeout=120)
        command = [sys.executable, "-m", "dashboard", "--store", store, "--report"]
        wrote = subprocess.run(
            [*command, "r", "-o", tmp_path / "r.html"], check=True, capture_output=True, text=True, timeout=120
        )
        assert "wrote" in wrote.stdout
        assert '<h1 data-part="name">a run</h1>' in (tmp_path / "r.html").read_text()
        missing = subprocess.run([*command, "nobody"], check=False, capture_output=True, text=True, timeout=120)
        assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
        assert "there is no run 'nobody'" in missing.stderr

    def test_is_asked_from_the_service_that_has_the_store_open(
        self,
        client: httpx.Client,
        settings: Settings,
        run_id: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for run in (run_id, f"{run_id}-b"):
            made.write_run(client, run)
        own = ["--store", settings.store, "--host", "127.0.0.1", "--port", str(client.base_url.port)]

        def written(*runs: str) -> str:
            assert report.main(["--report", *runs, "-o", str(tmp_path / "it.html"), *own], prog="brn-serve") == 0
            return (tmp_path / "it.html").read_text(encoding="utf-8")

        assert f'<h1 data-part="name">{client.get(f"/v1/runs/{run_id}").json()["name"]}</h1>' in written(run_id)
        assert "2 runs compared" in written(run_id, f"{run_id}-b")
        page = f"/compare?runs={run_id},{run_id}-b&by=fraction&stat=clip_r&scalar=loss&group=tag"
        for address in (page, f"{client.base_url}{page}"):  # what the page of this address shows
            assert '"name":"no tag (2 runs)"' in written(address)
        assert "share of the planned steps" in written(page)
        (tmp_path / "it.html").unlink()
        capsys.readouterr()
        for unknown in ("nobody", "../../healthz", "/compare?by=time&runs=a,b", "/runs/nobody/ranks"):
            assert report.main(["--report", unknown, "-o", str(tmp_path / "it.html"), *own], prog="brn-serve") == 1
            assert capsys.readouterr().err.count("\n") == 1
        own[-1] = "1"
        assert report.main(["--report", run_id, *own], prog="brn-serve") == 1
        assert "nor does a service answer at http://127.0.0.1:1/" in capsys.readouterr().err
        assert not (tmp_path / "it.html").exists()


def test_a_figure_that_does_not_exist_is_not_found(client: httpx.Client, run_id: str) -> None:
    made.write_run(client, run_id)
    answer = client.get(f"/runs/{run_id}/figures/nonsense")
    assert answer.status_code == 404
    assert "there are batch, causes" in answer.json()["detail"]


def test_half_a_range_is_none_and_a_turned_one_is_refused(client: httpx.Client, run_id: str) -> None:
    made.write_run(client, run_id, r_max=3.0, d_max=5.0)
    figure = client.get(f"/runs/{run_id}/figures/schedule?from=3").raise_for_status().json()
    assert "range" not in figure["layout"]["xaxis"]
    assert client.get(f"/runs/{run_id}/figures/schedule?from=3&to=2").status_code == 422


def test_a_schedule_that_ends_before_it_begins_is_refused(client: httpx.Client, run_id: str) -> None:
    made.write_run(client, run_id)
    limits = wire.Schedule(bn_steps=5, r_steps=3, d_steps=9, r_max=2, d_max=1).model_dump()
    assert client.get(f"/runs/{run_id}/figures/advisor", params=limits).status_code == 422
