"""Provenance of every value of a program: weights alone, constants alone, or data.

A `Provenance` says, for each value computed from weights and constants alone, which leaves it holds and where their
axes stand. It has a `Use` for each operation at which a leaf meets data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.extend.core import Literal

from jaxeff.graph import axes
from jaxeff.graph.axes import Dims, Factor
from jaxeff.graph.nonlinearities import POINTWISE, UNEVALUATED, pointwise
from jaxeff.graph.primitives import RANDOM
from jaxeff.graph.program import ENTERED, Operation, Program, Value, scan_operands


@dataclasses.dataclass(frozen=True)
class Lost:
    """The axes of a leaf could not be followed through this operation."""

    operation: str


Held = Mapping[int, Dims | Lost]
"""Leaf index -> where its axes stand."""

CONTRACTION, CONSTANT_CONTRACTION, OPAQUE, OUTPUT = "contraction", "constant contraction", "opaque", "output"
_ELEMENTWISE = {"add": "bias", "sub": "bias", "add_any": "bias", "mul": "scale", "div": "scale"}
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "gather"})
REDUCTIONS = frozenset({
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor",
})  # fmt: skip
# Primitives without array operands.
_SOURCES = frozenset({
    "after_all", "axis_index", "create_token", "empty", "empty2", "iota", "partition_id", "platform_index",
})  # fmt: skip
FOLLOWED = frozenset({
    *ENTERED, *POINTWISE, *UNEVALUATED, *axes.MOVED, *CONTRACTIONS, *REDUCTIONS, *RANDOM, *_SOURCES,
    "concatenate", "stack",
})  # fmt: skip
"""Primitives through which weights are followed, or at which they are used."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop or branch around a use of a leaf.

    Attributes:
        name: 'scan', 'while' or 'cond'.
        length: iterations of a scan; None if only running it tells.
        axis: the leaf's axis that the scan runs over, one slice per iteration; None if every
            iteration uses the leaf whole.
    """

    name: str
    length: int | None
    axis: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One operation at which one leaf meets data.

    Attributes:
        role: 'contraction' (multiplies data and sums), 'constant contraction' (the same with a
            constant: the position embedding of a fixed length), 'bias', 'scale', another pointwise
            primitive's name, 'opaque' or 'output'.
        operation: None for 'output'.
        operand: which input of the operation the leaf is.
        program: the program that contains the operation; the body of a loop is a program of its own.
        loops: the loops around it, outermost first.
    """

    leaf: int
    role: str
    operation: Operation | None
    operand: int
    dims: Dims | Lost
    program: Program
    loops: tuple[Loop, ...]

    @property
    def consumer(self) -> str:
        return self.operation.name if self.operation is not None else OUTPUT


@dataclasses.dataclass(eq=False)
class Provenance:
    """Where values come from.

    Attributes:
        held: values made of weights.
        constants: values made of constants. All others are data.
        uses: where leaves meet data, in execution order.
        scanned: for a scan and a leaf that it slices, the leaf's axis that it runs over.
        shapes: of the leaves.
        batch: values that depend on the batch.
    """

    held: dict[Value, Held]
    constants: set[Value]
    uses: list[Use]
    scanned: dict[tuple[Operation, int], int]
    shapes: Sequence[tuple[int, ...]]
    batch: set[Value]

    def loops_of(self, leaf: int, around: Sequence[Operation]) -> tuple[Loop, ...]:
        return tuple(
            Loop(operation.name, operation.params.get("length"), self.scanned.get((operation, leaf)))
            for operation in around
        )

    def is_constant(self, operand: Value | Literal) -> bool:
        return isinstance(operand, Literal) or operand in self.constants

    def holds(self, operand: Value | Literal) -> Held:
        return {} if isinstance(operand, Literal) else self.held.get(operand, {})

    def is_data(self, operand: Value | Literal) -> bool:
        return not self.is_constant(operand) and not self.holds(operand)


def trace_weights(
    program: Program,
    leaves: Mapping[Value, Held],
    shapes: Sequence[tuple[int, ...]],
    constants: Iterable[Value],
    batch: Iterable[Value],
) -> Provenance:
    """Follow the leaves through the program and its loops, to every operation at which they meet data.

    Args:
        leaves: the inputs that hold leaves.
        shapes: of all leaves.
        constants: the inputs that are the same for every batch (state, arrays closed over).
        batch: the inputs that are the batch.
    """
    provenance = Provenance(dict(leaves), set(constants), [], {}, shapes, set(batch))
    _walk(program, provenance, ())
    for output in program.outputs:
        for leaf, dims in provenance.holds(output).items():
            provenance.uses.append(Use(leaf, OUTPUT, None, 0, dims, program, ()))
    return provenance


def _walk(program: Program, provenance: Provenance, around: tuple[Operation, ...]) -> None:
    provenance.constants.update(program.constants)
    for operation in program.operations:
        if any(operand in provenance.batch for operand in operation.inputs if isinstance(operand, Value)):
            provenance.batch.update(operation.outputs)
            for body in operation.bodies:
                provenance.batch.update(body.inputs)
        if operation.name in RANDOM:
            continue  # Random bits are data even if the key is a constant: dropout is not an affine map.
        holding = [provenance.holds(operand) for operand in operation.inputs]
        meets_data = any(provenance.is_data(operand) for operand in operation.inputs)
        if not any(holding):
            if not meets_data and not operation.bodies:
                provenance.constants.update(operation.outputs)
        elif operation.bodies:
            _enter(operation, holding, provenance, around)
        elif meets_data and _masks(operation, holding, provenance):
            _propagate(operation, holding, provenance)
        elif meets_data:
            provenance.uses.extend(_meetings(operation, holding, program, provenance, around))
        else:
            if operation.name in CONTRACTIONS and not all(holding):
                provenance.uses.extend(
                    dataclasses.replace(use, role=CONSTANT_CONTRACTION)
                    for use in _meetings(operation, holding, program, provenance, around)
                    if use.role == CONTRACTION
                )
            _propagate(operation, holding, provenance)


def _masks(operation: Operation, holding: list[Held], provenance: Provenance) -> bool:
    """Return whether data other than the batch masks or scales a weight (a mask, noise), which remains a weight."""
    if operation.name not in ("mul", "div", "select_n") or operation.outputs[0] in provenance.batch:
        return False
    result = math.prod(operation.outputs[0].shape)
    return any(
        not isinstance(dims, Lost)
        and len([axis for axis in axes.held(dims) if provenance.shapes[leaf][axis] > 1]) > 1
        and math.prod(provenance.shapes[leaf][axis] for axis in axes.held(dims)) == result
        for held in holding
        for leaf, dims in held.items()
    )


def _meetings(
    operation: Operation,
    holding: list[Held],
    program: Program,
    provenance: Provenance,
    around: tuple[Operation, ...],
) -> Iterable[Use]:
    for operand, held in enumerate(holding):
        role = _role(operation, operand)
        for leaf, dims in held.items():
            yield Use(leaf, role, operation, operand, dims, program, provenance.loops_of(leaf, around))


def _role(operation: Operation, operand: int) -> str:
    name = operation.name
    if name == "dot_general":
        return CONTRACTION
    if name == "conv_general_dilated":
        return CONTRACTION if operand == 1 and operation.params["batch_group_count"] == 1 else OPAQUE
    if name == "gather":
        return CONTRACTION if operand == 0 else OPAQUE
    if pointwise(operation):
        return _ELEMENTWISE.get(name, name)
    return OPAQUE


def _enter(
    operation: Operation, holding: list[Held], provenance: Provenance, around: tuple[Operation, ...]
) -> None:
    """Follow the leaves into the bodies of a loop or branch."""
    for body, first in operands_of_bodies(operation):
        for operand, value in enumerate(body.inputs, start=first):
            if holding[operand]:
                provenance.held[value] = {
                    leaf: _entering(operation, operand, leaf, dims, provenance)
                    for leaf, dims in holding[operand].items()
                }
            elif provenance.is_constant(operation.inputs[operand]) and not is_carried(operation, operand):
                provenance.constants.add(value)
        _walk(body, provenance, (*around, operation))


def operands_of_bodies(operation: Operation) -> list[tuple[Program, int]]:
    """Return each body with the index of the operand that is its first input."""
    if operation.name == "while":
        return [(operation.bodies[1], operation.params["cond_nconsts"])]
    return [(body, 1 if operation.name == "cond" else 0) for body in operation.bodies]


def _entering(
    operation: Operation, operand: int, leaf: int, dims: Dims | Lost, provenance: Provenance
) -> Dims | Lost:
    """Return the dims with which a leaf enters a loop's body; a scan slices the axis that it runs over."""
    if isinstance(dims, Lost) or operation.name == "cond":
        return dims
    if is_carried(operation, operand):
        return Lost(f"the carry of a {operation.name}")
    if operation.name == "while" or operand < scan_operands(operation)[0]:
        return dims
    sliced, *kept = dims
    if len(sliced) != 1:
        return Lost("a scan over part of an axis")
    axis = sliced[0].axis
    if axis is not None:
        if sliced[0] != Factor(axis, provenance.shapes[leaf][axis]):
            return Lost("a scan over part of an axis")
        provenance.scanned[operation, leaf] = axis
    return tuple(kept)


def is_carried(operation: Operation, operand: int) -> bool:
    if operation.name == "while":
        return operand >= operation.params["cond_nconsts"] + operation.params["body_nconsts"]
    if operation.name == "scan":
        constants, carried = scan_operands(operation)
        return constants <= operand < constants + carried
    return False


def _propagate(operation: Operation, holding: list[Held], provenance: Provenance) -> None:
    """Describe the outputs of an operation on weights and constants alone."""
    for index, output in enumerate(operation.outputs):
        held: dict[int, Dims | Lost] = {}
        for operand, leaves in enumerate(holding):
            for leaf, dims in leaves.items():
                shape = provenance.shapes[leaf]
                new = dims if isinstance(dims, Lost) else _through(operation, operand, dims, shape, index)
                held[leaf] = _combine(held[leaf], new, operation.name) if leaf in held else new
        provenance.held[output] = held


def _combine(known: Dims | Lost, new: Dims | Lost, name: str) -> Dims | Lost:
    """Combine two descriptions of a leaf that reaches an operation twice (w / norm(w)): the fuller one stands."""
    if isinstance(known, Lost) or isinstance(new, Lost):
        return Lost(name)
    if len(axes.held(known)) != len(axes.held(new)):
        return max(known, new, key=lambda dims: len(axes.held(dims)))
    return known if known == new else Lost(name)


def _through(operation: Operation, operand: int, dims: Dims, leaf: Sequence[int], output: int) -> Dims | Lost:
    value = operation.inputs[operand]
    shape, result = value_shape(value), operation.outputs[0].shape
    if axes.moves(operation):
        return _or_lost(axes.move(operation, dims, shape)[output], operation)
    if operation.name == "concatenate":
        return _or_lost(axes.concatenated(operation, operand, dims, leaf), operation)
    if operation.name == "stack":
        return axes.stacked(operation, dims) if len(operation.inputs) == 1 else Lost(operation.name)
    if pointwise(operation):
        return axes.broadcast(dims, shape, result)
    if operation.name.startswith("reduce_") and "axes" in operation.params:
        reduced = {int(axis) for axis in operation.params["axes"]}
        return tuple(dim for i, dim in enumerate(dims) if i not in reduced)
    if operation.name == "dot_general":
        other = value_shape(operation.inputs[1 - operand])
        return contracted(operation, operand, dims, axes.of_data(other))
    if operation.name == "gather" and operand == 0:
        return gathered(operation, dims)
    return Lost(operation.name)


def _or_lost(dims: Dims | None, operation: Operation) -> Dims | Lost:
    return Lost(operation.name) if dims is None else dims


def value_shape(operand: Value | Literal) -> tuple[int, ...]:
    return operand.shape if isinstance(operand, Value) else np.shape(operand.val)


def contracted(operation: Operation, operand: int, mine: Dims, other: Dims) -> Dims:
    """Return the dims of a dot_general's output when operand `operand` has dims `mine`."""
    (contract, batch) = operation.params["dimension_numbers"]
    free = [
        [i for i in range(len(dims)) if i not in contract[side] and i not in batch[side]]
        for side, dims in ((operand, mine), (1 - operand, other))
    ]
    shared = tuple(mine[i] for i in batch[operand])
    own, others = tuple(mine[i] for i in free[0]), tuple(other[i] for i in free[1])
    return shared + (own + others if operand == 0 else others + own)


def gathered(operation: Operation, dims: Dims) -> Dims | Lost:
    """Return the dims of a gather's output; whole rows of the operand stand in the offset dimensions."""
    numbers = operation.params["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(dims)) if i not in dropped]
    sizes = operation.params["slice_sizes"]
    moved = list(axes.of_data(operation.outputs[0].shape))
    for target, source in zip(numbers.offset_dims, kept, strict=True):
        if sizes[source] == 1 and source in numbers.start_index_map:
            continue  # a row's own dimension, which others collapse, and the caller squeezes
        if sizes[source] != value_shape(operation.inputs[0])[source]:
            return Lost("gather of part of a row")
        moved[target] = dims[source]
    return tuple(moved)


def contraction_input(operation: Operation, operand: int, dims: Dims) -> tuple[Value | Literal, Dims]:
    """Return the data that a dot_general contracts with a weight, labeled with the weight's axes."""
    (contract, batch) = operation.params["dimension_numbers"]
    data = operation.inputs[1 - operand]
    labeled: list[tuple[Factor, ...]] = list(axes.of_data(value_shape(data)))
    for mine, theirs in ((contract[operand], contract[1 - operand]), (batch[operand], batch[1 - operand])):
        for i, j in zip(mine, theirs, strict=True):
            labeled[j] = dims[i]
    return data, tuple(labeled)
