"""A tree of many small arrays in one array for each dtype, which a training step passes on at little cost.

A step that donates its state pays microseconds for every array in it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff.numerics.meshes import gathered


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the arrays of a tree lie in a packed one.

    Attributes:
        structure: of the tree.
        shapes, dtypes: of its leaves.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @staticmethod
    def of(tree: Any) -> Packing:
        leaves, structure = jax.tree.flatten(tree)
        shapes = tuple(tuple(np.shape(leaf)) for leaf in leaves)
        return Packing(structure, shapes, tuple(str(leaf.dtype) for leaf in leaves))

    def pack(self, tree: Any) -> tuple[Any, ...]:
        """Return one row for each dtype in which leaves are stored; on the host, if no leaf is traced.

        >>> packing = Packing.of(tree := {"a": np.int32(1), "b": np.ones((2, 2), bool)})
        >>> packing.pack(tree)
        (array([1, 1, 1, 1, 1], dtype=int32),)
        """
        leaves = jax.tree.leaves(tree)
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        xp = jnp if traced else np
        rows: dict[str, list[Any]] = {dtype: [] for dtype in self._stored()}
        for leaf, dtype in zip(leaves if traced else jax.device_get(leaves), self.dtypes, strict=True):
            whole = gathered(leaf) if traced else leaf
            rows[_stored(dtype)].append(xp.ravel(whole).astype(_stored(dtype)))
        return tuple(map(xp.concatenate, rows.values()))

    def unpack(self, rows: tuple[Any, ...]) -> Any:
        """Return the tree; axes that `vmap` or `scan` added in front of the rows stay in front."""
        known = dict(zip(self._stored(), rows, strict=True))
        ends = dict.fromkeys(known, 0)
        leaves: list[Any] = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            row, start = known[_stored(dtype)], ends[_stored(dtype)]
            ends[_stored(dtype)] = start + math.prod(shape)
            piece = row[..., start : ends[_stored(dtype)]]
            leaves.append(piece.reshape((*row.shape[:-1], *shape)).astype(dtype))
        return jax.tree.unflatten(self.structure, leaves)

    def first(self, rows: tuple[Any, ...]) -> Any:
        """Return the first leaf, a number, without unpacking the others."""
        return rows[self._stored().index(self.dtypes[0])][..., 0]

    def with_first(self, rows: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
        """Return the rows with another first leaf."""
        at = self._stored().index(self.dtypes[0])
        row = rows[at]
        if isinstance(value, np.generic):
            changed = np.array(row)
            changed[0] = value
        else:
            changed = jnp.asarray(row).at[..., 0].set(value)
        return (*rows[:at], changed, *rows[at + 1 :])

    def _stored(self) -> list[str]:
        return sorted(set(map(_stored, self.dtypes)))


def _stored(dtype: str) -> str:
    return "int32" if dtype == "bool" else dtype
