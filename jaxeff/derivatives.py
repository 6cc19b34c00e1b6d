"""What the loss makes of each weight: gradients, curvature, flow; summed over the batch.

In: an `Objective`, the arrays that it reads, and what to collect. Out: `Derivatives` by path. Each
quantity is one function of a `Problem` that gives terms shaped like the weights. Imports
`objectives`, `statistics`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.objectives import Arrays, Objective, batch_leaves, with_batch
from jaxeff.precision import widened
from jaxeff.statistics import Derivatives, Moments

Need = tuple[str, str]
"""A quantity of `Derivatives`, and which of its sums: ('gradient', 'square_sum')."""

Wanted = frozenset[str]
"""Which sums of `Moments`."""

SAMPLES = 16
"""Random sign vectors a batch for the diagonal of a Hessian; several batches add theirs."""

WITHOUT_LOSS = frozenset({"synaptic_flow", "relevance", "relevance_alpha_beta"})
"""Quantities that need no loss and no targets."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def derive(
    objective: Objective,
    wanted: tuple[tuple[str, Wanted], ...],
    params: Any,
    arrays: Arrays,
    key: jax.Array,
) -> dict[str, Derivatives]:
    """Every quantity asked for, of every weight, by path.

    Args:
        wanted: quantities, and which of their sums.
        key: of the random signs.
    """
    problem = Problem(objective, params, arrays)
    found = {name: QUANTITIES[name](problem, totals, key) for name, totals in wanted}
    return {
        path: Derivatives(**{name: moments[i] for name, moments in found.items()})
        for i, (path, _) in enumerate(objective.weights)
    }


Weights = tuple[jax.Array, ...]


class Problem:
    """The loss as a function of the weights alone."""

    def __init__(self, objective: Objective, params: Any, arrays: Arrays):
        self.objective, self.arrays = objective, arrays
        self._leaves, self._structure = jax.tree.flatten(params)
        self.weights: Weights = tuple(self._leaves[index] for _, index in objective.weights)

    def outputs(self, weights: Weights) -> Any:
        return self.objective.function(self._filled(weights), self.arrays.inputs)[0]

    def mean_loss(self, weights: Weights) -> jax.Array:
        return self.loss_of(self.outputs(weights))

    def loss_of(self, outputs: Any) -> jax.Array:
        return self.objective.mean_loss(outputs, self.arrays)

    def example_loss(self, weights: Weights, index: jax.Array) -> jax.Array:
        """The loss of one example, run alone."""
        example, arrays = self.objective.example, self.arrays.example
        assert example is not None and arrays is not None
        pick = functools.partial(_example_of, index=index)
        whole, one = (
            batch_leaves(self.objective.origins, self.arrays.inputs),
            batch_leaves(example.origins, arrays.inputs),
        )
        inputs = with_batch(example.origins, arrays.inputs, [*map(pick, whole, one)])
        targets = jax.tree.map(pick, self.arrays.targets, arrays.targets)
        outputs = example.function(self._filled(weights), inputs)[0]
        return example.mean_loss(outputs, dataclasses.replace(arrays, targets=targets))

    def positive(self) -> tuple[Weights, Callable[[Weights], jax.Array]]:
        """The absolute weights, and the summed outputs of all-positive parameters on inputs of 1."""
        leaves = [jnp.abs(leaf) if _floating(leaf) else leaf for leaf in self._leaves]
        batch = batch_leaves(self.objective.origins, self.arrays.inputs)
        ones = [jnp.ones_like(leaf) if _floating(leaf) else leaf for leaf in batch]
        inputs = with_batch(self.objective.origins, self.arrays.inputs, ones)

        def total(weights: Weights) -> jax.Array:
            outputs = self.objective.function(self._with(leaves, weights), inputs)[0]
            sums = [jnp.sum(widened(leaf)) for leaf in jax.tree.leaves(outputs) if _floating(leaf)]
            return functools.reduce(jnp.add, sums)

        return tuple(leaves[index] for _, index in self.objective.weights), total

    def _filled(self, weights: Weights) -> Any:
        return self._with(self._leaves, weights)

    def _with(self, leaves: Sequence[Any], weights: Weights) -> Any:
        filled = list(leaves)
        for (_, index), weight in zip(self.objective.weights, weights, strict=True):
            filled[index] = weight
        return jax.tree.unflatten(self._structure, filled)


def _floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _example_of(whole: jax.Array, example: jax.Array, *, index: jax.Array) -> jax.Array:
    """One row of an array that has one an example; any other array, such as a mask, as it is."""
    if jnp.shape(whole) == jnp.shape(example):
        return whole
    return jax.lax.dynamic_slice_in_dim(whole, index, 1)


def _gradient(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    gradients = jax.grad(problem.mean_loss)(problem.weights)
    return _moments(gradients, wanted, problem.objective.batch_size, 1)


# Weight-shaped arrays of several examples that exist together hold at most so many elements.
_ELEMENTS = 1 << 24


def _example_gradient(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    """Each example's own backward pass, several at once as long as their gradients stay small."""
    examples = problem.objective.batch_size
    size = sum(weight.size for weight in problem.weights)
    together = max(1, min(examples, _ELEMENTS // size))

    def of_examples(indices: jax.Array) -> list[Moments]:
        gradients = jax.vmap(jax.grad(problem.example_loss), (None, 0))(problem.weights, indices)
        moments = jax.vmap(lambda gradient: _moments(gradient, wanted, 1, 1))(gradients)
        return jax.tree.map(lambda sums: jnp.sum(sums, 0), moments)

    whole = examples - examples % together
    total = _added(of_examples, jnp.arange(whole).reshape(-1, together))
    if whole < examples:
        total = jax.tree.map(jnp.add, total, of_examples(jnp.arange(whole, examples)))
    return total


def _hessian(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    _, product = jax.vjp(jax.grad(problem.mean_loss), problem.weights)
    return _sampled(problem, wanted, key, lambda signs: product(signs)[0])


def _gauss_newton(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    structure = jax.tree.structure(jax.eval_shape(problem.outputs, problem.weights))

    def outputs(weights: Weights) -> tuple[list[Any], list[Any]]:
        leaves = jax.tree.leaves(problem.outputs(weights))
        floats = [leaf for leaf in leaves if _floating(leaf)]
        return floats, [None if _floating(leaf) else leaf for leaf in leaves]

    floats, pull, rest = jax.vjp(outputs, problem.weights, has_aux=True)

    def loss(floats: list[Any]) -> jax.Array:
        given = iter(floats)
        leaves = [next(given) if leaf is None else leaf for leaf in rest]
        return problem.loss_of(jax.tree.unflatten(structure, leaves))

    # J as the transpose of its transpose: a function with its own backward rule has no forward mode.
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], floats)
    _, curvature = jax.vjp(jax.grad(loss), floats)
    return _sampled(problem, wanted, key, lambda signs: pull(curvature(push(signs)[0])[0])[0])


def _sampled(
    problem: Problem, wanted: Wanted, key: jax.Array, product: Callable[[Weights], Weights]
) -> list[Moments]:
    """Terms v * Av, v random signs: their mean is the diagonal of A.

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007
    """

    def of_key(key: jax.Array) -> list[Moments]:
        keys = jax.random.split(key, len(problem.weights))
        signs = tuple(
            jax.random.rademacher(key, weight.shape, weight.dtype)
            for key, weight in zip(keys, problem.weights, strict=True)
        )
        terms = [sign * found for sign, found in zip(signs, product(signs), strict=True)]
        return _moments(terms, wanted, problem.objective.batch_size, 1)

    return _added(of_key, jax.random.split(key, SAMPLES))


def _gradient_flow(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    gradient, product = jax.vjp(jax.grad(problem.mean_loss), problem.weights)
    return _moments(product(gradient)[0], wanted, problem.objective.batch_size, 1)


def _synaptic_flow(problem: Problem, wanted: Wanted, key: jax.Array) -> list[Moments]:
    weights, total = problem.positive()
    # All examples are the same: one is wanted.
    flow = [found / problem.objective.batch_size for found in jax.grad(total)(weights)]
    return _moments(flow, wanted, problem.objective.batch_size, 1)


QUANTITIES: Mapping[str, Callable[[Problem, Wanted, jax.Array], list[Moments]]] = {
    "gradient": _gradient,
    "example_gradient": _example_gradient,
    "hessian": _hessian,
    "gauss_newton": _gauss_newton,
    "gradient_flow": _gradient_flow,
    "synaptic_flow": _synaptic_flow,
}


def _moments(terms: Iterable[jax.Array], wanted: Wanted, weight: int, count: int) -> list[Moments]:
    return [moments_of(widened(term), wanted, weight, count) for term in terms]


def moments_of(term: jax.Array, wanted: Wanted, weight: int, count: int) -> Moments:
    """The sums of one term that stands for `weight` examples and counts as `count` terms."""
    return Moments(
        weight * term if "sum" in wanted else None,
        weight * jnp.abs(term) if "absolute_sum" in wanted else None,
        weight * jnp.square(term) if "square_sum" in wanted else None,
        jnp.asarray(weight, term.dtype),
        jnp.asarray(count, term.dtype),
    )


def _added(function: Callable[[jax.Array], Any], arguments: jax.Array) -> Any:
    """The sum of the function's results over the leading axis; one exists at a time."""

    def step(total: Any, argument: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(argument)), None

    shapes = jax.eval_shape(function, arguments[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(step, zeros, arguments)[0]
