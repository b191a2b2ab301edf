"""The store on a server: ClickHouse's HTTP interface, answered by `clickhouse_bridge`, and its real client.

Two replicas of the service share one server. What they say is compared with the session's embedded store.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import clickhouse_bridge
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import serving
from synthetic import create, layer_rows, run_record, scalar_rows, send, write_run

from brn_core import wire
from dashboard.app import create_app
from service import tables
from service.errors import CannotStart, Unavailable
from service.settings import Settings
from service.store import Batch, Store

DEADLINE_SECONDS = 60


class Bridge:
    """A process that answers as a server does, over one folder; it may end and start again at the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port_holder = socket.socket()  # bound and not listening: the port stays ours, and refuses connections
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port_holder.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._port_holder.getsockname()[1]}"
        self._process: subprocess.Popen[str] | None = None

    def store(self, database: str, password: str = clickhouse_bridge.PASSWORD) -> str:
        return f"clickhouse://{clickhouse_bridge.USER}:{password}@{self.address}/{database}"

    def start(self) -> None:
        command = [sys.executable, clickhouse_bridge.__file__, str(self._folder), self.address.partition(":")[2]]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._port_holder.close()


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with contextlib.closing(Bridge(tmp_path_factory.mktemp("server") / "store")) as bridge:
        bridge.start()
        yield bridge


@pytest.fixture(scope="module")
def replicas(bridge: Bridge) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """HTTP clients of two services over one database."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(2):
            app = create_app(Settings(store=bridge.store("brn"), diagnosis_seconds=0.0, readers=2))
            base_url = stack.enter_context(serving(app))
            clients.append(stack.enter_context(httpx.Client(base_url=base_url, timeout=DEADLINE_SECONDS)))
        first, second = clients
        yield first, second


@pytest.fixture(scope="module", params=["", clickhouse_bridge.CLUSTER], ids=["one server", "cluster"])
def stores(bridge: Bridge, request: pytest.FixtureRequest) -> Iterator[tuple[Store, Store]]:
    """Two stores over one database of their own."""
    with contextlib.ExitStack() as stack:
        settings = Settings(store=bridge.store(f"two_stores{request.param}"), cluster=request.param, readers=1)
        first, second = (stack.enter_context(contextlib.closing(Store(settings))) for _ in range(2))
        yield first, second


def count(store: Store, table: str, run_id: str) -> int:
    found = store.rows(f"SELECT count() AS n FROM {table} WHERE run_id = {{run:String}}", run=run_id)
    return int(found.column("n")[0].as_py())


def batch(store: Store, run_id: str, seq: int = 1) -> Batch:
    """Two rows of `layers` and one of `scalars`."""
    run = store.record(run_id)
    assert run is not None
    rows = {"layers": layer_rows([seq], 2), "scalars": scalar_rows({"loss": [(seq, 1.0)]})}
    return Batch(run, 0, seq, rows)


def put_run(store: Store, run_id: str) -> None:
    store.put_run(run_record(run_id, 2), "running", datetime.now(UTC))


def wait_until(holds: Callable[[], bool]) -> None:
    """A replica looks once a second whether another one wrote."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -------- the same answers


@pytest.fixture(scope="module")
def same_rows(client: httpx.Client, replicas: tuple[httpx.Client, httpx.Client]) -> str:
    """A run with the same rows in the embedded store and on the server, NaN, infinity and missing values among them."""
    run_id = "same-on-both"
    gap = np.random.default_rng(2).standard_normal((40, 3)).astype(np.float32)
    gap[30, 1], gap[31, 1] = np.nan, np.inf
    steps = np.arange(41, 44)
    fewer = layer_rows(steps, 3)
    at = fewer.schema.get_field_index("adjacency_noise")
    fewer = fewer.set_column(at, fewer.schema.field(at), pa.nulls(len(fewer), fewer.schema.field(at).type))
    vectors = {name: [0.5, 1.0, float("nan"), 2.0] for name in wire.TABLES["channels"].names[2:]}
    snapshot = [{"step": 43, "layer": layer, **vectors} for layer in range(3)]
    more = {
        "layers": fewer,
        "scalars": scalar_rows({"loss": [(41, float("nan")), (42, float("-inf"))], "läuft": [(43, 1e300)]}),
        "channels": pa.Table.from_pylist(snapshot, schema=wire.TABLES["channels"]),
    }
    for each in (client, replicas[0]):
        write_run(each, run_id, layers=3, steps=40, ranks=2, gap=gap)
        assert send(each, run_id, more, seq=2).json()["rows"] == 9 + 3 + 3
    return run_id


@pytest.mark.parametrize(
    "path",
    [
        "layers",
        "summary",
        "series?stat=gap&stat=adjacency_noise&points=10",
        "series?stat=gap&layer=1&rank=1&from=5&to=35",
        "heatmap?stat=gap&points=20",
        "scalars",
        "probe",
        "ranks",
        "channels",
        "channels?layer=1",
        "schedule?points=7",
        "findings",
    ],
)
def test_a_server_and_an_embedded_store_give_the_same_answer(
    client: httpx.Client, replicas: tuple[httpx.Client, httpx.Client], same_rows: str, path: str
) -> None:
    answers = [each.get(f"/v1/runs/{same_rows}/{path}") for each in (client, replicas[1])]
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
    # When rows came differs, as each store got its own.
    embedded, server = (re.sub(r'"received_at":"[^"]*"', '"received_at":""', answer.text) for answer in answers)
    assert json.loads(server) == json.loads(embedded)


def test_a_server_and_an_embedded_store_compare_runs_alike(
    client: httpx.Client, replicas: tuple[httpx.Client, httpx.Client], same_rows: str, run_id: str
) -> None:
    for each in (client, replicas[0]):
        create(each, run_record(run_id, layers=1, planned_steps=9)).raise_for_status()
        rows = {"layers": layer_rows(range(1, 8), 1), "scalars": scalar_rows({"loss": [(1, 1.0)]})}
        send(each, run_id, rows).raise_for_status()
    for by in ("step", "fraction"):
        params = {"run": [same_rows, run_id], "stat": ["gap", "clip_r"], "by": by, "points": 6}
        # The verdict is the one that was last computed: it comes when it comes.
        found = [each.get("/v1/compare", params=params).raise_for_status().json() for each in (client, replicas[1])]
        for answer in found:
            for run in answer["runs"]:
                del run["verdict"]
        assert found[0] == found[1]
    page = replicas[1].get(f"/compare?runs={same_rows},{run_id}").raise_for_status().text
    assert page.count('<tr data-part="found ') == 2


@pytest.mark.parametrize("table", wire.TABLES)
def test_a_server_and_an_embedded_store_export_the_same_rows(
    client: httpx.Client, replicas: tuple[httpx.Client, httpx.Client], same_rows: str, table: str
) -> None:
    def exported(each: httpx.Client) -> pa.Table:
        answer = each.get(f"/v1/runs/{same_rows}/export", params={"table": table})
        return pq.read_table(io.BytesIO(answer.raise_for_status().content))

    embedded, server = exported(client), exported(replicas[1])
    assert server.num_rows > 0
    assert server.schema == embedded.schema
    # As text, in which NaN equals NaN.
    assert sorted(map(str, server.to_pylist())) == sorted(map(str, embedded.to_pylist()))


# -------- two replicas


def test_a_replica_sees_what_another_one_took_and_takes_no_repeat_of_it(
    replicas: tuple[httpx.Client, httpx.Client], run_id: str
) -> None:
    first, second = replicas
    assert create(first, run_record(run_id, layers=2)).status_code == 201
    assert create(second, run_record(run_id, layers=2)).status_code == 200, "it is known"
    rows = {"layers": layer_rows([1], 2)}
    assert send(first, run_id, rows).json()["rows"] == 2
    repeat = send(second, run_id, rows).json()
    assert (repeat["rows"], repeat["duplicate"]) == (0, True)
    assert second.get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [1]
    assert send(second, run_id, {"layers": layer_rows([2], 2)}, seq=2).json()["rows"] == 2
    assert first.get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [1, 2]
    assert first.patch(f"/v1/runs/{run_id}", json={"tags": ["seen"], "status": "finished"}).status_code == 200

    def listed() -> list[Any]:
        runs = second.get("/v1/runs", params={"tag": "seen"}).json()["runs"]
        return [(run["id"], run["rows"], run["state"]) for run in runs]

    wait_until(lambda: listed() == [(run_id, 4, "finished")])
    assert second.delete(f"/v1/runs/{run_id}").status_code == 204
    assert first.get(f"/v1/runs/{run_id}").status_code == 404
    assert send(first, run_id, rows, seq=3).status_code == 404


def test_a_batch_that_replicas_take_at_the_same_moment_is_stored_once(
    stores: tuple[Store, Store], run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stores
    put_run(first, run_id)
    assert first.put_batches([batch(first, run_id)]) == ["stored"]
    with monkeypatch.context() as patch:
        patch.setattr(second._taken, "_keys_in", lambda *_: set())  # it had looked before the first one wrote
        assert second.put_batches([batch(second, run_id)]) == ["stored"]
    assert [count(second, table, run_id) for table in ("layers", "scalars", "batches")] == [2, 1, 1]
    assert second.put_batches([batch(second, run_id), batch(second, run_id, seq=2)]) == ["duplicate", "stored"]
    assert first.extent(run_id) == second.extent(run_id)
    assert first.extent(run_id).layer_rows == 4


def test_a_batch_that_broke_off_on_one_replica_is_completed_by_another(
    stores: tuple[Store, Store], run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stores
    put_run(first, run_id)
    insert = first.engine.insert

    def breaks_off(table: str, *rest: Any) -> None:
        if table == "batches":
            raise Unavailable("gone")
        insert(table, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(first.engine, "insert", breaks_off)
        with pytest.raises(Unavailable):
            first.put_batches([batch(first, run_id)])
    assert [count(second, table, run_id) for table in ("layers", "batches")] == [2, 0]
    assert second.put_batches([batch(second, run_id)]) == ["stored"]
    assert [count(first, table, run_id) for table in ("layers", "scalars", "batches")] == [2, 1, 1]


def test_a_deleted_run_leaves_nothing_and_its_name_may_be_used_again(stores: tuple[Store, Store], run_id: str) -> None:
    first, second = stores
    kept = f"{run_id}-kept"
    for name in (run_id, kept):
        put_run(first, name)
        first.put_batches([batch(first, name)])
    second.delete_runs([run_id])
    assert first.record(run_id) is None
    for table in ("layers", "scalars", "batches", "runs"):
        assert (count(first, table, run_id), count(first, table, kept) > 0) == (0, True), table
    put_run(first, run_id)
    assert first.put_batches([batch(first, run_id)]) == ["stored"], "the same batch, of another life"
    assert count(first, "layers", run_id) == 2


def test_a_deletion_that_broke_off_on_one_replica_is_finished_by_one_that_makes_the_run_anew(
    stores: tuple[Store, Store], run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stores
    put_run(first, run_id)
    first.put_batches([batch(first, run_id)])

    def breaks_off(*_: Any, **__: Any) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(first.engine, "remove", breaks_off)
        with pytest.raises(Unavailable):
            first.delete_runs([run_id])
    assert second.record(run_id) is None
    put_run(second, run_id)
    assert second.extent(run_id).layer_rows == 0
    assert count(second, "layers", run_id) == 0


# -------- the tables


def test_two_replicas_may_open_an_empty_database_at_once_and_a_third_one_an_older_version(bridge: Bridge) -> None:
    settings = Settings(store=bridge.store("made_at_once"), readers=1)
    opened: list[Store] = []
    threads = [threading.Thread(target=lambda: opened.append(Store(settings))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 2
    first, second = opened
    put_run(first, "a")
    first.put_batches([batch(first, "a")])
    first.engine.command("ALTER TABLE layers DROP COLUMN adjacency_noise")
    first.engine.command("TRUNCATE TABLE store_version")
    first.engine.insert("store_version", pa.table({"version": pa.array([1], pa.uint32())}))
    first.close()
    second.close()
    with contextlib.closing(Store(settings)) as third:
        assert third.rows("SELECT max(version) AS v FROM store_version").to_pylist() == [{"v": tables.STORE_VERSION}]
        assert third.rows("SELECT adjacency_noise FROM layers").column(0).to_pylist() == [None, None]
        assert third.put_batches([batch(third, "a")]) == ["duplicate"]
        third.engine.insert("store_version", pa.table({"version": pa.array([99], pa.uint32())}))
    with pytest.raises(CannotStart, match=r"written by a newer version \(99, this one knows"):
        Store(settings)


def test_every_table_of_a_cluster_is_made_on_all_its_servers_and_replicated(store: Store) -> None:
    """In the engine's own grammar; that servers then replicate is Keeper's doing, and no test of ours."""
    statements = list(tables.create_statements(embedded=False, cluster="brn"))
    assert len(statements) == len({*tables.RUN_TABLES, "runs", "store_version"})
    for statement in statements:
        parsed = store.engine.rows("SELECT formatQuerySingleLine({statement:String}) AS text", statement=statement)
        text = parsed.column("text")[0].as_py()
        assert re.match(r"CREATE TABLE IF NOT EXISTS \w+ ON CLUSTER brn \(", text), text
        assert re.search(r" ENGINE = Replicated(Replacing)?MergeTree(\(version\))? ORDER BY ", text), text
        assert "non_replicated" not in text
        assert ("replicated_deduplication_window = 10000" in text) == ("fsync_after_insert" in text), text


def test_a_cluster_is_refused_where_it_is_unknown_or_the_tables_belong_to_one_server(
    bridge: Bridge,
) -> None:
    with pytest.raises(CannotStart, match="cluster 'other' not found"):
        Store(Settings(store=bridge.store("clustered"), cluster="other", readers=1))
    Store(Settings(store=bridge.store("alone"), readers=1)).close()
    with pytest.raises(CannotStart, match=r"BRN_SERVICE_CLUSTER is set, but these tables .*layers"):
        Store(Settings(store=bridge.store("alone"), cluster=clickhouse_bridge.CLUSTER, readers=1))


def test_a_wrong_password_is_one_line_that_does_not_repeat_it(bridge: Bridge) -> None:
    with pytest.raises(CannotStart, match=rf"clickhouse://{bridge.address}/brn cannot be opened: .*516") as caught:
        Store(Settings(store=bridge.store("brn", password="hunter22")))
    assert "hunter22" not in str(caught.value)
    assert "\n" not in str(caught.value)


# -------- a server that goes away: last, as everything here runs on it


def test_a_server_that_is_away_is_a_503_and_all_goes_on_when_it_is_back(
    bridge: Bridge, replicas: tuple[httpx.Client, httpx.Client], run_id: str
) -> None:
    for each in replicas:
        create(each, run_record(run_id, layers=2)).raise_for_status()
    rows = {"layers": layer_rows([1], 2)}
    assert send(replicas[0], run_id, rows, seq=1).json()["rows"] == 2
    bridge.kill()
    try:
        for each in replicas:
            for answer in (
                send(each, run_id, {"layers": layer_rows([2], 2)}, seq=2),
                create(each, run_record(f"{run_id}-more")),
                each.get("/v1/runs"),
                each.get(f"/v1/runs/{run_id}/series?stat=gap"),
                each.get(f"/v1/runs/{run_id}/findings"),
                each.delete(f"/v1/runs/{run_id}"),
                each.get("/readyz"),
                each.get("/metrics"),
            ):
                assert answer.status_code == 503, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["detail"].startswith("the store does not answer")
            assert each.get("/healthz").status_code == 200
    finally:
        bridge.start()
    assert send(replicas[1], run_id, {"layers": layer_rows([2], 2)}, seq=2).json()["rows"] == 2
    assert send(replicas[0], run_id, rows, seq=1).json()["duplicate"], "what was acknowledged is there"
    assert replicas[0].get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [1, 2]
