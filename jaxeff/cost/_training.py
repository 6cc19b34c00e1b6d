"""The programs of a training step: forward pass, backward pass and the optimizer's update.

They are traced from a bound model, a loss and an optimizer, of arrays or shapes. Nothing runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jaxeff.model.apply import Bound
from jaxeff.model.functions import MISFITS, first_line


class Gradient(NamedTuple):
    """The gradient of a loss, as two programs.

    Attributes:
        forward: returns the loss and, as its last outputs, everything that the backward pass needs. Its inputs are
            the floating leaves of `params`, the other leaves, and the model's inputs.
        kept: number of outputs of `forward` that the backward pass needs.
        backward: the program that consumes them.
    """

    forward: ClosedJaxpr
    kept: int
    backward: ClosedJaxpr


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A model as its program: a function of (params, inputs) that does not run the user's code again.

    Attributes:
        closed: its inputs are the leaves of (params, inputs).
        structure: of the outputs.
    """

    closed: ClosedJaxpr
    structure: Any

    def __call__(self, params: Any, inputs: Any) -> Any:
        outputs = jaxpr_as_fun(self.closed)(*jax.tree.leaves((params, inputs)))
        return jax.tree.unflatten(self.structure, outputs)


def trace(bound: Bound) -> Traced:
    """Trace the program of the outputs."""
    closed, shapes = jax.make_jaxpr(bound.plain, return_shape=True)(bound.params, bound.inputs)
    return Traced(closed, jax.tree.structure(shapes))


def check_loss(loss_fn: Any, targets: Any) -> None:
    """Check the loss before anything is traced."""
    if loss_fn is None and targets is not None:
        raise ValueError("`targets` need a `loss_fn`, a function (outputs, targets) -> loss")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function (outputs, targets), got {type(loss_fn).__name__}")


Call = Callable[[Any, Any], Any]
"""The outputs as a function of (params, inputs)."""


def differentiated(bound: Bound, call: Call, loss_fn: Callable, targets: Any) -> Gradient:
    """Trace the gradient of the mean loss with respect to the floating leaves of `params`.

    Args:
        call: the result of `trace`, or a function that computes the same.

    Raises:
        ValueError: the loss does not match the outputs and targets, or has no gradient.
    """
    loss = loss_of(call, loss_fn)
    params, rest = split_floating(bound.params)

    def forward(params: Any, rest: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        return jax.vjp(lambda params: loss(joined(params, rest), inputs, targets), params)

    try:
        traced, shapes = jax.make_jaxpr(forward, return_shape=True)(params, rest, bound.inputs, targets)
        value, pullback = shapes
        backward = jax.make_jaxpr(lambda pullback, one: pullback(one))(pullback, value)
    except MISFITS as error:
        missing = "`targets` were not given. " if targets is None else ""
        raise ValueError(
            f"{missing}`loss_fn` must be a function (outputs, targets) -> loss, the model differentiable. "
            f"It raised {type(error).__name__}: {first_line(error)}"
        ) from error
    return Gradient(traced, len(jax.tree.leaves(pullback)), backward)


def loss_of(call: Call, loss_fn: Callable) -> Callable[[Any, Any, Any], jax.Array]:
    """Return the mean loss as a function of (params, inputs, targets)."""
    return lambda params, inputs, targets: jnp.mean(loss_fn(call(params, inputs), targets))


def without_remat(traced: Traced) -> Traced | None:
    """Return the model with every `jax.checkpoint` told to save everything; None if it has none."""
    if not _rematerializes(traced.closed.jaxpr):
        return None
    return dataclasses.replace(traced, closed=_keeping(traced.closed))


_REMAT = ("remat2", "checkpoint")


def _rematerializes(jaxpr: Jaxpr) -> bool:
    return any(
        equation.primitive.name in _REMAT or any(map(_rematerializes, _inside(equation)))
        for equation in jaxpr.eqns
    )


def _inside(equation: Any) -> list[Jaxpr]:
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
    return [getattr(value, "jaxpr", value) for value in values if _is_program(value)]


def _keeping(program: Any) -> Any:
    """Return the program with other policies, also in the bodies of its calls and loops."""
    inner = getattr(program, "jaxpr", program)
    # Newer JAX has one class for both, whose `jaxpr` is itself.
    if inner is not program:
        return program.replace(jaxpr=_keeping(inner))
    return program.replace(eqns=[_kept(equation) for equation in program.eqns])


def _kept(equation: Any) -> Any:
    params = {
        name: jax.tree.map(
            lambda leaf: _keeping(leaf) if _is_program(leaf) else leaf, value, is_leaf=_is_program
        )
        if isinstance(value, (ClosedJaxpr, Jaxpr, tuple))
        else value
        for name, value in equation.params.items()
    }
    if equation.primitive.name in _REMAT:
        params["policy"] = jax.checkpoint_policies.everything_saveable
    return equation.replace(params=params)


def _is_program(value: Any) -> bool:
    return isinstance(value, (ClosedJaxpr, Jaxpr))


def split_floating(params: Any) -> tuple[Any, Any]:
    """Split into the leaves that have a gradient and the others; each tree has None where the other has a leaf."""

    def pick(floating: bool) -> Any:
        return jax.tree.map(
            lambda leaf: leaf if jnp.issubdtype(dtype_of(leaf), jnp.floating) == floating else None, params
        )

    return pick(True), pick(False)


def joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def update(params: Any, optimizer: optax.GradientTransformation) -> ClosedJaxpr:
    """Trace one update of the floating leaves, from gradients to new params."""
    params = split_floating(params)[0]
    shapes = abstract(params)
    state = jax.eval_shape(optimizer.init, shapes)

    def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    return jax.make_jaxpr(step)(shapes, state, shapes)


def abstract(tree: Any) -> Any:
    """Return the tree with shapes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf)), tree)


def dtype_of(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
