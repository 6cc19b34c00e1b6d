"""Sites: which operation consumes each weight.

A `Graph` has a `Site` for every contraction of a weight with data, with the values and dimensions of its input, pre-
and post-activation. Every leaf without a site has a role, or a reason why it was not paired. Only structure is found
here; nothing is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.graph import axes
from jaxeff.graph.activations import Activation, follow
from jaxeff.graph.axes import Dims, Factor
from jaxeff.graph.contractions import multiplications
from jaxeff.graph.flow import Flow
from jaxeff.graph.influence import Influences, influences
from jaxeff.graph.nonlinearities import unchanged
from jaxeff.graph.primitives import UNPAIRED
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import (
    CONSTANT_CONTRACTION,
    CONTRACTION,
    OPAQUE,
    OUTPUT,
    Loop,
    Lost,
    Provenance,
    Use,
    contracted,
    contraction_input,
    gathered,
    trace_weights,
    value_shape,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of `params`: its keys joined by '/', shape and dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jnp.floating))


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One operation that consumes one weight.

    Attributes:
        leaf: the weight's index among the leaves.
        kind: 'dense', 'conv' or 'embedding'.
        unit_axes: axes of the weight that index its outputs.
        input_axes: axes of the weight that index its inputs.
        groups: feature groups of a convolution, else 1.
        input: the value that the weight multiplies; the row numbers for an embedding.
        input_dims: where the weight's input axes stand in it.
        activation: pre- and post-activation and the nonlinearity between them.
        direct: whether the operation takes the weight as it is stored, apart from moves of its elements, and
            has the plain derivative.
        macs: multiply-accumulates of the whole batch, as counted by `contractions`, over all iterations of a scan;
            None inside a `while`. An embedding looks up and has none.
        loops: the loops around the operation, outermost first.
    """

    leaf: int
    kind: str
    unit_axes: frozenset[int]
    input_axes: frozenset[int]
    groups: int
    input: Value
    input_dims: Dims
    activation: Activation
    direct: bool
    macs: int | None
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """All leaves, each in exactly one place: it has sites, a reason in `unpaired`, or a role in `others`.

    Attributes:
        sites: in execution order.
        unpaired: weights without a readable site -> why.
        others: leaves that are not weights -> 'bias', 'scale', 'integer', 'unused' and so on.
        order: every leaf's index, by first use, unused leaves last.
    """

    program: Program
    leaves: tuple[Leaf, ...]
    sites: tuple[Site, ...]
    unpaired: Mapping[int, str]
    others: Mapping[int, str]
    order: tuple[int, ...]
    provenance: Provenance


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A contraction's labeled operands, which become a site once its activation is followed."""

    kind: str
    input: Any
    input_dims: Dims
    output_dims: Dims
    unit_axes: frozenset[int]
    input_axes: frozenset[int]
    groups: int


def build(
    program: Program,
    leaves: Sequence[Leaf],
    constants: Iterable[Value] = (),
    batch: Iterable[Value] = (),
    returned: int | None = None,
) -> Graph:
    """Pair every leaf with its sites, or say why not.

    Args:
        program: a traced `function(params, ...)`, flattened.
        leaves: the leaves of `params`, in the order of the program's first inputs.
        constants: inputs that are the same for every batch, such as running averages and masks.
        batch: inputs that are the batch; other inputs may be masks or noise on a weight.
        returned: how many of the outputs the function returns; those after were captured. None for all.
    """
    tagged = {
        value: {index: axes.of_weight(leaf.shape)}
        for index, (leaf, value) in enumerate(zip(leaves, program.inputs, strict=False))
        if leaf.floating
    }
    provenance = trace_weights(program, tagged, [leaf.shape for leaf in leaves], constants, batch)
    followed = influences(program, returned, provenance)
    flows: dict[Program, Flow] = {}
    chosen = _contractions(provenance.uses)
    # WeightNorm's scale reaches the product inside its weight, and is not summed over.
    vectors = {use.leaf for use in chosen if len(leaves[use.leaf].shape) < 2 and not _sums_over(use)}
    sites: list[Site] = []
    reasons: dict[int, str] = {}
    for use in chosen:
        if use.leaf in vectors:
            continue
        flow = flows.setdefault(use.program, Flow(use.program, provenance))
        found = _site(use, leaves, flow, followed)
        if isinstance(found, Site):
            sites.append(found)
        else:
            reasons[use.leaf] = reasons.get(use.leaf, found)
    mixed = _mixed_stacks(sites)
    reasons.update(dict.fromkeys(mixed, "used both inside a scan over its layers and outside of it"))
    sites = [site for site in sites if site.leaf not in mixed]
    paired = {site.leaf for site in sites}
    unpaired, others = {}, {}
    for index, leaf in enumerate(leaves):
        if index in paired:
            continue
        if index in vectors:
            others[index] = "scale"
        elif index in reasons:
            unpaired[index] = reasons[index]
        else:
            _without_site(index, leaf, [u for u in provenance.uses if u.leaf == index], unpaired, others)
    order = tuple(dict.fromkeys([use.leaf for use in provenance.uses] + list(range(len(leaves)))))
    return Graph(program, tuple(leaves), tuple(sites), unpaired, others, order, provenance)


def _contractions(uses: Iterable[Use]) -> list[Use]:
    """Return the uses that may be sites; those with a constant only for leaves that never meet data otherwise."""
    uses = list(uses)
    with_data = {use.leaf for use in uses if use.role == CONTRACTION}
    return [
        use
        for use in uses
        if use.role == CONTRACTION or (use.role == CONSTANT_CONTRACTION and use.leaf not in with_data)
    ]


def _mixed_stacks(sites: Sequence[Site]) -> set[int]:
    """Return the leaves that one site takes layer by layer, and another whole."""
    stacks: dict[int, set[frozenset[int | None]]] = {}
    for site in sites:
        stacks.setdefault(site.leaf, set()).add(frozenset(loop.axis for loop in site.loops) - {None})
    return {leaf for leaf, found in stacks.items() if len(found) > 1}


def _sums_over(use: Use) -> bool:
    """Return whether a contraction sums over an axis of the leaf."""
    if use.operation is None or use.operation.name != "dot_general" or isinstance(use.dims, Lost):
        return True
    contract, _ = use.operation.params["dimension_numbers"]
    return bool(axes.held(tuple(use.dims[i] for i in contract[use.operand])))


def _site(use: Use, leaves: Sequence[Leaf], flow: Flow, followed: Influences) -> Site | str:
    """Return the site of one contraction, or why it cannot be read."""
    assert use.operation is not None
    if isinstance(use.dims, Lost):
        return f"its axes were lost at {use.dims.operation} before {use.consumer}"
    shape = leaves[use.leaf].shape
    reading = _READERS[use.operation.name](use, use.dims, shape)
    if isinstance(reading, str):
        return reading
    missing = _missing_axes(use, reading, shape)
    if missing:
        return f"its axis {missing[0]} was sliced, reversed or summed away before {use.consumer}"
    whole = axes.covers(reading.output_dims, reading.unit_axes, shape)
    if not whole or not (
        reading.kind == "embedding" or axes.covers(reading.input_dims, reading.input_axes, shape)
    ):
        return f"only a slice of it reaches {use.operation.name}"
    if not isinstance(reading.input, Value):
        return f"multiplies a literal at {use.operation.name}"
    shapes = [leaf.shape for leaf in leaves]
    activation = follow(flow, followed, use.operation.outputs[0], reading.output_dims, shapes, use.leaf)
    return Site(
        use.leaf,
        reading.kind,
        reading.unit_axes,
        reading.input_axes,
        reading.groups,
        reading.input,
        reading.input_dims,
        activation,
        _direct(use, flow),
        _all_iterations(use.operation, use.loops),
        use.loops,
    )


def _direct(use: Use, flow: Flow) -> bool:
    assert use.operation is not None
    if use.operation in flow.program.wrapped:
        return False
    value = use.operation.inputs[use.operand]
    while isinstance(value, Value) and value in flow.made_by:
        made = flow.program.operations[flow.made_by[value]]
        if made in flow.program.wrapped or not (axes.moves(made) or unchanged(made)):
            return False
        value = made.inputs[0]
    return isinstance(value, Value)


def _all_iterations(operation: Operation, loops: Sequence[Loop]) -> int | None:
    found = multiplications(operation)
    if found is None:
        return 0
    if any(loop.name == "while" for loop in loops):
        return None
    return found.macs * math.prod(loop.length for loop in loops if loop.length is not None)


def _missing_axes(use: Use, reading: _Reading, shape: Sequence[int]) -> list[int]:
    """Return the axes of the weight that are neither units, inputs, layers of a scan, nor a kernel's window."""
    if reading.kind == "conv":
        return []
    scanned = {loop.axis for loop in use.loops}
    known = reading.unit_axes | reading.input_axes | scanned
    return [axis for axis, size in enumerate(shape) if size > 1 and axis not in known]


def _read_dot(use: Use, dims: Dims, shape: Sequence[int]) -> _Reading | str:
    operation = use.operation
    assert operation is not None
    data, input_dims = contraction_input(operation, use.operand, dims)
    contract, batch = operation.params["dimension_numbers"]
    summed = frozenset().union(*(axes.held((dims[i],)) for i in contract[use.operand]))
    if not summed and len(shape) < 2:
        return "a vector that scales another weight"
    output_dims = contracted(operation, use.operand, dims, axes.of_data(value_shape(data)))
    parallel = frozenset().union(*(axes.held((dims[i],)) for i in batch[use.operand]))
    units = axes.held(output_dims)
    return _Reading("dense", data, input_dims, output_dims, units, summed | parallel, 1)


def _read_conv(use: Use, dims: Dims, shape: Sequence[int]) -> _Reading | str:
    operation = use.operation
    assert operation is not None
    numbers = operation.params["dimension_numbers"]
    groups = operation.params["feature_group_count"]
    data, output = operation.inputs[0], operation.outputs[0]
    features, per_group = dims[numbers.rhs_spec[0]], dims[numbers.rhs_spec[1]]
    output_dims, input_dims = list(axes.of_data(output.shape)), list(axes.of_data(value_shape(data)))
    output_dims[numbers.out_spec[1]] = features
    inputs, units = axes.held((per_group,)), axes.held((features,))
    if groups == 1:
        channels = per_group
    elif (len(inputs), len(units)) == (1, 1):
        channels = (Factor(None, groups), *per_group)
    elif (parallel := _leading(features, groups)) is not None:
        # The kernel has axes for the groups, as Keras's depthwise layers do: they are inputs and units, like the
        # batch dimensions of a matrix product.
        channels, groups = (*parallel, *per_group), 1
        inputs |= axes.held((parallel,))
    else:
        return "a grouped convolution whose kernel was reshaped before"
    input_dims[numbers.lhs_spec[1]] = channels
    return _Reading("conv", data, tuple(input_dims), tuple(output_dims), units, inputs, groups)


def _leading(dim: tuple[Factor, ...], size: int) -> tuple[Factor, ...] | None:
    """Return the first factors of a dimension, if they are axes of the weight and have this size together."""
    for end in range(1, len(dim) + 1):
        first, rest = dim[:end], dim[end:]
        if math.prod(factor.size for factor in first) == size:
            whole = None not in (factor.axis for factor in first)
            return first if whole and not axes.held((first,)) & axes.held((rest,)) else None
    return None


def _read_gather(use: Use, dims: Dims, shape: Sequence[int]) -> _Reading | str:
    operation = use.operation
    assert operation is not None
    output_dims = gathered(operation, dims)
    if isinstance(output_dims, Lost):
        return f"read by a {output_dims.operation}"
    numbers = operation.params["dimension_numbers"]
    rows = [i for i in numbers.start_index_map if operation.params["slice_sizes"][i] == 1]
    if len(rows) != 1 or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return "read by a gather over several axes"
    looked_up = axes.held((dims[rows[0]],))
    if sum(shape[axis] > 1 for axis in axes.held(output_dims)) > 1:
        return "whole matrices of it are looked up by a gather"
    indices = operation.inputs[1]
    units = axes.held(output_dims)
    return _Reading(
        "embedding", indices, axes.of_data(value_shape(indices)), output_dims, units, looked_up, 1
    )


_READERS = {"dot_general": _read_dot, "conv_general_dilated": _read_conv, "gather": _read_gather}


_JOINS = "concatenate"


def _like_a_mask(use: Use, leaf: Leaf) -> bool:
    """Return whether a matrix meets data elementwise, like a weight under a mask, and unlike a norm's scale."""
    if use.operation is None or use.operation.name not in ("mul", "select_n"):
        return False
    matrix = sum(size > 1 for size in leaf.shape) > 1
    return matrix and math.prod(use.operation.outputs[0].shape) == leaf.size


def _without_site(
    index: int, leaf: Leaf, uses: Sequence[Use], unpaired: dict[int, str], others: dict[int, str]
) -> None:
    roles = [use.role for use in uses]
    elementwise = [role for role in roles if role not in (OPAQUE, OUTPUT, CONTRACTION, CONSTANT_CONTRACTION)]
    # Rows beside those of data (the tokens of a model's own) are values, as a bias is, and have no inputs.
    opaque = sorted((use.consumer for use in uses if use.role == OPAQUE), key=lambda name: name == _JOINS)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        others[index] = "random key"
    elif not leaf.floating:
        others[index] = f"{jnp.dtype(leaf.dtype).name} array"
    elif any(_like_a_mask(use, leaf) for use in uses):
        unpaired[index] = "multiplied by an input of its own shape (a mask? pass it as a keyword argument)"
    elif elementwise:
        others[index] = elementwise[0]
    elif sum(size > 1 for size in leaf.shape) < 2 or opaque[:1] == [_JOINS]:
        others[index] = f"consumed by {opaque[0]}" if opaque else OUTPUT if roles else "unused"
    elif opaque:
        why = UNPAIRED.get(opaque[0])
        unpaired[index] = f"consumed by {opaque[0]}, which has no rule" + (f": {why}" if why else "")
    else:
        unpaired[index] = "returned as an output, and used by nothing else" if roles else "unused"
