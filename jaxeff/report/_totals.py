"""The numbers of the model as a whole, from those of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxeff.metrics import Metrics
from jaxeff.numerics.summation import namespace
from jaxeff.report._records import LayerNumbers, LayerStructure, ModelReport

_SPARSITIES = ("sparsity_1e2", "sparsity_1e3", "relative_sparsity_1e2", "relative_sparsity_1e3")


@np.errstate(all="ignore")
def model(structure: Sequence[LayerStructure], numbers: LayerNumbers, total_params: int) -> ModelReport:
    """Sum over the layers, weighted by size, and pool their distributions."""
    found = numbers.metrics
    xp = namespace(found.effective_params)
    sizes = np.asarray([layer.size for layer in structure], np.float32)
    counted = np.asarray([not layer.is_sum for layer in structure], bool)
    included = xp.isfinite(found.effective_params) & counted
    weights = xp.sum(xp.where(included, sizes, 0))
    # The mean is nan if there is no finite layer.
    over = xp.where(weights > 0, weights, math.nan)
    null = xp.full_like(sizes, math.nan) if numbers.null is None else numbers.null.utilization
    averaged = {"null_utilization": null, **{name: getattr(found, name) for name in _SPARSITIES}}
    weighted = {name: xp.sum(xp.where(included, sizes * value, 0)) / over for name, value in averaged.items()}
    effective = xp.sum(xp.where(included, found.effective_params, 0))
    pooled = _pooled_effective_params(found, sizes, included)
    layers = xp.sum(included)
    found_model = ModelReport(
        total_params=total_params,
        weights=sum(layer.size for layer in structure if not layer.is_sum),
        effective_params=effective,
        utilization=effective / over,
        compression_potential=1 - effective / over,
        average_redundancy=xp.sum(xp.where(included, found.redundancy, 0))
        / xp.where(layers > 0, layers, math.nan),
        pooled_effective_params=pooled,
        pooled_utilization=pooled / over,
        **weighted,
        excluded=xp.sum(~included & counted, dtype=np.int32),
    )
    return jax.tree.map(lambda number: _narrowed(number, found.mean.dtype), found_model)


def _narrowed(number: Any, dtype: Any) -> Any:
    """Return a float in the precision of the layers' numbers, and a count unchanged."""
    return number if number.dtype == np.int32 else namespace(number).asarray(number, dtype=dtype)


def _pooled_effective_params(found: Metrics, sizes: Any, included: Any) -> Any:
    """Return exp(H) of all weights as one distribution, without a second pass over them.

    H(all) = H(layers) + sum_l q_l H(layer l), where q_l is the layer's share of all importance.
    """
    xp = namespace(found.mean)
    held = included & (found.mean > 0)
    if not held.size:
        return xp.full((), math.nan, np.float32)
    # In logarithms, since the sum of a layer of large weights may exceed float32.
    logs = xp.where(held, xp.log(xp.where(held, found.mean, 1)) + xp.log(sizes), -math.inf)
    top = xp.max(logs)
    parts = xp.exp(logs - xp.where(xp.isfinite(top), top, 0))
    sum_ = xp.sum(parts)
    shares = parts / xp.where(sum_ > 0, sum_, math.nan)
    surprise = -shares * xp.log(xp.where(shares > 0, shares, 1))
    return xp.exp(xp.sum(surprise + xp.where(shares > 0, shares * found.entropy, 0)))
