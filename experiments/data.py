"""The data sets of the experiments, as arrays in memory."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import pathlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

CACHE = pathlib.Path(__file__).parent / ".cache"
READ_AT_ONCE = 5_000
REACH_SECONDS = 3.0
ADVICE = "set TFDS_DATA_DIR to a folder with MNIST prepared as array_record, or use `--dataset digits`"
DIGITS_TEST_FRACTION = 0.5


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images, split into a part to train on and a part to test on.

    Attributes:
      name: what the data set is called.
      classes: how many classes there are; labels are `0 .. classes - 1`.
      train_images: values from 0 to 1.
      train_labels: the class of each training image.
      test_images: values from 0 to 1.
      test_labels: the class of each test image.
    """

    name: str
    classes: int
    train_images: Float32[np.ndarray, "train height width channels"]
    train_labels: Int32[np.ndarray, " train"]
    test_images: Float32[np.ndarray, "test height width channels"]
    test_labels: Int32[np.ndarray, " test"]


class DatasetUnavailableError(Exception):
    """A data set is neither on this machine nor to be had from here; the message says what to do."""


def load(name: str) -> Dataset:
    """Loads a data set by name.

    `digits` comes with scikit-learn: 1,797 images of 8x8 pixels, two thirds of them to train on (E. Alpaydin and
    C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998). `mnist` is read
    through tensorflow-datasets, from the folder that the environment variable `TFDS_DATA_DIR` names (Y. LeCun,
    C. Cortes and C. Burges, "The MNIST database of handwritten digits", 1998).

    Raises:
      ValueError: for another name.
      DatasetUnavailableError: when `mnist` is neither prepared on this machine nor to be had from here.

    Example:
      >>> load("digits").test_images.shape
      (599, 8, 8, 1)
    """
    loaders: dict[str, Callable[[], Dataset]] = {"digits": _load_digits, "mnist": _load_mnist}
    if name not in loaders:
        raise ValueError(f"`name` must be one of {', '.join(loaders)}, got {name!r}; use for example load('digits')")
    return loaders[name]()


def _load_digits() -> Dataset:
    import sklearn.datasets
    import sklearn.model_selection

    pixels, classes = sklearn.datasets.load_digits(return_X_y=True)
    images, labels = (pixels.reshape(-1, 8, 8, 1) / 16).astype(np.float32), classes.astype(np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_FRACTION, stratify=labels, random_state=0
    )
    return Dataset("digits", 10, images[train], labels[train], images[test], labels[test])


def _load_mnist() -> Dataset:
    cache = CACHE / "mnist.npz"
    if cache.exists():
        with np.load(cache) as file:
            arrays = dict(file)
    else:
        arrays = _read_mnist()
        _write_cache(cache, arrays)
    train_images, test_images = (arrays[part].astype(np.float32) / 255 for part in ("train_images", "test_images"))
    return Dataset("mnist", 10, train_images, arrays["train_labels"], test_images, arrays["test_labels"])


def _write_cache(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.npz")  # renamed when whole: a killed run leaves no half file to read
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def _read_mnist(*, train: str = "train", test: str = "test") -> dict[str, np.ndarray]:
    """MNIST, or slices of its two parts, as TFDS has it. To decode all of it takes seconds: it is kept."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetUnavailableError(
            "MNIST is read through tensorflow-datasets, which is not installed; "
            "run `pip install tensorflow-datasets pillow` or use `--dataset digits`"
        ) from error
    with _quiet("absl"):
        builder: Any = tfds.builder("mnist")
        if not builder.is_prepared():
            check_preparable(builder.URL, builder.data_dir)
            builder = tfds.builder("mnist", file_format="array_record")
            builder.download_and_prepare()
        arrays: dict[str, np.ndarray] = {}
        for part, split in (("train", train), ("test", test)):
            try:
                source = builder.as_data_source(split=split)
            except NotImplementedError as error:
                raise DatasetUnavailableError(
                    f"MNIST in {builder.data_dir} is in a format that only TensorFlow reads; {ADVICE}"
                ) from error
            arrays[f"{part}_images"], arrays[f"{part}_labels"] = _read_source(source)
    return arrays


def _read_source(source: Any) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int32[np.ndarray, " n"]]:
    starts = range(0, len(source), READ_AT_ONCE)
    batches = [source.__getitems__(range(i, min(i + READ_AT_ONCE, len(source)))) for i in starts]
    examples = [example for batch in batches for example in batch]
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.int32)


def check_preparable(url: str, folder: str | os.PathLike[str]) -> None:
    """Raises DatasetUnavailableError, at once, unless TFDS can download MNIST from `url` and write it to `folder`.

    Left to itself, TFDS retries for minutes before it says that there is no network, and says only after the
    download that it needs TensorFlow to write the files (not to read them).
    """
    needed = [name for name in ("tensorflow", "importlib_resources") if importlib.util.find_spec(name) is None]
    if needed:
        raise DatasetUnavailableError(
            f"MNIST is not prepared in {os.fspath(folder)}, and preparing it takes {' and '.join(needed)}; {ADVICE}"
        )
    if not is_reachable(url):
        raise DatasetUnavailableError(
            f"MNIST is not prepared in {os.fspath(folder)}, and {url} cannot be reached; {ADVICE}"
        )


def is_reachable(url: str, *, seconds: float = REACH_SECONDS) -> bool:
    """Whether the host of `url` answers within `seconds`, looking up its name included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError as error:  # an answer all the same
            error.close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(seconds)
    return answered.is_set()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps warnings of one logger off the terminal: TFDS warns that it decodes without OpenCV, which is harmless."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
