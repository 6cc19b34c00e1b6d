"""The distribution of a layer's importance over its weights, in cells relative to the mean.

Metrics say how uneven a layer is. Histograms and Lorenz curves, drawn from these cells, say in what way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxeff.metrics._weighted import Spread
from jaxeff.numerics.summation import namespace, running_total
from jaxeff.output.shown import Shown

_OCTAVES = (-10, 6)
_CELL_BITS = 2  # four cells per octave
_SHIFT = 23 - _CELL_BITS
_FIRST = (127 + _OCTAVES[0]) << _CELL_BITS
CELLS = ((_OCTAVES[1] - _OCTAVES[0]) << _CELL_BITS) + 2

EDGES: np.ndarray = (
    (_FIRST + np.arange(CELLS - 1, dtype=np.uint32)).astype(np.uint32) << np.uint32(_SHIFT)
).view(np.float32)
"""[CELLS - 1], bounds between the cells, as multiples of the mean: 2^-10, 1.25 2^-10, 1.5 2^-10, ..., 2^6."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Distribution(Shown):
    """Distribution of one layer, [CELLS], or of all layers stacked, [CELLS, layers], as fractions that sum to 1.

    The first cell holds values below the first of EDGES, zeros included; the last holds values from the last
    edge on. Layers counted by bins are exact to 0.4 % of an edge's position. Nan if the metrics are nan, and for
    a layer without any importance.

    Attributes:
        weights: fraction of the weights in each cell.
        importance: fraction of the importance in each cell.
    """

    weights: Array
    importance: Array


def cells_of(spread: Spread) -> Any:
    """Return the fractions of weights and of importance in each cell, [CELLS, 2].

    Values of a bin are in the cell of their mean.
    """
    (values, counts, *_), (_, invalid, *_) = spread
    xp = namespace(values)
    held = xp.stack([counts, counts * values])
    running = xp.pad(running_total(held), [(0, 0), (1, 0)])
    size, sum_ = running[:, -1]
    alive = (sum_ > 0) & ~xp.any(invalid > 0)
    # Use differences of running sums, since adding weights one by one would round each time.
    relative = values * (size / xp.where(alive, sum_, 1))
    from_edge = xp.searchsorted(-relative, -EDGES.astype(values.dtype), side="right")
    above = xp.concatenate([running[:, -1:], running[:, from_edge], xp.zeros_like(running[:, :1])], axis=1)
    fractions = (above[:, :-1] - above[:, 1:]) / xp.where(alive, running[:, -1:], 1)
    return xp.where(alive, fractions, np.nan).T


def unpacked(cells: Any) -> Distribution:
    """Unpack the cells of one layer, [CELLS, 2], or of several stacked, [layers, CELLS, 2]."""
    weights, importance = (namespace(cells).moveaxis(cells[..., part], 0, -1) for part in range(2))
    return Distribution(weights, importance)


def lorenz(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Return points of the Lorenz curve, faintest weights first: fraction of weights, share of importance.

    Returns:
        Two arrays [CELLS + 1] from 0 to 1. Between two points the curve is drawn straight, and lies below by at
        most 1/40 of the cell's width.
    """
    parts = (np.asarray(part, np.float64) for part in (distribution.weights, distribution.importance))
    first, second = (np.concatenate([[0.0], np.cumsum(part)]) for part in parts)
    return first / first[-1], second / second[-1]
