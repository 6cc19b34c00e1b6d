"""A gradient of the entropy of magnitudes, for any Optax chain."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxeff import metrics
from jaxeff.model.params import named_leaves
from jaxeff.numerics.meshes import by_compiler
from jaxeff.prune._layouts import Layout, by_shape
from jaxeff.prune._masks import in_layers
from jaxeff.prune._scoring import Prunable, prunable_paths


class EntropyState(NamedTuple):
    """State of `add_entropy_gradient`.

    Attributes:
        step: [], steps so far.
    """

    step: Array


def add_entropy_gradient(strength: float, prunable: Prunable = None) -> optax.GradientTransformation:
    """Add the gradient of strength x the sum over layers of H(|w|) / ln N.

    H is the entropy of p = |w| / sum |w| of a layer's N weights. Its slope with respect to |w| is
    -(ln p + H) / sum |w|: weights below exp(-H) of the sum shrink, larger ones grow, and the magnitude concentrates
    in few weights. The penalty does not depend on a layer's scale. The slope at a weight of 0 is taken as 0, and so
    are those of a layer of zeros.

    In a chain it belongs where `optax.add_decayed_weights` would be. Before Adam it does harm: Adam scales small
    gradients up, and those of the penalty are small. Put it after `optax.scale_by_adam`, or after a whole
    optimizer, whose updates descend, with -strength.

    Args:
        strength: a number.
        prunable: the leaves to penalize, as in `prune.scored`.

    Returns:
        A transformation whose `update` needs the params.

    >>> optimizer = optax.chain(add_entropy_gradient(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.array([[1.0, 3.0, 0.0]])}
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    >>> updates["w"].round(3)
    Array([[-0.019,  0.006,  0.   ]], dtype=float32)
    """
    if not math.isfinite(strength):
        raise ValueError(f"`strength` must be a number, got {strength}")
    slope = jax.grad(lambda weight: metrics.normalized_entropy(jnp.abs(weight)))

    def of_layers(path: str, layout: Layout, weight: Array) -> Array:
        axes = layout[path].axes
        return by_compiler(in_layers(slope, axes.layers if axes else ()), weight, like=weight)

    def init(params: Any) -> EntropyState:
        _ = prunable_paths(prunable, named_leaves(params))
        return EntropyState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, EntropyState]:
        if params is None:
            raise ValueError("`params` is missing: call `update(gradients, state, params)`")
        named = named_leaves(params)
        layout = prunable if isinstance(prunable, Layout) else by_shape(named)
        paths = prunable_paths(prunable, named, layout)
        leaves, structure = jax.tree.flatten(updates)
        added = [
            update + (strength * of_layers(path, layout, named[path])).astype(update.dtype)
            if path in paths
            else update
            for path, update in zip(named, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, added), EntropyState(state.step + 1)

    return optax.GradientTransformation(init, update)
