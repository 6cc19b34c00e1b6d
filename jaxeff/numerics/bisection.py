"""The threshold between the lowest scores and the others, by bisection over whole arrays, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxeff.numerics.summation import bits_of

# Above the pattern of every number.
LAST = 2**31 - 1

Axes = tuple[int, ...]


class Threshold(NamedTuple):
    """The border between the lowest scores and the others, as two integers.

    Attributes:
        limit: a bit pattern; all scores below it are among the lowest.
        first: an index; scores equal to the limit with a smaller index are among the lowest too.
    """

    limit: Array
    first: Array


class Wide(NamedTuple):
    """A count that may pass 2^31: 2^16 upper + lower, as two int32."""

    upper: Array
    lower: Array

    @classmethod
    def of(cls, count: int | Array) -> Wide:
        """Return a count, which may be a whole number in float32, where int32 does not hold it."""
        if isinstance(count, int):
            return cls(*(jnp.int32(word) for word in divmod(count, _BASE)))
        upper = count // _BASE
        return cls(upper.astype(jnp.int32), (count - upper * _BASE).astype(jnp.int32))

    @classmethod
    def true_in(cls, truths: Sequence[Array]) -> Wide:
        """Count what is True in all arrays, of at most 2^24 rows along their first axis, each below 2^31 elements."""
        total = cls(jnp.int32(0), jnp.int32(0))
        for truth in truths:
            each = jnp.sum(truth, tuple(range(1, truth.ndim)), dtype=jnp.int32)
            # Sums of bytes, which stay below a word however many rows there are.
            low, middle = (jnp.sum((each >> shift & 255).astype(jnp.uint32)) for shift in (0, 8))
            rest = (low & (_BASE - 1)) + ((middle & 255) << 8) + total.lower.astype(jnp.uint32)
            carried = (low >> _BITS) + (middle >> 8) + (rest >> _BITS)
            upper = total.upper + jnp.sum(each >> _BITS) + carried.astype(jnp.int32)
            total = cls(upper, (rest & (_BASE - 1)).astype(jnp.int32))
        return total

    def at_most(self, other: Wide) -> Array:
        return (self.upper < other.upper) | ((self.upper == other.upper) & (self.lower <= other.lower))

    def minus(self, other: Wide) -> Wide:
        lower = self.lower - other.lower
        return Wide(self.upper - other.upper + (lower >> _BITS), lower & (_BASE - 1))


_BITS = 16
_BASE = 1 << _BITS


class Candidates(NamedTuple):
    """Scores and the candidates among them, as arrays of one shape."""

    values: Array
    open_: Array | None

    def map(self, function: Callable[[Array], Array]) -> Candidates:
        return Candidates(function(self.values), None if self.open_ is None else function(self.open_))

    def keys(self, largest: bool) -> Array:
        """Return integers from 0 on, the lowest of which are sought."""
        bits = pattern(self.values)
        keys = LAST - 1 - bits if largest else bits
        return keys if self.open_ is None else jnp.where(self.open_, keys, LAST)


def pattern(score: Array) -> Array:
    """Return bit patterns ordered like the scores, with -0.0 as 0."""
    return jnp.maximum(bits_of(score.astype(jnp.float32)), 0)


def is_below(key: Array, threshold: Threshold, index: Array) -> Array:
    return (key < threshold.limit) | ((key == threshold.limit) & (index < threshold.first))


def index_in_row(shape: Axes, apart: Axes, shared: int = 1) -> Array:
    """Return the index of each element in its row, in C order, without a reshape that would gather the array.

    Args:
        shared: number of elements side by side along the longest axis that have the same index.
    """
    index, stride = jnp.zeros(shape, jnp.int32), 1
    longest = max(range(len(shape)), key=shape.__getitem__, default=0)
    for axis in reversed([axis for axis in range(len(shape)) if axis not in apart]):
        number = shared if axis == longest else 1
        index = index + stride * (lax.broadcasted_iota(jnp.int32, shape, axis) // number)
        stride *= -(-shape[axis] // number)
    return index


def bisected(
    keys: Sequence[Array], indices: Sequence[Array], counts: list[Array], apart: tuple[Axes, ...] | None
) -> list[Threshold]:
    def counted(truths: list[Array]) -> list[Array]:
        if apart is None:
            return [sum((jnp.sum(truth, dtype=jnp.int32) for truth in truths), jnp.int32(0))]
        others = [
            tuple(a for a in range(t.ndim) if a not in axes) for t, axes in zip(truths, apart, strict=True)
        ]
        return [
            jnp.sum(truth, axes, dtype=jnp.int32, keepdims=True)
            for truth, axes in zip(truths, others, strict=True)
        ]

    def under(limits: list[Array]) -> list[Array]:
        return counted([key < limit for key, limit in zip(keys, for_all(limits), strict=True)])

    def for_all(limits: list[Array]) -> list[Array]:
        return limits if apart is not None else limits * len(keys)

    def at_most(found: list[Array], most: list[Array]) -> list[Array]:
        return [number <= limit for number, limit in zip(found, most, strict=True)]

    # Sharded like the arrays compared with them, as an explicit mesh requires; nothing is counted for that.
    start = [jnp.zeros_like(number) for number in under([jnp.zeros_like(count) for count in counts])]
    limits = largest_of_each(lambda limits: at_most(under(limits), counts), start, 31)
    missing = [count - gone for count, gone in zip(counts, under(limits), strict=True)]
    tied = [key == limit for key, limit in zip(keys, for_all(limits), strict=True)]

    def before(firsts: list[Array]) -> list[Array]:
        return counted(
            [
                ties & (index < first)
                for ties, index, first in zip(tied, indices, for_all(firsts), strict=True)
            ]
        )

    size = sum(key.size for key in keys) if apart is None else max(key.size for key in keys)
    firsts = largest_of_each(lambda firsts: at_most(before(firsts), missing), start, size.bit_length())
    return [Threshold(*pair) for pair in zip(limits, firsts, strict=True)]


def bisected_of_many(keys: Sequence[Array], indices: Sequence[Array], count: Wide) -> Threshold:
    """Return the threshold of all arrays together, whose number may pass 2^31.

    Args:
        indices: from 0 on. Elements may share one; where the ties of one do not all fit, none of them is selected.
    """

    def largest(truths: Callable[[Array], list[Array]], most: Wide) -> Array:
        fits = lambda limits: [Wide.true_in(truths(limits[0])).at_most(most)]  # noqa: E731
        return largest_of_each(fits, [jnp.int32(0)], 31)[0]

    def under(limit: Array) -> list[Array]:
        return [key < limit for key in keys]

    limit = largest(under, count)
    missing = count.minus(Wide.true_in(under(limit)))
    pairs = list(zip(keys, indices, strict=True))
    first = largest(lambda first: [(key == limit) & (index < first) for key, index in pairs], missing)
    return Threshold(limit, first)


def largest_of_each(holds: Callable[[list[Array]], list[Array]], like: list[Array], bits: int) -> list[Array]:
    """Return for each the largest n < 2^bits with `holds(n)`, where `holds` is true up to some n and false after."""

    def step(number: Array, found: list[Array]) -> list[Array]:
        bit = lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - number)
        tried = [part | bit for part in found]
        return [jnp.where(*choice) for choice in zip(holds(tried), tried, found, strict=True)]

    return lax.fori_loop(jnp.int32(0), jnp.int32(bits), step, [jnp.zeros_like(part) for part in like])
