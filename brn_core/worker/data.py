"""Images with labels, and samplers that decide which of them meet in a batch.

Batch statistics are made of what meets in a batch, so samplers are the experiment here: `IidBatchSampler` is the case
normalization was made for, `FewLabelsBatchSampler` one it was not. A sampler is an endless iterator of index tensors,
each rank its own; a batch is a pure function of (seed, rank, number of the batch), so a sampler's whole state is one
count and training resumes exactly.

Shapes: N samples of a split, B samples of a batch, C channels, H x W positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Split(Protocol):
    """Labelled images. Labels are in memory (samplers need them), images are fetched by the batch."""

    @property
    def labels_N(self) -> Tensor: ...  # noqa: N802

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 and labels (B,) int64, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """A training and a test split of images of one shape.

    Attributes:
        shape: (C, H, W) of every image.
        classes: number of labels; labels are 0 ... classes - 1.
    """

    name: str
    train: Split
    test: Split
    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """A split that is in memory as it is."""

    images_NCHW: Tensor
    labels_N: Tensor

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.images_NCHW[indices_B], self.labels_N[indices_B]


def digits() -> Dataset:
    """The 1,797 handwritten digits (8x8, one channel) that scikit-learn brings, standardized by the training split.

    Every fourth image is the test split: 1,347 train and 450 test images, the same on every machine for ever.
    Source: UCI Optical Recognition of Handwritten Digits (test part), through sklearn.datasets.load_digits.
    """
    from sklearn.datasets import load_digits  # half a second to import: only where it is used

    pixels, labels = load_digits(return_X_y=True)
    images_NCHW = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32))
    labels_N = torch.from_numpy(labels.astype(np.int64))
    is_test_N = torch.arange(len(labels_N)) % 4 == 0
    train_NCHW = images_NCHW[~is_test_N]
    images_NCHW = (images_NCHW - train_NCHW.mean()) / train_NCHW.std()
    return Dataset(
        name="digits",
        train=TensorSplit(images_NCHW[~is_test_N], labels_N[~is_test_N]),
        test=TensorSplit(images_NCHW[is_test_N], labels_N[is_test_N]),
        shape=(1, 8, 8),
        classes=10,
    )


@dataclass(frozen=True, slots=True)
class SyntheticSplit:
    """Images made when asked for: the smooth prototype of the label plus two of a few hundred noise images.

    Two noise images a sample give (pool size)² different images at the memory of one pool, so images may be large.
    """

    labels_N: Tensor
    prototypes_KCHW: Tensor
    noise_PCHW: Tensor
    noise_pair_N2: Tensor

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        labels_B = self.labels_N[indices_B]
        first_B, second_B = self.noise_pair_N2[indices_B].unbind(1)
        # each image is two independent standard normals: 1/sqrt(2) of their sum is one again
        noise_BCHW = (self.noise_PCHW[first_B] + self.noise_PCHW[second_B]) * 0.5**0.5
        return self.prototypes_KCHW[labels_B] + noise_BCHW, labels_B


def synthetic(
    shape: tuple[int, int, int] = (3, 32, 32),
    *,
    classes: int = 10,
    train_samples: int = 20_000,
    test_samples: int = 2_000,
    noise_images: int = 256,
    seed: int = 0,
) -> Dataset:
    """Labelled images of any shape, the same for the same arguments: for throughput, and for any number of classes.

    Raises:
        ValueError: a size that is not positive.
    """
    for name, value in [("classes", classes), ("train_samples", train_samples), ("test_samples", test_samples)]:
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (channels, height, width), each >= 1, got {shape}")
    generator = torch.Generator().manual_seed(seed)
    coarse_KCHW = torch.randn(classes, shape[0], 4, 4, generator=generator)
    prototypes_KCHW = torch.nn.functional.interpolate(coarse_KCHW, shape[1:], mode="bilinear", align_corners=True)
    noise_PCHW = torch.randn(noise_images, *shape, generator=generator)

    def split(samples: int) -> SyntheticSplit:
        return SyntheticSplit(
            labels_N=torch.randint(classes, (samples,), generator=generator),
            prototypes_KCHW=prototypes_KCHW,
            noise_PCHW=noise_PCHW,
            noise_pair_N2=torch.randint(noise_images, (samples, 2), generator=generator),
        )

    return Dataset("synthetic", split(train_samples), split(test_samples), shape, classes)


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


class IidBatchSampler(BatchSampler):
    """Random batches without replacement: in one epoch each index comes exactly once, on one of the ranks.

    The epochs' permutations stand one after the other in one stream; step by step the ranks take the next
    `world_size * batch_size` indices of it, alternating. Nothing is dropped or padded: the batch at the end of an
    epoch is filled from the next one.

    Args:
        samples: N, size of the split.
    """

    def __init__(self, samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(batch_size, rank=rank, world_size=world_size, seed=seed)
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self.samples = samples
        self._epoch, self._permutation_N = -1, np.empty(0, np.int64)

    def draw(self, number: int) -> NDArray[np.int64]:
        step_size = self.world_size * self.batch_size
        position_B = number * step_size + self.rank + self.world_size * np.arange(self.batch_size)
        epoch_B, within_B = np.divmod(position_B, self.samples)
        indices_B = np.empty(self.batch_size, np.int64)
        for epoch in range(epoch_B[0], epoch_B[-1] + 1):
            indices_B[epoch_B == epoch] = self._permutation(epoch)[within_B[epoch_B == epoch]]
        return indices_B

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation_N = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
        return self._permutation_N


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
        labels = labels_N.numpy()
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
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
