"""The numbers of one check, from the trees of a training step and the statistics of one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import layers
from jaxeff.model.params import Params
from jaxeff.model.roles import ParamInfo
from jaxeff.monitoring._records import Activations, Attention, LeafLayout, Norms, Vitals
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.report import Activity
from jaxeff.statistics import Derivatives, SiteStatistics, Statistics
from jaxeff.statistics.sums import sums


def layout(params: Params, statistics: Statistics) -> tuple[LeafLayout, ...]:
    """Return how each floating leaf is laid out, in the order of the tree.

    A weight's blocks are those of its uses. Any other leaf, such as a bias or scale, is stacked as all the weights
    are under the nearest module that has any, if its shape allows it.
    """
    stacking: dict[str, set[tuple[tuple[int, int], ...]]] = {}
    for site in statistics.sites:
        shape = np.shape(params.named[site.path])
        own = tuple((axis, shape[axis]) for axis in site.layer_axes)
        for path in (site.path, *_modules(site.path)):
            stacking.setdefault(path, set()).add(own)

    weights = {info.path for info in statistics.params if info.role == "weight"}

    def axes_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        around = [path] if path in weights else _modules(path)
        near = next((stacking[name] for name in around if name in stacking), {()})
        (blocks, *others) = near
        fits = not others and all(axis < len(shape) and shape[axis] == size for axis, size in blocks)
        return tuple(axis for axis, _ in blocks) if fits else ()

    return tuple(
        LeafLayout(path, np.shape(leaf), axes_of(path, np.shape(leaf)))
        for path, leaf in params.named.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    )


def _modules(path: str) -> list[str]:
    """Return the paths of the modules around a leaf, the innermost first; the last, '', is the model.

    >>> _modules("blocks/attention/kernel")
    ['blocks/attention', 'blocks', '']
    """
    keys = path.split("/")[:-1]
    return ["/".join(keys[:count]) for count in range(len(keys), -1, -1)]


def measure(
    leaves: tuple[LeafLayout, ...],
    params: Params,
    statistics: Statistics,
    effective_params: Any,
    *,
    gradients: Any = None,
    updates: Any = None,
    params_before: Any = None,
    tau: float,
) -> Vitals:
    """Measure one check.

    Args:
        leaves: from `layout`.
        statistics: of a forward pass.
        effective_params: of the latest report.
        gradients, updates, params_before: trees like `params`; None if not known.
        tau: of dormant units.

    Raises:
        ValueError: a tree has other leaves than `params`.
    """
    given = {"gradients": gradients, "updates": updates, "params_before": params_before}
    trees = [params, *(_like(params, leaves, name, tree) for name, tree in given.items())]
    *own, before = [None if tree is None else [tree.named[leaf.path] for leaf in leaves] for tree in trees]
    norms, activations, attention = _measured(leaves, tau, own, before, statistics)
    of_params, of_gradients, of_updates = norms
    return Vitals(of_params, of_gradients, of_updates, activations, attention, effective_params)


def _like(params: Params, leaves: Sequence[LeafLayout], name: str, given: Any) -> Params | None:
    if given is None:
        return None
    tree = Params.of(given)
    for leaf in leaves:
        came = np.shape(tree.named[leaf.path]) if leaf.path in tree.named else "no such leaf"
        if came != leaf.shape:
            raise ValueError(
                f"`{name}` must have the leaves of `params`: {leaf.path!r} has shape {leaf.shape} there, {came} here"
            )
    return tree


# One program, so that an eager step starts one and not hundreds.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(
    leaves: tuple[LeafLayout, ...],
    tau: float,
    trees: Sequence[Any],
    before: Sequence[Any] | None,
    statistics: Statistics,
) -> tuple[list[Norms], Activations, Attention]:
    params, gradients, updates = trees
    if before is not None:
        updates = [widened(new) - widened(old) for new, old in zip(params, before, strict=True)]
    trees = [params, gradients, updates]
    norms = [_norms(leaves, tree) for tree in trees]
    return norms, _activations(statistics, tau), _attention(statistics)


def _norms(leaves: Sequence[LeafLayout], arrays: Sequence[Any] | None) -> Norms:
    if arrays is None:
        parts = sum(len(leaf.blocks) for leaf in leaves)
        return Norms(jnp.full(parts, jnp.nan, jnp.float32), jnp.full(parts, -1, jnp.int32))
    found = [_norms_of(leaf, array) for leaf, array in zip(leaves, arrays, strict=True)]
    return Norms(*(jnp.concatenate(parts) for parts in zip(*found, strict=True)))


def _norms_of(leaf: LeafLayout, array: Any) -> tuple[jax.Array, jax.Array]:
    over = tuple(axis for axis in range(len(leaf.shape)) if axis not in leaf.axes)

    def reduced(array: jax.Array) -> tuple[jax.Array, jax.Array]:
        squares = sums(array, over).square
        return jnp.sqrt(squares).ravel(), jnp.sum(~jnp.isfinite(array), over, dtype=jnp.int32).ravel()

    return by_compiler(reduced, jnp.asarray(array))


def _activations(statistics: Statistics, tau: float) -> Activations:
    weights = [info for info in statistics.params if info.role == "weight"]
    found = [_activations_of(info, statistics.sites, tau) for info in weights]
    return Activations(*_columns(found, 4))


def _activations_of(info: ParamInfo, sites: Sequence[SiteStatistics], tau: float) -> list[jax.Array]:
    own = tuple(site for site in sites if site.path == info.path)
    only_shape = np.broadcast_to(np.zeros((), np.float32), info.shape)
    layer = layers.Layer(info, layers.Arrays(only_shape, own, Derivatives()))
    found = layers.over_activities(functools.partial(_of_units, tau), layer, sites)
    return [jnp.full(len(layer.indices), jnp.nan)] * 4 if found is None else found


def _of_units(tau: float, activity: Activity) -> list[jax.Array]:
    root_mean_square = jnp.sqrt(jnp.mean(jnp.square(activity.rms)))
    return [
        activity.dead,
        activity.dormant(tau),
        jnp.mean(activity.zero_fraction),
        jnp.max(activity.maximum) / root_mean_square,
    ]


def _attention(statistics: Statistics) -> Attention:
    found = [
        (one.largest_logit, jnp.mean(one.entropy, -1), jnp.min(one.entropy, -1))
        for one in statistics.attentions
    ]
    return Attention(*_columns(found, 3))


def _columns(rows: Sequence[Sequence[Any]], width: int) -> list[jax.Array]:
    """Join each of the `width` entries of all rows, numbers or arrays of one axis, into one array."""
    flat = [[jnp.ravel(row[at]).astype(jnp.float32) for row in rows] for at in range(width)]
    return [jnp.concatenate([jnp.zeros(0, jnp.float32), *column]) for column in flat]
