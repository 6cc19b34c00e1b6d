"""Groups whose elements may differ from block to block: of scanned blocks, and of experts side by side.

A group of hidden units in stacked weights spans all blocks, for the labels of the units stand in all of them.
But where no array has the units without the blocks, unit k of one block never meets unit k of another, and
each block may lose units of its own.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

from jaxeff.graph.coupling_labels import Dim, IntArray, Labels

Members = Sequence[tuple[int, int, np.ndarray]]


class Seen(NamedTuple):
    """The arrays and locks that a walk through a program has seen.

    Attributes:
        arrays: the dimensions of each array that is no constant, and the iterations that it stands in.
        locked: the dimensions of what an operation reads and writes, and labels that it locks.
    """

    arrays: list[tuple[Sequence[Dim], tuple[IntArray, ...]]]
    locked: list[tuple[Sequence[Dim], IntArray]]


class GroupsIn:
    """The groups whose labels stand in some dimensions."""

    def __init__(self, labels: Labels, of_label: np.ndarray):
        """
        Args:
            of_label: of each label its group, -1 where it stands in no leaf.
        """
        self._labels, self._of_label = labels, of_label
        # Dimensions are handed on from array to array. Their labels are kept, so that no other has their id.
        self._known: dict[int, tuple[IntArray, frozenset[int]]] = {}

    def __call__(self, dims: Sequence[Dim]) -> set[int]:
        return set().union(*(self.of(factor) for dim in dims for factor in dim.factors))

    def of(self, labels: IntArray) -> frozenset[int]:
        known = self._known.get(id(labels))
        if known is None:
            found = np.unique(self._of_label[self._labels.atoms(labels)]).tolist()
            known = self._known[id(labels)] = labels, frozenset(found) - {-1}
        return known[1]


class Stacked(NamedTuple):
    """The groups that a group is stacked along.

    Attributes:
        stacks: other groups.
        block_axes: of the leaf of each member, the axes of these.
    """

    stacks: tuple[int, ...]
    block_axes: tuple[tuple[int, ...], ...]


def stacked_over(
    groups_in: GroupsIn,
    groups: Sequence[tuple[int, Members]],
    seen: Seen,
    heads: Set[int],
    iterations: Set[int],
) -> list[Stacked]:
    """Return for each group what it is stacked along.

    It is stacked along an axis if every array that holds the group holds the axis as well, or lies in the
    body of the scan along it; if no operation on such an array mixes what lies along the axis; and if each
    leaf has the axis as one of its own, in order. Of two axes that only come together the iterations of a scan
    are the stack, or neither.

    Args:
        groups: size and members of each.
        heads: groups that are no stacks: attention modules want heads of one size.
        iterations: groups that are the iterations of scans.
    """
    axis_of = [{leaf: axis for leaf, axis, indices in members if _in_order(indices)} for _, members in groups]
    stacks = {
        number for number, (_, members) in enumerate(groups) if len(axis_of[number]) == len(members)
    } - heads
    always: list[set[int]] = [set(stacks) for _ in groups]
    for dims, around in seen.arrays:
        together = groups_in(dims).union(*map(groups_in.of, around))
        for number in together:
            always[number] &= together
    for dims, locked in seen.locked:
        if mixed := stacks & groups_in.of(locked):
            for number in groups_in(dims):
                always[number] -= mixed
    found = []
    for number, (_, members) in enumerate(groups):
        over = tuple(
            stack
            for stack in sorted(always[number])
            if (number not in always[stack] or stack in iterations)
            and all(axis_of[stack].get(leaf, axis) != axis for leaf, axis, _ in members)
        )
        axes = tuple(tuple(axis_of[stack][leaf] for stack in over) for leaf, _, _ in members)
        found.append(Stacked(over, axes))
    return found


def _in_order(indices: np.ndarray) -> bool:
    return indices.shape[1] == 1 and np.array_equal(indices[:, 0], np.arange(len(indices)))
