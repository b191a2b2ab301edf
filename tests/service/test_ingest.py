from __future__ import annotations

import json
import math
import re
import threading
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from synthetic import create, layer_rows, probe_rows, run_record, scalar_rows, send

from brn_core import wire
from service import ingest
from service.errors import Invalid
from service.store import Store

JSON = {"content-type": "application/json"}


def stored(store: Store, table: str, run_id: str, columns: str = "*", order: str = "step") -> list[dict[str, Any]]:
    return store.rows(
        f"SELECT {columns} FROM {table} WHERE run_id = {{r:String}} ORDER BY {order}", r=run_id
    ).to_pylist()


def post_json(client: httpx.Client, run_id: str, tables: dict[str, Any], **params: int) -> httpx.Response:
    content = json.dumps({"tables": tables})
    return client.post(
        f"/v1/runs/{run_id}/batches", params={"rank": 0, "seq": 1} | params, content=content, headers=JSON
    )


def channel_rows(step: int, layer: int, channels: int) -> pa.Table:
    vectors = {name: [float(i) for i in range(channels)] for name in wire.TABLES["channels"].names[2:]}
    return pa.Table.from_pylist([{"step": step, "layer": layer, **vectors}], schema=wire.TABLES["channels"])


def test_all_tables_of_a_batch_come_back_as_they_were_sent(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=2, channels=3, world_size=2))
    tables = {
        "layers": layer_rows([5, 6], 2),
        "probe": probe_rows([5, 6]),
        "scalars": scalar_rows({"loss": [(5, 1.5), (6, 1e300)]}),
        "channels": channel_rows(6, 1, 3),
    }
    answer = send(client, run_id, tables, rank=1, seq=2**64 - 1)
    assert answer.status_code == 200
    assert answer.json()["rows"] == 4 + 2 + 2 + 1
    for name, sent in tables.items():
        order = {"layers": "step, layer", "scalars": "name, step"}.get(name, "step")
        columns = ", ".join(sent.schema.names)
        assert stored(store, name, run_id, columns, order) == sent.to_pylist()
        assert {(row["rank"], row["seq"]) for row in stored(store, name, run_id, "rank, seq", "seq")} == {
            (1, 2**64 - 1)
        }


def test_non_finite_numbers_and_missing_ones_survive_storing(client: httpx.Client, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1))
    table = layer_rows([1, 2, 3], 1, gap=np.array([[np.nan], [np.inf], [-np.inf]]))
    position = table.schema.get_field_index("mean_noise")
    table = table.set_column(position, table.schema.field("mean_noise"), pa.array([None, math.nan, 2.0], pa.float32()))
    send(client, run_id, {"layers": table})
    rows = stored(store, "layers", run_id, "gap, mean_noise")
    assert math.isnan(rows[0]["gap"])
    assert [row["gap"] for row in rows[1:]] == [math.inf, -math.inf]
    assert rows[0]["mean_noise"] is None
    assert math.isnan(rows[1]["mean_noise"])
    assert rows[2]["mean_noise"] == 2.0


def test_a_repeated_batch_adds_nothing_and_says_so(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=3))
    first = send(client, run_id, {"layers": layer_rows([1], 3)}, seq=7).json()
    again = send(client, run_id, {"layers": layer_rows([1], 3)}, seq=7).json()
    assert (first["rows"], first["duplicate"]) == (3, False)
    assert (again["rows"], again["duplicate"]) == (0, True)
    assert client.get(f"/v1/runs/{run_id}").json()["rows"] == 3


def test_the_same_number_from_another_rank_is_another_batch(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, world_size=2))
    for rank in (0, 1):
        assert not send(client, run_id, {"layers": layer_rows([1], 1)}, rank=rank, seq=7).json()["duplicate"]
    assert client.get(f"/v1/runs/{run_id}").json()["rows"] == 2


def test_a_batch_that_broke_off_half_way_in_the_engine_is_completed(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, run_record(run_id, layers=2))
    tables = {"layers": layer_rows([1], 2), "scalars": scalar_rows({"loss": [(1, 0.5)]})}
    insert, broke = store.engine.insert, threading.Event()

    def breaks_at_scalars(table: str, *args: Any, **kwargs: Any) -> None:
        if table == "scalars":
            broke.set()
            raise OSError("the power went")
        insert(table, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(store.engine, "insert", breaks_at_scalars)
        assert not send(client, run_id, tables).json()["duplicate"]
        assert broke.wait(60)
        assert len(stored(store, "layers", run_id)) == 2
        assert len(stored(store, "scalars", run_id)) == 0
        assert send(client, run_id, tables).json()["duplicate"], "it is in the journal"
    assert len(stored(store, "layers", run_id)) == 2
    assert len(stored(store, "scalars", run_id)) == 1
    assert len(stored(store, "batches", run_id, order="seq")) == 1


def test_a_deleted_run_that_is_made_anew_takes_the_same_batch_again(client: httpx.Client, run_id: str) -> None:
    for _ in range(2):
        create(client, run_record(run_id, layers=2))
        assert send(client, run_id, {"layers": layer_rows([1], 2)}).json()["rows"] == 2
        assert client.get(f"/v1/runs/{run_id}").json()["rows"] == 2
        client.delete(f"/v1/runs/{run_id}")


def test_rows_may_come_as_json_with_non_finite_numbers_as_strings(
    client: httpx.Client, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    row = (
        {"step": 4, "layer": 0}
        | {m.name: 1 for m in wire.METRICS if not m.nullable}
        | {"gap": "NaN", "mu": "-Infinity"}
    )
    scalars = [{"step": 4, "name": "loss", "value": "Infinity"}]
    answer = post_json(client, run_id, {"layers": [row], "scalars": scalars})
    assert answer.json()["rows"] == 2, answer.text
    (found,) = stored(store, "layers", run_id)
    assert math.isnan(found["gap"])
    assert found["mu"] == -math.inf
    assert found["samples"] == 1
    assert found["mean_noise"] is None
    assert stored(store, "scalars", run_id, "value") == [{"value": math.inf}]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"nope": []}, "unknown table 'nope'; known: layers, probe, scalars, channels"),
        ({"scalars": {"step": 1}}, "'scalars' must be a list of rows"),
        ({"scalars": [{"step": 1, "name": "loss"}]}, "row 0: column 'value' is missing"),
        ({"scalars": [{"step": 1, "name": "loss", "value": 1, "rank": 0}]}, "unknown columns 'rank'"),
        ({"scalars": [{"step": -1, "name": "loss", "value": 1}]}, "column 'step'"),
        ({"scalars": [{"step": 1.5, "name": "loss", "value": 1}]}, "column 'step'"),
        ({"scalars": [{"step": 1, "name": "loss", "value": "nan"}]}, "'value' must be a number"),
        ({"scalars": [{"step": 1, "name": "loss", "value": 10**400}]}, "'value'"),
        ({"scalars": [{"step": 1, "name": "loss", "value": True}]}, "column 'value'"),
        ({"scalars": [{"step": 1, "name": 5, "value": 1}]}, "column 'name'"),
        ({"scalars": [{"step": 1, "name": "\ud800", "value": 1}]}, "column 'name'"),
        ({"probe": [{"step": 1, "samples": 2, "mean": 1, "var": [1], "adjacency": [1]}]}, "column 'mean'"),
        ({"probe": [{"step": 1, "samples": 2, "mean": [None], "var": [1], "adjacency": [1]}]}, "'mean'"),
    ],
)
def test_json_that_breaks_the_schema_is_named(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid, match=message):
        ingest.from_json(json.dumps({"tables": tables}).encode())


@pytest.mark.parametrize(
    "body", [b"", b"nope", b"[]", b"{}", b'{"tables": []}', b'{"tables": {}, "x": 1}', b"[" * 10**5]
)
def test_json_of_another_shape_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid, match="body"):
        ingest.from_json(body)


def wrong_probe() -> pa.Table:
    row = {"step": 1, "samples": 4, "mean": [1.0], "var": [1.0], "adjacency": [1.0]}
    return pa.Table.from_pylist([row], schema=wire.TABLES["probe"])


def probe_with_a_hole() -> pa.Table:
    table = probe_rows([1])
    holed = pa.array([[None, *[1.0] * 23]], pa.list_(pa.float32())).cast(table.schema.field("var").type)
    return table.set_column(3, table.schema.field("var"), holed)


@pytest.mark.parametrize(
    ("tables", "rank", "message"),
    [
        (
            {"layers": layer_rows([1], 4)},
            0,
            "there is no layer 3; run '.*' has 3 layers: block0.bn, block1.bn, block2.bn",
        ),
        ({"layers": layer_rows([1], 3)}, 1, "has world_size 1: rank must be below it, got 1"),
        ({"layers": layer_rows([2**53 + 1], 3)}, 0, "step must be at most 2\\*\\*53"),
        ({"probe": wrong_probe()}, 0, "'mean' must have 24 entries, got 1"),
        ({"probe": probe_with_a_hole()}, 0, "'var' holds null inside a vector"),
        ({"channels": channel_rows(1, 0, 5)}, 0, "row 0: 'mu_b' must have 4 entries, got 5"),
        ({"channels": channel_rows(1, 3, 4)}, 0, "there is no layer 3"),
        ({"scalars": scalar_rows({"": [(1, 1.0)]})}, 0, "name must have 1 to 200 characters, got 0"),
        ({"scalars": scalar_rows({"x" * 201: [(1, 1.0)]})}, 0, "got 201"),
    ],
)
def test_rows_that_contradict_the_run_are_refused_and_none_is_stored(
    client: httpx.Client, run_id: str, tables: dict[str, pa.Table], rank: int, message: str
) -> None:
    create(client, run_record(run_id, layers=3))
    good = {"scalars": scalar_rows({"good": [(1, 1.0)]})} if "scalars" not in tables else {}
    answer = send(client, run_id, good | tables, rank=rank)
    assert answer.status_code == 422
    assert re.search(message, answer.json()["detail"])
    assert client.get(f"/v1/runs/{run_id}/scalars").json()["names"] == []


def test_a_batch_of_too_many_rows_is_refused_with_the_limit(run_id: str) -> None:
    with pytest.raises(Invalid, match="a batch may hold 3 rows, got 4"):
        ingest.check(run_record(run_id, layers=2), 0, {"layers": layer_rows([1, 2], 2)}, max_rows=3)


def test_a_batch_without_rows_is_refused(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    assert "holds no row" in post_json(client, run_id, {"layers": []}).json()["detail"]


def test_a_body_that_is_not_arrow_is_refused(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    for body in (b"", b"nope", wire.encode_batch({"layers": layer_rows([1], 1)})[:-40]):
        answer = client.post(
            f"/v1/runs/{run_id}/batches?rank=0&seq=1", content=body, headers={"content-type": wire.MEDIA_TYPE}
        )
        assert answer.status_code == 422, body[:20]


def test_a_body_over_the_limit_is_refused_before_it_is_read_whole(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield b"x" * 2**16

    try:
        answer = client.post(f"/v1/runs/{run_id}/batches?rank=0&seq=1", content=endless(), headers=JSON)
    except httpx.WriteError:  # the service closed the connection while we went on sending: as good an answer
        assert sent < 2**26
    else:
        assert answer.status_code == 413
        assert "BRN_SERVICE_MAX_BODY_BYTES" in answer.json()["detail"]


@pytest.mark.parametrize("media", ["text/csv", ""])
def test_other_media_types_are_refused_with_the_two_that_are_taken(
    client: httpx.Client, run_id: str, media: str
) -> None:
    create(client, run_record(run_id))
    answer = client.post(f"/v1/runs/{run_id}/batches?rank=0&seq=1", content=b"x", headers={"content-type": media})
    assert answer.status_code == 415
    assert wire.MEDIA_TYPE in answer.json()["detail"]
    assert "application/json" in answer.json()["detail"]
