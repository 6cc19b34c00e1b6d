"""Which operations make and read each value of one program."""

from __future__ import annotations

from collections.abc import Callable

from jaxeff.graph.influence import Influences
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import Provenance


class Flow:
    """Which operations read and make each value of one program, in execution order."""

    def __init__(self, program: Program, provenance: Provenance):
        self.program = program
        self.provenance = provenance
        self.outputs = {output for output in program.outputs if isinstance(output, Value)}
        self.made_by: dict[Value, int] = {}
        self.read_by: dict[Value, list[int]] = {}
        for index, operation in enumerate(program.operations):
            for operand in operation.inputs:
                if isinstance(operand, Value):
                    self.read_by.setdefault(operand, []).append(index)
            self.made_by.update(dict.fromkeys(operation.outputs, index))

    def readers(self, value: Value) -> list[Operation]:
        return [self.program.operations[index] for index in self.read_by.get(value, ())]

    def carriers(self, value: Value, influences: Influences) -> list[Operation]:
        """What reads the value on its way through the network: not what only sums it up beside that."""
        return [operation for operation in self.readers(value) if influences.carry(operation, value)]

    def between(self, start: Value, end: Value, of_start: Callable[[Value], bool]) -> list[Operation]:
        """The operations that make `end` from `start`, constants included, in execution order.

        Args:
            of_start: whether a value is made of `start`.
        """
        wanted: set[int] = set()
        pending = [end]
        while pending:
            value = pending.pop()
            made = self.made_by.get(value)
            if value is start or made is None or made in wanted:
                continue
            if not of_start(value) and value not in self.provenance.constants:
                continue
            wanted.add(made)
            pending.extend(x for x in self.program.operations[made].inputs if isinstance(x, Value))
        return [self.program.operations[index] for index in sorted(wanted)]
