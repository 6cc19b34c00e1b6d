"""Which weights go together: alone, in blocks, as whole units, or so many of every few.

Imports `weight_axes`.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff.prune.weight_axes import FLAX_KERNEL, Axes, AxesByPath, by_path


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
        return jnp.sum(scores.reshape(_cut(scores.shape, block)), tuple(range(1, 2 * scores.ndim, 2)))

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        block = self._full(len(shape))
        inside = jnp.expand_dims(kept, tuple(range(1, 2 * len(shape), 2)))
        return jnp.broadcast_to(inside, _cut(shape, block)).reshape(shape)

    def _full(self, rank: int) -> tuple[int, ...]:
        return (1,) * (rank - len(self.shape)) + tuple(self.shape)


def _cut(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part for n, b in zip(shape, block, strict=True) for part in (n // b, b))


class _Along:
    """A pattern that goes along the inputs or the outputs of a weight.

    Which axes these are is a matter of the operation that consumes the weight: a Flax attention kernel is
    (inputs, heads, size), Equinox's weights are (outputs, inputs).
    """

    axis: int | str
    axes: AxesByPath | None

    def __post_init__(self) -> None:
        if self.axis not in ("input", "output") and not isinstance(self.axis, int):
            raise ValueError(f"`axis` must be 'input', 'output' or a number, got {self.axis!r}")
        if self.axes is None:
            return
        if isinstance(self.axis, int):
            raise ValueError(f"`axes` say where inputs and outputs are, and `axis` is {self.axis}: pass one")
        object.__setattr__(self, "axes", by_path(self.axes))

    def located(self, scores: Array, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of this leaf along which the pattern goes, and those that it never crosses.

        Raises:
            ValueError: nothing says which they are.
        """
        if isinstance(self.axis, int):
            return (self.axis % scores.ndim,), ()
        known = self._known(scores, path)
        found = known.inputs if self.axis == "input" else known.units
        if found:
            return found, known.layers
        uses = "none" if found is not None else "different ones in different uses"
        raise ValueError(
            f"`pattern` {self} goes along {self.axis} axes, of which {path!r}, shape {scores.shape}, has "
            f"{uses}: name them with `axes={{**axes, {path!r}: prune.Axes(inputs=..., units=...)}}`, or "
            "leave the leaf out with `prunable`"
        )

    def _known(self, scores: Array, path: str) -> Axes:
        if self.axes is not None:
            found = next((known for name, known in by_path(self.axes) if name == path), None)
            why = "`axes` do not name"
        else:
            kernel = path.rsplit("/", 1)[-1] == "kernel" and scores.ndim == 2
            found, why = FLAX_KERNEL if kernel else None, "without a model nothing says which are those of"
        if found is None:
            raise ValueError(
                f"`pattern` {self} goes along {self.axis} axes, and {why} {path!r}, shape {scores.shape}: "
                "pass `axes=prune.axes(params, apply_fn, batch)` or statistics, give `axis` as a number, or "
                "leave the leaf out with `prunable`"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Units(_Along):
    """Whole units (neurons, channels, features of heads), scored by their sum.

    Attributes:
        axis: 'output' for the outputs of a weight, all that one unit reads; 'input' for its inputs; or the
            number of one axis. Units along several axes, (heads, size) of an attention kernel, are one for
            each index of all of them.
        axes: as `NByM` has them.

    >>> Units(axis=0).groups(jnp.array([[1.0, 2.0], [0.0, 1.0]]), "w")
    Array([[3.],
           [1.]], dtype=float32)
    """

    axis: int | str = "output"
    axes: AxesByPath | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def groups(self, scores: Array, path: str) -> Array:
        along, apart = self.located(scores, path)
        summed = tuple(axis for axis in range(scores.ndim) if axis not in (*along, *apart))
        return jnp.sum(scores, summed, keepdims=True)

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(kept, shape)


@dataclasses.dataclass(frozen=True)
class NByM(_Along):
    """n weights kept of every m in a row along an axis: a sparsity of 1 - n / m in every layer.

    Inputs that are several axes, (heads, size) of the kernel after an attention, are one row, as in the
    matrix that the product reads; the same of outputs.

    Attributes:
        n: kept; hardware knows 2 of 4.
        m: in a row.
        axis: 'input', what the product sums over, which hardware asks for; 'output', the weight's units;
            or the number of one axis.
        axes: the axes of each weight: what `prune.axes(params, apply_fn, batch)` gives, statistics of
            `jaxeff.collect`, or `prune.Axes` by path. Without them a `kernel` of two axes is (inputs,
            outputs), as in Flax, and anything else is refused.

    >>> NByM(1, 2).kept(jnp.array([[1.0], [2.0], [4.0], [3.0]]), "kernel")[:, 0]
    Array([False,  True,  True, False], dtype=bool)
    """

    n: int
    m: int
    axis: int | str = "input"
    axes: AxesByPath | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.n <= self.m:
            raise ValueError(f"`n` must be from 1 to `m`, got n={self.n}, m={self.m}")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def kept(self, scores: Array, path: str) -> Array:
        """The mask; of equal scores the first go."""
        along, _ = self.located(scores, path)
        length = math.prod(scores.shape[axis] for axis in along)
        if length % self.m:
            names = f"axis {along[0]}" if len(along) == 1 else f"axes {along}"
            raise ValueError(
                f"`pattern` {self.n} of {self.m} does not divide {names} of {path!r}, shape "
                f"{scores.shape}: choose another `m`, or leave the leaf out with `prunable`"
            )
        last = range(-len(along), 0)
        moved = jnp.moveaxis(scores, along, last)
        rows = moved.reshape(*moved.shape[: -len(along)], -1, self.m)
        one, other = rows[..., :, None], rows[..., None, :]
        later = np.triu(np.ones((self.m, self.m), bool), 1).reshape((1,) * (one.ndim - 2) + (self.m, self.m))
        better = jnp.sum((other > one) | ((other == one) & later), -1)
        return jnp.moveaxis((better < self.n).reshape(moved.shape), last, along)


Pattern = Unstructured | Block | Units | NByM

UNSTRUCTURED = Unstructured()
