"""How many multiply-accumulates a contraction takes: the one count, which sites and costs share.

In: an `Operation`. Out: `Multiplications`. From shapes alone. Imports `program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.graph.program import Operation, Value


class Multiplications(NamedTuple):
    """Multiply-accumulates of one contraction.

    Attributes:
        macs: all of them, as the field counts them: output elements times what each sums over.
        padding: those of them that meet a zero which a convolution's padding put there. XLA leaves these out.
    """

    macs: int
    padding: int = 0


def multiplications(operation: Operation) -> Multiplications | None:
    """Of one run of a contraction; None for any other operation.

    A complex multiply-accumulate is four real ones. The zeros that the dilation of a convolution's input puts
    between its elements (a transposed convolution, the gradient of a strided one) are not counted: no two
    numbers of the model meet there.

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
    """Every row of the left operand in a group: the most that the sizes of the groups allow."""
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
    batch, features, *spatial = (output[axis] for axis in numbers.out_spec)
    taps = on_data = 1
    for position, size in enumerate(spatial):
        axis = 2 + position
        found = _taps(
            size,
            kernel[numbers.rhs_spec[axis]],
            inputs[numbers.lhs_spec[axis]],
            params["window_strides"][position],
            params["padding"][position][0],
            params["lhs_dilation"][position],
            params["rhs_dilation"][position],
        )
        taps, on_data = taps * found[0], on_data * found[1]
    # Per group, whichever of features and batch is grouped.
    each = batch * features * kernel[numbers.rhs_spec[1]]
    return Multiplications(each * taps, each * (taps - on_data))


def _taps(
    outputs: int, window: int, inputs: int, stride: int, low: int, input_dilation: int, window_dilation: int
) -> tuple[int, int]:
    """Pairs of an output and a tap of the window that meet an element along one dimension, real or padded.

    Output y and tap t meet position y * stride - low + t * window_dilation of the dilated input, whose
    elements lie input_dilation apart.

    Returns:
        All such pairs, and those whose element is no padding.
    """
    offsets = np.arange(window, dtype=np.int64) * window_dilation - low
    last = (inputs - 1) * input_dilation
    every = real = 0
    # Outputs in classes: within one, whether a tap meets an element or a gap is always the same.
    for first in range(min(input_dilation, outputs)):
        count = -(-(outputs - first) // input_dilation)
        starts, step = offsets + first * stride, stride * input_dilation
        starts = starts[starts % input_dilation == 0]
        lowest = np.maximum(0, -(starts // step))
        highest = np.minimum(count - 1, (last - starts) // step)
        every += count * len(starts)
        real += int(np.maximum(0, highest - lowest + 1).sum())
    return every, real


def _shape(operation: Operation, index: int) -> Sequence[int]:
    operand = operation.inputs[index]
    return operand.shape if isinstance(operand, Value) else np.shape(operand.val)


_RULES: Mapping[str, Callable[[Operation], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
}
