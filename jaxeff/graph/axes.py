"""Which axis of a weight stands in which dimension of an array, through reshapes and transposes.

A dimension is described by its factors, major first: a (768, 12, 64) kernel reshaped to (768, 768)
has the second dimension `(Factor(axis=1, size=12), Factor(axis=2, size=64))`. A factor whose axis is
None holds no axis of the weight: a batch, a position, a reduced or broadcast dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.graph.program import Operation, Value


class Factor(NamedTuple):
    """`size` steps of `stride` along one axis of a weight; step 0 is the axis's element `offset`.

    A factor may reach beyond its axis: of four kernels concatenated to (64, 128), the second holds
    its 32 units at `Factor(axis=1, size=128, offset=-32)`.
    """

    axis: int | None
    size: int
    stride: int = 1
    offset: int = 0


Dims = tuple[tuple[Factor, ...], ...]


def of_weight(shape: Sequence[int]) -> Dims:
    return tuple((Factor(axis, size),) for axis, size in enumerate(shape))


def of_data(shape: Sequence[int]) -> Dims:
    return tuple((Factor(None, size),) for size in shape)


def held(dims: Dims) -> frozenset[int]:
    """The weight's axes that stand somewhere in the array.

    >>> sorted(held(of_weight((3, 4)) + of_data((8,))))
    [0, 1]
    """
    return frozenset(factor.axis for dim in dims for factor in dim if factor.axis is not None)


def covers(dims: Dims, axes: frozenset[int], shape: Sequence[int]) -> bool:
    """Whether the array holds each of these axes of a weight whole."""
    return all(_covers(dims, axis, shape[axis]) for axis in axes)


def _covers(dims: Dims, axis: int, size: int) -> bool:
    factors = _factors_of(dims, axis)
    if len(factors) == 1 and factors[0].stride == 1:
        return factors[0].offset <= 0 and factors[0].offset + factors[0].size >= size
    whole = math.prod(factor.size for factor in factors) == size
    return whole and not sum(factor.offset for factor in factors) and bool(factors)


def _factors_of(dims: Dims, axis: int) -> list[Factor]:
    return [factor for dim in dims for factor in dim if factor.axis == axis]


class Part(NamedTuple):
    """Some of the units along one axis of a weight, as an axis of its own.

    Attributes:
        axis: of the weight.
        indices: along it, ascending.
        dims: where the weight's axes stand, with these units as the whole axis.
        shape: the weight's, with these units as the whole axis.
    """

    axis: int
    indices: tuple[int, ...]
    dims: Dims
    shape: tuple[int, ...]


def part(dims: Dims, axes: frozenset[int], shape: Sequence[int]) -> Part | None:
    """What an array holds of a weight, where that is part of one axis and all of the others."""
    partial = [axis for axis in axes if not _covers(dims, axis, shape[axis])]
    if len(partial) != 1:
        return None
    (axis,) = partial
    factors = sorted(_factors_of(dims, axis), key=lambda factor: -factor.stride)
    grid = np.zeros((), int)
    for factor in factors:
        grid = grid[..., None] + factor.offset + factor.stride * np.arange(factor.size)
    indices = grid.ravel()
    inside = indices.size and indices.min() >= 0 and indices.max() < shape[axis]
    if not factors or not inside or np.any(np.diff(indices) <= 0):
        return None
    strides = dict(zip(factors, np.cumprod([1, *[f.size for f in factors[:0:-1]]])[::-1], strict=True))
    renumbered = tuple(
        tuple(f._replace(stride=int(strides[f]), offset=0) if f.axis == axis else f for f in dim)
        for dim in dims
    )
    cut = tuple(indices.size if i == axis else size for i, size in enumerate(shape))
    return Part(axis, tuple(indices.tolist()), renumbered, cut)


def move(operation: Operation, dims: Dims, shape: Sequence[int]) -> list[Dims | None]:
    """Dims of each output of an operation that only moves elements; None where they cannot be followed."""
    if operation.name in _DIVISIONS:
        return _DIVISIONS[operation.name](dims, tuple(shape), operation.params)
    rule = _MOVES[operation.name]
    return [rule(dims, tuple(shape), operation.outputs[0].shape, operation.params)]


def moves(operation: Operation) -> bool:
    return operation.name in MOVED


REDUCING_COLLECTIVES = frozenset({"psum", "psum_invariant", "pmax", "pmin"})
GATHERING = frozenset({"all_gather", "all_gather_invariant"})
JOINING = REDUCING_COLLECTIVES | GATHERING
"""Collectives whose results are made of the elements of several devices."""


def reduced(operation: Operation) -> frozenset[int] | None:
    """Dimensions that a reduction removes: empty for one over devices, None if this is not a reduction."""
    name, along = operation.name, operation.params.get("axes")
    if along is None or not (name.startswith("reduce_") or name in REDUCING_COLLECTIVES):
        return None
    # A collective names the axes of devices; those that a vmap has brought in are dimensions.
    return frozenset(int(axis) for axis in along if isinstance(axis, (int, np.integer)))


def gathered_from_devices(operation: Operation, dims: Dims, result: Sequence[int]) -> Dims:
    """Dims of what a collective gathers: other devices' elements stand beside, in a dimension or its own."""
    if operation.name not in GATHERING:
        return dims
    along, tiled = operation.params["all_gather_dimension"], operation.params["tiled"]
    return (*dims[:along], (Factor(None, result[along]),), *dims[along + 1 if tiled else along :])


def concatenated(operation: Operation, operand: int, dims: Dims, leaf: Sequence[int]) -> Dims | None:
    """Dims of a concatenation's output, for the axes that this operand brings; each must be whole.

    None along a dimension that is no axis of the weight: which part of it is the weight's would be forgotten.
    """
    along = operation.params["dimension"]
    before = sum(_shape(other)[along] for other in operation.inputs[:operand])
    whole = operation.outputs[0].shape[along]
    if whole == _shape(operation.inputs[operand])[along]:
        return dims
    if len(dims[along]) != 1 or not held((dims[along],)) or not covers(dims, held((dims[along],)), leaf):
        return None
    factor = dims[along][0]
    widened = factor._replace(size=whole, offset=factor.offset - before)
    return (*dims[:along], (widened,), *dims[along + 1 :])


def stacked(operation: Operation, dims: Dims) -> Dims:
    """Dims of a stack's output, for any of its operands."""
    along = operation.params["axis"]
    return (*dims[:along], (Factor(None, operation.outputs[0].shape[along]),), *dims[along:])


def _shape(operand: Any) -> tuple[int, ...]:
    return operand.shape if isinstance(operand, Value) else np.shape(operand.val)


def broadcast(dims: Dims, shape: Sequence[int], result: Sequence[int]) -> Dims:
    """Dims of an operand of elementwise arithmetic, seen in the result (size 1 stretches)."""
    lead = len(result) - len(shape)
    kept = tuple(
        dim if shape[i] == result[lead + i] else (Factor(None, result[lead + i]),)
        for i, dim in enumerate(dims)
    )
    return of_data(result[:lead]) + kept


def _reshape(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims | None:
    """Split and join factors so that they fill the new dimensions, major first."""
    if params.get("dimensions") is not None:
        return None
    factors = [factor for dim in dims for factor in dim]
    kept = tuple(factor for factor in factors if factor.size != 1)
    left = list(_shifted((kept,), [factor for factor in factors if factor.size == 1])[0])
    filled: list[tuple[Factor, ...]] = []
    for size in result:
        dim: list[Factor] = []
        needed = size
        while needed > 1:
            if not left:
                return None
            factor = left.pop(0)
            if needed % factor.size == 0:
                dim.append(factor)
                needed //= factor.size
            elif factor.size % needed == 0:
                minor = factor.size // needed
                dim.append(factor._replace(size=needed, stride=factor.stride * minor))
                left.insert(0, factor._replace(size=minor, offset=0))
                needed = 1
            else:
                return None
        filled.append(tuple(dim))
    return tuple(filled)


def regrouped(dim: Sequence[Factor], sizes: Sequence[int]) -> list[tuple[Factor, ...]] | None:
    """A dimension cut into pieces of these sizes, major first; None where its factors do not allow it."""
    whole = math.prod(factor.size for factor in dim)
    pieces = _reshape((tuple(dim),), (whole,), tuple(sizes), {}) if whole == math.prod(sizes) else None
    return None if pieces is None else list(pieces)


def _transpose(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims:
    return tuple(dims[i] for i in params["permutation"])


def _squeeze(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims:
    dropped = {i % len(dims) for i in params["dimensions"]}
    kept = tuple(dim for i, dim in enumerate(dims) if i not in dropped)
    return _shifted(kept, [factor for i in dropped for factor in dims[i]])


def _shifted(dims: Dims, dropped: Sequence[Factor]) -> Dims:
    """The dims without some factors of size 1, whose offsets go to other factors of their axes.

    To the next finer one, so that what is cut out of every head does not shift the heads; past the finest, to
    the finest.
    """
    moved = [list(dim) for dim in dims]
    for gone in dropped:
        own = [
            (factor.stride, i, j)
            for i, dim in enumerate(moved)
            for j, factor in enumerate(dim)
            if factor.axis == gone.axis
        ]
        if gone.offset and own:
            _, i, j = max((place for place in own if place[0] <= gone.stride), default=min(own))
            moved[i][j] = moved[i][j]._replace(offset=moved[i][j].offset + gone.offset)
    return tuple(map(tuple, moved))


def _broadcast_in_dim(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims:
    moved = list(of_data(result))
    for i, target in enumerate(params["broadcast_dimensions"]):
        if shape[i] == result[int(target)]:
            moved[int(target)] = dims[i]
    return tuple(moved)


def _rev(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims:
    # A reversed axis no longer lines up with the weight's own order (a flipped convolution kernel).
    return tuple(
        (Factor(None, shape[i]),) if i in params["dimensions"] else dim for i, dim in enumerate(dims)
    )


def _slice(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims | None:
    strides = params["strides"] or (1,) * len(shape)
    moved: list[tuple[Factor, ...]] = []
    for dim, start, kept, stride in zip(dims, params["start_indices"], result, strides, strict=True):
        cut = _cut(dim, start, kept, stride)
        if cut is None:
            return None
        moved.append(cut)
    return tuple(moved)


def _tile(dims: Dims, shape: tuple[int, ...], result: tuple[int, ...], params: Mapping) -> Dims:
    return tuple(
        dim if times == 1 else (Factor(None, times), *dim)
        for dim, times in zip(dims, params["reps"], strict=True)
    )


def _split(dims: Dims, shape: tuple[int, ...], params: Mapping) -> list[Dims | None]:
    along, parts, start = params["axis"], [], 0
    for size in params["sizes"]:
        cut = _cut(dims[along], start, size)
        parts.append(None if cut is None else (*dims[:along], cut, *dims[along + 1 :]))
        start += size
    return parts


def _unstack(dims: Dims, shape: tuple[int, ...], params: Mapping) -> list[Dims | None]:
    along = params["axis"]
    kept = (*dims[:along], *dims[along + 1 :])
    cuts = (_cut(dims[along], start, 1) for start in range(shape[along]))
    return [None if cut is None else _shifted(kept, cut) for cut in cuts]


def _cut(dim: tuple[Factor, ...], start: int, size: int, stride: int = 1) -> tuple[Factor, ...] | None:
    """`size` elements of a dimension from `start`: of a product of factors, whole steps of the first."""
    if not dim or size == math.prod(factor.size for factor in dim):
        return dim
    first, *rest = dim
    minor = math.prod(factor.size for factor in rest)
    if start % minor or size % minor or (stride > 1 and rest):
        return None
    if first.axis is None:
        return (first._replace(size=size // minor), *rest)
    offset = first.offset + start // minor * first.stride
    return (first._replace(size=size // minor, stride=first.stride * stride, offset=offset), *rest)


_MOVES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "rev": _rev,
    "slice": _slice,
    "tile": _tile,
}
_DIVISIONS = {"split": _split, "unstack": _unstack}
MOVED = frozenset({*_MOVES, *_DIVISIONS})
"""Primitives that only move elements, of one operand."""


def reduce_to_axes(
    dims: Dims,
    axes: frozenset[int],
    shape: Sequence[int],
    array: jax.Array,
    reduction: Callable[..., Any],
) -> Any:
    """Reduce all but the given axes of a weight, and lay the rest out as the weight has them.

    Reduces by axis before it transposes: the big array is never moved (transposing first took three
    times the memory on a language model's logits).

    Args:
        dims: where the weight's axes stand in `array`.
        axes: the weight's axes to keep; each must stand whole in the array.
        shape: the weight's shape.
        reduction: `f(array, axis=tuple)`, such as `jnp.sum`, or one that returns a tree of arrays.

    Returns:
        The weight's rank; size 1 for each axis not kept, so that it broadcasts against the weight.
    """
    factors = [factor for dim in dims for factor in dim]
    kept = [factor for factor in factors if factor.axis in axes]
    reduced = tuple(i for i, factor in enumerate(factors) if factor.axis not in axes)
    small = reduction(array.reshape([factor.size for factor in factors]), axis=reduced)
    return jax.tree.map(lambda array: _laid(array, kept, axes, shape), small)


def _laid(small: jax.Array, kept: Sequence[Factor], axes: frozenset[int], shape: Sequence[int]) -> jax.Array:
    """What is left of the factors, in the order of the weight's axes."""
    order = sorted(range(len(kept)), key=lambda i: (kept[i].axis, -kept[i].stride))
    ordered = jnp.transpose(small, order)
    for i, factor in enumerate(kept[j] for j in order):
        size = shape[factor.axis] if factor.axis is not None else 0
        if factor.stride == 1 and factor.size > size:
            # Concatenated with other weights: its own units stand at -offset.
            ordered = jax.lax.slice_in_dim(ordered, -factor.offset, -factor.offset + size, axis=i)
    return ordered.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])


def positions(dims: Dims) -> int:
    """How many elements of the array fall on each combination of the weight's axes."""
    return math.prod(factor.size for dim in dims for factor in dim if factor.axis is None)
