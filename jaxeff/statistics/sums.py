"""The sums that statistics keep of an array.

They are taken axis by axis, long axes in blocks, because a float32 sum of n terms in a row has an error of
sqrt(n) roundings, and stops counting at 2^24. One reduction of several operands reads an array once. On a CPU, separate
reductions would each take 1.5 ms the first time they run, and if the first stage is short, XLA unrolls it and adds
several numbers at a time. On an accelerator, XLA fuses separate reductions of an array that is not large.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxeff.numerics.placement import in_turn_or_at_once
from jaxeff.numerics.precision import sized

Edges = tuple[float, float] | None
Stages = list[tuple[int, ...]]


class Sums(NamedTuple):
    """Sums over some axes of an array x; counts are floats, which XLA's CPU adds five times faster."""

    absolute: jax.Array
    square: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    saturated: jax.Array | None


# Elements of an array. Stages of a large one, from 16 MiB of float32 on, would take memory, and those of a small one
# take longer to compile than they save.
_LARGE, _SMALL = 1 << 22, 1 << 16


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def sums(array: jax.Array, axis: tuple[int, ...], edges: Edges = None) -> Sums:
    """Return sums of |x| and x^2, max |x|, the number of zeros, and the number of values at or beyond the edges.

    >>> import jax.numpy as jnp
    >>> found = sums(jnp.array([[1.0, -2.0, 0.0]]), (1,))
    >>> float(found.absolute[0]), float(found.square[0]), float(found.maximum[0]), float(found.zeros[0])
    (3.0, 5.0, 2.0, 1.0)
    """
    return _sums(array, axis, edges)


# Values of the same shape share a trace.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(array: jax.Array, axis: tuple[int, ...], edges: Edges) -> Sums:
    array, axis = _in_blocks(sized(array), axis, _LONG, _BLOCK)

    def on_cpu(array: jax.Array) -> Sums:
        stages = _stages(array.shape, axis)
        if axis and _SMALL < array.size <= _LARGE:
            longest = max(axis, key=lambda i: array.shape[i])
            array, pieces = _in_blocks(array, (longest,), _SHORT, _SHORT)
            if len(pieces) > 1:
                shape = *array.shape[: longest + 1], *array.shape[longest + 2 :]
                stages = [(longest + 1,), *_stages(shape, axis)]
        return _together(array, stages, edges)

    def on_accelerator(array: jax.Array) -> Sums:
        reduce = _together if array.size > _LARGE else _apart
        return reduce(array, _stages(array.shape, axis), edges)

    return in_turn_or_at_once(on_cpu, on_accelerator, array)


def _together(array: jax.Array, stages: Stages, edges: Edges) -> Sums:
    operands = _operands(array, edges)
    zeros = (np.zeros((), array.dtype),) * len(operands)
    for stage in stages:
        operands = lax.reduce(operands, zeros, _join, stage)
    return Sums(*operands, *(() if edges else (None,)))


def _join(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Add every operand, except the third, of which take the maximum."""
    return tuple(
        lax.max(x, y) if i == 2 else lax.add(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))
    )


def _apart(array: jax.Array, stages: Stages, edges: Edges) -> Sums:
    reduced: list[jax.Array] = []
    for i, operand in enumerate(_operands(array, edges)):
        for stage in stages:
            operand = lax.reduce(operand, np.zeros((), array.dtype), lax.max if i == 2 else lax.add, stage)
        reduced.append(operand)
    return Sums(*reduced, *(() if edges else (None,)))


# `lax` throughout: hundreds of values are summed, and each function of `jax.numpy` is traced as a call.


def _operands(x: jax.Array, edges: Edges) -> tuple[jax.Array, ...]:
    def count(hits: jax.Array) -> jax.Array:
        return lax.convert_element_type(hits, x.dtype)

    # The largest size is computed differently from the sizes, because XLA would store what two reductions share.
    largest = lax.max(x, lax.neg(x))
    found = (lax.abs(x), lax.square(x), largest, count(x == 0))
    return found if edges is None else (*found, count((x <= edges[0]) | (x >= edges[1])))


_LONG, _BLOCK, _SHORT = 1 << 14, 1 << 12, 1 << 4


def _stages(shape: tuple[int, ...], axis: tuple[int, ...]) -> Stages:
    """Return the axes to reduce together, the last first: as many as one sum may run over."""
    stages: Stages = [()]
    for i in sorted(axis, reverse=True):
        together = math.prod(shape[j] for j in stages[-1]) * shape[i]
        if together > _BLOCK and stages[-1]:
            stages.append((i,))
        else:
            stages[-1] = (i, *stages[-1])
    return stages


def _in_blocks(
    array: jax.Array, axis: tuple[int, ...], longest: int, most: int
) -> tuple[jax.Array, tuple[int, ...]]:
    """Split each axis that is longer than `longest` into two, the second at most `most`, if its length allows it."""
    shape: list[int] = []
    reduced: list[int] = []
    for i, size in enumerate(array.shape):
        long = i in axis and size > longest
        block = next((d for d in range(most, 1, -1) if size % d == 0), 1) if long else 1
        pieces = [size // block, block] if block > 1 else [size]
        reduced += range(len(shape), len(shape) + len(pieces)) if i in axis else ()
        shape += pieces
    return array.reshape(shape), tuple(reduced)


@sums.defjvp
def _(axis: tuple[int, ...], edges: Edges, primals: Any, tangents: Any) -> tuple[Sums, Sums]:
    # A reduction of several operands has no derivative rule of this quality.
    apart = functools.partial(_apart, stages=[axis], edges=edges)
    return sums(*primals, axis, edges), jax.jvp(lambda x: apart(sized(x)), primals, tangents)[1]
