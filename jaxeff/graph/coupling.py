"""Which indices of which axes of the leaves go together when a network is made smaller.

In: a `Program` and which of its inputs are leaves. Out: `Coupled` groups, whose elements may be removed one
by one, or why they may not. The rules hold for one promise: if the elements removed are taken out of
every dimension that their labels stand in, then what is left of every value is what the program
computes when the leaves are 0 there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxeff.graph.blocks import Block
from jaxeff.graph.coupling_experts import Gated, gated_sum
from jaxeff.graph.coupling_kinds import attention_of, kinds_of
from jaxeff.graph.coupling_labels import DATA, MASKED, ROUTED, WEIGHT, Described, Dim, Labels
from jaxeff.graph.coupling_routing import positions_in
from jaxeff.graph.coupling_stacks import GroupsIn, Stacked, stacked_over
from jaxeff.graph.coupling_walk import Walk
from jaxeff.graph.coupling_work import Amount, Counts, gated, key_value_cache, macs, scaled, total
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import operands_of_bodies

INPUT, OUTPUT = "input of the model", "output of the model"
UNREAD = "not read by the model"
_ALONE = "a single element, and a group cannot be emptied"


@dataclasses.dataclass(frozen=True, eq=False)
class Coupled:
    """Elements that are removed one by one, each with all of its members.

    Attributes:
        size: number of elements.
        members: (leaf, axis, indices): of that axis, row k of `indices`, [size, m], is element k.
        reasons: why none may be removed; empty where they may.
        kind: what they are, one of `coupling_kinds.GROUP_KINDS`.
        blocks: sizes of the axes that all members' leaves are stacked along, where each block may lose
            elements of its own, equally many; empty where there are none.
        block_axes: of each member, these axes of its leaf.
        scan: of blocks, the scan that goes through them.
        routed: of experts that a router chooses among, how many of them have to stay; 0 of all other groups. Such an
            expert is removed as if its logit were -inf, and not its weights 0.
        gated: of such experts, where the sum of their outputs is taken, or why this is not known.
    """

    size: int
    members: tuple[tuple[int, int, np.ndarray], ...]
    reasons: tuple[str, ...]
    kind: str = "unit"
    blocks: tuple[int, ...] = ()
    block_axes: Sequence[tuple[int, ...]] = ()
    scan: Operation | None = None
    routed: int = 0
    gated: Gated | str = ""


class Coupling(NamedTuple):
    """All groups of a program, and what it costs as a function of how many elements each keeps.

    Attributes:
        amounts: 'macs' of the program; 'params' and 'bytes' of the leaves that are asked for; 'kv_cache', the numbers
            that a cache of keys and values holds for each position, where there is attention.
    """

    groups: list[Coupled]
    amounts: Mapping[str, Amount]


def couple(
    program: Program,
    leaves: Sequence[bool],
    allowed: frozenset[str] = frozenset(),
    params: int = 0,
    blocks: Sequence[Block] = (),
) -> Coupling:
    """The groups of a program.

    Args:
        program: a traced function, flattened.
        leaves: of each of its inputs, whether it is a leaf; all others are data.
        allowed: kinds of locks to leave out.
        params: how many of the leaves, the first of them, count as params.
        blocks: parts of the program that may be left out. Each is a variable of the amounts, 1 or 0, after the sizes
            of the groups.

    Returns:
        Groups that cover every index of every axis longer than 1 of every leaf, in the order in which
        the program first uses their leaves. Leaves are numbered among leaves.
    """
    labels = Labels(allowed)
    inputs = []
    used = _first_uses(program)
    for value, is_leaf in zip(program.inputs, leaves, strict=True):
        lock = None if is_leaf and value in used else UNREAD if is_leaf else INPUT
        dims = tuple(labels.dim(size, True, lock) for size in value.shape)
        inputs.append(Described(dims, WEIGHT if is_leaf else DATA))
    walk = Walk(labels)
    for output in walk.run(program, inputs):
        labels.lock_dims([*output.dims, *positions_in(output)], OUTPUT)
    found = [described.dims for described, is_leaf in zip(inputs, leaves, strict=True) if is_leaf]
    values = [value for value, is_leaf in zip(program.inputs, leaves, strict=True) if is_leaf]
    order = sorted(range(len(values)), key=lambda leaf: used.get(values[leaf], math.inf))
    return _collected(program, walk, found, order, values, params, blocks)


def _first_uses(program: Program) -> dict[Value, int]:
    """Of each value of a program that is read, when it is first; in a loop as its body reads it."""
    order: list[Value | Literal] = []
    for operation in program.operations:
        for body, start in operands_of_bodies(operation):
            within = _first_uses(body)
            outer = dict(zip(body.inputs, operation.inputs[start:], strict=False))
            order += [outer[value] for value in sorted(within.keys() & outer.keys(), key=within.__getitem__)]
        order += operation.inputs
    order += program.outputs
    values = dict.fromkeys(value for value in order if isinstance(value, Value))
    return {value: position for position, value in enumerate(values)}


# --- From labels to groups -----------------------------------------------------------------------------


def _collected(
    program: Program,
    walk: Walk,
    leaves: Sequence[Sequence[Dim]],
    order: Sequence[int],
    values: Sequence[Value],
    params: int,
    blocks: Sequence[Block],
) -> Coupling:
    """Labels alike in all that they stand in become the elements of one group."""
    labels = walk.labels
    axes = [(leaf, axis) for leaf in order for axis, dim in enumerate(leaves[leaf]) if dim.factors]
    if not axes:
        return Coupling([], {})
    whole = [leaves[leaf][axis].factors[0] for leaf, axis in axes]
    owner = np.repeat(np.arange(len(axes)), [len(axis) for axis in whole])
    index = np.concatenate([np.arange(len(axis)) for axis in whole])
    owner, index, atom = labels.resolved(owner, index, labels.find(np.concatenate(whole)))
    reasons, locked = _locked(labels, MASKED)
    # Of each label the first place where it stands, which is how elements and groups are ordered.
    first = np.full(len(labels), len(atom))
    first[atom[::-1]] = np.arange(len(atom))[::-1]
    atoms = atom[first[atom] == np.arange(len(atom))]
    group = np.empty(len(labels), np.int64)
    group[atoms] = _numbered(_signatures(labels, owner, atom, locked)[atoms])
    sizes = np.bincount(group[atoms])
    # Rows come by owner and index, so that a stable sort has only runs to merge.
    key = (group[atom] * len(axes) + owner) * len(atom) + first[atom]
    rows = np.argsort(key, kind="stable")
    stands = key[rows] // len(atom)
    starts = np.flatnonzero(np.diff(stands, prepend=-1))
    members: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in sizes]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        at, of = divmod(int(stands[start]), len(axes))
        members[at].append((*axes[of], index[rows[start:end]].reshape(sizes[at], -1)))
    found = []
    examples = np.empty(len(sizes), np.int64)
    examples[group[atoms]] = atoms
    for size, held, example in zip(sizes.tolist(), members, examples, strict=True):
        why = [reason for reason, mask in zip(reasons, locked, strict=True) if mask[example]]
        why += [_ALONE] if size == 1 and not why else []
        found.append(Coupled(size, tuple(held), tuple(why)))
    of_label = np.full(len(labels), -1)
    of_label[atoms] = group[atoms]
    shapes = {leaf: [dim.size for dim in leaves[leaf]] for leaf in order}
    groups_in = GroupsIn(labels, of_label)
    scans = {number: scan for scan, along in walk.iterations for number in groups_in.of(along)}
    iterations = scans.keys()
    attention = attention_of(labels, groups_in, [(one.size, one.members) for one in found], shapes)
    over = stacked_over(
        groups_in, [(one.size, one.members) for one in found], walk.seen, attention.heads, iterations
    )
    stacks = {
        stack for one, each in zip(found, over, strict=True) if not one.reasons for stack in each.stacks
    }
    kinds = kinds_of(program, walk.described, groups_in, attention, iterations, stacks)
    unrouted = list(zip(*_locked(labels, ROUTED), strict=True))
    for i, one in enumerate(found):
        if kinds.get(i) == "expert" and one.reasons and one.size > 1:
            own = atoms[group[atoms] == i]
            why = tuple(reason for reason, mask in unrouted if mask[own].any())
            least = _chosen(labels, groups_in, i)
            if not why and least >= one.size:
                why = (f"the router chooses {least} of them for each token",)
            found[i] = dataclasses.replace(one, reasons=why, routed=0 if why else least)
    groups = [
        dataclasses.replace(one, kind=kinds.get(i, "unit"), scan=scans.get(i), **_blocks(one, found, over[i]))
        for i, one in enumerate(found)
    ]
    for i, one in enumerate(groups):
        if one.routed:
            stacked = [found[other].members for other, each in enumerate(over) if i in each.stacks]
            weights = [values[leaf] for leaf in {leaf for members in stacked for leaf, _, _ in members}]
            summed = gated_sum(program, walk.described, labels, groups_in, i, weights)
            groups[i] = dataclasses.replace(one, gated=summed)
    return Coupling(groups, _amounts(program, walk, groups, of_label, groups_in, values[:params], blocks))


def _amounts(
    program: Program,
    walk: Walk,
    groups: Sequence[Coupled],
    of_label: np.ndarray,
    groups_in: GroupsIn,
    params: Sequence[Value],
    blocks: Sequence[Block],
) -> dict[str, Amount]:
    fixed = np.array([bool(one.reasons) for one in groups])
    variables = [*(one.size for one in groups), *(1 for _ in blocks)]
    counts = Counts(walk.labels, np.where(fixed[of_label], -1, of_label), variables)
    block_of, block_of_leaf = {}, {}
    for number, block in enumerate(blocks, len(groups)):
        block_of |= dict.fromkeys(block.operations, number)
        block_of_leaf |= dict.fromkeys((program.inputs[leaf] for leaf in block.leaves), number)
    held = [
        (value.dtype.itemsize, gated(counts(walk.described[value].dims), block_of_leaf.get(value)))
        for value in params
    ]
    leaves_of = [{leaf for leaf, _, _ in one.members} for one in groups]
    heads, sizes = (
        {i for i, one in enumerate(groups) if one.kind in kinds}
        for kinds in (("head", "kv_head"), ("head_size",))
    )
    found = {
        "macs": macs(program, walk.described, counts, block_of),
        "params": total(each for _, each in held),
        "bytes": total(scaled(each, size) for size, each in held),
        "kv_cache": key_value_cache(
            program, walk.described, counts, block_of, groups_in, leaves_of, heads, sizes
        ),
    }
    return {name: Amount.of(polynomial) for name, polynomial in found.items() if polynomial}


def _blocks(one: Coupled, found: Sequence[Coupled], over: Stacked) -> dict[str, Any]:
    if one.reasons:
        return {}
    return {"blocks": tuple(found[stack].size for stack in over.stacks), "block_axes": over.block_axes}


def _numbered(signatures: np.ndarray) -> np.ndarray:
    """Equal signatures as one number, from 0 on, in the order in which they first come."""
    _, first, inverse = np.unique(signatures, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _chosen(labels: Labels, groups_in: GroupsIn, number: int) -> int:
    """How many experts of a group its router chooses for each token, at least 1."""
    counts = {operation: count for operation, dim, count in labels.choices if number in groups_in([dim])}
    of_top_k = [count for operation, count in counts.items() if operation.name == "top_k"]
    # One argmax after another chooses as many.
    return max([1, *of_top_k, len(counts) - len(of_top_k)])


def _locked(labels: Labels, sense: str) -> tuple[list[str], np.ndarray]:
    """The reasons in the order in which they were met, and [reason, label], whether it locks it.

    Args:
        sense: MASKED or ROUTED, what it means that an element is gone.
    """
    locks = [lock for lock in labels.locks if lock.only in (None, sense)]
    reasons = list(dict.fromkeys(lock.reason for lock in locks))
    locked = np.zeros((len(reasons), len(labels)), bool)
    for lock in locks:
        locked[reasons.index(lock.reason), labels.find(lock.labels)] = True
    every = np.arange(len(labels))
    products = every[(labels.of_all() == every) & labels.is_product(every)]
    major, minor = (labels.find(part) for part in labels.parts(products))
    for mask in locked:
        # A product stays if, and only if, both of its parts do.
        before = -1
        while before != (before := int(mask[major].sum() + mask[minor].sum())):
            held = mask[products]
            mask[major[held]] = mask[minor[held]] = True
    return reasons, locked


def _signatures(labels: Labels, owner: np.ndarray, atom: np.ndarray, locked: np.ndarray) -> np.ndarray:
    """A number for each label, equal for those alike.

    Alike are labels that came into being together, were never cut apart, stand equally often in the same
    axes, and are locked for the same reasons. The numbers are sums of 64 random bits for each of these.
    """
    bits = np.random.default_rng(0)

    def drawn(count: int) -> np.ndarray:
        return bits.integers(0, 2**64, count, np.uint64)

    signatures = np.zeros(len(labels), np.uint64)
    np.add.at(signatures, labels.of_all(), drawn(labels.colors)[labels.color()])
    np.add.at(signatures, atom, drawn(int(owner.max()) + 1)[owner])
    for mask, code in zip(locked, drawn(len(locked)), strict=True):
        signatures[mask] += code
    return signatures
