"""The softmaxes of a program: the logits that each takes, and the dimension in which its values sum to 1."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.flow import Flow
from jaxeff.graph.program import Operation, Value
from jaxeff.graph.provenance import value_shape


class Softmax(NamedTuple):
    """The logits, the dimension in which the probabilities sum to 1, and the base of the exponentials."""

    logits: Value
    over: int
    base: float


def softmaxes_of(flow: Flow) -> dict[Value, Softmax]:
    """Return values that sum to 1 over one dimension."""
    found: dict[Value, Softmax] = {}
    for operation in flow.program.operations:
        if operation.name == "div":
            softmax = _softmax(flow, operation)
            if softmax is not None:
                found[operation.outputs[0]] = softmax
    return found


def _softmax(flow: Flow, division: Operation) -> Softmax | None:
    """Return the softmax whose exponentials this operation divides by their sum."""
    exponential, divisor = division.inputs
    total = _back(flow, divisor, ("reduce_sum",), moved=True)
    numerator = _back(flow, exponential, _BASES)
    if total is None or numerator is None or len(total.params["axes"]) != 1:
        return None
    summed = _back(flow, total.inputs[0], _BASES)
    (over,) = (int(axis) for axis in total.params["axes"])
    if summed is None or value_shape(total.inputs[0]) != value_shape(exponential):
        return None
    logits = _origin(flow, numerator.inputs[0], over)
    same = summed is numerator or _origin(flow, summed.inputs[0], over) is logits
    if not same or isinstance(logits, Literal) or logits.shape != value_shape(exponential):
        return None
    return Softmax(logits, over, _BASES[numerator.name])


_BASES = {"exp": math.e, "exp2": 2.0}


def _back(
    flow: Flow, value: Value | Literal, names: Collection[str], *, moved: bool = False
) -> Operation | None:
    """Return the operation of one of these names that makes the value, ignoring conversions.

    Args:
        moved: whether to ignore moves of its elements too.
    """
    while isinstance(value, Value) and value in flow.made_by:
        operation = flow.program.operations[flow.made_by[value]]
        if operation.name in names:
            return operation
        if not (nonlinearities.unchanged(operation) or (moved and axes.moves(operation))):
            return None
        value = operation.inputs[0]
    return None


def _origin(flow: Flow, value: Value | Literal, over: int) -> Value | Literal:
    """Return the value of an exponent before its maximum is subtracted, and before it is made wider.

    A softmax is the same without anything that is subtracted from all of its logits.
    """
    shift = _back(flow, value, ("sub",))
    if shift is not None and _same_along(flow, shift.inputs[1], over):
        value = shift.inputs[0]
    while isinstance(value, Value) and value in flow.made_by:
        operation = flow.program.operations[flow.made_by[value]]
        source = operation.inputs[0] if operation.name == "convert_element_type" else None
        if not isinstance(source, Value) or not _holds(value.dtype, source.dtype):
            break
        value = source
    return value


def _same_along(flow: Flow, value: Value | Literal, dimension: int) -> bool:
    """Return whether a value is seen to be the same at all indices of a dimension."""
    while isinstance(value, Value) and value.shape[dimension] > 1:
        made = flow.made_by.get(value)
        operation = None if made is None else flow.program.operations[made]
        if operation is None:
            return False
        if operation.name == "broadcast_in_dim":
            kept = [int(each) for each in operation.params["broadcast_dimensions"]]
            if dimension not in kept:
                return True
            dimension = kept.index(dimension)
        elif not nonlinearities.unchanged(operation):
            return False
        value = operation.inputs[0]
    return isinstance(value, Value) or np.ndim(value.val) == 0


def _holds(wide: Any, narrow: Any) -> bool:
    """Return whether one dtype has all the floating numbers of another."""
    if not (jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)):
        return False
    one, other = jnp.finfo(wide), jnp.finfo(narrow)
    return one.nmant >= other.nmant and one.maxexp >= other.maxexp and one.minexp <= other.minexp


def softmax_of(flow: Flow, value: Value | Literal, softmaxes: Mapping[Value, Softmax]) -> Value | None:
    """Return the softmax that the value is, ignoring dropout and conversions."""
    while isinstance(value, Value) and value not in softmaxes:
        made = flow.made_by.get(value)
        operation = None if made is None else flow.program.operations[made]
        if operation is None or not nonlinearities.pointwise(operation):
            return None
        sources = [x for x in operation.inputs if isinstance(x, Value) and x.shape == value.shape]
        floating = [x for x in sources if flow.provenance.is_data(x) and x.dtype != bool]
        value = next(
            (x for x in floating if x in softmaxes), floating[0] if floating else operation.inputs[0]
        )
    return value if isinstance(value, Value) else None
