"""Metrics of any number of weights from one pass: `count` counts, `merge` adds, `summarize` gives the metrics.

whole = count(x)                         one pass
whole = merge(count(part), count(other)) the same to the bit, however x is split
metrics, bounds = summarize(whole)       each metric, and how far off it may be
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxeff.metrics._checks import checked
from jaxeff.metrics._histogram import (
    BELOW_BINS,
    COLUMNS,
    INVALID_BIN,
    LIMITS,
    PLACE_BITS,
    ROWS,
    ZERO_BIN,
    Histogram,
    histogram,
    may_lie_in_parts,
)
from jaxeff.metrics._order import importances, relative
from jaxeff.metrics._records import RELATIVE_THRESHOLDS, Bounds, Metrics
from jaxeff.metrics._weighted import SHARES, Spread, Weighted, metrics_of, reached, sums_of
from jaxeff.numerics.summation import namespace, running_total, total
from jaxeff.output.shown import Shown

# Metrics read whole bins for the 28 octaves up to the largest weight, then 8 bins at a time. Weights 2^60
# below the largest count as 0.
_FINE, _COARSE, _POOLED = 28, 32, 8
ENTRIES = _FINE * COLUMNS + _COARSE * COLUMNS // _POOLED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sketch(Shown):
    """Counts of an array's bit patterns: unsigned integers, exact for up to 2^40 weights, 2 MB.

    A bin is the first 17 bits of a float32's pattern. Adding two sketches (`merge`) gives the sketch of both
    arrays. No number falls in the last 512 bins: the first of them holds invalid entries, the second zeros, and
    the next two the weights below 1e-2 and 1e-3 that share their bins.
    """

    bins: Array
    """[131072, 4], for each bin the number of its weights and the sum of their last 14 bits, as low and high words."""
    size: Array
    """[2], number of entries, as low and high word."""
    largest: Array
    """[], the largest bit pattern."""

    def __str__(self) -> str:
        words, largest = np.asarray(self.size, np.uint64), np.asarray(self.largest, np.uint32)
        if words.ndim > 1:
            return f"Sketches {list(words.shape[:-1])}"
        count = int(words[0] + (words[1] << np.uint64(32)))
        return f"Sketch of {count:,} weights, the largest {largest.view(np.float32):.6g}"


@jax.jit
def count(x: ArrayLike, size: ArrayLike | None = None) -> Sketch:
    """Count the weights of x [...] in one pass; there are no derivatives.

    The bin of a weight is its bit pattern >> 14, and its position in the bin is the last 14 bits. An invalid
    entry (nan, infinite or negative) makes every float metric nan. Values are converted to float32, which is exact
    for narrower dtypes and rounds others.

    Args:
        x: [...], importances, at most 2^31 - 1.
        size: [], an integer, which may be traced: number of leading entries of x.ravel() to count; the others
            must be 0.

    Raises:
        ValueError: x is empty, or too large for one pass.
        TypeError: x is not an array, or holds booleans or complex numbers.

    >>> metrics, bounds = summarize(count(jnp.array([4.0, 3.0, 2.0, 1.0])))
    >>> metrics.coverage_80, bounds.coverage_80 < 1e-5
    (Array(0.75, dtype=float32), Array(True, dtype=bool))
    """
    x = checked(x)
    if x.size >= 2**31:
        raise ValueError(
            f"`x` must have fewer than 2^31 entries; got {x.shape}. Use `merge` on sketches of parts."
        )
    x = lax.stop_gradient(x)
    return of_histogram(histogram(x, size), x.size if size is None else size)


def of_histogram(found: Histogram, size: Any) -> Sketch:
    xp = namespace(found.table)
    counts, places = found.table[:, 0], found.table[:, 1]
    high = xp.broadcast_to(found.high, counts.shape)
    bins = xp.stack([counts, xp.zeros_like(counts), places, high], axis=1)
    return Sketch(bins, xp.stack([xp.asarray(size).astype(np.uint32), np.uint32(0)]), found.largest)


def merge(a: Sketch, b: Sketch) -> Sketch:
    """Merge the sketches of two arrays into that of both together, exact to the bit.

    Bins add, so order and grouping change nothing.

    Raises:
        TypeError: a or b is not a sketch.

    >>> parts = count(jnp.array([4.0, 3.0])), count(jnp.array([2.0, 1.0]))
    >>> summarize(merge(*parts))[0].size
    Array(4, dtype=int32)
    """
    if not (isinstance(a, Sketch) and isinstance(b, Sketch)):
        kinds = f"{type(a).__name__} and {type(b).__name__}"
        raise TypeError(f"`a` and `b` must be two sketches, from `count`; got {kinds}.")
    return _merged(a, b)


@jax.jit
def _merged(a: Sketch, b: Sketch) -> Sketch:
    return Sketch(
        _added(a.bins, b.bins),
        _added(a.size, b.size),
        jnp.maximum(a.largest, b.largest),
    )


def _added(a: Array, b: Array) -> Array:
    """Add numbers [..., 2 n] of alternating low and high words."""
    pairs = (*a.shape[:-1], -1, 2)
    a, b = a.reshape(pairs), b.reshape(pairs)
    low = a[..., 0] + b[..., 0]
    high = a[..., 1] + b[..., 1] + (low < a[..., 0]).astype(low.dtype)
    return namespace(a).stack([low, high], axis=-1).reshape(*a.shape[:-2], -1)


def summarize(sketch: Sketch) -> tuple[Metrics, Bounds]:
    """Compute every metric of a sketch's weights, and bounds of the errors against exact arithmetic on them.

    |metric - exact| <= bound, or <= bound * exact where `Bounds` says so. Counts are exact up to 2^31 - 1,
    where they stop. Bounds are wide if many weights share a bin, as in a layer of nearly equal weights.

    Raises:
        TypeError: the argument is not a sketch.

    >>> metrics, bounds = summarize(count(jnp.array([3.0, 1.0, 0.0, 0.0])))
    >>> metrics.gini, bounds.gini < 1e-5
    (Array(0.625, dtype=float32), Array(True, dtype=bool))
    """
    if not isinstance(sketch, Sketch):
        raise TypeError(f"`sketch` must be a Sketch, from `count`; got {type(sketch).__name__}.")
    return _summarized(sketch)


@jax.jit
def _summarized(sketch: Sketch) -> tuple[Metrics, Bounds]:
    return _summary(sketch, np.float32)


def on_host(sketch: Sketch) -> tuple[Metrics, Bounds]:
    """Compute the metrics of a sketch of NumPy arrays, in float64 and without compiling."""
    with np.errstate(all="ignore"):
        return _summary(sketch, np.float64)


def _summary(sketch: Sketch, dtype: Any) -> tuple[Metrics, Bounds]:
    spread = spread_of(sketch, dtype)
    metrics = metrics_of(sums_of(spread), integers_of(sketch))
    return metrics, _bounds(sketch, spread.distribution, metrics)


def spread_of(sketch: Sketch, dtype: Any = np.float32) -> Spread:
    """Return the spread of a sketch's weights; on the host if its arrays are NumPy arrays."""
    xp = namespace(sketch.bins)
    zeros, invalid = (_float(sketch.bins[at, :2], dtype) for at in (ZERO_BIN, INVALID_BIN))
    # Weights kept apart because they are below the smaller threshold are below the larger one too.
    apart = [_float(sketch.bins[at, :2], dtype) for at in BELOW_BINS]
    below = [
        total(_float(sketch.bins[: limit >> PLACE_BITS, :2], dtype))
        + zeros
        + sum(part for part, other in zip(apart, LIMITS, strict=True) if other <= limit)
        for limit in LIMITS
    ]
    # These tallies belong to no particular entry.
    first, *tallied = (xp.pad(tally[None], (0, ENTRIES - 1)) for tally in (zeros, invalid, *below))
    return Spread(weighted(sketch, dtype), (first, *tallied))


def integers_of(sketch: Sketch) -> Any:
    """Return [3]: numbers of zeros, of invalid entries, and of all; exact up to 2^31 - 1, where they stop."""
    most, xp = np.uint32(2**31 - 1), namespace(sketch.bins)
    words = xp.stack([sketch.bins[ZERO_BIN, :2], sketch.bins[INVALID_BIN, :2], sketch.size])
    return xp.where(words[:, 1] > 0, most, xp.minimum(words[:, 0], most)).astype(np.int32)


def squares_of(x: Array, size: Any = None) -> Array:
    """Return sum (x - mean)^2 relative to the largest, of x [...] or of the first `size` entries of x [M].

    Bins know it only to their width, which is too coarse for weights that are nearly equal.
    """
    x = lax.stop_gradient(x)
    bits, invalid = importances(x)
    x = jnp.where(invalid, 0, x)
    y, _ = relative(x, jnp.max(x), bits, jnp.max(bits))
    count = x.size if size is None else size
    off = y - _sum(y) / jnp.asarray(count).astype(y.dtype)
    if size is not None:
        off = jnp.where(jnp.arange(x.size, dtype=jnp.int32) < size, off, 0)
    return _sum(jnp.square(off))


def _sum(x: Array) -> Array:
    """Sum in levels, axis by axis, as x may lie in parts that another shape would gather."""
    if x.ndim == 1 and not may_lie_in_parts(x):
        return total(x)
    while x.ndim:
        x = jnp.sum(x, axis=-1)
    return x


def _float(words: Any, dtype: Any) -> Any:
    return words[..., 0].astype(dtype) + words[..., 1].astype(dtype) * 2.0**32


def weighted(sketch: Sketch, dtype: Any = np.float32) -> Weighted:
    """Return the distribution of a sketch: [16384] means of bins, largest first, then zeros."""
    xp = namespace(sketch.bins)
    largest = sketch.largest
    rows = _FINE + _COARSE
    last = (largest >> 23).astype(np.int32)
    exponent = last - (rows - 1) + xp.arange(rows, dtype=np.int32)  # of each octave to read
    counts, places = _octaves(sketch, last - (rows - 1), rows, dtype)

    # Relative to the octave of the largest weight. Subnormals have the octave above them, and no leading 1.
    octave = _power_of_two(xp.maximum(exponent, 1) - xp.maximum(last, 1), dtype, xp)[:, None]
    leading = (exponent > 0).astype(dtype)[:, None]
    step = 1 / COLUMNS
    start = (leading + xp.arange(COLUMNS, dtype=dtype)[None] * step) * octave
    width = xp.broadcast_to(octave * step, start.shape)
    mean = start + width * (places / xp.where(counts > 0, counts, 1)) / (1 << PLACE_BITS)
    whole = mean, counts, start, width
    coarse = _pooled(*(part[:_COARSE] for part in whole))
    values, counts, start, width = (
        xp.concatenate([rough, part[_COARSE:].reshape(-1)])[::-1]
        for rough, part in zip(coarse, whole, strict=True)
    )
    top = _largest_mantissa(largest, dtype, xp)
    zero = _float(sketch.size, dtype) - total(counts) - _float(sketch.bins[INVALID_BIN, :2], dtype)
    # The last entry holds zeros and weights that count as 0.
    nothing = xp.zeros(1, dtype)
    values, start, width = (xp.concatenate([part[:-1], nothing]) / top for part in (values, start, width))
    counts = xp.concatenate([counts[:-1], xp.maximum(zero + counts[-1:], 0)])
    return Weighted(xp.minimum(values, 1), counts, start, width, _float_of(largest, dtype))


def _octaves(sketch: Sketch, first: Any, rows: int, dtype: Any) -> list[Any]:
    """Return counts and position sums of all bins of `rows` exponents from `first` on, [rows, 512]; 0 below 0."""
    xp = namespace(sketch.bins)
    table = sketch.bins.reshape(ROWS, COLUMNS, 4)
    row = first + xp.arange(rows, dtype=np.int32)
    read = xp.where((row >= 0)[:, None, None], table[xp.maximum(row, 0)], np.uint32(0))
    bin_ = first * COLUMNS + xp.arange(rows * COLUMNS, dtype=np.int32).reshape(rows, COLUMNS)
    parts = []
    for column in (0, 2):
        part = _float(read[..., column : column + 2], dtype)
        for limit, apart in zip(LIMITS, BELOW_BINS, strict=True):
            # Weights below a threshold go back to their bin.
            more = _float(sketch.bins[apart, column : column + 2], dtype)
            part = part + xp.where(bin_ == limit >> PLACE_BITS, more, 0)
        parts.append(part)
    return parts


def _power_of_two(exponent: Any, dtype: Any, xp: Any) -> Any:
    """Return 2^exponent, for exponents from -126 on."""
    if xp is np:
        return np.ldexp(np.ones(exponent.shape, dtype), exponent)
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32).astype(dtype)


def _largest_mantissa(largest: Any, dtype: Any, xp: Any) -> Any:
    """Return the largest weight over 2^its octave."""
    fraction = (largest & np.uint32((1 << 23) - 1)).astype(dtype) * 2.0**-23
    mantissa = fraction + (largest >= 1 << 23).astype(dtype)
    return xp.where(largest > 0, mantissa, 1)


def _float_of(largest: Any, dtype: Any) -> Any:
    if isinstance(largest, (np.ndarray, np.generic)):
        return np.asarray(largest).view(np.float32).astype(dtype)
    return lax.bitcast_convert_type(largest, jnp.float32)


def _pooled(mean: Any, counts: Any, start: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """Pool eight bins into one."""
    xp = namespace(mean)
    mean, counts, start, width = (part.reshape(-1, _POOLED) for part in (mean, counts, start, width))
    whole = total(counts)
    first = start[:, 0]
    # Relative to the start of the bin, so that the means keep their digits.
    above = total(counts * (mean - start[:, :1])) / xp.where(whole > 0, whole, 1)
    return first + above, whole, first, total(width)


def _bounds(sketch: Sketch, distribution: Weighted, metrics: Metrics) -> Bounds:
    """Bound the error of each metric, since a bin knows only the number and mean of its weights.

    For n weights between a and a + w with mean m: v ln v sums to at most n w^2 / (8 a), and at most
    n w / e, more than n m ln m; differences of pairs to at most n^2 w / 2; squares to at most n w^2 / 4 more
    than n m^2; and the k largest to at most k (a + w) and at least k m.
    """
    values, counts, low, width, _ = distribution
    xp, dtype = namespace(values), values.dtype
    # Results are float32 even where they were computed in float64.
    rounding = 2e-6 if np.dtype(dtype).itemsize == 4 else 2e-7
    running, through = running_total(xp.stack([counts, counts * values]))
    size, sum_ = running[-1], xp.where(through[-1] > 0, through[-1], 1)
    mean = sum_ / size
    log_size = xp.log(xp.maximum(size, 2))
    several = xp.where(counts > 1, counts, 0)
    zeros = _float(sketch.bins[ZERO_BIN, :2], dtype)
    # Share of the weights so far below the largest that they count as 0.
    faint = xp.maximum(counts[-1] - zeros, 0) * 2.0 ** (1 - _FINE - _COARSE) / sum_
    slack = 2 * (rounding + faint)
    ends = xp.where(counts > 1, low + width, values)
    starts = xp.where(counts > 1, low, values)
    limits = [threshold * mean for threshold in RELATIVE_THRESHOLDS.values()]
    within = [(starts <= limit * (1 + slack)) & (ends >= limit * (1 - slack)) for limit in limits]
    # From 0 to w, v ln v lies at most w / e below its chord.
    bend = xp.where(low > 0, xp.minimum(width / (8 * xp.where(low > 0, low, 1)), 0.37), 0.37)
    spread = several * bend * width
    squares = counts * (values - mean) ** 2
    parts = [spread, several * several * width, several * width * width, squares]
    sums = total(xp.stack(parts + [xp.where(inside, counts, 0) for inside in within]))
    entropy = sums[0] / sum_ + 2 * faint * (log_size + 70) + rounding * xp.maximum(1, metrics.entropy)
    gini = sums[1] / (4 * size * sum_) + 2 * faint + rounding
    deviation = xp.sqrt(sums[3] / size)
    std = (xp.sqrt(deviation**2 + sums[2] / (4 * size)) - deviation + 1e-5 * deviation) / mean + 1e-6 + faint
    targets = xp.asarray(SHARES, dtype=dtype) * sum_
    fewest = reached(values, counts, running, through, targets * (1 - slack), ends)
    most = reached(values, counts, running, through, targets * (1 + slack))
    exact = xp.asarray(rounding, dtype=dtype)
    found = [
        entropy,
        entropy / log_size + rounding,
        xp.expm1(xp.minimum(entropy, 80)) + rounding,
        entropy + rounding,
        entropy / log_size + rounding,
        gini,
        *((xp.minimum(most, size) - xp.minimum(fewest, size)) / size + rounding),
        exact,
        exact,
        *(sums[4:] / size + rounding),
        rounding + faint,
        std,
        exact,
    ]
    stands = (through[-1] > 0) & (_float(sketch.bins[INVALID_BIN, :2], dtype) == 0)
    return Bounds(*(xp.where(stands, bound, 0).astype(np.float32) for bound in found))
