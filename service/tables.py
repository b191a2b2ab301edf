"""The tables of the store: their statements, generated from `brn_core.wire.TABLES`, and the way from older versions.

Every row of a wire table also says which run, rank and batch (`seq`) it came with. docs/storage.md shows the tables to
users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa

from brn_core.wire import TABLES
from service.engine import Engine
from service.errors import CannotStart

STORE_VERSION: Final = 3
"""Version of the tables. Columns that METRICS gains are added on opening and need no new version.

1: the first.
2: `thinned` says how far old steps of a run were thinned out. An embedded store had a list of unfinished batches beside
   it and needs no deduplication by the engine; a server remembers more inserts.
3: An embedded store has a journal instead of that list. `histories` says when findings came and went.
"""

DEDUPLICATION_WINDOW: Final = 10_000
"""Inserts of a table whose tokens a server remembers. It only has to cover batches that broke off half-way and are
sent again: at 100 ranks and a batch a second, those of the last 100 seconds. In memory, some 200 bytes each."""

_ROW_ORDER: Final[Mapping[str, str]] = {
    "layers": "run_id, layer, rank, step",
    "probe": "run_id, rank, step",
    "scalars": "run_id, name, rank, step",
    "channels": "run_id, layer, rank, step",
}
assert _ROW_ORDER.keys() == TABLES.keys()

_RUN_TABLES: Final = {
    # One row a change of a run; the newest version is the run. `record` is RunCreate without its layers, as JSON.
    # Status `deleted` marks a run whose rows are being removed.
    "runs": """
        run_id String, version UInt64, record String CODEC(ZSTD), layers String CODEC(ZSTD),
        status LowCardinality(String), created_at DateTime64(3, 'UTC'), changed_at DateTime64(3, 'UTC')
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id""",
    # The verdict that was last computed, as JSON. Derived from the rows, so losing one costs nothing.
    "verdicts": """
        run_id String, version UInt64, verdict String CODEC(ZSTD)
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id""",
    # One row a complete batch. `layer_rows` counts its rows of the table `layers`.
    "batches": """
        run_id LowCardinality(String), rank UInt32, seq UInt64, layer_rows UInt32,
        first_step UInt64, last_step UInt64, received_at DateTime64(3, 'UTC')
        ) ENGINE = MergeTree ORDER BY (run_id, rank, seq)""",
    # When the findings of a run came and went, and what people made of them, as JSON; the newest version stands.
    "histories": """
        run_id String, version UInt64, history String CODEC(ZSTD)
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id""",
    # How far the old steps of a run were thinned out, so that it is not done again.
    "thinned": """
        run_id String, version UInt64, last_step UInt64, kept_every UInt64
        ) ENGINE = ReplacingMergeTree(version) ORDER BY run_id""",
}

_SMALL_BLOCKS: Final = "index_granularity = 2048, min_compress_block_size = 4096"
"""A summary reads one row of each layer in every column: with the engine's own 8192 rows and 64 KB it would decompress
four times as much for it. With 1024 rows, inserts and merges would take a third more processor time."""

RUN_TABLES: Final = (*TABLES, "batches", "verdicts", "histories", "thinned")
"""The tables with rows of a run, besides `runs` itself."""


def _column(field: pa.Field) -> str:
    """`name type codec` of a column, from its Arrow field."""
    if pa.types.is_list(field.type):
        return f"{field.name} Array(Float32) CODEC(ZSTD)"
    if pa.types.is_string(field.type):
        return f"{field.name} LowCardinality(String)"
    if field.name == "step":
        return "step UInt64 CODEC(Delta, LZ4)"  # every question reads it: a heatmap takes a fifth less than by ZSTD
    names = {
        pa.uint16(): "UInt16",
        pa.uint32(): "UInt32",
        pa.uint64(): "UInt64",
        pa.float32(): "Float32",
        pa.float64(): "Float64",
    }
    base = names[field.type]
    return f"{field.name} {f'Nullable({base})' if field.nullable else base} CODEC(ZSTD)"


def columns(table: str) -> dict[str, str]:
    """`name type codec` of every column of a wire table, by name."""
    own = {
        "run_id": "run_id LowCardinality(String)",
        "rank": "rank UInt32",
        "seq": "seq UInt64 CODEC(DoubleDelta, ZSTD)",
    }
    return own | {field.name: _column(field) for field in TABLES[table]}


def _durable(embedded: bool, cluster: str) -> str:
    window = f"{'' if cluster else 'non_'}replicated_deduplication_window = {_window(embedded)}"
    return f"{window}, fsync_after_insert = 1, fsync_part_directory = 1"


def _window(embedded: bool) -> int:
    # Without a token the engine would compare content, and drop the rows of a run that was deleted and sent again.
    return 0 if embedded else DEDUPLICATION_WINDOW


def create_statements(embedded: bool, cluster: str = "") -> Iterator[str]:
    """Makes the tables that do not exist yet; of a cluster, on all of its servers, which replicate them."""
    durable = _durable(embedded, cluster)
    on, replicated = (f" ON CLUSTER `{cluster}`", "Replicated") if cluster else ("", "")
    for table in TABLES:
        # The first non-finite row is looked for in every diagnosis; the index skips the blocks that hold none.
        index = ", INDEX nonfinite nonfinite_channels TYPE minmax GRANULARITY 1" if table == "layers" else ""
        yield (
            f"CREATE TABLE IF NOT EXISTS {table}{on} ({', '.join(columns(table).values())}{index}) "
            f"ENGINE = {replicated}MergeTree ORDER BY ({_ROW_ORDER[table]}) SETTINGS {durable}, {_SMALL_BLOCKS}"
        )
    for table, rest in _RUN_TABLES.items():
        settings = "" if table in ("verdicts", "thinned") else f" SETTINGS {durable}"
        made = rest.replace("ENGINE = ", f"ENGINE = {replicated}")
        yield f"CREATE TABLE IF NOT EXISTS {table}{on} ({made}{settings}"
    yield (
        f"CREATE TABLE IF NOT EXISTS store_version{on} (version UInt32) ENGINE = {replicated}MergeTree ORDER BY version"
    )


def bring_up_to_date(engine: Engine, unfinished: Path | None) -> None:
    """Makes the tables, or brings those of an older version up to this one.

    Args:
        engine: over an empty database, or one of ours.
        unfinished: where an embedded store of version 2 listed the batches that were being written.

    Raises:
        CannotStart: they are of a newer version, or not replicated where they have to be.
    """
    version = _version(engine)
    if version is not None and version > STORE_VERSION:
        raise CannotStart(
            f"the store was written by a newer version ({version}, this one knows {STORE_VERSION}): "
            "update brn-diagnostics, or name another store with --store"
        )
    for statement in create_statements(engine.embedded, engine.cluster):
        engine.command(statement)
    if engine.cluster:
        _require_replicated(engine)
    _add_columns(engine)
    if version == STORE_VERSION:
        return
    if version is not None:
        for statement in upgrade_statements(version, engine.embedded):
            engine.command(statement)
        if unfinished is not None:
            _remove_unfinished(engine)
            unfinished.unlink(missing_ok=True)
    engine.insert("store_version", pa.table({"version": pa.array([STORE_VERSION], pa.uint32())}))


def _version(engine: Engine) -> int | None:
    """Of the tables as they are; None where there are none yet."""
    if not engine.command("EXISTS TABLE store_version"):
        return None
    found = engine.rows("SELECT max(version) AS version FROM store_version HAVING count() > 0")
    return found.column("version")[0].as_py() if found.num_rows else None


def _require_replicated(engine: Engine) -> None:
    """Tables that a single server had before it became one of a cluster stay what they were."""
    sql = "SELECT name, engine FROM system.tables WHERE database = currentDatabase() ORDER BY name"
    found = {row["name"]: row["engine"] for row in engine.rows(sql).to_pylist()}
    alone = [name for name in (*RUN_TABLES, "runs", "store_version") if not found[name].startswith("Replicated")]
    if alone:
        raise CannotStart(
            f"BRN_SERVICE_CLUSTER is set, but these tables were made without it: {', '.join(alone)}; "
            "name another database in BRN_SERVICE_STORE, or convert them (ATTACH TABLE ... AS REPLICATED)"
        )


def _remove_unfinished(engine: Engine) -> None:
    """Removes the rows of batches that broke off in a version without journal: unacknowledged, they are sent again.

    Reads the keys of all rows, once.
    """
    for table in TABLES:
        found = engine.rows(
            f"SELECT DISTINCT run_id, rank, seq FROM {table} "
            "WHERE (run_id, rank, seq) NOT IN (SELECT run_id, rank, seq FROM batches)"
        ).to_pylist()
        if found:
            keys = [(row["run_id"], row["rank"], row["seq"]) for row in found]
            sql = f"DELETE FROM {table} WHERE (run_id, rank, seq) IN {{keys:Array(Tuple(String, UInt32, UInt64))}}"
            engine.remove(sql, keys=keys)


def _add_columns(engine: Engine) -> None:
    present = engine.rows("SELECT table, name FROM system.columns WHERE database = currentDatabase()").to_pylist()
    known = {(row["table"], row["name"]) for row in present}
    for table in TABLES:
        for name, definition in columns(table).items():
            if (table, name) not in known:
                engine.command(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {definition}")


def upgrade_statements(version: int, embedded: bool) -> Iterator[str]:
    """Brings tables of an older version to this one; each statement may be repeated, should the upgrade break off.

    Tables that are new in this version are there already (`create_statements`).
    """
    if version < 2:
        for table in (*TABLES, "runs", "batches"):
            yield f"ALTER TABLE {table} MODIFY SETTING non_replicated_deduplication_window = {_window(embedded)}"
