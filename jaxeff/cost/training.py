"""The programs of a training step: its forward and backward pass, and the optimizer's update.

In: a bound model, a loss, an optimizer; shapes will do for arrays. Out: traced programs, whose first inputs
are the floating leaves of `params`, then its other leaves, then the model's inputs. Nothing runs.
Imports `models`, `functions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr

from jaxeff.functions import MISFITS, first_line
from jaxeff.models import Bound


class Gradient(NamedTuple):
    """The gradient of a loss in two programs.

    Attributes:
        forward: the outputs, the loss, and all that the backward pass needs; its last outputs are that.
        kept: how many outputs of `forward` the backward pass needs.
        backward: what is made of them.
    """

    forward: ClosedJaxpr
    kept: int
    backward: ClosedJaxpr


def outputs(bound: Bound) -> ClosedJaxpr:
    """The model's outputs."""

    def forward(params: Any, rest: Any, inputs: Any) -> Any:
        return bound.plain(joined(params, rest), inputs)

    return jax.make_jaxpr(forward)(*split_floating(bound.params), bound.inputs)


def differentiated(bound: Bound, loss_fn: Callable, targets: Any, policy: Any = None) -> Gradient:
    """The gradient of the mean loss with respect to the floating leaves of `params`.

    Args:
        policy: with one, the model runs under `jax.checkpoint` with this policy.

    Raises:
        ValueError: the loss does not fit the outputs and targets, or has no gradient.
    """
    loss = loss_of(bound, loss_fn, policy)
    params, rest = split_floating(bound.params)

    def forward(params: Any, rest: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        return jax.vjp(lambda params: loss(joined(params, rest), inputs, targets), params)

    try:
        traced, shapes = jax.make_jaxpr(forward, return_shape=True)(params, rest, bound.inputs, targets)
        value, pullback = shapes
        backward = jax.make_jaxpr(lambda pullback, one: pullback(one))(pullback, value)
    except MISFITS as error:
        raise ValueError(
            "`loss_fn` must be a differentiable function (outputs, targets) -> loss of these outputs and "
            f"`targets`. It raised {type(error).__name__}: {first_line(error)}"
        ) from error
    return Gradient(traced, len(jax.tree.leaves(pullback)), backward)


def loss_of(bound: Bound, loss_fn: Callable, policy: Any = None) -> Callable[[Any, Any, Any], jax.Array]:
    """The mean loss as a function of (params, inputs, targets)."""
    call = bound.plain
    if policy is not None:
        call = jax.checkpoint(call, policy=policy)
    return lambda params, inputs, targets: jnp.mean(loss_fn(call(params, inputs), targets))


def split_floating(params: Any) -> tuple[Any, Any]:
    """The leaves that have a gradient, and the others, each with None where the other has a leaf."""

    def pick(floating: bool) -> Any:
        return jax.tree.map(
            lambda leaf: leaf if jnp.issubdtype(dtype_of(leaf), jnp.floating) == floating else None, params
        )

    return pick(True), pick(False)


def joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def update(params: Any, optimizer: optax.GradientTransformation) -> ClosedJaxpr:
    """One update of the floating leaves, from gradients to new params."""
    params = split_floating(params)[0]
    shapes = abstract(params)
    state = jax.eval_shape(optimizer.init, shapes)

    def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    return jax.make_jaxpr(step)(shapes, state, shapes)


def abstract(tree: Any) -> Any:
    """The same tree with shapes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf)), tree)


def dtype_of(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
