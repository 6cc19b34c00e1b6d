"""From an array inside a program to one number a unit, laid out like the weight.

What is reduced has the weight's rank, with size 1 for each axis that it does not keep, so that it
broadcasts against the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph import axes
from jaxeff.graph.axes import Dims
from jaxeff.numerics.meshes import by_compiler


@dataclasses.dataclass(frozen=True)
class OverAxes:
    """Reduces an array to some axes of a weight of shape `shape`, which stand in it as `dims` says."""

    dims: Dims
    kept: frozenset[int]
    shape: tuple[int, ...]

    def reduce(self, array: jax.Array, reduction: Callable[..., Any] = jnp.sum) -> Any:
        """`reduction(array, axis=tuple)` may return a tree of arrays."""
        return by_compiler(
            lambda array: axes.reduce_to_axes(self.dims, self.kept, self.shape, array, reduction), array
        )

    @property
    def count(self) -> int:
        """Elements of the array for each one that is left."""
        # Not read off the shapes: the array may hold units of other weights beside this one's.
        return math.prod(f.size for dim in self.dims for f in dim if f.axis not in self.kept)

    def spread(self, small: jax.Array, array: jax.Array) -> jax.Array:
        """The transpose of a sum: each unit's number at all of its elements of `array`."""
        (spread,) = jax.linear_transpose(self.reduce, array)(small)
        return spread


def of_emissions(site: graph.Site) -> list[OverAxes]:
    """For each emission of a site, the reduction of its value to those units."""
    return [OverAxes(emission.dims, site.unit_axes, emission.shape) for emission in site.activation.post]


def join(site: graph.Site, parts: Sequence[jax.Array]) -> jax.Array:
    """One array of all units from one for each emission: a fused layer has several.

    A scan may have put its iterations in front.
    """
    emissions = site.activation.post
    axis = emissions[0].axis
    if axis is None:
        (whole,) = parts
        return whole
    order = jnp.argsort(jnp.asarray([index for emission in emissions for index in emission.indices]))
    along = axis - len(emissions[0].shape)
    return jnp.take(jnp.concatenate(parts, along), order, along)


def fold(
    array: jax.Array, loops: Sequence[graph.Loop], reduction: Callable[..., jax.Array] = jnp.sum
) -> jax.Array:
    """Fold the leading axes that scans have added: layers become an axis of the weight, time is reduced."""
    scans = [loop for loop in loops if loop.name == "scan"]
    for position, loop in reversed(list(enumerate(scans))):
        array = reduction(array, axis=position) if loop.axis is None else _laid(array, position, loop.axis)
    return array


def _laid(array: jax.Array, position: int, axis: int) -> jax.Array:
    """Move the axis of iterations to where the weight stacks its layers, which has size 1 so far."""
    moved = jnp.moveaxis(array, position, position + axis)
    shape = list(moved.shape)
    del shape[position + axis + 1]
    return moved.reshape(shape)
