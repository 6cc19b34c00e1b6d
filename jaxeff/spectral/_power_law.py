"""The exponent of a power law fitted to the largest eigenvalues, as WeightWatcher's alpha."""

from __future__ import annotations

import numpy as np


def alpha(values: np.ndarray) -> float:
    """Return the exponent of the power law p(x) ~ x^-alpha that fits the largest eigenvalues s^2 best.

    alpha = 1 + n / sum ln(x / x_min) over the n eigenvalues from x_min on, the maximum of the likelihood. x_min is the
    eigenvalue for which the greatest distance between the fitted and the actual distribution (Kolmogorov and Smirnov)
    is least. nan for fewer than two different eigenvalues above 0.

    Args:
        values: the singular values s, in any order.

    References:
        Clauset, Shalizi and Newman, Power-Law Distributions in Empirical Data, 2009. Martin and Mahoney, Traditional
        and Heavy-Tailed Self Regularization in Neural Network Models, 2019.

    >>> rank = np.arange(1, 1001)
    >>> round(alpha(np.sqrt((rank / 1000) ** -0.5)), 1)  # a tail with P(X > x) = x^-2
    3.0
    """
    positive = np.sort(values[values > 0])
    # Singular values of 0 come with rounding; a fit to their logarithms would start among them.
    positive = positive[positive > 1e-9 * positive[-1]] if positive.size else positive
    logs = 2 * np.log(positive)
    best, distance = float("nan"), float("inf")
    for start in range(len(logs) - 1):
        beyond = logs[start:] - logs[start]
        total = float(np.sum(beyond))
        if total <= 0:
            break
        count = len(beyond)
        exponent = 1 + count / total
        fitted = 1 - np.exp((1 - exponent) * beyond)
        steps = np.arange(count + 1) / count
        apart = max(float(np.max(fitted - steps[:-1])), float(np.max(steps[1:] - fitted)))
        if apart < distance:
            best, distance = exponent, apart
    return best
