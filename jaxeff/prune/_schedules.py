"""When to prune, and how far: functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Target(NamedTuple):
    """What a schedule asks for at a step: the sparsity, and whether masks are made anew."""

    sparsity: Array
    due: Array


Schedule = Callable[[ArrayLike], Target]


def one_shot(sparsity: float, step: int = 0) -> Schedule:
    """All at one step.

    >>> bool(one_shot(0.9, step=5)(5).due)
    True
    """
    _check(sparsity, step, step)
    return lambda count: Target(jnp.float32(sparsity), jnp.asarray(count) == step)


def periodic(sparsity: float, begin: int, end: int, every: int) -> Schedule:
    """The same sparsity, of masks that are made anew every few steps from `begin` to `end`."""
    _check(sparsity, begin, end, every)
    return lambda count: Target(jnp.float32(sparsity), _due(count, begin, end, every))


def cubic(sparsity: float, begin: int, end: int, every: int, initial: float = 0.0) -> Schedule:
    """s - (s - s_0) (1 - t)^3, t from 0 at `begin` to 1 at `end`: much at first, little in the end.

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878

    >>> [float(cubic(0.8, 0, 100, 10)(step).sparsity.round(3)) for step in (0, 50, 100)]
    [0.0, 0.7, 0.8]
    """
    _check(sparsity, begin, end, every)
    _check(initial, begin, end, every)

    def target(count: ArrayLike) -> Target:
        t = jnp.clip((jnp.asarray(count) - begin) / max(end - begin, 1), 0, 1).astype(jnp.float32)
        return Target(sparsity - (sparsity - initial) * (1 - t) ** 3, _due(count, begin, end, every))

    return target


def _due(count: ArrayLike, begin: int, end: int, every: int) -> Array:
    count = jnp.asarray(count)
    at = (count - begin) % every == 0
    # The last one too where the steps do not meet it.
    return (count >= begin) & (count <= end) & (at | (count == end))


def _check(sparsity: float, begin: int, end: int, every: int = 1) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), the fraction to remove, got {sparsity}")
    if not 0 <= begin <= end:
        raise ValueError(f"`begin` and `end` must be steps in order, got {begin} and {end}")
    if every < 1:
        raise ValueError(f"`every` must be 1 step or more, got {every}")
