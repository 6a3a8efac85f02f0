import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import bench_layers

TINY = dataclasses.replace(
    bench_layers.SMOKE, width=16, batch=8, methods=("float", "Symmetric(bits=4)", "KMeans(bits=2)"), steps=5
)


@pytest.fixture
def data():
    x_key, target_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(x_key, (8, 16)), jax.random.normal(target_key, (8, 16))


def test_writes_what_it_found_and_a_chart(tmp_path, capsys):
    found = bench_layers.main(dataclasses.replace(TINY, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "bench_layers.png").read_bytes().startswith(b"\x89PNG")
    assert [row["ratio"] for row in found["rows"] if row["method"] == "float"] == [1, 1]
    assert {row["traces"] for row in found["rows"]} == {1}
    assert found["codes_kept"] == {"Symmetric(bits=4)": True, "KMeans(bits=2)": True}
    assert "codes bit-identical after 5 AdamW steps: yes" in capsys.readouterr().out


def test_a_step_is_the_gradient_step_of_the_decoder(data):
    params = bench_layers.layer("KMeans(bits=2)", TINY)
    before = params["kernel"]
    x, target = data
    weight = before.dequantize()
    error = 2 * (x @ weight - target) / target.size
    by_weight, codes = x.T @ error, before.unpack()[..., 0]
    expected = [float(jnp.sum(jnp.where(codes == code, by_weight, 0))) for code in range(4)]
    trainer = bench_layers.Trainer(params, optax.sgd(0.5), data)
    loss, x_gradient = trainer.step()
    assert float(loss) == pytest.approx(float(jnp.mean((x @ weight - target) ** 2)), rel=1e-5)
    assert jnp.allclose(x_gradient, error @ weight.T, atol=1e-6)
    moved = before.decoder.vectors - trainer.params["kernel"].decoder.vectors
    assert moved.ravel().tolist() == pytest.approx([0.5 * value for value in expected], abs=1e-5)


def test_a_decoder_that_does_not_train_is_noticed(data, monkeypatch):
    monkeypatch.setitem(bench_layers.OPTIMIZERS, "adamw", optax.set_to_zero())
    params = bench_layers.layer("KMeans(bits=2)", TINY)
    assert not bench_layers.codes_kept("KMeans(bits=2)", params, data, TINY, bench_layers.Console())


def test_verdict_names_what_failed():
    assert bench_layers.verdict({"a": True, "b": True}) == "yes, all methods"
    assert bench_layers.verdict({"a": True, "b": False}) == "NO: b"
