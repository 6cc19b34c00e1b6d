"""One weight and what its units emit -> its row of the report.

Layers of similar size share one compiled kernel, which runs over them in a loop. Imports
`importance`, `metrics`, `records`, `statistics`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import importance, metrics
from jaxeff.importance import Criterion
from jaxeff.metrics import Metrics
from jaxeff.precision import widened
from jaxeff.records import Activity, LayerNumbers, LayerStructure, Null, none_of
from jaxeff.statistics import Derivatives, Place, SiteStatistics, UnitStatistics

Sites = tuple[SiteStatistics, ...]


class Layer(NamedTuple):
    """A weight under its name, its uses (none for a weight that was not paired), and its derivatives."""

    place: Place
    weight: jax.Array
    sites: Sites
    derivatives: Derivatives


def unstacked(layer: Layer) -> list[Layer]:
    """The layers that a scan stacks into one weight, each under its own index: 'blocks/kernel[3]'.

    A weight that holds one layer is a list of itself.
    """
    stacking = {site.layer_axes for site in layer.sites}
    axes = stacking.pop() if len(stacking) == 1 else ()
    if not axes:
        return [layer]
    indices = itertools.product(*(range(layer.place.shape[axis]) for axis in axes))
    return [_slice(layer, dict(zip(axes, index, strict=True))) for index in indices]


def _slice(layer: Layer, index: dict[int, int]) -> Layer:
    """The layer at these positions of the stacking axes."""
    rank = len(layer.place.shape)
    kept = [axis for axis in range(rank) if axis not in index]

    def pick(array: jax.Array) -> jax.Array:
        if array.ndim != rank:
            return array
        # Sums that all layers share have size 1 there.
        at = tuple(
            min(index[axis], array.shape[axis] - 1) if axis in index else slice(None) for axis in range(rank)
        )
        return array[at]

    def pick_sums(sums: UnitStatistics) -> UnitStatistics:
        picked = jax.tree.map(pick, sums)
        return dataclasses.replace(picked, count=picked.count.reshape(()))

    def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(kept.index(axis) for axis in axes if axis in kept)

    stacked = math.prod(layer.place.shape[axis] for axis in index)
    path = f"{layer.place.path}[{','.join(map(str, index.values()))}]"
    place = dataclasses.replace(layer.place, path=path, shape=tuple(layer.place.shape[axis] for axis in kept))
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
        for site in layer.sites
    )
    return Layer(place, pick(layer.weight), sites, jax.tree.map(pick, layer.derivatives))


def structure(criterion: Criterion, layer: Layer) -> LayerStructure:
    """All that is known of a layer before any number."""
    place, _, sites, _ = layer
    first = sites[0] if sites else None
    macs = [site.macs for site in sites]
    return LayerStructure(
        path=place.path,
        kind=first.kind if first else "weight",
        shape=place.shape,
        nonlinearity=first.nonlinearity if first else None,
        scored="magnitude" if criterion.reads_activations and not first else criterion.side,
        reason=place.reason,
        uses=len(sites),
        unit_axes=_unit_axes(layer),
        macs=None if not macs or None in macs else sum(count for count in macs if count is not None),
    )


def activity(layer: Layer) -> Activity | None:
    """What the units emit, over all uses that have the same units as the first."""
    sites = layer.sites
    alike = [site.post for site in sites if site.unit_axes == sites[0].unit_axes]
    if not alike:
        return None
    sums = functools.reduce(UnitStatistics.__add__, alike)
    return Activity(_unit_shape(layer), sums.absolute_sum.ndim, sums)


def measure(criterion: Criterion, layers: Sequence[Layer]) -> tuple[LayerNumbers, tuple[jax.Array, ...]]:
    """The numbers of all layers, stacked, and the importance of the units of each.

    Few kernels serve all layers, whatever their number: one for each class of padded sizes, in a
    loop over the layers of the class.
    """
    if not layers:
        return none_of(LayerNumbers), ()
    width = _padded_size(max([_SMALL, *map(_unit_count, layers)]))
    classes = _size_classes(layers, width)
    order = [index for members in classes for index in members]
    made = [_make_all(criterion, [layers[index] for index in members], width) for members in classes]
    found = _summarize(made, [layers[index] for index in order])
    back = np.argsort(np.asarray(order))
    summary, units, null, samples = jax.tree.map(lambda rows: rows[back], found)
    numbers = LayerNumbers(
        summary,
        null if criterion.null_power is not None else None,
        units.effective_params,
        summary.effective_params / jnp.where(units.effective_params > 0, units.effective_params, 1),
        samples.nonfinite_weights,
        samples.largest_weight,
        jnp.stack([_usable(criterion, layer) for layer in layers]),
    )
    return numbers, tuple(
        (samples.units[i, : _unit_count(layer)] * jnp.where(summary.max[i] > 0, summary.max[i], 1)).reshape(
            _unit_shape(layer)
        )
        for i, layer in enumerate(layers)
    )


def _summarize(
    made: Sequence[tuple[_Made, Metrics | None]], layers: Sequence[Layer]
) -> tuple[Metrics, Metrics, Null, _Made]:
    """Metrics of the scores, of the units and of the null; and what they were made of.

    Args:
        made: class by class, the largest first; the last holds scores that are still to be summarized.
        layers: in the same order.
    """
    large = [summary for _, summary in made if summary is not None]
    samples = _joined([item._replace(scores=None) for item, _ in made])
    last = made[-1][0].scores
    count, open_ = len(layers), layers[len(layers) - (0 if last is None else len(last)) :]
    rows = jnp.concatenate([samples.units, samples.null, *([] if last is None else [last])])
    true = [_unit_count(layer) for layer in layers], [_size(layer) for layer in open_]
    sizes = jnp.concatenate([jnp.asarray(true[0]), samples.null_size, jnp.asarray(true[1], jnp.int32)])
    found = jax.lax.map(lambda sample: metrics.summarize_padded(*sample), (rows, sizes))
    units, null, small = (
        jax.tree.map(lambda leaf, at=at: leaf[at], found)
        for at in (slice(0, count), slice(count, 2 * count), slice(2 * count, None))
    )
    return _joined([*large, small]), units, _null(null), samples


def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else parts[0]


_SMALL = 1 << 16


def _size_classes(layers: Sequence[Layer], width: int) -> list[list[int]]:
    """Layers of similar size, the largest first; all that fit the width in one class."""
    classes: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        classes.setdefault(max(width, _padded_size(_size(layer))), []).append(index)
    return [classes[length] for length in sorted(classes, reverse=True)]


def _padded_size(size: int) -> int:
    """Size classes: powers of 4 to 2^20, where compiling costs more than sorting zeros, then of 2."""
    bits = max((size - 1).bit_length(), _SMALL.bit_length() - 1)
    return 1 << (bits + bits % 2 if bits <= 20 else bits)


class _Made(NamedTuple):
    """What one layer's arrays are reduced to, padded with zeros; stacked, that of several layers."""

    scores: jax.Array | None
    units: jax.Array
    null: jax.Array
    null_size: jax.Array
    largest_weight: jax.Array
    nonfinite_weights: jax.Array


def _make_all(criterion: Criterion, layers: Sequence[Layer], width: int) -> tuple[_Made, Metrics | None]:
    """Layers of one size class, one after the other; of large ones the metrics in place of the scores.

    Switches pick one weight at a time, so that the scores of large layers never exist together: the
    outer one among the shapes, which are computed on differently, the inner one among equal layers.
    """
    length = max(width, *map(_size, layers))
    arrays = [(layer.weight, _nameless(layer.sites), layer.derivatives) for layer in layers]
    groups: dict[Any, list[int]] = {}
    for index, layer in enumerate(arrays):
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer))
        groups.setdefault((jax.tree.structure(layer), shapes), []).append(index)
    members = list(groups.values())
    branches = [
        functools.partial(
            _make_one, criterion, layers[group[0]].place, [arrays[i] for i in group], length, width
        )
        for group in members
    ]

    def step(at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[_Made, Metrics | None]:
        group, member, size = at
        made = jax.lax.switch(group, branches, member)
        if length == width:
            return made, None
        return made._replace(scores=None), metrics.summarize_padded(made.scores, size)

    position = {index: (g, i) for g, group in enumerate(members) for i, index in enumerate(group)}
    steps = [(*position[index], _size(layer)) for index, layer in enumerate(layers)]
    return jax.lax.map(step, tuple(jnp.asarray(column, jnp.int32) for column in zip(*steps, strict=True)))


def _nameless(sites: Sites) -> Sites:
    """The sites without what tells equal layers apart, so that they group."""
    return tuple(dataclasses.replace(site, path="", bias=None) for site in sites)


def _make_one(
    criterion: Criterion,
    place: Place,
    members: Sequence[tuple[jax.Array, Sites, Derivatives]],
    length: int,
    width: int,
    member: jax.Array,
) -> _Made:
    picked = jax.lax.switch(member, [lambda arrays=arrays: arrays for arrays in members])
    layer = Layer(place, *picked)
    scores = _scores(criterion, layer)
    null = _null_sample(criterion, layer)
    return _Made(
        _padded(scores, length),
        _padded(_scaled_units(scores, layer), width),
        _padded(null, width),
        jnp.asarray(null.size, jnp.int32),
        jnp.max(_magnitudes(layer.weight)),
        jnp.sum(~jnp.isfinite(layer.weight), dtype=jnp.int32),
    )


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x.ravel(), (0, length - x.size))


def _scores(criterion: Criterion, layer: Layer) -> jax.Array:
    """The importance of each weight; by magnitude where what the criterion reads is not finite."""
    scores = importance.score(criterion, layer.weight, layer.sites, layer.derivatives)
    return jnp.where(_usable(criterion, layer), scores, _magnitudes(layer.weight))


def _magnitudes(weight: jax.Array) -> jax.Array:
    return importance.magnitude(widened(weight))


def _scaled_units(scores: jax.Array, layer: Layer) -> jax.Array:
    """The importance of each unit, over the largest of a weight.

    The sum over a unit may lie beyond float32 where its scores do not.
    """
    largest = jnp.max(scores)
    return _sum_units(scores / jnp.where(largest > 0, largest, 1), layer)


def _null_sample(criterion: Criterion, layer: Layer) -> jax.Array:
    if criterion.null_power is None:
        return jnp.zeros(1)
    _, weight, sites, derivatives = layer
    return importance.null_sample(criterion, weight, sites, derivatives, _usable(criterion, layer))


def _null(summary: Metrics) -> Null:
    return Null(
        summary.utilization, summary.gini, summary.coverage_50, summary.coverage_80, summary.coverage_90
    )


def _usable(criterion: Criterion, layer: Layer) -> jax.Array:
    """Whether what the criterion reads was seen at all, and is finite."""
    read: list[Any] = [*jax.tree.leaves(layer.derivatives)] if criterion.needs else []
    seen = jnp.asarray(True)
    if criterion.reads_activations and layer.sites:
        # A branch that was not taken has seen nothing.
        seen = functools.reduce(jnp.add, [site.post.count for site in layer.sites]) > 0
        read += [sums.absolute_sum for site in layer.sites for sums in (site.input, site.post)]
        read += jax.tree.leaves([site.gate for site in layer.sites])
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(sums)) for sums in read], seen)


def _unit_axes(layer: Layer) -> tuple[int, ...]:
    # Flax lays every kernel out with its units last; where no operation was read that has to do.
    return layer.sites[0].unit_axes if layer.sites else (len(layer.place.shape) - 1,)


def _unit_shape(layer: Layer) -> tuple[int, ...]:
    return tuple(layer.place.shape[axis] for axis in _unit_axes(layer))


def _unit_count(layer: Layer) -> int:
    return math.prod(_unit_shape(layer))


def _size(layer: Layer) -> int:
    return math.prod(layer.place.shape)


def _sum_units(scores: jax.Array, layer: Layer) -> jax.Array:
    axes = _unit_axes(layer)
    return jnp.sum(scores, axis=tuple(axis for axis in range(scores.ndim) if axis not in axes))
