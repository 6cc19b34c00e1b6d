"""Where the leading axes of the batch stand in every value of a program: its examples and their positions.

The labels of `coupling` follow each index of these axes through the program. A value whose dimensions hold the same
labels in some order has the same examples and positions in that order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.graph.coupling import Walk
from jaxeff.graph.coupling_labels import DATA, WEIGHT, Described, Dim, IntArray, Labels
from jaxeff.graph.program import Program, Value

_EXAMPLES, _POSITIONS = 0, 1
Axes = tuple[int | None, ...]


class UnclearError(ValueError):
    """It cannot be told which examples and positions the elements of a value belong to."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One factor of a dimension.

    Attributes:
        axis: of the mask, cut into its factors; None for an index of anything else.
        indices: along that axis; None for all of them, in order.
    """

    size: int
    axis: int | None = None
    indices: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a mask of examples, [n], or of positions, [n, length], lies along an array.

    Attributes:
        dims: the factors of each dimension of the array, major first.
        sizes: into which the mask is cut before it is laid out.
        examples_only: whether the array has no positions, and counts the examples with any position that counts.
    """

    dims: tuple[tuple[Part, ...], ...]
    sizes: tuple[int, ...]
    examples_only: bool

    def lay(self, mask: jax.Array) -> jax.Array:
        """Return the mask along the array: its size, or 1, in each dimension."""
        if self.examples_only and mask.ndim > 1:
            mask = jnp.any(mask, _POSITIONS)
        parts = [part for dim in self.dims for part in dim if part.axis is not None]
        axes = [part.axis for part in parts if part.axis is not None]
        laid = jnp.transpose(mask.reshape(self.sizes), axes)
        for i, part in enumerate(parts):
            laid = laid if part.indices is None else jnp.take(laid, np.asarray(part.indices), i)
        shape = [1 if part.axis is None else part.size for dim in self.dims for part in dim]
        full = [
            part.size if any(other.axis is not None for other in dim) else 1
            for dim in self.dims
            for part in dim
        ]
        merged = [
            math.prod(part.size for part in dim) if any(part.axis is not None for part in dim) else 1
            for dim in self.dims
        ]
        return jnp.broadcast_to(laid.reshape(shape), full).reshape(merged)


class BatchAxes:
    """The examples and positions of a batch in the values of a program.

    Args:
        program: a traced function, flattened.
        leaves: how many of its inputs are weights, the first of them.
        axes: of each of its inputs, the axis of the mask that each dimension is; None where it is another.
        shape: of the mask: [n] or [n, length].
    """

    def __init__(self, program: Program, leaves: int, axes: Sequence[Axes], shape: Sequence[int]):
        self._labels = Labels()
        self._positions = len(shape) > 1
        own = [self._labels.dim(size, True) for size in shape]
        inputs = []
        for i, (value, along) in enumerate(zip(program.inputs, axes, strict=True)):
            dims = [
                self._labels.dim(size, True) if axis is None else own[axis]
                for size, axis in zip(value.shape, along, strict=True)
            ]
            inputs.append(Described(tuple(dims), WEIGHT if i < leaves else DATA))
        self._walk = Walk(self._labels)
        _ = self._walk.run(program, inputs)
        # Each axis as the finest factors into which the program has cut it anywhere.
        self._factors = [self._finest(dim) for dim in own]
        flat = [factor for factors in self._factors for factor in factors]
        self._sizes = tuple(len(factor) for factor in flat)
        self._places = {
            int(label): (axis, index)
            for axis, factor in enumerate(flat)
            for index, label in enumerate(factor)
        }
        self._distinct = len(self._places) == sum(self._sizes)

    def _finest(self, dim: Dim) -> list[IntArray]:
        return [self._labels.find(part) for factor in dim.factors for part in self._labels.factors(factor)]

    def axes(self, value: Value) -> Axes:
        """Return the axis of the mask that each dimension of a value is, whole and in order."""
        described = self._walk.described[value]
        owners = [axis for axis, factors in enumerate(self._factors) for _ in factors]
        if not self._distinct or len({*owners}) < len(owners):
            return (None,) * len(described.dims)
        return tuple(self._axis(dim, owners) for dim in described.dims)

    def _axis(self, dim: Dim, owners: Sequence[int]) -> int | None:
        factors = self._finest(dim)
        if len(factors) != 1:
            return None
        places = [self._places.get(label) for label in factors[0].tolist()]
        first = places[0]
        if first is None or places != [(first[0], index) for index in range(self._sizes[first[0]])]:
            return None
        return owners[first[0]]

    def standing(self, value: Value, units: Sequence[int], ignored: Sequence[int] = ()) -> Standing | None:
        """Return how the mask lies along a value; None for one made without data that has no examples.

        Args:
            units: dimensions that are not summed over.
            ignored: dimensions along which the mask does not lie, even if they are examples or positions.

        Raises:
            UnclearError: it cannot be told.
        """
        described = self._walk.described[value]
        try:
            return self._standing(value, described, units, ignored)
        except UnclearError:
            if described.made_of == DATA:
                raise
            return None

    def _standing(
        self, value: Value, described: Described, units: Sequence[int], ignored: Sequence[int]
    ) -> Standing:
        if not self._distinct:
            raise UnclearError("examples or positions are mixed with each other")
        dims = tuple(
            (Part(size),) if i in ignored else self._parts(dim, size)
            for i, (dim, size) in enumerate(zip(described.dims, value.shape, strict=True))
        )
        if any(part.axis is not None for i in units for part in dims[i]):
            raise UnclearError("its units are examples or positions")
        found = sorted(part.axis for dim in dims for part in dim if part.axis is not None)
        of_examples = [*range(len(self._factors[_EXAMPLES]))]
        if found == [*range(len(self._sizes))]:
            return Standing(dims, self._sizes, False)
        others = [size for i, size in enumerate(value.shape) if i not in (*units, *ignored)]
        without = math.prod(others) == math.prod(
            part.size for dim in dims for part in dim if part.axis is not None
        )
        if found == of_examples and self._positions and without:
            return Standing(dims, self._sizes[: len(found)], True)
        raise UnclearError(
            "not each of its elements belongs to one example" + " and one position" * self._positions
        )

    def _parts(self, dim: Dim, size: int) -> tuple[Part, ...]:
        factors = self._finest(dim)
        return tuple(map(self._part, factors)) if factors else (Part(size),)

    def _part(self, labels: IntArray) -> Part:
        places = [self._places.get(label) for label in labels.tolist()]
        known = {place[0] for place in places if place is not None}
        if not known:
            return Part(len(labels))
        if None in places or len(known) > 1:
            raise UnclearError("a dimension holds positions beside something else")
        (axis,) = known
        indices = tuple(place[1] for place in places if place is not None)
        whole = indices == tuple(range(self._sizes[axis]))
        return Part(len(labels), axis, None if whole else indices)
