"""A weight with its statistics, and the layers that it stacks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.importance import Criterion
from jaxeff.model.roles import ParamInfo
from jaxeff.report import Activity, LayerStructure
from jaxeff.statistics import (
    Derivatives,
    SiteStatistics,
    UnitStatistics,
)

Index = tuple[Any, ...]


class Arrays(NamedTuple):
    """A weight, its uses (none if it was not paired), and its derivatives."""

    weight: Any
    sites: tuple[SiteStatistics, ...]
    derivatives: Derivatives


class Layer(NamedTuple):
    """A weight with its static facts."""

    place: ParamInfo
    arrays: Arrays

    @property
    def size(self) -> int:
        """Number of weights of each layer that it stacks."""
        return math.prod(self.place.shape) // math.prod(self.place.shape[a] for a in layer_axes(self.arrays))

    @property
    def indices(self) -> list[Index]:
        """One index per layer that it stacks; one empty index if it is a single layer."""
        return [*itertools.product(*(range(self.place.shape[axis]) for axis in layer_axes(self.arrays)))]


def layer_axes(arrays: Arrays) -> tuple[int, ...]:
    stacking = {site.layer_axes for site in arrays.sites}
    return stacking.pop() if len(stacking) == 1 else ()


def unit_axes(arrays: Arrays) -> tuple[int, ...]:
    # Without a read operation, assume that units are last, as in all Flax kernels.
    return arrays.sites[0].unit_axes if arrays.sites else (arrays.weight.ndim - 1,)


def part_of(arrays: Arrays, index: Index) -> Arrays:
    """Return one of the layers that a weight stacks; `index` may be traced."""
    axes = layer_axes(arrays)
    if not axes:
        return arrays
    rank = arrays.weight.ndim
    at_axis = dict(zip(axes, index, strict=True))
    kept = [axis for axis in range(rank) if axis not in axes]
    stacked = math.prod(arrays.weight.shape[axis] for axis in axes)

    def pick(array: Any) -> Any:
        if array.ndim != rank:
            return array
        # Sums that all layers share have size 1 there.
        return array[
            tuple(
                (0 if array.shape[axis] == 1 else at_axis[axis]) if axis in axes else slice(None)
                for axis in range(rank)
            )
        ]

    def pick_sums(sums: UnitStatistics) -> UnitStatistics:
        picked = jax.tree.map(pick, sums)
        return dataclasses.replace(picked, count=picked.count.reshape(()))

    def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(kept.index(axis) for axis in axes if axis in kept)

    sites = tuple(
        dataclasses.replace(
            site,
            input=pick_sums(site.input),
            pre=pick_sums(site.pre),
            post=pick_sums(site.post),
            gate=jax.tree.map(pick, site.gate),
            unit_axes=renumbered(site.unit_axes),
            input_axes=renumbered(site.input_axes),
            layer_axes=(),
            macs=None if site.macs is None else site.macs // stacked,
            second_moments=None,  # which no report reads
        )
        for site in arrays.sites
    )
    return Arrays(pick(arrays.weight), sites, jax.tree.map(pick, arrays.derivatives))


def structures(criterion: Criterion, layer: Layer) -> list[LayerStructure]:
    """Return the static facts of each layer that a weight stacks."""
    place, arrays = layer
    part = part_of(jax.tree.map(shadow, arrays), layer.indices[0])
    first = part.sites[0] if part.sites else None
    macs = [site.macs for site in part.sites]
    common = LayerStructure(
        path=place.path,
        kind=first.kind if first else "weight",
        shape=part.weight.shape,
        dtype=place.dtype,
        nonlinearity=first.nonlinearity if first else None,
        scored="magnitude" if criterion.reads_activations and not first else criterion.side,
        reason=place.reason,
        uses=len(part.sites),
        unit_axes=unit_axes(part),
        macs=None if not macs or None in macs else sum(count for count in macs if count is not None),
        uncounted=any(site.uncounted for site in part.sites),
    )
    return [
        dataclasses.replace(common, path=f"{place.path}[{','.join(map(str, index))}]") if index else common
        for index in layer.indices
    ]


def activities(layer: Layer, sites: Sequence[SiteStatistics]) -> list[Activity | None]:
    """Return the activations of each stacked layer, over all uses that have the same units as the first.

    Args:
        sites: of all weights; NumPy arrays are added on the host.
    """
    own = tuple(site for site in sites if site.path == layer.place.path)
    arrays = Arrays(shadow(layer.arrays.weight), own, Derivatives())
    return [_activity(part_of(arrays, index)) for index in layer.indices]


def over_activities(
    function: Callable[[Activity], Any], layer: Layer, sites: Sequence[SiteStatistics]
) -> Any:
    """Return function(activity), stacked over the layers that a weight stacks; None if no activations were read."""
    if not layer_axes(layer.arrays):
        (activity,) = activities(layer, sites)
        return None if activity is None else function(activity)
    own = tuple(site for site in sites if site.path == layer.place.path)
    arrays = Arrays(jnp.zeros(layer.place.shape, bool), own, Derivatives())  # only its shape is read

    def of_one(index: Index) -> Any:
        activity = _activity(part_of(arrays, index))
        return None if activity is None else function(activity)

    return jax.vmap(of_one)(tuple(jnp.asarray(positions(arrays).T)))


def _activity(arrays: Arrays) -> Activity | None:
    alike = [site.post for site in arrays.sites if site.unit_axes == arrays.sites[0].unit_axes]
    if not alike:
        return None
    sums = functools.reduce(UnitStatistics.__add__, alike)
    shape = tuple(arrays.weight.shape[axis] for axis in unit_axes(arrays))
    return Activity(shape, sums.absolute_sum.ndim, sums)


def shadow(array: Any) -> np.ndarray:
    """Return zeros of the same shape, in the memory of one."""
    return np.broadcast_to(np.zeros((), np.float32), np.shape(array))


def positions(arrays: Arrays) -> np.ndarray:
    """Return [stacked layers, axes], the index of each layer."""
    shape = [arrays.weight.shape[axis] for axis in layer_axes(arrays)]
    return np.stack([part.ravel() for part in np.indices(shape, np.int32)], axis=1)


def nameless(arrays: Arrays) -> Arrays:
    """Remove the names of equal layers, so that they share a program."""
    sites = tuple(dataclasses.replace(site, path="", bias=None) for site in arrays.sites)
    return arrays._replace(sites=sites)
