"""brn-train --paper: which runs it makes, the arithmetic of its table, and the whole of it in small."""

import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_service import FakeService
from scipy import stats
from torch import nn
from torch.nn import functional as F

from brn_core.layers import BatchRenorm2d
from brn_core.wire import RunCreate
from brn_core.worker.__main__ import main
from brn_core.worker.data import digits
from brn_core.worker.models import make_model, norm_factory
from brn_core.worker.paper import batch_statistics_accuracy, jobs, share
from brn_core.worker.paper_table import (
    NORMS,
    REGIMES,
    Result,
    Spread,
    chosen_regimes,
    from_json,
    markdown,
    paired_difference,
    select,
    to_json,
    verdict,
)
from brn_core.worker.ranks import EXIT_USAGE, Rank
from brn_core.worker.samplers import IidBatchSampler, RankSkewedBatchSampler
from brn_core.worker.settings import parse_settings

DOCS = Path(__file__).parents[2] / "docs"
STORED = sorted((DOCS / "paper").glob("*.json"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BRN_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def results_of(regime: str, norm: str, moving: list[float], batch: list[float] | None = None) -> list[Result]:
    return [
        Result(regime, norm, seed, value, None if batch is None else batch[seed], diverged=False, seconds=1.0)
        for seed, value in enumerate(moving)
    ]


# --- the table --------------------------------------------------------------------------------------------------------

BN, BN_BATCH = [0.701, 0.742, 0.733, 0.690, 0.755], [0.801, 0.812, 0.822, 0.795, 0.840]
BRN, BRN_BATCH = [0.781, 0.772, 0.790, 0.765, 0.801], [0.783, 0.770, 0.785, 0.770, 0.799]


def test_means_spreads_and_gaps_are_those_of_numpy() -> None:
    results = results_of("pairs", "bn", BN, BN_BATCH) + results_of("pairs", "brn", BRN, BRN_BATCH)
    rows = [line.split("|") for line in markdown(results[::-1], {"pairs": "16 x 2"}).splitlines() if "16 x 2 " in line]
    for cells, moving, batch in zip(rows[:2], (BN, BRN), (BN_BATCH, BRN_BATCH), strict=True):
        numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d", "|".join(cells[4:7]))]
        columns = [np.array(moving), np.array(batch), np.array(batch) - np.array(moving)]
        expected = [100 * value for column in columns for value in (column.mean(), column.std(ddof=1))]
        np.testing.assert_allclose(numbers, expected, atol=0.0501)
        assert cells[3].strip() == "5"


def test_a_difference_is_taken_seed_by_seed_and_its_interval_is_students() -> None:
    results = results_of("pairs", "bn", BN)[::-1] + results_of("pairs", "brn", BRN) + results_of("iid", "brn", [0.0])
    found = paired_difference(results, "pairs", "brn", "bn")
    reference = stats.ttest_rel(BRN, BN)
    interval = reference.confidence_interval(0.95)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(np.array(BRN) - BN))
    assert (found.mean - found.half_width(), found.mean + found.half_width()) == pytest.approx(tuple(interval))
    without_two = [result for result in results if (result.norm, result.seed) not in {("bn", 0), ("brn", 3)}]
    found = paired_difference(without_two, "pairs", "brn", "bn")
    assert found is not None
    assert (found.count, found.mean) == (3, pytest.approx(np.mean([BRN[i] - BN[i] for i in (1, 2, 4)])))
    assert paired_difference(results, "iid", "brn", "bn") is None, "nothing to compare with"


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.03, 0.05, 0.04, 0.06], "brn − bn = +4.5 ± 1.3 points: brn wins."),
        ([-0.03, -0.05, -0.04, -0.06], "brn − bn = -4.5 ± 1.3 points: brn does not win, bn does."),
        # 2.8 ± 3.3: more than its standard error of 1.7, less than the 3.2 of the t distribution times that
        ([-0.01, 0.02, 0.03, 0.07], "no difference that 4 seeds can show, so brn does not win."),
        ([-0.0001, -0.0002, 0.0002], "brn − bn = +0.0 ± 0.0 points: no difference"),
        ([0.5], "brn − bn = +50.0 points in one seed, which says nothing of chance."),
    ],
)
def test_who_wins_is_said_in_words(differences: list[float], said: str) -> None:
    assert said in verdict(Spread.of(differences), "brn", "bn")


def test_runs_that_diverged_count_and_are_named() -> None:
    results = [Result("iid", "ema", seed, 0.1, None, diverged=seed < 2, seconds=1.0) for seed in range(3)]
    (row,) = [line for line in markdown(results, {"iid": "i.i.d."}).splitlines() if "ema" in line and "|" in line]
    assert "10.0 ± 0.0 (2 diverged)" in row
    assert row.split("|")[5:7] == [cell for cell in row.split("|")[5:7] if cell.strip() == "–"], "no batch statistics"


def test_the_file_holds_every_result(tmp_path: Path) -> None:
    results, headings = results_of("pairs", "bn", BN, BN_BATCH) + results_of("iid", "ema", BRN), {"pairs": "16 x 2"}
    (tmp_path / "out.json").write_text(to_json(results, headings, {"minutes": 3.5}))
    assert from_json(tmp_path / "out.json") == (results, headings, {"minutes": 3.5})


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_documented_table_is_made_of_the_stored_results(path: Path) -> None:
    page = (DOCS / "paper.md").read_text()
    results, headings, about = from_json(path)
    assert markdown(results, headings) in page, f"paste what brn_core.worker.paper_table.markdown makes of {path.name}"
    assert f"{about['date']}, {about['minutes']:g} minutes" in page


def test_every_row_of_the_table_is_documented_with_five_seeds() -> None:
    stored = [from_json(path) for path in STORED]
    at_default = [result for results, _, about in stored if about["settings"]["lr"] == 0.05 for result in results]
    seeds = {(regime.name, norm): range(5) for regime in REGIMES for norm in regime.norms}
    assert {cell: [result.seed for result in select(at_default, *cell)] for cell in seeds} == {
        cell: list(five) for cell, five in seeds.items()
    }


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_every_normalization_of_a_regime_gets_the_same_settings_and_seeds() -> None:
    settings = parse_settings(["--paper", "--lr", "0.03", "--steps", "70", "--seeds", "3", "--seed", "4"])
    work = jobs(settings, chosen_regimes(settings, 2), "g")
    assert len(work) == 3 * sum(len(regime.norms) for regime in REGIMES)
    about_norm = {"norm", "norm_sync"}
    for regime in REGIMES:
        by_norm = {
            norm: [job.settings.training() for job in work if (job.regime, job.norm) == (regime, norm)]
            for norm in regime.norms
        }
        for runs in by_norm.values():
            assert [run["seed"] for run in runs] == [4, 5, 6]
            assert {run["lr"] for run in runs} == {0.03 * regime.lr_factor}
            for run, reference in zip(runs, by_norm["bn"], strict=True):
                assert {k: v for k, v in run.items() if k not in about_norm} == {
                    k: v for k, v in reference.items() if k not in about_norm
                }
    assert {job.settings.steps for job in work} == {70}
    assert {job.settings.record_every for job in work} == {0}, "no service was named"
    for job in work:
        assert {"norm": job.settings.norm, "norm_sync": job.settings.norm_sync}.items() >= NORMS[job.norm].items()


def test_recorded_runs_have_names_tags_and_ids_of_their_own() -> None:
    settings = parse_settings(["--paper", "--seeds", "2", "--url", "http://127.0.0.1:1"])
    work = jobs(settings, chosen_regimes(settings, 2), "group-1")
    ids = {job.settings.run_id for job in work}
    assert len(ids) == len(work)
    for job in work:
        tags = job.settings.tags.split(",")
        assert tags == ["paper", "group-1", job.regime.name, job.norm, f"seed {job.seed}"]
        RunCreate(id=job.settings.run_id or "", name=job.settings.name, tags=tuple(tags))
        assert job.settings.record_every == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--regimes", "iid,sixteen"], "--regimes: there is no 'sixteen'; there are all, iid, microbatch-4"),
        (
            ["--dataset", "synthetic", "--regimes", "many-class-iid"],
            "is for --dataset digits or cifar10, got synthetic",
        ),
        (["--regimes", "rank-labels", "--ranks", "1"], "--regimes rank-labels is about ranks: give --ranks 2\n"),
        (["--regimes", "iid", "--output", "table.txt"], "--output must end in .json or .md, got table.txt"),
        (["--checkpoint", "kept"], "paper trains many short runs and keeps no checkpoints"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--paper", "--device", "cpu", *arguments]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_under_torchrun_the_table_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--paper"]) == EXIT_USAGE
    assert "--paper starts its own ranks: give --ranks instead of torchrun" in capsys.readouterr().err


def test_what_data_set_or_ranks_do_not_allow_is_left_out_unless_it_was_named() -> None:
    every = {regime.name for regime in REGIMES}
    many_classes = {"many-class-iid", "many-class-pairs"}
    for flags, ranks, missing in (
        ([], 2, set()),
        (["--dataset", "synthetic"], 2, many_classes),
        ([], 1, {"rank-labels"}),
    ):
        found = chosen_regimes(parse_settings(["--paper", *flags]), ranks)
        assert every - {regime.name for regime in found} == missing


def test_files_that_a_later_regime_needs_are_asked_for_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = pickle.dumps({b"data": np.zeros((10, 3072), np.uint8), b"labels": list(range(10))}, protocol=2)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    flags = ["--regimes", "iid,many-class-iid", "--ranks", "1", "--steps", "2", "--seeds", "1", "--device", "cpu"]
    assert main(["--paper", "--dataset", "cifar10", "--data", str(tmp_path), *flags]) == EXIT_USAGE
    said = capsys.readouterr()
    assert f"--dataset cifar100: there is no {tmp_path / 'cifar-100-python'}" in said.err
    assert "seed 0" not in said.out, "nothing was trained"
    assert main(["--paper", "--dataset", "cifar10", "--data", str(tmp_path), *flags, "--regimes", "iid"]) == 0
    assert "| i.i.d., 32 | brn " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", "33"], "group_size must"),
        (["--output", "nowhere/table.json"], "--output nowhere/table.json: no file can be written there"),
    ],
)
def test_what_would_fail_in_the_end_is_said_before_anything_is_trained(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--paper", "--regimes", "iid,pairs", "--ranks", "1", "--steps", "2", "--seeds", "1", "--device", "cpu"]
    assert main([*common, *flags]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert said in captured.err
    assert "seed 0" not in captured.out


def test_a_rank_waits_for_one_that_still_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: waits.append(timeout))
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    share(Rank(0, 2, 0, 2, "file:///meet"), "results", 1)
    assert waits[0] > timedelta(days=1), "torch's own half an hour may pass while others train"


# --- batch statistics at test time ------------------------------------------------------------------------------------


def reference_accuracy(model: nn.Module, drawn: list[torch.Tensor]) -> float:
    """Share of right answers where each index tensor is one batch, normalized by F.batch_norm alone."""
    test, correct, samples = digits().test, 0, 0
    for indices_B in drawn:
        images_BCHW, labels_B = test.batch(indices_B)
        x = images_BCHW
        for conv, norm, pool in (("conv1", "norm1", 1), ("conv2", "norm2", 2), ("conv3", "norm3", 1)):
            layer = model.get_submodule(norm)
            x = F.conv2d(x, model.get_submodule(conv).weight, padding=1)
            x = F.max_pool2d(F.relu(F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)), pool)
        logits_BK = model.head(x.mean((2, 3)))
        correct += int((logits_BK.argmax(1) == labels_B).sum())
        samples += len(labels_B)
    return correct / samples


@pytest.mark.parametrize("norm", ["bn", "brn"])
def test_batch_statistics_are_the_batchs_own_and_leave_the_model_as_it_was(norm: str) -> None:
    torch.manual_seed(0)
    model = make_model("small", (1, 8, 8), 10, norm_factory(norm, 0.1))  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, BatchRenorm2d):
            module.set_limits(3, 5)  # wide open: r and d would pull to moving statistics that are far off
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = parse_settings(["--norm", norm, "--seed", "3"])
    found = batch_statistics_accuracy(model, settings, ranks=1)
    sampler = IidBatchSampler(450, 32, seed=3)
    batches = math.ceil(4 * 450 / 32)
    assert found == pytest.approx(reference_accuracy(model, [next(sampler) for _ in range(batches)]), abs=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("norm", "sync", "joined"), [("brn", "ema", False), ("brn", "moments", True)])
def test_ranks_are_normalized_together_where_training_did_so(norm: str, sync: str, joined: bool) -> None:
    torch.manual_seed(0)
    model = make_model("small", (1, 8, 8), 10, norm_factory("brn", 0.1, sync=sync, world_size=2))  # type: ignore[arg-type]
    settings = parse_settings(["--norm", norm, "--norm-sync", sync, "--sampler", "rank-skewed", "--seed", "1"])
    samplers = [
        RankSkewedBatchSampler(digits().test.labels_N, 32, 1.0, rank=rank, world_size=2, seed=1) for rank in (0, 1)
    ]
    drawn = [[next(sampler) for sampler in samplers] for _ in range(math.ceil(4 * 450 / 64))]
    batches = [torch.cat(pair) for pair in drawn] if joined else [batch for pair in drawn for batch in pair]
    found = batch_statistics_accuracy(model, settings, ranks=2)
    assert found == pytest.approx(reference_accuracy(model, batches), abs=1e-3)


@pytest.mark.parametrize("norm", ["ema", "frozen"])
def test_what_never_uses_the_batch_has_no_batch_statistics(norm: str) -> None:
    model = make_model("small", (1, 8, 8), 10, norm_factory(norm, 0.1))  # type: ignore[arg-type]
    assert batch_statistics_accuracy(model, parse_settings(["--norm", norm]), ranks=1) is None


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # three processes that import torch, and ranks that meet nine times
def test_the_whole_table_in_small_recorded_and_linked(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    with FakeService() as service:
        flags = ["--regimes", "two-labels,rank-labels", "--steps", "4", "--seeds", "1", "--device", "cpu"]
        places = ["--url", service.url, "--spool", str(tmp_path / "spool"), "--output", str(output), "--run-id", "g"]
        done = subprocess.run(
            [sys.executable, "-m", "brn_core.worker", "--paper", *flags, *places],
            check=False,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        cells = [(r.name, norm) for r in REGIMES if r.name in ("two-labels", "rank-labels") for norm in r.norms]
        ids = [f"g-{regime}-{norm}-0".replace(" ", "-") for regime, norm in cells]
        assert set(service.statuses.items()) == {(run_id, "finished") for run_id in ids}
        for (regime, norm), run_id in zip(cells, ids, strict=True):
            registered = service.runs[run_id]
            assert registered["tags"] == ["paper", "g", regime, norm, "seed 0"]
            assert registered["world_size"] == (2 if regime == "rank-labels" else 1)
        evaluated = [row["value"] for row in service.rows("scalars") if row["name"] == "eval_accuracy"]
    results, headings, about = from_json(output)
    assert {(result.regime, result.norm) for result in results} == set(cells)
    assert markdown(results, headings) in done.stdout
    assert about["ranks"] == 2
    for result in results:
        assert any(value == pytest.approx(result.moving) for value in evaluated)
    assert f"{service.url}/compare?runs={','.join(ids[:2])}\n" in done.stdout
    assert f"{service.url}/?tag=g\n" in done.stdout
