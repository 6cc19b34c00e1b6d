"""Mean and spread of each input of a weight, of one run.

In: a site, and its input while the program runs. Out: a mean and a sum of squares of each input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.numerics.precision import widened
from jaxeff.statistics.units import OverAxes, fold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deviations:
    """Mean of some numbers, and the sum of their squared deviations from it. Equal numbers have exactly 0.

    Attributes:
        count: of the numbers; 0 where there were none.
        mean, squares: in the layout of a weight, with size 1 on all axes but those of its inputs.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array

    @property
    def variance(self) -> jax.Array:
        return self.squares / jnp.maximum(self.count, 1)

    def __add__(self, other: Deviations) -> Deviations:
        """Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + jnp.square(apart) * self.count * share
        return Deviations(count, self.mean + apart * share, squares)


def of_inputs(site: graph.Site, shape: tuple[int, ...], array: jax.Array) -> Deviations:
    """Return the deviations of a site's inputs, in the layout of its weight of this shape."""
    over = OverAxes(site.input_dims, site.input_axes, shape)
    mean, squares = over.reduce(widened(array), _mean_and_squares)
    return Deviations(jnp.full((1,) * len(shape), over.count, mean.dtype), mean, squares)


def _mean_and_squares(array: jax.Array, axis: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    # From the first number on, so that equal numbers leave no rounding.
    first = array[tuple(slice(0, 1) if i in axis else slice(None) for i in range(array.ndim))]
    shifted = array - first
    mean = jnp.mean(shifted, axis, keepdims=True)
    return jnp.squeeze(first + mean, axis), jnp.sum(jnp.square(shifted - mean), axis)


def over_iterations(seen: Deviations, loops: Sequence[graph.Loop]) -> Deviations:
    """Fold the leading axes that scans have added: layers become an axis of the weight, iterations in time add up."""
    scans = [loop for loop in loops if loop.name == "scan"]
    for position in reversed(range(len(scans))):
        if scans[position].axis is None:
            seen = _joined(seen, position)
    layers = [loop for loop in scans if loop.axis is not None]
    return jax.tree.map(lambda sums: fold(sums, layers), seen)


def _joined(parts: Deviations, axis: int) -> Deviations:
    """Add up the parts that lie along an axis."""
    count = jnp.sum(parts.count, axis)
    first = jnp.take(parts.mean, 0, axis)
    shifted = parts.mean - jnp.expand_dims(first, axis)
    mean = jnp.sum(parts.count * shifted, axis) / jnp.maximum(count, 1)
    apart = jnp.square(shifted - jnp.expand_dims(mean, axis))
    return Deviations(count, first + mean, jnp.sum(parts.squares + parts.count * apart, axis))
