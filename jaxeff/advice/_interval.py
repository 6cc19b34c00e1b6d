"""How far a mean loss rose, with a bootstrap interval over examples."""

from __future__ import annotations

import dataclasses

import numpy as np

_RESAMPLES, _AT_ONCE = 2000, 1 << 22
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
    """Return the rise of the mean, with a paired bootstrap interval.

    Whole examples are drawn with replacement, each with both of its losses, so that what makes an example hard
    for both networks cancels.

    Args:
        dense, pruned: [examples], or [] for one number.
        relative: divide by the mean of `dense`, of the same resample.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13

    >>> found = rise(np.array([1.0, 2.0]), np.array([1.5, 3.0]), relative=True, seed=0)
    >>> found.mean, found.low, found.high
    (0.5, 0.5, 0.5)
    """
    dense, pruned = np.asarray(dense, np.float64), np.asarray(pruned, np.float64)
    scale = abs(dense.mean()) if relative else 1.0
    mean = float((pruned - dense).mean() / scale)
    if not dense.ndim:
        return Rise(mean, None, None, relative, 1)
    count = len(dense)
    rng = np.random.default_rng(seed)
    rises = []
    for size in np.diff(np.linspace(0, _RESAMPLES, -(-_RESAMPLES * count // _AT_ONCE) + 1).astype(int)):
        drawn = rng.integers(count, size=(size, count))
        below = np.abs(dense[drawn].mean(1)) if relative else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            rises.append((pruned - dense)[drawn].mean(1) / below)
    ends = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(rises), (ends, 1 - ends))
    return Rise(mean, float(low), float(high), relative, count)
