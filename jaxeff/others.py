"""Leaves of `params` that are no weights: biases, scales, integers.

Imports `precision`, `records`, `statistics`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.precision import wide
from jaxeff.records import OtherNumbers, OtherStructure, none_of
from jaxeff.statistics import Place

_SHORT = 1 << 14


def structure(place: Place) -> OtherStructure:
    return OtherStructure(place.path, place.role, place.shape)


def measure(leaves: Sequence[jax.Array]) -> OtherNumbers:
    """The numbers of each leaf, stacked in the order of the leaves.

    All short ones are rows of one array, so that a kernel serves them whatever their number and shapes.
    """
    if not leaves:
        return none_of(OtherNumbers)
    alike: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(index)
    kinds: dict[Hashable, list[list[int]]] = {}
    for group in alike.values():
        kinds.setdefault(_kind(leaves[group[0]]), []).append(group)
    measured = [
        _measure([jnp.stack([leaves[i] for i in group]) for group in kind]) for kind in kinds.values()
    ]
    back = np.argsort([index for kind in kinds.values() for group in kind for index in group])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[back], *measured)


def _kind(leaf: jax.Array) -> Hashable:
    """Equal for leaves that are measured together."""
    if not jnp.issubdtype(leaf.dtype, jnp.number) or not leaf.size:
        return "unknown"
    return wide(leaf.dtype), leaf.size if leaf.size > _SHORT else None


def _measure(stacks: Sequence[jax.Array]) -> OtherNumbers:
    """Of leaves of one kind, stacked by shape."""
    sizes = np.concatenate([np.full(len(stack), stack[0].size, np.int32) for stack in stacks])
    if _kind(stacks[0][0]) == "unknown":
        nan, none = jnp.full(len(sizes), jnp.nan, jnp.float32), jnp.zeros(len(sizes), jnp.int32)
        return OtherNumbers(nan, nan, nan, none, none)
    rows = [stack.reshape(len(stack), -1).astype(wide(stack.dtype)) for stack in stacks]
    rows = jnp.concatenate([jnp.pad(row, ((0, 0), (0, sizes.max() - row.shape[1]))) for row in rows])
    magnitude = jnp.abs(rows)
    padding, count = jnp.asarray(sizes.max() - sizes), sizes.astype(rows.dtype)
    return OtherNumbers(
        jnp.sum(magnitude, 1) / count,
        jnp.sqrt(jnp.sum(jnp.square(rows), 1) / count),
        jnp.max(magnitude, 1),
        jnp.sum(rows == 0, 1, dtype=jnp.int32) - padding,
        jnp.sum(~jnp.isfinite(rows), 1, dtype=jnp.int32),
    )
