"""What to say of weights that are stored as integers. Imports neither Flax nor anything of jaxeff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NAMED = 3  # arrays that a message names
_INTEGERS = ("int", "uint")


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
