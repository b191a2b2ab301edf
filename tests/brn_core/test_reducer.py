import threading

import pytest
import torch
from fake_service import eventually

from brn_core import reducer
from brn_core.capture import BatchNormMoments, Transfer
from brn_core.reducer import Frame, Reducer

torch.set_num_threads(1)


class _Shipper:
    """Takes what is offered, once it is allowed to."""

    def __init__(self):
        self.items, self.open = [], threading.Event()
        self.open.set()

    def offer(self, item):
        self.open.wait(30)
        self.items.append(item)
        return True


@pytest.fixture
def shipper():
    return _Shipper()


@pytest.fixture
def reduce(shipper):
    made = Reducer([1e-5], 1, shipper, lambda: made.dropped, flush_seconds=0.01)
    yield made
    shipper.open.set()
    assert made.close(5)


def _frame(step, samples=4):
    vectors = [torch.ones(8) for _ in range(2)]
    taken = BatchNormMoments(torch.randn(samples, 8), torch.rand(samples, 8), *vectors)
    return Frame(step, {0: taken}, Transfer([]), {"loss": float(step)}, False, 2 * taken.mean_NC.nbytes)


def test_what_waits_is_bounded_in_bytes_and_the_newest_is_dropped_and_counted(reduce, shipper, monkeypatch):
    size = 2 * 4 * 8 * 4  # two tables of 4 samples x 8 channels
    monkeypatch.setattr(reducer, "PENDING_BYTES", 10 * size)
    shipper.open.clear()
    reduce.offer(_frame(0))
    eventually(lambda: not reduce._frames)
    for step in range(1, 16):
        reduce.offer(_frame(step))
        assert reduce._bytes <= 10 * size
    assert reduce.dropped == 5
    shipper.open.set()
    eventually(lambda: len(shipper.items) == 11)
    assert [item.step for item in shipper.items] == list(range(11))
    assert reduce._bytes == 0


def test_one_step_is_taken_however_large_it_is(reduce, shipper, monkeypatch):
    monkeypatch.setattr(reducer, "PENDING_BYTES", 1)
    reduce.offer(_frame(0, samples=1000))
    eventually(lambda: len(shipper.items) == 1)
    assert reduce.dropped == 0


def test_a_step_that_cannot_be_reduced_is_dropped_alone_and_nothing_is_offered_twice(reduce, shipper, caplog):
    shipper.open.clear()
    reduce.offer(_frame(0))
    eventually(lambda: not reduce._frames)
    broken = _frame(2)
    broken.taken[0] = broken.taken[0]._replace(var_NC=torch.rand(3, 8))
    for frame in (_frame(1), broken, _frame(3)):
        reduce.offer(frame)
    shipper.open.set()
    eventually(lambda: len(shipper.items) == 3)
    assert [item.step for item in shipper.items] == [0, 1, 3]
    assert [len(item.layers) for item in shipper.items] == [1, 1, 1]
    assert reduce.dropped == 1
    assert len([r for r in caplog.records if "a recorded step is lost" in r.getMessage()]) == 1


def test_closing_reduces_what_waits_until_the_deadline_and_counts_the_rest(shipper):
    prompt = Reducer([1e-5], 1, shipper, lambda: 0, flush_seconds=60)
    for step in range(3):
        prompt.offer(_frame(step))
    assert prompt.close(5)
    assert [item.step for item in shipper.items] == [0, 1, 2]
    late = Reducer([1e-5], 1, shipper, lambda: 0, flush_seconds=60)
    for step in range(3):
        late.offer(_frame(step))
    assert late.close(0)
    assert late.dropped == 3


class _BrokenCopy(Transfer):
    """A copy whose device fails when asked whether it has arrived, or when it is read."""

    def __init__(self, where):
        super().__init__([])
        self.where = where

    def ready(self):
        if self.where == "ready":
            raise RuntimeError("broken on purpose")
        return True

    def arrays(self):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("where", ["ready", "arrays"])
def test_a_copy_that_fails_costs_its_own_step_only(reduce, shipper, where):
    for frame in (_frame(0), _frame(1)._replace(transfer=_BrokenCopy(where)), _frame(2)):
        reduce.offer(frame)
    eventually(lambda: len(shipper.items) == 2)
    assert [item.step for item in shipper.items] == [0, 2]
    assert reduce.dropped == 1
    reduce.offer(_frame(3))
    eventually(lambda: len(shipper.items) == 3)
    assert reduce._bytes == 0


def test_a_step_offered_after_the_end_is_counted(shipper):
    ended = Reducer([1e-5], 1, shipper, lambda: 0, flush_seconds=60)
    assert ended.close(5)
    ended.offer(_frame(0))
    assert ended.dropped == 1


def test_fast_steps_are_not_gathered_until_the_time_is_up(shipper, monkeypatch):
    monkeypatch.setattr(reducer, "_GATHER_SECONDS", 3600.0)
    patient = Reducer([1e-5], 1, shipper, lambda: 0, flush_seconds=3600)
    for step in range(reducer._GATHER_STEPS):
        patient.offer(_frame(step))
    eventually(lambda: len(shipper.items) == reducer._GATHER_STEPS)
    assert patient.close(5)
    assert patient.dropped == 0
