"""Importance by any criterion, measured anew of each state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jaxeff._calibrate import calibrate
from jaxeff.prune._scoring import Prunable, scored
from jaxeff.prune._training import State, repeated

Importance = Callable[[State], Any]


def criterion(
    criterion: str,
    batches: Iterable[Any],
    *,
    loss_fn: Callable | None = None,
    apply_fn: Callable | None = None,
    prunable: Prunable = None,
    seed: int = 0,
) -> Importance:
    """The importance of a state by a criterion, measured anew whenever it is asked for.

    Args:
        criterion: as `jaxeff.analyze` takes it.
        batches: of model inputs, or with a `loss_fn` of `(inputs, targets)` pairs; a list, or what can be
            gone through again.
        loss_fn: as `jaxeff.calibrate` takes it.
        apply_fn: `state.apply_fn` unless given. In evaluation mode: `functools.partial(model.apply,
            train=False)` where the model asks.
        prunable: as `prune.scored` takes it.
        seed: of what a criterion draws at random.

    Returns:
        A function for the `importance` of `prune.iterative`.
    """
    _ = repeated(batches)

    def importance(state: State) -> Any:
        apply = getattr(state, "apply_fn", None) if apply_fn is None else apply_fn
        if apply is None:
            raise TypeError(f"`apply_fn` is missing: the state, a {type(state).__name__}, has none")
        stats = getattr(state, "batch_stats", None)
        variables = state.params if stats is None else {"params": state.params, "batch_stats": stats}
        statistics = calibrate(
            variables, apply, batches, criterion=criterion, loss_fn=loss_fn, seed=seed, progress=False
        )
        return scored(state.params, statistics, criterion, prunable=prunable)

    return importance
