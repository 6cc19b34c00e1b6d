"""Metrics of weights of any number, from one pass: `sketch` counts, `merge` adds, `summarize` tells.

whole = sketch(x)                                     one pass
whole = merge(sketch(part), sketch(other))            the same to the bit, however x is cut
metrics, bounds = summarize(whole)                    each metric, and how far off it may be
metrics, bounds = summarize(whole, refine(whole, x))  after a second pass, within 3e-6
metrics, bounds = summarize_array(x)                  both passes
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxeff import bins, certified, distribution, moments
from jaxeff.certified import Bounds as Bounds
from jaxeff.certified import Places
from jaxeff.exact import Metrics, checked
from jaxeff.moments import Whole

_GOOD = 2.0**-19  # a bound that asks for no second pass
_ROWS = 64  # that cells can be in: what is 2^64 below the largest weight decides nothing
_CELLS = 5 << bins.PLACE_BITS  # 3 bins with one a float, some by use, some by count
_NONE = np.uint32(_CELLS << 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Counts of an array's bit patterns: unsigned integers, exact for up to 2^40 weights, 1.6 MB.

    Bins are the first 17 bits of a float32's pattern, in rows of one exponent. Adding two sketches
    (`merge`) gives that of both arrays. Of the last row, which no number has, the first bin holds the
    entries that are no importance, and the second zeros.
    """

    sums: Array
    """[256, 512, 2], of each bin its weights and the sum of their patterns' last 14 bits, modulo 2^32."""
    high: Array
    """[256, 512], the multiples of 2^32 in these: 8 bits and 24 bits."""
    tallies: Array
    """[3, 2], entries, and weights but 0 below 1e-3 and 1e-2: low and high word."""
    extremes: Array
    """[2], the largest pattern less infinity's, and the smallest but 0 negated, modulo 2^32: maxima."""
    grain: Array
    """[], how many last bits of every pattern are known to be 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Refinement:
    """A second pass over the weights of a sketch: those of its crowded bins in finer cells."""

    table: Array
    """[64 * 512 + 1], of each bin from the base on its first cell and the logarithm of how many it has."""
    base: Array
    """[1], the first of these bins."""
    layout: Array
    """[81920], of each cell its bin and the logarithm of how many that has."""
    cells: Array
    """[81920, 2], of each cell its weights and the sum of their places in it."""
    used: Array
    """[], how many cells the bins have."""
    below: Array
    """[2, 2], weights but 0 below 1e-2 and 1e-3 of the mean: low and high word."""
    counted: Array
    """[], whether these were counted."""

    def holds(self, row: Array) -> Array:
        """[512], which bins of a row have cells."""
        index = row - (self.base[0] // bins.COLUMNS).astype(jnp.int32)
        entries = self.table[:-1].reshape(_ROWS, bins.COLUMNS)[jnp.clip(index, 0, _ROWS - 1)]
        return (entries < _NONE) & (index >= 0) & (index < _ROWS)

    def first_cell(self, bin_: Array) -> Array:
        return (self.table[bin_.astype(jnp.uint32) - self.base[0]] >> 4).astype(jnp.int32)


Part = TypeVar("Part", Sketch, Refinement)


@jax.jit
def sketch(x: ArrayLike, size: ArrayLike | None = None) -> Sketch:
    """Counts of x [...], in one pass; without derivatives.

    The bin of a weight is its bit pattern >> 14, its place in it the last 14 bits. An entry that is no
    importance (nan, infinite or negative) makes every float metric nan. Values are taken as float32, which
    the narrower dtypes fit exactly and others are rounded to.

    Args:
        x: [...], importances, at most 2^31 - 1.
        size: [], an integer, which may be traced: only so many of the first entries of x.ravel() count, and
            the others must be 0.

    Raises:
        ValueError: x is empty, or too large for one pass.
        TypeError: x is no array, or one of booleans or complex numbers.

    >>> metrics, bounds = summarize(sketch(jnp.array([4.0, 3.0, 2.0, 1.0])))
    >>> metrics.coverage_90, bounds.coverage_90 < 1e-6
    (Array(0.75, dtype=float32), Array(True, dtype=bool))
    """
    x = _checked(x)
    counts = bins.count(x)
    shape = (bins.ROWS, bins.COLUMNS)
    size = jnp.asarray(x.size if size is None else size).astype(jnp.uint32)
    tallies = jnp.concatenate([size[None], counts.below])
    sums = counts.sums.reshape(*shape, 2)
    return Sketch(
        sums.at[-1, 1, 0].add(size - np.uint32(x.size)),  # as many zeros less
        counts.high.reshape(shape),
        jnp.stack([tallies, jnp.zeros_like(tallies)], axis=1),
        counts.extremes,
        jnp.int32(bins.grain(x.dtype)),
    )


def _checked(x: ArrayLike) -> Array:
    x = checked(x)
    if x.size >= 2**31:
        raise ValueError(
            f"`x` must have fewer than 2^31 entries; got {x.shape}. Use `merge` on sketches of parts."
        )
    return lax.stop_gradient(x if x.ndim else x[None])


@jax.jit
def merge(a: Part, b: Part) -> Part:
    """The sketch of two arrays together, to the bit; of two refinements of one sketch, their sum.

    Bins add, a + b, so that order and grouping change nothing.

    Args:
        a: a Sketch or a Refinement.
        b: the like.

    Raises:
        TypeError: a and b are not of one kind.

    >>> parts = sketch(jnp.array([4.0, 3.0])), sketch(jnp.array([2.0, 1.0]))
    >>> summarize(merge(*parts))[0].size
    Array(4, dtype=int32)
    """
    if isinstance(a, Refinement) and isinstance(b, Refinement):
        return dataclasses.replace(a, cells=a.cells + b.cells, below=_added(a.below, b.below))
    if not (isinstance(a, Sketch) and isinstance(b, Sketch)):
        kinds = f"{type(a).__name__} and {type(b).__name__}"
        raise TypeError(f"`a` and `b` must be two sketches, or two refinements of one; got {kinds}.")
    sums, carry = bins.add(a.sums, b.sums)
    return Sketch(
        sums,
        a.high + b.high + carry[..., 1] + (carry[..., 0] << 24),
        _added(a.tallies, b.tallies),
        jnp.maximum(a.extremes, b.extremes),
        jnp.minimum(a.grain, b.grain),
    )


def _added(a: Array, b: Array) -> Array:
    """Sums of numbers [K, 2] of a low and a high word."""
    low, carry = bins.add(a[:, 0], b[:, 0])
    return jnp.stack([low, a[:, 1] + b[:, 1] + carry], axis=1)


@jax.jit
def summarize(sketch: Sketch, refinement: Refinement | None = None) -> tuple[Metrics, Bounds]:
    """Every metric of the weights of a sketch, and how far it may be from exact arithmetic on them.

    |metric - exact| <= bound, or <= bound * exact where `Bounds` says so. Counts are exact up to 2^31 - 1,
    where they stop.

    Args:
        sketch: of fewer than 2^40 weights.
        refinement: by all weights of this sketch. From 10^5 weights to 2^31 - 1 it brings every bound below
            3e-6.

    >>> metrics, bounds = summarize(sketch(jnp.array([3.0, 1.0, 0.0, 0.0])))
    >>> metrics.gini, bounds.gini < 1e-6
    (Array(0.625, dtype=float32), Array(True, dtype=bool))
    """
    whole = moments.whole_of(sketch)
    return certified.certify(sketch, whole, certified.find_all(sketch, whole), refinement)


@jax.jit
def distribute(sketch: Sketch) -> Array:
    """How the weights of a sketch are spread, as `distribution.of` has it: each bin is in one cell."""
    rows, last = jnp.arange(bins.ROWS - 1, dtype=jnp.int32), moments.largest_of(sketch) >> 23
    held = jax.vmap(lambda row: moments.row_of(sketch, row))(rows)
    values = held.level[0] * moments.factor_of(last.astype(jnp.int32), rows)[:, None]
    values = jnp.where(held.weights > 0, values, 0)
    size = moments.pair_of(*sketch.tallies[0])[0]
    cells = distribution.of(values.reshape(-1), held.weights.reshape(-1), size)
    return jnp.where(sketch.sums[-1, 0, 0] > 0, jnp.nan, cells)


@jax.jit
def refine(sketch: Sketch, x: ArrayLike) -> Refinement:
    """A second pass, over x [...]: what leaves the bounds of the sketch wide, counted in finer cells.

    Of weights in parts, refine the sketch of all by each part, and `merge` the refinements.

    Args:
        sketch: of all the weights.
        x: [...], the same weights or a part of them; zeros count for nothing.

    Raises:
        ValueError: x is empty, or too large for one pass.
        TypeError: x is no array, or one of booleans or complex numbers.

    >>> x = jnp.array([4.0, 3.0, 2.0, 1.0])
    >>> whole = sketch(x)
    >>> summarize(whole, refine(whole, x))[0].coverage_50
    Array(0.5, dtype=float32)
    """
    whole = moments.whole_of(sketch)
    return _refined(sketch, whole, certified.find_all(sketch, whole), _checked(x))


@jax.jit
def summarize_array(x: ArrayLike) -> tuple[Metrics, Bounds]:
    """summarize(s, refine(s, x)) with s = sketch(x), in one program.

    Raises:
        ValueError: x [...] is empty, or too large for one pass.
        TypeError: x is no array, or one of booleans or complex numbers.

    >>> metrics, bounds = summarize_array(jnp.array([1.0, 1.0, 0.0, 0.0]))
    >>> metrics.effective_params, bounds.effective_params < 1e-6
    (Array(2., dtype=float32), Array(True, dtype=bool))
    """
    counts = sketch(x)
    whole = moments.whole_of(counts)
    found = certified.find_all(counts, whole)
    return certified.certify(counts, whole, found, _refined(counts, whole, found, _checked(x)))


def _refined(sketch: Sketch, whole: Whole, places: Places, x: Array) -> Refinement:
    first = jnp.maximum(whole.last - (_ROWS - 1), 0)
    counts = lax.dynamic_slice(sketch.sums, (first, np.int32(0), np.int32(0)), (_ROWS, bins.COLUMNS, 1))[
        ..., 0
    ]
    cells, count, shared = _wanted(sketch, whole, places, first, counts)
    nothing = jnp.full(counts.size + 1, _NONE), jnp.zeros(_CELLS, jnp.uint32), jnp.int32(0)
    table, layout, used = lax.cond(
        cells, lambda: _plan(sketch, first, counts.reshape(-1), shared, places.crossings.bin), lambda: nothing
    )
    base = (first * bins.COLUMNS).astype(jnp.uint32)[None]
    filled = bins.fill(x, table, base, layout, places.limits, jnp.stack([cells, count]).astype(jnp.int32))
    below = jnp.where(count, filled.below, 0)
    below = jnp.stack([below, jnp.zeros_like(below)], axis=1)
    return Refinement(table, base, layout, filled.cells, used, below, count)


def _wanted(
    sketch: Sketch, whole: Whole, places: Places, first: Array, counts: Array
) -> tuple[Array, Array, Array]:
    """Whether a bound may be above _GOOD without cells, and without counts below the limits; shared bins."""
    total, size, mean, crossing = whole.total[0], whole.size[0], whole.mean[0], places.crossings
    row, column = first + jnp.arange(_ROWS, dtype=jnp.int32), jnp.arange(bins.COLUMNS, dtype=jnp.float32)
    factor, count = moments.factor_of(whole.last, row)[:, None], counts.astype(jnp.float32)
    off = column[None] * factor + (moments.base_of(row)[:, None] * factor - mean)
    lanes = (
        (counts > 1).astype(jnp.float32),
        count * count * factor,
        count * factor * factor,
        count * off * off,
    )
    shared, crowding, blur, spread = bins.across([lax.add] * 4, *(lane.reshape(-1) for lane in lanes))
    # Weights may be up to a step above the start of their bin, by which `off` measures them.
    spread = jnp.maximum(jnp.sqrt(spread) - jnp.sqrt(blur), 0) ** 2
    subnormal = jnp.where(whole.last > 0, whole.before[0][1, 1], total)
    width = (crossing.most - crossing.least) / jnp.maximum(crossing.least, moments.STEP)
    crossed = (crossing.weights[0] > 1) & (width > 0) & (width * crossing.weights[0] / 4 + 1 > _GOOD * size)
    coarse = (
        (crowding / 6 > _GOOD * size * total) | (blur / 12 > _GOOD * spread) | (subnormal > _GOOD * total)
    )
    open_ = ~moments.is_sure(sketch) & ~certified.is_even(sketch, whole)
    cells = open_ & (size < 2.0**31) & (coarse | crossed.any())
    return cells, open_ & (places.bounds.weights[0] > _GOOD * size).any(), shared


def _plan(
    sketch: Sketch, row: Array, counts: Array, shared: Array, crossed: Array
) -> tuple[Array, Array, Array]:
    """Table, layout and number of cells.

    A bin has them by how few bins are in use, and by its share of the weights: so few are in a cell of many
    floats that the sum of their places fits one word. A crossed one has one for each float.
    """
    index = row * bins.COLUMNS + jnp.arange(counts.size, dtype=jnp.int32)
    spare, depth = jnp.zeros((), jnp.uint32), jnp.zeros(counts.shape, jnp.uint32)
    for number in range(bins.PLACE_BITS):
        spare = spare + (shared <= 2.0**number).astype(jnp.uint32)
        depth = depth + (counts >= (sketch.tallies[0, 0] + ((1 << number) - 1)) >> number).astype(jnp.uint32)
    depth = jnp.where(counts > 1, jnp.maximum(depth, spare), 0)
    is_crossed = (index[None] == crossed[:, None]).any(axis=0) & (counts > 0)
    depth = jnp.where(is_crossed, np.uint32(bins.PLACE_BITS), depth)
    number = jnp.where(depth > 0, np.uint32(1) << depth, 0)
    through = moments.running_over(lax.cumsum, number, bins.COLUMNS)
    first, used = through - number, through[-1]
    table = jnp.append(jnp.where(depth > 0, (first << 4) | depth, _NONE), _NONE)
    at_first = jnp.where(depth > 0, first, np.uint32(_CELLS))
    marks = (
        jnp.zeros(_CELLS, jnp.uint32).at[at_first].set((index.astype(jnp.uint32) << 4) | depth, mode="drop")
    )
    layout = moments.running_over(lax.cummax, marks, 1024)
    in_use = jnp.arange(_CELLS, dtype=jnp.uint32) < used
    return table, jnp.where(in_use, layout, 0), used.astype(jnp.int32)
