"""The weights of a model -> the numbers of each layer.

A layer's scores are reduced where they lie: up to SMALL of them are sorted, more are counted by bit pattern.
Eagerly by a program for each kind of weight and two that all models share, whose few numbers are made metrics on
the host, where nothing is compiled. In a trace all of it is inlined, with one loop over the layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxeff import granularity, half_normal, importance, null
from jaxeff.importance import Criterion
from jaxeff.meshes import by_compiler
from jaxeff.metrics import _order, sketch
from jaxeff.metrics._curve import cells_of, unpacked
from jaxeff.metrics._histogram import Histogram, histogram
from jaxeff.metrics._records import Metrics
from jaxeff.metrics._weighted import Spread, effective_units, metrics_of, sums_of
from jaxeff.numerics.placement import each_row, to_host
from jaxeff.numerics.precision import wide, widened
from jaxeff.numerics.summation import namespace
from jaxeff.records import Activity, LayerNumbers, LayerStructure, Null, none_of
from jaxeff.statistics import (
    AttentionStatistics,
    Derivatives,
    HeadSlices,
    Place,
    SiteStatistics,
    UnitStatistics,
)

SMALL = 1 << 14
"""Layers of up to so many weights are sorted: the length that they are padded to."""

Index = tuple[Any, ...]


class Arrays(NamedTuple):
    """A weight, its uses (none for a weight that was not paired), and its derivatives."""

    weight: Any
    sites: tuple[SiteStatistics, ...]
    derivatives: Derivatives


class Layer(NamedTuple):
    """A weight under its name."""

    place: Place
    arrays: Arrays

    @property
    def size(self) -> int:
        """Weights of each of the layers that it stacks."""
        return math.prod(self.place.shape) // math.prod(self.place.shape[a] for a in _layer_axes(self.arrays))

    @property
    def indices(self) -> list[Index]:
        """One for each of the layers that it stacks; an empty one where it is one layer."""
        return [*itertools.product(*(range(self.place.shape[axis]) for axis in _layer_axes(self.arrays)))]


def _layer_axes(arrays: Arrays) -> tuple[int, ...]:
    stacking = {site.layer_axes for site in arrays.sites}
    return stacking.pop() if len(stacking) == 1 else ()


def _unit_axes(arrays: Arrays) -> tuple[int, ...]:
    # Flax lays every kernel out with its units last; where no operation was read that has to do.
    return arrays.sites[0].unit_axes if arrays.sites else (arrays.weight.ndim - 1,)


def part_of(arrays: Arrays, index: Index) -> Arrays:
    """One of the layers that a weight stacks; `index` may be traced."""
    axes = _layer_axes(arrays)
    if not axes:
        return arrays
    rank = arrays.weight.ndim
    at_axis = dict(zip(axes, index, strict=True))
    kept = [axis for axis in range(rank) if axis not in axes]
    stacked = math.prod(arrays.weight.shape[axis] for axis in axes)

    def pick(array: Any) -> Any:
        if array.ndim != rank:
            return array
        # Sums that all layers share have size 1 there.
        return array[
            tuple(
                (0 if array.shape[axis] == 1 else at_axis[axis]) if axis in axes else slice(None)
                for axis in range(rank)
            )
        ]

    def pick_sums(sums: UnitStatistics) -> UnitStatistics:
        picked = jax.tree.map(pick, sums)
        return dataclasses.replace(picked, count=picked.count.reshape(()))

    def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(kept.index(axis) for axis in axes if axis in kept)

    sites = tuple(
        dataclasses.replace(
            site,
            input=pick_sums(site.input),
            pre=pick_sums(site.pre),
            post=pick_sums(site.post),
            gate=jax.tree.map(pick, site.gate),
            unit_axes=renumbered(site.unit_axes),
            input_axes=renumbered(site.input_axes),
            layer_axes=(),
            macs=None if site.macs is None else site.macs // stacked,
        )
        for site in arrays.sites
    )
    return Arrays(pick(arrays.weight), sites, jax.tree.map(pick, arrays.derivatives))


def structures(criterion: Criterion, layer: Layer) -> list[LayerStructure]:
    """All that is known before any number, of each of the layers that a weight stacks."""
    place, arrays = layer
    part = part_of(jax.tree.map(_shadow, arrays), layer.indices[0])
    first = part.sites[0] if part.sites else None
    macs = [site.macs for site in part.sites]
    common = LayerStructure(
        path=place.path,
        kind=first.kind if first else "weight",
        shape=part.weight.shape,
        dtype=place.dtype,
        nonlinearity=first.nonlinearity if first else None,
        scored="magnitude" if criterion.reads_activations and not first else criterion.side,
        reason=place.reason,
        uses=len(part.sites),
        unit_axes=_unit_axes(part),
        macs=None if not macs or None in macs else sum(count for count in macs if count is not None),
        uncounted=any(site.uncounted for site in part.sites),
    )
    return [
        dataclasses.replace(common, path=f"{place.path}[{','.join(map(str, index))}]") if index else common
        for index in layer.indices
    ]


def activities(layer: Layer, sites: Sequence[SiteStatistics]) -> list[Activity | None]:
    """What the units of each stacked layer emit, over all uses that have the same units as the first.

    Args:
        sites: of all weights; NumPy's are added up on the host.
    """
    own = tuple(site for site in sites if site.path == layer.place.path)
    arrays = Arrays(_shadow(layer.arrays.weight), own, Derivatives())
    return [_activity(part_of(arrays, index)) for index in layer.indices]


def _activity(arrays: Arrays) -> Activity | None:
    alike = [site.post for site in arrays.sites if site.unit_axes == arrays.sites[0].unit_axes]
    if not alike:
        return None
    sums = functools.reduce(UnitStatistics.__add__, alike)
    shape = tuple(arrays.weight.shape[axis] for axis in _unit_axes(arrays))
    return Activity(shape, sums.absolute_sum.ndim, sums)


def _shadow(array: Any) -> np.ndarray:
    """Zeros of the same shape, in the memory of one."""
    return np.broadcast_to(np.zeros((), np.float32), np.shape(array))


class Reduced(NamedTuple):
    """What one layer's arrays are reduced to beside its scores."""

    units: Any  # the mean importance of each unit's weights, which no sum of large ones overflows
    factors: Any  # of the null; [1] where there is none that is sampled
    usable: Any  # whether what the criterion reads is finite
    largest: Any  # of |w|; nan where one is


def _reduce(criterion: Criterion, arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
    """The scores of a layer, and what is read of it besides.

    Args:
        seen: whether the activations that the criterion reads were seen, and are finite.
    """
    usable = seen
    if criterion.needs:
        finite = [jnp.all(jnp.isfinite(sums)) for sums in jax.tree.leaves(arrays.derivatives)]
        usable = functools.reduce(jnp.logical_and, finite, seen)
    magnitudes = importance.magnitude(widened(arrays.weight))
    # In the weight's own precision, whatever that of the activations, so that equal layers give equal types.
    scores = importance.score(criterion, *arrays).astype(magnitudes.dtype)
    # By magnitude where what the criterion reads is not finite.
    scores = jnp.where(usable, scores, magnitudes)
    within = tuple(axis for axis in range(scores.ndim) if axis not in _unit_axes(arrays))
    count = math.prod(scores.shape[axis] for axis in within)
    units = jnp.sum(scores * np.asarray(1 / count, scores.dtype), axis=within)
    factors = jnp.ones(1, scores.dtype)
    if null.is_sampled(criterion):
        factors = null.factors_of(criterion, arrays.weight, arrays.sites, arrays.derivatives, usable)
    return scores, Reduced(units, factors, jnp.asarray(usable), jnp.max(lax.stop_gradient(magnitudes)))


def _seen(criterion: Criterion, sites: Sequence[SiteStatistics]) -> Any:
    """Whether the activations that the criterion reads were seen at all, and are finite."""
    if not (criterion.reads_activations and sites):
        return np.bool_(True)
    # A branch that was not taken has seen nothing.
    counts = functools.reduce(operator.add, [site.post.count for site in sites])
    sides = {"post": ("post",), "input": ("input",)}.get(criterion.side, ("input", "post"))
    read = [getattr(site, side).absolute_sum for site in sites for side in sides]
    read += jax.tree.leaves([site.gate for site in sites])
    xp = namespace(counts)
    return functools.reduce(operator.and_, [xp.all(xp.isfinite(sums)) for sums in read], xp.all(counts > 0))


def _nonfinite(weight: Any) -> jax.Array:
    return jnp.sum(~jnp.isfinite(weight), dtype=jnp.int32)


def _sums_of_units(means: Any, size: int) -> Any:
    """The importance of each unit: the sum over its weights, of `size` in all."""
    return means * np.asarray(size // max(means.size, 1), means.dtype)


def _padded(scores: jax.Array, length: int) -> jax.Array:
    flat = scores.ravel()
    return jnp.pad(flat, (0, length - flat.size))


def _is_sorted(layer: Layer) -> bool:
    return layer.size <= SMALL or wide(layer.arrays.weight.dtype) == jnp.float64


def _is_small(layer: Layer) -> bool:
    return layer.size <= SMALL and wide(layer.arrays.weight.dtype) == jnp.float32


def _length(layer: Layer) -> int:
    """Padding to few lengths is cheap, and compiling for each is not."""
    bits = (layer.size - 1).bit_length()
    return next((length for length in (SMALL, _TOGETHER, 1 << 20) if layer.size <= length), 1 << bits)


def measure(criterion: Criterion, layers: Sequence[Layer], curves: bool) -> tuple[LayerNumbers, tuple[Any, ...]]:
    """The numbers of all layers, stacked, and the importance of the units of each.

    Args:
        curves: whether to count how the importance of each is spread.
    """
    if not layers:
        return none_of(LayerNumbers), ()
    if _is_traced([layer.arrays for layer in layers]):
        return _measure_traced(criterion, layers, curves)
    return _measure_eagerly(criterion, layers, curves)


# Eagerly


def _measure_eagerly(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    sites = to_host([layer.arrays.sites for layer in layers])
    seen = [_seen_by_part(criterion, layer, own) for layer, own in zip(layers, sites, strict=True)]
    together = [at for at, layer in enumerate(layers) if _goes_with_others(layer)]
    scored = _score_together(
        criterion,
        tuple(_length(layers[at]) for at in together),
        tuple((_nameless(layers[at].arrays), seen[at]) for at in together),
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
            found.append((None, [_reduce_alone(criterion, layer, index, one, curves) for index, one in alone]))
    # All programs are started before the first result is waited for.
    finished = [
        _finish(criterion, layer, index, *part, curves)
        for layer, (read, reduced) in zip(layers, to_host(found), strict=True)
        for index, part in zip(
            layer.indices,
            reduced if read is None else zip(read, _unstacked(reduced, len(read)), strict=True),
            strict=True,
        )
    ]
    numbers, units = zip(*finished, strict=True)
    return jax.tree.map(lambda *parts: np.stack(parts, axis=-1), *numbers), units


def _seen_by_part(criterion: Criterion, layer: Layer, sites: Sequence[SiteStatistics]) -> np.ndarray:
    """Of each of the layers that a weight stacks, from the sums of its uses on the host."""
    arrays = Arrays(_shadow(layer.arrays.weight), tuple(sites), Derivatives())
    return np.asarray([_seen(criterion, part_of(arrays, index).sites) for index in layer.indices], bool)


def _unstacked(reduced: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda array, at=at: array[at], reduced) for at in range(count)]


def _nameless(arrays: Arrays) -> Arrays:
    """Without what tells equal layers apart, so that they share a program."""
    sites = tuple(dataclasses.replace(site, path="", bias=None) for site in arrays.sites)
    return arrays._replace(sites=sites)


def _goes_with_others(layer: Layer) -> bool:
    """Whether its scores may exist beside those of others, so that one program makes all of them."""
    small = layer.size * len(layer.indices) <= _TOGETHER
    return small and (layer.size <= SMALL or _sharding_of(layer.arrays) is None)


_TOGETHER = 1 << 18


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_together(
    criterion: Criterion, lengths: tuple[int, ...], layers: tuple[tuple[Arrays, Any], ...]
) -> list[tuple[jax.Array, Reduced]]:
    """The scores of each layer as rows of its length, [stacked layers, length], and what else is read of it."""

    def one(length: int, arrays: Arrays, index: Index, seen: Any) -> tuple[jax.Array, Reduced]:
        scores, reduced = _reduce(criterion, part_of(arrays, index), seen)
        return _padded(scores, length), reduced

    def all_of(length: int, arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
        if not _layer_axes(arrays):
            return jax.tree.map(lambda array: array[None], one(length, arrays, (), seen[0]))
        steps = _positions(arrays), seen
        return lax.map(lambda step: one(length, arrays, tuple(step[0]), step[1]), steps)

    def every(layers: tuple[tuple[Arrays, Any], ...]) -> list[tuple[jax.Array, Reduced]]:
        return [all_of(length, *layer) for length, layer in zip(lengths, layers, strict=True)]

    return by_compiler(every, layers)


def _positions(arrays: Arrays) -> jax.Array:
    """[stacked layers, axes], the index of each."""
    shape = [arrays.weight.shape[axis] for axis in _layer_axes(arrays)]
    return jnp.asarray(np.stack([part.ravel() for part in np.indices(shape, np.int32)], axis=1))


def _read_row(layer: Layer, rows: jax.Array, part: int, curves: bool) -> Any:
    """What is read of the scores of one layer [length], by a program that all models share."""
    at, size = np.int32(part), np.int32(layer.size)
    return _sorted_row(rows, at, size, curves) if _is_sorted(layer) else _counted_row(rows, at, size)


@functools.partial(jax.jit, static_argnums=3)
def _sorted_row(rows: jax.Array, at: jax.Array, size: jax.Array, curves: bool) -> _Read:
    return _read(_order.spread_of(lax.dynamic_index_in_dim(rows, at, keepdims=False), size), curves)


@jax.jit
def _counted_row(rows: jax.Array, at: jax.Array, size: jax.Array) -> Histogram:
    return histogram(lax.dynamic_index_in_dim(rows, at, keepdims=False), size)


class _Read(NamedTuple):
    """What is read of the spread of a layer."""

    sums: Any
    cells: Any


def _read(spread: Spread, curves: bool) -> _Read:
    return _Read(sums_of(spread), cells_of(spread) if curves else None)


def _reduce_alone(
    criterion: Criterion, layer: Layer, index: Index, seen: Any, curves: bool
) -> tuple[Any, Reduced]:
    """Of a layer that is large, or lies in parts."""
    arrays, at = _nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if not _is_sorted(layer) and (sharding := _sharding_of(arrays)) is not None:
        # What is explicit is left to the compiler, which then counts in place by itself.
        known = None if AxisType.Explicit in sharding.mesh.axis_types else sharding
        return _count_in_place(criterion, known, arrays, at, seen)
    scores, reduced = _score_alone(criterion, _length(layer), arrays, at, seen)
    return _read_row(layer, scores, 0, curves), reduced


def _sharding_of(arrays: Arrays) -> NamedSharding | None:
    """How each of the stacked layers lies, where that is in parts."""
    sharding = getattr(arrays.weight, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    spec = [*sharding.spec, *[None] * (arrays.weight.ndim - len(sharding.spec))]
    kept = [entry for axis, entry in enumerate(spec) if axis not in _layer_axes(arrays)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_alone(
    criterion: Criterion, length: int, arrays: Arrays, index: Index, seen: Any
) -> tuple[jax.Array, Reduced]:
    def score(arrays: Arrays) -> tuple[jax.Array, Reduced]:
        scores, reduced = _reduce(criterion, part_of(arrays, index), seen)
        return _padded(scores, length)[None], reduced

    return by_compiler(score, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_in_place(
    criterion: Criterion, sharding: NamedSharding | None, arrays: Arrays, index: Index, seen: Any
) -> tuple[Histogram, Reduced]:
    def count(arrays: Arrays) -> tuple[Histogram, Reduced]:
        scores, reduced = _reduce(criterion, part_of(arrays, index), seen)
        return histogram(scores, sharding=sharding), reduced

    return by_compiler(count, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _squares(criterion: Criterion, arrays: Arrays, index: Index, seen: Any) -> jax.Array:
    def squares(arrays: Arrays) -> jax.Array:
        return sketch.squares_of(_reduce(criterion, part_of(arrays, index), seen)[0])

    return by_compiler(squares, arrays)


@jax.jit
def _nonfinite_of(arrays: Arrays, index: Index) -> jax.Array:
    return _nonfinite(part_of(arrays, index).weight)


@np.errstate(all="ignore")
def _finish(
    criterion: Criterion, layer: Layer, index: Index, read: Any, reduced: Reduced, curves: bool
) -> tuple[LayerNumbers, np.ndarray]:
    """The numbers of one layer, and the importance of its units, on the host."""
    arrays, at = _nameless(layer.arrays), tuple(np.int32(i) for i in index)
    if isinstance(read, _Read):
        metrics, cells = metrics_of(read.sums.astype(np.float64)), read.cells
    else:
        counts = sketch.of_histogram(read, layer.size)
        spread, integers = sketch.spread_of(counts, np.float64), sketch.integers_of(counts)
        sums, cells = _read(spread, curves)
        metrics = metrics_of(sums, integers)
        if metrics.std < _NEARLY_EQUAL * metrics.mean:
            # Bins are too wide to tell the deviation of weights that are nearly equal.
            metrics = metrics_of(sums, integers, to_host(_squares(criterion, arrays, at, reduced.usable)))
    noise = None
    if null.is_sampled(criterion):
        factors = reduced.factors.astype(np.float64)
        sample = Spread(null.sample_of(criterion, factors, reduced.usable), (np.zeros(null.SIZE),) * 4)
        noise = null.null_of(criterion, null.utilization_of(factors), reduced.usable, sums_of(sample))
    effective = effective_units(reduced.units.astype(np.float64), reduced.units.ndim)
    # The largest tells whether there are any.
    nonfinite = np.int32(0) if np.isfinite(reduced.largest) else to_host(_nonfinite_of(arrays, at))
    numbers = _numbers(criterion, metrics, noise, effective, reduced, nonfinite, cells)
    dtype = reduced.units.dtype
    return jax.tree.map(lambda part: _narrowed(part, dtype), numbers), _sums_of_units(reduced.units, layer.size)


_NEARLY_EQUAL = 0.2


def _narrowed(number: Any, dtype: Any) -> np.ndarray:
    number = np.asarray(number)
    return number.astype(dtype) if number.dtype.kind == "f" else number


def _numbers(
    criterion: Criterion,
    metrics: Metrics,
    noise: Null | None,
    effective_units: Any,
    reduced: Reduced,
    nonfinite: Any,
    cells: Any,
) -> LayerNumbers:
    """The numbers of one layer, or of several stacked.

    Args:
        noise: the null where it is sampled.
    """
    xp = namespace(metrics.utilization)
    if noise is None and criterion.null_power is not None:
        known = half_normal.null_of_magnitude()
        noise = jax.tree.map(lambda value: xp.full_like(metrics.utilization, value), known)
    units = xp.where(effective_units > 0, effective_units, 1)
    return LayerNumbers(
        metrics,
        noise,
        effective_units,
        metrics.effective_params / units,
        nonfinite,
        reduced.largest,
        reduced.usable,
        distribution=None if cells is None else unpacked(cells),
    )


# In a trace


def _measure_traced(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    places = [layer.place for layer in layers]

    def measured(in_order: bool, arrays: list[Arrays]) -> tuple[LayerNumbers, tuple[Any, ...]]:
        own = [Layer(*each) for each in zip(places, arrays, strict=True)]
        return _inlined(criterion, own, curves, in_order)

    arrays = [layer.arrays for layer in layers]
    return by_compiler(functools.partial(_differentiable, measured, all(map(_is_sorted, layers))), arrays)


def _differentiable(measured: Callable[[bool, Any], Any], in_order: bool, arrays: list[Arrays]) -> Any:
    """Counted, where not all layers are sorted anyway; with the derivatives of sorting."""
    if in_order:
        return measured(True, arrays)
    counted = jax.custom_jvp(functools.partial(measured, False))

    @counted.defjvp
    def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        return counted(*primals), jax.jvp(functools.partial(measured, True), primals, tangents)[1]

    return counted(arrays)


class _Row(NamedTuple):
    """What one layer is reduced to in a trace, or several stacked."""

    scores: Any  # [SMALL], of a small layer, to be sorted with the others
    read: _Read | None  # of a large layer that was sorted
    reduced: Reduced
    noise: Spread | None  # a sample of it, to be read with the others
    factors_used: Any
    effective_units: Any
    nonfinite: Any


class _Counted(NamedTuple):
    spread: Spread
    integers: Any
    squares: Any


def _inlined(
    criterion: Criterion, layers: Sequence[Layer], curves: bool, in_order: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    groups = _groups(layers)
    counted = [group for group in groups if not (in_order or _is_sorted(layers[group[0]]))]
    positions: list[tuple[int, int]] = []
    rows: list[_Row] = []
    # Counted layers first.
    for group in [*counted, *(group for group in groups if group not in counted)]:
        rows.append(_rows_alike(criterion, [layers[index] for index in group], curves, group in counted))
        positions += [(index, part) for index in group for part in range(len(layers[index].indices))]
    counts = _count_all(criterion, [[layers[index] for index in group] for group in counted]) if counted else None
    numbers = _joined(criterion, rows, counts, [layers[index].size for index, _ in positions], curves)
    in_layers_order = np.asarray(sorted(range(len(positions)), key=positions.__getitem__))
    means = [row.reduced.units[at] for row in rows for at in range(len(row.effective_units))]
    units = [_sums_of_units(mean, layers[index].size) for (index, _), mean in zip(positions, means, strict=True)]
    ordered = jax.tree.map(lambda numbers: numbers[..., in_layers_order], numbers)
    return ordered, tuple(units[at] for at in in_layers_order)


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Layers that one compiled loop can go through: of equal structure and shapes."""
    groups: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        leaves, structure = jax.tree.flatten(_nameless(layer.arrays))
        groups.setdefault((structure, *map(jax.typeof, leaves)), []).append(index)
    return list(groups.values())


def _rows_alike(criterion: Criterion, layers: Sequence[Layer], curves: bool, is_counted: bool) -> _Row:
    """Equal layers, stacked."""
    return _over_parts(
        [layer.arrays for layer in layers], lambda arrays: _row(criterion, layers[0], arrays, curves, is_counted)
    )


def _over_parts(members: Sequence[Arrays], function: Callable[[Arrays], Any]) -> Any:
    """The function of each of the layers that equal weights stack, stacked; in a loop where there are several."""
    members = [_nameless(arrays) for arrays in members]
    first, steps = members[0], _steps(members)
    if len(steps) == 1:
        return jax.tree.map(lambda array: array[None], function(part_of(first, tuple(steps[0, 1:]))))
    return lax.map(lambda step: function(_picked(members, step)), steps)


def _steps(members: Sequence[Arrays]) -> jax.Array:
    """[members x stacked layers, 1 + axes], the number of each member and the index of each of its layers."""
    at = np.arange(len(members), dtype=np.int32)
    if not _layer_axes(members[0]):
        return jnp.asarray(at[:, None])
    positions = np.asarray(_positions(members[0]))
    return jnp.asarray(np.column_stack([np.repeat(at, len(positions)), np.tile(positions, (len(at), 1))]))


def _picked(members: Sequence[Arrays], step: jax.Array) -> Arrays:
    arrays = members[0]
    if len(members) > 1:
        arrays = lax.switch(step[0], [lambda arrays=arrays: arrays for arrays in members])
    return part_of(arrays, tuple(step[1:]))


def _row(criterion: Criterion, layer: Layer, arrays: Arrays, curves: bool, is_counted: bool) -> _Row:
    scores, reduced = _reduce(criterion, arrays, _seen(criterion, arrays.sites))
    noise, used = None, None
    if null.is_sampled(criterion):
        noise, used = _noise(criterion, reduced), null.utilization_of(reduced.factors)
    units = effective_units(reduced.units, reduced.units.ndim)
    rest = reduced._replace(factors=None), noise, used, units, _nonfinite(arrays.weight)
    if is_counted:
        return _Row(None, None, *rest)
    if _is_small(layer):
        return _Row(_padded(scores, SMALL), None, *rest)
    return _Row(None, _read(_order.spread_of(scores.ravel(), layer.size), curves), *rest)


def _count_all(criterion: Criterion, groups: Sequence[Sequence[Layer]]) -> _Counted:
    """All layers of some groups in one loop, so that their scores never exist together."""
    members = [[_nameless(layer.arrays) for layer in group] for group in groups]

    def branch(arrays: list[Arrays]) -> Callable[[jax.Array], tuple[Histogram, jax.Array]]:
        axes = len(_layer_axes(arrays[0]))

        def count(step: jax.Array) -> tuple[Histogram, jax.Array]:
            part = _picked(arrays, step[: 1 + axes])
            scores, _ = _reduce(criterion, part, _seen(criterion, part.sites))
            found = histogram(scores)
            return found._replace(high=jnp.broadcast_to(found.high, len(found.table))), sketch.squares_of(scores)

        return count

    branches = [branch(arrays) for arrays in members]
    steps = [_steps(arrays) for arrays in members]
    width = max(step.shape[1] for step in steps)
    every = jnp.concatenate([jnp.pad(step, ((0, 0), (0, width - step.shape[1]))) for step in steps])
    at = np.repeat(np.arange(len(groups), dtype=np.int32), [len(step) for step in steps])
    size = np.repeat([group[0].size for group in groups], [len(step) for step in steps]).astype(np.int32)

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> _Counted:
        group, step, size = row
        found, squares = lax.switch(group, branches, step) if len(branches) > 1 else branches[0](step)
        counts = sketch.of_histogram(found, size)
        return _Counted(sketch.spread_of(counts), sketch.integers_of(counts), squares)

    if len(at) == 1:
        return jax.tree.map(lambda array: array[None], one((at[0], every[0], size[0])))
    return lax.map(one, (at, every, size))


def _joined(
    criterion: Criterion, rows: Sequence[_Row], counted: _Counted | None, sizes: Sequence[int], curves: bool
) -> LayerNumbers:
    """The numbers of all rows, those of counted layers first: through one kernel for what is sorted, and one that
    reads the spread of all.
    """
    lengths = [len(row.effective_units) for row in rows]
    by_row = np.split(np.asarray(sizes, np.int32), np.cumsum(lengths)[:-1])
    waiting = [] if counted is None else [counted.spread]
    short = [at for at, row in enumerate(rows) if row.scores is not None]
    if short:
        given = _concatenated([rows[at].scores for at in short]), np.concatenate([by_row[at] for at in short])
        waiting.append(each_row(lambda row: _order.spread_of(*row), given))
    noise = [row.noise for row in rows if row.noise is not None]
    reads: list[_Read] = []
    if waiting or noise:
        parts = [len(spread.distribution.largest) for spread in [*waiting, *noise]]
        reads = _split(each_row(lambda spread: _read(spread, curves), _concatenated([*waiting, *noise])), parts)
    # Counted, then small, then large ones that were sorted, in the order of the rows.
    found = [*reads[: len(waiting)], *(row.read for row in rows if row.read is not None)]
    kind = [0 if row.scores is None and row.read is None else 1 if row.read is None else 2 for row in rows]
    source = np.split(np.arange(len(sizes)), np.cumsum(lengths)[:-1])
    order = np.concatenate([source[at] for at in sorted(range(len(rows)), key=kind.__getitem__)])
    back = np.argsort(order)
    read: _Read = jax.tree.map(lambda array: array[back], _concatenated(found))
    metrics = metrics_of(read.sums, *_exactly(counted, read.sums))
    reduced, effective, nonfinite = _concatenated(
        [(row.reduced._replace(units=None), row.effective_units, row.nonfinite) for row in rows]
    )
    null_metrics = None
    if noise:
        used = jnp.concatenate([row.factors_used for row in rows])
        sums = jnp.concatenate([read.sums for read in reads[len(waiting) :]])
        null_metrics = null.null_of(criterion, used, reduced.usable, sums)
    return _numbers(criterion, metrics, null_metrics, effective, reduced, nonfinite, read.cells)


def _exactly(counted: _Counted | None, sums: jax.Array) -> tuple[Any, Any]:
    """What `metrics_of` takes beside sums [R, 16], of which the first rows are those of counted layers."""
    if counted is None:
        return None, None
    count = len(counted.squares)
    integers = sums[count:, np.asarray([12, 13, 0])].astype(jnp.int32)
    squares = jnp.concatenate([counted.squares.astype(sums.dtype), sums[count:, 6]])
    return jnp.concatenate([counted.integers, integers]), squares


def _noise(criterion: Criterion, reduced: Reduced) -> Spread:
    """A sample of noise with as many entries as other rows have."""
    sample = null.sample_of(criterion, reduced.factors, reduced.usable)
    spread = Spread(sample, (jnp.zeros_like(sample.values),) * 4)
    return jax.tree.map(lambda part: jnp.pad(part, (0, SMALL - null.SIZE)) if part.ndim else part, spread)


def _concatenated(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)


def _split(tree: Any, counts: Sequence[int]) -> list[Any]:
    ends = np.cumsum(counts)
    return [
        jax.tree.map(lambda array, start=end - count, end=end: array[start:end], tree)
        for count, end in zip(counts, ends, strict=True)
    ]


# Heads


def heads(criterion: Criterion, layers: Mapping[str, Layer], attentions: Sequence[AttentionStatistics]) -> list[Any]:
    """The importance of the heads of each attention, [units]; nan where no weight of it was read.

    Equal attentions share a program, or a loop.
    """
    alike: dict[Hashable, list[int]] = {}
    members: list[tuple[Arrays, ...]] = []
    for index, attention in enumerate(attentions):
        members.append(tuple(_nameless(layers[piece.path].arrays) for piece in attention.slices))
        leaves, structure = jax.tree.flatten(members[-1])
        slices = tuple(dataclasses.replace(piece, path=str(at)) for at, piece in enumerate(attention.slices))
        alike.setdefault((attention.units, slices, structure, *map(jax.typeof, leaves)), []).append(index)
    found: dict[int, Any] = {}
    for (_, slices, *_), group in alike.items():
        own = [members[index] for index in group]
        if not slices:
            found |= {index: np.full(attentions[index].units, np.nan, np.float32) for index in group}
        elif _is_traced(own):
            found |= zip(group, _over_alike(lambda arrays, s=slices: _heads(criterion, s, arrays), own), strict=True)
        else:
            found |= {index: _heads(criterion, slices, members[index]) for index in group}
    ordered = [found[index] for index in range(len(attentions))]
    return ordered if _is_traced(ordered) else [*to_host(ordered)]


def _over_alike(function: Callable[[Any], Any], members: Sequence[Any]) -> Any:
    """The function of each of several equal trees, stacked; in a loop, where there are several."""
    if len(members) == 1:
        return jax.tree.map(lambda array: array[None], function(members[0]))
    branches = [lambda arrays=arrays: arrays for arrays in members]
    return lax.map(lambda at: function(lax.switch(at, branches)), jnp.arange(len(members), dtype=jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heads(criterion: Criterion, slices: tuple[HeadSlices, ...], arrays: tuple[Arrays, ...]) -> jax.Array:
    scores = {piece.path: importance.score(criterion, *each) for piece, each in zip(slices, arrays, strict=True)}
    stacking = {piece.path: _layer_axes(each) for piece, each in zip(slices, arrays, strict=True)}
    return granularity.heads_of(slices, scores, stacking, granularity.REDUCTIONS["sum"])


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
