"""What fine-tuning needs beside an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxvq import KMeans, Product, Residual, Rule, Symmetric, partition, quantize_params
from jaxvq.array import is_quantized
from jaxvq.finetune import distillation_loss, quantize_iteratively, reassign


@pytest.fixture
def weights(rng):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"a": {"kernel": normal(32, 16), "bias": normal(16)}, "b": {"kernel": normal(16, 12)}}


@pytest.mark.parametrize("method", [KMeans(bits=2, per="channel"), Product(bits=3, dim=4), Symmetric(bits=3)], ids=str)
def test_reassigned_codes_are_the_nearest(method, weights, key):
    quantized = quantize_params(weights, method, key=key)
    moved = jax.tree.map(lambda leaf: leaf * 1.5 + 0.3 if leaf.dtype == jnp.float32 else leaf, quantized)
    done = reassign(moved, weights)
    assert jax.tree.structure(done) == jax.tree.structure(moved)
    for name in ("a", "b"):
        target, before, after = weights[name]["kernel"], moved[name]["kernel"], done[name]["kernel"]
        error = [float(jnp.mean((target - array.dequantize()) ** 2)) for array in (before, after)]
        assert error[1] < error[0]
        for entry, kept in zip(jax.tree.leaves(before.decoder), jax.tree.leaves(after.decoder), strict=True):
            np.testing.assert_array_equal(entry, kept)
    if isinstance(method, Product):
        table = np.asarray(done["b"]["kernel"].decoder.vectors)[0, 0, 0]
        vectors = np.asarray(done["b"]["kernel"].layout.to_vectors(weights["b"]["kernel"]))
        expected = ((vectors[:, :, None] - table) ** 2).sum(axis=-1).argmin(axis=-1)
        np.testing.assert_array_equal(done["b"]["kernel"].unpack()[..., 0], expected)
    np.testing.assert_array_equal(done["a"]["bias"], moved["a"]["bias"])


def test_reassign_of_residual_and_stacked_weights(rng, key):
    weights = {"w": jnp.asarray(rng.normal(size=(3, 16, 8)), jnp.float32)}
    quantized = quantize_params(weights, Rule("w", Residual(stages=2, bits=2, dim=4), stacked=1), key=key)
    same = reassign(quantized, weights)
    np.testing.assert_array_equal(same["w"].unpack(), quantized["w"].unpack())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "a/kernel: `targets` must have a float array of shape .32, 16., got none"),
        ({"a": {"kernel": jnp.ones((2, 2))}}, r"got \(2, 2\); pass the tree from before"),
        ({"a": {"kernel": jnp.full((32, 16), jnp.nan)}}, "a/kernel: the target must be finite"),
    ],
)
def test_reassign_needs_targets(targets, message, weights, key):
    quantized = quantize_params(weights, Rule("a/kernel", KMeans(bits=2)), key=key)
    with pytest.raises(ValueError, match=message):
        reassign(quantized, targets)


def test_reassign_to_quantized_targets(weights, key):
    quantized = quantize_params(weights, KMeans(bits=2), key=key)
    with pytest.raises(ValueError, match="got a quantized one"):
        reassign(quantized, quantized)


def test_quantizes_one_weight_after_the_other(weights, key):
    seen = []

    def finetune(params, path):
        seen.append((path, is_quantized(params["a"]["kernel"]), is_quantized(params["b"]["kernel"])))
        trainable, _ = partition(params)
        assert jax.tree.leaves(trainable)
        return jax.tree.map(lambda leaf: leaf + 0.5 if leaf.dtype == jnp.float32 else leaf, params)

    done = quantize_iteratively(weights, KMeans(bits=2), finetune, key=key)
    assert seen == [("a/kernel", True, False), ("b/kernel", True, True)]
    alone = quantize_params(weights, KMeans(bits=2), key=key)
    np.testing.assert_array_equal(done["a"]["kernel"].unpack(), alone["a"]["kernel"].unpack())
    # The second weight was quantized after it had trained, and trained once more with its codes fixed.
    moved = jax.tree.map(lambda leaf: leaf + 0.5, weights)
    later = quantize_params(moved, KMeans(bits=2), key=key)["b"]["kernel"]
    np.testing.assert_allclose(done["b"]["kernel"].dequantize(), later.dequantize() + 0.5, atol=1e-5)


def test_iterative_quantization_shows_progress(weights, key):
    paths = []

    def progress(entries):
        for entry in entries:
            paths.append(entry.path)
            yield entry

    quantize_iteratively(weights, KMeans(bits=2), lambda params, path: params, key=key, progress=progress)
    assert paths == ["a/kernel", "b/kernel"]


def test_iterative_quantization_refuses_another_tree(weights, key):
    with pytest.raises(ValueError, match="a/kernel: `finetune` must return the tree that it was given"):
        quantize_iteratively(weights, KMeans(bits=2), lambda params, path: params["a"], key=key)


def test_distillation_is_the_divergence_times_the_squared_temperature(rng):
    student, teacher = (jnp.asarray(rng.normal(size=(5, 10)), jnp.float32) for _ in range(2))
    p, q = (scipy.special.softmax(np.asarray(x, np.float64) / 3, axis=-1) for x in (teacher, student))
    expected = 9 * scipy.special.rel_entr(p, q).sum(axis=-1)
    np.testing.assert_allclose(distillation_loss(student, teacher, temperature=3.0), expected, rtol=1e-4)
    gradient = jax.grad(lambda t: distillation_loss(student, t).sum())(teacher)
    np.testing.assert_array_equal(gradient, 0)


def test_distillation_refuses():
    with pytest.raises(ValueError, match="`temperature` must be above 0, got"):
        distillation_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=0.0)


def test_distillation_of_other_shapes(unchecked):
    with pytest.raises(ValueError, match=r"`teacher_logits` must have the shape \(2, 3\)"):
        distillation_loss(jnp.ones((2, 3)), jnp.ones((2, 4)))
