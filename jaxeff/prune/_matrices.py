"""Each weight as the matrices that its products read, with the second moments of their inputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from jaxeff.model.params import Params
from jaxeff.numerics.meshes import by_compiler
from jaxeff.prune._layouts import Axes
from jaxeff.statistics import Statistics
from jaxeff.statistics.second_moments import over_uses


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How a weight is the matrix that its product reads, one for each layer that it stacks.

    Attributes:
        shape: of the weight.
        axes: what the axes of the weight index.
    """

    shape: tuple[int, ...]
    axes: Axes

    @property
    def inputs(self) -> int:
        return math.prod(self.shape[axis] for axis in self.axes.inputs or ())

    @property
    def units(self) -> int:
        return math.prod(self.shape[axis] for axis in self.axes.units or ())

    def of(self, weight: Array) -> Array:
        """[layers, inputs, units], of an array of the weight's shape."""
        return jnp.transpose(weight, self._order).reshape(-1, self.inputs, self.units)

    def back(self, matrices: Array) -> Array:
        """An array of the weight's shape, of [layers, inputs, units]."""
        moved = matrices.reshape([self.shape[axis] for axis in self._order])
        return jnp.transpose(moved, [self._order.index(axis) for axis in range(len(self._order))])

    @property
    def _order(self) -> list[int]:
        known = (*self.axes.layers, *(self.axes.inputs or ()), *(self.axes.units or ()))
        return [*known, *(axis for axis in range(len(self.shape)) if axis not in known)]

    def each(self, function: Callable[..., Any], moments: Array, *arrays: Array, rows: Any = ()) -> Any:
        """`function(moments, *matrices, *rows)` of one layer after the other, as arrays of the weight's shape.

        Args:
            function: returns an array [inputs, units], or a tuple of such.
            moments: [layers, inputs, inputs].
            arrays: of the weight's shape; results lie on devices as the first does.
            rows: arrays with the layers in front.
        """

        def whole(moments: Array, *arrays: Array) -> Any:
            # One at a time, so that what a layer needs beside its weights exists once.
            found = lax.map(lambda given: function(*given), (moments, *map(self.of, arrays), *rows))
            return jax.tree.map(self.back, found)

        return by_compiler(whole, moments, *arrays, like=arrays[0])


def read(path: str, leaf: Any, statistics: Statistics, axes: Axes | None) -> tuple[Matrix, Array]:
    """A weight's matrices, and their second moments over all its uses, [layers, inputs, inputs].

    Raises:
        ValueError: the statistics have none, or they are not finite.
    """
    found = over_uses([site for site in statistics.sites if site.path == path])
    if isinstance(found, str) or axes is None:
        raise ValueError(
            f"`statistics` have no second moments for {path!r}, as {found}: leave it out with `prunable`, or give it "
            "the mask True"
        )
    total = functools.reduce(jnp.add, found)
    # No product of two inputs is larger than the larger of their squares.
    squares = jnp.diagonal(total, axis1=-2, axis2=-1)
    if not isinstance(squares, Tracer) and not bool(jnp.all(jnp.isfinite(squares))):
        raise ValueError(
            f"the second moments of {path!r} hold nan or infinity: some of its inputs do, or are too large to be "
            "squared. Leave these examples out with `where`"
        )
    return Matrix(tuple(jnp.shape(leaf)), axes), total.reshape(-1, *total.shape[-2:])


def normalized(moments: Array) -> Array:
    """[inputs, inputs], over the mean of its diagonal."""
    # Divided before they are summed, so that large numbers do not overflow.
    mean = jnp.trace(moments / len(moments))
    return moments / jnp.where(mean > 0, mean, 1)


def damped(moments: Array, damping: float | Array) -> Array:
    """Normalized moments plus damping on the diagonal.

    An input that was always 0 has the damping alone, and its weights count for next to nothing.
    """
    return normalized(moments) + damping * jnp.eye(len(moments), dtype=moments.dtype)


def check_damping(damping: float) -> None:
    if not 0 < damping < math.inf:
        raise ValueError(
            f"`damping` must be positive and finite, got {damping}: a fraction of the mean of the diagonal, such as "
            "0.01"
        )


def check_finite(path: str, weight: Array, damping: float) -> None:
    if not isinstance(weight, Tracer) and not bool(jnp.all(jnp.isfinite(weight))):
        raise ValueError(
            f"the weights of {path!r} are no longer finite: they held nan or infinity to begin with, or `damping` "
            f"{damping} is too small for second moments that are nearly singular"
        )


def rebuilt(params: Any, leaves: Mapping[str, Any], others: Callable[[Any], Any]) -> Any:
    """A tree like `params`: these leaves by path, and of all others what the function makes of them."""
    own = Params.of(params)
    found = [leaves[path] if path in leaves else others(leaf) for path, leaf in own.named.items()]
    tree = jax.tree.unflatten(jax.tree.structure(own.tree), found)
    return {**jax.tree.map(others, dict(params)), "params": tree} if own.is_variables else tree
