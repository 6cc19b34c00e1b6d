"""The weights that stay under a mask, by least squares on what the layer emitted with all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxeff.model.params import Params
from jaxeff.numerics.precision import widened
from jaxeff.prune._layouts import by_path, of_statistics
from jaxeff.prune._masking import check_masks
from jaxeff.prune._matrices import Matrix, check_damping, check_finite, damped, normalized, read, rebuilt
from jaxeff.statistics import Statistics

# Of the gradient, by which it has shrunk where a unit's weights are taken to be found: float32 has no more.
_TOLERANCE = 1e-6


def reconstruct(
    params: Any, masks: Any, statistics: Statistics, *, damping: float = 0.01, iterations: int = 100
) -> Any:
    """Change the weights that stay so that each layer emits what it did with all of its weights.

    For each unit with weights w, the new weights v minimize (w - v)^T (H + d I) (w - v) among those that are 0 where
    the mask is False. H = X^T X are the second moments of the layer's inputs, and d is the damping. Conjugate
    gradients, preconditioned by the diagonal, start at the masked weights, for all units of a layer at once: an
    iteration is one product with H. At every iteration the squared error on the calibration data is at most that of
    the masked layer, whose weights are kept where rounding would make it larger.

    Args:
        params: before pruning.
        masks: from `prune.masks`, or any other, True = kept. A leaf whose mask is one boolean stays as it is.
        statistics: from `jaxeff.collect(..., hessians=True)`, of these params.
        damping: d, as a fraction of the mean of the diagonal of H.
        iterations: the most for each layer; it stops before if all of its units have converged.

    Returns:
        Params that are 0 where a mask is False, of the same types.

    Raises:
        TypeError: `statistics` are something else.
        ValueError: the masks or the statistics are of other params; the masks hold other numbers than 0 and 1; a masked
            layer has no finite second moments; or an argument is out of range.

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024,
        arXiv:2406.07831: conjugate gradients on the support of a mask
        Boza, Fast and Effective Weight Update for Pruned Large Language Models, 2024, arXiv:2401.02938

    >>> import jaxeff
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> x = jnp.array([[1.0, 1.0], [2.0, 2.1]])  # two inputs that are nearly the same
    >>> statistics = jaxeff.collect(params, lambda p, x: x @ p["kernel"], x, hessians=True)
    >>> masks = {"kernel": jnp.array([[False], [True]])}
    >>> reconstruct(params, masks, statistics)["kernel"].round(1)
    Array([[0.],
           [3.]], dtype=float32)
    """
    check_damping(damping)
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")
    check_masks(params, masks)
    own, under = Params.of(params), by_path(masks)
    known = of_statistics(statistics, own.named)
    found: dict[str, Array] = {}
    for path, leaf in own.named.items():
        mask = jnp.asarray(under[path])
        if mask.ndim and mask.size:
            weight = jnp.asarray(leaf)
            matrix, moments = read(path, weight, statistics, known[path].axes)
            found[path] = _reconstructed(matrix, iterations, damping, moments, weight, mask)
            check_finite(path, found[path], damping)
    return rebuilt(params, found, lambda leaf: leaf)


@functools.partial(jax.jit, static_argnums=0)
def _reconstructed(
    matrix: Matrix, iterations: Array, damping: Array, moments: Array, weight: Array, mask: Array
) -> Array:
    def of_layer(moments: Array, weights: Array, kept: Array) -> Array:
        moments = normalized(moments)
        # Squares of very large or small weights would overflow or underflow. By a power of two, nothing is rounded.
        size = jnp.max(jnp.abs(weights), initial=0)
        scale = jnp.ldexp(jnp.ones_like(size), jnp.frexp(size)[1] - 1)
        found = _solved(damped(moments, damping), weights / scale, kept, iterations) * scale
        masked = jnp.where(kept, weights, 0)
        # As they are stored: small floats may lose more by rounding than there was to gain.
        found = widened(found.astype(weight.dtype))
        errors = [_error(moments, (weights - each) / scale) for each in (found, masked)]
        return jnp.where(errors[0] <= errors[1], found, masked)

    return matrix.each(of_layer, moments, widened(weight), mask).astype(weight.dtype)


def _solved(moments: Array, weights: Array, kept: Array, iterations: Array) -> Array:
    """The minimum for each unit, [inputs, units], by conjugate gradients on the weights that stay."""
    scale = 1 / jnp.diagonal(moments)[:, None]

    def product(vectors: Array) -> Array:
        return jnp.where(kept, _product(moments, vectors), 0)

    start = jnp.where(kept, weights, 0)
    residual = product(weights - start)
    direction = scale * residual
    first = jnp.sum(residual * direction, 0, keepdims=True)

    def open_units(size: Array) -> Array:
        return size > _TOLERANCE**2 * first

    def unfinished(carry: tuple[Array, ...]) -> Array:
        return (carry[0] < iterations) & jnp.any(open_units(carry[-1]))

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        number, found, residual, direction, size = carry
        along = product(direction)
        curvature = jnp.sum(direction * along, 0, keepdims=True)
        # A unit that is found stays where it is while others go on.
        length = jnp.where(open_units(size), size / jnp.where(curvature > 0, curvature, 1), 0)
        found, residual = found + length * direction, residual - length * along
        scaled = scale * residual
        new = jnp.sum(residual * scaled, 0, keepdims=True)
        direction = scaled + direction * (new / jnp.where(size > 0, size, 1))
        return number + 1, found, residual, direction, jnp.where(open_units(size), new, size)

    return lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), start, residual, direction, first))[1]


def _error(moments: Array, difference: Array) -> Array:
    """[1, units], the squared error of the outputs over all positions."""
    return jnp.sum(difference * _product(moments, difference), 0, keepdims=True)


def _product(moments: Array, vectors: Array) -> Array:
    return jnp.matmul(moments, vectors, precision=lax.Precision.HIGHEST)
