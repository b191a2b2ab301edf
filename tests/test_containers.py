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
from typing import Any

import httpx
import pytest
from chromium import CHROMIUM, FLAGS
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
STEPS = 600

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

    def compose(self, *arguments: str, fails: bool = False, **environment: str) -> str:
        command = [*self.command, "-p", f"brn-test-{os.getpid()}", *arguments]
        ours = {"BRN_PORT": str(self.port), "BRN_STEPS": str(STEPS), "BRN_RUN_NAME": "in-a-container"}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **ours, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, f"{shlex.join(command)}\n{done.stdout[-4000:]}"
        return done.stdout

    def inside(self, *command: str, fails: bool = False) -> str:
        return self.compose("exec", "-T", "service", *command, fails=fails)

    def runs(self) -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{self.url}/v1/runs").raise_for_status().json()
        return {run["id"]: run for run in answer["runs"]}


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


def test_a_service_container_killed_in_training_loses_no_row_and_gives_a_verdict(stack: Stack) -> None:
    def some() -> bool:
        return any(run["rows"] for run in stack.runs().values())

    _eventually("rows", some, stack)
    (name,) = stack.runs()
    stack.compose("kill", "-s", "KILL", "service")
    stack.compose("start", "service")
    _eventually("the service's return", lambda: httpx.get(f"{stack.url}/readyz").is_success, stack)
    assert stack.runs()[name]["status"] == "running", "training ended before the service was killed: it proved nothing"
    _eventually("the end of training", lambda: stack.runs()[name]["status"] == "finished", stack)
    stack.compose("run", "--rm", "--no-deps", "worker", "--sync", "/var/lib/brn/spool")
    run = stack.runs()[name]
    assert run["name"] == "in-a-container"
    assert run["last_step"] == STEPS - 1
    layers = httpx.get(f"{stack.url}/v1/runs/{name}/layers").raise_for_status().json()["layers"]
    assert run["rows"] == STEPS * len(layers) * run["world_size"], "one row a step, layer and rank"
    findings = httpx.get(f"{stack.url}/v1/runs/{name}/findings").raise_for_status().json()
    assert findings["findings"], "the answer is never empty"


def test_the_dashboard_answers_through_the_published_port(stack: Stack) -> None:
    page = httpx.get(stack.url)
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_draws_the_run_through_the_published_port(stack: Stack) -> None:
    (run,) = stack.runs()
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(stack.url)
        page.locator(f"a[href*='{run}']").first.click()
        page.locator(".js-plotly-plot").first.wait_for()


def test_the_containers_have_no_root_no_capability_and_nothing_to_write_to_but_their_volume(stack: Stack) -> None:
    assert "10001" in stack.inside("id", "-u")
    status = dict(line.split(":", 1) for line in stack.inside("cat", "/proc/self/status").splitlines() if ":" in line)
    assert {int(status[name], 16) for name in ("CapEff", "CapBnd")} == {0}
    assert status["NoNewPrivs"].strip() == "1"
    assert "Read-only file system" in stack.inside("touch", "/etc/brn", fails=True)
    stack.inside("touch", "/var/lib/brn/probe", "/tmp/probe")
    assert "USER brn" in (ROOT / "docker" / "worker.Dockerfile").read_text()


def test_another_address_than_loopback_wants_a_token(stack: Stack) -> None:
    said = stack.compose("run", "--rm", "--no-deps", "service", fails=True, BRN_BIND="0.0.0.0", BRN_PORT="0")
    assert "refusing to listen on 0.0.0.0 without a token" in said
    assert "BRN_SERVICE_TOKEN=" in said


def test_without_a_gpu_the_worker_says_so_once_and_trains_on_the_cpu(stack: Stack) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this host has a GPU")
    logs = stack.compose("logs", "worker")
    assert logs.lower().count("no cuda device") == 1, logs[-2000:]


def test_rows_outlive_the_containers(stack: Stack) -> None:
    before = stack.runs()
    stack.compose("down")
    stack.compose("up", "-d", "--no-build", "service")
    _eventually("the service's return", lambda: httpx.get(f"{stack.url}/readyz").is_success, stack)
    after = stack.runs()
    assert {name: run["rows"] for name, run in after.items()} == {name: run["rows"] for name, run in before.items()}
