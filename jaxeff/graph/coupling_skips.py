"""Whether a block passes on what it is given when all of its weights are 0, as a residual block does.

Then leaving the block out is the same as setting its weights to 0.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxeff.graph.coupling_rules import zero_where
from jaxeff.graph.program import Operation, Value, scan_operands

ZERO = "zero"
ADDED = frozenset({"add", "add_any", "sub"})
_SUMS = frozenset({"conv_general_dilated", "dot_general", "ragged_dot", "ragged_dot_general"})
_KEPT = frozenset({
    "broadcast_in_dim", "concatenate", "cummax", "cumsum", "pad", "reduce_max", "reduce_min", "reduce_sum", "reshape",
    "rev", "slice", "split", "squeeze", "tile", "transpose",
})  # fmt: skip
_TAKEN = frozenset({"dynamic_slice", "gather"})
_SAME = frozenset({
    "convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "reshape", "sharding_constraint",
    "stop_gradient",
})  # fmt: skip


def skipped_by_zeros(operation: Operation) -> bool:
    """Whether every iteration of a scan carries on what it was given where all that it scans over is 0."""
    (body,) = operation.bodies
    constants, carried = scan_operands(operation)
    states: dict[Value, Any] = dict.fromkeys(body.inputs[constants + carried :], ZERO)
    carry = body.inputs[constants : constants + carried]
    states |= {value: value for value in carry}
    states |= {value: ZERO for value, array in body.constants.items() if is_zero(array)}

    def read(operand: Value | Literal) -> Any:
        if isinstance(operand, Literal):
            return ZERO if is_zero(operand.val) else None
        return states.get(operand)

    for each in body.operations:
        given = [read(operand) for operand in each.inputs]
        states.update(zip(each.outputs, through_zeros(each, given), strict=True))
    return bool(carry) and all(read(end) is start for start, end in zip(carry, body.outputs, strict=False))


def through_zeros(operation: Operation, given: list[Any]) -> list[Any]:
    """Return the state of each result: zero, the carried value that it equals, or None for anything else."""
    zeros = [state is ZERO for state in given]
    name = operation.name
    if name in _SUMS:
        zero = any(zeros[:2])
    elif name in _TAKEN:
        zero = zeros[0]
    elif name in _KEPT:
        zero = all(zeros)
    else:
        zero = zero_where(operation, zeros[1:] if name == "select_n" else zeros)
    if zero:
        return [ZERO] * len(operation.outputs)
    if name in _SAME:
        return [
            state if isinstance(state, Value) and _fits(state, output) else None
            for state, output in zip(given, operation.outputs, strict=False)
        ]
    if name in ADDED and len(given) == 2:
        one, other = given
        if other is not ZERO and name != "sub":
            one, other = other, one
        if other is ZERO and isinstance(one, Value) and _fits(one, operation.outputs[0]):
            return [one]
    return [None] * len(operation.outputs)


def _fits(carried: Value, output: Value) -> bool:
    """Whether an array of another type holds what is carried without rounding."""
    wide = jnp.promote_types(carried.dtype, output.dtype) == output.dtype
    return wide and carried.shape == output.shape


def is_zero(array: Any) -> bool:
    numeric = isinstance(array, (int, float, np.ndarray, np.generic)) or hasattr(array, "__array__")
    return numeric and not isinstance(array, Tracer) and not np.any(np.asarray(array))
