"""The one precision that everything is computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """float64 for float64, float32 for anything else: small floats are widened before any sum.

    >>> wide(jnp.bfloat16).__name__
    'float32'
    """
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def widened(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))
