"""A report of a checkpoint as text. Imports `table`, `report`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from jaxeff import table
from jaxeff.checkpoints.opening import Checkpoint, natural
from jaxeff.exact import Metrics
from jaxeff.records import LayerReport
from jaxeff.report import Report

# Of what tells of weights to spare the largest first, of what tells of weights in use the smallest.
_USED = (
    *("utilization", "effective_params", "entropy", "normalized_entropy", "mean", "std", "max"),
    *("coverage_50", "coverage_80", "coverage_90"),
)
_SPARE = tuple(field.name for field in dataclasses.fields(Metrics) if field.name not in (*_USED, "size"))
ORDERS = ("path", "size", *_USED, *_SPARE)


def render(
    report: Report,
    checkpoint: Checkpoint,
    order: str = "path",
    top: int | None = None,
    width: int = table.WIDTH,
) -> str:
    """The report's table in an order of ORDERS, with the first `top` rows, and what was left out.

    The model, the notes and the recommendations are of all rows.
    """
    return "\n".join([table.render(report, in_order(report, order)[:top], width), *_left_out(checkpoint)])


def in_order(report: Report, order: str) -> list[int]:
    """The rows' numbers; a row whose number is not known comes last."""
    rows = report.single().rows
    return sorted(range(len(rows)), key=lambda index: _key(order)(rows[index]))


def _key(order: str) -> Callable[[LayerReport], tuple]:
    if order == "path":
        return lambda row: (natural(row.path),)
    if order == "size":
        return lambda row: (-row.size,)

    def by_number(row: LayerReport) -> tuple:
        value = float(getattr(row.metrics, order))
        return math.isnan(value), value if order in _USED else -value

    return by_number


def _left_out(checkpoint: Checkpoint) -> list[str]:
    parts = [
        f"{name} ({len(arrays):,} arrays, {sum(array.size for array in arrays):,} elements)"
        for name, arrays in checkpoint.left_out.items()
    ]
    return ["", f"Beside `params`, and not analysed: {', '.join(parts)}."] if parts else []
