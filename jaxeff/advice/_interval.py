"""How far a mean loss rose, with a bootstrap interval over examples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_RESAMPLES, _OF_MANY, _MANY = 2000, 500, 20_000
_AT_ONCE = 1 << 20
_LEAST = 0.05  # of the standard error, in a resample whose own is smaller
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Rise:
    """How far the mean loss rose on examples that the search did not see.

    Attributes:
        mean: of the rise; divided by the dense loss if `relative`.
        low, high: ends of the 95 % interval; None if there is one number for all examples.
        relative: whether these are fractions of the dense loss.
        examples: how many examples were measured.
    """

    mean: float
    low: float | None
    high: float | None
    relative: bool
    examples: int


def rise(dense: np.ndarray, pruned: np.ndarray, *, relative: bool, seed: int) -> Rise:
    """Return the rise of the mean, with a paired bootstrap interval: at each end the wider of two.

    Whole examples are drawn with replacement, each with both of its losses, so that what makes an example hard
    for both networks cancels. One is that of the percentiles of the resamples' rises; the other, bootstrap-t,
    divides each rise by its own standard error. Losses are skewed, a few examples hold most of a rise, and
    either alone covers the truth less often than it says.

    Args:
        dense, pruned: [examples], or [] for one number.
        relative: divide by the mean of `dense`, of the same resample.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 12 and 13

    >>> found = rise(np.array([1.0, 2.0]), np.array([1.5, 3.0]), relative=True, seed=0)
    >>> found.mean, found.low, found.high
    (0.5, 0.5, 0.5)
    """
    dense, pruned = np.asarray(dense, np.float64), np.asarray(pruned, np.float64)
    if not dense.ndim:
        return Rise(float((pruned - dense) / (abs(dense) if relative else 1.0)), None, None, relative, 1)
    count = len(dense)
    rises = pruned - dense
    scale = dense * np.sign(dense.mean()) if relative else np.ones(count)
    # What a mean, its ratio and the ratio's standard error are made of.
    terms = np.stack([rises, scale, rises**2, rises * scale, scale**2], axis=1)
    mean, error = _ratio(terms.mean(0), count)
    rng = np.random.default_rng(seed)
    resamples = _RESAMPLES if count <= _MANY else _OF_MANY
    chunks = np.array_split(np.zeros(resamples), -(-resamples * count // _AT_ONCE))
    drawn = [terms[rng.integers(count, size=(len(chunk), count))].mean(1) for chunk in chunks]
    means, errors = _ratio(np.concatenate(drawn).T, count)
    if not error:
        return Rise(float(mean), float(mean), float(mean), relative, count)
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    ratios = (means - mean) / np.maximum(errors, _LEAST * error)
    high, low = mean - error * np.quantile(ratios[np.isfinite(ratios)], ends)
    plain = np.quantile(means[np.isfinite(means)], ends)
    # Losses that are never negative cannot fall by more than all.
    floor = -1.0 if relative and min(dense.min(), pruned.min()) >= 0 else -np.inf
    low, high = max(min(low, plain[0]), floor), max(high, plain[1])
    return Rise(float(mean), float(low), float(high), relative, count)


def mean_and_bound(dense: np.ndarray, pruned: np.ndarray, *, relative: bool) -> tuple[float, float]:
    """Return the mean loss, and a standard error of its rise above that.

    A search that goes by means alone ends where the examples happen to favor what it removed. One standard
    error is the margin of Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984.

    Args:
        dense, pruned: [examples], or [] for one number, which has no error.
        relative: whether the rise is one of the dense loss, whose own error then counts too.
    """
    mean = float(pruned.mean())
    if not pruned.ndim:
        return mean, mean
    rises = pruned - dense
    if relative and dense.mean():
        rises = rises - rises.mean() / dense.mean() * dense
    return mean, mean + float(rises.std(ddof=1)) / math.sqrt(len(rises))


def _ratio(terms: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean rise over the mean scale, and its standard error (by the delta method)."""
    rise, scale, rise_square, product, scale_square = terms
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = rise / scale
        variance = rise_square - 2 * ratio * product + ratio**2 * scale_square
        return ratio, np.sqrt(np.maximum(variance, 0) / (count - 1)) / scale
