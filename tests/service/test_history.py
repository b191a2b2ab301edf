"""The history of findings: what came when, what people made of it, and who is told."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pyarrow as pa
import pytest
from rich.console import Console
from synthetic import clustered_tables, probe_rows, run_record, send

from service import history, windows
from service.checkup import print_diagnosis
from service.diagnoser import Diagnoser
from service.diagnosis.finding import Diagnosis, Evidence, Finding, Severity, Verdict
from service.history import EVENTS, History
from service.recordings import Part, Recording, keep
from service.store import Batch, Store
from service.webhook import news_of

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def finding(code: str, severity: Severity = "warning", value: float = 2.0, first_step: int = 10) -> Finding:
    evidence = Evidence(statistic="F", value=value, threshold=1.2, steps_used=50, query="/v1/runs/r/series")
    return Finding(
        code=code, severity=severity, summary="So it is.", evidence=evidence, remedy=None, steps=(first_step, 99)
    )


def diagnosis(step: int, *findings: Finding) -> Diagnosis:
    verdict = Verdict(code="HEALTHY", severity="ok", summary="Said.")
    return Diagnosis(run="r", step=step, verdict=verdict, findings=findings)


def told(*diagnoses: Diagnosis, start: History | None = None) -> tuple[History, list[list[str]]]:
    """The history after some diagnoses, a minute apart, and what was news each time."""
    now, heard = start or {}, []
    for minutes, each in enumerate(diagnoses):
        after = history.advanced(now, each, BEGIN + timedelta(minutes=minutes))
        heard.append(history.news(now, after))
        now = after
    return now, heard


def events(found: History, code: str) -> list[tuple[str, int, str]]:
    return [(event.what, event.step, event.severity) for event in found[code].events]


def test_a_finding_appears_grows_eases_and_ends() -> None:
    found, heard = told(
        diagnosis(100),
        diagnosis(150, finding("NH-CLUSTER")),
        diagnosis(200, finding("NH-CLUSTER")),
        diagnosis(250, finding("NH-CLUSTER", "critical", first_step=5)),
        diagnosis(300, finding("NH-CLUSTER", "warning")),
        diagnosis(350),
        diagnosis(400, finding("NH-CLUSTER")),
    )

    assert events(found, "NH-CLUSTER") == [
        ("appeared", 150, "warning"),
        ("grew", 250, "critical"),
        ("eased", 300, "warning"),
        ("ended", 350, "warning"),
        ("appeared", 400, "warning"),
    ]
    assert heard == [[], ["NH-CLUSTER"], [], [], [], [], ["NH-CLUSTER"]]
    assert found["NH-CLUSTER"].first_step == 5
    assert found["NH-CLUSTER"].present


def test_a_statistic_twice_as_far_from_its_threshold_has_grown_and_a_little_more_is_no_event() -> None:
    values = (2.0, 2.5, 3.0, 3.5, 20.0)  # ln(value / 1.2) doubles at 3.33 and at 10.2
    found, heard = told(*(diagnosis(step, finding("NH-CLUSTER", value=v)) for step, v in enumerate(values)))

    assert [(what, step) for what, step, _ in events(found, "NH-CLUSTER")] == [
        ("appeared", 0),
        ("grew", 3),
        ("grew", 4),
    ]
    assert heard == [["NH-CLUSTER"], [], [], [], []]


def test_an_info_is_no_news_until_it_warns_and_answers_that_say_nothing_have_no_history() -> None:
    found, heard = told(
        diagnosis(1, finding("NH-SMALL", "info"), finding("NH-WITHHELD", "info"), finding("HEALTHY", "ok")),
        diagnosis(2, finding("NH-SMALL", "warning")),
    )

    assert list(found) == ["NH-SMALL"]
    assert heard == [[], ["NH-SMALL"]]


@pytest.mark.parametrize("mark", ["acknowledged", "muted"])
def test_what_someone_has_marked_is_no_news_and_keeps_its_history(mark: history.Mark) -> None:
    marked = {"NH-LAG": history.FindingHistory(code="NH-LAG", present=False, mark=mark, note="known")}
    found, heard = told(diagnosis(1, finding("NH-LAG")), diagnosis(2), diagnosis(3, finding("NH-LAG")), start=marked)

    assert heard == [[], [], []]
    assert [event[0] for event in events(found, "NH-LAG")] == ["appeared", "ended", "appeared"]
    assert (found["NH-LAG"].mark, found["NH-LAG"].note) == (mark, "known")


def test_a_finding_that_flickers_does_not_grow_its_history_without_end() -> None:
    flickering = (diagnosis(step, *([finding("NH-LAG")] if step % 2 else [])) for step in range(3 * EVENTS))
    found, _ = told(*flickering)

    assert len(found["NH-LAG"].events) == EVENTS
    assert found["NH-LAG"].events[-1].step == 3 * EVENTS - 1


def test_a_finding_dates_from_the_stretch_that_lasts_however_far_the_window_has_moved_on() -> None:
    said = [
        diagnosis(150, finding("NH-LAG", first_step=100)),
        diagnosis(900, finding("NH-LAG", first_step=500)),  # the window begins there now
        diagnosis(950, finding("NH-LAG", first_step=90)),  # rows came late
        diagnosis(990),
        diagnosis(2000, finding("NH-LAG", first_step=1400)),
        diagnosis(3000, finding("NH-LAG", first_step=2600), finding("NH-WITHHELD", "info", first_step=2999)),
    ]
    now: History = {}
    since = []
    for minutes, each in enumerate(said):
        now = history.advanced(now, each, BEGIN + timedelta(minutes=minutes))
        since.append([f.since for f in history.dated(now, each).findings])

    assert since == [[100], [100], [90], [], [1400], [1400, 2999]]
    assert now["NH-LAG"].first_step == 90
    assert [f.steps for f in history.dated(now, said[-1]).findings] == [(2600, 99), (2999, 99)]


def test_a_finding_that_nobody_has_seen_yet_or_whose_history_ended_dates_from_its_own_steps() -> None:
    before, ended = told(diagnosis(150, finding("NH-LAG", first_step=100)), diagnosis(200))[0], diagnosis(300)
    again = diagnosis(400, finding("NH-LAG", first_step=350), finding("NH-SMALL", first_step=7))

    assert [f.since for f in history.dated(before, again).findings] == [350, 7]
    assert history.dated(before, ended) is ended


def test_a_history_from_before_stretches_were_kept_dates_by_the_first_step_ever() -> None:
    old = told(diagnosis(150, finding("NH-LAG", first_step=100)))[0]["NH-LAG"].model_copy(update={"since": None})

    (found,) = history.dated({"NH-LAG": old}, diagnosis(900, finding("NH-LAG", first_step=500))).findings
    assert found.since == 100


# -------- stored


@pytest.fixture
def clustered(store: Store, run_id: str) -> Iterator[str]:
    """A run that warns, and of which the session's own diagnoser was not told."""
    keep(store, Recording(run_record(run_id, name="clustered"), "running", [Part(0, 1, clustered_tables())]))
    yield run_id
    store.delete_runs([run_id])


def test_whoever_reads_of_a_finding_hears_its_first_step_also_when_the_window_has_left_it_behind(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    ranks, steps, onset, part = 2, 3600, 300, 600
    keep(store, Recording(run_record(run_id, layers=0, world_size=ranks), "running", []))
    run = store.record(run_id)
    assert run is not None
    probes = [probe_rows(range(steps), seed=rank) for rank in range(ranks)]
    # from `onset` on rank 1 draws what rank 0 draws
    probes[1] = pa.concat_tables([probes[1].slice(0, onset), probes[0].slice(onset)])
    for seq, begin in enumerate(range(0, steps, part)):
        batches = [Batch(run, k, seq, {"probe": rows.slice(begin, part)}) for k, rows in enumerate(probes)]
        store.put_batches(batches)
        told, _ = history.note(store, windows.diagnosis(store, run_id))

    (found,) = (f for f in windows.diagnosis(store, run_id).findings if f.code == "NH-RANKDUP")
    assert found.steps[0] >= steps - windows.PROBE_WINDOW_STEPS > onset + 100
    since = found.since
    assert onset <= since <= onset + 100
    assert [w.since for w in told.warnings() if w.code == "NH-RANKDUP"] == [since]
    (answered,) = (
        f
        for f in client.get(f"/v1/runs/{run_id}/findings").raise_for_status().json()["findings"]
        if f["code"] == "NH-RANKDUP"
    )
    assert (answered["since"], answered["steps"]) == (since, list(found.steps))
    assert news_of(told, "a run", "NH-RANKDUP")["since"] == since
    for page in ("", "/ranks", "/report"):
        assert f"since step {since}" in client.get(f"/runs/{run_id}{page}").raise_for_status().text, page
    console = Console(file=io.StringIO(), width=80)
    print_diagnosis(console, told)
    assert f"since step {since}; steps {found.steps[0]} to {found.steps[1]}; ranks 0, 1" in (
        console.file.getvalue()  # type: ignore[attr-defined]
    )

    sent, deadline = iter(range(100, 10_000)), time.monotonic() + 60
    while not (acknowledged := send(client, run_id, {"probe": probe_rows([steps])}, seq=next(sent)).json())["findings"]:
        assert time.monotonic() < deadline
    assert {"NH-RANKDUP": since}.items() <= {f["code"]: f["since"] for f in acknowledged["findings"]}.items()


def test_new_warnings_are_told_once_each_and_are_in_the_history(
    client: httpx.Client, store: Store, clustered: str
) -> None:
    heard: list[dict[str, object]] = []
    spoken = threading.Event()

    def tell(news: dict[str, object]) -> None:
        heard.append(news)
        spoken.set()

    diagnoser = Diagnoser(store, 0.0, tell)
    diagnoser.start()
    diagnoser.touch(clustered)
    assert spoken.wait(60)
    diagnoser.stop()

    assert [news["code"] for news in heard].count("NH-CLUSTER") == 1
    news = next(news for news in heard if news["code"] == "NH-CLUSTER")
    assert news["run"] == clustered
    assert news["name"] == "clustered"
    assert str(news["text"]).startswith(f"clustered ({clustered}), step 199: ")
    answer = client.get(f"/v1/runs/{clustered}/findings/history").raise_for_status().json()
    entry = next(entry for entry in answer["findings"] if entry["code"] == "NH-CLUSTER")
    assert entry["present"]
    assert entry["events"][0]["what"] == "appeared"


def test_a_mark_with_its_note_is_kept_and_goes_with_its_run(client: httpx.Client, store: Store, clustered: str) -> None:
    path = f"/v1/runs/{clustered}/findings/NH-GAP/mark"
    answer = client.put(path, json={"mark": "acknowledged", "note": "being looked at"}).raise_for_status().json()
    assert (answer["mark"], answer["note"], answer["present"]) == ("acknowledged", "being looked at", False)

    history.note(store, diagnosis(1, finding("NH-GAP")).model_copy(update={"run": clustered}))
    kept = history.of_run(store, clustered).findings
    assert [(e.mark, e.note, e.present) for e in kept if e.code == "NH-GAP"] == [
        ("acknowledged", "being looked at", True)
    ]

    client.delete(f"/v1/runs/{clustered}").raise_for_status()
    assert store.history(clustered) is None
    assert client.get(f"/v1/runs/{clustered}/findings/history").status_code == 404
    assert client.put(path, json={"mark": "muted"}).status_code == 404


def test_the_marks_of_many_runs_are_read_by_one_query_and_again_only_after_a_change(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [f"{run_id}-{i}" for i in range(5)]
    for run, said in zip(runs, ("acknowledged", "muted", "open", "muted", None), strict=True):
        client.post("/v1/runs", json=run_record(run).model_dump()).raise_for_status()
        if said is not None:
            client.put(f"/v1/runs/{run}/findings/NH-GAP/mark", json={"mark": said}).raise_for_status()
    codes = dict.fromkeys(runs, "NH-GAP") | {runs[3]: "NH-LAG"}  # another one was muted there
    codes |= {f"{run_id}-unknown": "NH-GAP", f"{run_id}-healthy": "HEALTHY"}
    ask, asking, asked = store.engine.rows, threading.get_ident(), 0

    def counted(sql: str, **parameters: object) -> pa.Table:
        nonlocal asked
        asked += threading.get_ident() == asking  # a diagnosis runs beside this
        return ask(sql, **parameters)

    monkeypatch.setattr(store.engine, "rows", counted)
    for queries in (1, 1, 1):
        assert history.marks(store, codes) == {runs[0]: "acknowledged", runs[1]: "muted"}
        assert asked == queries
    client.put(f"/v1/runs/{runs[4]}/findings/NH-GAP/mark", json={"mark": "muted"}).raise_for_status()
    asked = 0
    assert history.marks(store, codes) == {runs[0]: "acknowledged", runs[1]: "muted", runs[4]: "muted"}
    assert asked == 1
    assert history.marks(store, dict.fromkeys(runs, "HEALTHY")) == {}
    assert asked == 1


def test_a_mark_of_no_finding_says_which_there_are(client: httpx.Client, clustered: str) -> None:
    answer = client.put(f"/v1/runs/{clustered}/findings/NH-NONSENSE/mark", json={"mark": "muted"})

    assert answer.status_code == 422
    assert "NH-CLUSTER" in answer.json()["detail"]
    assert client.put(f"/v1/runs/{clustered}/findings/NH-GAP/mark", json={"mark": "gone"}).status_code == 422


def test_news_of_a_finding_say_what_to_do() -> None:
    news = news_of(diagnosis(7, finding("NH-LAG")), "my run", "NH-LAG")

    assert news["text"] == "my run (r), step 7: warning NH-LAG. So it is."
    assert news["findings"] == "/v1/runs/r/findings"
