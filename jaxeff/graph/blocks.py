"""Residual blocks that are written out one after the other: parts of a program that read and write one stream.

In: a `Program`, and the paths of the leaves among its inputs. Out: `Block`s, alike ones in one `Blocks`.

A block is one of the segments that `streams` finds, or several in a row. It passes on what it is given if its weights
are 0, or a part of it does, as where a norm stands behind the addition.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxeff.graph.coupling_skips import ADDED
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.streams import Flow, Segment

SHARED = "other parts of the model use its weights too"
UNSKIPPED = "zeros in place of its weights would not skip it"
RETURNED = "the model returns something from within it"
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
        operations: those of these steps, and what else goes without them.
    """

    start: Value
    end: Value
    leaves: tuple[int, ...]
    steps: tuple[int, ...]
    operations: tuple[Operation, ...]


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

    >>> import jax, jax.numpy as jnp
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
    flow = Flow(program, len(paths))
    return _grouped(flow, _found(flow, paths, skip), paths)


def blocks_by_leaves(program: Program, paths: Sequence[str]) -> dict[frozenset[int], Block]:
    """Return all blocks of a program by the leaves that they hold, also those that may not go."""
    found = _found(Flow(program, len(paths)), paths, True)
    return {frozenset(block.leaves): block for block, _ in reversed(found)}


def common_name(paths: Sequence[str]) -> str:
    """Return the path of the module that holds these leaves: 'encoder/block3'; '' if nothing does."""
    if len(paths) == 1:
        return paths[0]
    return "/".join(os.path.commonprefix([path.split("/")[:-1] for path in paths]))


def common_pattern(names: Sequence[str]) -> str:
    """Return names that differ in numbers as one: 'encoder/block*'. The first of them if they differ in more."""
    parts = zip(*(name.split("/") for name in names), strict=False)
    pattern = "/".join(each[0] if len(set(each)) == 1 else _without_numbers(each[0]) for each in parts)
    numbered = re.escape(pattern).replace(r"\*", r"\d+")
    return pattern if all(re.fullmatch(numbered, name) for name in names) else names[0]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Segments in a row, of which one or several are to be a block."""

    segments: tuple[Segment, ...]
    leaves: tuple[int, ...]
    residual: bool

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(number for segment in self.segments for number in segment.steps)


def _found(flow: Flow, paths: Sequence[str], skip: bool) -> list[tuple[Block, str | None]]:
    """Return the blocks of a program, also those within others, and of each why it may not go."""
    found: dict[tuple[int, ...], tuple[Block, str | None]] = {}
    for chain in flow.chains():
        for block, reason in _of_chain(flow, chain, paths, skip):
            _ = found.setdefault(block.steps, (block, reason))
    return [*found.values()]


def _joined(parts: Sequence[_Part]) -> _Part:
    leaves = dict.fromkeys(leaf for part in parts for leaf in part.leaves)
    segments = tuple(segment for part in parts for segment in part.segments)
    return _Part(segments, tuple(leaves), any(part.residual for part in parts))


def _of_chain(
    flow: Flow, chain: Sequence[Segment], paths: Sequence[str], skip: bool
) -> list[tuple[Block, str | None]]:
    """Return the blocks of a chain, and of each why it may not go."""
    found: list[tuple[Block, str | None]] = []
    run: list[_Part] = []
    others: list[_Part] = []
    for segment in [*chain, None]:
        if segment is not None:
            leaves = flow.leaves_of(segment.steps)
            names = [operation.name for operation in flow.operations(segment.steps)]
            # A single addition is that of a bias.
            branch = bool(leaves) and len(names) > 1 and not ADDED.isdisjoint(names)
            residual = branch and flow.passed_on(segment.steps, segment.end, leaves) is segment.start
            part = _Part((segment,), leaves, residual)
            if _alike(segment.start, segment.end):
                run.append(part)
                continue
            others.append(part)
        found += [each for part in _parts(flow, run, paths) for each in _block(flow, part, skip)]
        run = []
    patterns = {_without_numbers(name) for block, _ in found if (name := _name(block.leaves, paths))}
    for part in others:
        start = part.segments[0].start
        name = _name(part.leaves, paths)
        if any(map(str.isdigit, name)) and _without_numbers(name) in patterns:
            found.append((Block(start, part.segments[-1].end, part.leaves, part.steps, ()), RESHAPED))
    return found


def _alike(one: Value, other: Value) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _name(leaves: Sequence[int], paths: Sequence[str]) -> str:
    return common_name([paths[leaf] for leaf in leaves]) if leaves else ""


def _block(flow: Flow, part: _Part, skip: bool) -> list[tuple[Block, str | None]]:
    start, end = part.segments[0].start, part.segments[-1].end
    if not part.residual:
        return []
    reason = None
    steps = part.steps
    if any(not flow.readers[leaf] <= set(steps) for leaf in part.leaves):
        reason = SHARED
    elif any(flow.returned & {*flow.wholes[number].outputs} - {end} for number in steps):
        reason = RETURNED
    elif not skip and flow.passed_on(steps, end, part.leaves) is not start:
        reason = UNSKIPPED
    operations = tuple(flow.operations([*flow.of_weights(steps, part.leaves), *steps]))
    return [(Block(start, end, part.leaves, steps, operations), reason)]


def _parts(flow: Flow, run: Sequence[_Part], paths: Sequence[str]) -> list[_Part]:
    """Join the segments of one block: those of one numbered module, or of what is repeated if none is numbered."""
    keys = _modules([part.leaves for part in run], paths)
    structures = [_structure(flow, part.leaves) for part in run]
    if not any(keys):
        return [_trimmed(run[start:end]) for start, end in _repeated(structures)]
    joined: list[_Part] = []
    for start, end in _equal_neighbors(keys):
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


def _equal_neighbors(keys: Sequence[str | None]) -> list[tuple[int, int]]:
    """Return [start, end) of what shares a key. Segments without weights, which have none, may stand between."""
    spans: list[tuple[int, int]] = []
    for place, key in enumerate(keys):
        if key is not None and spans and keys[spans[-1][0]] == key:
            spans[-1] = spans[-1][0], place + 1
        elif key is not None:
            spans.append((place, place + 1))
    taken = {place for start, end in spans for place in range(start, end)}
    return sorted([*spans, *((place, place + 1) for place in range(len(keys)) if place not in taken)])


def _structure(flow: Flow, leaves: Sequence[int]) -> tuple[Any, ...]:
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


def _grouped(flow: Flow, found: Sequence[tuple[Block, str | None]], paths: Sequence[str]) -> list[Blocks]:
    """Join blocks that are alike. Where blocks overlap, the larger ones are taken."""
    together: dict[Any, list[Block]] = {}
    for block, reason in found:
        key = block.end.shape, block.end.dtype, _structure(flow, block.leaves), reason
        alike = together.setdefault(key, [])
        if not any(set(block.steps) & set(other.steps) for other in alike):
            alike.append(block)
    patterns = [_without_numbers(_name(block.leaves, paths)) for block, _ in found]
    groups = []
    for (*_, reason), blocks in together.items():
        name = _name(blocks[0].leaves, paths)
        if len(blocks) > 1:
            groups.append(Blocks(tuple(sorted(blocks, key=lambda block: block.steps)), reason))
        elif re.search(r"\d", name) and patterns.count(_without_numbers(name)) > 1:
            groups.append(Blocks(tuple(blocks), reason or LONE))
    taken: set[int] = set()
    chosen = []
    for group in sorted(groups, key=lambda group: (len(group.blocks) == 1, -len(group.blocks[0].steps))):
        steps = {number for block in group.blocks for number in block.steps}
        if not steps & taken:
            chosen.append(group)
            taken |= steps
    return sorted(chosen, key=lambda group: group.blocks[0].steps)
