"""One run of the model on one batch: params, apply_fn, batch -> Statistics."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff import importance
from jaxeff.importance import Criterion, Score
from jaxeff.model import apply as models
from jaxeff.model import objective as objectives
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import Model
from jaxeff.model.functions import first_line
from jaxeff.model.objective import Arrays, Objective
from jaxeff.model.params import Params, is_array
from jaxeff.statistics import Conservation, Statistics
from jaxeff.statistics.derivatives import QUANTITIES, Need, derive
from jaxeff.statistics.observe import observe
from jaxeff.statistics.relevance import PROPAGATIONS, weight_relevance
from jaxeff.statistics.unit_gradients import gate_moments
from jaxeff.statistics.weight_loss import Alone

Where = Any
"""A mask, a function of the batch that makes it, or None."""
Criteria = str | Score | Criterion | Iterable[str | Score | Criterion]


def collect(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    criterion: Criteria = "activation",
    loss_fn: Callable | None = None,
    targets: Any = None,
    seed: int | jax.Array = 0,
    hessians: bool = False,
    ranges: bool = False,
    where: Where = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Statistics:
    """Run the model once and sum its activations, and the derivatives of the loss that a criterion needs.

    Args:
        params: the variables dict, its `params` collection, or the params from `jaxeff.functional`. Or a model that
            `jaxeff.functional` takes, followed by the batch.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, the function from `jaxeff.functional`, or
            `f(params, *batch)`.
        batch: the model's input; a tuple holds several positional inputs.
        criterion: one or several criteria that will read the statistics. They decide which derivatives
            are taken; activations are always summed.
        loss_fn, targets: as in `jaxeff.analyze`, for criteria that need gradients.
        seed: of the random signs that estimate a Hessian.
        hessians: also sum X^T X of the inputs of each dense layer, `site.second_moments`, which `prune.sparsegpt` and
            `prune.reconstruct` read. It takes 4 inputs^2 bytes for each use of each weight: 9 MiB of 1,536 inputs,
            in each block of a stack. What is not a plain product, such as a convolution, has none, and
            `site.without_moments` says why. Add batches with `jaxeff.merge`.
        ranges: also count the sizes of each layer's inputs, `site.ranges`, which `jaxeff.outliers` reads. It takes
            0.5 MiB for each use of each weight in each block of a stack and, while the model runs, each step of a loop.
        where: which examples, [n], or positions, [n, length], of the batch count, such as those that are not padding:
            a mask, True = counts, or a function of the batch that makes it. All sums are then those of the batch
            without the others, if the model itself keeps them apart, as attention under a mask does. Values without
            positions, such as a pooled output, count for examples in which any position does. Derivatives are not
            covered: leave padding out of the loss. None if all count.
        rngs: passed to `apply_fn` as `rngs`, for dropout.
        **apply_kwargs: passed to `apply_fn`. Arrays among them may change without recompiling.

    Raises:
        TypeError: an argument has the wrong type, or `apply_fn` does not accept the arguments.
        ValueError: an argument is invalid; or the program does not show which values of a layer belong to which example
            and position of `where`, such as after a loop over positions.

    Warns:
        UserWarning: the examples of the batch depend on each other, and the criterion is 'fisher'.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(2, use_bias=False)
    >>> params = {"params": {"kernel": jnp.array([[1.0, -1.0]])}}
    >>> (site,) = collect(params, model.apply, jnp.array([[2.0], [4.0]])).sites
    >>> site.post.mean_absolute
    Array([[3., 3.]], dtype=float32)
    >>> (site,) = collect(params, model.apply, jnp.array([[2.0], [4.0]]), where=jnp.array([True, False])).sites
    >>> site.post.mean_absolute
    Array([[2., 2.]], dtype=float32)
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    criteria = named(criterion, with_loss=loss_fn is not None)
    run = prepare(params, apply_fn, batch, criteria, loss_fn, targets, rngs, apply_kwargs)
    run = dataclasses.replace(run, hessians=hessians, ranges=ranges)
    return run.statistics(batch, targets, jax.random.key(seed), counted(where, batch))


def counted(where: Where, batch: Any) -> jax.Array | None:
    """Return which examples or positions of a batch count, as booleans; None for all.

    Raises:
        TypeError: `where` is neither a mask nor a function that makes one.
    """
    if callable(where):
        where = where(*batch) if isinstance(batch, tuple) else where(batch)
    if where is None:
        return None
    if not is_array(where) or jnp.issubdtype(jnp.result_type(where), jnp.inexact):
        kind = jnp.result_type(where) if is_array(where) else type(where).__name__
        raise TypeError(
            f"`where` must be a mask of booleans, or a function of the batch that makes it, got {kind}"
        )
    return jnp.asarray(where, bool)


def check_makes_masks(where: Callable | None) -> None:
    """Check that `where` is a function, where there are several batches."""
    if where is not None and not callable(where):
        raise TypeError(
            "`where` must be a function of a batch, such as `lambda tokens: tokens != padding`, since each batch has "
            f"a mask of its own, got {type(where).__name__}"
        )


def named(criterion: Criteria, *, with_loss: bool) -> tuple[Criterion, ...]:
    """Return one or several criteria as a tuple of `Criterion`."""
    if isinstance(criterion, Iterable) and not isinstance(criterion, str):
        return tuple(importance.named(one, with_loss=with_loss) for one in criterion)
    return (importance.named(criterion, with_loss=with_loss),)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A model and a loss, prepared once for all batches of the same shapes.

    Attributes:
        criteria: the criteria that will read the statistics.
        objective: the loss and the arrays that it reads; None if no criterion needs derivatives.
        hessians: whether to sum the products of each two inputs of a layer.
        ranges: whether to count the sizes of a layer's inputs.
    """

    model: Model
    criteria: tuple[Criterion, ...]
    objective: tuple[Objective, Arrays] | None
    hessians: bool = False
    ranges: bool = False

    def statistics(
        self, batch: Any, targets: Any, key: jax.Array, where: jax.Array | None = None
    ) -> Statistics:
        """Collect the statistics of one batch; `key` seeds the random signs."""
        if where is not None and self.objective is not None:
            names = ", ".join(repr(criterion.name) for criterion in self.criteria if criterion.needs)
            raise ValueError(
                f"`where` does not apply to criterion {names}, whose derivatives are those of the loss: leave the "
                "padding out of `loss_fn` instead, and `where` out of this call"
            )
        model = self.model
        batch = jax.tree.leaves(batch)
        inputs = objectives.with_batch(model.origins, model.inputs, batch)
        arguments = model.function, model.paths, model.origins, model.batch_size, model.params, inputs
        observed = observe(*arguments, where, hessians=self.hessians, ranges=self.ranges)
        if self.objective is None:
            return observed
        objective, arrays = self.objective
        arrays = dataclasses.replace(arrays, inputs=inputs, targets=targets)
        try:
            return self._with_derivatives(observed, objective, arrays, key)
        except (ValueError, TypeError, NotImplementedError) as error:
            names = ", ".join(repr(criterion.name) for criterion in self.criteria if criterion.needs)
            raise ValueError(
                f"`criterion` {names} needs derivatives, and this model or loss cannot be differentiated as "
                f"that takes. JAX raised {type(error).__name__}: {first_line(error)}"
            ) from error

    def _with_derivatives(
        self, observed: Statistics, objective: Objective, arrays: Arrays, key: jax.Array
    ) -> Statistics:
        wanted: dict[str, set[str]] = {}
        for quantity, total in _needs(self.criteria):
            wanted.setdefault(quantity, set()).add(total)
        totals = {quantity: frozenset(names) for quantity, names in wanted.items()}
        arguments = self.model.params, arrays
        plain = tuple(sorted((name, found) for name, found in totals.items() if name in QUANTITIES))
        derivatives, alone = derive(objective, plain, *arguments, key)
        if alone is not None:
            _check_alone(alone)
        conservation: dict[str, Conservation] = {}
        for name in sorted(totals.keys() & PROPAGATIONS.keys()):
            rule = PROPAGATIONS[name]
            found, conservation[name] = weight_relevance(objective, rule, totals[name], *arguments)
            derivatives = {
                path: dataclasses.replace(known, **{name: found[path]}) for path, known in derivatives.items()
            }
        sites = observed.sites
        if "gate" in totals:
            gates = gate_moments(objective, totals["gate"], *arguments)
            sites = tuple(
                dataclasses.replace(site, gate=gate) for site, gate in zip(sites, gates, strict=True)
            )
        return dataclasses.replace(observed, derivatives=derivatives, sites=sites, conservation=conservation)


def prepare(
    params: Any,
    apply_fn: Callable,
    batch: Any,
    criteria: tuple[Criterion, ...],
    loss_fn: Callable | None,
    targets: Any,
    rngs: Any,
    apply_kwargs: Mapping[str, Any],
) -> Run:
    """Prepare a model and a loss for the shapes of a batch and its targets."""
    check_loss_given(criteria, loss_fn, targets)
    params = Params.of(params)
    model = models.from_apply(params, apply_fn, batch, rngs, apply_kwargs)
    needs = _needs(criteria)
    if not needs:
        return Run(model, criteria, None)
    weights = _weights(model)
    objective = objectives.objective(model, loss_fn, targets, weights)
    if any(quantity == "example_gradient" for quantity, _ in needs):
        if model.batch_size is None:
            raise ValueError(
                "criterion 'fisher' needs one loss per example, and no output has the first axis of an array of "
                "`batch`, which would be its examples: let `apply_fn` return outputs with one row for each example"
            )
        first, first_targets = objectives.first_example((batch, targets), model.batch_size)
        one = models.from_apply(params, apply_fn, first, rngs, apply_kwargs)
        example = objectives.objective(one, loss_fn, first_targets, weights)
        objective = objectives.with_example(objective, example)
    return Run(model, criteria, objective)


_APART = 0.05
"""Share of the losses by which an example may differ when it runs alone: more than bfloat16 rounds off."""


def _check_alone(found: Alone) -> None:
    """Warn if examples that run alone have other losses than in their batch. Under `jit` nothing is known."""
    if isinstance(found.size, Tracer):
        return
    alone, together = (np.asarray(each, np.float64) for each in (found.alone, found.together))
    close = np.abs(alone - together) <= _APART * (np.abs(together) + float(found.size))
    close |= ~np.isfinite(together)  # which its own checks report
    if not close.all():
        at = int(np.argmin(close))
        warnings.warn(
            f"the loss of an example is {together[at]:.3g} in its batch and {alone[at]:.3g} alone: it depends on other "
            "examples, as under BatchNorm in training mode or along the edges of a graph, or on random numbers. "
            "Criterion 'fisher' runs each example alone, so do not trust its scores here",
            stacklevel=2,
        )


def _needs(criteria: Iterable[Criterion]) -> tuple[Need, ...]:
    return tuple(sorted({need for criterion in criteria for need in criterion.needs}))


def _weights(model: Model) -> set[str]:
    """Return the paths of the leaves that are weights."""
    arguments = model.function, model.paths, model.origins, model.batch_size, model.params, model.inputs
    return {info.path for info in observe.eval_shape(*arguments).params if info.role == "weight"}


def check_loss_given(criteria: Iterable[Criterion], loss_fn: Any, targets: Any) -> None:
    """Check that criteria which need gradients have a loss to differentiate."""
    for criterion in criteria:
        if criterion.needs_loss and (loss_fn is None or targets is None):
            absent = "loss_fn" if loss_fn is None else "targets"
            raise ValueError(
                f"`{absent}` is missing: criterion {criterion.name!r} needs `loss_fn`, a function "
                "(outputs, targets) -> mean loss or one loss per example, and `targets`"
            )
