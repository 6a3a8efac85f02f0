import csv
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxvq
from jaxvq import _stream, cli, storage
from jaxvq._container import tensor_of
from jaxvq._writer import Writer

FAST = ("--method", "uniform")  # compiles least


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint of PyTorch names: (path, arrays)."""
    rng = np.random.default_rng(0)
    arrays = {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "fc.weight": rng.normal(size=(6, 36)).astype(np.float32),
        "fc.bias": rng.normal(size=6).astype(np.float32),
        "steps": np.array(7, np.int64),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt", "by": "me"})
    return tmp_path / "model.safetensors", arrays


def run(capsys, *args):
    """(exit code, standard output, standard error) of `jaxvq args`."""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def failed(capsys, *args):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("jaxvq: error: ")
    assert err.count("\n") == 1
    return err


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# -- the four commands


def test_quantize_then_dequantize(capsys, checkpoint, tmp_path):
    path, arrays = checkpoint
    code, out, err = run(capsys, "quantize", path, "-o", tmp_path / "q", "--bits", 3, "--per", "channel")
    assert (code, err) == (0, "")
    assert "KMeans(bits=3, per='channel')" in out
    loaded = storage.load(tmp_path / "q")
    assert set(loaded) == set(arrays)
    assert same(np.asarray(loaded["steps"]), arrays["steps"])
    assert same(np.asarray(loaded["fc.bias"]), arrays["fc.bias"])

    assert run(capsys, "dequantize", tmp_path / "q", "-o", tmp_path / "d") == (0, "", "")
    plain = load_file(tmp_path / "d")
    with safe_open(tmp_path / "d", "numpy") as file:
        assert file.metadata() == {"format": "pt", "by": "me"}
    assert {name: (a.shape, a.dtype) for name, a in plain.items()} == {
        name: (a.shape, a.dtype) for name, a in arrays.items()
    }
    assert same(plain["conv.weight"], np.asarray(loaded["conv.weight"].dequantize()))
    assert same(plain["steps"], arrays["steps"])
    for row, column in zip(plain["fc.weight"], arrays["fc.weight"], strict=True):  # axis 0 is out
        assert len(set(row.tolist())) <= 8 < len(set(column.tolist()))


def test_quantize_is_what_the_library_does(capsys, checkpoint, tmp_path):
    path, arrays = checkpoint
    run(capsys, "quantize", path, "-o", tmp_path / "q", "--bits", 2, "--seed", 5)
    params = {name: jnp.asarray(a) for name, a in arrays.items() if name != "steps"}
    expected = jaxvq.quantize_params(params, jaxvq.KMeans(bits=2), key=jax.random.key(5))
    loaded = storage.load(tmp_path / "q")
    for name, leaf in expected.items():
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(loaded[name]), strict=True)
        assert all(same(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_reports_add_up_to_the_file(capsys, checkpoint, tmp_path):
    path, arrays = checkpoint
    code, out, _ = run(capsys, "quantize", path, "-o", tmp_path / "q", "--json", *FAST)
    report = json.loads(out)
    with storage.CheckpointReader(tmp_path / "q") as reader:
        data = reader.file_nbytes - reader.header_nbytes
    assert code == 0
    assert report["total"]["nbytes"] == data
    assert sum(leaf["nbytes"] for leaf in report["leaves"]) + report["checksums_nbytes"] == data
    leaf = next(leaf for leaf in report["leaves"] if leaf["path"] == "fc.weight")
    error = arrays["fc.weight"] - np.asarray(storage.load(tmp_path / "q")["fc.weight"].dequantize())
    expected = 10 * np.log10(np.sum(arrays["fc.weight"] ** 2) / np.sum(error**2))
    assert leaf["sqnr_db"] == pytest.approx(expected, rel=1e-5)


def test_plan_is_what_quantize_does(capsys, checkpoint, tmp_path):
    path, _ = checkpoint
    code, out, err = run(capsys, "plan", path, "--bits", 4, "--json")
    assert (code, err) == (0, "")
    run(capsys, "quantize", path, "-o", tmp_path / "q", "--bits", 4)
    planned = json.loads(out)
    with storage.CheckpointReader(tmp_path / "q") as reader:
        assert planned["total"]["nbytes"] == reader.file_nbytes - reader.header_nbytes
    assert [leaf["path"] for leaf in planned["leaves"]] == ["conv.weight", "fc.bias", "fc.weight", "steps"]
    assert all(leaf["note"] for leaf in planned["leaves"] if leaf["method"] == "float")


def test_plan_reads_no_weights(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(storage.CheckpointReader, "read", lambda *_: pytest.fail("read a weight"))
    code, out, _ = run(capsys, "plan", checkpoint[0])
    assert code == 0
    assert "plan for" in out
    assert "KMeans()" in out


def test_inspect(capsys, checkpoint, tmp_path):
    run(capsys, "quantize", checkpoint[0], "-o", tmp_path / "q", "--bits", 4)
    code, out, err = run(capsys, "inspect", tmp_path / "q")
    assert (code, err) == (0, "")
    assert f"{(tmp_path / 'q').stat().st_size:,} bytes" in out
    assert "codebook 16x1" in out
    report = json.loads(run(capsys, "inspect", tmp_path / "q", "--json")[1])
    assert report["format"] == "jaxvq"
    assert report["metadata"] == {"format": "pt", "by": "me"}
    assert report["header_nbytes"] + report["total"]["nbytes"] == report["file_nbytes"]


def test_inspect_a_foreign_file(capsys, checkpoint):
    code, out, _ = run(capsys, "inspect", checkpoint[0])
    assert code == 0
    assert "not a jaxvq file, a safetensors file of 4 tensors" in out
    assert "4x3x3x3" in out
    tensors = json.loads(run(capsys, "inspect", checkpoint[0], "--json")[1])["tensors"]
    assert {"path": "fc.weight", "dtype": "F32", "shape": [6, 36], "nbytes": 864} in tensors


def test_bfloat16_goes_through(capsys, tmp_path):
    array = jax.random.normal(jax.random.key(0), (8, 12), jnp.bfloat16)
    with Writer(tmp_path / "x", [tensor_of("a/kernel", array)], {}) as writer:
        writer.write("a/kernel", array)
    assert run(capsys, "quantize", tmp_path / "x", "-o", tmp_path / "q", *FAST)[0] == 0
    assert run(capsys, "dequantize", tmp_path / "q", "-o", tmp_path / "d")[0] == 0
    with storage.CheckpointReader(tmp_path / "d") as reader:
        near = reader.read("a/kernel")
    assert near.dtype == jnp.bfloat16
    assert float(jnp.abs(near.astype(jnp.float32) - array.astype(jnp.float32)).max()) < 0.05


# -- options


def test_keep_and_out_axis(capsys, checkpoint):
    options = ("--bits", 2, "--per", "channel", "--keep", "conv.*", "--out-axis", 1, "--json")
    leaves = json.loads(run(capsys, "plan", checkpoint[0], *options)[1])["leaves"]
    methods = {leaf["path"]: leaf["method"] for leaf in leaves}
    assert methods["conv.weight"] == "float"
    assert methods["fc.weight"] == "KMeans(bits=2, per='channel')"
    tables = {leaf["path"]: leaf["codebook_nbytes"] for leaf in leaves}
    assert tables["fc.weight"] == 36 * 4 * 4  # 36 columns, 4 centroids, 4 bytes


def test_out_axis_before_the_convention(capsys, tmp_path):
    save_file({"w.weight": np.ones((32, 4), np.float32)}, tmp_path / "x")  # 4 values a row: too few for 16 centroids
    options = ("--bits", 4, "--per", "channel")
    assert "w.weight" in failed(capsys, "plan", tmp_path / "x", *options)
    leaf = json.loads(run(capsys, "plan", tmp_path / "x", *options, "--out-axis", 1, "--json")[1])["leaves"][0]
    assert leaf["codebook_nbytes"] == 4 * 16 * 4


def test_spec_file(capsys, checkpoint, tmp_path):
    spec = jaxvq.Spec((jaxvq.Rule("conv.weight", None),), jaxvq.KMeans(bits=3))
    (tmp_path / "spec.json").write_text(spec.to_json())
    leaves = json.loads(run(capsys, "plan", checkpoint[0], "--spec", tmp_path / "spec.json", "--json")[1])["leaves"]
    methods = {leaf["path"]: leaf["method"] for leaf in leaves}
    assert methods["conv.weight"] == "float"
    assert methods["fc.weight"] == "KMeans(bits=3)"


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (("--method", "uniform", "--bits", 3, "--per", "12"), "Uniform(bits=3, per=12)"),
        (("--method", "Symmetric", "--bits", 3), "Symmetric(bits=3)"),
        (("--k", 13, "--codebook-dtype", "int8"), "KMeans(k=13, codebook_dtype='int8')"),
        (("--method", "rowvq", "--fraction", 0.5), "RowVQ(fraction=0.5)"),
        (("--method", "product", "--bits", 2, "--dim", 9, "--codebooks", "subspace"), "Product(bits=2, dim=9"),
        (("--method", "residual", "--bits", 2, "--dim", 4, "--stages", 3), "Residual(stages=3, bits=2, dim=4"),
    ],
)
def test_methods(capsys, checkpoint, options, method):
    code, out, err = run(capsys, "plan", checkpoint[0], *options)
    assert (code, err) == (0, "")
    assert method in out


# -- interrupts


def stop_after(count):
    """A progress bar that presses Ctrl-C after `count` leaves."""

    def progress(items, text):
        for done, item in enumerate(items):
            if done == count and text != "measuring":
                raise KeyboardInterrupt
            yield item

    return progress


def noting(write, names):
    """`write`, with the names of what is written put down."""

    def wrapped(self, name, value):
        names.append(name)
        write(self, name, value)

    return wrapped


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_an_interrupted_run_resumes(capsys, checkpoint, tmp_path, monkeypatch, command):
    source = checkpoint[0]
    options = FAST if command == "quantize" else ()
    if command == "dequantize":
        run(capsys, "quantize", source, "-o", tmp_path / "q", *FAST)
        source = tmp_path / "q"
    run(capsys, command, source, "-o", tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_progress", stop_after(2))
        code, out, err = run(capsys, command, source, "-o", tmp_path / "x", *options)
    assert (code, out) == (130, "")
    assert "interrupted; run the same command again to go on from" in err
    assert "x.partial" in err
    assert not (tmp_path / "x").exists()

    written = []
    for writer in (storage.CheckpointWriter, _stream.Writer):
        monkeypatch.setattr(writer, "write", noting(writer.write, written))
    assert run(capsys, command, source, "-o", tmp_path / "x", *options)[0] == 0
    assert {name.split("#")[0] for name in written} == {"fc.weight", "steps"}
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize("change", ["source", "seed", "spec"])
def test_another_run_does_not_resume(capsys, checkpoint, tmp_path, monkeypatch, change):
    path, arrays = checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_progress", stop_after(2))
        assert run(capsys, "quantize", path, "-o", tmp_path / "x", *FAST)[0] == 130
    options = {"source": FAST, "seed": [*FAST, "--seed", 1], "spec": [*FAST, "--bits", 3]}
    if change == "source":
        save_file({**arrays, "conv.weight": arrays["conv.weight"] + 9}, path, metadata={"format": "pt", "by": "me"})
        os.utime(path, ns=(1, 1))
    run(capsys, "quantize", path, "-o", tmp_path / "x", *options[change])
    run(capsys, "quantize", path, "-o", tmp_path / "whole", *options[change])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()


INTERRUPT = """
import os, signal, sys
import jax.numpy as jnp
from jaxvq import cli
def progress(items, text):
    yield items[0]
    product = jnp.ones((2000, 2000))
    for _ in range(50):
        product = product @ product  # still running when Python ends
    os.kill(os.getpid(), signal.SIGINT)
    yield items[1]
cli._progress = progress
cli.main()
"""


@pytest.mark.slow
def test_an_interrupted_process_ends_cleanly(checkpoint, tmp_path):
    arguments = ["quantize", str(checkpoint[0]), "-o", str(tmp_path / "q"), *FAST]
    done = subprocess.run([sys.executable, "-c", INTERRUPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("jaxvq: interrupted; run the same command again")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "q.partial").exists()


def test_an_interrupted_inspect_has_nothing_to_resume(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(cli, "inspect_file", lambda *_, **__: None)
    monkeypatch.setattr(cli, "CheckpointReader", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(capsys, "inspect", checkpoint[0]) == (130, "", "jaxvq: interrupted\n")


# -- bad input: one line, exit code 2, nothing half-written


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf(capsys, tmp_path, value):
    bad = np.ones((4, 4), np.float32)
    bad[1, 2] = value
    save_file({"a.weight": np.eye(4, dtype=np.float32), "b.weight": bad}, tmp_path / "x")
    assert "b.weight" in failed(capsys, "quantize", tmp_path / "x", "-o", tmp_path / "q", *FAST)
    assert files(tmp_path) == ["x"]


def test_existing_output(capsys, checkpoint, tmp_path):
    (tmp_path / "q").write_text("precious")
    for command in ("quantize", "dequantize"):
        source = checkpoint[0]
        if command == "dequantize":
            source = tmp_path / "source"
            run(capsys, "quantize", checkpoint[0], "-o", source, *FAST)
        assert "exists already" in failed(capsys, command, source, "-o", tmp_path / "q")
        assert (tmp_path / "q").read_text() == "precious"
    assert run(capsys, "quantize", checkpoint[0], "-o", tmp_path / "q", "--force", *FAST)[0] == 0
    assert set(storage.load(tmp_path / "q")) == set(checkpoint[1])


def test_missing_files(capsys, checkpoint, tmp_path):
    for command in (["plan"], ["inspect"], ["quantize", "-o", "q"], ["dequantize", "-o", "q"]):
        assert "nowhere: no such file" in failed(capsys, *command, tmp_path / "nowhere")
    assert "does not exist" in failed(capsys, "quantize", checkpoint[0], "-o", tmp_path / "no" / "q")
    assert "no such file" in failed(capsys, "plan", checkpoint[0], "--spec", tmp_path / "nospec")
    assert "another file" in failed(capsys, "quantize", checkpoint[0], "-o", checkpoint[0], "--force")


def test_bad_specs(capsys, checkpoint, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json: `spec` must be JSON" in failed(capsys, "plan", checkpoint[0], "--spec", tmp_path / "bad.json")
    assert "cannot be joined with `--bits`" in failed(capsys, "plan", checkpoint[0], "--spec", "x", "--bits", 4)
    for content in ("[]", "3", '{"rules": 3}', '{"default": {"method": "Magic"}}', '{"what": 1}'):
        (tmp_path / "odd.json").write_text(content)
        assert "odd.json: " in failed(capsys, "plan", checkpoint[0], "--spec", tmp_path / "odd.json")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--keep", "nothing"], "nothing"),
        (["--keep", "("], "("),
        (["--bits", 0], "bits"),
        (["--bits", 99], "bits"),
        (["--per", "row"], "per"),
        (["--per", "-1"], "got -1"),
        (["--dim", 4], "dim"),
        (["--method", "product", "--k", 999], "weight"),
        (["--out-axis", 7], "axis"),
    ],
)
def test_options_that_do_not_fit(capsys, checkpoint, tmp_path, options, match):
    error = failed(capsys, "quantize", checkpoint[0], "-o", tmp_path / "q", *options)
    assert match in error
    assert files(tmp_path) == ["model.safetensors"]


def test_rules_on_integers_and_scalars(capsys, checkpoint, tmp_path):
    spec = jaxvq.Spec((jaxvq.Rule("steps", jaxvq.KMeans(bits=2)),))
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert "steps" in failed(capsys, "plan", checkpoint[0], "--spec", tmp_path / "spec.json")


def test_damaged_and_foreign_files(capsys, checkpoint, tmp_path):
    path = checkpoint[0]
    assert "not a jaxvq file; `jaxvq quantize` makes" in failed(capsys, "dequantize", path, "-o", tmp_path / "d")
    run(capsys, "quantize", path, "-o", tmp_path / "q", *FAST)
    assert "quantized already" in failed(capsys, "quantize", tmp_path / "q", "-o", tmp_path / "qq")
    assert "quantized already" in failed(capsys, "plan", tmp_path / "q")
    data = bytearray((tmp_path / "q").read_bytes())
    data[-1] ^= 1
    (tmp_path / "q").write_bytes(data)
    for command in (["inspect"], ["dequantize", "-o", tmp_path / "d"]):
        assert "does not match its checksum" in failed(capsys, *command, tmp_path / "q")
    (tmp_path / "q").write_bytes(data[:-3])
    for command in (["inspect"], ["plan"], ["dequantize", "-o", tmp_path / "d"]):
        assert "cut short" in failed(capsys, *command, tmp_path / "q")
    assert files(tmp_path) == ["model.safetensors", "q"]


def test_csv(capsys, checkpoint, tmp_path):
    output = ["-o", tmp_path / "q"]
    tables = [run(capsys, "plan", checkpoint[0], "--csv", *FAST)[1]]
    tables.append(run(capsys, "quantize", checkpoint[0], *output, "--csv", *FAST)[1])
    tables.append(run(capsys, "inspect", tmp_path / "q", "--csv")[1])
    for text in tables:
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["path"] for row in rows[-2:]] == ["#crc32", "total"]
        with storage.CheckpointReader(tmp_path / "q") as reader:
            assert int(rows[-1]["nbytes"]) == reader.file_nbytes - reader.header_nbytes
    plain = list(csv.DictReader(io.StringIO(run(capsys, "inspect", checkpoint[0], "--csv")[1])))
    assert {"path": "fc.weight", "dtype": "F32", "shape": "6x36", "nbytes": "864"} in plain


def test_dequantize_prints_json(capsys, checkpoint, tmp_path):
    run(capsys, "quantize", checkpoint[0], "-o", tmp_path / "q", *FAST)
    out = run(capsys, "dequantize", tmp_path / "q", "-o", tmp_path / "d", "--json")[1]
    assert json.loads(out) == {"file": str(tmp_path / "d"), "nbytes": (tmp_path / "d").stat().st_size}


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(capsys, checkpoint, seed):
    assert f"`--seed` must be from 0 to 2**63 - 1, got {seed}" in failed(
        capsys, "plan", checkpoint[0], f"--seed={seed}"
    )


def test_largest_seed(capsys, checkpoint, tmp_path):
    assert run(capsys, "quantize", checkpoint[0], "-o", tmp_path / "q", "--seed", 2**63 - 1, *FAST)[0] == 0


def test_an_output_that_is_a_folder(capsys, checkpoint, tmp_path):
    for output in (".", tmp_path):
        assert f"{output}: is a folder; name a file" in failed(
            capsys, "quantize", checkpoint[0], "-o", output, "--force", *FAST
        )


def test_a_spec_that_is_no_text(capsys, checkpoint, tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"\xff\xfe\x80")
    assert "odd.bin: must be the JSON text of a spec" in failed(
        capsys, "plan", checkpoint[0], "--spec", tmp_path / "odd.bin"
    )


def test_the_lines_of_the_readme(capsys, checkpoint, tmp_path):
    options = ("--bits", 4, "--per", "channel")
    arrays = {**checkpoint[1], "norm.weight": np.ones((2, 32), np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    assert run(capsys, "plan", tmp_path / "model.safetensors", *options)[0] == 0
    out = run(
        capsys, "quantize", tmp_path / "model.safetensors", "-o", tmp_path / "small", *options, "--keep", ".*norm.*"
    )[1]
    line = next(line for line in out.splitlines() if line.startswith("norm.weight"))
    assert "float" in line
    assert "kept by rule '.*norm.*'" in line


def test_usage_errors(capsys):
    for arguments in ([], ["quantize", "x"], ["melt"], ["plan", "x", "--method", "magic"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert "usage: jaxvq" in capsys.readouterr().err
