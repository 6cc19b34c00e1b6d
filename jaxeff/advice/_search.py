"""How much of each part may go at once: bisection along an allocation, then a local search.

A part is a layer, or a group of units; the loss is measured with all parts pruned together, since losses of
parts pruned alone do not add up.

References:
    Sieberling, Kuznedelev, Kurtic and Alistarh, EvoPress: Towards Optimal Dynamic Model Compression via
    Evolutionary Search, 2024, arXiv:2410.14649
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxeff.advice._allocations import Family


@dataclasses.dataclass(frozen=True)
class Point:
    """What was tried.

    Attributes:
        start: the allocation that it comes from.
        counts: [parts], elements removed.
        fraction: of everything, removed.
        loss: the mean over the examples of the search.
        bound: a standard error above it, which has to stay within the tolerance.
        setting: by which criterion elements went.
        searched: whether it is a step of the local search.
    """

    start: str
    counts: np.ndarray
    fraction: float
    loss: float
    bound: float
    setting: Any = None
    searched: bool = False


class Search:
    """The best point so far, of all that were tried.

    Args:
        loss: of counts and a setting, the mean loss and its bound.
        sizes: [parts], elements of each.
        values: [parts], what an element of each counts.
        most: [parts], how many elements may go.
        allowed: the largest acceptable loss.
        dense: the loss with nothing removed.
        control: a setting whose points are never the best.
    """

    def __init__(
        self,
        loss: Callable[[np.ndarray, Any], tuple[float, float]],
        sizes: np.ndarray,
        values: np.ndarray,
        most: np.ndarray,
        *,
        allowed: float,
        dense: float,
        control: Any = None,
    ):
        self._control = control
        self._loss = loss
        self.sizes, self.values, self.most, self.allowed = sizes, values, most, allowed
        self.dense, self._known = dense, dict[Any, tuple[float, float]]()
        self.best = Point("nothing", np.zeros(len(sizes)), 0.0, dense, dense)
        self.tried: list[Point] = []

    def fraction(self, counts: np.ndarray) -> float:
        return float(counts @ self.values / (self.sizes @ self.values))

    def try_(self, counts: np.ndarray, start: str, setting: Any = None, *, searched: bool = False) -> Point:
        """Measure the loss, once for the same counts."""
        counts = np.clip(counts, 0, self.most)
        key = counts.astype(np.int64).tobytes(), setting
        if key not in self._known:
            self._known[key] = self._loss(counts, setting) if counts.any() else (self.dense, self.dense)
        point = Point(start, counts, self.fraction(counts), *self._known[key], setting, searched)
        self.tried.append(point)
        may = self._control is None or setting != self._control
        if may and self.fits(point) and point.fraction > self.best.fraction:
            self.best = point
        return point

    def fits(self, point: Point) -> bool:
        # False for nan.
        return point.bound <= self.allowed


def farthest(search: Search, family: Family, start: str, steps: int, setting: Any = None) -> Point | None:
    """Bisect for the largest fraction that an allocation may remove.

    Returns:
        The farthest point that fits; None if none of those tried does.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        point = search.try_(family(middle), start, setting)
        if search.fits(point):
            low, best = middle, point
        else:
            high = middle
    return best


def farthest_setting(search: Search, reached: Mapping[str, float]) -> str:
    """Return the setting that reaches the most; at equal fractions, the one with the lower losses."""

    def rank(name: str) -> tuple[float, float]:
        losses = [point.loss for point in search.tried if point.setting == name]
        return reached[name], -float(np.sum(np.nan_to_num(losses, nan=np.inf))) / max(len(losses), 1)

    return max(reached, key=rank)


_FIRST_STEP, _LONGER, _SHORTER = 0.25, 1.5, 0.6
_SHORTEST = 0.002  # of everything
_RETURNED = 0.7  # of what one part loses, at most, that another gets back


def improve(search: Search, rng: np.random.Generator) -> None:
    """Move sparsity between parts from the best point on, until the runs are spent or no step is left.

    A step removes a share of what one part keeps, and in every second try gives part of it back to another, so
    that each step removes more in all. Steps that fit grow, others shrink.
    """
    steps = np.full(len(search.sizes), _FIRST_STEP)
    total = search.sizes @ search.values
    turn = 0
    while True:
        best = search.best
        kept = (search.most - best.counts) * search.values
        # A part that keeps little has little to give; steps below one element are none.
        amounts = np.where(kept > 0, np.maximum(steps * kept, search.values), 0)
        amounts = np.where(steps * kept < _SHORTEST * total, 0, amounts)
        if not amounts.any():
            return
        part = int(rng.choice(len(amounts), p=amounts / amounts.sum()))
        counts = best.counts.copy()
        lost = max(1.0, np.round(amounts[part] / search.values[part]))
        counts[part] = min(counts[part] + lost, search.most[part])
        others = np.flatnonzero((best.counts > 0) & (np.arange(len(counts)) != part))
        if turn % 2 and len(others):
            other = int(rng.choice(others))
            back = rng.uniform(0.2, _RETURNED) * (counts[part] - best.counts[part]) * search.values[part]
            counts[other] = max(0.0, counts[other] - np.floor(back / search.values[other]))
        turn += 1
        point = search.try_(counts, best.start, best.setting, searched=True)
        fits = search.best is point
        steps[part] = min(steps[part] * (_LONGER if fits else _SHORTER), 0.9)
