"""How the kernels of products share out their work: which one serves, and with what tiles.

The numbers in here were measured on an H200; other chips have the same kernels, cut for the shared memory they have.
"""

import dataclasses
import math

from jaxvq.ops import cuda
from jaxvq.ops.problem import Problem

PROCESSORS = 132  # of an H100; in a product more blocks of threads than run at once only take turns
# Clusters of so many blocks that an H200 runs at once; of large ones some processors stay idle.
CLUSTERS = {1: PROCESSORS, 2: 66, 4: 30, 8: 15}
ROWS_FEW = 2  # rows of x that the kernels of palettes and of levels serve
ROWS_SPLIT = 4
ROWS_MOST = 64
STARTING = 2000  # cycles until a table of inner products can be read, more than until vectors can
MEETING, MEETING_OF_VECTORS = 3.5, 2.6  # lanes that read from one bank at most, where they read from random places
TAKING = 16  # outputs that a block could do in the time in which it begins with new ones
HELD = 128  # inputs that a thread keeps in registers
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
      split: few rows of x are read from shared memory where they are used, not from registers or global memory.
      ring: spans of words of palettes that are on their way to shared memory.
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
    ring: int = 0
    k_blocks: int = 1
    halved: bool = False

    @property
    def outs(self) -> int:
        """Outputs of a block of threads."""
        return self.lanes * self.columns * (2 * self.out_warps - self.halved) // 2

    def parts(self, outputs: int) -> int:
        """Blocks of threads that so many outputs take."""
        return math.ceil(outputs / self.outs)


def choose(problem: Problem) -> Tiles | None:
    """The tiles of the fastest kernel for a product; None where the weight had better be written out."""
    ways: list[Tiles] = []
    if problem.dim == 1 and problem.rows <= ROWS_FEW:
        if problem.parts[0] is None:
            ways += [_by_integers(problem)]
        elif problem.groups == 1:
            ways += _by_pairs(problem)
    if problem.rows == 1 and _is_worth_tables(problem):
        ways += [_by_products(problem)]
    if problem.rows <= ROWS_MOST:
        ways += _by_floats(problem)
    return next((tiles for tiles in ways if nbytes_of(problem, tiles) <= cuda.shared_nbytes()), None)


def _columns(problem: Problem) -> int:
    """As many neighbouring outputs to a thread as leave work for all processors."""
    return 4 if problem.outputs >= 24 * PROCESSORS else 2


def _by_pairs(problem: Problem) -> list[Tiles]:
    """Tiles for `kernels/pairs.cu`, the faster first, which take more shared memory.

    Lanes have the same outputs as long as that gives work to more processors; where it leaves a lane few codes, fewer
    warps are sooner through. A step is at most half of what a lane has, so that one is on its way while one is used.

    One row of many outputs has four columns, where a thread reads x for twice as many codes, if no processor has more
    to do for it. Of 4 bits two columns are faster where blocks take turns and x can stay in registers: their tables are
    half as large and sooner written. Where lanes share outputs, four columns fill fewer registers with x, and eight
    warps are enough, for 4 bits and for one row of 3 bits; all codes of 4 bits are then asked for at the beginning.
    """
    lanes, k_warps = 32, 16
    while lanes > 8 and problem.outputs <= PROCESSORS * lanes:
        lanes //= 2
    if lanes < 32 and _units_of_lane(problem, k_warps, lanes) * problem.unit[1] <= 32:
        k_warps = 8
    units = _units_of_lane(problem, k_warps, lanes)
    span = min(32 // problem.unit[1], math.ceil(units / 2))
    rings = [(span, ring) for ring in range(max(2, min(4, math.ceil(units / span))), 1, -1)]
    rings += [(span >> halved, 2) for halved in range(1, span.bit_length())] + [(1, 1)]
    ways = [_with_inputs(problem, Tiles("pairs", 2, k_warps, 1, span, 1, lanes, ring=ring)) for span, ring in rings]
    if lanes < 32 and (problem.bits == 4 or (problem.bits == 3 and problem.rows == 1)):
        span, ring = {3: (1, 2), 4: (2, 8)}[problem.bits]
        four = Tiles("pairs", 4, 8, 1, span, 1, lanes // 2)
        part = _part(problem, four)
        steps = part // (span * problem.unit[1])
        if steps > 1 and part <= HELD:
            return [dataclasses.replace(four, ring=min(ring, steps)), *ways]
    two, wide = ways[0], _with_inputs(problem, dataclasses.replace(ways[0], columns=4, ring=2))
    takes_two, takes_wide = takes(problem, two), takes(problem, wide)
    if problem.rows > 1 or problem.bits < 2 or lanes < 32 or takes_wide * wide.outs > takes_two * two.outs:
        return ways
    return ways if problem.bits == 4 and takes_wide > 1 and not two.split else [wide, *ways]


def _units_of_lane(problem: Problem, k_warps: int, lanes: int) -> int:
    """Units that a lane of `kernels/pairs.cu` has of an output."""
    return math.ceil(problem.units / (k_warps * (32 // lanes)))


def _with_inputs(problem: Problem, tiles: Tiles) -> Tiles:
    """x stays in registers where there is room for it, beside the words of four columns only if these are few."""
    held = problem.rows * _part(problem, tiles) <= HELD and (tiles.columns == 2 or problem.bits < 4)
    return dataclasses.replace(tiles, split=not held)


def _part(problem: Problem, tiles: Tiles) -> int:
    """Codes that a lane of `kernels/pairs.cu` has of an output, in whole spans."""
    steps = math.ceil(_units_of_lane(problem, tiles.k_warps, tiles.lanes) / tiles.span)
    return steps * tiles.span * problem.unit[1]


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
    """One block at once where so many do not fit."""
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
    return min(fit or ways[-1:], key=lambda tiles: takes(problem, tiles) * (tiles.columns + 4))


def _by_floats(problem: Problem) -> list[Tiles]:
    """Tiles for `kernels/matmul.cu`, those that take more shared memory first: for few rows of x, copies of a table."""
    span = max(1, (4 if problem.dim == 1 else 2) // (problem.unit[0] * problem.stages))
    if problem.groups > 1:
        span = math.gcd(span, problem.group_turns)
    many = problem.outputs >= 64 * PROCESSORS
    if many and problem.dim == 1 and problem.groups == 1 and problem.rows <= ROWS_MOST // 2:
        tiles = _by_whole_processors(problem, span)
    else:
        k_warps, out_warps = 8, 1
        if many and problem.rows > ROWS_SPLIT:
            k_warps, out_warps = (2, 4) if problem.rows > 16 else (4, 2)
        blocks = 1 if problem.rows > 16 else 2
        tiles = Tiles("matmul", _columns(problem), k_warps, out_warps, span, blocks, copies=_copies(problem))
        alone = tiles.parts(problem.outputs) <= PROCESSORS
        if alone and problem.rows <= 16 and problem.dim == 1 and problem.groups == 1 and span > 1:
            # A block has a processor to itself: more warps, each with less on its way.
            tiles = dataclasses.replace(tiles, k_warps=16, span=span // 2, blocks=1)
    splits = [True, False] if problem.rows <= ROWS_SPLIT else [False]
    copies = [tiles.copies >> n for n in range(tiles.copies.bit_length())] or [0]
    ways = [dataclasses.replace(tiles, split=split, copies=count) for split in splits for count in copies]
    return [_with_room(way, matmul_nbytes(problem, way)) for way in ways]


def _by_whole_processors(problem: Problem, span: int) -> Tiles:
    """Tiles for `kernels/matmul.cu` with one block at once on a processor, of the size that keeps most of them busy."""
    span = min(span, 2) if problem.parts[0] is not None else span
    warps = [(8, 2), (4, 3), (4, 4)]  # that share the input side, on different outputs
    sizes = [Tiles("matmul", 4, *both, span, 1, halved=halved) for both in warps for halved in (False, True)]
    return min(sizes, key=lambda size: takes(problem, size) * (size.outs + TAKING))


def for_writing(problem: Problem) -> Tiles:
    """Tiles for `kernels/matmul.cu` where it writes the weight out.

    A warp decodes about 32 values of each output, which a lane reads at once, and ends; with palettes of groups it
    decodes a group. Blocks start in the order of what they write, so memory is written from one end to the other. With
    vectors eight warps share a table, not four.
    """
    span = max(1, 32 // (problem.unit[1] * problem.dim))
    if problem.groups > 1:
        span = math.gcd(span, problem.group_turns)
    k_warps, blocks = (4, 4) if problem.dim == 1 else (8, 2)
    in_groups = problem.groups > 1 and problem.parts[0] is not None
    shares = problem.groups if in_groups else math.ceil(problem.turns / span)
    k_blocks = math.ceil(shares / k_warps)
    tiles = Tiles("matmul", 4, k_warps, 1, span, blocks, copies=_copies(problem), k_blocks=k_blocks)
    return _with_room(tiles, matmul_nbytes(problem, tiles))


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
    """Shared memory of a block of `kernels/pairs.cu`: tables, words on their way, x, sums, palettes."""
    levels = 2**problem.bits
    ring = tiles.ring * tiles.span * problem.unit[0] * 128 * tiles.k_warps * tiles.columns
    x = tiles.k_warps * (32 // tiles.lanes) * _part(problem, tiles)
    sums = (tiles.k_warps * problem.rows + 2) * tiles.outs
    columns = tiles.columns if tiles.lanes == 32 else 2
    return 128 * columns * levels**2 + ring + 2 * problem.rows * x + 4 * sums + 2 * levels * tiles.outs


def products_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/products.cu`: its table, words on their way, x, sums, largest values."""
    words, codes = problem.unit
    units = 32 // tiles.lanes
    slots, phases = units * codes, _phases(problem, units, tiles.k_blocks)
    row = 4 * tiles.lanes * tiles.columns * problem.stages
    part = units * words * (row + (16 if row < 128 and row % 32 == 0 else 0))
    table = 2 * slots * 2**problem.bits * problem.stages
    ring = tiles.span * tiles.out_warps * math.ceil(part / 16) * 16
    return table + ring + 16 * phases * slots + 4 * takes(problem, tiles) * tiles.outs + 8 * tiles.out_warps


def takes(problem: Problem, tiles: Tiles) -> int:
    """Parts of the outputs that each block, or cluster of them, takes in turn."""
    if problem.expand:
        return 1
    return math.ceil(tiles.parts(problem.outputs) / (CLUSTERS[tiles.k_blocks] * tiles.blocks))


def matmul_nbytes(problem: Problem, tiles: Tiles) -> int:
    """Shared memory of a block of `kernels/matmul.cu`: its table or palettes; few rows of x and sums, or what waits."""
    tables = _table_nbytes(problem) * tiles.copies
    if problem.dim == 1 and problem.parts[0] is not None:
        tables = (tiles.k_warps if problem.groups > 1 else 1) * tiles.outs * 32
    if problem.expand:
        piece = min(problem.unit[1] * problem.dim // 8, 8)
        return tables + (512 * piece * tiles.k_warps if piece > 1 else 0)
    turns = math.ceil(problem.turns / tiles.span) * tiles.span
    x = problem.rows * turns * 8 * problem.unit[1] * problem.dim if tiles.split else 0
    return tables + x + 4 * tiles.k_warps * problem.rows * (tiles.outs + 4)
