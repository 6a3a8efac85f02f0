import dataclasses
import functools
import json
import os
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_matmul, matmul_contenders
from experiments.bench_matmul import Case, Config, Target
from experiments.matmul_contenders import CONTENDERS, PEERS, Contender, Peer, Run

CODED = [name for name, contender in CONTENDERS.items() if contender.judged]
TINY = dataclasses.replace(bench_matmul.SMOKE, weights=2, columns=8, repeats=1)
LAUNCHES = """HloModule jit_f, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p, %p)
}

%graph (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  %gemm.1 = (f32[2]{0}, s8[4]{0}) custom-call(%q), custom_call_target="__cublas$gemm"
  ROOT %part = f32[2]{0} get-tuple-element(%gemm.1), index=0
}

%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], /*index=1*/f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%t), index=1
  %both = f32[2]{0} call(%x), to_apply=%graph
  %more = f32[2]{0} fusion(%both), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[2]{0}) tuple(%x, %more)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[2]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[2]{0}) while(%start), condition=%cond, body=%body
  %end = f32[2]{0} get-tuple-element(%loop), index=1
  %own = f32[2]{0} custom-call(%end), custom_call_target="__gpu$xla.gpu.ptx", backend_config={name = "a call(b)"}
  ROOT %copied = f32[2]{0} copy(%own)
}
"""


@pytest.fixture
def quiet():
    return bench_matmul.Console(quiet=True)


def codes_by_hand(w):
    """The codes `[g, out, m]`, from the bits of the words written one after another."""
    words = np.asarray(w.codes.words)
    stream = ((words[:, None] >> np.arange(32)[None, :, None, None]) & 1).reshape(-1, *words.shape[1:])
    used = w.codes.length * w.codes.bits
    assert not stream[used:].any()
    digits = stream[:used].reshape(w.codes.length, w.codes.bits, *words.shape[1:])
    return (digits << np.arange(w.codes.bits)[:, None, None]).sum(axis=1)


@pytest.mark.parametrize("name", CODED)
def test_weights_are_codes_of_every_value(name, key):
    w = CONTENDERS[name].make(key, 24, 130)
    w.validate()
    assert (w.shape, w.dtype) == ((24, 130), jnp.bfloat16)
    codes = codes_by_hand(w)
    assert (codes == w.unpack()).all()
    assert codes.max() > 0.9 * 2**w.codes.bits - 1
    assert matmul_contenders.nbytes_of(w) == w.nbytes


def test_columns_are_those_of_the_decoded_weight(key):
    columns = np.array([3, 0, 129])
    w = CONTENDERS["residual-2x8"].make(key, 24, 130)
    tables, codes = np.asarray(w.decoder.vectors, "f")[0, 0], codes_by_hand(w)[:, columns]
    vectors = tables[0][codes[..., 0]] + tables[1][codes[..., 1]]
    found = CONTENDERS["residual-2x8"].columns(w, columns)
    np.testing.assert_allclose(found, vectors.transpose(0, 2, 1).reshape(24, 3), rtol=1e-6)
    w = CONTENDERS["palette4-int8"].make(key, 24, 130)
    tables, codes = np.asarray(w.decoder.vectors, "f")[0, :, 0, :, 0], codes_by_hand(w)[..., 0]
    scaled = tables[columns, codes[:, columns]] * np.asarray(w.decoder.scale)[0, columns, 0, 0, 0]
    np.testing.assert_allclose(CONTENDERS["palette4-int8"].columns(w, columns), scaled, rtol=1e-6)


def test_both_ways_to_store_floats_are_the_same_product(key):
    w, columns = CONTENDERS["bf16"].make(key, 24, 16), np.array([5, 2])
    x = jax.random.normal(key, (3, 24), jnp.bfloat16)
    other = CONTENDERS["bf16-transposed"]
    assert other.make(key, 24, 16).shape == (16, 24)
    assert (CONTENDERS["bf16"].columns(w, columns) == other.columns(w.T, columns)).all()
    np.testing.assert_allclose(
        np.asarray(CONTENDERS["bf16"].product(x, w), "f"), np.asarray(other.product(x, w.T), "f"), rtol=1e-2
    )


def test_weights_differ_and_small_ones_are_more():
    made = bench_matmul.make_weights("bf16", (16, 8), dataclasses.replace(TINY, working_nbytes=5 * 256 - 1))
    assert len(made) == 5
    assert len({np.asarray(w, "f").tobytes() for w in made}) == 5
    config = Config()
    assert config.in_turn(2 * 4096 * 14336) == 48
    assert config.in_turn(1024 * 1024) == 96  # 48 would be 50 MB, which is what the cache holds


def test_a_loop_adds_up_every_product(key):
    xs = jax.random.normal(key, (2, 3, 16)).astype(jnp.bfloat16)
    weights = [jax.random.normal(jax.random.fold_in(key, i), (16, 130)).astype(jnp.bfloat16) for i in range(2)]
    found = matmul_contenders.many_turns(jnp.matmul, 3, xs, weights)
    x, w = np.asarray(xs, np.float64), np.asarray(weights, np.float64).sum(axis=0)[:, :16]
    np.testing.assert_allclose(found, (2 * x[0] + x[1]) @ w, atol=0.2, rtol=2e-2)  # 6 products rounded to bfloat16


def test_a_loop_without_weights_adds_up_x():
    xs = jnp.stack([jnp.full((1, 128), 2.0), jnp.full((1, 128), 5.0)]).astype(jnp.bfloat16)
    assert matmul_contenders.many_turns(jnp.matmul, 3, xs, []).tolist() == [[9.0] * 128]


def test_no_two_products_have_the_same_x():
    """Of those XLA would make one."""
    xs, weights = jnp.ones((2, 1, 8), jnp.bfloat16), [jnp.ones((8, 16), jnp.bfloat16)] * 3
    program = jax.make_jaxpr(functools.partial(matmul_contenders.many_turns, jnp.matmul, 2))(xs, weights)
    (loop,) = (equation for equation in program.jaxpr.eqns if "jaxpr" in equation.params)
    products = [equation for equation in loop.params["jaxpr"].eqns if equation.primitive.name == "dot_general"]
    assert len({product.invars[0] for product in products}) == len(products) == 3


def test_nothing_about_the_weights_is_computed_outside_the_loop():
    weights = bench_matmul.make_weights("palette4-xla", (32, 128), TINY)
    xs = jnp.ones((2, 1, 32), jnp.bfloat16)
    run = Run({}, 2, weights)
    text = matmul_contenders.compiled(CONTENDERS["palette4-xla"].product, run, xs).as_text()
    entry = text[text.index("\nENTRY") :]
    reading = [line for line in entry.splitlines()[2:] if re.search(r"\(.*%weights_", line)]
    assert len(reading) >= 1
    assert all(re.search(r" (tuple|bitcast|while)\(", line) for line in reading), reading


def test_launches_are_counted_where_they_happen():
    assert matmul_contenders.launches(LAUNCHES) == 4  # a product in a graph and a fusion in the loop, a call, a copy
    program = jax.jit(lambda x: x).lower(jnp.ones(3)).compile()
    assert matmul_contenders.launches(program.as_text()) <= 1


def measured(name, microseconds, rows=1, **more):
    row = bench_matmul.first_row(name, Case(64, 32, rows, 1), nbytes=480)
    return row | {"microseconds": microseconds} | more


def test_ratios_are_to_the_faster_reference():
    rows = [measured("bf16", 8.0), measured("bf16-transposed", 6.0), measured("palette4", 2.0)]
    bench_matmul.compare(rows, Case(64, 32, 1, 1), dataclasses.replace(TINY, bandwidth=1e9))
    assert [row["speed"] for row in rows] == pytest.approx([0.75, 1, 3])
    assert rows[2]["bits_per_weight"] == pytest.approx(1.875)
    assert rows[2]["times_floor"] == pytest.approx(2 / 0.48)
    assert rows[2]["tbytes_per_second"] == pytest.approx(480 / 2e-6 / 1e12)


def test_targets_are_judged_and_told():
    targets = (Target("palette4", 3.0), Target("palette4", 3.1), Target("palette4", 1.0, "torchao-int4"))
    rows = [measured("bf16", 6.0), measured("palette4", 2.0, relative_error=0.01)]
    bench_matmul.compare(rows, Case(64, 32, 1, 1, targets), TINY)
    assert [target["met"] for target in rows[1]["targets"]] == [True, False, None, False]
    assert bench_matmul.remarks(rows[1]) == [
        "3.00 times as fast as bf16 of at least 3: met",
        "3.00 times as fast as bf16 of at least 3.1: MISSED",
        " times as fast as torchao-int4 of at least 1: not known",
        "error 1.0e-02, under 0.004: MISSED",
    ]
    assert rows[0]["targets"] == []
    found = bench_matmul.finding(rows)
    assert found == "4-bit palettes at one row are 3.00 times as fast as bf16; 1 of 3 targets met"
    slower, faster = rows[1] | {"speed": 0.5}, rows[1] | {"speed": 12.0}
    assert "row are 0.50 to 12.00 times" in bench_matmul.finding([*rows, slower, faster])
    rows = [measured("bf16", 6.0), measured("palette4", 2.0, relative_error=0.001), measured("torchao-int4", 3.0)]
    bench_matmul.compare(rows, Case(64, 32, 1, 1, targets), TINY)
    assert [target["met"] for target in rows[1]["targets"]] == [True, False, True, True]


def test_targets_are_those_of_the_claim():
    wanted = {1: {"palette4": 2.3, "palette4-int8": 2.3, "palette3": 2.5, "residual-2x8": 2.0, "product-12": 1.8}}
    wanted |= {16: {"palette4": 1.8, "palette4-int8": 1.8}, 128: {}}
    wanted |= {2048: dict.fromkeys(set(CODED) - {"product-16", "palette4-xla"}, 0.85)}
    cases = {(case.inputs, case.outputs, case.rows): case for case in Config().cases}
    assert set(cases) == {(4096, out, rows) for out in (14336, 4096) for rows in (1, 16, 128, 2048)}
    for (_, _, rows), case in cases.items():
        assert {t.contender: t.least for t in case.targets if t.rival == "bf16"} == wanted[rows]
        beaten = {t.contender for t in case.targets if (t.rival, t.least) == ("torchao-int4", 1.0)}
        assert beaten == ({"palette4", "palette4-int8"} if rows == 1 else set())


def test_a_wrong_product_is_noticed(quiet, monkeypatch):
    right = CONTENDERS["palette4-xla"]
    wrong = dataclasses.replace(right, product=lambda x, w: right.product(x, w) * jnp.bfloat16(1.125))
    errors = []
    for contender in (right, wrong):
        monkeypatch.setitem(CONTENDERS, "palette4-xla", contender)
        made = {"palette4-xla": bench_matmul.make_weights("palette4-xla", (32, 128), TINY)}
        (run,) = bench_matmul.race(Case(32, 128, 3, 1), made, TINY, quiet)
        errors.append(run.row["relative_error"])
    assert errors[0] < TINY.largest_error
    assert errors[1] == pytest.approx(0.125, abs=0.01)


def test_writes_results_and_a_chart(tmp_path, monkeypatch, capsys):
    def fails(x, w):
        raise RuntimeError("no room on the device\nand more")

    def find(names, say):
        say("aqlm is nowhere")
        return {name: [] for name in names}

    broken = Contender("broken", matmul_contenders.matrix, fails, CONTENDERS["bf16"].columns)
    monkeypatch.setitem(CONTENDERS, "palette2", broken)
    monkeypatch.setattr(bench_matmul, "apart", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(bench_matmul, "find_peers", find)
    answers = [(1e-6, 4096, 2), OSError("nothing\nat all")]

    def seconds(peer, modules, shape, **settings):
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(bench_matmul, "peer_seconds", seconds)
    config = dataclasses.replace(
        TINY,
        cases=(Case(64, 128, 1, 2, (Target("palette4-xla", 1e-3),)),),
        contenders=("bf16", "palette2", "palette4-xla"),
        peers=("torchao-int4", "aqlm-2x8"),
        out=tmp_path / "out",
    )
    found = bench_matmul.main(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "out" / "bench_matmul.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["contender"]: row for row in found["rows"]}
    assert rows["palette2"]["failed"] == "failed: no room on the device"
    assert rows["aqlm-2x8"]["failed"] == "failed: OSError: nothing"
    assert rows["torchao-int4"]["speed"] == pytest.approx(rows["bf16"]["microseconds"])
    ours = rows["palette4-xla"]
    assert ours["relative_error"] < 4e-3
    assert not ours["kernel"]
    assert ours["weights"] == 2
    assert [target["met"] for target in ours["targets"]] == [True, True]
    out = capsys.readouterr().out
    assert "aqlm is nowhere" in out
    assert "broken: failed: no room on the device" in out
    assert "of at least 0.001: met" in out
    assert "2 of 2 targets met" in out


def test_packages_for_pytorch_run_in_a_process_of_their_own(monkeypatch, capsys):
    config = dataclasses.replace(TINY, peers=("aqlm-2x8",))
    nobody = {case: [] for case in config.cases}
    assert bench_matmul.rows_of_peers(config, bench_matmul.Console()) == nobody
    assert "left out: AQLM 2 x 8" in capsys.readouterr().out
    monkeypatch.setattr(bench_matmul, "apart", functools.partial(ends_early, bench_matmul.apart))
    assert bench_matmul.rows_of_peers(config, bench_matmul.Console()) == nobody
    assert "the process of the packages for PyTorch has ended early; they are left out" in capsys.readouterr().out


def ends_early(apart, work, config):
    return apart(os._exit, 1)


def test_missing_packages_are_named_once(monkeypatch):
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace())
    said = []
    monkeypatch.setattr(matmul_contenders.importlib, "import_module", fake_import(torch))
    peers = matmul_contenders.find_peers(tuple(PEERS), said.append)
    assert list(peers) == ["torch-bf16", "bitsandbytes-nf4"]
    assert peers["bitsandbytes-nf4"][0] is torch
    assert said == [
        "torchao is not installed: pip install torchao; left out: torchao int4",
        "aqlm is not installed: pip install aqlm[gpu]; left out: AQLM 2 x 8, AQLM 1 x 16",
    ]


def fake_import(torch):
    def load(name):
        if name in ("torch", "bitsandbytes"):
            return torch
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return load


def test_without_pytorch_or_its_gpu_all_are_left_out(monkeypatch):
    everyone = ", ".join(peer.title for peer in PEERS.values())
    said = []
    monkeypatch.setattr(
        matmul_contenders.importlib,
        "import_module",
        lambda name: types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False)),
    )
    assert matmul_contenders.find_peers(tuple(PEERS), said.append) == {}
    assert said == [f"PyTorch sees no GPU; left out: {everyone}"]


class FakeTorch:
    """As much of PyTorch as timing takes: a replay of a graph lasts a millisecond for each product in it."""

    float16 = "float16"

    def __init__(self):
        self.clock, self.recording, self.calls = 0.0, None, []
        torch = self

        class Context:
            def __enter__(self):
                return None

            def __exit__(self, *problem):
                torch.recording = None

        class Graph:
            def replay(self):
                torch.clock += self.products

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = torch.clock

            def elapsed_time(self, other):
                return other.at - self.at

        def graph(recorded):
            recorded.products = 0
            torch.recording = recorded
            return Context()

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        self.no_grad = Context
        self.randn = lambda *shape, device, dtype: (shape, dtype)
        self.cuda = types.SimpleNamespace(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda one: Context(),
            CUDAGraph=Graph,
            graph=graph,
            Event=Event,
            synchronize=lambda: None,
        )

    def product(self, x):
        self.calls.append(x)
        if self.recording is not None:
            self.recording.products += 1


def test_graphs_of_pytorch_are_timed_by_events():
    torch = FakeTorch()
    peer = Peer("fake", (), lambda torch, inputs, outputs: (torch.product, inputs * outputs), "float16")
    seconds, nbytes, weights = matmul_contenders.peer_seconds(
        peer, [torch], (3, 64, 32), count=lambda nbytes: nbytes // 512, turns=5, repeats=2
    )
    assert (seconds, nbytes, weights) == (pytest.approx(1e-3), 64 * 32, 4)
    assert torch.calls == [((3, 64), "float16")] * 12  # two turns before the one that is recorded


def test_every_version_of_torchao_is_asked_its_way():
    asked = []

    def config(group_size, **more):
        asked.append((group_size, more))
        if more:
            raise TypeError("unexpected keyword")
        return "newer"

    assert matmul_contenders._int4_of_torchao(types.SimpleNamespace(Int4WeightOnlyConfig=config)) == "newer"
    assert asked == [(128, {"int4_packing_format": "tile_packed_to_4d"}), (128, {})]
    old = types.SimpleNamespace(int4_weight_only=lambda group_size: group_size)
    assert matmul_contenders._int4_of_torchao(old) == 128


def test_only_some_contenders_and_rows():
    some = Config().only(["palette3", "torchao-int4"], [16, 1])
    assert some.contenders == ("bf16", "bf16-transposed", "palette3")
    assert some.peers == ("torchao-int4",)
    assert {case.rows for case in some.cases} == {1, 16}
    assert Config().only(None, None) == Config()
    with pytest.raises(ValueError, match=r"`--rows` must be of \[1, 16, 128, 2048\], got \[3\]"):
        Config().only(None, [1, 3])


def test_the_command_line_refuses_what_it_cannot_do(capsys):
    for arguments, message in (
        ([], "an NVIDIA GPU is needed, and jax sees none; --smoke runs anywhere"),
        (["--smoke", "--rows", "3"], "`--rows` must be of [1, 16], got [3]"),
        (["--smoke", "--only", "palette5"], "invalid choice: 'palette5'"),
    ):
        with pytest.raises(SystemExit):
            bench_matmul.cli(arguments)
        assert message in capsys.readouterr().err
