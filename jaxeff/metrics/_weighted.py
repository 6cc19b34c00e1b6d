"""The metrics of a weighted distribution: values, and how many weights have each.

Sorted arrays (with counts of 1, and 0 for padding), bins of histograms and sketches, and the null of a layer are
such distributions. With v_1 >= v_2 >= ... the values, n their counts, N = sum n, S = sum n v and
C_k = n_1 + ... + n_k:

    entropy   ln S - (sum n v ln v) / S
    Gini      sum n_k v_k (N - C_k - C_{k-1}) / (N S)
    coverage  the first group at which the running sum reaches the share, and as much of it as is needed
    std       sqrt(sum n (v - mean)^2 / N)

Values are relative to the largest, so that no sum overflows. The code uses the array API: NumPy arrays are
summarized on the host, in their own precision.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jaxeff.metrics._records import COVERAGES, RELATIVE_THRESHOLDS, Metrics
from jaxeff.numerics.summation import namespace, running_total, total

SHARES = tuple(COVERAGES.values())
SQUARES = 6
"""Index of sum n (v - mean)^2 among the sums."""


class Weighted(NamedTuple):
    """A distribution of importances, relative to the largest.

    Attributes:
        values: [..., K], descending from 1; for a bin of several weights their mean.
        counts: [..., K], floats; 0 for padding.
        low: [..., K], lower bound of each value's bin; None if values are single weights.
        width: [..., K], width of the bin; None if values are single weights.
        largest: [...], the largest importance.
    """

    values: Any
    counts: Any
    low: Any
    width: Any
    largest: Any


class Spread(NamedTuple):
    """How the weights of a layer are spread.

    Attributes:
        tallied: four arrays [..., K] or [..., 1], how many weights of each entry, or of all, are 0, are no
            importance, are below 1e-2, and below 1e-3.
    """

    distribution: Weighted
    tallied: tuple[Any, Any, Any, Any]


def tie(dtype: Any) -> float:
    """Return the factor by which a sum may miss a target and still reach it: 8 of 10 equal weights hold 0.8."""
    return 1 - (1e-6 if np.dtype(dtype).itemsize == 4 else 1e-12)


def surprises(values: Any, counts: Any) -> tuple[Any, Any]:
    """Return n v and n v ln v of each entry. The slope at a weight of 0, which is infinite, is 0 by convention."""
    xp = namespace(values)
    positive = values > 0
    held = xp.where(positive, values, 0) * counts
    return held, held * xp.log(xp.where(positive, values, 1))


def reached(values: Any, counts: Any, running: Any, through: Any, targets: Any, largest: Any = None) -> Any:
    """Count how many of the largest weights sum to each target [..., T], of descending values [..., K].

    Args:
        running: [..., K], running sum of n.
        through: [..., K], running sum of n v.
        largest: [..., K], assumed for the weights of the group that reaches the target; their mean by default.
    """
    xp = namespace(values)
    held, most = counts * values, values if largest is None else largest
    short = through[..., None, :] < targets[..., :, None]  # groups that are needed whole and do not suffice
    if xp is np:
        # A sixth of the passes; on a device the gathers cost more than they save.
        at = np.minimum(np.count_nonzero(short, axis=-1), values.shape[-1] - 1)
        of_all = running - counts, running, through - held, most
        whole, upto, before, value = (np.take_along_axis(part, at, axis=-1) for part in of_all)
    else:
        whole, before = (total(xp.where(short, part[..., None, :], 0)) for part in (counts, held))
        value = xp.max(xp.where(short | (counts == 0)[..., None, :], 0, most[..., None, :]), axis=-1)
        upto = xp.min(xp.where(short, running[..., -1:, None], running[..., None, :]), axis=-1)
    more = xp.ceil((targets - before) / xp.where(value > 0, value, 1))
    # At most the size of the group, even if the quotient was rounded up.
    return xp.minimum(whole + xp.maximum(more, 1), upto)


def sums_of(spread: Spread) -> Any:
    """Return the sums [..., 16] from which `metrics_of` computes every metric."""
    (values, counts, _, _, largest), tallied = spread
    xp, dtype = namespace(values), values.dtype
    held, surprise = surprises(values, counts)
    # From the values themselves, because Gini and mean have slopes at 0.
    running, through = running_total(counts), running_total(counts * values)
    size, sum_ = running[..., -1], through[..., -1]
    mean = (sum_ / size)[..., None]
    below = [_below(spread.distribution, mean, threshold) for threshold in RELATIVE_THRESHOLDS.values()]
    # For each group, the fraction of weights after it minus the fraction before it.
    balance = 1 - (2 * running - counts) / size[..., None]
    terms = [held, surprise, counts * values * balance, counts * (values - mean) ** 2]
    sums = xp.stack([total(term) for term in (*terms, *(counts * part for part in below), *tallied)], axis=-1)
    targets = xp.asarray(SHARES, dtype=dtype) * (tie(dtype) * sum_[..., None])
    found = reached(values, counts, running, through, targets)
    return xp.concatenate(
        [xp.stack([size, sum_, largest], axis=-1), sums[..., :6], found, sums[..., 6:]], axis=-1
    )


def _below(distribution: Weighted, mean: Any, threshold: float) -> Any:
    """Return the fraction of each group below the threshold times the mean, interpolated in its bin."""
    values, counts, low, width, _ = distribution
    xp = namespace(values)
    limit = threshold * tie(values.dtype) * mean
    below = (values < limit).astype(values.dtype)
    if width is None:
        return below
    # Weights are spread evenly about their mean, as far as the bin allows; with the mean at its edge all are equal.
    reach = xp.minimum(values - low, low + width - values)
    inside = xp.clip((limit - values) / xp.where(reach > 0, 2 * reach, 1) + 0.5, 0, 1)
    return xp.where((counts > 1) & (reach > 0), inside, below)


def metrics_of(sums: Any, integers: Any = None, squares: Any = None) -> Metrics:
    """Compute the metrics of one layer, or of several stacked."""
    xp = namespace(sums)
    size, sum_, largest, present, surprise, gaps, off, *rest = (sums[..., i] for i in range(16))
    squares = off if squares is None else squares
    below, reached, (zeros, invalid, *sparse) = rest[:2], rest[2:5], rest[5:]
    alive = sum_ > 0
    mean = sum_ / size
    varies = squares > 0
    deviation = xp.where(varies, xp.sqrt(xp.where(varies, squares, 1) / size), 0)
    floats = [
        *information(size, present, surprise),
        xp.where(alive, xp.maximum(gaps, 0) / xp.where(alive, sum_, 1), math.nan),
        *(xp.where(alive, xp.minimum(k, size) / size, math.nan) for k in reached),
        *(count / size for count in sparse),
        *(xp.where(alive, part / size, 1) for part in below),
        mean * largest,
        deviation * largest,
        largest,
    ]
    if integers is None:
        integers = xp.stack([zeros, invalid, size], axis=-1).astype(np.int32)
    valid = (xp.where(invalid > 0, math.nan, column) for column in floats)
    return Metrics(*valid, *(integers[..., i] for i in range(3)))


class Information(NamedTuple):
    """Entropy and the metrics derived from it."""

    entropy: Any
    normalized_entropy: Any
    effective_params: Any
    utilization: Any
    redundancy: Any


def information(size: Any, sum_: Any, surprise: Any) -> Information:
    """Compute from N, S = sum n v and sum n v ln v, with v relative to the largest."""
    xp = namespace(sum_)
    alive = sum_ > 0
    sum_ = xp.where(alive, sum_, 1)
    log_size = xp.log(size)
    # Rounding must not take it above that of equal weights, or below that of a single one.
    entropy = xp.clip(xp.log(sum_) - surprise / sum_, 0, log_size)
    normalized = xp.where(size > 1, entropy / xp.where(size > 1, log_size, 1), 1)
    used = xp.exp(entropy - log_size)
    return Information(
        xp.where(alive, entropy, math.nan),
        xp.where(alive, normalized, math.nan),
        xp.where(alive, used * size, 0),
        xp.where(alive, used, 0),
        xp.where(alive, 1 - normalized, 1),
    )


def effective_units(units: Any, rank: int = 1) -> Any:
    """Return exp(entropy) of the importance of units, over the last `rank` axes; nan if any is nan."""
    xp = namespace(units)
    units = units.reshape(*units.shape[: units.ndim - rank], -1)
    largest = xp.max(units, axis=-1)
    valid = xp.isfinite(largest) & (xp.min(units, axis=-1) >= 0)
    scale = xp.where(largest > 0, largest, 1)
    relative = xp.where(valid[..., None], units / scale[..., None], 0)
    held = [total(part) for part in surprises(relative, xp.ones_like(relative))]
    found = information(xp.full_like(held[0], units.shape[-1]), *held)
    return xp.where(valid, found.effective_params, math.nan)
