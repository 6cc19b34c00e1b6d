"""params, apply_fn, batch -> Statistics.

Imports `models`, `observation`, `derivatives`, `importance`, `statistics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxeff import derivatives, importance, leaves, models, objectives
from jaxeff.derivatives import Need
from jaxeff.functions import first_line
from jaxeff.gates import gate_moments
from jaxeff.importance import Criterion, Score
from jaxeff.objectives import Arrays, Objective
from jaxeff.observation import observe
from jaxeff.statistics import Statistics

Criteria = str | Score | Criterion | Iterable[str | Score | Criterion]


def collect(
    params: Any,
    apply_fn: Callable,
    batch: Any,
    *,
    criterion: Criteria = "activation",
    loss_fn: Callable | None = None,
    targets: Any = None,
    seed: int | jax.Array = 0,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Statistics:
    """Run the model and sum what its units emit, and what the loss makes of its weights.

    Args:
        params: the variables dict, its `params` collection, or what `jaxeff.from_nnx` gives.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, what `jaxeff.from_nnx` gives, or
            `f(params, *batch)`.
        batch: the model's input; a tuple is several positional inputs.
        criterion: what the statistics are for, one or several: it decides which derivatives are taken.
            Sums of activations are always there.
        loss_fn, targets: as `jaxeff.analyze` takes them, for criteria that need gradients.
        seed: of the random signs that estimate a Hessian.
        rngs: passed to `apply_fn` as `rngs`, for dropout.
        **apply_kwargs: passed to `apply_fn`; arrays among them may change without recompiling.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or `apply_fn` does not accept them.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(2, use_bias=False)
    >>> params = {"params": {"kernel": jnp.array([[1.0, -1.0]])}}
    >>> (site,) = collect(params, model.apply, jnp.array([[2.0], [4.0]])).sites
    >>> site.post.mean_absolute
    Array([[3., 3.]], dtype=float32)
    """
    chosen = _named(criterion, with_loss=loss_fn is not None)
    _check_loss_given(chosen, loss_fn, targets)
    named = leaves.named_leaves(leaves.split_variables(params)[0])
    model = models.from_apply(params, apply_fn, batch, rngs, apply_kwargs)
    observed = observe(
        model.function, tuple(named), model.origins, model.batch_size, model.params, model.inputs
    )
    needs = tuple(sorted({need for criterion in chosen for need in criterion.needs}))
    if not needs:
        return observed
    places = {place.path for place in observed.places if place.role == "weight"}
    weights = tuple((path, index) for index, path in enumerate(named) if path in places)
    objective, arrays = objectives.objective(model, loss_fn, targets, weights)
    if any(quantity == "example_gradient" for quantity, _ in needs):
        first, first_targets = objectives.first_example((batch, targets), model.batch_size)
        one = models.from_apply(params, apply_fn, first, rngs, apply_kwargs)
        example = objectives.objective(one, loss_fn, first_targets, weights)
        objective, arrays = objectives.with_example((objective, arrays), example)
    try:
        return _derived(observed, objective, needs, tuple(named), model.params, arrays, seed)
    except (ValueError, TypeError, NotImplementedError) as error:
        names = ", ".join(repr(criterion.name) for criterion in chosen if criterion.needs)
        raise ValueError(
            f"`criterion` {names} needs derivatives, and this model or loss cannot be differentiated as that "
            f"takes. JAX raised {type(error).__name__}: {first_line(error)}"
        ) from error


def _derived(
    observed: Statistics,
    objective: Objective,
    needs: Iterable[Need],
    paths: tuple[str, ...],
    params: Any,
    arrays: Arrays,
    seed: int | jax.Array,
) -> Statistics:
    """The statistics with the derivatives that the criteria need."""
    totals = frozenset(total for quantity, total in needs if quantity == "gate")
    others = tuple(need for need in needs if need[0] != "gate")
    found = derivatives.derive(objective, others, params, arrays, jax.random.key(seed))
    sites = observed.sites
    if totals:
        gates = gate_moments(objective, paths, totals, params, arrays)
        sites = tuple(dataclasses.replace(site, gate=gate) for site, gate in zip(sites, gates, strict=True))
    return dataclasses.replace(observed, derivatives=found, sites=sites)


def _named(criterion: Criteria, *, with_loss: bool) -> tuple[Criterion, ...]:
    several = isinstance(criterion, Iterable) and not isinstance(criterion, str)
    return tuple(
        importance.named(one, with_loss=with_loss)
        for one in (criterion if several else (criterion,))  # pyright: ignore
    )


def _check_loss_given(criteria: Iterable[Criterion], loss_fn: Any, targets: Any) -> None:
    for criterion in criteria:
        if criterion.needs_loss and (loss_fn is None or targets is None):
            absent = "loss_fn" if loss_fn is None else "targets"
            raise ValueError(
                f"`{absent}` is missing: criterion {criterion.name!r} needs `loss_fn`, a function "
                "(outputs, targets) -> mean loss or one loss for each example, and `targets`"
            )
