"""Plots that compare layers, follow them over depth and training, and map their units."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxeff.metrics import Metrics
from jaxeff.output.stacks import stacks
from jaxeff.output.text import matches
from jaxeff.plot._canvas import (
    COLORS,
    NO_LAYER,
    SMALL,
    any_finite,
    axes_or_new,
    check_kind,
    color_bar,
    finish,
    legend_above,
    line_style,
    name_lines,
    points_high,
    say,
    shortened,
    single,
    tick_names,
    whole_numbers,
)
from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METRICS = tuple(field.name for field in dataclasses.fields(Metrics))


def layers(report: Report, metric: str = "utilization", ax: Axes | None = None) -> Axes:
    """Draw a dot per layer in forward order, first layer on top, with a line to a mark at its null.

    The horizontal axis is limited to the numbers. Where layers are too many to be named, every second, third, ...
    has its name.

    Args:
        report: of one model.
        metric: a field of `jaxeff.metrics.Metrics`.
        ax: axes to draw on; those of a new pyplot figure by default, which is taller for more layers.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
        ValueError: there is no such metric, or the report holds several models.
    """
    name, rows = _known(metric), single(report).rows
    drawn = axes_or_new(ax, height=min(1.0 + 0.2 * max(len(rows), 5), 9.0))
    values = [float(getattr(row.metrics, name)) for row in rows]
    if not any_finite(values):
        return say(drawn, _no_finite(metric) if rows else NO_LAYER)
    room = points_high(drawn) / len(rows)
    nulls = [
        (index, float(value)) for index, row in enumerate(rows) if (value := _null(row, metric)) is not None
    ]
    size = min(5.0, max(room * 0.7, 1.5))
    if nulls:
        at, marks = zip(*nulls, strict=True)
        between = {"color": "0.75", "linewidth": min(1.0, room / 3), "zorder": 0}
        _ = drawn.hlines(at, [values[index] for index in at], marks, **between)
        mark = {"color": COLORS[3], "markersize": 1.6 * size, "markeredgewidth": 1.5}
        _ = drawn.plot(marks, at, "|", label="noise", **mark)
    _ = drawn.plot(values, range(len(rows)), "o", color=COLORS[0], label="layer", markersize=size)
    if nulls:
        legend_above(drawn)
    _ = finish(drawn, metric, "layer")
    named = range(0, len(rows), math.ceil(1.2 * SMALL / room))
    tick_names(drawn.yaxis, named, shortened(drawn, [rows[index].path for index in named]))
    _ = drawn.set_ylim(len(rows) - 0.5, -0.5)
    return drawn


def depth(report: Report, metric: str = "utilization", ax: Axes | None = None) -> Axes:
    """Draw a metric over depth, a line per kind of layer, from the first block to the last.

    A kind are at least three layers that differ only in the number of their block, whether a scan stacks them or
    each block has parameters of its own.

    Args:
        report: of one model.
        metric: a field of `jaxeff.metrics.Metrics`.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
        ValueError: there is no such metric, or the report holds several models.
    """
    name, rows, drawn = _known(metric), single(report).rows, axes_or_new(ax)
    kinds = stacks(rows)
    values = [[float(getattr(rows[index].metrics, name)) for index in kind.members] for kind in kinds]
    if not kinds:
        return say(drawn, "No three layers differ only in the number of their block." if rows else NO_LAYER)
    if not any(map(any_finite, values)):
        return say(drawn, _no_finite(metric))
    lines = [
        drawn.plot(kind.numbers, line, marker=".", markersize=3, linewidth=1, **line_style(index))[0]
        for index, (kind, line) in enumerate(zip(kinds, values, strict=True))
    ]
    whole_numbers(drawn.xaxis)
    _ = finish(drawn, "block", metric)
    name_lines(drawn, lines, [kind.path for kind in kinds], "kind of layer")
    return drawn


def _known(metric: str) -> str:
    if metric not in _METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(_METRICS)}; got {metric!r}")
    return metric


def _no_finite(metric: str) -> str:
    return f"No layer has a finite {metric}."


def _null(row: LayerReport, metric: str) -> Any:
    return None if row.null is None else getattr(row.null, metric, None)


def units(report: Report, path: str, ax: Axes | None = None, *, columns: int | None = None) -> Axes:
    """Draw a map of the units of a layer, by their importance over the units' mean.

    Args:
        report: of one model.
        path: of the layer.
        ax: axes to draw on; those of a new pyplot figure by default.
        columns: units per row; by default about one and a half times as many as there are rows. If the units have
            two axes (heads and their features), a row is one index of the first.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: the report has no such path.
        TypeError: an argument has the wrong type.
        ValueError: the report holds several models.
    """
    row, drawn = single(report)[path], axes_or_new(ax)
    found = np.asarray(row.units, np.float64)
    if not any_finite(found):
        return say(drawn, "No unit has a finite importance.")
    found = found / found.mean() if found.sum() > 0 else found
    names = "row of the unit axes", "unit"
    if found.ndim != 2:
        width = min(columns or _columns(found.size), found.size)
        empty = np.full(-found.size % width, np.nan)
        found = np.concatenate([found.ravel(), empty]).reshape(-1, width)
        names = f"row of {width} units", "unit of the row"
    image = drawn.imshow(found, cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
    whole_numbers(drawn.xaxis)
    whole_numbers(drawn.yaxis)
    _ = finish(drawn, x=names[1], y=names[0], title=path)
    _ = color_bar(drawn, image, "importance over the mean")
    return drawn


def _columns(units: int) -> int:
    """Return how many units a row has: a divisor of their number, if one is near."""
    wanted = math.sqrt(1.5 * units)
    divisors = [width for width in range(1, units + 1) if units % width == 0 and 0.6 < width / wanted < 1.7]
    return min(divisors, key=lambda width: abs(math.log(width / wanted)), default=math.ceil(wanted))


def history(
    reports: Report | Sequence[Report] | Sequence[Mapping[str, Any]] | str | os.PathLike[str],
    metric: str = "utilization",
    ax: Axes | None = None,
    *,
    steps: Sequence[float] | None = None,
) -> Axes:
    """Draw one metric over training, a line per layer; or what a monitor logged, a line per column.

    Args:
        reports: of one model at several steps, in a list, or stacked, as returned by `jax.lax.scan`. Or the path of a
            CSV file, or its rows as dicts, with a row for each check and the numbers of `Monitor.scalars` as columns.
        metric: a field of `jaxeff.metrics.Metrics`. Of a CSV file or rows, a column or a pattern of columns, in which *
            stands for any text: "updates/ratio/*".
        ax: axes to draw on; those of a new pyplot figure by default.
        steps: position of each report or row on the horizontal axis; by default the column 'step', if there is one,
            and 0, 1, 2, ... otherwise.

    Raises:
        ImportError: Matplotlib is not installed.
        OSError: the file cannot be read.
        TypeError: an argument has the wrong type.
        ValueError: there is no such metric or column, the reports have different layers or are stacked more than once,
            or the number of steps is not that of the reports.
    """
    rows = _rows_of(reports)
    if rows is None:
        values, names = _over_training(reports, _known(metric))
    else:
        values, names = _over_rows(rows, metric)
        steps = [float(row["step"]) for row in rows] if steps is None and "step" in rows[0] else steps
    at = range(len(values)) if steps is None else steps
    if len(at) != len(values):
        what = "reports" if rows is None else "rows"
        raise ValueError(f"`steps` must be one for each of {len(values)} {what}; got {len(at)}")
    drawn = axes_or_new(ax)
    if not any_finite(values):
        nothing = f"No number of {metric} is finite." if rows is not None else _no_finite(metric)
        return say(drawn, nothing if names else NO_LAYER)
    lines = [
        drawn.plot(at, values[:, index], marker=".", markersize=3, **line_style(index))[0]
        for index in range(len(names))
    ]
    if all(float(step).is_integer() for step in at):
        whole_numbers(drawn.xaxis)
    first = "report" if rows is None else "row"
    _ = finish(drawn, first if steps is None else "step", metric)
    if rows is None:
        name_lines(drawn, lines, names)
    elif len(names) > 1:
        name_lines(drawn, lines, names, "column")
    return drawn


def _rows_of(given: Any) -> list[Mapping[str, Any]] | None:
    """Return the rows of a CSV file, or those given; None for reports."""
    if isinstance(given, (str, os.PathLike)):
        with open(given, newline="", encoding="utf-8") as file:
            rows: list[Mapping[str, Any]] = [*csv.DictReader(file)]
        if not rows:
            raise ValueError(f"`reports` is a file without rows: {os.fspath(given)!r}")
        return rows
    are_rows = isinstance(given, Sequence) and given and all(isinstance(row, Mapping) for row in given)
    return [*given] if are_rows else None


def _over_rows(rows: Sequence[Mapping[str, Any]], pattern: str) -> tuple[np.ndarray, list[str]]:
    """Return [rows, columns], nan for an empty cell, and the names of the columns that match."""
    known = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in known if matches(name, pattern)]
    if not names:
        raise ValueError(
            f"`metric` must be a column, or a pattern of some: {', '.join(known)}; got {pattern!r}"
        )
    cells = [[row.get(name) for name in names] for row in rows]
    return np.array(
        [[float(cell) if cell not in (None, "") else np.nan for cell in row] for row in cells]
    ), names


def _over_training(reports: Any, metric: str) -> tuple[np.ndarray, list[str]]:
    """Return [reports, layers], and the paths of the layers."""
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
        raise ValueError("`reports` must have the same layers")
    return np.stack([getattr(report.single().numbers.metrics, metric) for report in reports]), paths[0]
