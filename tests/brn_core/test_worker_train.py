"""brn-train: settings, the loop, ranks, and every way a run can end."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_service import FakeService, eventually
from rich.console import Console
from torch.nn import functional as F

from brn_core.worker.__main__ import main
from brn_core.worker.data import TensorSplit, digits
from brn_core.worker.findings import Diagnosis, Finding, Remedy, Verdict, print_diagnosis
from brn_core.worker.models import make_model, norm_factory
from brn_core.worker.progress import Progress, figures_text, rate_text, time_text
from brn_core.worker.ranks import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Rank
from brn_core.worker.settings import Settings, UsageError, parse_settings
from brn_core.worker.train import Evaluation, Outcome, cosine_lr, evaluate, planned_limits, train


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BRN_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def train_alone(*flags: str) -> Outcome:
    return train(parse_settings(["--device", "cpu", "--record-every", "0", *flags]), Rank(), None)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_flags_and_environment_agree_and_the_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRN_LABELS_PER_BATCH", "5")
    monkeypatch.setenv("BRN_LR", "0.25")
    monkeypatch.setenv("BRN_SERVICE_TOKEN", "of the service, not ours")
    settings = parse_settings(["--lr", "0.5", "--no-summary"])
    assert (settings.labels_per_batch, settings.lr, settings.summary, settings.token) == (5, 0.5, False, None)


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batchsize", "8"], "unrecognized arguments: --batchsize 8; did you mean --batch-size?"),
        (["--lr", "-1"], "--lr (BRN_LR): input should be greater than 0, got '-1'"),
        (["--lr", "nan"], "--lr (BRN_LR): input should be a finite number, got 'nan'"),
        (
            ["--norm", "ln"],
            "--norm (BRN_NORM): input should be 'bn', 'brn', 'syncbn', 'gn', 'frozen' or 'ema', got 'ln'",
        ),
        (["--norm", "gn", "--virtual-batch-size", "4"], "virtual_batch_size is for bn and brn, got norm gn"),
        (["--virtual-batch-size", "4", "--norm-sync", "moments"], "norm_sync moments joins batches: choose one"),
        (["--sampler", "rank-skewed"], "ranks can only differ in their labels where there are 2 to 10"),
        (["--sampler", "duplicates", "--copies", "5"], "copies must be >= 1 and divide the batch size 32, got 5"),
        (["--run-id", "a/b"], "--run-id (BRN_RUN_ID): must match"),
        (["--url", "localhost:8321"], "url must begin with http:// or https:// and a host, got 'localhost:8321'"),
        (["--sampler", "few-labels", "--batch-size", "1"], "labels_per_batch must be <= batch_size, got 2 labels in 1"),
        (["--sampler", "few-labels", "--labels-per-batch", "11"], "labels_per_batch must be in [1, 10]"),
        (["--bn-steps", "9", "--r-steps", "5"], "need 0 <= bn_steps <= r_steps"),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device"),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("brn-train: ")
    assert error.count("\n") == 1


def test_ranks_that_contradict_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--ranks", "3"]) == EXIT_USAGE
    assert "--ranks 3, but torchrun started 2" in capsys.readouterr().err


def test_a_process_of_torchrun_knows_its_rank() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Rank.from_environment(environment) == Rank(5, 8, 1, 4, "env://")
    assert Rank.from_environment({}) is None


def test_the_limits_open_after_five_time_constants_and_the_user_can_say_otherwise() -> None:
    default = planned_limits(parse_settings(["--steps", "600", "--norm-momentum", "0.1"]))
    assert default.bn_steps == 50
    assert default.d_steps <= default.r_steps <= 600
    chosen = planned_limits(parse_settings(["--bn-steps", "400", "--r-max", "2"]))
    assert (chosen.bn_steps, chosen.r_max) == (400, 2)
    assert chosen.limits(399) == (1, 0)


def test_secrets_are_not_stored_with_the_run() -> None:
    settings = parse_settings(["--token", "hush"])
    assert "hush" not in str(settings.recorded())
    assert "hush" not in repr(settings)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        ("bn",),
        ("brn",),
        ("syncbn",),
        ("bn", "--virtual-batch-size", "8"),
        ("brn", "--virtual-batch-size", "8"),
    ],
)
def test_thirty_steps_learn(norm: tuple[str, ...]) -> None:
    outcome = train_alone("--steps", "30", "--eval-every", "0", "--bn-steps", "10", "--lr", "0.1", "--norm", *norm)
    # before training: loss ln 10 = 2.3, one image in ten right
    assert outcome.train_loss < 2.0
    assert outcome.train_accuracy > 0.25
    assert outcome.evaluation.accuracy > 0.3


def test_group_normalization_learns_too_if_more_slowly() -> None:
    outcome = train_alone("--steps", "120", "--eval-every", "0", "--lr", "0.2", "--norm", "gn")
    assert outcome.evaluation.accuracy > 0.4


def test_frozen_statistics_stay_and_moving_averages_move_without_a_gradient() -> None:
    x_NCHW = torch.randn(8, 16, 4, 4) * 3 + 1
    frozen, ema = (norm_factory(kind, 0.1)(16) for kind in ("frozen", "ema"))
    torch.testing.assert_close(frozen(x_NCHW), x_NCHW)
    torch.testing.assert_close(ema(x_NCHW), x_NCHW, rtol=1e-4, atol=1e-4)  # mu, sigma from before this batch: 0, 1
    assert frozen.running_mean.abs().max() == 0
    torch.testing.assert_close(ema.running_mean, 0.1 * x_NCHW.mean((0, 2, 3)))
    x_NCHW.requires_grad_()
    ema(x_NCHW).sum().backward()  # batch normalization's gradient of a sum is zero: its statistics know of x
    assert x_NCHW.grad is not None
    assert (x_NCHW.grad > 0.3).all()


def test_a_microbatch_is_what_is_normalized_together() -> None:
    x_NCHW = torch.randn(32, 16, 4, 4)
    ghost = norm_factory("bn", 0.1, virtual_batch_size=4)(16)
    for part, whole in zip(ghost(x_NCHW).split(4), x_NCHW.split(4), strict=True):
        torch.testing.assert_close(part, F.batch_norm(whole, None, None, training=True), rtol=1e-4, atol=1e-4)


def test_a_seed_trains_the_same_network_and_evaluating_it_changes_nothing() -> None:
    flags = ["--steps", "12", "--bn-steps", "4", "--seed", "7"]
    first, second = train_alone(*flags, "--eval-every", "3"), train_alone(*flags, "--eval-every", "0")
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    other = train_alone("--steps", "12", "--bn-steps", "4", "--seed", "8")
    assert not torch.equal(other.model.head.weight, first.model.head.weight)


def test_a_rank_without_a_share_of_the_test_split_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("small", (1, 8, 8), 10, norm_factory("bn", 0.1))
    test = digits().test
    few = TensorSplit(*test.batch(torch.arange(2)))
    summed: list[list[float]] = []

    def two_from_the_others(totals: torch.Tensor) -> None:
        summed.append(totals.tolist())
        totals += torch.tensor([3.0, 1.0, 2.0])

    monkeypatch.setattr(torch.distributed, "all_reduce", two_from_the_others)
    assert evaluate(model, few, torch.device("cpu"), Rank(3, 4, 3, 4)) == Evaluation(loss=1.5, accuracy=0.5)
    assert summed == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("flags", "training", "test"),
    [
        (["--norm", "bn"], ", batch statistics)", "% (moving statistics), loss"),
        (["--norm", "gn"], " batches)", "%, loss"),
        (["--norm", "ema", "--weight-ema", "0.9"], " batches)", "% (weights averaged with decay 0.9), loss"),
    ],
)
def test_the_summary_names_the_statistics_that_were_used(
    flags: list[str], training: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--steps", "2", "--eval-every", "0", "--device", "cpu", "--record-every", "0", *flags]) == 0
    lines = {line.split(" ")[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert training in lines["training"]
    assert test in lines["test"]


def test_what_is_recorded_is_the_training_and_not_the_evaluation(tmp_path: Path) -> None:
    with FakeService() as service:
        flags = ["--steps", "10", "--eval-every", "5", "--url", service.url, "--spool", str(tmp_path), "--run-id", "r"]
        outcome = train(parse_settings(["--device", "cpu", "--shadow-every", "4", *flags]), Rank(), None)
        assert service.statuses == {"r": "finished"}
        rows = service.rows("layers")
        assert {row["samples"] for row in rows} == {32.0}, "the test split has other batches"
        assert [row["step"] for row in rows if row["layer"] == 0] == list(range(10))
        scalars = {(row["step"], row["name"]): row["value"] for row in service.rows("scalars")}
        assert [step for step, name in scalars if name == "eval_accuracy"] == [4, 9]
        assert scalars[9, "eval_accuracy"] == pytest.approx(outcome.evaluation.accuracy)
        assert scalars[9, "loss"] == pytest.approx(outcome.train_loss)
        assert scalars[0, "lr"] == pytest.approx(0.05)
        assert [step for step, name in scalars if name == "brn/shadow_eval_loss"] == [4, 8]
        run = service.runs["r"]
        assert run["planned_steps"] == 10
        assert run["schedule"]["bn_steps"] == 50
        assert run["config"]["sampler"] == "iid"
        assert (outcome.run_id, outcome.last_recorded_step, outcome.dropped_steps) == ("r", 9, 0)


def test_a_run_that_turns_nan_streams_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeService() as service:
        flags = ["--steps", "12", "--lr", "1e30", "--weight-decay", "0", "--run-id", "nan", "--device", "cpu"]
        code = main([*flags, "--url", service.url, "--spool", str(tmp_path), "--no-summary"])
        assert code == 0
        assert service.statuses == {"nan": "finished"}
        losses = {row["step"]: row["value"] for row in service.rows("scalars") if row["name"] == "loss"}
        assert math.isfinite(losses[0])
        assert math.isnan(losses[11])
        assert service.rows("layers")[-1]["nonfinite_channels"] > 0
    assert "step 12/12  loss nan" in capsys.readouterr().out


def test_without_a_service_the_rows_are_kept_and_the_way_to_send_them_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeService() as service:
        url = service.url  # nobody listens there any more
    flags = ["--steps", "3", "--eval-every", "0", "--device", "cpu", "--run-id", "late", "--run-name", "late"]
    assert main([*flags, "--url", url, "--spool", str(tmp_path)]) == 0
    assert f"python -m brn_core.spool {tmp_path} --url {url}" in capsys.readouterr().out
    assert list((tmp_path / "late" / "rank-0").glob("*.arrow"))


def test_the_learning_rate_falls_from_the_set_value_towards_zero() -> None:
    rates = [cosine_lr(step, 100, 0.4) for step in range(100)]
    assert rates[0] == 0.4
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.001
    assert rates[50] == pytest.approx(0.2)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_the_network_takes_images_of_any_size(size: int) -> None:
    model = make_model("small", (3, 8, 8), 5, norm_factory("brn", 0.1))
    logits_NK = model(torch.randn(4, 3, size, size))
    assert logits_NK.shape == (4, 5)
    F.cross_entropy(logits_NK, torch.zeros(4, dtype=torch.int64)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- several ranks ----------------------------------------------------------------------------------------------------

RANK_SCRIPT = """
import sys
import torch
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import train

rank, folder = int(sys.argv[1]), sys.argv[2]
common = ["--steps", "6", "--bn-steps", "2", "--record-every", "0", "--eval-every", "0", "--device", "cpu"]
for run, flags in enumerate(sys.argv[3:]):
    settings = parse_settings([*common, *flags.split()])
    outcome = train(settings, Rank(rank, 2, rank, 2, f"file://{folder}/rendezvous-{run}"), None)
    torch.save((outcome.model.state_dict(), torch.rand(8)), f"{folder}/{run}-{rank}.pt")
    print(outcome.evaluation.accuracy)
"""


def test_two_ranks_end_with_the_same_network_to_the_last_buffer(tmp_path: Path) -> None:
    runs = [
        "--sampler few-labels",
        "--sampler rank-skewed --norm bn",
        "--sampler rank-skewed --norm syncbn",
        "--sampler rank-skewed --norm brn --norm-sync moments",
        "--sampler rank-skewed --norm brn --virtual-batch-size 4",
        "--sampler rank-skewed --norm ema --lr 0.01",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RANK_SCRIPT, str(rank), str(tmp_path), *runs],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    accuracies = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert accuracies[0] == accuracies[1], "the test split is shared out and its totals are summed"
    for run, flags in enumerate(runs):
        (first, drawn), (second, drawn_by_second) = (torch.load(tmp_path / f"{run}-{rank}.pt") for rank in range(2))
        assert not torch.equal(drawn, drawn_by_second), "each rank augments, and drops out, by a chance of its own"
        assert any(name.endswith("running_mean") for name in first)
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} of {flags}"
    first, _ = torch.load(tmp_path / "0-0.pt")
    alone = train_alone("--steps", "6", "--bn-steps", "2", "--sampler", "few-labels").model.state_dict()
    assert not torch.equal(first["norm1.running_mean"], alone["norm1.running_mean"]), "rank 1 saw other batches"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks' process ids in /proc")
@pytest.mark.parametrize(("flag", "ranks", "dies"), [("2", 2, 1), ("0", 1, 0)])
def test_a_rank_that_dies_ends_the_run_with_one_line_that_names_it(
    tmp_path: Path, flag: str, ranks: int, dies: int
) -> None:
    why = f"rank {dies} of {ranks} ended with SIGKILL (out of memory?)"
    with FakeService() as service:
        flags = ["--ranks", flag, "--steps", "1000000", "--device", "cpu", "--dataset", "synthetic"]
        flags += ["--run-id", "r", "--spool", str(tmp_path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "brn_core.worker", *flags, "--url", service.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            eventually(
                lambda: process.poll() is not None or len({rank for _, rank, _ in list(service.batches)}) == ranks, 90
            )
            started = children(process.pid)
            os.kill(started[dies], signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()  # where something above failed: its ranks notice and end
        assert process.returncode == EXIT_FAILED
        assert f"brn-train: {why}; the run has ended" in output
        assert "Traceback" not in output
        assert not any(Path(f"/proc/{rank}").exists() for rank in started)
        assert service.statuses == {"r": "failed"}
        assert service.failures == {"r": why}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


DIES_IN_A_RUN_OF_ITS_OWN = """
import os, sys, time
from dataclasses import replace
from brn_core.worker.ranks import Rank
me = Rank.from_environment(os.environ)
replace(me, rank=0, world_size=1).announce(f"run-of-{me.rank}")
if me.rank == 1:
    os._exit(3)
time.sleep(100)
"""


def test_the_run_that_is_blamed_is_the_one_the_dead_rank_was_in() -> None:
    script = f"""
import sys
from brn_core.worker.ranks import launch
launch([sys.executable, "-c", {DIES_IN_A_RUN_OF_ITS_OWN!r}], 2, lambda run, why: print("blamed", run))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "blamed run-of-1\n", done.stderr


LAUNCH_SCRIPT = """
import sys
from brn_core.worker.ranks import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], 2))
"""


@contextmanager
def launched(rank_script: str) -> Iterator[subprocess.Popen[str]]:
    """The launcher in a process of its own (it handles signals), with ranks that need no torch."""
    command = [sys.executable, "-c", LAUNCH_SCRIPT, rank_script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ranks_are_told_who_they_are_and_their_success_is_the_runs() -> None:
    script = (
        "import os; e = os.environ; os.write(1, ' '.join([e['RANK'], e['WORLD_SIZE'], e['LOCAL_RANK'], '']).encode())"
    )
    with launched(script) as process:
        output, _ = process.communicate(timeout=60)
    assert output in ("0 2 0 1 2 1 ", "1 2 1 0 2 0 ")
    assert process.returncode == 0


def test_one_ranks_error_is_printed_once_and_ends_the_other() -> None:
    script = """
import os, sys, time
from brn_core.worker.ranks import Rank
rank = Rank.from_environment(os.environ)
if rank.rank == 1:
    rank.report_failure("the reason")
    sys.exit(1)
time.sleep(600)
"""
    with launched(script) as process:
        output, _ = process.communicate(timeout=60)
    lines = [line for line in output.splitlines() if "brn-train" in line or "reason" in line]
    assert lines == ["the reason", "brn-train: rank 1 of 2 ended with exit code 1; the run has ended"]
    assert process.returncode == EXIT_FAILED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once_and_lets_it_close(number: signal.Signals) -> None:
    script = """
import os, time
try:
    os.write(1, b"up\\n")  # one write a line: two ranks share the pipe
    time.sleep(600)
except KeyboardInterrupt:
    os.write(1, b"closed\\n")
    raise SystemExit(130)
"""
    with launched(script) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert output.splitlines() == ["closed", "closed"]
    assert process.returncode == EXIT_INTERRUPTED


def test_a_rank_whose_launcher_is_gone_knows_it() -> None:
    assert Rank(launcher=os.getppid()).launcher_alive()
    assert not Rank(launcher=os.getpid()).launcher_alive()
    assert Rank().launcher_alive()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_figures_are_asked_for_only_when_they_are_shown() -> None:
    console = Console(width=100, record=True)
    asked = []

    def figures() -> dict[str, float]:
        asked.append(1)
        return {"loss": 0.5, "clip": 0.25}

    with Progress(console, 1000) as progress:
        for done in range(1, 1001):
            progress.update(done, figures)
    lines = console.export_text().splitlines()
    assert len(lines) == len(asked) == 10
    assert lines[-1].startswith("step 1000/1000  loss 0.500  clip 25%")


def test_rate_and_time_left_are_those_of_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    console = Console(width=100, record=True)
    with Progress(console, 100, 50) as progress:  # resumed at 50
        for done in range(51, 101):
            clock[0] += 600 if done == 51 else 2  # the first one compiles
            progress.update(done, lambda: {"loss": 1.0})
    lines = console.export_text().splitlines()
    assert [line[:12] for line in lines] == [f"step {done:>3}/100" for done in (60, 70, 80, 90, 100)]
    assert lines[0] == "step  60/100  loss 1.000  2.0 s/it  1:20 left"


def test_rates_and_times_have_a_unit_that_fits() -> None:
    assert [rate_text(rate) for rate in (123.4, 12.3, 3.21, 0.4, 0.0)] == [
        "123 it/s",
        "12 it/s",
        "3.2 it/s",
        "2.5 s/it",
        "0.0 it/s",
    ]
    assert [time_text(seconds) for seconds in (4.21, 187, 3723)] == ["4.2 s", "3:07", "1:02:03"]


def test_unknown_figures_are_left_out() -> None:
    assert figures_text({}) == ""
    assert figures_text({"loss": math.nan, "r_max": 1.4}) == "loss nan  r_max 1.40"


@pytest.mark.parametrize("width", [80, 120])
def test_findings_show_the_worst_first_with_remedy_and_code_within_the_width(width: int) -> None:
    diagnosis = Diagnosis(
        step=9,
        verdict=Verdict(code="NH-X", severity="critical", summary="bad"),
        findings=(
            Finding(code="NH-I", severity="info", summary="a note"),
            Finding(
                code="NH-X",
                severity="critical",
                summary="It is [bad] " + "and long " * 30,
                remedy=Remedy(text="Mend it. " * 20, code="mend(model[0])"),
            ),
        ),
    )
    console = Console(width=width, record=True, force_terminal=False)
    print_diagnosis(console, diagnosis)
    lines = console.export_text().splitlines()
    assert lines[0].startswith("CRITICAL NH-X  It is [bad]"), "brackets are text, not markup"
    assert "    mend(model[0])" in lines
    assert lines[-1].strip() == "INFO NH-I  a note"
    assert max(map(len, lines)) <= width


def test_usage_errors_are_raised_before_anything_is_started() -> None:
    with pytest.raises(UsageError, match="--steps"):
        parse_settings(["--steps", "0"])
