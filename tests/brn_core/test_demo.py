"""The demo's own decisions; the whole of it is `make demo ONCE=1`."""

import socket
from pathlib import Path

import pytest
from rich.console import Console

from brn_core.worker import demo
from brn_core.worker.findings import Diagnosis, Finding, Verdict
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import planned_limits


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = demo.free_port(port)
        assert other != port
    assert demo.free_port(other) == other, "a free port is kept"


def test_a_service_that_does_not_start_fails_the_demo_with_its_own_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("a file where the store's folder should be")
    assert demo.main(["--once", "--folder", str(tmp_path), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("demo: the service did not start: ")
    assert error.count("\n") == 1
    assert (tmp_path / "service.log").read_text().strip().splitlines()[-1] in error


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert demo.main(["--once", "--folder", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"demo: cannot write to {tmp_path / 'file'}: File exists; name another --folder\n"


def test_both_runs_are_long_enough_to_be_judged() -> None:
    for regime in demo.REGIMES:
        settings = parse_settings([*demo.training_flags(regime, "run", "http://127.0.0.1:1", Path("spool"))])
        limits = planned_limits(settings)
        time_constant = 1 / settings.norm_momentum
        assert settings.ranks == 2
        assert max(limits.r_steps, limits.d_steps) < settings.steps / 2, "most of the run has its final limits"
        # the gap is judged on 10 shadow passes after 25 time constants, clustering on windows of 400 steps
        assert (settings.steps - 25 * time_constant) / settings.shadow_every > 10
        assert settings.steps > 400


def test_the_comparison_names_each_run_its_accuracy_and_its_verdict() -> None:
    console = Console(width=100, record=True)
    finding = Finding(code="NH-CLUSTER", severity="warning", summary="Batches are not independent.")
    verdict = Verdict(code="NH-CLUSTER", severity="warning", summary="")
    demo.show(console, "digits, 2 labels a batch", 0.987, Diagnosis(step=9, verdict=verdict, findings=(finding,)))
    text = console.export_text()
    assert "digits, 2 labels a batch: test accuracy 98.7%, NH-CLUSTER" in text
    assert "WARNING NH-CLUSTER  Batches are not independent." in text
