"""The public metrics. N is the number of weights, S their sum and p = x / S; logarithms are natural.

A negative or non-finite entry makes every float metric nan and is counted in `Metrics.nonfinite`. An empty
array raises ValueError; anything else than an array of real numbers raises TypeError. Metrics are computed in
float64 for float64, and in float32 for all other dtypes, integers included.

Derivatives are those of the formulas; counts have none. The slope of entropy at x = 0, infinite from the right,
is taken as 0, and so are all slopes of a metric whose value is a convention (an all-zero or invalid layer).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxeff.metrics import _order, sketch
from jaxeff.metrics._checks import checked, checked_share, checked_threshold
from jaxeff.metrics._order import importances, relative
from jaxeff.metrics._records import Metrics
from jaxeff.metrics._weighted import Information, information, metrics_of, sums_of, surprises, tie
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.numerics.summation import running_total, total

SORTED = 1 << 14
"""Arrays of up to this many weights, and float64 arrays, are sorted; larger ones are counted by bit pattern."""


def summarize(x: ArrayLike) -> Metrics:
    """Compute all metrics of x [...] at once.

    Sorts up to 16,384 weights, and float64 of any size; counts larger arrays, as `jaxeff.sketch` does.
    Errors against exact arithmetic: 2e-6 for metrics in [0, 1]; 2e-6 max(1, H) for entropy; relative 5e-6 for
    effective_params, mean and max; relative 1e-5, or 1e-6 of the mean, for std. A coverage is right for a
    share within 2e-6. Counting puts weights within 0.2 % of each other into one bin: if that concerns a share
    s of all weights, Gini and coverages are good to 5e-4 s, and the bin at the bound of a relative sparsity
    counts in part.

    Args:
        x: importances, non-negative.

    Raises:
        ValueError: x is empty.
        TypeError: x is not an array, or holds booleans or complex numbers.

    >>> summarize(jnp.array([4.0, 3.0, 2.0, 1.0])).coverage_90
    Array(0.75, dtype=float32)
    """
    return by_compiler(_summarize, widened(checked(x)))


@jax.jit
def _summarize(x: Array) -> Metrics:
    if x.size <= SORTED or x.dtype == jnp.float64:
        return _by_order(x)
    return _counted(x)


def _by_order(x: Array) -> Metrics:
    spread = _order.spread_of(x.ravel(), x.size)
    return metrics_of(sums_of(spread))


@jax.custom_jvp
def _counted(x: Array) -> Metrics:
    counts = sketch.count(x)
    return metrics_of(sums_of(sketch.spread_of(counts)), sketch.integers_of(counts), sketch.squares_of(x))


@_counted.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Metrics, Metrics]:
    return _counted(*primals), jax.jvp(_by_order, primals, tangents)[1]


# Single metrics, which sort only if they need an order.


def _information(x: ArrayLike) -> Information:
    return by_compiler(_information_of, widened(checked(x)))


def _information_of(x: Array) -> Information:
    x = x.ravel()
    values, invalid = _relative(x)
    ones = jnp.ones((), x.dtype)
    held, surprise = (total(part) for part in surprises(values, ones))
    found = information(jnp.asarray(x.size, x.dtype), held, surprise)
    return Information(*(_valid(invalid, field) for field in found))


def _relative(x: Array) -> tuple[Array, Array]:
    """Return importances over the largest, with invalid entries as 0, and which entries are invalid."""
    bits, invalid = importances(lax.stop_gradient(x))
    x = jnp.where(invalid, 0, x)
    return relative(x, jnp.max(x), bits, jnp.max(bits))[0], invalid


def _valid(invalid: Array, value: Array) -> Array:
    return jnp.where(jnp.any(invalid), jnp.nan, value)


@jax.jit
def entropy(x: ArrayLike) -> Array:
    """Compute the Shannon entropy H = -sum p ln p in nats, with 0 ln 0 = 0.

    It ranges from 0 (one weight holds everything) to ln N (all weights equal). Nan for an all-zero layer.

    References:
        Shannon, A Mathematical Theory of Communication, 1948

    >>> entropy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.6931472, dtype=float32)
    """
    return _information(x).entropy


@jax.jit
def normalized_entropy(x: ArrayLike) -> Array:
    """Compute H / ln N, in [0, 1]; 1 for a single weight, nan for an all-zero layer.

    >>> normalized_entropy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    return _information(x).normalized_entropy


@jax.jit
def effective_params(x: ArrayLike) -> Array:
    """Compute exp(H), the number of equal weights with this entropy; 0 for an all-zero layer.

    This is the effective rank of Roy and Vetterli, with importances in place of singular values.

    References:
        Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality, 2007

    >>> effective_params(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(2., dtype=float32)
    """
    return _information(x).effective_params


@jax.jit
def utilization(x: ArrayLike) -> Array:
    """Compute exp(H) / N, in [1/N, 1]; 0 for an all-zero layer.

    Noise does not have 1: |w| has sqrt(e) / 2 = 0.824 for uniform w and 0.753 for normal w.

    >>> utilization(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    return _information(x).utilization


@jax.jit
def redundancy(x: ArrayLike) -> Array:
    """Compute 1 - H / ln N, in [0, 1]; 1 for an all-zero layer. For a given distribution it shrinks as 1 / ln N.

    >>> redundancy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    return _information(x).redundancy


def gini(x: ArrayLike) -> Array:
    """Compute the Gini coefficient: 0 if all weights are equal, (N - 1) / N if one holds everything.

    With x sorted ascending and i from 1, G = 2 sum i x_(i) / (N S) - (N + 1) / N. It does not change if a layer
    is scaled or repeated, so layers can be compared. Nan for an all-zero layer.

    References:
        Hurley and Rickard, Comparing Measures of Sparsity, 2009, arXiv:0811.4706

    >>> gini(jnp.array([0.0, 0.0, 0.0, 1.0]))
    Array(0.75, dtype=float32)
    """
    return summarize(x).gini


@partial(jax.jit, static_argnames="share")
def coverage(x: ArrayLike, share: float) -> Array:
    """Compute the smallest fraction of the weights that together hold `share` of the importance.

    It is k / N, where k is the smallest count whose k largest x reach share * S (to one part in 10^6, so that
    8 of 10 equal weights hold 0.8). Nan for an all-zero layer.

    Args:
        x: [...], importances.
        share: a Python number in (0, 1].

    >>> coverage(jnp.array([4.0, 3.0, 2.0, 1.0]), 0.5)
    Array(0.5, dtype=float32)
    """
    x = lax.stop_gradient(widened(checked(x)))
    return by_compiler(partial(_coverage, share=checked_share(share)), x)


def _coverage(x: Array, share: float) -> Array:
    x = x.ravel()
    spread = _order.spread_of(x, x.size)
    values, invalid = spread.distribution.values, spread.tallied[1] > 0
    through = running_total(values)
    count = jnp.sum(through < share * tie(x.dtype) * through[-1], dtype=jnp.int32) + 1
    fraction = jnp.minimum(count, x.size).astype(x.dtype) / x.size
    return _valid(invalid, jnp.where(values[0] > 0, fraction, jnp.nan))


@partial(jax.jit, static_argnames="threshold")
def sparsity(x: ArrayLike, threshold: float) -> Array:
    """Compute the fraction of weights with x < threshold, strictly and in exact arithmetic.

    It depends on the scale of x; `relative_sparsity` does not.

    Args:
        x: [...], importances.
        threshold: a finite Python number >= 0.

    >>> sparsity(jnp.array([0.0, 0.01, 0.5, 1.0]), 0.5)
    Array(0.5, dtype=float32)
    """
    limit, x = checked_threshold(threshold), widened(checked(x))
    bits, invalid = importances(lax.stop_gradient(x))
    return _fraction(bits < _order.first_not_below(limit, x.dtype), invalid, x)


@partial(jax.jit, static_argnames="threshold")
def relative_sparsity(x: ArrayLike, threshold: float) -> Array:
    """Compute the fraction of weights with x < threshold * mean(x), which does not depend on the scale of x.

    An x within one part in 10^6 of the bound is on it, not below. 1 for an all-zero layer.

    Args:
        x: [...], importances.
        threshold: a finite Python number >= 0, in units of the mean.

    >>> relative_sparsity(jnp.array([0.001, 1.0, 1.0, 1.0]), 1e-2)
    Array(0.25, dtype=float32)
    """
    x = lax.stop_gradient(widened(checked(x)))
    return by_compiler(partial(_relative_sparsity, limit=checked_threshold(threshold)), x)


def _relative_sparsity(x: Array, limit: float) -> Array:
    x = x.ravel()
    values, invalid = _relative(x)
    mean = total(values) / x.size
    limit = min(limit, 2.0 * x.size)  # the largest is at most N times the mean
    fraction = _fraction(values < limit * tie(x.dtype) * mean, invalid, x)
    return jnp.where(mean > 0, fraction, _valid(invalid, jnp.ones((), x.dtype)))


def _fraction(hits: Array, invalid: Array, x: Array) -> Array:
    return _valid(invalid, jnp.sum(hits, dtype=jnp.int32).astype(x.dtype) / x.size)
