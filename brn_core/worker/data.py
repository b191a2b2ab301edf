"""Images with labels.

Shapes: N samples of a split, B samples of a batch, C channels, H x W positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
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
class PairSplit:
    """Two images of another split as the channels of one: a sample is a pair of indices into `images_NCHW`."""

    images_NCHW: Tensor
    pair_M2: Tensor
    labels_N: Tensor

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        first_B, second_B = self.pair_M2[indices_B].unbind(1)
        return torch.cat([self.images_NCHW[first_B], self.images_NCHW[second_B]], dim=1), self.labels_N[indices_B]


def digit_pairs(*, train_samples: int = 20_000, test_samples: int = 2_000, seed: int = 0) -> Dataset:
    """The numbers 00 ... 99: two of the `digits` as two channels of one 8x8 image, labelled by both; 100 classes.

    Real images with as many labels as the paper's 16 x 2 batches need (ten are too few), made of nothing but digits.
    Pairs are drawn at random, of training digits for the training split and of test digits for the test split; the
    same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    single = digits()

    def split(of: Split, samples: int) -> PairSplit:
        images_NCHW, labels_N = of.batch(torch.arange(len(of.labels_N)))
        pair_M2 = torch.randint(len(labels_N), (samples, 2), generator=generator)
        tens_M, ones_M = labels_N[pair_M2].unbind(1)
        return PairSplit(images_NCHW, pair_M2, 10 * tens_M + ones_M)

    return Dataset("digit-pairs", split(single.train, train_samples), split(single.test, test_samples), (2, 8, 8), 100)


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
