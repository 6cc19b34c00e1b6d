"""Scores of one layer, and their reduction."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxeff import importance
from jaxeff.importance import Criterion
from jaxeff.importance import _null as null
from jaxeff.layers.stacks import (
    Arrays,
    Layer,
    unit_axes,
)
from jaxeff.metrics import _half_normal as half_normal
from jaxeff.metrics._curve import cells_of, unpacked
from jaxeff.metrics._half_normal import Null
from jaxeff.metrics._records import Metrics
from jaxeff.metrics._weighted import Spread, sums_of
from jaxeff.numerics.precision import wide, widened
from jaxeff.numerics.summation import namespace
from jaxeff.report import LayerNumbers
from jaxeff.statistics import (
    SiteStatistics,
)

SMALL = 1 << 14
"""Layers of at most this many weights are sorted, larger ones counted."""


class Reduced(NamedTuple):
    """Numbers of one layer besides its scores."""

    units: Any  # the mean importance of each unit's weights
    factors: Any  # of the null; [1] if the null is not sampled
    usable: Any  # whether the statistics that the criterion reads are finite
    largest: Any  # of |w|; nan if any weight is nan


def reduce(criterion: Criterion, arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
    """Return the scores of a layer, and its other numbers.

    Args:
        seen: whether the activations that the criterion reads were seen, and are finite.
    """
    scores, reduced = score(criterion, arrays, seen)
    return scores, reduced._replace(units=means_of_units(scores, unit_axes(arrays)))


def score(criterion: Criterion, arrays: Arrays, seen: Any) -> tuple[jax.Array, Reduced]:
    """Return the scores of a layer, and its other numbers without the units, which are sums of scores."""
    usable = seen
    if criterion.needs:
        finite = [jnp.all(jnp.isfinite(sums)) for sums in jax.tree.leaves(arrays.derivatives)]
        usable = functools.reduce(jnp.logical_and, finite, seen)
    magnitudes = importance.magnitude(widened(arrays.weight))
    # Use the weight's precision, whatever that of the activations, so that equal layers have equal types.
    scores = importance.score(criterion, *arrays).astype(magnitudes.dtype)
    # Fall back to magnitude if the criterion's statistics are not finite.
    scores = jnp.where(usable, scores, magnitudes)
    factors = jnp.ones(1, scores.dtype)
    if null.is_sampled(criterion):
        factors = null.factors_of(criterion, arrays.weight, arrays.sites, arrays.derivatives, usable)
    # Not of the magnitudes, which XLA would store for it.
    weight = lax.stop_gradient(widened(arrays.weight))
    largest = jnp.max(lax.max(weight, lax.neg(weight)))
    return scores, Reduced(None, factors, jnp.asarray(usable), largest)


def means_of_units(scores: Any, axes: Sequence[int]) -> Any:
    """Return the mean importance of each unit's weights, for a layer whose units lie along `axes`."""
    within = tuple(axis for axis in range(scores.ndim) if axis not in axes)
    count = math.prod(scores.shape[axis] for axis in within)
    # Divide first, so that sums of large scores do not overflow.
    return (scores * np.asarray(1 / count, scores.dtype)).sum(axis=within)


def was_seen(criterion: Criterion, sites: Sequence[SiteStatistics]) -> Any:
    """Return whether the activations that the criterion reads were seen at all, and are finite."""
    if not (criterion.reads_activations and sites):
        return np.bool_(True)
    # A branch that was not taken has seen nothing.
    counts = functools.reduce(operator.add, [site.post.count for site in sites])
    sides = {"post": ("post",), "input": ("input",)}.get(criterion.side, ("input", "post"))
    read = [getattr(site, side).absolute_sum for site in sites for side in sides]
    read += jax.tree.leaves([site.gate for site in sites])
    xp = namespace(counts)
    return functools.reduce(operator.and_, [xp.all(xp.isfinite(sums)) for sums in read], xp.all(counts > 0))


def nonfinite_count(weight: Any) -> jax.Array:
    return jnp.sum(~jnp.isfinite(weight), dtype=jnp.int32)


def sums_of_units(means: Any, size: int) -> Any:
    """Return the importance of each unit: the sum over its weights, of `size` in all."""
    return means * np.asarray(size // max(means.size, 1), means.dtype)


def padded(scores: jax.Array, length: int) -> jax.Array:
    flat = scores.ravel()
    return jnp.pad(flat, (0, length - flat.size))


def is_sorted(layer: Layer) -> bool:
    return layer.size <= SMALL or wide(layer.arrays.weight.dtype) == jnp.float64


def is_small(layer: Layer) -> bool:
    return layer.size <= SMALL and wide(layer.arrays.weight.dtype) == jnp.float32


class Read(NamedTuple):
    """Numbers of a layer's spread."""

    sums: Any
    cells: Any


def read_spread(spread: Spread, curves: bool) -> Read:
    return Read(sums_of(spread), cells_of(spread) if curves else None)


def untallied(zeros: Any) -> tuple[Any, Any, Any, Any]:
    """Return the tallies of a sample: no zeros, no entries below a threshold, no invalid entries."""
    return zeros, zeros, zeros, zeros


def layer_numbers(
    criterion: Criterion,
    metrics: Metrics,
    noise: Null | None,
    effective_units: Any,
    reduced: Reduced,
    nonfinite: Any,
    cells: Any,
) -> LayerNumbers:
    """Return the numbers of one layer, or of several stacked.

    Args:
        noise: the null, if it is sampled.
    """
    xp = namespace(metrics.utilization)
    if noise is None and criterion.null_power is not None:
        known = half_normal.null_of_magnitude()
        noise = jax.tree.map(lambda value: xp.full_like(metrics.utilization, value), known)
    units = xp.where(effective_units > 0, effective_units, 1)
    return LayerNumbers(
        metrics,
        noise,
        effective_units,
        metrics.effective_params / units,
        nonfinite,
        reduced.largest,
        reduced.usable,
        distribution=None if cells is None else unpacked(cells),
    )


def is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
