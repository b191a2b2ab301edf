"""A service that is killed with SIGKILL at any moment, or stopped under load, has every acknowledged row once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from synthetic import create, layer_rows, run_record, scalar_rows, send

KILLS = int(os.environ.get("BRN_TEST_KILLS", "10"))
RANKS, LAYERS = 4, 3


class Sender(threading.Thread):
    """One rank: sends batch after batch, and the one that was not acknowledged again after a restart."""

    def __init__(self, rank: int) -> None:
        super().__init__(daemon=True)
        self.rank = rank
        self.url = ""
        self.acknowledged: list[int] = []
        self.repeats = 0
        self.up = threading.Event()
        self.ended = False
        self.news = threading.Semaphore(0)

    def run(self) -> None:
        for seq in itertools.count(1):
            tables = {"layers": layer_rows([seq], LAYERS), "scalars": scalar_rows({"loss": [(seq, 1.0)]})}
            while True:
                self.up.wait()
                if self.ended:
                    return
                try:
                    with httpx.Client(base_url=self.url, timeout=30) as client:
                        answer = send(client, "a", tables, rank=self.rank, seq=seq)
                except httpx.TransportError:
                    self.up.clear()
                    self.repeats += 1
                    continue
                assert answer.status_code == 200, answer.text
                self.acknowledged.append(seq)
                self.news.release()
                break


def started(store: Path, *how: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, *(how or ("-m", "service")), "--port", "0", "--store", f"chdb://{store}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving on "), line
    return process, line.split()[2]


@pytest.mark.timeout(180 + 12 * KILLS)
def test_no_acknowledged_row_is_lost_or_doubled_whenever_the_service_is_killed(tmp_path: Path) -> None:
    rng = random.Random(0)
    senders = [Sender(rank) for rank in range(RANKS)]
    for kill in range(KILLS):
        process, url = started(tmp_path / "store")
        if kill == 0:
            with httpx.Client(base_url=url, timeout=30) as client:
                create(client, run_record("a", LAYERS, world_size=RANKS)).raise_for_status()
            for sender in senders:
                sender.start()
        for sender in senders:
            sender.url = url
            sender.up.set()
        watched = rng.choice(senders)
        for _ in range(rng.randint(1, 4)):
            assert watched.news.acquire(timeout=60), "nothing was acknowledged"
        threading.Event().wait(rng.uniform(0, 0.05))  # the moment is any, not that of an acknowledgement
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()
        for sender in senders:
            while sender.news.acquire(blocking=False):
                pass
    end(senders)
    assert sum(sender.repeats for sender in senders) >= KILLS, "no batch was on its way when the service died"
    assert_stored_once(tmp_path / "store", senders)


def test_a_stop_under_load_writes_all_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRN_SERVICE_DIAGNOSIS_SECONDS", "3600")  # to diagnose a run is to read it: writes what waits
    code = (
        "import sys, service.batches as b; b.BLOCK_SECONDS = 3600; from service.__main__ import main; sys.exit(main())"
    )
    process, url = started(tmp_path / "store", "-c", code)
    with httpx.Client(base_url=url, timeout=30) as client:
        create(client, run_record("a", LAYERS, world_size=RANKS)).raise_for_status()
    senders = [Sender(rank) for rank in range(RANKS)]
    for sender in senders:
        sender.url = url
        sender.up.set()
        sender.start()
    for sender in senders:
        for _ in range(10):
            assert sender.news.acquire(timeout=60), "nothing was acknowledged"
    journal = tmp_path / "store.journal"
    assert any(page.stat().st_size for page in journal.iterdir()), "something waits"
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(30) == 0, "it stops before whoever manages processes would kill it"
    finally:
        process.kill()
    assert process.stdout is not None
    process.stdout.close()
    end(senders)
    assert not journal.exists(), "the engine has all of it"
    assert_stored_once(tmp_path / "store", senders)


def end(senders: list[Sender]) -> None:
    for sender in senders:
        sender.ended = True
        sender.up.set()
        sender.join(60)


def assert_stored_once(store: Path, senders: list[Sender]) -> None:
    """Every table has every batch that was acknowledged, and no batch in part or twice."""
    code = """
import sys
from service.settings import Settings
from service.store import Store
store = Store(Settings(store=f"chdb://{sys.argv[1]}"))
for table in ("layers", "scalars", "batches"):
    for row in store.rows(f"SELECT rank, seq, count() AS n FROM {table} GROUP BY rank, seq").to_pylist():
        print(table, row["rank"], row["seq"], row["n"])
store.close()
"""
    found = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, check=True)
    rows: Counter[tuple[str, int, int]] = Counter()
    for line in found.stdout.splitlines():
        table, *numbers = line.split()
        rank, seq, count = map(int, numbers)
        rows[table, rank, seq] = count
    assert {rows["layers", rank, seq] for rank, seq in pairs(rows, "layers")} == {LAYERS}, "rows twice or half a batch"
    assert {rows["scalars", rank, seq] for rank, seq in pairs(rows, "scalars")} == {1}
    assert {rows["batches", rank, seq] for rank, seq in pairs(rows, "batches")} == {1}
    for sender in senders:
        for seq in sender.acknowledged:
            for table in ("layers", "scalars", "batches"):
                assert rows[table, sender.rank, seq] > 0, f"batch {seq} of rank {sender.rank} is not in {table}"


def pairs(rows: Counter[tuple[str, int, int]], wanted: str) -> list[tuple[int, int]]:
    return [(rank, seq) for table, rank, seq in rows if table == wanted]
