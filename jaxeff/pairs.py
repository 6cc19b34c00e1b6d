"""Floats as bit patterns, and sums carried as pairs of floats. Imports nothing of jaxeff.

XLA's CPU flushes subnormals to zero in arithmetic and in comparisons, so what must be exact there
works on integers. Pairs give twice the working precision: 10^7 float32 terms otherwise leave four
digits.

References:
    Ogita, Rump and Oishi, Accurate Sum and Dot Product, 2005
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Pair: TypeAlias = tuple[Array, Array]  # an unevaluated sum high + low: twice the precision

_FEWEST_LANES = 8192  # rows of this width stay in cache; fastest of 2^11 to 2^18 on a CPU
_MOST_ROWS = 1024
_LANES_AT_ONCE, _ROWS_AT_ONCE = 1 << 22, 64


def in_rows() -> bool:
    """Whether to go through an array row by row.

    On a CPU rows stay in its cache, and a loop compiles to little. On an accelerator every step of a loop is
    kernels of its own, which take longer to start than to run: there all rows go at once.
    """
    return jax.default_backend() == "cpu"


def each(function: Callable[[Any], Any], rows: Any) -> Any:
    """The function of every row: `lax.map`, or the rows side by side."""
    return lax.map(function, rows) if in_rows() else lax.map(function, rows, batch_size=_ROWS_AT_ONCE)


def bits_of(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def float_of(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype == jnp.int64 else jnp.float32)


def count(hits: Array) -> Array:
    return jnp.sum(hits, dtype=jnp.int32)


def _normal_bits(bits: Array, dtype: Any) -> Array:
    """Bit patterns with exponents continued below the smallest normal float: subnormals normalised.

    XLA on CPU flushes subnormals to zero in arithmetic and in comparisons, hence the integers.
    """
    mantissa_bits, lowest = jnp.finfo(dtype).nmant, jnp.finfo(dtype).minexp
    normalised = bits_of(bits.astype(dtype)) + ((lowest - mantissa_bits) << mantissa_bits)
    return jnp.where(bits < 1 << mantissa_bits, normalised, bits)


def exponent(bits: Array, dtype: Any) -> Array:
    return (_normal_bits(bits, dtype) >> jnp.finfo(dtype).nmant) + jnp.finfo(dtype).minexp - 1


def scale(bits: Array, rise: Array, dtype: Any) -> Array:
    """x * 2^rise, exactly; 0 where that is subnormal."""
    smallest_normal = 1 << jnp.finfo(dtype).nmant
    scaled = _normal_bits(bits, dtype) + (rise << jnp.finfo(dtype).nmant)
    return float_of(jnp.where((bits > 0) & (scaled >= smallest_normal), scaled, 0))


def unscale(y: Array, rise: Array) -> Array:
    """y * 2^-rise for one y >= 0, correctly rounded also where that is subnormal."""
    mantissa_bits, lowest = jnp.finfo(y.dtype).nmant, jnp.finfo(y.dtype).minexp
    normal = bits_of(y) - (rise << mantissa_bits)
    spacings = scale(bits_of(y), mantissa_bits - lowest - rise, y.dtype)
    subnormal = jnp.round(spacings).astype(normal.dtype)
    return float_of(jnp.where(y > 0, jnp.where(normal < 1 << mantissa_bits, subnormal, normal), 0))


# Sums: twice the working precision, for 10^7 float32 terms otherwise leave four digits.


def two_sum(a: Array, b: Array) -> Pair:
    """a + b and its rounding error, exactly (Knuth; Ogita, Rump and Oishi, 2005)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fast_two_sum(a: Array, b: Array) -> Pair:
    """The same where |a| >= |b| (Dekker)."""
    total = a + b
    return total, b - (total - a)


def add(a: Pair, b: Pair) -> Pair:
    high, low = two_sum(a[0], b[0])
    return fast_two_sum(high, low + (a[1] + b[1]))


def _halve(a: Array) -> Pair:
    """a as two floats of half the digits, so that products of halves are exact."""
    dropped = jnp.finfo(a.dtype).nmant // 2 + 1
    high = float_of(bits_of(a) & (-1 << dropped))
    return high, a - high


def multiply(a: Pair, b: Pair) -> Pair:
    """a * b. Every product that a sum consumes is exact: XLA may fuse it into an fma."""
    (a_high, a_low), (b_high, b_low) = _halve(a[0]), _halve(b[0])
    total, error = two_sum(a_high * b_high, a_high * b_low)
    total, more = two_sum(total, a_low * b_high)
    return fast_two_sum(total, error + more + a_low * b_low + (a[0] * b[1] + a[1] * b[0]))


def divide(a: Pair, b: Pair) -> Pair:
    """a / b, 0 where b is 0."""
    divisor = jnp.where(b[0] > 0, b[0], 1)
    quotient = a[0] / divisor
    back = multiply((quotient, jnp.zeros_like(quotient)), b)
    return fast_two_sum(quotient, ((a[0] - back[0]) + (a[1] - back[1])) / divisor)


def constant(value: float, dtype: Any) -> Pair:
    high = np.asarray(value).astype(dtype)
    low = value - (int(high) if isinstance(value, int) else float(high))
    return jnp.asarray(high), jnp.asarray(low, dtype)


def reduce(pairs: Pair, axis: int = -1) -> Pair:
    """The sum of pairs over one axis."""
    zero = np.zeros((), pairs[0].dtype)
    high, low = lax.reduce(pairs, (zero, zero), add, (axis % pairs[0].ndim,))
    # Without the barrier XLA repeats the scalar arithmetic that follows in every kernel that uses it:
    # twice the compile time.
    return lax.optimization_barrier((high, low))


def sums_before(pairs: Pair) -> Pair:
    """Of pairs [K, ...]: the sum of those before each, along the first axis, each anew."""
    before = jnp.tri(len(pairs[0]), k=-1, dtype=bool).reshape(len(pairs[0]), -1, *(1,) * (pairs[0].ndim - 1))
    high, low = (jnp.where(before, part[None], 0) for part in pairs)
    return reduce((high, low), axis=1)


def sums(terms: Callable[[Any, int], list[Array]], size: int) -> list[Pair]:
    """Sums of the arrays that terms(start, width) gives for the stretches of [0, size).

    Lane by lane over rows, then across the lanes: no array of N terms ever exists.
    """
    lanes = max(_FEWEST_LANES, -(-size // (128 * _MOST_ROWS)) * 128) if in_rows() else _LANES_AT_ONCE
    rows = size // lanes

    def accumulate(row: Array, sums: list[Pair]) -> list[Pair]:
        steps = [two_sum(high, term) for (high, _), term in zip(sums, terms(row * lanes, lanes), strict=True)]
        return [(high, low + error) for (high, error), (_, low) in zip(steps, sums, strict=True)]

    tail = terms(rows * lanes, size - rows * lanes)
    sums = [(jnp.zeros(lanes * (rows > 0), term.dtype),) * 2 for term in tail]
    sums = lax.fori_loop(0, rows, accumulate, sums) if rows else sums
    highs = [jnp.concatenate([high, term]) for (high, _), term in zip(sums, tail, strict=True)]
    lows = [jnp.concatenate([low, jnp.zeros_like(term)]) for (_, low), term in zip(sums, tail, strict=True)]
    return list(zip(*reduce((jnp.stack(highs), jnp.stack(lows))), strict=True))
