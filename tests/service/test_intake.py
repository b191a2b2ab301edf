"""What may be thrown at the ingest: bombs, nonsense, too much at once. All get a 4xx, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import create, layer_rows, probe_rows, run_record, scalar_rows, send

from brn_core import wire
from service import ipc
from service.diagnoser import Diagnoser
from service.errors import Busy, NotFound
from service.intake import Intake, Room, Writer
from service.journal import Entry, Journal
from service.metrics import Metrics
from service.settings import Settings
from service.store import Batch, Outcome, Store

ARROW = {"content-type": wire.MEDIA_TYPE}


def post(client: httpx.Client, run_id: str, body: bytes, headers: dict[str, str] = ARROW) -> httpx.Response:
    return client.post(f"/v1/runs/{run_id}/batches?rank=0&seq=1", content=body, headers=headers)


def a_body() -> bytes:
    tables = {"layers": layer_rows([1, 2], 3), "probe": probe_rows([1]), "scalars": scalar_rows({"loss": [(1, 1.0)]})}
    return wire.encode_batch(tables)


def stream(table: pa.Table, name: str = "scalars", **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    tagged = table.replace_schema_metadata({"table": name, "version": str(wire.SCHEMA_VERSION)})
    with pa.ipc.new_stream(sink, tagged.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(tagged)
    return sink.getvalue().to_pybytes()


def zeros(rows: int) -> pa.Table:
    columns = [
        pa.array(np.zeros(rows), field.type) if field.name != "name" else pa.array(["x"] * rows)
        for field in wire.TABLES["scalars"]
    ]
    return pa.Table.from_arrays(columns, schema=wire.TABLES["scalars"])


def nothing(rows: int) -> pa.Table:
    """Rows of `layers` that compress to next to nothing, and take 150 bytes each."""
    schema = wire.TABLES["layers"]
    columns = {kind: pa.array(np.zeros(rows, kind.to_pandas_dtype()), kind) for kind in set(schema.types)}
    return pa.Table.from_arrays([columns[field.type] for field in schema], schema=schema)


def test_the_decoded_size_is_known_before_decoding() -> None:
    table = layer_rows(range(200), 54)
    body = wire.encode_batch({"layers": table})
    assert len(body) < table.nbytes <= ipc.decoded_bytes(body) <= table.nbytes * 1.05 + ipc.MESSAGE_BYTES


def test_uncompressed_bodies_are_as_large_as_they_are() -> None:
    table = zeros(5000).set_column(0, wire.TABLES["scalars"].field("step"), pa.array([2**62] * 5000, pa.uint64()))
    body = stream(table)
    assert ipc.decoded_bytes(body) <= len(body) + ipc.MESSAGE_BYTES


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_bomb_is_refused_by_its_headers(client: httpx.Client, run_id: str, codec: str) -> None:
    create(client, run_record(run_id))
    body = stream(nothing(1_000_000), "layers", compression=codec)
    assert len(body) < 2**20
    before = pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()
    answer = post(client, run_id, body)
    assert answer.status_code == 413
    assert "BRN_SERVICE_MAX_BATCH_BYTES" in answer.json()["detail"]
    assert (pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()) == before, "it was decompressed"


def test_a_buffer_that_lies_about_its_size_is_refused(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    rows = 50_000
    honest = stream(zeros(rows), compression="zstd")
    size = struct.pack("<q", 8 * rows)  # of the steps, and of the values
    assert honest.count(size) >= 2
    for lie in (8, 2**40, -2, 2**63 - 1):
        answer = post(client, run_id, honest.replace(size, struct.pack("<q", lie)))
        assert answer.status_code in (413, 422), lie


def test_columns_by_the_thousand_and_dictionaries_are_refused(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    wide = pa.table({f"column{i}": pa.array([1.0]) for i in range(3000)})
    answer = post(client, run_id, stream(wide))
    assert answer.status_code == 422
    assert len(answer.content) < 4000
    coded = pa.table({"step": pa.array([1], pa.uint64()), "name": pa.array(["a"]).dictionary_encode(), "value": [1.0]})
    assert post(client, run_id, stream(coded)).status_code == 422


def test_a_million_layers_are_refused(client: httpx.Client, run_id: str) -> None:
    create(client, run_record(run_id))
    layer = {"name": "x", "kind": "BatchNorm", "channels": 1, "eps": 0, "momentum": None}
    many = [layer | {"index": i} for i in range(70_000)]
    record = {"id": f"{run_id}-many", "name": "many", "layers": many}
    assert client.post("/v1/runs", json=record).status_code == 413
    rows = layer_rows([1], 1).to_pylist()
    rows[0]["layer"] = 10**6
    answer = post(
        client, run_id, json.dumps({"tables": {"layers": rows}}).encode(), {"content-type": "application/json"}
    )
    assert answer.status_code == 422


def test_a_body_without_a_length_is_cut_off_at_the_limit_on_every_route(client: httpx.Client) -> None:
    def long() -> Iterator[bytes]:
        for _ in range(64):
            yield b'{"id": "' + b"x" * 2**16

    create(client, run_record("cut-off"))
    document = client.get("/openapi.json").json()["paths"]
    writing = [(method, path) for path, of in document.items() for method in of if method not in ("get", "delete")]
    assert len(writing) >= 3
    for method, path in writing:
        for kind in ("application/json", "application/vnd.apache.arrow.stream"):
            address, which = re.sub(r"\{\w+\}", "cut-off", path), {"rank": 0, "seq": 0}
            answer = client.request(method, address, content=long(), headers={"content-type": kind}, params=which)
            assert answer.status_code == 413, (method, path, kind, answer.text)
            assert "BRN_SERVICE_MAX_BODY_BYTES" in answer.json()["detail"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"tables": {"\xed\xa0\x80": []}}',
        json.dumps({"tables": {"\ud800": []}}).encode(),
        json.dumps({"tables": {"scalars": [{"\ud800": 1, "step": 1, "name": "a", "value": 1}]}}).encode(),
        b'{"tables": {"scalars": [{"step": 1, "name": "a", "value": ' + b"[" * 900 + b"]" * 900 + b"}]}}",
        b'{"tables": {"scalars": [{"step": ' + b"9" * 4000 + b', "name": "a", "value": 1}]}}',
        b'{"tables": {"scalars": [' + b"{}," * 300_000 + b"{}]}}",
    ],
)
def test_odd_json_is_a_problem_of_the_sender(client: httpx.Client, run_id: str, text: bytes) -> None:
    create(client, run_record(run_id))
    answer = post(client, run_id, text, {"content-type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.content) < 4000


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"id": "a", "name": "\ud800"}),
        json.dumps({"id": "a", "name": "a", "\ud800": 1}),
        json.dumps({"id": "odd-config", "name": "a", "config": {"\ud800": 1}}),
        json.dumps({"id": "odd-config", "name": "a", "config": {"a": "\ud800"}}),
        '{"id": "deep-config", "name": "a", "config": {"a": ' + "[" * 900 + "]" * 900 + "}}",
    ],
)
def test_odd_runs_are_a_problem_of_the_sender(client: httpx.Client, text: str) -> None:
    answer = client.post("/v1/runs", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (201, 422), answer.text  # the surrogate in a key is replaced


@given(data=st.data())
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_body_is_taken_or_refused_and_never_a_failure(
    client: httpx.Client, run_id: str, data: st.DataObject
) -> None:
    create(client, run_record(run_id))
    body = bytearray(a_body())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        if not body:
            break
    answer = post(client, run_id, bytes(body[: data.draw(st.integers(0, len(body)))]))
    assert answer.status_code in (200, 413, 422), answer.text


def test_room_is_given_back_and_a_batch_alone_always_has_room() -> None:
    room = Room(100)
    room.change(0, 500)
    with pytest.raises(Busy, match="BRN_SERVICE_QUEUE_BYTES"):
        room.change(0, 1)
    room.change(500, 60)
    room.change(0, 40)
    with pytest.raises(Busy):
        room.change(40, 41)
    room.change(60, 0)
    room.change(40, 100)
    room.change(100, 0)
    assert room.taken == 0


def test_ranks_are_sent_away_while_the_memory_set_aside_is_taken(
    client: httpx.Client, app: FastAPI, store: Store, run_id: str
) -> None:
    create(client, run_record(run_id, layers=1))
    room: Room = app.state.intake._room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_limit", 1000)
        patch.setattr(room, "_taken", 900)
        answer = send(client, run_id, {"layers": layer_rows([1], 1)})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.headers["content-type"] == "application/problem+json"
    assert send(client, run_id, {"layers": layer_rows([1], 1)}).json()["rows"] == 1
    assert room.taken == 0


def test_memory_is_given_back_whatever_becomes_of_a_batch(client: httpx.Client, app: FastAPI, run_id: str) -> None:
    create(client, run_record(run_id, layers=1))
    for body in (b"", b"nope", stream(zeros(10)), a_body(), stream(nothing(1_000_000), "layers", compression="zstd")):
        post(client, run_id, body)
    send(client, "no-such-run", {"layers": layer_rows([1], 1)})
    assert app.state.intake._room.taken == 0


def test_a_body_is_counted_against_the_room_as_it_arrives(store: Store, settings: Settings, run_id: str) -> None:
    intake = Intake(store, settings, Metrics(), Diagnoser(store, 1.0))
    seen = []

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 1000
            seen.append(intake._room.taken)

    with pytest.raises(NotFound):  # there is no such run
        asyncio.run(intake.take(run_id, 0, 1, wire.MEDIA_TYPE, parts()))
    assert seen == [1000, 2000, 3000]
    assert intake._room.taken == 0


def test_batches_that_wait_are_written_together(client: httpx.Client, app: FastAPI, store: Store, run_id: str) -> None:
    create(client, run_record(run_id, layers=1, world_size=30))
    groups: list[int] = []
    at_the_writer = threading.Event()
    append, put = Journal.append, store.put_batches

    def counted(journal: Journal, entries: Sequence[Entry]) -> None:
        groups.append(len(entries))
        append(journal, entries)

    def seen(batches: Sequence[Batch]) -> Sequence[Outcome]:
        at_the_writer.set()
        return put(batches)

    async def work() -> None:
        writer = app.state.intake._writer
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many, asyncio.timeout(60):
            body = wire.encode_batch({"layers": layer_rows([1], 1)})

            def send_of(rank: int) -> asyncio.Task[httpx.Response]:
                url = f"/v1/runs/{run_id}/batches?rank={rank}&seq=1"
                return asyncio.create_task(many.post(url, content=body, headers=ARROW))

            with store.engine.taking():
                sending = [send_of(0)]
                while not at_the_writer.is_set():
                    await asyncio.sleep(0.01)
                sending += [send_of(rank) for rank in range(1, 30)]
                while writer.waiting < 29:
                    early = [task.result().text for task in sending if task.done()]
                    assert not early, "answered before it was written"
                    await asyncio.sleep(0.01)
            assert {(await task).json()["rows"] for task in sending} == {1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", counted)
        patch.setattr(store, "put_batches", seen)
        asyncio.run(work())
    assert groups == [1, 29], "the first alone, then those that came meanwhile, with one wait for the disk"
    assert client.get(f"/v1/runs/{run_id}").json()["rows"] == 30


def test_a_batch_that_the_engine_rejects_fails_alone(
    client: httpx.Client, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(client, run_record(run_id, layers=1, world_size=3))
    run = store.record(run_id)
    assert run is not None
    put = store.put_batches

    def rejects_rank_1(batches: Any) -> Any:
        if any(batch.rank == 1 for batch in batches):
            raise RuntimeError("no")
        return put(batches)

    monkeypatch.setattr(store, "put_batches", rejects_rank_1)
    writer = Writer(store, Metrics())
    waiting = [writer.submit(Batch(run, rank, 1, {"layers": layer_rows([1], 1)}), 0.0) for rank in range(3)]
    writer.start()
    assert [waiting[0].result(30), waiting[2].result(30)] == ["stored", "stored"]
    with pytest.raises(RuntimeError, match="no"):
        waiting[1].result(30)
    writer.stop()


def test_metrics_count_what_became_of_batches(client: httpx.Client, run_id: str) -> None:
    def number(name: str) -> float:
        (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    create(client, run_record(run_id, layers=2))
    send(client, run_id, {"layers": layer_rows([1], 2)}, seq=1)
    names = ('rows_total{table="layers"}', 'batches_total{outcome="stored"}', "lag_seconds_count")
    before = [number(f"brn_ingest_{name}") for name in names]
    send(client, run_id, {"layers": layer_rows([2], 2)}, seq=2)
    assert [number(f"brn_ingest_{name}") for name in names] == [before[0] + 2, before[1] + 1, before[2] + 1]
    send(client, run_id, {"layers": layer_rows([2], 2)}, seq=2)
    assert number('brn_ingest_batches_total{outcome="duplicate"}') >= 1
    assert number('brn_query_seconds_count{method="POST",route="/v1/runs/{run}/batches"}') >= 3
    assert number("brn_store_bytes") > 0
    assert number("brn_ingest_held_bytes") == 0
