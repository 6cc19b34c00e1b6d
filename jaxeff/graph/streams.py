"""The stream of a program: what the rest of a model knows of what came before, and what happens to it.

In: a `Program`, and how many of its inputs are leaves. Out: a `Flow`, whose `chains` are `Segment`s.

After each operation some arrays are live: made before, and read later. Those that depend on weights and on data
are what the rest of the model knows of what came before. Where they are one array more than at an earlier point,
that array is the stream, and the operations between two such points are a segment.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal

from jaxeff.graph.coupling_skips import ZERO, is_zero, through_zeros
from jaxeff.graph.program import Call, Operation, Program, Value, operations_of

Point = tuple[int, Value, frozenset[Value]]
"""The number of a step, the stream after it, and what else is live there."""


class Segment(NamedTuple):
    """What happens between two points of a chain.

    Attributes:
        start, end: the stream before and after.
        steps: of the program, those that compute what is mixed.
    """

    start: Value
    end: Value
    steps: tuple[int, ...]


class Flow:
    """What each step of a program depends on.

    Attributes:
        sources: the leaves of each value that depends on weights alone.
        mixed: values that depend on floating data, or on weights and on other data. Positions and masks made of whole
            numbers are not among them.
        returned: the outputs of the program.
        readers: of each leaf, the steps that read it, or what is made of it, together with data.
    """

    def __init__(self, program: Program, leaves: int):
        self.program = program
        self.wholes = [step.whole if isinstance(step, Call) else step for step in program.steps]
        self.sources: dict[Value, frozenset[int]] = {
            value: frozenset([number]) for number, value in enumerate(program.inputs[:leaves])
        }
        self.data = set(program.inputs[leaves:])
        self.returned = {output for output in program.outputs if isinstance(output, Value)}
        self._given = [
            value for value in program.inputs[leaves:] if jnp.issubdtype(value.dtype, jnp.floating)
        ]
        self.mixed = set(self._given)
        self.readers: dict[int, set[int]] = {number: set() for number in range(leaves)}
        self._zeros = {value for value, array in program.constants.items() if is_zero(array)}
        self._maker: dict[Value, int] = {}
        self._mixed_steps: list[int] = []
        for number, whole in enumerate(self.wholes):
            self._through(number, whole)
        for output in program.outputs:
            for leaf in self.sources.get(output, ()) if isinstance(output, Value) else ():
                self.readers[leaf].add(len(self.wholes))

    def _through(self, number: int, whole: Operation) -> None:
        operands = [operand for operand in whole.inputs if isinstance(operand, Value)]
        leaves = frozenset().union(*(self.sources.get(operand, ()) for operand in operands))
        mixed = any(operand in self.mixed for operand in operands)
        data = mixed or any(operand in self.data for operand in operands)
        if mixed or (leaves and data):
            self.mixed.update(whole.outputs)
            self._mixed_steps.append(number)
            for leaf in leaves:
                self.readers[leaf].add(number)
        elif data:
            self.data.update(whole.outputs)
        elif leaves:
            self.sources.update(dict.fromkeys(whole.outputs, leaves))
        self._maker.update(dict.fromkeys(whole.outputs, number))

    def chains(self) -> list[list[Segment]]:
        """Return segments in a row, by what is live beside the stream, that with the least first."""
        points = self._points()
        by_others: dict[frozenset[Value], list[int]] = {}
        for place, (_, _, others) in enumerate(points):
            by_others.setdefault(others, []).append(place)
        chains = []
        for others, places in sorted(by_others.items(), key=lambda pair: len(pair[0])):
            # What the last block of a decoder reads besides the stream is dead before its end.
            after = (place for place in range(places[-1] + 1, len(points)) if points[place][2] < others)
            taken = [points[place] for place in [*places, *itertools.islice(after, len(places))]]
            taken = [*_before(points[: places[0]], others), *taken]
            chain = []
            for (before, start, _), (number, end, _) in itertools.pairwise(taken):
                first, last = (bisect.bisect_right(self._mixed_steps, each) for each in (before, number))
                chain.append(Segment(start, end, tuple(self._mixed_steps[first:last])))
            chains.append(chain)
        return chains

    def _points(self) -> list[Point]:
        """After each step: its number, the stream, and what else is live. Only of arrays that are mixed."""
        last: dict[Value, int] = {}
        for number, whole in enumerate(self.wholes):
            last.update((operand, number) for operand in whole.inputs if isinstance(operand, Value))
        live: dict[Value, None] = {}
        points = []
        for number in [-1, *self._mixed_steps]:
            made = self._given if number < 0 else self.wholes[number].outputs
            live.update(dict.fromkeys(made))
            for value in [value for value in live if last.get(value, -1) <= number]:
                del live[value]
            # What is returned and read by nothing is the stream where it is made, and nowhere else.
            streams = [*live, *(value for value in made if value in self.returned and value not in live)]
            if streams:
                *others, stream = streams
                points.append((number, stream, frozenset(others)))
        return points

    def leaves_of(self, steps: Iterable[int]) -> tuple[int, ...]:
        """Return the leaves that some steps read together with data, in order."""
        read: dict[int, None] = {}
        for number in steps:
            for operand in self.wholes[number].inputs:
                if isinstance(operand, Value):
                    read.update(dict.fromkeys(sorted(self.sources.get(operand, ()))))
        return tuple(read)

    def operations(self, steps: Iterable[int]) -> list[Operation]:
        return [*operations_of([self.program.steps[number] for number in steps])]

    def passed_on(self, steps: Sequence[int], end: Value, leaves: Sequence[int]) -> Value | None:
        """Return the array from before these steps that `end` equals if these leaves are 0."""
        states: dict[Value, Any] = {self.program.inputs[leaf]: ZERO for leaf in leaves}

        def read(operand: Value | Literal) -> Any:
            if isinstance(operand, Literal):
                return ZERO if is_zero(operand.val) else None
            return states.get(operand, ZERO if operand in self._zeros else operand)

        for operation in self.operations([*self.of_weights(steps, leaves), *steps]):
            given = [read(operand) for operand in operation.inputs]
            states.update(zip(operation.outputs, through_zeros(operation, given), strict=True))
        found = read(end)
        return found if isinstance(found, Value) else None

    def of_weights(self, steps: Iterable[int], leaves: Sequence[int]) -> list[int]:
        """Return the steps that make of these leaves, without data, what the given steps read."""
        found: set[int] = set()
        waiting = [operand for number in steps for operand in self.wholes[number].inputs]
        while waiting:
            operand = waiting.pop()
            if not isinstance(operand, Value) or self.sources.get(operand, frozenset()).isdisjoint(leaves):
                continue
            number = self._maker.get(operand)
            if number is not None and number not in found:
                found.add(number)
                waiting += self.wholes[number].inputs
        return sorted(found)


def _before(points: Sequence[Point], others: frozenset[Value]) -> list[Point]:
    """Return the point at which the stream of a chain begins, if some of the others were made after it."""
    for number, newest, older in reversed(points):
        live = older | {newest}
        if not others <= live:
            break
        if len(live) == len(others) + 1:
            (stream,) = live - others
            return [(number, stream, others)]
    return []
