from __future__ import annotations

import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from synthetic import create, layer_rows, run_record, scalar_rows, send, write_run

from brn_core import wire
from dashboard import figure_routes, pages
from service import answers
from service.__main__ import _listening_socket, serve
from service.access import COOKIE, cookie_value
from service.app import create_app
from service.settings import Settings
from service.store import Store

ROOT = Path(__file__).parents[2]


@contextmanager
def events(client: httpx.Client, run_id: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """The event stream of a run as (name, data) pairs."""

    def parsed(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in lines:
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value)

    with client.stream("GET", f"/v1/runs/{run_id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield parsed(response.iter_lines())


# -------- runs


def test_creating_a_run_twice_keeps_rows_and_takes_the_new_record(client: httpx.Client, run_id: str) -> None:
    first = create(client, run_record(run_id, layers=1, name="old"))
    send(client, run_id, {"layers": layer_rows([1], 1)})
    client.patch(f"/v1/runs/{run_id}", json={"status": "failed"})
    second = create(client, run_record(run_id, layers=2, name="new"))
    assert (first.status_code, second.status_code) == (201, 200)
    found = second.json()
    assert (found["name"], len(found["layers"]), found["status"], found["rows"]) == ("new", 2, "running", 1)
    assert found["created_at"] == first.json()["created_at"]


def test_a_run_answers_what_it_was_created_with(client: httpx.Client, run_id: str) -> None:
    schedule = wire.Schedule(bn_steps=1, r_steps=4, d_steps=3, r_max=3.0, d_max=5.0)
    config = {"lr": 0.1, "deep": {"list": [1, None, "x"]}}
    record = run_record(
        run_id, 2, world_size=2, batch_size=32, planned_steps=9, schedule=schedule, config=config, tags=("a", "b")
    )
    create(client, record)
    found = client.get(f"/v1/runs/{run_id}").json()
    assert record.model_dump(mode="json").items() <= found.items()
    assert client.get(f"/v1/runs/{run_id}/layers").json()["layers"] == found["layers"]


def test_layers_must_be_numbered_in_order(client: httpx.Client, run_id: str) -> None:
    record = run_record(run_id, 2)
    answer = create(client, record.model_copy(update={"layers": record.layers[::-1]}))
    assert answer.status_code == 422
    assert "layers[0] has index 1" in answer.json()["detail"]


def test_only_what_is_given_changes(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=2, name="old", tags=("a",)))
    assert client.patch(f"/v1/runs/{run_id}", json={"tags": []}).json()["tags"] == []
    found = client.patch(f"/v1/runs/{run_id}", json={"status": "finished"}).json()
    assert (found["name"], found["tags"], found["status"], len(found["layers"])) == ("old", [], "finished", 2)


def test_a_deleted_run_is_gone(client: httpx.Client, run_id: str) -> None:
    write_run(client, run_id)
    assert client.delete(f"/v1/runs/{run_id}").status_code == 204
    assert client.get(f"/v1/runs/{run_id}").status_code == 404
    assert client.delete(f"/v1/runs/{run_id}").status_code == 404
    assert send(client, run_id, {"layers": layer_rows([1], 1)}).status_code == 404


def test_the_list_leaves_layers_out(client: httpx.Client, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=5)
    (found,) = [run for run in client.get("/v1/runs").json()["runs"] if run["id"] == run_id]
    assert "layers" not in found
    assert (found["last_step"], found["rows"]) == (5, 10)


# -------- queries


def test_numbers_in_answers_follow_the_stated_rule(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=2))
    gap = [[float("nan"), 1], [float("inf"), 1], [float("-inf"), 1]]
    send(client, run_id, {"layers": layer_rows([1, 2, 3], 2, gap=gap)})
    send(client, run_id, {"layers": layer_rows([4], 1, gap=0.1)}, seq=2)
    found = client.get(f"/v1/runs/{run_id}/heatmap", params={"stat": "gap"}).json()
    assert found["values"] == [["NaN", "Infinity", "-Infinity", 0.1], [1, 1, 1, None]]


def test_queries_take_their_parameters_from_the_address(client: httpx.Client, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=50, ranks=2)
    part = {"rank": 1, "from": 11, "to": 30, "points": 4}
    series = client.get(f"/v1/runs/{run_id}/series", params={"stat": ["gap", "mu"], "layer": 1} | part).json()
    assert (series["layer"], series["rank"], series["bucket_steps"]) == (1, 1, 10)
    assert series["steps"] == [19, 29, 30]
    assert list(series["series"]) == ["gap", "mu"]
    heatmap = client.get(f"/v1/runs/{run_id}/heatmap", params={"stat": "gap"} | part).json()
    assert heatmap["steps"] == [19, 29, 30]
    scalars = client.get(f"/v1/runs/{run_id}/scalars", params={"name": "loss"} | part).json()
    assert scalars["series"]["loss"]["steps"] == [19, 29, 30]


def test_statistics_are_the_metrics_of_the_wire(client: httpx.Client) -> None:
    found = client.get("/v1/statistics").json()["statistics"]
    assert [entry["name"] for entry in found] == list(wire.METRIC)


def test_findings_are_for_the_rows_stored_now(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=1))
    assert client.get(f"/v1/runs/{run_id}/findings").json()["verdict"]["code"] == "NO_DATA"
    send(client, run_id, {"layers": layer_rows([1, 2], 1, nonfinite_channels=[[0], [3]])})
    found = client.get(f"/v1/runs/{run_id}/findings").json()
    assert (found["step"], found["verdict"]["code"]) == (2, "NH-NONFINITE")


# -------- events


def test_events_tell_the_cursor_and_the_findings_at_once_and_on_change(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=1))
    with events(client, run_id) as stream:
        assert next(stream) == ("cursor", {"last_step": None, "status": "running", "rows": 0})
        name, data = next(stream)
        assert (name, data["verdict"]["code"]) == ("findings", "NO_DATA")
        send(client, run_id, {"layers": layer_rows([1, 2], 1, nonfinite_channels=[[0], [3]])})
        assert next(stream) == ("cursor", {"last_step": 2, "status": "running", "rows": 2})
        name, data = next(stream)
        assert (name, data["verdict"]["code"]) == ("findings", "NH-NONFINITE")
        client.patch(f"/v1/runs/{run_id}", json={"status": "failed"})
        assert next(stream) == ("cursor", {"last_step": 2, "status": "failed", "rows": 2})


def test_events_follow_what_another_process_stored(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, run_record(run_id, layers=1))
    monkeypatch.setattr(store.engine, "embedded", False)  # as on a server; below, nobody tells this process
    with events(client, run_id) as stream:
        assert next(stream) == ("cursor", {"last_step": None, "status": "running", "rows": 0})
        assert next(stream)[0] == "findings"
        with store.writing():
            for table, columns in (
                ("layers", "3 AS step, 0 AS layer, 4 AS nonfinite_channels"),
                ("batches", "1 AS layer_rows, 3 AS first_step, 3 AS last_step, now() AS received_at"),
            ):
                names = ", ".join(part.split(" AS ")[1] for part in columns.split(", "))
                store.engine.command(
                    f"INSERT INTO {table} (run_id, rank, seq, {names}) SELECT {{run:String}}, 0, 1, {columns}",
                    run=run_id,
                )
        assert next(stream) == ("cursor", {"last_step": 3, "status": "running", "rows": 1})
        name, data = next(stream)
        assert (name, data["verdict"]["code"]) == ("findings", "NH-NONFINITE")


def test_events_end_when_the_run_is_deleted(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    with events(client, run_id) as stream:
        next(stream)
        client.delete(f"/v1/runs/{run_id}")
        assert "cursor" not in [name for name, _ in stream]


def test_events_of_an_unknown_run_are_a_404(client: httpx.Client) -> None:
    answer = client.get("/v1/runs/nope/events")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.fixture
def two_streams(app: FastAPI, client: httpx.Client) -> Iterator[None]:
    """The session's service, of which two event streams may be open."""
    before = app.state.settings
    app.state.settings = before.model_copy(update={"event_streams": 2})
    _until(lambda: app.state.event_streams == 0, "streams of earlier tests are over")
    try:
        yield
    finally:
        app.state.settings = before


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.usefixtures("two_streams")
def test_a_stream_too_many_is_refused_counted_and_taken_once_another_ends(client: httpx.Client, run_id: str) -> None:
    def counted(name: str) -> float:
        (found,) = re.findall(rf"^{name} (\S+)$", client.get("/metrics").text, flags=re.MULTILINE)
        return float(found)

    create(client, run_record(run_id))
    address = f"/v1/runs/{run_id}/events"
    refused = counted("brn_event_streams_refused_total")
    with events(client, run_id) as first, events(client, run_id) as second:
        assert (next(first)[0], next(second)[0]) == ("cursor", "cursor")
        answer = client.get(address)
        assert (answer.status_code, answer.json()["title"]) == (503, "Too many event streams")
        assert "BRN_SERVICE_EVENT_STREAMS" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/v1/runs/nope/events").status_code == 404, "one that never opens takes no place"
        assert counted("brn_event_streams") == 2
        assert counted("brn_event_streams_refused_total") == refused + 1
        assert client.get(f"/v1/runs/{run_id}").status_code == 200, "all else is answered"
    _until(lambda: counted("brn_event_streams") == 0, "streams that nobody reads any more are open")
    with events(client, run_id) as third:
        assert next(third)[0] == "cursor"


def test_verdict_and_findings_reach_the_sender_and_the_list_without_anyone_asking(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    send(client, run_id, {"layers": layer_rows([1, 2], 1, nonfinite_channels=[[0], [3]])})
    deadline, seq = time.monotonic() + 60, itertools.count(2)

    def answered() -> dict[str, Any]:
        rows = {"scalars": scalar_rows({"loss": [(3, 1.0)]})}
        answer: dict[str, Any] = send(client, run_id, rows, seq=next(seq)).json()
        return answer

    while not (answer := answered())["findings"]:
        assert time.monotonic() < deadline, answer
        time.sleep(0.01)
    assert [(found["code"], found["severity"]) for found in answer["findings"]] == [("NH-NONFINITE", "critical")]
    assert answered()["verdict"]["code"] == answers.run(store, run_id).verdict.code == "NH-NONFINITE"


# -------- errors


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/runs/nope", 404),
        ("GET", "/v1/runs/nope/series?stat=gap", 404),
        ("GET", "/v1/runs/{run}/series", 422),
        ("GET", "/v1/runs/{run}/series?stat=nope", 422),
        ("GET", "/v1/runs/{run}/series?stat=gap&layer=77", 422),
        ("GET", "/v1/runs/{run}/series?stat=gap&points=0", 422),
        ("GET", "/v1/runs/{run}/series?stat=gap&from=9&to=1", 422),
        ("GET", "/v1/runs/{run}/series?stat=gap&to=99999999999999999999", 422),
        ("GET", "/v1/runs/{run}/heatmap?stat=gap&rank=99999999999", 422),
        ("GET", "/v1/runs/{run}/scalars?name=nope", 422),
        ("POST", "/v1/runs/{run}/batches", 422),
        ("POST", "/v1/runs", 422),
        ("PATCH", "/v1/runs/nope", 422),
        ("PUT", "/v1/runs", 405),
        ("GET", "/v1/nope", 404),
    ],
)
def test_every_error_is_a_problem_with_a_detail(
    client: httpx.Client, run_id: str, method: str, path: str, status: int
) -> None:
    create(client, run_record(run_id))
    answer = client.request(method, path.replace("{run}", run_id))
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["detail"]


def test_an_unexpected_error_is_logged_and_tells_the_client_nothing(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(answers, "page", fail)
    answer = client.get("/v1/runs")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text
    assert "a secret detail" in caplog.text


# -------- token


@pytest.fixture
def guarded(app: FastAPI, client: httpx.Client, settings: Settings) -> Iterator[httpx.Client]:
    """The service with a token, for the time of one test."""
    app.state.settings = Settings(**settings.model_dump() | {"token": "correct horse"})
    yield client
    app.state.settings = settings


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic correct horse", "Bearer córrect horse"])
def test_without_the_token_nothing_below_v1_answers(guarded: httpx.Client, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    document = guarded.get("/openapi.json").json()["paths"]
    served = [(method.upper(), path) for path, methods in document.items() for method in methods]
    served = [(method, path) for method, path in served if path not in ("/healthz", "/readyz")]
    pages_of_runs = [*pages.router.routes, *figure_routes.router.routes]
    served += [
        (method, route.path) for route in pages_of_runs if isinstance(route, APIRoute) for method in route.methods
    ]
    assert len(served) > 30
    for method, path in served:
        answer = guarded.request(method, re.sub(r"\{\w+\}", "1", path), headers=headers)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_token_or_the_cookie_made_from_it_opens(guarded: httpx.Client) -> None:
    assert guarded.get("/v1/runs", headers={"authorization": "Bearer correct horse"}).status_code == 200
    cookie = f"{COOKIE}={cookie_value('correct horse')}"
    assert guarded.get("/v1/runs", headers={"cookie": cookie}).status_code == 200
    assert guarded.get("/v1/runs", headers={"cookie": f"{COOKIE}=correct horse"}).status_code == 401


def test_probes_of_the_process_need_no_token(guarded: httpx.Client) -> None:
    assert guarded.get("/healthz").json()["status"] == "ok"
    assert guarded.get("/readyz").json()["status"] == "ok"


# -------- documents


def test_the_documented_routes_are_the_routes_there_are(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    text = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^### `([A-Z]+ /\S+)`$", text, re.MULTILINE)) == served


def test_openapi_describes_every_route_and_its_errors(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["summary"], (method, path)
            assert route["tags"], (method, path)
            for status, answer in route["responses"].items():
                if status >= "400":
                    assert answer["content"].keys() == {"application/problem+json"}, (method, path, status)
            if "{run}" in path:
                assert "404" in route["responses"], (method, path)


# -------- process


@contextmanager
def process(tmp_path: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "service", "--port", "0", "--store", f"chdb://{tmp_path}/store", *arguments]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_the_process_stops_within_seconds_though_a_stream_is_open(tmp_path: Path, by: signal.Signals) -> None:
    with process(tmp_path) as started:
        assert started.stdout is not None
        url = started.stdout.readline().split()[2]
        with httpx.Client(base_url=url, timeout=30) as client:
            create(client, run_record("a"))
            with events(client, "a") as stream:
                next(stream)
                started.send_signal(by)
                began = time.monotonic()
                assert len(list(stream)) <= 2  # ends, and without an error
        assert started.wait(10) == 0
        assert time.monotonic() - began < 10
        assert started.stderr is not None
        assert started.stderr.read() == ""


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a start that cannot succeed ends with."""
    assert serve(create_app, ["--store", "chdb:///nowhere/at/all", *arguments], prog="brn") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"brn: port {port} on 127.0.0.1 is taken" in one_line(capsys, "--port", str(port))


def test_a_locked_store_is_one_line(capsys: pytest.CaptureFixture[str], settings: Settings, store: Store) -> None:
    line = one_line(capsys, "--port", "0", "--store", settings.store)
    assert f"in use by process {os.getpid()}" in line


def test_answers_are_not_held_back_for_an_acknowledgement() -> None:
    with _listening_socket(Settings(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # what asyncio asks before it sets TCP_NODELAY


HEAP = """
import ctypes, re, sys, threading
from service.__main__ import serve
from service.errors import CannotStart

libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p

def look(settings):
    for _ in range(3):
        block = bytearray(8 * 2**20)  # freed twice before it is looked at: glibc then would take it from a heap
        own = re.findall(r'type="mmap" count="(\\d+)" size="(\\d+)"', info())[-1]
        del block
    def work():
        kept.append(bytearray(10_000))
        all_here.wait()
    kept, all_here = [], threading.Barrier(9)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    all_here.wait()
    raise CannotStart(f"{info().count('<heap nr=')} heaps, {own[1]} bytes beside them")

def info():
    file = libc.fopen(sys.argv[1].encode(), b"w")
    libc.malloc_info(0, ctypes.c_void_p(file))
    libc.fclose(ctypes.c_void_p(file))
    return open(sys.argv[1]).read()

serve(look, ["--port", "0"], prog="brn")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_goes_back(tmp_path: Path) -> None:
    """Few heaps, and no large blocks in them: what is free in a heap stays with the process."""
    command = [sys.executable, "-c", HEAP, str(tmp_path / "info.xml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.fullmatch(r"brn: (\d+) heaps, (\d+) bytes beside them\n", done.stderr)
    assert found is not None, done.stderr
    assert int(found[1]) <= 2
    assert int(found[2]) >= 8 * 2**20


def test_listening_beyond_this_machine_wants_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert "refusing to listen on 0.0.0.0 without a token" in one_line(capsys, "--host", "0.0.0.0")


def test_a_wrong_setting_is_one_line_with_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "BRN_SERVICE_PORT (or --port): " in one_line(capsys, "--port", "x")
    monkeypatch.setenv("BRN_SERVICE_READERS", "0")
    assert "BRN_SERVICE_READERS: " in one_line(capsys)


def test_a_body_that_is_no_text_is_a_problem_as_any_other_wrong_body_is(client: httpx.Client) -> None:
    answer = client.post("/v1/runs", content=b'{"id": "\xff"}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"].startswith("body: cannot be read as JSON")
