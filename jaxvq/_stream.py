"""Checkpoint files in, checkpoint files out, one leaf in memory at a time."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvq._container import tensor_of
from jaxvq._leaves import Leaf
from jaxvq._writer import Writer
from jaxvq.array import QuantizedArray
from jaxvq.metrics import LeafReport, Report, energies, leaf_report
from jaxvq.quantize import quantize_leaf
from jaxvq.spec import Plan, PlanEntry, Spec, resolve
from jaxvq.storage import CheckpointReader, CheckpointWriter

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
"""Wraps a sequence to show how far its reader has come; the text says with what."""


def plan_file(source: CheckpointReader, spec: Spec) -> Plan:
    """What `quantize_file` would do, from the header alone.

    Raises:
      ValueError: if the file is quantized already or the spec does not fit it.
    """
    if source.is_jaxvq:
        raise ValueError(f"{source.path}: is quantized already; `jaxvq dequantize` it first")
    templates = source.templates()
    plan = resolve(templates, spec)
    return Plan(tuple(_keep_dtype(entry, np.dtype(templates[entry.path].dtype).name) for entry in plan.entries))


def plan_report(plan: Plan) -> Report:
    """The figures that follow from shapes: all but the error."""
    return Report(tuple(leaf_report(entry.path, None, _template(entry), entry=entry) for entry in plan.entries))


def quantize_file(
    source: CheckpointReader,
    target: str | os.PathLike[str],
    spec: Spec,
    *,
    seed: int,
    force: bool,
    progress: Progress,
) -> Report:
    """Quantizes a checkpoint file into another.

    Returns:
      The figures of the new file, measured on what was written.

    Raises:
      FileExistsError: if `target` exists, without `force`.
      ValueError: for what `plan_file` refuses, and for NaN or Inf in a weight.
      KeyboardInterrupt: the partial file is kept, and the same call goes on from it.
    """
    plan = plan_file(source, spec)
    templates = {entry.path: _template(entry) for entry in plan.entries}
    key = jax.random.key(seed)
    token = _token(source, {"spec": spec.to_json(), "seed": seed})
    with CheckpointWriter(target, templates, metadata=source.metadata, force=force, token=token) as writer:
        for entry in progress(plan.entries, "quantizing"):
            if writer.done(entry.path):
                continue
            leaf = source.read(entry.path)
            if entry.method is not None:
                leaf = quantize_leaf(leaf, entry, key=key)
            writer.write(entry.path, leaf)
            del leaf  # or it would stay while the next one is read
    with CheckpointReader(target) as written:
        return Report(tuple(_measure(source, written, entry) for entry in progress(plan.entries, "measuring")))


def dequantize_file(
    source: CheckpointReader, target: str | os.PathLike[str], *, force: bool, progress: Progress
) -> None:
    """Writes a plain checkpoint of the names, shapes, dtypes and metadata that were quantized.

    Raises:
      As `quantize_file` does.
    """
    source.require_jaxvq()
    leaves = [leaf for leaf in source.leaves.values() if leaf.parts()]
    tensors = [tensor_of(leaf.name, leaf.value) for leaf in leaves]
    with Writer(target, tensors, source.metadata, force=force, token=_token(source, {})) as writer:
        for leaf in progress(leaves, "dequantizing"):
            if not writer.done(leaf.name):
                value = source.read(leaf.name)
                writer.write(leaf.name, value.dequantize() if isinstance(value, QuantizedArray) else value)
                del value


def inspect_file(source: CheckpointReader, *, progress: Progress) -> Report:
    """The figures of a jaxvq file, every checksum compared."""
    leaves: list[Leaf] = [leaf for leaf in source.leaves.values() if leaf.parts()]
    return Report(tuple(leaf_report(leaf.name, None, source.read(leaf.name)) for leaf in progress(leaves, "reading")))


def _measure(source: CheckpointReader, written: CheckpointReader, entry: PlanEntry) -> LeafReport:
    leaf = written.read(entry.path)
    figures = leaf_report(entry.path, None, leaf, entry=entry)
    if not isinstance(leaf, QuantizedArray):
        return figures
    near = np.asarray(leaf.dequantize())  # first, for it takes more memory while it runs
    del leaf
    signal, noise = energies(source.read(entry.path), near)
    return dataclasses.replace(figures, signal=signal, noise=noise)


def _keep_dtype(entry: PlanEntry, dtype: str) -> PlanEntry:
    """The entry with the dtype of the file where JAX sees 64 bits as 32."""
    if dtype == entry.dtype:
        return entry
    if entry.method is None:
        return dataclasses.replace(entry, dtype=dtype)
    return dataclasses.replace(entry, reason=f"{dtype} becomes {entry.dtype}")


def _template(entry: PlanEntry) -> Any:
    if entry.template is not None:
        return entry.template
    return jax.ShapeDtypeStruct(entry.shape, np.dtype(jnp.dtype(entry.dtype)))


def _token(source: CheckpointReader, settings: dict[str, Any]) -> str:
    """A text that changes when the source file or the settings do."""
    status = os.stat(source.path)
    origin = {"name": str(source.path.resolve()), "nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return json.dumps({**origin, **settings}, sort_keys=True)
