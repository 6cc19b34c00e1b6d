"""Whole units, channels, heads and blocks: which go, and how many of each group at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxeff.advice import _allocations as allocations
from jaxeff.advice._masked import Measure, Removable, Removed
from jaxeff.advice._runs import Runs
from jaxeff.advice._search import Point, Search, farthest, farthest_setting, improve
from jaxeff.prune import Group, Groups, Plan

_STEPS = 5  # of each bisection
_BLOCKS = 32  # blocks, at most, that are removed one by one to rank them
_BLOCK, _LEFT_WHOLE = "block", ("head_size",)


def may_go(groups: Groups) -> tuple[Group, ...]:
    """Return the groups whose elements the search removes.

    No module can be built with heads of other sizes, weights of 0 do not keep a router from choosing an expert, and
    blocks in a row have no members to mask.
    """
    return tuple(
        group
        for group in groups.unlocked
        if group.kind not in _LEFT_WHOLE and not group.routed and group.size > 1 and group.members
    )


class UnitSearch:
    """The search among the elements of groups. What it has so far can be read at any time.

    Attributes:
        groups: those that may lose elements.
        search: the points that were tried, and the best of them.
        starts: the farthest fraction of each allocation.
        unscored: names of the groups that stay whole, as nothing tells their elements apart.
    """

    def __init__(
        self,
        found: Groups,
        losses: Measure,
        removable: Removable,
        without: Removed,
        runs: Runs,
        *,
        allowed: float,
        dense: float,
    ):
        self.found, self.groups, self.runs = found, may_go(found), runs
        self._losses, self._removable, self._without = losses, removable, without
        sizes = np.array([group.size for group in self.groups], np.float64)
        values = np.array([found.weights(group) for group in self.groups], np.float64)
        self.search = Search(self._loss, sizes, values, sizes - 1, allowed=allowed, dense=dense)
        self.starts: dict[str, float] = {}
        self.unscored: set[str] = set()
        self._ranks: dict[str, list[np.ndarray]] = {}
        self._curves: dict[str, np.ndarray] = {}
        self._reached: dict[str, float] = {}

    @property
    def blocks(self) -> np.ndarray:
        return np.array([group.kind == _BLOCK for group in self.groups])

    def score(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Score the elements by each criterion; blocks by the loss without each of them."""
        of_blocks = {
            index: self._without_each(index)
            for index, group in enumerate(self.groups)
            if group.kind == _BLOCK and group.size <= _BLOCKS
        }
        some = dataclasses.replace(self.found, groups=self.groups)
        for name, each in scores.items():
            importances = []
            for index, group in enumerate(some.scored(each, normalize="mean").groups):
                importance = of_blocks.get(index, group.importance)
                if importance is None or (group.kind == _BLOCK and index not in of_blocks):
                    self.search.most[index] = 0
                    self.unscored.add(group.name)
                    importance = np.zeros((*group.blocks, group.size))
                importances.append(importance)
            self._ranks[name] = [
                np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in importances
            ]
            self._curves[name] = _curves(importances)

    def _without_each(self, index: int) -> np.ndarray:
        """The loss without each block, from the lowest, 0; nan is the worst."""
        group = self.groups[index]
        losses = np.full(group.size, np.inf)
        with self.runs.at_most(group.size):
            for block in range(group.size):
                elements = self._none()
                elements[index] = np.arange(group.size) == block
                losses[block], _ = self._measured(elements)
        losses = np.where(np.isnan(losses), np.inf, losses)
        return losses - min(losses.min(), self.search.dense) if np.isfinite(losses).all() else _ranked(losses)

    def _none(self) -> list[np.ndarray]:
        return [np.zeros((*group.blocks, group.size), bool) for group in self.groups]

    def _measured(self, elements: list[np.ndarray]) -> tuple[float, float]:
        self.runs.spend()
        return self._losses(self._removable, dataclasses.replace(self._without, elements=elements))

    def _elements(self, counts: np.ndarray, criterion: str) -> list[np.ndarray]:
        return [rank < count for rank, count in zip(self._ranks[criterion], counts, strict=True)]

    def _loss(self, counts: np.ndarray, criterion: str) -> tuple[float, float]:
        return self._measured(self._elements(counts, criterion))

    def removed(self, point: Point) -> Removed:
        return dataclasses.replace(self._without, elements=self._elements(point.counts, point.setting))

    def plan(self, point: Point) -> Plan:
        elements = self._elements(point.counts, point.setting)
        return Plan.of(
            self.found,
            {
                group.name: _listed(gone)
                for group, gone in zip(self.groups, elements, strict=True)
                if gone.any()
            },
        )

    def start(self) -> None:
        """Bisect along allocations: each group alike by each criterion, one order over all, blocks alone."""
        sizes, values = self.search.sizes, self.search.values
        width = np.where(self.blocks, 0, sizes)
        if width.any():
            for name in self._ranks:
                self._start("uniform", name, allocations.uniform(width))
            best = self._best()
            family = allocations.by_score(width, values, self._curves[best])
            self._start("global", best, family)
        if self.blocks.any():
            self._start("blocks", self._best(), allocations.uniform(sizes - width))

    def _best(self) -> str:
        return farthest_setting(self.search, self._reached) if self._reached else next(iter(self._ranks))

    def _start(self, start: str, criterion: str, family: allocations.Family) -> None:
        _ = self._reached.setdefault(criterion, 0.0)  # also where no run is left to find more
        with self.runs.at_most(_STEPS):
            found = farthest(self.search, family, start, _STEPS, criterion)
            fraction = 0.0 if found is None else found.fraction
            self.starts[start] = max(self.starts.get(start, 0.0), fraction)
            self._reached[criterion] = max(self._reached.get(criterion, 0.0), fraction)

    def improve(self, runs: int, rng: np.random.Generator) -> None:
        """Move removals between groups, from the best point that was found."""
        with self.runs.at_most(runs):
            if not self.search.best.fraction:
                self.search.best = dataclasses.replace(self.search.best, setting=self._best())
            improve(self.search, rng)

    def kinds(self, point: Point) -> dict[str, tuple[int, int]]:
        """Removed and total by kind, in all blocks."""
        kinds: dict[str, tuple[int, int]] = {}
        for group, count in zip(self.groups, point.counts, strict=True):
            if group.name in self.unscored:
                continue
            copies = math.prod(group.blocks)
            removed, total = kinds.get(group.kind, (0, 0))
            kinds[group.kind] = removed + int(count) * copies, total + group.size * copies
        return kinds


def _curves(importances: list[np.ndarray]) -> np.ndarray:
    """[groups, quantiles], ascending; blocks lose equally many, so their lowest count together, by their mean."""
    rows = [np.sort(each).reshape(-1, each.shape[-1]).mean(0) for each in importances]
    places = np.linspace(0, 1, 129)
    return np.stack([row[np.round(places * (len(row) - 1)).astype(int)] for row in rows])


def _ranked(losses: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(losses, kind="stable"), kind="stable").astype(np.float64)


def _listed(gone: np.ndarray) -> Any:
    """The elements of each block, nested as a plan has them."""
    if gone.ndim == 1:
        return np.flatnonzero(gone).tolist()
    return [_listed(block) for block in gone]
