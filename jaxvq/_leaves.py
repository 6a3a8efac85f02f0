"""The leaves of a tree as named tensors and a JSON description, and back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxvq._container import CODE_NAMES, NUMPY_NAMES, Reader, Tensor, is_sizes
from jaxvq._pytree import path_str
from jaxvq.array import Affine, Codebook, QuantizedArray
from jaxvq.bits import MAX_BITS, PackedCodes, word_count
from jaxvq.layout import Layout

MAX_DEPTH = 100
FLOATS = {code for code, name in NUMPY_NAMES.items() if jnp.issubdtype(jnp.dtype(name), jnp.floating)}
EMPTY: dict[str, Any] = {"none": None, "dict": {}, "list": []}
DECODERS: dict[str, Any] = {"affine": Affine, "codebook": Codebook}
PARTS = {"affine": ("scale", "zero_point"), "codebook": ("vectors", "scale")}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree.

    Attributes:
      name: its path, as text.
      keys: its path as JSON: a text is a dictionary key, a number an index, `{"key": number}` a dictionary key that
        is a number.
      value: an array, a QuantizedArray, either with `jax.ShapeDtypeStruct`s for arrays, or None, {} or [].
    """

    name: str
    keys: tuple[Any, ...]
    value: Any

    def parts(self) -> dict[str, Any]:
        """Its arrays by tensor name."""
        return parts(self.name, self.value)

    def to_json(self) -> dict[str, Any]:
        """Everything about the leaf that its tensors do not say."""
        entry: dict[str, Any] = {"name": self.name, "keys": list(self.keys)}
        if isinstance(self.value, QuantizedArray):
            codes = self.value.codes
            entry["quantized"] = {
                "decoder": _kind(self.value),
                "bits": codes.bits,
                "length": codes.length,
                "axis": codes.axis,
                "stack": list(self.value.stack),
                "layout": dataclasses.asdict(self.value.layout),
            }
        elif _is_empty(self.value):
            entry["empty"] = next(kind for kind, value in EMPTY.items() if type(value) is type(self.value))
        return entry


def flatten(tree: Any) -> list[Leaf]:
    """The leaves of a tree.

    Raises:
      TypeError: for a leaf that is no array, and for dictionary keys that are neither texts nor numbers.
      ValueError: for two leaves of the same path.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves: dict[str, Leaf] = {}
    for path, value in found:
        name = path_str(path)
        if name in leaves:
            raise ValueError(f"{name}: two leaves have this path; rename one of them")
        if isinstance(value, dict | list | tuple):
            value = {} if isinstance(value, dict) else []
        else:
            _check_array(name, value)
        steps = path[: len(path) - 1] if _boxed(path) else path
        if len(steps) > MAX_DEPTH:
            raise ValueError(f"{name}: a leaf may be {MAX_DEPTH} levels deep, got {len(steps)}; flatten the tree")
        leaves[name] = Leaf(name, tuple(_key_json(name, step) for step in steps), value)
    return list(leaves.values())


def _check_array(name: str, value: Any) -> None:
    if value is None or isinstance(value, QuantizedArray):
        return
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(
            f"{name}: a leaf must be an array, got {type(value).__name__}; use jax.numpy.asarray for a number, "
            "or keep only the arrays of the tree, as equinox.filter(model, equinox.is_array) does"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name}: a leaf must hold numbers, got dtype {value.dtype}; leave random keys out, such as by "
            "nnx.state(model, nnx.Param), or use jax.random.key_data"
        )


def unflatten(leaves: Iterable[Leaf], reader: Reader) -> Any:
    """Nested dictionaries and lists from leaves. Raises FileFormatError when their paths make no tree."""
    root: dict[Any, Any] = {}
    for leaf in leaves:
        node, steps = root, ("root", *(_step(key) for key in leaf.keys))
        for step in steps[:-1]:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                reader.fail(f"`{leaf.name}`", "`keys` lead through another leaf; the file is damaged")
        if steps[-1] in node:
            reader.fail(f"`{leaf.name}`", "`keys` are those of another leaf; the file is damaged")
        node[steps[-1]] = leaf
    return _build(root.get("root", {}), reader)


def parts(name: str, value: Any) -> dict[str, Any]:
    """The arrays of a leaf by tensor name: `w` itself, or `w#codes`, `w#vectors`, `w#scale`, `w#zero_point`."""
    if _is_empty(value):
        return {}
    if not isinstance(value, QuantizedArray):
        return {name: value}
    fields = {field: getattr(value.decoder, field) for field in PARTS[_kind(value)]}
    found = {f"{name}#codes": value.codes.words} | {f"{name}#{field}": array for field, array in fields.items()}
    return {key: array for key, array in found.items() if array is not None}


def fill(template: Any, name: str, read: Callable[[str], jax.Array]) -> QuantizedArray:
    """The QuantizedArray of the shapes `template`, its arrays read by tensor name."""
    kind = _kind(template)
    present = parts(name, template)
    fields = {f: read(f"{name}#{f}") if f"{name}#{f}" in present else None for f in PARTS[kind]}
    codes = dataclasses.replace(template.codes, words=read(f"{name}#codes"))
    return QuantizedArray(codes, DECODERS[kind](**fields), template.layout)


def parse(entry: Any, reader: Reader) -> Leaf:
    """The leaf that one entry of a file's description stands for, with shapes in place of arrays.

    Raises:
      FileFormatError: naming file, leaf and field.
    """
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        reader.fail("the leaves", "must be objects with a `name`; the file is damaged")
    keys = _Fields(entry, f"`{name}`", reader).get("keys", _is_keys, "a list of path steps")
    if "empty" in entry:
        kind = _Fields(entry, f"`{name}`", reader).get(
            "empty", lambda value: value in list(EMPTY), "none, dict or list"
        )
        return Leaf(name, tuple(keys), EMPTY[kind])
    if "quantized" in entry:
        return Leaf(name, tuple(keys), _parse_quantized(name, entry["quantized"], reader))
    if name not in reader.tensors:
        reader.fail(f"`{name}`", "is described but not stored; the file is damaged")
    return Leaf(name, tuple(keys), struct_of(reader.tensors[name]))


def struct_of(tensor: Tensor) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a tensor."""
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A JSON object whose fields are checked as they are read."""

    content: Any
    where: str
    reader: Reader

    def get(self, key: str, holds: Callable[[Any], bool], rule: str) -> Any:
        value = self.content.get(key) if isinstance(self.content, dict) else None
        if not holds(value):
            problem = f"must be {rule}, got {str(value)[:40]!r}; the file is damaged"
            self.reader.fail(f"{self.where} field `{key}`", problem)
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        return self.get(key, lambda n: type(n) is int and low <= n <= high, f"a number from {low} to {high}")


def _parse_quantized(name: str, content: Any, reader: Reader) -> QuantizedArray:
    fields = _Fields(content, f"`{name}`", reader)
    kind = fields.get("decoder", lambda value: isinstance(value, str) and value in DECODERS, f"one of {list(DECODERS)}")
    stack = tuple(fields.get("stack", is_sizes, "a list of sizes"))
    layout = _parse_layout(
        _Fields(fields.get("layout", lambda v: isinstance(v, dict), "an object"), f"`{name}`", reader)
    )
    bits, axis = fields.whole("bits", 1, MAX_BITS), fields.whole("axis", 0, 1)
    grid = layout.grid
    length = fields.whole("length", grid[axis], grid[axis])
    found = {f: reader.tensors[f"{name}#{f}"] for f in ("codes", *PARTS[kind]) if f"{name}#{f}" in reader.tensors}
    _check_shapes(name, kind, stack, found, reader)
    stages = found["codes"].shape[-1]
    words = [word_count(n, bits) if side == axis else n for side, n in enumerate(grid)]
    if found["codes"].shape != (*stack, *words, stages):
        problem = f"must have shape {(*stack, *words, stages)}, got {found['codes'].shape}; the file is damaged"
        reader.fail(f"`{name}#codes`", problem)
    structs = {field: struct_of(tensor) for field, tensor in found.items()}

    def assemble(arrays: dict[str, jax.Array]) -> QuantizedArray:
        codes = PackedCodes(arrays["codes"], bits=bits, length=length, axis=axis)
        return QuantizedArray(codes, DECODERS[kind](**{f: arrays[f] for f in PARTS[kind] if f in arrays}), layout)

    template = jax.eval_shape(assemble, structs)
    try:
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[len(stack) :], s.dtype), template.decoder)
        one.check(grid, layout.dim, stages)
    except ValueError as error:
        reader.fail(f"`{name}` decoder:", f"{error}; the file is damaged")
    return template


def _check_shapes(name: str, kind: str, stack: tuple[int, ...], found: Mapping[str, Tensor], reader: Reader) -> None:
    """Checks which tensors there are, their dtypes, ranks and stacked axes."""
    for field in ("codes", PARTS[kind][0]):
        if field not in found:
            reader.fail(f"`{name}#{field}`", "is described but not stored; the file is damaged")
    for field, tensor in found.items():
        rank = len(stack) + (5 if kind == "codebook" and field != "codes" else 3)
        tail = {"codes": (), "vectors": (), "scale": (1, 1), "zero_point": (1,)}[field]
        tail = (1,) if kind == "affine" and field == "scale" else tail
        codes = {"codes": {"U32"}, "vectors": FLOATS | {"I8"}}.get(field, FLOATS)
        shape = tensor.shape
        fits = len(shape) == rank and shape[: len(stack)] == stack and shape[rank - len(tail) :] == tail
        if not fits or tensor.code not in codes or (field == "vectors" and shape[-2] < 1):
            problem = f"does not fit the leaf: got {tensor.code} {shape}, stack {stack}; the file is damaged"
            reader.fail(f"`{tensor.name}`", problem)


def _parse_layout(fields: _Fields) -> Layout:
    shape = tuple(fields.get("shape", is_sizes, "a list of sizes"))

    def is_float(value: Any) -> bool:
        return isinstance(value, str) and CODE_NAMES.get(value) in FLOATS

    def is_axis(value: Any) -> bool:
        return value is None or (type(value) is int and 0 <= value < len(shape))

    out_axis = fields.get("out_axis", is_axis, f"an axis of {shape} or null")
    in_axis = fields.get("in_axis", is_axis, f"an axis of {shape} or null")
    if in_axis is not None and in_axis == out_axis:
        fields.get("in_axis", lambda _: False, "another axis than out_axis")
    layout = Layout(
        shape,
        fields.get("dtype", is_float, "a floating-point dtype"),
        out_axis=out_axis,
        in_axis=in_axis,
        dim=fields.whole("dim", 1, 2**31),
        pad=fields.whole("pad", 0, 2**63),
        along_out=fields.get("along_out", lambda value: isinstance(value, bool), "true or false"),
    )
    cut = layout.matrix_shape[1 if layout.along_out else 0] + layout.pad
    fields.get("pad", lambda _: cut % layout.dim == 0, f"what makes whole vectors of {layout.dim}")
    return layout


def _build(node: Any, reader: Reader) -> Any:
    if isinstance(node, Leaf):
        return node.value
    indices = [step[1] for step in node if step[0] == "index"]
    if not indices:
        return {key: _build(child, reader) for (_, key), child in node.items()}
    if len(indices) != len(node) or sorted(indices) != list(range(len(node))):
        reader.fail("the leaves", f"`keys` must number a list from 0, got {sorted(indices)[:4]}; the file is damaged")
    return [_build(node["index", index], reader) for index in range(len(node))]


def _step(key: Any) -> tuple[str, Any]:
    """A path step that can be a dictionary key, with indices apart from keys that are numbers."""
    if isinstance(key, dict):
        return "key", key["key"]
    return ("index", key) if isinstance(key, int) else ("key", key)


def _key_json(name: str, step: Any) -> Any:
    match step:
        case SequenceKey():
            return step.idx
        case FlattenedIndexKey():
            return step.key
        case GetAttrKey():
            return step.name
        case DictKey(key=str() as key):
            return key
        case DictKey(key=int() as key) if not isinstance(key, bool):
            return {"key": key}
    raise TypeError(f"{name}: dictionary keys must be texts or whole numbers, got {step}; rename the key")


def _is_keys(value: Any) -> bool:
    def is_key(key: Any) -> bool:
        if isinstance(key, dict):
            return list(key) == ["key"] and type(key["key"]) is int
        return isinstance(key, str) or (type(key) is int and key >= 0)

    return isinstance(value, list) and len(value) <= MAX_DEPTH and all(is_key(key) for key in value)


def _boxed(path: tuple[Any, ...]) -> bool:
    """Whether the last step is the box of an nnx variable or a linen partitioned parameter, which has no name."""
    return len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value"


def _kind(value: QuantizedArray) -> str:
    return "affine" if isinstance(value.decoder, Affine) else "codebook"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def is_leaf(node: Any) -> bool:
    return isinstance(node, QuantizedArray) or _is_empty(node)
