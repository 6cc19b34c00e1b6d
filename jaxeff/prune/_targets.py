"""How many elements each group keeps so that a model meets its targets and loses the least importance.

In: `Choices`, the sizes that each group may have with what it loses at each, and `Budget`s, amounts with their limits.
Out: which size each group takes. From any result, no group can take its next larger size within all budgets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.graph.coupling_work import Amount

MOST = 20_000
"""Combinations of sizes of which each is looked at; of more, a few are searched for."""
_CHUNKS = 32


class Choice(NamedTuple):
    """The sizes that one group may have.

    Attributes:
        group: its number among all groups.
        sizes: [n], ascending; the last is the whole group.
        losses: [n], the importance of what is removed at each.
    """

    group: int
    sizes: np.ndarray
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What a model may cost.

    Attributes:
        whole: sizes of all groups while nothing is removed.
        amounts: functions of the sizes of all groups.
        limits: the most that each may be.
    """

    whole: np.ndarray
    amounts: Sequence[Amount]
    limits: np.ndarray

    def of(self, choices: Sequence[Choice], places: np.ndarray) -> np.ndarray:
        """[budgets, ...]: the share of its limit that each amount takes, for [choices, ...] places among the sizes."""
        sizes = np.repeat(self.whole[:, None], places[0].size, axis=1)
        for choice, place in zip(choices, places, strict=True):
            sizes[choice.group] = choice.sizes[place.ravel()]
        found = np.stack([amount(sizes) for amount in self.amounts]) / self.limits[:, None]
        return found.reshape(-1, *places[0].shape)
