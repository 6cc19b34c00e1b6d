"""Importance: one score per weight, shaped like the weight, from the weight and what its units emit.

A criterion is a function `criterion(weight, site) -> importance`; a user's own is passed the same
way. `site` is a `SiteStatistics`: its sums broadcast against the weight, so that a criterion reads
as its formula. Imports `statistics`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.precision import wide, widened
from jaxeff.statistics import SiteStatistics

Criterion = Callable[[jax.Array, SiteStatistics], jax.Array]


def magnitude(weight: jax.Array, site: SiteStatistics | None = None) -> jax.Array:
    """abs(w), whatever the unit emits.

    References:
        Han, Pool, Tran and Dally, Learning both Weights and Connections, 2015, arXiv:1506.02626

    >>> magnitude(jnp.array([[-2.0, 1.0]]))
    Array([[2., 1.]], dtype=float32)
    """
    return jnp.abs(weight)


def activation(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """abs(w_ij) mean abs(a_j), a_j the post-activation of unit j over the batch and all positions.

    The factor is the same for all weights of a unit: it ranks units, and leaves the order of the
    weights within a unit to their magnitude.

    Args:
        weight: any shape.
        site: whose `post` sums broadcast against it.
    """
    return jnp.abs(weight) * site.post.mean_absolute


def wanda(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """abs(w_ij) rms(x_i), x_i input i over the batch and all positions.

    A weight on an input that is always 0 has importance 0, which no output-side criterion sees. For
    an embedding, x is the one-hot row of each token.

    Args:
        weight: any shape.
        site: whose `input` sums broadcast against it.

    References:
        Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models,
        2023, arXiv:2306.11695
    """
    return jnp.abs(weight) * site.input.rms


CRITERIA: Mapping[str, Criterion] = {"activation": activation, "magnitude": magnitude, "wanda": wanda}
_SIDES: Mapping[Criterion, str] = {activation: "post", magnitude: "magnitude", wanda: "input"}


def criterion_named(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a function is its own criterion.

    >>> criterion_named("magnitude") is magnitude
    True
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(
            f"`criterion` must be one of {', '.join(map(repr, CRITERIA))} or a function "
            f"(weight, site) -> importance, got {criterion!r}"
        )
    return CRITERIA[criterion]


def name(criterion: Criterion) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def side(criterion: Criterion) -> str:
    """What the criterion reads: 'post', 'input', 'magnitude' for no activations, 'user' for a user's own."""
    return _SIDES.get(criterion, "user")


def score(criterion: Criterion, weight: jax.Array, sites: Sequence[SiteStatistics]) -> jax.Array:
    """The importance of a weight over all its uses, in float32 or wider.

    A tied or shared weight is scored at each use; the scores are averaged by the number of
    positions that each use saw, as if all had been one.

    Raises:
        ValueError: the criterion returned another shape than the weight's.
    """
    weight = widened(weight)
    if not sites or criterion is magnitude:
        return magnitude(weight)
    importance = _over_uses(criterion, weight, sites)
    if jnp.shape(importance) != jnp.shape(weight):
        raise ValueError(
            f"`criterion` {name(criterion)} returned shape {jnp.shape(importance)} for a weight of shape "
            f"{jnp.shape(weight)}: return one score per weight"
        )
    return importance


_SAMPLE = 1 << 16


def has_null(criterion: Criterion) -> bool:
    """Whether the criterion is abs(w) times a factor; the null of any other is unknown."""
    return side(criterion) != "user"


def null_sample(
    criterion: Criterion, weight: jax.Array, sites: Sequence[SiteStatistics], usable: jax.Array
) -> jax.Array:
    """Scores that the layer would have if its weights were noise, independent of the activations.

    Normal weights, cut into equally likely cells (64 or more) and each put at its cell's mean, times
    the factor that the criterion puts on each weight. Utilization and Gini of the sample are those of
    infinitely many such weights to 1e-3 (0.753 and sqrt(2) - 1 for magnitudes alone).

    Args:
        criterion: one that `has_null`.
        usable: [], False to take magnitudes instead.

    Returns:
        [n], at most 65,536 scores.
    """
    one = jnp.ones((1,) * weight.ndim, wide(weight.dtype))
    # A weight of ones, of size 1 on every axis, leaves the factor alone, and as small as it is.
    factor = _over_uses(criterion, one, sites) if sites and criterion is not magnitude else one
    profile = _thinned(jnp.ravel(jnp.where(usable, factor, 1)))
    nodes = _half_normal(min(4096, _SAMPLE // profile.size))
    return jnp.ravel(profile[:, None] * nodes[None])


def _over_uses(criterion: Criterion, weight: jax.Array, sites: Sequence[SiteStatistics]) -> jax.Array:
    total = jnp.maximum(functools.reduce(jnp.add, [site.post.count for site in sites]), 1)
    scores = [criterion(weight, site) * (site.post.count / total) for site in sites]
    return functools.reduce(jnp.add, scores)


def _thinned(profile: jax.Array) -> jax.Array:
    """At most 1,024 numbers that stand for the profile: means of equal runs of its sorted values."""
    most = _SAMPLE // 64
    if profile.size <= most:
        return profile
    strided = profile[:: math.ceil(profile.size / (16 * most))]
    run = math.ceil(strided.size / most)
    whole = strided.size - strided.size % run
    return jnp.mean(jnp.sort(strided)[:whole].reshape(-1, run), axis=1)


def _half_normal(cells: int) -> np.ndarray:
    """The means of |z|, z normal, in equally likely cells."""
    normal = NormalDist()
    edges = [normal.inv_cdf(0.5 + 0.5 * cell / cells) for cell in range(cells)]
    density = np.array([*map(normal.pdf, edges), 0.0])
    return (2 * cells * (density[:-1] - density[1:])).astype(np.float32)
