"""Multiply-accumulates of a contraction, from shapes alone; sites and costs share this count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.graph.program import Operation, Value


class Multiplications(NamedTuple):
    """Multiply-accumulates of one contraction.

    Attributes:
        macs: output elements times the terms that each sums. A convolution counts every tap of its window, a
            transposed one only the taps that meet an element of its input.
        padding: the part of `macs` that meets a zero of a convolution's padding. XLA leaves these out.
    """

    macs: int
    padding: int = 0


def multiplications(operation: Operation) -> Multiplications | None:
    """Count one run of a contraction; None for any other operation.

    A complex multiply-accumulate is four real ones. Zeros that a transposition puts between and around the
    elements of its input are not counted, since no two numbers of the model meet there.

    >>> import jax, jax.numpy as jnp
    >>> from jaxeff.graph.program import flatten
    >>> (product,) = flatten(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))).operations
    >>> multiplications(product).macs == 2 * 3 * 5
    True
    """
    rule = _RULES.get(operation.name)
    if rule is None:
        return None
    found = rule(operation)
    if np.issubdtype(operation.outputs[0].dtype, np.complexfloating):
        return Multiplications(4 * found.macs, 4 * found.padding)
    return found


def _dot(operation: Operation) -> Multiplications:
    (contract, _), _ = operation.params["dimension_numbers"]
    summed = math.prod(_shape(operation, 0)[axis] for axis in contract)
    return Multiplications(math.prod(operation.outputs[0].shape) * summed)


def _ragged_dot(operation: Operation) -> Multiplications:
    """Count every row of the left operand as part of a group, the maximum that the group sizes allow."""
    numbers = operation.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    met = {*contract, *batch, *numbers.rhs_group_dimensions}
    right = _shape(operation, 1)
    free = math.prod(size for axis, size in enumerate(right) if axis not in met)
    return Multiplications(math.prod(_shape(operation, 0)) * free)


def _convolution(operation: Operation) -> Multiplications:
    params = operation.params
    numbers = params["dimension_numbers"]
    inputs, kernel, output = _shape(operation, 0), _shape(operation, 1), operation.outputs[0].shape
    batch, features, *outputs = (output[axis] for axis in numbers.out_spec)
    _, per_group, *windows = (kernel[axis] for axis in numbers.rhs_spec)
    _, _, *elements = (inputs[axis] for axis in numbers.lhs_spec)
    lows = [low for low, _ in params["padding"]]
    strides, dilations, spread = (params[key] for key in ("window_strides", "lhs_dilation", "rhs_dilation"))
    met = math.prod(map(_met, outputs, windows, elements, strides, lows, dilations, spread))
    # The gradient of a kernel has the convolution's output as its window. JAX computes it by exchanging batch and
    # features, which swaps their dimensions.
    of_kernel = numbers.lhs_spec[0] > numbers.lhs_spec[1]
    transposed = any(dilation > 1 for dilation in dilations) or any(
        made > given for made, given in zip(windows if of_kernel else outputs, elements, strict=True)
    )
    every = met if transposed else math.prod(outputs) * math.prod(windows)
    # Per group, whether features or batch are grouped.
    each = batch * features * per_group
    return Multiplications(each * every, each * (every - met))


def _met(
    outputs: int, window: int, inputs: int, stride: int, low: int, input_dilation: int, window_dilation: int
) -> int:
    """Count the pairs of an output and a tap of the window that meet an element along one dimension.

    Output y and tap t meet position y * stride - low + t * window_dilation of the dilated input, whose
    elements lie input_dilation apart.
    """
    offsets = np.arange(window, dtype=np.int64) * window_dilation - low
    last = (inputs - 1) * input_dilation
    met = 0
    # Within a class of outputs, a tap always meets an element or always a gap.
    for first in range(min(input_dilation, outputs)):
        count = -(-(outputs - first) // input_dilation)
        starts, step = offsets + first * stride, stride * input_dilation
        starts = starts[starts % input_dilation == 0]
        lowest = np.maximum(0, -(starts // step))
        highest = np.minimum(count - 1, (last - starts) // step)
        met += int(np.maximum(0, highest - lowest + 1).sum())
    return met


def _shape(operation: Operation, index: int) -> Sequence[int]:
    operand = operation.inputs[index]
    return operand.shape if isinstance(operand, Value) else np.shape(operand.val)


_RULES: Mapping[str, Callable[[Operation], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
}
NAMES = frozenset(_RULES)
