"""Residual blocks that are written out one after the other: parts of a program that read and write one stream.

In: a `Program`, and the paths of the leaves among its inputs. Out: `Block`s, alike ones in one `Blocks`.

After each operation some arrays are live: made before, and read later. Those that depend on weights and on data
are what the rest of the model knows of what came before. Where they are one array more than at an earlier point,
that array is the stream, and the operations between two such points are a segment. A block is a segment, or several
in a row, that passes on what it is given if its weights are 0, or of which a part does (norms behind the addition).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.lax import copy_p

from jaxeff.graph.coupling_skips import ZERO, is_zero, through_zeros
from jaxeff.graph.evaluation import Read, Rule, apply
from jaxeff.graph.program import Call, Operation, Program, Step, Value, needed, operations_of

SHARED = "other parts of the model use its weights too"
UNSKIPPED = "zeros in place of its weights would not skip it"
RESHAPED = "its output has another shape than its input"
LONE = "a single element, and a group cannot be emptied"
_LONGEST = 24
"""Segments of a block, at most, if no paths tell where it ends."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of a program without which `end` would be `start`.

    Attributes:
        start, end: the stream before and after it.
        leaves: numbers of the leaves that it alone reads, in the order in which it does.
        steps: numbers of the program's steps that compute `end` from `start`.
    """

    start: Value
    end: Value
    leaves: tuple[int, ...]
    steps: tuple[int, ...]


class Blocks(NamedTuple):
    """Blocks with weights of the same shapes, in a stream of one shape.

    Attributes:
        blocks: in the order in which the program runs them.
        reason: why none may go; None where they may.
    """

    blocks: tuple[Block, ...]
    reason: str | None


def blocks_of(program: Program, paths: Sequence[str], skip: bool = False) -> list[Blocks]:
    """Return the residual blocks of a program.

    Args:
        program: a traced function, flattened.
        paths: of its first inputs, which are leaves; all others are data.
        skip: whether blocks may go that pass on something else than they are given when their weights are 0.

    >>> import jax
    >>> from jaxeff.graph.program import flatten
    >>> def model(params, x):
    ...     for block in params:
    ...         x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    ...     return x
    >>> params = [{"up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}] * 2
    >>> program = flatten(jax.make_jaxpr(model)(params, jnp.ones((2, 3))))
    >>> [(found,)] = [blocks_of(program, ["0/down", "0/up", "1/down", "1/up"])]
    >>> [block.leaves for block in found.blocks], found.reason
    ([(1, 0), (3, 2)], None)
    """
    flow = _Flow(program, len(paths))
    found = [block for chain in flow.chains() for block in _of_chain(flow, chain, paths, skip)]
    return _grouped(flow, found, paths)


def common_name(paths: Sequence[str]) -> str:
    """Return the path of the module that holds these leaves: 'encoder/block3'; '' if nothing does."""
    if len(paths) == 1:
        return paths[0]
    return "/".join(os.path.commonprefix([path.split("/")[:-1] for path in paths]))


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


# --- What depends on what --------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """What happens between two points of a chain.

    Attributes:
        start, end: the stream before and after.
        steps: of the program, those that compute what is mixed.
    """

    start: Value
    end: Value
    steps: tuple[int, ...]


class _Flow:
    """What each step of a program depends on.

    Attributes:
        sources: the leaves of each value that depends on weights alone.
        mixed: values that depend on floating data, or on weights and on other data. Positions and masks made of whole
            numbers are not among them.
        readers: of each leaf, the steps that read it, or what is made of it, together with data.
    """

    def __init__(self, program: Program, leaves: int):
        self.program = program
        self.wholes = [step.whole if isinstance(step, Call) else step for step in program.steps]
        self.sources: dict[Value, frozenset[int]] = {
            value: frozenset([number]) for number, value in enumerate(program.inputs[:leaves])
        }
        self.data = set(program.inputs[leaves:])
        self._given = [value for value in program.inputs[leaves:] if jnp.issubdtype(value.dtype, jnp.floating)]
        self.mixed = set(self._given)
        self.readers: dict[int, set[int]] = {number: set() for number in range(leaves)}
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

    def chains(self) -> list[list[_Segment]]:
        """Return segments in a row, by what is live beside the stream, that with the least first."""
        points = self._points()
        by_others: dict[frozenset[Value], list[int]] = {}
        for place, (_, _, others) in enumerate(points):
            by_others.setdefault(others, []).append(place)
        chains = []
        for others, places in sorted(by_others.items(), key=lambda pair: len(pair[0])):
            # What the last block of a decoder reads besides the stream is dead after it.
            after = range(places[-1] + 1, len(points))
            last = next((place for place in after if points[place][2] < others), None)
            taken = [points[place] for place in ([*places] if last is None else [*places, last])]
            chain = []
            for (before, start, _), (number, end, _) in itertools.pairwise(taken):
                steps = tuple(step for step in self._mixed_steps if before < step <= number)
                chain.append(_Segment(start, end, steps))
            chains.append(chain)
        return chains

    def _points(self) -> list[tuple[int, Value, frozenset[Value]]]:
        """After each step: its number, the stream, and what else is live. Only of arrays that are mixed."""
        last: dict[Value, float] = {}
        for number, whole in enumerate(self.wholes):
            last.update((operand, number) for operand in whole.inputs if isinstance(operand, Value))
        last.update((output, math.inf) for output in self.program.outputs if isinstance(output, Value))
        live: dict[Value, None] = {}
        points = []
        for number in [-1, *self._mixed_steps]:
            made = self._given if number < 0 else self.wholes[number].outputs
            live.update(dict.fromkeys(made))
            for value in [value for value in live if last.get(value, -1) <= number]:
                del live[value]
            if live:
                *others, stream = live
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
            if operand not in states and operand in self.program.constants:
                states[operand] = ZERO if is_zero(self.program.constants[operand]) else operand
            return states.get(operand, operand)

        for operation in self.operations([*self._of_weights(steps, frozenset(leaves)), *steps]):
            given = [read(operand) for operand in operation.inputs]
            states.update(zip(operation.outputs, through_zeros(operation, given), strict=True))
        found = read(end)
        return found if isinstance(found, Value) else None

    def _of_weights(self, steps: Iterable[int], leaves: frozenset[int]) -> list[int]:
        """Return the steps that make of these leaves, without data, what the given steps read."""
        found: set[int] = set()
        waiting = [operand for number in steps for operand in self.wholes[number].inputs]
        while waiting:
            operand = waiting.pop()
            if not isinstance(operand, Value) or not self.sources.get(operand, frozenset()) & leaves:
                continue
            number = self._maker.get(operand)
            if number is not None and number not in found:
                found.add(number)
                waiting += self.wholes[number].inputs
        return sorted(found)


# --- From segments to blocks -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Segments in a row, of which one or several are to be a block."""

    segments: tuple[_Segment, ...]
    leaves: tuple[int, ...]
    residual: bool

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(number for segment in self.segments for number in segment.steps)


def _joined(parts: Sequence[_Part]) -> _Part:
    leaves = dict.fromkeys(leaf for part in parts for leaf in part.leaves)
    segments = tuple(segment for part in parts for segment in part.segments)
    return _Part(segments, tuple(leaves), any(part.residual for part in parts))


def _of_chain(
    flow: _Flow, chain: Sequence[_Segment], paths: Sequence[str], skip: bool
) -> list[tuple[Block, str | None]]:
    """Return the blocks of a chain, and of each why it may not go."""
    found: list[tuple[Block, str | None]] = []
    run: list[_Part] = []
    others: list[_Part] = []
    for segment in [*chain, None]:
        if segment is not None:
            leaves = flow.leaves_of(segment.steps)
            # A single operation adds a bias.
            branch = bool(leaves) and len(flow.operations(segment.steps)) > 1
            residual = branch and flow.passed_on(segment.steps, segment.end, leaves) is segment.start
            part = _Part((segment,), leaves, residual)
            if _alike(segment.start, segment.end):
                run.append(part)
                continue
            others.append(part)
        found += [each for part in _parts(flow, run, paths) for each in _block(flow, part, skip)]
        run = []
    patterns = {without_numbers(name) for block, _ in found if (name := _name(block.leaves, paths))}
    for part in others:
        start = part.segments[0].start
        name = _name(part.leaves, paths)
        if any(map(str.isdigit, name)) and without_numbers(name) in patterns:
            found.append((Block(start, part.segments[-1].end, part.leaves, part.steps), RESHAPED))
    return found


def _alike(one: Value, other: Value) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _name(leaves: Sequence[int], paths: Sequence[str]) -> str:
    return common_name([paths[leaf] for leaf in leaves]) if leaves else ""


def _block(flow: _Flow, part: _Part, skip: bool) -> list[tuple[Block, str | None]]:
    start, end = part.segments[0].start, part.segments[-1].end
    if not part.residual:
        return []
    reason = None
    steps = part.steps
    if any(not flow.readers[leaf] <= set(steps) for leaf in part.leaves):
        reason = SHARED
    elif not skip and flow.passed_on(steps, end, part.leaves) is not start:
        reason = UNSKIPPED
    return [(Block(start, end, part.leaves, steps), reason)]


def _parts(flow: _Flow, run: Sequence[_Part], paths: Sequence[str]) -> list[_Part]:
    """Join the segments of one block: those of one numbered module, or of what is repeated if none is numbered."""
    keys = _modules([part.leaves for part in run], paths)
    structures = [_structure(flow, part.leaves) for part in run]
    if not any(keys):
        return [_trimmed(run[start:end]) for start, end in _repeated(structures)]
    joined: list[_Part] = []
    for start, end in _equal_neighbours(keys):
        inside = run[start:end]
        within = [structure for structure in structures[start:end] if structure]
        repeated = {tuple(within[first:last]) for first, last in _repeated(within)}
        if len(repeated) == 1 and repeated != {tuple(within)} and len(inside) < len(run):
            joined += _parts(flow, inside, paths)
        else:
            joined.append(_trimmed(inside))
    return joined


def _trimmed(parts: Sequence[_Part]) -> _Part:
    """Join parts, without those at either end that read no weights."""
    reading = [place for place, part in enumerate(parts) if part.leaves] or [0]
    return _joined(parts[reading[0] : reading[-1] + 1])


def _modules(leaves: Sequence[Sequence[int]], paths: Sequence[str]) -> list[str | None]:
    """Return for each of several sets of leaves the numbered module that holds it: 'encoder/layers_3'."""
    names = [paths[leaf].split("/")[:-1] for each in leaves for leaf in each]
    outer = len(os.path.commonprefix(names))
    found: list[str | None] = []
    for each in leaves:
        parts = os.path.commonprefix([paths[leaf].split("/")[:-1] for leaf in each])
        numbered = [place for place, part in enumerate(parts) if place >= outer and re.search(r"\d", part)]
        found.append("/".join(parts[: numbered[0] + 1]) if numbered else None)
    return found


def _equal_neighbours(keys: Sequence[str | None]) -> list[tuple[int, int]]:
    """Return [start, end) of what shares a key. Segments without weights, which have none, may stand between."""
    spans: list[tuple[int, int]] = []
    for place, key in enumerate(keys):
        if key is not None and spans and keys[spans[-1][0]] == key:
            spans[-1] = spans[-1][0], place + 1
        elif key is not None:
            spans.append((place, place + 1))
    taken = {place for start, end in spans for place in range(start, end)}
    return sorted([*spans, *((place, place + 1) for place in range(len(keys)) if place not in taken)])


def _structure(flow: _Flow, leaves: Sequence[int]) -> tuple[Any, ...]:
    return tuple((flow.program.inputs[leaf].shape, flow.program.inputs[leaf].dtype) for leaf in leaves)


def _repeated(structures: Sequence[Any]) -> list[tuple[int, int]]:
    """Cut a sequence where it repeats itself: [start, end) of each repetition, and of all that is not repeated."""
    spans, start = [], 0
    while start < len(structures):
        best = 1, 1
        for length in range(1, min(_LONGEST, (len(structures) - start) // 2) + 1):
            first, times = structures[start : start + length], 1
            while structures[start + times * length : start + (times + 1) * length] == first:
                times += 1
            if times > 1 and length * times > best[0] * best[1]:
                best = length, times
        length, times = best
        spans += [(start + k * length, start + (k + 1) * length) for k in range(times)]
        start += length * times
    return spans


def _grouped(
    flow: _Flow, found: Sequence[tuple[Block, str | None]], paths: Sequence[str]
) -> list[Blocks]:
    """Join blocks that are alike. Those of which a part is a block as well come first, and have it."""
    together: dict[Any, list[Block]] = {}
    for block, reason in found:
        key = block.end.shape, block.end.dtype, _structure(flow, block.leaves), reason
        together.setdefault(key, []).append(block)
    patterns = [without_numbers(_name(block.leaves, paths)) for block, _ in found]
    groups = []
    for (*_, reason), blocks in together.items():
        name = _name(blocks[0].leaves, paths)
        if len(blocks) > 1:
            groups.append(Blocks(tuple(blocks), reason))
        elif re.search(r"\d", name) and patterns.count(without_numbers(name)) > 1:
            groups.append(Blocks(tuple(blocks), reason or LONE))
    taken: set[int] = set()
    chosen = []
    for group in sorted(groups, key=lambda group: group.reason is not None):
        steps = {number for block in group.blocks for number in block.steps}
        if not steps & taken:
            chosen.append(group)
            taken |= steps
    return sorted(chosen, key=lambda group: group.blocks[0].steps)


# --- A program without some of its blocks ----------------------------------------------------------------


def without(program: Program, blocks: Sequence[Block]) -> Program:
    """Return the program that skips some blocks, and has no inputs for their leaves."""
    starts = {block.end: block.start for block in blocks}
    steps: list[Step] = []
    for step in program.steps:
        whole = step.whole if isinstance(step, Call) else step
        ends = [output for output in whole.outputs if output in starts]
        steps += [_copy(whole, starts[end], end) for end in ends] or [step]
    wanted = {output for output in program.outputs if isinstance(output, Value)}
    gone = {program.inputs[leaf] for block in blocks for leaf in block.leaves}
    inputs = tuple(value for value in program.inputs if value not in gone)
    return Program(inputs, program.outputs, needed(steps, wanted), program.constants)


def _copy(whole: Operation, start: Value, end: Value) -> Operation:
    return Operation(copy_p, {}, (start,), (end,), whole.context, False, (), whole.scope, whole.source_info)


def gated(blocks: Sequence[Block], program: Program, gates: Any) -> Mapping[Operation, Rule]:
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
