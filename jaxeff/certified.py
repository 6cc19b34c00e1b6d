"""Metrics and their certified bounds, from the sums of a sketch and what these leave open."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff import bins, moments, pairs
from jaxeff.exact import COVERAGES, TIE, Metrics
from jaxeff.moments import Found, Sums, Whole, at, exceeds, less, single, stacked
from jaxeff.pairs import Pair

if TYPE_CHECKING:
    from jaxeff.sketch import Refinement, Sketch


RELATIVE = {"relative_sparsity_1e2": 1e-2, "relative_sparsity_1e3": 1e-3}
_DEAD = {"effective_params": 0, "utilization": 0, "redundancy": 1, "mean": 0, "std": 0, "max": 0}
_ROUNDED = 2.0**-23  # of a number up to 1, twice over
_SAFE = 1 + 2.0**-10  # for the rounding of the bounds themselves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far each float field of `Metrics` may be from exact arithmetic on the same weights.

    Relative to the exact value for effective_params, mean, std and max, which have a unit; absolute for
    the others. A mean or std below the smallest normal float32 is besides rounded, by 2^-150 at most. 0
    where a metric stands by convention, infinite where the sketch leaves it open.
    """

    entropy: Array
    normalized_entropy: Array
    effective_params: Array
    utilization: Array
    redundancy: Array
    gini: Array
    coverage_50: Array
    coverage_80: Array
    coverage_90: Array
    sparsity_1e2: Array
    sparsity_1e3: Array
    relative_sparsity_1e2: Array
    relative_sparsity_1e3: Array
    mean: Array
    std: Array
    max: Array


class Known(NamedTuple):
    """Numbers and their largest errors."""

    value: Array
    error: Array


def certify(
    sketch: Sketch, whole: Whole, places: Places, refinement: Refinement | None
) -> tuple[Metrics, Bounds]:
    sums = moments.sums_of(sketch, whole, refinement)
    known = {
        **_information(sketch, whole, sums),
        **_unevenness(sketch, whole, sums),
        **_positions(sketch, whole, places, refinement),
    }
    return _by_convention(sketch, whole, known)


def _by_convention(sketch: Sketch, whole: Whole, known: dict[str, Known]) -> tuple[Metrics, Bounds]:
    invalid, invalid_high = sketch.sums[-1, 0, 0], sketch.high[-1, 0] >> 24
    valid, alive = (invalid | invalid_high) == 0, whole.total[0] > 0
    values, errors = {}, {}
    for name, (value, error) in known.items():
        dead = 1 if "sparsity" in name else _DEAD.get(name, math.nan)
        values[name] = jnp.where(valid, jnp.where(alive, value, np.float32(dead)), jnp.nan)
        errors[name] = jnp.where(valid & alive, error * _SAFE, 0)
    return (
        Metrics(
            **values,
            zeros=_capped(sketch.sums[-1, 1, 0], sketch.high[-1, 1] >> 24),
            nonfinite=_capped(invalid, invalid_high),
            size=_capped(sketch.tallies[0, 0], sketch.tallies[0, 1]),
        ),
        Bounds(**errors),
    )


def _capped(low: Array, high: Array) -> Array:
    most = np.uint32(2**31 - 1)
    return jnp.where(high > 0, most, jnp.minimum(low, most)).astype(jnp.int32)


def is_even(sketch: Sketch, whole: Whole) -> Array:
    """Whether all weights are known to be equal."""
    return (whole.zeros[0] == 0) & (moments.least_of(sketch) == moments.largest_of(sketch))


def _information(sketch: Sketch, whole: Whole, sums: Sums) -> dict[str, Known]:
    """H = ln (S / unit) + depth ln 2 - sum p ln (x / unit of its row), and its complement to ln N."""
    none, total = single(jnp.zeros_like(whole.slip)), whole.total[0]
    estimate, doubt = _surprise(sketch, whole, sums)
    (total_octaves, total_rest), (size_octaves, size_rest) = map(_logarithm, (whole.total, whole.size))
    unit_octaves, unit_rest = _logarithm(single(moments.unit_of(sketch, whole)))
    ln_2 = pairs.constant(math.log(2), jnp.float32)
    octaves = pairs.add(pairs.divide(whole.depth, whole.total), single(total_octaves - unit_octaves))
    rest = total_rest - unit_rest - (sums.logarithm + estimate) / total
    entropy = pairs.add(pairs.multiply(octaves, ln_2), single(rest))
    most = pairs.add(pairs.multiply(single(size_octaves), ln_2), single(size_rest))
    missing = pick(is_even(sketch, whole), none, _larger(less(most, entropy), none))
    entropy = _larger(less(most, missing), none)
    used, effective = (jnp.exp(high) * (1 + low) for high, low in ((-missing[0], -missing[1]), entropy))
    effective = jnp.where(missing[0] < entropy[0], whole.size[0] * used, effective)
    scale = jnp.where(whole.size[0] > 1, most[0], 1)
    # Of one sign, but for subnormal weights beside normal ones: ln (x / 512) > -17, and -u ln u < 1 / e.
    count = whole.size[0] * moments.factor_of(whole.last, jnp.int32(0))
    negative = jnp.where(whole.last > 0, jnp.minimum(17 * whole.before[0][1, 1], 512 / math.e * count), 0)
    terms = jnp.abs(sums.logarithm) + 2 * negative
    error = doubt / total + (1 + terms / total) * 2.0**-21
    relative, part = error * (1 + error) + 2.0**-21, error / scale + _ROUNDED
    return {
        "entropy": Known(entropy[0], error + entropy[0] * 2.0**-24),
        "normalized_entropy": Known(1 - missing[0] / scale, part),
        "effective_params": Known(effective, relative),
        "utilization": Known(used, used * relative),
        "redundancy": Known(missing[0] / scale, part),
    }


def _logarithm(value: Pair) -> tuple[Array, Array]:
    """e and ln m of m 2^e, m from 1 to 2."""
    exponent = (pairs.bits_of(value[0]) >> 23) - 127
    return exponent.astype(jnp.float32), jnp.log(value[0] * moments.power(-exponent)) + value[1] / value[0]


def _surprise(sketch: Sketch, whole: Whole, sums: Sums) -> tuple[Array, Array]:
    """Estimate of sum x ln(x / its bin's mean), and its largest error."""
    sure, most = moments.is_sure(sketch), sums.open.surprise
    even = jnp.where(sure, 1, np.float32(1 / 3)) * most
    # A third order of 2^-10 stands beside the second in a normal number's bin.
    more = jnp.where(whole.first > 0, np.float32(2.0**-8), 1)
    doubt = jnp.where(sure, 2.0**-11 * most, (1 + more) * most - even)
    return sums.between.surprise + even, doubt + sums.between.surprise * 2.0**-20


def _unevenness(sketch: Sketch, whole: Whole, sums: Sums) -> dict[str, Known]:
    """Gini and what has the unit of the weights."""
    even, size, rise = is_even(sketch, whole), whole.size[0], 136 - jnp.maximum(whole.last, 1)
    sure, mean, none = moments.is_sure(sketch), whole.mean[0], jnp.zeros_like(size)
    scale, most = size * whole.total[0], sums.open.inequality
    share = jnp.where(sure, 1, np.float32(2 / 3))
    gini = jnp.maximum((sums.balance + sums.between.inequality + share * most) / scale, 0)
    unsure = jnp.where(sure, 0, np.float32(2 / 3))
    square = sums.square + sums.between.square + (1 - unsure) * sums.open.square
    # What bins' means may be off by, from that of all.
    off = mean * jnp.where(size < 2.0**32, np.float32(2.0**-46), np.float32(2.0**-44))
    doubt = unsure * sums.open.square + off * (2 * sums.distance + size * off)
    roots = jnp.sqrt(jnp.stack([jnp.maximum(square - doubt, 0), square + doubt, square]) / size)
    std = roots[2]
    # |s - r| / r = |s^2 - r^2| / (r (r + s)) is largest at either end.
    error = jnp.max(doubt / size / (roots[:2] * (roots[:2] + std))) + 2.0**-20
    largest = lax.bitcast_convert_type(moments.largest_of(sketch), jnp.float32)
    return {
        "gini": Known(jnp.where(even, 0, gini), jnp.where(even, 0, unsure * most / scale + 2.0**-21)),
        "mean": Known(pairs.unscale(mean, rise), none + _ROUNDED),
        "std": Known(jnp.where(even, 0, pairs.unscale(std, rise)), jnp.where(even, 0, error)),
        "max": Known(largest, none),
    }


def _positions(
    sketch: Sketch, whole: Whole, places: Places, refinement: Refinement | None
) -> dict[str, Known]:
    """What the place of a weight in the order decides: coverage and sparsity."""
    sure, crossings, goals = moments.is_sure(sketch), places.crossings, places.goals
    relative = _below(whole, sure, places.bounds, places.limits)
    if refinement is not None:
        in_cells = partial(moments.find_cells, sketch, refinement, whole)
        crossings = lax.cond(refinement.used > 0, in_cells, lambda goals, found: found, goals, crossings)
        counted = Known(_fractions(refinement.below, whole), jnp.zeros_like(relative.error))
        relative = jax.tree.map(lambda a, b: jnp.where(refinement.counted, a, b), counted, relative)
    covered = _coverage(whole, sure, crossings, goals)
    fixed = _fractions(sketch.tallies[1:], whole)
    values = [*covered.value, fixed[1], fixed[0], *relative.value]
    errors = [*covered.error, *jnp.zeros_like(fixed), *relative.error]
    names = [*COVERAGES, "sparsity_1e2", "sparsity_1e3", *RELATIVE]
    return {
        name: Known(value, error + _ROUNDED) for name, value, error in zip(names, values, errors, strict=True)
    }


def _fractions(words: Array, whole: Whole) -> Array:
    """Of counts without the zeros, with these."""
    return pairs.add(moments.pair_of(words[:, 0], words[:, 1]), whole.zeros)[0] / whole.size[0]


class Places(NamedTuple):
    """Where sums from the largest weight on reach each of COVERAGES, and the bins of relative limits."""

    crossings: Found  # [3]
    goals: Pair  # [3]
    bounds: Found  # [2]
    limits: Array  # [2], patterns


def find_all(sketch: Sketch, whole: Whole) -> Places:
    factors = [
        *(1 - share * TIE for share in COVERAGES.values()),
        *(TIE * r for r in RELATIVE.values()),
    ]
    values = stacked(*[whole.total] * 3, *[whole.mean] * 2)
    values = pairs.multiply(values, stacked(*(pairs.constant(factor, jnp.float32) for factor in factors)))
    limits = _patterns_above(whole, at(values, slice(3, 5)))
    patterns = jnp.pad(limits, (3, 0))
    columns = ((patterns >> bins.PLACE_BITS) & (bins.COLUMNS - 1)).astype(jnp.int32)
    columns = jnp.where(jnp.arange(5) < 3, -1, columns)
    rows = (patterns >> 23).astype(jnp.int32)
    found = moments.find_bins(sketch, whole, values, rows, columns)
    crossings, bounds = (
        jax.tree.map(lambda part: part[:3], found),
        jax.tree.map(lambda part: part[3:], found),
    )
    return Places(crossings, at(values, slice(3)), bounds, limits)


def _patterns_above(whole: Whole, bounds: Pair) -> Array:
    """Patterns of the smallest float32 that are not below."""
    (high, low), row = bounds, jnp.maximum(whole.last, 1)
    normal = pairs.bits_of(high) + ((row - 136) << 23)
    ulps = high * moments.power(jnp.minimum(row + 13, 127))
    small, whole_ulps = normal < 1 << 23, jnp.ceil(ulps)
    # The high part of a pair with a low part > 0 is below it.
    more = (low > 0) & (~small | (whole_ulps == ulps))
    return (jnp.where(small, whole_ulps.astype(jnp.int32), normal) + more.astype(jnp.int32)).astype(
        jnp.uint32
    )


def _coverage(whole: Whole, sure: Array, crossing: Found, goal: Pair) -> Known:
    """k / N, k the fewest weights that hold the share.

    The j largest weights of a bin sum to j means at least; at most to j times the most, or to all less
    the others at the least.
    """
    missing, mean = less(pairs.add(crossing.lower, crossing.total), goal), crossing.level
    slip = 2 * whole.slip, jnp.zeros_like(whole.slip)
    parts = stacked(
        pairs.add(missing, slip), less(missing, slip), less(less(missing, slip), crossing.excess), missing
    )
    each = pairs.divide(parts, stacked(mean, single(crossing.most), single(crossing.least), mean))
    most, by_most, by_least, even = (at(each, index) for index in range(4))
    fewest = _ceil(_larger(_larger(by_most, by_least), single(jnp.zeros_like(mean[0]))))
    most = pick(sure, fewest, _ceil(most))
    # Of weights spread evenly the largest j exceed the mean by a part that falls with j.
    lead = jnp.maximum(jnp.minimum(crossing.most - mean[0], mean[0] - crossing.least), 0) / mean[0]
    lead = lead * even[0] * jnp.maximum(1 - even[0] / crossing.weights[0], 0)
    guess = _ceil(less(even, single(lead)))
    guess = _larger(pick(exceeds(guess, most), most, guess), fewest)
    above = less(less(whole.size, crossing.fewer), crossing.weights)
    off = jnp.maximum(less(most, guess)[0], less(guess, fewest)[0])
    return Known(pairs.add(above, guess)[0] / whole.size[0], off / whole.size[0])


def _below(whole: Whole, sure: Array, found: Found, limit: Array) -> Known:
    """Fraction of weights below a pattern in the bin: the most, with the others at the most of the bin."""
    factor = moments.factor_of(whole.last, (limit >> 23).astype(jnp.int32))
    level, place = moments.steps_of(limit) * factor, moments.STEP * factor
    mean = found.level[0] + found.level[1]
    to_most, to_least = jnp.maximum(found.most - mean, 0), jnp.maximum(mean - found.least, 0)
    largest = jnp.minimum(1, to_most / jnp.maximum(found.most - level + place, place) * _SAFE)
    smallest = jnp.maximum(0, 1 - to_least / jnp.maximum(level - found.least, place) * _SAFE)
    known = sure | (found.weights[0] <= 1) | (level <= found.least) | (level > found.most)
    of_one = (mean < level).astype(jnp.float32)
    inside = jnp.where(found.weights[0] > 1, to_most / jnp.maximum(to_most + to_least, place), of_one)
    exact = jnp.where(level <= found.least, 0, jnp.where(level > found.most, 1, inside))
    even = jnp.clip((level - found.least) / jnp.maximum(found.most - found.least, place), smallest, largest)
    value, error = (
        jnp.where(known, exact, even),
        jnp.where(known, 0, jnp.maximum(largest - even, even - smallest)),
    )
    count = pairs.add(found.fewer, single(found.weights[0] * value))[0]
    return Known(count / whole.size[0], found.weights[0] * error / whole.size[0])


def pick(first: Array, a: Pair, b: Pair) -> Pair:
    return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])


def _larger(a: Pair, b: Pair) -> Pair:
    return pick(exceeds(a, b), a, b)


def _ceil(value: Pair) -> Pair:
    high = jnp.ceil(value[0])
    return pairs.fast_two_sum(high, jnp.where(high == value[0], jnp.ceil(value[1]), 0))
