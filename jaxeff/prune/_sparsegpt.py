"""SparseGPT: masks and updates of the weights that stay, column by column."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxeff.model.params import Params
from jaxeff.numerics.precision import widened
from jaxeff.numerics.selection import lowest_of_each
from jaxeff.prune._layouts import layer_names, of_statistics
from jaxeff.prune._masks import check_allocation, check_sparsity
from jaxeff.prune._matrices import Matrix, check_damping, check_finite, damped, read, rebuilt
from jaxeff.prune._patterns import UNSTRUCTURED, NByM
from jaxeff.prune._scoring import Prunable, prunable_paths
from jaxeff.statistics import Statistics

_SCOPES = ("unit", "layer")


def sparsegpt(
    params: Any,
    statistics: Statistics,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    pattern: NByM | None = None,
    scope: str = "unit",
    block: int = 128,
    damping: float = 0.01,
    prunable: Prunable = None,
) -> tuple[Any, Any]:
    """Prune each layer once, and let the weights that stay make up for those that go.

    The weights of a unit are gone through input by input. Removing w_i costs w_i^2 / u_ii^2, with U^T U the inverse
    of the second moments H = X^T X, damped, and U upper triangular; the weights on later inputs then move by
    -w_i u_ij / u_ii, which is the least squared error of the layer's outputs. Masks are chosen as the updates go,
    for one block of inputs at a time: those whose removal costs least.

    Args:
        params: as `prune.scored` takes them.
        statistics: from `jaxeff.collect(..., hessians=True)`.
        sparsity: the fraction to remove, in [0, 1), of each layer, or by layer's name as `prune.masks` takes it for
            `allocation`. None for a pattern, which has its own.
        pattern: None for single weights, or `NByM(n, m)` along the inputs.
        scope: whose weights compete, within a block of inputs: 'unit' removes equally many of each unit, 'layer'
            compares those of all units, as published.
        block: inputs for which masks are chosen at once; with a pattern a multiple of its `m`.
        damping: added to the diagonal of H, as a fraction of its mean. It makes H invertible where there are fewer
            tokens than inputs, or an input is always 0.
        prunable: as `prune.scored` takes it. Convolutions and embeddings have no second moments: leave them out.

    Returns:
        Params that are 0 where a mask is False, of the same types; and the masks, True = kept, as `prune.masks`
        gives them.

    Raises:
        ValueError: a layer has no second moments, an argument is out of range, or H is singular all the same.

    References:
        Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023,
        arXiv:2301.00774

    >>> import jaxeff
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> x = jnp.array([[1.0, 1.0], [2.0, 2.1]])  # two inputs that are nearly the same
    >>> statistics = jaxeff.collect(params, lambda p, x: x @ p["kernel"], x, hessians=True)
    >>> pruned, masks = sparsegpt(params, statistics, 0.5)
    >>> pruned["kernel"].round(1), masks["kernel"].ravel()
    (Array([[0.],
           [3.]], dtype=float32), Array([False,  True], dtype=bool))
    """
    _check(sparsity, pattern, scope, block)
    check_damping(damping)
    own = Params.of(params)
    known = of_statistics(statistics, own.named)
    chosen = prunable_paths(prunable, own.named, known)
    weights = {path: jnp.asarray(leaf) for path, leaf in own.named.items() if path in chosen}
    names = {
        path: layer_names(path, weight.shape, axes.layers if (axes := known[path].axes) else ())
        for path, weight in weights.items()
    }
    shares = check_allocation(names, "layer", sparsity) if isinstance(sparsity, Mapping) else None
    pruned: dict[str, Array] = {}
    masks: dict[str, Array] = {}
    for path, weight in weights.items():
        matrix, moments = read(path, weight, statistics, known[path].axes)
        wanted = [sparsity if shares is None else shares[name] for name in names[path]]
        choice = _choice(path, matrix, pattern, scope, block)
        pruned[path], masks[path] = _pruned(
            matrix, choice, damping, moments, weight, choice.counts(matrix, wanted)
        )
        check_finite(path, pruned[path], damping)
    return rebuilt(params, pruned, lambda leaf: leaf), rebuilt(params, masks, lambda leaf: jnp.asarray(True))


def _check(sparsity: Any, pattern: Any, scope: str, block: int) -> None:
    if pattern is not None and (not isinstance(pattern, NByM) or pattern.axis != "input"):
        raise ValueError(f"`pattern` must be None or NByM(n, m) along the inputs, got {pattern!r}")
    if scope not in _SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(map(repr, _SCOPES))}, got {scope!r}")
    if block < 1 or (pattern is not None and block % pattern.m):
        of = f" that {pattern.m} divides" if pattern else ""
        raise ValueError(f"`block` must be a positive number of inputs{of}, got {block}")
    if pattern is not None or not isinstance(sparsity, Mapping):
        check_sparsity(sparsity, UNSTRUCTURED if pattern is None else pattern)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which weights go, of the next few inputs.

    Attributes:
        block: inputs whose updates reach the later ones together.
        group: inputs for which masks are chosen together; divides the block.
        kept: of each group and unit; None where counts say it.
        scope: whose weights compete.
    """

    block: int
    group: int
    kept: int | None
    scope: str

    def counts(self, matrix: Matrix, sparsities: Sequence[Any]) -> np.ndarray:
        """[layers, blocks], how many weights go: of each unit, or of all."""
        ends = np.minimum(np.arange(0, matrix.inputs + self.block, self.block), matrix.inputs)
        rows = 1 if self.scope == "unit" else matrix.units
        each = np.asarray([0.0 if self.kept else float(sparsity) for sparsity in sparsities])
        # Rounded at the end of each block, so that all blocks together lose round(sparsity x number).
        return np.diff(np.round(each[:, None] * ends * rows)).astype(np.int32)

    def __call__(self, costs: Array, count: Array) -> Array:
        """Which weights stay, of costs [group, units]."""
        if self.kept is not None:
            return NByM(self.kept, self.group, axis=0).kept(costs, "")
        apart = (1,) if self.scope == "unit" else ()
        return ~lowest_of_each([costs], [count], [apart])[0]


def _choice(path: str, matrix: Matrix, pattern: NByM | None, scope: str, block: int) -> _Choice:
    if pattern is None:
        size = min(block, matrix.inputs)
        return _Choice(size, size, None, scope)
    if matrix.inputs % pattern.m:
        raise ValueError(
            f"`pattern` {pattern.n} of {pattern.m} does not divide the {matrix.inputs} inputs of {path!r}: choose "
            "another `m`, or leave the leaf out with `prunable`"
        )
    return _Choice(min(block, matrix.inputs), pattern.m, pattern.n, scope)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pruned(
    matrix: Matrix, choice: _Choice, damping: Array, moments: Array, weight: Array, counts: Array
) -> tuple[Array, Array]:
    one = functools.partial(_of_layer, choice, damping)
    found, kept = matrix.each(one, moments, widened(weight), rows=(counts,))
    return found.astype(weight.dtype), kept


def _of_layer(
    choice: _Choice, damping: Array, moments: Array, weights: Array, counts: Array
) -> tuple[Array, Array]:
    """The weights [inputs, units] of one layer, pruned, and which of them stay."""
    inputs, block = len(weights), choice.block
    padding = -inputs % block
    # Inputs that do not exist are independent of all others.
    factor = jax.scipy.linalg.block_diag(_factor(damped(moments, damping)), jnp.eye(padding))
    weights = jnp.pad(weights, ((0, padding), (0, 0)))
    # What is removed on inputs that were always 0 costs nothing, and inputs that do not exist are never chosen.
    price = jnp.pad(jnp.where(jnp.diagonal(moments) > 0, 1.0, 0.0), (0, padding), constant_values=jnp.inf)

    def of_block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, kept = carry
        start = number * block
        rows = lax.dynamic_slice_in_dim(factor, start, block)
        inner = lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        own, prices = (lax.dynamic_slice_in_dim(array, start, block) for array in (weights, price))
        own, errors, stay = _of_block(choice, counts[number], inner, own, prices)
        later = jnp.where(jnp.arange(len(factor)) >= start + block, rows, 0)
        moved = weights - jnp.matmul(later.T, errors, precision=lax.Precision.HIGHEST)
        return (
            lax.dynamic_update_slice_in_dim(moved, own, start, 0),
            lax.dynamic_update_slice_in_dim(kept, stay, start, 0),
        )

    begun = weights, jnp.ones(weights.shape, bool)
    found, kept = lax.fori_loop(0, len(factor) // block, of_block, begun)
    return jnp.where(kept, found, 0)[:inputs], kept[:inputs]


def _of_block(
    choice: _Choice, count: Array, factor: Array, weights: Array, prices: Array
) -> tuple[Array, Array, Array]:
    """The weights [block, units] of a block of inputs, moved by those removed before them in the block.

    Returns:
        The weights; w_i / u_ii of those removed, else 0, by which the weights on later inputs move; which stay.
    """

    def of_group(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, errors, kept = carry
        first = number * choice.group
        arrays = (weights, jnp.diagonal(factor)[:, None], prices[:, None])
        own, steps, each = (lax.dynamic_slice_in_dim(array, first, choice.group) for array in arrays)
        # Without the square, which keeps the order, but overflows and underflows.
        costs = jnp.where(jnp.isinf(each), each, each * jnp.abs(own / steps))
        stay = choice(costs, count)

        def of_input(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            weights, errors = carry
            row = factor[first + i]
            error = jnp.where(stay[i], 0, weights[first + i] / row[first + i])
            # The factor is 0 before its diagonal: earlier weights stay as they are.
            return weights - row[:, None] * error[None], errors.at[first + i].set(error)

        weights, errors = lax.fori_loop(0, choice.group, of_input, (weights, errors))
        return weights, errors, lax.dynamic_update_slice_in_dim(kept, stay, first, 0)

    begun = weights, jnp.zeros_like(weights), jnp.ones(weights.shape, bool)
    return lax.fori_loop(0, choice.block // choice.group, of_group, begun)


def _factor(moments: Array) -> Array:
    """U upper triangular, with U^T U the inverse of the moments.

    With the moments R R^T, R upper triangular, U is the inverse of R: the moments themselves are never inverted.
    """
    flipped = jnp.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(flipped, jnp.eye(len(moments), dtype=moments.dtype), lower=False)
