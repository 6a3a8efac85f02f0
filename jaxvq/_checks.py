"""What the settings of a method must be."""

import contextlib
import math
import numbers
import operator
from typing import Any

from jaxvq.bits import MAX_BITS, check_bits

LARGEST_CODEBOOK = 2**MAX_BITS
CODEBOOK_DTYPES = ("float32", "bfloat16", "int8")


def store_integers(method: Any, *names: str) -> None:
    """Stores integers of any type as `int`, which JSON can write; what is none is left for the checks to refuse."""
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, bool):
            with contextlib.suppress(TypeError):
                object.__setattr__(method, name, operator.index(value))


def checked_fraction(fraction: Any) -> float:
    """The fraction as a number above 0 and at most 1."""
    number = float(fraction) if isinstance(fraction, numbers.Real) and not isinstance(fraction, bool) else math.nan
    if not 0 < number <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction!r}; use for example 0.1")
    return number


def check_rate(bits: int | None, k: int | None) -> None:
    """Refuses both of `bits` and `k`, or either out of range."""
    if bits is not None and k is not None:
        raise ValueError(f"`bits` and `k` exclude each other, got bits={bits} and k={k}; give one")
    if bits is not None:
        check_bits(bits, MAX_BITS)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= LARGEST_CODEBOOK):
        raise ValueError(f"`k` must be a whole number from 1 to {LARGEST_CODEBOOK}, got {k!r}; use for example k=16")


def check_count(name: str, value: int) -> None:
    """Refuses what is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")


def check_per(per: Any) -> None:
    """Refuses what is not "tensor", "channel" or a group size."""
    whole = isinstance(per, int) and not isinstance(per, bool) and per >= 1
    if not whole and per not in ("tensor", "channel"):
        raise ValueError(f'`per` must be "tensor", "channel" or a group size of at least 1, got {per!r}')


def check_codebook_dtype(dtype: str) -> None:
    """Refuses a dtype that centroids are not stored in."""
    if dtype not in CODEBOOK_DTYPES:
        raise ValueError(f"`codebook_dtype` must be one of {', '.join(CODEBOOK_DTYPES)}, got {dtype!r}")


def check_enough(k: int, most: int, what: str) -> None:
    """Refuses more centroids than there are vectors to stand for."""
    if k > most:
        raise ValueError(
            f"`k` must be at most the number of {what} that share a codebook, which is {most}, got {k}; "
            f"use {most} or less, or keep this weight float"
        )
