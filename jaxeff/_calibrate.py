"""Statistics of many batches, and whether they were enough.

In: any iterable of batches. Out: one `Statistics`, as of one large batch, with the stability of the
scores. One batch is held at a time.
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
from jaxeff._collect import Criteria, Run, named, prepare
from jaxeff.importance import Criterion
from jaxeff.model.params import Params
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.summation import two_sum
from jaxeff.output.progress import progress_bar
from jaxeff.statistics import Stability, Statistics, check_alike

STABLE = 0.95
"""Below this rank correlation over the last doubling of the batches, scores still move."""


def calibrate(
    params: Any,
    apply_fn: Callable,
    batches: Iterable[Any],
    *,
    criterion: Criteria = "activation",
    loss_fn: Callable | None = None,
    seed: int | jax.Array = 0,
    progress: bool = True,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Statistics:
    """Collect statistics over many batches: as `jaxeff.collect` on all of them together.

    Sums of activations and of per-example gradients equal those of one large batch to float32
    rounding; what is nonlinear in a batch's gradient is averaged over batches, each weighed by its
    examples. Programs compile once for batches of one shape. A batch of another leading size (the last
    of a data set) compiles them once more.

    Whether the batches are enough is told by `statistics.stability`: the rank correlation of each weight's
    scores after n batches with those after twice as many, for the first criterion.

    Args:
        params, apply_fn: as `jaxeff.collect` takes them.
        batches: an iterable of batches, or of `(batch, targets)` pairs where a `loss_fn` is given. It is run
            through once.
        criterion: what the statistics are for, one or several.
        loss_fn: as `jaxeff.analyze` takes it.
        seed: of the random signs that estimate a Hessian; each batch draws its own.
        progress: whether a bar on standard error, where that is a terminal, shows how far it is.
        rngs, **apply_kwargs: passed to `apply_fn`, the same for each batch.

    Raises:
        TypeError, ValueError: an argument is not of its kind, there are no batches, or a batch differs from
            the first in more than its leading size.

    Warns:
        UserWarning: there was one batch, or the scores of some weights still move.

    >>> import jax.numpy as jnp
    >>> batches = [jnp.full((4, 1), value) for value in (1.0, 3.0)]
    >>> statistics = calibrate({"w": jnp.ones((1, 2))}, lambda p, x: x @ p["w"], batches)
    >>> statistics.sites[0].input.mean_absolute
    Array([[2.]], dtype=float32)
    """
    criteria = named(criterion, with_loss=loss_fn is not None)
    params = Params.of(params)
    bind = functools.partial(
        prepare, params, apply_fn, criteria=criteria, loss_fn=loss_fn, rngs=rngs, apply_kwargs=apply_kwargs
    )
    key = jax.random.key(seed)
    sums: _CompensatedSums | None = None
    ranks: list[tuple[int, list[jax.Array]]] = []
    total = len(batches) if isinstance(batches, Sized) else None
    count = 0
    with progress_bar("Calibrating", total, progress) as step:
        for run, batch, targets in _bound(_items(batches, loss_fn), bind):
            found = run.statistics(batch, targets, jax.random.fold_in(key, count))
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
    """Each batch with its targets."""
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
    """Each batch with the run for its shapes: bound once for each leading size."""
    runs: dict[Any, Run] = {}
    first: Any = None
    for number, (batch, targets) in enumerate(items):
        shapes = _described((batch, targets))
        first = first or shapes
        if shapes[:2] != first[:2]:
            raise ValueError(
                f"batch {number} of `batches` has {shapes[2]}, the first has {first[2]}: batches may differ "
                "in their leading size alone; pad them to one shape"
            )
        if shapes not in runs:
            runs[shapes] = bind(batch=batch, targets=targets)
        yield runs[shapes], batch, targets


def _described(tree: Any) -> tuple[Any, Any, str]:
    """The structure of a batch, its leaves without their leading size, and its shapes in words."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    words = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in zip(dtypes, shapes, strict=True))
    return structure, tuple((dtype, shape[1:]) for dtype, shape in zip(dtypes, shapes, strict=True)), words


class _CompensatedSums(NamedTuple):
    """The sum of the batches' statistics so far, and its rounding error."""

    total: Statistics
    error: Statistics


def _add(sums: _CompensatedSums, found: Statistics) -> _CompensatedSums:
    check_alike(sums.total, found)
    # Batches of two leading sizes may differ in what is static of a site.
    alike = jax.tree.unflatten(jax.tree.structure(sums.total), jax.tree.leaves(found))
    return _added(sums, alike)


@jax.jit
def _added(sums: _CompensatedSums, found: Statistics) -> _CompensatedSums:
    """With the rounding errors kept apart, thousands of batches add up as exactly as one."""

    def add(path: Any, total: jax.Array, error: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
        if path[-1].name == "maximum":
            return jnp.maximum(total, found), error
        high, low = two_sum(total, found)
        return high, error + low

    added = jax.tree_util.tree_map_with_path(add, sums.total, sums.error, found)
    total, error = jax.tree.transpose(jax.tree.structure(sums.total), jax.tree.structure((0, 0)), added)
    return _CompensatedSums(total, error)


def _rounded(sums: _CompensatedSums) -> Statistics:
    return jax.tree.map(jnp.add, sums.total, sums.error)


_SAMPLE = 4096


@functools.partial(jax.jit, static_argnums=0)
def _sampled_ranks(criterion: Criterion, params: Any, statistics: Statistics) -> list[jax.Array]:
    """The ranks of evenly spread weights of each layer among themselves."""
    scores = importance.scores(params, statistics, criterion)
    return [by_compiler(_sample_ranks, score) for score in scores.values()]


def _sample_ranks(score: jax.Array) -> jax.Array:
    return importance.ranks(jnp.ravel(score)[:: math.ceil(score.size / _SAMPLE)])


def _stability(name: str, statistics: Statistics, ranks: list[tuple[int, list[jax.Array]]]) -> Stability:
    """Each checkpoint's ranks with those of the one before."""
    paths = tuple(info.path for info in statistics.params if info.role == "weight")
    found = [_correlations(before, after) for (_, before), (_, after) in itertools.pairwise(ranks)]
    counts = [count for count, _ in ranks[1:]]
    correlation = jnp.stack(found) if found else jnp.zeros((0, len(paths)))
    return Stability(name, paths, jnp.asarray(counts, jnp.int32), correlation)


@jax.jit
def _correlations(first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
    return jnp.stack([importance.correlation(a, b) for a, b in zip(first, second, strict=True)])


def _warn(stability: Stability, count: int) -> None:
    """Tells the caller of `calibrate` where the batches were too few."""
    if count == 1:
        message = "calibrated on one batch: how much the scores depend on it is unknown. Pass more batches."
        warnings.warn(message, stacklevel=3)
        return
    lowest, path = min(
        zip(stability.correlation[-1].tolist(), stability.paths, strict=True), default=(1.0, "")
    )
    if lowest < STABLE:
        message = (
            f"the scores of {path!r} still move: rank correlation {lowest:.2f} over the last doubling, to "
            f"{count} batches. Pass more batches, or larger ones."
        )
        warnings.warn(message, stacklevel=3)
