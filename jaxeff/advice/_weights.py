"""Single weights: which criterion orders them best, how far each layer goes alone, and all layers at once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import importance
from jaxeff.advice import _allocations as allocations
from jaxeff.advice._masked import Measure, Removable, Removed, kept
from jaxeff.advice._runs import Runs
from jaxeff.advice._search import Point, Search, farthest, farthest_setting, improve
from jaxeff.importance import Criterion
from jaxeff.importance._orders import orders
from jaxeff.model.params import Params
from jaxeff.prune import Layout, Sensitivity, Unstructured
from jaxeff.prune._layouts import Axes, layer_names
from jaxeff.statistics import Statistics

POINTS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_ALONE = 84  # runs for layers pruned alone
_STEPS = 6  # of each bisection
CONTROL = "random"


@functools.partial(jax.jit, static_argnums=0)
def scored(
    criteria: tuple[Criterion, ...], params: Params, statistics: Statistics
) -> list[dict[str, jax.Array]]:
    """Return the scores of all weights by each criterion, in one program."""
    return [importance.scores(params, statistics, criterion) for criterion in criteria]


@jax.jit
def finite(scores: list[dict[str, jax.Array]]) -> list[jax.Array]:
    """Return whether all scores of each criterion are finite."""
    return [jnp.stack([jnp.all(jnp.isfinite(score)) for score in each.values()]).all() for each in scores]


def spread(number: int) -> tuple[float, ...]:
    """Return some of the fractions to measure, each from the middle of its share of them.

    Fractions near 0 and 1 tell layers apart least.

    >>> spread(2), spread(4)
    ((0.5, 0.95), (0.3, 0.7, 0.9, 0.99))
    """
    return tuple(POINTS[int((i + 0.5) * len(POINTS) / number)] for i in range(number))


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """The layers that may lose single weights.

    Attributes:
        paths: of their leaves.
        stacks: for each leaf, the axes over which it stacks layers.
        names: of the layers, as in a report.
        shapes: of the layers.
        sizes: [layers], weights of each.
        scores: by criterion, one array per leaf.
    """

    paths: tuple[str, ...]
    stacks: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: np.ndarray
    scores: Mapping[str, list[jax.Array]]

    @classmethod
    def of(cls, params: Params, layout: Layout, scores: Mapping[str, Mapping[str, jax.Array]]) -> Layers:
        known = next(iter(scores.values()))
        leaves = [leaf for leaf in layout.leaves if leaf.prunable and leaf.path in known]
        axes = [leaf.axes or Axes() for leaf in leaves]
        names = [
            layer_names(leaf.path, leaf.shape, own.layers) for leaf, own in zip(leaves, axes, strict=True)
        ]
        shapes = [
            tuple(size for axis, size in enumerate(leaf.shape) if axis not in own.layers)
            for leaf, own, layers in zip(leaves, axes, names, strict=True)
            for _ in layers
        ]
        return cls(
            tuple(leaf.path for leaf in leaves),
            tuple(own.layers for own in axes),
            tuple(name for layers in names for name in layers),
            tuple(shapes),
            np.array([math.prod(shape) for shape in shapes], np.float64),
            {name: [each[leaf.path] for leaf in leaves] for name, each in scores.items()},
        )

    def curves(self, criterion: str) -> np.ndarray:
        """Return [layers, quantiles] of the scores."""
        found = allocations.quantiles(self.stacks, self.scores[criterion])
        return np.concatenate([np.asarray(each, np.float64) for each in found])


class WeightSearch:
    """The search among single weights, stage by stage. What it has so far can be read at any time.

    Attributes:
        reached: the farthest fraction of each criterion and allocation.
        sensitivity: losses of each layer alone.
        alone: by layer, the largest measured fraction up to which it alone stays within the tolerance.
        search: the points that were tried, and the best of them.
    """

    def __init__(
        self,
        layers: Layers,
        losses: Measure,
        removable: Removable,
        without: Removed,
        runs: Runs,
        *,
        allowed: float,
        dense: float,
    ):
        self.layers, self.runs = layers, runs
        self._losses, self._removable, self._without = losses, removable, without
        ones = np.ones(len(layers.sizes))
        self.search = Search(
            self._loss, layers.sizes, ones, layers.sizes, allowed=allowed, dense=dense, control=CONTROL
        )
        self.reached: dict[str, float] = {}
        self.starts: dict[str, float] = {}
        self.sensitivity: Sensitivity | None = None
        self.measured: list[int] = []
        self.alone: dict[str, float] = {}
        self._ordered: tuple[str, list[jax.Array]] | None = None

    def orders(self, criterion: str) -> list[jax.Array]:
        """The order of a criterion. One is kept, as each takes as much memory as the weights."""
        if self._ordered is None or self._ordered[0] != criterion:
            self._ordered = criterion, orders(self.layers.stacks, self.layers.scores[criterion])
        return self._ordered[1]

    def removed(self, point: Point) -> Removed:
        return self._removed(point.counts, point.setting)

    def masks(self, point: Point) -> dict[str, jax.Array]:
        """Return masks by path, True = kept."""
        counts = point.counts.astype(np.int32)
        found = kept(self.layers.stacks, self.orders(point.setting), counts)
        return dict(zip(self.layers.paths, found, strict=True))

    def _removed(self, counts: np.ndarray, criterion: str) -> Removed:
        return dataclasses.replace(
            self._without, orders=self.orders(criterion), counts=counts.astype(np.int32)
        )

    def _loss(self, counts: np.ndarray, criterion: str) -> tuple[float, float]:
        self.runs.spend()
        return self._losses(self._removable, self._removed(counts, criterion))

    @property
    def criterion(self) -> str:
        """The one whose order goes farthest; at equal fractions, the one with the lower losses."""
        known = {name: reached for name, reached in self.reached.items() if name != CONTROL}
        if known:
            return farthest_setting(self.search, known)
        return next(name for name in self.layers.scores if name != CONTROL)

    def compare_criteria(self) -> None:
        """Bisect along each criterion's order, in each layer alike and over all layers; and at random."""
        sizes = self.layers.sizes
        for name in self.layers.scores:
            with self.runs.at_most(2 * _STEPS):
                self._start("uniform", name, allocations.uniform(sizes))
                if name != CONTROL:
                    curves = self.layers.curves(name)
                    self._start("global", name, allocations.by_score(sizes, np.ones(len(sizes)), curves))

    def _start(self, start: str, criterion: str, family: allocations.Family) -> None:
        found = farthest(self.search, family, start, _STEPS, criterion)
        fraction = 0.0 if found is None else found.fraction
        self.reached[criterion] = max(self.reached.get(criterion, 0.0), fraction)
        if criterion != CONTROL:
            self.starts[start] = max(self.starts.get(start, 0.0), fraction)

    def measure_alone(self) -> None:
        """Prune each layer alone; where there are too many, the largest."""
        sizes, criterion = self.layers.sizes, self.criterion
        number = int(np.clip(_ALONE // len(sizes), 2, len(POINTS)))
        points = spread(number)
        largest = np.argsort(-sizes, kind="stable")[: _ALONE // number]
        losses: list[list[tuple[float, float]]] = []
        with self.runs.at_most(_ALONE):
            for layer in sorted(largest.tolist()):
                row = []
                for point in points:
                    counts = np.zeros(len(sizes))
                    counts[layer] = np.round(point * sizes[layer])
                    row.append(self._loss(counts, criterion))
                losses.append(row)
                self.measured.append(layer)
                within = np.logical_and.accumulate([bound <= self.search.allowed for _, bound in row])
                self.alone[self.layers.names[layer]] = (0.0, *points)[int(within.sum())]
                self.sensitivity = Sensitivity(
                    tuple(self.layers.names[i] for i in self.measured),
                    tuple(int(sizes[i]) for i in self.measured),
                    points,
                    criterion,
                    Unstructured(),
                    jnp.asarray(np.array(losses, np.float32)[..., 0]),
                    jnp.asarray(self.search.dense, jnp.float32),
                )

    def start_from_allocations(self) -> None:
        """Bisect along the allocations that are not an order of scores."""
        layers, criterion = self.layers, self.criterion
        ones = np.ones(len(layers.sizes))
        families = {
            "erk": allocations.erk(layers.sizes, layers.shapes),
            "lamp": allocations.by_score(layers.sizes, ones, allocations.lamp(layers.curves(criterion))),
        }
        if self.sensitivity is not None:
            families["sensitivity"] = allocations.by_rise(layers.sizes, self.measured, self.sensitivity)
        for name, family in families.items():
            with self.runs.at_most(_STEPS):
                self._start(name, criterion, family)

    def improve(self, runs: int, rng: np.random.Generator) -> None:
        """Move sparsity between layers, from the best point that was found."""
        if len(self.layers.sizes) > 1 or self.search.best.fraction:
            with self.runs.at_most(runs):
                improve(self.search, rng)
