"""What quantization cost and saved: bits, bytes and error of every leaf, and in all."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxvq._container import CHECKSUMS, checksums_nbytes
from jaxvq._hostcodes import iter_codes
from jaxvq._leaves import flatten, parts
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.spec import WEIGHT_RANK, Plan, PlanEntry

PIECE = 1 << 20  # values at a time


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf's figures.

    Attributes:
      path: its path in the tree.
      shape: its shape.
      dtype: its dtype before quantization.
      method: what quantized it; "float" for a leaf kept as it is.
      tensors: how many tensors hold it in a file.
      codes_nbytes: bytes of packed codes, their padding included.
      codebook_nbytes: bytes of codebook vectors.
      scales_nbytes: bytes of scales and zero points.
      float_nbytes: bytes of a leaf kept as it is.
      signal: the sum of the squared weights; None if not measured.
      noise: the sum of the squared errors; None if not measured.
      note: what a reader should know.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    tensors: int = 1
    codes_nbytes: int = 0
    codebook_nbytes: int = 0
    scales_nbytes: int = 0
    float_nbytes: int = 0
    signal: float | None = None
    noise: float | None = None
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored for it."""
        return self.codes_nbytes + self.codebook_nbytes + self.scales_nbytes + self.float_nbytes

    @property
    def original_nbytes(self) -> int:
        """Bytes before quantization."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes / size`: codes, codebooks, scales and padding."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    @property
    def ratio(self) -> float:
        """How many times smaller it became; 1 for a leaf without values."""
        return self.original_nbytes / max(1, self.nbytes) if self.original_nbytes else 1.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise, `10 * log10(sum(w**2) / sum((w - wq)**2))`; infinite if exact."""
        return decibels(self.signal, self.noise)


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures of a tree. `str(report)` is a plain table.

    Attributes:
      leaves: one entry for each array of the tree.

    Example:
      >>> report(None, {"bias": np.zeros(3, np.float32)}).nbytes
      20
    """

    leaves: tuple[LeafReport, ...]

    @property
    def checksums_nbytes(self) -> int:
        """Bytes of the checksums that a file adds."""
        return checksums_nbytes(sum(leaf.tensors for leaf in self.leaves))

    @property
    def nbytes(self) -> int:
        """Bytes of the file that `jaxvq.save` writes, but for its header."""
        return sum(leaf.nbytes for leaf in self.leaves) + self.checksums_nbytes

    @property
    def original_nbytes(self) -> int:
        """Bytes before quantization."""
        return sum(leaf.original_nbytes for leaf in self.leaves)

    @property
    def bits_per_weight(self) -> float:
        """Bits per value over the whole tree."""
        return 8 * self.nbytes / max(1, sum(math.prod(leaf.shape) for leaf in self.leaves))

    @property
    def ratio(self) -> float:
        """How many times smaller the tree became; 1 for a tree without values."""
        return self.original_nbytes / max(1, self.nbytes) if self.original_nbytes else 1.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise over all measured leaves; None if there are none."""
        measured = [leaf for leaf in self.leaves if leaf.signal is not None and leaf.noise is not None]
        if not measured:
            return None
        return decibels(sum(leaf.signal or 0.0 for leaf in measured), sum(leaf.noise or 0.0 for leaf in measured))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values. An infinite or unmeasured SQNR is null; `exact` tells which."""
        leaves = [
            {**row, "shape": list(leaf.shape), "sqnr_db": _finite(leaf.sqnr_db), "exact": _exact(leaf.noise)}
            for leaf, row in zip(self.leaves, map(_row, self.leaves), strict=True)
        ]
        total = {**_total(self), "sqnr_db": _finite(self.sqnr_db)}
        return {"leaves": leaves, "checksums_nbytes": self.checksums_nbytes, "total": total}

    def to_csv(self) -> str:
        """One line for each leaf, one for the checksums (`#crc32`) and one for the total."""
        text = io.StringIO()
        rows = [_row(leaf) for leaf in self.leaves]
        columns = list(_row(LeafReport("", (), "float32", "")))
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        writer.writerow({"path": CHECKSUMS, "nbytes": self.checksums_nbytes, "note": "checksums of the file"})
        writer.writerow({"path": "total", **_total(self)})
        return text.getvalue()

    def table(self, title: str | None = None) -> Table:
        """A table for `rich.print`."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("path", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("method", overflow="fold")
        for name in ("bits/weight", "SQNR dB", "bytes", "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape))
            table.add_row(escape(leaf.path), shape, escape(leaf.method), *_figures(leaf), escape(leaf.note))
        table.add_row("checksums", "", "", "", "", f"{self.checksums_nbytes:,}", "", "", style="dim")
        table.add_row("total", "", "", *_figures(self), f"from {self.original_nbytes:,} bytes", style="bold")
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=1000, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def report(original_params: Any, quantized_params: Any, *, plan: Plan | None = None) -> Report:
    """Bits, bytes and error of every leaf of a quantized tree.

    Args:
      original_params: the tree before quantization; None leaves the error out.
      quantized_params: the tree after it.
      plan: the plan it was quantized by, for the names of methods and the reasons why leaves stayed float.

    Raises:
      ValueError: if the trees have other leaves or shapes.
      TypeError: if `original_params` is quantized, or a leaf is no array of numbers.

    Example:
      >>> import jaxvq
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": np.zeros(32, np.float32)}
      >>> figures = report(params, jaxvq.quantize_params(params, jaxvq.KMeans(bits=4), key=jax.random.key(1)))
      >>> figures.nbytes, round(figures.ratio, 1), figures.leaves[0].note
      (1232, 6.8, 'rank 1, not a weight matrix')
    """
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a Plan, got {plan!r}; pass jaxvq.resolve(original_params, spec)")
    entries = {entry.path: entry for entry in plan.entries} if plan else {}
    leaves = [leaf for leaf in flatten(quantized_params) if leaf.parts()]
    originals: dict[str, Any] = {}
    if original_params is not None:
        originals = {leaf.name: leaf.value for leaf in flatten(original_params) if leaf.parts()}
        if odd := sorted(set(originals) ^ {leaf.name for leaf in leaves}):
            raise ValueError(
                f"{odd[0]}: `original_params` and `quantized_params` must have the same leaves, "
                "got this one in one of them only; pass the trees before and after `quantize_params`"
            )
    return Report(
        tuple(
            leaf_report(leaf.name, originals.get(leaf.name), leaf.value, entry=entries.get(leaf.name))
            for leaf in leaves
        )
    )


def leaf_report(path: str, original: Any, quantized: Any, *, entry: PlanEntry | None = None) -> LeafReport:
    """The figures of one leaf; `original` is None if the error is not wanted.

    Works on `jax.ShapeDtypeStruct`s too, but for the error and for what the codes tell.
    """
    if isinstance(original, QuantizedArray):
        raise TypeError(
            f"{path}: `original_params` must hold plain arrays, got a QuantizedArray; "
            "pass the tree before `quantize_params` first, the one after it second"
        )
    if original is not None and tuple(original.shape) != tuple(quantized.shape):
        raise ValueError(
            f"{path}: `original_params` and `quantized_params` must have the same shapes, "
            f"got {tuple(original.shape)} and {tuple(quantized.shape)}; pass the trees before and after"
        )
    method = str(entry.method) if entry is not None and entry.method is not None else ""
    signal, noise = energies(original, quantized) if original is not None else (None, None)
    nbytes = {name: math.prod(a.shape) * np.dtype(a.dtype).itemsize for name, a in parts(path, quantized).items()}
    notes = [entry.reason] if entry is not None and entry.reason else []
    if not isinstance(quantized, QuantizedArray):
        notes = notes or [_why_float(quantized)]
        return LeafReport(
            path,
            tuple(quantized.shape),
            np.dtype(quantized.dtype).name,
            "float",
            float_nbytes=nbytes[path],
            signal=signal,
            noise=noise,
            note="; ".join(notes),
        )
    codes, codebook = nbytes[f"{path}#codes"], nbytes.get(f"{path}#vectors", 0)
    if codebook > codes:
        notes.append("codebook larger than its codes")
    notes.extend(unused_note(quantized))
    return LeafReport(
        path,
        quantized.shape,
        quantized.layout.dtype,
        method or _decoder_text(quantized),
        tensors=len(nbytes),
        codes_nbytes=codes,
        codebook_nbytes=codebook,
        scales_nbytes=sum(nbytes.values()) - codes - codebook,
        signal=signal,
        noise=noise,
        note="; ".join(notes),
    )


def energies(original: Any, quantized: Any) -> tuple[float, float]:
    """(sum of w**2, sum of (w - wq)**2), added up in float64, a piece at a time."""
    exact = np.asarray(original).reshape(-1)
    near = np.asarray(quantized.dequantize() if isinstance(quantized, QuantizedArray) else quantized).reshape(-1)
    signal = noise = 0.0
    for start in range(0, exact.size, PIECE):
        w = _doubles(exact[start : start + PIECE])
        error = w - _doubles(near[start : start + PIECE])
        signal += float(np.vdot(w, w).real)
        noise += float(np.vdot(error, error).real)
    return signal, noise


def decibels(signal: float | None, noise: float | None) -> float | None:
    """`10 * log10(signal / noise)`; infinite without noise, None if not measured."""
    if signal is None or noise is None:
        return None
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def unused_note(array: QuantizedArray) -> Sequence[str]:
    """Says how many centroids are in use, if not all are."""
    vectors = getattr(array.decoder, "vectors", None)
    if vectors is None or isinstance(array.codes.words, jax.ShapeDtypeStruct):
        return []
    groups, outs = array.layout.grid
    g_blocks, out_blocks, stages, k, _ = vectors.shape[-5:]
    used = np.zeros((math.prod(array.stack), g_blocks, out_blocks, stages, k), bool)
    for layer, start, codes in iter_codes(array.codes):
        g = (np.arange(codes.shape[0]) + start[0]) * g_blocks // groups
        out = (np.arange(codes.shape[1]) + start[1]) * out_blocks // outs
        used[layer, g[:, None, None], out[:, None], np.arange(stages), codes] = True
    counts = used.sum(-1)
    least = int(counts.min(initial=k))
    if least == k:
        return []
    return [f"{least} of {k} centroids used" if counts.size == 1 else f"as few as {least} of {k} centroids used"]


def _doubles(values: np.ndarray) -> np.ndarray:
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _why_float(leaf: Any) -> str:
    """Why a leaf stayed float, as far as the leaf itself tells."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{np.dtype(leaf.dtype).name} is not a float dtype"
    rank = len(leaf.shape)
    return f"rank {rank}, not a weight matrix" if rank < WEIGHT_RANK else "kept float"


def _decoder_text(array: QuantizedArray) -> str:
    """What the decoder is, when the method is not known."""
    match array.decoder:
        case Affine():
            return f"affine, {array.codes.bits} bits"
        case Codebook(vectors=vectors):
            *_, g_blocks, out_blocks, stages, k, dim = vectors.shape
            tables = g_blocks * out_blocks * stages * math.prod(array.stack)
            return f"codebook {k}x{dim}" + (f", {tables} tables" if tables > 1 else "")
    return type(array.decoder).__name__


def _row(leaf: LeafReport) -> dict[str, Any]:
    columns = ("path", "shape", "dtype", "method", "bits_per_weight", "sqnr_db", "codes_nbytes", "codebook_nbytes")
    rest = ("scales_nbytes", "float_nbytes", "nbytes", "original_nbytes", "ratio", "note")
    row = {name: getattr(leaf, name) for name in (*columns, *rest)}
    return row | {"shape": "x".join(map(str, leaf.shape))}


def _total(whole: Report) -> dict[str, Any]:
    names = ("codes_nbytes", "codebook_nbytes", "scales_nbytes", "float_nbytes")
    sums = {name: sum(getattr(leaf, name) for leaf in whole.leaves) for name in names}
    own = ("bits_per_weight", "sqnr_db", "nbytes", "original_nbytes", "ratio")
    return {**sums, **{name: getattr(whole, name) for name in own}}


def _figures(item: LeafReport | Report) -> tuple[str, str, str, str]:
    sqnr = "" if item.sqnr_db is None else "exact" if item.sqnr_db == math.inf else f"{item.sqnr_db:.2f}"
    return f"{item.bits_per_weight:.3f}", sqnr, f"{item.nbytes:,}", f"{item.ratio:.2f}x"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exact(noise: float | None) -> bool | None:
    return None if noise is None else noise == 0
