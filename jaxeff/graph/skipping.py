"""Programs that skip some of their blocks: for good, or where a gate says so.

In: a `Program` and `Block`s of it. Out: a smaller program, or rules for `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.lax import copy_p

from jaxeff.graph.blocks import Block
from jaxeff.graph.evaluation import Read, Rule, apply
from jaxeff.graph.program import Call, Operation, Program, Step, Value, needed


def without(program: Program, blocks: Sequence[Block]) -> Program:
    """Return the program that skips some blocks, and has no inputs for their leaves."""
    starts = {block.end: block.start for block in blocks}
    steps: list[Step] = []
    for step in program.steps:
        whole = step.whole if isinstance(step, Call) else step
        ends = [output for output in whole.outputs if output in starts]
        steps += [_copy(whole, starts[end], end) for end in ends] or [step]
    wanted = {output for output in program.outputs if isinstance(output, Value)}
    steps = [*needed(steps, wanted)]
    gone = {program.inputs[leaf] for block in blocks for leaf in block.leaves}
    if not gone.isdisjoint(wanted):
        raise ValueError(
            "`plan` leaves out blocks from within which something is returned, or whose weights others read too"
        )
    inputs = tuple(value for value in program.inputs if value not in gone)
    return Program(inputs, program.outputs, tuple(steps), program.constants)


def _copy(whole: Operation, start: Value, end: Value) -> Operation:
    return Operation(copy_p, {}, (start,), (end,), whole.context, False, (), whole.scope, whole.source_info)


def gated(program: Program, blocks: Sequence[Block], gates: Any) -> Mapping[Operation, Rule]:
    """Return rules for `evaluate` that skip the blocks whose gate, an entry of [blocks], is False."""
    rules: dict[Operation, Rule] = {}
    ends = {block.end: number for number, block in enumerate(blocks)}
    for operation in program.operations:
        if not ends.keys().isdisjoint(operation.outputs):
            rules[operation] = _gate(operation, blocks, ends, gates)
    return rules


def _gate(operation: Operation, blocks: Sequence[Block], ends: Mapping[Value, int], gates: Any) -> Rule:
    def run(operands: list[Any], read: Read) -> list[Any]:
        results = apply(operation, operands)
        for place, output in enumerate(operation.outputs):
            if output in ends:
                number = ends[output]
                results[place] = jnp.where(gates[number], results[place], read(blocks[number].start))
        return results

    return run
