"""Single numbers of a report under flat names, for trackers such as TensorBoard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxeff.output.text import matches
from jaxeff.report._records import LayerReport, Snapshot

USUAL = (
    "model/utilization",
    "model/null_utilization",
    "model/lowest_utilization",
    "model/pooled_utilization",
    "model/effective_params",
    "model/mean_gini",
    "model/relative_sparsity_1e2",
    "model/zeros",
    "model/dead_units",
    "model/saturated_units",
    "model/largest_weight",
    "model/nonfinite_weights",
    "model/unpaired_layers",
    "model/mean_attention_entropy",
)
"""What is worth a chart during training. Those that the model does not have are left out."""


def scalars(report: Snapshot, patterns: tuple[str, ...]) -> dict[str, float]:
    """Return the usual numbers of the model, or all whose names match one of the patterns.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: nothing matches a pattern.
    """
    return chosen(dict(_every(report)), patterns, USUAL)


def chosen(every: Mapping[str, float], patterns: tuple[str, ...], usual: Sequence[str]) -> dict[str, float]:
    """Return the numbers whose names match one of the patterns; without patterns, the usual ones.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: nothing matches a pattern.
    """
    if not patterns:
        return {name: every[name] for name in usual if name in every}
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, such as '*/utilization', got {pattern!r}")
        found = [name for name in every if matches(name, pattern)]
        if not found:
            shown = ", ".join([*every][:5])
            raise ValueError(
                f"no scalar matches {pattern!r}, where * stands for anything; there are {shown}, ..."
            )
        matched.update(found)
    return {name: value for name, value in every.items() if name in matched}


def _every(report: Snapshot) -> Iterator[tuple[str, float]]:
    for name, value in {**_numbers(report.model), **_over_layers(report)}.items():
        yield f"model/{name}", float(value)
    for row in report.rows:
        for name, value in _of_layer(row).items():
            yield f"layers/{row.path}/{name}", float(value)
    for attention in report.attentions:
        yield f"attentions/{attention.path}/entropy", float(np.mean(attention.entropy))
        yield f"attentions/{attention.path}/lowest_entropy", float(np.min(attention.entropy))


def _over_layers(report: Snapshot) -> dict[str, Any]:
    """Return the numbers of the model that are not in its record, from those of its layers."""
    rows = report.rows
    active = [row.activity for row in rows if row.activity is not None]
    finite = [row for row in rows if math.isfinite(float(row.metrics.utilization))]
    found: dict[str, Any] = {
        "zeros": sum(int(row.metrics.zeros) for row in rows),
        "nonfinite_weights": sum(int(row.nonfinite_weights) for row in rows),
        "unpaired_layers": sum(row.reason is not None or not bool(row.evidence_finite) for row in rows),
    }
    if rows:
        found["largest_weight"] = max(float(row.largest_weight) for row in rows)
    if finite:
        found["lowest_utilization"] = min(float(row.metrics.utilization) for row in finite)
        sizes = [row.size for row in finite]
        found["mean_gini"] = np.average([float(row.metrics.gini) for row in finite], weights=sizes)
    if active:
        found["dead_units"] = sum(int(activity.dead) for activity in active)
        found["saturated_units"] = sum(int(activity.saturated) for activity in active)
    if report.attentions:
        entropies = [np.asarray(attention.entropy).ravel() for attention in report.attentions]
        found["mean_attention_entropy"] = np.mean(np.concatenate(entropies))
    return found


def _of_layer(row: LayerReport) -> dict[str, Any]:
    values = {**_numbers(row.metrics), **_numbers(row)}
    if row.null is not None:
        values["null_utilization"] = row.null.utilization
    if row.activity is not None:
        values["dead_units"] = row.activity.dead
        values["saturated_units"] = row.activity.saturated
    return values


def _numbers(node: Any) -> Mapping[str, Any]:
    """Return the scalar numbers that are fields of a report's node."""
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {
        name: value
        for name, value in fields.items()
        if isinstance(value, (int, float, jax.Array, np.ndarray, np.generic))
        and np.ndim(value) == 0
        and name not in ("evidence_finite", "uncounted")
    }
