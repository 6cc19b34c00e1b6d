"""Leaves of `params` that are no weights: biases, scales, integers. Imports `records`, `statistics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.precision import widened
from jaxeff.records import OtherNumbers, OtherStructure, none_of
from jaxeff.statistics import Place


def structure(place: Place) -> OtherStructure:
    return OtherStructure(place.path, place.role, place.shape)


def measure(leaves: Sequence[jax.Array]) -> OtherNumbers:
    """The numbers of each leaf, stacked in the order of the leaves; equal shapes are taken together."""
    if not leaves:
        return none_of(OtherNumbers)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault((leaf.shape, leaf.dtype), []).append(index)
    measured = [jax.vmap(_measure)(jnp.stack([leaves[i] for i in group])) for group in groups.values()]
    back = np.argsort([index for group in groups.values() for index in group])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[back], *measured)


def _measure(leaf: jax.Array) -> OtherNumbers:
    if not jnp.issubdtype(leaf.dtype, jnp.number) or not leaf.size:
        nan, none = jnp.asarray(jnp.nan, jnp.float32), jnp.asarray(0, jnp.int32)
        return OtherNumbers(nan, nan, nan, none, none)
    wide = widened(leaf)
    magnitude = jnp.abs(wide)
    return OtherNumbers(
        jnp.mean(magnitude),
        jnp.sqrt(jnp.mean(jnp.square(wide))),
        jnp.max(magnitude),
        jnp.sum(wide == 0, dtype=jnp.int32),
        jnp.sum(~jnp.isfinite(wide), dtype=jnp.int32),
    )
