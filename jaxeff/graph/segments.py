"""A program in segments that run one after the other, each from what the ones before it leave.

Only the steps that depend on the batch are cut. What is made of other inputs alone, such as weights in another dtype
or a causal mask, is made anew in each segment that reads it: segments may run with other weights than the ones before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from jax.extend.core import Literal

from jaxeff.graph.program import REMAT, Call, Operation, Program, Step, Value, needed

_ORDER = ("constant", "argument", "batch")


class Segments:
    """The steps of a program that depend on the batch, and where to cut between them.

    Attributes:
        steps: those that depend on the batch, in execution order. A position p is before `steps[p]`.
    """

    def __init__(self, program: Program, origins: Sequence[str]):
        """Sort the steps.

        Args:
            origins: of the program's inputs: 'constant', 'argument' or 'batch'.
        """
        self.program = program
        self._origins: dict[Value, str] = dict(zip(program.inputs, origins, strict=True))
        self.steps: list[Step] = []
        self._others: dict[Value, Step] = {}
        self._sources = {v: frozenset({v}) for v in program.inputs if self.origin(v) != "batch"}
        for step in _opened(program.steps):
            operands, results = _operands(step), whole(step).outputs
            origin = max(map(self.origin, operands), key=_ORDER.index, default="constant")
            self._origins.update(dict.fromkeys(results, origin))
            if origin == "batch":
                self.steps.append(step)
            else:
                self._others.update(dict.fromkeys(results, step))
                self._sources.update(dict.fromkeys(results, self.sources(operands)))
        self._made = {value: -1 for value in program.inputs if self._origins[value] == "batch"}
        self._last_read: dict[Value, int] = {}
        for position, step in enumerate(self.steps):
            self._made.update(dict.fromkeys(whole(step).outputs, position))
            self._last_read.update(dict.fromkeys(_operands(step), position))
        outputs = [output for output in program.outputs if isinstance(output, Value)]
        self._last_read.update(dict.fromkeys(outputs, len(self.steps)))

    def sources(self, values: Iterable[Value]) -> frozenset[Value]:
        """Return the program's inputs from which these are made without the batch."""
        none: frozenset[Value] = frozenset()
        return none.union(*(self._sources[v] for v in values if v in self._sources))

    def origin(self, value: Value | Literal) -> str:
        """Return 'batch', 'argument' or 'constant'."""
        return "constant" if isinstance(value, Literal) else self._origins.get(value, "constant")

    def made_without_batch(self, value: Value) -> Operation | None:
        """Return the operation that makes a value without the batch; None if there is none."""
        return whole(self._others[value]) if value in self._others else None

    def read_by(self, position: int) -> frozenset[Value]:
        """Return the inputs that a step reads, itself or through what is made of them without the batch."""
        return self.sources(_operands(self.steps[position]))

    def live(self, position: int) -> list[Value]:
        """Return the values of the batch that are made before a position, and read after it or returned."""
        return [
            value for value, made in self._made.items() if made < position <= self._last_read.get(value, -1)
        ]

    def narrowest(self, first: int, last: int) -> int:
        """Return the position from `first` to `last` where the fewest elements are live; the last of several."""

        def elements(position: int) -> int:
            return sum(math.prod(value.shape) for value in self.live(position))

        return min(range(last, first - 1, -1), key=elements)

    def between(self, first: int, last: int) -> Program:
        """Return the steps between two positions as a program that makes what is live after them."""
        made = {value for step in self.steps[first:last] for value in whole(step).outputs}
        outputs = [value for value in self.live(last) if value in made]
        return self._program(outputs, self.live(first), self.steps[first:last])

    def without_batch(self, values: Sequence[Value]) -> Program:
        """Return the program that makes values that do not depend on the batch."""
        return self._program(values, [], [])

    def _program(self, outputs: Sequence[Value], live: Sequence[Value], steps: Sequence[Step]) -> Program:
        wanted = set(outputs)
        steps = needed([*dict.fromkeys(self._others.values()), *steps], wanted)
        inputs = (*(value for value in self.program.inputs if value in self._sources), *live)
        inputs = tuple(value for value in inputs if value in wanted)
        return Program(inputs, tuple(outputs), steps, self.program.constants)


def whole(step: Step) -> Operation:
    """Return the operation of a step, which may be a call."""
    return step.whole if isinstance(step, Call) else step


def _operands(step: Step) -> list[Value]:
    return [operand for operand in whole(step).inputs if isinstance(operand, Value)]


def _opened(steps: Iterable[Step]) -> Iterator[Step]:
    """Return the steps, with those of remat in its place: run forwards, it changes nothing."""
    for step in steps:
        if isinstance(step, Call) and step.whole.name in REMAT:
            yield from _opened(step.steps)
        else:
            yield step
