"""Functions of an array that lies in parts on several devices, computed where the parts lie.

Imports nothing of jaxeff.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def everywhere(local: Callable[..., Any], total: Callable[..., Any]) -> Callable[..., Any]:
    """local(x, *plan) of all of x, by total(local(part, *plan), axes, devices) where x lies in parts.

    Args:
        local: x [...] and arrays that every device has, all of at least one axis -> a tuple of sums.
        total: such a tuple of one device, names of mesh axes, the devices along these -> the sums over them.
    """

    def of_parts(mesh: Any, spec: Any) -> Callable[..., Any]:
        axes = tuple(axis for entry in spec for axis in _axes(entry))
        devices = math.prod(mesh.shape[axis] for axis in axes)
        return lambda *given: total(local(*given), axes, devices) if axes else local(*given)

    def partition(mesh: Any, given: Any, results: Any) -> Any:
        whole = NamedSharding(mesh, PartitionSpec())
        kept = (given[0].sharding, *(whole for _ in given[1:]))
        return mesh, of_parts(mesh, kept[0].spec), jax.tree.map(lambda _: whole, results), kept

    def inferred(mesh: Any, given: Any, results: Any) -> Any:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), results)

    partitioned = custom_partitioning(local)
    partitioned.def_partition(partition, infer_sharding_from_operands=inferred, sharding_rule=_unrelated)

    @custom_vmap
    def one(*given: Array) -> Any:
        sharding = jax.typeof(given[0]).sharding
        if jax.sharding.get_abstract_mesh().manual_axes:
            return local(*given)
        if not any(sharding.spec):
            return partitioned(*given)
        return jax.shard_map(
            of_parts(sharding.mesh, sharding.spec),
            mesh=sharding.mesh,
            in_specs=(sharding.spec, *(PartitionSpec() for _ in given[1:])),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(*given)

    @one.def_vmap
    def _(size: int, batched: list[bool], *given: Array) -> tuple[Any, Any]:
        rows = [
            array if many else jnp.broadcast_to(array, (size, *array.shape))
            for array, many in zip(given, batched, strict=True)
        ]
        sums = lax.map(lambda row: one(*row), rows)
        return sums, jax.tree.map(lambda _: True, sums)

    return one


def _axes(entry: Any) -> tuple[str, ...]:
    """Names in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _unrelated(mesh: Any, given: Any, results: Any) -> str:
    """A rule for Shardy: no axis of a result is one of an argument."""
    names = itertools.count()

    def axes(arrays: Any) -> str:
        return ", ".join(" ".join(f"i{next(names)}" for _ in array.shape) for array in arrays)

    return f"{axes(given)} -> {axes(results)}"
