"""Selection of exactly the k lowest or highest of many scores, without sorting them.

A `Threshold` is two integers: the bit pattern below which all scores are selected, and the index below which ties
at that pattern are. There are two ways to find it. `bisection` counts over whole arrays, elementwise, so that scores
on several devices stay there. On one CPU, `pieces` counts in pieces that fit the cache.
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

from jaxeff.numerics.bisection import (
    LAST,
    Axes,
    Candidates,
    Threshold,
    Wide,
    bisected,
    bisected_of_many,
    index_in_row,
    is_below,
    pattern,
)
from jaxeff.numerics.pieces import in_pieces, of_rows, rows_of


def lowest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Select the `count` lowest scores of all arrays together; ties are selected by index.

    Args:
        scores: of any shapes, non-negative; compared as float32. From 2^31 scores on, a few of equal scores may be
            left out: fewer than one in 2^30.
        count: [], an integer from 0 to their number, which may be traced; in float32 where int32 does not hold it.
        among: boolean arrays of the same shapes that mark candidates; at least `count` must be True.

    Returns:
        Boolean arrays of the same shapes, `count` of them True.

    >>> lowest([jnp.array([3.0, 1.0, 1.0]), jnp.array([0.5])], 2)
    [Array([False,  True, False], dtype=bool), Array([ True], dtype=bool)]
    """
    return _of_all(False, scores, count, among)


def highest(scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None = None) -> list[Array]:
    """Select the `count` highest scores; otherwise as `lowest`, with ties by index too.

    >>> highest([jnp.array([3.0, 1.0, 3.0])], 1)
    [Array([ True, False, False], dtype=bool)]
    """
    return _of_all(True, scores, count, among)


def _of_all(
    largest: bool, scores: Sequence[Array], count: int | Array, among: Sequence[Array] | None
) -> list[Array]:
    if sum(score.size for score in scores) > LAST:
        return of_many(largest, list(scores), Wide.of(count), among)
    return _selected(_on_one_cpu(scores), None, largest, list(scores), [jnp.asarray(count, jnp.int32)], among)


@functools.partial(jax.jit, static_argnums=0)
def of_many(largest: bool, scores: list[Array], count: Wide, among: Sequence[Array] | None) -> list[Array]:
    """Select as `lowest` and `highest` do, of more than 2^31 scores."""
    opens = [None] * len(scores) if among is None else among
    keys = [Candidates(*pair).keys(largest) for pair in zip(scores, opens, strict=True)]
    shared = -(-sum(key.size for key in keys) // (LAST >> 1))
    indices, offset = [], 0
    for key in keys:
        indices.append(index_in_row(key.shape, (), shared) + offset)
        longest = max(key.shape)
        offset += key.size // max(longest, 1) * -(-longest // shared)
    threshold = bisected_of_many(keys, indices, count)
    return [is_below(key, threshold, index) for key, index in zip(keys, indices, strict=True)]


def lowest_of_each(
    scores: Sequence[Array],
    counts: Sequence[int | np.ndarray | Array],
    apart: Sequence[Axes],
    among: Sequence[Array] | None = None,
) -> list[Array]:
    """Select the lowest scores of each row; ties are selected by index.

    Args:
        scores: as in `lowest`.
        counts: for each array, how many of each row: shaped like the array's axes `apart`, or one number.
        apart: for each array, ascending axes, every index of which is a row of its own.
        among: as in `lowest`.

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
    """Select the highest scores of each row; otherwise as `lowest_of_each`."""
    counts = _laid_out(scores, counts, apart)
    return _selected(_on_one_cpu(scores), tuple(apart), True, list(scores), counts, among)


def thresholds(score: Array, counts: np.ndarray | Array, apart: Axes = ()) -> Threshold:
    """Return the thresholds between the lowest of each row and the others, for several counts.

    Args:
        score: as in `lowest`.
        counts: [counts].
        apart: as in `lowest_of_each`, for one array.

    Returns:
        [counts, rows], rows in C order.
    """
    return _thresholds(_on_one_cpu([score]), apart, score, jnp.asarray(counts, jnp.int32))


def below(score: Array, threshold: Threshold, apart: Axes, row: int | Array) -> Array:
    """Return which scores of one row a threshold selects.

    Args:
        apart: as in `thresholds`.
        row: its index.
    """
    found = is_below(pattern(score), threshold, index_in_row(score.shape, apart))
    if not apart:
        return found
    others = tuple(axis for axis in range(score.ndim) if axis not in apart)
    return found & (index_in_row(score.shape, others) == row)


def _on_one_cpu(arrays: Sequence[Array]) -> bool:
    """Return whether all arrays lie whole on one CPU; in a trace only the number of devices tells."""
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
    """Return counts that broadcast against the scores."""
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
    """Select the lowest or highest of each row, or, with `apart` None and a single count, of all arrays."""
    opens = [None] * len(scores) if among is None else among
    arrays = [Candidates(*pair) for pair in zip(scores, opens, strict=True)]
    ways = (functools.partial(way, apart=apart, largest=largest) for way in (in_pieces, _where_they_lie))
    return _by_platform(on_one_cpu, *ways, arrays, counts)


def _by_platform(on_one_cpu: bool, in_pieces: Callable, where_they_lie: Callable, *arrays: Any) -> Any:
    """Choose one of two equal functions by where the arrays lie, which may be compiled for another platform."""
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
