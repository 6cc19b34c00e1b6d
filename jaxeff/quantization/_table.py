"""The table of `jaxeff.outliers`, 100 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxeff.output.stacks import Stack
from jaxeff.output.text import UNKNOWN, WIDTH, aligned, number, percent, ranged, section, some, wrapped
from jaxeff.quantization._records import LayerOutliers
from jaxeff.report._table import fold

HEADER = (
    "layer", "max/med", "kurtosis", "channel", "zero", "half<", "in int8", "in fp8",
    "w int8", "int8/u", "w fp8", "fp8/u",
)  # fmt: skip
_LEGEND = (
    "max/med: largest |a| of the inputs over the median of those not 0; channel: which holds the largest; zero: share "
    "of inputs that are 0; half<: half of the inputs are below this. in, w: ||x - Q(x)|| / ||x|| of inputs and weights "
    "with one scale; /u: with a scale for each output"
)
_DISPENSABLE = ("fp8/u", "zero", "half<", "channel", "in fp8")
_MOST = 3


def render(rows: Sequence[LayerOutliers], blocks: bool) -> str:
    if not rows:
        return "No weights."
    folded = fold(rows, range(len(rows)), blocks)
    lines = [HEADER, *(_cells(stack, [rows[index] for index in stack.members]) for stack in folded)]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.reasons:
            reasons.setdefault(reason, []).append(row.path)
    notes = [f"{some([*dict.fromkeys(paths)])}: {reason}" for reason, paths in reasons.items()]
    table = aligned(lines, WIDTH, dispensable=_DISPENSABLE, left=("channel",))
    return "\n".join([*table, *wrapped(f"({_LEGEND}.)", WIDTH), *section(WIDTH, "Without numbers:", notes)])


def _cells(stack: Stack, rows: Sequence[LayerOutliers]) -> tuple[str, ...]:
    inputs = [row.inputs for row in rows if row.inputs is not None]
    weights = [row.weight for row in rows if row.weight is not None]
    by_unit = [each for each in weights if each.int8_by_unit is not None]
    tops = list(dict.fromkeys(_index(each.outlier_channels(1)[0][0]) for each in inputs))
    return (
        stack.label,
        _ranged([each.ratio for each in inputs]),
        _ranged([each.kurtosis for each in inputs]),
        " ".join(tops) if 0 < len(tops) <= _MOST else f"{len(tops)} others" if tops else UNKNOWN,
        _ranged([each.zeros for each in inputs], of_percent=True),
        _ranged([each.threshold(0.5) for each in inputs]),
        _ranged([each.int8 for each in inputs], of_percent=True),
        _ranged([each.fp8 for each in inputs], of_percent=True),
        _ranged([each.int8 for each in weights], of_percent=True),
        _ranged([each.int8_by_unit or 0.0 for each in by_unit], of_percent=True),
        _ranged([each.fp8 for each in weights], of_percent=True),
        _ranged([each.fp8_by_unit or 0.0 for each in by_unit], of_percent=True),
    )


def _index(channel: tuple[int, ...]) -> str:
    return ",".join(map(str, channel))


def _ranged(values: Sequence[float], *, of_percent: bool = False) -> str:
    if not values or all(map(math.isnan, values)):
        return UNKNOWN
    return ranged(values, percent if of_percent else number)
