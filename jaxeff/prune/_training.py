"""A user's training state, and the functions that train and evaluate it, each checked where it is called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxeff.model.params import is_array, named_leaves, own_arrays
from jaxeff.prune._masking import apply
from jaxeff.prune._optimizer import SparseState

State = Any
"""A pytree with `.params`, rebuilt by `.replace(params=...)`, `._replace` or `dataclasses.replace`."""
Step = Callable[[State, Any], Any]
Rebuild = Callable[[State], State]

_masked = jax.jit(apply)


@dataclasses.dataclass(frozen=True)
class Training:
    """What the user gave to train with.

    Attributes:
        step: `(state, batch) -> state`, or a tuple that begins with the state.
        batches: without end.
        evaluate: `state -> number`.
        recalibrate: `state -> state`, before each evaluation of a pruned state.
        advance: called after each step.
    """

    step: Step
    batches: Iterator[Any]
    evaluate: Callable[[State], Any]
    recalibrate: Rebuild | None
    advance: Callable[[], None]

    def round(self, state: State, masks: Any, steps: int, where: str) -> tuple[State, float, float]:
        """The state pruned, then trained; with the scores of both."""
        state = self.recalibrated(masked(state, masks), masks)
        before = self.score(state, f"after the pruning of {where}")
        state = self.recalibrated(self.run(state, masks, steps), masks)
        return state, before, self.score(state, f"after the training of {where}")

    def run(self, state: State, masks: Any | None, steps: int) -> State:
        """So many steps; the weights that the masks remove are 0 after each."""
        for _ in range(steps):
            batch = next(self.batches)
            # What a step is given it may donate: its shapes are read before.
            before = described(state.params)
            found = self.step(state, batch)
            if isinstance(found, tuple) and not hasattr(found, "params") and found:
                found = found[0]
            state = checked(found, before, "step")
            state = state if masks is None else masked(state, masks)
            self.advance()
        return state

    def recalibrated(self, state: State, masks: Any) -> State:
        if self.recalibrate is None:
            return state
        before = described(state.params)
        return masked(checked(self.recalibrate(state), before, "recalibrate"), masks)

    def score(self, state: State, when: str) -> float:
        """What `evaluate` says of a state."""
        value = self.evaluate(state)
        if not is_array(value) or np.ndim(value):
            what = f"an array of shape {np.shape(value)}" if is_array(value) else f"a {type(value).__name__}"
            raise ValueError(f"`evaluate` gave {what} {when}: it must give one number, higher is better")
        if math.isnan(float(value)):
            raise ValueError(
                f"`evaluate` gave nan {when}: training may have diverged; lower its learning rate"
            )
        return float(value)


def copied(state: State) -> State:
    """A state of its own arrays, which a step may donate.

    Raises:
        TypeError: it is no pytree with params, or cannot be rebuilt with others.
        ValueError: its optimizer prunes by itself.
    """
    if not hasattr(state, "params"):
        raise TypeError(
            f"`state` must have `.params`, got {type(state).__name__}: pass a TrainState, or a NamedTuple of "
            "params and whatever else is trained"
        )
    _ = named_leaves(state.params)
    if not (hasattr(state, "replace") or hasattr(state, "_replace") or dataclasses.is_dataclass(state)):
        raise TypeError(
            f"`state` is a {type(state).__name__} without `.replace(params=...)`: use a NamedTuple"
        )
    if jax.tree_util.all_leaves([state]):
        raise TypeError(f"`state` is a {type(state).__name__}, which is no pytree: register it with JAX")
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, SparseState))
    if any(isinstance(part, SparseState) for part in parts):
        raise ValueError(
            "`state` has an optimizer of `prune.sparsify`, which keeps masks of its own: make the state with "
            "the optimizer inside"
        )
    return own_arrays(state)


def restarted(restart: Rebuild, state: State) -> State:
    """What the user trains on from; of its own arrays, since it may be the same state each time."""
    return copied(checked(restart(state), described(state.params), "restart"))


def masked(state: State, masks: Any) -> State:
    """The state with 0 where a mask is False."""
    return replaced(state, params=_masked(state.params, masks))


def replaced(state: State, **fields: Any) -> State:
    if hasattr(state, "replace"):
        return state.replace(**fields)
    if hasattr(state, "_replace"):
        return state._replace(**fields)
    return dataclasses.replace(state, **fields)


def described(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """The structure of a tree, and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(leaf) for leaf in leaves]


def checked(state: State, before: Any, name: str) -> State:
    """What the function `name` of the user gave, if it is a state whose params are as before."""
    if not hasattr(state, "params"):
        raise TypeError(
            f"`{name}` gave a {type(state).__name__}: it must give the state that it was given, changed"
        )
    if described(state.params) != before:
        raise ValueError(f"`{name}` gave a state whose params have another structure or other shapes")
    return state


def repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches again and again.

    Raises:
        TypeError: they can be gone through once alone, or are one batch.
        ValueError: there are none.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (str, dict)) or hasattr(batches, "shape"):
        raise TypeError(
            f"`batches` must be an iterable of batches, such as a list, got {type(batches).__name__}"
        )
    if isinstance(batches, Iterator):
        raise TypeError(
            f"`batches` is a {type(batches).__name__}, which can be gone through once alone: pass a list, or "
            "an object whose `__iter__` begins anew"
        )
    return _without_end(batches)


def _without_end(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("`batches` is empty: pass at least one batch")


def check_count(name: str, count: Any, least: int) -> None:
    if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < least:
        raise ValueError(f"`{name}` must be a whole number, {least} or more, got {count!r}")
