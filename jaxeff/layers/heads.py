"""The importance of attention heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import importance
from jaxeff.importance import Criterion
from jaxeff.importance import _levels as granularity
from jaxeff.layers.reduction import (
    is_traced,
)
from jaxeff.layers.stacks import (
    Arrays,
    Layer,
    layer_axes,
    nameless,
    part_of,
    positions,
)
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.placement import to_host
from jaxeff.statistics import (
    AttentionStatistics,
    HeadSlices,
)


def heads(
    criterion: Criterion, layers: Mapping[str, Layer], attentions: Sequence[AttentionStatistics]
) -> list[Any]:
    """Return the importance of the heads of each attention, [units]; nan if none of its weights was read.

    Equal attentions share a program, or a loop.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    members: list[tuple[Arrays, ...]] = []
    for index, attention in enumerate(attentions):
        members.append(tuple(nameless(layers[piece.path].arrays) for piece in attention.slices))
        leaves, structure = jax.tree.flatten(members[-1])
        slices = tuple(dataclasses.replace(piece, path=str(at)) for at, piece in enumerate(attention.slices))
        alike.setdefault((attention.units, slices, structure, *map(jax.typeof, leaves)), []).append(index)
    found: dict[int, Any] = {}
    for (_, slices, *_), group in alike.items():
        own = [members[index] for index in group]
        if not slices:
            found |= {index: np.full(attentions[index].units, np.nan, np.float32) for index in group}
        elif is_traced(own):
            found |= zip(
                group, _over_alike(lambda arrays, s=slices: _heads(criterion, s, arrays), own), strict=True
            )
        else:
            found |= {index: _heads(criterion, slices, members[index]) for index in group}
    ordered = [found[index] for index in range(len(attentions))]
    return ordered if is_traced(ordered) else [*to_host(ordered)]


def _over_alike(function: Callable[[Any], Any], members: Sequence[Any]) -> Any:
    """Apply a function to each of several equal trees, in a loop, and stack the results."""
    if len(members) == 1:
        return jax.tree.map(lambda array: array[None], function(members[0]))
    branches = [lambda arrays=arrays: arrays for arrays in members]
    return lax.map(lambda at: function(lax.switch(at, branches)), jnp.arange(len(members), dtype=jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heads(criterion: Criterion, slices: tuple[HeadSlices, ...], arrays: tuple[Arrays, ...]) -> jax.Array:
    """Return [units]; blocks that the weights stack lead."""

    def every(arrays: tuple[Arrays, ...]) -> jax.Array:
        (stack, *others) = {tuple(each.weight.shape[axis] for axis in layer_axes(each)) for each in arrays}
        if not stack or others:
            return _of_arrays(criterion, slices, arrays)

        def block(step: jax.Array) -> jax.Array:
            return _of_arrays(criterion, own, tuple(part_of(each, tuple(step)) for each in arrays))

        # One block's scores at a time. The scores of all at once, XLA would gather from the devices of a mesh.
        own = tuple(_in_block(piece, each) for piece, each in zip(slices, arrays, strict=True))
        rows = lax.map(block, positions(arrays[0]))
        return rows.reshape(*stack, *rows.shape[1:])

    return by_compiler(every, arrays)


def _in_block(slices: HeadSlices, arrays: Arrays) -> HeadSlices:
    """Return the slices of one of the layers that a weight stacks."""
    return dataclasses.replace(
        slices, axis=slices.axis - sum(axis < slices.axis for axis in layer_axes(arrays))
    )


def _of_arrays(criterion: Criterion, slices: Sequence[HeadSlices], arrays: Sequence[Arrays]) -> jax.Array:
    scores = {
        piece.path: importance.score(criterion, *each) for piece, each in zip(slices, arrays, strict=True)
    }
    stacking = {piece.path: layer_axes(each) for piece, each in zip(slices, arrays, strict=True)}
    return granularity.heads_of(slices, scores, stacking, granularity.REDUCTIONS["sum"])
