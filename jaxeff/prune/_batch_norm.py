"""Recalibration of BatchNorm statistics over many batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.functions import named_misfit
from jaxeff.model.params import batch_size, is_variables, named_leaves

Values = dict[str, np.ndarray]
"""Running averages by path."""

_BATCH_STATS = "batch_stats"
_AVERAGES = ("mean", "var")


def recalibrate(variables: Any, apply_fn: Callable, batches: Iterable[Any], **apply_kwargs: Any) -> Any:
    """Compute the mean and variance of each BatchNorm over all batches, to replace its running averages.

    Pruning changes the inputs of a BatchNorm, and its running averages follow slowly. Over batches of n_b
    examples with mean m_b and variance v_b, the new statistics are m = mean(m_b) and
    v = mean(v_b) + mean((m_b - m)^2), each mean weighted by n_b. Each batch is normalized by its own statistics,
    as in training.

    A module writes a = k a + (1 - k) b, with k its momentum and b the batch's statistic. Two passes with different a
    give k and b, so b is exact to float32 rounding over 1 - k. Averages that the batches do not change, such as
    those of a frozen BatchNorm, stay as they are, and so do leaves not called `mean` or `var`.

    Args:
        variables: a Linen variables dict with `params` and `batch_stats`.
        apply_fn: `model.apply`.
        batches: of model inputs, read once; a tuple holds several inputs.
        **apply_kwargs: passed to `apply_fn`, to make it use the batch's statistics: such as `train=True`
            or `use_running_average=False`; also `rngs` for dropout, the same for each batch.

    Returns:
        The new `batch_stats` collection. For a TrainState that has one:
        `state.replace(batch_stats=prune.recalibrate(...))`.

    Raises:
        ValueError: there are no `batch_stats`, no batches, or no running averages that a batch changes.

    >>> import flax.linen as nn
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
    >>> found = recalibrate(model.init(jax.random.key(0), batches[0]), model.apply, batches)
    >>> found["mean"].round(3), found["var"].round(3)
    (Array([4.], dtype=float32), Array([5.], dtype=float32))
    """
    if not is_variables(variables) or not jax.tree.leaves(variables.get(_BATCH_STATS)):
        raise ValueError(
            "`variables` must have `params` and `batch_stats`: pass {'params': ..., 'batch_stats': ...}"
        )
    arrays = {name: value for name, value in apply_kwargs.items() if _has_array(value)}
    statics = tuple(sorted((name, value) for name, value in apply_kwargs.items() if name not in arrays))
    update = functools.partial(_updated, apply_fn, statics, variables, arrays)
    total, sums, squares = 0, {}, {}
    for count, values in _of_batches(update, variables[_BATCH_STATS], batches):
        total += count
        for path, value in values.items():
            sums[path] = sums.get(path, 0) + count * value
            squares[path] = squares.get(path, 0) + count * value**2
    if not total:
        raise ValueError("`batches` is empty: pass at least one batch of model inputs")
    means = {path: value / total for path, value in sums.items()}
    spread = {path: squares[path] / total - mean**2 for path, mean in means.items()}
    return _with_values(variables[_BATCH_STATS], _over_all(means, spread))


def _of_batches(update: Callable, stats: Any, batches: Iterable[Any]) -> Iterator[tuple[int, Values]]:
    """Yield the size of each batch, and its own value of each running average."""
    momenta: dict[str, float] = {}
    zeros: Values = {}
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        if not momenta:
            named = named_leaves(stats)
            zeros = {path: np.zeros(named[path].shape) for path in named if path.split("/")[-1] in _AVERAGES}
            # Averages that the model reads in this mode must keep their values, or they would change the activations.
            zeros = _changing(*_probed(update, stats, zeros, batch))
            momenta = _momenta(*_probed(update, stats, zeros, batch))
        low = named_leaves(update(_with_values(stats, zeros), batch))
        values = {path: np.asarray(low[path], np.float64) / (1 - k) for path, k in momenta.items()}
        yield batch_size(batch) or 1, values


def _probed(update: Callable, stats: Any, zeros: Values, batch: tuple) -> tuple[Values, Values, Values]:
    """Return a batch's update of averages of 0, some other averages, and its update of those."""
    low = named_leaves(update(_with_values(stats, zeros), batch))
    # As large as the batch's contribution, so that the momentum is not lost in its rounding.
    start = {path: np.maximum(np.abs(low[path]), 1) for path in zeros}
    high = named_leaves(update(_with_values(stats, start), batch))
    taken = [{path: np.asarray(found[path]) for path in zeros} for found in (low, high)]
    return taken[0], start, taken[1]


def _over_all(means: Values, spread: Values) -> Values:
    """Combine the batches; a variance is the mean of their variances plus the variance of their means."""
    pairs = {path: path.removesuffix("var") + "mean" for path in means if path.endswith("var")}
    return {path: mean + spread.get(pairs.get(path, ""), 0) for path, mean in means.items()}


def _with_values(stats: Any, values: Values) -> Any:
    named = named_leaves(stats)
    # Copies of the averages that do not change.
    leaves = [jnp.array(values.get(path, leaf), jnp.result_type(leaf)) for path, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(stats), leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _updated(
    apply_fn: Callable, statics: tuple, variables: Any, arrays: dict[str, Any], stats: Any, batch: tuple
) -> Any:
    """Return a batch's update of running averages."""
    apply = functools.partial(apply_fn, **dict(statics), **arrays, mutable=[_BATCH_STATS])
    _, updates = named_misfit(apply, {**variables, _BATCH_STATS: stats}, batch)
    return updates[_BATCH_STATS]


def _changing(low: Values, start: Values, high: Values) -> Values:
    """Return zeros for the averages that a batch changes.

    Raises:
        ValueError: there are none.
    """
    found = [path for path in low if np.any(low[path] != 0) or np.any(high[path] != start[path])]
    if not found:
        raise ValueError(
            "`apply_fn` does not change the means and variances of `batch_stats`: pass the argument that makes "
            "it use the batch's own, such as `train=True` or `use_running_average=False`"
        )
    return {path: np.zeros_like(low[path]) for path in found}


def _momenta(low: Values, start: Values, high: Values) -> dict[str, float]:
    """Return the momentum of each running average, by path.

    Raises:
        ValueError: an average follows another rule.
    """
    found: dict[str, float] = {}
    for path in low:
        each = (high[path].astype(np.float64) - low[path]) / start[path]
        found[path] = float(np.mean(each))
        if not (np.all(np.abs(each - found[path]) < 1e-5) and -1e-5 < found[path] < 1 - 1e-5):
            raise ValueError(f"`batch_stats` has {path!r}, which is not a running average of the batches")
    return found


def _has_array(value: Any) -> bool:
    return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))
