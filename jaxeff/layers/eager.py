"""The numbers of layers whose arrays are concrete.

A program for each kind of weight scores it and two that all models share reduce the scores; what comes out
becomes metrics on the host, which compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxeff.importance import Criterion
from jaxeff.importance import _null as null
from jaxeff.layers.reduction import (
    SMALL,
    TOGETHER,
    Read,
    Reduced,
    is_sorted,
    layer_numbers,
    nonfinite_count,
    padded,
    padded_length,
    read_spread,
    reduce,
    sums_of_units,
    untallied,
    was_seen,
)
from jaxeff.layers.stacks import (
    Arrays,
    Index,
    Layer,
    layer_axes,
    nameless,
    part_of,
    positions,
    shadow,
)
from jaxeff.metrics import _order, sketch
from jaxeff.metrics._histogram import Histogram, histogram
from jaxeff.metrics._weighted import Spread, effective_units, metrics_of, sums_of
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.placement import to_host
from jaxeff.report import LayerNumbers
from jaxeff.statistics import (
    Derivatives,
    SiteStatistics,
)


def measure_eagerly(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    sites = to_host([layer.arrays.sites for layer in layers])
    seen = [_seen_by_part(criterion, layer, own) for layer, own in zip(layers, sites, strict=True)]
    together = [at for at, layer in enumerate(layers) if _goes_with_others(layer)]
    scored = _score_together(
        criterion,
        tuple(padded_length(layers[at]) for at in together),
        tuple((nameless(layers[at].arrays), seen[at]) for at in together),
    )
    rows = dict(zip(together, scored, strict=True))
    found: list[Any] = []
    for at, layer in enumerate(layers):
        if at in rows:
            scores, reduced = rows[at]
            read = [_read_row(layer, scores, part, curves) for part in range(len(layer.indices))]
            found.append((read, reduced))
        else:
            alone = zip(layer.indices, seen[at], strict=True)
            found.append(
                (None, [_reduce_alone(criterion, layer, index, one, curves) for index, one in alone])
            )
    # All programs are started before the first result is waited for.
    finished = [
        _finish(criterion, layer, index, *part, curves)
        for layer, (read, reduced) in zip(layers, to_host(found), strict=True)
        for index, part in zip(
            layer.indices,
            reduced if read is None else zip(read, unstacked(reduced, len(read)), strict=True),
            strict=True,
        )
    ]
    numbers, units = zip(*finished, strict=True)
    return jax.tree.map(lambda *parts: np.stack(parts, axis=-1), *numbers), units


def _seen_by_part(criterion: Criterion, layer: Layer, sites: Sequence[SiteStatistics]) -> np.ndarray:
    """Of each of the layers that a weight stacks, from the sums of its uses on the host."""
    arrays = Arrays(shadow(layer.arrays.weight), tuple(sites), Derivatives())
    return np.asarray([was_seen(criterion, part_of(arrays, index).sites) for index in layer.indices], bool)


def _goes_with_others(layer: Layer) -> bool:
    """Whether its scores may exist beside those of others, so that one program makes all of them."""
    small = layer.size * len(layer.indices) <= TOGETHER
    return small and (layer.size <= SMALL or not _lies_in_parts(layer.arrays))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_together(
    criterion: Criterion, lengths: tuple[int, ...], layers: tuple[tuple[Arrays, Any], ...]
) -> list[tuple[jax.Array, Reduced]]:
    """The scores of each layer as rows [stacked layers, its length], and what else is read of it."""

    def one(length: int, arrays: Arrays, index: Index, seen: Any) -> tuple[jax.Array, Reduced]:
        scores, reduced = reduce(criterion, part_of(arrays, index), seen)
        return padded(scores, length), reduced

    def all_of(length: int, arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
        if not layer_axes(arrays):
            return jax.tree.map(lambda array: array[None], one(length, arrays, (), seen[0]))
        steps = positions(arrays), seen
        return lax.map(lambda step: one(length, arrays, tuple(step[0]), step[1]), steps)

    def every(layers: tuple[tuple[Arrays, Any], ...]) -> list[tuple[jax.Array, Reduced]]:
        return [all_of(length, *layer) for length, layer in zip(lengths, layers, strict=True)]

    return by_compiler(every, layers)


def _read_row(layer: Layer, rows: jax.Array, part: int, curves: bool) -> Any:
    """What is read of the scores of one layer [length], by a program that all models share."""
    at, size = np.int32(part), np.int32(layer.size)
    return _sorted_row(rows, at, size, curves) if is_sorted(layer) else _counted_row(rows, at, size)


@functools.partial(jax.jit, static_argnums=3)
def _sorted_row(rows: jax.Array, at: jax.Array, size: jax.Array, curves: bool) -> Read:
    return read_spread(_order.spread_of(lax.dynamic_index_in_dim(rows, at, keepdims=False), size), curves)


@jax.jit
def _counted_row(rows: jax.Array, at: jax.Array, size: jax.Array) -> Histogram:
    return histogram(lax.dynamic_index_in_dim(rows, at, keepdims=False), size)


def _reduce_alone(
    criterion: Criterion, layer: Layer, index: Index, seen: Any, curves: bool
) -> tuple[Any, Reduced]:
    """Of a layer that is large, or lies in parts."""
    arrays, at = nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if not is_sorted(layer):
        # Without a copy of a length that others share: of many weights that costs more than compiling.
        return _count_alone(criterion, _sharding_of(arrays), arrays, at, seen)
    scores, reduced = _score_alone(criterion, padded_length(layer), arrays, at, seen)
    return _read_row(layer, scores, 0, curves), reduced


def _lies_in_parts(arrays: Arrays) -> bool:
    sharding = getattr(arrays.weight, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated


def _sharding_of(arrays: Arrays) -> NamedSharding | None:
    """How each of the stacked layers lies, where that is in parts, and not for the compiler to know."""
    sharding = arrays.weight.sharding if _lies_in_parts(arrays) else None
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    spec = [*sharding.spec, *[None] * (arrays.weight.ndim - len(sharding.spec))]
    kept = [entry for axis, entry in enumerate(spec) if axis not in layer_axes(arrays)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_alone(
    criterion: Criterion, length: int, arrays: Arrays, index: Index, seen: Any
) -> tuple[jax.Array, Reduced]:
    def score(arrays: Arrays) -> tuple[jax.Array, Reduced]:
        scores, reduced = reduce(criterion, part_of(arrays, index), seen)
        return padded(scores, length)[None], reduced

    return by_compiler(score, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_alone(
    criterion: Criterion, sharding: NamedSharding | None, arrays: Arrays, index: Index, seen: Any
) -> tuple[Histogram, Reduced]:
    def count(arrays: Arrays) -> tuple[Histogram, Reduced]:
        scores, reduced = reduce(criterion, part_of(arrays, index), seen)
        return histogram(scores, sharding=sharding), reduced

    return by_compiler(count, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _squares(criterion: Criterion, arrays: Arrays, index: Index, seen: Any) -> jax.Array:
    def squares(arrays: Arrays) -> jax.Array:
        return sketch.squares_of(reduce(criterion, part_of(arrays, index), seen)[0])

    return by_compiler(squares, arrays)


@jax.jit
def _nonfinite_of(arrays: Arrays, index: Index) -> jax.Array:
    return nonfinite_count(part_of(arrays, index).weight)


@np.errstate(all="ignore")
def _finish(
    criterion: Criterion, layer: Layer, index: Index, read: Any, reduced: Reduced, curves: bool
) -> tuple[LayerNumbers, np.ndarray]:
    """The numbers of one layer, and the importance of its units, on the host."""
    arrays, at = nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if isinstance(read, Read):
        metrics, cells = metrics_of(read.sums.astype(np.float64)), read.cells
    else:
        counts = sketch.of_histogram(read, layer.size)
        spread, integers = sketch.spread_of(counts, np.float64), sketch.integers_of(counts)
        sums, cells = read_spread(spread, curves)
        metrics = metrics_of(sums, integers)
        if metrics.std < _NEARLY_EQUAL * metrics.mean:
            # Bins are too wide to tell the deviation of weights that are nearly equal.
            metrics = metrics_of(sums, integers, to_host(_squares(criterion, arrays, at, reduced.usable)))
    noise = None
    if null.is_sampled(criterion):
        factors = reduced.factors.astype(np.float64)
        sample = Spread(null.sample_of(criterion, factors, reduced.usable), untallied(np.zeros(null.SIZE)))
        noise = null.null_of(criterion, null.utilization_of(factors), reduced.usable, sums_of(sample))
    effective = effective_units(reduced.units.astype(np.float64), reduced.units.ndim)
    # The largest tells whether there are any.
    nonfinite = np.int32(0) if np.isfinite(reduced.largest) else to_host(_nonfinite_of(arrays, at))
    numbers = layer_numbers(criterion, metrics, noise, effective, reduced, nonfinite, cells)
    dtype = reduced.units.dtype
    return jax.tree.map(lambda part: _narrowed(part, dtype), numbers), sums_of_units(
        reduced.units, layer.size
    )


_NEARLY_EQUAL = 0.2


def _narrowed(number: Any, dtype: Any) -> np.ndarray:
    number = np.asarray(number)
    return number.astype(dtype) if number.dtype.kind == "f" else number


def unstacked(reduced: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda array, at=at: array[at], reduced) for at in range(count)]
