"""A maximum that adds, as the sums of a run do."""

from __future__ import annotations

import dataclasses

import jax

from jaxeff.numerics.summation import namespace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest of some values. Zeros, which a branch not taken leaves, are its neutral element.

    Attributes:
        value: [], the largest.
        seen: [], 1 if there were any values, else 0.
    """

    value: jax.Array
    seen: jax.Array

    def __add__(self, other: Largest) -> Largest:
        xp = namespace(self.value)
        value = xp.where(other.seen == 0, self.value, xp.maximum(self.value, other.value))
        return Largest(xp.where(self.seen == 0, other.value, value), xp.maximum(self.seen, other.seen))
