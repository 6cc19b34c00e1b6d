"""Where arrays lie, and what that asks of a computation."""

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
    """The one of two equal functions that suits the platform which the program is lowered for.

    On a CPU part after part: parts stay in its cache, and a loop compiles to less. On an accelerator all at
    once: there every step of a loop starts kernels of its own, which takes longer than to run them.
    """
    return lax.platform_dependent(*operands, cpu=in_turn, default=at_once)


def each_row(function: Callable[[Any], Any], rows: Any) -> Any:
    """The function of every row of a tree of arrays."""
    return in_turn_or_at_once(lambda rows: lax.map(function, rows), jax.vmap(function), rows)


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, also where a part of them lies with another process."""
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
    """Copies of a tree's arrays on the host; the tree as it is where it is traced."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return tree
    # A CPU's arrays are otherwise the same memory, which a caller may donate.
    return jax.tree.map(np.array, to_host(tree))
