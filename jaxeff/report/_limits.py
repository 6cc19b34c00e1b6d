"""Thresholds of the recommendations, and the methodology's words for the bands between them."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of the recommendations. The first three and the bands are the methodology's.

    Attributes:
        layer_redundancy: a layer above this is redundant.
        model_utilization: a model below this is oversized.
        sparsity: a model with more than this fraction of faint weights can be pruned.
        below_null: a layer holds its importance in fewer weights than noise would if its utilization is
            below its null by more than this plus three standard deviations of noise.
        at_null: this criterion cannot tell a layer this close to its null from noise, nor a small one within
            three standard deviations of noise.
        loss_rise: largest acceptable rise of the loss when a layer is pruned alone, as a fraction of the dense loss.
        utilization_bands, gini_bands: bounds between low and medium, and between medium and high.
        severe_redundancy: the methodology calls redundancy above this severe over-parameterization.
    """

    layer_redundancy: float = 0.6
    model_utilization: float = 0.3
    sparsity: float = 0.5
    below_null: float = 0.05
    at_null: float = 0.02
    loss_rise: float = 0.1
    utilization_bands: tuple[float, float] = (0.3, 0.7)
    gini_bands: tuple[float, float] = (0.4, 0.6)
    severe_redundancy: float = 0.7

    def of_noise(self, size: int) -> float:
        """Return how far from its null the utilization of this many weights may be for them to be called noise.

        >>> LIMITS.of_noise(100), LIMITS.of_noise(1_000_000)
        (0.078, 0.02)
        """
        return max(self.at_null, chance(size))


# Standard deviation of the utilization of N normal weights, times sqrt(N): by simulation, 25 to 10,000 weights.
_DEVIATION = 0.26


def chance(size: int) -> float:
    """Return three standard deviations of the utilization of this many normal weights."""
    return 3 * _DEVIATION / math.sqrt(size)


LIMITS = Limits()


def interpret_utilization(utilization: float, limits: Limits = LIMITS) -> str:
    """Return the methodology's band: 'high' above 0.7, 'medium' from 0.3, 'low' below; 'unknown' for nan.

    Noise has 0.753 (normal weights), so 'high' alone says nothing: compare with the null.

    >>> interpret_utilization(0.75), interpret_utilization(0.2)
    ('high', 'low')
    """
    return _band(utilization, limits.utilization_bands)


def interpret_gini(gini: float, limits: Limits = LIMITS) -> str:
    """Return the methodology's band: 'low' concentration below 0.4, 'medium' to 0.6, 'high' above.

    >>> interpret_gini(0.41)
    'medium'
    """
    return _band(gini, limits.gini_bands)


def interpret_redundancy(redundancy: float, limits: Limits = LIMITS) -> str:
    """Return the methodology's word: 'severe' above 0.7, 'redundant' above 0.6, else 'none'.

    Redundancy is -ln(utilization) / ln(N), so it shrinks with the size of the layer: at a million weights, 0.6
    needs a utilization below 0.0003.
    """
    if math.isnan(redundancy):
        return "unknown"
    if redundancy > limits.severe_redundancy:
        return "severe"
    return "redundant" if redundancy > limits.layer_redundancy else "none"


def _band(value: float, edges: tuple[float, float]) -> str:
    if math.isnan(value):
        return "unknown"
    low, high = edges
    return "high" if value > high else "medium" if value >= low else "low"
