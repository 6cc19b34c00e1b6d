"""What operations that sum over dimensions, or go along one, do to the labels of their operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxeff.graph.coupling_labels import (
    DATA,
    DERIVATIVE,
    LOGIT,
    MASKED,
    NOTHING,
    REPLAY,
    ROUTED,
    SCALE,
    STATISTICS,
    UNKNOWN,
    WEIGHT,
    Described,
    Dim,
    Labels,
    Rule,
    shared,
)
from jaxeff.graph.coupling_routing import is_lowest
from jaxeff.graph.program import Operation

_SCALED = "data multiplies data and is summed over it: a scale by its size (1/sqrt(d)) would change"


def _contract(labels: Labels, name: str, one: Described, other: Described, pair: tuple[Dim, Dim]) -> None:
    """A sum over a dimension of two operands, which leaves out what is 0 in either of them."""
    tied = labels.match(*pair)
    neither = f"{name} sums over it, and neither side is 0 where it is removed"
    if not any(dim.zero for dim in pair):
        labels.lock_dims([tied], neither, only=MASKED)
    if not any(dim.unrouted == NOTHING for dim in pair):
        labels.lock_dims([tied], neither, DERIVATIVE, only=ROUTED)
    if WEIGHT not in (one.made_of, other.made_of):
        labels.lock_dims([tied], _SCALED, SCALE, REPLAY, only=MASKED)


def _dot_general(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (over_left, over_right), (batch_left, batch_right) = operation.params["dimension_numbers"]
    left, right = inputs
    for i, j in zip(over_left, over_right, strict=True):
        pair = left.dims[i], right.dims[j]
        _contract(labels, operation.name, left, right, pair)
        if any(dim.unrouted == NOTHING for dim in pair):
            labels.summed.append((operation, pair[0], (i, j)))
    batch = [
        labels.match(a, b)._replace(zero=a.zero or b.zero, unrouted=_of_product(a, b))
        for a, b in ((left.dims[i], right.dims[j]) for i, j in zip(batch_left, batch_right, strict=True))
    ]
    free_left, free_right = _free(left, (*over_left, *batch_left)), _free(right, (*over_right, *batch_right))
    if left.made_of == right.made_of == DATA and over_left:
        labels.heads.append((batch, [*(left.dims[i] for i in over_left), *free_left, *free_right]))
    return [(*batch, *free_left, *free_right)]


def _of_product(one: Dim, other: Dim) -> int:
    return NOTHING if NOTHING in (one.unrouted, other.unrouted) else UNKNOWN


def _free(operand: Described, met: Sequence[int]) -> list[Dim]:
    """The dimensions of an operand that do not meet the other's.

    If it is one of weights, as of a router [width, experts], the product is what a router may choose by. Weights of the
    experts themselves have another.
    """
    free = [dim for axis, dim in enumerate(operand.dims) if axis not in met]
    alone = operand.made_of == WEIGHT and sum(bool(dim.factors) for dim in free) == 1
    return [
        dim._replace(unrouted=LOGIT if alone else NOTHING if dim.unrouted == NOTHING else UNKNOWN)
        for dim in free
    ]


def _convolution(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]] | None:
    numbers, groups = operation.params["dimension_numbers"], operation.params["feature_group_count"]
    if operation.params["batch_group_count"] != 1:
        return None
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
    dims[numbers.out_spec[0]] = data.dims[numbers.lhs_spec[0]]._replace(unrouted=UNKNOWN)
    dims[numbers.out_spec[1]] = features._replace(unrouted=UNKNOWN)
    return [tuple(dims)]


def _reduce(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A reduction gives its value in every element it reduces: statistics of a norm, a softmax."""
    reduced = {int(axis) for axis in operation.params.get("axes", operation.params.get("dimensions", ()))}
    sums = operation.name == "reduce_sum"
    for operand in inputs:
        for axis in reduced & set(range(len(operand.dims))):
            reason = f"{operation.name} over it" + (" (a norm or a mean, which would change)" if sums else "")
            # What is 0 adds nothing to a sum, in whose place only a count taken from the width would change.
            kinds = (STATISTICS, *([REPLAY] if operand.dims[axis].zero else [])) if sums else ()
            labels.lock_dims([operand.dims[axis]], reason, *kinds, only=MASKED)
            nothing = operand.dims[axis].unrouted == NOTHING and operation.name in ("reduce_sum", "reduce_or")
            if nothing and sums:
                labels.summed.append((operation, operand.dims[axis], (axis,)))
            if not (nothing or (operation.name in _LARGEST and is_lowest(operand, axis))):
                labels.lock_dims([operand.dims[axis]], reason, *([DERIVATIVE] if sums else []), only=ROUTED)
    kept = tuple(dim for i, dim in enumerate(inputs[0].dims) if i not in reduced)
    zero = sums or operation.name == "reduce_max"
    still = _STILL.get(operation.name, ())
    left = tuple(
        dim._replace(zero=dim.zero and zero, unrouted=dim.unrouted if dim.unrouted in still else UNKNOWN)
        for dim in kept
    )
    return [left for _ in operation.outputs]


_LARGEST = frozenset({"argmax", "reduce_max"})
# What a reduction over other dimensions leaves as it is.
_STILL = {
    "reduce_max": (NOTHING, LOGIT),
    **dict.fromkeys(("reduce_and", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"), (NOTHING,)),
}


def _reduce_window(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]] | None:
    """Pooling: dimensions with a window of 1 pass, the others are positions."""
    params, shape = operation.params, operation.outputs[0].shape
    windows = params["window_dimensions"]
    operands = [x for x in inputs if len(x.dims) == len(shape)]
    if len(operands) != len(operation.outputs):
        return None
    dims = []
    for axis, (size, window) in enumerate(zip(shape, windows, strict=True)):
        tied = labels.match_all([x.dims[axis] for x in operands])
        if window == 1 and params["window_strides"][axis] == 1 and tied.size == size:
            dims.append(tied._replace(zero=False, unrouted=UNKNOWN))
            continue
        labels.lock_dims([tied], "positions of a pooling window")
        dims.append(labels.dim(size, False, "positions of a pooling window"))
    return [tuple(dims) for _ in operation.outputs]


def _along(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Sorting and running sums: each element depends on the others of one dimension."""
    params = operation.params
    axis = params["dimension"] if "dimension" in params else params["axis"]
    dims = tuple(labels.match_all(tied) for tied in zip(*(x.dims for x in inputs), strict=True))
    labels.lock_dims([dims[axis]], f"{operation.name} along it")
    other = operation.name == "cumlogsumexp"
    dims = tuple(
        dim._replace(
            zero=dim.zero and not other,
            unrouted=NOTHING if dim.unrouted == NOTHING and i != axis and not other else UNKNOWN,
        )
        for i, dim in enumerate(dims)
    )
    return [dims for _ in operation.outputs]


def _top_k(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (operand,), axis = inputs, operation.params.get("axis", -1) % len(inputs[0].dims)
    labels.lock_dims([operand.dims[axis]], "top_k along it", only=MASKED)
    if not is_lowest(operand, axis):
        labels.lock_dims([operand.dims[axis]], "top_k along it", only=ROUTED)
    results = []
    for place, output in enumerate(operation.outputs):
        dims = [
            dim._replace(zero=False, unrouted=shared([dim.unrouted, NOTHING]) if place == 0 else UNKNOWN)
            for dim in operand.dims
        ]
        dims[axis] = labels.dim(output.shape[axis], False, "top_k along it")
        results.append(tuple(dims))
    return results


SUMS: Mapping[str, Rule] = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "top_k": _top_k,
    **dict.fromkeys(
        ("argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum", "reduce_xor"),
        _reduce,
    ),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "sort"), _along),
    **dict.fromkeys(("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
                    _reduce_window),
}  # fmt: skip
