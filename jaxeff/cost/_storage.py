"""Bytes of pruned weights, stored in four ways: params, masks -> Storage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxeff.cost._training import dtype_of
from jaxeff.model.params import Params
from jaxeff.output.shown import Shown

_INDEX = 4
"""Bytes of an index: int32, as in `jax.experimental.sparse` and most libraries."""


@dataclasses.dataclass(frozen=True, repr=False)
class Storage(Shown):
    """Storage of one weight with zeros.

    Attributes:
        size: number of entries.
        kept: number of entries that are not pruned.
        itemsize: bytes per entry.
        columns: entries per row, which is the last axis.
    """

    size: int
    kept: int
    itemsize: int
    columns: int

    @property
    def dense(self) -> int:
        """Bytes of all entries, zeros included."""
        return self.size * self.itemsize

    @property
    def masked(self) -> int:
        """Bytes of all entries and a mask of one byte per entry, as `jaxeff.prune` keeps it while training."""
        return self.dense + self.size

    @property
    def packed(self) -> int:
        """Bytes of the kept entries and a mask of one bit per entry."""
        return self.kept * self.itemsize + math.ceil(self.size / 8)

    @property
    def compressed(self) -> int:
        """Bytes in compressed sparse rows (CSR): kept entries, a column index for each, and the start of each row."""
        rows = self.size // max(self.columns, 1)
        return self.kept * (self.itemsize + _INDEX) + (rows + 1) * _INDEX

    @property
    def smallest(self) -> str:
        """'dense', 'packed' or 'compressed', whichever takes the fewest bytes."""
        return min(("dense", "packed", "compressed"), key=lambda form: getattr(self, form))

    def to_dict(self) -> dict[str, Any]:
        forms = ("dense", "masked", "packed", "compressed", "smallest")
        return {**dataclasses.asdict(self), **{form: getattr(self, form) for form in forms}}


def storage(params: Any, masks: Any = None) -> dict[str, Storage]:
    """Return the bytes of each pruned weight: dense, masked, bit-packed, and in compressed sparse rows.

    Args:
        params: a tree of arrays, or variables, whose `params` collection is used; with masks, shapes suffice.
        masks: True = kept, from `jaxeff.prune.masks` for the same tree. Without masks, the zeros of every leaf
            of two axes or more count as pruned.

    Returns:
        By path, the leaves that have a mask of their shape (without masks, those of two axes or more).

    Raises:
        ValueError: the masks belong to other params.

    >>> found = storage({"w": jnp.eye(16)})["w"]
    >>> found.kept, found.dense, found.packed, found.compressed, found.smallest
    (16, 1024, 96, 196, 'packed')
    """
    leaves = Params.of(params, abstract=masks is not None).named
    if masks is None:
        kept = {path: jnp.asarray(leaf) != 0 for path, leaf in leaves.items() if jnp.ndim(leaf) > 1}
    else:
        named = Params.of(masks).named
        if named.keys() != leaves.keys():
            strange = sorted(named.keys() ^ leaves.keys())[0]
            raise ValueError(f"`masks` must be of the same tree as `params`; they differ at {strange!r}")
        kept = {path: mask for path, mask in named.items() if jnp.ndim(mask)}
    return {path: _of_leaf(path, leaves[path], mask) for path, mask in kept.items()}


def _of_leaf(path: str, leaf: Any, mask: Any) -> Storage:
    if jnp.shape(leaf) != jnp.shape(mask):
        raise ValueError(
            f"`masks` has shape {jnp.shape(mask)} at {path!r}, where `params` has {jnp.shape(leaf)}"
        )
    shape = jnp.shape(leaf)
    kept = int(jnp.count_nonzero(mask))
    return Storage(math.prod(shape), kept, dtype_of(leaf).itemsize, shape[-1] if shape else 1)
