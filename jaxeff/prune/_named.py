"""The leaves of what users pass as params, variables or state, by the paths that groups and plans give them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jaxeff.model.params import is_variables, named_leaves


def named_variables(tree: Any) -> dict[str, Any]:
    """The leaves of params, of variables or of a state by the paths that `Groups` gives them, in order."""
    named = named_leaves(tree)
    if not is_variables(tree):
        return named
    bare = {path.removeprefix("params/"): leaf for path, leaf in named.items()}
    if len(bare) < len(named):
        raise ValueError("`params` and another collection have a path in common")
    return bare


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` on every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    paths = named_variables(jax.tree.map(stand_in, tree))
    return jax.tree.unflatten(structure, [function(*pair) for pair in zip(paths, leaves, strict=True)])


def in_modules(paths: Collection[str], params: Container[str]) -> list[str]:
    """Return paths without the names of collections: that of 'batch_stats/block0/mean' as 'block0/mean'.

    Args:
        paths: of leaves of params and of state.
        params: paths of the params among them.
    """
    tops = {path.split("/")[0] for path in paths if path in params}

    def bare(path: str) -> str:
        first, _, rest = path.partition("/")
        of_collection = path not in params and first not in tops and rest.split("/")[0] in tops
        return rest if of_collection else path

    return [bare(path) for path in paths]


def stand_in(leaf: Any) -> Any:
    """An array of the shape and dtype asked for that takes no memory."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


GONE = object()
"""Stands in a tree for a leaf that is to go."""


def without_leaves(tree: Any) -> Any:
    """Return a tree without the leaves that are `GONE`.

    Dicts lose their keys, and lists, and an `nnx.State` of a list, close up. Other nodes hold None in their place.
    """
    return _without(tree)[0]


def _without(tree: Any) -> tuple[Any, bool]:
    """The tree, and whether all that it held is gone."""
    if tree is GONE:
        return None, True
    children, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    if not any(leaf is GONE for leaf in jax.tree.leaves(tree)):
        return tree, False
    if isinstance(tree, (dict, FrozenDict, nnx.State)):
        found = {key: _without(child) for key, child in tree.items()}
        left = {key: child for key, (child, gone) in found.items() if not gone}
        if [*found] == [*range(len(found))]:
            left = dict(enumerate(left.values()))
        return type(tree)(left), not jax.tree.leaves(left)
    pairs = [_without(child) for child in children]
    none = not any(jax.tree.leaves(child) for child, _ in pairs)
    if type(tree) in (list, tuple):
        return type(tree)(child for child, gone in pairs if not gone), none
    return jax.tree.unflatten(structure, [child for child, _ in pairs]), none
