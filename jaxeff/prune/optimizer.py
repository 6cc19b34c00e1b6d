"""An optimizer that prunes as it goes, and keeps what it pruned at 0.

Imports `allocation`, `masks`, `patterns`, `schedules`; of jaxeff `meshes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxeff.meshes import laid_like
from jaxeff.prune.allocation import Measured
from jaxeff.prune.masks import Limits, Prunable, masks, scored
from jaxeff.prune.patterns import UNSTRUCTURED, Pattern
from jaxeff.prune.schedules import Schedule


class SparseState(NamedTuple):
    """Of `sparsify`, `rigl` and `sparse_evolution`.

    Attributes:
        step: [], steps so far.
        masks: shaped like the params, True = kept.
        inner: the state of the optimizer inside.
    """

    step: Array
    masks: Any
    inner: Any


def sparsify(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    importance: Callable[[Any, Any], Any] | None = None,
    prunable: Prunable = None,
    scope: str = "layer",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] | Measured = "uniform",
    max_sparsity: Limits = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates bring pruned weights to 0 and leave them there.

    The update of a weight whose mask is False is minus the weight, so that neither weight decay nor momentum
    revives it and `optax.apply_updates` is all there is to call. The optimizer inside sees gradients of 0
    there. Goes last in a chain: what follows it would change its updates.

    Args:
        optimizer: what trains the weights that stay.
        schedule: `one_shot`, `periodic`, `cubic`, or a function of the step that gives a `Target`.
        importance: `f(params, gradients)` -> scores, shaped like the params, where masks are due; magnitudes
            unless given, by which pruned weights never come back. By scores of gradients they may.
        prunable: as `prune.scored` takes it, for magnitudes.
        scope, pattern, allocation, max_sparsity: as `prune.masks` takes them.

    Returns:
        A transformation whose `update` needs the params, with a `SparseState`.

    >>> from jaxeff.prune import one_shot
    >>> optimizer = sparsify(optax.sgd(0.1), one_shot(0.5))
    >>> params = {"w": jnp.array([[1.0, 3.0]])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[0. , 2.7]], dtype=float32)
    """
    inside = optax.with_extra_args_support(optimizer)
    score = importance or (lambda params, gradients: scored(params, prunable=prunable))
    how = {"scope": scope, "pattern": pattern, "allocation": allocation, "max_sparsity": max_sparsity}

    def init(params: Any) -> SparseState:
        shapes = jax.eval_shape(score, params, params)
        kept = jax.tree.map(lambda shape, leaf: jnp.ones_like(leaf, bool, shape.shape), shapes, params)
        return SparseState(jnp.zeros((), jnp.int32), kept, inside.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SparseState]:
        check_given(params)
        sparsity, due = schedule(state.step)
        target = None if hasattr(pattern, "kept") else sparsity

        def anew() -> Any:
            return jax.tree.map(laid_like, masks(score(params, updates), target, **how), state.masks)

        kept = jax.lax.cond(due, anew, lambda: state.masks)
        found, inner = masked_update(inside, kept, updates, state.inner, params, **extra)
        return found, SparseState(state.step + 1, kept, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def check_given(params: Any) -> None:
    if params is None:
        raise ValueError("`params` is missing: call `update(gradients, state, params)`")


def masked_update(
    inside: optax.GradientTransformationExtraArgs,
    kept: Any,
    updates: Any,
    inner: Any,
    params: Any,
    **extra: Any,
) -> tuple[Any, Any]:
    """One step of the optimizer inside for the weights that are kept; minus the weight for the others."""
    masked = jax.tree.map(lambda mask, update: jnp.where(mask, update, 0), kept, updates)
    found, inner = inside.update(masked, inner, params, **extra)
    found = jax.tree.map(lambda mask, update, leaf: jnp.where(mask, update, -leaf), kept, found, params)
    return found, inner
