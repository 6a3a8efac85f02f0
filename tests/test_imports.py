"""The layers of the package: imports go down only."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxvq"
LEVELS = {
    "_pytree": 0,
    "_numerics": 0,
    "layout": 1,
    "bits": 1,
    "array": 1,
    "stats": 1,
    "ops": 1,
    "cluster": 2,
    "scalar": 2,
    "_blocks": 3,
    "_checks": 3,
    "_fit": 3,
    "_method": 3,
    "methods": 3,
    "spec": 3,
    "training": 4,
    "quantize": 4,
    "finetune": 4,
    "_container": 5,
    "_hostcodes": 5,
    "_leaves": 5,
    "_stream": 5,
    "_writer": 5,
    "storage": 5,
    "metrics": 5,
    "linen": 5,
    "nnx": 5,
    "cli": 6,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
TABLES = sorted(path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" if module == "jaxvq" else module for alias in node.names}
    return names


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name for name in imports(path) if name.startswith("jaxvq.")}
    above = {name for name in used if LEVELS[part(name)] > LEVELS[own]}
    assert not above, f"{own} (level {LEVELS[own]}) imports {above}"
    if own in ("ops", "storage"):
        assert "cluster" not in {part(name) for name in used}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_inside_imports_the_package_itself(path):
    assert "jaxvq" not in imports(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_stay_where_they_belong(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert "flax" not in roots or path.relative_to(PACKAGE).parts[0] in ("linen", "nnx")
    assert "safetensors" not in roots or path.stem in ("storage", "_container")
    assert not roots & {"optax", "sklearn", "scipy", "matplotlib"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_tables_of_names_define_nothing(path):
    kinds = {type(node).__name__ for node in ast.parse(path.read_text()).body}
    assert kinds <= {"Expr", "ImportFrom"}


def test_modules_at_one_level_do_not_import_in_a_circle():
    graph = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): {
            name.removeprefix("jaxvq.") for name in imports(path) if name.startswith("jaxvq.")
        }
        for path in FILES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for used in graph.get(module, ()):
                visit(used, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_import_needs_no_flax_and_no_network():
    code = "import socket; socket.socket.connect = None; import sys, jaxvq; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("table", ["jaxvq", "jaxvq.linen", "jaxvq.nnx"])
def test_public_names_are_documented(table):
    module = importlib.import_module(table)
    public = {name: value for name, value in vars(module).items() if name[0].isupper() or callable(value)}
    assert len(public) > 5
    for name, value in public.items():
        assert value.__doc__, name
        without = ("save", "load", "Affine", "Codebook", "Codes", "TrainingState")
        assert "Example:" in value.__doc__ or name in without, f"{name} has no example"
