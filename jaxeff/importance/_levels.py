"""Reduction of scores per weight to scores per unit, attention head or layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.numerics.meshes import gathered
from jaxeff.statistics import HeadSlices, Statistics

Scores = Mapping[str, jax.Array]


class Reduction(NamedTuple):
    """Reduces the scores of several weights to one: `last(over(first(scores)), count)`.

    `join` combines parts that were reduced separately, before the last step.
    """

    first: Callable[[jax.Array], jax.Array]
    over: Callable[..., jax.Array]
    join: Callable[[jax.Array, jax.Array], jax.Array]
    last: Callable[[jax.Array, int], jax.Array]


REDUCTIONS: Mapping[str, Reduction] = {
    "sum": Reduction(lambda x: x, jnp.sum, jnp.add, lambda x, count: x),
    "mean": Reduction(lambda x: x, jnp.sum, jnp.add, lambda x, count: x / count),
    "max": Reduction(lambda x: x, jnp.max, jnp.maximum, lambda x, count: x),
    "l2": Reduction(jnp.square, jnp.sum, jnp.add, lambda x, count: jnp.sqrt(x)),
}
"""'sum', 'mean', 'max' and 'l2', the square root of the sum of squares."""


def by_unit(scores: Scores, statistics: Statistics, reduction: Reduction) -> dict[str, jax.Array]:
    """Return the score of each unit, shaped like the weight's unit axes; layers that a scan stacks keep their axes."""
    return {
        path: _kept(
            score, (*unit_axes(statistics, path, score.ndim), *layer_axes(statistics, path)), reduction
        )
        for path, score in scores.items()
    }


def by_layer(scores: Scores, statistics: Statistics, reduction: Reduction) -> dict[str, jax.Array]:
    """Return the score of each weight as a whole, []; one per layer if a scan stacks them."""
    return {path: _kept(score, layer_axes(statistics, path), reduction) for path, score in scores.items()}


def by_head(scores: Scores, statistics: Statistics, reduction: Reduction) -> dict[str, jax.Array]:
    """Return [units] for each attention, over its query, key, value and output weights; stacked layers lead."""
    return {
        attention.path: heads_of(
            attention.slices,
            scores,
            {piece.path: layer_axes(statistics, piece.path) for piece in attention.slices},
            reduction,
        )
        for attention in statistics.attentions
        if attention.slices
    }


def heads_of(
    slices: Sequence[HeadSlices],
    scores: Scores,
    stacking: Mapping[str, tuple[int, ...]],
    reduction: Reduction,
) -> jax.Array:
    """Return [units] for one attention.

    Args:
        stacking: for each path, the axes over which its weight stacks layers.
    """
    parts, counts = [], []
    for piece in slices:
        stacked, score = stacking[piece.path], scores[piece.path]
        along = _over(score, (*stacked, piece.axis), reduction)
        # Layers lead, whatever their order in the weight.
        along = jnp.moveaxis(gathered(along), _rank(piece.axis, stacked), -1)
        indices = np.asarray(piece.indices)
        parts.append(reduction.over(_taken(along, indices), axis=-1))
        counts.append(
            score.size // int(np.prod([score.shape[a] for a in (*stacked, piece.axis)])) * indices.shape[1]
        )
    return reduction.last(functools.reduce(reduction.join, parts), sum(counts))


def _taken(along: jax.Array, indices: np.ndarray) -> jax.Array:
    """Return along[..., indices]. If these are all in order, reshape: a lookup would gather what is sharded."""
    if np.array_equal(indices.ravel(), np.arange(along.shape[-1])):
        return along.reshape(*along.shape[:-1], *indices.shape)
    return along[..., indices]


def _rank(axis: int, others: Sequence[int]) -> int:
    """Return the position of an axis once all axes but it and the others are gone."""
    return sum(other < axis for other in others)


def _kept(score: jax.Array, axes: Sequence[int], reduction: Reduction) -> jax.Array:
    count = score.size // int(np.prod([score.shape[axis] for axis in axes]))
    return reduction.last(_over(score, axes, reduction), count)


def _over(score: jax.Array, kept: Sequence[int], reduction: Reduction) -> jax.Array:
    return reduction.over(reduction.first(score), axis=tuple(a for a in range(score.ndim) if a not in kept))


def unit_axes(statistics: Statistics, path: str, rank: int) -> tuple[int, ...]:
    """Return the unit axes of a weight's first use; the last axis, as in Flax kernels, if no use was read."""
    return next((site.unit_axes for site in statistics.sites if site.path == path), (rank - 1,))


def layer_axes(statistics: Statistics, path: str) -> tuple[int, ...]:
    """Return the axes over which a weight stacks layers, each of which is a layer of its own."""
    return next((site.layer_axes for site in statistics.sites if site.path == path), ())
