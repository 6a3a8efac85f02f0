import os
import sys
import urllib.request

import numpy as np
import pytest

from experiments import data


def test_digits_are_split_by_class_and_scaled_to_one():
    digits = data.load("digits")
    assert digits.train_images.shape == (898, 8, 8, 1)
    assert digits.test_images.shape == (899, 8, 8, 1)
    assert digits.train_images.dtype == np.float32
    assert digits.train_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    counts = [np.bincount(labels, minlength=10) for labels in (digits.train_labels, digits.test_labels)]
    assert np.abs(counts[0] - counts[1]).max() <= 1


def test_no_digit_is_in_both_parts_and_the_split_is_the_same_each_time():
    digits, again = data.load("digits"), data.load("digits")
    train, test = ({image.tobytes() for image in images} for images in (digits.train_images, digits.test_images))
    assert not train & test
    np.testing.assert_array_equal(digits.test_images, again.test_images)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"`name` must be one of digits, mnist, got 'cifar'"):
        data.load("cifar")


def test_unprepared_mnist_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(data, "is_reachable", lambda url: False)
    with pytest.raises(
        data.DatasetUnavailableError, match=r"mnist\.test/ cannot be reached.*--dataset digits"
    ) as caught:
        data.check_preparable("http://mnist.test/", "folder")
    assert "\n" not in str(caught.value)


def test_unprepared_mnist_says_what_preparing_needs(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None if name == "tensorflow" else object())
    with pytest.raises(
        data.DatasetUnavailableError, match=r"in folder, and preparing it takes tensorflow; .*TFDS_DATA_DIR"
    ):
        data.check_preparable("http://mnist.test/", "folder")


def test_preparable_where_everything_is_there(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(data, "is_reachable", lambda url: True)
    data.check_preparable("http://mnist.test/", "folder")


def test_mnist_without_tensorflow_datasets_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DatasetUnavailableError, match="pip install tensorflow-datasets"):
        data.load("mnist")


def test_a_host_that_does_not_answer_in_time_is_not_reachable(monkeypatch):
    def refuse(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert not data.is_reachable("http://mnist.test/", seconds=1)


def test_mnist_is_kept_and_read_again(monkeypatch, tmp_path):
    labels = np.array([3, 1, 4], np.int32)
    arrays = {"train_images": np.full((3, 28, 28, 1), 255, np.uint8), "train_labels": labels}
    arrays |= {"test_images": np.zeros((3, 28, 28, 1), np.uint8), "test_labels": labels}
    reads = []
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "_read_mnist", lambda: reads.append(1) or arrays)
    first, second = data.load("mnist"), data.load("mnist")
    assert len(reads) == 1
    assert second.train_images.max() == 1
    np.testing.assert_array_equal(first.train_images, second.train_images)
    np.testing.assert_array_equal(second.test_labels, labels)


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR names no folder with MNIST in it")
def test_mnist_is_read_in_the_order_it_is_prepared_in():
    mnist = data._read_mnist(train="train[:1000]", test="test[:1000]")
    assert (mnist["train_images"].shape, mnist["test_images"].shape) == ((1000, 28, 28, 1), (1000, 28, 28, 1))
    assert mnist["train_images"].dtype == np.uint8
    assert mnist["train_images"].max() == 255
    assert mnist["train_labels"][:10].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6]
    assert mnist["test_labels"][:10].tolist() == [2, 0, 4, 8, 7, 6, 0, 6, 3, 1]
