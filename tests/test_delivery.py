"""What becomes of recorded steps when something breaks: real trainer processes, real sockets, a real service.

Every case ends the same way: the losses are those of the unwatched training to the last bit, and the rows that are
stored are those that were produced, less the drops that were counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import FakeService, Fault
from small_trainer import LAYERS, losses_of, run
from test_end_to_end import eventually, free_port, get

from brn_core.drain import sync

STEPS = 120
KILLS = int(os.environ.get("BRN_TEST_KILLS", "3"))
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Makes processes quickly: they are forked from one that has torch loaded."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_trainer"])
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Losses of the unwatched training."""
    return losses_of(STEPS)[0]


@dataclass
class Case:
    """One watched training in a process of its own, against `url`."""

    processes: Any
    folder: Path
    url: str
    run_id: str
    steps: int = STEPS

    def start(self, name: str = "result", **how: Any) -> Any:
        record = {
            "url": self.url,
            "run_id": self.run_id,
            "spool": str(self.folder / "spool"),
            "flush_seconds": 0.02,
            **how.pop("record", {}),
        }
        process = self.processes.Process(
            target=run, args=(str(self.folder / name), self.steps, record), kwargs=how, daemon=True
        )
        process.start()
        return process

    def finish(self, process: Any, name: str = "result") -> dict[str, Any]:
        process.join(150)
        assert process.exitcode == 0
        result: dict[str, Any] = json.loads((self.folder / name).read_text())
        return result

    def sync(self, url: str | None = None) -> None:
        """As `brn-train --sync`: everything that is spooled can be sent, once."""
        if (self.folder / "spool").exists():
            assert sync(self.folder / "spool", url or self.url, None) == 0
        assert not list(self.folder.rglob("*.arrow"))


@pytest.fixture
def case(processes: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    return Case(processes, tmp_path, "", request.node.originalname[:60].replace("_", "-"))


def stored_steps(service: FakeService, rank: int | None = None) -> list[int]:
    """Steps in the order of their numbers, one entry a row of layers."""
    return sorted(row["step"] for row in service.rows("layers", rank))


def every_step(steps: int) -> list[int]:
    return sorted([*range(steps)] * LAYERS)


def test_a_service_that_is_down_from_the_start_gets_everything_later(case: Case, expected: list[str]) -> None:
    case.url = f"http://127.0.0.1:{free_port()}"
    result = case.finish(case.start())
    with FakeService() as service:
        case.sync(service.url)
        assert stored_steps(service) == every_step(STEPS)
        assert service.statuses == {case.run_id: "finished"}
    assert result == {"losses": expected, "dropped": 0}


def test_a_service_that_is_down_for_the_middle_third_gets_everything(case: Case, expected: list[str]) -> None:
    port = free_port()
    case.url = f"http://127.0.0.1:{port}"
    with FakeService(port=port) as first:
        process = case.start(step_seconds=0.01)
        eventually(lambda: len(first.steps()) >= STEPS // 3, "a third")
    eventually(lambda: list(case.folder.rglob("*.arrow")), "steps in the spool")
    with FakeService(port=port) as second:
        second.runs, second.statuses, second.batches = first.runs, first.statuses, first.batches
        result = case.finish(process)
        case.sync()
        assert stored_steps(second) == every_step(STEPS)
        assert second.statuses == {case.run_id: "finished"}
    assert result == {"losses": expected, "dropped": 0}


def test_answers_of_every_bad_kind_lose_nothing(case: Case) -> None:
    kinds = [
        Fault(500),
        Fault(429, {"Retry-After": "0"}),
        Fault(503, {"Retry-After": "0.05"}),
        Fault(503, delay_seconds=0.2),
        Fault(delay_seconds=0.2, hang_up=True),
        Fault(200, body=b"\x00\xff garbage"),
        Fault(200, body=b"{}"),
        Fault(302, {"Location": "/"}),
        Fault(hang_up=True),
    ]
    waiting = [fault for kind in kinds for fault in (kind, None)]  # each between batches that are taken

    def fault(method: str, path: str) -> Fault | None:
        return waiting.pop(0) if "batches" in path and waiting else None

    with FakeService(fault) as service:
        case.url, case.steps = service.url, 100_000
        stop = case.folder / "stop"
        process = case.start(step_seconds=0.01, stop=str(stop))
        eventually(lambda: not waiting, "every kind of answer")
        stop.touch()
        result = case.finish(process)
        case.sync()
        steps = len(result["losses"])
        assert stored_steps(service) == every_step(steps)
    assert result == {"losses": losses_of(steps)[0], "dropped": 0}


def test_a_full_disk_costs_the_steps_it_cannot_hold_and_says_how_many(case: Case, expected: list[str]) -> None:
    port = free_port()
    case.url = f"http://127.0.0.1:{port}"
    room = case.folder / "room"
    process = case.start(file_bytes=100, room_again=str(room), step_seconds=0.002)
    eventually(Path(f"{room}.waiting").exists, "lost steps")
    with FakeService(port=port) as service:
        room.touch()
        result = case.finish(process)
        case.sync()
        assert len(stored_steps(service)) == (STEPS - result["dropped"]) * LAYERS
        assert service.dropped == {case.run_id: result["dropped"]}
    assert result["losses"] == expected
    assert 0 < result["dropped"] < STEPS


def test_a_killed_trainer_leaves_all_but_its_last_moment_and_no_hole(case: Case, expected: list[str]) -> None:
    case.url, case.steps = f"http://127.0.0.1:{free_port()}", 100_000
    process = case.start(step_seconds=0.002)
    eventually(lambda: len(list(case.folder.rglob("*.arrow"))) >= 5, "batches in the spool")
    process.kill()
    process.join()
    with FakeService() as service:
        case.sync(service.url)
        steps = stored_steps(service)
        assert steps
        assert steps == every_step(steps[-1] + 1)
        losses = [row["value"].hex() for row in service.rows("scalars") if row["name"] == "loss"]
        assert losses[:STEPS] == expected[: len(losses)]


def test_a_process_forked_from_training_changes_nothing(case: Case, expected: list[str]) -> None:
    with FakeService() as service:
        case.url = service.url
        result = case.finish(case.start(forks_at=STEPS // 2, step_seconds=0.002))
        case.sync()
        assert stored_steps(service) == every_step(STEPS)
        assert service.duplicates == 0
    assert result == {"losses": expected, "dropped": 0}


def test_eight_ranks_at_once_are_all_stored(case: Case, expected: list[str]) -> None:
    with FakeService() as service:
        case.url = service.url
        ranks = [case.start(f"rank-{rank}", rank=(rank, 8)) for rank in range(8)]
        results = [case.finish(process, f"rank-{rank}") for rank, process in enumerate(ranks)]
        case.sync()
        for rank, result in enumerate(results):
            assert stored_steps(service, rank) == every_step(STEPS)
            assert result == {"losses": expected, "dropped": 0}
        assert service.statuses == {case.run_id: "finished"}


def test_what_any_rank_lost_to_refusals_is_counted_and_the_run_says_the_sum(case: Case, expected: list[str]) -> None:
    refusals = [Fault(422)] * 6

    def fault(method: str, path: str) -> Fault | None:
        return refusals.pop() if "batches" in path and refusals else None

    with FakeService(fault) as service:
        case.url = service.url
        ranks = [case.start(f"rank-{rank}", rank=(rank, 3), step_seconds=0.002) for rank in range(3)]
        results = [case.finish(process, f"rank-{rank}") for rank, process in enumerate(ranks)]
        for rank, result in enumerate(results):
            assert result["losses"] == expected
            assert len(stored_steps(service, rank)) == (STEPS - result["dropped"]) * LAYERS
        assert service.dropped == {case.run_id: sum(result["dropped"] for result in results)}
        assert service.dropped[case.run_id] >= 6


def test_a_clock_that_jumps_by_hours_moves_nothing(case: Case, expected: list[str]) -> None:
    with FakeService() as service:
        case.url = service.url
        for _ in range(2):  # and a run that goes on repeats no number
            result = case.finish(case.start(jumping_clock=True))
            assert result == {"losses": expected, "dropped": 0}
        case.sync()
        assert stored_steps(service) == sorted(2 * every_step(STEPS))
        assert service.duplicates == 0


def test_nan_and_infinity_everywhere_arrive(case: Case) -> None:
    with FakeService() as service:
        case.url = service.url
        result = case.finish(case.start(poisoned=True))
        case.sync()
        assert stored_steps(service) == every_step(STEPS)
        losses = [row["value"].hex() for row in service.rows("scalars") if row["name"] == "loss"]
        assert {row["value"] for row in service.rows("scalars") if row["name"] == "bad"} == {float("inf")}
    assert "nan" in result["losses"]
    assert result == {"losses": losses_of(STEPS, poisoned=True)[0], "dropped": 0}
    assert losses == result["losses"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_last_step_is_sent(
    case: Case, number: signal.Signals, expected: list[str]
) -> None:
    with FakeService() as service:
        record = {"url": service.url, "run_id": "r", "spool": str(case.folder / "spool"), "flush_seconds": 3600}
        how = {"result": str(case.folder / "result"), "steps": 10**6, "record": record, "step_seconds": 0.002}
        command = [sys.executable, str(TESTS / "small_trainer.py"), json.dumps(how)]
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            eventually(service.steps, "a full batch", 120)  # flushes by size only: the rest is in memory
            process.send_signal(number)
            try:
                assert process.wait(60) == -number
            finally:
                process.kill()
        steps = stored_steps(service)
        assert steps == every_step(steps[-1] + 1)
        assert (steps[-1] + 1) % 256, "what came after the last full batch is there too"
        assert service.statuses == {"r": "failed"}
        losses = [row["value"].hex() for row in service.rows("scalars") if row["name"] == "loss"]
        assert losses[:STEPS] == expected


@pytest.mark.timeout(600)
def test_a_service_killed_again_and_again_during_ingest_stores_every_row_once(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port, case.steps = free_port(), 100_000
    case.url = f"http://127.0.0.1:{port}"
    store = tmp_path_factory.mktemp("killed") / "store"
    command = [sys.executable, "-m", "service", "--port", str(port), "--store", f"chdb://{store}"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def rows() -> int:
        answer = httpx.get(f"{case.url}/v1/runs/{case.run_id}")
        return int(answer.json()["rows"]) if answer.is_success else -1

    with ExitStack() as stack:
        stop = case.folder / "stop"
        process = case.start(step_seconds=0.01, stop=str(stop))
        stored = 0
        for _ in range(KILLS):
            service = stack.enter_context(subprocess.Popen(command, **quiet))
            stack.callback(service.kill)
            eventually(lambda: rows() > stored, "more rows", 120)  # noqa: B023
            stored = rows()
            service.kill()
            service.wait()
        service = stack.enter_context(subprocess.Popen(command, **quiet))
        stack.callback(service.kill)
        eventually(lambda: rows() >= stored, "the last start", 120)
        stop.touch()
        result = case.finish(process)
        case.sync()
        steps = len(result["losses"])
        assert result["dropped"] == 0
        assert get(case.url, case.run_id)["rows"] == steps * LAYERS
        series = get(case.url, f"{case.run_id}/series?stat=samples&layer=0&points={steps}")
        assert series["steps"][-1] == steps - 1
    assert result["losses"] == losses_of(steps)[0]
