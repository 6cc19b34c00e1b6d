"""The lowest or highest of many scores, exactly so many of them, without putting them in order.

Everything is elementwise or a count, so that scores that lie on several devices stay there: a bisection over
bit patterns finds the score up to which all go, a second one over indices the ties that go with them.
Imports nothing of jaxeff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# Above the pattern of every number.
_LAST = 2**31 - 1


@jax.jit
def lowest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Which scores are among the `count` lowest of all arrays together; of equal ones the first.

    Args:
        scores: of any shapes, non-negative, fewer than 2^31 in all; compared as float32.
        count: [], an integer from 0 to their number, which may be traced.
        among: truths of the same shapes, `count` or more of them True: what to choose from. All if None.

    Returns:
        Arrays of truths of the same shapes, `count` of them True.

    >>> lowest([jnp.array([3.0, 1.0, 1.0]), jnp.array([0.5])], 2)
    [Array([False,  True, False], dtype=bool), Array([ True], dtype=bool)]
    """
    return _first([*map(_pattern, scores)], count, among)


@jax.jit
def highest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Which scores are among the `count` highest; as `lowest` otherwise, of equal ones the first too.

    >>> highest([jnp.array([3.0, 1.0, 3.0])], 1)
    [Array([ True, False, False], dtype=bool)]
    """
    return _first([_LAST - 1 - _pattern(score) for score in scores], count, among)


class Threshold(NamedTuple):
    """What tells the lowest scores from the others: two integers.

    Attributes:
        limit: [], a bit pattern; every score below it is among the lowest.
        first: [], an index; of the scores at the limit those before it are. With both 0 there are none.
    """

    limit: Array
    first: Array


@jax.jit
def threshold(scores: Sequence[Array], count: int | Array) -> Threshold:
    """Between the `count` lowest of all arrays together and the others, as `lowest` has them."""
    return _threshold([*map(_pattern, scores)], count)


def below(scores: Sequence[Array], threshold: Threshold) -> list[Array]:
    """Which scores a threshold counts among the lowest."""
    return _below([*map(_pattern, scores)], threshold)


def _first(patterns: list[Array], count: int | Array, among: Sequence[Array] | None) -> list[Array]:
    """The `count` lowest of integers from 0 on, of equal ones the first."""
    if among is not None:
        patterns = [jnp.where(open_, bits, _LAST) for open_, bits in zip(among, patterns, strict=True)]
    return _below(patterns, _threshold(patterns, count))


def _threshold(patterns: list[Array], count: int | Array) -> Threshold:
    count = jnp.asarray(count, jnp.int32)
    limit = _largest(lambda limit: _count([bits < limit for bits in patterns]) <= count)
    missing = count - _count([bits < limit for bits in patterns])
    tied = [(bits == limit, index) for bits, index in zip(patterns, _indices(patterns), strict=True)]
    first = _largest(lambda first: _count([ties & (index < first) for ties, index in tied]) <= missing)
    return Threshold(limit, first)


def _below(patterns: list[Array], threshold: Threshold) -> list[Array]:
    limit, first = threshold
    return [
        (bits < limit) | ((bits == limit) & (index < first))
        for bits, index in zip(patterns, _indices(patterns), strict=True)
    ]


def _pattern(score: Array) -> Array:
    """Ordered as the scores are; -0.0 as 0."""
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)
    return jnp.where(bits == jnp.iinfo(jnp.int32).min, 0, bits)


def _count(truths: Sequence[Array]) -> Array:
    return sum((jnp.sum(truth, dtype=jnp.int32) for truth in truths), jnp.int32(0))


def _indices(scores: Sequence[Array]) -> list[Array]:
    """Of each element among those of all arrays."""
    offsets = [sum(score.size for score in scores[:i]) for i in range(len(scores))]
    return [_index(score.shape, at) for score, at in zip(scores, offsets, strict=True)]


def _index(shape: tuple[int, ...], offset: int) -> Array:
    """Of each element, in C order, without a reshape that would bring them to one device."""
    index, stride = jnp.full(shape, offset, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        index = index + stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index


def _largest(holds: Callable[[Array], Array]) -> Array:
    """The largest integer below 2^31 for which something holds that holds of 0 and of all below it."""

    def step(number: Array, found: Array) -> Array:
        tried = found | lax.shift_left(jnp.int32(1), jnp.int32(30) - number)
        return jnp.where(holds(tried), tried, found)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(31), step, jnp.int32(0))
