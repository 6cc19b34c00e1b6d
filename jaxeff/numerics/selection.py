"""The lowest or highest of many scores, exactly so many of them, without putting them in order.

A `Threshold` is two integers: the bit pattern up to which all scores go, and the index up to which the ties
at that pattern do. Two ways find it. `bisection` counts over whole arrays, elementwise, so that scores that
lie on several devices stay there. On one CPU `pieces` counts piece by piece, each of which fits the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from jaxeff.numerics.bisection import Axes, Candidates, Threshold, bisected, index_in_row, is_below, pattern
from jaxeff.numerics.pieces import in_pieces, of_rows, rows_of


def lowest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Which scores are among the `count` lowest of all arrays together; of equal ones the first.

    Args:
        scores: of any shapes, non-negative, fewer than 2^31 in all; compared as float32.
        count: [], an integer from 0 to their number, which may be traced.
        among: boolean arrays of the same shapes that mark candidates; at least `count` must be True.

    Returns:
        Boolean arrays of the same shapes, `count` of them True.

    >>> lowest([jnp.array([3.0, 1.0, 1.0]), jnp.array([0.5])], 2)
    [Array([False,  True, False], dtype=bool), Array([ True], dtype=bool)]
    """
    return _selected(_on_one_cpu(scores), None, False, list(scores), [jnp.asarray(count, jnp.int32)], among)


def highest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Which scores are among the `count` highest; as `lowest` otherwise, of equal ones the first too.

    >>> highest([jnp.array([3.0, 1.0, 3.0])], 1)
    [Array([ True, False, False], dtype=bool)]
    """
    return _selected(_on_one_cpu(scores), None, True, list(scores), [jnp.asarray(count, jnp.int32)], among)


def lowest_of_each(
    scores: Sequence[Array],
    counts: Sequence[int | np.ndarray | Array],
    apart: Sequence[Axes],
    among: Sequence[Array] | None = None,
) -> list[Array]:
    """Which scores are among the lowest of their row, so many of each row; of equal ones the first.

    Args:
        scores: as `lowest` takes them.
        counts: for each array, how many of each row: shaped like the array's axes `apart`, or one number.
        apart: for each array, ascending axes, every index of which is a row of its own.
        among: as `lowest` takes them.

    >>> lowest_of_each([jnp.array([[3.0, 1.0], [0.0, 0.0]])], [1], [(0,)])
    [Array([[False,  True],
           [ True, False]], dtype=bool)]
    """
    counts = _laid_out(scores, counts, apart)
    return _selected(_on_one_cpu(scores), tuple(apart), False, list(scores), counts, among)


def highest_of_each(
    scores: Sequence[Array],
    counts: Sequence[int | np.ndarray | Array],
    apart: Sequence[Axes],
    among: Sequence[Array] | None = None,
) -> list[Array]:
    """Which scores are among the highest of their row; as `lowest_of_each` otherwise."""
    counts = _laid_out(scores, counts, apart)
    return _selected(_on_one_cpu(scores), tuple(apart), True, list(scores), counts, among)


def thresholds(score: Array, counts: np.ndarray | Array, apart: Axes = ()) -> Threshold:
    """Between the lowest of each row and the others, for each of several counts.

    Args:
        score: as `lowest` takes one.
        counts: [counts].
        apart: as `lowest_of_each` takes those of one array.

    Returns:
        [counts, rows], rows in C order.
    """
    return _thresholds(_on_one_cpu([score]), apart, score, jnp.asarray(counts, jnp.int32))


def below(score: Array, threshold: Threshold, apart: Axes = (), row: int | Array = 0) -> Array:
    """Which scores of one row a threshold counts among its lowest.

    Args:
        apart: as `thresholds` takes them.
        row: its number.
    """
    found = is_below(pattern(score), threshold, index_in_row(score.shape, apart))
    if not apart:
        return found
    others = tuple(axis for axis in range(score.ndim) if axis not in apart)
    return found & (index_in_row(score.shape, others) == row)


def _on_one_cpu(arrays: Sequence[Array]) -> bool:
    """Whether all arrays lie whole on one CPU; of an array in a trace only the number of devices tells."""
    return jax.default_backend() == "cpu" and all(map(_lies_whole, arrays))


def _lies_whole(array: Array) -> bool:
    if any(jax.typeof(array).sharding.spec):
        return False
    if isinstance(array, Tracer):
        return jax.device_count() == 1
    return not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1


def _laid_out(
    scores: Sequence[Array], counts: Sequence[int | np.ndarray | Array], apart: Sequence[Axes]
) -> list[Array]:
    """Counts that broadcast against the scores."""
    shapes = [
        tuple(size if axis in axes else 1 for axis, size in enumerate(score.shape))
        for score, axes in zip(scores, apart, strict=True)
    ]
    return [
        jnp.broadcast_to(jnp.reshape(jnp.asarray(count, jnp.int32), shape if np.ndim(count) else ()), shape)
        for count, shape in zip(counts, shapes, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _selected(
    on_one_cpu: bool,
    apart: tuple[Axes, ...] | None,
    largest: bool,
    scores: list[Array],
    counts: list[Array],
    among: Sequence[Array] | None,
) -> list[Array]:
    """The lowest or highest of each row, or with `apart` None and a single count those of all arrays."""
    opens = [None] * len(scores) if among is None else among
    arrays = [Candidates(*pair) for pair in zip(scores, opens, strict=True)]
    ways = (functools.partial(way, apart=apart, largest=largest) for way in (in_pieces, _where_they_lie))
    return _by_platform(on_one_cpu, *ways, arrays, counts)


def _by_platform(on_one_cpu: bool, in_pieces: Callable, where_they_lie: Callable, *arrays: Any) -> Any:
    """Of two equal functions the one for where the arrays lie, which may be compiled for another platform."""
    if not on_one_cpu:
        return where_they_lie(*arrays)
    return lax.platform_dependent(*arrays, cpu=in_pieces, default=where_they_lie)


def _where_they_lie(
    arrays: list[Candidates], counts: list[Array], apart: tuple[Axes, ...] | None, largest: bool
) -> list[Array]:
    keys = [array.keys(largest) for array in arrays]
    indices = [
        index_in_row(key.shape, axes) for key, axes in zip(keys, apart or ((),) * len(keys), strict=True)
    ]
    if apart is None:
        offsets = np.cumsum([0, *(key.size for key in keys[:-1])]).tolist()
        indices = [index + offset for index, offset in zip(indices, offsets, strict=True)]
    found = bisected(keys, indices, counts, apart)
    return [
        is_below(key, threshold, index)
        for key, threshold, index in zip(
            keys, found if apart is not None else found * len(keys), indices, strict=True
        )
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _thresholds(on_one_cpu: bool, apart: Axes, score: Array, counts: Array) -> Threshold:
    shape = tuple(size if axis in apart else 1 for axis, size in enumerate(score.shape))

    def in_pieces(score: Array, each: Array) -> Threshold:
        (part,) = of_rows([Candidates(score, None).map(lambda x: rows_of(x, apart))], [each.ravel()], False)
        return part.threshold

    def where_they_lie(score: Array, each: Array) -> Threshold:
        (found,) = bisected([pattern(score)], [index_in_row(score.shape, apart)], [each], (apart,))
        return jax.tree.map(jnp.ravel, found)

    def of_count(count: Array) -> Threshold:
        return _by_platform(on_one_cpu, in_pieces, where_they_lie, score, jnp.broadcast_to(count, shape))

    return lax.map(of_count, counts)
