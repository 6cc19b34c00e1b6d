"""A loss over a model, its static part and its arrays, also for single examples.

An `Objective` and its `Arrays` are made from a `Model`, `loss_fn` and `targets`, which are checked here. Objectives
that compute the same are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.apply import Model, output_shapes
from jaxeff.model.functions import MISFITS, Function, TracedFunction, first_line, traced
from jaxeff.model.params import is_array
from jaxeff.numerics.meshes import gathered


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static part of `loss(function(params, inputs), targets)`, and which leaves are weights.

    Attributes:
        loss: None if none was given.
        example: the same for a batch of one; None if no per-example quantity is needed.
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
        """Return the mean loss of a batch's outputs; losses per example or per position are averaged."""
        return jnp.mean(self.losses(outputs, arrays))

    def losses(self, outputs: Any, arrays: Arrays) -> jax.Array:
        """Return what the loss gives of a batch's outputs: their mean, or losses per example or per position."""
        assert self.loss is not None, "checked where the objective is made"
        return self.loss(outputs, (arrays.targets, arrays.constants))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays that an objective reads besides `params`; `constants` are those that the loss closed over."""

    inputs: Any
    targets: Any
    constants: Any
    example: Arrays | None


def objective(
    model: Model, loss_fn: Callable | None, targets: Any, weights: Collection[str]
) -> tuple[Objective, Arrays]:
    """Return the objective of a whole batch.

    Args:
        weights: which of the model's `paths` are weights.

    Raises:
        TypeError: `loss_fn` is not a function, or `targets` holds something other than arrays of numbers.
        ValueError: `loss_fn` does not match the model's outputs and these targets.
    """
    loss, constants = (None, []) if loss_fn is None else _traced_loss(model, loss_fn, targets)
    function = model.function.without_capture()
    indexed = tuple((path, index) for index, path in enumerate(model.paths) if path in weights)
    found = Objective(function, loss, None, model.origins, model.paths, indexed, model.batch_size or 1)
    return found, Arrays(model.inputs, targets, constants, None)


def with_example(
    whole: tuple[Objective, Arrays], example: tuple[Objective, Arrays]
) -> tuple[Objective, Arrays]:
    """Return the objective of a batch together with that of a batch of one, for quantities per example.

    Raises:
        ValueError: `loss_fn` returned the mean loss, not one loss per example.
    """
    (batch, arrays), (one, one_arrays) = whole, example
    assert batch.loss is not None, "per-example quantities have a loss"
    if batch.loss.closed.jaxpr.outvars[0].aval.shape[:1] != (batch.batch_size,):
        raise ValueError(
            "`loss_fn` returned the mean loss: criterion 'fisher' needs one loss per example, an array "
            f"of shape ({batch.batch_size},), or ({batch.batch_size}, ...) to average over the rest"
        )
    return dataclasses.replace(batch, example=one), dataclasses.replace(arrays, example=one_arrays)


def first_example(batch: Any, batch_size: int | None) -> Any:
    """Return a batch of one. Arrays without one row per example, such as a mask, stay whole."""

    def first(leaf: Any) -> Any:
        return gathered(leaf)[:1] if np.ndim(leaf) and np.shape(leaf)[0] == batch_size else leaf

    return jax.tree.map(first, batch)


def batch_leaves(origins: Sequence[str], inputs: Any) -> list[Any]:
    """Return the leaves of a model's inputs that are the batch."""
    pairs = zip(jax.tree.leaves(inputs), origins, strict=True)
    return [leaf for leaf, origin in pairs if origin == "batch"]


def with_batch(origins: Sequence[str], inputs: Any, batch: Iterable[Any]) -> Any:
    """Return a model's inputs with other leaves for the batch."""
    leaves, structure = jax.tree.flatten(inputs)
    given = iter(batch)
    pairs = zip(leaves, origins, strict=True)
    return jax.tree.unflatten(structure, [next(given) if o == "batch" else leaf for leaf, o in pairs])


def _traced_loss(model: Model, loss_fn: Callable, targets: Any) -> tuple[TracedFunction, list[Any]]:
    """Trace `loss_fn(outputs, targets)`; return its program, and the arrays that it closed over."""
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function (outputs, targets), got {type(loss_fn).__name__}")
    for keys, leaf in jax.tree_util.tree_flatten_with_path(targets)[0]:
        if not is_array(leaf):
            where = f" at {jax.tree_util.keystr(keys)}" if keys else ""
            raise TypeError(f"`targets` holds a {type(leaf).__name__}{where}: pass arrays of numbers")
    outputs = output_shapes(model.function, model.params, model.inputs)
    try:
        loss, constants = traced(loss_fn, outputs, targets)
    except MISFITS as error:
        raise ValueError(
            f"`loss_fn` does not accept the model's outputs, {_shapes(outputs)}, with `targets`, "
            f"{_shapes(targets)}. It raised {type(error).__name__}: {first_line(error)}"
        ) from error
    _check_loss(loss, model.batch_size)
    return loss, constants


def _check_loss(loss: TracedFunction, batch_size: int | None) -> None:
    found = [variable.aval for variable in loss.closed.jaxpr.outvars]
    shapes = [aval.shape[:1] for aval in found if jnp.issubdtype(aval.dtype, jnp.floating)]
    if len(found) != 1 or shapes not in ([()], [(batch_size,)]):
        each = f"one loss for each of the {batch_size} examples (or of their positions)"
        if batch_size is None:
            each = "nothing else: no output has the first axis of an array of `batch`, which would be its examples"
        raise ValueError(
            f"`loss_fn` returned {', '.join(map(str, found)) or 'nothing'}: return one floating array, the "
            f"mean loss (a scalar), or {each}"
        )


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))
