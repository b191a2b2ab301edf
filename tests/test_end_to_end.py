"""The whole path in real processes: `brn-train` on two ranks, `brn-serve` on an embedded store, verdicts over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

STEPS = 200
RANKS = 2
LAYERS = 3  # of the worker's small network


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(answer: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := answer():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


@contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """`brn-serve` as a user starts it, stopped as a user stops it."""
    with (folder / "serve.log").open("w") as log:
        command = [sys.executable, "-m", "dashboard", "--port", str(port), "--store", f"chdb://{folder / 'store'}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            eventually(lambda: httpx.get(f"{url}/readyz").is_success, (folder / "serve.log").read_text() or "start")
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, (folder / "serve.log").read_text()
        finally:
            process.kill()
            process.wait()


def train(folder: Path, url: str, *arguments: str, ranks: int = RANKS, steps: int = STEPS) -> str:
    """`brn-train` to its end; returns what it printed."""
    command = [sys.executable, "-m", "brn_core.worker", "--url", url, "--spool", str(folder / "spool")]
    command += ["--device", "cpu", "--ranks", str(ranks), "--steps", str(steps), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "110"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


def get(url: str, path: str) -> Any:
    return httpx.get(f"{url}/v1/runs/{path}").raise_for_status().json()


def finished(url: str, run: str) -> Any:
    return eventually(lambda: (r := get(url, run))["status"] == "finished" and r, f"the end of {run}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, free_port()) as url:
        yield url


@pytest.fixture(scope="module")
def printed(folder: Path, url: str) -> dict[str, str]:
    """What two runs printed that differ in nothing but how a batch is drawn."""
    return {
        "iid": train(folder, url, "--run-id", "iid", "--sampler", "iid"),
        "few": train(folder, url, "--run-id", "few", "--sampler", "few-labels", "--labels-per-batch", "2"),
    }


def codes(url: str, run: str) -> set[str]:
    return {finding["code"] for finding in get(url, f"{run}/findings")["findings"]}


def test_few_labels_a_batch_are_found_and_iid_batches_are_not(url: str, printed: dict[str, str]) -> None:
    few, iid = get(url, "few/findings"), get(url, "iid/findings")
    (cluster,) = (finding for finding in few["findings"] if finding["code"] == "NH-CLUSTER")
    assert cluster["severity"] in ("warning", "critical")
    assert cluster["evidence"]["low"] > 2, "two of ten digits in a batch are far from i.i.d."
    assert cluster["remedy"]["text"]
    assert all(finding["severity"] in ("ok", "info") for finding in iid["findings"]), iid


def test_the_evidence_of_every_finding_can_be_fetched(url: str, printed: dict[str, str]) -> None:
    for finding in get(url, "few/findings")["findings"]:
        if finding["evidence"]:
            answer = httpx.get(url + finding["evidence"]["query"])
            assert answer.is_success, f"{finding['code']}: {finding['evidence']['query']} gave {answer.text}"


def test_the_trainer_prints_the_same_verdict_as_the_service(url: str, printed: dict[str, str]) -> None:
    assert "NH-CLUSTER" in printed["few"]
    assert "NH-CLUSTER" not in printed["iid"]


def test_every_step_of_every_layer_and_rank_is_stored_once(url: str, printed: dict[str, str]) -> None:
    for name in printed:
        run = finished(url, name)
        assert run["rows"] == STEPS * LAYERS * RANKS
        assert run["last_step"] == STEPS - 1
        series = get(url, f"{name}/series?stat=samples&layer=0&rank=1&points={STEPS}")
        assert series["steps"] == list(range(STEPS))


def test_recorded_limits_follow_the_schedule(url: str, printed: dict[str, str]) -> None:
    schedule = get(url, "few")["schedule"]
    recorded = get(url, f"few/series?stat=r_max&stat=d_max&layer=0&points={STEPS}")
    r_max, d_max = (recorded["series"][stat]["mean"] for stat in ("r_max", "d_max"))
    assert r_max[0] == 1
    assert d_max[schedule["bn_steps"] - 1] == 0
    assert r_max[-1] == pytest.approx(schedule["r_max"])
    assert d_max[schedule["d_steps"] :] == pytest.approx([schedule["d_max"]] * (STEPS - schedule["d_steps"]))


def test_the_dashboard_page_of_a_run_stands(url: str, printed: dict[str, str]) -> None:
    page = httpx.get(f"{url}/runs/few")
    assert page.is_success
    assert "NH-CLUSTER" in page.text


def test_a_run_that_turns_nan_ends_cleanly_and_names_layer_rank_and_step(folder: Path, url: str) -> None:
    output = train(folder, url, "--run-id", "nan", "--lr", "1e25", ranks=1, steps=40)
    (found,) = (f for f in get(url, "nan/findings")["findings"] if f["code"] == "NH-NONFINITE")
    assert found["severity"] == "critical"
    assert found["layers"]
    assert found["ranks"]
    heatmap = get(url, "nan/heatmap?stat=gap")
    step = found["steps"][0]
    row = heatmap["layers"].index(found["layers"][0])
    assert heatmap["values"][row][heatmap["steps"].index(step)] in ("NaN", "Infinity")
    assert finished(url, "nan")["rows"] == 40 * LAYERS, "a diverging run is recorded to its end"
    assert "NH-NONFINITE" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--store", "chdb:///proc/nowhere/store"], "/proc/nowhere"),
        (["--host", "0.0.0.0"], "BRN_SERVICE_TOKEN"),
        (["--port", "99999"], "port"),
    ],
)
def test_a_start_that_cannot_be_says_why_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "dashboard", "--store", f"chdb://{tmp_path}/store", "--port", str(free_port())]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_second_service_on_a_store_or_port_in_use_says_so_in_one_line(url: str, folder: Path, tmp_path: Path) -> None:
    port = url.rpartition(":")[2]
    for arguments, said in (
        (["--port", port, "--store", f"chdb://{tmp_path}/other"], port),
        (["--port", str(free_port()), "--store", f"chdb://{folder / 'store'}"], "store"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dashboard", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode != 0
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("few/series?stat=nonsense", 422, "clip_r"),
        ("few/series?stat=gap&layer=77", 422, "77"),
        ("few/heatmap?stat=nonsense", 422, "clip_r"),
        ("few/scalars?name=nonsense", 422, "loss"),
        ("nobody/findings", 404, "nobody"),
    ],
)
def test_an_unknown_name_is_answered_with_what_exists(
    url: str, printed: dict[str, str], path: str, status: int, said: str
) -> None:
    answer = httpx.get(f"{url}/v1/runs/{path}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert said in answer.json()["detail"]
