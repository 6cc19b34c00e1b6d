"""Statistics summed over many batches, and a check that the batches were enough.

Takes any iterable of batches and holds one at a time. Returns one `Statistics`, like that of one large
batch, with the stability of the scores.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import importance
from jaxeff._collect import Criteria, Run, check_makes_masks, counted, named, prepare
from jaxeff.importance import Criterion
from jaxeff.model.adapters import resolve_both
from jaxeff.model.params import Params
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.summation import two_sum
from jaxeff.output.progress import progress_bar
from jaxeff.statistics import Ranges, Stability, Statistics, check_alike

STABLE = 0.95
"""Scores are not stable if their rank correlation over the last doubling of the batches is below this."""


def calibrate(
    params: Any,
    apply_fn: Callable | Any = None,
    batches: Iterable[Any] | None = None,
    *,
    criterion: Criteria = "activation",
    loss_fn: Callable | None = None,
    seed: int | jax.Array = 0,
    where: Callable | None = None,
    hessians: bool = False,
    ranges: bool = False,
    progress: bool = True,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Statistics:
    """Collect statistics over many batches, as `jaxeff.collect` does on one.

    Sums of activations and of per-example gradients equal those of one large batch up to float32
    rounding. Quantities that are nonlinear in a batch's gradient are averaged over the batches, weighted
    by their examples. Programs compile once for batches of one shape, and once more for a batch of
    another leading size, such as the last of a data set.

    `statistics.stability` shows whether the batches were enough: for the first criterion, it holds the rank
    correlation of each weight's scores after n batches with those after 2 n.

    Args:
        params, apply_fn: as in `jaxeff.collect`; a model is followed by the batches.
        batches: an iterable of batches, or of `(batch, targets)` pairs if `loss_fn` is given; read once.
        criterion: one or several criteria that will read the statistics.
        loss_fn: as in `jaxeff.analyze`.
        seed: of the random signs that estimate a Hessian; each batch draws its own.
        where: a function of a batch that returns which of its examples or positions count, as in `jaxeff.collect`.
        hessians: also sum X^T X of the inputs of each dense layer, as in `jaxeff.collect`.
        ranges: also count the sizes of each layer's inputs for `jaxeff.outliers`, as in `jaxeff.collect`. For rounding
            errors, each batch is scaled by its own largest input.
        progress: show a progress bar if stderr is a terminal.
        rngs, **apply_kwargs: passed to `apply_fn`, the same for each batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, `batches` is empty, or a batch differs from the first in more
            than its leading size.

    Warns:
        UserWarning: there was only one batch, the scores of some weights are not stable yet, or the examples of a batch
            depend on each other and the criterion is 'fisher'.

    >>> import jax.numpy as jnp
    >>> batches = [jnp.full((4, 1), value) for value in (1.0, 3.0)]
    >>> statistics = calibrate({"w": jnp.ones((1, 2))}, lambda p, x: x @ p["w"], batches)
    >>> statistics.sites[0].input.mean_absolute
    Array([[2.]], dtype=float32)
    """
    check_makes_masks(where)
    criteria = named(criterion, with_loss=loss_fn is not None)
    params, apply_fn, given = resolve_both(params, apply_fn, batches)
    each: Iterable[Any] = given
    params = Params.of(params)

    def bind(batch: Any, targets: Any) -> Run:
        run = prepare(params, apply_fn, batch, criteria, loss_fn, targets, rngs, apply_kwargs)
        return dataclasses.replace(run, hessians=hessians, ranges=ranges)

    key = jax.random.key(seed)
    sums: _CompensatedSums | None = None
    ranks: list[tuple[int, list[jax.Array]]] = []
    total = len(each) if isinstance(each, Sized) else None
    count = 0
    with progress_bar("Calibrating", total, progress) as step:
        for run, batch, targets in _bound(_items(each, loss_fn), bind):
            found = run.statistics(batch, targets, jax.random.fold_in(key, count), counted(where, batch))
            sums = (
                _CompensatedSums(found, jax.tree.map(jnp.zeros_like, found))
                if sums is None
                else _add(sums, found)
            )
            count += 1
            if math.log2(count).is_integer():
                ranks.append((count, _sampled_ranks(criteria[0], params, _rounded(sums))))
            step()
    if sums is None:
        raise ValueError("`batches` is empty: pass an iterable of at least one batch")
    statistics = _rounded(sums)
    if ranks[-1][0] < count:
        ranks.append((count, _sampled_ranks(criteria[0], params, statistics)))
    stability = _stability(criteria[0].name, statistics, ranks)
    _warn(stability, count)
    return dataclasses.replace(statistics, stability=stability)


def _items(batches: Iterable[Any], loss_fn: Callable | None) -> Iterator[tuple[Any, Any]]:
    """Yield each batch with its targets."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable of batches, got {type(batches).__name__}")
    if isinstance(batches, dict) or hasattr(batches, "shape"):
        raise TypeError(
            f"`batches` is one {type(batches).__name__}: pass an iterable of batches, such as [batch]"
        )
    for number, item in enumerate(batches):
        if loss_fn is None:
            yield item, None
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            yield item[0], item[1]
        else:
            raise ValueError(
                f"item {number} of `batches` is a {type(item).__name__}: with a `loss_fn`, each item is a "
                "pair (batch, targets)"
            )


def _bound(items: Iterator[tuple[Any, Any]], bind: Callable[..., Run]) -> Iterator[tuple[Run, Any, Any]]:
    """Yield each batch with the run for its shapes, which is prepared once per leading size."""
    runs: dict[Any, Run] = {}
    first: Any = None
    for number, (batch, targets) in enumerate(items):
        shapes = _described((batch, targets))
        first = first or shapes
        if shapes[:2] != first[:2]:
            raise ValueError(
                f"batch {number} of `batches` has {shapes[2]}, the first has {first[2]}: batches may differ "
                "only in their leading size; pad them to one shape"
            )
        if shapes not in runs:
            runs[shapes] = bind(batch=batch, targets=targets)
        yield runs[shapes], batch, targets


def _described(tree: Any) -> tuple[Any, Any, str]:
    """Return a batch's structure, its dtypes and shapes without the leading size, and its shapes in words."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    words = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in zip(dtypes, shapes, strict=True))
    return structure, tuple((dtype, shape[1:]) for dtype, shape in zip(dtypes, shapes, strict=True)), words


class _CompensatedSums(NamedTuple):
    """Sum of the batches' statistics so far, and its rounding error."""

    total: Statistics
    error: Statistics


def _add(sums: _CompensatedSums, found: Statistics) -> _CompensatedSums:
    check_alike(sums.total, found)
    # The static fields of a site may differ between batches of different leading sizes.
    alike = jax.tree.unflatten(jax.tree.structure(sums.total), jax.tree.leaves(found))
    return _added(sums, alike)


@jax.jit
def _added(sums: _CompensatedSums, found: Statistics) -> _CompensatedSums:
    """Add, keeping the rounding errors apart, so that thousands of batches add up as exactly as one."""

    def add(path: Any, total: Any, error: Any, found: Any) -> tuple[Any, Any]:
        # Ranges are relative to the largest input and stop at a bound: they add by their own rule.
        if isinstance(total, Ranges):
            return total + found, error
        if any(getattr(key, "name", None) in ("maximum", "largest") for key in path[-2:]):
            return jnp.maximum(total, found), error
        high, low = two_sum(total, found)
        return high, error + low

    totals, structure = jax.tree_util.tree_flatten_with_path(sums.total, is_leaf=_is_ranges)
    errors, others = (jax.tree.leaves(tree, is_leaf=_is_ranges) for tree in (sums.error, found))
    added = [
        add(path, total, error, other)
        for (path, total), error, other in zip(totals, errors, others, strict=True)
    ]
    total, error = (jax.tree.unflatten(structure, each) for each in zip(*added, strict=True))
    return _CompensatedSums(total, error)


def _is_ranges(node: Any) -> bool:
    return isinstance(node, Ranges)


def _rounded(sums: _CompensatedSums) -> Statistics:
    return jax.tree.map(jnp.add, sums.total, sums.error)


_SAMPLE = 4096


@functools.partial(jax.jit, static_argnums=0)
def _sampled_ranks(criterion: Criterion, params: Any, statistics: Statistics) -> list[jax.Array]:
    """Rank an evenly spaced sample of the weights of each layer."""
    scores = importance.scores(params, statistics, criterion)
    return [by_compiler(_sample_ranks, score) for score in scores.values()]


def _sample_ranks(score: jax.Array) -> jax.Array:
    return importance.ranks(jnp.ravel(score)[:: math.ceil(score.size / _SAMPLE)])


def _stability(name: str, statistics: Statistics, ranks: list[tuple[int, list[jax.Array]]]) -> Stability:
    """Correlate the ranks at each checkpoint with those at the one before."""
    paths = tuple(info.path for info in statistics.params if info.role == "weight")
    found = [_correlations(before, after) for (_, before), (_, after) in itertools.pairwise(ranks)]
    counts = [count for count, _ in ranks[1:]]
    correlation = jnp.stack(found) if found else jnp.zeros((0, len(paths)))
    return Stability(name, paths, jnp.asarray(counts, jnp.int32), correlation)


@jax.jit
def _correlations(first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
    return jnp.stack([importance.correlation(a, b) for a, b in zip(first, second, strict=True)])


def _warn(stability: Stability, count: int) -> None:
    """Warn the caller of `calibrate` if the batches were too few."""
    if count == 1:
        message = "calibrated on one batch, so the stability of the scores is unknown. Pass more batches."
        warnings.warn(message, stacklevel=3)
        return
    lowest, path = min(
        zip(stability.correlation[-1].tolist(), stability.paths, strict=True), default=(1.0, "")
    )
    if lowest < STABLE:
        message = (
            f"the scores of {path!r} are not stable yet: rank correlation {lowest:.2f} over the last "
            f"doubling, to {count} batches. Pass more or larger batches."
        )
        warnings.warn(message, stacklevel=3)
