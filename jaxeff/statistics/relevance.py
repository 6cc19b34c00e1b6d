"""Layer-wise relevance propagation: how much of the winning outputs passes through each weight.

In: an `Objective` (its loss is not read) and its arrays. Out: relevance by weight, and whether it was
conserved. The program runs under the rules of `graph.relevance`, so that its gradients are
relevances.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph import Propagation
from jaxeff.model.objective import Arrays, Objective
from jaxeff.numerics.precision import widened
from jaxeff.statistics.observe import trace
from jaxeff.statistics.records import Conservation, Moments
from jaxeff.statistics.weight_loss import moments_of

PROPAGATIONS: Mapping[str, Propagation] = {
    "relevance": Propagation(),
    "relevance_alpha_beta": Propagation(alpha=2.0),
}
"""Quantities of `Derivatives` and their rules."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def weight_relevance(
    objective: Objective,
    propagation: Propagation,
    totals: frozenset[str],
    params: Any,
    arrays: Arrays,
) -> tuple[dict[str, Moments], Conservation]:
    """The relevance that passes through each weight, by path, as a mean over examples.

    Args:
        totals: which sums of `Moments`.
    """
    found, _ = trace(objective.function, objective.paths, objective.origins, params, arrays.inputs)
    program = found.program
    rules = graph.relevance_rules(found, propagation)
    leaves = jax.tree.leaves((params, arrays.inputs))
    weights = [leaves[index] for _, index in objective.weights]

    def explained(weights: Sequence[jax.Array], scale: jax.Array) -> jax.Array:
        arguments = list(leaves)
        for (_, index), weight in zip(objective.weights, weights, strict=True):
            arguments[index] = weight
        arguments = [
            argument * scale.astype(argument.dtype) if value in rules.sources else argument
            for argument, value in zip(arguments, program.inputs, strict=True)
        ]
        hooks = graph.Hooks(rules={operation: rule(scale) for operation, rule in rules.operations.items()})
        outputs, _ = graph.evaluate(program, arguments, hooks)
        return _winning(outputs)

    by = jax.value_and_grad(explained, (0, 1))
    total, (gradients, accounted) = by(weights, jnp.ones((), jnp.float32))
    examples = objective.batch_size
    terms = [widened(w) * widened(g) / examples for w, g in zip(weights, gradients, strict=True)]
    moments = {
        path: moments_of(term, totals, examples, 1)
        for (path, _), term in zip(objective.weights, terms, strict=True)
    }
    return moments, Conservation(total, accounted)


def _winning(outputs: Sequence[Any]) -> jax.Array:
    """The sum of the largest output at each position: what is explained."""
    floats = [widened(x) for x in outputs if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return functools.reduce(jnp.add, [jnp.sum(_largest(x)) for x in floats], jnp.zeros((), jnp.float32))


def _largest(x: jax.Array) -> jax.Array:
    if not x.ndim:
        return x
    # By index: the derivative of a maximum compares it with its operand, which XLA may compute twice,
    # rounded differently.
    index = jnp.argmax(jax.lax.stop_gradient(x), axis=-1, keepdims=True)
    return jnp.where(jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index, x, 0)
