"""How much of each layer goes, where each is pruned by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

Shapes = Mapping[str, tuple[int, ...]]


@runtime_checkable
class MeasuredAllocation(Protocol):
    """What knows by measurement how much of each layer may go: a `Sensitivity`."""

    def allocation(self, sparsity: Any) -> Mapping[str, Any]:
        """By path, the fraction of the layer that goes where so much of all goes."""
        ...


def uniform(shapes: Shapes, sparsity: float | Array) -> dict[str, float | Array]:
    """The same of every layer."""
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float | Array) -> dict[str, float | Array]:
    """Erdos-Renyi-kernel: a layer's density is proportional to the sum of its axes over their product.

    Small layers stay denser; those that would be denser than full are full, and the others make up for it.

    References:
        Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery, 2020, arXiv:1911.11134
    """
    sizes = jnp.asarray([math.prod(shape) for shape in shapes.values()], jnp.float32)
    raw = jnp.asarray([sum(shape) / math.prod(shape) for shape in shapes.values()], jnp.float32)
    kept = (1 - jnp.asarray(sparsity, jnp.float32)) * jnp.sum(sizes)

    def density(full: Array) -> Array:
        scale = (kept - jnp.sum(jnp.where(full, sizes, 0))) / jnp.sum(jnp.where(full, 0, raw * sizes))
        return jnp.where(full, 1, scale * raw)

    def step(_: Array, full: Array) -> Array:
        return full | (density(full) > 1)

    full = jax.lax.fori_loop(0, len(sizes), step, jnp.zeros(len(sizes), bool))
    return dict(zip(shapes, 1 - jnp.where(full, 1, density(full)), strict=True))


ALLOCATIONS: Mapping[str, Callable[[Shapes, float | Array], dict[str, float | Array]]] = {
    "uniform": uniform,
    "erk": erk,
}


def lamp(scores: Array) -> Array:
    """Scores that compare across layers: s^2 over the sum of the squares of those not below it.

    Pruned by them in one global order, each layer keeps at least its largest weight.

    References:
        Lee, Park, Mo, Ahn and Shin, Layer-Adaptive Sparsity for the Magnitude-Based Pruning, 2021,
        arXiv:2010.07611

    >>> lamp(jnp.array([1.0, 2.0])).round(2)
    Array([0.2, 1. ], dtype=float32)
    """
    squares = jnp.square(scores.astype(jnp.float32) / jnp.maximum(jnp.max(scores), 1e-30)).ravel()
    order = jnp.argsort(squares)
    remaining = jnp.cumsum(squares[order][::-1])[::-1]
    share = jnp.where(remaining > 0, squares[order] / remaining, 0)
    return jnp.zeros_like(squares).at[order].set(share, unique_indices=True).reshape(scores.shape)
