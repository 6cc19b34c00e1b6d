"""The weighted distribution of an array by sorting, and the sums that need single weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff.metrics._records import THRESHOLDS
from jaxeff.metrics._weighted import Spread, Weighted
from jaxeff.numerics.summation import bits_of, float_of


def spread_of(x: Array, size: Any) -> Spread:
    """Return the spread of the first `size` entries of x [M], float32 or float64; the others must be 0.

    One compiled program serves layers of many sizes. Derivatives come by automatic differentiation, of the
    array gathered in its order.

    Args:
        size: [], an integer from 1 to M, which may be traced.
    """
    _, invalid = importances(lax.stop_gradient(x))
    values, bits = _descending(x)
    values, largest = relative(values, values[0], bits, bits[0])
    counts = (jnp.arange(x.size, dtype=jnp.int32) < size).astype(x.dtype)
    # Invalid entries were sorted as 0.
    invalid = invalid.astype(x.dtype)
    first, second = (jnp.where(bits < limit, counts, 0) for limit in limits(x.dtype))
    tallied = jnp.where(bits == 0, counts, 0) - invalid, invalid, first, second
    return Spread(Weighted(values, counts, values, jnp.zeros_like(values), largest), tallied)


def spread_on_host(x: np.ndarray) -> Spread:
    """Return the spread of x [N], in float64."""
    values, invalid = _importances_on_host(x)
    # Sorted as they came, which is faster.
    values = np.sort(values)[::-1].astype(np.float64)
    below = [np.count_nonzero(values < threshold) for threshold in THRESHOLDS.values()]
    tallied = np.count_nonzero(values == 0) - invalid, invalid, *below
    scale = values[0] if values[0] > 0 else 1
    distribution = Weighted(values / scale, np.ones_like(values), None, None, values[0])
    zeros, nonfinite, first, second = (np.asarray([count], np.float64) for count in tallied)
    return Spread(distribution, (zeros, nonfinite, first, second))


def squares_on_host(x: np.ndarray) -> np.ndarray:
    """Return sum (x - mean)^2 of x [N], relative to the largest, in float64."""
    values = _importances_on_host(x)[0].astype(np.float64)
    values /= max(values.max(), np.finfo(np.float64).tiny)
    return np.sum(np.square(values - values.mean()))


def _importances_on_host(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Return x with invalid entries as 0, and their number."""
    valid = (x >= 0) & (x < np.inf)
    return np.where(valid, x, 0), int(x.size - np.count_nonzero(valid))


@jax.custom_jvp
def _descending(x: Array) -> tuple[Array, Array]:
    """Return importances in descending order, with invalid entries as 0, and their bit patterns."""
    # Patterns have the same order as the numbers, and sort in a fifth of the time.
    ordered = -lax.sort(-importances(x)[0], is_stable=False)
    return float_of(ordered), ordered


@_descending.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    def gathered(x: Array) -> tuple[Array, Array]:
        bits, invalid = importances(lax.stop_gradient(x))
        order = jnp.argsort(-bits, stable=False)
        return jnp.where(invalid, 0, x)[order], bits[order]

    return jax.jvp(gathered, primals, tangents)


def importances(x: Array) -> tuple[Array, Array]:
    """Return bit patterns, 0 for invalid entries, and which entries are invalid: nan, infinite or negative."""
    bits = bits_of(x)
    invalid = _invalid(bits, x.dtype)
    return jnp.where(invalid | _negative_zero(bits), 0, bits), invalid


def _negative_zero(bits: Array) -> Array:
    return bits == jnp.iinfo(bits.dtype).min


def _invalid(bits: Array, dtype: Any) -> Array:
    infinity = bits_of(jnp.asarray(jnp.inf, dtype))
    return ((bits < 0) & ~_negative_zero(bits)) | (bits >= infinity)


def limits(dtype: Any) -> list[np.ndarray]:
    """Return the bit patterns below which the thresholds count."""
    return [first_not_below(threshold, dtype) for threshold in THRESHOLDS.values()]


def first_not_below(threshold: float, dtype: Any) -> np.ndarray:
    """Return the pattern of the smallest float that is not below the threshold; float32(0.01) is below 0.01."""
    kind, integer = (np.float64, np.int64) if np.dtype(dtype).itemsize == 8 else (np.float32, np.int32)
    with np.errstate(over="ignore"):
        nearest = np.asarray(threshold, kind)
    if float(nearest) < threshold:
        nearest = np.nextafter(nearest, kind(np.inf))
    return np.asarray(nearest).view(integer)


def relative(values: Array, largest: Array, bits: Array, largest_bits: Array) -> tuple[Array, Array]:
    """Return values [...] over the largest, which is returned too; 0 if all are 0.

    Args:
        bits: patterns of the same values, without derivatives.
    """
    if values.dtype == jnp.float64:
        scaled, top = values, largest
    else:
        scaled, top = (
            _within_range(*given, largest_bits) for given in ((values, bits), (largest, largest_bits))
        )
    return scaled / jnp.where(top > 0, top, 1), largest


def _within_range(values: Array, bits: Array, largest: Array) -> Array:
    """Scale float32 values by a power of two, so that neither they nor 1 over the largest leave the normal floats.

    XLA divides by multiplying with the reciprocal, and its CPU flushes subnormals to 0; hence the integers.
    """
    raised = jnp.where(bits < 1 << 23, bits.astype(values.dtype) * 2.0**-23, values * 2.0**126)
    return jnp.where(largest < _FAINT, raised, jnp.where(largest > _HUGE, values * 2.0**-64, values))


_FAINT, _HUGE = (np.asarray(2.0**exponent, np.float32).view(np.int32) for exponent in (-64, 64))
