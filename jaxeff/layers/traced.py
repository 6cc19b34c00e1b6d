"""The numbers of layers in a trace: one loop over the large layers, and one over the small."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.importance import Criterion
from jaxeff.importance import _null as null
from jaxeff.layers.reduction import (
    SMALL,
    Read,
    Reduced,
    is_small,
    is_sorted,
    layer_numbers,
    nonfinite_count,
    padded,
    read_spread,
    reduce,
    sums_of_units,
    untallied,
    was_seen,
)
from jaxeff.layers.stacks import (
    Arrays,
    Layer,
    layer_axes,
    nameless,
    part_of,
    positions,
)
from jaxeff.metrics import _order, sketch
from jaxeff.metrics._histogram import Histogram, histogram
from jaxeff.metrics._weighted import Spread, effective_units, metrics_of
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.placement import each_row
from jaxeff.report import LayerNumbers


def measure_traced(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    places = [layer.place for layer in layers]

    def measured(in_order: bool, arrays: list[Arrays]) -> tuple[LayerNumbers, tuple[Any, ...]]:
        own = [Layer(*each) for each in zip(places, arrays, strict=True)]
        return _inlined(criterion, own, curves, in_order)

    arrays = [layer.arrays for layer in layers]
    return by_compiler(functools.partial(_differentiable, measured, all(map(is_sorted, layers))), arrays)


def _differentiable(measured: Callable[[bool, Any], Any], in_order: bool, arrays: list[Arrays]) -> Any:
    """Count large layers, unless all are sorted anyway; derivatives are those of sorting."""
    if in_order:
        return measured(True, arrays)
    counted = jax.custom_jvp(functools.partial(measured, False))

    @counted.defjvp
    def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        return counted(*primals), jax.jvp(functools.partial(measured, True), primals, tangents)[1]

    return counted(arrays)


class _Row(NamedTuple):
    """Numbers of one layer in a trace, or of several stacked."""

    scores: Any  # [SMALL], of a small layer, to be sorted with the others
    read: Read | None  # of a large layer that was sorted
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
    counted = [group for group in groups if not (in_order or is_sorted(layers[group[0]]))]
    positions: list[tuple[int, int]] = []
    rows: list[_Row] = []
    # Counted layers first.
    for group in [*counted, *(group for group in groups if group not in counted)]:
        rows.append(_rows_alike(criterion, [layers[index] for index in group], curves, group in counted))
        positions += [(index, part) for index in group for part in range(len(layers[index].indices))]
    counts = (
        _count_all(criterion, [[layers[index] for index in group] for group in counted]) if counted else None
    )
    numbers = _joined(criterion, rows, counts, [layers[index].size for index, _ in positions], curves)
    in_layers_order = np.asarray(sorted(range(len(positions)), key=positions.__getitem__))
    means = [row.reduced.units[at] for row in rows for at in range(len(row.effective_units))]
    units = [
        sums_of_units(mean, layers[index].size) for (index, _), mean in zip(positions, means, strict=True)
    ]
    ordered = jax.tree.map(lambda numbers: numbers[..., in_layers_order], numbers)
    return ordered, tuple(units[at] for at in in_layers_order)


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Group layers of equal structure and shapes, which one compiled loop can process.

    Large ones that may be sharded must also have the same place in their block: others may be sharded in another
    way, and a loop over both would move weights.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(layers):
        leaves, structure = jax.tree.flatten(nameless(layer.arrays))
        apart = layer.size > SMALL and (jax.device_count() > 1 or layer_axes(layer.arrays))
        place = _place_in_block(layer.place.path) if apart else None
        groups.setdefault((place, structure, *map(jax.typeof, leaves)), []).append(index)
    return list(groups.values())


def _place_in_block(path: str) -> str:
    """Return the path with * for the numbers of blocks. The last module keeps its own, as in Dense_0.

    >>> _place_in_block("block_3/mlp/Dense_1/kernel")
    'block_*/mlp/Dense_1/kernel'
    """
    modules = path.split("/")
    return "/".join([*(re.sub(r"\d+", "*", block) for block in modules[:-2]), *modules[-2:]])


def _rows_alike(criterion: Criterion, layers: Sequence[Layer], curves: bool, is_counted: bool) -> _Row:
    """Reduce equal layers; stack the results."""
    return _over_parts(
        [layer.arrays for layer in layers],
        lambda arrays: _row(criterion, layers[0], arrays, curves, is_counted),
    )


def _over_parts(members: Sequence[Arrays], function: Callable[[Arrays], Any]) -> Any:
    """Apply a function to each layer of equal weights, in a loop if there are several, and stack the results."""
    members = [nameless(arrays) for arrays in members]
    first, steps = members[0], _steps(members)
    if len(steps) == 1:
        return jax.tree.map(lambda array: array[None], function(part_of(first, tuple(steps[0, 1:]))))
    return lax.map(lambda step: function(_picked(members, step)), steps)


def _steps(members: Sequence[Arrays]) -> np.ndarray:
    """Return [members x stacked layers, 1 + axes]: the index of each member and of each of its layers."""
    at = np.arange(len(members), dtype=np.int32)
    if not layer_axes(members[0]):
        return at[:, None]
    inner = positions(members[0])
    return np.column_stack([np.repeat(at, len(inner)), np.tile(inner, (len(at), 1))])


def _picked(members: Sequence[Arrays], step: jax.Array) -> Arrays:
    arrays = members[0]
    if len(members) > 1:
        arrays = lax.switch(step[0], [lambda arrays=arrays: arrays for arrays in members])
    return part_of(arrays, tuple(step[1:]))


def _row(criterion: Criterion, layer: Layer, arrays: Arrays, curves: bool, is_counted: bool) -> _Row:
    scores, reduced = reduce(criterion, arrays, was_seen(criterion, arrays.sites))
    noise, used = None, None
    if null.is_sampled(criterion):
        noise, used = _noise(criterion, reduced), null.utilization_of(reduced.factors)
    units = effective_units(reduced.units, reduced.units.ndim)
    rest = reduced._replace(factors=None), noise, used, units, nonfinite_count(arrays.weight)
    if is_counted:
        return _Row(None, None, *rest)
    if is_small(layer):
        return _Row(padded(scores, SMALL), None, *rest)
    return _Row(None, read_spread(_order.spread_of(scores.ravel(), layer.size), curves), *rest)


def _count_all(criterion: Criterion, groups: Sequence[Sequence[Layer]]) -> _Counted:
    """Count all layers of some groups in one loop, so that their scores never exist together."""
    members = [[nameless(layer.arrays) for layer in group] for group in groups]

    def branch(arrays: list[Arrays]) -> Callable[[jax.Array], tuple[Histogram, jax.Array]]:
        axes = len(layer_axes(arrays[0]))

        def count(step: jax.Array) -> tuple[Histogram, jax.Array]:
            part = _picked(arrays, step[: 1 + axes])
            scores, _ = reduce(criterion, part, was_seen(criterion, part.sites))
            found = histogram(scores)
            return found._replace(high=jnp.broadcast_to(found.high, len(found.table))), sketch.squares_of(
                scores
            )

        return count

    branches = [branch(arrays) for arrays in members]
    steps = [_steps(arrays) for arrays in members]
    width = max(step.shape[1] for step in steps)
    every = np.concatenate([np.pad(step, ((0, 0), (0, width - step.shape[1]))) for step in steps])
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
    """Join the numbers of all rows, with those of counted layers first.

    One kernel sorts, and one reads the spread of all.
    """
    lengths = [len(row.effective_units) for row in rows]
    by_row = np.split(np.asarray(sizes, np.int32), np.cumsum(lengths)[:-1])
    waiting = [] if counted is None else [counted.spread]
    short = [at for at, row in enumerate(rows) if row.scores is not None]
    if short:
        given = _concatenated([rows[at].scores for at in short]), np.concatenate([by_row[at] for at in short])
        waiting.append(each_row(lambda row: _order.spread_of(*row), given))
    noise = [row.noise for row in rows if row.noise is not None]
    reads: list[Read] = []
    if waiting or noise:
        parts = [len(spread.distribution.largest) for spread in [*waiting, *noise]]
        reads = _split(
            each_row(lambda spread: read_spread(spread, curves), _concatenated([*waiting, *noise])), parts
        )
    # Counted, then small, then large ones that were sorted, in the order of the rows.
    found = [*reads[: len(waiting)], *(row.read for row in rows if row.read is not None)]
    kind = [0 if row.scores is None and row.read is None else 1 if row.read is None else 2 for row in rows]
    source = np.split(np.arange(len(sizes)), np.cumsum(lengths)[:-1])
    order = np.concatenate([source[at] for at in sorted(range(len(rows)), key=kind.__getitem__)])
    back = np.argsort(order)
    read: Read = jax.tree.map(lambda array: array[back], _concatenated(found))
    metrics = metrics_of(read.sums, *_exactly(counted, read.sums))
    reduced, effective, nonfinite = _concatenated(
        [(row.reduced._replace(units=None), row.effective_units, row.nonfinite) for row in rows]
    )
    null_metrics = None
    if noise:
        used = jnp.concatenate([row.factors_used for row in rows])
        sums = jnp.concatenate([read.sums for read in reads[len(waiting) :]])
        null_metrics = null.null_of(criterion, used, reduced.usable, sums)
    return layer_numbers(criterion, metrics, null_metrics, effective, reduced, nonfinite, read.cells)


def _exactly(counted: _Counted | None, sums: jax.Array) -> tuple[Any, Any]:
    """Return the exact counts that `metrics_of` takes with sums [R, 16], whose first rows are counted layers."""
    if counted is None:
        return None, None
    count = len(counted.squares)
    integers = sums[count:, np.asarray([12, 13, 0])].astype(jnp.int32)
    squares = jnp.concatenate([counted.squares.astype(sums.dtype), sums[count:, 6]])
    return jnp.concatenate([counted.integers, integers]), squares


def _noise(criterion: Criterion, reduced: Reduced) -> Spread:
    """Return a sample of noise with as many entries as other rows have."""
    sample = null.sample_of(criterion, reduced.factors, reduced.usable)
    spread = Spread(sample, untallied(jnp.zeros_like(sample.values)))
    return jax.tree.map(lambda part: jnp.pad(part, (0, SMALL - null.SIZE)) if part.ndim else part, spread)


def _concatenated(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)


def _split(tree: Any, counts: Sequence[int]) -> list[Any]:
    ends = np.cumsum(counts)
    return [
        jax.tree.map(lambda array, start=end - count, end=end: array[start:end], tree)
        for count, end in zip(counts, ends, strict=True)
    ]
