"""The lowest or highest of many scores, exactly so many of them, without putting them in order.

A `Threshold` is two integers: the bit pattern up to which all scores go, and the index up to which the ties
at that pattern do. Two ways find it. `_bisected` counts over whole arrays, elementwise, so that scores that
lie on several devices stay there. On one CPU `_in_pieces` counts piece by piece, each of which fits the
cache, in loops that all arrays share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

# Above the pattern of every number.
_LAST = 2**31 - 1

Axes = tuple[int, ...]


class Threshold(NamedTuple):
    """What tells the lowest scores from the others: two integers.

    Attributes:
        limit: a bit pattern; every score below it is among the lowest.
        first: an index; the scores at the limit whose index is smaller are among them, too.
    """

    limit: Array
    first: Array


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
    found = _below(_pattern(score), threshold, _index(score.shape, apart))
    if not apart:
        return found
    others = tuple(axis for axis in range(score.ndim) if axis not in apart)
    return found & (_index(score.shape, others) == row)


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


class _Scores(NamedTuple):
    """Arrays of one shape: scores, and which of them may be chosen."""

    values: Array
    open_: Array | None

    def map(self, function: Callable[[Array], Array]) -> _Scores:
        return _Scores(function(self.values), None if self.open_ is None else function(self.open_))

    def keys(self, largest: bool) -> Array:
        """Integers from 0 on, of which the lowest are sought."""
        bits = _pattern(self.values)
        keys = _LAST - 1 - bits if largest else bits
        return keys if self.open_ is None else jnp.where(self.open_, keys, _LAST)


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
    arrays = [_Scores(*pair) for pair in zip(scores, opens, strict=True)]
    ways = (functools.partial(way, apart=apart, largest=largest) for way in (_in_pieces, _where_they_lie))
    return _by_platform(on_one_cpu, *ways, arrays, counts)


def _by_platform(on_one_cpu: bool, in_pieces: Callable, where_they_lie: Callable, *arrays: Any) -> Any:
    """Of two equal functions the one for where the arrays lie, which may be compiled for another platform."""
    if not on_one_cpu:
        return where_they_lie(*arrays)
    return lax.platform_dependent(*arrays, cpu=in_pieces, default=where_they_lie)


def _where_they_lie(
    arrays: list[_Scores], counts: list[Array], apart: tuple[Axes, ...] | None, largest: bool
) -> list[Array]:
    keys = [array.keys(largest) for array in arrays]
    indices = [_index(key.shape, axes) for key, axes in zip(keys, apart or ((),) * len(keys), strict=True)]
    if apart is None:
        offsets = np.cumsum([0, *(key.size for key in keys[:-1])]).tolist()
        indices = [index + offset for index, offset in zip(indices, offsets, strict=True)]
    found = _bisected(keys, indices, counts, apart)
    return [
        _below(key, threshold, index)
        for key, threshold, index in zip(
            keys, found if apart is not None else found * len(keys), indices, strict=True
        )
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _thresholds(on_one_cpu: bool, apart: Axes, score: Array, counts: Array) -> Threshold:
    shape = tuple(size if axis in apart else 1 for axis, size in enumerate(score.shape))

    def in_pieces(score: Array, each: Array) -> Threshold:
        (part,) = _of_rows([_Scores(score, None).map(lambda x: _rows(x, apart))], [each.ravel()], False)
        return part.threshold

    def where_they_lie(score: Array, each: Array) -> Threshold:
        (found,) = _bisected([_pattern(score)], [_index(score.shape, apart)], [each], (apart,))
        return jax.tree.map(jnp.ravel, found)

    def of_count(count: Array) -> Threshold:
        return _by_platform(on_one_cpu, in_pieces, where_they_lie, score, jnp.broadcast_to(count, shape))

    return lax.map(of_count, counts)


def _pattern(score: Array) -> Array:
    """Ordered as the scores are; -0.0 as 0."""
    return jnp.maximum(lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32), 0)


def _below(key: Array, threshold: Threshold, index: Array) -> Array:
    return (key < threshold.limit) | ((key == threshold.limit) & (index < threshold.first))


def _index(shape: Axes, apart: Axes) -> Array:
    """Of each element in its row, in C order, without a reshape that would bring it to one device."""
    index, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed([axis for axis in range(len(shape)) if axis not in apart]):
        index = index + stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index


# Over whole arrays, where they lie


def _bisected(
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

    # Sharded as what is compared with them, which an explicit mesh asks for; nothing is counted for that.
    start = [jnp.zeros_like(number) for number in under([jnp.zeros_like(count) for count in counts])]
    limits = _largest(lambda limits: at_most(under(limits), counts), start, 31)
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
    firsts = _largest(lambda firsts: at_most(before(firsts), missing), start, size.bit_length())
    return [Threshold(*pair) for pair in zip(limits, firsts, strict=True)]


def _largest(holds: Callable[[list[Array]], list[Array]], like: list[Array], bits: int) -> list[Array]:
    """The largest n < 2^bits with `holds(n)`, where `holds` is true up to some n and false after; of each."""

    def step(number: Array, found: list[Array]) -> list[Array]:
        bit = lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - number)
        tried = [part | bit for part in found]
        return [jnp.where(*choice) for choice in zip(holds(tried), tried, found, strict=True)]

    return lax.fori_loop(jnp.int32(0), jnp.int32(bits), step, [jnp.zeros_like(part) for part in like])


# On one CPU, in pieces that fit its cache

_PIECE = 1 << 14
_AT_ONCE = 1 << 17  # elements of short rows that are bisected side by side
_FEW = 64  # rows whose histograms of 2^11 bins are small beside their elements


class _Part(NamedTuple):
    """Thresholds of all rows of a size class, [rows], and where those of one array begin."""

    threshold: Threshold
    start: int


def _in_pieces(
    arrays: list[_Scores], counts: list[Array], apart: tuple[Axes, ...] | None, largest: bool
) -> list[Array]:
    """The lowest or highest, as `_selected` has them."""
    offsets = [0] * len(arrays)
    if apart is None:
        offsets = np.cumsum([0, *(array.values.size for array in arrays[:-1])]).tolist()
        found = _of_rows([_joined(arrays).map(lambda flat: flat[None])], [counts[0].reshape(1)], largest)
        found, apart = found * len(arrays), ((),) * len(arrays)
    else:
        rows = [
            array.map(functools.partial(_rows, apart=axes)) for array, axes in zip(arrays, apart, strict=True)
        ]
        found = _of_rows(rows, [count.ravel() for count in counts], largest)
    masks = []
    for array, axes, part, offset in zip(arrays, apart, found, offsets, strict=True):
        # XLA compiles equal kernels once: what tells one array from another is to be read, not written there.
        start, before = _read(part.start, part.threshold), _read(offset, part.threshold)
        shape = tuple(size if axis in axes else 1 for axis, size in enumerate(array.values.shape))
        own = [lax.dynamic_slice(x, (start,), (math.prod(shape),)).reshape(shape) for x in part.threshold]
        index = _index(array.values.shape, axes) + before
        masks.append(_below(array.keys(largest), Threshold(*own), index))
    return masks


def _read(number: int, threshold: Threshold) -> Array:
    """A number that XLA takes from memory, since it does not know that no index is negative."""
    place = jnp.minimum(threshold.first[0], 0)
    return lax.dynamic_index_in_dim(jnp.asarray([number, -1], jnp.int32), place, keepdims=False)


def _rows(array: Array, apart: Axes) -> Array:
    """[rows, elements], both in C order."""
    moved = jnp.moveaxis(array, apart, range(len(apart)))
    return moved.reshape(math.prod(moved.shape[: len(apart)]), -1)


def _joined(arrays: Sequence[_Scores], rank: int = 1) -> _Scores:
    """Arrays one after the other: of all their elements, or along the first of two axes."""
    # As they are: what is done to each first would be done to each element by a choice among all of them.
    dtypes = {array.values.dtype for array in arrays}
    narrow = len(dtypes) == 1 and dtypes <= {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
    flat = [array.map(jnp.ravel) if rank == 1 else array for array in arrays]
    values = [array.values if narrow else array.values.astype(jnp.float32) for array in flat]
    opens = [array.open_ for array in flat if array.open_ is not None]
    return _Scores(jnp.concatenate(values), jnp.concatenate(opens) if opens else None)


def _of_rows(rows: list[_Scores], counts: list[Array], largest: bool) -> list[_Part]:
    """The thresholds of the rows of each [rows, elements]; those of one size class in one loop."""
    classes: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        classes.setdefault(_size_class(row.values.shape[1]), []).append(i)
    found: dict[int, _Part] = {}
    for size, members in classes.items():
        filled = [_filled(rows[i], size, largest) for i in members]
        of_class = _of_long_rows if size == _PIECE else _of_short_rows
        together = of_class(size, filled, jnp.concatenate([counts[i] for i in members]), largest)
        starts = np.cumsum([0, *(rows[i].values.shape[0] for i in members[:-1])]).tolist()
        found |= {i: _Part(together, start) for i, start in zip(members, starts, strict=True)}
    return [found[i] for i in range(len(rows))]


def _size_class(size: int) -> int:
    """The size that rows are filled up to, at most a quarter longer; for long ones that of a piece."""
    step = max(1 << (size.bit_length() - 1) >> 2, 1)
    return min(-(-size // step) * step, _PIECE)


def _filled(rows: _Scores, size: int, largest: bool) -> _Scores:
    """Rows whose length is a multiple of a size, filled with what goes after all else."""
    padding = -rows.values.shape[1] % size
    if not padding:
        return rows
    values = (
        rows.values if jnp.issubdtype(rows.values.dtype, jnp.floating) else rows.values.astype(jnp.float32)
    )
    last = 0.0 if largest else np.nan
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, padding)))
    return _Scores(
        pad(values, constant_values=last),
        None if rows.open_ is None else pad(rows.open_, constant_values=False),
    )


def _of_short_rows(size: int, rows: list[_Scores], counts: Array, largest: bool) -> Threshold:
    """By bisection, side by side."""
    joined = _joined(rows, 2)
    index = [lax.iota(jnp.int32, size)]

    def of_row(row: tuple[_Scores, Array]) -> Threshold:
        scores, count = row
        (found,) = _bisected([scores.keys(largest)], index, [count], None)
        return found

    at_once, number = _AT_ONCE // size, len(counts)
    if number <= at_once:
        return jax.vmap(of_row)((joined, counts))
    padding = -number % at_once
    whole = joined.map(lambda x: jnp.pad(x, ((0, padding), (0, 0)))), jnp.pad(counts, (0, padding))
    found = lax.map(of_row, whole, batch_size=at_once)
    return Threshold(*(part[:number] for part in found))


def _of_long_rows(size: int, rows: list[_Scores], counts: Array, largest: bool) -> Threshold:
    """By histograms of a few bits at a time, over pieces of the rows."""
    lengths = np.concatenate(
        [np.full(row.values.shape[0], row.values.shape[1] // size, np.int32) for row in rows]
    )
    pieces = _joined([row.map(lambda x: x.reshape(-1, size)) for row in rows], 2)
    number = int(lengths.sum())
    owners = jnp.asarray(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    starts = jnp.asarray(np.concatenate([np.arange(length, dtype=np.int32) * size for length in lengths]))
    width = 11 if len(lengths) <= _FEW else 8
    passes, bins = -(-31 // width), 1 << width

    def keys(at: Array) -> Array:
        return pieces.map(lambda x: x[at]).keys(largest)

    def narrowed(number_of_pass: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """The next bits of the limits, and how many are to go of those that share all bits so far."""
        prefix, missing = state
        shift = width * (passes - 1 - number_of_pass)
        known = jnp.minimum(shift + width, 31)

        def count(at: Array, table: Array) -> Array:
            owner, piece = owners[at], keys(at)
            digit = lax.shift_right_logical(piece, shift) & (bins - 1)
            # What has other bits before these goes to a bin of its own.
            digit = jnp.where(piece >> known == prefix[owner] >> known, digit, bins)
            return table.at[owner * (bins + 1) + digit].add(1, mode="promise_in_bounds")

        table = lax.fori_loop(0, number, count, jnp.zeros(len(lengths) * (bins + 1), jnp.int32))
        up_to = jnp.cumsum(table.reshape(len(lengths), bins + 1)[:, :bins], 1)
        under = up_to <= missing[:, None]
        digit = jnp.minimum(jnp.sum(under, 1, dtype=jnp.int32), bins - 1)
        gone = jnp.max(jnp.where(under, up_to, 0), 1)
        return prefix | (digit << shift), missing - gone

    limit, missing = lax.fori_loop(0, passes, narrowed, (jnp.zeros_like(counts), counts))
    # Where all of a row goes there is no score at which it ends.
    limit = jnp.where(counts >= jnp.asarray(lengths * size), _LAST, limit)

    def sought(at: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """The index of the first tie that stays, where it is in this piece."""
        seen, first = state
        owner = owners[at]
        ties = keys(at) == limit[owner]
        left, here = missing[owner] - seen[owner], jnp.sum(ties, dtype=jnp.int32)
        place = lax.cond((left >= 0) & (left < here), _first_after, lambda ties, left: _LAST, ties, left)
        index = jnp.where(place < _LAST, starts[at] + place, _LAST)
        return seen.at[owner].add(here), first.at[owner].min(index)

    state = jnp.zeros_like(counts), jnp.full_like(counts, _LAST)
    _, first = lax.fori_loop(0, number, sought, state)
    return Threshold(limit, first)


def _first_after(ties: Array, count: Array) -> Array:
    """The largest index with at most `count` ties before it: that of the next tie."""
    index = lax.iota(jnp.int32, ties.size)
    (found,) = _largest(
        lambda firsts: [jnp.sum(ties & (index < firsts[0]), dtype=jnp.int32) <= count],
        [count],
        ties.size.bit_length() - 1,
    )
    return found
