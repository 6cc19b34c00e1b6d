"""The report, a pytree of what was measured of every parameter.

`Report` passes through jit, vmap over an ensemble and scan over training. Printing, JSON and
recommendations read its snapshot, which holds one model with concrete numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff.output import files
from jaxeff.output.shown import Shown
from jaxeff.output.text import matching, some
from jaxeff.report import _notebook as notebook
from jaxeff.report import _scalars as scalars
from jaxeff.report import _serialization as serialization
from jaxeff.report import _table as table
from jaxeff.report._recommendations import MeasuredLosses, Recommendation, recommend
from jaxeff.report._records import (
    Activity,
    AttentionReport,
    LayerNumbers,
    LayerReport,
    LayerStructure,
    ModelReport,
    ModuleReport,
    OtherNumbers,
    OtherReport,
    OtherStructure,
    Snapshot,
    none_of,
)
from jaxeff.statistics import HeadlessAttention

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """The result of `jaxeff.analyze`. `str(report)` is a table of 100 columns.

    The numbers of all layers are stacked, so a report consists of a few arrays, however deep the model is;
    `layers`, `rows` and `others` take them apart.

    Attributes:
        criterion: name of the criterion.
        structure: static facts of every weight, in forward order.
        other_structure: static facts of every leaf that is not a weight.
        numbers: numbers of every weight, stacked.
        units: importance per unit, one array per weight.
        activities: activations of the units, one per weight.
        other_numbers: numbers of every leaf that is not a weight, stacked.
        modules: outputs that Flax captured.
        attentions: heads of every softmax attention.
        model: numbers of the model as a whole.
        headless: softmaxes that weigh data but in which no heads were found, with the reason.
    """

    criterion: str = dataclasses.field(metadata=_STATIC)
    structure: tuple[LayerStructure, ...] = dataclasses.field(metadata=_STATIC)
    other_structure: tuple[OtherStructure, ...] = dataclasses.field(metadata=_STATIC)
    numbers: LayerNumbers
    units: tuple[jax.Array, ...]
    activities: tuple[Activity | None, ...]
    other_numbers: OtherNumbers
    modules: tuple[ModuleReport, ...]
    attentions: tuple[AttentionReport, ...]
    model: ModelReport
    headless: tuple[HeadlessAttention, ...] = dataclasses.field(default=(), metadata=_STATIC)

    @functools.cached_property
    def rows(self) -> tuple[LayerReport, ...]:
        """Every weight, in forward order."""
        numbers = _unstacked(self.numbers, len(self.structure))
        return tuple(map(_row, self.structure, numbers, self.units, self.activities))

    @functools.cached_property
    def others(self) -> tuple[OtherReport, ...]:
        """Every leaf that is not a weight."""
        numbers = _unstacked(self.other_numbers, len(self.other_structure))
        pairs = zip(self.other_structure, numbers, strict=True)
        return tuple(OtherReport(**vars(structure), **vars(each)) for structure, each in pairs)

    @staticmethod
    def assemble(
        criterion: str,
        rows: Sequence[LayerReport],
        others: Sequence[OtherReport],
        modules: Sequence[ModuleReport],
        attentions: Sequence[AttentionReport],
        model: ModelReport,
        headless: Sequence[HeadlessAttention] = (),
    ) -> Report:
        """Make a report from its parts, as given by `rows` and `others`."""
        return Report(
            criterion,
            tuple(_part(LayerStructure, row) for row in rows),
            tuple(_part(OtherStructure, other) for other in others),
            _stacked([_part(LayerNumbers, row) for row in rows], LayerNumbers),
            tuple(row.units for row in rows),
            tuple(row.activity for row in rows),
            _stacked([_part(OtherNumbers, other) for other in others], OtherNumbers),
            tuple(modules),
            tuple(attentions),
            model,
            tuple(headless),
        )

    def _row(self, index: int) -> LayerReport:
        numbers = _at(self.numbers, index)
        return _row(self.structure[index], numbers, self.units[index], self.activities[index])

    @property
    def layers(self) -> dict[str, LayerReport]:
        """Every weight by path, in forward order."""
        # The pytree holds a tuple: a dict would come back from jit sorted by key.
        return {row.path: row for row in self.rows}

    @property
    def unpaired(self) -> dict[str, str]:
        """Weights scored by magnitude, with the reason: their activations could not be read, or are not finite.

        For several models, or while numbers are traced, it holds only those that could not be read.
        """
        unread = {layer.path: layer.reason for layer in self.structure if layer.reason is not None}
        reasons = {**{row.path: row.note for row in self._fallen_back()}, **unread}
        return {layer.path: reasons[layer.path] for layer in self.structure if layer.path in reasons}

    @property
    def analyzed_params(self) -> int:
        """Elements of the weights whose activations were read and, if scores rest on them, are finite."""
        seen = zip(self.structure, self.activities, strict=True)
        read = sum(layer.size for layer, activity in seen if activity is not None and not layer.is_sum)
        fallen_back = (row for row in self._fallen_back() if row.activity is not None and not row.is_sum)
        return read - sum(row.size for row in fallen_back)

    def _fallen_back(self) -> list[LayerReport]:
        """Return weights scored by magnitude because the criterion's statistics are not finite, if that is known."""
        finite = self.numbers.evidence_finite
        if isinstance(finite, Tracer) or np.ndim(finite) != 1:
            return []
        return [self._row(int(index)) for index in np.flatnonzero(~np.asarray(finite, bool))]

    @property
    def _is_traced(self) -> bool:
        return isinstance(self.model.utilization, Tracer)

    def single(self) -> Report:
        """Return the report with its numbers on the host.

        Raises:
            ValueError: the report holds several models (from `vmap`) or steps (from `scan`), or traced numbers.
        """
        members = np.shape(self.model.utilization)
        if self._is_traced:
            raise ValueError(
                "this report holds traced numbers, which are known once the program runs: return it from the "
                "function under `jit`, `vmap` or `scan`, and read it outside"
            )
        if members:
            raise ValueError(
                f"this report holds {math.prod(members)} models or steps: take one first, such as "
                "jax.tree.map(lambda x: x[0], report)"
            )
        # Return the report itself if its numbers are already on the host, so that its rows are made only once.
        here = all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(self))
        return self if here else jax.device_get(self)

    def snapshot(self) -> Snapshot:
        """Return the rows and numbers on the host, from which tables, pages and files are made.

        Raises:
            ValueError: the report holds several models or steps.
        """
        one = self.single()
        return Snapshot(
            one.criterion,
            one.rows,
            one.others,
            one.modules,
            one.attentions,
            one.model,
            one.headless,
            one.analyzed_params,
        )

    def __contains__(self, path: object) -> bool:
        return any(layer.path == path for layer in self.structure)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths of the weights, in forward order."""
        return (layer.path for layer in self.structure)

    def __getitem__(self, path: str) -> LayerReport:
        if not isinstance(path, str):
            raise TypeError(f"look up a layer by its path, got {path!r}; `report.rows` has them in order")
        paths = [layer.path for layer in self.structure]
        if path not in paths:
            near = [known for known in paths if path.split("/")[0] in known] or paths
            raise KeyError(f"no layer {path!r}; there are {some(near, 5)}")
        return self._row(paths.index(path))

    def __str__(self) -> str:
        members = np.shape(self.model.utilization)
        if self._is_traced:
            return "Report of traced numbers: return it from the traced function to read it."
        if members:
            return table.of_several(math.prod(members), len(self.structure))
        return table.render(self.snapshot())

    def _repr_html_(self) -> str:
        one = not np.ndim(self.model.utilization) and not self._is_traced
        return notebook.render(self.snapshot()) if one else notebook.preformatted(str(self))

    def recommendations(self, sensitivity: MeasuredLosses | None = None) -> tuple[Recommendation, ...]:
        """Return recommendations, each with the numbers it rests on, ranked by what they would save.

        Args:
            sensitivity: from `jaxeff.prune.sensitivity`, of the same model; adds the measurement of each layer.

        Raises:
            ValueError: the report holds several models or steps, or the sensitivity belongs to other params.
        """
        return recommend(self.snapshot(), sensitivity=sensitivity)

    def table(
        self,
        pattern: str = "*",
        *,
        blocks: bool = False,
        columns: Mapping[str, Mapping[str, float]] | None = None,
    ) -> str:
        """Return the table, as `print(report)` shows it, or the part of it that is of interest.

        In a table of more than 20 layers, at least three that differ only in the number of their block share a row:
        the lowest and the highest number, sums of weights, bytes, MACs and dead units, and utilization over depth.

        Args:
            pattern: of the paths of the layers to show, such as "*/attention/*"; * stands for any text, ? for one
                character. The text below the rows covers all layers.
            blocks: whether each block has a row of its own.
            columns: more columns, such as `jaxeff.spectra(params).columns()`: by heading, a number for each path.

        Raises:
            TypeError: the pattern is not a string.
            ValueError: no layer matches the pattern, a column has none of the report's paths, or the report holds
                several models or steps.
        """
        snapshot = self.snapshot()
        table.check_columns(snapshot, columns or {})
        shown = matching([row.path for row in snapshot.rows], pattern)
        return table.render(snapshot, shown, blocks=blocks, columns=columns)

    def scalars(self, *patterns: str) -> dict[str, float]:
        """Return about a dozen numbers of the model under flat names, for any tracker; more by pattern.

        By default: utilization, its null, its lowest in any layer, and that of all weights pooled; effective
        parameters; the Gini coefficient, a mean over the weights; the fraction of faint weights; weights of
        importance 0; dead and saturated units; the largest weight; weights that are not finite; layers scored
        without their activations; the entropy of attention, a mean over the heads. Names begin with 'model/'.

        Args:
            *patterns: of names, in which * stands for any text and ? for one character: "*/utilization" is the
                model's and each layer's, "layers/Dense_0/kernel/*" all of one layer, "*" everything.

        Raises:
            TypeError: a pattern is not a string.
            ValueError: nothing matches a pattern, or the report holds several models or steps.
        """
        return scalars.scalars(self.snapshot(), patterns)

    def to_records(self) -> list[dict[str, str | int | float | None]]:
        """Return a flat dict per layer, all with the same keys, for a pandas or polars DataFrame.

        nan stays nan; unknown values are None, such as the dead units of a layer without activations.
        For polars pass `infer_schema_length=None`, as the first hundred rows of a column may be unknown.

        Raises:
            ValueError: the report holds several models or steps.
        """
        return serialization.to_records(self.single().rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, with nan as None, infinity as a string and arrays as nested lists."""
        return serialization.to_dict(self.snapshot())

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the report as JSON without NaN literals; `Report.from_json` reads it back."""
        return serialization.to_json(self.snapshot(), indent=indent)

    def to_html(self, path: str | os.PathLike, *, title: str = "jaxeff report") -> None:
        """Write the report as one HTML file that needs no network and no other file.

        Args:
            path: of the file. An existing file is replaced once the new one is complete.
            title: of the page.

        Raises:
            ImportError: Jinja is not installed.
            OSError: the file cannot be written.
            ValueError: the report holds several models or steps.
        """
        from jaxeff.report import page

        files.write(path, page.render(self.snapshot(), title))

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report written by `to_json`.

        Raises:
            ValueError: the text is not a report, or has another schema version.
        """
        return serialization.from_json(text, Report.assemble)


def _part(kind: Any, view: Any) -> Any:
    return kind(**{field.name: getattr(view, field.name) for field in dataclasses.fields(kind)})


def _stacked(parts: Sequence[Any], kind: Any) -> Any:
    return jax.tree.map(lambda *numbers: jnp.stack(numbers, axis=-1), *parts) if parts else none_of(kind)


def _at(stacked: Any, index: int) -> Any:
    # The last axis, since vmap and scan add leading ones.
    return jax.tree.map(lambda numbers: numbers[..., index], stacked)


def _unstacked(stacked: Any, count: int) -> list[Any]:
    leaves, tree = jax.tree.flatten(stacked)
    columns = [[numbers[..., index] for index in range(count)] for numbers in leaves]
    return [tree.unflatten(row) for row in zip(*columns, strict=True)]


def _row(
    structure: LayerStructure, numbers: LayerNumbers, units: jax.Array, activity: Activity | None
) -> LayerReport:
    return LayerReport(**vars(structure), **vars(numbers), units=units, activity=activity)
