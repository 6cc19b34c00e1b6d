"""The null of a layer: the metrics of its scores if its weights were noise.

Scores are proportional to a power of |w|, times factors that come from the statistics of the layer. Noise is
independent of these factors, so its scores are products of the factors and of |z|^power, with z normal. The
utilization of such products is the product of both utilizations. Gini and coverages are taken from a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.importance._criteria import Criterion, magnitude
from jaxeff.importance._scores import over_uses
from jaxeff.metrics import _half_normal as half_normal
from jaxeff.metrics._half_normal import Null
from jaxeff.metrics._order import importances
from jaxeff.metrics._weighted import Weighted, information, surprises
from jaxeff.numerics.meshes import gathered
from jaxeff.numerics.precision import wide
from jaxeff.numerics.summation import float_of, namespace, total
from jaxeff.statistics import Derivatives, SiteStatistics

_PROFILE, _RUN, _CELLS = 1 << 12, 1 << 5, 1 << 5
SIZE = _PROFILE // _RUN * _CELLS


def is_sampled(criterion: Criterion) -> bool:
    """Return whether there is a null that depends on the statistics of the layer."""
    return criterion.null_power is not None and criterion.function is not magnitude


def factors_of(
    criterion: Criterion,
    weight: jax.Array,
    sites: Sequence[SiteStatistics],
    derivatives: Derivatives,
    usable: jax.Array,
) -> jax.Array:
    """Return the factors by which the criterion multiplies the weights of a layer.

    Args:
        criterion: one that has a `null_power`.
        usable: [], False to use magnitudes instead.

    Returns:
        [n], n up to 4096, evenly spaced over the layer.
    """
    one = jnp.ones((1,) * weight.ndim, wide(weight.dtype))
    factor = one
    if sites or not criterion.reads_activations:
        # A weight of ones with size 1 on every axis leaves only the factor, at its own size.
        factor = over_uses(criterion, one, sites, derivatives)
    factors = jnp.ravel(gathered(jnp.where(usable, factor, 1).astype(wide(weight.dtype))))
    return factors if factors.size <= _PROFILE else profile_of(factors)


def profile_of(factors: Any) -> Any:
    """Return [..., 4096], evenly spaced among the factors [..., n], each about equally often."""
    return factors[..., np.arange(_PROFILE) * factors.shape[-1] // _PROFILE]


def sample_of(criterion: Criterion, factors: Any, usable: Any) -> Weighted:
    """Return scores of noise under the factors of one layer, [4096], descending.

    Factors are sorted and averaged 32 at a time, and the noise is cut into 32 equally likely cells, each at
    its mean: Gini and coverages are those of infinitely many weights to 2e-3, and to 4e-3 if a hundredth
    of the factors holds nearly everything.

    Args:
        factors: from `factors_of`; NumPy arrays stay on the host.
    """
    xp, factors = namespace(factors), profile_of(factors)
    runs = xp.mean(_in_order(_relative(factors)).reshape(-1, _RUN), axis=1)
    nodes = xp.where(
        usable, *(half_normal.cell_means(power, _CELLS) for power in (_power(criterion), 1))
    ).astype(factors.dtype)
    sample = _in_order(xp.ravel(runs[:, None] * nodes[None]))[::-1]
    sample = sample / xp.where(sample[0] > 0, sample[0], 1)
    return Weighted(sample, xp.ones_like(sample), sample, xp.zeros_like(sample), sample[0])


def null_of(criterion: Criterion, used: Any, usable: Any, sums: Any) -> Null:
    """Return the null of one layer, or of several stacked.

    Args:
        used: [...], utilization of the factors.
        sums: [..., 16], sums of the samples, from `sums_of`.
    """
    xp = namespace(sums)
    used = used * xp.where(usable, half_normal.UTILIZATION[_power(criterion)], half_normal.UTILIZATION[1])
    alive = sums[..., 1] > 0
    gini = xp.where(alive, sums[..., 5] / xp.where(alive, sums[..., 1], 1), math.nan)
    coverages = [xp.where(alive, sums[..., i] / sums[..., 0], math.nan) for i in (9, 10, 11)]
    return Null(used, gini, *coverages)


def utilization_of(factors: Any) -> Any:
    """Return exp(entropy) / n of the factors [n]."""
    xp = namespace(factors)
    held = [total(part) for part in surprises(_relative(factors), xp.ones_like(factors))]
    return information(xp.full_like(held[0], factors.size), *held).utilization


def _relative(factors: Any) -> Any:
    xp = namespace(factors)
    largest = xp.max(factors, axis=-1, keepdims=True)
    return factors / xp.where(largest > 0, largest, 1)


def _power(criterion: Criterion) -> int:
    assert criterion.null_power is not None
    return criterion.null_power


def _in_order(x: Any) -> Any:
    """Sort non-negative values ascending."""
    if namespace(x) is np:
        return np.sort(x)
    # XLA would sort a constant, such as the factors of a magnitude, while compiling, which takes a second.
    bits, _ = importances(jax.lax.optimization_barrier(x))
    return float_of(jnp.sort(bits))
