"""Where arrays lie, and the form of a computation that suits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def in_turn_or_at_once(in_turn: Callable[..., Any], at_once: Callable[..., Any], *operands: Any) -> Any:
    """Choose the one of two equal functions that suits the platform for which the program is lowered.

    A CPU takes part after part: a part stays in its cache, and a loop compiles to less. An accelerator takes all at
    once, since every step of a loop launches kernels of its own, which takes longer than to run them.
    """
    return lax.platform_dependent(*operands, cpu=in_turn, default=at_once)


def each_row(function: Callable[[Any], Any], rows: Any) -> Any:
    """Apply a function to every row of a tree of arrays."""
    return in_turn_or_at_once(lambda rows: lax.map(function, rows), jax.vmap(function), rows)


def to_host(tree: Any) -> Any:
    """Return the arrays of a tree as NumPy arrays, also if a part of them belongs to another process."""
    leaves, structure = jax.tree.flatten(tree)
    scattered = [at for at, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _is_here(leaf)]
    for at in scattered:
        mesh = leaves[at].sharding.mesh
        whole = NamedSharding(mesh, PartitionSpec())
        leaves[at] = jax.jit(jnp.copy, out_shardings=whole)(leaves[at])
    return structure.unflatten([np.asarray(leaf) for leaf in jax.device_get(leaves)])


def _is_here(array: Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated


def on_host_if_concrete(tree: Any) -> Any:
    """Copy a tree's arrays to the host; return a traced tree unchanged."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return tree
    # Without a copy, arrays on a CPU would share memory that a caller may donate.
    return jax.tree.map(np.array, to_host(tree))
