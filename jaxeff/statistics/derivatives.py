"""Derivatives of the loss with respect to each weight: gradients, curvature and flow, summed over the batch.

Each quantity is a function of a `WeightLoss` that returns terms shaped like the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxeff.model.objective import Arrays, Objective
from jaxeff.numerics.meshes import laid_like
from jaxeff.statistics.example_gradients import example_gradient
from jaxeff.statistics.records import Derivatives, Moments
from jaxeff.statistics.weight_loss import Alone, Wanted, WeightLoss, Weights, added, floating, moments

Need = tuple[str, str]
"""A quantity of `Derivatives`, and which of its sums: ('gradient', 'square_sum')."""

SAMPLES = 16
"""Number of random sign vectors per batch for the diagonal of a Hessian; several batches add up."""

WITHOUT_LOSS = frozenset({"synaptic_flow", "relevance", "relevance_alpha_beta"})
"""Quantities that need no loss and no targets."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def derive(
    objective: Objective,
    wanted: tuple[tuple[str, Wanted], ...],
    params: Any,
    arrays: Arrays,
    key: jax.Array,
) -> tuple[dict[str, Derivatives], Alone | None]:
    """Return every requested quantity of every weight, by path, and the losses of examples that run alone, if any do.

    Args:
        wanted: quantities, and which of their sums.
        key: of the random signs.
    """
    weight_loss = WeightLoss(objective, params, arrays)
    found = {name: QUANTITIES[name](weight_loss, totals, key) for name, totals in wanted}
    by_path = {
        path: Derivatives(**{name: moments[i] for name, moments in found.items()})
        for i, (path, _) in enumerate(objective.weights)
    }
    return by_path, None if objective.example is None else weight_loss.alone_and_together()


def _gradient(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    gradients = jax.grad(weight_loss.mean_loss)(weight_loss.weights)
    return moments(gradients, wanted, weight_loss.objective.batch_size, 1)


def _hessian(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    _, product = jax.vjp(jax.grad(weight_loss.mean_loss), weight_loss.weights)
    return _sampled(weight_loss, wanted, key, lambda signs: product(signs)[0])


def _gauss_newton(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    structure = jax.tree.structure(jax.eval_shape(weight_loss.outputs, weight_loss.weights))

    def outputs(weights: Weights) -> tuple[list[Any], list[Any]]:
        leaves = jax.tree.leaves(weight_loss.outputs(weights))
        floats = [leaf for leaf in leaves if floating(leaf)]
        return floats, [None if floating(leaf) else leaf for leaf in leaves]

    floats, pull, rest = jax.vjp(outputs, weight_loss.weights, has_aux=True)

    def loss(floats: list[Any]) -> jax.Array:
        given = iter(floats)
        leaves = [next(given) if leaf is None else leaf for leaf in rest]
        return weight_loss.loss_of(jax.tree.unflatten(structure, leaves))

    # J is the transpose of its transpose, since a function with its own backward rule has no forward mode.
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], floats)
    _, curvature = jax.vjp(jax.grad(loss), floats)
    return _sampled(weight_loss, wanted, key, lambda signs: pull(curvature(push(signs)[0])[0])[0])


def _sampled(
    weight_loss: WeightLoss, wanted: Wanted, key: jax.Array, product: Callable[[Weights], Weights]
) -> list[Moments]:
    """Return terms v * Av, with v random signs; their mean is the diagonal of A.

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007
    """

    def of_key(key: jax.Array) -> list[Moments]:
        keys = jax.random.split(key, len(weight_loss.weights))
        signs = tuple(
            laid_like(jax.random.rademacher(key, weight.shape, weight.dtype), weight)
            for key, weight in zip(keys, weight_loss.weights, strict=True)
        )
        terms = [sign * found for sign, found in zip(signs, product(signs), strict=True)]
        return moments(terms, wanted, weight_loss.objective.batch_size, 1)

    return added(of_key, jax.random.split(key, SAMPLES))


def _gradient_flow(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    gradient, product = jax.vjp(jax.grad(weight_loss.mean_loss), weight_loss.weights)
    return moments(product(gradient)[0], wanted, weight_loss.objective.batch_size, 1)


def _synaptic_flow(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    weights, total = weight_loss.positive()
    # All examples are equal, and one suffices.
    flow = [found / weight_loss.objective.batch_size for found in jax.grad(total)(weights)]
    return moments(flow, wanted, weight_loss.objective.batch_size, 1)


QUANTITIES: Mapping[str, Callable[[WeightLoss, Wanted, jax.Array], list[Moments]]] = {
    "gradient": _gradient,
    "example_gradient": example_gradient,
    "hessian": _hessian,
    "gauss_newton": _gauss_newton,
    "gradient_flow": _gradient_flow,
    "synaptic_flow": _synaptic_flow,
}
