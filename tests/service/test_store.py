from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError
from other_process import python
from synthetic import create, layer_rows, run_record, send, write_run

from brn_core import wire
from service import answers, batches, windows
from service.errors import CannotStart, StoreFull, Unavailable
from service.settings import Settings
from service.store import Store
from service.tables import STORE_VERSION


def test_every_table_of_the_wire_has_its_columns(store: Store) -> None:
    rows = store.rows("SELECT table, name, type FROM system.columns WHERE database = currentDatabase()").to_pylist()
    types = {(row["table"], row["name"]): row["type"] for row in rows}
    for table, schema in wire.TABLES.items():
        for own in ("run_id", "rank", "seq"):
            assert (table, own) in types
        for field in schema:
            assert types[table, field.name].startswith("Nullable") is field.nullable, field.name
    assert types["layers", "gap"] == "Float32"
    assert types["probe", "mean"] == "Array(Float32)"
    assert types["scalars", "value"] == "Float64"


def test_the_store_says_its_version(store: Store) -> None:
    assert store.rows("SELECT version FROM store_version").to_pylist() == [{"version": STORE_VERSION}]


def test_parameters_are_values_and_never_sql(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id))
    evil = "x' OR 1 = 1 --"
    assert store.record(evil) is None
    assert store.rows("SELECT {v:String} AS v", v=evil).to_pylist() == [{"v": evil}]

    write_run(client, run_id)
    before = client.get(f"/v1/runs/{run_id}").json()["rows"]
    asked = 0
    for path, routes in client.get("/openapi.json").json()["paths"].items():
        if path.endswith("/events"):
            continue
        for parameter in routes.get("get", {}).get("parameters", []):
            for text in (evil, "x') UNION ALL SELECT 1 --", "\\"):
                where = {parameter["name"]: text} if parameter["in"] == "query" else {}
                address = re.sub(r"\{\w+\}", lambda _, text=text, where=where: run_id if where else quote(text), path)
                answer = client.get(address, params=where)
                assert answer.status_code in (200, 404, 422), (path, parameter["name"], text)
                asked += 1
    assert asked > 60
    assert client.get(f"/v1/runs/{run_id}").json()["rows"] == before > 0


def test_readers_and_writers_do_not_disturb_each_other(client: httpx.Client, store: Store, run_id: str) -> None:
    write_run(client, run_id, layers=2, steps=2, ranks=4)
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return run

    def write(rank: int) -> Callable[[], None]:
        def work() -> None:
            for seq in range(10, 16):
                tables = {"layers": layer_rows([seq], 2)}
                assert send(client, run_id, tables, rank=rank, seq=seq).status_code == 200

        return work

    def read() -> None:
        for _ in range(10):
            steps = answers.series(store, run_id, ["gap"]).steps
            assert steps == sorted(steps)
            assert answers.run(store, run_id).rows % 2 == 0, "half a batch was seen"

    threads = [threading.Thread(target=guarded(work)) for work in (*(write(rank) for rank in range(4)), read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert answers.run(store, run_id).rows == 2 * 2 * 4 + 6 * 2 * 4


def test_the_same_batch_sent_at_once_by_many_is_stored_once(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=3))
    answers = []

    def work() -> None:
        answers.append(send(client, run_id, {"layers": layer_rows([1], 3)}, seq=5).json())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["duplicate"] for answer in answers) == [False] + [True] * 5
    assert store.rows("SELECT count() AS n FROM layers WHERE run_id = {r:String}", r=run_id).to_pylist() == [{"n": 3}]


def test_deleting_a_run_leaves_nothing_of_it_and_everything_of_others(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    for name in ("gone", "kept"):
        write_run(client, f"{run_id}-{name}", layers=2, steps=3)
        windows.diagnosis(store, f"{run_id}-{name}")
    store.delete_runs([f"{run_id}-gone"])
    for table in ("runs", "batches", "verdicts", "layers", "probe", "scalars"):
        rows = store.rows(f"SELECT DISTINCT run_id FROM {table} WHERE startsWith(run_id, {{r:String}})", r=run_id)
        assert rows.column(0).to_pylist() == [f"{run_id}-kept"], table


def test_rows_survive_the_process_and_its_sudden_end(tmp_path: Path) -> None:
    killed = python(
        """
import os, signal
store = open_store()
store.put_run(run_record("a", 3), "running", datetime.now(UTC))
store.put_batches([batch(1, 3), batch(2, 3)])
os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path / "store",
    )
    assert killed.returncode == -9, killed.stderr
    found = python(
        """
store = open_store()
print(store.record("a").record.layers[2].name, store.extent("a").layer_rows)
print(store.rows("SELECT count() AS n FROM layers").column(0)[0])
store.close()
""",
        tmp_path / "store",
    )
    assert found.stdout.split() == ["block2.bn", "6", "6"], found.stderr


def test_a_column_that_the_schema_gained_is_added_and_old_rows_are_kept(tmp_path: Path) -> None:
    found = python(
        """
store = open_store()
store.put_run(run_record("a", 2), "running", datetime.now(UTC))
store.put_batches([batch(1)])
store.rows("SELECT 1")  # the engine has the batch
store.engine.command("ALTER TABLE layers DROP COLUMN adjacency_noise")
store.close()
store = open_store()
print(store.rows("SELECT adjacency_noise FROM layers").column(0).to_pylist())
store.close()
""",
        tmp_path / "store",
    )
    assert found.stdout.strip() == "[None, None]", found.stderr


def test_a_store_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    found = python(
        """
store = open_store()
store.engine.insert("store_version", pa.table({"version": pa.array([99], pa.uint32())}))
store.close()
try:
    open_store()
except CannotStart as error:
    print(error)
""",
        tmp_path / "store",
    )
    assert "written by a newer version (99, this one knows" in found.stdout, found.stderr


def test_a_second_process_is_told_who_has_the_store(settings: Settings, store: Store) -> None:
    found = python("try: open_store()\nexcept CannotStart as error: print(error)", settings.store_path)
    assert f"is in use by process {os.getpid()}: stop it, or name another with --store" in found.stdout, found.stderr


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CannotStart, match=r"cannot write the store at .*file/store: Not a directory; name another"):
        Store(Settings(store=f"chdb://{tmp_path}/file/store"))


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(CannotStart, match=r"clickhouse://127\.0\.0\.1:1/brn cannot be opened") as caught:
        Store(Settings(store="clickhouse://me:hunter22@127.0.0.1:1/brn"))
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DatabaseError("Code: 243", code=243), StoreFull),
        (OperationalError("connection refused"), Unavailable),
        (DatabaseError("Code: 62. syntax error", code=62), DatabaseError),
    ],
)
def test_errors_of_the_engine_become_ours(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def fail(*args: object, **kwargs: object) -> pa.Table:
        raise error

    monkeypatch.setattr(store.engine._writer, "insert_arrow", fail)  # `verdicts` has no connection of its own
    with pytest.raises(expected):
        store.engine.insert("verdicts", pa.table({}))


def test_what_was_acknowledged_and_broke_off_in_the_engine_is_completed_by_the_next_process(tmp_path: Path) -> None:
    """Three batches written together, killed after the first table."""
    killed = python(
        """
import os, signal
store = open_store()
store.put_run(run_record("a", 2), "running", datetime.now(UTC))
insert = store.engine.insert
def dies_after_layers(table, *rest):
    insert(table, *rest)
    if table == "layers":
        os.kill(os.getpid(), signal.SIGKILL)
store.engine.insert = dies_after_layers
store.put_batches([batch(1), batch(2), batch(3)])
store.rows("SELECT 1")
""",
        tmp_path / "store",
    )
    assert killed.returncode == -9, killed.stderr
    found = python(
        """
store = open_store()
print(store.extent("a").layer_rows)
print(store.put_batches([batch(3), batch(4)]), store.put_batches([batch(2), batch(1), batch(4), batch(1)]))
for table in ("layers", "scalars"):
    print(store.rows(f"SELECT seq, count() AS n FROM {table} GROUP BY seq ORDER BY seq").to_pydict())
print(store.extent("a").layer_rows)
store.close()
""",
        tmp_path / "store",
    )
    before, outcomes, layers, scalars, extent = found.stdout.splitlines()
    assert before == "6", found.stderr
    assert outcomes == "['duplicate', 'stored'] ['duplicate', 'duplicate', 'duplicate', 'duplicate']"
    assert layers == "{'seq': [1, 2, 3, 4], 'n': [2, 2, 2, 2]}"
    assert scalars == "{'seq': [1, 2, 3, 4], 'n': [1, 1, 1, 1]}"
    assert extent == "8"


def test_a_batch_may_be_repeated_after_any_number_of_others_and_a_restart(tmp_path: Path) -> None:
    for expected in ("stored", "duplicate"):
        found = python(
            """
store = open_store()
store.put_run(run_record("a", 1), "running", datetime.now(UTC))
print(*{outcome for first in (1000, 0) for outcome in store.put_batches([batch(first + i, 1) for i in range(1000)])})
print(store.rows("SELECT count() AS n FROM layers").column(0)[0])
store.close()
""",
            tmp_path / "store",
        )
        assert found.stdout.split() == [expected, "2000"], found.stderr


def test_a_deletion_that_broke_off_is_finished_by_the_next_process(tmp_path: Path) -> None:
    killed = python(
        """
import os, signal
store = open_store()
for name in ("gone", "kept"):
    store.put_run(run_record(name, 2), "running", datetime.now(UTC))
    store.put_batches([batch(1, run=name)])
command = store.engine._remover.command
def dies(sql, **rest):
    if "probe" in sql:
        os.kill(os.getpid(), signal.SIGKILL)
    return command(sql, **rest)
store.engine._remover.command = dies
store.delete_runs(["gone"])
""",
        tmp_path / "store",
    )
    assert killed.returncode == -9, killed.stderr
    found = python(
        """
store = open_store()
print([run.record.id for run in store.records()], store.record("gone"))
for table in ("runs", "layers", "batches"):
    print(store.rows(f"SELECT DISTINCT run_id FROM {table}").column(0).to_pylist())
store.put_run(run_record("gone", 2), "running", datetime.now(UTC))
print(store.extent("gone").layer_rows, store.put_batches([batch(1, run="gone")]))
store.close()
""",
        tmp_path / "store",
    )
    assert found.stdout.splitlines() == ["['kept'] None", "['kept']", "['kept']", "['kept']", "0 ['stored']"], (
        found.stderr
    )


def test_a_store_of_the_first_version_keeps_every_row_and_what_broke_off_in_it_is_completed(tmp_path: Path) -> None:
    found = python(
        """
import clickhouse_connect
from pathlib import Path
Path(sys.argv[1]).mkdir()
old = clickhouse_connect.get_client(dsn=f"chdb://{sys.argv[1]}")
for statement in ("CREATE DATABASE brn", "USE brn", *Path(sys.argv[2]).read_text().split(";" + chr(10))):
    old.command(statement)
def insert(table, **columns):
    old.insert_arrow(table, pa.table(columns))
def u(*values):
    return pa.array(values, pa.uint64())
def insert_layers(seq, steps):
    rows = layer_rows(steps, 2, gap=0.5)
    own = [pa.array([value] * len(rows)) for value in ("a", 0, seq)]
    old.insert_arrow("layers", pa.table([*own, *rows.columns], names=["run_id", "rank", "seq", *rows.column_names]))
record = run_record("a", 2)
texts = {"record": [record.model_dump_json(exclude={"layers"})], "layers": [record.model_dump_json(include={"layers"})]}
now = pa.array([datetime.now(UTC)], pa.timestamp("ms", tz="UTC"))
insert("store_version", version=u(1))
insert("runs", run_id=["a"], version=u(1), **texts, status=["running"], created_at=now, changed_at=now)
insert_layers(1, [1, 2])
insert("batches", run_id=["a"], rank=u(0), seq=u(1), layer_rows=u(4), first_step=u(1), last_step=u(2), received_at=now)
insert_layers(2, [3])  # broke off: no row in batches
old.close()
for _ in range(2):
    store = open_store()
    tables = {"layers": layer_rows([3], 2, gap=0.5), "scalars": scalar_rows({"loss": [(3, 1.0)]})}
    print([store.put_batches([Batch(store.record("a"), 0, seq, tables)]) for seq in (1, 2)])
    print(store.rows("SELECT step, layer, gap FROM layers ORDER BY step, layer").to_pylist() == [
        {"step": step, "layer": layer, "gap": 0.5} for step in (1, 2, 3) for layer in (0, 1)])
    print(store.rows("SELECT max(version) AS v FROM store_version").column(0)[0], store.record("a").record == record)
    store.close()
""",
        tmp_path / "store",
        Path(__file__).with_name("store_v1.sql"),
    )
    first, second = found.stdout.splitlines()[:3], found.stdout.splitlines()[3:]
    assert first == ["[['duplicate'], ['stored']]", "True", f"{STORE_VERSION} True"], found.stderr
    assert second == ["[['duplicate'], ['duplicate']]", "True", f"{STORE_VERSION} True"]


def test_a_diagnosis_that_ends_after_its_run_was_deleted_leaves_no_verdict(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    write_run(client, run_id, layers=1, steps=2)
    verdict = windows.diagnosis(store, run_id).verdict
    store.delete_runs([run_id])
    store.put_verdict(run_id, verdict)
    create(client, run_record(run_id))
    assert client.get(f"/v1/runs/{run_id}").json()["verdict"]["summary"] == answers.NOT_YET.summary


def test_a_batch_is_stored_while_every_reader_is_busy(
    client: httpx.Client, store: Store, settings: Settings, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    with contextlib.ExitStack() as busy:
        for _ in range(settings.readers):
            busy.enter_context(store.engine.reader())
        assert send(client, run_id, {"layers": layer_rows([1], 1)}).json()["rows"] == 1


def test_queries_are_answered_while_more_batches_wait_than_the_service_has_threads(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    body = wire.encode_batch({"layers": layer_rows([1], 1)})

    async def work() -> None:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=30, limits=httpx.Limits()) as many:
            sending = [
                asyncio.create_task(
                    many.post(
                        f"/v1/runs/{run_id}/batches?rank=0&seq={seq}",
                        content=body,
                        headers={"content-type": wire.MEDIA_TYPE},
                    )
                )
                for seq in range(60)
            ]
            with store.engine.taking():  # the writer waits for this lock
                assert (await many.get(f"/v1/runs/{run_id}")).json()["rows"] == 0
            assert {(await task).json()["rows"] for task in sending} == {1}

    asyncio.run(work())


def test_an_engine_that_takes_nothing_bounds_what_waits_and_gets_it_all_once_it_does(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, run_record(run_id, layers=1))
    store.rows("SELECT 1")  # nothing of other tests waits
    insert = store.engine.insert

    def full(table: str, *rest: object) -> None:
        if table == "layers":
            raise StoreFull("no space")
        insert(table, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "WAITING_BYTES", 0)
        patch.setattr(store.engine, "insert", full)
        assert send(client, run_id, {"layers": layer_rows([1], 1)}, seq=1).json()["rows"] == 1, "the journal has it"
        assert send(client, run_id, {"layers": layer_rows([2], 1)}, seq=2).status_code == 507
        assert client.get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [], "questions are answered"
    assert client.get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [1]
    repeats = [send(client, run_id, {"layers": layer_rows([seq], 1)}, seq=seq).json() for seq in (1, 2)]
    assert [answer["duplicate"] for answer in repeats] == [True, False]
    assert client.get(f"/v1/runs/{run_id}/series?stat=gap").json()["steps"] == [1, 2]


def test_a_nearly_full_disk_takes_nothing_more_and_goes_on_when_there_is_space(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, run_record(run_id, layers=1))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_min_free_bytes", 2**62)
        answer = send(client, run_id, {"layers": layer_rows([1], 1)})
        assert answer.status_code == 507
        assert "BRN_SERVICE_MIN_FREE_BYTES" in answer.json()["detail"]
        assert client.delete(f"/v1/runs/{run_id}").status_code == 204, "deleting must work: it makes space"
        assert create(client, run_record(run_id)).status_code == 507
    create(client, run_record(run_id, layers=1))
    assert send(client, run_id, {"layers": layer_rows([1], 1)}).json()["rows"] == 1
