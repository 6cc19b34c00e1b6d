"""What the leaves of `params` are where no program tells: by name, shape and dtype.

Needs neither Flax nor the arrays, so that a checkpoint is read by the same rule.
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
    """What one leaf of `params` is.

    Attributes:
        role: 'weight', or what it is instead: 'bias', 'scale', 'integer array', ...
        reason: why no site of this weight could be read; None for one that has sites.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    reason: str | None


def last_name(path: str) -> str:
    """The name at the end of a path, whose parts are joined by '/' or, in checkpoints, by '.'."""
    return re.split(r"[./]", path)[-1]


def role_of(path: str, shape: Sequence[int], dtype: Any, layers: int = 0) -> str:
    """'weight', or what a leaf is instead: 'bias', 'scale', 'vector', 'empty', 'int32 array'.

    A weight is a floating array of two axes or more that is called neither bias nor scale.

    Args:
        layers: leading axes over which layers are stacked, which do not count.

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
    """What to do about weights that are integers; empty where no array of two axes or more is of them.

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
