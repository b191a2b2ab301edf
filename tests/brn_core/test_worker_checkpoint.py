"""Checkpoints: what they refuse, and what a training does where one cannot be written."""

from __future__ import annotations

import logging
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_service import FakeService

from brn_core.journal import Journal
from brn_core.worker import checkpoint as module
from brn_core.worker import train as train_module
from brn_core.worker.checkpoint import random_state, restore_random_state
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import UsageError, parse_settings
from brn_core.worker.train import Outcome, train

COMMON = ["--device", "cpu", "--steps", "6", "--checkpoint-every", "4", "--eval-every", "0", "--record-every", "0"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *flags: str) -> Outcome:
    return train(parse_settings([*COMMON, "--checkpoint", str(folder), *flags]), Rank(), None)


def test_a_training_that_has_ended_is_evaluated_again_and_trains_nothing(tmp_path: Path) -> None:
    first = run(tmp_path / "new" / "folder")
    again = run(tmp_path / "new" / "folder", "--resume")
    assert (first.first_step, again.first_step) == (0, 6)
    assert again.evaluation == first.evaluation
    assert (again.train_loss, again.train_accuracy) == (first.train_loss, first.train_accuracy)


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    with FakeService() as service:
        run(tmp_path, "--record-every", "1", "--url", service.url, "--run-id", "r", "--spool", str(tmp_path / "spool"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(UsageError, match="holds a checkpoint at step 6 of run r: --resume goes on with it"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_amid_rows_that_are_repeated_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lr(step: int, *rest: float) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return real(step, *rest)  # type: ignore[arg-type]

    caplog.set_level(logging.INFO, "brn_core")
    real = train_module.cosine_lr
    spool = str(tmp_path / "spool")
    with FakeService() as service:
        flags = ["--record-every", "1", "--url", service.url, "--run-id", "r", "--spool", spool, "--steps", "12"]
        monkeypatch.setattr(train_module, "cosine_lr", lr)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *flags)
        monkeypatch.setattr(train_module, "cosine_lr", real)
        Journal(tmp_path / "journal-0", "r", 0).begin(2**60, 4, 6)  # and killed, before it was sent
        assert run(tmp_path, *flags, "--resume", "--checkpoint-every", "2").first_step == 4
        assert service.steps() == list(range(12))
        told = [r.getMessage() for r in caplog.records if "checkpoint at step" in r.getMessage()]
        assert told == ["checkpoint at step 6 is put off: rows of before the last kill are being repeated"]
        assert run(tmp_path, *flags, "--resume").first_step == 12


def test_another_training_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match=r"but lr was 0.05 and is 0.1, norm was 'brn' and is 'bn'; see"):
        run(tmp_path, "--resume", "--lr", "0.1", "--norm", "bn")
    with pytest.raises(UsageError, match="is of run None, got --run-id r: leave it out"):
        run(tmp_path, "--resume", "--run-id", "r")
    settings = parse_settings([*COMMON, "--checkpoint", str(tmp_path), "--resume"])
    with pytest.raises(UsageError, match="is of a training with 1 ranks, this one has 2"):
        module.Checkpoints(settings, Rank(0, 2, 0, 2))


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(UsageError, match=r"checkpoint.pt cannot be read: \w+: [^\n]*$"):
        run(tmp_path, "--resume")
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="of another version of brn-train"):
        run(tmp_path, "--resume")


def test_a_folder_that_cannot_be_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--checkpoint .*file/x: Not a directory; name another folder"):
        run(tmp_path / "file" / "x")


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "whole")
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the first checkpoint, without momentum, fits; writing the next one stops in the middle of the file
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 40_000, hard))
    try:
        with caplog.at_level(logging.ERROR):
            assert run(tmp_path / "cut").steps == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint at step 4 could not be written: [Errno 27] File too large; the one before" in caplog.text
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 0
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["checkpoint.pt"], "nothing half-written is left"


def test_every_random_generator_goes_on_where_it_was() -> None:
    torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    state = random_state()

    def draw() -> tuple[float, float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random(), random.gauss(0, 1)

    drawn = draw()
    assert draw() != drawn
    restore_random_state(state)
    assert draw() == drawn


def test_a_run_that_was_resumed_reads_only_data_from_the_file(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": 1, "step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        run(tmp_path, "--resume")
    assert not (tmp_path / "owned").exists()
