import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from experiments import train
from experiments.data import Dataset

CONFIG = train.TrainConfig(channels=(2, 2, 4), hidden=8, epochs=6, batch_size=16, learning_rate=1e-2)


def stripes(count: int) -> Dataset:
    """Two classes that a glance tells apart: a bright upper or a bright lower half."""
    labels = (np.arange(count) % 2).astype(np.int32)
    images = np.random.default_rng(0).uniform(0, 0.2, (count, 8, 8, 1)).astype(np.float32)
    images[labels == 0, :4] += 0.8
    images[labels == 1, 4:] += 0.8
    return Dataset("stripes", 2, images, labels, images[: count - 3], labels[: count - 3])


@pytest.fixture(scope="module")
def trained() -> train.Variables:
    return train.fit(stripes(64), CONFIG)


def test_network_has_three_normalized_convolutions_and_two_dense_layers(trained):
    kernels = {name: layer["kernel"].shape for name, layer in trained["params"].items() if "kernel" in layer}
    assert kernels == {
        "Conv_0": (5, 5, 1, 2),
        "Conv_1": (3, 3, 2, 2),
        "Conv_2": (3, 3, 2, 4),
        "Dense_0": (2 * 2 * 4, 8),
        "Dense_1": (8, 2),
    }
    assert sorted(trained["batch_stats"]) == ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2"]


def test_training_learns_what_can_be_learned(trained):
    dataset = stripes(64)
    assert train.accuracy(train.network(CONFIG, dataset), trained, dataset) == 1


def test_the_seed_decides_everything(trained):
    again = train.fit(stripes(64), CONFIG)
    other = train.fit(stripes(64), dataclasses.replace(CONFIG, seed=1))
    same = jax.tree.map(np.array_equal, trained, again)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(trained["params"]["Dense_1"]["kernel"], other["params"]["Dense_1"]["kernel"])


def test_accuracy_equals_a_count_by_hand_whatever_the_batches(trained, monkeypatch):
    dataset = stripes(64)
    model = train.network(CONFIG, dataset)
    half = dataclasses.replace(dataset, test_labels=np.zeros_like(dataset.test_labels))
    logits: Any = model.apply(trained, dataset.test_images, train=False)
    expected = np.sum(np.argmax(logits, axis=-1) == 0) / len(logits)
    assert 0 < expected < 1
    assert train.accuracy(model, trained, half) == expected
    monkeypatch.setattr(train, "TEST_BATCH", 13)
    assert train.accuracy(model, trained, half) == expected


def test_variants_share_one_compiled_test(trained, monkeypatch):
    dataset = stripes(40)
    model = train.network(CONFIG, dataset)
    traces = []
    apply = train.ConvNet.apply
    monkeypatch.setattr(train.ConvNet, "apply", lambda *args, **kwargs: traces.append(1) or apply(*args, **kwargs))
    for factor in (1.0, 0.5, 0.25):
        train.accuracy(model, jax.tree.map(lambda leaf, factor=factor: leaf * factor, trained), dataset)
    assert len(traces) == 1


def test_begins_where_flax_begins():
    dataset = stripes(64)
    plain = train.network(CONFIG, dataset).init(jax.random.key(CONFIG.seed), dataset.train_images[:1], train=False)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), train.begin(CONFIG, dataset), plain)


def test_progress_wraps_the_epochs():
    seen = []
    train.fit(stripes(64), CONFIG, progress=lambda epochs: seen.extend(epochs) or epochs)
    assert seen == list(range(CONFIG.epochs))


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="`batch_size` must be at most the 8 training images, got 16"):
        train.fit(stripes(8), CONFIG)
