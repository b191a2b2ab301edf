"""`docker compose up`, for real: builds both images, brings the file up, sees rows arrive and a verdict come back."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.containers


def _compose_command() -> list[str] | None:
    """BRN_COMPOSE, else docker's compose where an engine answers, else podman-compose."""
    if given := os.environ.get("BRN_COMPOSE"):
        return shlex.split(given)
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    if podman := shutil.which("podman-compose"):
        return [podman]
    return None


@dataclass(frozen=True)
class Stack:
    """The compose file, up in a project and on a port of its own."""

    command: list[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *arguments: str) -> str:
        command = [*self.command, "-p", f"brn-test-{os.getpid()}", *arguments]
        environment = {**os.environ, "BRN_PORT": str(self.port), "BRN_STEPS": "120", "BRN_RUN_NAME": "in-a-container"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    command = _compose_command()
    if command is None:
        pytest.skip("neither a docker engine nor podman-compose is here; BRN_COMPOSE may name another compose command")
    files = ["-f", "docker-compose.yml"] if _has_gpu_runtime() else ["-f", "docker-compose.yml", "-f", "docker/cpu.yml"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stack = Stack([*command, *files], port)
    try:
        stack.compose("up", "-d", "--build")
        yield stack
    finally:
        stack.compose("down", "-v")


def _has_gpu_runtime() -> bool:
    """Whether a container may ask for an nvidia device here: a CDI description of one exists."""
    return any(Path(folder).glob("nvidia*.y*ml") for folder in ("/etc/cdi", "/var/run/cdi"))


def _eventually(what: str, answer: Callable[[], object], stack: Stack, seconds: float = 240) -> object:
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if last := answer():
                return last
        except httpx.HTTPError as error:
            last = error
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen in {seconds} s; last: {last!r}\n{stack.compose('logs')[-4000:]}")


def test_compose_up_trains_streams_and_gives_a_verdict(stack: Stack) -> None:

    def finished_run() -> dict[str, object] | None:
        runs: list[dict[str, object]] = httpx.get(f"{stack.url}/v1/runs").raise_for_status().json()["runs"]
        return next((run for run in runs if run["status"] == "finished"), None)

    run = _eventually("a finished run", finished_run, stack)
    assert isinstance(run, dict)
    assert run["name"] == "in-a-container"
    assert run["last_step"] == 119
    layers = httpx.get(f"{stack.url}/v1/runs/{run['id']}/layers").raise_for_status().json()["layers"]
    assert run["rows"] == 120 * len(layers) * int(str(run["world_size"])), "one row a step, layer and rank"
    findings = httpx.get(f"{stack.url}/v1/runs/{run['id']}/findings").raise_for_status().json()
    assert findings["findings"], "the answer is never empty"


def test_the_dashboard_answers_through_the_published_port(stack: Stack) -> None:
    page = httpx.get(stack.url)
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]


def test_neither_container_runs_as_root(stack: Stack) -> None:
    assert "10001" in stack.compose("exec", "-T", "service", "id", "-u")
    for name in ("service", "worker"):
        assert "USER brn" in (ROOT / "docker" / f"{name}.Dockerfile").read_text()


def test_without_a_gpu_the_worker_says_so_once_and_trains_on_the_cpu(stack: Stack) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this host has a GPU")
    logs = stack.compose("logs", "worker")
    assert logs.lower().count("no cuda device") == 1, logs[-2000:]
