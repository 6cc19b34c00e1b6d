"""The exponent of a power law fitted to the largest eigenvalues, as WeightWatcher's alpha."""

from __future__ import annotations

import math

import numpy as np

_FEWEST = 20
_ZERO = 1e-9


def alpha(values: np.ndarray) -> float:
    """Return the exponent of the power law p(x) ~ x^-alpha that fits the largest eigenvalues s^2 best.

    alpha = 1 + n / sum ln(x / x_min) over the n eigenvalues from x_min on, the maximum of the likelihood. x_min is the
    eigenvalue for which the largest |F(x) - i / n| is least, with F the fitted distribution and i = 0 to n - 1, as in
    WeightWatcher 0.7.7. nan for fewer than 20 eigenvalues above 0, for which WeightWatcher has another fit.

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
    # What rounding makes of singular values of 0 is no tail.
    positive = positive[positive > _ZERO * positive[-1]] if positive.size else positive
    logs = 2 * np.log(positive)
    best, distance = math.nan, math.inf
    for start in range(len(logs) - 1 if len(logs) >= _FEWEST else 0):
        beyond = logs[start:] - logs[start]
        total = float(np.sum(beyond))
        if total <= 0:
            break
        count = len(beyond)
        exponent = 1 + count / total
        apart = float(np.max(np.abs(1 - np.exp((1 - exponent) * beyond) - np.arange(count) / count)))
        if apart < distance:
            best, distance = exponent, apart
    return best
