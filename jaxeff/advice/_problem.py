"""What advice is about: a model, its loss, the examples to search with, and those to measure on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.advice._masked import Removable, Removed, example_losses, zeroed
from jaxeff.model import apply as models
from jaxeff.model import objective as objectives
from jaxeff.model.apply import Model, StatefulApply
from jaxeff.model.functions import TracedFunction
from jaxeff.model.objective import Arrays, Objective
from jaxeff.model.params import Params, batch_size, named_leaves
from jaxeff.numerics.meshes import by_compiler

HELD_OUT = 4
"""One example in this number is set aside."""
FEWEST = 2 * HELD_OUT


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs and targets of one part of the data.

    Attributes:
        batch, targets: as users pass them.
        count: number of examples.
    """

    batch: Any
    targets: Any
    count: int


def split(
    batch: Any, targets: Any, held_out: tuple[Any, Any] | None, seed: int
) -> tuple[Examples, Examples | None]:
    """Return the examples to search with and those to measure on, which are another quarter unless given.

    Raises:
        TypeError, ValueError: `held_out` is not a pair, there are too few examples, or some may point at others.
    """
    count = _count("batch", batch, targets)
    if held_out is not None:
        if not isinstance(held_out, tuple) or len(held_out) != 2:
            raise TypeError(f"`held_out` must be a pair (batch, targets), got {type(held_out).__name__}")
        number = _count("held_out", *held_out)
        if number < 2:
            raise ValueError(
                "`held_out` has 1 example: an interval needs at least 2, and says little below 100"
            )
        return Examples(batch, targets, count), Examples(*held_out, number)
    if pointers := _pointers(batch, count):
        raise ValueError(
            f"`batch` has an array of {pointers} integers, not one for each target. They may point at examples, as "
            "the edges of a graph do, so that no part can be set aside: pass `held_out=(batch, targets)`"
        )
    if count < FEWEST:
        raise ValueError(
            f"`batch` has {count} examples, of which a quarter is set aside: pass at least {FEWEST}, or "
            "`held_out=(batch, targets)`"
        )
    order = np.random.default_rng(seed).permutation(count)
    number = count // HELD_OUT
    parts = [np.sort(order[number:]), np.sort(order[:number])]
    searched, measured = (
        Examples(_taken(batch, count, part), _taken(targets, count, part), len(part)) for part in parts
    )
    return searched, measured


def _count(name: str, batch: Any, targets: Any) -> int:
    count = batch_size(batch if isinstance(batch, tuple) else (batch,), lambda: targets)
    if count is None:
        raise ValueError(f"`{name}` holds no array with an axis of examples that `targets` share")
    return count


def _pointers(batch: Any, count: int) -> int | None:
    """Return the number of rows of an array that may point at examples; None if no array does.

    Random keys are unsigned; masks of zeros and ones, positions that count from 0, and integers too large for examples
    do not point at any.
    """
    for leaf in jax.tree.leaves(batch):
        if (
            np.ndim(leaf)
            and jnp.issubdtype(jnp.result_type(leaf), jnp.signedinteger)
            and len(leaf) not in (1, count)
        ):
            values = np.asarray(leaf)
            # Edges that pad a graph may point just past its last node.
            in_range = 1 < np.max(values, initial=0) <= count
            if in_range and np.any(values != np.arange(values.shape[-1])):
                return len(leaf)
    return None


def _taken(tree: Any, count: int, rows: np.ndarray) -> Any:
    """Some examples. Arrays without one row an example, such as a mask, stay whole."""

    def of_leaf(leaf: Any) -> Any:
        if not np.ndim(leaf) or np.shape(leaf)[0] != count:
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[rows]
        return by_compiler(functools.partial(jnp.take, indices=rows, axis=0), leaf, like=leaf)

    return jax.tree.map(of_leaf, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model with a loss on some examples, ready to be run with parts of it removed."""

    params: Params
    model: Model
    objective: Objective
    arrays: Arrays

    @classmethod
    def bind(
        cls,
        params: Params,
        apply_fn: Callable,
        examples: Examples,
        loss_fn: Callable | None,
        rngs: Any,
        keywords: Mapping[str, Any],
    ) -> Problem:
        model = models.from_apply(params, apply_fn, examples.batch, rngs, keywords)
        return cls(params, model, *objectives.objective(model, loss_fn, examples.targets, ()))

    @property
    def gives_each_example(self) -> bool:
        loss = self.objective.loss
        return loss is not None and bool(loss.closed.jaxpr.outvars[0].aval.shape)

    @functools.cached_property
    def state(self) -> Any:
        inputs = (
            self.model.inputs[0] if isinstance(self.model.function, TracedFunction) else self.model.inputs
        )
        return inputs[0]

    @functools.cached_property
    def leaves(self) -> dict[str, int]:
        """The number of each leaf of `params` and of the state, by path, as `Removable` counts them."""
        state = named_leaves(self.state) if jax.tree.leaves(self.state) else {}
        return {path: index for index, path in enumerate([*self.params.paths, *state])}

    def losses(self, removable: Removable, removed: Removed) -> np.ndarray:
        """Return [examples]."""
        found = example_losses(self.objective, removable, self.model.params, self.arrays, removed)
        return np.asarray(found, np.float64)

    def zeroed(self, removable: Removable, removed: Removed) -> tuple[Any, Any]:
        """Return params and state with 0 where something goes."""
        params, inputs = zeroed(removable, self.model.params, self.model.inputs, removed)
        return params, dataclasses.replace(self, model=dataclasses.replace(self.model, inputs=inputs)).state


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """The user's own measure of the model with parts of it removed, the lower the better.

    Attributes:
        evaluate: `(params, apply_fn) -> score`, of which higher is better.
    """

    problem: Problem
    apply_fn: Callable
    evaluate: Callable[[Any, Callable], Any]

    def losses(self, removable: Removable, removed: Removed) -> np.ndarray:
        """Return minus the score, [] or [examples]."""
        params, state = self.problem.zeroed(removable, removed)
        apply_fn = self.apply_fn
        if self.problem.params.is_variables:
            params = {**state, "params": params}
        elif isinstance(apply_fn, StatefulApply) and jax.tree.leaves(apply_fn.state):
            apply_fn = apply_fn.with_state(state)
        scores = np.asarray(self.evaluate(params, apply_fn), np.float64)
        if scores.ndim > 1:
            raise ValueError(
                f"`evaluate` must return a number or one score for each example, got shape {scores.shape}"
            )
        return -scores


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A measure on some of its examples."""

    measure: Evaluated
    rows: np.ndarray

    def losses(self, removable: Removable, removed: Removed) -> np.ndarray:
        return self.measure.losses(removable, removed)[self.rows]
