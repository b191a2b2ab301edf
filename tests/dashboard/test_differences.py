"""What the tables of a comparison say: results, settings, findings."""

from __future__ import annotations

import re

import httpx
import pytest
import synthetic as made

from brn_core import wire
from dashboard.differences import compare_context, finding_columns, is_setting
from service.diagnosis.finding import Diagnosis, Evidence, Finding, Severity, Verdict
from service.schemas import Comparison, Run
from service.store import Store


def a_run(run_id: str, **changes: object) -> Run:
    verdict = Verdict(code="HEALTHY", severity="ok", summary="-")
    known = {"status": "finished", "state": "finished", "rows": 1, "verdict": verdict, "last_step": 900}
    times = {"created_at": "2026-01-01T00:00Z", "updated_at": "2026-01-01T00:00Z"}
    return Run.model_validate(made.run_record(run_id).model_dump() | known | times | changes)


def finding(code: str, severity: Severity, value: float | None = 2.0, first: int = 400) -> Finding:
    evidence = None
    if value is not None:
        query = "/v1/runs/r/series?stat=gap&layer=1"
        evidence = Evidence(statistic="G, gap", value=value, low=value - 1, high=value + 1, steps_used=9, query=query)
    return Finding(
        code=code, severity=severity, summary=f"{code} is so.", evidence=evidence, remedy=None, steps=(first, 900)
    )


def diagnosis(run: str, *findings: Finding) -> Diagnosis:
    verdict = Verdict(code="HEALTHY", severity="ok", summary="-")
    return Diagnosis(run=run, step=900, verdict=verdict, findings=findings)


class TestFindings:
    def test_worst_code_first_then_what_most_runs_have(self) -> None:
        a = diagnosis("a", finding("NH-LAG", "warning"), finding("NH-SMALL", "warning"), finding("NH-GAP", "info"))
        b = diagnosis("b", finding("NH-SMALL", "info"), finding("NH-CLUSTER", "critical"))
        c = diagnosis("c", finding("HEALTHY", "ok"), finding("NH-WITHHELD", "info"))
        columns = finding_columns([a_run("a"), a_run("b"), a_run("c")], [a, b, c])
        assert [column.code for column in columns] == ["NH-CLUSTER", "NH-SMALL", "NH-LAG", "NH-GAP"]
        assert [[cell and cell.severity for cell in column.cells] for column in columns] == [
            [None, "critical", None], ["warning", "info", None], ["warning", None, None], ["info", None, None],
        ]  # fmt: skip

    def test_a_cell_says_how_much_since_when_and_leads_to_the_evidence(self) -> None:
        mild, bad = finding("NH-SMALL", "info", 1.0, 700), finding("NH-SMALL", "warning", 5.0)
        (column,) = finding_columns([a_run("a")], [diagnosis("a", mild, bad)])
        (cell,) = column.cells
        assert cell is not None
        assert (column.statistic, cell.value, cell.low, cell.high, cell.since) == ("G, gap", 5.0, 4.0, 6.0, 400)
        assert cell.more == 1
        assert "finding=NH-SMALL~2" in cell.view.replace("%7E", "~")  # the second of this code, the worst

    def test_a_finding_is_as_old_as_its_history_says(self) -> None:
        old, new = finding("NH-SMALL", "info").model_copy(update={"since": 7}), finding("NH-SMALL", "info")
        (column,) = finding_columns([a_run("a"), a_run("b")], [diagnosis("a", old), diagnosis("b", new)])
        assert [cell and cell.since for cell in column.cells] == [7, 400]

    def test_a_run_that_is_not_diagnosed_yet_hides_no_other(self) -> None:
        runs = [a_run("a"), a_run("b")]
        context = compare_context(
            Comparison(by="step", runs=[], config={}, final={}),
            runs,
            [None, diagnosis("b", finding("NH-LAG", "warning", None))],
        )
        assert context["pending"] == [True, False]
        assert [cell and cell.value for cell in context["findings"][0].cells] == [None, None]
        assert context["findings"][0].cells[1] is not None


@pytest.mark.parametrize("name", ["lr", "lr-SGD", "train/lr", "lr_group0", "learning_rate", "LearningRate", "epoch"])
def test_what_training_was_told_is_a_setting(name: str) -> None:
    assert is_setting(name)


@pytest.mark.parametrize("name", ["loss", "accuracy", "epoch_loss", "mlr", "top5", "lr_loss", "reward", "val/f1"])
def test_what_came_of_it_is_a_result(name: str) -> None:
    assert not is_setting(name)


def test_results_are_accuracy_loss_and_every_scalar_of_the_user() -> None:
    final: dict[str, list[float | None]] = {
        name: [1.0, None] for name in ("reward", "loss", "lr", "brn/shadow_eval_loss", "val_acc", "momentum")
    }
    final["momentum"] = [0.9, 0.9]  # alike in both
    found = Comparison(by="step", runs=[], config={"config.lr": [1, 2]}, final=final)
    context = compare_context(found, [], [])
    assert [name for name, _ in context["results"]] == ["val_acc", "loss", "reward"]
    assert [name for name, _ in context["settings"]] == ["lr", "lr at the newest step"]
    assert context["scalars"] == ["val_acc", "loss", "reward", "lr", "momentum"]  # any can be drawn


def test_what_config_repeats_of_the_record_is_a_column_once() -> None:
    config = {"batch_size": [1, 2], "config.batch_size": [1, 2], "config.lr": [1, 2]}
    found = Comparison.model_validate({"by": "step", "runs": [], "final": {}, "config": config})
    assert [name for name, _ in compare_context(found, [], [])["settings"]] == ["lr", "batch_size"]


class TestPage:
    @pytest.fixture
    def pair(self, client: httpx.Client, run_id: str) -> tuple[str, str]:
        """A run whose batches are clustered, finished; one of independent samples that goes on."""
        clustered, other = f"{run_id}-a", f"{run_id}-b"
        made.create(client, made.run_record(clustered, batch_size=32)).raise_for_status()
        made.send(client, clustered, made.clustered_tables()).raise_for_status()
        client.patch(f"/v1/runs/{clustered}", json={"status": "finished"}).raise_for_status()
        made.write_run(client, other)
        return clustered, other

    def test_says_which_run_has_which_finding(self, client: httpx.Client, pair: tuple[str, str]) -> None:
        (found,) = [
            own for own in client.get(f"/v1/runs/{pair[0]}/findings").json()["findings"] if own["code"] == "NH-CLUSTER"
        ]
        page = client.get(f"/compare/fragment?runs={','.join(pair)}").text
        rows = re.findall(r'<tr data-part="found (\S+)">(.*?)</tr>', page, re.DOTALL)
        assert [run for run, _ in rows] == list(pair)
        assert f"{found['evidence']['value']:.4g}" in rows[0][1]
        assert "finding=NH-CLUSTER" in rows[0][1]
        assert f"since step {found['steps'][0]:,}" in rows[0][1]
        assert "NH-CLUSTER" not in rows[1][1]

    def test_what_takes_too_long_comes_later(
        self, client: httpx.Client, store: Store, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dashboard.pages.COMPARE_SECONDS", -1.0)
        monkeypatch.setattr("dashboard.pages.windows.computed", lambda store, run: None)
        page = client.get(f"/compare/fragment?runs={','.join(pair)}").text
        assert page.count("data-pending") == 2

    def test_only_what_runs_is_live(self, client: httpx.Client, pair: tuple[str, str]) -> None:
        page = client.get(f"/compare?runs={','.join(pair)}").text
        assert page.count("state-running") == page.count("state-finished") == 1


class TestReport:
    def test_shows_what_the_page_shows(self, client: httpx.Client, run_id: str) -> None:
        for name, norm in (("a", "bn"), ("b", "brn")):
            own = made.run_record(f"{run_id}-{name}", name=name, planned_steps=100, config={"norm": norm})
            made.create(client, own).raise_for_status()
            scalars = made.scalar_rows({"loss": [(1, 2.0), (9, 1.0)], "reward": [(1, 1.0), (9, 5.0)]})
            made.send(client, own.id, {"layers": made.layer_rows(range(1, 10), 3), "scalars": scalars})
        runs = f"runs={run_id}-a,{run_id}-b"
        asked = "by=fraction&stat=clip_r&scalar=reward&group=config.norm"
        plain = client.get(f"/compare/report?{runs}").raise_for_status().text
        like_page = client.get(f"/compare/report?{runs}&{asked}").raise_for_status().text
        figure = client.get(f"/figures/compare?{runs}&{asked}").raise_for_status().json()
        for title in ("reward", wire.METRIC["clip_r"].label):
            assert any(title in own["text"] for own in figure["layout"]["annotations"])
            assert f'"text":"{title}:' in like_page
        assert '"name":"norm = bn (1 run)"' in like_page
        assert "share of the planned steps" in like_page
        assert "share of the planned steps" not in plain  # as the page without choices: over steps
        assert '"text":"loss:' in plain
        assert client.get(f"/compare/report?{runs}&by=time").status_code == 422
