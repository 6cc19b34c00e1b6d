"""How a layer's importance is spread over its weights, in cells relative to the mean.

What a histogram and a Lorenz curve are drawn from: metrics say how uneven a layer is, these say in what
way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff.metrics._weighted import Weighted
from jaxeff.numerics.summation import namespace, total

_OCTAVES = (-10, 6)
_CELL_BITS = 2  # four cells an octave
_SHIFT = 23 - _CELL_BITS
_FIRST = (127 + _OCTAVES[0]) << _CELL_BITS
CELLS = ((_OCTAVES[1] - _OCTAVES[0]) << _CELL_BITS) + 2

EDGES: np.ndarray = (
    (_FIRST + np.arange(CELLS - 1, dtype=np.uint32)).astype(np.uint32) << np.uint32(_SHIFT)
).view(np.float32)
"""[CELLS - 1], between the cells, as multiples of the mean: 2^-10, 1.25 2^-10, 1.5 2^-10, ..., 2^6."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distribution:
    """Of one layer, [CELLS], or of all layers stacked, [CELLS, layers]: fractions, which sum to 1.

    The first cell holds what is below the first of EDGES, zeros included, the last what is not below the
    last. Layers counted by bins are exact to 0.4 % of an edge's position. Nan where the metrics are, and
    for a layer without any importance.

    Attributes:
        weights: how much of the weights is in each cell.
        importance: how much of the importance.
    """

    weights: Array
    importance: Array


def cells_of(distribution: Weighted) -> Any:
    """The fractions of weights and of importance in each cell, [CELLS, 2].

    Values of a bin are in the cell of their mean.
    """
    values, counts, *_ = distribution
    xp = namespace(values)
    size, shares = total(counts), counts * values
    sum_ = total(shares)
    alive = sum_ > 0
    relative = (values * (size / xp.where(alive, sum_, 1))).astype(np.float32)
    patterns = relative.view(np.int32) if xp is np else lax.bitcast_convert_type(relative, jnp.int32)
    cell = xp.clip((patterns >> _SHIFT) - (_FIRST - 1), 0, CELLS - 1)
    held = xp.stack([counts / size, shares / xp.where(alive, sum_, 1)], axis=1)
    if xp is np:
        fractions = np.stack([np.bincount(cell, part, CELLS) for part in held.T], axis=1)
    else:
        fractions = jnp.zeros((CELLS, 2), held.dtype).at[cell].add(held)
    return xp.where(alive, fractions, np.nan)


def unpacked(cells: Any) -> Distribution:
    """Of several layers, [layers, CELLS, 2], stacked."""
    weights, importance = (namespace(cells).moveaxis(cells[..., part], 0, 1) for part in range(2))
    return Distribution(weights, importance)


def lorenz(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Points of the Lorenz curve, from the faintest weights on: fraction of weights, share of importance.

    Returns:
        Two arrays [CELLS + 1] from 0 to 1. Straight between two points, where the curve hangs below by at
        most 1/40 of the cell's own width.
    """
    parts = (np.asarray(part, np.float64) for part in (distribution.weights, distribution.importance))
    first, second = (np.concatenate([[0.0], np.cumsum(part)]) for part in parts)
    return first / first[-1], second / second[-1]
