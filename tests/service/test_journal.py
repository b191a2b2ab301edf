"""The journal of an embedded store: whatever ends the process, and wherever, each acknowledged batch is stored once."""

from __future__ import annotations

import os
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from other_process import python

from service.journal import Entry, Journal

NOW = datetime(2026, 11, 23, 12, 0, 0, 123000, UTC)


def entry(seq: int, body: bytes = b"body") -> Entry:
    return Entry("run", NOW, 0, seq, NOW, body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_entries_come_back_as_they_were_in_order(folder: Path) -> None:
    entries = [entry(2**64 - 1), entry(1, b""), entry(2, bytes(range(256)) * 1000)]
    journal = Journal(folder)
    journal.append(entries[:2])
    journal.turn()
    journal.append(entries[2:])
    assert list(Journal(folder).entries()) == entries


def test_what_is_appended_after_the_page_was_turned_is_not_cut_off(folder: Path) -> None:
    journal = Journal(folder)
    journal.append([entry(1)])
    page = journal.turn()
    journal.append([entry(2)])
    journal.cut(page)
    assert list(Journal(folder).entries()) == [entry(2)]
    later = Journal(folder)
    later.append([entry(3)])
    assert list(Journal(folder).entries()) == [entry(2), entry(3)], "a new process goes on with a page of its own"
    later.cut(later.turn())
    later.close()
    assert not folder.exists()


def test_an_entry_that_broke_off_or_was_damaged_is_left_out_and_those_before_it_are_not(folder: Path) -> None:
    whole, last = [entry(1), entry(2)], entry(3, b"x" * 100)
    journal = Journal(folder)
    journal.append(whole)
    (page,) = folder.iterdir()
    kept = page.stat().st_size
    journal.append([last])
    data = page.read_bytes()
    for at in range(kept, len(data)):
        page.write_bytes(data[:at])
        assert list(Journal(folder).entries()) == whole, f"cut at byte {at}"
        page.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert list(Journal(folder).entries()) == whole, f"byte {at} was damaged"


def test_lengths_beyond_the_page_are_not_believed(folder: Path) -> None:
    journal = Journal(folder)
    journal.append([entry(1)])
    (page,) = folder.iterdir()
    page.write_bytes(page.read_bytes() + struct.pack("<4sIQI", b"BRN1", 2**32 - 1, 2**63, 0) + b"x" * 100)
    assert list(Journal(folder).entries()) == [entry(1)]


@pytest.mark.parametrize("bytes_written", [0, 30])
def test_a_disk_that_filled_up_leaves_no_half_of_an_entry_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bytes_written: int
) -> None:
    journal = Journal(folder)
    journal.append([entry(1)])
    write = os.write

    def fills_up(file: int, data: bytes) -> int:
        if len(data) <= bytes_written:
            raise OSError(28, "No space left on device")
        return write(file, data[:bytes_written]) if bytes_written else fills_up(file, b"")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fills_up)
        with pytest.raises(OSError, match="No space"):
            journal.append([entry(2)])
    journal.append([entry(3)])
    assert list(Journal(folder).entries()) == [entry(1), entry(3)]


DIES = """
import os, signal
from service.engine import Engine
from service.journal import Journal
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def put(*batches):
    print(*store.put_batches(batches), flush=True)
"""

KILLS = {
    "before it is on disk": ("Journal.append = die", "stored"),
    "before it is acknowledged": (
        "append = Journal.append; Journal.append = lambda *rest: (append(*rest), die())",
        "duplicate",
    ),
    "before the engine has it": ("Engine.insert = die", "duplicate"),
    "between tables": (
        "insert = Engine.insert\n"
        "Engine.insert = lambda own, table, *rest: die() if table == 'batches' else insert(own, table, *rest)",
        "duplicate",
    ),
    "before the journal is cut": ("Journal.cut = die", "duplicate"),
}
"""Where the process ends, and what a repeat of the batch gets from the next one."""


def test_a_batch_is_stored_once_wherever_the_process_ends(tmp_path: Path) -> None:
    """Each process finds what the one before left, repeats its batch, and is killed at the next point."""
    store = tmp_path / "store"
    code = f"""{DIES}
store = open_store()
store.put_run(run_record("a", 2), "running", datetime.now(UTC))
seq = int(sys.argv[2])
put(batch(seq))
{{}}
put(batch(seq + 1))
store.rows("SELECT 1")
"""
    expected = "stored"
    for seq, (point, (dies, repeated)) in enumerate(KILLS.items(), start=1):
        killed = python(code.format(dies), store, seq)
        assert killed.returncode == -9, (point, killed.stderr)
        assert killed.stdout.split()[0] == expected, f"after the process before the one that was killed {point}"
        expected = repeated
    taking_up = python(f"{DIES}\n{KILLS['between tables'][0]}\nJournal.cut = die\nopen_store()", store)
    assert taking_up.returncode == -9, taking_up.stderr
    found = python(
        """
store = open_store()
print(*store.put_batches([batch(seq) for seq in range(1, 7)]))
for table, rows in (("layers", 2), ("scalars", 1), ("batches", 1)):
    counted = store.rows(f"SELECT seq, count() AS n FROM {table} GROUP BY seq ORDER BY seq")
    print(table, counted.to_pydict() == {"seq": [1, 2, 3, 4, 5, 6], "n": 6 * [rows]})
print(store.extent("a").layer_rows, store.extent("a").batches)
store.close()
""",
        store,
    )
    assert found.stdout.splitlines() == [
        " ".join(["duplicate"] * 6),
        "layers True",
        "scalars True",
        "batches True",
        "12 6",
    ], found.stderr
    assert not (tmp_path / "store.journal").exists(), "a clean stop leaves everything with the engine"


def test_repeats_of_what_the_engine_has_are_known_beside_what_the_journal_has(tmp_path: Path) -> None:
    """Another rank's batch, and a newer one of the same rank: neither is in the journal when the process ends."""
    store = tmp_path / "store"
    killed = python(
        f"""{DIES}
store = open_store()
store.put_run(run_record("a", 2, world_size=2), "running", datetime.now(UTC))
put(batch(1, rank=1), batch(9))
store.rows("SELECT 1")  # the engine has them
put(batch(5))
die()
""",
        store,
    )
    assert (killed.returncode, killed.stdout.split()) == (-9, ["stored"] * 3), killed.stderr
    found = python(
        """
store = open_store()
print(*store.put_batches([batch(1, rank=1), batch(9), batch(5)]))
print(store.rows("SELECT rank, seq FROM batches ORDER BY rank, seq").to_pydict())
store.close()
""",
        store,
    )
    assert found.stdout.splitlines() == ["duplicate duplicate duplicate", "{'rank': [0, 0, 1], 'seq': [5, 9, 1]}"], (
        found.stderr
    )


def test_the_journal_brings_back_no_deleted_run_and_is_left_alone_by_another_version(tmp_path: Path) -> None:
    store = tmp_path / "store"
    killed = python(
        f"""{DIES}
store = open_store()
for name in ("a", "b"):
    store.put_run(run_record(name, 2), "running", datetime.now(UTC))
store._batches.settle = lambda *_: None  # the engine has nothing of it yet
put(batch(1), batch(2), batch(1, run="b"))
store.delete_runs(["a"])
store.put_run(run_record("a", 2), "running", datetime.now(UTC))
put(batch(2))
die()
""",
        store,
    )
    assert (killed.returncode, killed.stdout.split()) == (-9, ["stored"] * 4), killed.stderr
    other = python(
        """
from brn_core import wire
wire.SCHEMA_VERSION += 1
try: open_store()
except CannotStart as error: print(error)
""",
        store,
    )
    assert "another version of brn-diagnostics: start and stop that one first" in other.stdout, other.stderr
    found = python(
        """
store = open_store()
for run in ("a", "b"):
    print(run, store.rows("SELECT seq FROM batches WHERE run_id = {run:String}", run=run).column("seq").to_pylist(),
        store.extent(run).layer_rows)
store.close()
""",
        store,
    )
    assert found.stdout.splitlines() == ["a [2] 2", "b [1] 2"], found.stderr
