"""What each operation does to the labels of its operands' dimensions: one table of rules.

In: an `Operation` and its operands, `Described`. Out: its outputs, described, with labels joined and locked
on the way. What has no rule is locked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxeff.graph.coupling_labels import CONSTANT, NOTHING, Described, Dim, Labels, Rule
from jaxeff.graph.coupling_moves import MOVES, unknown
from jaxeff.graph.coupling_routing import counted, sign_of, unrouted, unrouted_at
from jaxeff.graph.coupling_sums import SUMS
from jaxeff.graph.nonlinearities import POINTWISE, UNEVALUATED, unchanged
from jaxeff.graph.primitives import LOCKED, RANDOM
from jaxeff.graph.program import ENTERED, Operation
from jaxeff.graph.provenance import value_shape


def through(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
    """The outputs of an operation that has no body; what has no rule is locked."""
    rule = _RULES.get(operation.name, _pointwise if operation.name in _POINTWISE else _without_rule)
    found = rule(labels, operation, inputs)
    dims_of_each = _without_rule(labels, operation, inputs) if found is None else found
    made_of = max((operand.made_of for operand in inputs), default=CONSTANT)
    zero = (operation.name in _MOVES or unchanged(operation)) and all(x.zero for x in inputs)
    sign = sign_of(operation, inputs)
    results = [Described(dims, made_of, zero, sign) for dims in dims_of_each]
    return counted(labels, operation, inputs, results)


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
    return unknown(labels, operation, reason)


def _bitcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    same = value_shape(operation.inputs[0]) == operation.outputs[0].shape
    return (_pointwise if same else _without_rule)(labels, operation, inputs)


def _random(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    for operand in inputs:
        labels.lock_dims(operand.dims, "random numbers: another shape draws others")
    return unknown(labels, operation, "random numbers: another shape draws others")


def _pointwise(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    if len(operation.outputs) != 1:
        return [operand.dims for operand in inputs]
    (shape,) = (output.shape for output in operation.outputs)
    chosen = list(inputs)[1 if operation.name == "select_n" else 0 :]
    dims = []
    for axis, size in enumerate(shape):
        states = [unrouted_at(x, axis, len(shape)) for x in inputs]
        unchosen = unrouted(operation, inputs, states, zero_where(operation, [s == NOTHING for s in states]))
        spanning = [x for x in inputs if len(x.dims) == len(shape) and x.dims[axis].factors]
        if size < 2 or not spanning:
            dims.append(labels.dim(size)._replace(unrouted=unchosen))
            continue
        dim = spanning[0].dims[axis]
        for other in spanning[1:]:
            dim = labels.match(dim, other.dims[axis])
        zeros = [
            x.dims[axis].zero if len(x.dims) == len(shape) and x.dims[axis].factors else x.zero
            for x in chosen
        ]
        dims.append(dim._replace(zero=zero_where(operation, zeros), unrouted=unchosen))
    return [tuple(dims)]


def zero_where(operation: Operation, zeros: Sequence[bool]) -> bool:
    """Whether an operation element by element gives 0 where these of its operands are 0."""
    if operation.name in _ZERO_OF_FIRST:
        return zeros[0] and (operation.name != "integer_pow" or operation.params["y"] > 0)
    if operation.name in _ZERO_OF_ANY:
        return any(zeros)
    return operation.name in _ZERO_OF_ALL and all(zeros)


def _iota(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Positions, which `counted` follows."""
    return [tuple(labels.dim(size) for size in operation.outputs[0].shape)]


def _empty(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Arrays of which nothing is known but their shape."""
    return [tuple(labels.dim(size, True) for size in output.shape) for output in operation.outputs]


_RULES: Mapping[str, Rule] = {
    **MOVES,
    **SUMS,
    "bitcast_convert_type": _bitcast,
    "iota": _iota,
    **dict.fromkeys(RANDOM, _random),
    **dict.fromkeys(
        ("after_all", "axis_index", "create_token", "empty", "empty2", "partition_id", "platform_index"),
        _empty,
    ),
}
COUPLED = frozenset({*ENTERED, *_POINTWISE, *_RULES})
"""Primitives of which it is known what goes together in them."""
