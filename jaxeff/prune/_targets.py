"""How many elements each group keeps so that a model meets a target and loses the least importance.

In: `Choices`, the sizes that each group may have and what it loses at each, and a `Budget`. Out: for each group the
place of its size among its choices. In every result, no group can have its next larger size within the budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxeff.graph.coupling_work import Amount

MOST = 20_000
"""All combinations of sizes are tried if there are no more; otherwise some are searched for."""
FITS = 1 + 1e-9
"""The largest share of a limit, but for rounding."""
# The search goes in steps of these parts of a group, and at last one by one.
_PARTS = (32, 256, 1 << 62)
_TIMES = (1, 2, 4, 8, 16, 32)
_GAIN = 1e-4
_SCALES = (0.5, 2.0, 0.25, 4.0)


class Choices(NamedTuple):
    """The sizes that groups may have.

    Attributes:
        groups: [n], the first variable of each among those of all groups.
        kinds: of each.
        sizes: [n, most]: ascending, up to the whole group, which is repeated at the end of shorter rows.
        losses: [n, most]: the importance of what is removed at each.
        tops: [n]: the place of the whole group.
    """

    groups: np.ndarray
    kinds: np.ndarray
    sizes: np.ndarray
    losses: np.ndarray
    tops: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, str, np.ndarray, np.ndarray]]) -> Choices:
        """Of the number, the kind, the sizes and the losses of each group."""
        groups, kinds, sizes, losses = zip(*rows, strict=True) if rows else ((), (), (), ())
        tops = np.array([len(row) - 1 for row in sizes], int)
        most = int(tops.max(initial=0)) + 1
        sizes, losses = (
            np.array([np.pad(row, (0, most - len(row)), "edge") for row in table]).reshape(-1, most)
            for table in (sizes, losses)
        )
        return cls(np.array(groups, int), np.array(kinds), sizes, losses, tops)

    def sizes_at(self, places: np.ndarray) -> np.ndarray:
        """[n, ...], for places of [n, ...]."""
        return np.take_along_axis(self.sizes, places.reshape(len(places), -1), axis=1).reshape(places.shape)

    def loss(self, places: np.ndarray) -> np.ndarray:
        """[...], for places of [n, ...]."""
        flat = places.reshape(len(places), -1)
        return np.take_along_axis(self.losses, flat, axis=1).sum(axis=0).reshape(places.shape[1:])


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        whole: [variables]: sizes of groups while nothing is removed, and 1 for each block in a row.
        amounts: functions of these variables.
        limits: [amounts], the most that each may be.
        blocks: of choices that are how many blocks in a row stay, by their place: the first of the blocks' variables,
            and the place of each block in the order in which they go.
    """

    whole: np.ndarray
    amounts: Sequence[Amount]
    limits: np.ndarray
    blocks: Mapping[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)

    def shares(self, choices: Choices, places: np.ndarray) -> np.ndarray:
        """[amounts, ...]: how much of its limit each takes, at places of [n, ...]."""
        flat = places.reshape(len(places), -1)
        sizes = np.repeat(self.whole[:, None], flat.shape[1], axis=1)
        chosen = choices.sizes_at(flat)
        of_sizes = [place for place in range(len(chosen)) if place not in self.blocks]
        sizes[choices.groups[of_sizes]] = chosen[of_sizes]
        for place, (first, ranks) in self.blocks.items():
            sizes[first : first + len(ranks)] = ranks[:, None] >= len(ranks) - chosen[place]
        found = np.stack([amount(sizes) for amount in self.amounts]) / self.limits[:, None]
        return found.reshape(len(self.amounts), *places.shape[1:])

    def fits(self, choices: Choices, places: np.ndarray) -> np.ndarray:
        return np.all(self.shares(choices, places) <= FITS, axis=0)


def best_places(choices: Choices, budget: Budget, count: int = 1) -> list[np.ndarray]:
    """At most `count` results, least loss first: the best of all where `MOST` allows, else of a search."""
    if math.prod((choices.tops + 1).tolist()) <= MOST:
        return _of_all(choices, budget, count)
    found = {tuple(places): places for places in [_searched(choices, budget)]}
    # The same search, with some groups counting for more and for less than their scores say: of a kind, or one by one.
    some = [choices.kinds == kind for kind in np.unique(choices.kinds)]
    some += [*np.eye(len(choices.groups), dtype=bool)]
    for scale, chosen in itertools.product(_SCALES, some):
        if len(found) >= count:
            break
        scales = np.where(chosen, scale, 1.0)
        places = _searched(choices._replace(losses=choices.losses * scales[:, None]), budget)
        found[tuple(places)] = places
    return sorted(found.values(), key=choices.loss)[:count]


def _of_all(choices: Choices, budget: Budget, count: int) -> list[np.ndarray]:
    # NumPy has at most 64 axes, and groups of one size need none.
    free = np.flatnonzero(choices.tops)
    combinations = np.indices((choices.tops[free] + 1).tolist())
    places = np.zeros((len(choices.tops), *combinations.shape[1:]), int)
    places[free] = combinations
    fits = budget.fits(choices, places)
    # What fits with one size larger is not looked at: that loses no more.
    larger = np.zeros_like(fits)
    for axis in range(fits.ndim):
        before, after = np.moveaxis(larger, axis, 0), np.moveaxis(fits, axis, 0)
        before[:-1] |= after[1:]
    found = places[:, fits & ~larger]
    return [found[:, number] for number in np.argsort(choices.loss(found), kind="stable")[:count]]


# --- The search --------------------------------------------------------------------------------------------


def _searched(choices: Choices, budget: Budget) -> np.ndarray:
    """Remove by importance for each unit of the budget, put back what fits, and exchange while that helps."""
    places = _restored(choices, budget, _removed(choices, budget))
    for part in _PARTS:
        steps = np.maximum(1, choices.tops // part)
        while (exchanged := _exchanged(choices, budget, places, steps)) is not None:
            places = _restored(choices, budget, exchanged)
    return places


def _removed(choices: Choices, budget: Budget) -> np.ndarray:
    places = choices.tops
    steps = np.maximum(1, choices.tops // _PARTS[0])
    while (now := np.maximum(budget.shares(choices, places), FITS)).max() > FITS:
        able = np.flatnonzero(places)
        moved = _moved(places, able, np.maximum(places - steps, 0)[able])
        # What goes below a limit saves nothing more.
        saved = (now[:, None] - np.maximum(budget.shares(choices, moved), FITS)).sum(axis=0)
        lost = choices.loss(moved) - choices.loss(places)
        price = np.where(saved > 0, lost / np.where(saved > 0, saved, 1), np.inf)
        places = moved[:, np.lexsort((-saved, price))[0]]
    return places


def _restored(choices: Choices, budget: Budget, places: np.ndarray) -> np.ndarray:
    while True:
        able = np.flatnonzero(places < choices.tops)
        moved = _moved(places, able, places[able] + 1)
        shares = budget.shares(choices, moved)
        fits = (shares <= FITS).all(axis=0)
        if not fits.any():
            return places
        moved, taken = moved[:, fits], (shares[:, fits] - budget.shares(choices, places)[:, None]).sum(axis=0)
        won = choices.loss(places) - choices.loss(moved)
        places = moved[:, np.argmax(won / np.maximum(taken, np.finfo(float).tiny))]


def _exchanged(choices: Choices, budget: Budget, places: np.ndarray, steps: np.ndarray) -> np.ndarray | None:
    """Places of less loss, where one group is larger and another smaller; None where no exchange helps."""
    least = choices.loss(places)
    every = np.arange(len(places))
    for larger in np.flatnonzero(places < choices.tops):
        tried = []
        for up, down in _EXCHANGES:
            raised = places[larger] + up * steps[larger]
            others = every[(every != larger) & (places >= down * steps)]
            if raised <= choices.tops[larger] and len(others):
                moved = _moved(places, others, places[others] - down * steps[others])
                moved[larger] = raised
                tried.append(moved)
        if not tried:
            continue
        moved = np.concatenate(tried, axis=1)
        losses = choices.loss(moved)
        better = losses < least * (1 - _GAIN)
        moved, losses = moved[:, better], losses[better]
        fits = budget.fits(choices, moved)
        if fits.any():
            return moved[:, fits][:, np.argmin(losses[fits])]
    return None


_EXCHANGES = [(up, down) for up in _TIMES for down in _TIMES if 1 in (up, down)]
"""Steps up of one group, and down of another."""


def _moved(places: np.ndarray, rows: np.ndarray, to: np.ndarray) -> np.ndarray:
    """[n, rows]: the places with one of them changed in each column."""
    moved = np.repeat(places[:, None], len(rows), axis=1)
    moved[rows, np.arange(len(rows))] = to
    return moved
