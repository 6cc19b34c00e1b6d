"""What becomes of each value: whether a network passes it on, or only ever sums it up.

A unit emits what the network computes with. The mean square of a layer, returned, penalised or used to
normalise the layer, is made of a nonlinear function of every unit as well, but passes none of its elements
on. The program is read backwards from what it returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import Literal

from jaxeff.graph import axes
from jaxeff.graph.program import Operation, Program, Value, scan_operands
from jaxeff.graph.provenance import CONTRACTIONS, Provenance, operands_of_bodies, value_shape


class Influence(NamedTuple):
    """The best way from a value to what the program returns; of two influences the greater is preferred.

    Attributes:
        several: it ends in more than one number: not in a loss or a penalty.
        contracted: a weight's contraction stands on the way.
        whole: no reduction stands on the way to that contraction, or to the end where there is none.
        size: of the smallest array on this part of the way.
    """

    several: bool
    contracted: bool
    whole: bool
    size: int

    @property
    def rank(self) -> tuple[bool, bool, bool, int]:
        """To compare by: a value that a weight takes whole counts as much as any part of it."""
        return (*self[:3], 0 if self.contracted and self.whole else self.size)


NONE = Influence(False, False, False, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Influences:
    """The influence of every value of a program and of the bodies of its loops.

    Attributes:
        known: of each value that has any.
        returned: of a value that its program returns, for that alone.
    """

    provenance: Provenance
    known: dict[Value, Influence]
    returned: dict[Value, Influence]

    def of(self, value: Value) -> Influence:
        return self.known.get(value, NONE)

    def carry(self, operation: Operation, value: Value) -> bool:
        """Whether the operation takes the value on the best of its ways."""
        if operation.bodies:
            return True
        found = [_through(operation, i, self.known, self.provenance) for i in _places(operation, value)]
        return max(influence.rank for influence in found) >= self.of(value).rank

    def end(self, value: Value) -> bool:
        """Whether the value's best way is to be returned as it is."""
        return value in self.returned and self.returned[value].rank >= self.of(value).rank


def influences(program: Program, returned: int | None, provenance: Provenance) -> Influences:
    """Find what becomes of each value.

    Args:
        returned: how many of the outputs, from the first, the function returns; what was captured besides
            has no influence. None for all.
    """
    found = Influences(provenance, {}, {})
    ends = [_end(output) for output in program.outputs[:returned]]
    _walk(program, ends + [NONE] * (len(program.outputs) - len(ends)), found)
    return found


def _end(output: Value | Literal) -> Influence:
    size = math.prod(value_shape(output))
    return Influence(size > 1, False, True, size)


def _walk(program: Program, ends: Sequence[Influence], found: Influences) -> None:
    """Read one program backwards, given what becomes of its outputs."""
    _raise(found.returned, zip(program.outputs, ends, strict=True))
    _raise(found.known, zip(program.outputs, ends, strict=True))
    for operation in reversed(program.operations):
        if operation.bodies:
            _enter(operation, found)
            continue
        for i, operand in enumerate(operation.inputs):
            influence = _through(operation, i, found.known, found.provenance)
            _raise(found.known, [(operand, influence)])


def _raise(known: dict[Value, Influence], pairs: Iterable[tuple[Value | Literal, Influence]]) -> None:
    for value, influence in pairs:
        if isinstance(value, Value):
            known[value] = max(known.get(value, NONE), influence)


def _through(
    operation: Operation, operand: int, known: Mapping[Value, Influence], provenance: Provenance
) -> Influence:
    """What an operation makes of the influence of its results for one of its operands."""
    outputs = operation.outputs
    if operation.name in axes.JOINING and len(outputs) == len(operation.inputs):
        outputs = outputs[operand : operand + 1]
    after = max((known.get(output, NONE) for output in outputs), default=NONE)
    size = math.prod(value_shape(operation.inputs[operand]))
    if after == NONE:
        return NONE
    if operation.name in CONTRACTIONS and any(
        provenance.holds(other) for i, other in enumerate(operation.inputs) if i != operand
    ):
        return Influence(after.several, True, True, size)
    whole = after.whole and not reduces(operation)
    return Influence(after.several, after.contracted, whole, min(size, after.size))


def reduces(operation: Operation) -> bool:
    """Whether each of the operation's results is made of many elements of its operand."""
    return axes.reduced(operation) is not None or operation.name in ("argmax", "argmin", "reduce")


def _enter(operation: Operation, found: Influences) -> None:
    """Read the bodies of a loop backwards until what its iterations hand on stays the same."""
    after = [found.of(output) for output in operation.outputs]
    carried = _carried(operation)
    for body, first in operands_of_bodies(operation):
        ends = list(after)
        while True:
            _walk(body, ends, found)
            # An iteration takes what the one before returned.
            taken = [found.of(body.inputs[i]) for i in carried]
            joined = [*map(max, ends, taken), *ends[len(taken) :]]
            if joined == ends:
                break
            ends = joined
        _raise(
            found.known,
            (
                (operand, found.of(value))
                for operand, value in zip(operation.inputs[first:], body.inputs, strict=False)
            ),
        )


def _carried(operation: Operation) -> range:
    """The inputs of a loop's body that are the first outputs of its last iteration."""
    if operation.name == "scan":
        constants, carried = scan_operands(operation)
        return range(constants, constants + carried)
    if operation.name == "while":
        constants = operation.params["body_nconsts"]
        return range(constants, constants + len(operation.outputs))
    return range(0)


def _places(operation: Operation, value: Value) -> list[int]:
    return [i for i, operand in enumerate(operation.inputs) if operand is value]
