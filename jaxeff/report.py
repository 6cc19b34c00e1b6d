"""The report: what was measured of every parameter, as a pytree.

`Report` and everything in it are pytrees: structure (paths, shapes, reasons) is static, numbers are
arrays, so that jit, vmap over an ensemble and scan over training work on them. Printing, JSON and
recommendations read a report whose numbers are concrete. Imports `metrics`, `statistics`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.metrics import Metrics
from jaxeff.statistics import UnitStatistics

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Null:
    """The scale-free metrics of a layer whose weights are noise, under the same activations."""

    utilization: jax.Array
    gini: jax.Array
    coverage_50: jax.Array
    coverage_80: jax.Array
    coverage_90: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activity:
    """What the units of a layer or module emit; every property has the shape of the units.

    Attributes:
        shape: of the units: (3072,), or (12, 64) for heads and their features.
        rank: number of axes of each of the sums.
        sums: over everything that each unit emitted.
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
        """The fraction of each unit's values that are exactly 0."""
        return self._laid(self.sums.zero_fraction)

    @property
    def dead(self) -> jax.Array:
        """Number of units that emitted nothing but 0."""
        axes = tuple(range(-len(self.shape), 0))
        return jnp.sum(self.maximum == 0, axis=axes, dtype=jnp.int32)

    @property
    def count(self) -> jax.Array:
        """Values seen of each unit."""
        return self.sums.count

    @property
    def units(self) -> int:
        return math.prod(self.shape)

    def _laid(self, sums: jax.Array) -> jax.Array:
        # The sums have the weight's rank; vmap and scan add axes in front.
        return sums.reshape(*sums.shape[: sums.ndim - self.rank], *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNumbers:
    """The numbers of one layer, [], or of all layers stacked, [layers].

    Attributes:
        metrics: of the importance of all the layer's weights.
        null: the same where the weights are noise; None for a criterion without one.
        effective_units: exp(entropy) of the units' importance.
        effective_fan_in: effective weights per effective unit; the product of both is
            `metrics.effective_params` (the entropy chain rule).
        nonfinite_weights: entries of the weight itself that are nan or infinite.
        largest_weight: max |w|.
        activations_finite: False where activations are nan or infinite: the layer is then scored
            by magnitude.
    """

    metrics: Metrics
    null: Null | None
    effective_units: jax.Array
    effective_fan_in: jax.Array
    nonfinite_weights: jax.Array
    largest_weight: jax.Array
    activations_finite: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerStructure:
    """What is known of one layer before any number.

    Attributes:
        path: keys below `params`, joined by '/'; with an index for one of several layers that a scan
            stacks into one array.
        kind: 'dense', 'conv', 'embedding', or 'weight' where no operation was read.
        shape: of the weight.
        nonlinearity: between pre- and post-activation; None where no operation was read.
        scored: 'post', 'magnitude' or 'user': whose activations the criterion reads.
        reason: why the activations could not be read; None where they were.
        uses: how many operations consume the weight.
        unit_axes: axes of the weight that index its units.
        macs: multiply-accumulates per example; None where unknown.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    nonlinearity: str | None
    scored: str
    reason: str | None
    uses: int
    unit_axes: tuple[int, ...]
    macs: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def unit_count(self) -> int:
        return math.prod(self.shape[axis] for axis in self.unit_axes)


@dataclasses.dataclass(frozen=True)
class LayerReport(LayerNumbers, LayerStructure):
    """One weight: its `LayerStructure`, its `LayerNumbers`, and the arrays over its units.

    Attributes:
        units: importance per unit, shaped like the weight's unit axes.
        activity: what the units emit; None where no activations were read.
    """

    units: jax.Array
    activity: Activity | None

    @property
    def side(self) -> str:
        """'post', 'pre', 'input', 'user', or 'magnitude' where that is all the layer could be scored by."""
        return self.scored if bool(self.activations_finite) else "magnitude"

    @property
    def note(self) -> str:
        """What a reader must know before using the numbers; empty for nothing."""
        return "; ".join(_notes(self))


def _register_view(view: Any, structure: Any) -> None:
    static = [field.name for field in dataclasses.fields(structure)]
    data = [field.name for field in dataclasses.fields(view) if field.name not in static]
    _ = jax.tree_util.register_dataclass(view, data_fields=data, meta_fields=static)


_register_view(LayerReport, LayerStructure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OtherNumbers:
    """Numbers of one leaf that is no weight, [], or of all of them, [leaves]; nan where it holds none."""

    mean_absolute: jax.Array
    rms: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    nonfinite: jax.Array


@dataclasses.dataclass(frozen=True)
class OtherStructure:
    """A leaf that is no weight: its path, its role ('bias', 'scale', 'int32 array', ...) and shape."""

    path: str
    role: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class OtherReport(OtherNumbers, OtherStructure):
    """A leaf that is no weight, and the numbers of its own elements."""


_register_view(OtherReport, OtherStructure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """The output that Flax captured of one module (path '' is the model); units are its last axis."""

    path: str = dataclasses.field(metadata=_STATIC)
    activity: Activity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The model as a whole. Layers whose metrics are not finite are left out of every sum.

    Attributes:
        total_params: all elements of `params`, weights or not.
        weights: elements of all weights that have a row.
        effective_params: sum of the layers' effective weights.
        utilization: effective_params / weights.
        null_utilization: the same of the layers' nulls; nan where a layer has none.
        compression_potential: 1 - utilization. Noise has 0.25: see `null_utilization`.
        average_redundancy: unweighted mean over layers.
        sparsity_1e2, sparsity_1e3: fraction of weights with importance below 1e-2, 1e-3.
        relative_sparsity_1e2, relative_sparsity_1e3: below 1e-2, 1e-3 of their own layer's mean.
        pooled_effective_params, pooled_utilization: of all weights of the model taken as one
            distribution: a layer of faint weights counts for little.
        excluded: how many layers were left out.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """All that `jaxeff.analyze` found. `str(report)` is a table of 100 columns.

    The numbers of all layers are held stacked, so that a report is a few arrays however deep the
    model; `layers`, `rows` and `others` take them apart.

    Attributes:
        criterion: its name.
        structure: of every weight, in forward order.
        other_structure: of every leaf that is no weight.
        numbers: of every weight, stacked.
        units: importance per unit, one array a weight.
        activities: what the units emit, one a weight.
        other_numbers: of every leaf that is no weight, stacked.
        modules: outputs that Flax captured.
        model: the model-level numbers.
    """

    criterion: str = dataclasses.field(metadata=_STATIC)
    structure: tuple[LayerStructure, ...] = dataclasses.field(metadata=_STATIC)
    other_structure: tuple[OtherStructure, ...] = dataclasses.field(metadata=_STATIC)
    numbers: LayerNumbers
    units: tuple[jax.Array, ...]
    activities: tuple[Activity | None, ...]
    other_numbers: OtherNumbers
    modules: tuple[ModuleReport, ...]
    model: ModelReport

    @property
    def rows(self) -> tuple[LayerReport, ...]:
        """Every weight, in forward order."""
        return tuple(self._row(i) for i in range(len(self.structure)))

    @property
    def others(self) -> tuple[OtherReport, ...]:
        """Every leaf that is no weight."""
        return tuple(
            OtherReport(**_fields(structure), **_fields(_at(self.other_numbers, i)))
            for i, structure in enumerate(self.other_structure)
        )

    @staticmethod
    def assemble(
        criterion: str,
        rows: Sequence[LayerReport],
        others: Sequence[OtherReport],
        modules: Sequence[ModuleReport],
        model: ModelReport,
    ) -> Report:
        """A report from its parts, as `rows` and `others` give them."""
        return Report(
            criterion,
            tuple(_part(LayerStructure, row) for row in rows),
            tuple(_part(OtherStructure, other) for other in others),
            _stacked([_part(LayerNumbers, row) for row in rows], LayerNumbers),
            tuple(row.units for row in rows),
            tuple(row.activity for row in rows),
            _stacked([_part(OtherNumbers, other) for other in others], OtherNumbers),
            tuple(modules),
            model,
        )

    def _row(self, index: int) -> LayerReport:
        return LayerReport(
            **_fields(self.structure[index]),
            **_fields(_at(self.numbers, index)),
            units=self.units[index],
            activity=self.activities[index],
        )

    @property
    def layers(self) -> dict[str, LayerReport]:
        """Every weight by path, in forward order."""
        # The pytree holds a tuple: a dict would come back from jit sorted by key.
        return {row.path: row for row in self.rows}

    @property
    def unpaired(self) -> dict[str, str]:
        """Weights whose activations could not be read, with the reason: scored by magnitude."""
        return {layer.path: layer.reason for layer in self.structure if layer.reason is not None}

    @property
    def analysed_params(self) -> int:
        """Elements of the weights whose activations were read."""
        seen = zip(self.structure, self.activities, strict=True)
        return sum(layer.size for layer, activity in seen if activity is not None)

    def single(self) -> Report:
        """The report with its numbers on the host.

        Raises:
            ValueError: it is of several models (from `vmap`) or steps (from `scan`).
        """
        members = np.shape(self.model.utilization)
        if members:
            raise ValueError(
                f"this report is of {math.prod(members)} models or steps: take one first, such as "
                "jax.tree.map(lambda x: x[0], report)"
            )
        return jax.device_get(self)

    def __getitem__(self, path: str) -> LayerReport:
        paths = [layer.path for layer in self.structure]
        if path not in paths:
            near = [known for known in paths if path.split("/")[0] in known] or paths
            shown = ", ".join(near[:5]) + (", ..." if len(near) > 5 else "")
            raise KeyError(f"no layer {path!r}; there are {shown}")
        return self._row(paths.index(path))

    def __str__(self) -> str:
        from jaxeff.table import render

        return render(self)

    def recommendations(self) -> tuple[Any, ...]:
        """What to do, each with the numbers it rests on: see `jaxeff.recommendations.recommend`."""
        from jaxeff.recommendations import recommend

        return recommend(self)

    def scalars(self) -> dict[str, float]:
        """A flat dict of numbers for any tracker: 'model/utilization', 'layers/Dense_0/kernel/gini', ..."""
        concrete = self.single()
        flat = {f"model/{name}": float(value) for name, value in _numbers(concrete.model).items()}
        for row in concrete.rows:
            values = {**_numbers(row.metrics), **_numbers(row)}
            if row.null is not None:
                values["null_utilization"] = row.null.utilization
            if row.activity is not None:
                values["dead_units"] = row.activity.dead
            flat.update({f"layers/{row.path}/{name}": float(value) for name, value in values.items()})
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data; nan is None, infinity a string, arrays are nested lists."""
        from jaxeff.serialization import to_dict

        return to_dict(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """The report as JSON without NaN literals; `Report.from_json` reads it back."""
        from jaxeff.serialization import to_json

        return to_json(self, indent=indent)

    @staticmethod
    def from_json(text: str) -> Report:
        """A report as `to_json` wrote it.

        Raises:
            ValueError: the text is no report, or of another schema version.
        """
        from jaxeff.serialization import from_json

        return from_json(text)


def _fields(node: Any) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}


def _part(kind: Any, view: Any) -> Any:
    return kind(**{field.name: getattr(view, field.name) for field in dataclasses.fields(kind)})


def _stacked(parts: Sequence[Any], kind: Any) -> Any:
    return jax.tree.map(lambda *numbers: jnp.stack(numbers, axis=-1), *parts) if parts else none_of(kind)


def none_of(kind: Any) -> Any:
    """The stacked numbers of no layer, or of no leaf."""
    nothing: dict[str, Any] = {field.name: jnp.zeros(0) for field in dataclasses.fields(kind)}
    if kind is LayerNumbers:
        nothing.update(metrics=none_of(Metrics), null=None)
    return kind(**nothing)



def _at(stacked: Any, index: int) -> Any:
    # The last axis: vmap and scan add theirs in front.
    return jax.tree.map(lambda numbers: numbers[..., index], stacked)


def _numbers(node: Any) -> Mapping[str, Any]:
    """The scalar numbers that stand directly in a report's node."""
    return {
        name: value
        for name, value in _fields(node).items()
        if isinstance(value, (int, float, jax.Array, np.ndarray))
        and np.ndim(value) == 0
        and name != "activations_finite"
    }


# Products below 1.2e-38 are flushed to 0; what lies 2^24 below the largest no longer matters.
_FAINT = 1e-30


def _notes(row: LayerReport) -> list[str]:
    notes = [] if row.reason is None else [f"scored by magnitude: {row.reason}"]
    if int(row.nonfinite_weights):
        notes.append(f"{int(row.nonfinite_weights):,} weights are nan or infinite")
    elif row.activity is not None and not float(row.activity.count):
        notes.append("not reached on this batch: scored by magnitude")
    elif not bool(row.activations_finite):
        notes.append("its activations, or their sums, are nan or infinite: scored by magnitude")
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


def _all_zero(row: LayerReport) -> str:
    if row.activity is not None and float(jnp.max(row.activity.maximum)) == 0:
        return "no unit emits anything on this batch: every importance is 0"
    return "every importance is 0 in float32: weights and activations are too small to multiply"
