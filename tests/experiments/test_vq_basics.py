import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvq
from experiments import language, vq_basics


def test_tables_have_the_nearest_codes():
    tables = vq_basics.lookup_tables()
    assert tables["weights"]["codes"] == [0, 1, 2]
    assert tables["word vector"]["codes"] == [0, 1, 2, 0, 1]
    ours, published = (sum(tables["word vector"][name]) for name in ("diff", "published_diff"))
    assert ours < published


def test_broadcasting_says_what_vq_says(rng):
    points, codebook = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (50, 7))
    for ours, theirs in zip(
        vq_basics.nearest_by_broadcasting(points, codebook), jaxvq.vq(points, codebook), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_gradient_descent_finds_the_means_of_two_heaps(rng):
    heaps = np.concatenate([rng.normal(size=(40, 2)) + 5, rng.normal(size=(40, 2)) - 5]).astype(np.float32)
    codebook, losses = vq_basics.fit_by_gradient(jnp.asarray(heaps), jnp.asarray(heaps[[0, -1]]), 200)
    np.testing.assert_allclose(codebook, [heaps[:40].mean(axis=0), heaps[40:].mean(axis=0)], atol=0.05)
    assert losses[-1] < losses[0]


def test_blocks_of_an_image_make_the_image_again(rng):
    image = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    blocks = vq_basics.to_blocks(image.astype(np.float32), 4)
    assert blocks.shape == (6, 48)
    np.testing.assert_array_equal(blocks[1].reshape(4, 4, 3), image[:4, 4:8])
    np.testing.assert_array_equal(vq_basics.from_blocks(blocks, image.shape, 4), image)


def test_an_image_of_few_blocks_comes_back_whole(tmp_path):
    config = vq_basics.parse(["--smoke", "--out", str(tmp_path)])
    image = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2)[..., None] * 60, np.ones((4, 4, 3), np.uint8))
    found = vq_basics.compress_image(image, 4, config)
    assert found["psnr_db"] > 45
    assert np.abs(found["image"].astype(int) - image).max() <= 1


def test_words_are_numbered_by_how_often_they_occur():
    words, vocabulary = language.tokenize("to be or not to be, that is the to", 3)
    assert vocabulary == [language.UNKNOWN, "to", "be"]
    assert words.tolist() == [1, 2, 0, 0, 1, 2, 0, 0, 0, 0, 1]


def test_texts_come_from_a_file_or_from_python_itself(tmp_path):
    (tmp_path / "text").write_text("words")
    assert language.read_text(tmp_path / "text") == "words"
    assert "expression" in language.read_text(None)


def test_a_transformer_learns_a_pattern():
    config = language.LanguageConfig(
        vocabulary=4, width=8, steps=100, layers=1, heads=2, length=8, batch_size=4, learning_rate=3e-2
    )
    words = np.tile(np.array([1, 2, 3], np.int32), 200)
    params = language.train_model(words, config, seed=0)
    assert language.perplexity(params, words, config) < 1.5


def test_a_table_with_enough_entries_predicts_as_well(rng):
    config = vq_basics.parse(["--smoke"])
    words = rng.integers(0, config.language.vocabulary, 400)
    table = language.Transformer(config.language).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    few = 0.3 * rng.normal(size=4)
    table["embedding"] = jnp.asarray(few[rng.integers(0, 4, table["embedding"].shape)], jnp.float32)
    exact = vq_basics.embedding_row(table, words, None, config)
    same = vq_basics.embedding_row(table, words, jaxvq.KMeans(k=4), config)
    assert (exact["bits_per_weight"], exact["nbytes"]) == (32, table["embedding"].nbytes)
    assert same["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)
    assert same["nbytes"] < exact["nbytes"]


@pytest.mark.parametrize("missing", ["no such file"])
def test_a_text_that_is_not_there(missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=missing):
        language.read_text(tmp_path / missing)
