"""Importance by any criterion, measured for each state anew."""

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
    """Return a function that measures the importance of a state by a criterion.

    Args:
        criterion: as in `jaxeff.analyze`.
        batches: of model inputs, or `(inputs, targets)` pairs if `loss_fn` is given; a list, or an iterable that
            can be read repeatedly.
        loss_fn: as in `jaxeff.calibrate`.
        apply_fn: `state.apply_fn` by default. It should be in evaluation mode, for example
            `functools.partial(model.apply, train=False)`.
        prunable: as in `prune.scored`.
        seed: for criteria that draw random numbers.

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
