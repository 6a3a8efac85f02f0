import dataclasses
import os
from typing import Any

import jax
import numpy as np
import pytest

import jaxvq
from experiments import cifar, resnet, train
from experiments.data import DatasetUnavailableError

STEM = resnet.ResNet20(widths=(16, 32, 64), blocks=0)  # one convolution and the dense layer: compiles in no time
CONFIG = resnet.TuneConfig(epochs=2, batch_size=10, learning_rate=1e-2)


def torch_tensors(widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random weights of a network with one block in each stage, under PyTorch names."""
    generator = np.random.default_rng(0)
    tensors = {"linear.weight": (10, widths[-1]), "linear.bias": (10,)}
    before = [3, widths[0], *widths[:-1]]
    places = ["conv1 bn1", *(f"layer{stage}.0.conv1 layer{stage}.0.bn1" for stage in (1, 2, 3))]
    for place, width_in, width in zip(places, before, [widths[0], *widths], strict=True):
        conv, norm = place.split()
        pairs = [(conv, norm, width_in)]
        if "layer" in conv:
            pairs.append((conv.replace("conv1", "conv2"), norm.replace("bn1", "bn2"), width))
        for conv, norm, columns in pairs:
            tensors[f"{conv}.weight"] = (width, columns, 3, 3)
            tensors |= {f"{norm}.{kind}": (width,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {
        name: generator.uniform(0.1, 1, shape).astype(np.float32) - 0.4 * (len(shape) == 4)
        for name, shape in tensors.items()
    }


def by_hand(tensors: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The answers of the network, by loops over the pixels of a window."""

    def block(x: np.ndarray, conv: str, norm: str, stride: int) -> np.ndarray:
        weight = tensors[f"{conv}.weight"].astype(np.float64)
        size = x.shape[2] // stride
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        y = np.zeros((len(x), len(weight), size, size))
        for i in range(3):
            for j in range(3):
                window = padded[:, :, i : i + stride * size : stride, j : j + stride * size : stride]
                y += np.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
        scale, bias, mean, var = (
            tensors[f"{norm}.{kind}"].reshape(-1, 1, 1) for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(block(images.transpose(0, 3, 1, 2), "conv1", "bn1", 1), 0)
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        y = np.maximum(block(x, f"layer{stage}.0.conv1", f"layer{stage}.0.bn1", stride), 0)
        y = block(y, f"layer{stage}.0.conv2", f"layer{stage}.0.bn2", 1)
        more = (y.shape[1] - x.shape[1]) // 2
        x = np.maximum(y + np.pad(x[:, :, ::stride, ::stride], ((0, 0), (more, more), (0, 0), (0, 0))), 0)
    return x.mean((2, 3)) @ tensors["linear.weight"].T + tensors["linear.bias"]


def test_weights_from_torch_give_the_answers_of_the_network_by_hand():
    tensors = torch_tensors((2, 4, 8))
    variables = resnet.from_torch(tensors)
    images = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    answers: Any = resnet.ResNet20(widths=(2, 4, 8), blocks=1).apply(variables, images, train=False)
    np.testing.assert_allclose(answers, by_hand(tensors, images), rtol=1e-3)


def test_a_tensor_the_network_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"`tensors` must have names that end in weight, bias.*got 'num_batches'"):
        resnet.from_torch({"bn1.num_batches": np.zeros(1)})


def random_variables(model: resnet.ResNet20) -> resnet.Variables:
    """Weights drawn by numpy: to run Flax's own initializers takes seconds."""
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(np.float32), dict(shapes))
    ones = jax.tree.map(np.ones_like, variables["batch_stats"])
    return jax.tree.map(jax.numpy.asarray, {**variables, "batch_stats": ones})


@pytest.fixture(scope="module")
def dataset() -> cifar.Dataset:
    return cifar.synthetic(50)


@pytest.fixture(scope="module")
def variables() -> resnet.Variables:
    return random_variables(STEM)


@pytest.fixture(scope="module")
def quantized(variables) -> resnet.Variables:
    params = jaxvq.quantize_params(variables["params"], jaxvq.KMeans(bits=2), key=jax.random.key(0))
    return {**variables, "params": params}


def test_tuning_moves_codebooks_and_normalization_and_no_code(dataset, quantized):
    tuned = resnet.tune(STEM, quantized, dataset, CONFIG)
    before, after = quantized["params"]["conv1"]["kernel"], tuned["params"]["conv1"]["kernel"]
    np.testing.assert_array_equal(before.codes.words, after.codes.words)
    assert not np.allclose(before.decoder.vectors, after.decoder.vectors)
    for part in ("params", "batch_stats"):
        assert all(
            jax.tree.leaves(
                jax.tree.map(lambda a, b: not np.allclose(a, b), quantized[part]["bn1"], tuned[part]["bn1"])
            )
        )


def test_tuning_learns_and_the_float_network_is_trained_by_the_same_code(dataset, variables):
    config = dataclasses.replace(CONFIG, epochs=20)
    tuned = resnet.tune(STEM, variables, dataset, config)
    model: Any = STEM
    assert train.accuracy(model, tuned, dataset) > train.accuracy(model, variables, dataset) + 0.1


def test_a_teacher_with_all_the_say_makes_labels_irrelevant(dataset, variables, quantized):
    config = dataclasses.replace(CONFIG, distilled=1.0, epochs=1)
    wrong = dataclasses.replace(dataset, train_labels=np.zeros_like(dataset.train_labels))
    right = resnet.tune(STEM, quantized, dataset, config, teacher=variables)
    assert_equal(right, resnet.tune(STEM, quantized, wrong, config, teacher=variables))
    with pytest.raises(AssertionError):
        assert_equal(right, resnet.tune(STEM, quantized, dataset, config))


def test_no_teacher_means_that_only_labels_count(dataset, variables, quantized):
    config = dataclasses.replace(CONFIG, distilled=0.0, epochs=1)
    taught = resnet.tune(STEM, quantized, dataset, config, teacher=variables)
    for one, other in zip(
        jax.tree.leaves(taught), jax.tree.leaves(resnet.tune(STEM, quantized, dataset, config)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_progress_sees_the_steps_and_parts_of_an_epoch_count(dataset, variables):
    seen = []
    config = dataclasses.replace(CONFIG, epochs=1.6)
    resnet.tune(STEM, variables, dataset, config, progress=lambda steps: seen.extend(steps) or steps)
    assert seen == list(range(8))


def test_too_few_images_for_a_batch(dataset, variables):
    with pytest.raises(ValueError, match="`batch_size` must be at most the 50 training images, got 64"):
        resnet.tune(STEM, variables, dataset, resnet.TuneConfig())


def test_sensitivity_is_the_mean_square_of_the_gradients_of_single_images(dataset, variables, monkeypatch):
    monkeypatch.setattr(resnet, "SENSITIVITY_BATCH", 4)
    stats = resnet.sensitivity(STEM, variables, dataset, count=6)
    assert sorted(stats) == ["conv1/kernel", "linear/kernel"]
    squares = np.zeros(variables["params"]["linear"]["kernel"].shape)
    for image, label in zip(dataset.train_images[:6], dataset.train_labels[:6], strict=True):

        def loss(params, image=image, label=label):
            logits: Any = STEM.apply({**variables, "params": params}, image[None], train=False)
            return -jax.nn.log_softmax(logits)[0, label]

        squares += np.square(jax.grad(loss)(variables["params"])["linear"]["kernel"]) / 6
    np.testing.assert_allclose(stats["linear/kernel"].importance, squares + squares.mean() / 1000, rtol=1e-3, atol=1e-7)


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_imitating_ones_own_answers_has_no_gradient():
    logits = jax.random.normal(jax.random.key(0), (4, 10))

    def imitation(logits, answers):
        return jaxvq.distillation_loss(logits, answers, temperature=resnet.TEMPERATURE).mean()

    np.testing.assert_allclose(jax.grad(imitation)(logits, logits), 0, atol=1e-6)
    shifted = jax.grad(imitation)(logits, logits + jax.random.normal(jax.random.key(1), (4, 10)))
    assert np.abs(shifted).max() > 0.01


def test_augmented_images_are_windows_of_the_padded_image_or_its_mirror_image():
    images = cifar.synthetic(4).train_images
    changed = cifar.augment(images, np.random.default_rng(3))
    black = np.full((40, 40, 3), -cifar.MEAN / cifar.DEVIATION)
    for image, got in zip(images, changed, strict=True):
        padded = black.copy()
        padded[4:36, 4:36] = image
        windows = [padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        assert any(np.array_equal(got, window) or np.array_equal(got, window[:, ::-1]) for window in windows)
    assert not np.array_equal(images, changed)


def test_data_that_nobody_named_is_one_line(monkeypatch):
    monkeypatch.delenv("JAXVQ_CIFAR10_DIR", raising=False)
    with pytest.raises(DatasetUnavailableError, match=r"^JAXVQ_CIFAR10_DIR must name a folder with .*got nothing$"):
        cifar.cifar10()


def test_a_folder_without_the_files_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXVQ_CIFAR10_DIR", str(tmp_path))
    (tmp_path / cifar.TEST).touch()
    with pytest.raises(
        DatasetUnavailableError, match=r"has no resnet20_cifar10\.safetensors, cifar10_train5k_jpeg\.npz;"
    ):
        cifar.weights()


def test_images_are_normalized_and_both_parts_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXVQ_CIFAR10_DIR", str(tmp_path))
    (tmp_path / cifar.WEIGHTS).touch()
    for name, value, count in ((cifar.TRAIN, 255, 20), (cifar.TEST, 0, 10)):
        images = np.full((count, 32, 32, 3), value, np.uint8)
        np.savez(tmp_path / name, images=images, labels=np.arange(count) % 10)
    dataset = cifar.cifar10()
    assert (len(dataset.train_labels), len(dataset.test_labels), dataset.train_labels.dtype) == (20, 10, np.int32)
    np.testing.assert_allclose(dataset.train_images[0, 0, 0], (1 - cifar.MEAN) / cifar.DEVIATION, rtol=1e-6)
    np.testing.assert_allclose(dataset.test_images[0, 0, 0], -cifar.MEAN / cifar.DEVIATION, rtol=1e-6)
    part = cifar.held_out(dataset)
    assert (len(part.train_labels), len(part.test_labels)) == (16, 4)
    np.testing.assert_array_equal(np.concatenate([part.train_labels, part.test_labels]), dataset.train_labels)


@pytest.mark.slow
@pytest.mark.skipif(cifar.VARIABLE not in os.environ, reason=f"{cifar.VARIABLE} names no folder")
def test_the_trained_network_gets_8103_of_10000_test_images_right():
    model: Any = resnet.ResNet20()
    assert round(10_000 * train.accuracy(model, resnet.from_torch(cifar.weights()), cifar.cifar10())) == 8_103
