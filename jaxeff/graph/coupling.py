"""Which indices of which axes of the leaves go together when a network is made smaller.

In: a `Program` and which of its inputs are leaves. Out: `Coupled` groups, whose elements may be removed one
by one, or why they may not. The rules hold for one promise: if the elements removed are taken out of
every dimension that their labels stand in, then what is left of every value is what the program
computes when the leaves are 0 there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxeff.graph.blocks import Block
from jaxeff.graph.coupling_kinds import attention_of, kinds_of
from jaxeff.graph.coupling_labels import CONSTANT, DATA, DEPTH, WEIGHT, Described, Dim, Labels
from jaxeff.graph.coupling_rules import through
from jaxeff.graph.coupling_skips import skipped_by_zeros
from jaxeff.graph.coupling_stacks import GroupsIn, Seen, Stacked, stacked_over
from jaxeff.graph.coupling_work import Amount, Counts, gated, key_value_cache, macs, scaled, total
from jaxeff.graph.program import Operation, Program, Value, scan_operands
from jaxeff.graph.provenance import operands_of_bodies

INPUT, OUTPUT = "input of the model", "output of the model"
UNREAD = "not read by the model"
_ITERATIONS = "the iterations of a scan"
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
    """

    size: int
    members: tuple[tuple[int, int, np.ndarray], ...]
    reasons: tuple[str, ...]
    kind: str = "unit"
    blocks: tuple[int, ...] = ()
    block_axes: Sequence[tuple[int, ...]] = ()
    scan: Operation | None = None


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
        labels.lock_dims(output.dims, OUTPUT)
    found = [described.dims for described, is_leaf in zip(inputs, leaves, strict=True) if is_leaf]
    values = [value for value, is_leaf in zip(program.inputs, leaves, strict=True) if is_leaf]
    order = sorted(range(len(values)), key=lambda leaf: used.get(values[leaf], math.inf))
    return _collected(program, walk, found, order, values[:params], blocks)


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
    params: Sequence[Value],
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
    reasons, locked = _locked(labels)
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
    groups = [
        dataclasses.replace(one, kind=kinds.get(i, "unit"), scan=scans.get(i), **_blocks(one, found, over[i]))
        for i, one in enumerate(found)
    ]
    return Coupling(groups, _amounts(program, walk, groups, of_label, groups_in, params, blocks))


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


def _locked(labels: Labels) -> tuple[list[str], np.ndarray]:
    """The reasons in the order in which they were met, and [reason, label], whether it locks it."""
    reasons = list(dict.fromkeys(lock.reason for lock in labels.locks))
    locked = np.zeros((len(reasons), len(labels)), bool)
    for lock in labels.locks:
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


# --- The walk ------------------------------------------------------------------------------------------


class Walk:
    """Describes the values of a program, operation by operation.

    Attributes:
        described: every value so far, also inside the bodies of loops.
        iterations: scans, with the labels of the blocks that each goes through.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self.seen = Seen([], [])
        self.described: dict[Value, Described] = {}
        self.iterations: list[tuple[Operation, np.ndarray]] = []
        self._constants: dict[Value, Any] = {}
        self._iterations: tuple[np.ndarray, ...] = ()

    def run(self, program: Program, inputs: Sequence[Described]) -> list[Described]:
        self.described.update(zip(program.inputs, inputs, strict=True))
        self._constants.update(program.constants)
        self._see(inputs)
        around = self.labels.during
        for operation in program.operations:
            self.labels.during = operation
            operands, locked = [self._read(operand) for operand in operation.inputs], len(self.labels.locks)
            results = self._step(operation, operands)
            self._see(results)
            if operation.name not in _LOOPS:
                dims = [dim for described in (*operands, *results) for dim in described.dims]
                self.seen.locked.extend((dims, lock.labels) for lock in self.labels.locks[locked:])
            self.described.update(zip(operation.outputs, results, strict=True))
        self.labels.during = around
        return [self._read(output) for output in program.outputs]

    def _read(self, operand: Value | Literal) -> Described:
        if isinstance(operand, Literal):
            return self._constant(operand.val)
        if operand not in self.described:
            # Here, and not at first, so that what it locks names the operation that reads it.
            self.described[operand] = self._constant(self._constants[operand])
        return self.described[operand]

    def _see(self, arrays: Sequence[Described]) -> None:
        # What is the same all along an axis is so in every block.
        kept = (described.dims for described in arrays if described.made_of != CONSTANT)
        self.seen.arrays.extend((dims, self._iterations) for dims in kept)

    def _constant(self, constant: Any) -> Described:
        shape = np.shape(constant)
        if isinstance(constant, (int, float)):
            return Described((), CONSTANT, constant == 0)
        kind = getattr(constant, "dtype", None)
        numeric = kind is not None and (jnp.issubdtype(kind, np.number) or jnp.issubdtype(kind, bool))
        if isinstance(constant, Tracer) or not numeric:
            dims = tuple(self.labels.dim(size, False, "an array that is no number") for size in shape)
            return Described(dims, CONSTANT, False)
        array = np.asarray(constant)
        zero = not array.any()
        dims = []
        for axis, size in enumerate(shape):
            uniform = size < 2 or bool((array == array.take([0], axis)).all())
            dims.append(self.labels.dim(size, zero, None if uniform else "a constant array"))
        return Described(tuple(dims), CONSTANT, zero)

    def _step(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        if operation.name in _LOOPS:
            return _LOOPS[operation.name](self, operation, inputs)
        return through(self.labels, operation, inputs)

    def scan(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        constants, carried = scan_operands(operation)
        initial, stacked = inputs[constants : constants + carried], inputs[constants + carried :]
        if not all(operand.made_of == WEIGHT for operand in stacked) or not skipped_by_zeros(operation):
            self.labels.lock_dims([operand.dims[0] for operand in stacked], _ITERATIONS, DEPTH)
        time = self._iterated([operand.dims[0] for operand in stacked if operand.made_of == WEIGHT])
        time = time or self.labels.dim(int(operation.params["length"]), False, _ITERATIONS)
        slices = [operand._replace(dims=operand.dims[1:]) for operand in stacked]

        def body(carry: Sequence[Described]) -> list[Described]:
            return self.run(operation.bodies[0], [*inputs[:constants], *carry, *slices])

        outside = self._iterations
        if len(time.factors) == 1:
            self.iterations.append((operation, time.factors[0]))
            self._iterations = (*outside, time.factors[0])
        ends, results = self._repeated(body, initial)
        self._iterations = outside
        time = time._replace(zero=False)
        return ends + [result._replace(dims=(time, *result.dims)) for result in results[carried:]]

    def _iterated(self, leading: Sequence[Dim]) -> Dim | None:
        """The dimension that a scan goes along, of all weights that it takes apart."""
        return functools.reduce(self.labels.match, leading) if leading else None

    def loop(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        test, body = operation.bodies
        for_test, for_body = operation.params["cond_nconsts"], operation.params["body_nconsts"]
        initial = inputs[for_test + for_body :]

        def once(carry: Sequence[Described]) -> list[Described]:
            _ = self.run(test, [*inputs[:for_test], *carry])
            return self.run(body, [*inputs[for_test : for_test + for_body], *carry])

        return self._repeated(once, initial)[0]

    def _repeated(
        self, body: Callable[[Sequence[Described]], list[Described]], initial: Sequence[Described]
    ) -> tuple[list[Described], list[Described]]:
        """Return the final carry of a loop, and everything that its body returns.

        What it carries is 0 somewhere if it is so at first, and each iteration leaves it so.
        """
        carry = [operand._replace(made_of=DATA) for operand in initial]
        while True:
            results = body(carry)
            ends = self._tied(carry, results[: len(carry)])
            if list(map(_zeros, ends)) == list(map(_zeros, carry)):
                return ends, results
            carry = ends

    def branches(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        first, *others = [self.run(body, inputs[1:]) for body in operation.bodies]
        for other in others:
            first = self._tied(first, other)
        return [described._replace(made_of=max(described.made_of, inputs[0].made_of)) for described in first]

    def _tied(self, ones: Sequence[Described], others: Sequence[Described]) -> list[Described]:
        """Arrays of which either may stand in the same place."""
        return [
            Described(
                tuple(
                    self.labels.match(a, b)._replace(zero=a.zero and b.zero)
                    for a, b in zip(one.dims, other.dims, strict=True)
                ),
                max(one.made_of, other.made_of),
                one.zero and other.zero,
            )
            for one, other in zip(ones, others, strict=True)
        ]


def _zeros(described: Described) -> tuple[bool, ...]:
    """Where it is 0: everywhere, and where labels of each dimension are removed."""
    return (described.zero, *(dim.zero for dim in described.dims))


_LOOPS = {"scan": Walk.scan, "while": Walk.loop, "cond": Walk.branches}
