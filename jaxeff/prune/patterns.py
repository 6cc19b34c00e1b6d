"""Which weights go together: alone, in blocks, as whole units, or so many of every few.

Imports, of jaxeff, `meshes`.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff.meshes import by_compiler


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Each weight by itself."""

    def groups(self, scores: Array, path: str) -> Array:
        """One score for each group of weights that goes as one."""
        return scores

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        """The mask of the weights, of that of the groups."""
        return kept


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of weights, scored by their sum.

    Attributes:
        shape: of a block, along the last axes of a weight, which it must divide.

    >>> Block((1, 2)).groups(jnp.array([[1.0, 2.0, 0.0, 1.0]]), "w")
    Array([[3., 1.]], dtype=float32)
    """

    shape: tuple[int, ...]

    def groups(self, scores: Array, path: str) -> Array:
        block = self._full(scores.ndim)
        if len(block) != scores.ndim or any(n % b for n, b in zip(scores.shape, block, strict=True)):
            raise ValueError(
                f"`pattern` Block({self.shape}) does not divide {path!r}, shape {scores.shape}: choose "
                "divisors of its last axes, or leave the leaf out with `prunable`"
            )
        cut, inside = _cut(scores.shape, block), tuple(range(1, 2 * scores.ndim, 2))
        return by_compiler(lambda scores: jnp.sum(scores.reshape(cut), inside), scores, like=scores)

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        block = self._full(len(shape))
        cut, inside = _cut(shape, block), tuple(range(1, 2 * len(shape), 2))

        def spread(kept: Array) -> Array:
            return jnp.broadcast_to(jnp.expand_dims(kept, inside), cut).reshape(shape)

        return by_compiler(spread, kept, like=kept)

    def _full(self, rank: int) -> tuple[int, ...]:
        return (1,) * (rank - len(self.shape)) + tuple(self.shape)


def _cut(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part for n, b in zip(shape, block, strict=True) for part in (n // b, b))


@dataclasses.dataclass(frozen=True)
class Units:
    """Whole units (neurons, channels), scored by their sum: the weights of one index along an axis.

    Attributes:
        axis: of the units. Flax lays every kernel out with its units last.
    """

    axis: int = -1

    def groups(self, scores: Array, path: str) -> Array:
        axis = self.axis % scores.ndim
        return jnp.sum(scores, tuple(other for other in range(scores.ndim) if other != axis), keepdims=True)

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(kept, shape)


_AXES = {"input": -2, "output": -1}


@dataclasses.dataclass(frozen=True)
class NByM:
    """n weights kept of every m in a row along an axis: a sparsity of 1 - n / m in every layer.

    Attributes:
        n: kept; hardware knows 2 of 4.
        m: in a row.
        axis: 'input', the axis that a matrix product sums over, next to last in Flax's layout; 'output', the
            last; or a number.

    >>> NByM(1, 2).kept(jnp.array([[1.0], [2.0], [4.0], [3.0]]), "w")[:, 0]
    Array([False,  True,  True, False], dtype=bool)
    """

    n: int
    m: int
    axis: int | str = "input"

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"`n` must be from 1 to `m`, got n={self.n}, m={self.m}")
        if self.axis not in _AXES and not isinstance(self.axis, int):
            raise ValueError(f"`axis` must be 'input', 'output' or a number, got {self.axis!r}")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def kept(self, scores: Array, path: str) -> Array:
        """The mask; of equal scores the first go."""
        axis = _AXES[self.axis] if isinstance(self.axis, str) else self.axis
        axis %= scores.ndim
        if scores.shape[axis] % self.m:
            raise ValueError(
                f"`pattern` {self.n} of {self.m} does not divide axis {axis} of {path!r}, shape "
                f"{scores.shape}: choose another `m`, or leave the leaf out with `prunable`"
            )
        return by_compiler(lambda scores: self._kept_along(scores, axis), scores, like=scores)

    def _kept_along(self, scores: Array, axis: int) -> Array:
        rows = jnp.moveaxis(scores, axis, -1)
        rows = rows.reshape(*rows.shape[:-1], -1, self.m)
        one, other = rows[..., :, None], rows[..., None, :]
        later = np.triu(np.ones((self.m, self.m), bool), 1).reshape((1,) * (one.ndim - 2) + (self.m, self.m))
        better = jnp.sum((other > one) | ((other == one) & later), -1)
        flat = (better < self.n).reshape(*rows.shape[:-2], math.prod(rows.shape[-2:]))
        return jnp.moveaxis(flat, -1, axis)


Pattern = Unstructured | Block | Units | NByM

UNSTRUCTURED = Unstructured()
