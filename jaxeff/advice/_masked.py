"""The loss of each example with some weights, units and blocks at 0: one program for all that a search tries.

Which weights and elements go are arrays, so that no candidate compiles anything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.objective import Arrays, Objective
from jaxeff.numerics.meshes import laid_like
from jaxeff.numerics.precision import widened
from jaxeff.prune._groups import Group
from jaxeff.prune._plans import laid_out


@dataclasses.dataclass(frozen=True)
class Removable:
    """What may go, as far as it is static. Leaves are numbered through `params` and then the model's inputs.

    Attributes:
        weights: leaf of each weight, and the axes over which it stacks layers.
        members: for each group, leaf, axis and block axes of each of its members.
    """

    weights: tuple[tuple[int, tuple[int, ...]], ...]
    members: tuple[tuple[tuple[int, int, tuple[int, ...]], ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Removed:
    """What goes.

    Attributes:
        orders: for each weight, the position of each of its numbers in the order of its layer.
        counts: [layers], how many go first in each layer.
        indices: for each member of each group, [size, m]: the indices that each element holds.
        elements: for each group, [*blocks, size]: True for elements that go.
    """

    orders: list[Any]
    counts: Any
    indices: list[list[Any]]
    elements: list[Any]


Measure = Callable[[Removable, Removed], tuple[float, float]]
"""The mean loss without what is removed, and a bound that has to stay within the tolerance."""


def group_members(group: Group, leaves: dict[str, int]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    return tuple((leaves[member.path], member.axis, member.block_axes) for member in group.members)


@functools.partial(jax.jit, static_argnums=(0, 1))
def example_losses(
    objective: Objective, removable: Removable, params: Any, arrays: Arrays, removed: Removed
) -> jax.Array:
    """Return [examples], the loss of each example; [] if the loss is a mean."""
    assert objective.loss is not None, "advice is given by a loss"
    params, inputs = _zeroed(removable, params, arrays.inputs, removed)
    outputs = objective.function(params, inputs)[0]
    losses = widened(objective.loss(outputs, (arrays.targets, arrays.constants))[0])
    return jnp.mean(losses, axis=tuple(range(1, losses.ndim)))


@functools.partial(jax.jit, static_argnums=0)
def zeroed(removable: Removable, params: Any, inputs: Any, removed: Removed) -> tuple[Any, Any]:
    """Return params and the model's inputs, which hold its state, with 0 where something goes."""
    return _zeroed(removable, params, inputs, removed)


@functools.partial(jax.jit, static_argnums=0)
def kept(stacks: tuple[tuple[int, ...], ...], orders: list[jax.Array], counts: Any) -> list[jax.Array]:
    """Return masks, True = kept, that remove a given number of the lowest-scored weights of each layer."""
    starts = np.cumsum([0, *(_rows(order, axes) for order, axes in zip(orders, stacks, strict=True))])
    each = zip(orders, stacks, starts[:-1].tolist(), strict=True)
    return [order >= _of_layers(counts, start, order, axes) for order, axes, start in each]


def _zeroed(removable: Removable, params: Any, inputs: Any, removed: Removed) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten((params, inputs))
    starts = np.cumsum([0, *(_rows(order, axes) for (_, axes), order in _paired(removable, removed))])
    for ((leaf, axes), order), start in zip(_paired(removable, removed), starts[:-1].tolist(), strict=True):
        gone = order < _of_layers(removed.counts, start, order, axes)
        leaves[leaf] = _zeros_at(leaves[leaf], gone)
    for members, indices, elements in zip(removable.members, removed.indices, removed.elements, strict=True):
        for (leaf, axis, block_axes), held in zip(members, indices, strict=True):
            gone = jnp.zeros((*elements.shape[:-1], jnp.shape(leaves[leaf])[axis]), bool)
            gone = gone.at[..., held.ravel()].set(jnp.repeat(elements, held.shape[1], axis=-1))
            gone = laid_out(gone, (*block_axes, axis), jnp.ndim(leaves[leaf]))
            leaves[leaf] = _zeros_at(leaves[leaf], _spread(gone, leaves[leaf]))
    return jax.tree.unflatten(structure, leaves)


def _of_layers(counts: Any, start: int, order: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The counts of a weight's layers, from a start on, shaped like the weight."""
    own = jnp.asarray(counts)[start : start + _rows(order, axes)]
    return _spread(own.reshape([size if axis in axes else 1 for axis, size in enumerate(order.shape)]), order)


def _paired(removable: Removable, removed: Removed) -> Sequence[tuple[tuple[int, tuple[int, ...]], Any]]:
    return list(zip(removable.weights, removed.orders, strict=True))


def _rows(order: Any, axes: tuple[int, ...]) -> int:
    return math.prod(order.shape[axis] for axis in axes)


def _spread(array: jax.Array, like: Any) -> jax.Array:
    return laid_like(jnp.broadcast_to(array, jnp.shape(like)), like)


def _zeros_at(leaf: Any, gone: jax.Array) -> jax.Array:
    return jnp.where(gone, jnp.zeros_like(leaf), leaf)
