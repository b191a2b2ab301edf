from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError
from synthetic import create, layer_rows, run_record, send, write_run

from brn_core import wire
from service import query
from service.errors import CannotStart, StoreFull, Unavailable
from service.settings import Settings
from service.store import STORE_VERSION, Store

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, as chDB allows one store a process."""
    prelude = """
import sys, pyarrow as pa
from datetime import UTC, datetime
from service.errors import CannotStart
from service.settings import Settings
from service.store import Store
from synthetic import layer_rows, run_record
open_store = lambda: Store(Settings(store=f"chdb://{sys.argv[1]}"))
"""
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


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
            steps = query.series(store, run_id, ["gap"]).steps
            assert steps == sorted(steps)
            assert query.run(store, run_id).rows % 2 == 0, "half a batch was seen"

    threads = [threading.Thread(target=guarded(work)) for work in (*(write(rank) for rank in range(4)), read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert query.run(store, run_id).rows == 2 * 2 * 4 + 6 * 2 * 4


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
        query.diagnosis(store, f"{run_id}-{name}")
    store.delete_run(f"{run_id}-gone")
    for table in ("runs", "batches", "verdicts", "layers", "probe", "scalars"):
        rows = store.rows(f"SELECT DISTINCT run_id FROM {table} WHERE startsWith(run_id, {{r:String}})", r=run_id)
        assert rows.column(0).to_pylist() == [f"{run_id}-kept"], table


def test_rows_survive_the_process_and_its_sudden_end(tmp_path: Path) -> None:
    killed = python(
        """
import os, signal
store = open_store()
store.put_run(run_record("a", 3), "running", datetime.now(UTC))
store.put_batch(store.record("a"), 0, 1, {"layers": layer_rows([1, 2], 3)})
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
store.put_batch(store.record("a"), 0, 1, {"layers": layer_rows([1], 2)})
store._writer.command("ALTER TABLE layers DROP COLUMN adjacency_noise")
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
store._insert("store_version", pa.table({"version": pa.array([99], pa.uint32())}))
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

    monkeypatch.setattr(store._writer, "insert_arrow", fail)
    with pytest.raises(expected):
        store._insert("verdicts", pa.table({}))
