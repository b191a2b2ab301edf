import contextlib
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from brn_core import wire


def _layers(rows=2, **changed):
    schema = wire.TABLES["layers"]
    columns = {"step": pa.array(range(rows), pa.uint64()), "layer": pa.array([3] * rows, pa.uint16())}
    columns |= {metric.name: pa.array([1.5] * rows, pa.float32()) for metric in wire.METRICS} | changed
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _scalars(values):
    return pa.table(
        {
            "step": pa.array(range(len(values)), pa.uint64()),
            "name": pa.array(["loss"] * len(values), pa.string()),
            "value": pa.array(np.array(values, np.float64)),
        },
        schema=wire.TABLES["scalars"],
    )


def _stream(rows, **metadata):
    """A stream as another program may write it: no check of ours applies."""
    sink = pa.BufferOutputStream()
    tagged = rows.replace_schema_metadata({k: str(v) for k, v in metadata.items()})
    with pa.ipc.new_stream(sink, tagged.schema) as writer:
        writer.write_table(tagged)
    return sink.getvalue().to_pybytes()


def test_every_table_survives_the_trip():
    vector = pa.array([[1.0, 2.0]], wire.TABLES["probe"].field("mean").type)
    tables = {
        "layers": _layers(),
        "scalars": _scalars([0.5]),
        "probe": pa.table(
            [pa.array([7], pa.uint64()), pa.array([32], pa.uint32()), vector, vector, vector],
            schema=wire.TABLES["probe"],
        ),
        "channels": pa.table(
            [pa.array([7], pa.uint64()), pa.array([1], pa.uint16()), *[vector] * 7], schema=wire.TABLES["channels"]
        ),
    }
    decoded = wire.decode_batch(wire.encode_batch(tables))
    assert set(decoded) == set(wire.TABLES)
    for name, table in tables.items():
        assert decoded[name].replace_schema_metadata(None).equals(table)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_non_finite_numbers_are_values(values):
    decoded = wire.decode_batch(wire.encode_batch({"scalars": _scalars(values)}))["scalars"].column("value")
    assert decoded.null_count == 0
    np.testing.assert_array_equal(decoded.to_numpy(), np.array(values))


def test_null_survives_where_a_statistic_may_be_missing_and_is_not_nan():
    table = _layers(mean_diff1=pa.array([None, math.nan], pa.float32(), from_pandas=False))
    decoded = wire.decode_batch(wire.encode_batch({"layers": table}))["layers"].column("mean_diff1")
    assert decoded.is_null().to_pylist() == [True, False]
    assert math.isnan(decoded[1].as_py())


def test_a_null_where_none_may_be_is_refused_by_name():
    table = _layers(gap=pa.array([1.0, None], pa.float32()))
    with pytest.raises(wire.WireError, match="'gap' holds null"):
        wire.decode_batch(_stream(table, table="layers", version=1))


def test_empty_tables_are_left_out_and_an_empty_batch_is_no_bytes():
    empty = wire.TABLES["scalars"].empty_table()
    assert wire.encode_batch({"scalars": empty}) == b""
    assert set(wire.decode_batch(wire.encode_batch({"scalars": empty, "layers": _layers()}))) == {"layers"}


@pytest.mark.parametrize(
    "tables",
    [{"nonsense": _scalars([1.0])}, {"layers": _scalars([1.0])}, {"scalars": _scalars([1.0]).drop_columns("name")}],
)
def test_what_is_not_in_the_schema_is_not_encoded(tables):
    with pytest.raises(wire.WireError, match="does not follow the schema"):
        wire.encode_batch(tables)


def test_wrong_columns_are_named():
    table = pa.table({"step": pa.array([1], pa.int64()), "name": ["loss"], "price": [1.0]})
    with pytest.raises(
        wire.WireError, match=r"missing columns \['value'\], unknown columns \['price'\], wrong types"
    ) as e:
        wire.decode_batch(_stream(table, table="scalars", version=1))
    assert "step: int64, not uint64" in str(e.value)


def test_a_column_may_stand_once():
    twice = pa.Table.from_arrays([*_scalars([1.0]).columns, pa.array([2.0])], names=["step", "name", "value", "value"])
    with pytest.raises(wire.WireError, match="value: twice"):
        wire.decode_batch(_stream(twice, table="scalars", version=1))


def test_a_stream_without_its_end_mark_is_cut_off():
    body = wire.encode_batch({"scalars": _scalars([1.0])})
    with pytest.raises(wire.WireError, match="cut off"):
        wire.decode_batch(body[:-8])


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"table": "scalars", "version": 99}, "version '99' is not understood"),
        ({"table": "scalars"}, "version None is not understood"),
        ({"table": "nonsense", "version": 1}, "unknown table 'nonsense'; known: layers"),
        ({"version": 1}, "unknown table None"),
    ],
)
def test_an_unknown_table_or_version_is_refused(metadata, text):
    with pytest.raises(wire.WireError, match=text):
        wire.decode_batch(_stream(_scalars([1.0]), **metadata))


def test_a_table_may_stand_once_in_a_batch():
    body = wire.encode_batch({"scalars": _scalars([1.0])})
    with pytest.raises(wire.WireError, match="stands twice"):
        wire.decode_batch(body + body)


@pytest.mark.parametrize("body", [b"", b"hello", b"\x00" * 64, b"\xff" * 4 + b"\x7f" * 8, b'{"tables": {}}' * 9])
def test_what_is_not_arrow_is_refused(body):
    with pytest.raises(wire.WireError):
        wire.decode_batch(body)


def test_no_truncated_body_passes_as_the_whole():
    body = wire.encode_batch({"layers": _layers(5), "scalars": _scalars([1.0, 2.0])})
    whole = wire.decode_batch(body)
    for length in range(0, len(body), 8):
        try:
            part = wire.decode_batch(body[:length])
        except wire.WireError:
            continue
        # a cut between two streams leaves whole tables
        assert part == {name: whole[name] for name in part}


@given(st.binary(max_size=40), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_a_damaged_body_is_refused_or_read_but_never_anything_else(noise, at):
    body = wire.encode_batch({"scalars": _scalars([1.0, 2.0])})
    with contextlib.suppress(wire.WireError):
        wire.decode_batch(body[:at] + noise + body[at + len(noise) :])


@pytest.mark.parametrize("run_id", ["", "a b", "../up", ".hidden", "a/b", "x" * 101, "é"])
def test_a_run_id_is_safe_in_a_path(run_id):
    with pytest.raises(ValidationError):
        wire.RunCreate(id=run_id, name="n")


def test_statistics_have_distinct_names_and_a_sentence_each():
    assert len(wire.METRIC) == len(wire.METRICS)
    assert all(metric.meaning.endswith(".") and metric.label for metric in wire.METRICS)


def test_a_config_is_kept_without_its_secrets():
    given = {
        "lr": 0.1,
        "max_tokens": 512,
        "pad_token": "<pad>",
        "tokenizer": "bpe",
        "keyboard": "us",
        "data": "s3://me:hunter22@bucket/x",
        "url": "https://host/path",
        "wandb": {"api-key": "hunter22", "apiKey": "hunter22", "entity": "us"},
        "HF_TOKEN": "hunter22",
        "auth.token": "hunter22",
        "AWS_SECRET_ACCESS_KEY": "hunter22",
        "db_password": ["hunter22", ""],
    }
    kept = wire.RunCreate(id="r", name="r", config=given).config
    assert "hunter22" not in str(kept)
    assert kept["data"] == "s3://(hidden)@bucket/x"
    assert kept["wandb"] == {"api-key": "(hidden)", "apiKey": "(hidden)", "entity": "us"}
    assert kept["db_password"] == ["(hidden)", ""]
    unchanged = ("lr", "max_tokens", "pad_token", "tokenizer", "keyboard", "url")
    assert {name: kept[name] for name in unchanged} == {name: given[name] for name in unchanged}
    assert wire.RunCreate(id="r", name="r", config=kept).config == kept


def test_secrets_under_any_name_and_in_texts_are_hidden():
    s = "hunter22"
    given = {
        "secrets": {"openai": s, "ids": [s, 7]},
        "credentials": {"user": s, "pass": s},
        "password": 12345678,
        "tokens": [s],
        "url": f"https://h/x?a=1&token={s}&b=2",
        "slash": f"clickhouse://me:hun/{s}@h/db",
        "env": [f"HF_TOKEN={s}", "LR=0.1"],
        "argv": ["train.py", "--token", s, "--lr", "0.1", f"--api-key={s}"],
        "command": f"train.py --token {s} --lr 0.1",
        "headers": [f"Bearer {s}"],
    } | dict.fromkeys(("my_access_key", "ssh_key", "passwords", "auth", "bearer", "cookie", "db_pass", "hfToken"), s)
    kept = wire.without_secrets(given)
    assert s not in str(kept)
    assert "12345678" not in str(kept)
    assert kept["url"] == "https://h/x?a=1&token=(hidden)&b=2"
    assert kept["env"] == ["HF_TOKEN=(hidden)", "LR=0.1"]
    assert kept["argv"] == ["train.py", "--token", "(hidden)", "--lr", "0.1", "--api-key=(hidden)"]
    assert kept["command"] == "train.py --token (hidden) --lr 0.1"
    assert wire.without_secrets(kept) == kept


def test_under_other_keys_only_a_text_as_long_as_a_secret_is_hidden():
    kept = {"sort_key": "loss", "image_key": "image.png", "cache_key": "train split, resized to 224", "row_key": 7}
    assert wire.without_secrets(kept) == kept
    for name in ("OPENAI_KEY", "wandb_key", "wandbKey"):
        assert wire.without_secrets({name: "a" * 15}) == {name: "a" * 15}
        assert wire.without_secrets({name: ["a" * 16]}) == {name: [wire.HIDDEN]}
    command = f"OPENAI_KEY={'a' * 16} train.py --sort-key loss"
    assert wire.text_without_secrets(command) == "OPENAI_KEY=(hidden) train.py --sort-key loss"
    assert wire.without_secrets({"sort_key": {"api_key": "a", "by": "loss"}}) == {
        "sort_key": {"api_key": wire.HIDDEN, "by": "loss"}
    }


def test_settings_that_only_look_like_secrets_are_kept():
    given = {
        "max_tokens": 512,
        "num_tokens": "3e9",
        "tokens": 300,
        "tokenizer": {"name": "bpe", "pad_token": "<pad>"},
        "key_dim": 64,
        "keys": ["image", "label"],
        "use_auth_token": True,
        "third_pass": 3,
        "compass": "north",
        "author": "me",
        "data": "http://host:80/path@2",
        "text": "the password is asked for, token by token; max_tokens=5",
        "host": None,
    }
    assert wire.without_secrets(given) == given


def test_drops_are_added_up_over_ranks_and_processes_and_a_repeated_word_is_no_news():
    run = wire.RunCreate(id="r", name="r")
    assert "dropped_by" not in run.model_dump_json()
    for said in ({3: {8: 1}}, {3: {8: 2}}, {3: {9: 4}}, {0: {8: 1}}):
        for _ in range(2):
            run = wire.updated(run, wire.RunUpdate(dropped_by_process=said))
    assert wire.RunCreate.model_validate_json(run.model_dump_json()) == run
    assert (run.dropped_steps, run.dropped_by_rank) == (7, {3: 6, 0: 1})
    assert run.dropped_by_process == {3: {8: 2, 9: 4}, 0: {8: 1}}
    assert wire.updated(run, wire.RunUpdate(notes="seen")).dropped_steps == 7


def test_notes_and_failures_are_kept_without_secrets():
    text = "no answer from http://me:hunter22@host: --token hunter22"
    run = wire.RunCreate(id="r", name="r", notes=text, failure=text)
    assert run.notes == run.failure == "no answer from http://(hidden)@host: --token (hidden)"
    assert "hunter22" not in str(wire.RunUpdate(notes=text, failure=text))
    full = "token=x " * 60
    cut = wire.RunCreate(id="r", name="r", failure=full).failure
    assert len(cut) == wire.MAX_FAILURE
    assert wire.RunCreate(id="r", name="r", failure=cut).failure == cut


@pytest.mark.parametrize("piece", ["://a:", "a.", "bearer ", "token=", "--token ", "a@", "x"])
def test_hiding_secrets_in_a_long_text_takes_linear_time(piece: str):
    """Counted by what would not end: a quadratic search of two million signs takes hours."""
    assert wire.text_without_secrets(piece * (2_000_000 // len(piece)))
