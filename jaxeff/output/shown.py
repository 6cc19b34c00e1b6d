"""Results that show themselves: short text in a terminal and a notebook, and nothing compiled for it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxeff.output.text import UNKNOWN, number

MOST_LINES = 60
"""Lines of a repr; `str` has all of them."""

_LARGE = 1 << 20  # Larger arrays are not copied to the host for the sake of their range.


class Shown:
    """A dataclass whose repr is its text, shortened, and which notebooks show in the same way.

    Declare it with `repr=False`. Unless the class has a `__str__` of its own, the text lists its fields.
    """

    def __str__(self) -> str:
        return fields(self)

    def __repr__(self) -> str:
        strangers = [leaf for leaf in jax.tree.leaves(self) if not _is_concrete(leaf) and leaf is not self]
        if strangers:
            return f"{type(self).__name__} of {type(strangers[0]).__name__}s"
        return shortened(str(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def shortened(text: str, most: int = MOST_LINES) -> str:
    """Shorten a text to at most `most` lines by leaving out its middle.

    >>> shortened("1\\n2\\n3\\n4\\n5", 3)
    '1\\n... 3 lines left out: print the result for all of them.\\n5'
    """
    lines = text.splitlines()
    if len(lines) <= most:
        return text
    head, tail = 2 * (most - 1) // 3, most - 1 - 2 * (most - 1) // 3
    if most == 3:
        head, tail = 1, 1
    left_out = f"... {len(lines) - head - tail:,} lines left out: print the result for all of them."
    return "\n".join([*lines[:head], left_out, *lines[len(lines) - tail :]])


def fields(shown: Any) -> str:
    """A line for each field of a dataclass: numbers as they are, arrays by shape and range."""
    rows = [
        row for field in dataclasses.fields(shown) for row in _rows(field.name, getattr(shown, field.name))
    ]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([type(shown).__name__, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    """A row; of a dataclass that holds single numbers one for each."""
    inner = (
        [] if not dataclasses.is_dataclass(value) or isinstance(value, type) else dataclasses.fields(value)
    )
    found = [(f"{name}.{field.name}", getattr(value, field.name)) for field in inner]
    if found and all(np.ndim(each) == 0 and not dataclasses.is_dataclass(each) for _, each in found):
        return [(each, described(number)) for each, number in found]
    return [(name, described(value))]


def described(value: Any) -> str:
    """One value in a few words.

    >>> described(None), described(1234), described(np.float32(0.5)), described(np.arange(6.0).reshape(2, 3))
    ('–', '1,234', '0.5', '[2, 3], 0 to 5')
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, float, np.generic)) or (
        _is_array(value) and not value.shape and _is_number(value)
    ):
        return _scalar(value)
    if _is_array(value):
        return _array(value)
    if isinstance(value, Mapping):
        return _several([str(key) for key in value], "entries")
    if isinstance(value, (tuple, list)):
        plain = all(isinstance(each, (bool, int, float, str)) for each in value)
        return _several([described(each) for each in value] if plain else [], "", len(value), value)
    return type(value).__name__


def _several(names: list[str], noun: str, count: int | None = None, values: Any = ()) -> str:
    count = len(names) if count is None else count
    if names and count <= 8:
        return ", ".join(names)
    kinds = sorted({type(each).__name__ for each in values})
    return f"{count:,} {noun or ' or '.join(kinds)}".rstrip()


def _scalar(value: Any) -> str:
    found = np.asarray(value).item() if not isinstance(value, (int, float)) else value
    return (
        f"{found:,}" if isinstance(found, int) else number(found) if isinstance(found, float) else str(found)
    )


def _array(array: Any) -> str:
    shape = f"[{', '.join(map(str, array.shape))}]"
    if array.size == 0 or array.size > _LARGE or not _is_number(array):
        return f"{shape} {array.dtype}"
    host = np.asarray(array)
    if host.dtype == bool:
        return f"{shape}, {np.count_nonzero(host):,} True"
    host = host.astype(np.float64)
    finite = host[np.isfinite(host)]
    others = host.size - finite.size
    ranged = (
        f"{number(float(finite.min()))} to {number(float(finite.max()))}" if finite.size else "none finite"
    )
    return f"{shape}, {ranged}" + (f", {others:,} not finite" if others and finite.size else "")


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array))


def _is_number(array: Any) -> bool:
    return jax.numpy.issubdtype(array.dtype, np.number) or array.dtype == bool


def _is_concrete(leaf: Any) -> bool:
    plain = isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex, str))
    return plain or (isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer))
