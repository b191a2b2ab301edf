"""Data sets and samplers: what a batch is made of."""

import itertools
from collections import Counter

import pytest
import torch

from brn_core.worker.data import BatchSampler, FewLabelsBatchSampler, IidBatchSampler, digits, synthetic


def first(sampler: BatchSampler, batches: int) -> list[list[int]]:
    return [indices_B.tolist() for indices_B in itertools.islice(sampler, batches)]


@pytest.mark.parametrize(("samples", "batch_size", "world_size"), [(1347, 32, 2), (12, 3, 2), (10, 4, 3), (5, 8, 1)])
def test_every_index_comes_once_an_epoch_over_all_ranks(samples: int, batch_size: int, world_size: int) -> None:
    epochs = batch_size * world_size  # so many epochs are a whole number of steps
    ranks = [IidBatchSampler(samples, batch_size, rank=r, world_size=world_size, seed=3) for r in range(world_size)]
    # in the order of the stream: step by step, alternating over the ranks
    stream = [
        index
        for batches in zip(*(first(rank, samples) for rank in ranks), strict=True)
        for indices in zip(*batches, strict=True)
        for index in indices
    ]
    assert len(stream) == samples * epochs
    orders = [stream[epoch * samples : (epoch + 1) * samples] for epoch in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(samples))
    assert orders[0] != orders[1], "each epoch is shuffled anew"


def test_a_small_split_serves_batches_that_span_several_epochs() -> None:
    (batch,) = first(IidBatchSampler(3, 9), 1)
    assert Counter(batch) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(("labels", "counts"), [(1, {32}), (2, {16}), (3, {10, 11}), (10, {3, 4})])
def test_few_labels_batches_hold_exactly_so_many_labels_in_equal_parts(labels: int, counts: set[int]) -> None:
    labels_N = torch.arange(1000) % 10
    chosen = set()
    for batch in first(FewLabelsBatchSampler(labels_N, 32, labels, seed=1), 60):
        found = Counter(labels_N[batch].tolist())
        assert len(batch) == 32
        assert len(found) == labels
        assert set(found.values()) <= counts
        assert len(set(batch)) == 32, "no index twice"
        chosen |= found.keys()
    assert chosen == set(range(10)), "over the batches every label has its turn"


def test_samples_of_a_label_do_not_stand_together() -> None:
    labels_N = torch.arange(1000) % 10
    sampler = FewLabelsBatchSampler(labels_N, 32, 2)
    neighbours = [
        bool(a == b) for batch in first(sampler, 200) for a, b in itertools.pairwise(labels_N[batch].tolist())
    ]
    # two labels x 16 in random order: a neighbour has the same label with probability 15/31; 6200 pairs, sd 0.6 %
    assert sum(neighbours) / len(neighbours) == pytest.approx(15 / 31, abs=0.03)


def test_a_label_with_too_few_samples_repeats_them() -> None:
    labels_N = torch.tensor([0] * 100 + [1] * 2)
    (batch,) = first(FewLabelsBatchSampler(labels_N, 10, 2), 1)
    assert Counter(labels_N[batch].tolist()) == {0: 5, 1: 5}


def make(kind: str, *, rank: int = 0, seed: int = 0) -> BatchSampler:
    if kind == "iid":
        return IidBatchSampler(100, 8, rank=rank, world_size=2, seed=seed)
    return FewLabelsBatchSampler(torch.arange(100) % 10, 8, 2, rank=rank, world_size=2, seed=seed)


@pytest.mark.parametrize("kind", ["iid", "few-labels"])
def test_a_seed_reproduces_the_batches_and_another_seed_or_rank_does_not(kind: str) -> None:
    assert first(make(kind, seed=5), 20) == first(make(kind, seed=5), 20)
    assert first(make(kind, seed=5), 20) != first(make(kind, seed=6), 20)
    assert first(make(kind, rank=0), 20) != first(make(kind, rank=1), 20)


@pytest.mark.parametrize("kind", ["iid", "few-labels"])
def test_a_sampler_goes_on_exactly_where_its_state_was_taken(kind: str) -> None:
    whole, resumed = make(kind), make(kind)
    first(whole, 17)
    resumed.load_state_dict(whole.state_dict())
    assert first(resumed, 20) == first(whole, 20)


def test_what_a_sampler_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        IidBatchSampler(10, 2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        IidBatchSampler(10, 0)
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        IidBatchSampler(0, 2)
    with pytest.raises(ValueError, match=r"labels_per_batch must be in \[1, 3\] \(3 labels, batches of 8\), got 4"):
        FewLabelsBatchSampler(torch.arange(9) % 3, 8, 4)


def test_digits_are_split_the_same_way_always() -> None:
    data = digits()
    assert (len(data.train.labels_N), len(data.test.labels_N)) == (1347, 450)
    images_NCHW, labels_N = data.train.batch(torch.arange(1347))
    assert images_NCHW.shape == (1347, *data.shape)
    assert images_NCHW.mean().item() == pytest.approx(0, abs=1e-5)
    assert images_NCHW.std().item() == pytest.approx(1, abs=1e-5)
    # the first ten images of the set are 0 ... 9; every fourth one, from the first, is a test image
    assert data.test.labels_N[:3].tolist() == [0, 4, 8]
    assert labels_N[:7].tolist() == [1, 2, 3, 5, 6, 7, 9]
    assert min(Counter(labels_N.tolist()).values()) > 100, "every class is well represented"


def test_synthetic_images_have_any_shape_and_their_label_shows() -> None:
    data = synthetic((2, 5, 9), classes=4, train_samples=600, test_samples=200)
    train_NCHW, train_N = data.train.batch(torch.arange(600))
    test_NCHW, test_N = data.test.batch(torch.arange(200))
    assert train_NCHW.shape == (600, 2, 5, 9)
    centres = torch.stack([train_NCHW[train_N == label].mean(0) for label in range(4)]).flatten(1)
    nearest = torch.cdist(test_NCHW.flatten(1), centres).argmin(1)
    assert (nearest == test_N).float().mean() > 0.9
    assert len({tuple(image.flatten().tolist()) for image in train_NCHW}) > 590, "images differ"
    again = synthetic((2, 5, 9), classes=4, train_samples=600, test_samples=200).train.batch(torch.arange(600))[0]
    assert torch.equal(train_NCHW, again)


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape must be \(channels, height, width\), each >= 1, got \(3, 0, 8\)"):
        synthetic((3, 0, 8))
    with pytest.raises(ValueError, match="classes must be >= 1, got 0"):
        synthetic(classes=0)
