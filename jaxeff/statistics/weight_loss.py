"""A loss as a function of the weights alone, and sums over its terms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.model.objective import Arrays, Objective, batch_leaves, with_batch
from jaxeff.numerics.meshes import gathered, zeros_of
from jaxeff.numerics.precision import widened
from jaxeff.statistics.records import Moments

Wanted = frozenset[str]
"""Which sums of `Moments`."""

Weights = tuple[jax.Array, ...]


class Alone(NamedTuple):
    """Losses of a few examples, [n], run alone and in the batch, and the mean size of all losses of the batch."""

    alone: jax.Array
    together: jax.Array
    size: jax.Array


class WeightLoss:
    """The loss as a function of the weights alone."""

    def __init__(self, objective: Objective, params: Any, arrays: Arrays):
        self.objective, self.arrays = objective, arrays
        self._leaves, self._structure = jax.tree.flatten(params)
        self.weights: Weights = tuple(self._leaves[index] for _, index in objective.weights)

    def outputs(self, weights: Weights) -> Any:
        return self.objective.function(self.filled(weights), self.arrays.inputs)[0]

    def mean_loss(self, weights: Weights) -> jax.Array:
        return self.loss_of(self.outputs(weights))

    def loss_of(self, outputs: Any) -> jax.Array:
        return self.objective.mean_loss(outputs, self.arrays)

    def example_loss(self, weights: Weights, index: jax.Array) -> jax.Array:
        """Return the loss of one example, run alone."""
        example = self.objective.example
        assert example is not None, "made where a per-example quantity is asked for"
        arrays = self.example(index)
        outputs = example.function(self.filled(weights), arrays.inputs)[0]
        return example.mean_loss(outputs, arrays)

    def alone_and_together(self) -> Alone:
        """Return the loss of the first and the last example, run alone and in the batch."""
        ends = jnp.array([0, self.objective.batch_size - 1])
        losses = self.objective.losses(self.outputs(self.weights), self.arrays)
        each = gathered(jnp.mean(losses, range(1, losses.ndim)))
        alone = jax.vmap(lambda index: self.example_loss(self.weights, index))(ends)
        return Alone(alone, each[ends], jnp.mean(jnp.abs(each)))

    def example(self, index: jax.Array) -> Arrays:
        """Return the arrays that the objective of one example reads."""
        example, arrays = self.objective.example, self.arrays.example
        assert example is not None and arrays is not None, "made where a per-example quantity is asked for"
        pick = functools.partial(_example_of, index=index)
        whole = batch_leaves(self.objective.origins, self.arrays.inputs)
        one = batch_leaves(example.origins, arrays.inputs)
        inputs = with_batch(example.origins, arrays.inputs, [*map(pick, whole, one)])
        targets = jax.tree.map(pick, self.arrays.targets, arrays.targets)
        return dataclasses.replace(arrays, inputs=inputs, targets=targets)

    def positive(self) -> tuple[Weights, Callable[[Weights], jax.Array]]:
        """Return the absolute weights, and the summed outputs of all-positive parameters on inputs of 1."""
        leaves = [jnp.abs(leaf) if floating(leaf) else leaf for leaf in self._leaves]
        batch = batch_leaves(self.objective.origins, self.arrays.inputs)
        ones = [jnp.ones_like(leaf) if floating(leaf) else leaf for leaf in batch]
        inputs = with_batch(self.objective.origins, self.arrays.inputs, ones)

        def total(weights: Weights) -> jax.Array:
            outputs = self.objective.function(self._with(leaves, weights), inputs)[0]
            sums = [jnp.sum(widened(leaf)) for leaf in jax.tree.leaves(outputs) if floating(leaf)]
            return functools.reduce(jnp.add, sums)

        return tuple(leaves[index] for _, index in self.objective.weights), total

    def filled(self, weights: Weights) -> Any:
        """Return the parameters with other weights in them."""
        return self._with(self._leaves, weights)

    def _with(self, leaves: Sequence[Any], weights: Weights) -> Any:
        filled = list(leaves)
        for (_, index), weight in zip(self.objective.weights, weights, strict=True):
            filled[index] = weight
        return jax.tree.unflatten(self._structure, filled)


def floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _example_of(whole: jax.Array, example: jax.Array, *, index: jax.Array) -> jax.Array:
    """Return one row of an array that has one per example; return any other array, such as a mask, unchanged."""
    if jnp.shape(whole) == jnp.shape(example):
        return whole
    return jax.lax.dynamic_slice_in_dim(gathered(whole), index, 1)


def moments(terms: Iterable[jax.Array], wanted: Wanted, weight: int, count: int) -> list[Moments]:
    return [moments_of(widened(term), wanted, weight, count) for term in terms]


def moments_of(term: jax.Array, wanted: Wanted, weight: int, count: int) -> Moments:
    """Return the sums of one term that stands for `weight` examples and counts as `count` terms."""
    return Moments(
        weight * term if "sum" in wanted else None,
        weight * jnp.abs(term) if "absolute_sum" in wanted else None,
        weight * jnp.square(term) if "square_sum" in wanted else None,
        jnp.asarray(weight, term.dtype),
        jnp.asarray(count, term.dtype),
    )


def added(function: Callable[[jax.Array], Any], arguments: jax.Array) -> Any:
    """Sum the function's results over the leading axis; only one exists at a time."""

    def step(total: Any, argument: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(argument)), None

    shapes = jax.eval_shape(function, arguments[0])
    return jax.lax.scan(step, zeros_of(shapes), arguments)[0]
