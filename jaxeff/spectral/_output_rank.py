"""The rank that keeps a share of what a layer puts out on a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxeff.statistics import SiteStatistics
from jaxeff.statistics.second_moments import over_uses


def second_moments_of(uses: Sequence[SiteStatistics]) -> np.ndarray | str:
    """Return X^T X over all uses of a weight, [layers, inputs, inputs], or why there is none."""
    found = over_uses(uses)
    if isinstance(found, str):
        return found
    total = np.sum([np.asarray(one, np.float64) for one in found], axis=0)
    return total.reshape(-1, *total.shape[-2:])


def output_rank(matrix: np.ndarray, moments: np.ndarray, share: float) -> int | str:
    """Return the least rank r for which the best approximation of X W of rank r keeps this share of its squares.

    Its squared singular values are the eigenvalues of W^T (X^T X) W. The best W of rank r projects the outputs on the
    r leading eigenvectors (Eckart and Young, 1936). A string says why there is no rank.

    Args:
        matrix: W, [inputs, units], finite.
        moments: X^T X, [inputs, inputs].

    >>> output_rank(np.diag([3.0, 1.0]), np.diag([1.0, 9.0]), 0.9)
    2
    """
    if not np.all(np.isfinite(moments)):
        return "the second moments of its inputs are nan or infinite"
    weights = matrix.astype(np.float64)
    inputs, units = weights.shape
    if units <= inputs:
        squares = weights.T @ moments @ weights
    else:
        eigenvalues, vectors = np.linalg.eigh(moments)
        root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
        half = root.T @ weights
        squares = half @ half.T
    energies = np.maximum(np.linalg.eigvalsh(squares)[::-1], 0)
    total = np.cumsum(energies)
    if not total[-1] > 0:
        return "its outputs are all 0 on this batch"
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12))) + 1
