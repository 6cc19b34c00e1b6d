"""A loss over a model: what is static of it, the arrays that it reads, and the same for one example.

In: a `Model`, `loss_fn` and `targets`, each checked and named when it does not fit. Out: an
`Objective`, equal to another that computes the same, and its `Arrays`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.apply import Model
from jaxeff.model.functions import MISFITS, Function, TracedFunction, first_line, traced
from jaxeff.numerics.meshes import gathered


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is static of `loss(function(params, inputs), targets)`, and which leaves are weights.

    Attributes:
        loss: None where none was given.
        example: the same for a batch of one; None where no per-example quantity is asked for.
        origins: of the leaves of `inputs`.
        paths: of the leaves of `params`.
        weights: path of each weight, and its index among the leaves.
        batch_size: examples in the batch.
    """

    function: Function
    loss: TracedFunction | None
    example: Objective | None
    origins: tuple[str, ...]
    paths: tuple[str, ...]
    weights: tuple[tuple[str, int], ...]
    batch_size: int

    def mean_loss(self, outputs: Any, arrays: Arrays) -> jax.Array:
        """Of a batch's outputs; a loss for each example, or each of its positions, is averaged."""
        assert self.loss is not None, "checked where the objective is made"
        return jnp.mean(self.loss(outputs, (arrays.targets, arrays.constants))[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """What an objective reads beside `params`; `constants` are what the loss closed over."""

    inputs: Any
    targets: Any
    constants: Any
    example: Arrays | None


def objective(
    model: Model, loss_fn: Callable | None, targets: Any, weights: Collection[str]
) -> tuple[Objective, Arrays]:
    """The objective of a whole batch.

    Args:
        weights: which of the model's `paths` are weights.

    Raises:
        TypeError, ValueError: `loss_fn` is no loss of the model's outputs and these targets.
    """
    loss, constants = (None, []) if loss_fn is None else _traced_loss(model, loss_fn, targets)
    function = model.function.without_capture()
    indexed = tuple((path, index) for index, path in enumerate(model.paths) if path in weights)
    found = Objective(function, loss, None, model.origins, model.paths, indexed, model.batch_size or 1)
    return found, Arrays(model.inputs, targets, constants, None)


def with_example(
    whole: tuple[Objective, Arrays], example: tuple[Objective, Arrays]
) -> tuple[Objective, Arrays]:
    """The objective of a batch, with that of a batch of one for what each example makes of the loss.

    Raises:
        ValueError: `loss_fn` gave the mean loss, not one loss for each example.
    """
    (batch, arrays), (one, one_arrays) = whole, example
    assert batch.loss is not None, "per-example quantities have a loss"
    if batch.loss.closed.jaxpr.outvars[0].aval.shape[:1] != (batch.batch_size,):
        raise ValueError(
            "`loss_fn` returned the mean loss: criterion 'fisher' needs one loss for each example, an array "
            f"of shape ({batch.batch_size},), or ({batch.batch_size}, ...) to average over the rest"
        )
    return dataclasses.replace(batch, example=one), dataclasses.replace(arrays, example=one_arrays)


def first_example(batch: Any, batch_size: int | None) -> Any:
    """A batch of one. Arrays without one row an example, such as a mask, stay whole."""

    def first(leaf: Any) -> Any:
        return gathered(leaf)[:1] if np.ndim(leaf) and np.shape(leaf)[0] == batch_size else leaf

    return jax.tree.map(first, batch)


def batch_leaves(origins: Sequence[str], inputs: Any) -> list[Any]:
    """The leaves of a model's inputs that are the batch."""
    pairs = zip(jax.tree.leaves(inputs), origins, strict=True)
    return [leaf for leaf, origin in pairs if origin == "batch"]


def with_batch(origins: Sequence[str], inputs: Any, batch: Iterable[Any]) -> Any:
    """A model's inputs with other leaves for the batch."""
    leaves, structure = jax.tree.flatten(inputs)
    given = iter(batch)
    pairs = zip(leaves, origins, strict=True)
    return jax.tree.unflatten(structure, [next(given) if o == "batch" else leaf for leaf, o in pairs])


def _traced_loss(model: Model, loss_fn: Callable, targets: Any) -> tuple[TracedFunction, list[Any]]:
    """`loss_fn(outputs, targets)` as its program, and the arrays that it closed over."""
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function (outputs, targets), got {type(loss_fn).__name__}")
    outputs = _outputs.eval_shape(model.function, model.params, model.inputs)
    try:
        loss, constants = traced(loss_fn, outputs, targets)
    except MISFITS as error:
        raise ValueError(
            f"`loss_fn` does not accept the model's outputs, {_shapes(outputs)}, with `targets`, "
            f"{_shapes(targets)}. It raised {type(error).__name__}: {first_line(error)}"
        ) from error
    _check_loss(loss, model.batch_size)
    return loss, constants


@functools.partial(jax.jit, static_argnums=0)
def _outputs(function: Function, params: Any, inputs: Any) -> Any:
    return function.without_capture()(params, inputs)[0]


def _check_loss(loss: TracedFunction, batch_size: int | None) -> None:
    found = [variable.aval for variable in loss.closed.jaxpr.outvars]
    shapes = [aval.shape[:1] for aval in found if jnp.issubdtype(aval.dtype, jnp.floating)]
    if len(found) != 1 or shapes not in ([()], [(batch_size,)]):
        raise ValueError(
            f"`loss_fn` returned {', '.join(map(str, found)) or 'nothing'}: return one floating array, the "
            f"mean loss (a scalar), or one loss for each of the {batch_size} examples (or of their positions)"
        )


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))
