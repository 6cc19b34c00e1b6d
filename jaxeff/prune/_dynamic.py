"""Dynamic sparse training: sparse from the first step, with masks that move.

These optimizers drop the smallest weights every few steps and grow as many others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxeff.numerics.selection import highest_of_each, lowest_of_each
from jaxeff.prune._layouts import axes_of, unboxed
from jaxeff.prune._masks import masks
from jaxeff.prune._optimizer import SparseState, beside, check_copies, check_given, masked_update, trained
from jaxeff.prune._schedules import periodic
from jaxeff.prune._scoring import Prunable, scored


def rigl(
    optimizer: optax.GradientTransformation,
    sparsity: float,
    *,
    key: Array,
    end: int,
    every: int,
    begin: int = 0,
    fraction: float = 0.3,
    allocation: str | Mapping[str, float] = "erk",
    prunable: Prunable = None,
) -> optax.GradientTransformationExtraArgs:
    """Rigging the lottery: drop weights of small magnitude, and grow weights of large gradient.

    Masks are random at first. At a step t at which masks change, each layer of n active weights drops

        k = round(a(t) n),  a(t) = fraction / 2 (1 + cos(pi t / end))

    active weights with the smallest abs(w), and then grows the k inactive weights with the largest abs(dL/dw);
    ties go by index. So n is the same at every step.

    A weight that is dropped and grown in one step keeps its value. Other grown weights start at 0, and so does
    their part of the inner optimizer's state: momentum, second moments, copies of the weights, any array of their
    path and shape. The remaining weights are trained in that step too. The first update makes dense params
    sparse, and moves no mask.

    As with `sparsify`, the update of an inactive weight is minus the weight, and the transformation goes last in a
    chain. `update` takes the gradients of all weights, as returned by `jax.grad`.

    Args:
        optimizer: trains the active weights.
        sparsity: fraction of inactive weights, in [0, 1).
        key: of the random masks.
        end: step after which masks no longer change; 3/4 of all steps in the paper.
        every: steps from one change of the masks to the next; 100 in the paper.
        begin: first step at which masks may change.
        fraction: initial fraction of the active weights to drop, in (0, 1].
        allocation: 'erk', 'uniform', or fractions by path, as in `prune.masks`.
        prunable: as in `prune.scored`.

    Returns:
        A transformation whose `update` needs the params, with a `SparseState`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery, 2020, arXiv:1911.11134

    >>> optimizer = rigl(optax.sgd(0.1), 0.5, key=jax.random.key(0), end=750, every=100)
    >>> params = {"w": jnp.ones((4, 8))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> int(jnp.sum(optax.apply_updates(params, updates)["w"] == 0))
    16
    """

    def promise(gradients: Any, shapes: Any, step: Array) -> Any:
        return jax.tree.map(lambda gradient, shape: jnp.abs(gradient), gradients, shapes)

    return _dynamic(optimizer, sparsity, promise, key, begin, end, every, fraction, allocation, prunable)


def sparse_evolution(
    optimizer: optax.GradientTransformation,
    sparsity: float,
    *,
    key: Array,
    end: int,
    every: int,
    begin: int = 0,
    fraction: float = 0.3,
    allocation: str | Mapping[str, float] = "erk",
    prunable: Prunable = None,
) -> optax.GradientTransformationExtraArgs:
    """Sparse evolutionary training: drop weights of small magnitude, and grow random ones.

    Otherwise it equals `rigl`, in the form in which Evci et al. compare the two. Mocanu et al. drop a constant
    fraction of the positive and of the negative weights, and draw the values of grown weights.

    Args:
        key: of the random masks and, with the step, of the random growth.
        optimizer, sparsity, end, every, begin, fraction, allocation, prunable: as in `rigl`.

    Returns:
        A transformation whose `update` needs the params, with a `SparseState`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Mocanu, Mocanu, Stone, Nguyen, Gibescu and Liotta, Scalable Training of Artificial Neural Networks
        with Adaptive Sparse Connectivity Inspired by Network Science, 2018, arXiv:1707.04780

    >>> optimizer = sparse_evolution(optax.sgd(0.1), 0.5, key=jax.random.key(0), end=750, every=100)
    >>> optimizer.init({"w": jnp.ones((4, 8))}).masks["w"].sum()
    Array(16, dtype=int32)
    """

    def promise(gradients: Any, shapes: Any, step: Array) -> Any:
        return _random(jax.random.fold_in(key, step), shapes)

    return _dynamic(optimizer, sparsity, promise, key, begin, end, every, fraction, allocation, prunable)


# (gradients, shapes of the scores, step) -> scores; the inactive weights with the highest scores are grown.
Promise = Callable[[Any, Any, Array], Any]


def _dynamic(
    optimizer: optax.GradientTransformation,
    sparsity: float,
    promise: Promise,
    key: Array,
    begin: int,
    end: int,
    every: int,
    fraction: float,
    allocation: str | Mapping[str, float],
    prunable: Prunable,
) -> optax.GradientTransformationExtraArgs:
    schedule = periodic(sparsity, begin, end, every)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], of the active weights to drop, got {fraction}")
    inside = optax.with_extra_args_support(optimizer)

    def shapes(params: Any) -> Any:
        return jax.eval_shape(lambda params: scored(params, prunable=prunable), params)

    def init(params: Any) -> SparseState:
        weights = trained(params)
        kept = masks(_random(key, shapes(weights)), sparsity, allocation=allocation)
        check_copies(inside, params, kept)
        return SparseState(jnp.zeros((), jnp.int32), jax.tree.map(beside, kept, weights), inside.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SparseState]:
        check_given(params)
        step, before, weights = state.step, state.masks, trained(params)
        # Gradients of the first step may be those of dense params.
        due = schedule(step).due & (step > 0)
        share = fraction / 2 * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / max(end, 1)))

        def moved() -> Any:
            magnitudes, promises = scored(weights, prunable=prunable), promise(updates, shapes(weights), step)
            return _moved(before, magnitudes, promises, share)

        kept = jax.lax.cond(due, moved, lambda: before)
        stayed = jax.tree.map(jnp.logical_and, before, kept)
        # Grown weights count as pruned in this step, so that they start at 0, and so does their state.
        found, inner = masked_update(inside, stayed, updates, state.inner, params, **extra)
        return found, SparseState(step + 1, kept, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _random(key: Array, shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(one, leaf.shape, jnp.float32) for one, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _moved(before: Any, magnitudes: Any, promises: Any, share: Array) -> Any:
    """Drop the lowest magnitudes of each layer from the masks, and grow as many of the highest promises."""
    leaves, structure = jax.tree.flatten(before)
    moving = [i for i, mask in enumerate(leaves) if mask.ndim]
    small, promised = ([jax.tree.leaves(unboxed(tree))[i] for i in moving] for tree in (magnitudes, promises))
    axes = axes_of(magnitudes)
    layers = [() if (found := axes[i]) is None else tuple(sorted(found.layers)) for i in moving]
    active = [leaves[i] for i in moving]
    counts = [
        jnp.round(share * jnp.sum(mask, [a for a in range(mask.ndim) if a not in own], jnp.int32)).astype(
            jnp.int32
        )
        for mask, own in zip(active, layers, strict=True)
    ]
    dropped = lowest_of_each(small, counts, layers, among=active)
    stays = [mask & ~gone for mask, gone in zip(active, dropped, strict=True)]
    grown = highest_of_each(promised, counts, layers, among=[~mask for mask in stays])
    for i, stay, new in zip(moving, stays, grown, strict=True):
        leaves[i] = stay | new
    return jax.tree.unflatten(structure, leaves)
