"""What operations that move, cut or join elements do to the labels of their operands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxeff.graph.coupling_labels import (
    MASKED,
    NOTHING,
    ROUTED,
    UNIFORM,
    UNKNOWN,
    Described,
    Dim,
    Labels,
    Rule,
    shared,
)
from jaxeff.graph.coupling_routing import looks_up, positions_in
from jaxeff.graph.program import Operation
from jaxeff.graph.provenance import value_shape


def unknown(labels: Labels, operation: Operation, reason: str) -> list[tuple[Dim, ...]]:
    """Outputs of which nothing is known but their shape: locked, for this reason."""
    return [tuple(labels.dim(n, False, reason) for n in output.shape) for output in operation.outputs]


def _broadcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    stands = {
        int(t): dim for t, dim in zip(operation.params["broadcast_dimensions"], inputs[0].dims, strict=True)
    }
    return [
        tuple(
            stands[axis]
            if axis in stands and stands[axis].factors
            else labels.dim(size, inputs[0].zero)._replace(unrouted=NOTHING if inputs[0].zero else UNIFORM)
            for axis, size in enumerate(shape)
        )
    ]


def _reshape(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    plain = operation.params.get("dimensions") is None and math.prod(shape) > 0
    regrouped = labels.regrouped(inputs[0].dims, shape) if plain else None
    if regrouped is None:
        labels.lock_dims(inputs[0].dims, "a reshape that cuts across its axes")
        return unknown(labels, operation, "a reshape that cuts across its axes")
    return [tuple(regrouped)]


def _transpose(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    return [tuple(inputs[0].dims[i] for i in operation.params["permutation"])]


def _squeeze(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    dims = inputs[0].dims
    dropped = {i % len(dims) for i in operation.params["dimensions"]}
    return [tuple(dim for i, dim in enumerate(dims) if i not in dropped)]


def _rev(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    backwards = {int(i) for i in operation.params["dimensions"]}
    return [
        tuple(
            labels.taken(dim, np.arange(dim.size)[::-1]) if i in backwards and dim.factors else dim
            for i, dim in enumerate(inputs[0].dims)
        )
    ]


def _slice(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    params = operation.params
    strides = params["strides"] or (1,) * len(inputs[0].dims)
    windows = zip(inputs[0].dims, params["start_indices"], params["limit_indices"], strides, strict=True)
    return [tuple(_taken(labels, dim, start, end, step) for dim, start, end, step in windows)]


def _taken(labels: Labels, dim: Dim, start: int, end: int, step: int = 1) -> Dim:
    return labels.taken(dim, np.arange(start, end, step)) if dim.factors else dim


def _split(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (operand,), axis = inputs, operation.params["axis"]
    ends = np.cumsum(operation.params["sizes"]).tolist()
    parts = [
        _taken(labels, operand.dims[axis], start, end)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return [(*operand.dims[:axis], part, *operand.dims[axis + 1 :]) for part in parts]


def _concatenate(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    along = operation.params["dimension"]
    dims = []
    for axis, size in enumerate(operation.outputs[0].shape):
        here = [x.dims[axis] for x, v in zip(inputs, operation.inputs, strict=True) if value_shape(v)[along]]
        if axis == along:
            dims.append(labels.concatenated(here) if size > 1 else Dim((), False))
        else:
            dims.append(labels.match_all(here))
    return [tuple(dims)]


def _stack(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A new dimension, in which each operand is one element."""
    along, size = operation.params["axis"], len(inputs)
    tied = [labels.match_all(dims) for dims in zip(*(x.dims for x in inputs), strict=True)]
    here = [Dim((), x.zero) for x in inputs]
    tied.insert(along, labels.concatenated(here) if size > 1 else here[0])
    return [tuple(tied)]


def _unstack(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (operand,), along = inputs, operation.params["axis"]
    if operand.dims[along].factors:
        for position in range(operand.dims[along].size):
            _ = labels.taken(operand.dims[along], np.array([position]))
    kept = (*operand.dims[:along], *operand.dims[along + 1 :])
    return [kept for _ in operation.outputs]


def _tile(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Copies one after the other: major the copy, minor the element."""
    (operand,) = inputs
    copies = (labels.dim(times, operand.zero) for times in operation.params["reps"])
    return [
        tuple(
            Dim((*copy.factors, *dim.factors), dim.zero)
            for copy, dim in zip(copies, operand.dims, strict=True)
        )
    ]


def _pad(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    dims = []
    for dim, (low, high, interior), size in zip(
        inputs[0].dims, operation.params["padding_config"], operation.outputs[0].shape, strict=True
    ):
        if (low, high, interior) == (0, 0, 0):
            dims.append(dim)
        elif interior or low < 0 or high < 0:
            labels.lock_dims([dim], "padding")
            dims.append(labels.dim(size, False, "padding"))
        else:
            # One element of padding has no label yet, and is locked when it gets one.
            before, after = ([labels.dim(n, True, "padding")] if n else [] for n in (low, high))
            parts = [*before, dim, *after]
            dims.append(labels.concatenated(parts))
    zero = inputs[1].zero
    return [
        tuple(
            dim._replace(
                zero=dim.zero and zero, unrouted=NOTHING if zero and dim.unrouted == NOTHING else UNKNOWN
            )
            for dim in dims
        )
    ]


def _gather(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A look-up: what is looked up by is locked, whole rows pass."""
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    operand, indices = inputs
    shape = operation.outputs[0].shape
    _lock_looked_up(labels, operand, indices, numbers.start_index_map, "looked up by a gather")
    labels.lock_dims(indices.dims[-1:], "looked up by a gather")
    dims = [Dim((), False)] * len(shape)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rows = [i for i in range(len(operand.dims)) if i not in dropped]
    for target, source in zip(numbers.offset_dims, rows, strict=True):
        dims[target] = _whole(
            labels, operand.dims[source], sizes[source], shape[target], "looked up by a gather"
        )
    others = [target for target in range(len(shape)) if target not in numbers.offset_dims]
    for target, source in zip(others, range(len(indices.dims) - 1), strict=True):
        dims[target] = indices.dims[source]._replace(zero=False, unrouted=UNKNOWN)
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        _ = labels.match(operand.dims[i], indices.dims[j])
    return [tuple(dims)]


def _lock_looked_up(
    labels: Labels, operand: Described, indices: Described, axes: Sequence[int], reason: str
) -> None:
    """Lock these axes of the operand, from which index vectors choose, unless a router chose the indices."""
    for place, axis in enumerate(axes):
        dim = operand.dims[axis]
        labels.lock_dims([dim], reason, only=MASKED)
        if not looks_up(labels, dim, indices, place, len(axes)):
            labels.lock_dims([dim], reason, only=ROUTED)
            labels.lock_dims(positions_in(indices), reason)


def _whole(labels: Labels, dim: Dim, taken: int, size: int, reason: str) -> Dim:
    """A dimension of which all is taken; else it is locked, and what is taken of it is new."""
    if taken == dim.size:
        return dim
    labels.lock_dims([dim], reason)
    return labels.dim(size, False, reason)


def _dynamic_slice(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    return [
        tuple(
            _whole(labels, dim, size, size, "sliced at a position")
            for dim, size in zip(inputs[0].dims, shape, strict=True)
        )
    ]


def _dynamic_update(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    """A slice of an array replaced: dimensions that the slice has whole are tied, the others locked."""
    operand, update = inputs[:2]
    pairs = zip(operand.dims, update.dims, strict=True)
    return [tuple(_replaced(labels, whole, part, "updated at a position") for whole, part in pairs)]


def _replaced(labels: Labels, whole: Dim, part: Dim, reason: str) -> Dim:
    if whole.size == part.size:
        tied = labels.match(whole, part) if whole.factors else whole
    else:
        labels.lock_dims([whole, part], reason)
        tied = whole
    return tied._replace(zero=whole.zero and part.zero, unrouted=shared([whole.unrouted, part.unrouted]))


def _scatter(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Rows written at indices: whole rows are tied, what the indices choose is locked."""
    numbers = operation.params["dimension_numbers"]
    operand, indices, updates = inputs
    reason = f"written to by a {operation.name}"
    _lock_looked_up(labels, operand, indices, numbers.scatter_dims_to_operand_dims, reason)
    labels.lock_dims(indices.dims[-1:], reason)
    dims = list(operand.dims)
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    rows = [i for i in range(len(dims)) if i not in dropped]
    for target, source in zip(rows, numbers.update_window_dims, strict=True):
        dims[target] = _replaced(labels, dims[target], updates.dims[source], reason)
    others = [i for i in range(len(updates.dims)) if i not in numbers.update_window_dims]
    for source, index in zip(others, indices.dims[:-1], strict=True):
        dim = updates.dims[source]
        _ = labels.match(dim, index)
        # What is removed must not have been written: only a sum may leave it out, where it is 0.
        adds = operation.name in ("scatter-add", "scatter_add")
        if not (adds and dim.zero):
            labels.lock_dims([dim], reason, only=MASKED)
        if not (adds and dim.unrouted == NOTHING):
            labels.lock_dims([dim], reason, only=ROUTED)
    for i, j in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        dims[i] = labels.match(dims[i], indices.dims[j])._replace(zero=False, unrouted=UNKNOWN)
    return [tuple(dims)]


MOVES: Mapping[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "scatter_add",
         "scatter_max", "scatter_min", "scatter_mul", "scatter_sub"),
        _scatter,
    ),
}  # fmt: skip
