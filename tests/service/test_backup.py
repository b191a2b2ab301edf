"""docs/operations.md on backups: a copy of a stopped store, and one at the instant of a sudden end, are whole."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from synthetic import create, layer_rows, run_record, scalar_rows, send

BATCHES, LAYERS = 4, 3


@contextmanager
def serving(store: Path, end: signal.Signals) -> Iterator[httpx.Client]:
    """A service in a process of its own, which ends by a signal."""
    command = [sys.executable, "-m", "service", "--port", "0", "--store", f"chdb://{store}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving on "), line
            with httpx.Client(base_url=line.split()[2], timeout=60) as client:
                yield client
            process.send_signal(end)
            assert process.wait(60) == (0 if end == signal.SIGTERM else -end)
        finally:
            process.kill()


def stored(client: httpx.Client) -> dict[str, Any]:
    """All that is asked of a run, with full digits."""
    run = client.get("/v1/runs/a").raise_for_status().json()
    tables = {
        table: client.get(f"/v1/runs/a/export?table={table}&format=csv").raise_for_status().text
        for table in ("layers", "scalars")
    }
    return {"rows": run["rows"], "name": run["name"], "notes": run["notes"], **tables}


@pytest.mark.timeout(600)  # three processes start one after another
def test_a_copy_of_the_store_and_its_journal_has_the_same_rows_wherever_it_is_restored(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name / "store" for name in ("first", "second", "third"))
    with serving(first, signal.SIGKILL) as client:
        create(client, run_record("a", LAYERS)).raise_for_status()
        client.patch("/v1/runs/a", json={"notes": "kept"}).raise_for_status()
        for seq in range(1, BATCHES + 1):
            tables = {"layers": layer_rows([seq], LAYERS), "scalars": scalar_rows({"loss": [(seq, 1.0 / seq)]})}
            send(client, "a", tables, seq=seq).raise_for_status()
    journal = first.with_name("store.journal")
    assert journal.is_dir(), "it belongs to what is copied, whether or not the engine had all of it by then"

    shutil.copytree(first, second, symlinks=True)
    shutil.copytree(journal, second.with_name("store.journal"))
    with serving(second, signal.SIGTERM) as client:
        after_a_kill = stored(client)
    assert after_a_kill["rows"] == BATCHES * LAYERS
    assert after_a_kill["notes"] == "kept"
    assert len(after_a_kill["scalars"].splitlines()) == 1 + BATCHES

    assert not second.with_name("store.journal").exists(), "a clean stop leaves the directory alone"
    shutil.copytree(second, third, symlinks=True)
    shutil.rmtree(second)
    with serving(third, signal.SIGTERM) as client:
        assert stored(client) == after_a_kill
