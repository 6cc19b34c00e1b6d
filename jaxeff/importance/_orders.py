"""The order in which weights are removed: the position of each by its score."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.numerics.meshes import by_compiler

Stacks = tuple[tuple[int, ...], ...] | None
"""For each weight, the axes over which it stacks layers; None to order all weights together."""


@functools.partial(jax.jit, static_argnums=0)
def orders(stacks: Stacks, scores: list[jax.Array]) -> list[jax.Array]:
    """Return the position of each weight in the order of removal: of its layer if `stacks`, else of the model."""
    return by_compiler(lambda *scores: _ordered(stacks, scores), *scores, like=scores)


def _ordered(stacks: Stacks, scores: Sequence[jax.Array]) -> list[jax.Array]:
    if stacks is None:
        order = _places(jnp.concatenate([jnp.ravel(score) for score in scores]))
        ends = np.cumsum([score.size for score in scores])
        return [
            part.reshape(score.shape) for part, score in zip(jnp.split(order, ends[:-1]), scores, strict=True)
        ]
    return [_within_layers(score, axes) for score, axes in zip(scores, stacks, strict=True)]


def _within_layers(score: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    front = tuple(range(len(axes)))
    layers = jnp.moveaxis(score, axes, front)
    order = jax.vmap(_places)(layers.reshape(math.prod(layers.shape[: len(axes)]), -1))
    return jnp.moveaxis(order.reshape(layers.shape), front, axes)


def _places(scores: jax.Array) -> jax.Array:
    """Return the position of each score in ascending order; equal scores by index."""
    order = jnp.argsort(scores, stable=True)
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
