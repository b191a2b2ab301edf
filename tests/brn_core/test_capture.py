import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brn_core.capture import BatchNormMoments, PinnedRing, Segment, Transfer, pack
from brn_core.functional import Observation
from brn_core.packer import ScalarGroup

torch.set_num_threads(1)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _batch_norm(dtype=torch.float32):
    vectors = [torch.ones(3, dtype=dtype) for _ in range(2)]
    return BatchNormMoments(torch.randn(4, 3, dtype=dtype), torch.rand(4, 3, dtype=dtype), *vectors)


def _batch_renorm(dtype=torch.float32):
    vectors = [torch.ones(3, dtype=dtype) for _ in range(4)]
    limits = [torch.tensor(1.0) for _ in range(3)]
    return Observation(torch.randn(4, 3, dtype=dtype), torch.rand(4, 3, dtype=dtype), *vectors, *limits)


@pytest.mark.parametrize("sample", [_batch_norm, _batch_renorm])
def test_packing_costs_the_same_few_operations_however_many_layers_there_are(sample):
    def operations(layers):
        taken = {i: sample() for i in range(layers)}
        with _Count() as count:
            pack({0: taken})
        return count.names

    few, many = operations(2), operations(20)
    assert few == many
    assert len(few) <= 25
    assert not {"aten._local_scalar_dense.default", "aten._to_copy.default"} & set(many)


def test_layers_that_differ_in_precision_are_packed_together():
    taken = {0: _batch_norm(), 1: _batch_norm(torch.float64), 2: _batch_norm()}
    (segment,) = pack({0: taken})
    assert segment.flat.dtype == torch.float32
    assert segment.flat.numel() == 7 * 9


def test_what_is_packed_does_not_change_with_what_it_was_packed_from():
    sample = _batch_renorm()
    (segment,) = pack({0: {0: sample}})
    before = segment.flat.clone()
    for tensor in sample:
        tensor.fill_(99.0)
    assert torch.equal(segment.flat, before)


def test_segments_of_one_device_travel_in_one_piece_and_come_apart_again():
    segments = [Segment(ScalarGroup((name,)), torch.full((size,), float(size))) for name, size in (("a", 2), ("b", 5))]
    transfer = Transfer.start(segments, {})
    assert transfer.size_bytes == 4 * 7
    assert transfer.ready()
    assert [(key.names, values.tolist()) for key, values in transfer.arrays()] == [
        (("a",), [2.0] * 2),
        (("b",), [5.0] * 5),
    ]
    assert Transfer.start([], {}).arrays() == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_ring_grows_with_the_steps_under_way_and_uses_its_buffers_again_after_reading():
    ring = PinnedRing()
    rings = {torch.device("cuda", 0): ring}
    segments = [Segment(ScalarGroup(("a",)), torch.ones(2, device="cuda:0"))]
    under_way = [Transfer.start(segments, rings) for _ in range(100)]
    torch.cuda.synchronize()
    assert [t.arrays()[0][1].tolist() for t in under_way] == [[1.0, 1.0]] * 100
    assert len(ring._free) == 100
    Transfer.start(segments, rings)
    assert len(ring._free) == 99
