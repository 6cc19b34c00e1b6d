"""The precision in which everything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Return float64 for float64, and float32 for anything else: small floats are widened before any sum.

    >>> wide(jnp.bfloat16).__name__
    'float32'
    """
    return jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32


def widened(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))


def sized(x: jax.Array) -> jax.Array:
    """Return x in the precision of sums; of complex numbers, their absolute values."""
    return widened(jnp.abs(x) if jnp.iscomplexobj(x) else x)
