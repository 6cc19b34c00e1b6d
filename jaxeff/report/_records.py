"""The records of a report: numbers of layers, of other leaves, of modules and of the model.

Everything is a pytree. Structure (paths, shapes, reasons) is static, numbers are arrays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.metrics import Distribution, Metrics
from jaxeff.metrics._half_normal import Null
from jaxeff.numerics.summation import namespace
from jaxeff.output.shown import Shown
from jaxeff.statistics import HeadlessAttention, UnitStatistics

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Activity(Shown):
    """Activations of the units of a layer or module. Every property has the shape of the units.

    Attributes:
        shape: of the units: (3072,), or (12, 64) for heads and their features.
        rank: number of axes of each of the sums.
        sums: over all values that each unit emitted.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    rank: int = dataclasses.field(metadata=_STATIC)
    sums: UnitStatistics

    @property
    def mean_absolute(self) -> jax.Array:
        """mean |a| of each unit."""
        return self._laid(self.sums.mean_absolute)

    @property
    def rms(self) -> jax.Array:
        """sqrt(mean a^2) of each unit."""
        return self._laid(self.sums.rms)

    @property
    def maximum(self) -> jax.Array:
        """max |a| of each unit."""
        return self._laid(self.sums.maximum)

    @property
    def zero_fraction(self) -> jax.Array:
        """Fraction of each unit's values that are exactly 0."""
        return self._laid(self.sums.zero_fraction)

    @property
    def dead(self) -> jax.Array:
        """Number of units that emitted only 0; 0 if no value was seen, as where a mask leaves nothing of a batch."""
        return self._number_of(self.maximum == 0)

    def dormant(self, tau: float = 0.025) -> jax.Array:
        """Return the number of tau-dormant units: those with mean |a| <= tau * (mean |a| over the layer's units).

        With tau = 0 these are the dead units. Sokar et al., The dormant neuron phenomenon in deep reinforcement
        learning, ICML 2023.

        >>> sums = UnitStatistics(*(np.array([4.0, 0.08, 0.0], np.float32),) * 4, np.float32(2))
        >>> Activity((3,), 1, sums).dormant(), Activity((3,), 1, sums).dormant(0.1)
        (np.int32(1), np.int32(2))
        """
        mean = self.mean_absolute
        return self._number_of(mean <= tau * mean.mean(tuple(range(-len(self.shape), 0)), keepdims=True))

    @property
    def saturated(self) -> jax.Array:
        """Number of units whose values all lay within 1 % of a bound of their nonlinearity.

        0 for nonlinearities that are not bounded on both sides, such as relu.
        """
        axes = tuple(range(-len(self.shape), 0))
        if self.sums.saturated is None:
            return namespace(self.sums.count).zeros_like(self.dead)
        xp = namespace(self.sums.count)
        fractions = self._laid(self.sums.saturated / xp.maximum(self.sums.count, 1))
        return xp.sum(fractions == 1, axis=axes, dtype=np.int32)

    @property
    def count(self) -> jax.Array:
        """Number of values seen of each unit."""
        return self.sums.count

    @property
    def units(self) -> int:
        return math.prod(self.shape)

    def _number_of(self, units: jax.Array) -> jax.Array:
        xp = namespace(units)
        number = xp.sum(units, axis=tuple(range(-len(self.shape), 0)), dtype=np.int32)
        return number * (self.count > 0)

    def _laid(self, sums: jax.Array) -> jax.Array:
        # The sums have the weight's rank; vmap and scan add axes in front.
        return sums.reshape(*sums.shape[: sums.ndim - self.rank], *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNumbers:
    """Numbers of one layer, [], or of all layers stacked, [layers].

    Attributes:
        metrics: of the importance of all weights of the layer.
        null: the same metrics if the weights were noise; None for a criterion without a null.
        effective_units: exp(entropy) of the units' importance.
        effective_fan_in: effective weights per effective unit; the product of both is
            `metrics.effective_params` (the entropy chain rule).
        nonfinite_weights: number of weights that are nan or infinite.
        largest_weight: max |w|.
        evidence_finite: False if the activations or derivatives that the criterion reads are nan, infinite
            or missing; the layer is then scored by magnitude.
        distribution: of the importance over the weights; None unless `curves` was set.
    """

    metrics: Metrics
    null: Null | None
    effective_units: jax.Array
    effective_fan_in: jax.Array
    nonfinite_weights: jax.Array
    largest_weight: jax.Array
    evidence_finite: jax.Array
    # By keyword, for the fields of `LayerReport` that follow have no default.
    distribution: Distribution | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class LayerStructure:
    """Static facts about one layer.

    Attributes:
        path: keys below `params`, joined by '/', with an index if a scan stacks several layers in one array.
        kind: 'dense', 'conv' or 'embedding'; 'weight' if no operation was read.
        shape, dtype: of the weight.
        nonlinearity: between pre- and post-activation; None if no operation was read.
        scored: what the criterion reads: 'post', 'input', 'magnitude', 'gradient', 'none' or 'user'.
        reason: why the activations could not be read; None if they were.
        uses: number of operations that consume the weight.
        unit_axes: axes of the weight that index its units.
        macs: multiply-accumulates per example; None if unknown.
        uncounted: whether the MACs are unknown because of a use inside a `while`.
        is_sum: whether it is the sum of a weight and its low-rank update, which have rows of their own; no total
            counts it.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nonlinearity: str | None
    scored: str
    reason: str | None
    uses: int
    unit_axes: tuple[int, ...]
    macs: int | None
    # By keyword, for the fields of `LayerReport` that follow have no default.
    uncounted: bool = dataclasses.field(default=False, kw_only=True)
    is_sum: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the weight, stored dense."""
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def unit_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.unit_axes)

    @property
    def unit_count(self) -> int:
        return math.prod(self.unit_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class LayerReport(Shown, LayerNumbers, LayerStructure):
    """One weight: its `LayerStructure`, its `LayerNumbers`, and its arrays over units.

    Attributes:
        units: importance per unit, shaped like the weight's unit axes.
        activity: activations of the units; None if none were read.
    """

    units: jax.Array
    activity: Activity | None

    @property
    def side(self) -> str:
        """As `scored`, or 'magnitude' if the layer had to be scored by it."""
        return self.scored if bool(self.evidence_finite) else "magnitude"

    @property
    def note(self) -> str:
        """A warning about the numbers; empty if there is none."""
        return "; ".join([*_notes(self), *_uncounted(self)])


def _register_view(view: Any, structure: Any) -> None:
    static = [field.name for field in dataclasses.fields(structure)]
    data = [field.name for field in dataclasses.fields(view) if field.name not in static]
    _ = jax.tree_util.register_dataclass(view, data_fields=data, meta_fields=static)


_register_view(LayerReport, LayerStructure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OtherNumbers:
    """Numbers of one leaf that is not a weight, [], or of all of them, [leaves]; nan for a leaf without numbers."""

    mean_absolute: jax.Array
    rms: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    nonfinite: jax.Array


@dataclasses.dataclass(frozen=True)
class OtherStructure:
    """A leaf that is not a weight: its path, role ('bias', 'scale', 'int32 array', ...) and shape."""

    path: str
    role: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class OtherReport(Shown, OtherNumbers, OtherStructure):
    """A leaf that is not a weight, and the numbers of its elements."""


_register_view(OtherReport, OtherStructure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ModuleReport(Shown):
    """Output that Flax captured of one module (the path '' is the model). Units are its last axis."""

    path: str = dataclasses.field(metadata=_STATIC)
    activity: Activity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class AttentionReport(Shown):
    """The heads of one softmax attention.

    Attributes:
        path: the common path of its weights.
        heads: number of heads.
        units: number of groups of heads that share keys and values; the number of heads if all share one key.
        entropy: [heads], mean over the batch and all queries, in nats: 0 if a head attends to one position,
            ln(positions) if it attends to all equally. Layers that a scan stacks are leading axes.
        importance: [units], summed over the unit's part of the query, key, value and output weights.
    """

    path: str = dataclasses.field(metadata=_STATIC)
    heads: int = dataclasses.field(metadata=_STATIC)
    units: int = dataclasses.field(metadata=_STATIC)
    entropy: jax.Array
    importance: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ModelReport(Shown):
    """Numbers of the model as a whole. Sums leave out layers whose metrics are not finite.

    Attributes:
        total_params: all elements of `params`, weights or not.
        weights: elements of all weights that have a row.
        effective_params: sum of the layers' effective weights.
        utilization: effective_params / weights.
        null_utilization: the same for the layers' nulls; nan if a layer has none.
        compression_potential: 1 - utilization. Noise has 0.25: see `null_utilization`.
        average_redundancy: unweighted mean over layers.
        sparsity_1e2, sparsity_1e3: fraction of weights with importance below 1e-2, 1e-3.
        relative_sparsity_1e2, relative_sparsity_1e3: fraction below 1e-2, 1e-3 of their own layer's mean.
        pooled_effective_params, pooled_utilization: of all weights of the model as one distribution, in which
            a layer of faint weights counts for little.
        excluded: number of layers left out.
        relevance_residual: for a relevance criterion, the fraction of the winning outputs that was neither
            passed on to the inputs nor taken by biases; None for other criteria.
    """

    total_params: int = dataclasses.field(metadata=_STATIC)
    weights: int = dataclasses.field(metadata=_STATIC)
    effective_params: jax.Array
    utilization: jax.Array
    null_utilization: jax.Array
    compression_potential: jax.Array
    average_redundancy: jax.Array
    sparsity_1e2: jax.Array
    sparsity_1e3: jax.Array
    relative_sparsity_1e2: jax.Array
    relative_sparsity_1e3: jax.Array
    pooled_effective_params: jax.Array
    pooled_utilization: jax.Array
    excluded: jax.Array
    relevance_residual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A report of one model with its numbers on the host. Every table, page and file is made from it.

    Attributes:
        analyzed_params: elements of the weights that were scored by their activations or derivatives.
    """

    criterion: str
    rows: tuple[LayerReport, ...]
    others: tuple[OtherReport, ...]
    modules: tuple[ModuleReport, ...]
    attentions: tuple[AttentionReport, ...]
    model: ModelReport
    headless: tuple[HeadlessAttention, ...]
    analyzed_params: int


def none_of(kind: Any) -> Any:
    """Return the stacked numbers of no layer, or of no leaf."""
    nothing: dict[str, Any] = {field.name: np.zeros(0, np.float32) for field in dataclasses.fields(kind)}
    if kind is LayerNumbers:
        nothing.update(metrics=none_of(Metrics), null=None, distribution=None)
    return kind(**nothing)


# Products below 1.2e-38 are flushed to 0; values 2^24 below the largest no longer matter.
_FAINT = 1e-30


def _notes(row: LayerReport) -> list[str]:
    notes = [] if row.reason is None else [f"{_fallback(row, 'its activations were not read')}: {row.reason}"]
    if int(row.nonfinite_weights):
        notes.append(f"{int(row.nonfinite_weights):,} weights are nan or infinite")
    elif row.activity is not None and not float(row.activity.count):
        notes.append(_fallback(row, "not reached on this batch", "not reached on this batch: "))
    elif not bool(row.evidence_finite):
        read = "derivatives" if row.scored == "gradient" else "activations, or their sums,"
        notes.append(f"its {read} are nan or infinite: scored by magnitude")
    elif int(row.metrics.nonfinite):
        notes.append(
            f"the importance of {int(row.metrics.nonfinite):,} weights is negative, nan or beyond float32"
        )
    elif float(row.largest_weight) == 0:
        notes.append("all weights are 0")
    elif int(row.metrics.zeros) == row.size:
        notes.append(_all_zero(row))
    elif float(row.metrics.max) < _FAINT:
        notes.append("its importances are so small that float32 rounds some of them to 0: rescale the layer")
    return notes


def _uncounted(row: LayerReport) -> list[str]:
    reason = "it is used inside a while loop, whose number of steps is only known by running it"
    return [f"its MACs are unknown: {reason}"] if row.uncounted else []


def _fallback(row: LayerReport, otherwise: str, lead: str = "") -> str:
    """Return that the layer is scored by magnitude, or `otherwise` if it is not."""
    return f"{lead}scored by magnitude" if row.side == "magnitude" else otherwise


def _all_zero(row: LayerReport) -> str:
    if row.scored == "gradient":
        return "the loss does not depend on it on this batch: every importance is 0"
    if row.activity is not None and float(np.max(row.activity.maximum)) == 0:
        return "no unit emits anything on this batch: every importance is 0"
    return "every importance is 0 in float32: weights and activations are too small to multiply"
