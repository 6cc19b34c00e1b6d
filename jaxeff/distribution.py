"""How a layer's importance is spread over its weights, in cells relative to the mean.

What a histogram and a Lorenz curve are drawn from: metrics say how uneven a layer is, these say in what
way. Imports `pairs`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff import pairs

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


def of(values: Array, counts: Array, size: Array | int) -> Array:
    """The fractions of weights and of importance in each cell, [CELLS, 2], without derivatives.

    Args:
        values: [M], positive importances in any order and unit, or 0; XLA takes what is subnormal for 0.
        counts: [M], how many weights have each.
        size: [], how many weights there are; those that `counts` leaves out are 0.

    >>> cells = of(jnp.array([1.0, 2.0]), jnp.array([2, 1]), 4)
    >>> cells[CELLS // 2 - 20, 0] - cells[0, 0]
    Array(-0.25, dtype=float32)
    >>> cells.sum(axis=0)
    Array([1., 1.], dtype=float32)
    """
    values, size = lax.stop_gradient(values), jnp.asarray(size).astype(jnp.float32)
    relative = (values / jnp.max(values)).astype(jnp.float32)
    counts = jnp.where(relative > 0, counts, 0).astype(jnp.float32)
    shares = counts * relative
    total = jnp.sum(shares)
    patterns = pairs.bits_of(relative * (size / total))
    cells = jnp.clip((patterns >> _SHIFT) - (_FIRST - 1), 0, CELLS - 1)
    # Counts as they are: whole numbers add without rounding, fractions do not.
    held = jnp.zeros((CELLS, 2), jnp.float32).at[cells].add(jnp.stack([counts, shares], axis=1))
    held = held.at[0, 0].add(jnp.maximum(size - jnp.sum(counts), 0))
    return jnp.where(total > 0, held / jnp.stack([size, total])[None], jnp.nan)


def of_padded(x: Array, size: Array | int) -> Array:
    """The same of the first `size` entries of x [M], importances; the others must be 0."""
    invalid = ~jnp.all(jnp.isfinite(x) & (x >= 0))
    return jnp.where(invalid, jnp.nan, of(x, jnp.ones(x.shape, jnp.int32), size))


def unpacked(cells: Array) -> Distribution:
    """Of several layers, [layers, CELLS, 2], stacked."""
    return Distribution(*jnp.moveaxis(cells, (2, 1), (0, 1)))


def lorenz(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Points of the Lorenz curve, from the faintest weights on: fraction of weights, share of importance.

    Returns:
        Two arrays [CELLS + 1] from 0 to 1. Straight between two points, where the curve hangs below by at
        most 1/40 of the cell's own width.
    """
    parts = (np.asarray(part, np.float64) for part in (distribution.weights, distribution.importance))
    first, second = (np.concatenate([[0.0], np.cumsum(part)]) for part in parts)
    return first / first[-1], second / second[-1]
