"""Four ranks of brn-train over gloo: every way to share statistics, with batches that are and are not equally long."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from brn_core.worker.ranks import Rank
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import train

RANKS = 4
COMMON = ["--steps", "4", "--bn-steps", "1", "--r-steps", "3", "--d-steps", "2", "--record-every", "0"]
COMMON += ["--eval-every", "0", "--device", "cpu"]

RUNS = {
    "moments": ["--norm-sync", "moments", "--batch-size", "8"],
    "uneven ema": ["--norm-sync", "ema"],
    "uneven moments": ["--norm-sync", "moments"],
    "uneven none": ["--norm-sync", "none"],
}

# Ranks are forked from a process that has imported everything, which takes longer than to train.
SCRIPT = """
import json, os, sys, traceback, warnings
import sklearn.datasets, torch, torch._dynamo, torch.profiler
from brn_core.worker.ranks import Rank
from brn_core.worker.samplers import IidBatchSampler
from brn_core.worker.settings import parse_settings
from brn_core.worker.train import train

torch.set_num_threads(1)
folder, runs, ranks = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
draw = IidBatchSampler.draw

def uneven(self, number):  # what an epoch leaves: less on every rank, one sample on the last
    return draw(self, number)[: None if number % 2 == 0 else 1 + 5 * (ranks - 1 - self.rank)]

codes = []
for name, flags in runs.items():
    IidBatchSampler.draw = uneven if name.startswith("uneven") else draw
    if name.endswith("none"):
        warnings.simplefilter("ignore", UserWarning)  # that nobody shares the statistics: so it was asked for
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                meet = f"file://{folder}/meet-{name.replace(' ', '-')}"
                outcome = train(parse_settings(flags), Rank(rank, ranks, rank, ranks, meet), None)
                torch.save((outcome.evaluation.accuracy, outcome.model.state_dict()), f"{folder}/{name}-{rank}.pt")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(any(codes))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, dict[str, torch.Tensor]]]]:
    """Test accuracy and final state of each rank, by run."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {name: [*COMMON, *flags] for name, flags in RUNS.items()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BRN_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), json.dumps(runs), str(RANKS)],
        env=environment | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)] for name in RUNS}


@pytest.mark.parametrize("run", ["moments", "uneven ema", "uneven moments"])
def test_ranks_that_share_statistics_end_with_the_same_network_to_the_last_buffer(ended, run: str) -> None:
    (accuracy, first), *others = ended[run]
    for other_accuracy, other in others:
        assert other_accuracy == accuracy, "the test split is shared out unevenly, and its totals are summed"
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def test_ranks_that_share_no_statistics_share_the_weights_all_the_same(ended) -> None:
    (_, first), *others = ended["uneven none"]
    for _, other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]) != ("running_" in name), name


def test_four_ranks_that_normalize_together_train_as_one_with_the_whole_batch(ended) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train(parse_settings([*COMMON, "--batch-size", "32"]), Rank(), None)
    torch.set_num_threads(threads)
    accuracy, together = ended["moments"][0]
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert accuracy == pytest.approx(alone.evaluation.accuracy, abs=0.01)
