"""Patterns: which weights are removed together, singly, in blocks, as whole units, or n of every m."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff.prune._layouts import Axes, AxesByPath, assumed, axes_by_path


class _Anywhere:
    """A pattern that follows the known axes of a weight."""

    def located(self, path: str, scores: Array, known: Axes | None) -> Axes:
        """Return the axes of a leaf: the known ones, or else those that its name and shape suggest."""
        return assumed(path, scores.shape) if known is None else known


@dataclasses.dataclass(frozen=True)
class Unstructured(_Anywhere):
    """Each weight by itself."""

    def groups(self, scores: Array, path: str, axes: Axes | None = None) -> Array:
        """Return one score per group of weights that are removed together.

        Args:
            scores: of one layer.
            axes: of the layer.
        """
        return scores

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        """Return the mask of the weights from that of the groups."""
        return kept


@dataclasses.dataclass(frozen=True)
class Block(_Anywhere):
    """Blocks of weights, scored by their sum.

    Attributes:
        shape: of a block, along the last axes of a weight, which it must divide.

    >>> Block((1, 2)).groups(jnp.array([[1.0, 2.0, 0.0, 1.0]]), "w")
    Array([[3., 1.]], dtype=float32)
    """

    shape: tuple[int, ...]

    def groups(self, scores: Array, path: str, axes: Axes | None = None) -> Array:
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


class _Along(_Anywhere):
    """A pattern along the inputs or the outputs of a weight.

    The operation that consumes a weight determines which axes these are: a Flax attention kernel is
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
            raise ValueError(f"`axes` name the inputs and outputs, but `axis` is {self.axis}: pass only one")
        object.__setattr__(self, "axes", axes_by_path(self.axes))

    def located(self, path: str, scores: Array, known: Axes | None) -> Axes:
        """Return the axes of a leaf, from `axes`, or else the known ones.

        Raises:
            ValueError: `axes` are given, and do not name the leaf.
        """
        if self.axes is None:
            return super().located(path, scores, known)
        found = next((axes for name, axes in axes_by_path(self.axes) if name == path), None)
        if found is None:
            raise ValueError(f"`pattern` {self} has `axes` that do not name {path!r}: {_ADVICE}")
        return found

    def along(self, scores: Array, path: str, axes: Axes | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the axes of a layer along which the pattern goes, and those that it never crosses.

        Raises:
            ValueError: these axes are unknown.
        """
        if isinstance(self.axis, int):
            return (self.axis % scores.ndim,), ()
        axes = self.located(path, scores, None) if axes is None else axes
        own, others = axes.inputs, axes.units or ()
        if self.axis == "output":
            own, others = axes.units, axes.inputs or ()
        apart = tuple(axis for axis in own or () if axis in others)
        if found := tuple(axis for axis in own or () if axis not in others):
            return found, apart
        which = f"`pattern` {self} goes along {self.axis} axes"
        if axes.inputs == axes.units == ():
            raise ValueError(
                f"{which}, which are unknown without a model for {path!r}, shape {scores.shape}: {_ADVICE}"
            )
        uses = "none" if own is not None else "different ones in different uses"
        raise ValueError(
            f"{which}, of which {path!r}, shape {scores.shape}, has {uses}: name them with "
            f"`axes={{**layout, {path!r}: prune.Axes(inputs=..., units=...)}}`, or leave the leaf out with "
            "`prunable`"
        )


_ADVICE = (
    "let `prune.scored` know, by statistics or by `prunable=prune.layout(params, apply_fn, batch)`, or give "
    "the pattern that layout as `axes`, or `axis` as a number, or leave the leaf out with `prunable`"
)


@dataclasses.dataclass(frozen=True)
class Units(_Along):
    """Whole units (neurons, channels, features of heads), scored by their sum.

    Attributes:
        axis: 'output' for the outputs of a weight, 'input' for its inputs, or the number of one axis. If units
            span several axes, such as (heads, size) of an attention kernel, each index of all of them is a unit.
        axes: as in `NByM`.

    >>> Units(axis=0).groups(jnp.array([[1.0, 2.0], [0.0, 1.0]]), "w")
    Array([[3.],
           [1.]], dtype=float32)
    """

    axis: int | str = "output"
    axes: AxesByPath | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def groups(self, scores: Array, path: str, axes: Axes | None = None) -> Array:
        along, apart = self.along(scores, path, axes)
        summed = tuple(axis for axis in range(scores.ndim) if axis not in (*along, *apart))
        return jnp.sum(scores, summed, keepdims=True)

    def expanded(self, kept: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(kept, shape)


@dataclasses.dataclass(frozen=True)
class NByM(_Along):
    """Keep n of every m consecutive weights along an axis, which is a sparsity of 1 - n / m in every layer.

    Inputs that span several axes, such as (heads, size) of the kernel after an attention, are one row, as in the
    matrix that the product reads; so are outputs.

    Attributes:
        n: weights kept; hardware supports 2 of 4.
        m: consecutive weights.
        axis: 'input', which the product sums over and hardware requires; 'output', the weight's units;
            or the number of one axis.
        axes: the axes of each weight, to replace those in its scores: a layout from
            `prune.layout(params, apply_fn, batch)`, statistics from `jaxeff.collect`, or `prune.Axes` by path. If
            the axes are unknown, a `kernel` of two axes is (inputs, outputs), as in Flax, and anything else is
            refused.

    >>> NByM(1, 2).kept(jnp.array([[1.0], [2.0], [4.0], [3.0]]), "kernel")[:, 0]
    Array([False,  True,  True, False], dtype=bool)
    """

    n: int
    m: int
    axis: int | str = "input"
    axes: AxesByPath | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.n, Integral) and isinstance(self.m, Integral) and 0 < self.n <= self.m):
            raise ValueError(f"`n` must be from 1 to `m`, both whole numbers, got n={self.n!r}, m={self.m!r}")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def kept(self, scores: Array, path: str, axes: Axes | None = None) -> Array:
        """Return the mask of one layer; ties are removed by index."""
        along, _ = self.along(scores, path, axes)
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
