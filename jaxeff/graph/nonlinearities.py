"""Pointwise operations, and the names of the nonlinearities that networks build from them.

A nonlinearity is recognized by its values on a grid, not by its spelling: relu written as
`maximum`, `where` or `clip` is relu, and tanh-gelu is distinguished from erf-gelu. The primitives are
evaluated in NumPy, without compiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jaxeff.graph.program import Operation, Value

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _convert(x: Array, *, new_dtype: Any, **_: Any) -> Array:
    # Rounding to a narrower float does not matter here; a bool must become a number.
    return x.astype(np.float64) if x.dtype == bool else x


def _select(which: Array, *cases: Array) -> Array:
    return np.choose(which.astype(int), np.broadcast_arrays(*cases))


def _stable_sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


# Pointwise primitives by name, as NumPy functions of (operands, **params).
POINTWISE: Mapping[str, Callable[..., Array]] = {
    "abs": lambda x: np.abs(x),
    "acos": lambda x: np.arccos(x),
    "acosh": lambda x: np.arccosh(x),
    "add": lambda x, y: x + y,
    "add_any": lambda x, y: x + y,
    "and": lambda x, y: np.logical_and(x, y),
    "asin": lambda x: np.arcsin(x),
    "asinh": lambda x: np.arcsinh(x),
    "atan": lambda x: np.arctan(x),
    "atan2": lambda x, y: np.arctan2(x, y),
    "atanh": lambda x: np.arctanh(x),
    "cbrt": lambda x: np.cbrt(x),
    "ceil": lambda x: np.ceil(x),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": _convert,
    "conj": lambda x, **_: np.conj(x),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": lambda x: np.cos(x),
    "cosh": lambda x: np.cosh(x),
    "div": lambda x, y: x / y,
    "eq": lambda x, y: x == y,
    "erf": lambda x: _erf(x),
    "erfc": lambda x: 1 - _erf(x),
    "exp": lambda x, **_: np.exp(x),
    "exp2": lambda x, **_: np.exp2(x),
    "expm1": lambda x, **_: np.expm1(x),
    "floor": lambda x: np.floor(x),
    "ge": lambda x, y: x >= y,
    "gt": lambda x, y: x > y,
    "integer_pow": lambda x, *, y: x**y,
    "is_finite": lambda x: np.isfinite(x),
    "le": lambda x, y: x <= y,
    "log": lambda x, **_: np.log(x),
    "log1p": lambda x, **_: np.log1p(x),
    "log2": lambda x, **_: np.log2(x),
    "logistic": lambda x, **_: _stable_sigmoid(x),
    "lt": lambda x, y: x < y,
    "max": lambda x, y: np.maximum(x, y),
    "mesh_cast": lambda x, **_: x,
    "min": lambda x, y: np.minimum(x, y),
    "mul": lambda x, y: x * y,
    "name": lambda x, **_: x,
    "ne": lambda x, y: x != y,
    "neg": lambda x: -x,
    "not": lambda x: np.logical_not(x),
    "one_minus_square": lambda x: 1 - x * x,
    "optimization_barrier": lambda x: x,
    "or": lambda x, y: np.logical_or(x, y),
    "pcast": lambda x, **_: x,
    "polynomial": lambda x, *coefficients, **_: sum(c * x**i for i, c in enumerate(coefficients)),
    "pow": lambda x, y: np.power(x, y),
    "preduced": lambda x, **_: x,
    "pvary": lambda x, **_: x,
    "reduce_precision": lambda x, **_: x,
    "reduced_vary_cast": lambda x, **_: x,
    "reduced_vary_cast_p": lambda x, **_: x,
    "relayout": lambda x, **_: x,
    "rem": lambda x, y: np.fmod(x, y),
    "reshard": lambda x, **_: x,
    "round": lambda x, **_: np.round(x),
    "rsqrt": lambda x, **_: 1 / np.sqrt(x),
    "select_n": _select,
    "sharding_constraint": lambda x, **_: x,
    "sign": lambda x: np.sign(x),
    "sin": lambda x, **_: np.sin(x),
    "sinh": lambda x: np.sinh(x),
    "sqrt": lambda x, **_: np.sqrt(x),
    "square": lambda x: x * x,
    "stage": lambda x: x,
    "stop_gradient": lambda x: x,
    "sub": lambda x, y: x - y,
    "tan": lambda x, **_: np.tan(x),
    "tanh": lambda x, **_: np.tanh(x),
    "vary_unreduced_cast": lambda x, **_: x,
    "vary_unreduced_cast_p": lambda x, **_: x,
    "with_memory_space_constraint": lambda x, **_: x,
    "xor": lambda x, y: np.logical_xor(x, y),
    "zeros_like": lambda x: np.zeros_like(x),
}

UNEVALUATED = frozenset({
    "bessel_i0e", "bessel_i1e", "clz", "complex", "device_put", "digamma", "eq_to", "erf_inv", "igamma",
    "igamma_grad_a", "igammac", "imag", "layout_constraint", "le_to", "lgamma", "lt_to", "mulhi",
    "nextafter", "polygamma", "population_count", "real", "regularized_incomplete_beta", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "zeta",
})  # fmt: skip
"""Pointwise primitives that are in no known nonlinearity, or that have no counterpart in NumPy."""

_UNCHANGED = frozenset({
    "convert_element_type", "copy", "copy_p", "device_put", "layout_constraint", "mesh_cast", "name",
    "optimization_barrier", "pcast", "preduced", "pvary", "reduce_precision", "reduced_vary_cast",
    "reduced_vary_cast_p", "relayout", "reshard", "sharding_constraint", "stage", "stop_gradient",
    "vary_unreduced_cast", "vary_unreduced_cast_p", "with_memory_space_constraint",
})  # fmt: skip
# Operations on a scalar constant before it enters pointwise arithmetic.
_SCALAR_MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})


def pointwise(operation: Operation) -> bool:
    """Return whether each output element depends only on the inputs at its own position."""
    named = operation.name in POINTWISE or operation.name in UNEVALUATED
    return named and len(operation.outputs) == 1


def unchanged(operation: Operation) -> bool:
    """Return whether the operation passes its one operand on, at most in another dtype or placement."""
    return operation.name in _UNCHANGED and len(operation.outputs) == 1


def affine(name: str, carried: Sequence[bool]) -> bool:
    """Return whether the operation is affine in the operands marked `carried`, with the others held fixed.

    Adding or gating with other data, dropout and the affine part of a norm all are.

    >>> affine("mul", [True, False]), affine("mul", [True, True]), affine("tanh", [True])
    (True, False, False)
    """
    if name in _UNCHANGED or name in {"neg", "add", "sub", "add_any"}:
        return True
    if name == "mul":
        return sum(carried) == 1
    if name == "div":
        return not carried[1]
    return name == "select_n" and not carried[0]


_GRID = np.concatenate([np.linspace(-6, 6, 49), [-12.0, -9.0, -0.3, 0.1, 0.7, 9.0, 12.0]])


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _relu6(x: Array) -> Array:
    return np.clip(x, 0, 6)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_SELU = 1.0507009873554805

CATALOG: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": _relu,
    "gelu_tanh": _gelu_tanh,
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "silu": lambda x: x * _stable_sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": _stable_sigmoid,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: _SELU * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "softplus": lambda x: np.logaddexp(0, x),
    "relu6": _relu6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_sigmoid": lambda x: _relu6(x + 3) / 6,
    "hard_silu": lambda x: x * _relu6(x + 3) / 6,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "squared_relu": lambda x: _relu(x) ** 2,
    "quick_gelu": lambda x: x * _stable_sigmoid(1.702 * x),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "abs": np.abs,
    "square": np.square,
    "exp": np.exp,
}


BOUNDS: Mapping[str, tuple[float, float]] = {
    "tanh": (-1, 1),
    "sigmoid": (0, 1),
    "hard_tanh": (-1, 1),
    "hard_sigmoid": (0, 1),
    "soft_sign": (-1, 1),
}
"""The values at which a nonlinearity levels off on both sides."""


def recognize(
    operations: Sequence[Operation], start: Value, end: Value, constants: Mapping[Value, Any]
) -> str:
    """Name the function that the pointwise operations compute from `start` to `end`.

    Returns:
        A name of `CATALOG`; 'leaky_relu' for any slope below 1; or 'pointwise' if nothing matches to 1e-3 on the
        grid, or a constant on the way is an array. tanh-gelu and erf-gelu differ by 5e-4 and are distinguished by
        which is nearer.
    """
    curve = _curve(operations, start, end, constants)
    if curve is None:
        return "pointwise"
    distances = {name: _distance(curve, function(_GRID)) for name, function in CATALOG.items()}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] < 1e-3:
        return nearest
    slope = curve[_GRID == -1.0][0] / -1.0
    leaky = np.where(_GRID > 0, _GRID, slope * _GRID)
    return "leaky_relu" if abs(slope) < 1 and _distance(curve, leaky) < 1e-3 else "pointwise"


def within_0_and_1(
    operations: Sequence[Operation], start: Value, end: Value, constants: Mapping[Value, Any]
) -> bool:
    """Return whether the pointwise operations compute a function with values in [0, 1]: a gate."""
    curve = _curve(operations, start, end, constants)
    return curve is not None and curve.min() >= 0 and curve.max() <= 1


def _distance(curve: Array, expected: Array) -> float:
    return float(np.max(np.abs(curve - expected) / (1 + np.abs(expected))))


def _curve(
    operations: Sequence[Operation], start: Value, end: Value, constants: Mapping[Value, Any]
) -> Array | None:
    known: dict[Value, Array] = {start: _GRID}
    # Evaluation on a grid may overflow or divide 0 by 0 in a branch that a `where` discards.
    with np.errstate(all="ignore"):
        for operation in operations:
            operands = [_scalar(operand, known, constants) for operand in operation.inputs]
            if any(operand is None for operand in operands) or not _evaluable(operation):
                return None
            known[operation.outputs[0]] = _evaluate(operation, operands)
    if np.iscomplexobj(known[end]):  # of which the catalog has none
        return None
    curve = np.asarray(known[end], np.float64)
    return curve if curve.shape == _GRID.shape and np.all(np.isfinite(curve)) else None


def _evaluable(operation: Operation) -> bool:
    return operation.name in _SCALAR_MOVES or operation.name in POINTWISE


def _evaluate(operation: Operation, operands: Sequence[Any]) -> Array:
    if operation.name in _SCALAR_MOVES:
        return operands[0]
    return np.asarray(POINTWISE[operation.name](*operands, **_numeric(operation)))


def _numeric(operation: Operation) -> dict[str, Any]:
    kept = {"integer_pow": ("y",), "convert_element_type": ("new_dtype",)}.get(operation.name, ())
    return {key: operation.params[key] for key in kept}


def _scalar(operand: Value | Literal, known: Mapping[Value, Any], constants: Mapping[Value, Any]) -> Any:
    """Return the operand on the grid: a computed curve, or a constant that is one number."""
    if isinstance(operand, Literal):
        value = operand.val
    elif operand in known:
        return known[operand]
    else:
        value = constants.get(operand)
    if isinstance(value, (int, float, bool, np.generic, np.ndarray)) and np.size(value) == 1:
        return np.asarray(value).reshape(())
    return None
