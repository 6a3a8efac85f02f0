"""Products with quantized matrices by kernels for NVIDIA's chips (compute capability 8.0 and later).

For one or two rows, palettes are looked up two codes at a time (`kernels/pairs.cu`) and evenly spaced levels go to the
integer matrix units (`kernels/levels.cu`). For one row, codes of vectors are looked up in tables of inner products with
x (`kernels/products.cu`) where the weight is large enough. All else up to 64 rows goes to the floating-point matrix
units (`kernels/matmul.cu`). All read the codes where they are. For more rows the last kernel writes the weight out
once, and XLA multiplies.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import whole_words, word_count
from jaxvq.ops import cuda

TYPES = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}
PROCESSORS = 132  # of an H100; more blocks of threads than run at once only take turns
# Clusters of so many blocks that an H200 runs at once; of large ones some processors stay idle.
CLUSTERS = {1: PROCESSORS, 2: 66, 4: 30, 8: 15}
ROWS_FEW = 2  # rows of x that the kernels of palettes and of levels serve
ROWS_SPLIT = 4
ROWS_MOST = 64
PALETTE_MOST = 16
STARTING = 2000  # cycles until a table of inner products can be read, more than until vectors can
MEETING, MEETING_OF_VECTORS = 3.5, 2.6  # lanes that read from one bank at most, where they read from random places
TAKING = 16  # outputs that a block could do in the time in which it begins with new ones
DECLARED_NBYTES = 48 * 1024  # of shared memory that a kernel may declare; more is given to it at launch
WRITERS = 2 * PROCESSORS  # blocks that write a weight out
TABLE_NBYTES = 65536  # a table of copies leaves room for a second block of threads


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel shares out its work.

    Attributes:
      kernel: which one.
      columns: neighbouring outputs of a thread.
      k_warps: warps that share the input side.
      out_warps: warps on different outputs.
      span: turns of a warp that are read before the first is used.
      blocks: of threads, at once on a processor.
      lanes: of a warp, that have different outputs.
      copies: of a table of vectors in shared memory; 0 leaves it in global memory.
      split: few rows of x wait in shared memory.
      k_blocks: blocks that share the input side; where they add up, those of a cluster.
      halved: the last of the `out_warps` has half as many outputs.
    """

    kernel: str
    columns: int
    k_warps: int
    out_warps: int
    span: int
    blocks: int
    lanes: int = 8
    copies: int = 0
    split: bool = False
    k_blocks: int = 1
    halved: bool = False

    @property
    def outs(self) -> int:
        """Outputs of a block of threads."""
        return self.lanes * self.columns * (2 * self.out_warps - self.halved) // 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a product, which a kernel is compiled for.

    Attributes:
      rows: of x.
      inputs: columns of x.
      dtype: of x.
      w: the weight; only its shapes and dtypes count.
      expand: the weight itself is wanted.
    """

    rows: int
    inputs: int
    dtype: Any
    w: QuantizedArray
    expand: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.w.codes.bits

    @property
    def dim(self) -> int:
        """Values of a code."""
        return self.w.layout.dim

    @property
    def outputs(self) -> int:
        """Columns of the product."""
        return self.w.layout.grid[1]

    @property
    def stages(self) -> int:
        """Codes that are added up."""
        return self.w.codes.words.shape[2]

    @property
    def unit(self) -> tuple[int, int]:
        """(words, codes) of the fewest words of an output that end where a code and eight values end."""
        words, codes = whole_words(self.bits)
        while codes * self.dim % 8:
            words, codes = 2 * words, 2 * codes
        return words, codes

    @property
    def units(self) -> int:
        """Along the input side."""
        return math.ceil(word_count(self.w.codes.length, self.bits) / self.unit[0])

    @property
    def turns(self) -> int:
        """Times that the four quads of a warp take turns along the input side."""
        return math.ceil(self.units / 4)

    @property
    def parts(self) -> tuple[Array | None, Array | None, Array | None]:
        """(vectors, scale, zero point) of the decoder."""
        decoder = self.w.decoder
        if isinstance(decoder, Affine):
            return None, decoder.scale, decoder.zero_point
        assert isinstance(decoder, Codebook)
        return decoder.vectors, decoder.scale, None

    @property
    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(#g, #out) of the vectors or zero points, and (#g, #out, #m) of the scales."""
        vectors, scale, zero = self.parts
        table = vectors if vectors is not None else zero
        return (1, 1) if table is None else table.shape[:2], (1, 1, 1) if scale is None else scale.shape[:3]

    @property
    def groups(self) -> int:
        """Parts of the input side with a decoder of their own."""
        table, scale = self.blocks
        return max(table[0], scale[0])

    @property
    def group_turns(self) -> int:
        """Turns in one of the groups."""
        return self.w.codes.length // self.groups // (4 * self.unit[1])


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
        return x @ expand(w, x.dtype)
    return _launch(problem, tiles, x, jax.ShapeDtypeStruct((problem.rows, problem.outputs), x.dtype))


def expand(w: QuantizedArray, dtype: Any) -> Float[Array, "a b"]:
    """The weight as the layout's matrix, rounded to `dtype`."""
    inputs = w.layout.matrix_shape[0]
    problem = Problem(1, inputs, jnp.dtype(dtype), w, expand=True)
    result = jax.ShapeDtypeStruct((inputs, problem.outputs), dtype)
    return _launch(problem, _by_writing(problem), jnp.zeros((), dtype), result)


def choose(problem: Problem) -> Tiles | None:
    """The tiles of the fastest kernel for a product; None where the weight had better be written out."""
    ways: list[Callable[[Problem], Tiles]] = []
    if problem.dim == 1 and problem.rows <= ROWS_FEW:
        if problem.parts[0] is None:
            ways.append(_by_integers)
        elif problem.groups == 1:
            ways.append(_by_pairs)
    if problem.rows == 1 and _is_worth_tables(problem):
        ways.append(_by_products)
    if problem.rows <= ROWS_MOST:
        ways.append(_by_floats)
    every = (way(problem) for way in ways)
    return next((tiles for tiles in every if nbytes_of(problem, tiles) <= cuda.shared_nbytes()), None)


def _columns(problem: Problem) -> int:
    """As many neighbouring outputs to a thread as leave work for all processors."""
    return 4 if problem.outputs >= 24 * PROCESSORS else 2


def _by_pairs(problem: Problem) -> Tiles:
    """Tiles for `kernels/pairs.cu`: the most outputs of a block that leave one for two thirds of the processors.

    With four columns a thread reads x for twice as many codes; one row only, if no processor has more to do for it.
    """
    words, codes = problem.unit
    columns, lanes, k_warps = 2, 32, 16
    while lanes > 8 and 3 * problem.outputs < 2 * PROCESSORS * columns * lanes:
        lanes //= 2
    blocks = 1 if problem.outputs <= PROCESSORS * columns * lanes else 2
    units_of_lane = -(-problem.w.codes.length // (codes * k_warps * (32 // lanes)))
    span = min(4 if words == 1 else 2, units_of_lane)
    tiles = Tiles("pairs", columns, k_warps, 1, span, blocks, lanes)
    wide = dataclasses.replace(tiles, columns=4, blocks=1)
    most, most_if_wide = (math.ceil(problem.outputs / way.outs / PROCESSORS) * way.outs for way in (tiles, wide))
    room = pairs_nbytes(problem, wide) <= cuda.shared_nbytes()
    if problem.rows == 1 and problem.bits == 4 and lanes == 32 and most_if_wide <= most and room:
        return wide
    return _with_room(tiles, pairs_nbytes(problem, tiles))


def _by_integers(problem: Problem) -> Tiles:
    """Tiles for `kernels/levels.cu`: of few outputs all threads of a processor do the same ones."""
    columns = _columns(problem)
    few = problem.outputs <= PROCESSORS * 8 * columns
    span = {1: 2, 2: 2, 4: 4}.get(problem.bits, max(1, 8 // problem.unit[0]))
    if few:
        span = min(span, max(1, 4 // problem.unit[0]))
    if problem.groups > 1:
        span = math.gcd(span, problem.group_turns)
    tiles = Tiles("levels", columns, 16 if few else 8, 1, span, 1 if few else 2)
    return _with_room(tiles, levels_nbytes(problem, tiles))


def _with_room(tiles: Tiles, nbytes: int) -> Tiles:
    """One block at once where two do not fit."""
    return tiles if tiles.blocks * (nbytes + 1024) <= cuda.shared_nbytes() else dataclasses.replace(tiles, blocks=1)


def _units_of_table(problem: Problem) -> int:
    """Units whose inner products with all vectors have room in shared memory; at most one for each lane."""
    nbytes = 2 * problem.unit[1] * problem.stages * 2**problem.bits
    units = 32
    while units * nbytes > cuda.shared_nbytes() * 3 // 5:
        units //= 2
    return units


def _phases(problem: Problem, units: int, blocks: int) -> int:
    """Tables of so many units that each of so many blocks writes, one after the other."""
    return math.ceil(problem.units / (units * blocks))


def _cluster(problem: Problem) -> int:
    """Blocks that share the input side of a product by tables; no more than tables are needed for it."""
    tables = _phases(problem, _units_of_table(problem), 1)
    most = min(max(CLUSTERS), tables) if cuda.has_clusters() else 1
    return 2 ** (most.bit_length() - 1)


def _is_worth_tables(problem: Problem) -> bool:
    """Whether `kernels/products.cu` can serve and waits less for shared memory than `kernels/matmul.cu`.

    Counted in cycles of a processor, in each of which it reads or writes 128 bytes. Vectors are read in `dim * 2` bytes
    and numbers in four; lanes that read from places of their own never meet in a bank. Tables are read as a whole, also
    where they reach beyond the input side.
    """
    units, (_, codes_of_unit) = _units_of_table(problem), problem.unit
    if problem.dim < 4 or problem.bits < (4 if units == 32 else 6) or units == 0 or units * codes_of_unit % 16 != 0:
        return False
    cluster = _cluster(problem)
    numbers = _phases(problem, units, cluster) * units * codes_of_unit * problem.stages
    writes = numbers * 2**problem.bits / 64
    reads = numbers * cluster * problem.outputs / 32 / PROCESSORS * (1 if units == 32 else MEETING)
    vectors = problem.w.codes.length * problem.stages * problem.outputs / 32 / PROCESSORS * problem.dim / 2
    meeting = 1 if _copies(problem) * problem.dim == 64 else MEETING_OF_VECTORS
    return writes + reads + STARTING < vectors * meeting


def _by_products(problem: Problem) -> Tiles:
    """Tiles for `kernels/products.cu`: columns that make turns few and full, and as many on their way as have room."""
    lanes, cluster = 32 // _units_of_table(problem), _cluster(problem)
    sizes = [(columns, span) for columns in (8, 4, 2, 1) for span in (3, 2)]
    ways = [Tiles("products", columns, 1, 16, span, 1, lanes, k_blocks=cluster) for columns, span in sizes]
    fit = [way for way in ways if products_nbytes(problem, way) <= cuda.shared_nbytes()]
    return min(fit or ways[-1:], key=lambda tiles: _takes(problem, tiles) * (tiles.columns + 4))


def _by_floats(problem: Problem) -> Tiles:
    """Tiles for `kernels/matmul.cu`: the most copies of its table for which there is room."""
    span = max(1, (4 if problem.dim == 1 else 2) // (problem.unit[0] * problem.stages))
    if problem.groups > 1:
        span = math.gcd(span, problem.group_turns)
    many = problem.outputs >= 64 * PROCESSORS
    if many and problem.dim == 1 and problem.groups == 1 and problem.rows <= ROWS_MOST // 2:
        return _by_whole_processors(problem, span)
    k_warps, out_warps = 8, 1
    if many and problem.rows > ROWS_SPLIT:
        k_warps, out_warps = (2, 4) if problem.rows > 16 else (4, 2)
    blocks = 1 if problem.rows > 16 else 2
    tiles = Tiles("matmul", _columns(problem), k_warps, out_warps, span, blocks, copies=_copies(problem))
    splits = [True, False] if problem.rows <= ROWS_SPLIT else [False]
    copies = [tiles.copies >> n for n in range(tiles.copies.bit_length())] or [0]
    ways = [dataclasses.replace(tiles, split=split, copies=count) for split in splits for count in copies]
    fit = (way for way in ways if matmul_nbytes(problem, way) <= cuda.shared_nbytes())
    tiles = next(fit, ways[-1])
    return _with_room(tiles, matmul_nbytes(problem, tiles))


def _by_whole_processors(problem: Problem, span: int) -> Tiles:
    """Tiles for `kernels/matmul.cu` with one block at once on a processor, of the size that keeps most of them busy."""
    span = min(span, 2) if problem.parts[0] is not None else span
    warps = [(8, 2), (4, 3), (4, 4)]  # that share the input side, on different outputs
    sizes = [Tiles("matmul", 4, *both, span, 1, halved=halved) for both in warps for halved in (False, True)]
    tiles = min(sizes, key=lambda size: _takes(problem, size) * (size.outs + TAKING))
    split = dataclasses.replace(tiles, split=problem.rows <= ROWS_SPLIT)
    return split if matmul_nbytes(problem, split) <= cuda.shared_nbytes() else tiles


def _by_writing(problem: Problem) -> Tiles:
    """Tiles for `kernels/matmul.cu` where it writes the weight out: a warp writes outputs that lie side by side."""
    span = 1 if problem.unit[0] * problem.stages > 1 else 4
    if problem.groups > 1:
        span = math.gcd(span, problem.w.codes.length // problem.groups // problem.unit[1])
    tiles = Tiles("matmul", 4, 8, 1, span, 2, 32, _copies(problem))
    # Warps share out whole groups, or else what is on its way.
    turns = problem.groups if problem.groups > 1 else math.ceil(problem.units / span)
    k_blocks = math.ceil(WRITERS / math.ceil(problem.outputs / tiles.outs))
    k_blocks = max(1, min(k_blocks, turns // tiles.k_warps))
    return _with_room(dataclasses.replace(tiles, k_blocks=k_blocks), matmul_nbytes(problem, tiles))


def _copies(problem: Problem) -> int:
    """Copies of a table of vectors in shared memory: as many as threads read at a time, if there is room."""
    if problem.dim == 1:
        return 0
    nbytes = _table_nbytes(problem)
    copies = 64 // problem.dim
    while copies > 1 and copies * nbytes > TABLE_NBYTES:
        copies //= 2
    return copies if copies * nbytes <= cuda.shared_nbytes() * 3 // 4 else 0


def _table_nbytes(problem: Problem) -> int:
    """Of 16-bit numbers; a power of two, so that a code becomes an address by a shift."""
    return 2 ** (problem.bits + 1 + (problem.stages - 1).bit_length()) * problem.dim


def nbytes_of(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of threads."""
    sizes = {"pairs": pairs_nbytes, "levels": levels_nbytes, "products": products_nbytes, "matmul": matmul_nbytes}
    return sizes[tiles.kernel](problem, tiles)


def levels_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/levels.cu`: levels, sums, digits of x."""
    part = problem.group_turns if problem.groups > 1 else tiles.span
    mine = math.ceil(math.ceil(problem.turns / part) / tiles.k_warps) * part * 4 * problem.unit[1]
    levels = (tiles.k_warps if problem.groups > 1 else 2) * tiles.outs * 8
    return levels + tiles.k_warps * problem.rows * (8 * tiles.outs + 3 * (mine + 32))


def pairs_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/pairs.cu`: tables, x, sums, palettes."""
    levels, codes = 2**problem.bits, problem.unit[1]
    part = tiles.k_warps * (32 // tiles.lanes) * tiles.span * codes
    x = -(-problem.w.codes.length // part) * part
    sums = (tiles.k_warps * problem.rows + 2) * tiles.outs
    return 128 * tiles.columns * levels**2 + 2 * problem.rows * x + 4 * sums + 2 * levels * tiles.outs


def products_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/products.cu`: its table, words on their way, x, sums, largest values."""
    words, codes = problem.unit
    units = 32 // tiles.lanes
    slots, phases = units * codes, _phases(problem, units, tiles.k_blocks)
    row = 4 * tiles.lanes * tiles.columns * problem.stages
    part = units * words * (row + (16 if row < 128 and row % 32 == 0 else 0))
    table = 2 * slots * 2**problem.bits * problem.stages
    ring = tiles.span * tiles.out_warps * math.ceil(part / 16) * 16
    return table + ring + 16 * phases * slots + 4 * _takes(problem, tiles) * tiles.outs + 8 * tiles.out_warps


def _takes(problem: Problem, tiles: Tiles) -> int:
    """Parts of the outputs that each block, or cluster of them, takes in turn."""
    at_once = PROCESSORS if problem.expand else CLUSTERS[tiles.k_blocks]
    return math.ceil(math.ceil(problem.outputs / tiles.outs) / (at_once * tiles.blocks))


def matmul_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/matmul.cu`: its table or palettes, few rows of x, the sums."""
    tables = _table_nbytes(problem) * tiles.copies
    if problem.dim == 1 and problem.parts[0] is not None:
        tables = (tiles.k_warps if problem.groups > 1 else 1) * tiles.outs * 32
    if problem.expand:
        return tables
    turns = math.ceil(problem.turns / tiles.span) * tiles.span
    x = problem.rows * turns * 8 * problem.unit[1] * problem.dim if tiles.split else 0
    return tables + x + 4 * tiles.k_warps * problem.rows * (tiles.outs + 4)


def _launch(problem: Problem, tiles: Tiles, x: Array, result: jax.ShapeDtypeStruct) -> Array:
    vectors, scale, zero = problem.parts
    if tiles.kernel == "matmul" and problem.dim > 1 and tiles.copies == 0:  # looked up as they are
        assert vectors is not None
        units = 1 if scale is None else scale.astype(jnp.float32)
        vectors, scale = (vectors.astype(jnp.float32) * units).astype(problem.dtype), None
    decoder = vectors, scale, zero
    operands = x, problem.w.codes.words, *(problem.w.codes.words if part is None else part for part in decoder)
    parts = math.ceil(problem.outputs / tiles.outs)
    nbytes = nbytes_of(problem, tiles)
    launch = {
        "blocks": tiles.k_blocks * math.ceil(parts / _takes(problem, tiles)),  # the fewest that take no longer
        "threads": 32 * tiles.k_warps * tiles.out_warps,
        "shared_nbytes": nbytes if nbytes > DECLARED_NBYTES else 0,
        "cluster": 1 if problem.expand else tiles.k_blocks,
    }
    return cuda.launch(tiles.kernel, _constants(problem, tiles, decoder), result, *operands, **launch)


def _constants(problem: Problem, tiles: Tiles, decoder: tuple[Array | None, ...]) -> dict[str, int]:
    table, scales = problem.blocks
    vectors, _, _ = problem.parts
    types = [0 if part is None else TYPES[part.dtype.name] for part in decoder]
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
        "BLOCKS": tiles.blocks,
        "SPLIT": int(tiles.split),
        "K_BLOCKS": tiles.k_blocks,
        "HALVED": int(tiles.halved),
        "SHARED_NBYTES": nbytes_of(problem, tiles),
        "TAKES": _takes(problem, tiles),
    }
