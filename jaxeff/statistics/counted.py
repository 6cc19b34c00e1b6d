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
from jaxeff.graph.batch_axes import BatchAxes, Standing, UnclearError
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
    def of(cls, found: graph.Graph, origins: Sequence[str], where: jax.Array) -> Counted:
        """Take the leading axes of every batch array that has the mask's shape there, or its number of examples."""
        inputs = found.program.inputs
        of_batch = [False] * len(found.leaves) + [origin == "batch" for origin in origins]
        axes = [
            _shared(value.shape, where.shape) if batch else 0
            for value, batch in zip(inputs, of_batch, strict=True)
        ]
        if where.ndim not in (1, 2) or where.ndim not in axes:
            shapes = ", ".join(
                str(value.shape) for value, batch in zip(inputs, of_batch, strict=True) if batch
            )
            raise ValueError(
                f"`where` has shape {where.shape}, which must be the first one or two axes of an array of `batch`: "
                f"examples, or examples and positions; got {shapes}"
            )
        return cls(where, BatchAxes(found.program, len(found.leaves), axes, where.shape))

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


def _shared(shape: Sequence[int], mask: Sequence[int]) -> int:
    """Return how many leading axes an array shares with the mask."""
    if tuple(shape[: len(mask)]) == tuple(mask):
        return len(mask)
    return int(tuple(shape[:1]) == tuple(mask[:1]))


def cleared(array: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Return the array, 0 where it does not count."""
    if counts is None:
        return array
    return by_compiler(lambda array, counts: jnp.where(counts, array, 0), array, counts, like=array)


def number(elements: int, counts: jax.Array | None) -> int | jax.Array:
    """Return how many of so many elements count, of which every part of the mask has equally many."""
    return elements if counts is None else jnp.sum(counts) * (elements // math.prod(counts.shape))
