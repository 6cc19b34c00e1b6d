"""Scores of a model's weights by a criterion, over all uses of each weight and at any level."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.importance import _levels as levels
from jaxeff.importance._criteria import Criterion, Score, magnitude, named
from jaxeff.model.params import Params
from jaxeff.numerics.precision import widened
from jaxeff.statistics import Derivatives, SiteStatistics, Statistics, UnitStatistics, check_params


def missing(criterion: Criterion, statistics: Statistics) -> str | None:
    """Return in words what the criterion reads and the statistics lack; None if nothing."""
    weights = [info.path for info in statistics.params if info.role == "weight"]
    for quantity, total in criterion.needs:
        found = (
            [site.gate for site in statistics.sites]
            if quantity == "gate"
            else [getattr(statistics.derivatives.get(path, Derivatives()), quantity) for path in weights]
        )
        if any(moments is None or getattr(moments, total) is None for moments in found):
            return quantity.replace("_", " ")
    return None


def score(
    criterion: str | Score | Criterion,
    weight: jax.Array,
    sites: Sequence[SiteStatistics],
    derivatives: Derivatives | None = None,
) -> jax.Array:
    """Return the importance of a weight over all its uses, in float32 or wider.

    Of a tied or shared weight, uses that read it alike count as one for a criterion of inputs, as in a loop over them.
    Otherwise it is scored at each use, and the scores are averaged by the number of positions that each use saw.
    Derivatives already cover all uses.

    Args:
        sites: of the weight; without any, a criterion that reads activations returns magnitudes.
        derivatives: of the loss with respect to the weight, for a criterion that needs them.

    Raises:
        ValueError: the criterion returned a shape other than the weight's.
    """
    criterion, weight = named(criterion), widened(weight)
    if not sites and criterion.reads_activations:
        return magnitude(weight)
    importance = over_uses(criterion, weight, sites, derivatives or Derivatives())
    if jnp.shape(importance) != jnp.shape(weight):
        raise ValueError(
            f"`criterion` {criterion.name} returned shape {jnp.shape(importance)} for a weight of shape "
            f"{jnp.shape(weight)}: return one score per weight"
        )
    return importance


def scores(
    params: Any,
    statistics: Statistics,
    criterion: str | Score | Criterion = "activation",
    *,
    level: str = "weight",
    reduction: str = "sum",
) -> dict[str, jax.Array]:
    """Score all weights, units, heads or layers of a model, by path.

    Args:
        params: as in `jaxeff.analyze`.
        statistics: from `jaxeff.collect` or `jaxeff.calibrate`, for this criterion.
        criterion: as in `jaxeff.analyze`.
        level: 'weight' returns arrays shaped like each weight; 'unit' arrays shaped like its unit axes (neurons,
            channels, head features); 'head' [units] for each attention, by the common path of its weights, where
            heads that share keys and values are one unit; 'layer' []. Layers that a scan stacks keep their axes.
        reduction: how the scores of several weights are combined: 'sum', 'mean', 'max' or 'l2'.

    Raises:
        TypeError: `statistics` are something else.
        ValueError: a name is unknown, the statistics lack what the criterion reads, or are those of other params.

    >>> import jaxeff
    >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.0]])}
    >>> statistics = jaxeff.collect(params, lambda p, x: x @ p["w"], jnp.eye(2))
    >>> scores(params, statistics, "magnitude", level="unit", reduction="max")["w"]
    Array([3., 2.], dtype=float32)
    """
    chosen = named(criterion)
    if reduction not in levels.REDUCTIONS:
        raise ValueError(
            f"`reduction` must be one of {', '.join(map(repr, levels.REDUCTIONS))}, got {reduction!r}"
        )
    if level not in _LEVELS:
        raise ValueError(f"`level` must be one of {', '.join(map(repr, _LEVELS))}, got {level!r}")
    leaves = Params.of(params).named
    check_params(statistics, leaves)
    found = {
        info.path: score(
            chosen,
            leaves[info.path],
            [site for site in statistics.sites if site.path == info.path],
            statistics.derivatives.get(info.path),
        )
        for info in statistics.params
        if info.role == "weight"
    }
    return _LEVELS[level](found, statistics, levels.REDUCTIONS[reduction])


_LEVELS: Mapping[str, Callable[[levels.Scores, Statistics, levels.Reduction], dict[str, jax.Array]]] = {
    "weight": lambda scores, statistics, reduction: dict(scores),
    "unit": levels.by_unit,
    "head": levels.by_head,
    "layer": levels.by_layer,
}


def over_uses(
    criterion: Criterion, weight: jax.Array, sites: Sequence[SiteStatistics], derivatives: Derivatives
) -> jax.Array:
    """Average the criterion's scores over a weight's uses, weighted by the positions that each saw."""
    sites = sites or (_unread(weight),)
    if criterion.side == "input":
        sites = _alike_joined(sites)
    sites = [dataclasses.replace(site, derivatives=derivatives) for site in sites]
    if not criterion.reads_activations:
        return criterion.function(weight, sites[0])
    total = jnp.maximum(functools.reduce(jnp.add, [site.post.count for site in sites]), 1)
    scores = [criterion.function(weight, site) * (site.post.count / total) for site in sites]
    return functools.reduce(jnp.add, scores)


def _alike_joined(sites: Sequence[SiteStatistics]) -> list[SiteStatistics]:
    """Join uses with the same inputs and units, so that a root mean square is that of all positions."""
    joined: dict[Any, SiteStatistics] = {}
    for site in sites:
        key = site.kind, site.input_axes, site.unit_axes
        if key in joined:
            first = joined[key]
            site = dataclasses.replace(first, input=first.input + site.input, post=first.post + site.post)
        joined[key] = site
    return [*joined.values()]


def _unread(weight: jax.Array) -> SiteStatistics:
    """Return a use about which nothing is known; its units are the last axis, as in Flax kernels."""
    nan = jnp.full((1,) * weight.ndim, jnp.nan)
    unknown = UnitStatistics(nan, nan, nan, nan, jnp.zeros(()))
    units = (weight.ndim - 1,)
    return SiteStatistics(
        path="", kind="weight", nonlinearity="identity", bias=None, unit_axes=units, input_axes=(),
        layer_axes=(), macs=None, input=unknown, pre=unknown, post=unknown,
    )  # fmt: skip
