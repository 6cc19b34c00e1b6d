"""Published recipes for pruning, each a function of a training state and your own step and evaluation.

All but `gradual` call `rounds.iterative`, after some preparation or with their own scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypedDict, Unpack

import optax

from jaxeff.output.progress import progress_bar
from jaxeff.prune._criteria import Importance, criterion
from jaxeff.prune._masking import sparsity as sparsity_of
from jaxeff.prune._masks import Limits
from jaxeff.prune._patterns import UNSTRUCTURED, NByM, Pattern
from jaxeff.prune._regularization import add_entropy_gradient
from jaxeff.prune._rounds import Pruned, Round, Selection, iterative
from jaxeff.prune._schedules import cubic
from jaxeff.prune._scoring import Prunable
from jaxeff.prune._training import (
    Rebuild,
    State,
    Step,
    Training,
    check_count,
    copied,
    masked,
    repeated,
    replaced,
)

Evaluate = Callable[[State], Any]


class Options(TypedDict, total=False):
    """Options of every recipe that prunes in rounds, as in `iterative`."""

    scope: str
    pattern: Pattern
    allocation: str | Mapping[str, float]
    max_sparsity: Limits
    max_drop: float | None
    recalibrate: Rebuild | None
    progress: bool


def iterative_magnitude(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    sparsity: float | None,
    rounds: int,
    steps: int,
    prunable: Prunable = None,
    **options: Unpack[Options],
) -> Pruned:
    """Remove the smallest weights, train the others, and repeat.

    Han et al. set a threshold by hand for each layer. Here it follows from the sparsity, over all layers, or with
    `scope="layer"` in each.

    Args:
        state: trained.
        step, batches, evaluate, sparsity, rounds, steps, prunable, **options: as in `prune.iterative`.

    References:
        Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks, 2015,
        arXiv:1506.02626
    """
    return iterative(
        state,
        step,
        batches,
        evaluate,
        sparsity=sparsity,
        rounds=rounds,
        steps=steps,
        prunable=prunable,
        **options,
    )


def lottery_ticket(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    sparsity: float | None,
    rounds: int,
    steps: int,
    rewind: int = 0,
    importance: Importance | None = None,
    prunable: Prunable = None,
    **options: Unpack[Options],
) -> Pruned:
    """Train, prune, rewind the kept weights to an early state, and train again from there.

    With `rewind=0` the weights, the optimizer and the rest of the state go back to the given state. Larger networks
    need a positive `rewind`, which goes back to the state after that many steps.

    Args:
        state: not trained yet.
        step, batches, evaluate, sparsity, rounds, importance, prunable, **options: as in `prune.iterative`.
        steps: of one whole training; each round trains for `steps - rewind`.
        rewind: from 0 to below `steps`.

    Returns:
        As `prune.iterative`; the dense score is that of the whole training, and `before` that of the pruned and
        rewound weights.

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635
        Frankle, Dziugaite, Roy and Carbin, Stabilizing the Lottery Ticket Hypothesis, 2019, arXiv:1903.01611
    """
    check_count("steps", steps, 1)
    check_count("rewind", rewind, 0)
    if rewind >= steps:
        raise ValueError(f"`rewind` must be below `steps`, got {rewind} and {steps}")
    with progress_bar("Training", steps, options.get("progress", True)) as advance:
        training = Training(step, repeated(batches), evaluate, None, advance)
        start = training.run(copied(state), None, rewind)
        trained = training.run(copied(start), None, steps - rewind)
    return iterative(
        trained,
        step,
        batches,
        evaluate,
        sparsity=sparsity,
        rounds=rounds,
        steps=steps - rewind,
        importance=importance,
        restart=lambda trained: start,
        prunable=prunable,
        **options,
    )


def iterative_taylor(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    loss_fn: Callable,
    calibration: Iterable[Any],
    sparsity: float | None,
    rounds: int,
    steps: int,
    apply_fn: Callable | None = None,
    prunable: Prunable = None,
    **options: Unpack[Options],
) -> Pruned:
    """Remove the weights whose removal changes the loss least to first order: mean (g w)^2 over batches.

    Molchanov et al. remove whole filters: `pattern=prune.Units()`.

    Args:
        state: trained.
        loss_fn, calibration, apply_fn, prunable: as in `prune.criterion`, with `calibration` as its batches.
        step, batches, evaluate, sparsity, rounds, steps, **options: as in `prune.iterative`.

    References:
        Molchanov, Mallya, Tyree, Frosio and Kautz, Importance Estimation for Neural Network Pruning, 2019,
        arXiv:1906.10771
    """
    importance = criterion("taylor", calibration, loss_fn=loss_fn, apply_fn=apply_fn, prunable=prunable)
    return iterative(
        state,
        step,
        batches,
        evaluate,
        sparsity=sparsity,
        rounds=rounds,
        steps=steps,
        importance=importance,
        **options,
    )


def iterative_obd(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    loss_fn: Callable,
    calibration: Iterable[Any],
    sparsity: float | None,
    rounds: int,
    steps: int,
    apply_fn: Callable | None = None,
    prunable: Prunable = None,
    seed: int = 0,
    **options: Unpack[Options],
) -> Pruned:
    """Optimal Brain Damage: remove the weights whose removal costs least to second order, w^2 |h| / 2.

    h is the diagonal of the Hessian, estimated from random signs (see docs/criteria.md).

    Args:
        state: trained to a minimum, where the first order vanishes.
        loss_fn, calibration, apply_fn, prunable, seed: as in `prune.criterion`, with `calibration` as its
            batches.
        step, batches, evaluate, sparsity, rounds, steps, **options: as in `prune.iterative`.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1990
    """
    importance = criterion(
        "obd", calibration, loss_fn=loss_fn, apply_fn=apply_fn, prunable=prunable, seed=seed
    )
    return iterative(
        state,
        step,
        batches,
        evaluate,
        sparsity=sparsity,
        rounds=rounds,
        steps=steps,
        importance=importance,
        **options,
    )


def gradual(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    sparsity: float,
    steps: int,
    fine_tune: int,
    every: int,
    initial: float = 0.0,
    importance: Importance | None = None,
    prunable: Prunable = None,
    scope: str = "global",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] = "uniform",
    max_sparsity: Limits = None,
    recalibrate: Rebuild | None = None,
    progress: bool = True,
) -> Pruned:
    """Prune every few steps of one training, to the sparsity of `prune.cubic`; then train on.

    `prune.sparsify` does the same inside an optimizer. Zhu and Gupta prune all layers equally: `scope="layer"`.

    Args:
        state: trained, or not yet.
        step, batches, evaluate: as in `prune.iterative`.
        importance, prunable, scope, pattern, allocation, max_sparsity, recalibrate, progress: as there.
        sparsity: final sparsity, in [0, 1).
        steps: until it is reached.
        fine_tune: steps after that.
        every: steps between changes of the masks.
        initial: initial sparsity.

    Returns:
        As `prune.iterative`, with one round: its `before` is the score when the sparsity is reached. The
        dense score is that of the given state.

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878
    """
    check_count("steps", steps, 1)
    check_count("fine_tune", fine_tune, 0)
    check_count("every", every, 1)
    if isinstance(pattern, NByM):
        raise ValueError(
            f"`pattern` {pattern} has one sparsity: pass it to `prune.iterative`, with `rounds=1`"
        )
    _ = cubic(sparsity, 0, steps, every, initial)  # Raises on invalid arguments before anything is trained.
    selection = Selection(importance, prunable, scope, pattern, allocation, max_sparsity)
    state, kept = copied(state), None
    with progress_bar("Pruning", steps + fine_tune, progress) as advance:
        training = Training(step, repeated(batches), evaluate, recalibrate, advance)
        dense = training.score(state, "before pruning")
        for at, until in itertools.pairwise([*range(0, steps, every), steps]):
            kept = selection.masks(state, sparsity, kept, partial(_gone, at, steps, every, initial))
            state = training.run(masked(state, kept), kept, until - at)
        kept = selection.masks(state, sparsity, kept, lambda final: final)
        state, before, after = training.round(state, kept, fine_tune, "all steps")
    return Pruned(state, kept, dense, (Round(sparsity_of(kept), before, after),))


def _gone(step: int, steps: int, every: int, initial: float, final: float) -> float:
    """Return the sparsity at a step, for a final sparsity."""
    return float(cubic(final, 0, steps, every, min(initial, final))(step).sparsity)


def entropy_regularized(
    state: State,
    step: Step,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    strength: float,
    sparsity: float | None,
    steps: int,
    fine_tune: int,
    rounds: int = 1,
    prunable: Prunable = None,
    **options: Unpack[Options],
) -> Pruned:
    """Train with a penalty on the entropy of each layer's magnitudes, prune by magnitude, and train without it.

    The penalty is `prune.add_entropy_gradient`: strength x H(|w|) / ln N for each layer, with jaxeff's own
    metrics. Bayandorian (2023) penalizes another entropy of the weights, that of their arrangement, to the same
    end.

    Args:
        state: with a `tx`, the Optax transformation that `step` reads from it, and its `opt_state`, as in a Flax
            `TrainState`. For other states, put `prune.add_entropy_gradient` into the optimizer, train, and
            pass the trained state to `prune.iterative_magnitude`.
        strength: of the penalty, 0 or more. Each step changes the weights by strength x slope in addition to the
            optimizer's update, whatever its learning rate. Within the gradient, Adam would scale it up wherever
            the loss has nearly no gradient.
        steps: with the penalty.
        fine_tune: steps without it, after each pruning.
        step, batches, evaluate, sparsity, rounds, prunable, **options: as in `prune.iterative`.

    Returns:
        As `prune.iterative`; the dense score is that after training with the penalty.

    Raises:
        ValueError: `step` did not use `state.tx`; also as in `prune.iterative`.

    References:
        Bayandorian, A Novel Sparse Regularizer, 2023, arXiv:2301.07285
    """
    check_count("steps", steps, 1)
    if not (hasattr(state, "tx") and hasattr(state, "opt_state")):
        raise TypeError(
            f"`state` is a {type(state).__name__} without `tx` and `opt_state`: put "
            "`prune.add_entropy_gradient` into its optimizer, train, and pass the trained state to "
            "`prune.iterative_magnitude`"
        )
    if not strength >= 0:
        raise ValueError(f"`strength` must be 0 or more, got {strength}")
    # After an optimizer, updates descend.
    penalty = add_entropy_gradient(-strength, prunable)
    state = copied(state)
    penalized = replaced(
        state,
        tx=optax.chain(state.tx, penalty),
        opt_state=(state.opt_state, penalty.init(state.params)),
    )
    with progress_bar("Training", steps, options.get("progress", True)) as advance:
        training = Training(step, repeated(batches), evaluate, None, advance)
        trained = training.run(penalized, None, steps)
    opt_state, counting = trained.opt_state
    if int(counting.step) != steps:
        raise ValueError(
            "`step` did not use `state.tx`: take the optimizer from the state, not from outside it"
        )
    return iterative_magnitude(
        replaced(trained, tx=state.tx, opt_state=opt_state),
        step,
        batches,
        evaluate,
        sparsity=sparsity,
        rounds=rounds,
        steps=fine_tune,
        prunable=prunable,
        **options,
    )
