import jax
import numpy as np

import jaxvq
from experiments import pictures


def test_images_are_named_and_the_rest_of_the_grid_is_empty(rng):
    figure = pictures.draw_images(rng.normal(size=(3, 4, 4, 1)), ["a", "b", "c"], title="three", columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    shown = figure.axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1)


def test_images_of_bytes_keep_their_brightness():
    images = np.full((1, 2, 2, 3), 51.0)
    shown = pictures.draw_images(images, [""], title="", contrast=False).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, 0.2)


def test_values_are_counted(rng):
    before = rng.normal(size=(10, 10))
    left, right = pictures.draw_values(before, np.sign(before), title="signs").axes
    assert "100 distinct" in left.get_title()
    assert right.get_title() == "after: 2"
    counts = right.lines[0].get_ydata()
    assert list(counts) == [(before < 0).sum(), (before > 0).sum()]


def test_codes_are_pixels(rng, key):
    weight = jaxvq.quantize_params({"w": rng.normal(size=(8, 6)).astype(np.float32)}, jaxvq.KMeans(k=3), key=key)["w"]
    image = pictures.draw_codes(weight, title="codes").axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, np.asarray(weight.unpack())[..., 0])


def test_vectors_and_entries_are_points(rng):
    vectors, codebook = rng.normal(size=(9, 4)), rng.normal(size=(2, 4))
    lines = pictures.draw_vectors(jax.numpy.asarray(vectors), codebook, title="").axes[0].lines
    np.testing.assert_allclose(lines[0].get_xydata(), vectors[:, :2], rtol=1e-6)
    np.testing.assert_allclose(lines[1].get_xydata(), codebook[:, :2])


def test_sizes_stand_in_kilobytes_with_the_error():
    figure = pictures.draw_sizes([("float", 2000, 98.5), ("small", 500, 90.0)], title="two")
    points = [line.get_xydata()[0] for line in figure.axes[0].lines]
    np.testing.assert_allclose(points, [(2, 1.5), (0.5, 10)])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["float: 2.0 kB, 98.50% right", "small: 0.5 kB, 90.00% right"]


def test_a_network_that_is_always_right_can_be_drawn(tmp_path):
    pictures.draw_sizes([("perfect", 2000, 100.0)], title="").savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
