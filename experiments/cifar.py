"""CIFAR-10 as JPEG images, and the weights of a ResNet-20 trained on the images before they were compressed.

The project holds neither: `JAXVQ_CIFAR10_DIR` names a folder with `resnet20_cifar10.safetensors` (PyTorch names),
`cifar10_train5k_jpeg.npz` and `cifar10_test_jpeg.npz`.
"""

import os
import pathlib

import numpy as np
from jaxtyping import UInt8

from experiments.data import Dataset, DatasetUnavailableError

VARIABLE = "JAXVQ_CIFAR10_DIR"
WEIGHTS = "resnet20_cifar10.safetensors"
TRAIN = "cifar10_train5k_jpeg.npz"
TEST = "cifar10_test_jpeg.npz"
SIZE = 32
CLASSES = 10
SHIFT = 4
HELD_OUT = 5
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def folder() -> pathlib.Path:
    """The folder that `JAXVQ_CIFAR10_DIR` names.

    Raises:
      DatasetUnavailableError: when the variable is not set or a file is missing.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        raise DatasetUnavailableError(f"{VARIABLE} must name a folder with {WEIGHTS}, {TRAIN} and {TEST}, got nothing")
    path = pathlib.Path(name)
    missing = [file for file in (WEIGHTS, TRAIN, TEST) if not (path / file).is_file()]
    if missing:
        raise DatasetUnavailableError(f"{VARIABLE}: {path} has no {', '.join(missing)}; name the folder that has")
    return path


def cifar10() -> Dataset:
    """The 5,000 training and 10,000 test images, normalized as the weights expect.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Raises:
      DatasetUnavailableError: when the files are not there.
    """
    path = folder()
    parts: list[np.ndarray] = []
    for name in (TRAIN, TEST):
        with np.load(path / name) as file:
            parts += [normalize(file["images"]), file["labels"].astype(np.int32)]
    return Dataset("cifar10", CLASSES, *parts)


def weights() -> dict[str, np.ndarray]:
    """The tensors of the trained network, by their PyTorch names.

    Raises:
      DatasetUnavailableError: when the files are not there.
    """
    import safetensors.numpy

    return safetensors.numpy.load_file(folder() / WEIGHTS)


def synthetic(count: int) -> Dataset:
    """Images of noise in a colour that the label decides, to try a program with.

    Args:
      count: training images, and as many test images.
    """
    generator = np.random.default_rng(0)
    labels = np.arange(2 * count, dtype=np.int32) % CLASSES
    colours = np.stack([labels % 3, labels // 3 % 3, labels // 9], axis=-1).astype(np.uint8)
    noise = generator.integers(0, 100, (2 * count, SIZE, SIZE, 3), np.uint8)
    images = normalize(noise + 70 * colours[:, None, None, :])
    return Dataset("synthetic", CLASSES, images[:count], labels[:count], images[count:], labels[count:])


def held_out(dataset: Dataset) -> Dataset:
    """The training images alone: the last fifth tests and the others train, to choose settings by."""
    images, labels = dataset.train_images, dataset.train_labels
    count = len(labels) - len(labels) // HELD_OUT
    name = f"{dataset.name}, training images held out"
    return Dataset(name, dataset.classes, images[:count], labels[:count], images[count:], labels[count:])


def normalize(images: UInt8[np.ndarray, "n 32 32 3"]) -> np.ndarray:
    """RGB values from 0 to 255 to about zero mean and unit deviation."""
    return (images.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION


def augment(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each image shifted by up to four pixels each way, black beyond the border, and mirrored half the time.

    Args:
      images: `[n, 32, 32, 3]`, normalized.
      generator: draws the shifts.
    """
    count = len(images)
    black = np.broadcast_to(-MEAN / DEVIATION, (count, SIZE + 2 * SHIFT, SIZE + 2 * SHIFT, 3)).copy()
    black[:, SHIFT:-SHIFT, SHIFT:-SHIFT] = images
    top, left = generator.integers(0, 2 * SHIFT + 1, (2, count))
    rows = top[:, None] + np.arange(SIZE)
    columns = left[:, None] + np.arange(SIZE)
    mirrored = generator.random(count) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return black[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
