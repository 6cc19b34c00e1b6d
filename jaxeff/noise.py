"""Scores that a layer would have if its weights were noise, under what was seen of it: each metric's null.

In two steps, so that layers of all shapes share the second: a profile of the factors that the criterion puts
on the weights, then scores. Imports `exact`, `importance`, `pairs`, `precision`, `statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import pairs
from jaxeff.exact import COVERAGES, TIE
from jaxeff.importance import Criterion, magnitude, over_uses
from jaxeff.precision import wide
from jaxeff.statistics import Derivatives, SiteStatistics

_PROFILE, _RUN, _CELLS = 1 << 12, 1 << 4, 1 << 6
SIZE = _PROFILE // _RUN * _CELLS


def profile(
    criterion: Criterion,
    weight: jax.Array,
    sites: Sequence[SiteStatistics],
    derivatives: Derivatives,
    usable: jax.Array,
) -> jax.Array:
    """The factors that the criterion puts on the weights of a layer, whatever these are.

    Args:
        criterion: one that has a `null_power`.
        usable: [], False to take magnitudes instead.

    Returns:
        [4096], evenly spread over the layer, each about as often.
    """
    one = jnp.ones((1,) * weight.ndim, wide(weight.dtype))
    factor = one
    if sites or not criterion.reads_activations:
        # A weight of ones, of size 1 on every axis, leaves the factor alone, and as small as it is.
        factor = over_uses(criterion, one, sites, derivatives)
    factors = jnp.ravel(jnp.where(usable, factor, 1))
    return factors[np.arange(_PROFILE) * factors.size // _PROFILE]


def scores(criterion: Criterion, profile: jax.Array, usable: jax.Array) -> jax.Array:
    """Scores that a layer would have if its weights were noise, independent of all that was seen.

    The factors of the profile, sorted and averaged 16 at a time, times normal weights, cut into 64 equally
    likely cells and each put at its cell's mean. Utilization and Gini of the sample are those of
    infinitely many such weights to 1e-3 (0.753 and sqrt(2) - 1 for magnitudes alone).

    Returns:
        [16384].
    """
    assert criterion.null_power is not None
    # A constant, as the profile of a magnitude is, XLA would sort while compiling: in a second.
    profile = jax.lax.optimization_barrier(profile)
    factors = jnp.mean(_in_order(profile).reshape(-1, _RUN), axis=1)
    nodes = jnp.where(usable, _half_normal(_CELLS, criterion.null_power), _half_normal(_CELLS, 1))
    return jnp.ravel(factors[:, None] * nodes[None])


def _in_order(profile: jax.Array) -> jax.Array:
    """Sorted, where the factors differ at all."""
    # Bit patterns of what is not negative are ordered as the numbers are, and sorted five times as fast.
    ordered = lambda: pairs.float_of(jnp.sort(pairs.bits_of(profile)))  # noqa: E731
    return jax.lax.cond(jnp.min(profile) == jnp.max(profile), lambda: profile, ordered)


def known(criterion: Criterion) -> tuple[float, ...] | None:
    """The null where it is the same for every layer, as for magnitudes: the metrics of the scores.

    Returns:
        utilization, gini, coverage_50, coverage_80, coverage_90; or None where it depends on what was seen.
    """
    if criterion.function is not magnitude:
        return None
    nodes = np.sort(_half_normal(_CELLS, 1).astype(np.float64))
    shares, copies = nodes / nodes.sum(), SIZE // _CELLS
    gini = 2 * np.dot(np.arange(1, _CELLS + 1) - 0.5, shares) / _CELLS - 1
    reached = np.cumsum(np.repeat(shares[::-1] / copies, copies))
    coverages = [1 + np.searchsorted(reached, share * TIE) for share in COVERAGES.values()]
    used = np.exp(-np.dot(shares, np.log(shares))) / _CELLS
    return float(used), float(gini), *(float(count) / SIZE for count in coverages)


def _half_normal(cells: int, power: int) -> np.ndarray:
    """The means of |z|^power (1 or 2), z normal, in equally likely cells."""
    normal = NormalDist()
    edges = np.array([normal.inv_cdf(0.5 + 0.5 * cell / cells) for cell in range(cells)])
    density = np.array([*map(normal.pdf, edges), 0.0])
    if power == 1:
        means = 2 * cells * (density[:-1] - density[1:])
    else:
        moment = np.append(edges * density[:-1], 0.0)
        means = 1 + 2 * cells * (moment[:-1] - moment[1:])
    return means.astype(np.float32)
