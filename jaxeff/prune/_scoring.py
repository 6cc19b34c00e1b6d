"""Which leaves may be pruned, and the importance of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxeff import importance as criteria
from jaxeff.model.params import Params
from jaxeff.output.text import some
from jaxeff.prune._layouts import (
    Axes,
    Layout,
    Scores,
    assumed,
    by_shape,
    check_named,
    is_scores,
    of_statistics,
)
from jaxeff.statistics import Statistics

Prunable = Callable[[str, Any], bool] | Mapping[str, bool] | Layout | None


def scored(
    params: Any,
    statistics: Statistics | None = None,
    criterion: str | criteria.Score = "magnitude",
    *,
    prunable: Prunable = None,
) -> Any:
    """Score the importance of every weight, shaped like `params`.

    Args:
        params: a tree of arrays, or variables, of which only the `params` collection may be pruned.
        statistics: from `jaxeff.collect` or `jaxeff.calibrate`, for this criterion; without them, magnitudes.
        criterion: as in `jaxeff.analyze`.
        prunable: which leaves may be pruned: a layout of the program from `prune.layout`, a function
            `(path, leaf) -> bool`, or exceptions by path.

    Returns:
        Scores for a leaf that may be pruned; the number 0 for one that may not. With statistics or a layout,
        weights of the program may be pruned; without, floating arrays of two axes or more in each layer. Leaves
        named `bias`, `scale` or `embedding` stay whole. If a weight is not a kernel of inputs by outputs,
        its scores come with the meaning of its axes, in a box (`prune.Scores`) that reads as the array.

    Raises:
        ValueError: a path of `prunable` is not a leaf, or has no scores; or the criterion needs statistics.

    Warns:
        UserWarning: without a program, layers look stacked; says how each leaf was interpreted. Or the criterion reads
            activations, and those of a weight could not be read: it is scored by magnitude.

    >>> scored({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)})["kernel"]
    Array([[1., 2.]], dtype=float32)
    """
    own = Params.of(params)
    named = own.named
    if statistics is not None:
        found = criteria.scores(own, statistics, criterion)
        known = of_statistics(statistics, named)
    elif criteria.named(criterion).function is criteria.magnitude:
        found = {path: jnp.abs(leaf) for path, leaf in named.items()}
        known = prunable if isinstance(prunable, Layout) else by_shape(named)
        _warn_of_stacks(known, prunable)
    else:
        raise ValueError(f"`statistics` are missing: criterion {criterion!r} needs them")
    chosen = prunable_paths(prunable, named, known)
    if statistics is not None:
        _warn_of_unread(statistics, chosen, criterion)
    if missing := sorted(_asked_for(prunable, chosen) - found.keys()):
        raise ValueError(f"`prunable` asks for {missing[0]!r}, which multiplies no data and has no scores")
    scores = [
        _boxed(path, found[path], known[path].axes) if path in chosen & found.keys() else jnp.zeros(())
        for path in named
    ]
    tree = jax.tree.unflatten(jax.tree.structure(own.tree), scores)
    if not own.is_variables:
        return tree
    return {**jax.tree.map(lambda leaf: jnp.zeros(()), dict(params)), "params": tree}


def _boxed(path: str, scores: Array, axes: Axes | None) -> Any:
    """Box scores if `masks` would not know the meaning of their axes."""
    return scores if axes in (None, assumed(path, scores.shape)) else Scores(scores, axes)


def _asked_for(prunable: Prunable, chosen: set[str]) -> set[str]:
    """Return the leaves that the user named."""
    if isinstance(prunable, Layout) or callable(prunable):
        return chosen
    return {path for path, may in (prunable or {}).items() if may}


def prunable_paths(prunable: Prunable, named: Mapping[str, Any], known: Layout | None = None) -> set[str]:
    """Return the leaves that may be pruned.

    Args:
        known: decides for leaves that `prunable` does not name; names and shapes by default.
    """
    if isinstance(prunable, Layout):
        _check_layout(prunable, named)
        return {leaf.path for leaf in prunable.leaves if leaf.prunable}
    if callable(prunable):
        return {path for path, leaf in named.items() if prunable(path, leaf)}
    exceptions = dict(prunable or {})
    check_named(exceptions, named)
    known = by_shape(named) if known is None else known
    return {path for path in named if exceptions.get(path, known[path].prunable)}


def _check_layout(layout: Layout, named: Mapping[str, Any]) -> None:
    found = {leaf.path: leaf.shape for leaf in layout.leaves}
    wanted = {path: tuple(jnp.shape(leaf)) for path, leaf in named.items()}
    if found != wanted:
        different = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        raise ValueError(
            f"`prunable` is a layout for other params: {different[0]!r} has shape {found.get(different[0])} "
            f"there and {wanted.get(different[0])} here"
        )


def _warn_of_unread(statistics: Statistics, chosen: set[str], criterion: str | criteria.Score) -> None:
    asked = criteria.named(criterion)
    read = {site.path for site in statistics.sites}
    unread = [info for info in statistics.params if info.path in chosen - read and info.role == "weight"]
    if unread and asked.reads_activations:
        warnings.warn(
            f"{some([repr(info.path) for info in unread])} scored by magnitude, since criterion {asked.name!r} reads "
            f"activations, and those of {unread[0].path!r} could not be read: {unread[0].reason}. Such scores do not "
            "compare with those of other weights: leave these out with `prunable`, or write the model so that the "
            "weight meets data as it is stored",
            stacklevel=3,
        )


def _warn_of_stacks(known: Layout, prunable: Prunable) -> None:
    if known.stacked and not isinstance(prunable, Layout):
        where = ", ".join(repr(top) if top else "all leaves" for top in known.stacked)
        warnings.warn(
            f"the shapes under {where} look like stacked layers, and are taken so. `prunable="
            "prune.layout(params, apply_fn, batch)` asks the program instead; `prune.layout(params)` as "
            f"`prunable` agrees. Taken as:\n{known}",
            stacklevel=3,
        )


def after_pruned(kept: Array, scores: Any) -> Any:
    """Return scores of one leaf in which pruned weights are the lowest, below all others."""
    if is_scores(scores):
        return scores.replace_boxed(after_pruned(kept, scores.value))
    if not jnp.ndim(scores):
        return scores
    # Scores are ordered in float32, whose zero must be left to the pruned weights.
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return jnp.where(kept, jnp.maximum(wide, jnp.finfo(jnp.float32).tiny), 0)
