"""`docker compose up`, for real: builds both images, brings the file up, sees rows arrive and a verdict come back."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from chromium import CHROMIUM, FLAGS
from playwright.sync_api import sync_playwright

from brn_core import wire

ROOT = Path(__file__).parent.parent
STEPS = 600
LONG_STEPS = 2000
"""Of the training that is stopped and goes on."""
MOST_BYTES = 770e6
"""Of what the service's image adds to its base: with the some 125 MB of python:3.11-slim-bookworm less than 900 MB."""
IMPORT_ALL = """
import importlib, pkgutil, sys
import brn_core.wire, dashboard, service
for package in (service, dashboard):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print("modules:", len(sys.modules))
"""
PAGES = (
    "/",
    *(f"/runs/{{run}}{page}" for page in ("", "/fragment", "/layers/1", "/ranks", "/advisor", "/report")),
    *(f"/runs/{{run}}/figures/{name}" for name in ("schedule", "heatmap", "causes", "scalars", "ranks", "rank-curves")),
)

WITHOUT_GPU = ("docker-compose.yml", "docker/cpu.yml")

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
    files: tuple[str, ...]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def project(self) -> str:
        return f"brn-test-{os.getpid()}"

    @property
    def compose_command(self) -> list[str]:
        files = [part for file in self.files for part in ("-f", file)]
        return [*self.command, *files, "-p", self.project]

    def compose(self, *arguments: str, fails: bool = False, **environment: str) -> str:
        command = [*self.compose_command, *arguments]
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

    def inside(self, *command: str, service: str = "service", fails: bool = False) -> str:
        return self.compose("exec", "-T", service, *command, fails=fails)

    def inspect(self, service: str, what: str) -> str:
        """What the engine knows of a service's container, by a Go template."""
        engine = "docker" if self.command[0] == "docker" else "podman"
        labels = (f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}")
        named = [part for label in labels for part in ("--filter", f"label={label}")]
        (container,) = _said(engine, "ps", "--all", "--quiet", *named).split()
        return _said(engine, "inspect", "--format", what, container).strip()

    def exit_code(self, service: str) -> int:
        return int(self.inspect(service, "{{.State.ExitCode}}"))

    def runs(self) -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{self.url}/v1/runs").raise_for_status().json()
        return {run["id"]: run for run in answer["runs"]}


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    command = _compose_command()
    if command is None:
        pytest.skip("neither a docker engine nor podman-compose is here; BRN_COMPOSE may name another compose command")
    files = ("docker-compose.yml",) if _has_gpu_runtime() else WITHOUT_GPU
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stack = Stack(command, files, port)
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
    _locked(stack, "service", "/var/lib/brn", "/tmp")


def _locked(stack: Stack, service: str, *writable: str) -> None:
    """A running container, asked from inside."""
    assert stack.inside("id", "-u", service=service).split()[-1] == "10001"
    lines = stack.inside("cat", "/proc/self/status", service=service).splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"].strip() == "1"
    assert "Read-only file system" in stack.inside("touch", "/etc/brn", service=service, fails=True)
    stack.inside("touch", *(f"{folder}/probe" for folder in writable), service=service)
    started = stack.inside("sh", "-c", "cp /bin/true /tmp/true && /tmp/true", service=service, fails=True)
    assert "Permission denied" in started, "nothing in /tmp is executed"
    limits = stack.inspect(service, "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}").split()
    assert all(int(limit) > 0 for limit in limits), "memory and processes are limited"


def test_the_image_of_the_service_is_small_and_has_neither_torch_nor_a_compiler(stack: Stack) -> None:
    (size,) = (line.split()[0] for line in stack.inside("du", "-sb", "/opt/brn").splitlines() if "/opt/brn" in line)
    assert int(size) <= MOST_BYTES
    stack.inside("sh", "-c", "for c in cc c++ gcc g++ clang; do ! command -v $c || exit 1; done")
    assert "No module named 'torch'" in stack.inside("python", "-c", "import torch", fails=True)


def test_the_image_has_all_that_its_modules_import_and_its_routes_answer_with(stack: Stack) -> None:
    """It leaves out much of what its libraries bring: docker/service.Dockerfile."""
    assert "modules: " in stack.inside("python", "-c", IMPORT_ALL)
    assert "No module named 'pandas'" in stack.inside("python", "-c", "import pandas", fails=True)
    (run,) = stack.runs()
    with httpx.Client(base_url=stack.url, timeout=120) as client:
        given = {"run": run, "stat": "gap"}
        asked = 0
        for path, methods in client.get("/openapi.json").raise_for_status().json()["paths"].items():
            if "get" not in methods or path.endswith("/events") or path == "/v1/compare":  # has no end; wants two runs
                continue
            wanted = [p["name"] for p in methods["get"].get("parameters", []) if p["in"] == "query" and p["required"]]
            answer = client.get(path.format(**given), params={name: given[name] for name in wanted})
            assert answer.status_code == 200, f"{path}: {answer.text}"
            asked += 1
        assert asked >= 15
        for page in PAGES:
            client.get(page.format(**given)).raise_for_status()
        for table in wire.TABLES:
            for file_format in ("parquet", "csv", "arrow"):
                query = {"table": table, "format": file_format}
                client.get(f"/v1/runs/{run}/export", params=query).raise_for_status()
    fetch = f"http://127.0.0.1:8321/v1/runs/{run}/export?table=layers&format=parquet"
    fetch = f"import urllib.request; urllib.request.urlretrieve({fetch!r}, '/tmp/layers.parquet')"
    stack.inside("python", "-c", fetch)
    stack.inside("sh", "-c", "brn-serve --diagnose /tmp/layers.parquet; test $? -ne 1")  # 1: it could not look


def test_the_check_of_health_asks_the_service(stack: Stack) -> None:
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    how, *command = file["services"]["service"]["healthcheck"]["test"]
    assert how == "CMD"
    stack.inside(*command)
    stack.inside(*(part.replace("8321", "8322") for part in command), fails=True)


def test_another_address_than_loopback_wants_a_token(stack: Stack) -> None:
    said = stack.compose("run", "--rm", "--no-deps", "service", fails=True, BRN_BIND="0.0.0.0", BRN_PORT="0")
    assert "refusing to listen on 0.0.0.0 without a token" in said
    assert "BRN_SERVICE_TOKEN=" in said


def test_without_a_gpu_the_worker_says_so_once_and_trains_on_the_cpu(stack: Stack) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this host has a GPU")
    logs = stack.compose("logs", "worker")
    assert logs.lower().count("no cuda device") == 1, logs[-2000:]


def test_a_training_that_is_stopped_or_killed_goes_on_where_it_was(stack: Stack) -> None:
    """With docker/cpu.yml, as a host without a GPU has it."""
    stack = replace(stack, files=WITHOUT_GPU)
    job = {"BRN_RUN_ID": "stopped", "BRN_STEPS": str(LONG_STEPS), "BRN_CHECKPOINT_EVERY": "50"}
    job |= {"BRN_CHECKPOINT": "/checkpoints/stopped", "BRN_RESUME": "true"}

    stack.compose("up", "-d", "--no-build", "worker", **job)
    stack.compose("stop", "worker", **job)
    assert stack.exit_code("worker") in (128 + 15, 130), "it was still starting, and ended by the first signal"

    stack.compose("up", "-d", "--no-build", "worker", **job)
    _eventually("rows", lambda: stack.runs().get("stopped", {}).get("rows"), stack)
    _locked(stack, "worker", "/var/lib/brn", "/checkpoints", "/tmp")
    assert stack.runs()["stopped"]["status"] == "running", "training ended before it was stopped: it proved nothing"
    stack.compose("stop", **job)
    assert (stack.exit_code("worker"), stack.exit_code("service")) == (130, 0)

    stack.compose("up", "-d", "--no-build", **job)
    _eventually("the service's return", lambda: httpx.get(f"{stack.url}/readyz").is_success, stack)
    before = stack.runs()["stopped"]["rows"]
    _eventually("more rows", lambda: stack.runs()["stopped"]["rows"] > before, stack)
    stack.inside("sh", "-c", "kill -KILL -1", service="worker")  # all but process 1, which then says that it failed
    assert stack.runs()["stopped"]["status"] != "finished", "training ended before it was killed: it proved nothing"

    _eventually("the end of training", lambda: stack.runs()["stopped"]["status"] == "finished", stack)
    run = stack.runs()["stopped"]
    layers = httpx.get(f"{stack.url}/v1/runs/stopped/layers").raise_for_status().json()["layers"]
    assert run["rows"] == LONG_STEPS * len(layers), "one row a step and layer: none twice, none missing"


def test_a_compiled_training_finds_its_compiler_and_a_place_to_execute_from(stack: Stack) -> None:
    """As hardened as the others, /tmp noexec too."""
    job = {"BRN_RUN_ID": "compiled", "BRN_STEPS": "4", "BRN_EVAL_EVERY": "0", "BRN_COMPILE": "true"}
    stack.compose("run", "--rm", "--no-deps", "worker", **job)
    run = httpx.get(f"{stack.url}/v1/runs/compiled").raise_for_status().json()
    assert run["config"]["compile"]
    layers = httpx.get(f"{stack.url}/v1/runs/compiled/layers").raise_for_status().json()["layers"]
    assert (run["status"], run["rows"]) == ("finished", 4 * len(layers) * run["world_size"])
    kernels = "from brn_core import fused_host; print(fused_host._compiled()); assert fused_host.library()"
    said = stack.compose("run", "--rm", "--no-deps", "--entrypoint", "python", "worker", "-c", kernels)
    assert "/var/lib/brn/cache/brn/fused_host-" in said


def test_rows_outlive_the_containers(stack: Stack) -> None:
    before = stack.runs()
    stack.compose("down")
    stack.compose("up", "-d", "--no-build", "service")
    _eventually("the service's return", lambda: httpx.get(f"{stack.url}/readyz").is_success, stack)
    after = stack.runs()
    assert {name: run["rows"] for name, run in after.items()} == {name: run["rows"] for name, run in before.items()}


def test_a_backup_as_the_operations_page_has_it_is_restored_into_a_new_volume(stack: Stack, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    lines = re.findall(r"^docker compose .*$", text, flags=re.MULTILINE)
    (restore,) = (line for line in lines if "<" in line)

    def paste(line: str) -> None:
        command = line.replace("docker compose", shlex.join(stack.compose_command), 1)
        command = command.replace("store.tar", shlex.quote(str(tmp_path / "store.tar")))
        subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, env=os.environ | {"BRN_PORT": str(stack.port)})

    def rows() -> dict[str, int]:
        _eventually("the service's return", lambda: httpx.get(f"{stack.url}/readyz").is_success, stack)
        return {name: run["rows"] for name, run in stack.runs().items()}

    before = rows()
    assert before
    for line in lines:
        if line != restore:
            paste(line)
    assert rows() == before, "it goes on"
    stack.compose("down", "-v")
    paste(restore)
    stack.compose("up", "-d", "--no-build", "service")
    assert rows() == before
