"""Sums and running sums in levels, which bounds their rounding errors.

Every function works on NumPy and JAX arrays. NumPy arrays are summed on the host, without compiling.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

WIDTH = 128  # of a row: products with a triangle of this size run as fast as they compile


def namespace(x: Any) -> Any:
    """Return NumPy for arrays on the host, jax.numpy for JAX arrays."""
    return np if isinstance(x, (np.ndarray, np.generic)) else jnp


def total(x: Any) -> Any:
    """Sum over the last axis, row by row and then over the rows."""
    if isinstance(x, np.ndarray):
        return x.sum(axis=-1)
    while x.shape[-1] > WIDTH:
        x = jnp.sum(in_rows(x), axis=-1)
    return jnp.sum(x, axis=-1)


def running_total(x: Any) -> Any:
    """Return the sum of each entry and all before it, over the last axis.

    On a device it uses products with triangles, which compile in half the time of a `cumsum`.
    """
    if isinstance(x, np.ndarray):
        return np.cumsum(x, axis=-1)
    size = x.shape[-1]
    if size <= WIDTH:
        return _by_triangle(x)
    within = _by_triangle(in_rows(x))
    rows = within[..., -1]
    before = running_total(rows) - rows
    return (within + before[..., None]).reshape(*x.shape[:-1], -1)[..., :size]


def in_rows(x: Array) -> Array:
    """Split the last axis into rows of WIDTH, padded with zeros."""
    padding = -x.shape[-1] % WIDTH
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, WIDTH)


def _by_triangle(x: Array) -> Array:
    # Highest precision, as a GPU would multiply in TensorFloat-32 and a TPU in bfloat16.
    triangle = np.triu(np.ones((x.shape[-1],) * 2)).astype(x.dtype)
    return jnp.matmul(x, triangle, precision=lax.Precision.HIGHEST)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b as a float, and the rounding error of that sum (Knuth)."""
    whole = a + b
    part = whole - a
    return whole, (a - (whole - part)) + (b - part)


def bits_of(x: Array) -> Array:
    """Return bit patterns as signed integers, which are ordered like non-negative numbers."""
    return jax.lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def float_of(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype == jnp.int64 else jnp.float32)
