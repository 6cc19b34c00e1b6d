"""Every metric by its textbook formula in NumPy float64: the truth of the tests.

The formulas are rearranged only where float64 itself would cancel: entropy about one dominant
weight, redundancy and Gini about equal weights.
"""

import math
from fractions import Fraction

import numpy as np

TIE = 1 - 2.0**-40  # a share or bound that is met to this factor is met


def metrics(x) -> dict[str, float]:
    """All fields of `jaxeff.metrics.Metrics` of x [...], non-negative and finite, as Python numbers."""
    x = np.asarray(x).astype(np.float64).ravel()
    alive = x.max() > 0
    shannon = entropy(x) if alive else math.nan
    missing = divergence(x) if alive else math.nan
    log_size = math.log(x.size) or 1.0
    return {
        "entropy": shannon,
        "normalized_entropy": (shannon / log_size if x.size > 1 else 1.0) if alive else math.nan,
        "effective_params": math.exp(shannon) if alive else 0.0,
        "utilization": math.exp(shannon) / x.size if alive else 0.0,
        "redundancy": missing / log_size if alive else 1.0,
        "gini": gini(x) if alive else math.nan,
        "coverage_50": coverage(x, 0.5),
        "coverage_80": coverage(x, 0.8),
        "coverage_90": coverage(x, 0.9),
        "sparsity_1e2": sparsity(x, 1e-2),
        "sparsity_1e3": sparsity(x, 1e-3),
        "relative_sparsity_1e2": relative_sparsity(x, 1e-2),
        "relative_sparsity_1e3": relative_sparsity(x, 1e-3),
        "mean": mean(x),
        "std": std(x),
        "max": x.max(),
        "zeros": int(np.sum(x == 0)),
        "nonfinite": 0,
        "size": x.size,
    }


def total(x: np.ndarray) -> float:
    return math.fsum(x) if x.size <= 100_000 else float(x.sum())


def mean(x: np.ndarray) -> float:
    return total(x) / x.size


def std(x: np.ndarray) -> float:
    center = mean(x)
    return 0.0 if x.min() == x.max() else math.sqrt(mean((x - center) ** 2))


def entropy(x: np.ndarray) -> float:
    """-sum p ln p, with -ln p = ln(1 + others / x) for the largest."""
    largest = int(x.argmax())
    others = np.delete(x, largest)
    rest = total(others)
    whole = rest + x[largest]
    p = others[others > 0] / whole
    return x[largest] / whole * math.log1p(rest / x[largest]) + total(-p * np.log(p))


def divergence(x: np.ndarray) -> float:
    """ln N - H = mean (1 + d) ln(1 + d) - d, d = x / mean - 1, by its power series about d = 0."""
    if x.min() == x.max():
        return 0.0
    center = mean(x)
    d = (x - center) / center
    near = np.abs(d) < 0.02
    series = sum((-1) ** k * d[near] ** k / (k * (k - 1)) for k in range(2, 9))
    far = d[~near]
    ratio = x[~near] / center
    direct = ratio * np.log(np.where(ratio > 0, ratio, 1)) - far
    return total(np.concatenate([series, direct])) / x.size


def gini(x: np.ndarray) -> float:
    """sum (2 i - N - 1) x_(i) / (N S); subtracting min x changes nothing, as the ranks sum to 0."""
    x = np.sort(x)
    rank = 2 * np.arange(1, x.size + 1) - (x.size + 1)
    return total(rank * (x - x[0])) / (x.size * total(x))


def coverage(x: np.ndarray, share: float) -> float:
    if x.max() == 0:
        return math.nan
    x = x.astype(np.float64)
    reached = np.cumsum(np.sort(x)[::-1])
    return int(np.sum(reached < share * TIE * total(x)) + 1) / x.size


def sparsity(x: np.ndarray, threshold: float) -> float:
    return float(np.mean(x.astype(np.float64) < threshold))


def relative_sparsity(x: np.ndarray, threshold: float) -> float:
    x = x.astype(np.float64)
    return float(np.mean(x < threshold * TIE * mean(x))) if x.max() > 0 else 1.0


def exact_gini(x: list[float]) -> Fraction:
    """The definition in rational arithmetic, for the reference's own test."""
    ordered, size = sorted(map(Fraction, x)), len(x)
    ranked = sum((i * value for i, value in enumerate(ordered, 1)), Fraction(0))
    return 2 * ranked / (size * sum(ordered)) - Fraction(size + 1, size)
