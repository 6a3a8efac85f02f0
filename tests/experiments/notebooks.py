"""Runs the notebooks: the tests on small data, the command line to renew the outputs that are kept.

python -m tests.experiments.notebooks [NAME ...]
"""

import base64
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import nbclient
import nbformat
from PIL import Image
from traitlets.config import Config

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
PARAMETERS = "parameters"
COLOURS = 256
SECONDS = 600  # for one cell


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    """A notebook, checked against the format."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def parameters(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that say what to run."""
    return [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ())]


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a folder that is removed afterwards, and puts the outputs into them.

    Raises:
      nbclient.exceptions.CellExecutionError: when a cell raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}  # files instead of ports of the network
        client = nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            config=Config(KernelManager=sockets),
        )
        client.execute(env={**os.environ, "IPYTHONDIR": folder, "PYTHONPATH": str(ROOT)})
    notebook.metadata.language_info = {"name": "python"}


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Gives every picture a palette of 256 colours, which takes a third of the bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                smaller = io.BytesIO()
                picture.quantize(COLOURS, dither=Image.Dither.NONE).save(smaller, "png", optimize=True)
                data["image/png"] = base64.b64encode(smaller.getvalue()).decode()


def main(names: Sequence[str]) -> None:
    """Runs the notebooks with the parameters that they have, and writes them."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = read(path)
        execute(notebook)
        shrink(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
