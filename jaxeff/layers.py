"""One weight and what its units emit -> its row of the report.

Layers share compiled kernels, which run over them in a loop. Imports `binned`, `distribution`, `exact`,
`granularity`, `importance`, `noise`, `pairs`, `records`, `statistics`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import binned, distribution, exact, granularity, importance, noise, pairs
from jaxeff.exact import Metrics, Packed
from jaxeff.importance import Criterion
from jaxeff.precision import wide, widened
from jaxeff.records import Activity, LayerNumbers, LayerStructure, Null, none_of
from jaxeff.statistics import (
    AttentionStatistics,
    Derivatives,
    Place,
    SiteStatistics,
    Statistics,
    UnitStatistics,
)

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
        dtype=place.dtype,
        nonlinearity=first.nonlinearity if first else None,
        scored="magnitude" if criterion.reads_activations and not first else criterion.side,
        reason=place.reason,
        uses=len(sites),
        unit_axes=_unit_axes(layer),
        macs=None if not macs or None in macs else sum(count for count in macs if count is not None),
        uncounted=any(site.uncounted for site in sites),
    )


def activity(layer: Layer) -> Activity | None:
    """What the units emit, over all uses that have the same units as the first."""
    sites = layer.sites
    alike = [site.post for site in sites if site.unit_axes == sites[0].unit_axes]
    if not alike:
        return None
    sums = functools.reduce(UnitStatistics.__add__, alike)
    return Activity(_unit_shape(layer), sums.absolute_sum.ndim, sums)


def activity_of(site: SiteStatistics, unit_shape: tuple[int, ...]) -> Activity:
    """What the units of one use emit."""
    return Activity(unit_shape, site.post.absolute_sum.ndim, site.post)


def measure(
    criterion: Criterion, layers: Sequence[Layer], in_parts: bool = False, curves: bool = False
) -> tuple[LayerNumbers, jax.Array]:
    """The numbers of all layers, stacked, and the importance of the units of each, padded: see `units_of`.

    Few kernels serve all layers, whatever their number. Small layers, and those of float64, are sorted;
    large ones are counted by bit pattern, and sorted where a derivative is taken.

    Args:
        in_parts: whether weights may lie in parts on several devices. Each is then counted where it lies,
            by a kernel for its shape, and only those of float64 are sorted.
        curves: whether to count how the importance of each is spread.
    """
    if not layers:
        return none_of(LayerNumbers), jnp.zeros((0, 0))
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault((_is_counted(layer, in_parts), wide(layer.weight.dtype)), []).append(index)
    parts = []
    for (counted, _), chosen in kinds.items():
        alike = [layers[index] for index in chosen]
        parts.append(
            _by_bins(criterion, alike, in_parts, curves) if counted else _by_order(criterion, alike, curves)
        )
    found = parts[0] if len(parts) == 1 else _merged(parts, np.argsort(np.concatenate([*kinds.values()])))
    return _numbers(criterion, found), found.made.units * _unit_scale(found.made.largest_weight)[:, None]


def heads(
    criterion: Criterion,
    attentions: Sequence[AttentionStatistics],
    weights: Mapping[str, Layer],
    statistics: Statistics,
) -> list[jax.Array]:
    """The importance of the heads of each attention, [units]; nan where no weight of it was read.

    Equal attentions share a kernel, which runs over them in a loop.
    """
    groups: dict[Any, list[int]] = {}
    for index, attention in enumerate(attentions):
        parts = [(part.axis, part.indices, _sort_of(weights[part.path])) for part in attention.slices]
        groups.setdefault((attention.units, *parts), []).append(index)
    found: dict[int, jax.Array] = {}
    for group in groups.values():
        alike = [attentions[index] for index in group]
        found |= zip(group, _heads_alike(criterion, alike, weights, statistics), strict=True)
    return [found[index] for index in range(len(attentions))]


def _heads_alike(
    criterion: Criterion,
    attentions: Sequence[AttentionStatistics],
    weights: Mapping[str, Layer],
    statistics: Statistics,
) -> jax.Array:
    first = attentions[0]
    if not first.slices:
        return jnp.full((len(attentions), first.units), jnp.nan)
    members = [[_nameless(weights[part.path]) for part in attention.slices] for attention in attentions]

    def one(member: jax.Array) -> jax.Array:
        picked = jax.lax.switch(member, [lambda arrays=arrays: arrays for arrays in members])
        scores = {
            part.path: importance.score(criterion, *arrays)
            for part, arrays in zip(first.slices, picked, strict=True)
        }
        return granularity.heads_of(first, scores, statistics, granularity.REDUCTIONS["sum"])

    return jax.lax.map(one, jnp.arange(len(members), dtype=jnp.int32))


def _is_counted(layer: Layer, in_parts: bool) -> bool:
    return (in_parts or _size(layer) > _SMALL) and wide(layer.weight.dtype) == jnp.float32


def units_of(units: jax.Array, structure: Sequence[LayerStructure]) -> tuple[jax.Array, ...]:
    """The importance of the units of each layer, shaped like its unit axes."""
    # By dynamic slices: layers with as many units share a program.
    return tuple(
        jax.lax.dynamic_slice(units, (np.int32(index), np.int32(0)), (1, row.unit_count)).reshape(
            row.unit_shape
        )
        for index, row in enumerate(structure)
    )


def _numbers(criterion: Criterion, found: _Found) -> LayerNumbers:
    effective_units = found.units.effective_params
    return LayerNumbers(
        found.summary,
        _null(criterion, found),
        effective_units,
        found.summary.effective_params / jnp.where(effective_units > 0, effective_units, 1),
        found.made.nonfinite_weights,
        found.made.largest_weight,
        found.made.usable,
        distribution=None if found.cells is None else distribution.unpacked(found.cells),
    )


class _Found(NamedTuple):
    """Metrics of several layers' scores, units and null (None where it is known); and what they are of."""

    summary: Metrics
    cells: jax.Array | None  # [layers, CELLS, 2], how the scores are spread, where that was asked for
    units: Metrics
    null: Metrics | None
    made: _Made


def _merged(parts: Sequence[_Found], order: np.ndarray) -> _Found:
    """The same in the layers' order, with the units padded to one width."""
    width = max(part.made.units.shape[1] for part in parts)
    padded = [
        part._replace(made=part.made._replace(units=_widened(part.made.units, width))) for part in parts
    ]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows)[order], *padded)


def _widened(rows: jax.Array, width: int) -> jax.Array:
    return jnp.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _by_bins(criterion: Criterion, layers: Sequence[Layer], in_parts: bool, curves: bool) -> _Found:
    """Layers of any size, counted one after the other; the derivatives are those of sorting."""
    places = [layer.place for layer in layers]

    @jax.custom_jvp
    def measured(arrays: list[Any]) -> _Found:
        own = [Layer(place, *each) for place, each in zip(places, arrays, strict=True)]
        return _count_all(criterion, own, in_parts, curves)

    @measured.defjvp
    def _(primals: tuple[list[Any]], tangents: tuple[list[Any]]) -> tuple[_Found, _Found]:
        def sorted_(arrays: list[Any]) -> _Found:
            own = [Layer(place, *each) for place, each in zip(places, arrays, strict=True)]
            found = _by_order(criterion, own, curves)
            width = max(map(_unit_count, own))
            return found._replace(made=found.made._replace(units=found.made.units[:, :width]))

        return jax.jvp(sorted_, primals, tangents)

    return measured([tuple(layer[1:]) for layer in layers])


def _count_all(criterion: Criterion, layers: Sequence[Layer], in_parts: bool, curves: bool) -> _Found:
    """One kernel to count for each length, or in parts for each shape; one to read the counts for all.

    The outer switch is among the kernels, the next among the shapes, the innermost among equal layers.
    """
    width = max(map(_unit_count, layers))
    groups = _groups(layers)
    kernels = [(None, [group]) for group in groups] if in_parts else _by_length(layers, groups)

    def branch(length: int | None, groups: list[list[int]]) -> Callable[..., tuple[binned.Bins, _Made]]:
        makers = [_maker(criterion, [layers[i] for i in group], length, width) for group in groups]

        def run(group: jax.Array, member: jax.Array, size: jax.Array) -> tuple[binned.Bins, _Made]:
            made = jax.lax.switch(group, makers, member)
            return binned.count(made.scores, None if length is None else size), made._replace(scores=None)

        return run

    branches = [branch(length, groups) for length, groups in kernels]

    def step(at: tuple[jax.Array, ...]) -> tuple[Packed, jax.Array | None, _Made]:
        choice, group, member, size, units = at
        bins, made = jax.lax.switch(choice, branches, group, member, size)
        rows, sizes = made.units[None], units[None]
        if _is_sampled(criterion):
            null = noise.scores(criterion, made.profile, made.usable)[None]
            longest = max(width, noise.SIZE)
            rows = jnp.concatenate([_widened(rows, longest), _widened(null, longest)])
            sizes = jnp.append(units, noise.SIZE)
        others = jax.lax.map(lambda row: binned.count(*row), (rows, sizes))
        rows = jax.tree.map(lambda one, two: jnp.concatenate([one[None], two]), bins, others)
        read = lambda row: exact.pack(binned.summarize_bins(*row))  # noqa: E731
        summaries = pairs.each(read, (rows, jnp.append(size, sizes)))
        return summaries, binned.distribute(bins, size) if curves else None, made

    positions = {
        index: (choice, g, member)
        for choice, (_, groups) in enumerate(kernels)
        for g, group in enumerate(groups)
        for member, index in enumerate(group)
    }
    steps = [(*positions[i], _size(layer), _unit_count(layer)) for i, layer in enumerate(layers)]
    summaries, cells, made = jax.lax.map(
        step, tuple(jnp.asarray(c, jnp.int32) for c in zip(*steps, strict=True))
    )
    scores, units, *null = (
        exact.unpack(jax.tree.map(lambda leaf, at=at: leaf[:, at], summaries))
        for at in range(summaries.floats.shape[1])
    )
    return _Found(scores, cells, units, null[0] if null else None, made)


def _by_length(layers: Sequence[Layer], groups: list[list[int]]) -> list[tuple[int, list[list[int]]]]:
    """Lengths to pad to, so that no layer is padded to more than twice its size; and the groups of each."""
    found: list[tuple[int, list[list[int]]]] = []
    for group in sorted(groups, key=lambda group: -_size(layers[group[0]])):
        size = _size(layers[group[0]])
        if not found or 2 * size < found[-1][0]:
            found.append((size, []))
        found[-1][1].append(group)
    return found


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Layers that one compiled function can make: of equal structure and shapes."""
    groups: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(_sort_of(layer), []).append(index)
    return list(groups.values())


def _sort_of(layer: Layer) -> Hashable:
    """Equal for layers of equal structure and shapes."""
    arrays = _nameless(layer)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays))
    return jax.tree.structure(arrays), shapes


def _maker(
    criterion: Criterion, members: Sequence[Layer], length: int | None, width: int
) -> Callable[[jax.Array], _Made]:
    """Makes one of equal layers, by its number among them."""
    arrays = [_nameless(layer) for layer in members]
    return functools.partial(_make_one, criterion, members[0].place, arrays, length, width)


def _by_order(criterion: Criterion, layers: Sequence[Layer], curves: bool) -> _Found:
    """Layers sorted, in classes of padded sizes: one kernel a class, in a loop over its layers."""
    width = _padded_size(max([_SMALL, *map(_unit_count, layers)]))
    classes = _size_classes(layers, width)
    order = [index for members in classes for index in members]
    made = [_make_all(criterion, [layers[index] for index in members], width, curves) for members in classes]
    found = _summarize(criterion, made, [layers[index] for index in order], width, curves)
    if order == sorted(order):
        return found
    back = np.argsort(np.asarray(order))
    return jax.tree.map(lambda rows: rows[back], found)


def _summarize(
    criterion: Criterion,
    made: Sequence[tuple[_Made, _Summary | None]],
    layers: Sequence[Layer],
    width: int,
    curves: bool,
) -> _Found:
    """Metrics of all that was made.

    Args:
        made: class by class, the largest first; the last holds scores that are still to be summarized.
        layers: in the same order.
    """
    large = [summary for _, summary in made if summary is not None]
    samples = _joined([item._replace(scores=None) for item, _ in made])
    last = made[-1][0].scores
    count, open_ = len(layers), layers[len(layers) - (0 if last is None else len(last)) :]
    rows, sizes = [samples.units], [*map(_unit_count, layers)]
    if _is_sampled(criterion):
        made_of_noise = lambda sample: noise.scores(criterion, sample.profile, sample.usable)  # noqa: E731
        rows.append(_widened(pairs.each(made_of_noise, samples), width))
        sizes += [noise.SIZE] * count
    if last is not None:
        rows.append(last)
        sizes += map(_size, open_)
    stacked = jnp.concatenate(rows), jnp.asarray(sizes, jnp.int32)
    found = pairs.each(lambda row: _summary(row[0], row[1], curves), stacked)
    ends = [0, *itertools.accumulate(len(part) for part in rows)]
    parts = [jax.tree.map(lambda leaf, at=at: leaf[slice(*at)], found) for at in itertools.pairwise(ends)]
    small = [parts.pop()] if last is not None else []
    null = exact.unpack(parts[1].metrics) if _is_sampled(criterion) else None
    summary = _joined([*large, *small])
    return _Found(exact.unpack(summary.metrics), summary.cells, exact.unpack(parts[0].metrics), null, samples)


class _Summary(NamedTuple):
    metrics: Packed
    cells: jax.Array | None


def _summary(scores: jax.Array, size: jax.Array, curves: bool) -> _Summary:
    """Of the first `size` scores; the others must be 0."""
    cells = distribution.of_padded(scores, size) if curves else None
    return _Summary(exact.pack(exact.summarize_padded(scores, size)), cells)


def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else parts[0]


_SMALL = 1 << 14


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
    profile: jax.Array  # of the null
    usable: jax.Array  # whether what the criterion reads is finite
    largest_weight: jax.Array
    nonfinite_weights: jax.Array


def _make_all(
    criterion: Criterion, layers: Sequence[Layer], width: int, curves: bool
) -> tuple[_Made, _Summary | None]:
    """Layers of one size class, one after the other; of large ones the metrics in place of the scores.

    Switches pick one weight at a time, so that the scores of large layers never exist together: the
    outer one among the shapes, which are computed on differently, the inner one among equal layers.
    """
    length = max(width, *map(_size, layers))
    members = _groups(layers)
    branches = [_maker(criterion, [layers[i] for i in group], length, width) for group in members]

    def step(at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[_Made, _Summary | None]:
        group, member, size = at
        made = jax.lax.switch(group, branches, member)
        if length == width:
            return made, None
        return made._replace(scores=None), _summary(made.scores, size, curves)

    position = {index: (g, i) for g, group in enumerate(members) for i, index in enumerate(group)}
    steps = [(*position[index], _size(layer)) for index, layer in enumerate(layers)]
    return jax.lax.map(step, tuple(jnp.asarray(column, jnp.int32) for column in zip(*steps, strict=True)))


def _nameless(layer: Layer) -> tuple[jax.Array, Sites, Derivatives]:
    """A layer's arrays without what tells equal layers apart, so that they group."""
    sites = tuple(dataclasses.replace(site, path="", bias=None) for site in layer.sites)
    return layer.weight, sites, layer.derivatives


def _make_one(
    criterion: Criterion,
    place: Place,
    members: Sequence[tuple[jax.Array, Sites, Derivatives]],
    length: int | None,
    width: int,
    member: jax.Array,
) -> _Made:
    picked = jax.lax.switch(member, [lambda arrays=arrays: arrays for arrays in members])
    layer = Layer(place, *picked)
    usable = _usable(criterion, layer)
    magnitudes = importance.magnitude(widened(layer.weight))
    # In the weight's own precision, whatever that of the activations, so that equal layers give equal types.
    scores = importance.score(criterion, layer.weight, layer.sites, layer.derivatives)
    scores = scores.astype(magnitudes.dtype)
    # By magnitude where what the criterion reads is not finite.
    scores = jnp.where(usable, scores, magnitudes)
    largest, nonfinite = _largest_and_nonfinite(magnitudes)
    return _Made(
        scores if length is None else _padded(scores, length),
        _padded(_sum_units(scores / _unit_scale(largest), layer), width),
        _profile(criterion, layer, usable),
        usable,
        largest,
        nonfinite,
    )


def _largest_and_nonfinite(magnitudes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In one pass, which XLA compiles into one kernel; without derivatives."""
    magnitudes = jax.lax.stop_gradient(magnitudes)
    nonfinite = (~jnp.isfinite(magnitudes)).astype(jnp.int32)
    both = lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1])  # noqa: E731
    nothing = np.zeros((), magnitudes.dtype), np.int32(0)
    return jax.lax.reduce((magnitudes, nonfinite), nothing, both, tuple(range(magnitudes.ndim)))


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x.ravel(), (0, length - x.size))


def _unit_scale(largest_weight: jax.Array) -> jax.Array:
    """What units are summed over: of large weights the sum may lie beyond float32 where no score does."""
    # Not near the ends of float32: XLA divides by multiplying with the reciprocal, which must be a number.
    scale = jnp.clip(largest_weight, 2.0**-100, 2.0**100)
    return jnp.where((largest_weight > 0) & jnp.isfinite(largest_weight), scale, 1)


def _profile(criterion: Criterion, layer: Layer, usable: jax.Array) -> jax.Array:
    if not _is_sampled(criterion):
        return jnp.zeros(1)
    _, weight, sites, derivatives = layer
    profile = noise.profile(criterion, weight, sites, derivatives, usable)
    return profile.astype(wide(weight.dtype))


def _is_sampled(criterion: Criterion) -> bool:
    """Whether there is a null, and it depends on what was seen."""
    return criterion.null_power is not None and noise.known(criterion) is None


def _null(criterion: Criterion, found: _Found) -> Null | None:
    if criterion.null_power is None:
        return None
    if (known := noise.known(criterion)) is not None:
        return Null(*(jnp.full_like(found.summary.utilization, value) for value in known))
    assert found.null is not None
    names = (field.name for field in dataclasses.fields(Null))
    return Null(*(getattr(found.null, name) for name in names))


def _usable(criterion: Criterion, layer: Layer) -> jax.Array:
    """Whether what the criterion reads was seen at all, and is finite."""
    read: list[Any] = [*jax.tree.leaves(layer.derivatives)] if criterion.needs else []
    seen = jnp.asarray(True)
    if criterion.reads_activations and layer.sites:
        # A branch that was not taken has seen nothing.
        seen = functools.reduce(jnp.add, [site.post.count for site in layer.sites]) > 0
        sides = {"post": ("post",), "input": ("input",)}.get(criterion.side, ("input", "post"))
        read += [getattr(site, side).absolute_sum for site in layer.sites for side in sides]
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
