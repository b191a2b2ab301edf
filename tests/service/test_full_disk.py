"""A disk that really is full: 507, nothing acknowledged is lost, and it goes on by itself when there is space."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from synthetic import create, layer_rows, run_record, send

LAYERS, STEPS = 54, 100

OWN_DISK = ("unshare", "--map-root-user", "--mount")
"""A mount of the process's own, for which no privilege is needed where the kernel lets users have name spaces."""

# What the other files leave may all be in the journal; twice as much has to become free for the engine to write and
# merge it before the journal is cut.
SERVICE = """
mount -t tmpfs -o size=72m tmpfs "$1"
head -c 48M /dev/zero > "$1/other-files"
exec "$2" -m service --port 0 --store "chdb://$1/store"
"""


def can_mount() -> bool:
    if shutil.which(OWN_DISK[0]) is None:
        return False
    probe = subprocess.run([*OWN_DISK, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return probe.returncode == 0


def batch(rng: np.random.Generator, seq: int) -> pa.Table:
    """Rows that hardly compress: some 0.4 MB of them."""
    table = layer_rows(range(STEPS * seq, STEPS * (seq + 1)), LAYERS)
    for name in ("gap", *(name for name in table.schema.names if name.startswith(("r_q", "d_q")))):
        noise = pa.array(rng.normal(size=table.num_rows).astype(np.float32))
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), noise)
    return table


def exported(client: httpx.Client) -> Counter[int]:
    """How many rows of each step the engine has."""
    with pa.ipc.open_stream(client.get("/v1/runs/a/export?format=arrow").raise_for_status().content) as reader:
        return Counter(reader.read_all().column("step").to_pylist())


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")
def test_a_full_disk_is_a_507_and_what_was_acknowledged_is_there_once_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRN_SERVICE_MIN_FREE_BYTES", "0")  # no margin: journal and engine both run into the end
    command = [*OWN_DISK, "sh", "-ec", SERVICE, "sh", str(tmp_path), sys.executable]
    rng = np.random.default_rng(0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2]
            with httpx.Client(base_url=url, timeout=60) as client:
                create(client, run_record("a", LAYERS)).raise_for_status()
                for seq in itertools.count(1):
                    refused = batch(rng, seq)
                    answer = send(client, "a", {"layers": refused}, seq=seq)
                    if answer.status_code != 200:
                        break
                assert answer.status_code == 507, answer.text
                assert answer.json()["title"] == "Disk full"
                assert seq > 5, "the disk was full from the start"
                assert client.get("/v1/runs/a/series?stat=gap&layer=0").status_code == 200, "questions are answered"

                Path(f"/proc/{process.pid}/root{tmp_path}/other-files").unlink()
                deadline = time.monotonic() + 60
                while (answer := send(client, "a", {"layers": refused}, seq=seq)).status_code == 507:
                    assert time.monotonic() < deadline, answer.text
                    time.sleep(0.1)
                assert answer.json() | {"rows": LAYERS * STEPS, "duplicate": False} == answer.json()
                expected = Counter(dict.fromkeys(range(STEPS, STEPS * (seq + 1)), LAYERS))
                while (rows := exported(client)) != expected:
                    assert time.monotonic() < deadline, f"{expected - rows} are missing, {rows - expected} too many"
                    time.sleep(0.1)
        finally:
            process.kill()
