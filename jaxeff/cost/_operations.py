"""The work of one operation, or the reason why it is not counted.

Every primitive is in one of the tables below, or in `graph.primitives` with the reason why it is not
counted. A primitive in neither is reported, and never taken as free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxeff.cost._work import Work
from jaxeff.graph import contractions, multiplications
from jaxeff.graph.primitives import UNCOUNTED
from jaxeff.graph.program import ENTERED, Operation, Value

# These move, copy, name or convert elements, without arithmetic.
MOVES = frozenset({
    "after_all", "axis_index", "bitcast_convert_type", "broadcast", "broadcast_in_dim", "complex",
    "concatenate", "conj", "convert_element_type", "copy", "copy_p", "create_token",
    "device_put", "dynamic_slice", "dynamic_update_slice", "empty", "empty2", "expand_dims", "gather", "imag",
    "iota",
    "layout_constraint", "mesh_cast", "name", "optimization_barrier", "pad", "partition_id", "pcast",
    "platform_index", "preduced", "pvary", "random_clone", "random_unwrap", "random_wrap", "real",
    "reduce_precision", "reduced_vary_cast", "reduced_vary_cast_p", "relayout", "reshape", "reshard", "rev",
    "scatter", "sharding_constraint", "slice", "split", "squeeze", "stack", "stage", "stop_gradient", "tile",
    "transpose", "unstack", "vary_unreduced_cast", "vary_unreduced_cast_p", "with_memory_space_constraint",
    "zeros_like",
})  # fmt: skip

# One operation for each element of the result.
_ARITHMETIC = frozenset({
    "abs", "add", "add_any", "and", "ceil", "clz", "div", "eq", "eq_to", "floor", "ge", "gt", "is_finite",
    "le", "le_to", "lt", "lt_to", "max", "min", "mul", "mulhi", "ne", "neg", "nextafter", "not", "or",
    "population_count", "rem", "round", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "square", "sub", "xor",
})  # fmt: skip

TRANSCENDENTAL = frozenset({
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "cos",
    "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "igamma", "igamma_grad_a", "igammac",
    "lgamma", "log", "log1p", "log2", "logistic", "polygamma", "pow", "regularized_incomplete_beta", "rsqrt",
    "sin", "sinh", "sqrt", "tan", "tanh", "zeta",
})  # fmt: skip

_REDUCTIONS = frozenset({
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
})  # fmt: skip

UNKNOWN = "no rule for this operation"


def work_of(operation: Operation) -> Work | str:
    """Return the work of one run of an operation without a body, or why it is not counted.

    >>> import jax
    >>> from jaxeff.graph import flatten
    >>> (tanh,) = flatten(jax.make_jaxpr(jnp.tanh)(jnp.ones((2, 3)))).operations
    >>> work_of(tanh).transcendentals
    6
    """
    name = operation.name
    if name in MOVES:
        return Work()
    found = multiplications(operation)
    if found is not None:
        return Work(macs=found.macs, flops=2 * found.macs, padding_macs=found.padding)
    if name in UNCOUNTED:
        return UNCOUNTED[name]
    steps = _steps(operation)
    if steps is None:
        return UNKNOWN
    dtypes = [_dtype(operand) for operand in operation.inputs] + [operation.outputs[0].dtype]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "arithmetic on complex numbers"
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return Work(integer_operations=steps)
    return Work(transcendentals=steps) if name in TRANSCENDENTAL else Work(flops=steps)


def _steps(operation: Operation) -> int | None:
    """Return the number of successive elementary operations per element; None without a rule."""
    name = operation.name
    if name in _ARITHMETIC or name in TRANSCENDENTAL:
        return _size(operation.outputs[0])
    if name in _REDUCTIONS:
        return max(_size(operation.inputs[0]) - _size(operation.outputs[0]), 0)
    rule = _STEPS.get(name)
    return None if rule is None else rule(operation)


def _integer_power(operation: Operation) -> int:
    """Count multiplications by repeated squaring, and a division if the power is negative."""
    power = abs(operation.params["y"])
    products = max(power.bit_length() - 1 + power.bit_count() - 1, 0)
    return (products + (operation.params["y"] < 0)) * _size(operation.outputs[0])


def _cumulation(operation: Operation) -> int:
    shape = operation.outputs[0].shape
    length = shape[operation.params["axis"]]
    return _size(operation.outputs[0]) * (length - 1) // max(length, 1)


def _window(operation: Operation) -> int:
    window = math.prod(operation.params["window_dimensions"])
    return _size(operation.outputs[0]) * (window - 1)


def _select_and_scatter(operation: Operation) -> int:
    """Count the gradient of max-pooling: the comparisons of each window, and one addition."""
    return _size(operation.inputs[0]) * math.prod(operation.params["window_dimensions"])


def _updates(operation: Operation) -> int:
    return _size(operation.inputs[2])


_STEPS: Mapping[str, Callable[[Operation], int]] = {
    "clamp": lambda operation: 2 * _size(operation.outputs[0]),
    "integer_pow": _integer_power,
    # By Horner's rule: a product and a sum for each coefficient but the highest.
    "polynomial": lambda operation: 2 * (len(operation.inputs) - 2) * _size(operation.outputs[0]),
    "one_minus_square": lambda operation: 2 * _size(operation.outputs[0]),
    **dict.fromkeys(("cummax", "cummin", "cumprod", "cumsum"), _cumulation),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _window),
    "select_and_gather_add": _window,
    "select_and_scatter_add": _select_and_scatter,
    **dict.fromkeys(
        ("scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "scatter_add",
         "scatter_max", "scatter_min", "scatter_mul", "scatter_sub"),
        _updates,
    ),
}  # fmt: skip


COUNTED = frozenset({
    *MOVES, *_ARITHMETIC, *TRANSCENDENTAL, *_REDUCTIONS, *_STEPS, *contractions.NAMES, *ENTERED, "shard_map",
})  # fmt: skip
"""Primitives whose work is counted, or that run a program whose work is counted."""


def _size(operand: Any) -> int:
    return math.prod(operand.shape if isinstance(operand, Value) else np.shape(operand.val))


def _dtype(operand: Any) -> Any:
    return operand.dtype if isinstance(operand, Value) else operand.aval.dtype
