"""Which indices of which axes of the leaves go together when a network is made smaller.

In: a `Program` and which of its inputs are leaves. Out: `Coupled` groups, whose elements may be removed one
by one, or why they may not. The rules hold for one promise: if the elements removed are taken out of
every dimension that their labels stand in, then what is left of every value is what the program
computes when the leaves are 0 there. What has no rule is locked. Imports `labels`, `nonlinearities`,
`program`, `provenance`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxeff.graph.labels import DEEPEST, Dim, Labels
from jaxeff.graph.nonlinearities import POINTWISE, unchanged
from jaxeff.graph.program import Operation, Program, Value, callee, flatten, scan_operands
from jaxeff.graph.provenance import operands_of_bodies, value_shape

# Kinds of locks that a caller who knows better may leave out.
STATISTICS, SCALE = "statistics", "scale"
KINDS = frozenset({STATISTICS, SCALE})

CONSTANT, WEIGHT, DATA = range(3)
INPUT, OUTPUT = "input of the model", "output of the model"
UNREAD = "not read by the model"
_ALONE = "a single element, and a group cannot be emptied"
_SCALED = "data multiplies data and is summed over it: a scale by its size (1/sqrt(d)) would change"


class Described(NamedTuple):
    """What is known of one array.

    Attributes:
        dims: one for each dimension.
        made_of: CONSTANT; WEIGHT, of leaves and constants; or DATA.
        zero: whether it is 0 everywhere.
    """

    dims: tuple[Dim, ...]
    made_of: int
    zero: bool = False


Rule = Callable[[Labels, Operation, Sequence[Described]], list[tuple[Dim, ...]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Coupled:
    """Elements that are removed one by one, each with all of its members.

    Attributes:
        size: number of elements.
        members: (leaf, axis, indices): of that axis, row k of `indices`, [size, m], is element k.
        reasons: why none may be removed; empty where they may.
    """

    size: int
    members: tuple[tuple[int, int, np.ndarray], ...]
    reasons: tuple[str, ...]


def couple(program: Program, leaves: Sequence[bool], allowed: frozenset[str] = frozenset()) -> list[Coupled]:
    """The groups of a program.

    Args:
        program: a traced function, flattened.
        leaves: of each of its inputs, whether it is a leaf; all others are data.
        allowed: kinds of locks to leave out.

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
    for output in _Walk(labels).run(program, inputs):
        labels.lock_dims(output.dims, OUTPUT)
    found = [described.dims for described, is_leaf in zip(inputs, leaves, strict=True) if is_leaf]
    values = [value for value, is_leaf in zip(program.inputs, leaves, strict=True) if is_leaf]
    order = sorted(range(len(values)), key=lambda leaf: used.get(values[leaf], math.inf))
    return _collected(labels, found, order)


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


def _collected(labels: Labels, leaves: Sequence[Sequence[Dim]], order: Sequence[int]) -> list[Coupled]:
    """Labels alike in all that they stand in become the elements of one group."""
    axes = [(leaf, axis) for leaf in order for axis, dim in enumerate(leaves[leaf]) if dim.factors]
    if not axes:
        return []
    whole = [leaves[leaf][axis].factors[0] for leaf, axis in axes]
    owner = np.repeat(np.arange(len(axes)), [len(axis) for axis in whole])
    index = np.concatenate([np.arange(len(axis)) for axis in whole])
    owner, index, atom = _resolved(labels, owner, index, labels.find(np.concatenate(whole)))
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
    return found


def _numbered(signatures: np.ndarray) -> np.ndarray:
    """Equal signatures as one number, from 0 on, in the order in which they first come."""
    _, first, inverse = np.unique(signatures, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _resolved(
    labels: Labels, owner: np.ndarray, index: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels that are no products behind each index, each once, by owner and index."""
    products = labels.is_product(found)
    rows = np.stack([owner, index, found])
    done, rows = [rows[:, ~products]], rows[:, products]
    for _ in range(DEEPEST):
        if not rows.shape[1]:
            break
        parts = labels.find(np.concatenate(labels.parts(rows[2])))
        rows = np.stack([*np.tile(rows[:2], 2), parts])
        products = labels.is_product(parts)
        done.append(rows[:, ~products])
        rows = rows[:, products]
    if rows.shape[1]:
        labels.lock(rows[2], "a part of itself, after a reshape")
        done.append(rows)
    owner, index, found = np.concatenate(done, axis=1)
    if len(done) > 1:
        most, many = int(index.max()) + 1, len(labels)
        # Sorted, not `np.unique`, which hashes: these are nearly in order.
        key = np.sort((owner * most + index) * many + found, kind="stable")
        key = key[np.diff(key, prepend=-1) > 0]
        owner, index, found = key // many // most, key // many % most, key % many
    return owner, index, found


def _locked(labels: Labels) -> tuple[list[str], np.ndarray]:
    """The reasons in the order in which they were met, and [reason, label], whether it locks it."""
    reasons = list(dict.fromkeys(reason for reason, _ in labels.locks))
    locked = np.zeros((len(reasons), len(labels)), bool)
    for reason, held in labels.locks:
        locked[reasons.index(reason), labels.find(held)] = True
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


class _Walk:
    """Describes the values of a program, operation by operation."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def run(self, program: Program, inputs: Sequence[Described]) -> list[Described]:
        known = dict(zip(program.inputs, inputs, strict=True))
        for value, constant in program.constants.items():
            known[value] = self._constant(constant)

        def read(operand: Value | Literal) -> Described:
            return known[operand] if isinstance(operand, Value) else self._constant(operand.val)

        for operation in program.operations:
            results = self._step(operation, [read(operand) for operand in operation.inputs])
            known.update(zip(operation.outputs, results, strict=True))
        return [read(output) for output in program.outputs]

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
        called = callee(operation)
        if called is not None:
            return self.run(flatten(called), inputs)
        rule = _RULES.get(operation.name, _pointwise if operation.name in _POINTWISE else _without_rule)
        made_of = max((operand.made_of for operand in inputs), default=CONSTANT)
        zero = (operation.name in _MOVES or unchanged(operation)) and all(x.zero for x in inputs)
        return [Described(dims, made_of, zero) for dims in rule(self.labels, operation, inputs)]

    def scan(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        constants, carried = scan_operands(operation)
        initial, stacked = inputs[constants : constants + carried], inputs[constants + carried :]
        for operand in stacked:
            self.labels.lock_dims(operand.dims[:1], "the iterations of a scan")
        slices = [operand._replace(dims=operand.dims[1:]) for operand in stacked]
        results = self.run(operation.bodies[0], [*inputs[:constants], *map(_carried, initial), *slices])
        ends = self._tied(initial, results[:carried])
        time = self.labels.dim(int(operation.params["length"]), False, "the iterations of a scan")
        return ends + [result._replace(dims=(time, *result.dims)) for result in results[carried:]]

    def loop(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        test, body = operation.bodies
        for_test, for_body = operation.params["cond_nconsts"], operation.params["body_nconsts"]
        initial = inputs[for_test + for_body :]
        carried = [_carried(operand) for operand in initial]
        _ = self.run(test, [*inputs[:for_test], *carried])
        return self._tied(initial, self.run(body, [*inputs[for_test : for_test + for_body], *carried]))

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


def _carried(described: Described) -> Described:
    """What a loop carries, of whose later values nothing is known yet but their shape."""
    dims = tuple(dim._replace(zero=False) for dim in described.dims)
    return Described(dims, DATA, False)


_LOOPS = {"scan": _Walk.scan, "while": _Walk.loop, "cond": _Walk.branches}


# --- The rules -----------------------------------------------------------------------------------------

_POINTWISE = frozenset(POINTWISE) | {
    "bessel_i0e", "bessel_i1e", "clamp", "conj", "digamma", "erf_inv", "imag", "lgamma", "nextafter",
    "polygamma", "population_count", "real", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "device_put", "optimization_barrier",
}  # fmt: skip
# 0 where every operand is 0; where any is; where the first is.
_ZERO_OF_ALL = frozenset({
    "abs", "add", "add_any", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "conj", "convert_element_type",
    "copy", "copy_p", "device_put", "erf", "erf_inv", "expm1", "floor", "imag", "log1p", "max", "min", "name",
    "neg", "optimization_barrier", "or", "real", "reduce_precision", "round", "select_n",
    "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
    "xor",
})  # fmt: skip
_ZERO_OF_ANY = frozenset({"and", "mul"})
_ZERO_OF_FIRST = frozenset({"div", "integer_pow", "rem"})
_MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})


def _without_rule(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    reason = f"{operation.name}, which has no rule"
    for operand in inputs:
        labels.lock_dims(operand.dims, reason)
    return _new(labels, operation, reason)


def _bitcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    same = value_shape(operation.inputs[0]) == operation.outputs[0].shape
    return (_pointwise if same else _without_rule)(labels, operation, inputs)


def _random(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    for operand in inputs:
        labels.lock_dims(operand.dims, "random numbers: another shape draws others")
    return _new(labels, operation, "random numbers: another shape draws others")


def _new(labels: Labels, operation: Operation, reason: str) -> list[tuple[Dim, ...]]:
    return [tuple(labels.dim(n, False, reason) for n in output.shape) for output in operation.outputs]


def _pointwise(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    if len(operation.outputs) != 1:
        return [operand.dims for operand in inputs]
    (shape,) = (output.shape for output in operation.outputs)
    counted = list(inputs)[1 if operation.name == "select_n" else 0 :]
    dims = []
    for axis, size in enumerate(shape):
        spanning = [x for x in inputs if len(x.dims) == len(shape) and x.dims[axis].factors]
        if size < 2 or not spanning:
            dims.append(labels.dim(size))
            continue
        dim = spanning[0].dims[axis]
        for other in spanning[1:]:
            dim = labels.match(dim, other.dims[axis])
        zeros = [
            x.dims[axis].zero if len(x.dims) == len(shape) and x.dims[axis].factors else x.zero
            for x in counted
        ]
        dims.append(dim._replace(zero=_zero(operation, zeros)))
    return [tuple(dims)]


def _zero(operation: Operation, zeros: Sequence[bool]) -> bool:
    if operation.name in _ZERO_OF_FIRST:
        return zeros[0] and (operation.name != "integer_pow" or operation.params["y"] > 0)
    if operation.name in _ZERO_OF_ANY:
        return any(zeros)
    return operation.name in _ZERO_OF_ALL and all(zeros)


def _broadcast(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    stands = {
        int(t): dim for t, dim in zip(operation.params["broadcast_dimensions"], inputs[0].dims, strict=True)
    }
    return [
        tuple(
            stands[axis] if axis in stands and stands[axis].factors else labels.dim(size, inputs[0].zero)
            for axis, size in enumerate(shape)
        )
    ]


def _reshape(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    plain = operation.params.get("dimensions") is None and math.prod(shape) > 0
    regrouped = labels.regrouped(inputs[0].dims, shape) if plain else None
    if regrouped is None:
        labels.lock_dims(inputs[0].dims, "a reshape that cuts across its axes")
        return _new(labels, operation, "a reshape that cuts across its axes")
    return [tuple(regrouped)]


def _transpose(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    return [tuple(inputs[0].dims[i] for i in operation.params["permutation"])]


def _squeeze(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    dims = inputs[0].dims
    dropped = {i % len(dims) for i in operation.params["dimensions"]}
    return [tuple(dim for i, dim in enumerate(dims) if i not in dropped)]


def _rev(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    backwards = {int(i) for i in operation.params["dimensions"]}
    return [
        tuple(
            labels.taken(dim, np.arange(dim.size)[::-1]) if i in backwards and dim.factors else dim
            for i, dim in enumerate(inputs[0].dims)
        )
    ]


def _slice(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    params = operation.params
    strides = params["strides"] or (1,) * len(inputs[0].dims)
    windows = zip(inputs[0].dims, params["start_indices"], params["limit_indices"], strides, strict=True)
    return [tuple(_taken(labels, dim, start, end, step) for dim, start, end, step in windows)]


def _taken(labels: Labels, dim: Dim, start: int, end: int, step: int = 1) -> Dim:
    return labels.taken(dim, np.arange(start, end, step)) if dim.factors else dim


def _split(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (operand,), axis = inputs, operation.params["axis"]
    ends = np.cumsum(operation.params["sizes"]).tolist()
    parts = [
        _taken(labels, operand.dims[axis], start, end)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return [(*operand.dims[:axis], part, *operand.dims[axis + 1 :]) for part in parts]


def _concatenate(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    along = operation.params["dimension"]
    dims = []
    for axis, size in enumerate(operation.outputs[0].shape):
        here = [x.dims[axis] for x, v in zip(inputs, operation.inputs, strict=True) if value_shape(v)[along]]
        if axis == along:
            dims.append(labels.concatenated(here) if size > 1 else Dim((), False))
        else:
            dims.append(_all_tied(labels, here))
    return [tuple(dims)]


def _all_tied(labels: Labels, dims: Sequence[Dim]) -> Dim:
    tied = dims[0]
    for other in dims[1:]:
        tied = labels.match(tied, other)
    return tied._replace(zero=all(dim.zero for dim in dims))


def _pad(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    dims = []
    for dim, (low, high, interior), size in zip(
        inputs[0].dims, operation.params["padding_config"], operation.outputs[0].shape, strict=True
    ):
        if (low, high, interior) == (0, 0, 0):
            dims.append(dim)
        elif interior or low < 0 or high < 0:
            labels.lock_dims([dim], "padding")
            dims.append(labels.dim(size, False, "padding"))
        else:
            # One element of padding has no label yet, and is locked when it gets one.
            before, after = ([labels.dim(n, True, "padding")] if n else [] for n in (low, high))
            parts = [*before, dim, *after]
            dims.append(labels.concatenated(parts))
    return [tuple(dim._replace(zero=dim.zero and inputs[1].zero) for dim in dims)]


def _iota(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    along = operation.params["dimension"]
    return [
        tuple(
            labels.dim(size, False, "numbered by its position" if axis == along else None)
            for axis, size in enumerate(operation.outputs[0].shape)
        )
    ]


def _reduce(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A reduction gives its value in every element it reduces: statistics of a norm, a softmax."""
    reduced = {int(axis) for axis in operation.params.get("axes", operation.params.get("dimensions", ()))}
    sums = operation.name == "reduce_sum"
    for operand in inputs:
        for axis in reduced & set(range(len(operand.dims))):
            reason = f"{operation.name} over it" + (" (a norm or a mean, which would change)" if sums else "")
            labels.lock_dims([operand.dims[axis]], reason, STATISTICS if sums else None)
    kept = tuple(dim for i, dim in enumerate(inputs[0].dims) if i not in reduced)
    zero = sums or operation.name == "reduce_max"
    return [tuple(dim._replace(zero=dim.zero and zero) for dim in kept) for _ in operation.outputs]


def _along(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """Sorting and running sums: each element depends on the others of one dimension."""
    params = operation.params
    axis = params["dimension"] if "dimension" in params else params["axis"]
    dims = tuple(_all_tied(labels, tied) for tied in zip(*(x.dims for x in inputs), strict=True))
    labels.lock_dims([dims[axis]], f"{operation.name} along it")
    if operation.name == "cumlogsumexp":
        dims = tuple(dim._replace(zero=False) for dim in dims)
    return [dims for _ in operation.outputs]


def _top_k(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    labels.lock_dims(inputs[0].dims[-1:], "top_k along it")
    kept = tuple(dim._replace(zero=False) for dim in inputs[0].dims[:-1])
    return [(*kept, labels.dim(output.shape[-1], False, "top_k along it")) for output in operation.outputs]


def _contract(labels: Labels, name: str, one: Described, other: Described, pair: tuple[Dim, Dim]) -> None:
    """A sum over a dimension of two operands, which leaves out what is 0 in either of them."""
    tied = labels.match(*pair)
    if not any(dim.zero for dim in pair):
        labels.lock_dims([tied], f"{name} sums over it, and neither side is 0 where it is removed")
    if WEIGHT not in (one.made_of, other.made_of):
        labels.lock_dims([tied], _SCALED, SCALE)


def _dot_general(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    (over_left, over_right), (batch_left, batch_right) = operation.params["dimension_numbers"]
    left, right = inputs
    for i, j in zip(over_left, over_right, strict=True):
        _contract(labels, operation.name, left, right, (left.dims[i], right.dims[j]))
    batch = [
        labels.match(a, b)._replace(zero=a.zero or b.zero)
        for a, b in ((left.dims[i], right.dims[j]) for i, j in zip(batch_left, batch_right, strict=True))
    ]
    free_left = [dim for i, dim in enumerate(left.dims) if i not in (*over_left, *batch_left)]
    free_right = [dim for i, dim in enumerate(right.dims) if i not in (*over_right, *batch_right)]
    return [(*batch, *free_left, *free_right)]


def _convolution(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    numbers, groups = operation.params["dimension_numbers"], operation.params["feature_group_count"]
    if operation.params["batch_group_count"] != 1:
        return _without_rule(labels, operation, inputs)
    data, kernel = inputs
    shape = operation.outputs[0].shape
    spatial = [data.dims[i] for i in numbers.lhs_spec[2:]]
    labels.lock_dims(spatial, "positions of a convolution")
    labels.lock_dims([kernel.dims[i] for i in numbers.rhs_spec[2:]], "the window of a convolution")
    channels, features = data.dims[numbers.lhs_spec[1]], kernel.dims[numbers.rhs_spec[0]]
    within = kernel.dims[numbers.rhs_spec[1]]
    if groups > 1:
        # Channels and features are both groups x what is in each, and the groups go together.
        group = labels.fresh(groups)
        each = labels.dim(features.size // groups)
        channels = labels.match(channels, Dim((group, *within.factors), within.zero))
        features = labels.match(features, Dim((group, *each.factors), features.zero))
        if WEIGHT not in (data.made_of, kernel.made_of):
            labels.lock_dims([channels], _SCALED, SCALE)
        if within.factors and not within.zero:
            labels.lock_dims([channels], "neither side of a convolution is 0 where it is removed")
    else:
        _contract(labels, operation.name, data, kernel, (channels, within))
    dims = [labels.dim(size, False, "positions of a convolution") for size in shape]
    dims[numbers.out_spec[0]] = data.dims[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = features
    return [tuple(dims)]


def _reduce_window(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    """Pooling: dimensions with a window of 1 pass, the others are positions."""
    params, shape = operation.params, operation.outputs[0].shape
    windows = params["window_dimensions"]
    operands = [x for x in inputs if len(x.dims) == len(shape)]
    if len(operands) != len(operation.outputs):
        return _without_rule(labels, operation, inputs)
    dims = []
    for axis, (size, window) in enumerate(zip(shape, windows, strict=True)):
        tied = _all_tied(labels, [x.dims[axis] for x in operands])
        if window == 1 and params["window_strides"][axis] == 1 and tied.size == size:
            dims.append(tied._replace(zero=False))
            continue
        labels.lock_dims([tied], "positions of a pooling window")
        dims.append(labels.dim(size, False, "positions of a pooling window"))
    return [tuple(dims) for _ in operation.outputs]


def _gather(labels: Labels, operation: Operation, inputs: Sequence[Described]) -> list[tuple[Dim, ...]]:
    """A look-up: what is looked up by is locked, whole rows pass."""
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    operand, indices = inputs
    shape = operation.outputs[0].shape
    labels.lock_dims([operand.dims[i] for i in numbers.start_index_map], "looked up by a gather")
    labels.lock_dims(indices.dims[-1:], "looked up by a gather")
    dims = [Dim((), False)] * len(shape)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    rows = [i for i in range(len(operand.dims)) if i not in dropped]
    for target, source in zip(numbers.offset_dims, rows, strict=True):
        dims[target] = _whole(
            labels, operand.dims[source], sizes[source], shape[target], "looked up by a gather"
        )
    others = [target for target in range(len(shape)) if target not in numbers.offset_dims]
    for target, source in zip(others, range(len(indices.dims) - 1), strict=True):
        dims[target] = indices.dims[source]._replace(zero=False)
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        _ = labels.match(operand.dims[i], indices.dims[j])
    return [tuple(dims)]


def _whole(labels: Labels, dim: Dim, taken: int, size: int, reason: str) -> Dim:
    """A dimension of which all is taken; else it is locked, and what is taken of it is new."""
    if taken == dim.size:
        return dim
    labels.lock_dims([dim], reason)
    return labels.dim(size, False, reason)


def _dynamic_slice(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    shape = operation.outputs[0].shape
    return [
        tuple(
            _whole(labels, dim, size, size, "sliced at a position")
            for dim, size in zip(inputs[0].dims, shape, strict=True)
        )
    ]


def _dynamic_update(
    labels: Labels, operation: Operation, inputs: Sequence[Described]
) -> list[tuple[Dim, ...]]:
    """A slice of an array replaced: dimensions that the slice has whole are tied, the others locked."""
    operand, update = inputs[:2]
    dims = []
    for whole, part in zip(operand.dims, update.dims, strict=True):
        if whole.size == part.size:
            tied = labels.match(whole, part) if whole.factors else whole
        else:
            labels.lock_dims([whole, part], "updated at a position")
            tied = whole
        dims.append(tied._replace(zero=whole.zero and part.zero))
    return [tuple(dims)]


_RULES: Mapping[str, Rule] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "top_k": _top_k,
    "transpose": _transpose,
    **dict.fromkeys(
        ("argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum", "reduce_xor"),
        _reduce,
    ),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "sort"), _along),
    **dict.fromkeys(("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"),
                    _reduce_window),
    **dict.fromkeys(
        ("random_bits", "random_fold_in", "random_gamma", "random_seed", "random_split", "random_unwrap",
         "random_wrap", "rng_bit_generator", "rng_uniform", "threefry2x32"),
        _random,
    ),
}  # fmt: skip
