"""What the elements of a group are: units, channels, heads, experts, blocks.

Read from the program: channels stand in convolutions, heads are what attention runs over in parallel, the
residual stream is what sums of different branches stand in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from jaxeff.graph.coupling_labels import CONSTANT, WEIGHT, Described, Dim, Labels
from jaxeff.graph.coupling_stacks import GroupsIn, Members
from jaxeff.graph.nonlinearities import POINTWISE
from jaxeff.graph.program import Operation, Program, Value, scan_operands

GROUP_KINDS = (
    "unit", "channel", "head", "kv_head", "query", "head_size", "expert", "block", "stream"
)  # fmt: skip


class Attention(NamedTuple):
    """Groups that stand in attention: `heads`, the query heads that share one of them, and the size of a head."""

    heads: set[int]
    queries: set[int]
    sizes: set[int]


def attention_of(
    labels: Labels,
    groups_in: GroupsIn,
    groups: Sequence[tuple[int, Members]],
    shapes: Mapping[int, Sequence[int]],
) -> Attention:
    """The groups that stand in attention.

    Heads are what products of data with data run over in parallel, queries with keys and probabilities with
    values. Of what else stands in these products, the size of a head is the innermost in each weight
    that has both: the query heads that share a key, which may stand between, are outside of it.
    """
    heads: set[int] = set()
    inside: set[int] = set()
    of_one: set[int] = set()
    for parallel, others in labels.heads:
        if found_heads := groups_in(parallel):
            heads |= found_heads
            inside |= groups_in(others)
        elif not all(dim.factors for dim in parallel):
            of_one |= groups_in(others)
    leaves_of = [{leaf for leaf, _, _ in members} for _, members in groups]
    with_heads = set().union(*(leaves_of[head] for head in heads))
    places: dict[int, dict[int, tuple[int, int]]] = {}
    for number in (inside | of_one) - heads:
        for leaf, axis, indices in groups[number][1]:
            one_head = axis > 1 and shapes[leaf][axis - 1] == 1
            if (number in inside and leaf in with_heads) or (number in of_one and one_head):
                step = int(indices[1, 0] - indices[0, 0]) if len(indices) > 1 else 1
                places.setdefault(leaf, {})[number] = axis, -step
    # A leaf that holds queries, keys and values has several: theirs may differ.
    sizes = {
        number for found in places.values() for number, place in found.items() if place == max(found.values())
    }
    queries = {number for number in inside - heads - sizes if leaves_of[number] & with_heads}
    return Attention(heads, queries, sizes)


def kinds_of(
    program: Program,
    described: Mapping[Value, Described],
    groups_in: GroupsIn,
    attention: Attention,
    iterations: Set[int],
    stacks: Set[int],
) -> dict[int, str]:
    """The kind of each group that is more than units.

    Args:
        described: every value of the program.
        iterations: groups that are the iterations of scans.
        stacks: groups that others are stacked along.
    """
    passes = _Passes(described, groups_in)
    passes.walk(program, [frozenset()] * len(program.inputs), recurrent=False)
    kinds = dict.fromkeys(passes.channels, "channel")
    kinds |= dict.fromkeys(passes.streams, "stream")
    kinds |= dict.fromkeys(stacks, "expert")
    kinds |= dict.fromkeys(attention.queries, "query")
    kinds |= dict.fromkeys(attention.heads, "kv_head" if attention.queries else "head")
    kinds |= dict.fromkeys(attention.sizes, "head_size")
    return kinds | dict.fromkeys(iterations, "block")


_Sources = frozenset[Operation]


class _Passes:
    """Which groups stand in convolutions, and in sums of data that different operations made."""

    def __init__(self, described: Mapping[Value, Described], groups_in: GroupsIn):
        self._described, self._groups_in = described, groups_in
        self.channels: set[int] = set()
        self.streams: set[int] = set()

    def walk(self, program: Program, sources: Sequence[_Sources], recurrent: bool) -> None:
        """
        Args:
            sources: the operations that made each input, as far as their elements were changed one by one.
            recurrent: whether the same weights are used again and again, so that a sum is a state.
        """
        made = dict(zip(program.inputs, sources, strict=True))
        for operation in program.operations:
            given = [
                made.get(operand, frozenset()) for operand in operation.inputs if isinstance(operand, Value)
            ]
            if operation.name == "conv_general_dilated":
                self.channels |= self._groups_in(self._dims(operation))
            if operation.name in ("add", "add_any") and not recurrent and len(given) == 2 and all(given):
                if not given[0] & given[1]:
                    self.streams |= self._groups_in(self._dims(operation))
            together = (
                given[0] if given and all(each is given[0] for each in given) else frozenset().union(*given)
            )
            own = together if operation.name in _CHANGES else frozenset([operation])
            made.update(dict.fromkeys(operation.outputs, own))
            for body in operation.bodies:
                self.walk(body, *self._inside(operation, body))

    def _inside(self, operation: Operation, body: Program) -> tuple[list[_Sources], bool]:
        """Return the sources of a loop body's inputs, each carried value as if an operation had just made it."""
        if operation.name != "scan":
            return [frozenset([operation])] * len(body.inputs), operation.name == "while"
        constants, carried = scan_operands(operation)
        scanned = [
            self._described.get(value)
            for value in operation.inputs[constants + carried :]
            if isinstance(value, Value)
        ]
        over_weights = any(each is not None and each.made_of == WEIGHT for each in scanned)
        none, fresh = frozenset(), frozenset([operation])
        sources = [fresh if 0 <= i - constants < carried else none for i in range(len(body.inputs))]
        return sources, not over_weights

    def _dims(self, operation: Operation) -> list[Dim]:
        values = [*operation.outputs, *(each for each in operation.inputs if isinstance(each, Value))]
        known = [self._described[value] for value in values if value in self._described]
        return [dim for each in known if each.made_of != CONSTANT for dim in each.dims]


_CHANGES = frozenset(POINTWISE) | {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "transpose",
    "convert_element_type",
}
