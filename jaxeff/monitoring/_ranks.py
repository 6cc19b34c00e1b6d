"""Effective and stable rank of every weight, inside a compiled step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.model.params import Params
from jaxeff.monitoring._records import SpectralRanks
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.prune import _layouts as layouts
from jaxeff.spectral import _singular_values as numbers
from jaxeff.spectral._matrices import Roles, has_matrices, roles, stacked
from jaxeff.statistics import Statistics


def spectral_ranks(params: Params, statistics: Statistics) -> SpectralRanks:
    """Measure the ranks of every weight, by the matrices of `jaxeff.spectra`."""
    layout = layouts.of_statistics(statistics, params.named)
    leaves = [layout[info.path] for info in statistics.params if has_matrices(layout[info.path])]
    found = [roles(leaf.path, leaf.shape, leaf.axes) for leaf in leaves]
    names = [
        name
        for leaf, own in zip(leaves, found, strict=True)
        for name in layouts.layer_names(leaf.path, leaf.shape, own.batch)
    ]
    return SpectralRanks(tuple(names), *_measured(tuple(found), [params.named[leaf.path] for leaf in leaves]))


@functools.partial(jax.jit, static_argnums=0)
def _measured(found: tuple[Roles, ...], weights: list[Any]) -> list[jax.Array]:
    """Return the effective and the stable ranks of all matrices."""
    each = [
        by_compiler(functools.partial(_of_weight, own), weight)
        for own, weight in zip(found, weights, strict=True)
    ]
    return [jnp.concatenate([jnp.zeros(0, jnp.float32), *ranks]) for ranks in zip(*each, strict=True)]


def _of_weight(found: Roles, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    matrices = stacked(widened(weight), found)
    largest = jnp.max(jnp.abs(matrices), (1, 2), keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)  # a decomposition of nan need not come to an end
    # Gram matrices decompose in less time, but in float32 their roots cannot tell 0 from 3e-4 of the largest value,
    # which makes the effective rank of a matrix of low rank 10 % too high.
    values = jnp.linalg.svd(jnp.where(usable, matrices / largest, 0), compute_uv=False)
    return numbers.effective_rank(values), numbers.stable_rank(values)
