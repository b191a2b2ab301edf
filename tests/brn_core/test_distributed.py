"""Several ranks over gloo: one group of three processes runs every check, so starting them is paid for once.

Run as a script, this file is one rank: processes that share nothing with the test's, whatever threads that one has.
"""

import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brn_core.layers import BatchRenorm1d
from brn_core.moments import batch_moments
from brn_core.statistics import average_statistics, update_statistics

WORLD = 3
SIZES = (5, 2, 0)  # samples a rank: uneven, and one rank without any


def _whole_batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), 4, 6, generator=g, dtype=torch.float64) * 3 + 2
    dy = torch.randn(sum(SIZES), 4, 6, generator=g, dtype=torch.float64)
    return x, dy, torch.rand(sum(SIZES), 6, generator=g) > 0.4


def _layer(**kwargs):
    layer = BatchRenorm1d(4, momentum=0.3, r_max=1.5, d_max=0.6, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0, 1.5]))
    return layer


def _slices():
    ends = torch.tensor(SIZES).cumsum(0).tolist()
    return [slice(end - n, end) for end, n in zip(ends, SIZES, strict=True)]


def _moments_equal_the_whole_batch(rank, masked):
    x, dy, mask = _whole_batch()
    mine = _slices()[rank]
    layer = _layer(sync="moments")
    layer.observe = True
    x_mine = x[mine].clone().requires_grad_()
    y = layer(x_mine, mask[mine] if masked else None)
    y.backward(dy[mine])
    grads = torch.stack((layer.weight.grad, layer.bias.grad))
    dist.all_reduce(grads)  # as DistributedDataParallel does

    whole, x_whole = _layer(), x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that ranks are not synced: here each has the whole batch
        y_whole = whole(x_whole, mask if masked else None)
    y_whole.backward(dy)
    for ours, theirs in (
        (y, y_whole[mine]),
        (x_mine.grad, x_whole.grad[mine]),
        (grads, torch.stack((whole.weight.grad, whole.bias.grad))),
        (layer.running_mean, whole.running_mean),
        (layer.running_std, whole.running_std),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # every rank observes the common statistics and its own samples
    torch.testing.assert_close(layer.observed.mu_B, batch_moments(x, mask[:, None] if masked else None).mean_C)


def moments_over_uneven_ranks_equal_the_whole_batch(rank):
    _moments_equal_the_whole_batch(rank, masked=False)


def masked_moments_over_uneven_ranks_equal_the_whole_batch(rank):
    _moments_equal_the_whole_batch(rank, masked=True)


class _Passes(TorchDispatchMode):
    """How often operators read or write something as large as the activation."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        large = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.numel() == self.size]
        self.count += 0 if func is torch.ops.aten.detach.default else len(large)  # no kernel
        return out


def the_synced_gradient_takes_the_kernels_and_one_line_in_x_more(rank):
    layer, x = _layer(sync="moments"), torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    with _Passes(x.numel()) as counted:
        y.backward(grad)
    # the kernel; two reads and a write; in place. The plain formula takes 18.
    assert counted.count <= 3 + 3 + 2, counted.count


def moments_have_no_second_derivative_and_say_so(rank):
    layer, x = _layer(sync="moments"), torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)


def one_sample_a_rank_is_enough_for_synced_moments(rank):
    x = torch.full((1, 4), float(rank), dtype=torch.float64)
    layer = _layer(sync="moments")
    layer(x)
    torch.testing.assert_close(layer.running_mean, torch.full((4,), 0.3 * 1.0, dtype=torch.float64))


def ema_moves_all_ranks_to_the_mean_of_their_updates_in_one_collective(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(_layer(sync="ema"), nn.Identity(), _layer(sync="ema"), _layer(sync="none"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            before = [m.running_std.clone() for m in model if isinstance(m, BatchRenorm1d)]
            model(torch.randn(4, 4, 3, dtype=torch.float64) * (rank + 1))
            own = [m.running_std.clone() for m in model if isinstance(m, BatchRenorm1d)]
            calls = _count_all_reduces(lambda: average_statistics(model))
    assert calls == 1
    expected = own[0].clone()
    dist.all_reduce(expected)
    torch.testing.assert_close(model[0].running_std, expected / WORLD)
    assert not torch.equal(own[0], before[0])
    assert torch.equal(model[3].running_std, own[2])  # sync="none" is left alone


def _count_all_reduces(call):
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    try:
        call()
    finally:
        dist.all_reduce = original
    return len(calls)


def ema_without_averaging_warns_and_says_what_to_call(rank):
    layer = BatchRenorm1d(2, sync="ema")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(150):
            layer(torch.randn(3, 2))
    assert len(caught) == 1
    assert "average_statistics" in str(caught[0].message)


def unsynced_ranks_warn_once_about_the_buffer_broadcast(rank):
    layer = BatchRenorm1d(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(3, 2))
        layer(torch.randn(3, 2))
    assert len(caught) == 1
    assert "broadcast buffers" in str(caught[0].message)


def _trained_in_ddp(rank, sync, broadcast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), _layer(sync=sync), nn.Linear(4, 1, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument has a new name from torch 2.13 on
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    torch.manual_seed(rank + 1)
    for _ in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(6, 3, dtype=torch.float64) + rank).pow(2).mean().backward()
        average_statistics(model)
        optimizer.step()
    return model


def ddp_with_broadcast_buffers_or_without_trains_the_same_when_synced(rank):
    for sync in ("moments", "ema"):
        states = [_trained_in_ddp(rank, sync, broadcast).state_dict() for broadcast in (True, False)]
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name])
            first = value.clone()
            dist.broadcast(first, 0)
            torch.testing.assert_close(value, first)  # and every rank holds the same


def update_statistics_pools_over_the_ranks(rank):
    x, _, _ = _whole_batch()
    model = nn.Sequential(_layer(sync="ema"))
    update_statistics(model, [x[_slices()[rank]]])
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2)))
    torch.testing.assert_close(model[0].running_std, (x.var((0, 2), correction=0) + 1e-5).sqrt())


CHECKS = (
    moments_over_uneven_ranks_equal_the_whole_batch,
    masked_moments_over_uneven_ranks_equal_the_whole_batch,
    the_synced_gradient_takes_the_kernels_and_one_line_in_x_more,
    moments_have_no_second_derivative_and_say_so,
    one_sample_a_rank_is_enough_for_synced_moments,
    ema_moves_all_ranks_to_the_mean_of_their_updates_in_one_collective,
    ema_without_averaging_warns_and_says_what_to_call,
    unsynced_ranks_warn_once_about_the_buffer_broadcast,
    ddp_with_broadcast_buffers_or_without_trains_the_same_when_synced,
    update_statistics_pools_over_the_ranks,
)


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    for check in CHECKS:
        outcome = ""
        try:
            check(rank)
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{check name: tracebacks of all ranks, "" if it holds}."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = "".join(process.communicate(timeout=120)[1] for process in ranks)
    finally:
        for process in ranks:
            process.kill()

    def outcome(name, rank):
        path = folder / f"{name}.{rank}"
        return path.read_text() if path.exists() else f"rank {rank} did not get there\n{errors}"

    return {c.__name__: "".join(outcome(c.__name__, rank) for rank in range(WORLD)) for c in CHECKS}


@pytest.mark.parametrize("check", [c.__name__ for c in CHECKS])
def test_over_three_ranks(outcomes, check):
    assert not outcomes[check], outcomes[check]


def test_synced_moments_without_a_process_group_say_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        BatchRenorm1d(2, sync="moments")(torch.randn(4, 2))


if __name__ == "__main__":
    _run_rank(int(sys.argv[1]), sys.argv[2])
