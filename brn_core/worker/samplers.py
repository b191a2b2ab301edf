"""Samplers: which samples meet in a batch. Batch statistics are made of what meets: samplers are the experiment here.

`IidBatchSampler` is the case normalization was made for; each of the others is one that users meet:

    FewLabelsBatchSampler     P labels x K samples of metric learning; all labels in equal parts is a stratified batch
    SortedBatchSampler        a data set stored class by class, with or without a shuffle buffer
    DirichletBatchSampler     label shares that change from batch to batch, as in federated learning and mined batches
    RankSkewedBatchSampler    shards: each rank sees mostly its own labels
    DuplicatesBatchSampler    every sample several times in a batch: repeated augmentation

A sampler is an endless iterator of index tensors, each rank its own; a batch is a pure function of (seed, rank, number
of the batch), so a sampler's whole state is one count and training resumes exactly.

Shapes: N samples of a split, B samples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BatchSampler(ABC):
    """An endless iterator of index tensors (B,), one a step, for one rank.

    Args:
        batch_size: B, indices a batch.
        rank: global rank that draws.
        world_size: ranks that draw side by side.
        seed: the same on every rank.

    Raises:
        ValueError: a batch size below 1, or a rank that is not in [0, world_size).
    """

    def __init__(self, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self._drawn = 0

    @abstractmethod
    def draw(self, number: int) -> NDArray[np.int64]:
        """Indices of this rank's batch `number` (0, 1, ...), a pure function of seed, rank and number."""

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        indices_B = torch.from_numpy(self.draw(self._drawn))
        self._drawn += 1
        return indices_B

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._drawn = state["drawn"]


class StreamBatchSampler(BatchSampler):
    """Batches cut from an endless stream of epochs that the ranks share.

    Step by step the ranks take the next `world_size * batch_size` indices of it, alternating. Nothing is dropped or
    padded: the batch at the end of an epoch is filled from the next one. In one epoch each index comes exactly once,
    on one of the ranks.

    Args:
        samples: N, size of the split.
    """

    def __init__(self, samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self.samples = samples
        self._epoch, self._order_N = -1, np.empty(0, np.int64)

    @abstractmethod
    def order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """A permutation of 0 ... N - 1: the next epoch."""

    def draw(self, number: int) -> NDArray[np.int64]:
        step_size = self.world_size * self.batch_size
        position_B = number * step_size + self.rank + self.world_size * np.arange(self.batch_size)
        epoch_B, within_B = np.divmod(position_B, self.samples)
        indices_B = np.empty(self.batch_size, np.int64)
        for epoch in range(epoch_B[0], epoch_B[-1] + 1):
            if epoch != self._epoch:
                self._epoch, self._order_N = epoch, self.order(np.random.default_rng((self.seed, epoch)))
            indices_B[epoch_B == epoch] = self._order_N[within_B[epoch_B == epoch]]
        return indices_B


class IidBatchSampler(StreamBatchSampler):
    """Random batches without replacement: each epoch is a new permutation."""

    def order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.permutation(self.samples)


class SortedBatchSampler(StreamBatchSampler):
    """Each epoch runs through the labels one after the other, read through a shuffle buffer.

    The buffer holds so many samples; one at random leaves it, the next of the sorted stream takes its place. A buffer
    of 1 shuffles nothing, one as large as the split everything.

    Args:
        labels_N: label of each sample of the split.
        shuffle_buffer: samples the buffer holds.

    Raises:
        ValueError: `shuffle_buffer` is below 1.
    """

    def __init__(
        self,
        labels_N: Tensor,
        batch_size: int,
        shuffle_buffer: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(len(labels_N), batch_size, rank=rank, world_size=world_size, seed=seed)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be >= 1, got {shuffle_buffer}")
        self.labels_N, self.shuffle_buffer = labels_N.numpy(), shuffle_buffer

    def order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        shuffled_N = rng.permutation(self.samples)
        sorted_N = shuffled_N[np.argsort(self.labels_N[shuffled_N], kind="stable")]
        buffer, rest = sorted_N[: self.shuffle_buffer].copy(), sorted_N[self.shuffle_buffer :]
        places = rng.integers(len(buffer), size=len(rest))
        order_N = np.empty(self.samples, np.int64)
        for i, (place, index) in enumerate(zip(places, rest, strict=True)):
            order_N[i], buffer[place] = buffer[place], index
        order_N[len(rest) :] = rng.permutation(buffer) if self.shuffle_buffer > 1 else buffer
        return order_N


class FewLabelsBatchSampler(BatchSampler):
    """Every batch holds exactly `labels_per_batch` random labels in equal parts (a remainder goes to the first).

    Samples stand in random order. Each rank draws for itself. No index comes twice in a batch, unless a label has too
    few samples.

    Args:
        labels_N: label of each sample of the split.

    Raises:
        ValueError: `labels_per_batch` is not in [1, number of labels], or above the batch size.
    """

    def __init__(
        self,
        labels_N: Tensor,
        batch_size: int,
        labels_per_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        self._members = _by_label(labels_N)
        if not 1 <= labels_per_batch <= min(len(self._members), batch_size):
            raise ValueError(
                f"labels_per_batch must be in [1, {min(len(self._members), batch_size)}] "
                f"({len(self._members)} labels, batches of {batch_size}), got {labels_per_batch}"
            )
        self.labels_per_batch = labels_per_batch

    def draw(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.rank, number))
        chosen = rng.choice(len(self._members), self.labels_per_batch, replace=False)
        parts = []
        for place, label in enumerate(chosen):
            members = self._members[label]
            count = self.batch_size // self.labels_per_batch + (place < self.batch_size % self.labels_per_batch)
            parts.append(rng.choice(members, count, replace=count > len(members)))
        return rng.permutation(np.concatenate(parts))


class LabelGroupsBatchSampler(BatchSampler):
    """Every batch holds groups of `group_size` samples that share a label: 16 x 2 is a batch of 32 in groups of 2.

    The groups' labels are distinct where there are enough labels, else each is drawn for itself. Samples stand in
    random order. Each rank draws for itself. No index comes twice in a group, unless its label has too few samples.
    Source: Ioffe 2017, section 4.3, and the batches of metric learning.

    Args:
        labels_N: label of each sample of the split.

    Raises:
        ValueError: `group_size` is below 1 or does not divide the batch size.
    """

    def __init__(
        self,
        labels_N: Tensor,
        batch_size: int,
        group_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if group_size < 1 or batch_size % group_size:
            raise ValueError(f"group_size must be >= 1 and divide the batch size {batch_size}, got {group_size}")
        self._members, self.group_size = _by_label(labels_N), group_size

    def draw(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.rank, number))
        groups = self.batch_size // self.group_size
        chosen = rng.choice(len(self._members), groups, replace=groups > len(self._members))
        members = [self._members[label] for label in chosen]
        parts = [rng.choice(of, self.group_size, replace=self.group_size > len(of)) for of in members]
        return rng.permutation(np.concatenate(parts))


class DirichletBatchSampler(BatchSampler):
    """The labels of every batch are drawn with shares of their own, from a symmetric Dirichlet distribution.

    Each rank draws for itself, samples of a label with replacement.

    Args:
        labels_N: label of each sample of the split.
        concentration: of the distribution; towards 0 a batch has one label, from about 10 on it is nearly i.i.d. with
            equal shares.

    Raises:
        ValueError: `concentration` is not positive.
    """

    def __init__(
        self,
        labels_N: Tensor,
        batch_size: int,
        concentration: float,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if not concentration > 0:
            raise ValueError(f"concentration must be > 0, got {concentration}")
        self._members, self.concentration = _by_label(labels_N), concentration

    def draw(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.rank, number))
        shares = rng.dirichlet(np.full(len(self._members), self.concentration))
        chosen_B = rng.choice(len(self._members), self.batch_size, p=shares)
        return np.array([rng.choice(self._members[label]) for label in chosen_B], np.int64)


class RankSkewedBatchSampler(BatchSampler):
    """Each sample is one of the rank's own labels with probability `own_share`, else any sample of the split.

    The labels are dealt out to the ranks in turn. Samples are drawn with replacement.

    Args:
        labels_N: label of each sample of the split.
        own_share: 0 is i.i.d., 1 one set of labels for each rank.

    Raises:
        ValueError: `own_share` is not in [0, 1], or there are fewer than two ranks, or fewer labels than ranks.
    """

    def __init__(
        self,
        labels_N: Tensor,
        batch_size: int,
        own_share: float = 1.0,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        members = _by_label(labels_N)
        if not 0 <= own_share <= 1:
            raise ValueError(f"own_share must be in [0, 1], got {own_share}")
        if not 2 <= world_size <= len(members):
            raise ValueError(
                f"ranks can only differ in their labels where there are 2 to {len(members)} (the number of labels), "
                f"got {world_size}"
            )
        self.samples, self.own_share, self._own = len(labels_N), own_share, np.concatenate(members[rank::world_size])

    def draw(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.rank, number))
        own_B = rng.choice(self._own, self.batch_size)
        return np.where(
            rng.random(self.batch_size) < self.own_share, own_B, rng.integers(self.samples, size=self.batch_size)
        )


class DuplicatesBatchSampler(BatchSampler):
    """Every batch holds each of its samples `copies` times, in random order; the samples are i.i.d.

    Args:
        samples: N, size of the split.

    Raises:
        ValueError: `copies` is below 1 or does not divide the batch size.
    """

    def __init__(
        self, samples: int, batch_size: int, copies: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if copies < 1 or batch_size % copies:
            raise ValueError(f"copies must be >= 1 and divide the batch size {batch_size}, got {copies}")
        self.copies = copies
        self._distinct = IidBatchSampler(samples, batch_size // copies, rank=rank, world_size=world_size, seed=seed)

    def draw(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.rank, number))
        return rng.permutation(np.repeat(self._distinct.draw(number), self.copies))


def _by_label(labels_N: Tensor) -> list[NDArray[np.int64]]:
    labels = labels_N.numpy()
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]
