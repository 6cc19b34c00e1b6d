"""Where a joint search starts: how much of each layer goes, as a function of how much of all goes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.prune import ALLOCATIONS, Sensitivity

Family = Callable[[float], np.ndarray]
"""The fraction of all to remove -> [parts], the number of elements to remove from each."""

_QUANTILES = 513


@functools.partial(jax.jit, static_argnums=0)
def quantiles(stacks: tuple[tuple[int, ...], ...], scores: list[jax.Array]) -> list[jax.Array]:
    """Return for each weight [layers, 513], evenly spaced among the sorted scores of each of its layers."""

    def of_weight(score: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        front = tuple(range(len(axes)))
        rows = jnp.moveaxis(score, axes, front).reshape(int(np.prod([score.shape[a] for a in axes])), -1)
        places = np.linspace(0, rows.shape[1] - 1, _QUANTILES).round().astype(np.int32)
        return widened(jnp.sort(rows, axis=1))[:, places]

    return by_compiler(
        lambda *scores: [of_weight(*pair) for pair in zip(scores, stacks, strict=True)], *scores
    )


def uniform(sizes: np.ndarray) -> Family:
    return lambda share: np.round(share * sizes)


def erk(sizes: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> Family:
    named = {str(index): shape for index, shape in enumerate(shapes)}

    def family(share: float) -> np.ndarray:
        found = ALLOCATIONS["erk"](named, share)
        return np.round(np.array([float(part) for part in found.values()]) * sizes)

    return family


def by_rise(sizes: np.ndarray, measured: Sequence[int], sensitivity: Sensitivity) -> Family:
    """The same rise of the loss in each layer alone; layers that were not measured lose the fraction asked for.

    Args:
        measured: the layers whose sensitivity it is, in its order.
    """
    totals, shares = sensitivity.allocations()

    def family(share: float) -> np.ndarray:
        found = np.full(len(sizes), share)
        found[[*measured]] = [np.interp(share, totals, column) for column in shares.T]
        return np.round(found * sizes)

    return family


def by_score(sizes: np.ndarray, values: np.ndarray, curves: np.ndarray) -> Family:
    """The lowest scores of all parts together.

    Args:
        values: [parts], what an element of each counts.
        curves: [parts, quantiles], ascending scores.
    """
    owners = np.repeat(np.arange(len(sizes)), curves.shape[1])
    order = np.argsort(curves.ravel(), kind="stable")
    owners = owners[order]
    weights = (sizes * values / curves.shape[1])[owners]
    up_to = np.cumsum(weights) / weights.sum()

    def family(share: float) -> np.ndarray:
        taken = owners[up_to <= share + 1e-9]
        return np.round(np.bincount(taken, minlength=len(sizes)) * sizes / curves.shape[1])

    return family


def lamp(curves: np.ndarray) -> np.ndarray:
    """Return scores that compare across layers: s^2 over the sum of the squares of those not below it.

    References:
        Lee, Park, Mo, Ahn and Shin, Layer-Adaptive Sparsity for the Magnitude-Based Pruning, 2021,
        arXiv:2010.07611

    >>> lamp(np.array([[1.0, 2.0]])).round(2)
    array([[0.2, 1. ]])
    """
    squares = np.square(curves / np.maximum(curves[:, -1:], 1e-300))
    left = np.cumsum(squares[:, ::-1], axis=1)[:, ::-1]
    return np.divide(squares, left, out=np.zeros_like(squares), where=left > 0)
