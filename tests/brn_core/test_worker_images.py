"""Image files on disk: CIFAR in its own format, folders of images."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brn_core.worker.images import (
    DatasetNotFoundError,
    cifar10,
    cifar100,
    image_folder,
    middle,
    random_part,
    shift_and_mirror,
)
from brn_core.worker.ranks import Rank
from brn_core.worker.settings import UsageError, parse_settings
from brn_core.worker.train import load_dataset, train


def python2_pickle(pixels_NP: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    """The stream Python 2's cPickle wrote into CIFAR's files: protocol 2, byte strings, numpy.core's arrays."""
    samples, length = pixels_NP.shape
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    number = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + number(samples) + number(length) + b"\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb\x89"
        b"T" + struct.pack("<i", pixels_NP.size) + pixels_NP.tobytes() + b"tb"
    )
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + listed + b"u."


def write_cifar10(folder: Path, write: Callable[..., bytes] = python2_pickle) -> np.ndarray:
    """Six files of 20 images; returns the pixels, training first."""
    folder.mkdir(parents=True)
    pixels_NP = np.random.default_rng(0).integers(256, size=(120, 3072)).astype(np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [int(label) for label in np.arange(20) % 10]
        (folder / name).write_bytes(write(pixels_NP[20 * i : 20 * (i + 1)], labels, b"labels"))
    return pixels_NP


def python3_pickle(pixels_NP: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    return pickle.dumps({b"data": pixels_NP, label_key: labels}, protocol=2)


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("named", ["the folder itself", "the folder above"])
def test_cifar10_is_read_from_its_own_format(tmp_path: Path, named: str, write: Callable[..., bytes]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    pixels_NCHW = write_cifar10(folder, write).reshape(120, 3, 32, 32).astype(np.float64)
    data = cifar10(folder if named == "the folder itself" else tmp_path)
    assert (data.shape, data.classes) == ((3, 32, 32), 10)
    assert (len(data.train.labels_N), len(data.test.labels_N)) == (100, 20)
    assert data.train.labels_N.tolist() == list(range(10)) * 10
    train_NCHW = pixels_NCHW[:100]
    mean_C, std_C = train_NCHW.mean((0, 2, 3)), train_NCHW.std((0, 2, 3))
    test_NCHW, labels_N = data.test.batch(torch.arange(20))
    expected = (pixels_NCHW[100:] - mean_C[:, None, None]) / std_C[:, None, None]
    np.testing.assert_allclose(test_NCHW.numpy(), expected, atol=1e-4)
    assert labels_N.tolist() == list(range(10)) * 2


def test_training_images_are_shifted_and_mirrored_and_a_seed_repeats_it(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    data = cifar10(tmp_path)
    torch.manual_seed(3)
    first_NCHW, _ = data.train.batch(torch.zeros(64, dtype=torch.int64))
    torch.manual_seed(3)
    again_NCHW, _ = data.train.batch(torch.zeros(64, dtype=torch.int64))
    assert torch.equal(first_NCHW, again_NCHW)
    assert len({tuple(image.flatten().tolist()) for image in first_NCHW}) > 40, "one image, 81 shifts, two sides"
    test_NCHW, _ = data.test.batch(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(test_NCHW[0], test_NCHW[1]), "test images are not"


def test_a_shift_moves_the_whole_image_and_lets_zeros_in() -> None:
    torch.manual_seed(0)
    image_CHW = torch.arange(1.0, 2 * 5 * 7 + 1).view(2, 5, 7)
    possible = {
        tuple(_moved(image_CHW, dy, dx, mirrored).flatten().tolist())
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        for mirrored in (False, True)
    }
    seen = {tuple(out.flatten().tolist()) for out in shift_and_mirror(image_CHW.expand(400, -1, -1, -1), margin=2)}
    assert len(possible) == 50
    assert seen == possible, "every shift of 5 x 5, on both sides, and nothing else"


def _moved(image_CHW: torch.Tensor, dy: int, dx: int, mirrored: bool) -> torch.Tensor:
    _, height, width = image_CHW.shape
    out_CHW = torch.zeros_like(image_CHW)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out_CHW[:, y, x] = image_CHW[:, y + dy, x + dx]
    return out_CHW.flip(2) if mirrored else out_CHW


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels_NP = np.zeros((200, 3072), np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(python2_pickle(pixels_NP, list(range(100)) * 2, b"fine_labels"))
    data = cifar100(tmp_path)
    assert data.classes == 100
    assert data.test.labels_N.tolist() == list(range(100)) * 2
    images_NCHW, _ = data.train.batch(torch.arange(3))
    assert images_NCHW.isfinite().all(), "one color only: its spread is no divisor"


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo run by a data set",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(_Evil()), "it asks for posix.system"),
        (b"<html>not found</html>", "is not a file of CIFAR's python version"),
        (b"", "is not a file of CIFAR's python version"),
        (pickle.dumps({b"labels": []}), "is not a file of CIFAR's python version: b'data'"),
        (python3_pickle(np.zeros((3, 3072), np.uint8), [1, 2], b"labels"), "as many labels below 10"),
        (python3_pickle(np.zeros((2, 3072), np.uint8), [1, 10], b"labels"), "as many labels below 10"),
        (python3_pickle(np.zeros((2, 3072)), [1, 2], b"labels"), "uint8 images"),
    ],
)
def test_a_file_that_is_not_cifar_is_refused_and_runs_nothing(
    tmp_path: Path, content: bytes, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(DatasetNotFoundError, match="data_batch_3") as caught:
        cifar10(tmp_path)
    assert said in str(caught.value)
    assert "run by" not in capfd.readouterr().out


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "imagefolder"])
def test_files_that_are_not_there_are_asked_for_and_never_downloaded(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UsageError, match=rf"--dataset {dataset}: there is no {tmp_path}.*--data"):
        load_dataset(parse_settings(["--dataset", dataset, "--data", str(tmp_path)]))


def write_images(folder: Path) -> None:
    """Two classes in both splits: red ones and blue ones, 30 x 20, one of them grey, one a file that is no image."""
    for split, count in (("train", 4), ("val", 2)):
        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            place = folder / split / name / "deep"
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (30, 20), color).save(place / f"{i}.png")
    Image.new("L", (9, 40), 128).save(folder / "train" / "red" / "grey.JPG", format="JPEG")
    (folder / "train" / "red" / "notes.txt").write_text("no image")


def test_a_folder_of_images_has_its_classes_by_name(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = image_folder(tmp_path, 8)
    assert (data.classes, data.shape) == (2, (3, 8, 8))
    assert data.train.labels_N.tolist() == [0] * 4 + [1] * 5
    images_NCHW, labels_N = data.test.batch(torch.tensor([0, 3]))
    assert labels_N.tolist() == [0, 1]
    # (0, 0, 1) and (1, 0, 0) less the mean of ImageNet's pixels, over their spread
    blue, red = torch.tensor([-2.1179, -2.0357, 2.64]), torch.tensor([2.2489, -2.0357, -1.8044])
    torch.testing.assert_close(
        images_NCHW, torch.stack([blue, red])[:, :, None, None].expand(2, 3, 8, 8).clone(), atol=1e-3, rtol=0
    )
    train_NCHW, _ = data.train.batch(torch.arange(9))
    assert train_NCHW.shape == (9, 3, 8, 8)
    assert train_NCHW.isfinite().all()


def test_a_test_image_is_the_middle_of_the_file() -> None:
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (16, 0, 48, 32))  # the middle half is white
    assert np.asarray(middle(image, 8)).min() == 255


def test_a_training_image_is_a_random_part_mirrored_half_of_the_time() -> None:
    columns = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    image = Image.fromarray(np.stack([columns] * 3, axis=2))
    whole = np.asarray(random_part(image, 64, 0.999999, 0.5, 0.2, 0.7))[:, :, 0]
    assert np.abs(whole.astype(int) - columns).max() <= 1, "all of the area, ratio 1: the image itself"
    left, right = (np.asarray(random_part(image, 8, 0.0, 0.5, across, 0.0))[0, :, 0] for across in (0.0, 0.499))
    assert left.max() < right.min(), "8 % of the area: the left and the right end"
    mirrored = np.asarray(random_part(image, 8, 0.0, 0.5, 0.5, 0.0))[0, :, 0]
    np.testing.assert_array_equal(mirrored, left[::-1])


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "train" / "red" / "grey.JPG").write_bytes(b"no image")
    data = image_folder(tmp_path, 8)
    flags = ["--dataset", "imagefolder", "--data", str(tmp_path), "--image-size", "8", "--batch-size", "9"]
    with pytest.raises(UsageError, match=r"grey\.JPG cannot be read as an image"):  # met in training: one line as well
        train(parse_settings([*flags, "--steps", "1", "--record-every", "0", "--device", "cpu"]), Rank())
    with pytest.raises(DatasetNotFoundError, match=r"grey\.JPG cannot be read as an image"):
        data.train.batch(torch.arange(9))
    (tmp_path / "val" / "green").mkdir()
    with pytest.raises(DatasetNotFoundError, match="has classes that train has not: green"):
        image_folder(tmp_path, 8)
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "val" / "a").mkdir(parents=True)
    with pytest.raises(DatasetNotFoundError, match="holds no images in folders of classes"):
        image_folder(tmp_path / "empty", 8)
