"""The report of a checkpoint as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxeff.checkpoints._opening import Checkpoint
from jaxeff.metrics import Metrics
from jaxeff.output import text
from jaxeff.report import LayerReport, Report, _table

# Metrics of weights to spare sort largest first, metrics of weights in use sort smallest first.
_USED = (
    *("utilization", "effective_params", "entropy", "normalized_entropy", "mean", "std", "max"),
    *("coverage_50", "coverage_80", "coverage_90"),
)
_SPARE = tuple(field.name for field in dataclasses.fields(Metrics) if field.name not in (*_USED, "size"))
# Columns that a checkpoint's table can have; its headings are orders too.
_HEADINGS = {"layer": "path", "weights": "size"}
_COLUMNS = ("layer", "shape", "weights", "bytes", "utilization", "null", "gini", "units", "fan-in")
ORDERS = (*_COLUMNS, *(name for name in ("path", "size", *_USED, *_SPARE) if name not in _COLUMNS))


def render(
    report: Report,
    checkpoint: Checkpoint,
    order: str = "path",
    top: int | None = None,
    width: int = text.WIDTH,
    *,
    pattern: str = "*",
    blocks: bool = False,
) -> str:
    """Render the report's table in an order of ORDERS, and what was left out of the report.

    `top` limits the rows and the recommendations, `pattern` the layers. The text on the model and the notes always
    cover all rows.

    Raises:
        ValueError: no layer matches the pattern.
    """
    found = set(text.matching([row.path for row in report.snapshot().rows], pattern))
    shown = [index for index in in_order(report, order) if index in found]
    table = _table.render(report.snapshot(), shown, width, top, blocks=blocks)
    return "\n".join([table, *_left_out(checkpoint, width)])


def in_order(report: Report, order: str) -> list[int]:
    """Return the indices of the rows in order; rows with an unknown number come last."""
    rows, order = report.single().rows, _HEADINGS.get(order, order)
    if order == "path":
        return list(range(len(rows)))  # the order of the checkpoint
    return sorted(range(len(rows)), key=lambda index: _key(order)(rows[index]))


def _key(order: str) -> Callable[[LayerReport], tuple]:
    if order == "shape":
        return lambda row: tuple(-length for length in row.shape)

    def by_number(row: LayerReport) -> tuple:
        value = _number(row, order)
        return math.isnan(value), value

    return by_number


def _number(row: LayerReport, order: str) -> float:
    """Return the number by which rows are sorted, smallest first."""
    match order:
        case "size":
            return -row.size
        case "bytes":
            return -row.bytes
        case "null":
            return math.nan if row.null is None else float(row.null.utilization)
        case "units":
            return float(row.effective_units) / row.unit_count
        case "fan-in":
            return float(row.effective_fan_in)
    value = float(getattr(row.metrics, order))
    return value if order in _USED else -value


def _left_out(checkpoint: Checkpoint, width: int) -> list[str]:
    parts = [
        f"{name} ({len(arrays):,} arrays, {sum(array.size for array in arrays):,} elements)"
        for name, arrays in checkpoint.left_out.items()
    ]
    said = f"Beside `params`, and not analyzed: {', '.join(parts)}."
    return ["", *text.wrapped(said, width)] if parts else []
