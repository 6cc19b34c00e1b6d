"""Records of a model's run: sums over activations, and over derivatives of the loss.

Every sum comes with its count, so that the statistics of two batches add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.roles import ParamInfo
from jaxeff.numerics.summation import namespace
from jaxeff.output.shown import Shown, described
from jaxeff.output.stacks import folded_cells
from jaxeff.output.text import aligned
from jaxeff.statistics.largest import Largest
from jaxeff.statistics.ranges import Ranges

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class UnitStatistics(Shown):
    """Sums over all values that each unit emitted, in float32.

    Shapes broadcast against the weight: a (768, 3072) kernel has (1, 3072) for its outputs and
    (768, 1) for its inputs. `count`, the number of values in each sum, is a scalar. `saturated` counts
    the values within 1 % of a bound of a bounded nonlinearity (tanh, sigmoid); otherwise it is None.
    """

    absolute_sum: jax.Array
    square_sum: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    count: jax.Array
    saturated: jax.Array | None = None

    @property
    def mean_absolute(self) -> jax.Array:
        """mean |a|; 0 if nothing was seen."""
        return self.absolute_sum / namespace(self.count).maximum(self.count, 1)

    @property
    def rms(self) -> jax.Array:
        """sqrt(mean a^2)."""
        xp = namespace(self.count)
        return xp.sqrt(self.square_sum / xp.maximum(self.count, 1))

    @property
    def zero_fraction(self) -> jax.Array:
        """Fraction of values that are exactly 0."""
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
@dataclasses.dataclass(frozen=True, repr=False)
class Moments(Shown):
    """Sums of terms that are shaped like a weight, or like its units; None for sums that were not requested.

    Attributes:
        sum, absolute_sum, square_sum: of t, |t| and t^2, each term weighted by its examples.
        weight: [], total number of examples of all terms.
        terms: [], number of terms: batches, examples or random samples.
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
        """Standard error of `mean`, from the spread of the terms; infinite for a single term."""
        variance = jnp.maximum(self.mean_square - jnp.square(self.mean), 0)
        return jnp.sqrt(variance / (self.terms - 1))

    def _over_weight(self, total: jax.Array | None, name: str) -> jax.Array:
        if total is None:
            raise ValueError(f"`{name}` was not collected: no criterion of this run reads it")
        return total / self.weight

    def __add__(self, other: Moments) -> Moments:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Derivatives(Shown):
    """Derivatives of the loss with respect to one weight, each shaped like the weight; None if not collected.

    Attributes:
        gradient: dL/dw of the mean loss of each batch.
        example_gradient: dL_n/dw of each example alone.
        hessian: samples of the diagonal of the Hessian of the mean loss: v * Hv, with v random signs.
        gauss_newton: the same for its Gauss-Newton part, J^T (d^2 loss / d outputs^2) J.
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
    """Conservation of relevance on its way from the outputs.

    Attributes:
        total: [], sum of the winning outputs.
        accounted: [], the part of it that arrived at inputs and looked-up rows, or was taken by biases and constants.
    """

    total: jax.Array
    accounted: jax.Array

    @property
    def residual(self) -> jax.Array:
        """The fraction of the total that was neither passed on nor taken."""
        return abs(self.total - self.accounted) / abs(self.total)

    def __add__(self, other: Conservation) -> Conservation:
        return Conservation(self.total + other.total, self.accounted + other.accounted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SecondMoments(Shown):
    """X^T X of the inputs of a weight, X with a row per position, in float32.

    Twice this is the Hessian of the squared error of the layer's outputs, the same for each unit.

    Attributes:
        sum: [inputs, inputs], over all positions; inputs along several axes of the weight count as one, in the order
            of these axes. Layers that a scan stacks come first, in the order of the weight's `layer_axes`.
        count: [], or one per stacked layer: the number of positions.
    """

    sum: jax.Array
    count: jax.Array

    def __add__(self, other: SecondMoments) -> SecondMoments:
        return SecondMoments(self.sum + other.sum, self.count + other.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SiteStatistics(Shown):
    """One use of one weight.

    Attributes:
        path: of the weight.
        kind: 'dense', 'conv' or 'embedding'; 'weight' if no operation was read.
        nonlinearity: between pre- and post-activation; 'identity' if there is none, several names joined by '/'
            for a fused layer whose parts have different ones.
        bias: path of the bias that the pre-activation includes, or None.
        unit_axes, input_axes: axes of the weight that index its outputs and its inputs.
        layer_axes: axes over which the weight stacks layers that a scan runs through.
        macs: multiply-accumulates per example; None inside a `while`, or if the batch has no leading axis
            to divide by.
        input, pre, post: the inputs of the weight, and the activations of its units before and after the
            nonlinearity. The input of an embedding is the one-hot row of each token.
        gate: the derivative of the mean loss with respect to a factor on each unit's post-activation, at 1, which
            is the sum of a dL/da; None if not collected.
        derivatives: of the loss with respect to the weight, over all its uses.
        uncounted: whether it runs inside a `while`, whose number of steps is only known by running it.
        second_moments: of the inputs; None if not collected.
        without_moments: why there are none although they were requested.
        ranges: of the inputs; None if not collected.
        without_ranges: why there are none although they were requested.
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
    ranges: Ranges | None = None
    without_ranges: str | None = dataclasses.field(default=None, metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModuleStatistics:
    """Outputs that Flax captured of one module. Units are the last axis."""

    path: str = dataclasses.field(metadata=_STATIC)
    output: UnitStatistics


@dataclasses.dataclass(frozen=True)
class HeadSlices:
    """The part of one weight that belongs to each unit of an attention.

    Attributes:
        path: of the weight.
        axis: of the weight.
        indices: for each unit, its indices along the axis.
    """

    path: str
    axis: int
    indices: tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class AttentionStatistics(Shown):
    """How broadly the heads of one softmax attention attend, and their largest logit.

    Attributes:
        path: the common path of its weights.
        heads: number of heads.
        units: number of groups of heads that share keys and values; the number of heads if all share one key.
        slices: the parts of the query, key, value and output weights that belong to each unit.
        entropy_sum: [heads], sum of the entropies of the probabilities, in nats, over the batch and all queries;
            layers that a scan stacks are leading axes.
        count: [1], number of probability distributions of each head.
        largest: of all logits, before the softmax and after any mask; stacked layers are leading axes.
    """

    path: str = dataclasses.field(metadata=_STATIC)
    heads: int = dataclasses.field(metadata=_STATIC)
    units: int = dataclasses.field(metadata=_STATIC)
    slices: tuple[HeadSlices, ...] = dataclasses.field(metadata=_STATIC)
    entropy_sum: jax.Array
    count: jax.Array
    largest: Largest

    @property
    def entropy(self) -> jax.Array:
        """Mean entropy of each head, in nats: 0 if it attends to one position, ln(positions) if to all equally."""
        return self.entropy_sum / self.count

    @property
    def largest_logit(self) -> jax.Array:
        """Largest logit of any head; nan if none was seen."""
        return namespace(self.largest.seen).where(self.largest.seen > 0, self.largest.value, np.nan)

    def __add__(self, other: AttentionStatistics) -> AttentionStatistics:
        total, largest = self.entropy_sum + other.entropy_sum, self.largest + other.largest
        return dataclasses.replace(self, entropy_sum=total, count=self.count + other.count, largest=largest)


@dataclasses.dataclass(frozen=True)
class HeadlessAttention:
    """A softmax that weighs data but in which no heads were found.

    Attributes:
        path: the common path of the weights before it; empty if there are none.
        reason: why no heads were found.
    """

    path: str
    reason: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Stability(Shown):
    """How the order of the scores settles as batches are added.

    Attributes:
        criterion: of the scores.
        paths: of the weights.
        batches: [k], numbers of batches: 2, 4, 8, and so on, and the last.
        correlation: [k, weights], the rank correlation (Spearman) of a weight's scores after this many
            batches with those after half as many; over at most 4,096 scores of each.
    """

    criterion: str = dataclasses.field(metadata=_STATIC)
    paths: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    batches: jax.Array
    correlation: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Statistics(Shown):
    """Sums over one or more batches.

    Attributes:
        sites: every use of every weight, in execution order.
        modules: outputs that Flax captured, in execution order.
        attentions: softmax attentions, in execution order.
        derivatives: of the loss with respect to each weight, by path; empty if none were requested.
        params: every leaf of `params` once, in the order of first use.
        headless: softmax attentions without heads, with the reason.
        conservation: of relevance, by quantity ('relevance', 'relevance_alpha_beta').
        stability: of the scores, if `jaxeff.calibrate` collected them.
    """

    sites: tuple[SiteStatistics, ...]
    modules: tuple[ModuleStatistics, ...]
    attentions: tuple[AttentionStatistics, ...]
    derivatives: Mapping[str, Derivatives]
    params: tuple[ParamInfo, ...] = dataclasses.field(metadata=_STATIC)
    headless: tuple[HeadlessAttention, ...] = dataclasses.field(default=(), metadata=_STATIC)
    conservation: Mapping[str, Conservation] = dataclasses.field(default_factory=dict)
    stability: Stability | None = None

    def __str__(self) -> str:
        """A row for each use of a weight."""
        header = ("weight", "kind", "emits", "positions")
        rows = [(site.path, site.kind, site.nonlinearity, described(site.post.count)) for site in self.sites]
        given = {
            field.name
            for each in self.derivatives.values()
            for field in dataclasses.fields(each)
            if getattr(each, field.name) is not None
        }
        lines = (
            aligned([header, *folded_cells(rows)], left=header[1:3], gap=2)
            if rows
            else ["No weight meets data."]
        )
        return "\n".join([*lines, *([f"Derivatives: {', '.join(sorted(given))}."] if given else [])])


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Merge the statistics of two batches.

    Raises:
        TypeError: an argument is not a Statistics.
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


def check_params(statistics: Any, params: Mapping[str, Any]) -> None:
    """Check that these are statistics of leaves of these paths and shapes; raise TypeError or ValueError if not."""
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"`statistics` must be Statistics from `jaxeff.collect`, got {type(statistics).__name__}"
        )
    found = {info.path: info.shape for info in statistics.params}
    wanted = {path: tuple(jnp.shape(leaf)) for path, leaf in params.items()}
    if found != wanted:
        path = min(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        raise ValueError(
            f"`statistics` were collected with other `params`: {path!r} has shape {found.get(path)} there and "
            f"{wanted.get(path)} here. Collect them with these `params`."
        )


def check_alike(first: Statistics, second: Statistics) -> None:
    """Check that two statistics can be added; raise TypeError or ValueError if not."""
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
            "second moments or ranges, that the other lacks. Collect both with the same `ranges`, "
            "`criterion` and `hessians`."
        )


def _merge_sites(a: SiteStatistics, b: SiteStatistics) -> SiteStatistics:
    gate = None if a.gate is None or b.gate is None else a.gate + b.gate
    second = None
    if a.second_moments is not None and b.second_moments is not None:
        second = a.second_moments + b.second_moments
    ranges = None if a.ranges is None or b.ranges is None else a.ranges + b.ranges
    added = {"input": a.input + b.input, "pre": a.pre + b.pre, "post": a.post + b.post}
    return dataclasses.replace(a, **added, gate=gate, second_moments=second, ranges=ranges)


def _described(statistics: Statistics) -> tuple:
    sites = tuple((site.path, site.kind, site.unit_axes) for site in statistics.sites)
    attentions = tuple((found.path, found.slices) for found in statistics.attentions)
    return statistics.params, sites, attentions, tuple(module.path for module in statistics.modules)


def _structures(statistics: Statistics) -> Any:
    own = [(site.gate, site.second_moments, site.ranges) for site in statistics.sites]
    return jax.tree.structure((statistics.derivatives, own))
