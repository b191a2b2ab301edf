"""kill -9 in the middle of a training, --resume, and nobody can tell: the same losses to the last bit, the same run,
every row stored once. Real processes, a real service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import httpx
import pyarrow as pa
import pytest

from brn_core import wire
from brn_core.client import Client
from brn_core.shipper import Shipper

pytestmark = pytest.mark.timeout(600)

STEPS = 30
LAYERS = 3

TRAINING = ["--device", "cpu", "--steps", str(STEPS), "--checkpoint-every", "10", "--eval-every", "15"]
# everything that has a state: limits that move, a learning rate that rises and falls, averaged weights, several
# forwards a step, the shadow pass, samplers
TRAINING += ["--bn-steps", "5", "--r-steps", "20", "--d-steps", "12", "--warmup-steps", "4", "--weight-ema", "0.9"]
TRAINING += ["--accumulate", "2", "--shadow-every", "4", "--sampler", "few-labels", "--batch-size", "8"]

# Trainings one after the other, each rank a process. They are forked from one that has imported everything, which takes
# longer than to train. After `flush` steps all that is recorded is sent; after `kill` steps a rank kills itself.
SCRIPT = """
import json, os, signal, sys, traceback
import httpcore, sklearn.datasets, torch, torch._dynamo, torch.profiler  # what is imported late otherwise, by each
from brn_core.recorder import Recorder
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import train

torch.set_num_threads(1)
step, at = Recorder.step, {}

def counted(self, *args, **scalars):
    step(self, *args, **scalars)
    if self._step == at["flush"]:
        assert self.flush(timeout_seconds=60)
    if self._step == at["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)

Recorder.step = counted
folder, trainings = sys.argv[1], json.loads(sys.argv[2])
codes = []
for number, (ranks, flush, kill, flags) in enumerate(trainings):
    at = {"flush": flush, "kill": kill}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                train(parse_settings(flags), Rank(rank, ranks, rank, ranks, f"file://{folder}/meet-{number}"), None)
            except Exception:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def codes(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Exit codes by training and rank: one, two and four ranks, without and with interruptions."""
    folder = tmp_path_factory.mktemp("resume")
    flags = [*TRAINING, "--url", str(client.base_url), "--spool", str(folder / "spool")]

    def training(ranks: int, flush: int = -1, kill: int = -1) -> list[Any]:
        resumed = ["--run-name", f"resumed-{ranks}", "--checkpoint", str(folder / f"checkpoint-{ranks}"), "--resume"]
        return [ranks, flush, kill, flags + resumed]

    trainings = [
        [1, -1, -1, [*flags, "--run-id", "straight-1"]],
        training(1, kill=4),  # before the first checkpoint but that of the start; nothing is sent yet
        training(1, flush=14, kill=17),  # four steps beyond a checkpoint are sent, three are lost with the process
        training(1),
        training(1),  # there is nothing left to train
        [2, -1, -1, [*flags, "--run-id", "straight-2"]],
        training(2, flush=14, kill=17),
        training(2),
        # from 3 ranks on it matters in which order gradients are summed
        [4, -1, -1, [*flags, "--run-id", "straight-4"]],
        training(4, flush=14, kill=17),
        training(4),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BRN_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), json.dumps(trainings)],
        env=environment | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def the_run(client: httpx.Client, name: str) -> dict[str, Any]:
    """The only run of a name."""
    (found,) = client.get("/v1/runs", params={"search": name}).raise_for_status().json()["runs"]
    return dict(found)


def rows(client: httpx.Client, run: str, table: str, *key: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of a stored table, exactly, by their key."""
    answer = client.get(f"/v1/runs/{run}/export", params={"table": table, "format": "arrow"}).raise_for_status()
    found = pa.ipc.open_stream(answer.content).read_all().to_pylist()
    by_key = {tuple(row[part] for part in key): row for row in found}
    assert len(by_key) == len(found), "a row is stored twice"
    return by_key


def test_the_killed_trainings_were_killed_and_the_others_ended(codes: list[list[int]]) -> None:
    killed = -signal.SIGKILL
    assert codes[:5] == [[0], [killed], [killed], [0], [0]]
    for codes_of_killed in (codes[6], codes[9]):
        assert killed in codes_of_killed, "the first to come to the step takes the others' connections with it"
    assert [codes[5], codes[7], codes[8], codes[10]] == [[0] * 2, [0] * 2, [0] * 4, [0] * 4]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_training_has_the_losses_of_the_uninterrupted_one_to_the_last_bit(
    client: httpx.Client, codes: list[list[int]], ranks: int
) -> None:
    resumed, straight = (
        {
            key: row["value"].hex()
            for key, row in rows(client, run, "scalars", "rank", "step", "name").items()
            if key[2] != "brn/step_time_seconds"
        }
        for run in (the_run(client, f"resumed-{ranks}")["id"], f"straight-{ranks}")
    )
    assert {key for key in resumed if key[2] == "loss"} == {
        (rank, step, "loss") for rank in range(ranks) for step in range(STEPS)
    }
    assert {key[1] for key in resumed if key[2] == "eval_loss"} == {14, 29}
    assert resumed == straight


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_training_is_the_same_run_with_every_row_stored_once(
    client: httpx.Client, codes: list[list[int]], ranks: int
) -> None:
    run = the_run(client, f"resumed-{ranks}")
    assert (run["status"], run["last_step"], run["rows"]) == ("finished", STEPS - 1, ranks * STEPS * LAYERS)
    resumed = rows(client, run["id"], "layers", "rank", "step", "layer")
    straight = rows(client, f"straight-{ranks}", "layers", "rank", "step", "layer")
    assert resumed.keys() == straight.keys()
    for key, row in resumed.items():
        expected = straight[key]
        assert {name for name in row if row[name] is None} == {name for name in row if expected[name] is None}, key
        known = {name: value for name, value in row.items() if value is not None}
        # steps are reduced in groups, and sums of another group may differ in their last bit
        assert known == pytest.approx({name: expected[name] for name in known}, rel=1e-5, abs=1e-12, nan_ok=True), key


def test_why_a_run_failed_is_told_until_it_goes_on(client: httpx.Client, run_id: str) -> None:
    record = {"id": run_id, "name": "a run", "world_size": 2}
    client.post("/v1/runs", json=record).raise_for_status()
    client.patch(f"/v1/runs/{run_id}", json={"status": "failed", "failure": "rank 1 of 2 ended with SIGKILL"})
    failed = client.get(f"/v1/runs/{run_id}").json()
    assert (failed["state"], failed["failure"]) == ("failed", "rank 1 of 2 ended with SIGKILL")
    client.post("/v1/runs", json=record).raise_for_status()
    assert client.get(f"/v1/runs/{run_id}").json()["failure"] == ""


def test_a_run_says_what_all_its_ranks_dropped_in_whatever_order_they_end(client: httpx.Client, run_id: str) -> None:
    record = {"id": run_id, "name": "a run", "world_size": 3}

    def told(update: dict[str, object]) -> tuple[int, dict[str, int]]:
        answer = client.patch(f"/v1/runs/{run_id}", json=update).raise_for_status().json()
        return answer["dropped_steps"], answer.get("dropped_by_rank", {})

    client.post("/v1/runs", json=record).raise_for_status()
    assert told({"notes": "so far"}) == (0, {})
    assert told({"dropped_by_process": {"2": {"20": 4}}}) == (4, {"2": 4})
    client.post("/v1/runs", json=record).raise_for_status()  # rank 0 could not say it earlier
    for _ in range(2):  # said again, after an answer that was lost
        assert told({"status": "finished", "dropped_by_process": {"0": {"10": 3}}}) == (7, {"0": 3, "2": 4})
    assert told({"dropped_by_process": {"1": {"10": 1}}}) == (8, {"0": 3, "1": 1, "2": 4})


@pytest.mark.parametrize("status", ["running", "finished", "failed"])
def test_what_a_run_dropped_before_it_goes_on_stays_counted_and_nothing_is_counted_twice(
    client: httpx.Client, run_id: str, status: str
) -> None:
    record = {"id": run_id, "name": "a run", "world_size": 2}
    path = f"/v1/runs/{run_id}"

    def say(update: dict[str, object]) -> None:
        for _ in range(2):  # again, after an answer that was lost
            client.patch(path, json=update).raise_for_status()

    client.post("/v1/runs", json=record).raise_for_status()
    say({"dropped_by_process": {"1": {"20": 4}}})
    say({"status": status, "dropped_by_process": {"0": {"10": 3}}})
    for _ in range(2):
        known = client.post("/v1/runs", json=record).raise_for_status().json()
        assert (known["status"], known["dropped_steps"], known["dropped_by_rank"]) == ("running", 7, {"0": 3, "1": 4})
    say({"dropped_by_process": {"1": {"21": 2}}})  # each process counts from 0
    say({"status": "finished", "dropped_by_process": {"0": {"11": 5}}})
    say({"dropped_by_process": {"1": {"20": 6}}})  # and its last word may come late
    run = client.get(path).json()
    assert (run["dropped_steps"], run["dropped_by_rank"]) == (16, {"0": 8, "1": 8})
    assert run["dropped_by_process"] == {"0": {"10": 3, "11": 5}, "1": {"20": 6, "21": 2}}


@dataclass
class Lost:
    """A recorded step that no service takes."""

    step: int
    size_bytes: int = 1


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_resumed_training_adds_what_it_drops_to_what_was_dropped_before(
    client: httpx.Client, run_id: str, status: str
) -> None:
    registration = wire.RunCreate(id=run_id, name="a run", world_size=2)
    for process in range(3):
        for rank in range(2):
            sender = Client(str(client.base_url))
            shipper = Shipper[Lost](sender, registration, rank, lambda rows: b"no Arrow", spool=None)
            for step in range(process * (rank + 1)):  # the first drops nothing
                shipper.offer(Lost(step))
            assert shipper.close(end=wire.RunUpdate.model_validate({"status": status}))
            assert shipper.dropped == process * (rank + 1)
    run = client.get(f"/v1/runs/{run_id}").json()
    assert (run["status"], run["dropped_steps"], run["dropped_by_rank"]) == (status, 9, {"0": 3, "1": 6})
