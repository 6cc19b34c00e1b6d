"""Analysis every so many training steps, inside the compiled step: `jaxeff.monitor`.

The state is a pytree that lives in the train state. Between two analyses a step costs a comparison.
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
from jaxeff.report import Report


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vitals:
    """What events are told from, of every weight in the report's order.

    Attributes:
        effective_params: [weights].
        dead: [weights], units that emitted nothing but 0; nan where no activations were read.
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
@dataclasses.dataclass(frozen=True)
class MonitorState:
    """
    Attributes:
        step: int32 [], how many updates there were.
        analysed: int32 [], the update that `report` is of; 0 is the start.
        report: the latest.
        first: what it was at the start.
        previous: what it was in the report before.
    """

    step: jax.Array
    analysed: jax.Array
    report: Report
    first: Vitals
    previous: Vitals


@dataclasses.dataclass(frozen=True)
class Event:
    """An early sign of trouble in one weight. `str(event)` is a sentence.

    Attributes:
        path: of the weight.
        sign: 'dead units', 'effective parameters'; 'not finite', of weights, and 'fallen back', where what
            the criterion reads was not finite and magnitudes stand in: no other is looked for then.
        step: the update it was seen at.
        first: the number at the start; None for the last two signs.
        previous: the number in the report before; likewise.
        now: the number in this report.
        of: how many units, or weights, there are.
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
            return f"step {self.step}: {self.path}: what scores rest on is not finite; scored by magnitude"
        return (
            f"step {self.step}: {self.path}: {self.now:,.0f} of {self.of:,} {_NOUNS[self.sign]}, "
            f"{self.previous:,.0f} in the report before, {self.first:,.0f} at the start"
        )


_NOUNS = {"dead units": "units are dead", "effective parameters": "weights are effective"}


@dataclasses.dataclass(frozen=True)
class Monitor:
    """See `monitor`."""

    every: int
    criterion: str | Criterion | Callable[..., jax.Array]
    loss_fn: Callable[..., jax.Array] | None
    growth: float
    collapse: float

    def init(self, params: Any, apply_fn: Any, batch: Any, **analysis: Any) -> MonitorState:
        """The state before the first step, with a report of it; a step may donate it.

        Args:
            params: as for `jaxeff.analyze`.
            apply_fn: the same.
            batch: the same; it may be the training batch, or one set aside.
            **analysis: further arguments of `jaxeff.analyze`, such as `targets` and `rngs`.
        """
        report = self._analyze(params, apply_fn, batch, analysis)
        start, vitals = jnp.zeros((), jnp.int32), Vitals.of(report)
        return own_arrays(MonitorState(start, start, report, vitals, vitals))

    def update(
        self, state: MonitorState, params: Any, apply_fn: Any, batch: Any, **analysis: Any
    ) -> MonitorState:
        """The state after one more step: analysed anew where their number is a multiple of `every`.

        To be called under `jit` or `scan`. Under `vmap` it analyses every time, as `lax.cond` does there.
        """
        if not isinstance(state, MonitorState):
            raise TypeError(f"`state` must be a MonitorState from `init`, got {type(state).__name__}")
        step = state.step + 1

        def again() -> MonitorState:
            report = self._analyze(params, apply_fn, batch, analysis)
            if jax.tree.structure(report) != jax.tree.structure(state.report):
                raise ValueError("`state` is of another model: make one with `init(params, apply_fn, batch)`")
            return MonitorState(step, step, report, state.first, Vitals.of(state.report))

        return jax.lax.cond(step % self.every == 0, again, lambda: dataclasses.replace(state, step=step))

    def events(self, state: MonitorState) -> tuple[Event, ...]:
        """Early signs in the latest report, by weight in forward order.

        Raises:
            ValueError: the state is of several models.
        """
        if not isinstance(state, MonitorState):
            raise TypeError(f"`state` must be a MonitorState from `init`, got {type(state).__name__}")
        report, now = state.report.single(), Vitals.of(state.report)
        first, previous, now = jax.device_get((state.first, state.previous, now))
        step, found = int(state.analysed), []
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
    """Analyses a network while it trains, every so many steps, inside the compiled step.

    `init` gives a state to keep with the train state, `update` takes it through a step, and `events` says
    what to worry about. The latest report is `state.report`; `state.report.scalars()` goes to any tracker.

    Args:
        every: steps between two analyses.
        criterion: as for `jaxeff.analyze`.
        loss_fn: the same; `targets` go to `init` and `update`.
        growth: by what fraction of a layer's units more must be dead than at the start, to be an event.
        collapse: to what fraction of those at the start effective parameters must fall, to be an event.

    Raises:
        ValueError: `every` is no positive integer, or `growth` or `collapse` not in (0, 1].

    >>> import flax.linen as nn
    >>> model, batch = nn.Dense(4), jnp.ones((8, 3))
    >>> params = model.init(jax.random.key(0), batch)
    >>> watch = monitor(every=10)
    >>> state = watch.init(params, model.apply, batch)
    >>> train = jax.jit(lambda state, params: watch.update(state, params, model.apply, batch))
    >>> for _ in range(25):
    ...     state = train(state, params)
    >>> int(state.step), int(state.analysed), watch.events(state)
    (25, 20, ())
    """
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"`every` must be a positive number of steps, got {every!r}")
    for name, value in (("growth", growth), ("collapse", collapse)):
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` must be a fraction above 0, up to 1, got {value!r}")
    _ = named(criterion, with_loss=loss_fn is not None)
    return Monitor(int(every), criterion, loss_fn, growth, collapse)
