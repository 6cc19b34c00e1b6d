"""What each operation does to the labels of its operands' dimensions.

In: an `Operation` and its operands, `Described`. Out: its outputs, described, with labels joined and locked
on the way. What has no rule is locked. Imports `labels`, `nonlinearities`, `primitives`, `program`,
`provenance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.graph.labels import Dim, Labels
from jaxeff.graph.nonlinearities import POINTWISE, UNEVALUATED, unchanged
from jaxeff.graph.primitives import LOCKED, RANDOM
from jaxeff.graph.program import ENTERED, Operation
from jaxeff.graph.provenance import value_shape

# Kinds of locks that a caller who knows better may leave out. REPLAY: those that only a rebuilt module needs,
# because it computes numbers from its widths anew (1/n, 1/sqrt(d)), where a replayed program keeps them.
STATISTICS, SCALE, REPLAY = "statistics", "scale", "replay"
KINDS = frozenset({STATISTICS, SCALE, REPLAY})

CONSTANT, WEIGHT, DATA = range(3)
_SCALED = "data multiplies data and is summed over it: a scale by its size (1/sqrt(d)) would change"


class Described(NamedTuple):
    """What is known of one array.

    Attributes:
        dims: one for each dimension.
        made_of: CONSTANT; WEIGHT, of leaves and constants; or DATA.
        zero: whether it is 0 everywhere.
    """

    dims: tuple[Dim, ...]
    made_of: int
    zero: bool = False


Rule = Callable[[Labels, Operation, Sequence[Described]], list[tuple[Dim, ...]]]


def through(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
    """The outputs of an operation that has no body; what has no rule is locked."""
    rule = _RULES.get(operation.name, _pointwise if operation.name in _POINTWISE else _without_rule)
    made_of = max((operand.made_of for operand in inputs), default=CONSTANT)
    zero = (operation.name in _MOVES or unchanged(operation)) and all(x.zero for x in inputs)
    return [Described(dims, made_of, zero) for dims in rule(labels, operation, inputs)]


_POINTWISE = frozenset(POINTWISE) | UNEVALUATED
# 0 where every operand is 0; where any is; where the first is.
_ZERO_OF_ALL = frozenset({
    "abs", "add", "add_any", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "conj", "convert_element_type",
    "copy", "copy_p", "device_put", "erf", "erf_inv", "expm1", "floor", "imag", "layout_constraint", "log1p",
    "max", "mesh_cast", "min", "mulhi", "name", "neg", "optimization_barrier", "or", "pcast", "preduced",
    "pvary", "real", "reduce_precision", "reduced_vary_cast", "reduced_vary_cast_p", "relayout", "reshard",
    "round", "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stage",
    "stop_gradient", "sub", "tan", "tanh", "vary_unreduced_cast", "vary_unreduced_cast_p",
    "with_memory_space_constraint", "xor",
})  # fmt: skip
_ZERO_OF_ANY = frozenset({"and", "mul"})
_ZERO_OF_FIRST = frozenset({"div", "integer_pow", "rem"})
_MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "tile", "transpose"})


def _without_rule(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    why = LOCKED.get(operation.name)
    reason = f"{operation.name}, which has no rule" + (f": {why}" if why else "")
    for operand in inputs:
        labels.lock_dims(operand.dims, reason)
    return _new(labels, operation, reason)


def _bitcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    same = value_shape(operation.inputs[0]) == operation.outputs[0].shape
    return (_pointwise if same else _without_rule)(labels, operation, inputs)


def _random(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    for operand in inputs:
        labels.lock_dims(operand.dims, "random numbers: another shape draws others")
    return _new(labels, operation, "random numbers: another shape draws others")


def _new(labels: Labels, operation: Operation, reason: str) -> list[tuple[Dim, ...]]:
    return [tuple(labels.dim(n, False, reason) for n in output.shape) for output in operation.outputs]


def _pointwise(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    if len(operation.outputs) != 1:
        return [operand.dims for operand in inputs]
    (shape,) = (output.shape for output in operation.outputs)
    counted = list(inputs)[1 if operation.name == "select_n" else 0 :]
    dims = []
    for axis, size in enumerate(shape):
        spanning = [x for x in inputs if len(x.dims) == len(shape) and x.dims[axis].factors]
        if size < 2 or not spanning:
            dims.append(labels.dim(size))
            continue
        dim = spanning[0].dims[axis]
        for other in spanning[1:]:
            dim = labels.match(dim, other.dims[axis])
        zeros = [
            x.dims[axis].zero if len(x.dims) == len(shape) and x.dims[axis].factors else x.zero
            for x in counted
        ]
        dims.append(dim._replace(zero=_zero(operation, zeros)))
    return [tuple(dims)]


def _zero(operation: Operation, zeros: Sequence[bool]) -> bool:
    if operation.name in _ZERO_OF_FIRST:
        return zeros[0] and (operation.name != "integer_pow" or operation.params["y"] > 0)
    if operation.name in _ZERO_OF_ANY:
        return any(zeros)
    return operation.name in _ZERO_OF_ALL and all(zeros)


def _broadcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    stands = {
        int(t): dim for t, dim in zip(operation.params["broadcast_dimensions"], inputs[0].dims, strict=True)
    }
    return [
        tuple(
            stands[axis] if axis in stands and stands[axis].factors else labels.dim(size, inputs[0].zero)
            for axis, size in enumerate(shape)
        )
    ]


def _reshape(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    plain = operation.params.get("dimensions") is None and math.prod(shape) > 0
    regrouped = labels.regrouped(inputs[0].dims, shape) if plain else None
    if regrouped is None:
        labels.lock_dims(inputs[0].dims, "a reshape that cuts across its axes")
        return _new(labels, operation, "a reshape that cuts across its axes")
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
            dims.append(_all_tied(labels, here))
    return [tuple(dims)]


def _stack(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A new dimension, in which each operand is one element."""
    along, size = operation.params["axis"], len(inputs)
    tied = [_all_tied(labels, dims) for dims in zip(*(x.dims for x in inputs), strict=True)]
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


def _all_tied(labels: Labels, dims: Sequence[Dim]) -> Dim:
    tied = dims[0]
    for other in dims[1:]:
        tied = labels.match(tied, other)
    return tied._replace(zero=all(dim.zero for dim in dims))


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
    return [tuple(dim._replace(zero=dim.zero and inputs[1].zero) for dim in dims)]


def _iota(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    along = operation.params["dimension"]
    return [
        tuple(
            labels.dim(size, False, "numbered by its position" if axis == along else None)
            for axis, size in enumerate(operation.outputs[0].shape)
        )
    ]


def _reduce(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A reduction gives its value in every element it reduces: statistics of a norm, a softmax."""
    reduced = {int(axis) for axis in operation.params.get("axes", operation.params.get("dimensions", ()))}
    sums = operation.name == "reduce_sum"
    for operand in inputs:
        for axis in reduced & set(range(len(operand.dims))):
            reason = f"{operation.name} over it" + (" (a norm or a mean, which would change)" if sums else "")
            # What is 0 adds nothing to a sum, in whose place only a count taken from the width would change.
            kinds = (STATISTICS, *([REPLAY] if operand.dims[axis].zero else [])) if sums else ()
            labels.lock_dims([operand.dims[axis]], reason, *kinds)
    kept = tuple(dim for i, dim in enumerate(inputs[0].dims) if i not in reduced)
    zero = sums or operation.name == "reduce_max"
    return [tuple(dim._replace(zero=dim.zero and zero) for dim in kept) for _ in operation.outputs]


def _along(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Sorting and running sums: each element depends on the others of one dimension."""
    params = operation.params
    axis = params["dimension"] if "dimension" in params else params["axis"]
    dims = tuple(_all_tied(labels, tied) for tied in zip(*(x.dims for x in inputs), strict=True))
    labels.lock_dims([dims[axis]], f"{operation.name} along it")
    if operation.name == "cumlogsumexp":
        dims = tuple(dim._replace(zero=False) for dim in dims)
    return [dims for _ in operation.outputs]


def _top_k(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    labels.lock_dims(inputs[0].dims[-1:], "top_k along it")
    kept = tuple(dim._replace(zero=False) for dim in inputs[0].dims[:-1])
    return [(*kept, labels.dim(output.shape[-1], False, "top_k along it")) for output in operation.outputs]


def _contract(labels: Labels, name: str, one: Described, other: Described, pair: tuple[Dim, Dim]) -> None:
    """A sum over a dimension of two operands, which leaves out what is 0 in either of them."""
    tied = labels.match(*pair)
    if not any(dim.zero for dim in pair):
        labels.lock_dims([tied], f"{name} sums over it, and neither side is 0 where it is removed")
    if WEIGHT not in (one.made_of, other.made_of):
        labels.lock_dims([tied], _SCALED, SCALE, REPLAY)


def _dot_general(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (over_left, over_right), (batch_left, batch_right) = operation.params["dimension_numbers"]
    left, right = inputs
    for i, j in zip(over_left, over_right, strict=True):
        _contract(labels, operation.name, left, right, (left.dims[i], right.dims[j]))
    batch = [
        labels.match(a, b)._replace(zero=a.zero or b.zero)
        for a, b in ((left.dims[i], right.dims[j]) for i, j in zip(batch_left, batch_right, strict=True))
    ]
    free_left = [dim for i, dim in enumerate(left.dims) if i not in (*over_left, *batch_left)]
    free_right = [dim for i, dim in enumerate(right.dims) if i not in (*over_right, *batch_right)]
    if left.made_of == right.made_of == DATA:
        labels.heads.append((batch, [*(left.dims[i] for i in over_left), *free_left, *free_right]))
    return [(*batch, *free_left, *free_right)]


def _convolution(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    numbers, groups = operation.params["dimension_numbers"], operation.params["feature_group_count"]
    if operation.params["batch_group_count"] != 1:
        return _without_rule(labels, operation, inputs)
    data, kernel = inputs
    shape = operation.outputs[0].shape
    spatial = [data.dims[i] for i in numbers.lhs_spec[2:]]
    labels.lock_dims(spatial, "positions of a convolution")
    labels.lock_dims([kernel.dims[i] for i in numbers.rhs_spec[2:]], "the window of a convolution")
    channels, features = data.dims[numbers.lhs_spec[1]], kernel.dims[numbers.rhs_spec[0]]
    within = kernel.dims[numbers.rhs_spec[1]]
    if groups > 1:
        # Channels and features are both groups x what is in each, and the groups go together.
        group = labels.fresh(groups)
        each = labels.dim(features.size // groups)
        channels = labels.match(channels, Dim((group, *within.factors), within.zero))
        features = labels.match(features, Dim((group, *each.factors), features.zero))
        if WEIGHT not in (data.made_of, kernel.made_of):
            labels.lock_dims([channels], _SCALED, SCALE, REPLAY)
        if within.factors and not within.zero:
            labels.lock_dims([channels], "neither side of a convolution is 0 where it is removed")
    else:
        _contract(labels, operation.name, data, kernel, (channels, within))
    dims = [labels.dim(size, False, "positions of a convolution") for size in shape]
    dims[numbers.out_spec[0]] = data.dims[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = features
    return [tuple(dims)]


def _reduce_window(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    """Pooling: dimensions with a window of 1 pass, the others are positions."""
    params, shape = operation.params, operation.outputs[0].shape
    windows = params["window_dimensions"]
    operands = [x for x in inputs if len(x.dims) == len(shape)]
    if len(operands) != len(operation.outputs):
        return _without_rule(labels, operation, inputs)
    dims = []
    for axis, (size, window) in enumerate(zip(shape, windows, strict=True)):
        tied = _all_tied(labels, [x.dims[axis] for x in operands])
        if window == 1 and params["window_strides"][axis] == 1 and tied.size == size:
            dims.append(tied._replace(zero=False))
            continue
        labels.lock_dims([tied], "positions of a pooling window")
        dims.append(labels.dim(size, False, "positions of a pooling window"))
    return [tuple(dims) for _ in operation.outputs]


def _gather(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A look-up: what is looked up by is locked, whole rows pass."""
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    operand, indices = inputs
    shape = operation.outputs[0].shape
    labels.lock_dims([operand.dims[i] for i in numbers.start_index_map], "looked up by a gather")
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
        dims[target] = indices.dims[source]._replace(zero=False)
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        _ = labels.match(operand.dims[i], indices.dims[j])
    return [tuple(dims)]


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
    return tied._replace(zero=whole.zero and part.zero)


def _scatter(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Rows written at indices: whole rows are tied, what the indices choose is locked."""
    numbers = operation.params["dimension_numbers"]
    operand, indices, updates = inputs
    reason = f"written to by a {operation.name}"
    labels.lock_dims([operand.dims[i] for i in numbers.scatter_dims_to_operand_dims], reason)
    labels.lock_dims(indices.dims[-1:], reason)
    dims = list(operand.dims)
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    rows = [i for i in range(len(dims)) if i not in dropped]
    for target, source in zip(rows, numbers.update_window_dims, strict=True):
        dims[target] = _replaced(labels, dims[target], updates.dims[source], reason)
    others = [i for i in range(len(updates.dims)) if i not in numbers.update_window_dims]
    for source, index in zip(others, indices.dims[:-1], strict=True):
        _ = labels.match(updates.dims[source], index)
    for i, j in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        dims[i] = labels.match(dims[i], indices.dims[j])._replace(zero=False)
    return [tuple(dims)]


def _empty(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Arrays of which nothing is known but their shape."""
    return [tuple(labels.dim(size, True) for size in output.shape) for output in operation.outputs]


_RULES: Mapping[str, Rule] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
    **dict.fromkeys(
        ("argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum", "reduce_xor"),
        _reduce,
    ),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "sort"), _along),
    **dict.fromkeys(("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
                    _reduce_window),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "scatter_add",
         "scatter_max", "scatter_min", "scatter_mul", "scatter_sub"),
        _scatter,
    ),
    **dict.fromkeys(RANDOM, _random),
    **dict.fromkeys(
        ("after_all", "axis_index", "create_token", "empty", "empty2", "partition_id", "platform_index"),
        _empty,
    ),
}  # fmt: skip
COUPLED = frozenset({*ENTERED, *_POINTWISE, *_RULES})
"""Primitives of which it is known what goes together in them."""
