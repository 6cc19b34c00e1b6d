"""The gradient of the loss of each single example, squared and summed.

If an example meets a weight at only one position, as in a network of dense layers, the weight's gradient is x d^T:
the input times the slope of the loss with respect to the output. Its squares then sum to a product of two thin
matrices, x^2 and d^2 of all examples, tapped from the traced program. The gradients themselves, one array of the
weight's size per example, are never made. All other weights take one backward pass per example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph import Site
from jaxeff.numerics.meshes import laid_like
from jaxeff.numerics.precision import widened
from jaxeff.statistics.observe import trace
from jaxeff.statistics.records import Moments
from jaxeff.statistics.units import OverAxes
from jaxeff.statistics.weight_loss import Wanted, WeightLoss, added, moments

# Maximum number of elements of the weight-shaped arrays of several examples that exist together.
_ELEMENTS = 1 << 24


def example_gradient(weight_loss: WeightLoss, wanted: Wanted, key: jax.Array) -> list[Moments]:
    """Return moments of dL_n/dw over the examples n of the batch, each run alone."""
    traced = _traced(weight_loss) if wanted == {"square_sum"} else None
    found = _tapped(weight_loss, traced) if traced and traced.sites else {}
    full = [index for index in range(len(weight_loss.weights)) if index not in found]
    found.update(zip(full, _full(weight_loss, wanted, full), strict=True) if full else ())
    return [found[index] for index in range(len(weight_loss.weights))]


def _full(weight_loss: WeightLoss, wanted: Wanted, which: Sequence[int]) -> list[Moments]:
    """Run a backward pass per example, several at once as long as their gradients stay small."""
    examples = weight_loss.objective.batch_size
    size = sum(weight_loss.weights[index].size for index in which)
    together = max(1, min(examples, _ELEMENTS // size))

    def loss(chosen: Sequence[jax.Array], index: jax.Array) -> jax.Array:
        weights = list(weight_loss.weights)
        for position, weight in zip(which, chosen, strict=True):
            weights[position] = weight
        return weight_loss.example_loss(tuple(weights), index)

    def of_examples(indices: jax.Array) -> list[Moments]:
        chosen = [weight_loss.weights[index] for index in which]
        gradients = jax.vmap(jax.grad(loss), (None, 0))(chosen, indices)
        each = jax.vmap(lambda gradient: moments(gradient, wanted, 1, 1))(gradients)
        return jax.tree.map(lambda sums: jnp.sum(sums, 0), each)

    whole = examples - examples % together
    total = added(of_examples, jnp.arange(whole).reshape(-1, together))
    if whole < examples:
        total = jax.tree.map(jnp.add, total, of_examples(jnp.arange(whole, examples)))
    return total


class _Traced(NamedTuple):
    """The program of one example, and the sites to tap, by the index of their weight."""

    program: graph.Program
    outputs: Any
    sites: dict[int, Site]


def _traced(weight_loss: WeightLoss) -> _Traced:
    example, arrays = weight_loss.objective.example, weight_loss.arrays.example
    assert example is not None and arrays is not None, "made where a per-example quantity is asked for"
    params = weight_loss.filled(weight_loss.weights)
    found, _ = trace(example.function, example.paths, example.origins, params, arrays.inputs)
    sites: dict[int, Site] = {}
    for position, (_, leaf) in enumerate(weight_loss.objective.weights):
        own = [site for site in found.sites if site.leaf == leaf]
        if len(own) == 1 and _at_one_position(own[0], len(found.leaves[leaf].shape)):
            sites[position] = own[0]
    outputs = jax.tree.structure(jax.eval_shape(example.function, params, arrays.inputs)[0])
    return _Traced(found.program, outputs, sites)


def _at_one_position(site: Site, rank: int) -> bool:
    whole = site.input_axes.isdisjoint(site.unit_axes) and len(site.input_axes | site.unit_axes) == rank
    activation = site.activation
    single = graph.positions(site.input_dims) == 1 == graph.positions(activation.pre_dims)
    # The square of the real part of a complex x d^T is not a product of squares.
    real = not jnp.issubdtype(activation.pre.dtype, jnp.complexfloating)
    return site.kind == "dense" and site.direct and not site.loops and whole and single and real


def _tapped(weight_loss: WeightLoss, traced: _Traced) -> dict[int, Moments]:
    """Sum x^2 d^2 over examples, with x a weight's input and d the slope of the loss with respect to its output."""
    examples = weight_loss.objective.batch_size
    inputs, slopes = jax.vmap(lambda index: _taps(weight_loss, traced, index))(jnp.arange(examples))
    found: dict[int, Moments] = {}
    for (position, site), x, d in zip(traced.sites.items(), inputs, slopes, strict=True):
        squares = _outer(site, weight_loss.weights[position].ndim, jnp.square(x), jnp.square(d))
        count = jnp.asarray(examples, squares.dtype)
        squares = laid_like(squares, weight_loss.weights[position])
        found[position] = Moments(None, None, squares, count, count)
    return found


def _taps(
    weight_loss: WeightLoss, traced: _Traced, index: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return for one example and each tapped site its input, and the slope of the loss with respect to its output."""
    example, arrays = weight_loss.objective.example, weight_loss.example(index)
    assert example is not None, "made where a per-example quantity is asked for"
    sites = list(traced.sites.values())
    leaves = jax.tree.leaves((weight_loss.filled(weight_loss.weights), arrays.inputs))
    hooks = graph.Hooks(
        reductions={site.input: lambda array: array for site in sites},
        gates={site.activation.pre: jnp.add for site in sites},
    )

    def loss(probes: list[jax.Array]) -> tuple[jax.Array, list[Any]]:
        gates = {site.activation.pre: probe for site, probe in zip(sites, probes, strict=True)}
        results, seen = graph.evaluate(traced.program, leaves, hooks, gates)
        outputs = jax.tree.unflatten(traced.outputs, results[: traced.outputs.num_leaves])
        return example.mean_loss(outputs, arrays), [seen[site.input] for site in sites]

    zeros = [jnp.zeros(site.activation.pre.shape, site.activation.pre.dtype) for site in sites]
    slopes, inputs = jax.grad(loss, has_aux=True)(zeros)
    shapes = [weight_loss.weights[position].shape for position in traced.sites]
    return (
        [
            OverAxes(site.input_dims, site.input_axes, shape).reduce(widened(x))
            for site, shape, x in zip(sites, shapes, inputs, strict=True)
        ],
        [
            OverAxes(site.activation.pre_dims, site.unit_axes, shape).reduce(widened(slope))
            for site, shape, slope in zip(sites, shapes, slopes, strict=True)
        ],
    )


def _outer(site: Site, rank: int, inputs: jax.Array, units: jax.Array) -> jax.Array:
    """Sum over examples the products of inputs and units, laid out like the weight."""
    letters = [chr(ord("a") + axis) for axis in range(rank)]
    first, second = (
        "".join(letter for axis, letter in enumerate(letters) if axis in axes)
        for axes in (site.input_axes, site.unit_axes)
    )
    inputs, units = (
        array.reshape(array.shape[0], *(n for axis, n in enumerate(array.shape[1:]) if axis in axes))
        for array, axes in ((inputs, site.input_axes), (units, site.unit_axes))
    )
    # On a GPU the default precision keeps ten digits of a float32's 24.
    return jnp.einsum(f"z{first},z{second}->{''.join(letters)}", inputs, units, precision="highest")
