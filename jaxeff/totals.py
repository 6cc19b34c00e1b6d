"""The numbers of all layers -> those of the model as a whole. Imports `exact`, `records`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxeff.exact import Metrics
from jaxeff.records import LayerNumbers, LayerStructure, ModelReport

_SPARSITIES = ("sparsity_1e2", "sparsity_1e3", "relative_sparsity_1e2", "relative_sparsity_1e3")


def model(structure: Sequence[LayerStructure], numbers: LayerNumbers, total_params: int) -> ModelReport:
    """Sums over the layers, each weighed by its size, and the pooled distribution."""
    sizes = jnp.asarray([layer.size for layer in structure], jnp.float32)
    found = numbers.metrics
    included = jnp.isfinite(found.effective_params)
    weights = jnp.sum(jnp.where(included, sizes, 0))

    null = jnp.full_like(sizes, jnp.nan) if numbers.null is None else numbers.null.utilization
    averaged = {"null_utilization": null, **{name: getattr(found, name) for name in _SPARSITIES}}
    weighted = (
        jnp.sum(jnp.where(included[None], sizes[None] * jnp.stack([*averaged.values()]), 0), 1) / weights
    )
    effective = jnp.sum(jnp.where(included, found.effective_params, 0))
    pooled = _pooled_effective_params(found, sizes, included)
    return ModelReport(
        total_params=total_params,
        weights=sum(layer.size for layer in structure),
        effective_params=effective,
        utilization=effective / weights,
        compression_potential=1 - effective / weights,
        average_redundancy=jnp.sum(jnp.where(included, found.redundancy, 0)) / jnp.sum(included),
        pooled_effective_params=pooled,
        pooled_utilization=pooled / weights,
        **dict(zip(averaged, weighted, strict=True)),
        excluded=jnp.sum(~included, dtype=jnp.int32),
    )


def _pooled_effective_params(found: Metrics, sizes: jax.Array, included: jax.Array) -> jax.Array:
    """exp(H) of all weights taken as one distribution, without a second pass over them.

    H(all) = H(layers) + sum_l q_l H(layer l), q_l the layer's share of all importance.
    """
    # In logarithms: the sum of a layer of large weights lies beyond float32.
    shares = jax.nn.softmax(
        jnp.where(included & (found.mean > 0), jnp.log(found.mean) + jnp.log(sizes), -jnp.inf)
    )
    within = jnp.where(shares > 0, shares * found.entropy, 0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)) + jnp.sum(within))
