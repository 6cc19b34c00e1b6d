"""Roles of the leaves of `params` without a program: by name, shape and dtype.

It needs neither Flax nor the arrays, so that checkpoints are read by the same rule.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

BIASES = ("bias", "scale")
_NAMED = 3  # arrays that a message names
_INTEGERS = ("int", "uint")


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Facts about one leaf of `params`.

    Attributes:
        role: 'weight' or another role: 'bias', 'scale', 'integer array', ...
        reason: why no site of this weight could be read; None if it has sites.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    reason: str | None


def last_name(path: str) -> str:
    """Return the name at the end of a path, whose parts are joined by '/' or, in checkpoints, by '.'."""
    return re.split(r"[./]", path)[-1]


def role_of(path: str, shape: Sequence[int], dtype: Any, layers: int = 0) -> str:
    """Return 'weight' or another role of a leaf: 'bias', 'scale', 'vector', 'empty', 'int32 array'.

    A weight is a floating array of two axes or more whose name is not that of a bias or scale.

    Args:
        layers: number of leading axes over which layers are stacked, which do not count.

    >>> role_of("Dense_0/kernel", (3, 4), "float32"), role_of("Dense_0/bias", (4,), "float32")
    ('weight', 'bias')
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"{dtype} array"
    if 0 in shape:
        return "empty"
    name = last_name(path)
    return name if name in BIASES else "weight" if len(shape) - layers > 1 else "vector"


def whole_numbers(arrays: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """Return advice on integer weights; empty if no array of two axes or more holds integers.

    Args:
        arrays: path, shape and dtype of each.

    >>> whole_numbers([("kernel", (64, 32), "int8"), ("bias", (32,), "float32")])[:44]
    ' 1 array holds whole numbers: kernel (int8).'
    """
    matrices = [(path, dtype) for path, shape, dtype in arrays if len(shape) > 1]
    found = [f"{path} ({dtype})" for path, dtype in matrices if dtype.startswith(_INTEGERS)]
    if not found:
        return ""
    some = "1 array holds" if len(found) == 1 else f"{len(found):,} arrays hold"
    named = ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    return (
        f" {some} whole numbers: {named}. Pass quantized weights as floats: `.astype(jnp.float32)`, times "
        "their scale."
    )
