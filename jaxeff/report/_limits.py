"""The thresholds of the recommendations, and the methodology's words for what lies between them."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """The thresholds, once each. The first three and the bands are the methodology's.

    Attributes:
        layer_redundancy: a layer above this is redundant.
        model_utilization: a model below this is oversized.
        sparsity: a model with more than this fraction of faint weights can be pruned.
        below_null: a layer whose utilization is this much below its null, and three standard
            deviations of noise more, holds its importance in fewer weights than noise would.
        at_null: a layer this close to its null cannot be told from noise by this criterion.
        loss_rise: what pruning a layer alone may cost, as a fraction of the dense loss.
        utilization_bands, gini_bands: between low and medium, and medium and high.
        severe_redundancy: above this the methodology speaks of severe over-parameterization.
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


LIMITS = Limits()


def interpret_utilization(utilization: float, limits: Limits = LIMITS) -> str:
    """The methodology's band: 'high' above 0.7, 'medium' from 0.3, 'low' below; 'unknown' for nan.

    Noise has 0.753 (normal weights), so 'high' alone says nothing: look at the null.

    >>> interpret_utilization(0.75), interpret_utilization(0.2)
    ('high', 'low')
    """
    return _band(utilization, limits.utilization_bands)


def interpret_gini(gini: float, limits: Limits = LIMITS) -> str:
    """The methodology's band: 'low' concentration below 0.4, 'medium' to 0.6, 'high' above.

    >>> interpret_gini(0.41)
    'medium'
    """
    return _band(gini, limits.gini_bands)


def interpret_redundancy(redundancy: float, limits: Limits = LIMITS) -> str:
    """The methodology's words: 'severe' above 0.7, 'redundant' above 0.6, else 'none'.

    Redundancy is -ln(utilization) / ln(N), so it shrinks with the layer: 0.6 needs a utilization
    below 0.0003 at a million weights.
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
