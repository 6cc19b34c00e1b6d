"""What is left of a program's arrays when a router never chooses some of its experts.

An expert is removed as if its logit were -inf: exp of it is 0, and it is never a maximum or among the top k. The rules
here follow that through operations on single elements, and follow the positions that top_k and argmax choose to
where they are compared with an iota or look something up. In a smaller program both count the experts that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.extend.core import Literal

from jaxeff.graph.coupling_labels import (
    ANY,
    FRACTION,
    LOGIT,
    NONNEGATIVE,
    NOTHING,
    UNIFORM,
    UNKNOWN,
    WEIGHT,
    Described,
    Dim,
    Labels,
    Positions,
    shared,
)
from jaxeff.graph.nonlinearities import unchanged
from jaxeff.graph.program import Operation, Value
from jaxeff.graph.provenance import value_shape

BY_NUMBER = "numbered by its position"

# --- Element by element --------------------------------------------------------------------------------

_ZERO_OF_LOGITS = frozenset({"exp", "exp2", "logistic"})
_FALSE_OF_LOGITS = frozenset({"eq", "ge", "gt"})
# Increasing functions of their first logit: whatever caps or clips logits, the router chooses by what comes out.
_INCREASING = frozenset({"add", "add_any", "clamp", "max", "min", "sub", "tanh"})
_SCALING = frozenset({"div", "mul"})


def unrouted_at(operand: Described, axis: int, rank: int) -> int:
    """What an operand of an operation on single elements holds along an axis of the result."""
    if len(operand.dims) != rank or not operand.dims[axis].factors:
        return NOTHING if operand.zero else UNIFORM
    # One weight for each expert, such as a router's bias, may be taken as -inf like a logit.
    alone = operand.made_of == WEIGHT and sum(bool(dim.factors) for dim in operand.dims) == 1
    found = operand.dims[axis].unrouted
    return LOGIT if alone and found == UNKNOWN else found


def unrouted(operation: Operation, inputs: Sequence[Described], states: Sequence[int], zero: bool) -> int:
    """What the result of an operation on single elements holds along an axis.

    Args:
        states: what each operand holds.
        zero: whether the result is 0 where those operands are that hold NOTHING.
    """
    name = operation.name
    if name == "select_n":
        return states[1] if states[0] == NOTHING else shared(states[1:])
    if zero:
        return NOTHING
    if UNKNOWN in states:
        return UNKNOWN
    if name == "log" and states[0] == NOTHING:
        return LOGIT
    if LOGIT not in states:
        return UNIFORM if set(states) == {UNIFORM} else UNKNOWN
    if name in _ZERO_OF_LOGITS or (name == "max" and NOTHING in states):
        return NOTHING
    if name in _FALSE_OF_LOGITS and states[0] == LOGIT and states[1] == UNIFORM:
        return NOTHING
    if name in _SCALING:
        scales = [operand.sign for operand, state in zip(inputs, states, strict=True) if state != LOGIT]
        increases = len(scales) == 1 and scales[0] != ANY
    else:
        increases = name in _INCREASING or unchanged(operation)
    return LOGIT if increases and (name not in ("div", "sub") or states[0] == LOGIT) else UNKNOWN


_NEVER_NEGATIVE = frozenset({"abs", "argmax", "argmin", "exp", "exp2", "iota", "sqrt", "square"})
_LIKE_FIRST = frozenset({"dynamic_slice", "gather"})
_LIKE_ALL = frozenset({
    "broadcast_in_dim", "concatenate", "cummax", "cummin", "cumprod", "dynamic_update_slice", "expand_dims",
    "integer_pow", "min", "mul", "pad", "reduce_max", "reduce_min", "reduce_prod", "reshape", "rev", "slice", "split",
    "squeeze", "tile", "top_k", "transpose",
})  # fmt: skip
_SUMS = frozenset({"add", "add_any", "cumsum", "div", "dot_general", "reduce_sum"})


def sign_of(operation: Operation, inputs: Sequence[Described]) -> int:
    """What is known of all numbers in an operation's results: ANY, NONNEGATIVE or FRACTION."""
    name, known = operation.name, [operand.sign for operand in inputs]
    complement = name == "sub" and _is_one(operation.inputs[0]) and known[1] == FRACTION
    if name == "logistic" or complement or all(output.dtype == bool for output in operation.outputs):
        return FRACTION
    if name in _NEVER_NEGATIVE:
        return NONNEGATIVE
    if name == "max":
        return min(max(known), NONNEGATIVE)
    if name == "select_n":
        return min(known[1:])
    if name in _LIKE_FIRST:
        return known[0]
    if name in _LIKE_ALL or unchanged(operation):
        return min(known)
    return min(*known, NONNEGATIVE) if name in _SUMS else ANY


def _is_one(operand: Value | Literal) -> bool:
    return isinstance(operand, Literal) and bool(np.all(np.asarray(operand.val) == 1))


def is_lowest(operand: Described, axis: int) -> bool:
    """Whether what is not chosen is never the largest along an axis."""
    state = operand.dims[axis].unrouted
    return state == LOGIT or (state == NOTHING and operand.sign != ANY)


# --- Positions -----------------------------------------------------------------------------------------

_MOVES = frozenset({"broadcast_in_dim", "reshape", "rev", "slice", "split", "squeeze", "transpose"})
_READ_BY = {"gather": 1, "scatter": 1, "scatter-add": 1, "scatter_add": 1}
"""The operand that holds positions to look up, or to write at."""


def positions_in(operand: Described) -> list[Dim]:
    """The dimensions along which an array counts positions."""
    return [one.dim for one in operand.positions if one is not None]


def settle(labels: Labels, operand: Described) -> Described:
    """Lock what positions are counted of, since their numbers are used for something that is not followed."""
    around = labels.during
    for one in operand.positions:
        if one is not None:
            labels.during = one.operation
            labels.lock_dims([one.dim], BY_NUMBER)
    labels.during = around
    return operand._replace(positions=())


def counted(
    labels: Labels, operation: Operation, inputs: Sequence[Described], results: list[Described]
) -> list[Described]:
    """The results of an operation with the positions that they count."""
    name = operation.name
    if name == "iota":
        return _counting(operation, results, 0, results[0].dims[operation.params["dimension"]])
    if name == "top_k":
        dim = inputs[0].dims[operation.params.get("axis", -1)]
        labels.choices.append((operation, dim, operation.params["k"]))
        return _counting(operation, results, 1, dim)
    if name == "argmax" and len(operation.params["axes"]) == 1:
        dim = inputs[0].dims[operation.params["axes"][0]]
        labels.choices.append((operation, dim, 1))
        return _counting(operation, results, 0, dim)
    if not any(operand.positions for operand in inputs):
        return results
    followed = _followed(labels, operation, inputs, results)
    if followed is not None:
        return followed
    for place, operand in enumerate(inputs):
        if place != _READ_BY.get(name):
            _ = settle(labels, operand)
    return results


def _counting(operation: Operation, results: list[Described], place: int, dim: Dim) -> list[Described]:
    if dim.factors:
        results[place] = results[place]._replace(sign=NONNEGATIVE, positions=(Positions(dim, operation),))
    return results


def _followed(
    labels: Labels, operation: Operation, inputs: Sequence[Described], results: list[Described]
) -> list[Described] | None:
    """The results of an operation whose use of positions is known; None for all others."""
    name, first = operation.name, inputs[0].positions
    kept = unchanged(operation) and operation.outputs[0].dtype != bool
    if kept or (name in _MOVES and len(first) == 1):
        return [result._replace(positions=first) for result in results]
    if name == "concatenate":
        along = operation.params["dimension"]
        last = along == len(operation.outputs[0].shape) - 1
        if last and all(value_shape(value)[along] == 1 for value in operation.inputs):
            every = tuple(x.positions[0] if x.positions else None for x in inputs)
            return [results[0]._replace(positions=every)]
    # Indices from the end: select_n(i < 0, i, i + n), which is i where none is negative.
    if name == "lt" and inputs[1].zero and inputs[0].sign != ANY:
        return [results[0]._replace(zero=True)]
    if name == "add" and len(first) == 1 and isinstance(operation.inputs[1], Literal):
        return [results[0]._replace(positions=(first[0] and first[0]._replace(shifted=True),))]
    if name == "select_n" and inputs[0].zero:
        return [results[0]._replace(positions=inputs[1].positions, sign=inputs[1].sign)]
    if name == "eq":
        return _equal(labels, inputs, results)
    return None


def _equal(labels: Labels, inputs: Sequence[Described], results: list[Described]) -> list[Described] | None:
    """Positions compared with others: a one-hot array, which is 0 at what is not chosen."""
    pairs = [operand.positions for operand in inputs]
    if any(len(pair) != 1 or pair[0] is None or pair[0].shifted for pair in pairs):
        return None
    one, other = (pair[0].dim for pair in pairs if pair[0] is not None)
    if one.size != other.size:
        return None
    tied = labels.match(one, other)
    dims = (
        dim._replace(unrouted=NOTHING) if dim.factors and labels.same(dim, tied) else dim
        for dim in results[0].dims
    )
    return [results[0]._replace(dims=tuple(dims))]


def looks_up(labels: Labels, dim: Dim, indices: Described, place: int, count: int) -> bool:
    """Whether a number of index vectors is a position along a dimension; joins the two where it is.

    Args:
        place: of the number.
        count: how many numbers each index vector has.
    """
    known = indices.positions[place] if len(indices.positions) == count else None
    if known is None or known.shifted or known.dim.size != dim.size:
        return False
    _ = labels.match(dim, known.dim)
    return True
