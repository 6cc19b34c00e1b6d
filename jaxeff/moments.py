"""What a sketch tells of its weights, and how much it leaves open: exact counts in, sums out.

A bin tells how many weights it holds, their sum and between what they are. So everything between bins is
known, and what the weights do inside one lies between two extremes: all of them at the mean, or all at
the ends.

A row of bins is one exponent; inside it weights are counted in steps, 1 to a bin, so that a row starts at
512, and all rows together in steps of the last: nothing overflows, and what underflows is below 2^-126 of
the largest weight. Sums by which ties are decided are exact, in integers and `pairs`; terms that only add
up to a metric are float32, and their rounding is part of its bound.

XLA's CPU takes milliseconds to compile a kernel, about one for each array that a loop or function gives:
hence the arrays that stack numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff import bins, pairs
from jaxeff.pairs import Pair

if TYPE_CHECKING:
    from jaxeff.sketch import Refinement, Sketch

STEP = np.float32(2.0**-bins.PLACE_BITS)  # a place
_AT_ONCE = 1024  # cells


def pair_of(low: Array, high: Array | None = None) -> Pair:
    """low + 2^32 high of two words, to 2^-47."""
    words = (low >> 16).astype(jnp.float32) * 2.0**16, (low & 0xFFFF).astype(jnp.float32)
    if high is None:
        return pairs.fast_two_sum(*words)
    return pairs.add(single(high.astype(jnp.float32) * 2.0**32), words)


def single(value: Array) -> Pair:
    return value, jnp.zeros_like(value)


def stacked(*values: Pair) -> Pair:
    return jnp.stack([high for high, _ in values]), jnp.stack([low for _, low in values])


def at(pair: Pair, index: Any) -> Pair:
    return pair[0][index], pair[1][index]


def times(pair: Pair, power: Any) -> Pair:
    """pair * power, a power of two."""
    return pair[0] * power, pair[1] * power


def less(a: Pair, b: Pair) -> Pair:
    return pairs.add(a, (-b[0], -b[1]))


def exceeds(a: Pair, b: Pair) -> Array:
    return (a[0] - b[0]) + (a[1] - b[1]) > 0


def power(exponent: Array) -> Array:
    """2^exponent, 0 where that is subnormal."""
    return pairs.float_of(jnp.maximum(exponent + 127, 0) << 23)


def running(total: Callable[..., Array], values: Array) -> Array:
    """`lax.cumsum` or `lax.cummax` along the first axis."""
    operation = {lax.cumsum: lax.add, lax.cummax: lax.max}[total]

    def in_sequence(values: Array) -> Array:
        def step(total: Array, value: Array) -> tuple[Array, Array]:
            through = operation(total, value)
            return through, through

        return lax.scan(step, jnp.zeros_like(values[0]), values)[1]

    # XLA's CPU compiles a parallel one ten times as long, and takes 10 us for 512 steps.
    return in_sequence(values) if pairs.in_rows() else total(values)


def running_over(total: Callable[..., Array], values: Array, width: int) -> Array:
    """The same along [K], in rows of a width that divides K."""
    operation = {lax.cumsum: lax.add, lax.cummax: lax.max}[total]
    inside = running(total, values.reshape(-1, width).T)
    rows = jnp.pad(running(total, inside[-1]), (1, 0))[:-1]
    return operation(inside, jnp.broadcast_to(rows, inside.shape)).T.reshape(-1)


# Bins.


class Bin(NamedTuple):
    """In steps of its row."""

    weights: Array  # how many
    level: Pair  # the mean
    least: Array  # what weights of the bin may be, from
    most: Array  # to


def row_of(sketch: Sketch, row: Array) -> Bin:
    """[COLUMNS]"""
    return _bin_of(sketch, *_words(sketch, row), row, jnp.arange(bins.COLUMNS, dtype=jnp.int32))


def _words(sketch: Sketch, row: Array) -> tuple[Array, Array]:
    words = lax.dynamic_index_in_dim(sketch.sums, row, keepdims=False)
    return words, lax.dynamic_index_in_dim(sketch.high, row, keepdims=False)


def _bin_of(sketch: Sketch, words: Array, high: Array, row: Array, column: Array) -> Bin:
    start = column.astype(jnp.float32) + base_of(row)
    count, place = _mean_place(words, high)
    level = pairs.add(single(start), times(place, STEP))
    return Bin(count, level, *_ends(sketch, row, start, start + 1))


def base_of(row: Array) -> Array:
    """Where a row starts."""
    return jnp.where(row > 0, np.float32(bins.COLUMNS), np.float32(0))


def _mean_place(words: Array, high: Array) -> tuple[Array, Pair]:
    """Count and mean place."""
    count = pair_of(words[..., 0], high >> 24)
    return count[0], pairs.divide(pair_of(words[..., 1], high & 0xFFFFFF), count)


def _ends(sketch: Sketch, row: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """What weights in [start, end) may be, given the least and the largest of all, and their grain."""
    least, largest = least_of(sketch), largest_of(sketch)
    last = jnp.maximum(start, end - power(sketch.grain - bins.PLACE_BITS))
    return (
        jnp.where((least >> 23).astype(jnp.int32) == row, jnp.maximum(start, steps_of(least)), start),
        jnp.where((largest >> 23).astype(jnp.int32) == row, jnp.minimum(last, steps_of(largest)), last),
    )


def least_of(sketch: Sketch) -> Array:
    """Pattern of the smallest weight but 0; 0 where there is none."""
    return jnp.where(largest_of(sketch) > 0, np.uint32(0) - sketch.extremes[1], 0)


def largest_of(sketch: Sketch) -> Array:
    """Pattern of the largest weight, or 0."""
    over = sketch.extremes[0]
    return jnp.where(over >> 31 > 0, over + np.uint32(0x7F800000), 0)


def is_sure(sketch: Sketch) -> Array:
    """Whether every weight is the least or the most of its bin, as float16 is."""
    return sketch.grain >= bins.PLACE_BITS - 1


def steps_of(pattern: Array) -> Array:
    """A weight in steps of its row."""
    mantissa = (pattern & 0x7FFFFF) | jnp.where(pattern >> 23 > 0, np.uint32(1 << 23), np.uint32(0))
    return mantissa.astype(jnp.float32) * STEP


def factor_of(last: Array, row: Array) -> Array:
    """A step of a row up to the last in steps of the last."""
    return power(jnp.minimum(jnp.maximum(row, 1) - jnp.maximum(last, 1), 0))


def _digits(sketch: Sketch, row: Array) -> Array:
    """[COLUMNS, 9], counts, counts times column, and places of a row: in digits that 512 bins can add."""
    words, high = _words(sketch, row)
    column = jnp.arange(bins.COLUMNS, dtype=jnp.uint32)[:, None]
    counts = _split(words[:, :1], (high >> 24)[:, None], 14)
    return jnp.concatenate(
        [counts, counts * column, _split(words[:, 1:], (high & 0xFFFFFF)[:, None], 18)], axis=1
    )


def _split(low: Array, high: Array, width: int) -> Array:
    """Words [M, 1] in three digits [M, 3], of 14 or 18 bits and the rest."""
    digit = jnp.arange(3, dtype=jnp.uint32)[None]
    shift = digit * np.uint32(width)
    below = jnp.where(shift < 32, low >> jnp.minimum(shift, 31), 0)
    above = jnp.where(shift < 32, high << (32 - jnp.maximum(shift, 1)), high >> (jnp.maximum(shift, 32) - 32))
    part = below | jnp.where(digit > 0, above, 0)
    return jnp.where(digit < 2, part & np.uint32((1 << width) - 1), part)


def _numbers(digits: Array, row: Array) -> tuple[Pair, Pair]:
    """Count and total, in steps, of sums [9] of a row's digits."""
    high, low = pair_of(digits.reshape(3, 3))
    radix = np.asarray([2.0**14, 2.0**14, 2.0**18], np.float32)
    upper = pairs.add((high[:, 1] * radix, low[:, 1] * radix), (high[:, 2] * radix**2, low[:, 2] * radix**2))
    count, columns, places = (at(pairs.add((high[:, 0], low[:, 0]), upper), index) for index in range(3))
    return count, pairs.add(times(count, base_of(row)), pairs.add(columns, times(places, STEP)))


# Totals, and what each row starts from.


class Whole(NamedTuple):
    first: Array  # [], the row of the smallest weight but 0
    last: Array  # [], of the largest
    size: Pair  # N
    zeros: Pair
    total: Pair  # S
    mean: Pair
    depth: Pair  # sum x (last - its row)
    slip: Array  # [], what a sum up to any bin may be off by
    before: Pair  # [ROWS, 2], weights below the row, and their sum


def whole_of(sketch: Sketch) -> Whole:
    last = (largest_of(sketch) >> 23).astype(jnp.int32)
    first = (least_of(sketch) >> 23).astype(jnp.int32)

    def sum_row(row: Array) -> Array:
        return _digits(sketch, row).sum(axis=0, dtype=jnp.uint32)

    def numbers(index: Array, digits: Array) -> Pair:
        count, total = _numbers(digits, index)
        total = times(total, factor_of(last, index))
        depth = jnp.maximum(jnp.maximum(last, 1) - jnp.maximum(index, 1), 0)
        depth = pairs.multiply(total, single(depth.astype(jnp.float32)))
        return stacked(count, total, depth)

    def through(start: Array) -> tuple[Array, Array]:
        """The sums of all rows, and of those before each, [2, 3] and [ROWS, 2, 3]."""
        rows = jnp.arange(bins.ROWS, dtype=jnp.int32)
        if not pairs.in_rows():
            inside = ((rows >= first) & (rows <= last))[:, None]
            own = jax.vmap(numbers)(rows, jnp.where(inside, jax.vmap(sum_row)(rows), 0))
            before = pairs.add((start[0][None], start[1][None]), pairs.sums_before(own))
            return jnp.stack(pairs.add(at(before, -1), at(own, -1))), jnp.stack(before, axis=1)
        digits = lax.fori_loop(
            first,
            last + 1,
            lambda row, digits: digits.at[row].set(sum_row(row)),
            jnp.zeros((bins.ROWS, 9), jnp.uint32),
        )
        add_row = lambda sums, row: (jnp.stack(pairs.add((sums[0], sums[1]), numbers(*row))), sums)  # noqa: E731
        return lax.scan(add_row, start, (rows, digits))

    size = pair_of(sketch.tallies[0, 0], sketch.tallies[0, 1])
    zeros = pair_of(sketch.sums[-1, 1, 0], sketch.high[-1, 1] >> 24)
    none = jnp.zeros_like(zeros[0])
    start = jnp.stack([jnp.stack([part, none, none]) for part in zeros])
    sums, before = through(start)
    total, depth = ((sums[0, index], sums[1, index]) for index in (1, 2))
    # A pair's sum is good to 3 units of 2^-48 (Joldes, Muller and Popescu, 2017).
    below = jnp.where(jnp.arange(bins.ROWS, dtype=jnp.int32) <= last, before[:, 0, 1], 0)
    slip = total[0] * 2.0**-43 + below.sum() * (3 * 2.0**-48)
    mean = pairs.divide(total, size)
    return Whole(first, last, size, zeros, total, mean, depth, slip, (before[:, 0, :2], before[:, 1, :2]))


# Sums that need the ranks and the mean, and what the bins leave open.


class Open(NamedTuple):
    """The most by which weights of bins can exceed sums in which all are at their bin's mean.

    Each is 0 with all weights at the mean, and largest with all at the ends. x ln x has the second
    derivative 1 / x: its gap is near half the variance by the mean, and twice that at most.
    """

    inequality: Array  # sum_ij |x_i - x_j| / 2
    square: Array  # sum (x - mean)^2
    surprise: Array  # sum x ln(x / mean), as half the variance by the mean


def _open(count: Array, level: Pair, least: Array, most: Array, factor: Array) -> Open:
    below = jnp.maximum((level[0] - least) + level[1], 0)
    above = jnp.maximum((most - level[0]) - level[1], 0)
    square = jnp.where(count > 1, count * (below * above), 0) * factor
    inequality = count * (square / jnp.maximum(below + above, 2.0**-60))
    return Open(inequality, square * factor, square / jnp.maximum(2 * (level[0] + level[1]), 2.0**-20))


class Sums(NamedTuple):
    balance: Array  # sum (2 rank - N - 1) x with every weight at its bin's mean
    logarithm: Array  # sum x ln(x / unit), likewise; the unit of a row is its start
    distance: Array  # sum |x - mean|, likewise
    square: Array  # sum (x - mean)^2, likewise
    between: Open  # what cells tell to add to that
    open: Open  # and what is left


def sums_of(sketch: Sketch, whole: Whole, refinement: Refinement | None) -> Sums:
    unit = unit_of(sketch, whole)

    def terms(row: Array) -> list[Array]:
        (count, level, least, most), factor = row_of(sketch, row), factor_of(whole.last, row)
        digits = _digits(sketch, row)[:, :3]
        fewer = (running(lax.cumsum, digits) - digits).astype(jnp.float32)
        fewer = fewer[:, 0] + (fewer[:, 1] * 2.0**14 + fewer[:, 2] * 2.0**28)
        base = at(whole.before, (row, 0))
        base = less(pairs.add(base, base), whole.size)
        mean = level[0] + level[1]
        total, ranks = count * mean * factor, (base[0] + (2 * fewer + count)) + base[1]
        off = (level[0] * factor - whole.mean[0]) + (level[1] * factor - whole.mean[1])
        distance = count * jnp.abs(off)
        coarse = count if refinement is None else jnp.where(refinement.holds(row), 0, count)
        opened = _open(coarse, level, least, most, factor)
        logarithm = jnp.log(jnp.maximum(mean, STEP) / unit)
        return [total * ranks, total * logarithm, distance, distance * jnp.abs(off), *opened]

    sums = _walk(terms, whole.first, whole.last + 1, (bins.ROWS, 7, bins.COLUMNS))
    zeros = whole.zeros[0] * whole.mean[0]
    (balance, logarithm, distance, square), opened = (sums[index] for index in range(4)), sums[4:]
    between = jnp.zeros_like(opened)
    if refinement is not None:
        cells = _cell_sums(sketch, whole, refinement)
        between, opened = cells[:3], opened + cells[3:]
    return Sums(
        balance,
        logarithm,
        distance + zeros,
        square + zeros * whole.mean[0],
        *(Open(part[0], part[1], part[2]) for part in (between, opened)),
    )


def unit_of(sketch: Sketch, whole: Whole) -> Array:
    return jnp.where(whole.last > 0, np.float32(bins.COLUMNS), steps_of(largest_of(sketch)))


def _walk(terms: Callable[[Array], list[Array]], first: Any, last: Any, shape: tuple[int, int, int]) -> Array:
    """Sums over the rows of terms(row), lane by lane and then across the lanes.

    Args:
        shape: (most rows, terms, lanes).
    """
    if not pairs.in_rows():
        rows = jnp.arange(shape[0], dtype=jnp.int32)
        found = jax.vmap(lambda row: jnp.stack(terms(row)))(rows)
        found = jnp.where(((rows >= first) & (rows < last))[:, None, None], found, 0)
        return pairs.reduce(single(jnp.moveaxis(found, 1, 0).reshape(shape[1], -1)))[0]

    def accumulate(row: Array, lanes: Pair) -> Pair:
        sums, errors = pairs.two_sum(lanes[0], jnp.stack(terms(row)))
        return sums, lanes[1] + errors

    lanes = jnp.zeros(shape[1:], jnp.float32)
    return pairs.reduce(lax.fori_loop(first, last, accumulate, (lanes, lanes)))[0]


def _cell_sums(sketch: Sketch, whole: Whole, refinement: Refinement) -> Array:
    """[6], what weights of bins with cells add: known between the cells, and open in them."""
    fewer = running_over(lax.cumsum, refinement.cells[:, 0], _AT_ONCE) - refinement.cells[:, 0]

    def terms(index: Array) -> list[Array]:
        return _cell_terms(sketch, whole, refinement, fewer, index * _AT_ONCE)

    shape = refinement.layout.size // _AT_ONCE, 6, _AT_ONCE
    return _walk(terms, 0, (refinement.used + (_AT_ONCE - 1)) // _AT_ONCE, shape)


def _cell_terms(
    sketch: Sketch, whole: Whole, refinement: Refinement, before: Array, index: Array
) -> list[Array]:
    layout, cells, fewer = (
        lax.dynamic_slice_in_dim(part, index, _AT_ONCE)
        for part in (refinement.layout, refinement.cells, before)
    )
    first, low, floats = bins.cells_at(refinement.table, refinement.base, layout, index)
    fewer = fewer - before[first]
    bin_, count = (layout >> 4).astype(jnp.int32), cells[:, 0].astype(jnp.float32)
    row, column = bin_ // bins.COLUMNS, bin_ % bins.COLUMNS
    words = sketch.sums[row, column]
    _, (center, rest) = _mean_place(words, sketch.high[row, column])
    start, place = base_of(row) + column.astype(jnp.float32), (low & 0x3FFF).astype(jnp.float32)
    within = cells[:, 1].astype(jnp.float32) / jnp.maximum(count, 1)
    off, mean = ((place - center) - rest + within) * STEP, start + (center + rest) * STEP
    ranks = lax.bitcast_convert_type(2 * fewer + cells[:, 0] - words[:, 0], jnp.int32).astype(jnp.float32)
    left, factor = start + place * STEP, factor_of(whole.last, row)
    ends = _ends(sketch, row, left, left + floats.astype(jnp.float32) * STEP)
    opened = _open(count, (left, within * STEP), *ends, factor)
    count = count * factor
    between = Open(
        count * off * ranks, count * off * off * factor, count * mean * _gap(off / jnp.maximum(mean, STEP))
    )
    # Of a cell of two floats nothing is open: its weights are at its ends.
    between = [known + jnp.where(floats == 2, most, 0) for known, most in zip(between, opened, strict=True)]
    return [*between, *(jnp.where(floats == 2, 0, most) for most in opened)]


def _gap(off: Array) -> Array:
    """(1 + off) ln(1 + off) - off for off >= -1."""
    near = off * off * (1 / 2 - off * (1 / 6 - off * (1 / 12 - off * (1 / 20 - off * (1 / 30)))))
    inside = jnp.maximum(off, -1 + 2.0**-20)
    return jnp.where(jnp.abs(off) < 1 / 16, near, (1 + inside) * jnp.log1p(inside) - off)


# A bin or a cell by the sum of what lies below, or a bin by its place.


class Found(NamedTuple):
    """A bin or a cell, and what lies below it; sums and weights in steps of the last row."""

    bin: Array
    least: Array
    most: Array
    fewer: Pair  # weights below
    lower: Pair  # their sum
    weights: Pair  # in it
    level: Pair  # the mean
    total: Pair
    excess: Pair  # total less count * least


def find_bins(sketch: Sketch, whole: Whole, goals: Pair, rows: Array, columns: Array) -> Found:
    """[K], bins of these rows and columns, or for a column < 0 those with which sums first exceed a goal."""
    return _found(pairs.each(lambda each: _bin_numbers(sketch, whole, *each), (goals, rows, columns)))


def _found(numbers: Array) -> Found:
    """Of [K, 15]."""
    bin_, least, most, *parts = numbers.T
    return Found(bin_.astype(jnp.int32), least, most, *zip(parts[::2], parts[1::2], strict=True))


def _bin_numbers(sketch: Sketch, whole: Whole, goal: Pair, row: Array, column: Array) -> Array:
    reached = pairs.count(~exceeds(at(whole.before, (slice(None), 1)), goal)) - 1
    row = jnp.where(column < 0, jnp.minimum(reached, whole.last), row)
    factor, digits = factor_of(whole.last, row), _digits(sketch, row)
    column, below = _column(whole, running(lax.cumsum, digits) - digits, goal, row, column)
    words, high = sketch.sums[row, column], sketch.high[row, column]
    _, level, least, most = _bin_of(sketch, words, high, row, column)
    count, level, least, most = (
        pair_of(words[0], high >> 24),
        times(level, factor),
        least * factor,
        most * factor,
    )
    over = stacked(level, less(level, single(least)))
    totals = pairs.multiply(count, over)
    bin_ = (row * bins.COLUMNS + column).astype(jnp.float32)
    return jnp.stack([bin_, least, most, *below, *count, *level, *at(totals, 0), *at(totals, 1)])


def _column(whole: Whole, digits: Array, goal: Pair, row: Array, column: Array) -> tuple[Array, Array]:
    """By halving: the column, and weights below and their sum, as pairs [4]."""
    factor, (count, total) = factor_of(whole.last, row), (at(whole.before, (row, index)) for index in (0, 1))

    def halve(index: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        tried = best[0] + (bins.COLUMNS >> index)
        fewer, lower = _numbers(digits[tried], row)
        fewer, lower = pairs.add(fewer, count), pairs.add(times(lower, factor), total)
        fits = jnp.where(column < 0, ~exceeds(lower, goal), tried <= column)
        return jnp.where(fits, tried, best[0]), jnp.where(fits, jnp.stack([*fewer, *lower]), best[1])

    return lax.fori_loop(1, 10, halve, (jnp.int32(0), jnp.stack([*count, *total])))


def find_cells(sketch: Sketch, refinement: Refinement, whole: Whole, goals: Pair, found: Found) -> Found:
    """[K], the cells, of bins with one for each float, with which sums first exceed a goal."""
    return _found(pairs.each(lambda each: _cell_numbers(sketch, refinement, whole, *each), (goals, found)))


def _cell_numbers(sketch: Sketch, refinement: Refinement, whole: Whole, goal: Pair, found: Found) -> Array:
    row, column, places = found.bin // bins.COLUMNS, found.bin % bins.COLUMNS, 1 << bins.PLACE_BITS
    place = STEP * factor_of(whole.last, row)
    counts = lax.dynamic_slice(
        refinement.cells, (refinement.first_cell(found.bin), np.int32(0)), (places, 1)
    )[:, 0]
    through = running_over(lax.cumsum, counts, 128)
    # sum n i over places i before, as what the running counts by then fall short of the last of them.
    halves = [running_over(lax.cumsum, half, 128) - half for half in (through & 0xFFFF, through >> 16)]
    short = pairs.add(pair_of(halves[0]), times(pair_of(halves[1]), 2.0**16))
    values = (base_of(row) + column.astype(jnp.float32)) / STEP + jnp.arange(places, dtype=jnp.float32)
    fewer = pair_of(through - counts)
    lower = pairs.add(times(less(pairs.multiply(fewer, single(values)), short), place), found.lower)
    index = jnp.maximum(pairs.count(~exceeds(lower, goal)) - 1, 0)
    level, count = values[index] * place, pair_of(counts[index])
    totals = *pairs.multiply(count, single(level)), *single(0 * level)
    below = *pairs.add(found.fewer, at(fewer, index)), *at(lower, index)
    bin_ = found.bin.astype(jnp.float32)
    return jnp.stack([bin_, level, level, *below, *count, *single(level), *totals])
