"""Which method for which weight: rules over paths, and the plan that they make for a tree of parameters."""

import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxvq._pytree import path_str
from jaxvq.array import QuantizedArray, is_quantized
from jaxvq.layout import Layout
from jaxvq.methods import AbstractMethod, method_from_json

WEIGHT_RANK = 2


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the weights whose path matches.

    Attributes:
      pattern: a regular expression that must match the whole path (`re.fullmatch`), such as `"Dense_[01]/kernel"`.
      method: how to quantize; None keeps the weight float.
      out_axis: the axis of output features; None for the convention of the leaf's name: `kernel` last (Flax), `weight`
        first (PyTorch, Equinox), `embedding` first, anything else last.
      min_size: weights with fewer values stay float.
      stacked: how many leading axes stack layers (`flax.linen.scan`, `jax.vmap`); each slice is quantized by itself.

    Example:
      >>> from jaxvq.methods import KMeans
      >>> rule = Rule(".*/kernel", KMeans(bits=4), min_size=1000)
    """

    pattern: str
    method: AbstractMethod | None
    out_axis: int | None = None
    min_size: int = 0
    stacked: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"`pattern` must be a regular expression, got {self.pattern!r}: {error}") from None
        if self.method is not None and not isinstance(self.method, AbstractMethod):
            raise TypeError(f"`method` must be a method such as KMeans(bits=4) or None, got {self.method!r}")
        for name in ("min_size", "stacked"):
            number = _whole(getattr(self, name))
            if number is None or number < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {getattr(self, name)!r}")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "out_axis", _checked_axis(self.out_axis))


@dataclasses.dataclass(frozen=True)
class Spec:
    """An ordered list of rules, the first match wins, and a default for the weights that none matches.

    Attributes:
      rules: tried in order.
      default: the method for every other float leaf of rank 2 or more; None keeps them float.
      out_axis: the axis of output features of every weight whose rule names none; None for the convention of the name.

    Example:
      >>> from jaxvq.methods import KMeans, Product
      >>> spec = Spec((Rule("head/kernel", None), Rule("Conv.*/kernel", Product(dim=9))), default=KMeans(bits=4))
      >>> Spec.from_json(spec.to_json()) == spec
      True
    """

    rules: tuple[Rule, ...] = ()
    default: AbstractMethod | None = None
    out_axis: int | None = None

    def __post_init__(self) -> None:
        if not _are_rules(self.rules):
            raise TypeError(
                f"`rules` must be a sequence of Rules, got {self.rules!r}; "
                "a method for every weight is Spec(default=KMeans(bits=4))"
            )
        if self.default is not None and not isinstance(self.default, AbstractMethod):
            raise TypeError(f"`default` must be a method such as KMeans(bits=4) or None, got {self.default!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "out_axis", _checked_axis(self.out_axis))

    def to_json(self) -> str:
        """The spec as JSON text."""
        rules = [
            {
                **{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)},
                "method": _method_to_json(rule.method),
            }
            for rule in self.rules
        ]
        data = {"rules": rules, "default": _method_to_json(self.default), "out_axis": self.out_axis}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """The spec that `to_json` wrote.

        Raises:
          ValueError: for text that is not JSON or not a spec, naming the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`spec` must be JSON, got text that does not parse: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("rules", []), list):
            raise ValueError('`spec` must be {"rules": [...], "default": {...} or null}, got something else')
        if unknown := sorted(set(data) - {"rules", "default", "out_axis"}):
            raise ValueError(f"`spec` has only the fields rules, default and out_axis, got {', '.join(unknown)}")
        try:
            rules = tuple(_rule_from_json(rule) for rule in data.get("rules", []))
            return cls(rules, _method(data.get("default")), data.get("out_axis"))
        except TypeError as error:
            raise ValueError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What will happen to one leaf.

    Attributes:
      path: where it is, such as `"Dense_0/kernel"`.
      shape: its shape.
      dtype: its dtype, by name; empty for a leaf that is not an array.
      method: how it will be quantized, or None.
      layout: how one layer of it will be cut, or None.
      stacked: how many leading axes stack layers.
      reason: why it stays float, or a remark on how it is quantized; may be empty.
      template: the quantized leaf with `jax.ShapeDtypeStruct`s for arrays, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    method: AbstractMethod | None = None
    layout: Layout | None = None
    stacked: int = 0
    reason: str = ""
    template: QuantizedArray | None = None

    @property
    def original_nbytes(self) -> int:
        """Bytes of the leaf as it is; 0 for one that holds no numbers, such as a random key."""
        try:
            itemsize = jnp.dtype(self.dtype).itemsize
        except TypeError:
            return 0
        return math.prod(self.shape) * itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf as it will be: exact, everything counted."""
        return self.original_nbytes if self.template is None else self.template.nbytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will happen to every leaf of a tree, in its order. Printing it shows a table."""

    entries: tuple[PlanEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tree as it will be."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the whole tree as it is."""
        return sum(entry.original_nbytes for entry in self.entries)

    def __str__(self) -> str:
        rows = [("path", "shape", "becomes", "bytes", "bits/weight", "remark")]
        for entry in self.entries:
            becomes = "float" if entry.method is None else str(entry.method)
            rate = 8 * entry.nbytes / max(1, math.prod(entry.shape))
            rows.append((entry.path, str(entry.shape), becomes, f"{entry.nbytes:,}", f"{rate:.2f}", entry.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        ratio = self.original_nbytes / max(1, self.nbytes)
        return "\n".join([*lines, f"{self.original_nbytes:,} bytes become {self.nbytes:,} ({ratio:.2f}x smaller)"])


def resolve(params: Any, spec: Spec | Rule | Sequence[Rule] | AbstractMethod) -> Plan:
    """Decides what happens to each leaf, without reading a value.

    Args:
      params: a tree of arrays or `jax.ShapeDtypeStruct`s.
      spec: a `Spec`, a sequence of rules, or a bare method for every weight of rank 2 or more.

    Raises:
      ValueError: for a rule that matches nothing, a leaf that its method cannot take, or two leaves of one path.
      TypeError: for something else than a spec, or a leaf under a rule that is not a float array.

    Example:
      >>> from jaxvq.methods import KMeans
      >>> shapes = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((784, 128), jnp.float32)}}
      >>> resolve(shapes, KMeans(bits=4)).nbytes
      50240
    """
    spec = as_spec(spec)
    leaves = [(path_str(path), leaf) for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_quantized)]
    paths = [path for path, _ in leaves]
    _check_patterns(spec, paths)
    repeated = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
    if repeated:
        raise ValueError(f"{repeated[0]}: two leaves have this path; rename one, so that a rule can tell them apart")
    return Plan(tuple(_entry(path, leaf, spec) for path, leaf in leaves))


def as_spec(spec: Any) -> Spec:
    """A `Spec` from what users may pass for one."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, AbstractMethod):
        return Spec(default=spec)
    rules = (spec,) if isinstance(spec, Rule) else spec
    if _are_rules(rules):
        return Spec(tuple(rules))
    raise TypeError(f"`spec` must be a Spec, a sequence of Rules or a method such as KMeans(bits=4), got {spec!r}")


def _entry(path: str, leaf: Any, spec: Spec) -> PlanEntry:
    if is_quantized(leaf):
        return PlanEntry(path, leaf.shape, leaf.layout.dtype, reason="already quantized", template=leaf)
    rule = next((rule for rule in spec.rules if re.fullmatch(rule.pattern, path)), None)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        if rule is not None and rule.method is not None:
            raise TypeError(f"{path}: a rule quantizes arrays, got {leaf!r}; exclude this leaf from the pattern")
        return PlanEntry(path, (), "", reason="not an array" if rule is None else f"kept by rule {rule.pattern!r}")
    shape, dtype = tuple(leaf.shape), leaf.dtype
    kept = PlanEntry(path, shape, dtype.name)
    if rule is None:
        if spec.default is None:
            return dataclasses.replace(kept, reason="no rule matches")
        if not jnp.issubdtype(dtype, jnp.floating):
            return dataclasses.replace(kept, reason=f"{dtype.name} is not a float dtype")
        if len(shape) < WEIGHT_RANK:
            return dataclasses.replace(kept, reason=f"rank {len(shape)}, not a weight matrix")
        rule = Rule(".*", spec.default)
    if rule.method is None:
        return dataclasses.replace(kept, reason=f"kept by rule {rule.pattern!r}")
    if math.prod(shape) < rule.min_size:
        return dataclasses.replace(kept, reason=f"fewer than {rule.min_size} values")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path}: a rule quantizes float arrays, got {dtype.name}; exclude this leaf from the pattern")
    out_axis = spec.out_axis if rule.out_axis is None else rule.out_axis
    return _quantized_entry(kept, dataclasses.replace(rule, out_axis=out_axis), rule.method)


def _quantized_entry(entry: PlanEntry, rule: Rule, method: AbstractMethod) -> PlanEntry:
    path, shape, dtype = entry.path, entry.shape, jax.dtypes.canonicalize_dtype(jnp.dtype(entry.dtype))
    one = shape[rule.stacked :]
    if not one or math.prod(shape) == 0:
        raise ValueError(
            f"{path}: a rule quantizes arrays with values in them and axes beside the {rule.stacked} stacked ones, "
            f"got shape {shape}; exclude this leaf from the pattern"
        )
    out_axis, channels_last = _convention(path)
    if rule.stacked and rule.out_axis is not None and len(one) > 1 and not -len(one) <= rule.out_axis < len(one):
        raise ValueError(
            f"{path}: `out_axis` counts the axes of one slice, here of shape {one} without the {rule.stacked} stacked, "
            f"got {rule.out_axis}; use a number from {-len(one)} to {len(one) - 1}"
        )
    try:
        layout = method.layout(
            one,
            dtype,
            out_axis=(out_axis if rule.out_axis is None else rule.out_axis) if len(one) > 1 else None,
            channels_last=channels_last,
        )
        template = method.template(layout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    stack = shape[: rule.stacked]
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(stack + leaf.shape, leaf.dtype), template)
    remarks = [] if dtype.name == entry.dtype else [f"{entry.dtype} becomes {dtype.name}"]
    if template.nbytes >= entry.original_nbytes:
        remarks.append("larger than before")
    return dataclasses.replace(
        entry, method=method, layout=layout, stacked=rule.stacked, template=template, reason="; ".join(remarks)
    )


def _are_rules(rules: Any) -> bool:
    return isinstance(rules, Sequence) and not isinstance(rules, str) and all(isinstance(rule, Rule) for rule in rules)


def _whole(value: Any) -> int | None:
    """`value` as an int, or None if it is no integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _checked_axis(axis: Any) -> int | None:
    if axis is not None and _whole(axis) is None:
        raise TypeError(f"`out_axis` must be a whole number or None, got {axis!r}; use for example -1")
    return _whole(axis)


def _convention(path: str) -> tuple[int, bool]:
    """(out_axis, channels_last) by the last part of a leaf's name."""
    name = re.split(r"[/.]", path)[-1]
    if name == "weight":
        return 0, False
    return (0, True) if name == "embedding" else (-1, True)


def _check_patterns(spec: Spec, paths: Sequence[str]) -> None:
    for rule in spec.rules:
        if not any(re.fullmatch(rule.pattern, path) for path in paths):
            near = difflib.get_close_matches(rule.pattern, paths, n=5, cutoff=0.3) or list(paths[:5])
            raise ValueError(
                f"`pattern` {rule.pattern!r} matches no path; a pattern must match a whole path, such as "
                f"{', '.join(map(repr, near)) or '(the tree has no leaves)'}"
            )


def _method_to_json(method: AbstractMethod | None) -> dict[str, Any] | None:
    return None if method is None else method.to_json()


def _method(data: Any) -> AbstractMethod | None:
    return None if data is None else method_from_json(data)


def _rule_from_json(data: Any) -> Rule:
    known = [field.name for field in dataclasses.fields(Rule)]
    if not isinstance(data, Mapping) or not {"pattern", "method"} <= set(data) <= set(known):
        raise ValueError(f"`rules` must hold objects with pattern and method, and no fields but {known}, got {data!r}")
    return Rule(**{**data, "method": _method(data["method"])})
