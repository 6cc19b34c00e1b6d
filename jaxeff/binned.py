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
_PIECE = 1 << 18
_RUN = 4  # the places of so many pieces sum to less than 2^32


class Bins(NamedTuple):
    """What one pass keeps of an array, of whatever size. Bins ascend; weights are over a power of two."""

    held: Array  # [BINS], how many positive weights
    place: Array  # [BINS], their mean place in the bin, from 0 to 1
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
    held, zeros, lost = counts[:_BINS], counts[_BINS] - padding, counts[_BINS + 1]
    width = (1 << jnp.minimum(shift, _PLACE_BITS)).astype(jnp.float32)
    place = places[:_BINS] / (jnp.maximum(held, 1).astype(jnp.float32) * width)
    bins = Bins(held, place, jnp.stack([first, shift, smallest, largest, zeros, lost]))
    limits = [*map(_pattern_at_least, THRESHOLDS), *_relative_limits(bins, x.size - padding)]
    # Behind the barrier the patterns are made again; XLA would keep those of the first pass in memory.
    below = _below(lax.optimization_barrier(x), jnp.stack(limits)) + zeros
    return bins._replace(integers=jnp.concatenate([bins.integers, below]))


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
    """[4], how many positive weights lie below each limit."""
    bits = _patterns(x.reshape(-1))
    hits = [((bits > 0) & (bits < limit) & (bits < _INFINITY)).astype(jnp.int32) for limit in limits]
    return jnp.stack(_across(jnp.add, *hits))


def _across(operation: Callable[[Array, Array], Array], *lanes: Array) -> list[Array]:
    """The operation over each array [N] of non-negative integers, all in one pass."""
    both = lambda a, b: tuple(map(operation, a, b))  # noqa: E731
    return list(lax.reduce(lanes, (np.int32(0),) * len(lanes), both, (0,)))


def _scattered(x: Array, where: Array) -> tuple[Array, Array]:
    """Of each bin, and of zeros and what is no number: how many, and the sum of their places in it.

    Args:
        x: [...].
        where: [2], the pattern at which the first bin begins, and the shift.
    """
    first, shift = where
    flat, length = x.reshape(-1), min(x.size, _PIECE)
    pieces = -(-x.size // length)
    coarse = jnp.maximum(shift - _PLACE_BITS, 0)

    def count(index: Array, table: Array) -> Array:
        # The last piece begins early, and leaves out what the one before it has counted.
        start = jnp.minimum(index * length, x.size - length)
        bits = _patterns(lax.dynamic_slice(flat, (start,), (length,)))
        bits = jnp.where(lax.iota(jnp.int32, length) >= index * length - start, bits, 0)
        offset = bits - first
        key = jnp.where(bits > 0, jnp.where(bits < _INFINITY, offset >> shift, _BINS + 1), _BINS)
        place = ((offset & ((1 << shift) - 1)) >> coarse).astype(jnp.uint32)
        updates = jnp.stack([jnp.ones_like(place), place], axis=1)
        return table.at[key].add(updates, mode="promise_in_bounds")

    def run(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start, stop = index * _RUN, jnp.minimum((index + 1) * _RUN, pieces)
        table = lax.fori_loop(start, stop, count, jnp.zeros((_BINS + 2, 2), jnp.uint32))
        return sums[0] + table[:, 0].astype(jnp.int32), sums[1] + table[:, 1].astype(jnp.float32)

    none = jnp.zeros(_BINS + 2, jnp.int32), jnp.zeros(_BINS + 2, jnp.float32)
    counts, places = lax.fori_loop(np.int32(0), np.int32(-(-pieces // _RUN)), run, none)
    return counts.at[_BINS].add(x.size - pieces * length), places


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
    mass = pairs.multiply(_pair(bins.held), _single(y))
    before, below, total = _earlier(bins.held, mass)
    mean = pairs.divide(total, n.pair)
    spread = _spread(bins, y, before, total, mean, n)
    sparsities = bins.below.astype(jnp.float32) / n.float
    known = {
        **_information(spread, n),
        **_coverages(bins, y, mass, before, below, total, n),
        **dict(zip(_SPARSITIES, sparsities, strict=True)),
        "gini": jnp.where(spread.even, 0, spread.gini),
        "mean": pairs.unscale(mean[0], rise),
        "std": pairs.unscale(jnp.where(spread.even, 0, jnp.sqrt(spread.variance)), rise),
        "max": pairs.float_of(bins.largest),
    }
    return _by_convention(known, bins, n)


def distribute(bins: Bins, size: int | Array) -> Array:
    """How the weights are spread, as `distribution.of` has it; each bin is in one cell with its mean."""
    cells = distribution.of(_weights(bins)[0], bins.held, size)
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
    total = jnp.sum(jnp.sum((bins.held.astype(jnp.float32) * y).reshape(_SIDE, _SIDE), 1))
    mean = total / jnp.asarray(size).astype(jnp.float32)
    return [_pattern_not_below(mean * (threshold * TIE), rise) for threshold in THRESHOLDS]


def _pattern_not_below(limit: Array, rise: Array) -> Array:
    """Of the smallest float that is not below limit 2^-rise; subnormal ones are far apart."""
    nearest = pairs.bits_of(pairs.unscale(limit, rise))
    return nearest + (pairs.scale(nearest, rise, jnp.float32) < limit)


def _weights(bins: Bins) -> tuple[Array, Array]:
    """The mean weight of each bin times 2^rise, the largest in [1, 2); and the rise."""
    rise = -pairs.exponent(bins.largest, jnp.float32)
    starts = bins.first + (jnp.arange(_BINS + 1, dtype=jnp.int32) << bins.shift)
    # Patterns that overflow belong to bins beyond the largest weight, which are empty.
    edges = pairs.scale(jnp.where(starts < bins.first, bins.largest, starts), rise, jnp.float32)
    return jnp.where(bins.held > 0, edges[:-1] + bins.place * (edges[1:] - edges[:-1]), 0), rise


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


def _earlier(counts: Array, values: Pair) -> tuple[Array, Pair, Pair]:
    """[BINS], the sums of the counts and of the values before each; and that of all values."""

    def add(sums: tuple[Array, Pair], row: tuple[Array, Pair]) -> tuple[Any, Any]:
        return (sums[0] + row[0], pairs.add(sums[1], row[1])), sums

    columns = jax.tree.map(lambda part: part.reshape(_SIDE, _SIDE).T, (counts, values))
    none = jnp.zeros(_SIDE, jnp.int32), _single(jnp.zeros(_SIDE, jnp.float32))
    rows, inside = lax.scan(add, none, columns)
    (_, total), above = lax.scan(add, jax.tree.map(lambda part: part[0], none), rows)
    above = jax.tree.map(lambda part: part[None], above)
    before, (high, low) = inside[0] + above[0], pairs.add(inside[1], above[1])
    return before.T.ravel(), (high.T.ravel(), low.T.ravel()), total


def _sums(terms: list[Array]) -> list[Pair]:
    """Of arrays [BINS] each."""
    stacked = jnp.stack(terms).reshape(len(terms), _SIDE, _SIDE)

    def add(row: Array, sums: Pair) -> Pair:
        high, error = pairs.two_sum(sums[0], lax.dynamic_index_in_dim(stacked, row, 1, keepdims=False))
        return high, sums[1] + error

    none = jnp.zeros((len(terms), _SIDE), jnp.float32)
    return list(zip(*pairs.reduce(lax.fori_loop(0, _SIDE, add, (none, none))), strict=True))


def _spread(bins: Bins, y: Array, before: Array, total: Pair, mean: Pair, size: _Size) -> _Spread:
    weight, empty = bins.held.astype(jnp.float32), bins.zeros.astype(jnp.float32)
    top, center = y.max(), mean[0]
    # Not 0, to which XLA on a CPU flushes the smallest quotients: their logarithm is a number.
    surprise = -y * jnp.log(jnp.where(y > 0, jnp.maximum(y / top, jnp.finfo(jnp.float32).tiny), 1))
    terms = [
        weight * excess_over_mean(y, center),
        weight * jnp.square(y - center),
        weight * surprise,
    ]
    uneven, squares, surprises, balance = _sums([*terms, _balances(bins, y, before, size)])
    return _Spread(
        divergence=(uneven[0] + empty) / size.float,
        entropy=jnp.log(total[0] / top) + pairs.divide(surprises, total)[0],
        variance=(squares[0] + empty * jnp.square(center)) / size.float,
        gini=pairs.divide(balance, total)[0] / size.float,
        even=(bins.smallest == bins.largest) & (bins.zeros == 0),
    )


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


def _balances(bins: Bins, y: Array, before: Array, size: _Size) -> Array:
    """Of each bin, the weights above the smallest times how many are smaller, less how many are larger."""
    smaller = before + bins.zeros + bins.invalid
    balance = (smaller - (size.int - smaller - bins.held)).astype(jnp.float32)
    least = jnp.where(bins.zeros > 0, 0, jnp.where(bins.held > 0, y, jnp.inf).min())
    return bins.held.astype(jnp.float32) * balance * (y - least)


def _coverages(
    bins: Bins, y: Array, mass: Pair, before: Array, below: Pair, total: Pair, size: _Size
) -> dict[str, Array]:
    """k / N: all weights of the bins above the one in which the share is reached, and some of its own."""

    def covered(high: Array, low: Array) -> Array:
        # Weights that are not needed sum to so much, at most.
        spare = pairs.multiply(total, (high, low))
        at = pairs.count((below[0] - spare[0]) + (below[1] - spare[1]) <= 0) - 1
        reached = pairs.add((below[0][at], below[1][at]), (mass[0][at], mass[1][at]))
        missing = pairs.divide(pairs.add(reached, (-spare[0], -spare[1])), _single(y[at]))
        above = size.int - bins.zeros - bins.invalid - before[at] - bins.held[at]
        needed = above + jnp.clip(_ceil(missing), 1, bins.held[at])
        return needed.astype(jnp.float32) / size.float

    shares = [pairs.constant(1 - share * TIE, jnp.float32) for share in COVERAGES.values()]
    found = jax.vmap(covered)(*(jnp.stack(parts) for parts in zip(*shares, strict=True)))
    return dict(zip(COVERAGES, found, strict=True))


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
