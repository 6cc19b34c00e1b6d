"""The metrics of a large array from counts of its bit patterns, instead of from its order.

A non-negative float's bit pattern is ordered as the float is. The patterns between the smallest and the
largest are cut into at most 2^16 bins, at most 2^-8 wide relative to what they hold, and as narrow as the
range allows: of nearly equal weights each bin is one float. A bin keeps how many weights it holds, and
the sum of their places in it. What the weights of one bin differ by is left out, so that arrays of few
distinct values are exact and others good to 1e-6. One pass of a few ns a weight on a CPU, where sorting
takes 100. Imports `distribution`, `exact`, `pairs`, `sharded`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff import distribution, pairs
from jaxeff.exact import COVERAGES, TIE, Metrics, excess_over_mean, float_at_least
from jaxeff.pairs import Pair
from jaxeff.sharded import everywhere

THRESHOLDS = (1e-2, 1e-3)
_SPARSITIES = ("sparsity_1e2", "sparsity_1e3", "relative_sparsity_1e2", "relative_sparsity_1e3")

_SIDE = 1 << 8
_BINS = _SIDE * _SIDE
_PLACE_BITS = 12
_PIECE = 1 << 13
_RUN = 1 << 20  # the places of so many weights sum to less than 2^32
_COPIES = 32  # of the table, on an accelerator, where additions to one address wait for each other


class Bins(NamedTuple):
    """What one pass keeps of an array, of whatever size.

    Bins ascend down each column, and from one column to the next, so that sums run over whole rows.
    """

    held: Array  # [SIDE, SIDE], how many positive weights
    place: Array  # [SIDE, SIDE], their mean place in the bin, from 0 to 1
    integers: Array  # [10], in one array, which compiles faster than ten

    @property
    def first(self) -> Array:
        """[], the pattern at which the first bin begins."""
        return self.integers[0]

    @property
    def shift(self) -> Array:
        """[], a bin is 2^shift patterns wide."""
        return self.integers[1]

    @property
    def smallest(self) -> Array:
        """[], the smallest pattern of a positive weight."""
        return self.integers[2]

    @property
    def largest(self) -> Array:
        return self.integers[3]

    @property
    def zeros(self) -> Array:
        return self.integers[4]

    @property
    def invalid(self) -> Array:
        return self.integers[5]

    @property
    def below(self) -> Array:
        """[4], weights below 1e-2, 1e-3, and these of the mean."""
        return self.integers[6:]


def summarize(x: Array) -> Metrics:
    """As `metrics.summarize`, of an array of up to 2^31 - 1 weights.

    >>> float(summarize(jnp.array([4.0, 3.0, 2.0, 1.0])).coverage_90)
    0.75
    """
    return summarize_bins(count(x), x.size)


def count(x: Array, size: int | Array | None = None) -> Bins:
    """The bins of x [...], counted where it lies; or of its first `size` entries, where the others are 0."""
    padding = 0 if size is None else x.size - size
    largest, smallest = _extremes(x)
    smallest = jnp.where(largest > 0, _INFINITY - smallest, 0)
    # Bins begin at multiples of their width: none reaches over a power of two, so that in each the floats
    # are evenly spaced. One spare bit, for the first bin may begin before the smallest weight.
    shift = jnp.maximum(33 - lax.clz(largest - smallest) - 16, 0)
    first = (smallest >> shift) << shift
    counts, places = _scatter(x, jnp.stack([first, shift]))
    held, places = (part[:_BINS].reshape(_SIDE, _SIDE).T for part in (counts, places))
    width = (1 << jnp.minimum(shift, _PLACE_BITS)).astype(jnp.float32)
    place = places / (jnp.maximum(held, 1).astype(jnp.float32) * width)
    zeros = counts[_BINS] - padding
    bins = Bins(held, place, jnp.stack([first, shift, smallest, largest, zeros]))
    limits = [*map(_pattern_at_least, THRESHOLDS), *_relative_limits(bins, x.size - padding)]
    # Behind the barrier the patterns are made again; XLA would keep those of the first pass in memory.
    counted = _below(lax.optimization_barrier(x), jnp.stack(limits))
    return bins._replace(integers=jnp.concatenate([bins.integers, counted[:1], counted[1:] + zeros]))


_INFINITY = 0x7F800000


def _patterns(x: Array) -> Array:
    """Bit patterns; infinity's for what is no importance."""
    bits = pairs.bits_of(x.astype(jnp.float32))
    bits = jnp.where(bits == jnp.iinfo(jnp.int32).min, 0, bits)  # -0.0
    return jnp.where((bits < 0) | (bits > _INFINITY), _INFINITY, bits)


def _most(x: Array) -> Array:
    """[2], the largest pattern, and the largest of positive ones' taken from infinity's."""
    bits = _patterns(x.reshape(-1))
    # No pattern of a number is 0 in either.
    valid = jnp.where(bits < _INFINITY, bits, 0)
    return jnp.stack(_across(jnp.maximum, valid, jnp.where(valid > 0, _INFINITY - valid, 0)))


def _counts_below(x: Array, limits: Array) -> Array:
    """[5], how many are no importances, and how many positive weights lie below each limit."""
    bits = _patterns(x.reshape(-1))
    hits = [bits == _INFINITY, *((bits > 0) & (bits < limit) & (bits < _INFINITY) for limit in limits)]
    return jnp.stack(_across(jnp.add, *(hit.astype(jnp.int32) for hit in hits)))


def _across(operation: Callable[[Array, Array], Array], *lanes: Array) -> list[Array]:
    """The operation over each array [N] of non-negative integers, all in one pass."""
    both = lambda a, b: tuple(map(operation, a, b))  # noqa: E731
    return list(lax.reduce(lanes, (np.int32(0),) * len(lanes), both, (0,)))


def _scattered(x: Array, where: Array) -> tuple[Array, Array]:
    """Of each bin, and of zeros: how many, and the sum of their places in it. What is no number is anywhere.

    Args:
        x: [...].
        where: [2], the pattern at which the first bin begins, and the shift.
    """
    first, shift = where.astype(jnp.uint32)
    flat, length, copies = x.reshape(-1), _piece(x.size), 1 if pairs.in_rows() else _COPIES
    pieces = -(-x.size // length)
    per_run = max(_RUN * copies // length, 1)
    coarse = jnp.maximum(shift, _PLACE_BITS) - _PLACE_BITS

    def count(index: Array, table: Array) -> Array:
        # The last piece may begin early, and leaves out what the one before it has counted.
        start = jnp.minimum(index * length, x.size - length)
        bits = _unsigned(lax.dynamic_slice(flat, (start,), (length,)))
        if x.size % length:
            bits = jnp.where(lax.iota(jnp.int32, length) >= index * length - start, bits, 0)
        offset = bits - first
        key = jnp.where(bits << 1 == 0, _BINS, jnp.minimum(offset >> shift, _BINS - 1))
        place = (offset & ((np.uint32(1) << shift) - 1)) >> coarse
        if copies > 1:
            key = key + lax.rem(lax.iota(jnp.uint32, length), np.uint32(copies)) * np.uint32(_BINS + 1)
        return table.at[key].add(jnp.stack([jnp.ones_like(place), place], axis=1), mode="promise_in_bounds")

    def run(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        table = jnp.zeros((copies * (_BINS + 1), 2), jnp.uint32)
        if pairs.in_rows():
            start, stop = index * per_run, jnp.minimum((index + 1) * per_run, pieces)
            table = lax.fori_loop(start, stop, count, table)
        else:
            table = count(index, table)
        table = table.reshape(copies, _BINS + 1, 2)
        counts = table[..., 0].astype(jnp.int32).sum(axis=0, dtype=jnp.int32)
        return sums[0] + counts, sums[1] + table[..., 1].astype(jnp.float32).sum(axis=0)

    none = jnp.zeros(_BINS + 1, jnp.int32), jnp.zeros(_BINS + 1, jnp.float32)
    counts, places = lax.fori_loop(np.int32(0), np.int32(-(-pieces // per_run)), run, none)
    return counts.at[_BINS].add(x.size - pieces * length), places


def _piece(size: int) -> int:
    """How many weights at a time: on a CPU so few that XLA wakes no other thread, which takes longer than
    to count; elsewhere all that the copies of the table can hold."""
    if not pairs.in_rows():
        return min(size, _RUN * _COPIES)
    return max((length for length in range(2048, _PIECE) if size % length == 0), default=min(size, _PIECE))


def _unsigned(x: Array) -> Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _total(sums: Any, axes: tuple[str, ...], _: int) -> Any:
    return lax.psum(sums, axes)


def _total_most(most: Array, axes: tuple[str, ...], _: int) -> Array:
    return lax.pmax(most, axes)


_extremes = everywhere(_most, _total_most)
_scatter = everywhere(_scattered, _total)
_below = everywhere(_counts_below, _total)


def summarize_bins(bins: Bins, size: int | Array) -> Metrics:
    """The metrics of an array of `size` weights, which may be traced."""
    n = _Size.of(size)
    y, rise = _weights(bins)
    before, below, total = _earlier(*_columns(bins.held, y))
    mean = pairs.divide(total, n.pair)
    spread = _spread(bins, y, before, total, mean, n)
    sparsities = bins.below.astype(jnp.float32) / n.float
    known = {
        **_information(spread, n),
        **_coverages(bins, y, before, below, total, n),
        **dict(zip(_SPARSITIES, sparsities, strict=True)),
        "gini": jnp.where(spread.even, 0, spread.gini),
        "mean": pairs.unscale(mean[0], rise),
        "std": pairs.unscale(jnp.where(spread.even, 0, jnp.sqrt(spread.variance)), rise),
        "max": pairs.float_of(bins.largest),
    }
    return _by_convention(known, bins, n)


def distribute(bins: Bins, size: int | Array) -> Array:
    """How the weights are spread, as `distribution.of` has it; each bin is in one cell with its mean."""
    cells = distribution.of(_weights(bins)[0].ravel(), bins.held.ravel(), size)
    return jnp.where(bins.invalid > 0, jnp.nan, cells)


class _Size(NamedTuple):
    """N, as an integer, a float, a pair and a logarithm."""

    int: int | Array
    float: Array
    pair: Pair
    log: Array

    @staticmethod
    def of(size: int | Array) -> _Size:
        integer = jnp.asarray(size, jnp.int32)
        exact = integer.astype(jnp.float32)
        return _Size(integer, exact, _pair(integer), jnp.log(exact))


def _pattern_at_least(threshold: float) -> Array:
    return pairs.bits_of(float_at_least(threshold, jnp.float32))


def _relative_limits(bins: Bins, size: int | Array) -> list[Array]:
    """The patterns of 1e-2 and 1e-3 of the mean."""
    y, rise = _weights(bins)
    total = jnp.sum(jnp.sum(bins.held.astype(jnp.float32) * y, 0))
    mean = total / jnp.asarray(size).astype(jnp.float32)
    return [_pattern_not_below(mean * (threshold * TIE), rise) for threshold in THRESHOLDS]


def _pattern_not_below(limit: Array, rise: Array) -> Array:
    """Of the smallest float that is not below limit 2^-rise; subnormal ones are far apart."""
    nearest = pairs.bits_of(pairs.unscale(limit, rise))
    return nearest + (pairs.scale(nearest, rise, jnp.float32) < limit)


def _weights(bins: Bins) -> tuple[Array, Array]:
    """The mean weight of each bin times 2^rise, the largest in [1, 2); and the rise."""
    rise = -pairs.exponent(bins.largest, jnp.float32)
    row, column = (lax.broadcasted_iota(jnp.int32, (_SIDE, _SIDE), axis) for axis in (0, 1))
    start = bins.first + ((column * _SIDE + row) << bins.shift)
    # Patterns that overflow belong to bins beyond the largest weight, which are empty.
    edges = (jnp.where(at < bins.first, bins.largest, at) for at in (start, start + (1 << bins.shift)))
    low, high = (pairs.scale(edge, rise, jnp.float32) for edge in edges)
    return jnp.where(bins.held > 0, low + bins.place * (high - low), 0), rise


class _Spread(NamedTuple):
    divergence: Array  # ln N - H
    entropy: Array
    variance: Array
    gini: Array
    even: Array


def _pair(counts: Array) -> Pair:
    """Integers as pairs of floats, exactly."""
    return pairs.fast_two_sum((counts & ~0xFFF).astype(jnp.float32), (counts & 0xFFF).astype(jnp.float32))


def _single(values: Array) -> Pair:
    return values, jnp.zeros_like(values)


def _mass(held: Array, y: Array) -> Pair:
    return pairs.multiply(_pair(held), _single(y))


def _columns(held: Array, y: Array) -> tuple[Array, Pair]:
    """[SIDE], the count and the mass of each column."""
    if not pairs.in_rows():
        return jnp.sum(held, axis=0, dtype=held.dtype), pairs.reduce(_mass(held, y), axis=0)

    def add(row: Array, sums: tuple[Array, Pair]) -> tuple[Array, Pair]:
        return sums[0] + held[row], pairs.add(sums[1], _mass(held[row], y[row]))

    none = jnp.zeros(_SIDE, jnp.int32), _single(jnp.zeros(_SIDE, jnp.float32))
    return lax.fori_loop(0, _SIDE, add, none)


def _earlier(counts: Array, masses: Pair) -> tuple[Array, Pair, Pair]:
    """Sums of the counts [SIDE, ...] and the masses before each, along the first axis; and of all masses."""

    def add(sums: tuple[Array, Pair], row: tuple[Array, Pair]) -> tuple[Any, Any]:
        return (sums[0] + row[0], pairs.add(sums[1], row[1])), sums

    if not pairs.in_rows():
        fewer, below = jnp.cumsum(counts, axis=0, dtype=counts.dtype) - counts, pairs.sums_before(masses)
        return fewer, below, pairs.reduce(masses, axis=0)
    none = jax.tree.map(lambda part: jnp.zeros_like(part[0]), (counts, masses))
    (_, total), (before, below) = lax.scan(add, none, (counts, masses))
    return before, below, total


def _spread(bins: Bins, y: Array, before: Array, total: Pair, mean: Pair, size: _Size) -> _Spread:
    """
    Args:
        before: [SIDE], how many positive weights are in the columns before each.
    """
    held, empty, top, center = bins.held.astype(jnp.float32), bins.zeros.astype(jnp.float32), y.max(), mean[0]
    # Not 0, to which XLA on a CPU flushes the smallest quotients: their logarithm is a number.
    surprise = -y * jnp.log(jnp.where(y > 0, jnp.maximum(y / top, jnp.finfo(jnp.float32).tiny), 1))
    terms = excess_over_mean(y, center), jnp.square(y - center), surprise, _balances(bins, y, before, size)
    uneven, squares, surprises, balance = _sums([held * term for term in terms])
    return _Spread(
        divergence=(uneven[0] + empty) / size.float,
        entropy=jnp.log(total[0] / top) + pairs.divide(surprises, total)[0],
        variance=(squares[0] + empty * jnp.square(center)) / size.float,
        gini=pairs.divide(balance, total)[0] / size.float,
        even=(bins.smallest == bins.largest) & (bins.zeros == 0),
    )


def _balances(bins: Bins, y: Array, before: Array, size: _Size) -> Array:
    """Of each bin, the weights above the smallest times how many are smaller, less how many are larger."""
    smaller = _running(before, bins.held) + bins.zeros
    balance = (smaller - (size.int - smaller - bins.held)).astype(jnp.float32)
    least = jnp.where(bins.zeros > 0, 0, jnp.where(bins.held > 0, y, jnp.inf).min())
    return balance * (y - least)


def _running(start: Array, rows: Array) -> Array:
    """[ROWS, ...], the start and the rows before each."""
    if not pairs.in_rows():
        return start[None] + jnp.cumsum(rows, axis=0, dtype=rows.dtype) - rows
    return lax.scan(lambda sums, row: (sums + row, sums), start, rows)[1]


def _sums(terms: list[Array]) -> list[Pair]:
    """Of arrays [SIDE, SIDE] each."""
    if not pairs.in_rows():
        flat = jnp.stack(terms).reshape(len(terms), -1)
        return list(zip(*pairs.reduce(_single(flat)), strict=True))
    stacked = jnp.stack(terms, axis=1)

    def add(row: Array, sums: Pair) -> Pair:
        high, error = pairs.two_sum(sums[0], stacked[row])
        return high, sums[1] + error

    none = _single(jnp.zeros((len(terms), _SIDE), jnp.float32))
    return list(zip(*pairs.reduce(lax.fori_loop(0, _SIDE, add, none)), strict=True))


def _information(spread: _Spread, size: _Size) -> dict[str, Array]:
    """As in `exact`: of H and ln N - H, the smaller is a sum of terms of one sign, and leads."""
    most, scale = size.log, jnp.where(size.int > 1, size.log, 1)
    divergence = jnp.where(spread.even, 0, spread.divergence)
    shannon = jnp.maximum(spread.entropy, 0)
    lead = divergence <= shannon
    missing = jnp.where(lead, divergence, most - shannon)
    entropy = jnp.where(lead, most - divergence, shannon)
    used = jnp.exp(-missing)
    return {
        "entropy": entropy,
        "normalized_entropy": jnp.where(lead, 1 - missing / scale, entropy / scale),
        "effective_params": jnp.where(lead, size.float * used, jnp.exp(entropy)),
        "utilization": jnp.where(lead, used, jnp.exp(entropy) / size.float),
        "redundancy": missing / scale,
    }


def _coverages(
    bins: Bins, y: Array, before: Array, below: Pair, total: Pair, size: _Size
) -> dict[str, Array]:
    """k / N: all weights of the bins above the one in which the share is reached, and some of its own.

    Args:
        before: [SIDE], how many positive weights are in the columns before each.
        below: [SIDE], what these sum to.
    """
    high, low = zip(
        *(pairs.constant(1 - share * TIE, jnp.float32) for share in COVERAGES.values()), strict=True
    )
    # Weights that are not needed sum to so much, at most.
    spare = pairs.multiply(total, (jnp.stack(high), jnp.stack(low)))

    def reached(below: Pair) -> Array:
        """The last along the first axis below which there is no more than can be spared."""
        within = (below[0] - spare[0][None]) + (below[1] - spare[1][None]) <= 0
        return jnp.sum(within, axis=0, dtype=jnp.int32) - 1

    column = reached((below[0][:, None], below[1][:, None]))
    held, y = bins.held[:, column], y[:, column]
    mass = _mass(held, y)
    inside, within, _ = _earlier(held, mass)
    within = pairs.add((below[0][None, column], below[1][None, column]), within)
    row, share = reached(within), jnp.arange(len(COVERAGES))
    last = pairs.add(
        (within[0][row, share], within[1][row, share]), (mass[0][row, share], mass[1][row, share])
    )
    missing = pairs.divide(pairs.add(last, (-spare[0], -spare[1])), _single(y[row, share]))
    held = held[row, share]
    above = size.int - bins.zeros - before[column] - inside[row, share] - held
    needed = above + jnp.clip(_ceil(missing), 1, held)
    return dict(zip(COVERAGES, needed.astype(jnp.float32) / size.float, strict=True))


def _ceil(value: Pair) -> Array:
    high = jnp.ceil(value[0])
    return (high + jnp.where(high == value[0], jnp.ceil(value[1]), 0)).astype(jnp.int32)


_DEAD = {"effective_params": 0.0, "utilization": 0.0, "redundancy": 1.0, "mean": 0.0, "std": 0.0, "max": 0.0}


def _by_convention(known: dict[str, Array], bins: Bins, size: _Size) -> Metrics:
    """What stands for a layer that is all zero, or holds what is no importance."""
    alive = bins.largest > 0
    values: dict[str, Array] = {}
    for name, value in known.items():
        dead = 1.0 if name.startswith("relative") else _DEAD.get(name, math.nan)
        kept = value if name.startswith("sparsity") else jnp.where(alive, value, dead)
        values[name] = jnp.where(bins.invalid > 0, jnp.nan, kept)
    return Metrics(**values, zeros=bins.zeros, nonfinite=bins.invalid, size=jnp.asarray(size.int, jnp.int32))
