"""The metrics of one array, and the bounds of their errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax import Array

from jaxeff.output.shown import Shown

COVERAGES: Mapping[str, float] = {"coverage_50": 0.5, "coverage_80": 0.8, "coverage_90": 0.9}
THRESHOLDS: Mapping[str, float] = {"sparsity_1e2": 1e-2, "sparsity_1e3": 1e-3}
RELATIVE_THRESHOLDS: Mapping[str, float] = {"relative_sparsity_1e2": 1e-2, "relative_sparsity_1e3": 1e-3}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Metrics(Shown):
    """Every metric of one array, each a scalar; `vmap` and `scan` add leading axes.

    Fields are defined by the functions of `jaxeff.metrics` of the same name; `coverage_80` holds 80 % of the
    importance, `sparsity_1e2` counts x < 1e-2. The last three are int32 counts, which stop at 2^31 - 1.
    """

    entropy: Array
    normalized_entropy: Array
    effective_params: Array
    utilization: Array
    redundancy: Array
    gini: Array
    coverage_50: Array
    coverage_80: Array
    coverage_90: Array
    sparsity_1e2: Array
    sparsity_1e3: Array
    relative_sparsity_1e2: Array
    relative_sparsity_1e3: Array
    mean: Array
    std: Array
    """Population standard deviation (ddof 0)."""
    max: Array
    zeros: Array
    """Entries equal to 0, including -0.0 but not the smallest subnormal."""
    nonfinite: Array
    """Invalid entries: nan, infinite or negative."""
    size: Array
    """Number of entries."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Bounds(Shown):
    """Bounds of the error of each float field of `Metrics`, against exact arithmetic on the same weights.

    Bounds are relative to the exact value for effective_params, mean and max, relative to the exact mean for std,
    and absolute for the others. They are 0 if the metric's value is a convention. Mean, std and max below 2^-126,
    the smallest normal float32, may be returned as 0.
    """

    entropy: Array
    normalized_entropy: Array
    effective_params: Array
    utilization: Array
    redundancy: Array
    gini: Array
    coverage_50: Array
    coverage_80: Array
    coverage_90: Array
    sparsity_1e2: Array
    sparsity_1e3: Array
    relative_sparsity_1e2: Array
    relative_sparsity_1e3: Array
    mean: Array
    std: Array
    max: Array
