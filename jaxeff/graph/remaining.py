"""Which indices of every value of a program remain when some indices of its inputs are removed.

In: a `Program`, and which indices of each of its inputs stay. The labels of `coupling` say what goes with the
others: a label is gone if it stands at removed indices of inputs only. An index that cannot go is an error, which
names the operation that needs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util
from jax.extend.core import Literal

from jaxeff.graph.coupling import INPUT, OUTPUT
from jaxeff.graph.coupling_labels import (
    DATA,
    DEPTH,
    DERIVATIVE,
    LOGIT,
    REPLAY,
    ROUTED,
    SCALE,
    STATISTICS,
    UNKNOWN,
    WEIGHT,
    Described,
    Labels,
)
from jaxeff.graph.coupling_routing import settle
from jaxeff.graph.coupling_walk import Walk
from jaxeff.graph.program import Operation, Program, Value

Kept = tuple[np.ndarray, ...]
"""Of each dimension of an array, which indices stay: boolean."""


class MisfitError(ValueError):
    """The program does not run at these sizes.

    Args:
        why: what does not fit.
        operation: which asks for it.
    """

    def __init__(self, why: str, operation: Operation | None = None):
        super().__init__(f"the program does not run without what is removed: {why}{_place(operation)}")


def _place(operation: Operation | None) -> str:
    if operation is None:
        return ""
    scope = f" in {operation.scope}" if operation.scope else ""
    source = source_info_util.summarize(operation.source_info) if operation.source_info else ""
    return f" ({operation.name}{scope}{', ' + source if source else ''})"


class Input(NamedTuple):
    """An input of a program that is to be resized.

    Attributes:
        kept: which indices stay.
        made_of: as `Described` has it: DATA or WEIGHT.
        lock: why all of them have to; None where they need not.
        name: in messages.
        blocks: where other indices stay in each block of a stack, as many in all, those of each.
        routed: axes along which experts are removed that a router may no longer choose.
    """

    kept: Kept
    made_of: int
    lock: str | None = None
    name: str = "an input"
    blocks: tuple[Kept, ...] = ()
    routed: frozenset[int] = frozenset()

    @classmethod
    def of_data(cls, shape: Sequence[int]) -> Input:
        return cls(whole(shape), DATA, INPUT)

    @classmethod
    def of_weights(cls, path: str, blocks: Sequence[Kept], routed: frozenset[int] = frozenset()) -> Input:
        return cls(blocks[0], WEIGHT, None, repr(path), tuple(blocks) if len(blocks) > 1 else (), routed)

    def in_block(self, block: int) -> Kept:
        return self.blocks[block] if self.blocks else self.kept


def whole(shape: Sequence[int]) -> Kept:
    return tuple(np.ones(size, bool) for size in shape)


class Remaining:
    """Which indices of a program's values stay.

    Args:
        program: traced at its original sizes.
        inputs: one for each of the program's.
        outputs: what is to be left of each of the program's outputs; None where the program says so.
        derivative: whether the program is a derivative of another that is replayed. What is removed then has
            no influence, and a sum may leave it out.

    Raises:
        MisfitError: what is removed cannot be left out. The message names the operation.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Input],
        outputs: Sequence[Input | None],
        derivative: bool = False,
    ):
        allowed = frozenset({DEPTH, SCALE, REPLAY, *((STATISTICS, DERIVATIVE) if derivative else ())})
        # A derivative reads what its function made: what that left out of a maximum it leaves out as well.
        labeled = _Labeled(Labels(allowed), inputs, LOGIT if derivative else UNKNOWN)
        walk = Walk(labeled.labels)
        labeled.tie(walk.run(program, labeled.inputs), outputs)
        self._described, self._gone = walk.described, labeled.gone()
        # Sizes are those of the first block, and of all; positions may be others in each.
        count = max((len(one.blocks) for one in inputs), default=0)
        self._gone_in_blocks = [labeled.gone(block) for block in range(count)]
        self._known: dict[Value, Kept] = {}
        self._labels, self._routed = labeled.labels, labeled.routed()
        for lock in labeled.labels.locks:
            held = self._gone[lock.labels]
            if lock.only is not None:
                held &= self._routed[lock.labels] == (lock.only == ROUTED)
            if held.any():
                raise MisfitError(lock.reason, lock.during)
        if found := labeled.tied_to_what_stays(self._gone):
            why = f"axis {found[1]} of {found[0]} is tied to indices that stay"
            raise MisfitError(why, _first_to_tie(program, inputs, allowed))

    def kept(self, operand: Value | Literal) -> Kept:
        """Which indices of a value stay."""
        if isinstance(operand, Literal):
            return whole(np.shape(operand.val))
        if operand not in self._known:
            self._known[operand] = self._left(operand, self._gone)
        return self._known[operand]

    def in_blocks(self, operand: Value | Literal) -> tuple[Kept, ...]:
        """Which indices of a value stay in each block of the stacks, where they are not the same in all."""
        if isinstance(operand, Literal):
            return ()
        return tuple(self._left(operand, gone) for gone in self._gone_in_blocks)

    def routed(self, operand: Value | Literal) -> frozenset[int]:
        """The axes of a value along which experts are removed that a router may no longer choose."""
        dims = self._described[operand].dims if isinstance(operand, Value) else ()
        return frozenset(
            axis
            for axis, dim in enumerate(dims)
            if any(self._routed[self._labels.atoms(factor)].any() for factor in dim.factors)
        )

    def _left(self, value: Value, gone: np.ndarray) -> Kept:
        masks = []
        for dim, size in zip(self._described[value].dims, value.shape, strict=True):
            mask = np.ones(1 if dim.factors else size, bool)
            for factor in dim.factors:
                mask = np.logical_and.outer(mask, ~gone[factor]).ravel()
            masks.append(mask)
        return tuple(masks)

    def shape(self, operand: Value | Literal) -> tuple[int, ...]:
        return tuple(int(mask.sum()) for mask in self.kept(operand))

    def is_whole(self, *operands: Value | Literal) -> bool:
        return all(mask.all() for operand in operands for mask in self.kept(operand))

    def made(self, operation: Operation) -> list[Value]:
        """The outputs of an operation that the program has use for."""
        return [output for output in operation.outputs if output in self._described]

    def constants(self, program: Program) -> dict[Value, Any]:
        """What is left of the constants that the program, or a body of one of its loops, has use for."""
        found = program.constants.items()
        return {value: self._cut(value, array) for value, array in found if value in self._described}

    def _cut(self, value: Value, array: Any) -> Any:
        if self.is_whole(value):
            return array
        array = array if isinstance(array, Tracer) else np.asarray(array)
        for axis, mask in enumerate(self.kept(value)):
            array = array if mask.all() else array.take(np.flatnonzero(mask), axis)
        return array


class _Labeled:
    """Labels for the inputs of a program, and of which of them it is known whether they stay."""

    def __init__(self, labels: Labels, inputs: Sequence[Input], unrouted: int = UNKNOWN):
        self.labels, self._named = labels, inputs
        self.inputs = [
            Described(
                tuple(labels.dim(len(mask), True, one.lock)._replace(unrouted=unrouted) for mask in one.kept),
                one.made_of,
            )
            for one in inputs
        ]
        self._known = [
            (dim, one, axis)
            for described, one in zip(self.inputs, inputs, strict=True)
            for axis, dim in enumerate(described.dims)
        ]

    def tie(self, results: Sequence[Described], outputs: Sequence[Input | None]) -> None:
        """Let results have the indices that are expected of them."""
        for result, expected in zip(results, outputs, strict=True):
            _ = settle(self.labels, result)
            if expected is None:
                continue
            for axis, (dim, mask) in enumerate(zip(result.dims, expected.kept, strict=True)):
                if mask.all():
                    self.labels.lock_dims([dim], OUTPUT)
                    continue
                asked = self.labels.dim(len(mask), True)
                _ = self.labels.match(dim, asked)
                self._known.append((asked, expected, axis))

    def gone(self, block: int | None = None) -> np.ndarray:
        """Of every label whether it is removed: it is where it stands at nothing but removed indices."""
        labels = self.labels
        known = [
            (dim.factors[0], (one.kept if block is None else one.in_block(block))[axis])
            for dim, one, axis in self._known
            if dim.factors
        ]
        gone = np.zeros(len(labels), bool)
        if not known:
            return gone
        sizes = [len(mask) for _, mask in known]
        owner = np.repeat(np.arange(len(known)), sizes)
        index = np.concatenate([np.arange(size) for size in sizes])
        found = labels.find(np.concatenate([standing for standing, _ in known]))
        owner, index, atoms = labels.resolved(owner, index, found)
        stays = np.concatenate([mask for _, mask in known])[np.cumsum([0, *sizes])[owner] + index]
        gone[atoms] = True
        gone[atoms[stays]] = False
        # A product goes where either of its parts does.
        root, every = labels.of_all(), np.arange(len(labels))
        products = every[(root == every) & labels.is_product(every)]
        major, minor = (labels.find(part) for part in labels.parts(products))
        before = -1
        while before != (before := int(gone.sum())):
            gone[products] |= gone[major] | gone[minor]
        return gone[root]

    def routed(self) -> np.ndarray:
        """Of every label whether it stands where experts are removed that a router may no longer choose."""
        labels = self.labels
        routed = np.zeros(len(labels), bool)
        for dim, one, axis in self._known:
            if axis in one.routed:
                for factor in dim.factors:
                    routed[labels.atoms(factor)] = True
        root, every = labels.of_all(), np.arange(len(labels))
        products = every[(root == every) & labels.is_product(every)]
        major, minor = (labels.find(part) for part in labels.parts(products))
        before = -1
        while before != (before := int(routed.sum())):
            routed[products] |= routed[major] | routed[minor]
        return routed[root]

    def tied_to_what_stays(self, gone: np.ndarray) -> tuple[str, int] | None:
        """The name and axis of an input that is not left with the indices that it should be."""
        for described, one in zip(self.inputs, self._named, strict=True):
            for axis, (dim, mask) in enumerate(zip(described.dims, one.kept, strict=True)):
                if dim.factors and not np.array_equal(~gone[dim.factors[0]], mask):
                    return one.name, axis
        return None


class _Halted(Exception):
    pass


class _Beginning(Walk):
    """A walk over the first of a program's operations, those in the bodies of loops included.

    Attributes:
        walked: how many, with the last of them.
    """

    def __init__(self, labels: Labels, most: int):
        super().__init__(labels)
        self.most = most
        self.walked: tuple[int, Operation | None] = 0, None

    def _step(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        if self.walked[0] == self.most:
            raise _Halted
        self.walked = self.walked[0] + 1, operation
        return super()._step(operation, inputs)


def _first_to_tie(program: Program, inputs: Sequence[Input], allowed: frozenset[str]) -> Operation | None:
    """The operation that ties what is removed to what stays, found by bisection; None where none does."""

    def walked(most: int) -> tuple[bool, int, Operation | None]:
        labeled = _Labeled(Labels(allowed), inputs)
        walk = _Beginning(labeled.labels, most)
        with contextlib.suppress(_Halted):
            _ = walk.run(program, labeled.inputs)
        return labeled.tied_to_what_stays(labeled.gone()) is not None, *walk.walked

    tied, most, last = walked(sys.maxsize)
    if not tied:
        return None
    least = 0
    while least < most:
        middle = (least + most) // 2
        tied, _, operation = walked(middle)
        if tied:
            most, last = middle, operation
        else:
            least = middle + 1
    return last
