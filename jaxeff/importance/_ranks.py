"""Ranks of scores, and their correlation (Spearman's)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ranks(scores: jax.Array) -> jax.Array:
    """Return the rank of each score from 0; equal scores share their mean rank.

    >>> ranks(jnp.array([5.0, 1.0, 5.0]))
    Array([1.5, 0. , 1.5], dtype=float32)
    """
    ordered = jnp.sort(scores)
    below = jnp.searchsorted(ordered, scores, side="left")
    up_to = jnp.searchsorted(ordered, scores, side="right")
    return (below + up_to - 1) / 2


def correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Return the correlation of two arrays (Spearman's, if they are ranks); 1 for two constant arrays.

    >>> correlation(jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 2.0, 4.0]))
    Array(1., dtype=float32)
    """
    first, second = first - jnp.mean(first), second - jnp.mean(second)
    norms = jnp.sqrt(jnp.mean(jnp.square(first)) * jnp.mean(jnp.square(second)))
    constant = (jnp.max(jnp.abs(first)) == 0) & (jnp.max(jnp.abs(second)) == 0)
    found = jnp.mean(first * second) / jnp.where(norms > 0, norms, 1)
    return jnp.where(constant, 1, found)
