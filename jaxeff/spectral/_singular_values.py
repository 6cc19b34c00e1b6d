"""The singular values of one matrix, in float64 on the host; and what singular values say, in NumPy or JAX."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxeff.numerics.summation import namespace

_PIECE = 1 << 22  # elements that are widened to float64 at a time
_SMALLEST = 1e-11  # of the largest eigenvalue: below it, a Gram matrix in float64 knows less than four digits


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Return the singular values of a finite matrix in descending order, [min(rows, columns)], in float64.

    They are the roots of the eigenvalues of A A^T or A^T A, whichever is smaller. Squaring costs half of the digits, so
    a matrix with a singular value below 3e-6 of the largest is decomposed itself, which takes longer.

    >>> singular_values(np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    array([4., 3.])
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    count, largest = len(wide), float(np.max(np.abs(wide), initial=0))
    found = np.zeros(count)
    if largest == 0:
        return found
    # Over the largest element, no square overflows, and none that matters is lost.
    gram = np.zeros((count, count))
    step = max(_PIECE // count, 1)
    for start in range(0, wide.shape[1], step):
        piece = _scaled(wide[:, start : start + step], largest)
        gram += piece @ piece.T
    # Rows of zeros, as of pruned units, are singular values of 0 that need no decomposition.
    used = np.flatnonzero(gram.diagonal())
    values = np.linalg.eigvalsh(gram[np.ix_(used, used)])
    if values[0] > _SMALLEST * values[-1]:
        roots = np.sqrt(values[::-1])
    else:
        roots = np.linalg.svd(_scaled(wide[used], largest), compute_uv=False)
    found[: len(roots)] = largest * roots
    return found


def _scaled(matrix: np.ndarray, largest: float) -> np.ndarray:
    return matrix.astype(np.float64) / largest


def effective_rank(values: Any) -> Any:
    """exp(-sum p ln p), p = s / sum s (Roy and Vetterli, 2007), over the last axis; nan if all are 0."""
    xp = namespace(values)
    shares = values / xp.sum(values, -1, keepdims=True)
    return xp.exp(-xp.sum(shares * xp.log(xp.where(shares > 0, shares, 1)), -1))


def stable_rank(values: Any) -> Any:
    """sum s^2 / max s^2, over the last axis; nan if all are 0."""
    xp = namespace(values)
    return xp.sum(xp.square(values / xp.max(values, -1, keepdims=True)), -1)


def energy_beyond_edge(values: np.ndarray, rows: int, columns: int) -> float:
    """Share of sum s^2 in the s^2 beyond the Marchenko-Pastur edge for elements of the same mean square."""
    shares = np.square(values / np.max(values))
    shares /= np.sum(shares)
    return float(np.sum(shares[shares > edge(rows, columns)]))


def edge(rows: int, columns: int) -> float:
    """The Marchenko-Pastur edge (sqrt(rows) + sqrt(columns))^2 var, over the sum of squares, rows columns var."""
    return (np.sqrt(rows) + np.sqrt(columns)) ** 2 / (rows * columns)


def utilization(elements: np.ndarray) -> float:
    """exp(H) / N of |w|, of elements that are not all 0."""
    flat = elements.reshape(-1)
    total, logs = 0.0, 0.0
    largest = float(np.max(np.abs(flat)))
    for start in range(0, flat.size, _PIECE):
        piece = np.abs(flat[start : start + _PIECE].astype(np.float64)) / largest
        total += float(np.sum(piece))
        logs += float(np.sum(piece * np.log(np.where(piece > 0, piece, 1.0))))
    return float(np.exp(np.log(total) - logs / total) / flat.size)
