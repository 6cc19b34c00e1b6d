"""Where a program takes the sum of its experts' outputs, each times its gate, and what each expert adds there.

The sum is a product or a `reduce_sum` over the experts, of which at least one operand is 0 where a router does not
choose. A gate may also have been multiplied in before: it is then looked for in what made the operand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff.graph.coupling_labels import NOTHING, Described, Labels
from jaxeff.graph.coupling_stacks import GroupsIn
from jaxeff.graph.evaluation import Read, apply
from jaxeff.graph.program import Operation, Program, Value, scan_operands


@dataclasses.dataclass(frozen=True, eq=False)
class Gated:
    """A sum over experts of their outputs, each times its gate.

    Attributes:
        operation: which takes the sum.
        axes: that of the experts in each of its operands.
        gate: of each expert for each token.
        gate_axis: that of the experts in `gate`.
        tokens: for each axis of tokens, that of the sum and that of the gate.
    """

    operation: Operation
    axes: tuple[int, ...]
    gate: Value
    gate_axis: int
    tokens: tuple[tuple[int, int], ...]

    def totals(self, operands: Sequence[Any], read: Read) -> tuple[jax.Array, jax.Array]:
        """For each expert, the sum over tokens of gate x norm of its output, and how many tokens reached it."""
        gate = read(self.gate)
        others = tuple(set(range(gate.ndim)) - {self.gate_axis} - {axis for _, axis in self.tokens})
        reached = (gate != 0).any(axis=others, keepdims=True)
        order = [self.gate_axis, *(axis for _, axis in self.tokens), *others]
        reached = reached.transpose(order).reshape(
            [gate.shape[axis] for axis in order[: len(order) - len(others)]]
        )
        stacked = [jnp.moveaxis(each, axis, 0) for each, axis in zip(operands, self.axes, strict=True)]

        def of_one(pair: tuple[list[Any], Any]) -> tuple[Any, Any]:
            slices, reached = pair
            output = self._output(slices)
            output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
            features = tuple(set(range(output.ndim)) - {axis for axis, _ in self.tokens})
            norms = jnp.sqrt(jnp.square(output).sum(features, keepdims=True))
            norms = norms.transpose([*(axis for axis, _ in self.tokens), *features]).reshape(reached.shape)
            return jnp.where(reached, norms, 0).sum(), reached.sum(dtype=jnp.int32)

        # One expert at a time, since the outputs of all are not in memory where tokens are dispatched.
        return lax.map(of_one, (stacked, reached))

    def _output(self, slices: Sequence[Any]) -> Any:
        """The sum as it is of one expert alone."""
        alone = [jnp.expand_dims(each, axis) for each, axis in zip(slices, self.axes, strict=True)]
        return apply(self.operation, alone)[0]


def gated_sum(
    program: Program,
    described: Mapping[Value, Described],
    labels: Labels,
    groups_in: GroupsIn,
    number: int,
    weights: Sequence[Value],
) -> Gated | str:
    """Find the sum over the experts of a group; where it is not found, say why.

    Args:
        number: of the group.
        weights: the leaves that the experts themselves are made of, without their router.
    """
    outputs = _outputs(program, described, groups_in, number, set(weights))
    sums = {
        (operation, axes)
        for operation, dim, axes in labels.summed
        if number in groups_in([dim]) and outputs & set(_values(operation))
    }
    if len(sums) != 1:
        return f"{len(sums)} sums over the experts' outputs times their gates are found, and one is needed"
    ((operation, axes),) = sums
    gate = _gate(_makers(program), described, groups_in, number, outputs, _values(operation))
    if gate is None:
        return f"the gates of the sum over experts are not found ({operation.name} in {operation.scope or 'the model'})"
    held = [groups_in([dim]) for dim in described[gate].dims]
    along = [axis for axis, groups in enumerate(held) if number in groups]
    if len(along) != 1:
        return "the gates hold the experts along several axes"
    tokens = []
    atoms = [_atoms(labels, dim.factors) for dim in described[gate].dims]
    for axis, dim in enumerate(described[operation.outputs[0]].dims):
        own = _atoms(labels, dim.factors)
        if same := [at for at, other in enumerate(atoms) if own and other == own and at != along[0]]:
            tokens.append((axis, same[0]))
    return Gated(operation, axes, gate, along[0], tuple(tokens))


def _values(operation: Operation) -> list[Value]:
    return [value for value in operation.inputs if isinstance(value, Value)]


def _atoms(labels: Labels, factors: Sequence[np.ndarray]) -> frozenset[int]:
    return frozenset().union(*(labels.atoms(factor).tolist() for factor in factors))


def _outputs(
    program: Program, described: Mapping[Value, Described], groups_in: GroupsIn, number: int, made: Set[Value]
) -> set[Value]:
    """All values with the experts along an axis that the experts' weights have gone into."""
    made = set(made)
    for operation in program.operations:
        if not made & set(_values(operation)):
            continue
        if operation.name == "scan":
            (body,) = operation.bodies
            constants, carried = scan_operands(operation)
            inner = [
                inside
                for place, (inside, outside) in enumerate(zip(body.inputs, operation.inputs, strict=True))
                if outside in made and not constants <= place < constants + carried
            ]
            made |= _outputs(body, described, groups_in, number, set(inner))
        made |= {value for value in operation.outputs
                 if value in described and number in groups_in(described[value].dims)}  # fmt: skip
    return made


def _makers(program: Program) -> dict[Value, Operation]:
    """Which operation made each value, also inside the bodies of scans."""
    makers: dict[Value, Operation] = {}
    for operation in program.operations:
        makers.update(dict.fromkeys(operation.outputs, operation))
        for body in operation.bodies:
            makers.update(_makers(body))
    return makers


def _gate(
    makers: Mapping[Value, Operation],
    described: Mapping[Value, Described],
    groups_in: GroupsIn,
    number: int,
    outputs: Set[Value],
    operands: Sequence[Value],
) -> Value | None:
    """The operand that is 0 where the router does not choose and that no expert made, or the one behind it."""
    nothing = [
        value
        for value in operands
        if any(dim.unrouted == NOTHING and number in groups_in([dim]) for dim in described[value].dims)
    ]
    gates = [value for value in nothing if value not in outputs]
    if gates:
        return gates[0] if len(gates) == 1 else None
    for value in nothing:
        maker = makers.get(value)
        if maker is not None and not maker.bodies:
            if (found := _gate(makers, described, groups_in, number, outputs, _values(maker))) is not None:
                return found
    return None
