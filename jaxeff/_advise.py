"""How much of a network can go at once, measured: a search on the loss of the whole pruned model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxeff._collect import Criteria, check_loss_given, named
from jaxeff.advice import Advice
from jaxeff.advice._problem import Examples, split
from jaxeff.advice._runs import OutOfTime, Runs
from jaxeff.advice._task import Given, Task
from jaxeff.advice._weights import CONTROL
from jaxeff.importance import Criterion
from jaxeff.model.adapters import resolve_both
from jaxeff.output.progress import progress_bar

CRITERIA, OF_LOSS = ("magnitude", "wanda"), ("fisher",)
RUNS = 300


def advise(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    loss_fn: Callable | None = None,
    targets: Any = None,
    held_out: tuple[Any, Any] | None = None,
    evaluate: Callable[[Any, Callable], Any] | None = None,
    tolerance: float = 0.01,
    criteria: Criteria | None = None,
    budget_s: float | None = None,
    max_runs: int = RUNS,
    seed: int = 0,
    progress: bool = True,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Advice:
    """Search for how much of a network can go at once, and measure what that does to its loss.

    In turn: which criterion orders the weights best, beside a random order; how far each layer goes alone; an
    allocation for all layers together, by search on the loss of the whole masked model; the same for whole
    units, channels, heads and blocks of a scan, whose smaller network is timed beside the large one. Nothing is
    retrained.

    All candidates run through one compiled program, which takes what is removed as arrays. A second program
    measures what was found on examples that the search did not see.

    Args:
        params, apply_fn, batch: as in `jaxeff.analyze`. The model should run as it serves: dropout off.
        loss_fn: `loss_fn(outputs, targets)`, one loss for each example: [examples], or [examples, ...] to
            average over the rest. With `evaluate`, only criteria that need gradients read it: leave out both
            it and `targets` to do without them.
        targets: passed to `loss_fn`.
        held_out: another `(batch, targets)` on which to measure what was found. Unless given, a quarter of
            `batch`, drawn by example, is set aside before the search.
        evaluate: `(params, apply_fn) -> score`, the higher the better, as the measure in place of the loss: a
            number, or one score for each example, a quarter of which the search then does not see. Criteria
            read all of `batch`.
        tolerance: how much worse the pruned network may be on the examples of the search, one standard error
            included, 0 or more: a fraction of the dense loss, or in units of the score for `evaluate`.
        criteria: criteria whose orders to compare; None for magnitude, wanda and, with `loss_fn`, fisher.
        budget_s: seconds after which the search stops with what it has.
        max_runs: forward passes that may be spent; a gradient counts three.
        seed: of the split, the search and the bootstrap.
        progress: show a progress bar if stderr is a terminal.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Returns:
        An `Advice`, with masks, a plan and a report. Ctrl-C ends the search, and the result has what was found.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, the loss is not finite before anything is removed, there are too few
            examples, or `loss_fn` returns the mean loss.

    >>> import jax, jax.numpy as jnp
    >>> model = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.eye(8)[:, :4]}
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> squares = lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=1)
    >>> found = advise(params, model, x, loss_fn=squares, targets=x[:, :4] + 1, criteria=("magnitude",))
    >>> found.weights.fraction > 0.8, found.weights.rise.mean <= 0.01
    (True, True)
    """
    _check_numbers(tolerance, budget_s, max_runs)
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    _check_measure(loss_fn, targets, evaluate)
    if held_out is not None and evaluate is not None:
        raise ValueError(
            "`held_out` is for the loss, and `evaluate` brings its own data: let it return one score for each "
            "example"
        )
    searched, measured = (
        (Examples(batch, targets, 0), None) if evaluate else split(batch, targets, held_out, seed)
    )
    chosen = _criteria(criteria, with_loss=loss_fn is not None)
    check_loss_given(chosen, loss_fn, targets)
    given = Given(
        params, apply_fn, searched, measured, loss_fn, evaluate, tolerance, chosen, seed, rngs, apply_kwargs,
    )  # fmt: skip
    with progress_bar("Advising", max_runs, progress) as step:
        task = Task(given, Runs(max_runs, budget_s, step))
        interrupted = None
        try:
            task.search()
        except OutOfTime:
            interrupted = f"after `budget_s` of {budget_s:g} s"
        except KeyboardInterrupt:
            interrupted = "by the keyboard"
        return task.advice(interrupted)


def _check_numbers(tolerance: float, budget_s: float | None, max_runs: int) -> None:
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` must be 0 or more, how much worse the network may be, got {tolerance}")
    if budget_s is not None and (isinstance(budget_s, str) or not budget_s > 0):
        raise ValueError(f"`budget_s` must be above 0 seconds, got {budget_s!r}")
    if max_runs < 100:
        raise ValueError(f"`max_runs` must be at least 100 forward passes, got {max_runs}")


def _check_measure(loss_fn: Any, targets: Any, evaluate: Any) -> None:
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function (params, apply_fn) -> score, got {evaluate!r}")
    if evaluate is not None and loss_fn is None and targets is None:
        return
    if not callable(loss_fn):
        raise TypeError(
            f"`loss_fn` must be a function (outputs, targets) -> one loss for each example, got {loss_fn!r}. A score "
            "of your own goes to `evaluate`, which needs neither `loss_fn` nor `targets`"
        )
    if targets is None:
        raise ValueError("`targets` is missing: `loss_fn(outputs, targets)` reads them")


def _criteria(given: Criteria | None, *, with_loss: bool) -> tuple[Criterion, ...]:
    if given is None:
        given = CRITERIA + OF_LOSS if with_loss else CRITERIA
    found = tuple(each for each in named(given, with_loss=with_loss) if each.name != CONTROL)
    if not found:
        raise ValueError(f"`criteria` must name at least one beside the random control, got {given!r}")
    return found
