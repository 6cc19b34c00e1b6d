"""Pruning and training in rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff.output.progress import progress_bar
from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned
from jaxeff.prune._criteria import Importance
from jaxeff.prune._layouts import unboxed
from jaxeff.prune._masking import sparsity as sparsity_of
from jaxeff.prune._masks import Limits, masks
from jaxeff.prune._patterns import UNSTRUCTURED, NByM, Pattern
from jaxeff.prune._scoring import Prunable, after_pruned, scored
from jaxeff.prune._training import (
    Rebuild,
    State,
    Step,
    Training,
    check_count,
    copied,
    described,
    repeated,
    restarted,
)

Way = Callable[[float], float]


class Round(NamedTuple):
    """One round: masks, then training.

    Attributes:
        sparsity: fraction removed from the leaves that may be pruned.
        before: score right after pruning.
        after: score after training.
    """

    sparsity: float
    before: float
    after: float


@dataclasses.dataclass(frozen=True, repr=False)
class Pruned(Shown):
    """A pruned network and its history. `str(pruned)` is a table.

    Attributes:
        state: training state, with pruned weights exactly 0.
        masks: shaped like its params, True = kept.
        dense: score before pruning.
        rounds: all rounds that ran. If `stopped` is set, the last one failed, and state and masks are those of the
            round before it, or of the dense network.
        stopped: why pruning stopped early; None if all rounds ran and held.
    """

    state: State
    masks: Any
    dense: float
    rounds: tuple[Round, ...]
    stopped: str | None = None

    def __str__(self) -> str:
        rows = [("dense", f"{0:.2%}", "", f"{self.dense:.4f}")]
        for number, (sparsity, before, after) in enumerate(self.rounds, 1):
            rows.append((f"{number:>5}", f"{sparsity:.2%}", f"{before:.4f}", f"{after:.4f}"))
        header = ("round", "sparsity", "before", "after")
        stopped = [f"Stopped: {self.stopped}."] if self.stopped else []
        return "\n".join([*aligned([header, *rows], gap=2), *stopped])


def iterative(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Callable[[State], Any],
    *,
    sparsity: float | None,
    rounds: int,
    steps: int,
    importance: Importance | None = None,
    restart: Rebuild | None = None,
    prunable: Prunable = None,
    scope: str = "global",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] = "uniform",
    max_sparsity: Limits = None,
    max_drop: float | None = None,
    recalibrate: Rebuild | None = None,
    progress: bool = True,
) -> Pruned:
    """Prune a little, train, and repeat for `rounds` rounds, up to a sparsity.

    After round r of R, (1 - sparsity)^(r / R) of the weights are left: each round removes the same fraction of the
    remaining weights. Pruned weights stay pruned. Masks are applied after every step, so that pruned weights are
    exactly 0 whatever the optimizer does.

    Args:
        state: a pytree with `.params`, such as a Flax `TrainState`, a NamedTuple or a registered dataclass.
            It is copied first, so that a step that donates its input deletes none of your arrays.
        step: `(state, batch) -> state`, or a tuple that begins with the state.
        batches: a list or a loader, read repeatedly, continuing from one round to the next.
        evaluate: `state -> number`, higher is better.
        sparsity: final fraction to remove, in [0, 1). None for `NByM`, which has its own.
        rounds: 1 or more; 1 with `NByM`.
        steps: training steps after each pruning.
        importance: `state -> scores`, shaped like the params, as returned by `prune.scored`; magnitudes by
            default.
        restart: `state -> state`, from which a round trains once masks are made from the trained state; the
            trained state itself by default.
        prunable: as in `prune.scored`, for magnitudes.
        scope, pattern, allocation, max_sparsity: as in `prune.masks`. Fractions by path are those of the
            last round.
        max_drop: stop if a round ends more than this below the dense score.
        recalibrate: `state -> state`, called before each evaluation of a pruned state, such as for BatchNorm
            (`prune.recalibrate`).
        progress: show a progress bar if stderr is a terminal.

    Returns:
        The pruned state and its masks, with the scores before and after the training of each round.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or a function returned an invalid result.

    >>> from typing import NamedTuple
    >>> class Trained(NamedTuple):
    ...     params: dict
    >>> state = Trained({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
    >>> step = lambda state, batch: Trained(jax.tree.map(lambda w: w + batch, state.params))
    >>> evaluate = lambda state: state.params["w"].max()
    >>> print(iterative(state, step, [0.5], evaluate, sparsity=0.75, rounds=2, steps=1))
    round  sparsity  before   after
    -------------------------------
    dense     0.00%          4.0000
        1    50.00%  4.0000  4.5000
        2    75.00%  4.5000  5.0000
    """
    check_count("rounds", rounds, 1)
    check_count("steps", steps, 0)
    if isinstance(pattern, NByM) and rounds != 1:
        raise ValueError(f"`rounds` must be 1 with {pattern}, which has one sparsity, got {rounds}")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"`max_drop` must be 0 or more, a drop of the score, got {max_drop}")
    selection = Selection(importance, prunable, scope, pattern, allocation, max_sparsity)
    state, kept, done = copied(state), None, []
    with progress_bar("Pruning", rounds * steps, progress) as advance:
        training = Training(step, repeated(batches), evaluate, recalibrate, advance)
        dense = training.score(state, "before pruning")
        for number in range(1, rounds + 1):
            # The steps of this round may donate the state of the last.
            held = (state if max_drop is None else copied(state)), kept
            kept = selection.masks(state, sparsity, kept, partial(_share, number, rounds))
            start = state if restart is None else restarted(restart, state)
            state, before, after = training.round(start, kept, steps, f"round {number}")
            done.append(Round(sparsity_of(kept), before, after))
            if max_drop is not None and after < dense - max_drop:
                state, kept = held[0], everything(kept) if held[1] is None else held[1]
                reason = f"round {number} ended at {after:.4f}, more than {max_drop:g} below {dense:.4f}"
                return Pruned(state, kept, dense, tuple(done), reason)
    return Pruned(state, kept, dense, tuple(done))


def _share(number: int, rounds: int, final: float) -> float:
    """Return the fraction removed after a round, for `final` after the last: each removes the same part of the rest."""
    if number == rounds or not 0 <= final < 1:
        # Exact to the bit at the end; `masks` raises on values out of range.
        return final
    return 1 - (1 - final) ** (number / rounds)


@dataclasses.dataclass(frozen=True)
class Selection:
    """How to make masks from a state."""

    importance: Importance | None
    prunable: Prunable
    scope: str
    pattern: Pattern
    allocation: str | Mapping[str, float]
    max_sparsity: Limits

    def __post_init__(self) -> None:
        if self.importance is not None and self.prunable is not None:
            raise ValueError(
                "`prunable` is for magnitudes: with `importance`, score each leaf that may not be "
                "pruned with one number, 0, as `prune.scored(..., prunable=...)` does"
            )

    def masks(self, state: State, sparsity: float | None, kept: Any, way: Way) -> Any:
        """Make masks from the scores of a state; weights that are already pruned are removed first.

        Args:
            state: whose weights are scored.
            sparsity: final sparsity.
            kept: the masks until now; None if nothing is pruned.
            way: the part of the final fraction to remove now.
        """
        scores = self._scores(state)
        if kept is not None:
            scores = jax.tree.map(after_pruned, kept, scores)
        allocation = self.allocation
        if isinstance(allocation, Mapping):
            allocation = {path: way(share) for path, share in allocation.items()}
        found = masks(
            scores,
            None if sparsity is None else way(sparsity),
            scope=self.scope,
            pattern=self.pattern,
            allocation=allocation,
            max_sparsity=self.max_sparsity,
        )
        return found if kept is None else jax.tree.map(jnp.logical_and, found, kept)

    def _scores(self, state: State) -> Any:
        if self.importance is None:
            return scored(state.params, prunable=self.prunable)
        scores = self.importance(state)
        structure, shapes = described(unboxed(scores))
        of_params, shapes_of_params = described(state.params)
        alike = structure == of_params and all(
            shape in ((), other) for shape, other in zip(shapes, shapes_of_params, strict=True)
        )
        if not alike:
            raise ValueError(
                "`importance` returned scores of another tree or other shapes than the params: return the "
                "result of `prune.scored(state.params, ...)`"
            )
        return scores


def everything(kept: Any) -> Any:
    """Return masks that remove nothing."""
    return jax.tree.map(jnp.ones_like, kept)
