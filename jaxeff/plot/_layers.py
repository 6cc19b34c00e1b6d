"""Layers beside each other, over training, and unit by unit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxeff.metrics import Metrics
from jaxeff.plot._canvas import (
    COLOURS,
    NO_IMPORTANCE,
    NO_LAYER,
    any_finite,
    axes_or_new,
    check_kind,
    chosen,
    line_style,
    outlined,
    say,
    single,
)
from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METRICS = tuple(field.name for field in dataclasses.fields(Metrics))


def layers(report: Report, metric: str = "utilization", ax: Axes | None = None) -> Axes:
    """A bar for each layer in forward order, from above; a line across it is where noise would be.

    Args:
        report: of one model.
        metric: a field of `jaxeff.metrics.Metrics`.
        ax: to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is not of its kind.
        ValueError: no such metric, or the report is of several models.
    """
    name, rows, drawn = _known(metric), single(report).rows, axes_or_new(ax)
    values = [float(getattr(row.metrics, name)) for row in rows]
    if not any_finite(values):
        return say(drawn, _no_finite(metric) if rows else NO_LAYER)
    _ = drawn.barh(range(len(rows)), values, color=COLOURS[0])
    nulls = [
        (index, float(value)) for index, row in enumerate(rows) if (value := _null(row, metric)) is not None
    ]
    if nulls:
        at, marks = zip(*nulls, strict=True)
        edged = {"markersize": 12, "markeredgewidth": 2, "path_effects": outlined()}
        _ = drawn.plot(marks, at, "|", color=COLOURS[3], label="noise", **edged)
        _ = drawn.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _ = drawn.set_yticks(range(len(rows)), [row.path for row in rows])
    drawn.invert_yaxis()
    _ = drawn.set_xlabel(metric)
    return drawn


def _known(metric: str) -> str:
    if metric not in _METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(_METRICS)}; got {metric!r}")
    return metric


def _no_finite(metric: str) -> str:
    return f"No layer has a finite {metric}."


def _null(row: LayerReport, metric: str) -> Any:
    return None if row.null is None else getattr(row.null, metric, None)


SPOKES = ("utilization", "entropy", "equality", "units", "coverage of 80 %", "not faint")


def radar(report: Report, paths: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Six numbers of each layer around a circle, from 0 at its centre to 1: the larger, the more even.

    utilization; normalized entropy; 1 - Gini; effective units over units; coverage_80; and what part of the
    weights has at least 1 % of the mean importance. The area means nothing: it depends on their order.

    Args:
        report: of one model.
        paths: of the layers to draw; all unless given.
        ax: polar axes to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: a path is none of the report's.
        TypeError: an argument is not of its kind.
        ValueError: the axes are not polar, or the report is of several models.
    """
    rows, drawn = chosen(report, paths), axes_or_new(ax, projection="polar")
    if drawn.name != "polar":
        raise ValueError("`ax` must be polar: pyplot.subplots(subplot_kw={'projection': 'polar'})")
    spokes = [_spokes(row) for row in rows]
    if not any(np.isfinite(values).all() for values in spokes):
        return say(drawn, NO_IMPORTANCE if rows else NO_LAYER)
    angles = np.linspace(0, 2 * math.pi, len(SPOKES) + 1)
    for index, (row, values) in enumerate(zip(rows, spokes, strict=True)):
        _ = drawn.plot(angles, [*values, values[0]], label=row.path, **line_style(index))
    _ = drawn.set_xticks(angles[:-1], SPOKES)
    for label, angle in zip(drawn.get_xticklabels(), angles[:-1], strict=True):
        # Away from the circle, which a centred label would lie on.
        label.set_horizontalalignment("left" if math.cos(angle) > 0 else "right")
    _ = drawn.set_ylim(0, 1)
    _ = drawn.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.05, 1.05))
    return drawn


def _spokes(row: LayerReport) -> list[float]:
    metrics = row.metrics
    found = (
        metrics.utilization,
        metrics.normalized_entropy,
        1 - metrics.gini,
        row.effective_units / row.unit_count,
        metrics.coverage_80,
        1 - metrics.relative_sparsity_1e2,
    )
    return [float(value) for value in found]


def units(report: Report, path: str, ax: Axes | None = None, *, columns: int = 32) -> Axes:
    """The importance of every unit of a layer over their mean, as a map.

    Args:
        report: of one model.
        path: of the layer.
        ax: to draw on; those of a new pyplot figure unless given.
        columns: units in a line; where the units have two axes (heads and their features), a line is one
            index of the first.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: the path is none of the report's.
        TypeError: an argument is not of its kind.
        ValueError: the report is of several models.
    """
    row, drawn = single(report)[path], axes_or_new(ax)
    _ = drawn.set_title(path)
    found = np.asarray(row.units, np.float64)
    if not any_finite(found):
        return say(drawn, "No unit has a finite importance.")
    found = found / found.mean() if found.sum() > 0 else found
    if found.ndim != 2:
        width = min(columns, found.size)
        empty = np.full(-found.size % width, np.nan)
        found = np.concatenate([found.ravel(), empty]).reshape(-1, width)
    image = drawn.imshow(found, cmap="cividis", vmin=0, aspect="equal", interpolation="nearest")
    bar = drawn.figure.colorbar(image, ax=drawn, shrink=0.7)
    bar.set_label("importance over the mean of units")
    _ = drawn.set_xticks([])
    _ = drawn.set_yticks([])
    return drawn


def history(
    reports: Report | Sequence[Report],
    metric: str = "utilization",
    ax: Axes | None = None,
    *,
    steps: Sequence[float] | None = None,
) -> Axes:
    """A line for each layer: one metric over training.

    Args:
        reports: of one model at several steps: in a list, or stacked, as `jax.lax.scan` gives them.
        metric: a field of `jaxeff.metrics.Metrics`.
        ax: to draw on; those of a new pyplot figure unless given.
        steps: where on the horizontal axis each report stands; 0, 1, 2, ... unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is not of its kind.
        ValueError: no such metric; the reports are of models of other layers, or stacked more than once; or
            there are not as many steps.
    """
    values, paths = _over_training(reports, _known(metric))
    at = range(len(values)) if steps is None else steps
    if len(at) != len(values):
        raise ValueError(f"`steps` must be one for each of {len(values)} reports; got {len(at)}")
    drawn = axes_or_new(ax)
    if not any_finite(values):
        return say(drawn, _no_finite(metric) if paths else NO_LAYER)
    for index, path in enumerate(paths):
        _ = drawn.plot(at, values[:, index], label=path, **line_style(index))
    _ = drawn.set_xlabel("report" if steps is None else "step")
    _ = drawn.set_ylabel(metric)
    _ = drawn.legend(fontsize="small")
    return drawn


def _over_training(reports: Report | Sequence[Report], metric: str) -> tuple[np.ndarray, list[str]]:
    """[reports, layers], and the paths of the layers."""
    if isinstance(reports, Report):
        values = np.asarray(jax.device_get(getattr(reports.numbers.metrics, metric)))
        if values.ndim != 2:
            raise ValueError(
                "`reports` must be a list, or stacked once, as scan does; got one stacked "
                f"{values.ndim - 1} times"
            )
        return values, [row.path for row in reports.structure]
    check_kind("reports", reports, Sequence, "[jaxeff.analyze(...), ...]")
    if not reports:
        raise ValueError("`reports` is empty")
    for index, report in enumerate(reports):
        check_kind(f"reports[{index}]", report, Report, "jaxeff.analyze")
    paths = [[row.path for row in report.structure] for report in reports]
    if any(other != paths[0] for other in paths):
        raise ValueError("`reports` are of models of other layers")
    return np.stack([getattr(report.single().numbers.metrics, metric) for report in reports]), paths[0]
