"""Image files on disk as data sets: CIFAR in its own format, and folders of images. Nothing is ever downloaded.

Shapes: N samples of a split, B samples of a batch, C channels, H x W positions.
"""

from __future__ import annotations

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from brn_core.worker.data import Dataset
from brn_core.worker.settings import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_CIFAR_SIZE: Final = 32
_CIFAR_MARGIN: Final = 4

_SUFFIXES: Final = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_CHANNEL_MEAN: Final = (0.485, 0.456, 0.406)  # of ImageNet, of pixels in [0, 1]
_CHANNEL_STD: Final = (0.229, 0.224, 0.225)
_CROP_AREA: Final = (0.08, 1.0)
_CROP_RATIO: Final = (3 / 4, 4 / 3)
_TEST_MARGIN: Final = 256 / 224
"""A test image's shorter side before the center crop, over the crop's: what ImageNet's numbers are quoted with."""


class DatasetNotFoundError(UsageError):
    """The files of a data set are not where they were looked for, or not what they should be."""


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def cifar10(folder: Path) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images, 3x32x32, ten classes.

    Training images are shifted by up to 4 pixels and mirrored at random, from torch's global generator.
    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; augmentation: He et al. 2015
    (arXiv 1512.03385), section 4.2.

    Args:
        folder: `cifar-10-batches-py` (the "python version" unpacked), or the folder that holds it.

    Raises:
        DatasetNotFoundError: a file is missing or is not of this format.
    """
    files = [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar("cifar10", folder, "cifar-10-batches-py", files, "test_batch", b"labels", classes=10)


def cifar100(folder: Path) -> Dataset:
    """CIFAR-100 with its 100 fine labels; see `cifar10`. The folder is `cifar-100-python`, or the one that holds it."""
    return _cifar("cifar100", folder, "cifar-100-python", ["train"], "test", b"fine_labels", classes=100)


@dataclass(frozen=True, slots=True)
class CifarSplit:
    """Bytes in memory; standardized, and augmented where they are trained on, by the batch."""

    pixels_NCHW: Tensor
    labels_N: Tensor
    mean_C: Tensor
    std_C: Tensor
    augmented: bool

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        images_BCHW = (self.pixels_NCHW[indices_B].float() - self.mean_C[:, None, None]) / self.std_C[:, None, None]
        return (shift_and_mirror(images_BCHW) if self.augmented else images_BCHW), self.labels_N[indices_B]


def shift_and_mirror(images_BCHW: Tensor, margin: int = _CIFAR_MARGIN) -> Tensor:
    """Each image shifted by -margin ... margin pixels both ways, zeros moving in, and mirrored half of the time."""
    samples, _, height, width = images_BCHW.shape
    top_B1, left_B1 = torch.randint(2 * margin + 1, (2, samples, 1))
    mirrored_B1 = torch.rand(samples, 1) < 0.5
    rows_BH = top_B1 + torch.arange(height)
    columns_BW = left_B1 + torch.arange(width)
    columns_BW = torch.where(mirrored_B1, columns_BW.flip(1), columns_BW)
    padded_BHWC = F.pad(images_BCHW, (margin,) * 4).permute(0, 2, 3, 1)
    picked_BHWC = padded_BHWC[torch.arange(samples)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
    return picked_BHWC.permute(0, 3, 1, 2).contiguous()


def _cifar(
    name: str, folder: Path, inner: str, train_files: list[str], test_file: str, label_key: bytes, *, classes: int
) -> Dataset:
    if not (folder / test_file).is_file():
        folder /= inner
    pixels, labels = zip(*(_read_cifar(folder / file, label_key, classes) for file in train_files), strict=True)
    train_NCHW = torch.from_numpy(np.concatenate(pixels))
    # by histogram: a float64 copy of 50,000 images would take 1.2 GB
    counts_CV = torch.stack([train_NCHW[:, channel].flatten().bincount(minlength=256) for channel in range(3)])
    value_V, share_CV = torch.arange(256).double(), counts_CV / counts_CV.sum(1, keepdim=True)
    mean_C = share_CV.double() @ value_V
    std_C = (share_CV.double() @ value_V.square() - mean_C.square()).sqrt().clamp(min=1)
    statistics = mean_C.float(), std_C.float()
    test_pixels, test_labels = _read_cifar(folder / test_file, label_key, classes)
    return Dataset(
        name=name,
        train=CifarSplit(train_NCHW, torch.from_numpy(np.concatenate(labels)), *statistics, augmented=True),
        test=CifarSplit(torch.from_numpy(test_pixels), torch.from_numpy(test_labels), *statistics, augmented=False),
        shape=(3, _CIFAR_SIZE, _CIFAR_SIZE),
        classes=classes,
    )


def _read_cifar(path: Path, label_key: bytes, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (N, 3, 32, 32) and labels (N,) of one file."""
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except FileNotFoundError:
        raise DatasetNotFoundError(
            f"there is no {path}; unpack the python version of CIFAR there, or name the folder that holds "
            f"{path.parent.name} with --data (nothing is downloaded)"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise DatasetNotFoundError(f"{path} is not a file of CIFAR's python version: {error}") from None
    try:
        pixels = np.ascontiguousarray(content[b"data"]).reshape(-1, 3, _CIFAR_SIZE, _CIFAR_SIZE)
        labels = np.asarray(content[label_key], np.int64)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DatasetNotFoundError(f"{path} is not a file of CIFAR's python version: {error}") from None
    if pixels.dtype != np.uint8 or labels.shape != pixels.shape[:1] or not ((labels >= 0) & (labels < classes)).all():
        raise DatasetNotFoundError(
            f"{path} should hold uint8 images and as many labels below {classes}, got {pixels.dtype} {pixels.shape} "
            f"and labels {labels.shape}"
        )
    return pixels, labels


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays out of a pickle and nothing else: a data set is no reason to run anybody's code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]  # as np.load does
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them in protocol 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- folders of images ------------------------------------------------------------------------------------------------


def image_folder(folder: Path, size: int) -> Dataset:
    """Images in `train/CLASS/...` and `val/CLASS/...` (or `test/CLASS/...`), cut to size x size; ImageNet's layout.

    A class is a folder of `train`, numbered in order of name. A training image is a random part (8 % to all of the
    area, ratio 3:4 to 4:3) scaled to size and mirrored half of the time, from torch's global generator; a test image
    is its middle. Source: Szegedy et al. 2014 (arXiv 1409.4842), section 6. Images are decoded by the batch, by
    threads; nothing is kept.

    Raises:
        DatasetNotFoundError: folders are missing or hold no image, or Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DatasetNotFoundError("reading image files needs Pillow: pip install pillow") from None
    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), folder / "val")
    for wanted in (folder / "train", test):
        if not wanted.is_dir():
            raise DatasetNotFoundError(
                f"there is no {wanted}; name a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg with --data"
            )
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    return Dataset(
        name="imagefolder",
        train=_folder_split(folder / "train", classes, size, augmented=True),
        test=_folder_split(test, classes, size, augmented=False),
        shape=(3, size, size),
        classes=len(classes),
    )


def _folder_split(folder: Path, classes: list[str], size: int, *, augmented: bool) -> FolderSplit:
    unknown = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(classes))
    if unknown:
        raise DatasetNotFoundError(f"{folder} has classes that train has not: {', '.join(unknown[:5])}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DatasetNotFoundError(f"{folder} holds no images in folders of classes ({', '.join(sorted(_SUFFIXES))})")
    return FolderSplit(tuple(paths), torch.tensor(labels), size, augmented)


@dataclass(frozen=True)
class FolderSplit:
    """Image files, decoded when asked for."""

    paths: tuple[Path, ...]
    labels_N: Tensor
    size: int
    augmented: bool

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="decode")

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        # drawn here, in order: threads would take from the generator in any
        draws_B4 = torch.rand(len(indices_B), 4).tolist() if self.augmented else [None] * len(indices_B)
        images = self._threads.map(self._image, indices_B.tolist(), draws_B4)
        return torch.stack(list(images)), self.labels_N[indices_B]

    def _image(self, index: int, draws: list[float] | None) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DatasetNotFoundError(f"{path} cannot be read as an image: {error}") from error
        cut = middle(rgb, self.size) if draws is None else random_part(rgb, self.size, *draws)
        pixels_CHW = torch.from_numpy(np.array(cut, np.uint8)).permute(2, 0, 1).float() / 255
        mean_C, std_C = torch.tensor(_CHANNEL_MEAN), torch.tensor(_CHANNEL_STD)
        return (pixels_CHW - mean_C[:, None, None]) / std_C[:, None, None]


def middle(image: Image, size: int) -> Image:
    """The central square whose side is 224/256 of the shorter side, scaled to size x size."""
    from PIL.Image import Resampling

    side = min(image.size) / _TEST_MARGIN
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + side, top + side), reducing_gap=3)


def random_part(image: Image, size: int, area: float, ratio: float, across: float, down: float) -> Image:
    """A part of the image, scaled to size x size and half of the time mirrored.

    The last four arguments are uniform in [0, 1). `across` draws two things: in which half it lies says whether to
    mirror, where in that half says where the part lies.
    """
    from PIL.Image import Resampling, Transpose

    pixels = image.width * image.height * (_CROP_AREA[0] + area * (_CROP_AREA[1] - _CROP_AREA[0]))
    shape = _CROP_RATIO[0] * (_CROP_RATIO[1] / _CROP_RATIO[0]) ** ratio
    width, height = min(image.width, (pixels * shape) ** 0.5), min(image.height, (pixels / shape) ** 0.5)
    mirrored, across = across >= 0.5, (2 * across) % 1
    left, top = (image.width - width) * across, (image.height - height) * down
    part = image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + width, top + height), reducing_gap=3)
    return part.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else part
