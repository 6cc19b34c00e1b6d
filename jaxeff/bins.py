"""Passes over an array that count its weights by bit pattern, in exact integers. Imports `sharded`.

The 31 bits of a non-negative float32 are ordered as the numbers are. The first 17 (8 of exponent, 9 of
mantissa) name one of 2^17 bins, at most 2^-9 wide relative to what they hold; the last 14 are a weight's
place in its bin, in units in the last place. Integers add without rounding, so no order, split or
sharding of the array changes a bit, and subnormals count although XLA's CPU flushes them to zero.

An array that lies on several devices is counted where it lies: one all-reduce of counts, and no copy of
the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jaxeff.sharded import everywhere

ROWS = 256  # one an exponent
COLUMNS = 512
BINS = ROWS * COLUMNS
PLACE_BITS = 14
THRESHOLDS = (1e-3, 1e-2)

_LAST_PLACE = np.uint32((1 << PLACE_BITS) - 1)
_HALF_BITS = PLACE_BITS // 2
_INVALID = np.uint32(0x7F800000)  # infinity, whose row of bins is free
_NOTHING = np.uint32(0x7F804000)  # zeros, in the bin after
_UNCROWDED = 1 << 18  # so many places sum to less than 2^32
_RUN = 1 << 24  # so many halves of places do, and remainders


class Counts(NamedTuple):
    """What one pass counts, as uint32."""

    sums: Array  # [BINS, 2], of each bin its weights and, modulo 2^32, the sum of their places
    high: Array  # [BINS], the multiples of 2^32 in that sum
    below: Array  # [2], weights below each threshold, zeros aside
    extremes: Array  # [2], maxima: of patterns less that of infinity, and of negated patterns, modulo 2^32


def patterns(x: Array) -> Array:
    """Bit patterns as uint32; infinity's for what is no importance, and one after it for 0."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits << 1 == 0, _NOTHING, jnp.minimum(bits, _INVALID))


def _limits() -> Array:
    """[2], the patterns that `Counts.below` counts below: float32(0.01), for one, is below 0.01."""
    nearest = np.asarray(THRESHOLDS, np.float32)
    above = np.nextafter(nearest, np.float32(np.inf))
    limits = np.where(nearest.astype(np.float64) < THRESHOLDS, above, nearest).view(np.uint32)
    # Scalars, for a function partitioned by hand may hold no constant array.
    return jnp.stack([*limits])


def grain(dtype: Any) -> int:
    """How many last bits of a float32's pattern are 0 in a value of the dtype."""
    return max(0, 23 - jnp.finfo(dtype).nmant) if jnp.issubdtype(dtype, jnp.floating) else 0


def add(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b modulo 2^32, and the carry."""
    total = a + b
    return total, (total < a).astype(jnp.uint32)


def _joined(digits: list[Array], width: int) -> tuple[Array, Array]:
    """Low and high word of sum_i digits[i] 2^(i width)."""
    low, high = digits[0], jnp.zeros_like(digits[0])
    for shift, digit in zip(itertools.count(width, width), digits[1:]):
        low, carry = add(low, digit << shift)
        high = high + carry + (digit >> (32 - shift))
    return low, high


# On a CPU: scatter, of both sums of a bin at once. XLA runs it in one thread.


class _Watch(NamedTuple):
    """One lane a weight of a piece: to sum across them as they come costs more than the scatter."""

    below: Array  # [2, piece]
    largest: Array  # [piece]
    smallest: Array  # [piece]


def _scattered(x: Array) -> Counts:
    """Counts of x [N]: the tail that no whole piece holds, then run by run."""
    piece = _piece(x.size)
    pieces, at_once, padding = x.size // piece, _RUN // piece, -x.size % piece
    table, lane = jnp.zeros((BINS, 2), jnp.uint32), jnp.zeros(piece, jnp.uint32)
    sums, watch = table, _Watch(jnp.zeros((2, piece), jnp.uint32), lane, lane)
    if padding:
        # With zeros, whose bin starts with as many less.
        sums = sums.at[_NOTHING >> PLACE_BITS, 0].set(np.uint32(2**32 - padding))
        rest = jnp.pad(x[pieces * piece :], (0, padding))
        sums, watch = _count((sums, watch), patterns(rest))

    def run(index: Any, state: tuple[Array, Array, _Watch]) -> tuple[Array, Array, _Watch]:
        first, last = index * at_once, jnp.minimum((index + 1) * at_once, pieces)
        sums, watch = _in_pieces(_count, (table, state[2]), x, first, last)
        high = _carries(sums, x, first, last)
        sums, carry = add(state[0], sums)
        return sums, state[1] + high + carry[:, 1], watch

    state = (sums, table[:, 0], watch)
    sums, high, watch = (
        run(0, state) if pieces <= at_once else lax.fori_loop(0, -(-pieces // at_once), run, state)
    )
    *below, largest, smallest = across([lax.add] * 2 + [lax.max] * 2, *watch.below, *watch[1:])
    return Counts(sums, high, jnp.stack(below), jnp.stack([largest, smallest]))


def across(operations: Sequence[Callable[[Array, Array], Array]], *lanes: Array) -> list[Array]:
    """Each operation over its lanes [M]: as one reduction, where XLA compiles a chain for each alone."""

    def both(a: Any, b: Any) -> Any:
        return tuple(operation(*each) for operation, *each in zip(operations, a, b, strict=True))

    return lax.reduce(lanes, tuple(np.zeros((), lane.dtype) for lane in lanes), both, (0,))


def _piece(size: int) -> int:
    """How many weights at a time: few enough for the cache, and leaving no tail where that can be."""
    return max((length for length in range(4096, 16384) if size % length == 0), default=16384)


def _in_pieces(step: Callable[[Any, Array], Any], state: Any, x: Array, first: Any, last: Any) -> Any:
    """step(state, patterns) over pieces of x [N]."""
    piece = _piece(x.size)

    def body(index: Array, state: Any) -> Any:
        return step(state, patterns(lax.dynamic_slice(x, (index * piece,), (piece,))))

    return lax.fori_loop(first, last, body, state) if x.size >= piece else state


def _count(state: tuple[Array, _Watch], bits: Array) -> tuple[Array, _Watch]:
    # No kernel here may take more operations than it moves bytes, or XLA cuts it up over threads, whose
    # wakening takes longer than the kernel.
    table, watch = state
    sums = _scatter(table, bits >> PLACE_BITS, _one_and(bits & _LAST_PLACE))
    return sums, _Watch(
        watch.below + (bits[None] < _limits()[:, None]).astype(jnp.uint32),
        jnp.maximum(watch.largest, bits - _INVALID),
        jnp.maximum(watch.smallest, np.uint32(0) - bits),
    )


def _scatter(table: Array, index: Array, both: Array) -> Array:
    return table.at[index].add(both, mode="promise_in_bounds")


def _one_and(value: Array) -> Array:
    return jnp.stack([jnp.ones_like(value), value], axis=-1)


def _carries(sums: Array, x: Array, first: Any, last: Any) -> Array:
    """[BINS], multiples of 2^32 in the sums of places of a run, where a bin is crowded from a second pass.

    With h the sum of places without their last 7 bits, the sum s exceeds 2^7 h by less than 2^32.
    """

    def add(halves: Array, bits: Array) -> Array:
        return halves.at[bits >> PLACE_BITS].add((bits & _LAST_PLACE) >> _HALF_BITS, mode="promise_in_bounds")

    def again() -> Array:
        halves = _in_pieces(add, none, x, first, last)
        return (halves >> (32 - _HALF_BITS)) + (sums[:, 1] < halves << _HALF_BITS)

    none = jnp.zeros(BINS, jnp.uint32)
    if x.size <= _UNCROWDED or grain(x.dtype) >= PLACE_BITS:
        return none
    return lax.cond(sums[:, 0].max() > _UNCROWDED, again, lambda: none)


# On an accelerator, where additions to one address wait for each other: sort.


def _sorted(x: Array) -> Counts:
    """Counts of x [N]."""
    ordered = lax.sort(patterns(x))
    edges = jnp.searchsorted(ordered, jnp.arange(BINS + 1, dtype=jnp.uint32) << PLACE_BITS)
    count, low, high = _between(ordered, edges[:-1], edges[1:])
    below = jnp.searchsorted(ordered, _limits()).astype(jnp.uint32)
    # With no weight the last and the first are no number.
    valid = edges[int(_INVALID >> PLACE_BITS)]
    extremes = jnp.stack(
        [ordered[jnp.where(valid > 0, valid - 1, x.size - 1)] - _INVALID, np.uint32(0) - ordered[0]]
    )
    return Counts(jnp.stack([count, low], axis=-1), high, below, extremes)


def _between(ordered: Array, first: Array, last: Array) -> tuple[Array, Array, Array]:
    """Of ordered[first:last], for many: count, and low and high word of the sum of places."""
    width = 32 - ordered.size.bit_length()
    digits = []
    for shift in range(0, PLACE_BITS, width):
        digit = ((ordered & _LAST_PLACE) >> shift) & np.uint32((1 << width) - 1)
        running = jnp.pad(jnp.cumsum(digit, dtype=jnp.uint32), (1, 0))
        digits.append(running[last] - running[first])
    return (last - first).astype(jnp.uint32), *_joined(digits, width)


# A second pass: some bins again in cells, and weights below limits.


class Filled(NamedTuple):
    """What the second pass counts, as uint32."""

    cells: Array  # [K, 2], of each cell its weights and the sum of their places above its start
    below: Array  # [L], weights below each limit, zeros aside


def _filled(x: Array, table: Array, base: Array, layout: Array, limits: Array, wanted: Array) -> Filled:
    """Filled by x [N]; what is not wanted, cells or weights below, takes no pass and tells nothing."""
    piece, cells = _piece(x.size), jnp.zeros((len(layout) + 1, 2), jnp.uint32)
    pieces = jnp.where(wanted > 0, x.size // piece, 0)

    def fill(cells: Array, bits: Array) -> Array:
        entry = table.at[jnp.minimum((bits >> PLACE_BITS) - base, len(table) - 1)].get(
            mode="promise_in_bounds"
        )
        depth = entry & 15
        place = (bits & _LAST_PLACE) << depth
        index = (entry >> 4) + (place >> PLACE_BITS)
        return _scatter(cells, index, _one_and((place & _LAST_PLACE) >> depth))

    def count(lanes: Array, bits: Array) -> Array:
        return lanes + (bits[None] < limits[:, None]).astype(jnp.uint32)

    lanes = jnp.zeros((len(limits), piece), jnp.uint32)
    cells, lanes = _in_pieces(fill, cells, x, 0, pieces[0]), _in_pieces(count, lanes, x, 0, pieces[1])
    if x.size % piece:
        rest = patterns(jnp.pad(x[x.size // piece * piece :], (0, -x.size % piece)))
        cells, lanes = fill(cells, rest), count(lanes, rest)
    return Filled(cells[:-1], lanes.sum(axis=1, dtype=jnp.uint32))


def _filled_by_sort(
    x: Array, table: Array, base: Array, layout: Array, limits: Array, wanted: Array
) -> Filled:
    """The same by sorting."""

    def fill() -> Filled:
        ordered, (_, start, width) = lax.sort(patterns(x)), cells_at(table, base, layout, 0)
        first, last = (jnp.searchsorted(ordered, edge) for edge in (start, start + width))
        count, places, _ = _between(ordered, first, last)
        # Modulo 2^32, which the places above a cell's start sum to less than.
        places = places - count * (start & _LAST_PLACE)
        return Filled(
            jnp.stack([count, places], axis=-1), jnp.searchsorted(ordered, limits).astype(jnp.uint32)
        )

    def skip() -> Filled:
        return Filled(jnp.zeros((len(layout), 2), jnp.uint32), jnp.zeros_like(limits))

    return lax.cond((wanted > 0).any(), fill, skip)


def cells_at(table: Array, base: Array, layout: Array, index: Any) -> tuple[Array, Array, Array]:
    """Of cells from an index on: the first of the bin, the pattern at which they begin, how many they span.

    A cell that is not in use spans none.
    """
    bin_, depth = layout >> 4, layout & 15
    first = table.at[bin_ - base].get(mode="clip") >> 4
    inside = jnp.uint32(index) + jnp.arange(layout.size, dtype=jnp.uint32) - first
    start = (bin_ << PLACE_BITS) + (inside << (PLACE_BITS - depth))
    return first, start, jnp.where(depth > 0, np.uint32(1) << (PLACE_BITS - depth), 0)


# Over the devices that an array lies on.


def _total(counts: Counts, axes: tuple[str, ...], devices: int) -> Counts:
    """Over devices, in one all-reduce: sums of half words, which keep their carries, and a slot each."""
    low, slots = counts.sums[:, 1], jnp.zeros((devices, 2), jnp.uint32)
    slots = slots.at[lax.axis_index(axes)].set(counts.extremes)
    middle = (low >> 16) | (counts.high << 16)
    halves = (counts.sums[:, 0], low & np.uint32(0xFFFF), middle, counts.below, slots)
    words, apart = ravel_pytree(halves)
    count, low, middle, below, slots = apart(lax.psum(words, axes))
    low, carry = add(low, middle << 16)
    return Counts(jnp.stack([count, low], axis=-1), carry + (middle >> 16), below, slots.max(axis=0))


def _total_filled(filled: Filled, axes: tuple[str, ...], devices: int) -> Filled:
    words, apart = ravel_pytree(filled)
    return apart(lax.psum(words, axes))


def _counted(x: Array) -> Counts:
    return lax.platform_dependent(x.reshape(-1), cpu=_scattered, default=_sorted)


def _filled_anyhow(x: Array, *plan: Array) -> Filled:
    return lax.platform_dependent(x.reshape(-1), *plan, cpu=_filled, default=_filled_by_sort)


count = everywhere(_counted, _total)
fill = everywhere(_filled_anyhow, _total_filled)
