"""Attention heads: the slices of weights that belong to each head, and the head's probabilities.

An attention is a softmax whose values weigh other data: a contraction of two data operands, one of them
normalized over the contracted dimension. The dimensions that come from the weights' units are the heads. Heads
that share keys and values are one unit, the group. If all heads share one key, each head is a unit, of the weights
that it has for itself. Only structure is found here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.axes import Dims, Factor
from jaxeff.graph.flow import Flow
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import Loop, Lost, Provenance, contracted, gathered, value_shape
from jaxeff.graph.sites import Site
from jaxeff.graph.softmaxes import Softmax, softmax_of, softmaxes_of


@dataclasses.dataclass(frozen=True)
class Member:
    """The part of one weight that belongs to each unit of an attention.

    Attributes:
        leaf: the weight's index among the leaves.
        axis: of the weight.
        indices: for each unit, its indices along the axis.
    """

    leaf: int
    axis: int
    indices: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """One softmax attention.

    Attributes:
        logits: what the softmax turns into probabilities.
        over: the dimension in which these sum to 1.
        base: of the softmax's exponentials.
        head_dims: the dimensions that index heads, in order.
        heads: number of heads.
        units: number of groups of heads that share keys and values, or of heads.
        members: the parts of weights that belong to the units.
        loops: the loops around it, as seen by its first member's weight.
    """

    logits: Value
    over: int
    base: float
    head_dims: tuple[int, ...]
    heads: int
    units: int
    members: tuple[Member, ...]
    loops: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Headless:
    """A softmax that weighs data but in which no heads were found.

    Attributes:
        leaves: the weights nearest before it.
        reason: why no heads were found.
    """

    leaves: frozenset[int]
    reason: str


Labels = Mapping[int, frozenset[Dims]]
"""Leaf -> where its unit axes stand; several ways if parts of one leaf have met."""


def attentions(
    program: Program, sites: Sequence[Site], shapes: Sequence[tuple[int, ...]], provenance: Provenance
) -> tuple[tuple[Attention, ...], tuple[Headless, ...]]:
    """Find the attentions of a program and of the bodies of its loops, in execution order, with and without heads."""
    by_output = {site.activation.pre: site for site in sites}
    found: list[Attention | Headless] = []
    _search(program, by_output, shapes, provenance, found)
    return (
        tuple(each for each in found if isinstance(each, Attention)),
        tuple(each for each in found if isinstance(each, Headless)),
    )


def _search(
    program: Program,
    by_output: Mapping[Value, Site],
    shapes: Sequence[tuple[int, ...]],
    provenance: Provenance,
    found: list[Attention | Headless],
) -> None:
    flow = Flow(program, provenance)
    labels = _labeled(program, by_output, provenance)
    softmaxes = softmaxes_of(flow)
    for operation in program.operations:
        for body in operation.bodies:
            _search(body, by_output, shapes, provenance, found)
        if operation.name == "dot_general":
            attention = _attention(operation, flow, labels, softmaxes, by_output, shapes)
            if attention is not None:
                found.append(attention)


def _labeled(
    program: Program, by_output: Mapping[Value, Site], provenance: Provenance
) -> dict[Value, Labels]:
    """Return where the units of the nearest weights stand in each value."""
    labels: dict[Value, Labels] = {}
    for operation in program.operations:
        for index, output in enumerate(operation.outputs):
            site = by_output.get(output)
            if site is not None:
                labels[output] = {site.leaf: frozenset({_without_inputs(site)})}
            elif any(isinstance(x, Value) and x in labels for x in operation.inputs):
                labels[output] = _through(operation, index, labels)
    return labels


def _without_inputs(site: Site) -> Dims:
    def kept(factor: Factor) -> Factor:
        return factor if factor.axis in site.unit_axes else Factor(None, factor.size)

    return tuple(tuple(map(kept, dim)) for dim in site.activation.pre_dims)


def _through(operation: Operation, output: int, labels: Mapping[Value, Labels]) -> Labels:
    """Return the labels of an operation's output, as far as they can be followed."""
    found: dict[int, set[Dims]] = {}
    for operand, value in enumerate(operation.inputs):
        for leaf, variants in labels.get(value, {}).items() if isinstance(value, Value) else ():
            moved = (_moved(operation, operand, dims, output) for dims in variants)
            found.setdefault(leaf, set()).update(
                dims for dims in moved if dims is not None and axes.held(dims)
            )
    return {leaf: frozenset(variants) for leaf, variants in found.items() if variants}


def _moved(operation: Operation, operand: int, dims: Dims, output: int) -> Dims | None:
    shape, result = value_shape(operation.inputs[operand]), operation.outputs[output].shape
    if axes.moves(operation):
        return axes.move(operation, dims, shape)[output]
    if operation.name == "concatenate":
        along = operation.params["dimension"]
        return (*dims[:along], (Factor(None, result[along]),), *dims[along + 1 :])
    if operation.name == "stack":
        return axes.stacked(operation, dims)
    if operation.name.startswith("reduce_") and "axes" in operation.params:
        reduced = {int(axis) for axis in operation.params["axes"]}
        return tuple(dim for i, dim in enumerate(dims) if i not in reduced)
    if operation.name == "dot_general":
        return contracted(operation, operand, dims, axes.of_data(value_shape(operation.inputs[1 - operand])))
    if operation.name == "gather" and operand == 0:
        return _taken(operation, dims)
    return axes.broadcast(dims, shape, result) if nonlinearities.pointwise(operation) else None


def _taken(operation: Operation, dims: Dims) -> Dims | None:
    """Return the dims of rows that are taken whole; None where the others hold part of an axis that they hold too."""
    rows = gathered(operation, dims)
    if isinstance(rows, Lost):
        return None
    kept = {factor for dim in rows for factor in dim}
    gone = {factor.axis for dim in dims for factor in dim if factor not in kept}
    return None if gone & axes.held(rows) else rows


def _attention(
    operation: Operation,
    flow: Flow,
    labels: Mapping[Value, Labels],
    softmaxes: Mapping[Value, Softmax],
    by_output: Mapping[Value, Site],
    shapes: Sequence[tuple[int, ...]],
) -> Attention | Headless | None:
    """Return the attention whose probabilities this contraction takes, if it takes any."""
    contract, batch = operation.params["dimension_numbers"]
    headless = None
    for side in (0, 1):
        weights, data = operation.inputs[side], operation.inputs[1 - side]
        softmax = softmax_of(flow, weights, softmaxes)
        found = softmax is not None and contract[side] == (softmaxes[softmax].over,)
        if softmax is None or not found or not isinstance(data, Value) or not flow.provenance.is_data(data):
            continue
        (over,), (weighed,) = contract[side], contract[1 - side]
        if _of_units(labels.get(softmax, {}), over) and _of_units(labels.get(data, {}), weighed):
            continue  # a router, which weighs experts
        if data not in labels:
            headless = _headless(flow, labels, data, "its values")
            continue
        shared = dict(zip(batch[side], batch[1 - side], strict=True))
        heads = _Heads.of(labels.get(softmax, {}), labels[data], shared, softmax.shape, over)
        if heads is None:
            headless = _headless(flow, labels, softmax, "its logits")
            continue
        members = heads.members(labels, softmax, data, shared, by_output.values(), shapes)
        loops = next((site.loops for site in by_output.values() if site.leaf in labels[softmax]), ())
        dims, sizes = tuple(heads.digits), [d for pieces in heads.digits.values() for d in pieces]
        units = math.prod(digit.size for digit in sizes if digit.unit)
        count = math.prod(digit.size for digit in sizes)
        return Attention(*softmaxes[softmax], dims, count, units, members, loops)
    return headless


def _headless(flow: Flow, labels: Mapping[Value, Labels], value: Value, what: str) -> Headless:
    """Return why a value has no heads: the nearest operations before it at which a weight's units were lost."""
    names: set[str] = set()
    # Units that stand in the value itself are those of the dimension that is summed over.
    leaves = set(labels.get(value, {}))
    pending = [] if leaves else [value]
    seen = set(pending)
    while pending:
        made = flow.made_by.get(pending.pop())
        sources = [] if made is None else flow.program.operations[made].inputs
        for source in sources:
            if not isinstance(source, Value) or source in seen:
                continue
            seen.add(source)
            if labels.get(source) and made is not None:
                names.add(flow.program.operations[made].name)
                leaves.update(labels[source])
            else:
                pending.append(source)
    lost = sorted(name for name in names if not (name == "dot_general" or name.startswith("reduce_")))
    if not leaves:
        reason = f"{what} come from no weight that could be followed"
    elif lost:
        reason = f"units are not followed through {', '.join(lost)}, on the way to {what}"
    else:
        reason = "one head: no dimension of its probabilities is made of a weight's units"
    return Headless(frozenset(leaves), reason)


class _Digit(NamedTuple):
    """A factor of a dimension that indexes heads; `unit` if it indexes units."""

    size: int
    unit: bool


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The dimensions of the probabilities that index heads, each as its digits, major first."""

    digits: Mapping[int, tuple[_Digit, ...]]

    @staticmethod
    def of(
        queries: Labels, values: Labels, shared: Mapping[int, int], shape: Sequence[int], over: int
    ) -> _Heads | None:
        """Find the heads from the labels of the probabilities and of the values that they weigh."""
        own = {i for i in range(len(shape)) if i != over and _of_units(queries, i)}
        digits: dict[int, tuple[_Digit, ...]] = {}
        for i in sorted(own):
            factors = _value_factors(values, shared.get(i))
            digits[i] = tuple(_Digit(f.size, f.axis is not None) for f in factors) or (
                _Digit(shape[i], False),
            )
        if not digits:
            return None
        if not any(digit.unit for pieces in digits.values() for digit in pieces):
            digits = {i: tuple(_Digit(d.size, True) for d in pieces) for i, pieces in digits.items()}
        return _Heads(digits)

    def members(
        self,
        labels: Mapping[Value, Labels],
        softmax: Value,
        data: Value,
        shared: Mapping[int, int],
        sites: Iterable[Site],
        shapes: Sequence[tuple[int, ...]],
    ) -> tuple[Member, ...]:
        """Return the parts of the query, key, value and output weights that belong to each unit."""
        found: dict[int, dict[int, list[set[int]]]] = {}
        for leaf, variants in labels[softmax].items():
            for dims in variants:
                self._add(found, leaf, {i: dims[i] for i in self.digits})
        for leaf, variants in labels[data].items():
            for dims in variants:
                self._add(found, leaf, {i: dims[shared[i]] for i in self.digits if i in shared})
        for site in sites:
            known = labels.get(site.input, {})
            for leaf in labels[softmax].keys() & known.keys():
                for dims in known[leaf]:
                    for variant in labels[softmax][leaf]:
                        self._add(found, site.leaf, self._in_input(site, dims, variant))
        return tuple(
            Member(leaf, axis, tuple(tuple(sorted(unit)) for unit in units))
            for leaf, by_axis in found.items()
            for axis, units in by_axis.items()
            if len(by_axis) == 1 and max(map(max, units)) < shapes[leaf][axis]
        )

    def _in_input(self, site: Site, dims: Dims, variant: Dims) -> dict[int, tuple[Factor, ...]]:
        """Return the factors of the output weight's input axes that are heads."""
        found: dict[int, tuple[Factor, ...]] = {}
        for dim, own in zip(dims, site.input_dims, strict=True):
            pieces = axes.regrouped(own, [factor.size for factor in dim])
            for i in self.digits:
                if pieces is not None and _held(variant[i]) and all(factor in dim for factor in variant[i]):
                    found[i] = tuple(f for factor in variant[i] for f in pieces[dim.index(factor)])
        return found

    def _add(
        self,
        found: dict[int, dict[int, list[set[int]]]],
        leaf: int,
        factors: Mapping[int, tuple[Factor, ...]],
    ) -> None:
        """Add the indices of each unit in a leaf, if the factors distinguish all units."""
        chosen: list[Factor] = []
        for i, pieces in self.digits.items():
            if not any(digit.unit for digit in pieces):
                continue
            split = axes.regrouped(factors.get(i, ()), [digit.size for digit in pieces])
            if split is None:
                return
            own = [split[j] for j, digit in enumerate(pieces) if digit.unit]
            if any(len(part) != 1 or part[0].axis is None for part in own):
                return
            chosen.extend(part[0] for part in own)
        (axis, *others) = {factor.axis for factor in chosen}
        if others or axis is None:
            return
        block = min(factor.stride for factor in chosen)
        starts = np.zeros((), int)
        for factor in chosen:
            starts = starts[..., None] + factor.offset + factor.stride * np.arange(factor.size)
        units = found.setdefault(leaf, {}).setdefault(axis, [set() for _ in starts.ravel()])
        for unit, start in zip(units, starts.ravel().tolist(), strict=True):
            unit.update(range(start, start + block))


def _of_units(labels: Labels, dim: int) -> bool:
    """Whether units of a weight stand in a dimension."""
    return any(_held(dims[dim]) for variants in labels.values() for dims in variants)


def _held(dim: Sequence[Factor]) -> bool:
    return any(factor.axis is not None for factor in dim)


def _value_factors(values: Labels, dim: int | None) -> tuple[Factor, ...]:
    """Return the factors of a dimension of the values, from the first leaf that has any there."""
    held = [
        dims[dim] for variants in values.values() for dims in variants if dim is not None and _held(dims[dim])
    ]
    return held[0] if held else ()
