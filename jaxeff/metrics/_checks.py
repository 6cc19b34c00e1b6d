"""Checks of the arguments of metrics."""

from __future__ import annotations

import math
import numbers

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def checked(x: ArrayLike) -> Array:
    """Return x as an array of importances, of any real dtype.

    Raises:
        TypeError: x is not an array, or holds booleans or complex numbers.
        ValueError: x is empty.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"`x` must be one array of importances; got {type(x).__name__}.")
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_ or not jnp.isrealobj(x) or not jnp.issubdtype(x.dtype, jnp.number):
        raise TypeError(f"`x` must hold real numbers, one importance per weight; got {x.dtype}.")
    if x.size == 0:
        raise ValueError(f"`x` is empty, shape {x.shape}: a layer without weights has no metrics.")
    return x


def checked_share(share: float) -> float:
    if not (_is_number(share) and 0 < share <= 1):
        raise ValueError(f"`share` must be a number in (0, 1], such as 0.8; got {share!r}.")
    return float(share)


def checked_threshold(threshold: float) -> float:
    if not (_is_number(threshold) and 0 <= threshold < math.inf):
        raise ValueError(f"`threshold` must be a finite number >= 0; got {threshold!r}.")
    return float(threshold)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
