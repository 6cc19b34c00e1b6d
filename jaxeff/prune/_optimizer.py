"""An optimizer that prunes while it trains, and keeps pruned weights at 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxeff.graph.program import Value, flatten
from jaxeff.model.params import leaves_by_path
from jaxeff.numerics.meshes import laid_like
from jaxeff.prune._allocation import MeasuredAllocation
from jaxeff.prune._layouts import unboxed
from jaxeff.prune._masking import check_masks
from jaxeff.prune._masks import Limits
from jaxeff.prune._masks import masks as make_masks
from jaxeff.prune._patterns import UNSTRUCTURED, Pattern
from jaxeff.prune._schedules import Schedule
from jaxeff.prune._scoring import Prunable, after_pruned, scored


class SparseState(NamedTuple):
    """State of `sparsify`, `rigl` and `sparse_evolution`.

    Attributes:
        step: [], steps so far.
        masks: shaped like the params, True = kept.
        inner: state of the inner optimizer, 0 where a weight is pruned.
        given: masks inside which a schedule prunes further; None if there are none.
    """

    step: Array
    masks: Any
    inner: Any
    given: Any = None


def sparsify(
    optimizer: optax.GradientTransformation,
    schedule: Schedule | None = None,
    *,
    masks: Any = None,
    importance: Callable[[Any, Any], Any] | None = None,
    prunable: Prunable = None,
    scope: str = "layer",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] | MeasuredAllocation = "uniform",
    max_sparsity: Limits = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that pruned weights go to 0 and stay there.

    The update of a weight whose mask is False is minus the weight, so that neither weight decay nor momentum
    revives it, and `optax.apply_updates` suffices. The inner optimizer sees gradients of 0 there, and its state of
    that weight is 0: momentum, and copies of the weights such as those of `optax.contrib.schedule_free`, which
    evaluation reads. With `optax.lookahead` fast and slow weights have the same masks. Put it last in a chain and
    around optimizers that keep copies, since a later transformation would change its updates.

    Args:
        optimizer: trains the weights that are kept.
        schedule: `one_shot`, `periodic`, `cubic`, or a function from the step to a `Target`. None to
            train under `masks` as they are.
        masks: shaped like the params, True = kept, as returned by `prune.masks`. The first update sets the weights
            that they remove to 0. A schedule prunes further inside them: its sparsity includes what they remove.
        importance: `f(params, gradients)` -> scores, shaped like the params, at steps where masks are due.
            Magnitudes by default, by which pruned weights never come back; by scores of gradients they may,
            inside `masks`.
        prunable: as in `prune.scored`, for magnitudes.
        scope, pattern, allocation, max_sparsity: as in `prune.masks`, for a schedule.

    Returns:
        A transformation whose `update` needs the params, with a `SparseState`.

    Raises:
        TypeError: `optimizer` or `schedule` is something else.
        ValueError: `schedule` and `masks` are both missing, or an argument needs a schedule and there is
            none. From `init`: the masks do not match the params, or the optimizer's state holds a copy of the
            weights in another shape (`optax.flatten`), which cannot be masked.

    >>> from jaxeff.prune import one_shot
    >>> optimizer = sparsify(optax.sgd(0.1), one_shot(0.5))
    >>> params = {"w": jnp.array([[1.0, 3.0]])}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([[0. , 2.7]], dtype=float32)
    """
    how = {"scope": scope, "pattern": pattern, "allocation": allocation, "max_sparsity": max_sparsity}
    if schedule is None:
        _check_fixed(masks, {**how, "importance": importance, "prunable": prunable})
    _check_types(optimizer, schedule)
    inside = optax.with_extra_args_support(optimizer)
    score = importance or (lambda params, gradients: scored(params, prunable=prunable))

    def init(params: Any) -> SparseState:
        weights, given = trained(params), None
        if masks is not None:
            check_masks(weights, masks)
            given = jax.tree.map(lambda mask, leaf: beside(jnp.array(mask, bool), leaf), masks, weights)
        if schedule is None:
            kept, given = given, None
        else:
            shapes = unboxed(jax.eval_shape(score, weights, weights))
            kept = jax.tree.map(lambda shape, leaf: jnp.ones_like(leaf, bool, shape.shape), shapes, weights)
            kept = kept if given is None else jax.tree.map(jnp.logical_and, kept, given)
        check_copies(inside, params, kept)
        return SparseState(jnp.zeros((), jnp.int32), kept, inside.init(params), given)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SparseState]:
        check_given(params)
        kept = state.masks
        if schedule is not None:
            sparsity, due = schedule(state.step)
            target = None if hasattr(pattern, "kept") else sparsity

            def made() -> Any:
                scores = score(trained(params), updates)
                if state.given is not None:
                    scores = jax.tree.map(after_pruned, state.given, scores)
                found = jax.tree.map(laid_like, make_masks(scores, target, **how), state.masks)
                return found if state.given is None else jax.tree.map(jnp.logical_and, found, state.given)

            kept = jax.lax.cond(due, made, lambda: state.masks)
        found, inner = masked_update(inside, kept, updates, state.inner, params, **extra)
        return found, SparseState(state.step + 1, kept, inner, state.given)

    return optax.GradientTransformationExtraArgs(init, update)


_DEFAULTS = {
    "scope": "layer",
    "pattern": UNSTRUCTURED,
    "allocation": "uniform",
    "max_sparsity": None,
    "importance": None,
    "prunable": None,
}


def _check_types(optimizer: Any, schedule: Any) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"`optimizer` must be an Optax optimizer, got {type(optimizer).__name__}")
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"`schedule` must be `prune.one_shot`, `periodic` or `cubic`, or a function of the step, got {schedule!r}"
        )


def _check_fixed(masks: Any, options: Mapping[str, Any]) -> None:
    """Check that without a schedule there are masks, and no arguments of a schedule."""
    if masks is None:
        raise ValueError(
            "`schedule` is missing: pass one, such as `prune.cubic(...)`, or the `masks` to train under"
        )
    for name, value in options.items():
        if value != _DEFAULTS[name]:
            raise ValueError(f"`{name}` needs a `schedule`: without one, `masks` do not change")


def check_given(params: Any) -> None:
    if params is None:
        raise ValueError("`params` is missing: call `update(gradients, state, params)`")


def trained(params: Any) -> Any:
    """Return the weights whose gradients are taken: the fast ones of `optax.lookahead`, otherwise all."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def beside(mask: Array, leaf: Array) -> Array:
    """Put the mask on the devices of the leaf."""
    return laid_like(mask, leaf) & jnp.ones_like(leaf, bool) if mask.ndim else mask


def masked_update(
    inside: optax.GradientTransformationExtraArgs,
    kept: Any,
    updates: Any,
    inner: Any,
    params: Any,
    **extra: Any,
) -> tuple[Any, Any]:
    """Update kept weights by one step of the inner optimizer, and the others by minus the weight."""

    def pruned(found: Any, params: Any) -> Any:
        return jax.tree.map(lambda mask, update, leaf: jnp.where(mask, update, -leaf), kept, found, params)

    masked = jax.tree.map(lambda mask, update: jnp.where(mask, update, 0), kept, updates)
    found, inner = inside.update(masked, inner, params, **extra)
    inner = _masked_state(inner, kept)
    if isinstance(params, optax.LookaheadParams) and isinstance(found, optax.LookaheadParams):
        return optax.LookaheadParams(pruned(found.fast, params.fast), pruned(found.slow, params.slow)), inner
    return pruned(found, params), inner


def _masked_state(inner: Any, kept: Any) -> Any:
    """Set an optimizer's state to 0 for pruned weights, in arrays of the path and shape of a mask."""
    masks = by_keys(kept)

    def one(keys: tuple, leaf: Any) -> Any:
        mask = of_state(masks, keys)
        if mask is None or not mask.ndim or mask.shape != jnp.shape(leaf):
            return leaf
        return jnp.where(laid_like(mask, leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(one, inner)


def by_keys(tree: Any) -> dict[tuple, Any]:
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def of_state(of: Mapping[tuple, Any], keys: tuple) -> Any:
    """Return the value for the weight whose state has these keys, which end with the weight's."""
    return next((of[keys[start:]] for start in range(len(keys) + 1) if keys[start:] in of), None)


def check_copies(inside: optax.GradientTransformation, params: Any, kept: Any) -> None:
    """Check that an optimizer's copies of the weights have their shapes, so that they can be masked."""
    weights = by_keys(trained(params))
    least = min((mask.size for mask in jax.tree.leaves(kept) if mask.ndim), default=math.inf)
    closed, state = jax.make_jaxpr(inside.init, return_shape=True)(params)
    program = flatten(closed)
    made = set(program.inputs)
    for operation in program.operations:
        if not made.isdisjoint(value for value in operation.inputs if isinstance(value, Value)):
            made.update(operation.outputs)
    for (keys, leaf), (path, _), value in zip(
        jax.tree_util.tree_flatten_with_path(state)[0], leaves_by_path(state), program.outputs, strict=True
    ):
        # Single numbers computed from the weights, such as norms, are not copies.
        if not isinstance(value, Value) or value not in made or math.prod(leaf.shape) < least:
            continue
        weight = of_state(weights, keys)
        if weight is None or jnp.shape(weight) != leaf.shape:
            raise ValueError(
                f"`optimizer` keeps a copy of the weights at {path!r} of its state, in the shape "
                f"{leaf.shape}, which no mask fits: do not reshape the weights (`optax.flatten`)"
            )
