"""Rounding to the numbers of int8 and of fp8, as quantization with symmetric scales does."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxeff.numerics.summation import namespace

FORMATS = ("int8", "fp8")
_LARGEST_FP8 = 448.0  # of float8_e4m3fn
_LARGEST_INT8 = 127.0


def quantized(x: Any, name: str) -> Any:
    """Round x [...], of numbers from -1 to 1, to the grid of a format whose largest number stands for 1.

    Ties go to even. The grid of 'int8' is k / 127 for k from -127 to 127; that of 'fp8', float8_e4m3fn over 448.

    >>> quantized(jnp.array([1.0, 0.3]), "int8") * 127
    Array([127.,  38.], dtype=float32)
    """
    if name == "int8":
        return namespace(x).round(x * _LARGEST_INT8) / _LARGEST_INT8
    return (x * _LARGEST_FP8).astype(jnp.float8_e4m3fn).astype(x.dtype) / _LARGEST_FP8
