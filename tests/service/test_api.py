"""docs/api.md against the service: every line to paste is pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from synthetic import create, run_record, write_run

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("## Settings")[0]

COMMANDS = dict(re.findall(r"^### `(\S+ \S+)`\n(?:(?!### ).*\n)*?```sh\n([^`]*)```", TEXT, re.MULTILINE))


@pytest.fixture(scope="module")
def run_id(client: httpx.Client) -> Iterator[str]:
    """A run with rows, beside the run `by-hand` that the page makes."""
    write_run(client, "documented", layers=2, steps=3)
    create(client, run_record("by-hand"))
    yield "documented"
    for name in ("documented", "by-hand"):
        client.delete(f"/v1/runs/{name}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("route", sorted(COMMANDS, key=lambda route: route.startswith("DELETE")))  # deletes at the end
def test_every_line_to_paste_succeeds(client: httpx.Client, run_id: str, route: str) -> None:
    command = COMMANDS[route].replace("curl ", "curl --fail-with-body ", 1)
    if "/events" in route:
        # a stream has no end: its first line is enough, and curl notices late that nobody reads on
        command = f"{command.strip().replace('curl ', 'curl --max-time 2 ', 1)} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"S": str(client.base_url).rstrip("/"), "R": run_id},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "/events" in route:
        assert done.stdout == b"event: cursor\n"


def test_every_documented_route_has_a_line_to_paste() -> None:
    assert set(COMMANDS) == set(re.findall(r"^### `([A-Z]+ /\S+)`$", TEXT, re.MULTILINE))
