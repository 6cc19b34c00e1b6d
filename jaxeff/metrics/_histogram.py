"""Passes over an array that count its weights by bit pattern, in exact integers.

The bits of a non-negative float32 have the same order as the numbers. The first 17 of its 31 bits (8 of
exponent, 9 of mantissa) name one of 2^17 bins, whose relative width is at most 2^-9; the last 14 bits are the
weight's position in its bin, in units in the last place. Integers add without rounding, so order, splitting and
sharding of the array change no bit, and subnormals count although XLA's CPU flushes them to zero.

An array that lies on several devices is counted where it lies; weights are not moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.metrics._order import importances, limits
from jaxeff.numerics.placement import in_turn_or_at_once
from jaxeff.numerics.summation import namespace

ROWS, COLUMNS = 256, 512  # one row per exponent
BINS = ROWS * COLUMNS
PLACE_BITS = 14

# No number falls in the last row of bins, which holds invalid entries and zeros.
INVALID_BIN, ZERO_BIN = BINS - COLUMNS, BINS - COLUMNS + 1
# It also holds the weights below a threshold that share its bin, apart from the others there.
BELOW_BINS = ZERO_BIN + 1, ZERO_BIN + 2
LIMITS = [int(limit) for limit in limits(np.float32)]
_INVALID = np.uint32(INVALID_BIN << PLACE_BITS)
_ZERO = np.uint32(ZERO_BIN << PLACE_BITS)

_PIECE_BITS = 13
_PIECE = 1 << _PIECE_BITS  # weights at a time, which stay in a core's cache
_RUN = 1 << 24  # weights counted into one table
_UNCROWDED = 1 << 18  # weights of one bin whose positions sum to less than a word


class Histogram(NamedTuple):
    """Exact counts of an array, as uint32.

    Attributes:
        table: [BINS, 2], for each bin the number of its weights and the sum of their positions modulo 2^32.
        high: [BINS], multiples of 2^32 in that sum; [] if there cannot be any.
        largest: [], the largest bit pattern.
    """

    table: Any
    high: Any
    largest: Any


def patterns(x: Any) -> Any:
    """Return bit patterns as uint32, with reserved patterns for invalid entries and for 0."""
    xp, x = namespace(x), x.astype(np.float32)
    bits = x.view(np.uint32) if xp is np else lax.bitcast_convert_type(x, jnp.uint32)
    return xp.where(bits << 1 == 0, _ZERO, xp.minimum(bits, _INVALID))


def bins_of(found: Any) -> Any:
    """Return the bin of each pattern."""
    xp = namespace(found)
    at = found >> PLACE_BITS
    for limit, apart in zip(LIMITS, BELOW_BINS, strict=True):
        at = xp.where((at == limit >> PLACE_BITS) & (found < limit), np.uint32(apart), at)
    return at


def histogram_on_host(x: np.ndarray) -> Histogram:
    """Count x [N] of at most 2^18 weights."""
    found = patterns(x)
    at, places = bins_of(found), found & ((1 << PLACE_BITS) - 1)
    columns = np.bincount(at, minlength=BINS), np.bincount(at, weights=places, minlength=BINS)
    return Histogram(np.stack(columns, axis=1).astype(np.uint32), np.uint32(0), _largest_on_host(x))


def histogram_in_chunks(x: np.ndarray) -> Histogram:
    """Count x [...], float32 of any size, on the CPU, by one program for arrays of all shapes."""
    x = x.reshape(-1)
    nothing = np.zeros((BINS, 2), np.uint32), np.zeros(BINS, np.uint32)
    table, high = jax.device_put(nothing, jax.local_devices(backend="cpu")[0])
    largest = np.uint32(0)
    for start in range(0, x.size, _UNCROWDED):
        chunk = x[start : start + _UNCROWDED]
        largest = np.maximum(largest, _largest_on_host(chunk))
        padded = chunk if chunk.size == _UNCROWDED else np.pad(chunk, (0, _UNCROWDED - chunk.size))
        table, high = _add_chunk(table, high, padded, np.int32(chunk.size))
    return Histogram(table, high, largest)


@partial(jax.jit, donate_argnums=(0, 1))
def _add_chunk(table: Array, high: Array, chunk: Array, size: Array) -> tuple[Array, Array]:
    """Add the counts of a chunk, whose positions sum to less than a word for each bin."""
    more, _ = _by_pieces(chunk, size)
    table += more
    return table, high + (table[:, 1] < more[:, 1]).astype(jnp.uint32)


def _largest_on_host(x: np.ndarray) -> np.ndarray:
    """Return the largest bit pattern of a valid importance."""
    largest = x.max(initial=0)
    if not np.isfinite(largest):
        largest = x.max(initial=0, where=np.isfinite(x))
    return np.abs(largest).astype(np.float32).view(np.uint32)


def add_words(low: Array, high: Array, more: Array) -> tuple[Array, Array]:
    """Add one word to a number of two words."""
    total = low + more
    return total, high + (total < low).astype(jnp.uint32)


def histogram(x: Array, size: Any = None, sharding: NamedSharding | None = None) -> Histogram:
    """Count the weights of x [...].

    Args:
        size: [], an integer, which may be traced: number of leading entries of x [M] to count; the others must
            be 0. Whole pieces of padding are skipped.
        sharding: layout of x on a mesh, if it is known and not part of x.
    """
    mesh, spec = _layout(x, sharding)
    if any(spec):
        return _in_parts(x, mesh, spec)
    if size is not None or sharding is not None or jax.sharding.get_abstract_mesh().manual_axes:
        return _flat(x, size)
    # The program may be compiled for other devices than those of this process.
    on_cpu = _in_place if may_lie_in_parts(x) else _flat
    return lax.platform_dependent(x, cpu=on_cpu, default=_in_place)


def _flat(x: Array, size: Any = None) -> Histogram:
    x = x.reshape(-1)
    return _in_pieces(x, x.size if size is None else size)


def _layout(x: Array, sharding: NamedSharding | None) -> tuple[Any, tuple[Any, ...]]:
    if sharding is None:
        known = jax.typeof(x).sharding
        if jax.sharding.get_abstract_mesh().manual_axes:
            return None, ()
        return known.mesh, tuple(known.spec)
    return sharding.mesh, tuple(sharding.spec)


def may_lie_in_parts(x: Array) -> bool:
    """Return whether x is sharded by its type, or XLA may shard it, as in a trace on several devices."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return False
    return any(jax.typeof(x).sharding.spec) or (isinstance(x, Tracer) and jax.device_count() > 1)


def _in_pieces(x: Array, size: Any) -> Histogram:
    """Count x [M] run by run and piece by piece."""
    if x.size % _PIECE:
        x = jnp.pad(x, (0, -x.size % _PIECE))
    size = jnp.asarray(size, jnp.int32)
    if x.size <= _RUN:
        table, high = _run(x, size)
    else:
        x = jnp.pad(x, (0, -x.size % _RUN)) if x.size % _RUN else x

        def step(carry: Any, at: Any) -> tuple[Any, None]:
            row, start = at
            counts, places, high = carry
            more, upper = _run(row, jnp.clip(size - start, 0, _RUN))
            return (counts + more[:, 0], *add_words(places, high + upper, more[:, 1])), None

        starts = jnp.arange(x.size // _RUN, dtype=jnp.int32) * _RUN
        nothing = (jnp.zeros(BINS, jnp.uint32),) * 3
        (*columns, high), _ = lax.scan(step, nothing, (x.reshape(-1, _RUN), starts))
        table = jnp.stack(columns, axis=1)
    return Histogram(table, high, _largest(x))


def _largest(x: Array) -> Array:
    """Return the largest bit pattern of a valid importance."""
    x = x.astype(jnp.float32)
    largest = jnp.max(x)

    def among_integers() -> Array:
        return lax.bitcast_convert_type(jnp.max(importances(x)[0]), jnp.uint32)

    # The maximum of floats takes a tenth of the time, but XLA flushes subnormals to 0, and entries may be invalid.
    plain = jnp.isfinite(largest) & (largest > 0)
    return lax.cond(plain, lambda: lax.bitcast_convert_type(largest, jnp.uint32), among_integers)


def _run(x: Array, size: Array) -> tuple[Array, Array]:
    """Count the first `size` of x [M], at most _RUN weights; return the table and the high words of the positions."""
    return in_turn_or_at_once(_by_pieces, _by_one_scatter, x, size)


def _by_pieces(x: Array, size: Array) -> tuple[Array, Array]:
    pieces = x.reshape(-1, _PIECE)
    last = (size + (_PIECE - 1)) >> _PIECE_BITS

    def over_pieces(table: Array, update: Callable[[Array], Array]) -> Array:
        def count(index: Array, table: Array) -> Array:
            found = patterns(lax.dynamic_index_in_dim(pieces, index, keepdims=False))
            return table.at[bins_of(found)].add(update(found), mode="promise_in_bounds")

        return lax.fori_loop(0, last, count, table)

    def count_and_place(found: Array) -> Array:
        return jnp.stack([jnp.ones_like(found), found & ((1 << PLACE_BITS) - 1)], axis=1)

    def digits(shift: int, width: int) -> Array:
        return over_pieces(jnp.zeros(BINS, jnp.uint32), lambda found: _digits(found, shift, width))

    # The last piece is padded with zeros, so their bin starts at minus that many.
    padding = (size - last * _PIECE).astype(jnp.uint32)
    table = over_pieces(jnp.zeros((BINS, 2), jnp.uint32).at[ZERO_BIN, 0].set(padding), count_and_place)
    return table, _high_words(x.size, table, digits)


def _by_one_scatter(x: Array, size: Array) -> tuple[Array, Array]:
    """Count x [...] in its own shape, since reshaping an array that lies in parts would gather it."""
    found = patterns(x)
    at, none = bins_of(found), jnp.zeros(BINS, jnp.uint32)

    def over_all(table: Array, update: Array) -> Array:
        return table.at[at].add(update, mode="promise_in_bounds")

    counts = over_all(none.at[ZERO_BIN].set((size - x.size).astype(jnp.uint32)), jnp.ones_like(found))
    places = over_all(none, found & ((1 << PLACE_BITS) - 1))
    table = jnp.stack([counts, places], axis=1)
    return table, _high_words(x.size, table, lambda *digit: over_all(none, _digits(found, *digit)))


def _high_words(size: int, table: Array, digits: Callable[[int, int], Array]) -> Array:
    """Return the multiples of 2^32 in the sums of positions, which only crowded bins have.

    Args:
        size: maximum number of weights.
        digits: `digits(shift, width)` sums the `width` bits of the positions from bit `shift` on, for each bin.
    """
    if size <= _UNCROWDED:
        return jnp.zeros((), jnp.uint32)
    counts, places = table[:, 0], table[:, 1]
    width = 32 - size.bit_length()  # this many bits of all positions sum to less than a word

    def carried() -> Array:
        low, high = jnp.zeros_like(places), jnp.zeros_like(places)
        for shift in range(width, PLACE_BITS, width):
            found = digits(shift, width)
            low, high = add_words(low, high + (found >> (32 - shift)), found << shift)
        # The lowest bits add less than 2^32, which shows as a carry.
        return high + (places < low).astype(jnp.uint32)

    return lax.cond(jnp.max(counts) > _UNCROWDED, carried, lambda: jnp.zeros_like(places))


def _digits(found: Array, shift: int, width: int) -> Array:
    return ((found & ((1 << PLACE_BITS) - 1)) >> shift) & ((1 << width) - 1)


def _in_place(x: Array) -> Histogram:
    """Count under XLA's partitioner, which counts each part on its device."""
    return Histogram(*_by_one_scatter(x, jnp.asarray(x.size, jnp.int32)), _largest(x))


def _in_parts(x: Array, mesh: Any, spec: tuple[Any, ...]) -> Histogram:
    """Count each part on its device, and add the tables by all-reduces."""
    axes = tuple(axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis)

    by_device = partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec(*spec), out_specs=PartitionSpec(), check_vma=False
    )

    @by_device
    def count(part: Array) -> Histogram:
        found = _in_pieces(part.reshape(-1), part.size)
        # Halves of words, whose sums over devices have no carries.
        counts, places = found.table[:, 0], found.table[:, 1]
        counts, lower, upper = lax.psum((counts, places & 0xFFFF, (places >> 16) + (found.high << 16)), axes)
        places, high = add_words(upper << 16, upper >> 16, lower)
        return Histogram(jnp.stack([counts, places], axis=1), high, lax.pmax(found.largest, axes))

    return count(x)
