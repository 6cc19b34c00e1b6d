"""Allocation of a sparsity to layers that are pruned separately."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff.prune._layouts import axes_of, by_path, layer_names, unboxed

Shapes = Mapping[str, tuple[int, ...]]


@runtime_checkable
class MeasuredAllocation(Protocol):
    """A measurement of how far each layer can be pruned: a `Sensitivity`."""

    def allocation(self, sparsity: Any) -> Mapping[str, Any]:
        """Return by path the fraction to remove from each layer, for a fraction of all."""
        ...


def uniform(shapes: Shapes, sparsity: float | Array) -> dict[str, float | Array]:
    """Remove the same fraction of every layer."""
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float | Array) -> dict[str, float | Array]:
    """Allocate by Erdos-Renyi-kernel: a layer's density is proportional to the sum of its axes over their product.

    Small layers stay denser. Layers that would be denser than full are full, and the others make up for it.

    References:
        Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery, 2020, arXiv:1911.11134
    """
    sizes = jnp.asarray([math.prod(shape) for shape in shapes.values()], jnp.float32)
    raw = jnp.asarray([sum(shape) / math.prod(shape) for shape in shapes.values()], jnp.float32)
    kept = (1 - jnp.asarray(sparsity, jnp.float32)) * jnp.sum(sizes)

    def density(full: Array) -> Array:
        scale = (kept - jnp.sum(jnp.where(full, sizes, 0))) / jnp.sum(jnp.where(full, 0, raw * sizes))
        return jnp.where(full, 1, scale * raw)

    def step(_: Array, full: Array) -> Array:
        return full | (density(full) > 1)

    full = jax.lax.fori_loop(0, len(sizes), step, jnp.zeros(len(sizes), bool))
    return dict(zip(shapes, 1 - jnp.where(full, 1, density(full)), strict=True))


ALLOCATIONS: Mapping[str, Callable[[Shapes, float | Array], dict[str, float | Array]]] = {
    "uniform": uniform,
    "erk": erk,
}


def lamp(scores: Array) -> Array:
    """Return scores that compare across layers: s^2 over the sum of squares of the scores that are not below s.

    Pruned by these scores in one global order, each layer keeps at least its largest weight.

    References:
        Lee, Park, Mo, Ahn and Shin, Layer-Adaptive Sparsity for the Magnitude-Based Pruning, 2021,
        arXiv:2010.07611

    >>> lamp(jnp.array([1.0, 2.0])).round(2)
    Array([0.2, 1. ], dtype=float32)
    """
    squares = jnp.square(scores.astype(jnp.float32) / jnp.maximum(jnp.max(scores), 1e-30)).ravel()
    order = jnp.argsort(squares)
    remaining = jnp.cumsum(squares[order][::-1])[::-1]
    share = jnp.where(remaining > 0, squares[order] / remaining, 0)
    return jnp.zeros_like(squares).at[order].set(share, unique_indices=True).reshape(scores.shape)


def owl(scores: Any, sparsity: float, *, multiple: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    """Outlier-weighed layerwise sparsity: blocks with more outliers among their scores lose less.

    The outlier ratio r of a block is the share of its scores above `multiple` times their mean. The sparsity of all its
    weights is s - spread (r - m) / max |r - m|, with m the mean of r over all weights, so that s of all weights go.

    A block is what one step of a scan reads, or the module whose name ends in a number: 'layers_3', 'layers/3'. A
    weight in neither is a block of its own. Stacked weights are taken to be read by one scan if they lie under the same
    key, below the keys that all leaves share.

    Args:
        scores: as `prune.masks` takes them; published with the criterion `wanda`.
        sparsity: s, the fraction of all weights to remove.
        multiple: of the mean, above which a score is an outlier.
        spread: the largest difference between the sparsity of a block and s.

    Returns:
        By layer, the fraction to remove, for `allocation` of `prune.masks`. Each of the layers that a scan stacks
        has its own: 'blocks/q[3]'.

    Raises:
        ValueError: `scores` holds none or is not finite, an argument is out of range, or `spread` would give a block a
            sparsity outside [0, 1).

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
        Sparsity, 2024, arXiv:2310.05175

    >>> scores = {"flat": jnp.ones((4, 4)), "peaked": jnp.ones((4, 4)).at[0, 0].set(100.0)}
    >>> {name: round(fraction, 2) for name, fraction in owl(scores, 0.5).items()}
    {'flat': 0.58, 'peaked': 0.42}
    """
    if not multiple > 0:
        raise ValueError(
            f"`multiple` must be positive, got {multiple}: an outlier is a score above this multiple of the mean"
        )
    if not 0 <= spread <= sparsity or not sparsity + spread < 1:
        raise ValueError(
            f"`sparsity` {sparsity} and `spread` {spread} must leave each layer a fraction in [0, 1) to remove: "
            "choose a `spread` that is at most `sparsity` and less than 1 - `sparsity`"
        )
    plain = unboxed(scores)
    named = [
        (path, score, axes.layers if axes else ())
        for (path, score), axes in zip(by_path(plain).items(), axes_of(scores), strict=True)
        if jnp.ndim(score)
    ]
    if not named:
        raise ValueError("`scores` holds no scores: every leaf is a single number")
    blocks = _blocks(named, [*by_path(plain)])
    members = np.concatenate([each.ravel() for each in blocks])
    own = [tuple(axis for axis in range(score.ndim) if axis not in stacked) for _, score, stacked in named]

    def per_block(sums: Iterable[Any]) -> np.ndarray:
        """[blocks], of the sums of each layer of each leaf."""
        return np.bincount(members, np.concatenate([np.ravel(np.asarray(each, np.float64)) for each in sums]))

    scored = [(score, axes) for (_, score, _), axes in zip(named, own, strict=True)]
    sizes = per_block(
        np.full(each.shape, score.size / each.size) for each, (score, _) in zip(blocks, scored, strict=True)
    )
    means = per_block(jnp.sum(score, axes, jnp.float32) for score, axes in scored) / sizes
    if not np.all(np.isfinite(means)):
        raise ValueError("`scores` hold nan or infinity, or are too large to be summed: pass finite scores")
    edges = [np.expand_dims(multiple * means[each], axes) for each, axes in zip(blocks, own, strict=True)]
    outliers = per_block(
        jnp.sum(score > jnp.asarray(edge, jnp.float32), axes)
        for (score, axes), edge in zip(scored, edges, strict=True)
    )
    deviation = outliers / sizes - outliers.sum() / sizes.sum()
    largest = np.max(np.abs(deviation))
    fractions = sparsity - deviation * (spread / largest if largest else 0.0)
    names = [name for path, score, stacked in named for name in layer_names(path, score.shape, stacked)]
    return dict(zip(names, fractions[members].tolist(), strict=True))


def _blocks(named: Sequence[tuple[str, Array, tuple[int, ...]]], every: Sequence[str]) -> list[np.ndarray]:
    """Return for each leaf the number of the block that each of its layers belongs to, [*stacked].

    Args:
        every: the paths of all leaves, those without scores among them.
    """
    numbers: dict[Hashable, int] = {}
    found = []
    shared = len(os.path.commonprefix([_keys(path)[:-1] for path in every]))
    for path, score, stacked in named:
        module = _module(_keys(path)[shared:], bool(stacked))
        shape = tuple(score.shape[axis] for axis in stacked)
        each = [numbers.setdefault((module, index), len(numbers)) for index in np.ndindex(shape)]
        found.append(np.array(each).reshape(shape))
    return found


def _keys(path: str) -> list[str]:
    """Return the keys of a path, also of one like 'layers.3.q.weight' in a flat dict."""
    return re.split("[/.]", path)


def _module(keys: Sequence[str], stacked: bool) -> tuple[str, ...]:
    """Return the module that makes a leaf part of a block; for stacked blocks, what all of them lie in.

    >>> [_module(path.split("/"), False) for path in ("layers_0/q", "layers/0/mlp/up", "head")]
    [('layers_0',), ('layers', '0'), ('head',)]
    >>> [_module(path.split("/"), True) for path in ("blocks/Dense_0/kernel", "blocks/q", "q")]
    [('blocks',), ('blocks',), ()]
    """
    if stacked:
        return tuple(keys[:-1][:1])
    end = next((i for i, key in enumerate(keys) if key[-1:].isdigit()), 0)
    return tuple(keys[: end + 1])
