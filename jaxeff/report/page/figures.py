"""Figures of the whole model: numbers as text, and charts as coordinates for the page's template."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxeff.output import text
from jaxeff.output.stacks import Stack
from jaxeff.report import _table as table
from jaxeff.report._limits import LIMITS
from jaxeff.report._records import LayerReport, Snapshot

_RANKED = 10
_LABELED = 4


def summary(report: Snapshot) -> dict[str, Any]:
    """Return the tiles at the top of the page, and the sentence on what was analyzed."""
    model = report.model
    tiles = [
        ("Utilization", text.percent(float(model.utilization)), f"null: {_noise(report)}"),
        ("Effective weights", text.number(float(model.effective_params)), f"of {model.weights:,}"),
        ("Parameters", f"{model.total_params:,}", table.shares(report)),
        ("Layers", f"{len(report.rows):,}", _excluded(report)),
        ("Redundancy", text.percent(float(model.average_redundancy)), "mean over layers"),
        (
            "Faint weights",
            text.percent(float(model.relative_sparsity_1e2)),
            "below 1 % of the mean",
        ),
    ]
    return {"criterion": report.criterion, "tiles": tiles}


def _noise(report: Snapshot) -> str:
    null = float(report.model.null_utilization)
    return "unknown" if math.isnan(null) else text.percent(null)


def _excluded(report: Snapshot) -> str:
    excluded = int(report.model.excluded)
    return f"{excluded} not finite and left out" if excluded else "all of them counted"


def anchors(report: Snapshot) -> dict[str, int]:
    """Return the index of each layer by path."""
    return {row.path: index for index, row in enumerate(report.rows)}


# The table.


@dataclasses.dataclass(frozen=True)
class Cell:
    """Text of a cell, and the number by which it is sorted; None if unknown."""

    text: str
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, or a stack of layers with its members, with utilization and its null as positions on a bar.

    Attributes:
        index: of the layer, or of the first of a stack.
        bar, null: from 0 to 100; None where unknown, and for a stack.
        depth: utilization from block to block, as a line of bars; empty for a single layer.
        members: of a stack; none for a single layer.
    """

    index: int
    path: str
    note: str
    emits: str
    shape: Cell
    weights: Cell
    bytes: Cell
    macs: Cell
    used: Cell
    bar: float | None
    null: float | None
    below: Cell
    gini: Cell
    redundancy: Cell
    units: Cell
    dead: Cell
    depth: str = ""
    members: Sequence[Row] = ()


def rows(layers: Sequence[LayerReport]) -> list[Row]:
    """Return the rows of the table, folded as those of `Report.table`."""
    folded = table.fold(layers, range(len(layers)))
    return [_folded(stack, [_row(index, layers[index]) for index in stack.members]) for stack in folded]


def _folded(stack: Stack, members: Sequence[Row]) -> Row:
    """Return one row for all members: sums of what adds up, and otherwise what they range over."""
    first = members[0]
    if len(members) == 1:
        return first

    def summed(cells: Sequence[Cell]) -> Cell:
        known = [cell.value for cell in cells if cell.value is not None]
        return Cell(text.number(sum(known)), sum(known)) if known else cells[0]

    def spanned(cells: Sequence[Cell], formatted: Callable[[float], str], between: str = "–") -> Cell:
        known = [cell.value for cell in cells if cell.value is not None]
        return Cell(text.ranged(known, formatted, between), sum(known) / len(known)) if known else cells[0]

    return Row(
        index=min(row.index for row in members),
        path=stack.label,
        note="; ".join(sorted({row.note for row in members if row.note})),
        emits=first.emits,
        shape=first.shape,
        weights=summed([row.weights for row in members]),
        bytes=summed([row.bytes for row in members]),
        macs=summed([row.macs for row in members]),
        used=spanned([row.used for row in members], text.percent),
        bar=None,
        null=None,
        below=spanned([row.below for row in members], lambda below: f"{100 * below:+.1f}", " to "),
        gini=spanned([row.gini for row in members], text.decimal),
        redundancy=spanned([row.redundancy for row in members], text.percent),
        units=spanned([row.units for row in members], text.percent),
        dead=summed([row.dead for row in members]),
        depth=text.sparkline([math.nan if row.used.value is None else row.used.value for row in members]),
        members=members,
    )


def _row(index: int, row: LayerReport) -> Row:
    used, null = float(row.metrics.utilization), _null(row)
    below = math.nan if null is None else null - used
    dead = math.nan if row.activity is None else float(row.activity.dead)
    return Row(
        index=index,
        path=row.path,
        note=row.note,
        emits=row.nonlinearity or "–",
        shape=Cell("×".join(map(str, row.shape)), row.size),
        weights=Cell(text.number(row.size), row.size),
        bytes=Cell(text.number(row.bytes), row.bytes),
        macs=Cell("–" if row.macs is None else text.number(row.macs), row.macs),
        used=_cell(used, text.percent(used)),
        bar=_percentage(used),
        null=None if null is None else _percentage(null),
        below=_cell(below, "–" if math.isnan(below) else f"{100 * below:+.1f}"),
        gini=_cell(float(row.metrics.gini), text.decimal(float(row.metrics.gini))),
        redundancy=_cell(float(row.metrics.redundancy), text.percent(float(row.metrics.redundancy))),
        units=_cell(
            float(row.effective_units) / row.unit_count,
            f"{text.number(float(row.effective_units))}/{text.number(row.unit_count)}",
        ),
        dead=_cell(dead, "–" if math.isnan(dead) else f"{dead:,.0f}"),
    )


def _null(row: LayerReport) -> float | None:
    return (
        None if row.null is None or math.isnan(float(row.null.utilization)) else float(row.null.utilization)
    )


def _cell(value: float, text: str) -> Cell:
    return Cell(text, float(f"{value:.6g}") if math.isfinite(value) else None)


def _percentage(value: float) -> float | None:
    return round(100 * value, 1) if math.isfinite(value) else None


# Charts: coordinates of their viewBox. In a narrow window text is 20 units high, and the margins have room for it.

WIDTH, HEIGHT = 720.0, 252.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 68.0, 28.0, 12.0, 48.0
_LABEL, _LINE = 26, 22.0  # characters of a label, and its distance from the next


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str
    label: str = ""
    end: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Points, marks to compare them with, and ticks: positions on an axis with their labels."""

    points: Sequence[Point]
    marks: Sequence[Point]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def utilization(layers: Sequence[LayerReport]) -> Chart:
    """Chart the utilization of every layer in forward order, with a dash at its null."""
    step = (WIDTH - _LEFT - _RIGHT) / max(len(layers), 1)
    points, marks = [], []
    for index, row in enumerate(layers):
        x = round(_LEFT + (index + 0.5) * step, 1)
        used, null = float(row.metrics.utilization), _null(row)
        if math.isfinite(used):
            points.append(Point(x, _height(used), f"{row.path}: {text.percent(used)}"))
        if null is not None:
            marks.append(Point(x, _height(null), f"{row.path}, null: {text.percent(null)}"))
    every = -(-len(layers) // 10) or 1
    ticks = [(round(_LEFT + (i + 0.5) * step, 1), str(i + 1)) for i in range(0, len(layers), every)]
    return Chart(points, marks, ticks, [(_height(part / 4), f"{25 * part}%") for part in range(5)])


def _height(fraction: float) -> float:
    return round(HEIGHT - _BOTTOM - min(max(fraction, 0), 1) * (HEIGHT - _BOTTOM - _TOP), 1)


def cost(layers: Sequence[LayerReport]) -> Chart:
    """Chart each layer's share of the cost, and how far its utilization lies below its null."""
    found = [(row, spare) for row in layers if not row.is_sum and (spare := _spare(row)) is not None]
    by_macs = has_macs(layers)
    costs = [float(row.macs or 0) if by_macs else float(row.size) for row, _ in found]
    total = sum(costs) or 1.0
    most = _limit(max([each / total for each in costs], default=0.0))
    scale = _limit(max([spare for _, spare in found], default=0.0))
    named = sorted(range(len(found)), key=lambda i: -costs[i] * max(found[i][1], 0))[:_LABELED]
    heights = [_height(spare / scale) for _, spare in found]
    labeled = _apart([index for index in named if found[index][1] > 0], heights)
    names = text.shorten([found[index][0].path for index in labeled], _LABEL)
    labels = dict(zip(labeled, names, strict=True))
    points = []
    for index, (row, spare) in enumerate(found):
        share = costs[index] / total
        x = round(_LEFT + share / most * (WIDTH - _LEFT - _RIGHT - 8), 1)
        title = f"{row.path}: {text.percent(share)} of the cost, {text.percent(spare)} spare"
        points.append(Point(x, heights[index], title, labels.get(index, ""), end=x > WIDTH / 2))
    places = [_LEFT + part / 4 * (WIDTH - _LEFT - _RIGHT - 8) for part in range(5)]
    x_ticks = [(round(x, 1), f"{100 * most * part / 4:.3g}%") for part, x in enumerate(places)]
    y_ticks = [(_height(part / 4), f"{25 * part * scale:.3g}%") for part in range(5)]
    return Chart(points, [], x_ticks, y_ticks)


def _apart(indices: Sequence[int], heights: Sequence[float]) -> list[int]:
    """Return the indices whose labels do not overlap an earlier one."""
    kept: list[int] = []
    for index in indices:
        if all(abs(heights[index] - heights[other]) >= _LINE for other in kept):
            kept.append(index)
    return kept


def _limit(most: float) -> float:
    """Return the end of an axis that reaches the largest value and has readable quarters."""
    return next((limit for limit in (0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8) if most <= limit), 1.0)


def has_macs(layers: Sequence[LayerReport]) -> bool:
    """Return whether the multiply-accumulates of every layer are known; otherwise cost is counted in weights."""
    return bool(layers) and all(row.macs is not None for row in layers)


def _spare(row: LayerReport) -> float | None:
    """Return 1 - utilization / null, at least 0."""
    used, null = float(row.metrics.utilization), _null(row)
    return None if null is None or not null or math.isnan(used) else min(max(1 - used / null, 0.0), 1.0)


# What to prune first.


def ranking(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Return the layers with the most weights to spare: null less utilization, times the size."""
    counted = [(index, row) for index, row in enumerate(layers) if not row.is_sum]
    total = sum(row.size for _, row in counted)
    found = [
        (index, spare) for index, row in counted if (spare := _spare(row) or 0.0) > LIMITS.of_noise(row.size)
    ]
    at_stake = sorted(
        ((spare * layers[index].size, index) for index, spare in found), key=lambda pair: -pair[0]
    )
    return [
        {
            "index": index,
            "path": layers[index].path,
            "spare": text.number(weights),
            "share": text.percent(weights / total),
            "of": text.percent(weights / layers[index].size),
            "where": "units" if _among_units(layers[index]) else "single weights",
        }
        for weights, index in at_stake[:_RANKED]
    ]


def _among_units(row: LayerReport) -> bool:
    """Return whether more is spare among the units than within them, by the chain rule of entropy."""
    return (
        float(row.effective_units) / row.unit_count < float(row.effective_fan_in) * row.unit_count / row.size
    )


def others(report: Snapshot) -> list[tuple[str, str, str, str]]:
    """Return the leaves that are not weights: path, role, shape, mean absolute value."""
    return [
        (other.path, other.role, "×".join(map(str, other.shape)), text.number(float(other.mean_absolute)))
        for other in report.others
    ]
