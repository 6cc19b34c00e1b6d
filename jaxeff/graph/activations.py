"""The activations of units: from the output of a contraction to its pre- and post-activation.

The pre-activation is the contraction's output with its own bias. The post-activation is the first
nonlinearity that it reaches through pointwise operations: bias, the affine part of a norm, dropout,
adding or gating with other data. If a reduction, another contraction or a normalization across units comes
first, the pre-activation stands for both. If the output of a fused layer is split (the gates of a recurrent
cell, a gated linear unit), each part is followed separately.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.axes import Dims, Factor
from jaxeff.graph.flow import Flow
from jaxeff.graph.influence import Influences
from jaxeff.graph.program import Operation, Value
from jaxeff.graph.provenance import Lost, value_shape
from jaxeff.graph.reach import Reach


@dataclasses.dataclass(frozen=True, eq=False)
class Emission:
    """Activations of some of a weight's units.

    Attributes:
        value: the post-activation.
        dims: where the weight's axes stand in it.
        shape: shape of the weight, reduced to these units along `axis`.
        axis: axis of the weight that also indexes other units; None if these are all units.
        indices: of these units along it.
        nonlinearity: its name.
    """

    value: Value
    dims: Dims
    shape: tuple[int, ...]
    axis: int | None
    indices: tuple[int, ...]
    nonlinearity: str


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """Values before and after the nonlinearity, with the weight's axes in their dimensions.

    `post` has one emission, or several that hold each unit once; their names are joined by '/'.
    """

    pre: Value
    pre_dims: Dims
    post: tuple[Emission, ...]
    bias: int | None

    @property
    def nonlinearity(self) -> str:
        return "/".join(dict.fromkeys(emission.nonlinearity for emission in self.post))


def follow(
    flow: Flow,
    influences: Influences,
    output: Value,
    dims: Dims,
    shapes: Sequence[tuple[int, ...]],
    leaf: int,
) -> Activation:
    """Find the pre- and post-activation of a contraction's output.

    Args:
        influences: what becomes of each value.
        output: the contraction's output; `dims` says where the weight's axes stand in it.
        shapes: of all leaves, to tell a bias (one number per unit) from other additions.
        leaf: the weight's index among them.
    """
    output = _rescaled(flow, influences, output)
    pre, pre_dims, bias = _add_bias(flow, influences, output, dims, shapes, leaf)
    post = _emissions(flow, influences, output, dims, shapes[leaf])
    if all(emission.nonlinearity == "identity" for emission in post):
        post = [Emission(pre, pre_dims, shapes[leaf], None, (), "identity")]
    return Activation(pre, pre_dims, tuple(post), bias)


def _rescaled(flow: Flow, influences: Influences, output: Value) -> Value:
    """Return the output of a contraction of quantized numbers times their scales: what its units emit."""
    made = flow.program.operations[flow.made_by[output]]
    if not all(isinstance(operand, Value) and _is_quantized(operand.dtype) for operand in made.inputs[:2]):
        return output
    product = value = output
    while len(readers := flow.carriers(value, influences)) == 1:
        (operation,) = readers
        if operation.name in ("mul", "div") and operation.inputs[0] is not operation.inputs[1]:
            other = operation.inputs[operation.inputs[0] is value]
            # The scales of inputs and weight may come as one product. What comes later may be a gate.
            is_scale = output is product or not flow.provenance.is_data(other) or 1 in value_shape(other)
            if operation.outputs[0].shape != output.shape or not is_scale:
                break
            output = operation.outputs[0]
        elif not nonlinearities.unchanged(operation):
            break
        value = operation.outputs[0]
    return output


def _is_quantized(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer)) or str(dtype).startswith("float8")


def _emissions(
    flow: Flow, influences: Influences, output: Value, dims: Dims, shape: tuple[int, ...]
) -> list[Emission]:
    """Return the activations of the units, together if they reach a nonlinearity together, else part by part."""
    reach = Reach(flow, influences, output, dims, shape)
    post = reach.first_nonlinearity()
    if post is not None:
        return [Emission(post, reach.images[post].dims, shape, None, (), reach.name(post))]
    parts = reach.parts()
    if not parts:
        return [Emission(output, dims, shape, None, (), "identity")]
    return [
        emission for value, part in parts for emission in _emissions_of_part(flow, influences, value, part)
    ]


def _emissions_of_part(flow: Flow, influences: Influences, value: Value, part: axes.Part) -> list[Emission]:
    found = _emissions(flow, influences, value, part.dims, part.shape)
    if any(emission.axis not in (None, part.axis) for emission in found):
        found = [Emission(value, part.dims, part.shape, None, (), "identity")]
    return [
        dataclasses.replace(
            emission,
            axis=part.axis,
            indices=tuple(part.indices[i] for i in emission.indices) if emission.indices else part.indices,
        )
        for emission in found
    ]


def _add_bias(
    flow: Flow,
    influences: Influences,
    output: Value,
    dims: Dims,
    shapes: Sequence[tuple[int, ...]],
    leaf: int,
) -> tuple[Value, Dims, int | None]:
    value, here = output, dims
    while True:
        readers = flow.carriers(value, influences)
        if len(readers) != 1 or influences.end(value):
            return output, dims, None
        operation = readers[0]
        bias = _bias_of(flow, operation, value, here, shapes, leaf)
        if bias is not None:
            return operation.outputs[0], here, bias
        moved = _moved(operation, here)
        if moved is None:
            return output, dims, None
        value, here = operation.outputs[0], moved


def _moved(operation: Operation, dims: Dims) -> Dims | None:
    if axes.moves(operation) and len(operation.outputs) == 1:
        return axes.move(operation, dims, value_shape(operation.inputs[0]))[0]
    return dims if nonlinearities.unchanged(operation) else None


def _bias_of(
    flow: Flow,
    operation: Operation,
    value: Value,
    dims: Dims,
    shapes: Sequence[tuple[int, ...]],
    leaf: int,
) -> int | None:
    """Return the leaf that `operation` adds to `value`, if it has exactly one number per unit."""
    if operation.name not in ("add", "add_any") or operation.outputs[0].shape != value.shape:
        return None
    other = operation.inputs[1] if operation.inputs[0] is value else operation.inputs[0]
    units = math.prod(shapes[leaf][axis] for axis in axes.held(dims))
    for candidate, where in flow.provenance.holds(other).items():
        if isinstance(where, Lost) or not _one_a_unit(flow, candidate, where, shapes[candidate], units):
            continue
        seen = axes.broadcast(where, value_shape(other), value.shape)
        if all(_aligned(theirs, mine) for theirs, mine in zip(seen, dims, strict=True)):
            return candidate
    return None


def _one_a_unit(flow: Flow, leaf: int, dims: Dims, shape: tuple[int, ...], units: int) -> bool:
    """Return whether the leaf holds one number per unit, apart from layers that a scan stacks."""
    here = axes.held(dims)
    scanned = {axis for (_, other), axis in flow.provenance.scanned.items() if other == leaf}
    whole = all(axis in here or axis in scanned for axis, size in enumerate(shape) if size > 1)
    return whole and math.prod(shape[axis] for axis in here) == units


def _aligned(theirs: tuple[Factor, ...], mine: tuple[Factor, ...]) -> bool:
    """Return whether a bias and a weight's units are aligned in one dimension."""
    bias, units = [f for f in theirs if f.axis is not None], [f for f in mine if f.axis is not None]
    return math.prod(f.size for f in bias) == math.prod(f.size for f in units) and (
        [f.offset for f in bias if f.offset] == [f.offset for f in units if f.offset]
    )
