"""Deletion curves: the measured loss as weights are removed in the order of a criterion's scores."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import importance
from jaxeff._collect import Criteria, named, prepare
from jaxeff._saving import saved_by_flax
from jaxeff.importance import _levels as levels
from jaxeff.importance._orders import Stacks, orders
from jaxeff.model import objective as objectives
from jaxeff.model.adapters import resolve_both
from jaxeff.model.objective import Arrays, Objective
from jaxeff.model.params import Params
from jaxeff.model.roles import whole_numbers
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.placement import to_host
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.statistics.weight_loss import WeightLoss

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
CONTROLS = 5

_STATIC = {"static": True}


@saved_by_flax
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Deletion curves of several criteria, and of removal at random. `str(comparison)` is a table.

    Attributes:
        criteria: names of the criteria.
        scope: 'layer' or 'global'.
        fractions: [fractions], fraction of the weights removed, lowest scores first.
        loss: [criteria, fractions], mean loss with these weights set to 0.
        random_loss: [controls, fractions], the same in random orders.
        area: [criteria], area under the loss curve divided by the range of the fractions, which is the mean
            loss along the way. The lower it is, the better the criterion finds weights to spare.
        random_area: [controls], the same in random orders.
        rank_correlation: [criteria, criteria], Spearman's, over all weights (at most 65,536, evenly spaced).
    """

    criteria: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    scope: str = dataclasses.field(metadata=_STATIC)
    fractions: jax.Array
    loss: jax.Array
    random_loss: jax.Array
    area: jax.Array
    random_area: jax.Array
    rank_correlation: jax.Array

    def __str__(self) -> str:
        # On the host, where nothing is compiled.
        return _render(to_host(self))


def compare_criteria(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    criteria: Criteria = ("magnitude", "activation", "wanda", "taylor", "obd_gauss_newton"),
    *,
    loss_fn: Callable,
    targets: Any,
    fractions: Sequence[float] = FRACTIONS,
    scope: str = "global",
    held_out: tuple[Any, Any] | None = None,
    seed: int = 0,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Comparison:
    """Remove weights in the order of each criterion's scores and measure the loss on the way.

    Weights are set to 0 without retraining; ties are removed by index. Exactly round(fraction x N) weights
    are removed, of the N weights of the model or of each layer.

    Args:
        params, apply_fn, batch: as in `jaxeff.analyze`.
        criteria: names or functions.
        loss_fn, targets: as in `jaxeff.analyze`.
        fractions: fractions of the weights to remove, ascending, in [0, 1].
        scope: 'global' removes the lowest scores of the whole model, so the criterion has to compare layers
            too; 'layer' removes the same fraction of each layer.
        held_out: another `(batch, targets)` on which to measure the loss; scores still come from `batch`.
        seed: of the random controls, and of the random signs that estimate a Hessian.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or the arguments do not match each other.

    >>> w, x = jnp.array([[3.0], [1e-3]]), jnp.eye(2)
    >>> loss = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))
    >>> compared = compare_criteria(
    ...     {"w": w}, lambda p, x: x @ p["w"], x, ("magnitude",), loss_fn=loss, targets=w,
    ...     fractions=(0.0, 0.5, 1.0),
    ... )
    >>> compared.loss.round(2)
    Array([[0. , 0. , 4.5]], dtype=float32)
    """
    chosen = named(criteria, with_loss=True)
    fractions = _checked_fractions(fractions)
    if scope not in ("global", "layer"):
        raise ValueError(f"`scope` must be 'global' or 'layer', got {scope!r}")
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    params = Params.of(params)
    bind = functools.partial(
        prepare, params, apply_fn, criteria=chosen, loss_fn=loss_fn, rngs=rngs, apply_kwargs=apply_kwargs
    )
    run = bind(batch=batch, targets=targets)
    statistics = run.statistics(batch, targets, jax.random.key(seed))
    measured_batch, measured_targets = (batch, targets) if held_out is None else held_out
    model = run.model if held_out is None else bind(batch=measured_batch, targets=measured_targets).model
    scores = [importance.scores(params, statistics, criterion) for criterion in chosen]
    if not scores[0]:
        raise ValueError(f"`params` holds no weights that multiply data.{whole_numbers(params.described())}")
    objective, arrays = objectives.objective(model, loss_fn, measured_targets, scores[0].keys())
    paths = [path for path, _ in objective.weights]
    stacks = tuple(levels.layer_axes(statistics, path) for path in paths) if scope == "layer" else None

    def curve(scores: dict[str, jax.Array]) -> jax.Array:
        ordered = orders(stacks, [scores[path] for path in paths])
        return _losses(objective, model.params, arrays, ordered, _counts(fractions, ordered, stacks))

    keys = jax.random.split(jax.random.key(seed), CONTROLS)
    losses = jnp.stack([curve(found) for found in scores])
    random_losses = jnp.stack([curve(_random_scores(key, scores[0])) for key in keys])
    return Comparison(
        tuple(criterion.name for criterion in chosen),
        scope,
        jnp.asarray(fractions),
        losses,
        random_losses,
        _area(fractions, losses),
        _area(fractions, random_losses),
        _rank_correlation([list(found.values()) for found in scores]),
    )


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(fraction) for fraction in fractions)
    ascending = all(a < b for a, b in itertools.pairwise(found))
    if len(found) < 2 or not ascending or not 0 <= found[0] <= found[-1] <= 1:
        raise ValueError(f"`fractions` must be two or more ascending numbers in [0, 1], got {fractions!r}")
    return found


def _counts(fractions: tuple[float, ...], orders: list[jax.Array], stacks: Stacks) -> np.ndarray:
    """Return [fractions, weights]: how many weights are removed from the order that each weight is in."""
    if stacks is None:
        sizes = [sum(order.size for order in orders)] * len(orders)
    else:
        layers = [
            math.prod(order.shape[axis] for axis in axes) for order, axes in zip(orders, stacks, strict=True)
        ]
        sizes = [order.size // count for order, count in zip(orders, layers, strict=True)]
    return np.array([[round(fraction * size) for size in sizes] for fraction in fractions], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    objective: Objective, params: Any, arrays: Arrays, orders: list[jax.Array], counts: np.ndarray
) -> jax.Array:
    """Return the mean loss for each row of counts, with the first weights of each order at 0."""
    problem = WeightLoss(objective, params, arrays)

    def loss(counts: jax.Array) -> jax.Array:
        kept = [order >= count for order, count in zip(orders, counts, strict=True)]
        return problem.mean_loss(
            tuple(jnp.where(k, w, 0) for k, w in zip(kept, problem.weights, strict=True))
        )

    return jax.lax.map(loss, jnp.asarray(counts))


def _random_scores(key: jax.Array, scores: dict[str, jax.Array]) -> dict[str, jax.Array]:
    keys = jax.random.split(key, len(scores))
    return {
        path: jax.random.uniform(own, score.shape)
        for own, (path, score) in zip(keys, scores.items(), strict=True)
    }


def _area(fractions: tuple[float, ...], losses: jax.Array) -> jax.Array:
    weights = np.convolve(np.diff(fractions), (0.5, 0.5)) / (fractions[-1] - fractions[0])
    return jnp.matmul(losses, jnp.asarray(weights, losses.dtype), precision="highest")


_SAMPLE = 1 << 16


@jax.jit
def _rank_correlation(scores: list[list[jax.Array]]) -> jax.Array:
    sampled = [by_compiler(lambda *found: importance.ranks(_sampled(found)), *found) for found in scores]
    return jnp.stack([jnp.stack([importance.correlation(a, b) for b in sampled]) for a in sampled])


def _sampled(scores: Sequence[jax.Array]) -> jax.Array:
    """Take every k-th score of each weight, at most 65,536 in all."""
    stride = math.ceil(sum(score.size for score in scores) / _SAMPLE)
    return jnp.concatenate([jnp.ravel(score)[::stride] for score in scores])[:_SAMPLE]


def _render(comparison: Comparison) -> str:
    """Render a row per criterion, best first: its area, and its loss at some fractions removed."""
    fractions = comparison.fractions.tolist()
    shown = [i for i, fraction in enumerate(fractions) if round(100 * fraction) in (0, 20, 50, 80, 90, 95)]
    header = ("removed by", "area", *(f"{fractions[i]:.0%}" for i in shown))
    random = np.mean(comparison.random_loss, 0)
    rows = [
        (float(area), (name, text.decimal(float(area)), *(text.decimal(float(loss[i])) for i in shown)))
        for name, area, loss in zip(
            (*comparison.criteria, "at random"),
            (*comparison.area, np.mean(comparison.random_area)),
            (*comparison.loss, random),
            strict=True,
        )
    ]
    lines = [header, *(row for _, row in sorted(rows, key=lambda row: (math.isnan(row[0]), row[0])))]
    spread = float(np.max(comparison.random_area) - np.min(comparison.random_area))
    note = (
        f"Loss by fraction of the weights removed, {comparison.scope} order; area is its mean along the way. "
        f"At random: the mean of {comparison.random_area.size} orders, whose areas differ by up to {spread:.3f}."
    )
    return "\n".join([*text.aligned(lines), "", *text.wrapped(note, text.WIDTH)])
