"""What a training step costs, in counts that do not depend on the machine: passes, saved bytes, dispatches, syncs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brn_core.layers import BatchRenorm, BatchRenorm2d

torch.set_num_threads(1)

SHAPE = (8, 16, 12, 12)
LARGE = (4, 16, 96, 96)  # where batch statistics come from the samples
HOST_SYNCS = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.nonzero.default",
    "aten.is_nonzero.default",
}
VIEWS = ("detach.default", "view.default", "expand.default", "unbind.int", "permute.default", "unsqueeze.default")
FREE = {f"aten.{name}" for name in (*VIEWS, "squeeze.dim")}  # no kernel


class _Counting(TorchDispatchMode):
    """Names of all dispatched operators, and how often they read or write something as large as the activation."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names, self.passes = size, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func) not in FREE:
            self.names.append(str(func))
            large = [
                t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.numel() == self.size
            ]
            self.passes += len(large)
        return out


def _input(channels_last, dtype=torch.float32, shape=SHAPE):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


def _counted(layer, x):
    grad = torch.randn_like(x)
    layer(x).backward(grad)  # the first call may do more
    layer.zero_grad()
    x.grad = None
    with _Counting(x.numel()) as forward:
        y = layer(x)
    with _Counting(x.numel()) as backward:
        y.backward(grad)
    return forward, backward


@pytest.mark.parametrize("observe", [False, True])
def test_no_operator_of_a_training_step_waits_for_the_device(observe):
    layer = BatchRenorm2d(16, r_max=3.0, d_max=5.0, debias=True)
    layer.observe = observe
    for counted in _counted(layer, _input(channels_last=False)):
        assert not HOST_SYNCS & set(counted.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_activation_passes_through_memory_no_oftener_than_in_batch_norm(dtype):
    # Per operator's arguments: statistics 1 read; transform 1 read, 1 write; backward 2 reads (x, dy; the kernel makes
    # two rounds), 1 write.
    forward, backward = _counted(BatchRenorm2d(16), _input(channels_last=True, dtype=dtype))
    assert forward.passes == 3
    assert backward.passes == 3


@pytest.mark.parametrize("shape", [(8, 144, 16), (8, 12, 12, 16)])
def test_channels_in_the_last_dimension_are_read_where_they_are(shape):
    x = torch.randn(shape, requires_grad=True)
    forward, backward = _counted(BatchRenorm(16, axis=-1), x)
    assert forward.passes == 3
    assert backward.passes == 3
    assert "aten.clone.default" not in (*forward.names, *backward.names)


def test_large_contiguous_float_input_on_cpu_takes_its_statistics_from_the_samples_and_writes_once_more():
    forward, backward = _counted(BatchRenorm2d(16), _input(channels_last=False, shape=LARGE))
    assert "aten.native_group_norm.default" in forward.names
    assert forward.passes == 4
    assert backward.passes == 3


@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype", "more"),
    [
        (LARGE, False, torch.float32, 0),
        (LARGE, True, torch.float32, 0),
        (SHAPE, False, torch.float32, 2),  # the kernel for rows writes what nobody reads
        (SHAPE, False, torch.bfloat16, 1),
    ],
)
def test_observing_reads_the_activation_once_more_or_not_at_all(shape, channels_last, dtype, more):
    passes = []
    for observe in (False, True):
        layer = BatchRenorm2d(16)
        layer.observe = observe
        passes.append(_counted(layer, _input(channels_last, dtype, shape))[0].passes)
    assert passes[1] - passes[0] == more


@pytest.mark.parametrize("channels_last", [False, True])
def test_small_operators_around_the_kernels_stay_few(channels_last):
    forward, backward = _counted(BatchRenorm2d(16), _input(channels_last))
    assert len(forward.names) <= 16
    assert len(backward.names) <= 3
    forward, _ = _counted(BatchRenorm2d(16), _input(channels_last=False, shape=LARGE))
    assert len(forward.names) <= 22
    forward, _ = _counted(BatchRenorm2d(16), _input(channels_last, torch.bfloat16))
    assert len(forward.names) <= 17  # the buffer that has the kernel answer in float32


def test_observing_costs_two_small_operators_where_the_samples_moments_are_there_anyway():
    names = []
    for observe in (False, True):
        layer = BatchRenorm2d(16)
        layer.observe = observe
        names.append(_counted(layer, _input(channels_last=False, shape=LARGE))[0].names)
    assert len(names[1]) - len(names[0]) == 2  # one copy of mu and sigma, one of the limits


def test_small_contiguous_input_takes_its_statistics_from_the_samples_too():
    forward, _ = _counted(BatchRenorm2d(64), _input(channels_last=False, shape=(16, 64, 7, 7)))
    assert "aten.batch_norm_update_stats.default" in forward.names  # of the samples' moments
    assert "aten.mv.default" in forward.names


def test_what_is_saved_for_backward_is_the_input_and_a_few_vectors():
    def saved_bytes(layer, x):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            layer(x)
        return sum(storages.values())

    x = _input(channels_last=True)
    ours, batch_norm = saved_bytes(BatchRenorm2d(16), x), saved_bytes(nn.BatchNorm2d(16), x)
    assert ours <= x.nbytes + 7 * 16 * 4
    assert ours <= 1.01 * batch_norm
