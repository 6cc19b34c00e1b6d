"""Where a program's blocks begin and end: those that a scan runs through, and those with leaves of their own."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from jax.extend.core import Literal

from jaxeff.graph.nonlinearities import unchanged
from jaxeff.graph.program import Operation, Value, scan_operands
from jaxeff.graph.segments import Segments, whole
from jaxeff.output.text import some

Leaves = Mapping[str, Value]
"""The inputs of the program that are the params, by path."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block with leaves of its own.

    Attributes:
        leaves: paths by name within the block.
        first, last: positions between which it runs.
    """

    leaves: Mapping[str, str]
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Stack:
    """Blocks that a scan runs through.

    Attributes:
        leaves: paths by name within a block.
        operands: paths by position among the operands of the scan.
        first: position of the scan.
        length: number of blocks.
    """

    leaves: Mapping[str, str]
    operands: Mapping[int, str]
    first: int
    length: int


def stacks(segments: Segments, leaves: Leaves) -> list[Stack]:
    """Return the scans over stacked weights, in execution order."""
    found = [
        _stack(segments, leaves, position, whole(step))
        for position, step in enumerate(segments.steps)
        if whole(step).name == "scan"
    ]
    if not any(stack.leaves for stack in found):
        raise ValueError(
            "`apply_fn` has no scan over stacked weights: name its blocks in `blocks`, such as "
            "['layers_0', 'layers_1']; or, where a loop takes them from a stack by their number, scan over the stack"
        )
    return [stack for stack in found if stack.leaves]


def _stack(segments: Segments, leaves: Leaves, position: int, scan: Operation) -> Stack:
    constants, carried = scan_operands(scan)
    paths = {value: path for path, value in leaves.items()}
    operands: dict[int, str] = {}
    others: list[Value] = []
    for i, operand in enumerate(scan.inputs):
        stored = _stored(segments, operand)
        if i >= constants + carried and stored in paths:
            operands[i] = paths[stored]
        elif isinstance(operand, Value):
            others.append(operand)
            if i >= constants + carried:
                _check_no_weight(segments, operand, paths)
    own = {leaves[path] for path in operands.values()}
    elsewhere = [segments.read_by(other) for other in range(len(segments.steps)) if other != position]
    if shared := own.intersection(segments.sources(others).union(*elsewhere)):
        raise ValueError(
            f"{paths[shared.pop()]!r} is stacked by a scan and used outside it as well, so that no single block can "
            "prune it: name the blocks in `blocks`"
        )
    return Stack(_within(operands.values()), operands, position, scan.params["length"])


def _stored(segments: Segments, value: Value | Literal) -> Value | Literal:
    """Return what is passed on unchanged, at most in another dtype or placement."""
    while isinstance(value, Value) and (made := segments.made_without_batch(value)) and unchanged(made):
        value = made.inputs[0]
    return value


def _check_no_weight(segments: Segments, operand: Value, paths: Mapping[Value, str]) -> None:
    """Check that what a scan runs over is not made of a stack of matrices, which would be left as it is."""
    weights = [paths[source] for source in segments.sources([operand]) if source in paths]
    if weights and len(operand.shape) > 2 and jnp.issubdtype(operand.dtype, jnp.floating):
        raise ValueError(
            f"the scan does not run over {weights[0]!r} as it is stored, but over what is made of it: store the "
            "leaf as the scan reads it, with the blocks along its first axis"
        )


def _within(paths: Iterable[str]) -> dict[str, str]:
    """Return the paths by what follows the keys that all share, at least their last key."""
    paths = sorted(set(paths))
    shared = os.path.commonprefix([path.split("/")[:-1] for path in paths])
    return {"/".join(path.split("/")[len(shared) :]): path for path in paths}


def listed(segments: Segments, leaves: Leaves, blocks: Sequence[str]) -> list[Block]:
    """Return the named blocks in execution order. They meet where the least is kept from one to the next."""
    if isinstance(blocks, str) or not blocks:
        raise ValueError(f"`blocks` must be paths, such as ['layers_0', 'layers_1'], got {blocks!r}")
    read = [segments.read_by(position) for position in range(len(segments.steps))]
    spans: list[tuple[int, int, str]] = []
    for block in blocks:
        own = {value for path, value in leaves.items() if _is_below(path, block)}
        positions = [position for position, inputs in enumerate(read) if not inputs.isdisjoint(own)]
        if not positions:
            raise ValueError(f"`blocks` names {block!r}, but no leaf there meets data: {some([*leaves], 8)}")
        spans.append((positions[0], positions[-1], block))
    spans.sort()
    for (_, last, before), (first, _, after) in itertools.pairwise(spans):
        if first <= last:
            raise ValueError(
                f"`blocks` {before!r} and {after!r} do not run one after the other: give a path above both, or leave "
                "one out"
            )
    starts = [first for first, _, _ in spans]
    cuts = [segments.narrowest(0, starts[0])]
    for (_, last, _), start in zip(spans, [*starts[1:], len(read)], strict=True):
        cuts.append(segments.narrowest(last + 1, start))
    return [
        Block(_within(path for path in leaves if _is_below(path, block)), *ends)
        for (_, _, block), ends in zip(spans, itertools.pairwise(cuts), strict=True)
    ]


def _is_below(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}/")
