"""Labels for the indices of dimensions, and which of them stand and fall together.

Every index of every dimension of a program has a label. Two labels that are joined are removed
together. A label may be the product of two others, a major and a minor one: index 5 of a dimension of
4 x 3 is row 1, column 2, and is removed when either of them is. A label that is locked stays. Slices
and concatenations are then slices and concatenations of label arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.graph.program import Operation

IntArray = np.ndarray

_NONE = -1
# Deeper products than this are a label that is a part of itself.
DEEPEST = 32
BY_POSITION = "one element is taken by its position"
UNFIT = "reshapes that do not fit together"
# Kinds of locks that a caller who knows better may leave out. REPLAY: those that only a rebuilt module needs,
# because it computes numbers from its widths anew (1/n, 1/sqrt(d)), where a replayed program keeps them.
STATISTICS, SCALE, REPLAY = "statistics", "scale", "replay"
# Of blocks that zeros in place of their weights would not skip, which `Remaining` leaves to whoever found that they
# may go.
DEPTH = "depth"
# Of sums in a derivative, to which what a function left out adds nothing.
DERIVATIVE = "derivative"
KINDS = frozenset({STATISTICS, SCALE, REPLAY, DEPTH})
# What it means that an element is gone. MASKED: its weights are 0. ROUTED: it is an expert that its router never
# chooses, as if the expert's logit were -inf. A lock may hold for one of these only.
MASKED, ROUTED = "masked", "routed"
# What an array holds where elements are gone in the sense of ROUTED: unknown; the same as beside them; what a router
# chooses by, which may be taken as -inf; or 0.
UNKNOWN, UNIFORM, LOGIT, NOTHING = range(4)
# What is known of all numbers in an array: nothing; that none is negative, but for -inf; that all are from 0 to 1.
ANY, NONNEGATIVE, FRACTION = range(3)


class Dim(NamedTuple):
    """One dimension of an array.

    Attributes:
        factors: arrays of labels, major first, whose product the dimension is; none where its size is 1.
        zero: whether the array is 0 wherever a label of this dimension is removed and all leaves that
            hold it are set to 0 there.
        unrouted: what the array holds where a label of this dimension is an expert that its router never chooses:
            UNKNOWN, UNIFORM, LOGIT or NOTHING.
    """

    factors: tuple[IntArray, ...]
    zero: bool
    unrouted: int = UNKNOWN

    @property
    def size(self) -> int:
        return math.prod(len(factor) for factor in self.factors)


class Lock(NamedTuple):
    """Labels that stay.

    Attributes:
        during: what was being described when the lock was set: an operation, or None.
        only: MASKED or ROUTED, where the labels stay in that sense only.
    """

    reason: str
    labels: IntArray
    during: Any
    only: str | None = None


class Labels:
    """A union-find over labels, with products.

    Attributes:
        allowed: kinds of locks that are not to be set.
        locks: what was locked, in the order of the program.
        during: what is being described; each lock notes it.
        heads: of each product of data with data, the dimensions it runs over in parallel, and the others.
        choices: operations that choose entries of a dimension for each token: (operation, dim, how many).
        summed: sums to which what no router chooses adds nothing: (operation, dim, its axis in each operand).
            An operation in a loop may stand in both more than once.
    """

    def __init__(self, allowed: frozenset[str] = frozenset()):
        self.allowed = allowed
        self.locks: list[Lock] = []
        self.during: Any = None
        self.heads: list[tuple[Sequence[Dim], Sequence[Dim]]] = []
        self.choices: list[tuple[Operation, Dim, int]] = []
        self.summed: list[tuple[Operation, Dim, tuple[int, ...]]] = []
        self.colors = 0
        self._count = 0
        # Of each label: its parent, the parts of its product, the number of minor parts, its color, scratch.
        self._table = np.full((6, 1 << 12), _NONE, np.int64)

    def __len__(self) -> int:
        return self._count

    def fresh(self, size: int) -> IntArray:
        """New labels, of a color of their own."""
        start, self._count = self._count, self._count + size
        if self._count > self._table.shape[1]:
            wider = np.full((6, 2 * self._count), _NONE, np.int64)
            wider[:, :start] = self._table[:, :start]
            self._table = wider
        labels = np.arange(start, self._count)
        self._table[0, labels] = labels
        self._table[4, labels] = self.colors
        self.colors += 1
        return labels

    def dim(self, size: int, zero: bool = False, lock: str | None = None) -> Dim:
        """A dimension of new labels."""
        if size < 2:
            return Dim((), zero)
        labels = self.fresh(size)
        if lock is not None:
            self.lock(labels, lock)
        return Dim((labels,), zero)

    def find(self, labels: IntArray) -> IntArray:
        """The label that stands for all that are joined with each."""
        parent = self._table[0]
        found = parent[labels]
        while True:
            above = parent[found]
            if np.array_equal(above, found):
                parent[labels] = found
                return found
            found = above

    def lock(self, labels: IntArray, reason: str, *kinds: str, only: str | None = None) -> None:
        """Let labels stay, unless one of the lock's kinds is allowed to go."""
        if self.allowed.isdisjoint(kinds):
            self.locks.append(Lock(reason, labels, self.during, only))

    def lock_dims(self, dims: Sequence[Dim], reason: str, *kinds: str, only: str | None = None) -> None:
        for dim in dims:
            for factor in dim.factors:
                self.lock(factor, reason, *kinds, only=only)

    def same(self, one: Dim, other: Dim) -> bool:
        """Whether two dimensions have the same labels."""
        return len(one.factors) == len(other.factors) and all(
            np.array_equal(self.find(a), self.find(b))
            for a, b in zip(one.factors, other.factors, strict=True)
        )

    def color(self) -> IntArray:
        """Of every label: equal colors came into being together, and were never cut apart."""
        return self._table[4, : self._count]

    def of_all(self) -> IntArray:
        """The label that stands for each, of every label."""
        return self.find(np.arange(self._count))

    def is_product(self, found: IntArray) -> IntArray:
        return self._table[1, found] != _NONE

    def parts(self, found: IntArray) -> tuple[IntArray, IntArray]:
        """The major and minor labels of labels that are products."""
        return self._table[1, found], self._table[2, found]

    def atoms(self, labels: IntArray) -> IntArray:
        """Return the factors of which these labels are made."""
        found = np.unique(self.find(labels))
        for _ in range(DEEPEST):
            products = self.is_product(found)
            if not products.any():
                break
            parts = np.concatenate(self.parts(found[products]))
            found = np.unique(np.concatenate([found[~products], self.find(parts)]))
        return found

    def resolved(
        self, owner: IntArray, index: IntArray, found: IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Return the factors behind each index, each once, by owner and index."""
        products = self.is_product(found)
        rows = np.stack([owner, index, found])
        done, rows = [rows[:, ~products]], rows[:, products]
        for _ in range(DEEPEST):
            if not rows.shape[1]:
                break
            parts = self.find(np.concatenate(self.parts(rows[2])))
            rows = np.stack([*np.tile(rows[:2], 2), parts])
            products = self.is_product(parts)
            done.append(rows[:, ~products])
            rows = rows[:, products]
        if rows.shape[1]:
            self.lock(rows[2], "a part of itself, after a reshape")
            done.append(rows)
        owner, index, found = np.concatenate(done, axis=1)
        if len(done) > 1:
            most, many = int(index.max()) + 1, len(self)
            # Sorted, not `np.unique`, which hashes: these are nearly in order.
            key = np.sort((owner * most + index) * many + found, kind="stable")
            key = key[np.diff(key, prepend=-1) > 0]
            owner, index, found = key // many // most, key // many % most, key % many
        return owner, index, found

    def join(self, one: IntArray, other: IntArray) -> None:
        """Let the labels of two arrays stand and fall together, pair by pair."""
        if one is other:
            return
        one, other = self.find(one), self.find(other)
        differ = one != other
        if not differ.any():
            return
        one, other = one[differ], other[differ]
        structured = self.is_product(other)
        both = structured & self.is_product(one)
        parts = zip(self.parts(one[both]), self.parts(other[both]), strict=True)
        # A product stays one: its label stands for the two.
        child, root = np.where(structured, one, other), np.where(structured, other, one)
        if self._distinct(child, root):
            self._table[0, child] = root
        else:
            for pair in zip(child, root, strict=True):
                self._join_pair(*pair)
        for first, second in parts:
            self.join(first, second)

    def _distinct(self, child: IntArray, root: IntArray) -> bool:
        """Whether no child occurs twice, or among the roots."""
        seen, places = self._table[5], np.arange(len(child))
        seen[root] = _NONE
        seen[child] = places
        return np.array_equal(seen[child], places) and bool((seen[root] == _NONE).all())

    def _join_pair(self, one: int, other: int) -> None:
        one, other = (int(self.find(np.array([label]))[0]) for label in (one, other))
        if one == other:
            return
        pair = np.array([one, other])
        products = self.is_product(pair)
        child, root = (one, other) if products[1] else (other, one)
        self._table[0, child] = root
        if products.all():
            for first, second in self.parts(pair):
                self.join(np.array([first]), np.array([second]))

    def product(self, major: IntArray, minor: IntArray) -> IntArray:
        """One array of labels of two, row by row."""
        labels = self.fresh(len(major) * len(minor))
        self._describe(labels, major, minor)
        return labels

    def _describe(self, labels: IntArray, major: IntArray, minor: IntArray) -> None:
        """Say of labels that they are the products of these."""
        rows, columns = np.repeat(major, len(minor)), np.tile(minor, len(major))
        found, first = np.unique(self.find(labels), return_index=True)
        self._table[1, found], self._table[2, found] = rows[first], columns[first]
        self._table[3, found] = len(minor)
        if len(found) < len(labels):
            # Some of the labels are joined: so are then their rows and columns.
            described = self.parts(self.find(labels))
            self.join(described[0], rows)
            self.join(described[1], columns)

    def factors(self, labels: IntArray, depth: int = 0) -> list[IntArray]:
        """The arrays whose product the labels are: themselves, unless they have rows and columns."""
        found = self.find(labels)
        if depth > DEEPEST or not self.is_product(found).all():
            return [labels]
        width = int(self._table[3, found[0]])
        if len(labels) % width:
            return [labels]
        major, minor = (part.reshape(-1, width) for part in self.parts(found))
        rows, columns = self.find(major), self.find(minor)
        if (rows != rows[:, :1]).any() or (columns != columns[:1]).any():
            return [labels]
        below = self.factors(minor[0], depth + 1)
        if len(major) == 1:
            self.lock(major[0, :1], BY_POSITION)
            return below
        return [*self.factors(major[:, 0], depth + 1), *below]

    def cut(self, labels: IntArray, rows: int) -> tuple[IntArray, IntArray] | None:
        """Write labels as a product of `rows` rows and some columns; None if they cannot be written so."""
        if len(labels) % rows or self.is_product(self.find(labels)).any():
            return None
        major, minor = self.fresh(rows), self.fresh(len(labels) // rows)
        self._describe(labels, major, minor)
        return major, minor

    def packed(self, dim: Dim) -> IntArray:
        """A dimension as one array of labels."""
        if not dim.factors:
            labels = self.fresh(1)
            self.lock(labels, BY_POSITION)
            return labels
        *majors, labels = dim.factors
        for major in reversed(majors):
            labels = self.product(major, labels)
        return labels

    def taken(self, dim: Dim, indices: IntArray) -> Dim:
        """Some of the indices of a dimension."""
        if len(indices) == dim.size and (indices == np.arange(dim.size)).all():
            return dim
        if len(indices) < 2:
            # Without its neighbors before it, the position would be another.
            self.lock_dims([dim], BY_POSITION)
            return Dim((), dim.zero)
        labels = self.packed(dim)[indices]
        factors = self.factors(labels)
        if len(factors) == 1 and self.is_product(self.find(factors[0])).any():
            self.lock(labels, "a slice through a reshaped dimension")
        if len(factors) < len(dim.factors):
            self.lock(dim.factors[0], BY_POSITION)
        for factor in factors:
            self._colored(factor)
        return dim._replace(factors=tuple(factors))

    def _colored(self, labels: IntArray) -> None:
        """Cut some labels off from those that they came into being with."""
        _, colors = np.unique(self._table[4, labels], return_inverse=True)
        self._table[4, labels] = self.colors + colors
        self.colors += int(colors.max()) + 1

    def concatenated(self, dims: Sequence[Dim]) -> Dim:
        labels = np.concatenate([self.packed(dim) for dim in dims])
        return Dim((labels,), all(dim.zero for dim in dims))

    def match_all(self, dims: Sequence[Dim]) -> Dim:
        """All of them joined: one element after the other; 0 where all are."""
        tied = dims[0]
        for other in dims[1:]:
            tied = self.match(tied, other)
        return tied._replace(
            zero=all(dim.zero for dim in dims), unrouted=shared(dim.unrouted for dim in dims)
        )

    def match(self, one: Dim, other: Dim) -> Dim:
        """Let two dimensions of equal size stand and fall together; the first, cut as both need it."""
        if all(a is b for a, b in zip(one.factors, other.factors, strict=False)) and one.size == other.size:
            return one
        left, right = list(one.factors), list(other.factors)
        matched: list[IntArray] = []
        while left and right:
            a, b = self._first(left), self._first(right)
            size = min(len(a), len(b))
            a, b = self._rows(a, size, left), self._rows(b, size, right)
            if a is None or b is None:
                self.lock_dims([one, other], UNFIT)
                return one
            self.join(a, b)
            matched.append(a)
        return one._replace(factors=tuple(matched))

    def regrouped(self, dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim] | None:
        """Dimensions reshaped to others; None where their factors do not allow it."""
        left = [factor for dim in dims for factor in dim.factors]
        sources = [dim for dim in dims for _ in dim.factors]
        # Which old dimensions a new one is made of: by their position among all elements, major first.
        ends = np.cumprod([len(factor) for factor in left], dtype=int)
        starts = np.concatenate([[1], ends])[: len(ends)]
        regrouped, passed = [], 1
        for size in sizes:
            factors: list[IntArray] = []
            needed = size
            while needed > 1:
                if not left:
                    return None
                first = self._first(left)
                part = self._rows(first, min(needed, len(first)), left)
                if part is None or needed % len(part):
                    return None
                factors.append(part)
                needed //= len(part)
            touched = [
                dim
                for dim, start, end in zip(sources, starts, ends, strict=True)
                if start < passed * size and end > passed
            ]
            passed *= size
            zero = all(dim.zero for dim in touched) and bool(touched)
            regrouped.append(Dim(tuple(factors), zero, shared(dim.unrouted for dim in touched)))
        return None if left else regrouped

    def _first(self, factors: list[IntArray]) -> IntArray:
        """Take the first factor, as fine as it has been cut anywhere."""
        first, *rest = self.factors(factors.pop(0))
        factors[:0] = rest
        return first

    def _rows(self, labels: IntArray, rows: int, rest: list[IntArray]) -> IntArray | None:
        """The rows of labels; their columns are put back before the rest."""
        if len(labels) == rows:
            return labels
        pieces = self.cut(labels, rows)
        if pieces is None:
            return None
        rest.insert(0, pieces[1])
        return pieces[0]


def shared(states: Iterable[int]) -> int:
    """What arrays hold in common where an expert is not chosen."""
    found = set(states)
    return found.pop() if len(found) == 1 else UNKNOWN


CONSTANT, WEIGHT, DATA = range(3)


class Positions(NamedTuple):
    """What an array of whole numbers counts: positions along a dimension, none of them one that a router leaves out.

    Attributes:
        operation: which counted them.
        shifted: whether something was added to them, as for positions from the end.
    """

    dim: Dim
    operation: Any
    shifted: bool = False


class Described(NamedTuple):
    """What is known of one array.

    Attributes:
        dims: one for each dimension.
        made_of: CONSTANT; WEIGHT, of leaves and constants; or DATA.
        zero: whether it is 0 everywhere.
        sign: ANY, NONNEGATIVE or FRACTION.
        positions: what it counts; of index vectors along the last dimension, what each of their numbers does.
    """

    dims: tuple[Dim, ...]
    made_of: int
    zero: bool = False
    sign: int = ANY
    positions: tuple[Positions | None, ...] = ()


Rule = Callable[[Labels, Operation, Sequence[Described]], list[tuple[Dim, ...]] | None]
"""The dimensions of each output; None for an operation that it does not know."""
