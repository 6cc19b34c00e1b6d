"""The numbers of layers whose arrays are concrete.

One program of the model scores all but the large layers, and their scores are read on the host, which
compiles nothing. A large layer is scored alone, and on a CPU its scores are counted by a program that all layers share.
On an accelerator, or where it lies in parts, it is counted in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxeff.importance import Criterion
from jaxeff.importance import _null as null
from jaxeff.layers.reduction import (
    SMALL,
    Read,
    Reduced,
    is_sorted,
    layer_numbers,
    means_of_units,
    nonfinite_count,
    read_spread,
    reduce,
    score,
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
    unit_axes,
)
from jaxeff.metrics import _order, sketch
from jaxeff.metrics._histogram import Histogram, histogram, histogram_in_chunks, histogram_on_host
from jaxeff.metrics._records import Metrics
from jaxeff.metrics._weighted import Spread, effective_units, metrics_of, sums_of
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.placement import to_host
from jaxeff.report import LayerNumbers
from jaxeff.statistics import (
    Derivatives,
    SiteStatistics,
)

TOGETHER = 1 << 18
"""One program scores the layers of at most this many weights, which take no more bytes than a histogram."""


def measure_eagerly(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    sites = to_host([layer.arrays.sites for layer in layers])
    seen = [_seen_by_part(criterion, layer, own) for layer, own in zip(layers, sites, strict=True)]
    together = [at for at, layer in enumerate(layers) if _goes_with_others(layer)]
    scored = _score_together(criterion, tuple((nameless(layers[at].arrays), seen[at]) for at in together))
    rows = dict(zip(together, scored, strict=True))
    # Start all programs before waiting for the first result.
    started: list[Any] = [
        rows[at]
        if at in rows
        else [
            _reduce_alone(criterion, layer, index, one, curves)
            for index, one in zip(layer.indices, seen[at], strict=True)
        ]
        for at, layer in enumerate(layers)
    ]
    finished = [
        _finish(criterion, layer, index, read, reduced, curves)
        for layer, parts in zip(layers, to_host(started), strict=True)
        for index, (read, reduced) in zip(layer.indices, _apart(parts), strict=True)
    ]
    numbers, units = zip(*finished, strict=True)
    return jax.tree.map(lambda *parts: np.stack(parts, axis=-1), *numbers), units


def _seen_by_part(criterion: Criterion, layer: Layer, sites: Sequence[SiteStatistics]) -> np.ndarray:
    """Return for each layer that a weight stacks whether its activations were seen, from sums on the host."""
    arrays = Arrays(shadow(layer.arrays.weight), tuple(sites), Derivatives())
    return np.asarray([was_seen(criterion, part_of(arrays, index).sites) for index in layer.indices], bool)


def _goes_with_others(layer: Layer) -> bool:
    """Return whether a layer's scores may exist beside those of others, so that one program makes them all."""
    small = layer.size * len(layer.indices) <= TOGETHER
    return small and (layer.size <= SMALL or not _lies_in_parts(layer.arrays))


@functools.partial(jax.jit, static_argnums=0)
def _score_together(
    criterion: Criterion, layers: tuple[tuple[Arrays, Any], ...]
) -> list[tuple[jax.Array, Reduced]]:
    """Return the scores of each layer, [stacked layers, ...], and its other numbers."""

    def all_of(arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
        if not layer_axes(arrays):
            return jax.tree.map(lambda array: array[None], score(criterion, arrays, seen[0]))
        steps = positions(arrays), seen
        return lax.map(lambda step: score(criterion, part_of(arrays, tuple(step[0])), step[1]), steps)

    def every(layers: tuple[tuple[Arrays, Any], ...]) -> list[tuple[jax.Array, Reduced]]:
        return [all_of(*layer) for layer in layers]

    return by_compiler(every, layers)


def _reduce_alone(
    criterion: Criterion, layer: Layer, index: Index, seen: Any, curves: bool
) -> tuple[Any, Reduced]:
    """Reduce a layer that is large, or lies in parts."""
    arrays, at = nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if is_sorted(layer):
        return _sort_alone(criterion, curves, arrays, at, seen)
    # Under a mesh, JAX refuses programs of one device's arrays.
    on_cpu = all(device.platform == "cpu" for device in arrays.weight.devices())
    if _lies_in_parts(arrays) or not on_cpu or not jax.sharding.get_abstract_mesh().empty:
        return _count_alone(criterion, _sharding_of(arrays), arrays, at, seen)
    scores, reduced = _score_alone(criterion, arrays, at, seen)
    return histogram_in_chunks(to_host(scores)), reduced


def _lies_in_parts(arrays: Arrays) -> bool:
    sharding = getattr(arrays.weight, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated


def _sharding_of(arrays: Arrays) -> NamedSharding | None:
    """Return the layout of each stacked layer, if it lies in parts and the layout is known."""
    sharding = arrays.weight.sharding if _lies_in_parts(arrays) else None
    if sharding is None or AxisType.Explicit in sharding.mesh.axis_types:
        return None
    spec = [*sharding.spec, *[None] * (arrays.weight.ndim - len(sharding.spec))]
    kept = [entry for axis, entry in enumerate(spec) if axis not in layer_axes(arrays)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sort_alone(
    criterion: Criterion, curves: bool, arrays: Arrays, index: Index, seen: Any
) -> tuple[Read, Reduced]:
    def sort(arrays: Arrays) -> tuple[Read, Reduced]:
        scores, reduced = reduce(criterion, part_of(arrays, index), seen)
        return read_spread(_order.spread_of(scores.ravel(), scores.size), curves), reduced

    return by_compiler(sort, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _score_alone(criterion: Criterion, arrays: Arrays, index: Index, seen: Any) -> tuple[jax.Array, Reduced]:
    return by_compiler(lambda arrays: reduce(criterion, part_of(arrays, index), seen), arrays)


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
    """Return the numbers of one layer, and the importance of its units, on the host.

    Args:
        read: the layer's scores, or their counts.
    """
    arrays, at = nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if isinstance(read, Read):
        metrics, cells = metrics_of(read.sums.astype(np.float64)), read.cells
    elif isinstance(read, Histogram):
        squares = functools.partial(_squares, criterion, arrays, at, reduced.usable)
        metrics, cells = _of_counts(read, layer.size, lambda: to_host(squares()), curves)
    else:
        axes = unit_axes(part_of(jax.tree.map(shadow, arrays), index))
        reduced = reduced._replace(units=means_of_units(read, axes))
        metrics, cells = _of_scores(read.ravel(), is_sorted(layer), curves)
    noise = None
    if null.is_sampled(criterion):
        factors = reduced.factors.astype(np.float64)
        sample = Spread(null.sample_of(criterion, factors, reduced.usable), untallied(np.zeros(null.SIZE)))
        noise = null.null_of(criterion, null.utilization_of(factors), reduced.usable, sums_of(sample))
    effective = effective_units(reduced.units.astype(np.float64), reduced.units.ndim)
    # The largest weight tells whether any is not finite.
    nonfinite = np.int32(0) if np.isfinite(reduced.largest) else to_host(_nonfinite_of(arrays, at))
    numbers = layer_numbers(criterion, metrics, noise, effective, reduced, nonfinite, cells)
    dtype = reduced.units.dtype
    return jax.tree.map(lambda part: _narrowed(part, dtype), numbers), sums_of_units(
        reduced.units, layer.size
    )


def _of_scores(scores: np.ndarray, in_order: bool, curves: bool) -> tuple[Metrics, Any]:
    if in_order:
        sums, cells = read_spread(_order.spread_on_host(scores), curves)
        return metrics_of(sums), cells
    return _of_counts(histogram_on_host(scores), scores.size, lambda: _order.squares_on_host(scores), curves)


def _of_counts(counts: Histogram, size: int, squares: Callable[[], Any], curves: bool) -> tuple[Metrics, Any]:
    """Return the metrics of a layer from its bins.

    Args:
        squares: returns sum (v - mean)^2 relative to the largest, if bins are too wide for it.
    """
    sketched = sketch.of_histogram(counts, size)
    spread, integers = sketch.spread_of(sketched, np.float64), sketch.integers_of(sketched)
    sums, cells = read_spread(spread, curves)
    metrics = metrics_of(sums, integers)
    if metrics.std < _NEARLY_EQUAL * metrics.mean:
        metrics = metrics_of(sums, integers, squares())
    return metrics, cells


_NEARLY_EQUAL = 0.2


def _narrowed(number: Any, dtype: Any) -> np.ndarray:
    number = np.asarray(number)
    return number.astype(dtype) if number.dtype.kind == "f" else number


def _apart(parts: Any) -> list[Any]:
    """Split into one for each layer that a weight stacks."""
    if isinstance(parts, list):
        return parts
    return [jax.tree.map(lambda array, at=at: array[at], parts) for at in range(len(parts[0]))]
