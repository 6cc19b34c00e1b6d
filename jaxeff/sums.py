"""The sums that statistics keep of an array, from one pass over it. Imports `precision`.

One reduction of several operands reads the array once: with a vocabulary of 50,257, eight times faster on
a CPU than a reduction a sum, and without their scratch memory. It goes axis by axis, long axes in blocks:
a float32 sum of n terms in a row is good to sqrt(n) roundings, and stops counting at 2^24.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.precision import widened

Edges = tuple[float, float] | None


class Sums(NamedTuple):
    """Over some axes of an array x; counts are floats, which XLA's CPU adds five times faster."""

    absolute: jax.Array
    square: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    saturated: jax.Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def sums(array: jax.Array, axis: tuple[int, ...], edges: Edges = None) -> Sums:
    """Sums of |x| and x^2, max |x|, how many x are 0, and how many lie at or beyond the edges.

    >>> found = sums(jnp.array([[1.0, -2.0, 0.0]]), (1,))
    >>> float(found.absolute[0]), float(found.square[0]), float(found.maximum[0]), float(found.zeros[0])
    (3.0, 5.0, 2.0, 1.0)
    """
    array, axis = _in_blocks(widened(array), axis)
    operands = _operands(array, edges)
    zero = jnp.zeros((), array.dtype)
    for stage in _stages(array.shape, axis):
        operands = jax.lax.reduce(operands, (zero,) * len(operands), _join, stage)
    return Sums(*operands, *(() if edges else (None,)))


_LONG, _BLOCK = 1 << 14, 1 << 12


def _stages(shape: tuple[int, ...], axis: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes to reduce together, the last first: as many as one sum may run over."""
    stages: list[tuple[int, ...]] = [()]
    for i in sorted(axis, reverse=True):
        together = math.prod(shape[j] for j in stages[-1]) * shape[i]
        if together > _BLOCK and stages[-1]:
            stages.append((i,))
        else:
            stages[-1] = (i, *stages[-1])
    return stages


def _in_blocks(array: jax.Array, axis: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Each long axis as two, where its length allows it."""
    shape: list[int] = []
    reduced: list[int] = []
    for i, size in enumerate(array.shape):
        long = i in axis and size > _LONG
        block = next((d for d in range(_BLOCK, 1, -1) if size % d == 0), 1) if long else 1
        pieces = [size // block, block] if block > 1 else [size]
        reduced += range(len(shape), len(shape) + len(pieces)) if i in axis else ()
        shape += pieces
    return array.reshape(shape), tuple(reduced)


def _operands(x: jax.Array, edges: Edges) -> tuple[jax.Array, ...]:
    def count(hits: jax.Array) -> jax.Array:
        return hits.astype(x.dtype)

    magnitude = jnp.abs(x)
    found = (magnitude, jnp.square(x), magnitude, count(x == 0))
    return found if edges is None else (*found, count((x <= edges[0]) | (x >= edges[1])))


def _join(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of every operand the sum, but of the third the maximum."""
    return tuple(jnp.maximum(x, y) if i == 2 else x + y for i, (x, y) in enumerate(zip(a, b, strict=True)))


@sums.defjvp
def _(axis: tuple[int, ...], edges: Edges, primals: Any, tangents: Any) -> tuple[Sums, Sums]:
    def apart(array: jax.Array) -> Sums:
        reduced = [
            jnp.max(x, axis) if i == 2 else jnp.sum(x, axis)
            for i, x in enumerate(_operands(widened(array), edges))
        ]
        return Sums(*reduced, *(() if edges else (None,)))

    return sums(*primals, axis, edges), jax.jvp(apart, primals, tangents)[1]
