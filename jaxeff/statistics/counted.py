"""Which examples and positions of a batch count: a mask, laid along each array that is summed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph.axes import Dims
from jaxeff.graph.batch_axes import Axes, BatchAxes, Standing, UnclearError
from jaxeff.graph.program import Value
from jaxeff.numerics.meshes import by_compiler


class Place(NamedTuple):
    """What is known of a value that is summed.

    Attributes:
        what: names it in messages.
        dims: where the axes of a weight stand in it.
        kept: those of them that are not summed over.
        loops: around it.
        ignored: dimensions that belong to each of its elements, such as the positions that a head attends to.
    """

    what: str
    dims: Dims
    kept: frozenset[int] = frozenset()
    loops: Sequence[graph.Loop] = ()
    ignored: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """The mask of a batch, and where its axes stand in the values of the program.

    Attributes:
        where: [n] or [n, length], True = counts.
    """

    where: jax.Array
    axes: BatchAxes

    @classmethod
    def of(cls, found: graph.Graph, where: jax.Array, axes: Sequence[Axes]) -> Counted:
        """Follow the mask through the program, from the inputs beside the leaves, whose axes are given."""
        of_leaves = [(None,) * len(leaf.shape) for leaf in found.leaves]
        number_of_leaves = len(found.leaves)
        return cls(where, BatchAxes(found.program, number_of_leaves, [*of_leaves, *axes], where.shape))

    def standing(self, value: Value, place: Place) -> Standing | None:
        """Return how the mask lies along a value; None if the value does not depend on the batch."""
        in_time = any(
            loop.name == "while" or (loop.name == "scan" and loop.axis is None) for loop in place.loops
        )
        if in_time and self.where.ndim > 1:
            raise self._refused(place, "a loop runs over it, and may run over positions")
        units = [i for i, dim in enumerate(place.dims) if any(f.axis in place.kept for f in dim)]
        try:
            return self.axes.standing(value, units, place.ignored)
        except UnclearError as error:
            raise self._refused(place, str(error)) from None

    def _refused(self, place: Place, why: str) -> ValueError:
        return ValueError(
            f"`where` does not say which values of {place.what} count: {why}. Pass a batch without padding instead"
        )


def mask_axes(
    shapes: Sequence[Sequence[int]], origins: Sequence[str], mask: Sequence[int]
) -> tuple[Axes, ...]:
    """Return the axis of the mask that each dimension of each input is: the leading ones of those of the batch.

    An array of the batch has the mask's shape there, or at least its number of examples.

    Raises:
        ValueError: none has.
    """
    of_batch = [tuple(shape) for shape, origin in zip(shapes, origins, strict=True) if origin == "batch"]
    if len(mask) not in (1, 2) or not any(shape[: len(mask)] == tuple(mask) for shape in of_batch):
        raise ValueError(
            f"`where` has shape {tuple(mask)}, which must be the first one or two axes of an array of `batch`: "
            f"examples, or examples and positions; got {', '.join(map(str, of_batch))}"
        )

    def leading(shape: Sequence[int], origin: str) -> Axes:
        both = tuple(shape[: len(mask)]) == tuple(mask)
        count = 0 if origin != "batch" else len(mask) if both else int(tuple(shape[:1]) == tuple(mask[:1]))
        return (*range(count), *(None,) * (len(shape) - count))

    return tuple(map(leading, shapes, origins))


def cleared(array: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Return the array, 0 where it does not count."""
    if counts is None:
        return array
    return by_compiler(lambda array, counts: jnp.where(counts, array, 0), array, counts, like=array)


def number(elements: int, counts: jax.Array | None) -> int | jax.Array:
    """Return how many of an array's elements count; each element of the mask stands for equally many of them."""
    return elements if counts is None else jnp.sum(counts) * (elements // math.prod(counts.shape))
