"""A search from its beginning to its result, one stage after the other."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxeff._analyze import analyze
from jaxeff._collect import Run, prepare
from jaxeff.advice._advice import Advice
from jaxeff.advice._interval import mean_and_bound, rise
from jaxeff.advice._masked import Removable, Removed, group_members
from jaxeff.advice._problem import FEWEST, HELD_OUT, Evaluated, Examples, Problem, Rows
from jaxeff.advice._records import LayerAdvice, Removal, Tried
from jaxeff.advice._runs import Runs
from jaxeff.advice._search import Point, Search
from jaxeff.advice._units import UnitSearch, may_go
from jaxeff.advice._weights import CONTROL, Layers, WeightSearch, finite, scored
from jaxeff.importance import Criterion
from jaxeff.model.params import Params
from jaxeff.model.roles import whole_numbers
from jaxeff.prune import BeforeAndAfter, Groups, Layout, Plan, before_and_after, compact, groups
from jaxeff.prune._layouts import of_statistics
from jaxeff.prune._sensitivity import check_dense
from jaxeff.report import Report
from jaxeff.statistics import Statistics

_REPEATS, _WARMUP = 10, 3
TIMING = 2 * (_REPEATS + _WARMUP)
"""Forward passes that timing takes."""
_AT_THE_END = TIMING + 3
_UNITS = 70  # runs, of those that the weights leave, for units
_GRADIENT = 3
# Forward passes for a quantity of which random signs are drawn; any other takes a gradient.
_OF_QUANTITY = {"hessian": 16 * 6, "gauss_newton": 16 * 5}


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """The arguments of a search, checked.

    Attributes:
        params: as the user has them.
        searched: examples to search with.
        measured: other examples; None with `evaluate`.
    """

    params: Any
    apply_fn: Callable
    searched: Examples
    measured: Examples | None
    loss_fn: Callable | None
    evaluate: Callable[[Any, Callable], Any] | None
    tolerance: float
    criteria: tuple[Criterion, ...]
    seed: int
    rngs: Any
    keywords: Mapping[str, Any]


class Task:
    """The stages of a search, and what they found so far."""

    def __init__(self, given: Given, runs: Runs):
        self.given, self.runs = given, runs
        self.notes: list[str] = []
        self._began = time.monotonic()
        self._params = Params.of(given.params)
        self._problem = self._bind(given.searched)
        if given.evaluate is None and not self._problem.gives_each_example:
            raise ValueError(
                "`loss_fn` returned the mean loss: an interval needs one loss for each example, an array of shape "
                f"({given.searched.count},), or ({given.searched.count}, ...) to average over the rest. Leave out "
                "the last `jnp.mean`, or pass `evaluate`"
            )
        self._statistics, self._scores = self._scored()
        layout = of_statistics(self._statistics, self._params.named)
        self._layers = Layers.of(self._params, self._without_tables(layout), self._scores)
        if not self._layers.names:
            raise ValueError(
                f"`params` hold no weights to prune: {', '.join(self._params.paths)}."
                f"{whole_numbers(self._params.described())}{''.join(f' {note}' for note in self.notes)}"
            )
        self._groups = self._removable_groups()
        self._begin()
        self.units: UnitSearch | None = None
        self._timed: BeforeAndAfter | None = None

    def _bind(self, examples: Examples) -> Problem:
        given = self.given
        return Problem.bind(self._params, given.apply_fn, examples, given.loss_fn, given.rngs, given.keywords)

    def _scored(self) -> tuple[Statistics, dict[str, dict[str, Any]]]:
        """Run the model for its statistics, and score all weights by all criteria and at random."""
        given = self.given
        examples = given.searched
        run = self._prepared(given.criteria)
        criteria = run.criteria
        quantities = {quantity for criterion in criteria for quantity, _ in criterion.needs}
        forwards = 1 + sum(_OF_QUANTITY.get(quantity, _GRADIENT) for quantity in quantities)
        self.runs.spend(forwards, always=True)
        statistics = run.statistics(examples.batch, examples.targets, jax.random.key(given.seed))
        found = scored(criteria, self._params, statistics)
        whole = finite(found)
        scores = {c.name: each for c, each, ok in zip(criteria, found, whole, strict=True) if bool(ok)}
        for criterion in criteria:
            if criterion.name not in scores:
                self.notes.append(f"Scores by {criterion.name} are not finite, and were left out.")
        if not scores:
            check_dense(
                jax.numpy.asarray(np.nan),
                {"params": self._params.tree, "batch": examples.batch, "targets": examples.targets},
            )
        return statistics, {**scores, CONTROL: _at_random(next(iter(scores.values())), given.seed)}

    def _without_tables(self, layout: Layout) -> Layout:
        """Leave tables whole that are only looked up: rows that no example reads would go at no cost."""
        uses: dict[str, set[str]] = {}
        for site in self._statistics.sites:
            uses.setdefault(site.path, set()).add(site.kind)
        tables = {
            leaf.path for leaf in layout.leaves if leaf.prunable and uses.get(leaf.path) == {"embedding"}
        }
        self.notes += [
            f"No single weights of {path} go: it is only looked up, and examples say nothing of rows that none of "
            "them reads."
            for path in sorted(tables)
        ]
        leaves = [
            dataclasses.replace(leaf, prunable=leaf.prunable and leaf.path not in tables)
            for leaf in layout.leaves
        ]
        return Layout(tuple(leaves))

    def _prepared(self, criteria: tuple[Criterion, ...]) -> Run:
        given = self.given
        try:
            return prepare(
                self._params, given.apply_fn, given.searched.batch, criteria, given.loss_fn,
                given.searched.targets, given.rngs, given.keywords,
            )  # fmt: skip
        except ValueError as error:
            # Some models take no batch of one, as the gradient of each example asks for.
            rest = tuple(each for each in criteria if not _takes_single_examples(each))
            if not rest or len(rest) == len(criteria):
                raise
            left_out = ", ".join(each.name for each in criteria if each not in rest)
            self.notes.append(f"Without {left_out}, which runs single examples: {_sentence(error)}")
            return self._prepared(rest)

    def _removable_groups(self) -> Groups | None:
        given = self.given
        try:
            found = groups(
                given.params, given.apply_fn, given.searched.batch, rngs=given.rngs, **given.keywords
            )
        except ValueError as error:
            self.notes.append(f"Whole units were left out: {_sentence(error)}")
            return None
        if not may_go(found):
            self.notes.append("No units can be removed: print(jaxeff.prune.groups(...)) says why.")
            return None
        return found

    def _begin(self) -> None:
        """Measure the whole model, from which the tolerance is told."""
        given, leaves = self.given, self._problem.leaves
        chosen = [] if self._groups is None else may_go(self._groups)
        self._removable = Removable(
            tuple(
                (leaves[path], axes)
                for path, axes in zip(self._layers.paths, self._layers.stacks, strict=True)
            ),
            tuple(group_members(group, leaves) for group in chosen),
        )
        orders = [jax.numpy.zeros_like(score, np.int32) for score in next(iter(self._layers.scores.values()))]
        self._without = Removed(
            orders,
            np.zeros(len(self._layers.sizes), np.int32),
            [[member.indices for member in group.members] for group in chosen],
            [np.zeros((*group.blocks, group.size), bool) for group in chosen],
        )
        searched: Any = self._problem
        self._held: Any = None
        if given.evaluate is not None:
            searched = Evaluated(self._problem, given.apply_fn, given.evaluate)
        self.runs.spend(always=True)
        dense = searched.losses(self._removable, self._without)
        if given.evaluate is not None and dense.ndim:
            if len(dense) < FEWEST:
                raise ValueError(
                    f"`evaluate` returned scores of {len(dense)} examples, of which a quarter is set aside: score at "
                    f"least {FEWEST}, or return one number"
                )
            order = np.random.default_rng(given.seed).permutation(len(dense))
            held = np.sort(order[: len(dense) // HELD_OUT])
            rest = np.sort(order[len(dense) // HELD_OUT :])
            self._held, searched, dense = Rows(searched, held), Rows(searched, rest), dense[rest]
        self._count = len(dense) if dense.ndim else 1
        self._searched, self._dense, self.dense = searched, dense, float(np.mean(dense))
        check_dense(
            jax.numpy.asarray(self.dense),
            {"params": self._params.tree, "batch": given.searched.batch, "targets": given.searched.targets},
        )
        relative = given.evaluate is None
        if relative and self.dense == 0:
            self.notes.append(
                "The dense loss is 0, of which no fraction is above 0: pass `evaluate`, whose tolerance is absolute."
            )
        if (classes := _only_class(given.searched.targets)) is not None:
            self.notes.append(
                f"All targets are {classes}: a loss on one class says little of what the network can do."
            )
        self._allowed = self.dense + given.tolerance * (abs(self.dense) if relative else 1.0)
        self.weights = WeightSearch(
            self._layers, self._measure, self._removable, self._without, self.runs, **self._bounds
        )

    def _measure(self, removable: Removable, removed: Removed) -> tuple[float, float]:
        """The mean loss without what is removed, and its bound."""
        pruned = self._searched.losses(removable, removed)
        return mean_and_bound(self._dense, pruned, relative=self._relative)

    @property
    def _bounds(self) -> dict[str, float]:
        return {"allowed": self._allowed, "dense": self.dense}

    def search(self) -> None:
        """Run all stages. May be interrupted anywhere; what was found stays."""
        rng = np.random.default_rng(self.given.seed)
        with self.runs.keeping(_AT_THE_END):
            self.weights.compare_criteria()
            self.weights.measure_alone()
            self.weights.start_from_allocations()
            self.weights.improve(self.runs.left - (_UNITS if self._groups else 0), rng)
            if self._groups is not None:
                self.units = UnitSearch(
                    self._groups, self._measure, self._removable, self._without, self.runs, **self._bounds
                )
                criteria = [name for name in self._scores if name != CONTROL]
                self.units.score({name: self._scores[name] for name in criteria})
                self.notes += [
                    f"{name} stays whole: no criterion scores it." for name in sorted(self.units.unscored)
                ]
                self.units.start()
                self.units.improve(self.runs.left, rng)
        self._time()

    def _time(self) -> None:
        """Time the smaller network beside the large one, on the examples that the search did not see."""
        plan = self._plan()
        if plan is None:
            return
        given = self.given
        batch = (given.measured or given.searched).batch
        try:
            small = compact(given.params, given.apply_fn, batch, plan, rngs=given.rngs, **given.keywords)
        except ValueError as error:
            self.notes.append(f"The smaller network was not timed: {_sentence(error)}")
            return
        self.runs.spend(TIMING, always=True)
        self._timed = before_and_after(
            (given.params, given.apply_fn),
            small,
            [batch],
            repeats=_REPEATS,
            rngs=given.rngs,
            **given.keywords,
        )

    def _plan(self) -> Plan | None:
        if self.units is None or not self.units.search.best.fraction:
            return None
        return self.units.plan(self.units.search.best)

    def advice(self, interrupted: str | None) -> Advice:
        """Measure what was found on the examples that the search did not see."""
        given = self.given
        if given.measured is not None:
            self._held = self._bind(given.measured)
        best = self.weights.search.best
        weights = units = masks = None
        dense: Any = None
        if best.fraction or self._plan() is not None:
            dense = self._on_held_out(self._without)
        if best.fraction:
            weights = Removal(
                "weights", int(best.counts.sum()), int(self._layers.sizes.sum()), best.setting, best.start,
                self.weights.starts, self._rise_of(best), self._rise(dense, self.weights.removed(best)),
            )  # fmt: skip
            masks = self._masks(best)
        plan = self._plan()
        if self.units is not None and plan is not None:
            chosen = self.units.search.best
            kinds = self.units.kinds(chosen)
            units = Removal(
                "units", sum(removed for removed, _ in kinds.values()), sum(total for _, total in kinds.values()),
                chosen.setting, chosen.start, self.units.starts, self._rise_of(chosen),
                self._rise(dense, self.units.removed(chosen)), kinds, self._timed,
            )  # fmt: skip
        elif self.units is not None and self.units.search.tried:
            self.notes.append("No units can be removed within the tolerance.")
        elif self._groups is not None and not interrupted:
            self.notes.append(
                "Whole units were left out: no forward passes were left for them. Raise `max_runs`."
            )
        criterion = best.setting or self.weights.criterion
        return Advice(
            weights, units, self._rows(), self.weights.sensitivity, self.weights.reached, self._tried(),
            self.dense, given.tolerance, given.evaluate is not None, self._count, self._held_count(dense),
            self.runs.count, time.monotonic() - self._began, interrupted, tuple(self.notes),
            masks, plan, functools.partial(_report, given.params, self._statistics, criterion),
        )  # fmt: skip

    def _on_held_out(self, removed: Removed) -> np.ndarray:
        self.runs.spend(always=True)
        return (self._held or self._searched).losses(self._removable, removed)

    def _held_count(self, dense: np.ndarray | None) -> int:
        if self._held is None:
            return 0
        return self.given.measured.count if self.given.measured is not None else len(self._held.rows)

    def _rise(self, dense: np.ndarray, removed: Removed) -> Any:
        pruned = self._on_held_out(removed)
        return rise(dense, pruned, relative=self._relative, seed=self.given.seed)

    def _rise_of(self, point: Point) -> float:
        return (point.loss - self.dense) / (abs(self.dense) if self._relative else 1.0)

    @property
    def _relative(self) -> bool:
        return self.given.evaluate is None and self.dense != 0

    def _masks(self, point: Point) -> Any:
        found = self.weights.masks(point)
        leaves = [found.get(path, jax.numpy.asarray(True)) for path in self._params.paths]
        tree = jax.tree.unflatten(jax.tree.structure(self._params.tree), leaves)
        if not self._params.is_variables:
            return tree
        others = jax.tree.map(lambda leaf: jax.numpy.asarray(True), dict(self.given.params))
        return {**others, "params": tree}

    def _rows(self) -> tuple[LayerAdvice, ...]:
        layers, best = self._layers, self.weights.search.best
        criterion = best.setting or self.weights.criterion
        alone = self.weights.alone
        rows = [
            LayerAdvice(name, "weights", int(size), criterion, alone.get(name), _share(best, count, size))
            for name, size, count in zip(layers.names, layers.sizes, best.counts, strict=True)
        ]
        if self.units is not None and self.units.search.tried:
            chosen = self.units.search.best
            rows += [
                LayerAdvice(
                    group.name,
                    group.kind,
                    group.size * math.prod(group.blocks),
                    chosen.setting or "",
                    None,
                    _share(chosen, count, group.size),
                )  # fmt: skip
                for group, count in zip(self.units.groups, chosen.counts, strict=True)
                if group.name not in self.units.unscored
            ]
        return tuple(rows)

    def _tried(self) -> tuple[Tried, ...]:
        searches: list[tuple[str, Search]] = [("weights", self.weights.search)]
        if self.units is not None:
            searches.append(("units", self.units.search))
        return tuple(
            Tried(
                what,
                point.start,
                point.setting,
                point.fraction,
                point.loss,
                point.bound,
                point.searched,
            )  # fmt: skip
            for what, search in searches
            for point in search.tried
        )


def _sentence(error: ValueError) -> str:
    return f"{str(error).rstrip('.')}."


def _at_random(like: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return scores that know nothing. NumPy draws them: as a program they would take longest to compile."""
    rng = np.random.default_rng(seed)
    return {
        # Uncommitted where the scores are: another placement would compile every program anew.
        path: jax.device_put(
            rng.random(score.shape, np.float32),
            score.sharding if getattr(score, "committed", False) else None,
        )
        for path, score in like.items()
    }


def _takes_single_examples(criterion: Criterion) -> bool:
    return any(quantity == "example_gradient" for quantity, _ in criterion.needs)


def _share(best: Point, count: float, size: float) -> float | None:
    return float(count / size) if best.fraction else None


def _report(params: Any, statistics: Statistics, criterion: str) -> Report:
    return analyze(params, statistics=statistics, criterion=criterion)


def _only_class(targets: Any) -> int | None:
    """The class of all targets, if they are whole numbers and have only one."""
    leaves = jax.tree.leaves(targets)
    if len(leaves) != 1 or not np.issubdtype(np.asarray(leaves[0]).dtype, np.integer):
        return None
    classes = np.unique(np.asarray(leaves[0]))
    return int(classes[0]) if len(classes) == 1 else None
