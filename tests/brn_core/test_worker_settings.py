"""Settings of brn-train from flags, environment and file; what is stored of where a run comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from brn_core.worker.__main__ import main
from brn_core.worker.provenance import provenance
from brn_core.worker.ranks import EXIT_USAGE
from brn_core.worker.settings import Settings, UsageError, parse_settings


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BRN_"):
            monkeypatch.delenv(name)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.yaml", "lr: 0.1\nbatch-size: 8\nsteps: 70\nweight_ema: 0.99\nchannels_last: true\n")
    monkeypatch.setenv("BRN_LR", "0.2")
    monkeypatch.setenv("BRN_BATCH_SIZE", "16")
    settings = parse_settings(["--config", path, "--lr", "0.3"])
    assert (settings.lr, settings.batch_size, settings.steps) == (0.3, 16, 70)
    assert (settings.weight_ema, settings.channels_last, settings.momentum) == (0.99, True, 0.9)


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRN_CONFIG", write(tmp_path / "a.yaml", "steps: 70"))
    assert parse_settings([]).steps == 70
    assert parse_settings([f"--config={write(tmp_path / 'b.yaml', '# nothing')}"]).steps == 1000


def test_dumped_settings_give_the_same_settings_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRN_TOKEN", "hush")
    flags = [
        "--sampler",
        "few-labels",
        "--lr",
        "1e-3",
        "--weight-decay",
        "0.0005",
        "--no-summary",
        "--run-name",
        "a: b",
    ]
    assert main([*flags, "--amp", "bf16", "--weight-ema", "0.999", "--dump-config"]) == 0
    dumped = capsys.readouterr().out
    assert "hush" not in dumped
    again = parse_settings(["--config", write(tmp_path / "a.yaml", dumped)])
    assert again.as_yaml() == dumped
    assert again.recorded() == parse_settings([*flags, "--amp", "bf16", "--weight-ema", "0.999"]).recorded()
    left_out = {"token", "sync", "config", "dump_config"} | {"url", "ranks"}  # nobody gave these two
    assert set(yaml.safe_load(dumped)) == Settings.model_fields.keys() - left_out


@pytest.mark.parametrize("given", [[], ["--ranks", "1", "--url", "http://host:1"]])
def test_a_dumped_table_has_as_many_ranks_and_is_recorded_as_before(tmp_path: Path, given: list[str]) -> None:
    settings = parse_settings(["--paper", "--device", "cpu", *given])
    again = parse_settings(["--config", write(tmp_path / "a.yaml", settings.as_yaml())])
    for name in ("ranks", "url"):  # what is not said, --paper decides
        assert (name in again.model_fields_set) == (name in settings.model_fields_set)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("batchsize: 8", "a.yaml: unknown setting batchsize; did you mean batch_size?"),
        ("dump_config: true", "a.yaml: unknown setting dump_config"),
        ("lr: fast", "--lr (BRN_LR): input should be a valid number, unable to parse string as a number, got 'fast'"),
        ("[1, 2]", "a.yaml must be lines of `setting: value`, got a list"),
        ("a: [", "a.yaml is not YAML: while parsing"),
        ("\x80", "a.yaml is not YAML"),
        (None, "a.yaml: No such file or directory"),
        ("resume: true", "resume goes on from a checkpoint: name its folder with --checkpoint"),
        ("steps: 5\nwarmup_steps: 5", "warmup_steps must be below steps, got 5 of 5"),
        ("paper: true\ncheckpoint: x", "paper trains many short runs and keeps no checkpoints"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert main(["--config", str(path)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_decides_the_training_is_apart_from_where_it_is_kept(tmp_path: Path) -> None:
    here = parse_settings(["--checkpoint", str(tmp_path), "--device", "cpu", "--url", "http://a", "--ranks", "2"])
    there = parse_settings(["--spool", "x", "--no-summary", "--run-id", "r"])
    assert here.training() == there.training()
    assert parse_settings(["--lr", "0.1"]).training() != here.training()
    assert not {"checkpoint", "token", "url"} & here.recorded().keys()


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_run_knows_the_revision_it_was_started_from_and_whether_that_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known() -> tuple[Any, Any]:
        found = provenance(torch.device("cpu"))
        return found["git_revision"], found["git_dirty"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert known() == (None, None)
    git(tmp_path, "init")
    assert known() == (None, None), "no commit yet"
    (tmp_path / "model.py").write_text("1")
    git(tmp_path, "add", "model.py")
    git(tmp_path, "commit", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert known() == (revision, False)
    (tmp_path / "model.py").write_text("2")
    assert known() == (revision, True)


def test_versions_and_device_are_known_where_git_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = provenance(torch.device("cpu"))
    assert (found["git_revision"], found["git_dirty"]) == (None, None)
    assert found["torch_version"] == torch.__version__
    assert found["device_name"]


def test_a_password_in_the_url_is_not_shown_in_errors_and_written_files() -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(["--url", "ftp://me:hunter22@host"])
    assert "hunter22" not in str(caught.value)
    assert "url: http://host:1\n" in parse_settings(["--url", "http://me:hunter22@host:1"]).as_yaml()
