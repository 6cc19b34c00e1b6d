"""The null in closed form: |z| and z^2 of a normal z."""

from __future__ import annotations

import dataclasses
import functools
import math
from statistics import NormalDist
from typing import Any

import jax
import numpy as np

from jaxeff.metrics._records import COVERAGES
from jaxeff.output.shown import Shown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Null(Shown):
    """Scale-free metrics of a layer whose weights are noise, under the same activations."""

    utilization: jax.Array
    gini: jax.Array
    coverage_50: jax.Array
    coverage_80: jax.Array
    coverage_90: jax.Array


_EULER = 0.5772156649015329
UTILIZATION = {
    1: math.sqrt(2 / math.pi) * math.exp(-(math.log(2) - _EULER) / 2),
    2: math.exp(-(2 - math.log(2) - _EULER)),
}
"""exp(H) / N of |z|^power, from the entropies of a half-normal and of a chi-squared variable."""


@functools.cache
def null_of_magnitude() -> Null:
    """Return the null of magnitudes, which is the same for every layer.

    Gini is sqrt(2) - 1; the values |z| > t hold exp(-t^2 / 2) of the sum.
    """
    normal = NormalDist()
    coverages = [2 * (1 - normal.cdf(math.sqrt(-2 * math.log(share)))) for share in COVERAGES.values()]
    values: list[Any] = [np.float32(value) for value in (UTILIZATION[1], math.sqrt(2) - 1, *coverages)]
    return Null(*values)


@functools.cache
def cell_means(power: int, cells: int) -> np.ndarray:
    """Return the means of |z|^power (1 or 2) in equally likely cells, [cells]."""
    normal = NormalDist()
    edges = np.array([normal.inv_cdf(0.5 + 0.5 * cell / cells) for cell in range(cells)])
    density = np.array([*map(normal.pdf, edges), 0.0])
    if power == 1:
        means = 2 * cells * (density[:-1] - density[1:])
    else:
        moment = np.append(edges * density[:-1], 0.0)
        means = 1 + 2 * cells * (moment[:-1] - moment[1:])
    return means.astype(np.float32)
