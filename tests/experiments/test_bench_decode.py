import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvq
from experiments import bench_decode, decoder
from experiments.decoder import Model

MODEL = Model(layers=2, width=16, heads=4, kv_heads=2, hidden=24, vocabulary=20)
TINY = dataclasses.replace(bench_decode.SMOKE, model=MODEL, tokens=6, short=2, repeats=1)
FEW_SHAPES = dataclasses.replace(TINY, model=dataclasses.replace(MODEL, hidden=16, vocabulary=32))
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
ONE_LAYER = dataclasses.replace(TINY, model=dataclasses.replace(FEW_SHAPES.model, layers=1))


@pytest.fixture
def quiet():
    return bench_decode.Console(quiet=True)


@pytest.fixture
def params(quiet):
    params = bench_decode.build(None, TINY, quiet)
    for index, layer in enumerate(params["layers"]):  # norms that do something
        for name in ("attention_norm", "gate_norm"):
            layer[name] = layer[name] * jnp.linspace(0.5, 2 + index, MODEL.width).astype(decoder.DTYPE)
    return params


def by_hand(params, tokens, model):
    """The logits after the last token in double precision: head by head, without a cache."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    head, shared = model.width // model.heads, model.heads // model.kv_heads

    def normed(x, norm):
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + model.epsilon) * norm

    def turned(x):
        pairs = x[:, : head // 2] + 1j * x[:, head // 2 :]
        speeds = model.rotary_base ** (-2 * np.arange(head // 2) / head)
        pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * speeds)
        return np.hstack([pairs.real, pairs.imag])

    x = params["table"][tokens]
    for layer in params["layers"]:
        heads = np.split(normed(x, layer["attention_norm"]) @ layer["qkv"].T, model.heads + 2 * model.kv_heads, axis=1)
        attended = []
        for index in range(model.heads):
            key, value = (heads[model.heads + part * model.kv_heads + index // shared] for part in (0, 1))
            scores = turned(heads[index]) @ turned(key).T / np.sqrt(head)
            shares = np.tril(np.exp(scores))
            attended.append(shares / shares.sum(axis=1, keepdims=True) @ value)
        x = x + np.hstack(attended) @ layer["attention_out"].T
        gate, up = np.split(normed(x, layer["gate_norm"]) @ layer["gate_up"].T, 2, axis=1)
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["down"].T
    return (normed(x, params["norm"]) @ params["table"].T)[-1]


def distance(got, wanted):
    return float(np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted))


def test_forward_is_a_transformer(params):
    cache = decoder.empty_cache(8, MODEL)
    logits, cache = decoder.forward(params, cache, PROMPT[:3], jnp.int32(0), MODEL)
    assert logits.dtype == jnp.float32
    assert distance(logits, by_hand(params, PROMPT[:3], MODEL)) < 1e-2
    for place in (3, 4):  # one token after the other, with what the cache keeps
        logits, cache = decoder.forward(params, cache, PROMPT[place : place + 1], jnp.int32(place), MODEL)
    assert distance(logits, by_hand(params, PROMPT, MODEL)) < 1e-2


def test_decode_takes_the_likeliest_token_each_time(params):
    # A table like noise beside the layers' sums, so that a token does not predict itself.
    params["layers"] = [layer | {"down": 30 * layer["down"]} for layer in params["layers"]]
    cache = decoder.empty_cache(9, MODEL)
    logits, cache = decoder.forward(params, cache, PROMPT, jnp.int32(0), MODEL)
    tokens, last = decoder.decode(params, logits, cache, jnp.int32(5), count=4, model=MODEL)
    wanted = []
    for place in range(5, 9):
        wanted.append(int(logits.argmax()))
        logits, cache = decoder.forward(params, cache, jnp.array(wanted[-1:]), jnp.int32(place), MODEL)
    assert len(set(wanted)) > 1
    assert tokens.tolist() == wanted
    assert distance(last, np.asarray(logits)) < 1e-2


def test_writes_what_it_found_and_a_chart(tmp_path, capsys):
    found = bench_decode.main(dataclasses.replace(ONE_LAYER, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "bench_decode.png").read_bytes().startswith(b"\x89PNG")
    reference, row = found["rows"]
    assert (reference["contender"], reference["speed_ratio"], reference["memory_ratio"]) == ("bf16", 1, 1)
    assert reference["program_nbytes"] > reference["weight_nbytes"] == 2 * reference["weights"]
    assert row["finite"]
    assert row["relative_error"] < 1e-2
    assert row["weights"] == reference["weights"]
    assert "4-bit palettes: " in capsys.readouterr().out


@pytest.mark.parametrize("speeds", [(-3.0, 170.0), (5.0, 1e6), (-1.0, -56.0), (1.0, -56.0)])
def test_times_that_are_noise_are_drawn_all_the_same(speeds, tmp_path):
    rows = [
        {
            "contender": name,
            "tokens_per_second": speed,
            "program_nbytes": 1e6,
            "speed_ratio": speed / speeds[0],
            "memory_ratio": 1.0,
            "weights": 1000,
        }
        for name, speed in zip(("bf16", "4-bit palettes"), speeds, strict=True)
    ]
    bench_decode.draw(rows, dataclasses.replace(ONE_LAYER, out=tmp_path), "a busy machine")
    assert (tmp_path / "bench_decode.png").exists()


def test_every_matrix_is_quantized_and_no_float_is_wide(quiet):
    method = jaxvq.KMeans(bits=2, per="channel", codebook_dtype="int8")
    params = bench_decode.build(method, dataclasses.replace(FEW_SHAPES, fitted=2), quiet)
    leaves = jax.tree.leaves(params, is_leaf=bench_decode.is_quantized)
    assert all(leaf.ndim == 1 or isinstance(leaf, jaxvq.QuantizedArray) for leaf in leaves)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"uint32", "int8", "bfloat16"}
    assert params["table"].decoder.vectors.shape == (1, 32, 1, 4, 1)  # a palette for each token
    first, second = (layer["down"].codes.words for layer in params["layers"])
    assert (first != second).any()


def test_reordered_layers_are_the_others_with_their_output_features_moved(quiet):
    params = bench_decode.build(jaxvq.Symmetric(bits=4, per="channel"), FEW_SHAPES, quiet)
    first, second = (layer["qkv"].dequantize() for layer in params["layers"])
    assert np.array_equal(second, np.roll(np.asarray(first), 1, axis=0))


@pytest.mark.parametrize(
    ("name", "bits"), [("4-bit palettes", 4.2), ("4-bit int8 palettes", 4.1), ("2-bit codebooks", 2.1)]
)
def test_the_real_model_is_small_enough(name, bits):
    """The plan of the matrices of 1.24 billion weights; nothing is computed."""
    model, method = Model(), bench_decode.METHODS[name]
    key = jax.random.key(0)
    shapes = [jax.eval_shape(lambda: decoder.init_table(key, model))]
    shapes += model.layers * [jax.eval_shape(lambda: decoder.init_layer(key, model))]
    matrices = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim == 2]
    count = sum(leaf.size for leaf in matrices)
    assert round(count / 1e9, 3) == 1.236
    layouts = [method.layout(leaf.shape, leaf.dtype, out_axis=0) for leaf in matrices]
    assert 8 * sum(method.template(layout).nbytes for layout in layouts) / count < bits < 0.35 * 16


def row(**changes):
    return {
        "contender": "4-bit palettes",
        "tokens_per_second": 20.0,
        "program_nbytes": 30,
        "finite": True,
        "relative_error": 1e-3,
    } | changes


@pytest.mark.parametrize(
    ("changes", "speed", "memory"),
    [({}, "yes", "yes"), ({"tokens_per_second": 17.9}, "NO", "yes"), ({"program_nbytes": 36}, "yes", "NO")],
)
def test_verdict(changes, speed, memory):
    reference = row(contender="bf16", tokens_per_second=10.0, program_nbytes=100)
    judged = row(**changes)
    text = bench_decode.verdict(judged | bench_decode.against(judged, reference, TINY), TINY)
    assert f"at least 1.8: {speed};" in text
    assert text.endswith(f"at most 0.35: {memory}")


@pytest.mark.parametrize("changes", [{"finite": False}, {"relative_error": 0.02}, {"relative_error": float("nan")}])
def test_wrong_logits_are_an_error(changes):
    bench_decode.check([row(), row(relative_error=None)], TINY)
    with pytest.raises(RuntimeError, match=r"4-bit palettes: the logits must be finite and within 0\.01"):
        bench_decode.check([row(), row(**changes)], TINY)


def test_the_error_is_the_larger_of_both_steps(monkeypatch):
    weight = jaxvq.quantize_params(jnp.ones((4, 8)), jaxvq.Symmetric(bits=4), key=jax.random.key(0))

    def forward(params, cache, tokens, position, model):
        exact = not isinstance(params["table"], jaxvq.QuantizedArray)
        return jnp.array([3.0, 4.0]) * (1 if exact else 1.01 if position == 0 else 1.1), cache

    monkeypatch.setattr(bench_decode, "forward", forward)
    assert bench_decode.relative_error({"table": weight}, PROMPT, [], TINY) == pytest.approx(0.1, rel=1e-4)


def test_command_line(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(bench_decode, "main", seen.append)
    bench_decode.cli(["--only", "3-bit palettes", "--fitted", "1", "--out", str(tmp_path)])
    assert seen[0] == bench_decode.Config(contenders=["3-bit palettes"], fitted=1, out=tmp_path)
    with pytest.raises(SystemExit):
        bench_decode.cli(["--only", "5-bit palettes"])
    assert "5-bit palettes" in capsys.readouterr().err
