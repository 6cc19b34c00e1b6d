"""What random numbers would give: expected spectra of independent elements, with the range of 95 % of the draws.

Every number is free of scale, so that the shape says it all. Large matrices have closed forms, which are integrals over
the Marchenko-Pastur law with their finite-size corrections. Those with a side of at most 32 are drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxeff.output.shown import Shown
from jaxeff.spectral._singular_values import edge

_DRAWN = 32  # the smaller side up to which matrices are drawn rather than computed
_DRAWS = 1 << 15  # singular values in all the draws of a shape
_DRAWN_ELEMENTS = 1 << 10  # elements up to which utilization is drawn
_POINTS = 4096
_TERMS = 256
_NORMAL_95 = 1.959964
_RANGE = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Expected:
    """A number of random matrices: its mean, and the bounds between which 95 % of them lie."""

    mean: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True, repr=False)
class SpectralNull(Shown):
    """Numbers of a matrix of independent normal elements, of any variance.

    Attributes:
        utilization: exp(H) / N of the magnitudes of its elements.
        effective_rank, stable_rank, energy_beyond_edge: as in `Spectrum`.
    """

    utilization: Expected
    effective_rank: Expected
    stable_rank: Expected
    energy_beyond_edge: Expected


@functools.lru_cache(maxsize=1024)
def null(rows: int, columns: int) -> SpectralNull:
    """Return the null of a matrix of this shape.

    The mean of a large matrix is within 0.2 % of simulations for the effective rank, 0.5 % for the stable rank.

    References:
        Marchenko and Pastur, 1967. Bai and Silverstein, CLT for Linear Spectral Statistics, 2004 (mean and variance of
        a sum over eigenvalues). Johnstone, 2001, and Ma, 2012 (the largest eigenvalue).

    >>> found = null(384, 1536)
    >>> round(found.effective_rank.mean, 1), round(found.stable_rank.mean, 1)
    (371.0, 172.3)
    """
    small, large = sorted((rows, columns))
    of_normal = utilization("normal", rows * columns)
    if small == 1:
        one = Expected(1.0, 1.0, 1.0)
        return SpectralNull(of_normal, one, one, Expected(0.0, 0.0, 0.0))
    if small <= _DRAWN:
        return SpectralNull(of_normal, *_drawn(small, large))
    stable, beyond = _of_largest(small, large)
    return SpectralNull(of_normal, _effective_rank(small, large), stable, beyond)


def _effective_rank(small: int, large: int) -> Expected:
    """ln of the effective rank is ln S - T / S, with S = sum s and T = sum s ln s, both sums over eigenvalues."""
    ratio = small / large
    root = math.sqrt(ratio)
    angles = (np.arange(_POINTS) + 0.5) * (math.pi / _POINTS)
    eigenvalues = 1 + ratio + 2 * root * np.cos(angles)  # of A A^T / large, from edge to edge
    density = 2 * np.square(np.sin(angles)) / eigenvalues / _POINTS
    edges = np.array([max((1 - root) ** 2, 1e-300), (1 + root) ** 2])

    def total(function: Callable[[np.ndarray], np.ndarray]) -> float:
        inside = function(eigenvalues)
        # The second and third terms are of order 1 where the first is of order `small`: those of real elements.
        return float(small * (density @ inside) + np.sum(function(edges)) / 4 - np.mean(inside) / 2)

    def entropic(x: np.ndarray) -> np.ndarray:
        return np.sqrt(x) * np.log(x) / 2

    first, second = total(np.sqrt), total(entropic)
    log_rank = math.log(first) - second / first
    # What one eigenvalue adds to ln of the rank; its cosine coefficients give the variance.
    influence = ((1 + second / first) * np.sqrt(eigenvalues) - entropic(eigenvalues)) / first
    orders = np.arange(1, _TERMS + 1)
    coefficients = 2 * np.cos(np.outer(orders, angles)) @ influence / _POINTS
    spread = _NORMAL_95 * math.sqrt(float(np.sum(orders * np.square(coefficients))) / 2)
    bounds = (min(math.exp(log_rank + side * spread), small) for side in (-1, 1))
    return Expected(math.exp(log_rank), *bounds)


def _of_largest(small: int, large: int) -> tuple[Expected, Expected]:
    """Return the stable rank and the energy beyond the edge, both from the law of the largest eigenvalue."""
    roots = math.sqrt(small - 0.5), math.sqrt(large - 0.5)
    center = sum(roots) ** 2
    scale = sum(roots) * (1 / roots[0] + 1 / roots[1]) ** (1 / 3)
    points, weights = _tracy_widom()
    energy = small * large
    # The logarithm of the largest eigenvalue follows the law sooner than the eigenvalue itself.
    largest = center * np.exp(scale / center * points)
    low, high = (float(np.interp(level, np.cumsum(weights), largest)) for level in _RANGE)
    stable = Expected(float(weights @ (energy / largest)), energy / high, energy / low)
    beyond = np.where(largest > edge(small, large) * energy, largest / energy, 0.0)
    return stable, Expected(float(weights @ beyond), 0.0, high / energy)


@functools.cache
def _tracy_widom() -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights of the law of Tracy and Widom for real matrices.

    By the shifted gamma law of the same mean, variance and skewness (Chiani, Distribution of the Largest Eigenvalue for
    Real Wishart and Gaussian Random Matrices, 2014), whose distribution function is within 2e-3.
    """
    shape, scale, shift = 46.446, 0.186054, 9.84801
    points = np.linspace(-7.0, 7.0, _POINTS)
    gamma = points + shift
    log_density = (shape - 1) * np.log(gamma) - gamma / scale
    weights = np.exp(log_density - np.max(log_density))
    return points, weights / np.sum(weights)


def _drawn(small: int, large: int) -> tuple[Expected, Expected, Expected]:
    """Return effective rank, stable rank and energy beyond the edge of drawn matrices.

    A normal matrix has the singular values of a bidiagonal one with independent chi elements (Dumitriu and Edelman,
    Matrix Models for Beta Ensembles, 2002), which takes few draws however long its other side is.
    """
    generator = np.random.default_rng(small * large)
    draws, index = _DRAWS // small, np.arange(small)
    bidiagonal = np.zeros((draws, small, small))
    bidiagonal[:, index, index] = np.sqrt(generator.chisquare(large - index, (draws, small)))
    freedom = small - 1 - index[:-1]
    bidiagonal[:, index[1:], index[:-1]] = np.sqrt(generator.chisquare(freedom, (draws, small - 1)))
    squares = np.maximum(np.linalg.eigvalsh(bidiagonal @ bidiagonal.transpose(0, 2, 1)), 1e-300)
    shares = np.sqrt(squares)
    shares /= shares.sum(-1, keepdims=True)
    effective = np.exp(-np.sum(shares * np.log(shares), -1))
    stable = np.sum(squares, -1) / squares[:, -1]
    energy = squares / np.sum(squares, -1, keepdims=True)
    beyond = np.sum(np.where(energy > edge(small, large), energy, 0.0), -1)
    return _range_of(effective), _range_of(stable), dataclasses.replace(_range_of(beyond), low=0.0)


def _range_of(drawn: np.ndarray) -> Expected:
    low, high = np.quantile(drawn, _RANGE)
    return Expected(float(np.mean(drawn)), float(low), float(high))


def _normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return np.abs(generator.standard_normal(count))


def _truncated(generator: np.random.Generator, count: int) -> np.ndarray:
    found = _normal(generator, count)
    while np.any(outside := found > 2):
        found[outside] = _normal(generator, int(np.count_nonzero(outside)))
    return found


def _uniform(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.random(count)


_LAWS: Mapping[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float, float]] = {
    # How to draw magnitudes, where the density of a normal ends, and its factor in the exponent.
    "normal": (_normal, 12.0, 0.5),
    "truncated normal": (_truncated, 2.0, 0.5),
    "uniform": (_uniform, 1.0, 0.0),
}
LAWS = tuple(_LAWS)
"""Laws from which weights are initialized: 'normal', 'truncated normal' (at two standard deviations), 'uniform'."""


@functools.lru_cache(maxsize=4096)
def utilization(law: str, count: int) -> Expected:
    """Return the utilization exp(H) / N of `count` independent magnitudes of a law, which no spectrum tells apart.

    >>> [round(utilization(law, 10**6).mean, 3) for law in LAWS]
    [0.753, 0.775, 0.824]
    """
    draw, end, factor = _LAWS[law]
    if count <= _DRAWN_ELEMENTS:
        draws = min(_DRAWS, (1 << 21) // count)
        drawn = draw(np.random.default_rng(count), draws * count).reshape(draws, count)
        shares = drawn / drawn.sum(1, keepdims=True)
        return _range_of(np.exp(-np.sum(shares * np.log(shares), 1)) / count)
    points = (np.arange(_POINTS) + 0.5) * (end / _POINTS)
    weights = np.exp(-factor * np.square(points))
    weights /= np.sum(weights)
    mean = float(weights @ points)
    logs = float(weights @ (points * np.log(points)))
    log_used = math.log(mean) - logs / mean
    # What one element adds to ln of the utilization; its variance over the count is that of the whole.
    influence = ((1 + logs / mean) * points - points * np.log(points)) / mean
    variance = float(weights @ np.square(influence) - (weights @ influence) ** 2)
    spread = _NORMAL_95 * math.sqrt(variance / count)
    return Expected(math.exp(log_used), math.exp(log_used - spread), math.exp(log_used + spread))
