"""Arrays on a mesh of explicit axes, whose types say how they lie on the devices.

JAX refuses operations whose layout does not follow from the types of the operands, such as a sort along an axis that
lies in parts, or a reshape that splits or merges one. If no axis is explicit, the compiler decides on layouts, and
the functions of this module do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def gathered(array: Any) -> Any:
    """Return the array, whole on every device of its explicit mesh."""
    sharding = _explicit(array)
    return array if sharding is None else jax.sharding.reshard(array, _whole(sharding))


def laid_like(array: jax.Array, other: Any) -> jax.Array:
    """Lay out the array like another of its shape; an array of another shape is unchanged."""
    wanted = _explicit(other)
    if jnp.shape(array) != jnp.shape(other):
        return array
    return gathered(array) if wanted is None else jax.sharding.reshard(array, wanted)


def zeros_of(shapes: Any) -> Any:
    """Return zeros of the shapes, types and layouts of `jax.eval_shape`."""
    return jax.tree.map(lambda leaf: laid_like(jnp.zeros(leaf.shape, leaf.dtype), leaf), shapes)


def by_compiler(function: Callable[..., Any], *arrays: Any, like: Any = None) -> Any:
    """Return function(*arrays), with all layouts inside it left to the compiler.

    Args:
        function: trees of arrays -> a tree of arrays.
        like: a tree of arrays like that of the results, or one array for all. Each result is laid out like its array
            along every axis that the parts divide, if both have equally many axes. Otherwise, and without `like`,
            results are whole on every device.
    """
    explicit = [sharding for sharding in map(_explicit, jax.tree.leaves(arrays)) if sharding is not None]
    if not explicit:
        return function(*arrays)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arrays)
    leaves, structure = jax.tree.flatten(jax.eval_shape(function, *plain))
    models = jax.tree.leaves(like)
    models = models * len(leaves) if len(models) == 1 else models or [None] * len(leaves)
    whole = _whole(explicit[0])
    layouts = [_fitted(leaf.shape, model, whole) for leaf, model in zip(leaves, models, strict=True)]
    return jax.sharding.auto_axes(function, out_sharding=jax.tree.unflatten(structure, layouts))(*arrays)


def _fitted(shape: Sequence[int], like: Any, whole: NamedSharding) -> NamedSharding:
    found = None if like is None else _explicit(like)
    if found is None or len(found.spec) != len(shape):
        return whole
    entries = [
        entry if size % _parts(entry, found.mesh) == 0 else None
        for size, entry in zip(shape, found.spec, strict=True)
    ]
    return NamedSharding(found.mesh, PartitionSpec(*entries))


def _parts(entry: Any, mesh: Any) -> int:
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[axis] for axis in axes)


def _explicit(array: Any) -> NamedSharding | None:
    """Return the layout of an array that an explicit axis of a mesh splits."""
    # Results of eval_shape have no type of their own.
    abstract = isinstance(array, jax.ShapeDtypeStruct)
    sharding = array.sharding if abstract else jax.typeof(array).sharding
    return sharding if isinstance(sharding, NamedSharding) and any(sharding.spec) else None


def _whole(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec())
