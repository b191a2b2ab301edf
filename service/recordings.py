"""Runs that lie in files: what a recorder keeps while no service answers, and what the export route wrote.

    SPOOL/<run>/rank-<n>/run.json, <seq>-<steps>.arrow     a recorder's spool, or the folder of one run in it
    <any name>.parquet, <any name>.arrow                   an exported table, or a folder with those of one run

An exported table carries its run's record in its schema's metadata. What a file does not hold (an export of the table
`layers` has no input probe) is missing in the run, and the rules that need it say so.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from pydantic import ValidationError

from brn_core.wire import TABLES, RunCreate, RunStatus, RunUpdate, WireError, decode_batch
from service.answers.files import RUN_KEY, STATUS_KEY, TABLE_KEY
from service.errors import CannotStart, some
from service.settings import Settings
from service.store import Batch, Store

_RANK_FOLDER: Final = re.compile(r"^rank-(\d{1,9})$")
_SPOOLED: Final = re.compile(r"^(\d{20})-\d{1,9}\.arrow$")
_EXPORTED: Final = (".parquet", ".arrow")
_NAMED_BY: Final = {"layers": ["step", "layer"], "probe": ["step"], "scalars": ["step", "name"]}
"""What names a row of a rank: of several, as a run that went on from a checkpoint sends them, the last one counts."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one rank, as one batch."""

    rank: int
    seq: int
    tables: Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class Recording:
    """A run as files hold it."""

    record: RunCreate
    status: RunStatus
    parts: Sequence[Part]


def recording(path: Path) -> Recording:
    """The run that a file or folder holds.

    Raises:
        CannotStart: it holds none, several, or what cannot be read; says which.
    """
    if path.is_file():
        return _exported([path])
    runs = sorted(folder for folder in (path, *path.iterdir()) if folder.is_dir() and _rank_folders(folder))
    if len(runs) > 1:
        raise CannotStart(f"{path} holds {len(runs)} runs ({some([r.name for r in runs])}): name one, {runs[0]}")
    if runs:
        return _spooled(runs[0])
    files = sorted(file for file in path.iterdir() if file.suffix in _EXPORTED)
    if not files:
        raise CannotStart(f"{path} holds neither a recorder's spool nor exported tables (.parquet, .arrow)")
    return _exported(files)


@contextmanager
def stored(found: Recording) -> Iterator[Store]:
    """A store of its own, for as long as the `with` lasts, that holds this run alone."""
    with tempfile.TemporaryDirectory(prefix="brn-recording-") as folder:
        store = Store(Settings(store=f"chdb://{folder}/store", readers=1, min_free_bytes=0))
        try:
            keep(store, found)
            yield store
        finally:
            store.close()


def keep(store: Store, found: Recording) -> None:
    """Stores a run as if it had been sent."""
    store.put_run(found.record, found.status, datetime.now(UTC))
    run = store.record(found.record.id)
    assert run is not None
    store.put_batches([Batch(run, part.rank, part.seq, part.tables) for part in found.parts])


# -------- a spool


def _rank_folders(folder: Path) -> list[tuple[int, Path]]:
    return [(int(match[1]), entry) for entry in folder.iterdir() if (match := _RANK_FOLDER.match(entry.name))]


def _spooled(folder: Path) -> Recording:
    record: RunCreate | None = None
    status: RunStatus = "running"
    parts = []
    for rank, own in sorted(_rank_folders(folder)):
        try:
            record = RunCreate.model_validate_json((own / "run.json").read_bytes())
            if (end := own / "end.json").exists():
                status = RunUpdate.model_validate_json(end.read_bytes()).status or status
            for file in sorted(own.iterdir()):
                if match := _SPOOLED.match(file.name):
                    parts.append(Part(rank, int(match[1]), decode_batch(file.read_bytes())))
        except (OSError, ValidationError, WireError) as error:
            raise CannotStart(f"{own} cannot be read: {str(error).splitlines()[0]}") from error
    assert record is not None
    return Recording(record, status, parts)


# -------- exported tables


def _exported(files: Sequence[Path]) -> Recording:
    found: list[tuple[RunCreate, RunStatus]] = []
    parts = []
    for seq, file in enumerate(files):
        rows = _rows(file)
        metadata = rows.schema.metadata or {}
        name = metadata.get(TABLE_KEY, b"").decode()
        if name not in TABLES or RUN_KEY not in metadata or STATUS_KEY not in metadata:
            raise CannotStart(f"{file} does not say of which run it is: export it from this version of the service")
        try:
            record = RunCreate.model_validate_json(metadata[RUN_KEY])
            update = RunUpdate.model_validate({"status": metadata[STATUS_KEY].decode()})
        except ValidationError as error:
            raise CannotStart(f"{file}: its run cannot be read: {str(error).splitlines()[0]}") from error
        found.append((record, update.status or "running"))
        for rank in pc.unique(rows.column("rank")).to_pylist():
            own = rows.filter(pc.equal(rows.column("rank"), rank)).drop_columns("rank")
            parts.append(Part(rank, seq, {name: _newest(name, own).cast(TABLES[name])}))
    if len(ids := sorted({record.id for record, _ in found})) > 1:
        raise CannotStart(f"{files[0].parent} holds tables of {len(ids)} runs ({some(ids)}): give each its folder")
    return Recording(*found[-1], parts)


def _rows(file: Path) -> pa.Table:
    if file.suffix not in _EXPORTED:
        raise CannotStart(
            f"{file} is no exported table: give it the ending .parquet or .arrow of its format (csv cannot say of "
            "which run it is)"
        )
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_table(file)
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            return reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise CannotStart(f"{file} is no exported table: {str(error).splitlines()[0]}") from error


def _newest(name: str, rows: pa.Table) -> pa.Table:
    if name not in _NAMED_BY:
        return rows
    at = rows.select(_NAMED_BY[name]).append_column("at", pa.array(np.arange(rows.num_rows)))
    last = at.group_by(_NAMED_BY[name]).aggregate([("at", "max")])
    return rows.take(np.sort(last.column("at_max").to_numpy()))
