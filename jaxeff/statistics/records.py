"""What is kept of a model's run: sums over what its units emit, and over derivatives of the loss.

Everything is a sum with its count, so that two batches' statistics add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.model.roles import ParamInfo
from jaxeff.numerics.summation import namespace

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnitStatistics:
    """Sums over everything that each unit emitted, in float32.

    Shapes broadcast against the weight: a (768, 3072) kernel has (1, 3072) for its outputs and
    (768, 1) for its inputs. `count`, how many values each sum holds, is a scalar. `saturated` counts
    the values within 1 % of a bound of a nonlinearity that has bounds (tanh, sigmoid), else it is None.
    """

    absolute_sum: jax.Array
    square_sum: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    count: jax.Array
    saturated: jax.Array | None = None

    @property
    def mean_absolute(self) -> jax.Array:
        """mean |a|; 0 where nothing was seen."""
        return self.absolute_sum / namespace(self.count).maximum(self.count, 1)

    @property
    def rms(self) -> jax.Array:
        """sqrt(mean a^2)."""
        xp = namespace(self.count)
        return xp.sqrt(self.square_sum / xp.maximum(self.count, 1))

    @property
    def zero_fraction(self) -> jax.Array:
        """The fraction of values that are exactly 0."""
        return self.zeros / namespace(self.count).maximum(self.count, 1)

    def __add__(self, other: UnitStatistics) -> UnitStatistics:
        # Uses without bounds have no saturated values, whatever the others have.
        counts = [count for count in (self.saturated, other.saturated) if count is not None]
        return UnitStatistics(
            self.absolute_sum + other.absolute_sum,
            self.square_sum + other.square_sum,
            namespace(self.maximum).maximum(self.maximum, other.maximum),
            self.zeros + other.zeros,
            self.count + other.count,
            sum(counts[1:], start=counts[0]) if counts else None,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums of terms that are shaped like a weight, or like its units; one that nobody asked for is None.

    Attributes:
        sum, absolute_sum, square_sum: of t, |t| and t^2, each term weighed by its examples.
        weight: [], the examples that all terms stand for.
        terms: [], how many there are: batches, examples or random samples.
    """

    sum: jax.Array | None
    absolute_sum: jax.Array | None
    square_sum: jax.Array | None
    weight: jax.Array
    terms: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self._over_weight(self.sum, "sum")

    @property
    def mean_absolute(self) -> jax.Array:
        return self._over_weight(self.absolute_sum, "absolute_sum")

    @property
    def mean_square(self) -> jax.Array:
        return self._over_weight(self.square_sum, "square_sum")

    @property
    def standard_error(self) -> jax.Array:
        """Of `mean`, from the spread of the terms; infinite for a single one."""
        variance = jnp.maximum(self.mean_square - jnp.square(self.mean), 0)
        return jnp.sqrt(variance / (self.terms - 1))

    def _over_weight(self, total: jax.Array | None, name: str) -> jax.Array:
        if total is None:
            raise ValueError(f"`{name}` was not collected: no criterion of this run reads it")
        return total / self.weight

    def __add__(self, other: Moments) -> Moments:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Derivatives:
    """What the loss makes of one weight; each is shaped like the weight, and None where not collected.

    Attributes:
        gradient: dL/dw of the mean loss of each batch.
        example_gradient: dL_n/dw of each example alone.
        hessian: samples of the diagonal of the Hessian of the mean loss: v * Hv, v random signs.
        gauss_newton: the same of its Gauss-Newton part, J^T (d^2 loss / d outputs^2) J.
        gradient_flow: Hg, the gradient of |g|^2 / 2.
        synaptic_flow: the gradient of the summed outputs with all parameters positive and inputs of 1.
        relevance, relevance_alpha_beta: the relevance of the winning outputs that passes through the
            weight, by the epsilon and the alpha-beta rule.
    """

    gradient: Moments | None = None
    example_gradient: Moments | None = None
    hessian: Moments | None = None
    gauss_newton: Moments | None = None
    gradient_flow: Moments | None = None
    synaptic_flow: Moments | None = None
    relevance: Moments | None = None
    relevance_alpha_beta: Moments | None = None

    def __add__(self, other: Derivatives) -> Derivatives:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conservation:
    """Whether relevance was conserved on its way from the outputs.

    Attributes:
        total: [], the winning outputs, summed.
        accounted: [], what of it arrived at inputs and looked-up rows, or was taken by biases and constants.
    """

    total: jax.Array
    accounted: jax.Array

    @property
    def residual(self) -> jax.Array:
        """What was neither passed on nor taken, as a fraction of the total."""
        return abs(self.total - self.accounted) / abs(self.total)

    def __add__(self, other: Conservation) -> Conservation:
        return Conservation(self.total + other.total, self.accounted + other.accounted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """X^T X of what a weight multiplies, X having one row for each position, in float32.

    Twice this is the Hessian of the squared error of the layer's outputs, the same for each unit.

    Attributes:
        sum: [inputs, inputs], over all positions; inputs along several axes of the weight count as one, in the order
            of these axes. Layers that a scan stacks stand in front, in the order of the weight's `layer_axes`.
        count: [], or one for each stacked layer: the positions.
    """

    sum: jax.Array
    count: jax.Array

    def __add__(self, other: SecondMoments) -> SecondMoments:
        return SecondMoments(self.sum + other.sum, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteStatistics:
    """One use of one weight.

    Attributes:
        path: of the weight.
        kind: 'dense', 'conv' or 'embedding'; 'weight' where no operation was read.
        nonlinearity: what stands between pre- and post-activation; 'identity' for nothing, several names
            joined by '/' for a fused layer whose parts go separate ways.
        bias: path of the bias that the pre-activation includes, or None.
        unit_axes, input_axes: axes of the weight that index its outputs, and what it multiplies.
        layer_axes: axes over which the weight stacks layers that a scan runs through.
        macs: multiply-accumulates per example; None inside a `while`, and where the batch has no leading axis
            to divide by.
        input, pre, post: what the weight multiplies and what its units emit before and after the
            nonlinearity. The input of an embedding is the one-hot row of each token.
        gate: the derivative of the mean loss by a factor on each unit's post-activation, at 1, which is
            the sum of a dL/da; None where not collected.
        derivatives: of the loss by the weight, over all its uses.
        uncounted: whether it runs inside a `while`, whose number of steps only running it tells.
        second_moments: of the inputs; None where not collected.
        without_moments: why there are none although they were asked for.
    """

    path: str = dataclasses.field(metadata=_STATIC)
    kind: str = dataclasses.field(metadata=_STATIC)
    nonlinearity: str = dataclasses.field(metadata=_STATIC)
    bias: str | None = dataclasses.field(metadata=_STATIC)
    unit_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    input_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    layer_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    macs: int | None = dataclasses.field(metadata=_STATIC)
    input: UnitStatistics
    pre: UnitStatistics
    post: UnitStatistics
    gate: Moments | None = None
    derivatives: Derivatives = Derivatives()
    uncounted: bool = dataclasses.field(default=False, metadata=_STATIC)
    second_moments: SecondMoments | None = None
    without_moments: str | None = dataclasses.field(default=None, metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModuleStatistics:
    """The outputs that Flax captured of one module; the units are the last axis."""

    path: str = dataclasses.field(metadata=_STATIC)
    output: UnitStatistics


@dataclasses.dataclass(frozen=True)
class HeadSlices:
    """What each unit of an attention has of one weight.

    Attributes:
        path: of the weight.
        axis: of the weight.
        indices: for each unit, those along the axis that are its own.
    """

    path: str
    axis: int
    indices: tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionStatistics:
    """How widely the heads of one softmax attention look.

    Attributes:
        path: what the paths of its weights have in common.
        heads: how many there are.
        units: how many groups of heads share keys and values; the heads themselves where all share one key.
        slices: the parts of the query, key, value and output weights that belong to each unit.
        entropy_sum: [heads], of the entropy of the probabilities, in nats, over the batch and all queries;
            layers that a scan stacks stand in front.
        count: [1], how many probability distributions each head gave.
    """

    path: str = dataclasses.field(metadata=_STATIC)
    heads: int = dataclasses.field(metadata=_STATIC)
    units: int = dataclasses.field(metadata=_STATIC)
    slices: tuple[HeadSlices, ...] = dataclasses.field(metadata=_STATIC)
    entropy_sum: jax.Array
    count: jax.Array

    @property
    def entropy(self) -> jax.Array:
        """Mean entropy of each head, in nats: 0 for one position alone, ln of their number for all alike."""
        return self.entropy_sum / self.count

    def __add__(self, other: AttentionStatistics) -> AttentionStatistics:
        total = self.entropy_sum + other.entropy_sum
        return dataclasses.replace(self, entropy_sum=total, count=self.count + other.count)


@dataclasses.dataclass(frozen=True)
class HeadlessAttention:
    """A softmax that weighs data, and in which no heads were found.

    Attributes:
        path: what the paths of the weights before it have in common; empty where there are none.
        reason: why there are none.
    """

    path: str
    reason: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """How the order of the scores settles as batches are added.

    Attributes:
        criterion: whose scores.
        paths: of the weights.
        batches: [k], numbers of batches: 2, 4, 8, and so on, and the last.
        correlation: [k, weights], the rank correlation (Spearman) of a weight's scores after so many
            batches with those after half as many; over at most 4,096 scores of each.
    """

    criterion: str = dataclasses.field(metadata=_STATIC)
    paths: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    batches: jax.Array
    correlation: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums of one or more batches.

    Attributes:
        sites: every use of every weight, in execution order.
        modules: outputs that Flax captured, in execution order.
        attentions: softmax attentions, in execution order.
        derivatives: of the loss by each weight, by path; empty where none were asked for.
        params: every leaf of `params` once, in the order of first use.
        headless: softmax attentions without heads, and why.
        conservation: of relevance, by quantity ('relevance', 'relevance_alpha_beta').
        stability: of the scores, where `jaxeff.calibrate` collected them.
    """

    sites: tuple[SiteStatistics, ...]
    modules: tuple[ModuleStatistics, ...]
    attentions: tuple[AttentionStatistics, ...]
    derivatives: Mapping[str, Derivatives]
    params: tuple[ParamInfo, ...] = dataclasses.field(metadata=_STATIC)
    headless: tuple[HeadlessAttention, ...] = dataclasses.field(default=(), metadata=_STATIC)
    conservation: Mapping[str, Conservation] = dataclasses.field(default_factory=dict)
    stability: Stability | None = None


def merge(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of both batches together.

    Raises:
        TypeError: they are no statistics.
        ValueError: the two come from different models, or hold different derivatives.
    """
    check_alike(first, second)
    return Statistics(
        tuple(_merge_sites(a, b) for a, b in zip(first.sites, second.sites, strict=True)),
        tuple(
            dataclasses.replace(a, output=a.output + b.output)
            for a, b in zip(first.modules, second.modules, strict=True)
        ),
        tuple(a + b for a, b in zip(first.attentions, second.attentions, strict=True)),
        {path: first.derivatives[path] + second.derivatives[path] for path in first.derivatives},
        first.params,
        first.headless,
        {name: first.conservation[name] + second.conservation[name] for name in first.conservation},
    )


def check_alike(first: Statistics, second: Statistics) -> None:
    """Raises TypeError or ValueError where the two cannot be added."""
    for name, statistics in (("first", first), ("second", second)):
        if not isinstance(statistics, Statistics):
            kind = type(statistics).__name__
            raise TypeError(f"`{name}` must be Statistics from `jaxeff.collect`, got {kind}")
    if _described(first) != _described(second):
        raise ValueError(
            "`first` and `second` come from different models: their sites or leaves differ. "
            "Merge statistics of one model on several batches."
        )
    if _structures(first) != _structures(second):
        raise ValueError(
            "`first` and `second` were collected for different criteria: one holds derivatives of the loss, or "
            "second moments, that the other has not. Collect both with the same `criterion` and `hessians`."
        )


def _merge_sites(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    gate = None if a.gate is None or b.gate is None else a.gate + b.gate
    second = None
    if a.second_moments is not None and b.second_moments is not None:
        second = a.second_moments + b.second_moments
    added = {"input": a.input + b.input, "pre": a.pre + b.pre, "post": a.post + b.post}
    return dataclasses.replace(a, **added, gate=gate, second_moments=second)


def _described(statistics: Statistics) -> tuple:
    sites = tuple((site.path, site.kind, site.unit_axes) for site in statistics.sites)
    attentions = tuple((found.path, found.slices) for found in statistics.attentions)
    return statistics.params, sites, attentions, tuple(module.path for module in statistics.modules)


def _structures(statistics: Statistics) -> Any:
    own = [(site.gate, site.second_moments) for site in statistics.sites]
    return jax.tree.structure((statistics.derivatives, own))
