"""Rules, plans, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvq
from jaxvq import KMeans, Product, Rule, Spec, Uniform, resolve


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "Conv_0": {"kernel": struct(3, 3, 16, 32), "bias": struct(32)},
    "Dense_0": {"kernel": struct(784, 128), "bias": struct(128)},
    "Embed_0": {"embedding": struct(1000, 64, dtype=jnp.bfloat16)},
    "step": struct(dtype=jnp.int32),
}


def entry(plan, path):
    return next(entry for entry in plan.entries if entry.path == path)


def test_bare_method_takes_every_weight_matrix():
    plan = resolve(PARAMS, KMeans(bits=4))
    reasons = {entry.path: entry.reason for entry in plan.entries if entry.method is None}
    assert reasons == {
        "Conv_0/bias": "rank 1, not a weight matrix",
        "Dense_0/bias": "rank 1, not a weight matrix",
        "step": "int32 is not a float dtype",
    }
    assert entry(plan, "Dense_0/kernel").nbytes == 784 * 128 // 2 + 16 * 4
    assert plan.nbytes == sum(entry.nbytes for entry in plan.entries)
    assert plan.original_nbytes == 4 * (9 * 16 * 32 + 32 + 784 * 128 + 128 + 1) + 2 * 64000


def test_first_match_wins():
    rules = (Rule(".*/bias", None), Rule("Dense.*", Uniform(8)), Rule(".*/kernel", KMeans(bits=2)))
    plan = resolve(PARAMS, rules)
    methods = {entry.path: entry.method for entry in plan.entries}
    assert methods["Dense_0/bias"] is None
    assert methods["Dense_0/kernel"] == Uniform(8)
    assert methods["Conv_0/kernel"] == KMeans(bits=2)
    assert methods["Embed_0/embedding"] is None
    assert entry(plan, "Embed_0/embedding").reason == "no rule matches"
    assert entry(plan, "Conv_0/bias").reason == "kept by rule '.*/bias'"


def test_default_after_rules():
    plan = resolve(PARAMS, Spec((Rule("Dense_0/kernel", None),), default=KMeans(bits=3)))
    assert entry(plan, "Dense_0/kernel").method is None
    assert entry(plan, "Conv_0/kernel").method == KMeans(bits=3)


def test_explicit_rule_takes_a_bias():
    plan = resolve(PARAMS, Rule("Dense_0/bias", Uniform(bits=1)))
    bias = entry(plan, "Dense_0/bias")
    assert bias.layout.out_axis is None
    assert bias.nbytes == 16 + 8


def test_min_size():
    plan = resolve(PARAMS, Rule(".*/kernel", KMeans(), min_size=10_000))
    assert entry(plan, "Conv_0/kernel").reason == "fewer than 10000 values"
    assert entry(plan, "Dense_0/kernel").method == KMeans()


def test_conventions_of_names():
    tree = {
        "kernel": struct(3, 3, 4, 8),
        "weight": struct(8, 4, 3, 3),
        "embedding": struct(50, 8),
        "layers.0.weight": struct(8, 4, 3),
        "filters": struct(4, 8),
    }
    layouts = {entry.path: entry.layout for entry in resolve(tree, KMeans(bits=1)).entries}
    assert {path: (layout.out_axis, layout.in_axis) for path, layout in layouts.items()} == {
        "kernel": (3, 2),
        "weight": (0, 1),
        "embedding": (0, 1),
        "layers.0.weight": (0, 1),
        "filters": (1, 0),
    }


def test_out_axis_of_a_rule():
    plan = resolve({"w": struct(6, 4)}, Rule("w", KMeans(bits=1, per="channel"), out_axis=0))
    assert plan.entries[0].layout.out_axis == 0
    assert plan.entries[0].template.decoder.vectors.shape == (1, 6, 1, 2, 1)


def test_stacked_layers_have_the_layout_of_one():
    plan = resolve({"layers": {"kernel": struct(12, 64, 32)}}, Rule(".*", KMeans(bits=4), stacked=1))
    found = plan.entries[0]
    assert found.layout.shape == (64, 32)
    assert found.template.shape == (12, 64, 32)
    assert found.nbytes == 12 * (64 * 32 // 2 + 64)


def test_plan_prints_every_leaf_and_the_total():
    text = str(resolve(PARAMS, Product(bits=8, dim=9)))
    for part in ("Conv_0/kernel", "(3, 3, 16, 32)", "Product(bits=8, dim=9)", "rank 1", "x smaller", "int32"):
        assert part in text


def test_weight_that_grows_is_pointed_out():
    plan = resolve({"w": struct(16, 16)}, Product(k=64, dim=4))
    assert plan.entries[0].reason == "larger than before"


def test_quantized_leaves_are_left_alone(key):
    params = {"w": jax.random.normal(key, (32, 16)), "v": jax.random.normal(key, (32, 16))}
    once = jaxvq.quantize_params(params, Rule("w", KMeans(bits=2)), key=key)
    plan = resolve(once, KMeans(bits=4))
    assert entry(plan, "w").reason == "already quantized"
    twice = jaxvq.quantize_params(once, KMeans(bits=4), key=key)
    assert twice["w"] is once["w"]
    assert twice["v"].codes.bits == 4


def test_json_round_trip():
    spec = Spec(
        (Rule("head.*", None), Rule(".*/kernel", Product(k=100, dim=9), out_axis=-1, min_size=10, stacked=1)),
        default=KMeans(bits=3, per=64),
        out_axis=0,
    )
    assert Spec.from_json(spec.to_json()) == spec
    assert Spec.from_json('{"rules": []}') == Spec()


def test_rule_that_matches_nothing_lists_paths():
    with pytest.raises(ValueError, match=r"`pattern` 'Dense_0/kernels' matches no path.*'Dense_0/kernel'"):
        resolve(PARAMS, Rule("Dense_0/kernels", KMeans()))


def test_rule_for_an_integer_leaf():
    with pytest.raises(TypeError, match=r"step: a rule quantizes float arrays, got int32; exclude this leaf"):
        resolve(PARAMS, Rule("step", KMeans()))


def test_rule_for_a_scalar():
    with pytest.raises(ValueError, match=r"scale: a rule quantizes arrays with values .* got shape \(\)"):
        resolve({"scale": struct()}, Rule("scale", Uniform()))


def test_rule_for_an_empty_array():
    with pytest.raises(ValueError, match=r"w: a rule quantizes arrays with values .* got shape \(0, 4\)"):
        resolve({"w": struct(0, 4)}, Rule("w", Uniform()))


def test_rule_for_something_else():
    with pytest.raises(TypeError, match=r"name: a rule quantizes arrays, got 'relu'; exclude this leaf"):
        resolve({"name": "relu"}, Rule("name", Uniform()))


def test_too_large_k_names_the_path():
    with pytest.raises(ValueError, match=r"Dense_0/kernel: `k` must be at most the number of output features .* 128"):
        resolve(PARAMS, Rule("Dense_0/kernel", jaxvq.RowVQ(k=200)))


def test_missing_axis_names_the_path():
    with pytest.raises(ValueError, match=r"Dense_0/kernel: `out_axis` must name one of the 2 axes"):
        resolve(PARAMS, Rule("Dense_0/kernel", KMeans(), out_axis=2))


def test_two_leaves_of_one_path():
    with pytest.raises(ValueError, match=r"a/b: two leaves have this path"):
        resolve({"a": {"b": struct(2, 2)}, "a/b": struct(2, 2)}, KMeans(bits=1))


@pytest.mark.parametrize("spec", ["KMeans", 4, [KMeans()], None])
def test_not_a_spec(spec):
    from jaxvq.spec import as_spec

    with pytest.raises(TypeError, match=r"`spec` must be a Spec, a sequence of Rules or a method such as KMeans"):
        as_spec(spec)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule("(", KMeans()), ValueError, "`pattern` must be a regular expression, got '\\('"),
        (lambda: Rule("a", None, min_size=-1), ValueError, "`min_size` must be a whole number of at least 0, got -1"),
        (lambda: Rule("a", None, stacked=-1), ValueError, "`stacked` must be a whole number of at least 0, got -1"),
        (lambda: Spec.from_json("{"), ValueError, "`spec` must be JSON"),
        (lambda: Spec.from_json("[]"), ValueError, '`spec` must be {"rules"'),
        (lambda: Spec.from_json('{"rule": []}'), ValueError, "rules, default and out_axis, got rule$"),
        (lambda: Spec.from_json('{"rules": [{"pattern": "a"}]}'), ValueError, "`rules` must hold objects with pattern"),
        (lambda: Spec.from_json('{"default": {"method": "x"}}'), ValueError, "`method` must be"),
    ],
)
def test_bad_spec(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_leaves_that_are_no_arrays_are_kept(key):
    tree = {"act": jnp.tanh, "key": key, "name": "relu", "w": struct(64, 32)}
    plan = resolve(tree, KMeans(bits=4))
    reasons = {entry.path: entry.reason for entry in plan.entries}
    assert reasons["act"] == reasons["name"] == "not an array"
    assert reasons["key"] == "key<fry> is not a float dtype"
    assert plan.nbytes == entry(plan, "w").nbytes
    assert plan.original_nbytes == 64 * 32 * 4
    assert "key<fry>" in str(plan)
    with pytest.raises(TypeError, match=r"key: a rule quantizes float arrays, got key<fry>; exclude this leaf"):
        resolve(tree, Rule("key", KMeans()))


def test_double_precision_is_counted_as_it_is():
    plan = resolve({"w": np.zeros((64, 32)), "b": np.zeros(8)}, KMeans(bits=4))
    w, b = entry(plan, "w"), entry(plan, "b")
    assert (w.dtype, w.original_nbytes, w.layout.dtype) == ("float64", 64 * 32 * 8, "float32")
    assert w.reason == "float64 becomes float32"
    assert (b.dtype, b.nbytes) == ("float64", 64)


@pytest.mark.usefixtures("unchecked")
def test_out_axis_of_the_whole_spec():
    tree = {"a": struct(6, 4), "b": struct(6, 4), "c": struct(4)}
    spec = Spec([Rule("a", KMeans(bits=1), out_axis=1), Rule("c", Uniform())], default=KMeans(bits=1), out_axis=0)
    assert [entry.layout.out_axis for entry in resolve(tree, spec).entries] == [1, 0, None]
    assert isinstance(spec.rules, tuple)


def test_out_axis_of_stacked_layers():
    with pytest.raises(ValueError, match=r"w: `out_axis` counts the axes of one slice, here of shape \(6, 4\).*got 2"):
        resolve({"w": struct(3, 6, 4)}, Rule("w", KMeans(), stacked=1, out_axis=2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Spec(KMeans()), TypeError, "`rules` must be a sequence of Rules, got KMeans"),
        (lambda: Spec(Rule("a", None)), TypeError, "`rules` must be a sequence of Rules, got Rule"),
        (lambda: Spec((KMeans(),)), TypeError, r"`rules` must be a sequence of Rules, got \(KMeans"),
        (lambda: Spec(default="KMeans"), TypeError, "`default` must be a method such as KMeans.* got 'KMeans'"),
        (lambda: Spec(out_axis=1.5), TypeError, "`out_axis` must be a whole number or None, got 1.5"),
        (lambda: Rule("a", None, out_axis="x"), TypeError, "`out_axis` must be a whole number or None, got 'x'"),
        (lambda: Rule("a", None, out_axis=True), TypeError, "`out_axis` must be a whole number or None, got True"),
        (lambda: Rule("a", None, stacked=True), ValueError, "`stacked` must be a whole number .* got True"),
        (lambda: Rule("a", None, min_size=False), ValueError, "`min_size` must be a whole number .* got False"),
        (lambda: jaxvq.RowVQ(fraction=True), ValueError, "`fraction` must be above 0 and at most 1, got True"),
        (lambda: jaxvq.RowVQ(fraction="x"), ValueError, "`fraction` must be above 0 and at most 1, got 'x'"),
        (lambda: Rule("a", "KMeans"), TypeError, "`method` must be a method such as KMeans.* got 'KMeans'"),
        (lambda: Spec.from_json('{"out_axis": "x"}'), ValueError, "`out_axis` must be a whole number or None"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_kinds(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy():
    rule = Rule("a", Product(k=np.int64(4), dim=np.int32(2)), out_axis=np.int64(0), min_size=np.int64(3))
    assert Spec.from_json(Spec((rule,)).to_json()).rules == (rule,)
    assert type(rule.out_axis) is type(rule.method.k) is int
