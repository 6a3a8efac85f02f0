import ast
import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from notebooks import FOLDER, ROOT, execute, parameters, read

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = """
import socket

arguments = ["--smoke", *{more}]
socket.socket.connect = None  # no network
"""
MORE = {"resnet_pq": ["--recipes", "palettes"]}  # compiles the quickest
MOST_BYTES = 300_000
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook) -> list[str]:
    """The code cells as plain Python."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [TransformerManager().transform_cell(source) for source in cells]


def images_of(notebook) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_each_source_has_a_notebook():
    assert {path.stem for path in NOTEBOOKS} == {"mnist_cnn", "mnist_mlp", "resnet_pq", "two_moons", "vq_basics"}


@every_notebook
def test_defines_nothing_and_imports_the_project(path):
    trees = [ast.parse(source) for source in code_of(read(path))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert not [ast.unparse(node) for node in nodes if isinstance(node, DEFINITIONS)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "jaxvq" in modules
    assert "experiments" in modules


@every_notebook
def test_is_kept_clean(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert len(parameters(notebook)) == 1
    assert images_of(notebook)
    text = path.read_text()
    assert not [word for word in (str(ROOT), str(pathlib.Path.home()), "/tmp/", "Traceback", "stderr") if word in text]
    assert len(text) < MOST_BYTES


@pytest.fixture
def installed(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that the first cell runs, in a folder outside the checkout; none of them is run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return commands


@every_notebook
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("on_colab", [False, True])
def test_first_cell_installs_only_on_colab_and_only_what_is_missing(path, missing, on_colab, installed, monkeypatch):
    find = importlib.util.find_spec
    hidden = {"jaxvq", "experiments"} if missing else set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    first = read(path).cells[0]
    assert first.cell_type == "code"
    exec(first.source, {})
    if not (missing and on_colab):
        assert installed == []
        return
    clone, install = installed
    assert clone[:2] == ["git", "clone"]
    assert install[1:4] == ["-m", "pip", "install"]
    assert any(part.endswith("[experiments]") for part in install)
    assert sys.path[0] == clone[-1]


@every_notebook
def test_runs_on_small_data(path, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nothing stays behind
    for name in ("TFDS_DATA_DIR", "JAXVQ_CIFAR10_DIR"):
        monkeypatch.delenv(name, raising=False)
    notebook = read(path)
    cell = parameters(notebook)[0]
    cell.source += SMALL.format(more=MORE.get(path.stem, []))
    execute(notebook)
    assert images_of(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
