"""The threshold between the lowest scores and the others, on one CPU, in pieces that fit its cache.

Counts go piece by piece, in loops that all arrays share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff.numerics.bisection import (
    LAST,
    Axes,
    Candidates,
    Threshold,
    bisected,
    index_in_row,
    is_below,
    largest_of_each,
)

_PIECE = 1 << 14
_AT_ONCE = 1 << 17  # elements of short rows to bisect side by side
_FEW = 64  # rows whose histograms of 2^11 bins are small compared with their elements


class _Part(NamedTuple):
    """Thresholds of all rows of a size class, [rows], and the start of those of one array."""

    threshold: Threshold
    start: int


def in_pieces(
    arrays: list[Candidates], counts: list[Array], apart: tuple[Axes, ...] | None, largest: bool
) -> list[Array]:
    """Find the lowest or highest, as in `_selected`."""
    offsets = [0] * len(arrays)
    if apart is None:
        offsets = np.cumsum([0, *(array.values.size for array in arrays[:-1])]).tolist()
        found = of_rows([_joined(arrays).map(lambda flat: flat[None])], [counts[0].reshape(1)], largest)
        found, apart = found * len(arrays), ((),) * len(arrays)
    else:
        rows = [
            array.map(functools.partial(rows_of, apart=axes))
            for array, axes in zip(arrays, apart, strict=True)
        ]
        found = of_rows(rows, [count.ravel() for count in counts], largest)
    masks = []
    for array, axes, part, offset in zip(arrays, apart, found, offsets, strict=True):
        # XLA compiles equal kernels once, so the difference between arrays has to be read from memory.
        start, before = _read(part.start, part.threshold), _read(offset, part.threshold)
        shape = tuple(size if axis in axes else 1 for axis, size in enumerate(array.values.shape))
        own = [lax.dynamic_slice(x, (start,), (math.prod(shape),)).reshape(shape) for x in part.threshold]
        index = index_in_row(array.values.shape, axes) + before
        masks.append(is_below(array.keys(largest), Threshold(*own), index))
    return masks


def _read(number: int, threshold: Threshold) -> Array:
    """Return a number that XLA has to read from memory, as it does not know that no index is negative."""
    place = jnp.minimum(threshold.first[0], 0)
    return lax.dynamic_index_in_dim(jnp.asarray([number, -1], jnp.int32), place, keepdims=False)


def rows_of(array: Array, apart: Axes) -> Array:
    """Return [rows, elements], both in C order."""
    moved = jnp.moveaxis(array, apart, range(len(apart)))
    return moved.reshape(math.prod(moved.shape[: len(apart)]), -1)


def _joined(arrays: Sequence[Candidates], rank: int = 1) -> Candidates:
    """Concatenate arrays: all of their elements, or along the first of two axes."""
    # Unchanged, because an operation on each first would be applied to every element by a choice among all.
    dtypes = {array.values.dtype for array in arrays}
    narrow = len(dtypes) == 1 and dtypes <= {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
    flat = [array.map(jnp.ravel) if rank == 1 else array for array in arrays]
    values = [array.values if narrow else array.values.astype(jnp.float32) for array in flat]
    opens = [array.open_ for array in flat if array.open_ is not None]
    return Candidates(jnp.concatenate(values), jnp.concatenate(opens) if opens else None)


def of_rows(rows: list[Candidates], counts: list[Array], largest: bool) -> list[_Part]:
    """Return the thresholds of the rows of each [rows, elements]; those of one size class in one loop."""
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
    """Return the size to which rows are padded: at most a quarter longer, or that of a piece for long rows."""
    step = max(1 << (size.bit_length() - 1) >> 2, 1)
    return min(-(-size // step) * step, _PIECE)


def _filled(rows: Candidates, size: int, largest: bool) -> Candidates:
    """Pad rows to a multiple of a size, with values after all others."""
    padding = -rows.values.shape[1] % size
    if not padding:
        return rows
    values = (
        rows.values if jnp.issubdtype(rows.values.dtype, jnp.floating) else rows.values.astype(jnp.float32)
    )
    last = 0.0 if largest else np.nan
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, padding)))
    return Candidates(
        pad(values, constant_values=last),
        None if rows.open_ is None else pad(rows.open_, constant_values=False),
    )


def _of_short_rows(size: int, rows: list[Candidates], counts: Array, largest: bool) -> Threshold:
    """Find thresholds by bisection, many rows side by side."""
    joined = _joined(rows, 2)
    index = [lax.iota(jnp.int32, size)]

    def of_row(row: tuple[Candidates, Array]) -> Threshold:
        scores, count = row
        (found,) = bisected([scores.keys(largest)], index, [count], None)
        return found

    at_once, number = _AT_ONCE // size, len(counts)
    if number <= at_once:
        return jax.vmap(of_row)((joined, counts))
    padding = -number % at_once
    whole = joined.map(lambda x: jnp.pad(x, ((0, padding), (0, 0)))), jnp.pad(counts, (0, padding))
    found = lax.map(of_row, whole, batch_size=at_once)
    return Threshold(*(part[:number] for part in found))


def _of_long_rows(size: int, rows: list[Candidates], counts: Array, largest: bool) -> Threshold:
    """Find thresholds by histograms of a few bits at a time, over pieces of the rows."""
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
        """Return the next bits of the limits, and how many to select of the scores that share all bits so far."""
        prefix, missing = state
        shift = width * (passes - 1 - number_of_pass)
        known = jnp.minimum(shift + width, 31)

        def count(at: Array, table: Array) -> Array:
            owner, piece = owners[at], keys(at)
            digit = lax.shift_right_logical(piece, shift) & (bins - 1)
            # Scores whose earlier bits differ go to a bin of their own.
            digit = jnp.where(piece >> known == prefix[owner] >> known, digit, bins)
            return table.at[owner * (bins + 1) + digit].add(1, mode="promise_in_bounds")

        table = lax.fori_loop(0, number, count, jnp.zeros(len(lengths) * (bins + 1), jnp.int32))
        up_to = jnp.cumsum(table.reshape(len(lengths), bins + 1)[:, :bins], 1)
        under = up_to <= missing[:, None]
        digit = jnp.minimum(jnp.sum(under, 1, dtype=jnp.int32), bins - 1)
        gone = jnp.max(jnp.where(under, up_to, 0), 1)
        return prefix | (digit << shift), missing - gone

    limit, missing = lax.fori_loop(0, passes, narrowed, (jnp.zeros_like(counts), counts))
    # If a whole row is removed, no score is its limit.
    limit = jnp.where(counts >= jnp.asarray(lengths * size), LAST, limit)

    def sought(at: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the index of the first tie that stays, if it is in this piece."""
        seen, first = state
        owner = owners[at]
        ties = keys(at) == limit[owner]
        left, here = missing[owner] - seen[owner], jnp.sum(ties, dtype=jnp.int32)
        place = lax.cond((left >= 0) & (left < here), _first_after, lambda ties, left: LAST, ties, left)
        index = jnp.where(place < LAST, starts[at] + place, LAST)
        return seen.at[owner].add(here), first.at[owner].min(index)

    state = jnp.zeros_like(counts), jnp.full_like(counts, LAST)
    _, first = lax.fori_loop(0, number, sought, state)
    return Threshold(limit, first)


def _first_after(ties: Array, count: Array) -> Array:
    """Return the largest index with at most `count` ties before it, which is that of the next tie."""
    index = lax.iota(jnp.int32, ties.size)
    (found,) = largest_of_each(
        lambda firsts: [jnp.sum(ties & (index < firsts[0]), dtype=jnp.int32) <= count],
        [count],
        ties.size.bit_length() - 1,
    )
    return found
