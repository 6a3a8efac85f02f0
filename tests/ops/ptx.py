"""Runs PTX, the assembly that kernels are compiled to, on the CPU: for tests of kernels where there is no GPU.

Every register is a NumPy array with an entry for each thread of the grid, and an instruction is run for all threads
that have come to it at once. The threads that are furthest behind go first, which brings those together that have
parted. Only what the kernels of `jaxvq.ops` use is known.

Stricter than a GPU: shared memory begins as NaN, what is copied asynchronously is NaN until it has been waited for, and
addresses outside of arrays, or not multiples of what is read, are errors. Threads run in step, or each warp as far as
it comes without the others, which shows where a barrier is missing.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

WARP = 32
WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "f16": 16, "b32": 32, "f32": 32, "b64": 64}
STORED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
KINDS = {"s": "int", "u": "uint", "b": "uint", "f": "float"}
SPACES = 40  # bits of an address within an array; those above are the array's number
BLOCK = (
    24  # bits of an address in a block's shared memory; those above are 0, or 1 + the number of a block in a cluster
)
POISON = 0xFF  # four of them are NaN

Values = np.ndarray
Instruction = tuple[str | None, bool, list[str], list[str]]  # predicate, negated, words of the operation, operands


def dtype_of(name: str) -> np.dtype:
    """That of PTX's `u32`, `f16` and the like."""
    if name == "pred":
        return np.dtype(np.bool_)
    return np.dtype(f"{KINDS[name[0]]}{name[1:]}")


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel's instructions, where its labels are, and the widths of its registers by their first letters."""

    instructions: list[Instruction]
    labels: dict[str, int]
    widths: dict[str, int]
    shared_name: str  # of the one array in shared memory
    shared_nbytes: int  # declared in the source


def parse(text: str) -> Program:
    """The one kernel of a PTX text."""
    body = re.sub(r"//[^\n]*", "", text[text.index("{", text.index(".entry")) :])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    # A label, or what ends in a semicolon; braces around a scope have semicolons within, those of operands have none.
    for label, statement in re.findall(r"(\$?\w+):\s|([^\s;{}][^;{}]*(?:{[^;{}]*}[^;{}]*)*);", body):
        if label:
            labels[label] = len(instructions)
        elif declared := re.match(r"\.reg \.(\w+)\s+(.*)", statement, re.DOTALL):
            for name in declared[2].split(","):
                widths[re.sub(r"<\d+>", "", name.strip())] = WIDTHS[declared[1]]
        elif parts := re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL):
            if parts[3][0] == ".":  # a directive
                continue
            operands = re.findall(r"{[^}]*}|\[[^\]]*\]|[^\s,]+", parts[4])
            instructions.append((parts[2], parts[1] == "!", parts[3].split("."), operands))
    shared = re.search(r"\.shared [^;]*?(\w+)\[(\d*)\];", text)
    name, nbytes = (shared[1], int(shared[2] or 0)) if shared else ("", 0)
    return Program(instructions, labels, widths, name, nbytes)


def run(
    text: str,
    arrays: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    *,
    blocks: int,
    threads: int,
    shared_nbytes: int = 0,
    cluster: int = 1,
    order: int = 0,
) -> None:
    """Runs a kernel over its grid and fills `results`, its last arguments.

    With `order` 0 all threads go in step. With 1 the last warp of a block goes first, up to the next barrier, and then
    the one before it; with -1 the first warp goes first. Both are slower.

    Raises:
      IndexError: for an address outside of every array, or one that is no multiple of what is read or written.
      NotImplementedError: for an instruction that is not known.
      RuntimeError: when threads of a warp that must meet do not.
    """
    program = parse(text)
    memory = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (*arrays, *results)]
    grid = Grid(program, memory, blocks, threads, max(shared_nbytes, program.shared_nbytes), cluster)
    grid.run(order * (grid.warp % (threads // WARP)).astype(np.int64))


class Grid:
    """All threads of a kernel."""

    def __init__(
        self, program: Program, memory: list[np.ndarray], blocks: int, threads: int, shared_nbytes: int, cluster: int
    ) -> None:
        self.program, self.memory, self.count = program, memory, blocks * threads
        ids = np.arange(self.count, dtype=np.uint32)
        self.block, self.warp = ids // threads, ids // WARP
        self.shared = np.full((blocks, max(shared_nbytes, 1)), POISON, np.uint8)
        self.registers: dict[str, Values] = {}
        self.special = {"%tid.x": ids % threads, "%ctaid.x": self.block, "%cluster_ctarank": self.block % cluster}
        self.special |= {"%ntid.x": np.full_like(ids, threads), "%nctaid.x": np.full_like(ids, blocks)}
        self.cluster, self.cluster_size = self.block // cluster, cluster
        self.at = np.zeros(self.count, np.int64)  # the next instruction of each thread
        self.waits = np.zeros(self.count, bool)  # at a barrier
        self.committed = np.zeros(self.count, np.int64)  # groups of copies
        self.coming: list[tuple[Values, Values, Values, Values]] = []  # threads, groups, addresses, bytes

    # Registers and operands.

    def width(self, name: str) -> int:
        return self.program.widths.get(name) or self.program.widths[re.sub(r"\d+$", "", name)]

    def get(self, operand: str, kind: str) -> Values:
        """The operand of all threads, as the dtype `kind`."""
        dtype = dtype_of(kind)
        if operand in self.special:
            return self.special[operand].astype(dtype)
        if operand[0] == "%" or operand in self.program.widths:
            if operand not in self.registers:
                raise RuntimeError(f"{operand} is read before anything is written to it")
            stored = self.registers[operand]
            if stored.dtype.itemsize > dtype.itemsize:
                stored = stored.astype(f"u{dtype.itemsize}")
            elif stored.dtype.itemsize < dtype.itemsize:
                stored = stored.astype(f"i{dtype.itemsize}" if kind[0] == "s" else f"u{dtype.itemsize}")
            return stored.view(dtype)
        if operand == self.program.shared_name:
            return np.zeros(self.count, dtype)
        if operand[:2] == "0f":
            return np.full(self.count, int(operand[2:], 16), np.uint32).view(dtype)
        value = int(operand, 0) & (1 << 8 * dtype.itemsize) - 1
        return np.full(self.count, value, f"u{dtype.itemsize}").view(dtype)

    def put(self, name: str, value: Values, who: Values) -> None:
        """Values narrower than the register are extended by their own kind."""
        stored = STORED[self.width(name)]
        if value.dtype.itemsize != np.dtype(stored).itemsize and value.dtype.kind in "iu":
            value = value.astype(f"{value.dtype.kind}{np.dtype(stored).itemsize}")
        value = value.view(stored)
        if not who.all():
            value = np.where(who, value, self.registers.get(name, np.zeros(self.count, stored)))
        self.registers[name] = value

    # Memory.

    def address(self, operand: str) -> tuple[Values, bool]:
        """Addresses, and whether they are of 32 bits, as those of shared memory may be."""
        base, _, offset = operand.strip("[]").partition("+")
        return self.get(base, "s64") + np.int64(int(offset, 0) if offset else 0)

    def bytes_at(
        self, space: str, addresses: Values, nbytes: int, who: Values
    ) -> list[tuple[np.ndarray, Values, Values]]:
        """(memory, which of `who`, places) of all that threads `who` read or write."""
        threads = np.flatnonzero(who)
        places = addresses[threads]
        if (places % nbytes).any():
            raise IndexError(f"an address in {space} memory is no multiple of the {nbytes} bytes there")
        if space == "shared":
            block, places = self.block[threads], places.astype(np.uint32)
            remote = places >> BLOCK
            block = np.where(remote > 0, block // self.cluster_size * self.cluster_size + remote - 1, block)
            places = (places & (1 << BLOCK) - 1).astype(np.int64)
            if (places + nbytes > self.shared.shape[1]).any():
                raise IndexError(
                    f"{places.max()} + {nbytes} is beyond the {self.shared.shape[1]} bytes of shared memory"
                )
            flat = block.astype(np.int64) * self.shared.shape[1] + places
            return [(self.shared.reshape(-1), threads, flat)]
        found = []
        for array in np.unique(places >> SPACES):
            mine = places >> SPACES == array
            offsets = places[mine] & (1 << SPACES) - 1
            if not 0 < array <= len(self.memory) or (offsets + nbytes > self.memory[array - 1].size).any():
                raise IndexError(f"byte {offsets.max()} of argument {array - 1} is read or written, which has fewer")
            found.append((self.memory[array - 1], threads[mine], offsets))
        return found

    def read(self, space: str, addresses: Values, nbytes: int, who: Values) -> np.ndarray:
        """`[thread, byte]`."""
        got = np.zeros((self.count, nbytes), np.uint8)
        for memory, threads, places in self.bytes_at(space, addresses, nbytes, who):
            got[threads] = memory[places[:, None] + np.arange(nbytes)]
        return got

    def write(self, space: str, addresses: Values, values: np.ndarray, who: Values) -> None:
        for memory, threads, places in self.bytes_at(space, addresses, values.shape[1], who):
            memory[places[:, None] + np.arange(values.shape[1])] = values[threads]

    # What happens.

    def run(self, rank: Values) -> None:
        """Runs all threads to their ends, those of the highest rank first."""
        end = len(self.program.instructions)
        actions = [self.action(*instruction) for instruction in self.program.instructions]
        while True:
            going = (self.at < end) & ~self.waits
            if not going.any():
                if (self.at >= end).all():
                    return
                self.meet()
                continue
            first = going & (rank == rank[going].max())
            now = int(self.at[first].min())
            who = first & (self.at == now)
            self.at[who] = now + 1
            actions[now](who)

    def group_of(self, words: list[str]) -> Values:
        """Which threads meet at a barrier: those with the same number."""
        return self.warp if words[1] == "warp" else self.block if words[0] == "bar" else self.cluster

    def incomplete(self, group: Values, who: Values) -> Values:
        """The groups of which threads that have not ended are missing in `who`."""
        return np.unique(group[(self.at < len(self.program.instructions)) & ~who])

    def meet(self) -> None:
        """Lets those go on whose barrier all of their group have reached."""
        waited = self.waits.copy()
        for place in np.unique(self.at[waited]):
            came = waited & (self.at == place)
            group = self.group_of(self.program.instructions[place - 1][2])
            self.waits &= ~came | np.isin(group, self.incomplete(group, came))
        if (self.waits == waited).all():
            raise RuntimeError("threads wait for others that wait elsewhere")

    def together(self, who: Values) -> None:
        if np.isin(self.warp[who], self.incomplete(self.warp, who)).any():
            raise RuntimeError("not all threads of a warp have come to an instruction for all")

    def action(
        self, guard: str | None, negated: bool, words: list[str], operands: list[str]
    ) -> Callable[[Values], None]:
        """What an instruction does to the threads that have come to it."""
        work = self.work(words, operands)
        if guard is None:
            return work

        def guarded(who: Values) -> None:
            holds = self.get(guard, "pred") != negated
            if (who & holds).any():
                work(who & holds)

        return guarded

    def work(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        root, kind = words[0], words[-1]
        special = {
            "bra": self.branch,
            "ret": self.leave,
            "bar": self.wait,
            "barrier": self.wait,
            "ld": self.load,
            "st": self.store,
            "cp": self.copy,
            "mov": self.move,
            "cvt": self.convert,
            "cvta": self.same,
            "setp": self.compare,
            "shfl": self.shuffle,
            "redux": self.reduce,
            "mma": self.multiply_matrices,
            "mapa": self.map,
        }
        if root in special:
            return special[root](words, operands)
        if root in ELEMENTWISE:
            kinds, function = ELEMENTWISE[root](words)
            result = kinds[0]

            def compute(who: Values) -> None:
                arguments = [self.get(operand, of) for operand, of in zip(operands[1:], kinds[1:], strict=True)]
                with np.errstate(all="ignore"):
                    self.put(operands[0], np.asarray(function(*arguments)).astype(dtype_of(result)), who)

            return compute
        raise NotImplementedError(f"{'.'.join(words)} {kind}")

    def branch(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        def go(who: Values) -> None:
            self.at[who] = self.program.labels[operands[0]]

        return go

    def leave(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        def end(who: Values) -> None:
            self.at[who] = len(self.program.instructions)

        return end

    def wait(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        if words[:3] == ["barrier", "cluster", "arrive"]:
            return lambda who: None
        if len(operands) > 1:
            raise NotImplementedError("barriers of a part of a block")
        group = self.group_of(words)

        def stop(who: Values) -> None:
            self.waits |= who & np.isin(group, self.incomplete(group, who))

        return stop

    def load(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        space, kind = words[1].split("::")[0], words[-1]
        names, dtype = operands[0].strip("{}").split(","), dtype_of(kind)
        if space == "param":
            number = int(operands[1].strip("[]").rpartition("_")[2])
            base = np.full(self.count, number + 1 << SPACES, np.int64)
            return lambda who: self.put(operands[0], base, who)

        def read(who: Values) -> None:
            got = self.read(space, self.address(operands[1]), len(names) * dtype.itemsize, who).view(dtype)
            for i, name in enumerate(names):
                self.put(name.strip(), np.ascontiguousarray(got[:, i]), who)

        return read

    def store(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        kind = words[-1]
        names = [name.strip() for name in operands[1].strip("{}").split(",")]

        def write(who: Values) -> None:
            values = np.stack([self.get(name, kind) for name in names], axis=1)
            self.write(words[1], self.address(operands[0]), values.view(np.uint8), who)

        return write

    def copy(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        def commit(who: Values) -> None:
            self.committed[who] += 1

        def wait(who: Values) -> None:
            left = []
            for threads, groups, places, values in self.coming:
                done = who[threads] & (groups < self.committed[threads] - int(operands[0]))
                self.shared.reshape(-1)[places[done][:, None] + np.arange(values.shape[1])] = values[done]
                left.append((threads[~done], groups[~done], places[~done], values[~done]))
            self.coming = [one for one in left if one[0].size]

        def start(who: Values) -> None:
            nbytes = int(operands[2])
            inside = self.get(operands[3], "u32") if len(operands) > 3 else np.full(self.count, nbytes)
            values = self.read("global", self.address(operands[1]), nbytes, who & (inside > 0))
            ((memory, threads, places),) = self.bytes_at("shared", self.address(operands[0]), nbytes, who)
            memory[places[:, None] + np.arange(nbytes)] = POISON
            self.coming.append((threads, self.committed[threads], places, values[threads]))

        return {"commit_group": commit, "wait_group": wait}.get(words[2], start)

    def move(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        kind, to, of = words[1], operands[0], operands[1]

        def go(who: Values) -> None:
            if to[0] == "{":
                names = [name.strip() for name in to.strip("{}").split(",")]
                whole = np.ascontiguousarray(self.get(of, kind))
                parts = whole.view(f"u{whole.dtype.itemsize // len(names)}").reshape(self.count, len(names))
                for i, name in enumerate(names):
                    self.put(name, np.ascontiguousarray(parts[:, i]), who)
            elif of[0] == "{":
                names = [name.strip() for name in of.strip("{}").split(",")]
                parts = [self.get(name, f"b{dtype_of(kind).itemsize * 8 // len(names)}") for name in names]
                self.put(to, np.ascontiguousarray(np.stack(parts, axis=1)).view(dtype_of(kind))[:, 0].copy(), who)
            else:
                self.put(to, self.get(of, kind), who)

        return go

    def same(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        return lambda who: self.put(operands[0], self.get(operands[1], words[-1]), who)

    def convert(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        to, of = words[-2], words[-1]
        half = ml_dtypes.bfloat16 if to.startswith("bf16") else np.float16

        def go(who: Values) -> None:
            with np.errstate(all="ignore"):
                if to.endswith("x2"):  # the first is the upper one
                    parts = [self.get(operand, of).astype(half).view(np.uint16) for operand in operands[:0:-1]]
                    value = np.stack(parts, axis=1).view(np.uint32)[:, 0].copy()
                elif to == "bf16":
                    value = self.get(operands[1], of).astype(half).view(np.uint16)
                else:
                    value = self.get(operands[1], of)
                    if "rni" in words:
                        value = np.rint(value)
                    if to[0] in "su" and value.dtype.kind == "f":
                        info = np.iinfo(dtype_of(to))
                        value = np.clip(np.nan_to_num(value.astype(np.float64)), info.min, info.max)
                    value = value.astype(dtype_of(to))
            self.put(operands[0], value, who)

        return go

    def compare(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        test, kind = words[1], words[-1]
        functions = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le}
        functions |= {"gt": operator.gt, "ge": operator.ge}
        unordered = len(test) == 3 and test[-1] == "u"

        def go(who: Values) -> None:
            a, b = (self.get(operand, kind) for operand in operands[1:])
            with np.errstate(all="ignore"):
                holds = functions[test[:2]](a, b)
                if unordered:
                    holds |= np.isnan(a) | np.isnan(b)
            self.put(operands[0], holds, who)

        return go

    def shuffle(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        if words[2] != "bfly":
            raise NotImplementedError(".".join(words))

        def go(who: Values) -> None:
            self.together(who)
            other = np.arange(self.count) ^ self.get(operands[2], "u32")
            self.put(operands[0].split("|")[0], self.get(operands[1], "b32")[other], who)

        return go

    def reduce(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        function = {"add": np.add, "max": np.maximum, "min": np.minimum}[words[2]]

        def go(who: Values) -> None:
            self.together(who)
            value = self.get(operands[1], words[-1]).reshape(-1, WARP)
            whole = function.reduce(value, axis=1, dtype=value.dtype)
            self.put(operands[0], np.repeat(whole, WARP), who)

        return go

    def map(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        def go(who: Values) -> None:
            self.put(operands[0], self.get(operands[1], "u32") | (self.get(operands[2], "u32") + 1) << BLOCK, who)

        return go

    def multiply_matrices(self, words: list[str], operands: list[str]) -> Callable[[Values], None]:
        """`mma.sync`: the fragments of each warp become matrices, which are multiplied, and their product fragments."""
        m, n, k = map(int, re.findall(r"\d+", words[3]))
        of_d, of_a, of_b, of_c = words[6:10]
        lane, pair = np.arange(WARP) // 4, np.arange(WARP) % 4

        def matrix(operand: str, kind: str, rows: int, is_b: bool) -> np.ndarray:
            names = [name.strip() for name in operand.strip("{}").split(",")]
            dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bf16" else dtype_of(kind)
            each = 4 // dtype.itemsize
            packed = np.stack([self.get(name, "b32") for name in names], axis=1)  # [thread, register]
            values = packed.view(dtype).reshape(-1, WARP, len(names), each)
            whole = np.zeros((values.shape[0], rows, k), np.float64)
            for register in range(len(names)):
                row = lane if is_b else lane + register % 2 * 8
                group = register if is_b else register // 2
                for i in range(each):
                    whole[:, row, group * 4 * each + pair * each + i] = values[:, :, register, i].astype(np.float64)
            return whole

        def go(who: Values) -> None:
            self.together(who)
            with np.errstate(all="ignore"):
                product = matrix(operands[1], of_a, m, False) @ matrix(operands[2], of_b, n, True).transpose(0, 2, 1)
            results = [name.strip() for name in operands[0].strip("{}").split(",")]
            addends = [name.strip() for name in operands[3].strip("{}").split(",")]
            dtype, each = dtype_of(of_d), 4 // dtype_of(of_d).itemsize
            for register, (result, addend) in enumerate(zip(results, addends, strict=True)):
                got = np.empty((product.shape[0], WARP, each), dtype)
                more = np.ascontiguousarray(self.get(addend, "b32")).view(dtype_of(of_c)).reshape(-1, WARP, each)
                for i in range(each):
                    item = register * each + i
                    with np.errstate(all="ignore"):
                        got[:, :, i] = product[:, lane + item // 2 * 8, pair * 2 + item % 2] + more[:, :, i]
                self.put(result, got.reshape(self.count, each).view(np.uint32)[:, 0].copy(), who)

        return go


Elementwise = Callable[[list[str]], tuple[list[str], Callable[..., Any]]]


def halves(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float16 or bfloat16 for both halves of registers."""

    def both(dtype: Any, *arguments: Values) -> Values:
        wide = [np.ascontiguousarray(one).view(dtype).astype(np.float64) for one in arguments]
        return function(*wide).astype(dtype).view(np.uint32)

    return both


def arithmetic(function: Callable[..., Any], count: int) -> Elementwise:
    """An operation of `count` operands of the kind that the instruction ends with."""

    def of(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
        kind = words[-1]
        if kind in ("f16x2", "bf16x2"):
            dtype = ml_dtypes.bfloat16 if kind == "bf16x2" else np.float16
            return ["b32"] * (count + 1), lambda *all: halves(function)(dtype, *all)
        if kind[0] == "f":
            return [kind] * (count + 1), lambda *all: function(*(one.astype(np.float64) for one in all))
        if "wide" in words:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            kinds = [wide, kind, kind, wide][: count + 1]
            return kinds, lambda *all: function(*(one.astype(dtype_of(wide)) for one in all))
        if "hi" in words:
            return [kind] * (count + 1), lambda a, b: a.astype(np.int64) * b.astype(np.int64) >> 32
        return [kind] * (count + 1), function

    return of


def lop3(a: Values, b: Values, c: Values, table: Values) -> Values:
    result = np.zeros_like(a)
    for row in range(8):
        picks = [one if row >> 2 - i & 1 else ~one for i, one in enumerate((a, b, c))]
        result |= np.where(table >> row & 1, picks[0] & picks[1] & picks[2], 0).astype(np.uint32)
    return result


def prmt(a: Values, b: Values, selectors: Values) -> Values:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def shift(left: bool) -> Elementwise:
    def of(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
        kind = words[-1]
        most = int(kind[1:])

        def go(a: Values, by: Values) -> Values:
            if left:
                return np.where(by >= most, 0, a << np.minimum(by, most - 1).astype(a.dtype))
            return np.where(
                by >= most,
                a >> a.dtype.type(most - 1) if kind[0] == "s" else 0,
                a >> np.minimum(by, most - 1).astype(a.dtype),
            )

        return [kind, kind, "u32"], go

    return of


def funnel(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
    def go(low: Values, high: Values, by: Values) -> Values:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = (by & 31).astype(np.uint64)
        return both >> by if words[1] == "r" else both << by >> np.uint64(32)

    return ["b32", "b32", "b32", "u32"], go


def bfi(a: Values, b: Values, at: Values, count: Values) -> Values:
    mask = ((np.uint64(1) << count.astype(np.uint64)) - np.uint64(1) << at.astype(np.uint64)).astype(np.uint32)
    return a << at & mask | b & ~mask


def bfe(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
    kind = words[-1]

    def go(a: Values, at: Values, count: Values) -> Values:
        up = (32 - count - at).astype(a.dtype)
        return a << up >> (32 - count).astype(a.dtype)

    return [kind, kind, "u32", "u32"], go


def dp2a(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
    """The sum of the products of two numbers of 16 bits and two of 8 bits."""
    by = {"lo": 0, "hi": 16}[words[1]]

    def go(a: Values, b: Values, c: Values) -> Values:
        return (a & 0xFFFF) * (b >> by & 0xFF) + (a >> 16) * (b >> by + 8 & 0xFF) + c

    if words[2:] != ["u32", "u32"]:
        raise NotImplementedError(".".join(words))
    return ["u32"] * 4, go


def selected(words: list[str]) -> tuple[list[str], Callable[..., Any]]:
    return [words[-1], words[-1], words[-1], "pred"], lambda a, b, where: np.where(where, a, b)


def fixed(kinds: list[str], function: Callable[..., Any]) -> Elementwise:
    return lambda words: (kinds, function)


ELEMENTWISE: Mapping[str, Elementwise] = {
    "add": arithmetic(operator.add, 2),
    "sub": arithmetic(operator.sub, 2),
    "mul": arithmetic(operator.mul, 2),
    "mad": arithmetic(lambda a, b, c: a * b + c, 3),
    "fma": arithmetic(lambda a, b, c: a * b + c, 3),
    "div": arithmetic(operator.truediv, 2),
    "rcp": arithmetic(lambda a: 1 / a, 1),
    "min": arithmetic(np.fmin, 2),
    "max": arithmetic(np.fmax, 2),
    "abs": arithmetic(np.abs, 1),
    "neg": arithmetic(operator.neg, 1),
    "not": arithmetic(np.invert, 1),
    "and": arithmetic(operator.and_, 2),
    "or": arithmetic(operator.or_, 2),
    "xor": arithmetic(operator.xor, 2),
    "shl": shift(True),
    "shr": shift(False),
    "shf": funnel,
    "bfi": fixed(["b32", "b32", "b32", "u32", "u32"], bfi),
    "bfe": bfe,
    "lop3": fixed(["b32", "b32", "b32", "b32", "u32"], lop3),
    "prmt": fixed(["b32", "b32", "b32", "b32"], prmt),
    "selp": selected,
    "dp2a": dp2a,
}
