"""The derivative of the loss with respect to a factor on each unit, at 1: the effect of silencing the unit.

The program runs with a gate on each post-activation. The gradient of a gate is the sum of a dL/da over the
batch and all positions, also inside loops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph.program import Value
from jaxeff.model.objective import Arrays, Objective
from jaxeff.statistics.observe import trace
from jaxeff.statistics.records import Moments
from jaxeff.statistics.units import OverAxes, fold, join, of_emissions
from jaxeff.statistics.weight_loss import moments_of

_Gated = dict[Value, list[OverAxes]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def gate_moments(
    objective: Objective, totals: frozenset[str], params: Any, arrays: Arrays
) -> tuple[Moments, ...]:
    """Return for each site, in execution order, the moments of its units' gate gradients over the batch.

    Args:
        totals: which sums of `Moments`.
    """
    found, _ = trace(objective.function, objective.paths, objective.origins, params, arrays.inputs)
    structure = jax.tree.structure(jax.eval_shape(objective.function, params, arrays.inputs)[0])
    gated: _Gated = {}
    for site in found.sites:
        for emission, over in zip(site.activation.post, of_emissions(site), strict=True):
            gated.setdefault(emission.value, []).append(over)
    leaves = jax.tree.leaves((params, arrays.inputs))

    def mean_loss(gates: dict[int, list[jax.Array]]) -> jax.Array:
        hooks = graph.Hooks(gates={value: functools.partial(_gate, asked) for value, asked in gated.items()})
        by_value = dict(zip(gated, gates.values(), strict=True))
        outputs, _ = graph.evaluate(found.program, leaves, hooks, by_value)
        return objective.mean_loss(jax.tree.unflatten(structure, outputs[: structure.num_leaves]), arrays)

    gradients = jax.grad(mean_loss)(_closed_gates(found.program, gated, leaves))
    by_value = dict(zip(gated, gradients.values(), strict=True))
    return tuple(
        moments_of(_of_site(site, by_value, gated), totals, objective.batch_size, 1) for site in found.sites
    )


def _gate(asked: Sequence[OverAxes], array: jax.Array, gates: Sequence[jax.Array]) -> jax.Array:
    """Multiply the array by 1 + the gates of its units; several weights may share a post-activation."""
    total = functools.reduce(
        jnp.add, [over.spread(gate, jnp.real(array)) for over, gate in zip(asked, gates, strict=True)]
    )
    return array * (1 + total)


def _closed_gates(program: graph.Program, gated: _Gated, leaves: Sequence[Any]) -> dict[int, list[jax.Array]]:
    """Return zeros for every gate, shaped like sums over the units, with iterations of a scan leading."""
    hooks = graph.Hooks(
        {
            value: lambda array, asked=asked: [over.reduce(array) for over in asked]
            for value, asked in gated.items()
        }
    )

    def sums() -> list[Any]:
        _, observed = graph.evaluate(program, leaves, hooks)
        return [observed[value] for value in gated]

    shapes = jax.eval_shape(sums)
    # Real gates, also of complex activations: scaling a by 1 + t moves the loss by a real number.
    return dict(
        enumerate(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.finfo(leaf.dtype).dtype), shapes))
    )


def _of_site(site: graph.Site, gradients: dict[Value, list[jax.Array]], gated: _Gated) -> jax.Array:
    parts = [
        gradients[emission.value][gated[emission.value].index(over)]
        for emission, over in zip(site.activation.post, of_emissions(site), strict=True)
    ]
    return fold(join(site, parts), site.loops)
