"""What a program costs, as a function of how many elements each group keeps.

The multiply-accumulates of a contraction, and the numbers in a leaf, are products over dimensions. A dimension is as
long as it has indices that stay, and an index stays if every element that its label is made of does. So each of
these costs is a polynomial in the sizes of the groups, and no smaller program has to be traced to know it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import numpy as np
from jax.extend.core import Literal

from jaxeff.graph.contractions import multiplications
from jaxeff.graph.coupling_labels import DATA, Described, Dim, IntArray, Labels
from jaxeff.graph.coupling_stacks import GroupsIn
from jaxeff.graph.program import Operation, Program, Value, scan_operands

Term = tuple[tuple[int, int], ...]
"""A product of differences, each of the size of a group and a number: (group, number)."""
Polynomial = Mapping[Term, float]
_ONE: Polynomial = {(): 1.0}
_MOST = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Amount:
    """A polynomial in the sizes of groups, to be evaluated for many sizes at once.

    Attributes:
        coefficients: [terms].
        factors: [terms, factors of a term]: rows of `bases`; 0 stands for 1.
        bases: [n, 2]: (group, number); the first is unused.
    """

    coefficients: np.ndarray
    factors: np.ndarray
    bases: np.ndarray

    @classmethod
    def of(cls, polynomial: Polynomial) -> Amount:
        bases = [(-1, 0), *sorted({base for term in polynomial for base in term})]
        row = {base: number for number, base in enumerate(bases)}
        factors = np.zeros((len(polynomial), max(map(len, polynomial), default=0)), int)
        for number, term in enumerate(polynomial):
            factors[number, : len(term)] = [row[base] for base in term]
        return cls(np.array([*polynomial.values()], float), factors, np.array(bases))

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """[...], given the sizes of all groups, [groups, ...]."""
        sizes = np.asarray(sizes, float)
        columns = sizes.reshape(len(sizes), -1)
        # A part at a time, since the products of all terms stand side by side.
        width = max(1, _MOST // max(1, len(self.coefficients)))
        starts = range(0, max(1, columns.shape[1]), width)
        parts = [self._values(columns[:, start : start + width]) for start in starts]
        return np.concatenate(parts).reshape(sizes.shape[1:])

    def _values(self, sizes: np.ndarray) -> np.ndarray:
        bases = np.ones((len(self.bases), sizes.shape[1]))
        bases[1:] = sizes[self.bases[1:, 0]] - self.bases[1:, 1:]
        products = np.repeat(self.coefficients[:, None], sizes.shape[1], axis=1)
        for factor in self.factors.T:
            products *= bases[factor]
        return products.sum(axis=0)


class Counts:
    """Counts the indices of dimensions that stay.

    Args:
        of_label: the group of each label whose elements may be removed; -1 for every other label.
        sizes: of the groups.
    """

    def __init__(self, labels: Labels, of_label: np.ndarray, sizes: Sequence[int]):
        self.sizes = sizes
        self._labels, self._of_label = labels, of_label
        # Labels are kept, so that no others have their id.
        self._known: dict[int, tuple[IntArray, Polynomial]] = {}

    def __call__(self, dims: Iterable[Dim]) -> Polynomial:
        """How many numbers an array of these dimensions holds."""
        return _product(self._of(labels) for dim in dims for labels in dim.factors)

    def largest(self, polynomial: Polynomial) -> float:
        """The value while no group has lost an element."""
        return sum(value * _at(self.sizes, term) for term, value in polynomial.items())

    def _of(self, labels: IntArray) -> Polynomial:
        known = self._known.get(id(labels))
        if known is None:
            known = self._known[id(labels)] = labels, self._counted(labels)
        return known[1]

    def _counted(self, labels: IntArray) -> Polynomial:
        rows, numbers = np.unique(self._groups_of_each(labels), axis=0, return_counts=True)
        counted: dict[Term, float] = collections.defaultdict(float)
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            # Pairs of different elements of one group: size x (size - 1), and not the square of the size.
            times = collections.Counter(group for group in row if group >= 0)
            term = tuple((group, less) for group in sorted(times) for less in range(times[group]))
            counted[term] += number / _at(self.sizes, term)
        return counted

    def _groups_of_each(self, labels: IntArray) -> np.ndarray:
        """[indices, m]: the groups of all that each label is made of."""
        found, index = self._labels.find(labels), np.arange(len(labels))
        if not self._labels.is_product(found).any():
            return self._of_label[found][:, None]
        _, index, atoms = self._labels.resolved(np.zeros_like(index), index, found)
        order = np.argsort(index, kind="stable")
        index, groups = index[order], self._of_label[atoms[order]]
        place = np.arange(len(index)) - np.searchsorted(index, index)
        table = np.full((len(labels), int(place.max()) + 1), -1)
        table[index, place] = groups
        return np.sort(table, axis=1)


def macs(
    program: Program,
    described: Mapping[Value, Described],
    counts: Counts,
    block_of: Mapping[Operation, int],
) -> Polynomial:
    """The multiply-accumulates: of one iteration of each `while`, and of the branch of each `cond` that has most."""

    def of(operation: Operation) -> Polynomial:
        found = multiplications(operation)
        if found is None or not found.macs:
            return {}
        product = counts(_multiplied(operation, described))
        return scaled(product, found.macs / counts.largest(product))

    return _over(program, described, counts, block_of, of)


def _multiplied(operation: Operation, described: Mapping[Value, Described]) -> list[Dim]:
    """The dimensions whose product the multiply-accumulates are, but for windows and positions of convolutions."""
    left, right = (_dims(operand, described) for operand in operation.inputs[:2])
    output, params = _dims(operation.outputs[0], described), operation.params
    if operation.name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        return [output[numbers.out_spec[0]], output[numbers.out_spec[1]], right[numbers.rhs_spec[1]]]
    if operation.name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        met = {*contracted, *batch, *numbers.rhs_group_dimensions}
        return [*left, *(dim for axis, dim in enumerate(right) if axis not in met)]
    (contracted, _), _ = params["dimension_numbers"]
    return [*output, *(left[axis] for axis in contracted)]


def key_value_cache(
    program: Program,
    described: Mapping[Value, Described],
    counts: Counts,
    block_of: Mapping[Operation, int],
    groups_in: GroupsIn,
    leaves_of: Sequence[Set[int]],
    heads: Set[int],
    head_sizes: Set[int],
) -> Polynomial:
    """How many numbers a cache of keys and values holds for each position.

    Args:
        block_of: the variable of each operation that is part of a block.
        leaves_of: the leaves that hold each group.
        heads, head_sizes: groups whose elements are heads, and the numbers within one.
    """

    def of(operation: Operation) -> Polynomial:
        operands = [described[each] for each in operation.inputs if isinstance(each, Value)]
        if operation.name != "dot_general" or any(operand.made_of != DATA for operand in operands):
            return {}
        (contracted, _), (batch, _) = operation.params["dimension_numbers"]
        output = _dims(operation.outputs[0], described)
        # Queries and keys are summed over the size of their heads; that of values is left.
        rest = [*(operands[0].dims[axis] for axis in contracted), *output[len(batch) :]]
        sizes = [dim for dim in rest if groups_in([dim]) & head_sizes]
        if len(sizes) != 1:
            return {}
        held = set().union(*(leaves_of[group] for group in groups_in(sizes) & head_sizes))
        own = _in_all(held, leaves_of, heads)
        parallel = (labels for dim in output[: len(batch)] for labels in dim.factors)
        return counts([*sizes, *(Dim((labels,), False) for labels in parallel if groups_in.of(labels) & own)])

    return _over(program, described, counts, block_of, of)


def _in_all(leaves: Set[int], leaves_of: Sequence[Set[int]], heads: Set[int]) -> set[int]:
    """The heads in all of these leaves that have any: not the query heads that share a key, which it has not."""
    with_heads = leaves & set().union(*(leaves_of[head] for head in heads))
    return {head for head in heads if with_heads <= leaves_of[head]}


def _over(
    program: Program,
    described: Mapping[Value, Described],
    counts: Counts,
    block_of: Mapping[Operation, int],
    of: Callable[[Operation], Polynomial],
) -> Polynomial:
    """The sum over all operations of a program, as often as they run."""
    found = []
    for operation in program.operations:
        bodies = [_over(body, described, counts, {}, of) for body in operation.bodies]
        if operation.name == "scan":
            bodies = [_times(_length(operation, described, counts), bodies[0])]
        elif operation.name == "cond":
            bodies = [max(bodies, key=counts.largest)]
        found += [gated(each, block_of.get(operation)) for each in (of(operation), *bodies)]
    return total(found)


def _length(operation: Operation, described: Mapping[Value, Described], counts: Counts) -> Polynomial:
    """How often a scan runs its body: once for each block that stays."""
    constants, carried = scan_operands(operation)
    scanned = operation.inputs[constants + carried :]
    return counts(_dims(scanned[0], described)[:1]) if scanned else {(): float(operation.params["length"])}


def _dims(operand: Value | Literal, described: Mapping[Value, Described]) -> Sequence[Dim]:
    return described[operand].dims if isinstance(operand, Value) else ()


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    result: dict[Term, float] = collections.defaultdict(float)
    for polynomial in polynomials:
        for term, value in polynomial.items():
            result[term] += value
    return result


def gated(polynomial: Polynomial, variable: int | None) -> Polynomial:
    """The polynomial times a variable."""
    return polynomial if variable is None else _times(polynomial, {((variable, 0),): 1.0})


def scaled(polynomial: Polynomial, scale: float) -> Polynomial:
    return {term: value * scale for term, value in polynomial.items()}


def _product(polynomials: Iterable[Polynomial]) -> Polynomial:
    return functools.reduce(_times, polynomials, _ONE)


def _times(one: Polynomial, other: Polynomial) -> Polynomial:
    result: dict[Term, float] = collections.defaultdict(float)
    for (term, value), (more, factor) in itertools.product(one.items(), other.items()):
        result[tuple(sorted((*term, *more)))] += value * factor
    return result


def _at(sizes: Sequence[int], term: Term) -> int:
    return math.prod(sizes[group] - less for group, less in term)
