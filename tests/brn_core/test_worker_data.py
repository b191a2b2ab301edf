"""Data sets and samplers: what a batch is made of."""

import itertools
from collections import Counter

import pytest
import torch

from brn_core.worker.data import digit_pairs, digits, synthetic
from brn_core.worker.samplers import (
    BatchSampler,
    DirichletBatchSampler,
    DuplicatesBatchSampler,
    FewLabelsBatchSampler,
    IidBatchSampler,
    LabelGroupsBatchSampler,
    RankSkewedBatchSampler,
    SortedBatchSampler,
)


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


def test_sixteen_by_two_is_sixteen_labels_with_two_samples_each() -> None:
    labels_N = torch.arange(1000) % 100
    chosen = set()
    for batch in first(LabelGroupsBatchSampler(labels_N, 32, 2, seed=1), 60):
        found = Counter(labels_N[batch].tolist())
        assert sorted(found.values()) == [2] * 16
        assert len(set(batch)) == 32, "no index twice"
        chosen |= found.keys()
    assert chosen == set(range(100)), "over the batches every label has its turn"


def test_groups_of_fewer_labels_than_groups_take_each_label_for_itself() -> None:
    labels_N = torch.arange(1000) % 10
    counts_BL = torch.stack(
        [labels_N[batch].bincount(minlength=10) for batch in first(LabelGroupsBatchSampler(labels_N, 32, 2), 400)]
    )
    assert (counts_BL % 2 == 0).all(), "labels come in twos"
    # 16 draws of 10 labels, 2 samples a draw: the count of a label is 2 Binomial(16, 0.1), its variance 5.76; of 4000
    # counts the standard error is 3 %
    assert counts_BL.double().var(unbiased=True).item() == pytest.approx(5.76, rel=0.15)


def test_sorted_batches_run_through_the_labels_one_after_the_other_every_epoch() -> None:
    labels_N = torch.arange(120) % 3
    epochs = torch.tensor(first(SortedBatchSampler(labels_N, 8), 30)).view(2, 120)
    for epoch in epochs:
        assert labels_N[epoch].tolist() == sorted(labels_N.tolist())
        assert sorted(epoch.tolist()) == list(range(120))
    assert epochs[0].tolist() != epochs[1].tolist(), "each label's samples are shuffled anew"


def test_a_shuffle_buffer_mixes_neighbours_only_and_a_full_one_mixes_all() -> None:
    labels_N = torch.arange(1000) // 100
    weak, full = (torch.tensor(first(SortedBatchSampler(labels_N, 10, buffer), 100)).flatten() for buffer in (50, 1000))
    for order in (weak, full):
        assert sorted(order.tolist()) == list(range(1000))
    assert labels_N[weak[:50]].max() <= 1, "label 2 begins at 200 of the stream and cannot be reached from its first 50"
    assert labels_N[weak[:50]].min() < labels_N[weak[-50:]].min()
    assert len(set(labels_N[full[:50]].tolist())) == 10


@pytest.mark.parametrize(("concentration", "few", "many"), [(0.05, 1, 4), (100.0, 8, 10)])
def test_dirichlet_batches_have_as_many_labels_as_their_concentration_says(
    concentration: float, few: int, many: int
) -> None:
    labels_N = torch.arange(1000) % 10
    batches = first(DirichletBatchSampler(labels_N, 32, concentration), 200)
    counts = [len(set(labels_N[batch].tolist())) for batch in batches]
    assert few <= sum(counts) / len(counts) <= many
    assert {label for batch in batches for label in labels_N[batch].tolist()} == set(range(10))


@pytest.mark.parametrize("own_share", [0.0, 0.8, 1.0])
def test_a_skewed_rank_sees_its_own_labels_that_often(own_share: float) -> None:
    labels_N = torch.arange(1000) % 10
    for rank in (0, 1):
        sampler = RankSkewedBatchSampler(labels_N, 50, own_share, rank=rank, world_size=2)
        seen = labels_N[torch.tensor(first(sampler, 100)).flatten()]
        own = (seen % 2 == rank).double().mean().item()  # labels are dealt out in turn; others come half the time
        assert own == pytest.approx(own_share + (1 - own_share) / 2, abs=0.03)  # sd 0.7 %


def test_every_sample_of_a_duplicates_batch_comes_so_many_times_and_not_in_a_row() -> None:
    batches = first(DuplicatesBatchSampler(1000, 32, 4), 50)
    for batch in batches:
        assert set(Counter(batch).values()) == {4}
    together = [a == b for batch in batches for a, b in itertools.pairwise(batch)]
    assert sum(together) / len(together) == pytest.approx(3 / 31, abs=0.03)


KINDS = ["iid", "few-labels", "label-groups", "sorted", "dirichlet", "rank-skewed", "duplicates"]


def make(kind: str, *, rank: int = 0, seed: int = 0) -> BatchSampler:
    labels_N = torch.arange(100) % 10
    match kind:
        case "iid":
            return IidBatchSampler(100, 8, rank=rank, world_size=2, seed=seed)
        case "few-labels":
            return FewLabelsBatchSampler(labels_N, 8, 2, rank=rank, world_size=2, seed=seed)
        case "label-groups":
            return LabelGroupsBatchSampler(labels_N, 8, 2, rank=rank, world_size=2, seed=seed)
        case "sorted":
            return SortedBatchSampler(labels_N, 8, 5, rank=rank, world_size=2, seed=seed)
        case "dirichlet":
            return DirichletBatchSampler(labels_N, 8, 0.3, rank=rank, world_size=2, seed=seed)
        case "rank-skewed":
            return RankSkewedBatchSampler(labels_N, 8, 0.5, rank=rank, world_size=2, seed=seed)
        case _:
            return DuplicatesBatchSampler(100, 8, 4, rank=rank, world_size=2, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_reproduces_the_batches_and_another_seed_or_rank_does_not(kind: str) -> None:
    assert first(make(kind, seed=5), 20) == first(make(kind, seed=5), 20)
    assert first(make(kind, seed=5), 20) != first(make(kind, seed=6), 20)
    assert first(make(kind, rank=0), 20) != first(make(kind, rank=1), 20)


@pytest.mark.parametrize("kind", KINDS)
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
    with pytest.raises(ValueError, match="group_size must be >= 1 and divide the batch size 8, got 3"):
        LabelGroupsBatchSampler(torch.arange(9) % 3, 8, 3)
    with pytest.raises(ValueError, match="shuffle_buffer must be >= 1, got 0"):
        SortedBatchSampler(torch.arange(9) % 3, 8, 0)
    with pytest.raises(ValueError, match="concentration must be > 0, got 0"):
        DirichletBatchSampler(torch.arange(9) % 3, 8, 0)
    with pytest.raises(ValueError, match=r"where there are 2 to 3 \(the number of labels\), got 1"):
        RankSkewedBatchSampler(torch.arange(9) % 3, 8)
    with pytest.raises(ValueError, match=r"own_share must be in \[0, 1\], got 2"):
        RankSkewedBatchSampler(torch.arange(9) % 3, 8, 2, world_size=2)
    with pytest.raises(ValueError, match="copies must be >= 1 and divide the batch size 8, got 3"):
        DuplicatesBatchSampler(9, 8, 3)


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


def test_digit_pairs_are_two_digits_with_a_label_of_both_and_splits_share_no_image() -> None:
    single, pairs = digits(), digit_pairs(train_samples=500, test_samples=300)
    assert (pairs.classes, pairs.shape) == (100, (2, 8, 8))
    for of, split in ((single.train, pairs.train), (single.test, pairs.test)):
        images_NCHW, labels_N = of.batch(torch.arange(len(of.labels_N)))
        label_of = {tuple(image.flatten().tolist()): int(k) for image, k in zip(images_NCHW, labels_N, strict=True)}
        for pair_CHW, label in zip(*split.batch(torch.arange(len(split.labels_N))), strict=True):
            tens, ones = (label_of[tuple(channel.flatten().tolist())] for channel in pair_CHW)
            assert label == 10 * tens + ones
    again = digit_pairs(train_samples=500, test_samples=300)
    assert torch.equal(again.train.labels_N, pairs.train.labels_N)


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
