"""Checks and analyses every N training steps, inside the compiled step: `jaxeff.monitor`.

The monitor's state is a pytree to keep in the train state. A step without a check costs one comparison.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.core import Tracer

from jaxeff import monitoring
from jaxeff._analyze import analyze
from jaxeff._collect import collect
from jaxeff._saving import saved_by_flax
from jaxeff.importance import Criterion, named
from jaxeff.model.params import Params
from jaxeff.monitoring import Event as Event
from jaxeff.monitoring import LeafLayout, Limits, Packing, SpectralRanks, Vitals
from jaxeff.output.shown import Shown, described
from jaxeff.report import Report
from jaxeff.statistics import Statistics

_STATIC = {"static": True}


@saved_by_flax
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a state holds: the attributes of `MonitorState`. The step is first."""

    step: Any
    checked: Any
    analyzed: Any
    report: Report
    vitals: Vitals
    first: Vitals
    previous: Vitals
    ranks: SpectralRanks | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class MonitorState(Shown):
    """State of a monitor, to keep with the train state. Its numbers are packed in two or three arrays.

    Attributes:
        rows: an array for each dtype.
        packing: where each number is.
        leaves: how each floating leaf of `params` is laid out.
    """

    rows: tuple[Any, ...]
    packing: Packing = dataclasses.field(metadata=_STATIC)
    leaves: tuple[LeafLayout, ...] = dataclasses.field(metadata=_STATIC)

    @property
    def _contents(self) -> _Contents:
        traced = any(isinstance(row, Tracer) for row in self.rows)
        return self.packing.unpack(self.rows if traced else jax.device_get(self.rows))

    @property
    def step(self) -> jax.Array:
        """int32 [], number of updates so far."""
        return self._contents.step

    @property
    def checked(self) -> jax.Array:
        """int32 [], update of the latest check; 0 is the start."""
        return self._contents.checked

    @property
    def analyzed(self) -> jax.Array:
        """int32 [], update at which `report` was made."""
        return self._contents.analyzed

    @property
    def report(self) -> Report:
        """The latest report."""
        return self._contents.report

    @property
    def ranks(self) -> SpectralRanks | None:
        """Effective and stable rank of every weight at the step of `report`; None without `spectra=True`."""
        return self._contents.ranks

    @property
    def vitals(self) -> Vitals:
        """Numbers of the latest check."""
        return self._contents.vitals

    @property
    def first(self) -> Vitals:
        """Numbers at the start."""
        return self._contents.first

    @property
    def previous(self) -> Vitals:
        """Numbers of the check before the latest."""
        return self._contents.previous

    def __str__(self) -> str:
        step, analyzed = (described(each) for each in (self.step, self.analyzed))
        return f"Step {step}; this is the report of step {analyzed}.\n\n{self.report}"


def _to_saved(state: MonitorState) -> Any:
    return serialization.to_state_dict(state._contents)


def _from_saved(target: MonitorState, saved: Any) -> MonitorState:
    contents = serialization.from_state_dict(target._contents, saved)
    return dataclasses.replace(target, rows=target.packing.pack(contents))


serialization.register_serialization_state(MonitorState, _to_saved, _from_saved)


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Checks a network every N training steps, and analyzes it less often; made by `monitor`."""

    every: int
    report_every: int
    criterion: str | Criterion | Callable[..., jax.Array]
    loss_fn: Callable[..., jax.Array] | None
    tau: float
    spectra: bool
    limits: Limits

    def init(self, params: Any, apply_fn: Any, batch: Any, **analysis: Any) -> MonitorState:
        """Analyze the network before the first step and return the initial state, which a step may donate.

        Args:
            params, apply_fn: as in `jaxeff.analyze`.
            batch: as in `jaxeff.analyze`; a training batch or a held-out one.
            **analysis: further arguments of `jaxeff.analyze`, such as `targets` and `rngs`.
        """
        given, statistics = self._run(params, apply_fn, batch, analysis)
        report = self._analyze(given, apply_fn, batch, analysis, statistics)
        ranks = self._ranks(given, statistics)
        leaves = monitoring.layout(given, statistics)
        vitals = monitoring.measure(leaves, given, statistics, _effective_params(report), tau=self.tau)
        start = np.zeros((), np.int32)
        contents = _Contents(start, start, start, report, vitals, vitals, vitals, ranks)
        packing = Packing.of(contents)
        return MonitorState(packing.pack(contents), packing, leaves)

    def update(
        self,
        state: MonitorState,
        params: Any,
        apply_fn: Any,
        batch: Any,
        *,
        gradients: Any = None,
        updates: Any = None,
        params_before: Any = None,
        check_now: bool | None = None,
        **analysis: Any,
    ) -> MonitorState:
        """Advance the state by one step; check the network if the step is a multiple of `every`.

        A check reads the gradients and updates, and runs the model once. Every `report_every` steps it is followed by
        an analysis. Under `jit` and `scan` both are in the compiled step. Under `vmap` they happen at every step,
        because `lax.cond` runs both branches there.

        Args:
            gradients: like `params`. To see what clipping hides, pass them as they are before it.
            updates: like `params`: what the optimizer adds to them.
            params_before: like `params`: the parameters before the step, in place of `updates`. The updates are then
                what the stored parameters changed by: 0 where bfloat16 rounds an update away. This is cheaper in a step
                that decides while it runs whether to check.
            check_now: whether to check at this step, if that is known outside of the compiled step, such as by a static
                argument. Steps that do not check are then compiled without the check, and make no updates for it.

        Raises:
            TypeError: `state` is not a MonitorState.
            ValueError: `state` belongs to another model, or to a monitor with another `spectra`; `gradients`, `updates`
                or `params_before` are not like `params`; or `updates` and `params_before` are both given.
        """
        _check_state(state)
        if updates is not None and params_before is not None:
            raise ValueError(
                "pass `updates` or `params_before`, not both: the updates are `params - params_before`"
            )
        step = state.packing.first(state.rows) + 1

        def check() -> tuple[Any, ...]:
            given, statistics = self._run(params, apply_fn, batch, analysis)
            if monitoring.layout(given, statistics) != state.leaves:
                raise ValueError(_ANOTHER_MODEL)
            held = state._contents
            if self.spectra != (held.ranks is not None):
                raise ValueError(
                    f"`state` comes from a monitor with `spectra={not self.spectra}`, and this one has "
                    f"`spectra={self.spectra}`: make a new state with this monitor's `init`"
                )

            def analyzed_now() -> tuple[Any, ...]:
                report = self._analyze(given, apply_fn, batch, analysis, statistics, held.report)
                return step, report, self._ranks(given, statistics)

            analyzed, report, ranks = _if(
                step % self.report_every == 0,
                analyzed_now,
                lambda: (held.analyzed, held.report, held.ranks),
            )
            trees = {"gradients": gradients, "updates": updates, "params_before": params_before}
            effective = _effective_params(report)
            vitals = monitoring.measure(state.leaves, given, statistics, effective, **trees, tau=self.tau)
            contents = _Contents(step, step, analyzed, report, vitals, held.first, held.vitals, ranks)
            return state.packing.pack(contents)

        wait = functools.partial(state.packing.with_first, state.rows, step)
        if check_now is None:
            check_now = step % self.every == 0
        return dataclasses.replace(state, rows=_if(check_now, check, wait))

    def scalars(self, state: MonitorState, *patterns: str) -> dict[str, float]:
        """Return about a dozen numbers of the latest check under flat names, for any tracker; more by pattern.

        Names begin with 'gradients/', 'params/', 'updates/', 'activations/', 'attention/' or 'spectra/'. Gradients and
        updates are there if they were passed to `update`, spectra with `spectra=True`; these are of the latest report,
        whose own numbers are `state.report.scalars()`.

        Args:
            *patterns: of names, in which * stands for any text and ? for one character: "updates/ratio/*" is the
                ratio of every module, stacked block and leaf, "*" everything.

        Raises:
            TypeError: `state` is not a MonitorState, or a pattern not a string.
            ValueError: nothing matches a pattern, or the state holds several models.
        """
        _check_state(state)
        held = state._contents
        return monitoring.scalars(state.leaves, held.vitals, held.report.single(), held.ranks, patterns)

    def events(self, state: MonitorState) -> tuple[Event, ...]:
        """Return the early signs of trouble at the latest check, by weight in forward order, then by attention.

        Raises:
            TypeError: `state` is not a MonitorState.
            ValueError: the state holds several models.
        """
        _check_state(state)
        held = state._contents
        report, step = held.report.single(), int(held.checked)
        compared = held.first, held.previous, held.vitals
        is_new = step == int(held.analyzed)
        return monitoring.events(self.limits, state.leaves, report, step, *compared, is_new=is_new)

    def _run(
        self, params: Any, apply_fn: Any, batch: Any, analysis: dict[str, Any]
    ) -> tuple[Params, Statistics]:
        """Return the params and the statistics of a forward pass."""
        given = Params.of(params)
        model = {name: value for name, value in analysis.items() if name not in ("targets", "curves")}
        return given, collect(given, apply_fn, batch, **model)

    def _analyze(
        self,
        params: Params,
        apply_fn: Any,
        batch: Any,
        analysis: dict[str, Any],
        statistics: Statistics,
        like: Report | None = None,
    ) -> Report:
        chosen = {"criterion": self.criterion, "loss_fn": self.loss_fn}
        if named(self.criterion, with_loss=self.loss_fn is not None).needs:
            report = analyze(params, apply_fn, batch, **chosen, **analysis)
        else:
            curves = analysis.get("curves", False)
            report = analyze(params, statistics=statistics, curves=curves, **chosen)
        if like is not None and jax.tree.structure(report) != jax.tree.structure(like):
            raise ValueError(_ANOTHER_MODEL)
        return report

    def _ranks(self, params: Params, statistics: Statistics) -> SpectralRanks | None:
        return monitoring.spectral_ranks(params, statistics) if self.spectra else None


_ANOTHER_MODEL = "`state` belongs to another model: make one with `init(params, apply_fn, batch)`"


def _check_state(state: Any) -> None:
    if not isinstance(state, MonitorState):
        raise TypeError(f"`state` must be a MonitorState from `init`, got {type(state).__name__}")


def _effective_params(report: Report) -> jax.Array:
    return report.numbers.metrics.effective_params


def _if(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Return then() or otherwise(); outside of a trace without compiling both."""
    if isinstance(condition, Tracer):
        return jax.lax.cond(condition, then, otherwise)
    return then() if condition else otherwise()


def monitor(
    every: int,
    *,
    report_every: int | None = None,
    criterion: str | Criterion | Callable[..., jax.Array] = "activation",
    loss_fn: Callable[..., jax.Array] | None = None,
    spectra: bool = False,
    tau: float = 0.025,
    growth: float = 0.1,
    collapse: float = 0.5,
    largest_logit: float = 1e4,
    entropy_collapse: float = 0.1,
    update_ratio: tuple[float, float] = (1e-5, 1e-1),
) -> Monitor:
    """Check the network every N training steps, inside the compiled step, and report early signs of trouble.

    `init` returns a state to keep with the train state, `update` advances it by one step, `scalars` gives the numbers
    of the latest check to any tracker, and `events` lists the early signs. The latest report is `state.report`.

    Args:
        every: steps between two checks: norms of gradients, parameters and updates, activations, and attention.
        report_every: steps between two reports, which cost more; a multiple of `every`, and ten times as many by
            default.
        criterion, loss_fn: of the reports, as in `jaxeff.analyze`; `targets` go to `init` and `update`.
        spectra: whether reports also measure the effective rank (Roy and Vetterli 2007) and the stable rank of every
            weight, as `jaxeff.spectra` does. They decompose each weight, in time that grows with the cube of its
            smaller side.
        tau: a unit is dormant if its mean |a| is at most `tau` times that of the layer's units (Sokar et al. 2023).
        growth: report an event if the dead or dormant units of a layer have grown by this fraction of its units.
        collapse: report an event if the effective weights of a layer have fallen to this fraction of their
            number at the start.
        largest_logit: report an event if an attention logit is at least this large. All runs of Wortsman et al. (2023,
            arXiv:2309.14322, section 3.3) with one above 1e4 diverged, and loss suffered from 1e3 where logits were
            set; without normalized queries and keys, ViT-22B saw more than 5e4 (Dehghani et al. 2023,
            arXiv:2302.05442, appendix B).
        entropy_collapse: report an event if the mean entropy of an attention has fallen to this fraction of that at
            the start (entropy collapse: Zhai et al. 2023).
        update_ratio: report an event if the norm of a weight's update, over that of the weight, is outside of these
            limits. About 1e-3 is usual.

    Raises:
        ValueError: `every` is not a positive integer, `report_every` not a multiple of it, or a threshold is out of
            range.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> model, batch = nn.Dense(4), jnp.ones((8, 3))
    >>> params = model.init(jax.random.key(0), batch)
    >>> watch = monitor(every=10)
    >>> state = watch.init(params, model.apply, batch)
    >>> train = jax.jit(lambda state, params: watch.update(state, params, model.apply, batch, gradients=params))
    >>> for _ in range(25):
    ...     state = train(state, params)
    >>> int(state.step), int(state.checked), int(state.analyzed), watch.events(state)
    (25, 20, 0, ())
    >>> numbers = watch.scalars(state)
    >>> numbers["gradients/norm"] == numbers["params/norm"], numbers["activations/dead_units"]
    (True, 0.0)
    >>> params = {"w": jnp.diag(jnp.array([2.0, 1.0]))}
    >>> state = monitor(every=10, spectra=True).init(params, lambda params, x: x @ params["w"], jnp.ones((1, 2)))
    >>> state.ranks.paths, state.ranks.stable_rank
    (('w',), array([1.25], dtype=float32))
    """
    report_every = 10 * every if report_every is None else report_every
    for name, value in (("every", every), ("report_every", report_every)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < 2**31:
            raise ValueError(f"`{name}` must be a positive number of steps below 2^31, got {value!r}")
    if report_every % every:
        raise ValueError(f"`report_every` must be a multiple of `every`, {every}; got {report_every}")
    fractions = {"growth": growth, "collapse": collapse, "entropy_collapse": entropy_collapse}
    for name, value in fractions.items():
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` must be a fraction above 0, up to 1, got {value!r}")
    if not isinstance(spectra, bool):
        raise TypeError(f"`spectra` must be True or False, got {spectra!r}")
    if not 0 <= tau < 1:
        raise ValueError(f"`tau` must be a fraction from 0, below 1, got {tau!r}")
    if not largest_logit > 0:
        raise ValueError(f"`largest_logit` must be above 0, got {largest_logit!r}")
    low, high = update_ratio
    if not 0 <= low < high:
        raise ValueError(f"`update_ratio` must be a lower and an upper limit, got {update_ratio!r}")
    _ = named(criterion, with_loss=loss_fn is not None)
    limits = Limits(growth, collapse, largest_logit, entropy_collapse, (low, high))
    return Monitor(int(every), int(report_every), criterion, loss_fn, tau, spectra, limits)
