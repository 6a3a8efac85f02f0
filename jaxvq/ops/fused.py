"""Products with quantized matrices by kernels for NVIDIA's chips (compute capability 8.0 and later).

For one or two rows, palettes are looked up two codes at a time (`kernels/pairs.cu`) and evenly spaced levels go to the
integer matrix units (`kernels/levels.cu`). For one row, codes of vectors are looked up in tables of inner products with
x (`kernels/products.cu`) where the weight is large enough. All else up to 64 rows goes to the floating-point matrix
units (`kernels/matmul.cu`). All read the codes where they are. For more rows the last kernel writes the weight out
once, and XLA multiplies.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxvq.array import QuantizedArray
from jaxvq.ops import cuda
from jaxvq.ops.problem import Problem
from jaxvq.ops.schedule import Tiles, choose, for_writing, nbytes_of, takes

TYPES = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}
PALETTE_MOST = 16
DECLARED_NBYTES = 48 * 1024  # of shared memory that a kernel may declare; more is given to it at launch


def reason(rows: int, inputs: int, dtype: Any, w: QuantizedArray) -> str | None:
    """Why no kernel serves x `[rows, inputs]` of `dtype` times `w`; None where one does.

    The codes must follow each other along the input side.
    """
    if cuda.compiler() is None:
        return 'the kernels\' compiler is missing: pip install "jaxvq[cuda]"'
    if cuda.shared_nbytes() == 0:
        return "the GPU is none of NVIDIA's of compute capability 8.0 or later"
    if jnp.dtype(dtype).name not in ("float16", "bfloat16"):
        return f"`x` must be float16 or bfloat16, got {jnp.dtype(dtype).name}"
    problem = Problem(rows, inputs, dtype, w)
    if 0 in (rows, inputs, problem.outputs):
        return f"there is nothing to multiply, got {rows} rows, {inputs} inputs and {problem.outputs} outputs"
    for part in problem.parts:
        if part is not None and part.dtype.name not in TYPES:
            return f"the decoder must be float32, bfloat16, float16 or int8, got {part.dtype.name}"
    return _reason_of_format(problem)


def _reason_of_format(problem: Problem) -> str | None:
    vectors, _, _ = problem.parts
    table, scale = problem.blocks
    bits, dim, stages, length = problem.bits, problem.dim, problem.stages, problem.w.codes.length
    if vectors is None and bits > 8:
        return f"evenly spaced levels must have at most 8 bits, got {bits}"
    if vectors is not None and dim == 1 and (vectors.shape[3] > PALETTE_MOST or bits > 4 or stages > 1):
        got = f"{stages} of {vectors.shape[3]} at {bits} bits"
        return f"palettes must have one stage of at most {PALETTE_MOST} values and 4 bits, got {got}"
    if dim not in (1, 2, 4, 8):
        return f"vectors must have 1, 2, 4 or 8 values, got {dim}"
    if dim > 1 and (table != (1, 1) or scale[:2] != (1, 1)):
        return "vectors must come from one codebook for the whole weight, got codebooks of parts of it"
    if not {table[0], scale[0]} <= {1, problem.groups}:
        return f"scales and palettes must have the same groups, got {scale[0]} and {table[0]}"
    turn = 4 * problem.unit[1]
    if problem.groups > 1 and length // problem.groups % turn:
        return f"groups must be multiples of {turn} values at {bits} bits, got {length // problem.groups}"
    return None


def product(x: Float[Array, "n a"], w: QuantizedArray) -> Float[Array, "n b"]:
    """`x @ w` where `reason` has nothing against it, rounded to the dtype of `x`.

    Sums are float32. At one or two rows those of palettes are of sums of eight products in float16; at one row of a
    large weight those of vectors are of sums of eight inner products, in float16 too.
    """
    problem = Problem(x.shape[0], x.shape[1], x.dtype, w)
    tiles = choose(problem)
    if tiles is None:
        return lax.dot_general(x, expand(w, x.dtype), (((1,), (1,)), ((), ())))
    return _launch(problem, tiles, x, jax.ShapeDtypeStruct((problem.rows, problem.outputs), x.dtype))


def expand(w: QuantizedArray, dtype: Any) -> Float[Array, "b a"]:
    """The weight as the layout's matrix, transposed and rounded to `dtype`."""
    inputs = w.layout.matrix_shape[0]
    problem = Problem(1, inputs, jnp.dtype(dtype), w, expand=True)
    result = jax.ShapeDtypeStruct((problem.outputs, inputs), dtype)
    return _launch(problem, for_writing(problem), jnp.zeros((), dtype), result)


def _launch(problem: Problem, tiles: Tiles, x: Array, result: jax.ShapeDtypeStruct) -> Array:
    vectors, scale, zero = problem.parts
    if tiles.kernel == "matmul" and problem.dim > 1 and tiles.copies == 0:  # looked up as they are
        assert vectors is not None
        units = 1 if scale is None else scale.astype(jnp.float32)
        vectors, scale = (vectors.astype(jnp.float32) * units).astype(problem.dtype), None
    decoder = vectors, scale, zero
    operands = x, problem.w.codes.words, *(problem.w.codes.words if part is None else part for part in decoder)
    constants = _constants(problem, tiles, decoder)
    launch = {
        # The fewest that take no longer.
        "blocks": tiles.k_blocks * math.ceil(tiles.parts(problem.outputs) / constants["TAKES"]),
        "threads": 32 * tiles.k_warps * tiles.out_warps,
        "shared_nbytes": 0 if constants["DECLARED"] else constants["SHARED_NBYTES"],
        "cluster": 1 if problem.expand else tiles.k_blocks,
    }
    return cuda.launch(tiles.kernel, constants, result, *operands, **launch)


def _constants(problem: Problem, tiles: Tiles, decoder: tuple[Array | None, ...]) -> dict[str, int]:
    table, scales = problem.blocks
    vectors, _, _ = problem.parts
    types = [0 if part is None else TYPES[part.dtype.name] for part in decoder]
    nbytes = nbytes_of(problem, tiles)
    if decoder[1] is None:
        scales = 1, 1, 1
    return {
        "ROWS": problem.rows,
        "EXPAND": int(problem.expand),
        "INPUTS": problem.inputs,
        "OUTPUTS": problem.outputs,
        "LENGTH": problem.w.codes.length,
        "BITS": problem.bits,
        "STAGES": problem.stages,
        "DIM": problem.dim,
        "BFLOAT": int(jnp.dtype(problem.dtype).name == "bfloat16"),
        "AFFINE": int(vectors is None),
        "ENTRIES": 1 if vectors is None else vectors.shape[3],
        "G_BLOCKS": table[0],
        "OUT_BLOCKS": table[1],
        **dict(zip(("VECTORS", "SCALES", "ZEROS"), types, strict=True)),
        **dict(zip(("SCALE_G", "SCALE_OUT", "SCALE_STAGES"), scales, strict=True)),
        "COPIES": tiles.copies,
        "LANES": tiles.lanes,
        "COLUMNS": tiles.columns,
        "K_WARPS": tiles.k_warps,
        "OUT_WARPS": tiles.out_warps,
        "SPAN": tiles.span,
        "RING": tiles.ring,
        "BLOCKS": tiles.blocks,
        "SPLIT": int(tiles.split),
        "K_BLOCKS": tiles.k_blocks,
        "HALVED": int(tiles.halved),
        "SHARED_NBYTES": nbytes,
        "DECLARED": int(nbytes <= DECLARED_NBYTES),
        "TAKES": takes(problem, tiles),
    }
