"""Analysis every N training steps, inside the compiled step: `jaxeff.monitor`.

The monitor's state is a pytree to keep in the train state. A step without an analysis costs one comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff._analyze import analyze
from jaxeff._saving import saved_by_flax
from jaxeff.importance import Criterion, named
from jaxeff.model.params import own_arrays
from jaxeff.output.shown import Shown, described
from jaxeff.report import Report


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vitals:
    """The numbers from which events are derived, for all weights in the report's order.

    Attributes:
        effective_params: [weights], effective weights.
        dead: [weights], units that emitted only 0; nan if no activations were read.
    """

    effective_params: jax.Array
    dead: jax.Array

    @staticmethod
    def of(report: Report) -> Vitals:
        effective = report.numbers.metrics.effective_params
        dead = [
            jnp.full(effective.shape[:-1], jnp.nan) if activity is None else activity.dead
            for activity in report.activities
        ]
        return Vitals(effective, jnp.stack([jnp.asarray(count, jnp.float32) for count in dead], axis=-1))


@saved_by_flax
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class MonitorState(Shown):
    """State of a monitor, to keep with the train state.

    Attributes:
        step: int32 [], number of updates so far.
        analyzed: int32 [], update at which `report` was made; 0 is the start.
        report: the latest report.
        first: vitals at the start.
        previous: vitals of the report before the latest.
    """

    step: jax.Array
    analyzed: jax.Array
    report: Report
    first: Vitals
    previous: Vitals

    def __str__(self) -> str:
        step, analyzed = (described(each) for each in (self.step, self.analyzed))
        return f"Step {step}; this is the report of step {analyzed}.\n\n{self.report}"


@dataclasses.dataclass(frozen=True)
class Event:
    """An early sign of trouble in one weight. `str(event)` is a sentence.

    Attributes:
        path: of the weight.
        sign: 'dead units'; 'effective parameters'; 'not finite', if weights are; or 'fallen back', if the
            criterion's statistics are not finite, so that magnitudes replace the scores. The last two
            exclude the others.
        step: update at which it was seen.
        first: number at the start; None for the last two signs.
        previous: number in the report before; None for the last two signs.
        now: number in this report.
        of: total number of units or weights.
    """

    path: str
    sign: str
    step: int
    first: float | None
    previous: float | None
    now: float
    of: int

    def __str__(self) -> str:
        if self.sign == "not finite":
            return f"step {self.step}: {self.path}: {self.now:,.0f} of {self.of:,} weights are not finite"
        if self.sign == "fallen back":
            return f"step {self.step}: {self.path}: statistics are not finite; scored by magnitude"
        return (
            f"step {self.step}: {self.path}: {self.now:,.0f} of {self.of:,} {_NOUNS[self.sign]}, "
            f"{self.previous:,.0f} in the report before, {self.first:,.0f} at the start"
        )


_NOUNS = {"dead units": "units are dead", "effective parameters": "weights are effective"}


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Analyzes a network every N training steps; made by `monitor`."""

    every: int
    criterion: str | Criterion | Callable[..., jax.Array]
    loss_fn: Callable[..., jax.Array] | None
    growth: float
    collapse: float

    def init(self, params: Any, apply_fn: Any, batch: Any, **analysis: Any) -> MonitorState:
        """Analyze the network before the first step and return the initial state, which a step may donate.

        Args:
            params, apply_fn: as in `jaxeff.analyze`.
            batch: as in `jaxeff.analyze`; a training batch or a held-out one.
            **analysis: further arguments of `jaxeff.analyze`, such as `targets` and `rngs`.
        """
        report = self._analyze(params, apply_fn, batch, analysis)
        start, vitals = jnp.zeros((), jnp.int32), Vitals.of(report)
        return own_arrays(MonitorState(start, start, report, vitals, vitals))

    def update(
        self, state: MonitorState, params: Any, apply_fn: Any, batch: Any, **analysis: Any
    ) -> MonitorState:
        """Advance the state by one step, and analyze the network if the step is a multiple of `every`.

        Call it under `jit` or `scan`. Under `vmap` it analyzes at every step, because `lax.cond` runs both
        branches there.

        Raises:
            TypeError: `state` is not a MonitorState.
            ValueError: `state` belongs to another model.
        """
        if not isinstance(state, MonitorState):
            raise TypeError(f"`state` must be a MonitorState from `init`, got {type(state).__name__}")
        step = state.step + 1

        def again() -> MonitorState:
            report = self._analyze(params, apply_fn, batch, analysis)
            if jax.tree.structure(report) != jax.tree.structure(state.report):
                raise ValueError(
                    "`state` belongs to another model: make one with `init(params, apply_fn, batch)`"
                )
            return MonitorState(step, step, report, state.first, Vitals.of(state.report))

        return jax.lax.cond(step % self.every == 0, again, lambda: dataclasses.replace(state, step=step))

    def events(self, state: MonitorState) -> tuple[Event, ...]:
        """Return the early signs of trouble in the latest report, by weight in forward order.

        Raises:
            TypeError: `state` is not a MonitorState.
            ValueError: the state holds several models.
        """
        if not isinstance(state, MonitorState):
            raise TypeError(f"`state` must be a MonitorState from `init`, got {type(state).__name__}")
        report, now = state.report.single(), Vitals.of(state.report)
        first, previous, now = jax.device_get((state.first, state.previous, now))
        step, found = int(state.analyzed), []
        for at, row in enumerate(report.rows):
            if bad := int(row.nonfinite_weights):
                found.append(Event(row.path, "not finite", step, None, None, bad, row.size))
                continue
            if not bool(row.evidence_finite):
                found.append(Event(row.path, "fallen back", step, None, None, row.size, row.size))
                continue
            start, before, dead = (float(vitals.dead[at]) for vitals in (first, previous, now))
            if dead - start >= self.growth * row.unit_count:
                found.append(Event(row.path, "dead units", step, start, before, dead, row.unit_count))
            start, before, left = (float(vitals.effective_params[at]) for vitals in (first, previous, now))
            if left <= self.collapse * start:
                found.append(Event(row.path, "effective parameters", step, start, before, left, row.size))
        return tuple(found)

    def _analyze(self, params: Any, apply_fn: Any, batch: Any, analysis: dict[str, Any]) -> Report:
        return analyze(params, apply_fn, batch, criterion=self.criterion, loss_fn=self.loss_fn, **analysis)


def monitor(
    every: int,
    *,
    criterion: str | Criterion | Callable[..., jax.Array] = "activation",
    loss_fn: Callable[..., jax.Array] | None = None,
    growth: float = 0.1,
    collapse: float = 0.5,
) -> Monitor:
    """Analyze the network every N training steps, inside the compiled step, and report early signs of trouble.

    `init` returns a state to keep with the train state, `update` advances it by one step, and `events` lists
    the early signs. The latest report is `state.report`; `state.report.scalars()` goes to any tracker.

    Args:
        every: steps between two analyses.
        criterion, loss_fn: as in `jaxeff.analyze`; `targets` go to `init` and `update`.
        growth: report an event if the dead units of a layer have grown by this fraction of its units.
        collapse: report an event if the effective weights of a layer have fallen to this fraction of their
            number at the start.

    Raises:
        ValueError: `every` is not a positive integer, or `growth` or `collapse` is not in (0, 1].

    >>> import flax.linen as nn
    >>> model, batch = nn.Dense(4), jnp.ones((8, 3))
    >>> params = model.init(jax.random.key(0), batch)
    >>> watch = monitor(every=10)
    >>> state = watch.init(params, model.apply, batch)
    >>> train = jax.jit(lambda state, params: watch.update(state, params, model.apply, batch))
    >>> for _ in range(25):
    ...     state = train(state, params)
    >>> int(state.step), int(state.analyzed), watch.events(state)
    (25, 20, ())
    """
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"`every` must be a positive number of steps, got {every!r}")
    for name, value in (("growth", growth), ("collapse", collapse)):
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` must be a fraction above 0, up to 1, got {value!r}")
    _ = named(criterion, with_loss=loss_fn is not None)
    return Monitor(int(every), criterion, loss_fn, growth, collapse)
