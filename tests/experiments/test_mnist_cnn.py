import dataclasses

import jax
import numpy as np
import pytest

from experiments import mnist_cnn, train
from experiments.data import Dataset

CONFIG = train.TrainConfig(
    channels=(8, 8, 8), hidden=8, epochs=1, batch_size=8, learning_rate=1e-2, l1=1e-3, conv_bias=True
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = np.random.default_rng(0)
    images, labels = generator.uniform(size=(16, 8, 8, 1)).astype(np.float32), np.arange(16, dtype=np.int32) % 8
    return Dataset("noise", 8, images, labels, images, labels)


@pytest.fixture(scope="module")
def trained(dataset) -> train.Variables:
    return train.fit(dataset, CONFIG)


def test_rounding_leaves_two_values_to_a_bias_and_256_to_a_weight(trained):
    counts = mnist_cnn.count_distinct(mnist_cnn.quantized(trained, mnist_cnn.UNIFORM, 0))
    before = mnist_cnn.count_distinct(trained)
    assert set(counts) == set(before)
    for path, count in counts.items():
        assert count <= (2 if path.endswith("bias") else min(256, before[path]))
    assert before["Dense_0/kernel"] > 2


def test_training_the_values_keeps_them_shared_and_training_the_weights_does_not(dataset, trained):
    small = mnist_cnn.quantized(trained, mnist_cnn.to_values(2), 0)
    again = dataclasses.replace(CONFIG, seed=1)
    shared = mnist_cnn.count_distinct(train.fit(dataset, again, start=small))
    free = mnist_cnn.count_distinct(train.fit(dataset, again, start=mnist_cnn.decoded(small)))
    assert max(shared.values()) == 2
    assert free["Dense_0/kernel"] > 2


def test_compares_the_most_values_with_the_source(tmp_path):
    config = dataclasses.replace(mnist_cnn.parse(["--smoke"]), values=(2, 4))
    accuracies = dict.fromkeys(("float", "8 bits, biases 1 bit", "float, fresh", "4 values a tensor"), 90.0)
    row = dict.fromkeys((mnist_cnn.BEFORE, mnist_cnn.SHARED, mnist_cnn.FREE, mnist_cnn.AGAIN), 80.0)
    exercise = {k: {**row, "nbytes": 10 * k, "nbytes_free": 100} for k in config.values}
    found = mnist_cnn.summary(
        [{"accuracies": accuracies, "exercise": exercise, "distinct": [{"a": 5}, {"a": 2}]}], config
    )
    assert found["accuracies"]["float"]["published"] == 98.12
    assert found["accuracies"]["4 values a tensor"]["published"] is None
    mnist_cnn.draw({"dataset": "noise", **found}).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_training_on_changes_nothing_in_place(dataset, trained):
    before = jax.tree.map(np.array, trained)
    train.fit(dataset, dataclasses.replace(CONFIG, seed=2), start=trained)
    for kept, now in zip(jax.tree.leaves(before), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_the_penalty_makes_weights_smaller(dataset):
    def size(l1: float) -> float:
        params = train.fit(dataset, dataclasses.replace(CONFIG, epochs=10, l1=l1))["params"]
        return sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(params))

    assert size(1e-1) < size(0.0)
