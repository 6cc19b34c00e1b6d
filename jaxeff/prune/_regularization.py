"""A gradient that draws magnitudes together, for any Optax chain."""

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
    """Of `add_entropy_gradient`.

    Attributes:
        step: [], steps so far.
    """

    step: Array


def add_entropy_gradient(strength: float, prunable: Prunable = None) -> optax.GradientTransformation:
    """Adds to the gradients those of strength x the sum over layers of H(|w|) / ln N.

    H is the entropy of p = |w| / sum |w| of a layer's N weights. Its slope by |w| is -(ln p + H) / sum |w|:
    weights below exp(-H) of the sum shrink, those above it grow, and a few come to hold what many held. The
    penalty knows nothing of a layer's scale. The slope of a weight that is 0 is taken as 0, and so is that of
    a layer of zeros.

    In a chain it stands where `optax.add_decayed_weights` would. Before Adam it does harm: Adam scales small
    gradients up, and those of the penalty are small. Behind `optax.scale_by_adam` it is left as it is, and
    behind a whole optimizer, whose updates descend, with -strength.

    Args:
        strength: a number.
        prunable: which leaves, as `prune.scored` takes it.

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
