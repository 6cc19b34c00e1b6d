"""A report as text, 100 columns wide or as wide as a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxeff.model.roles import whole_numbers
from jaxeff.output.stacks import PLAIN, Row, Stack, alone, explained, folded, named, rows_of
from jaxeff.output.text import (
    UNKNOWN,
    WIDTH,
    aligned,
    decimal,
    left_out,
    number,
    percent,
    ranged,
    section,
    sparkline,
    wrapped,
)
from jaxeff.report._limits import LIMITS
from jaxeff.report._recommendations import grouped, recommend
from jaxeff.report._records import AttentionReport, LayerReport, Snapshot

HEADER = (
    "layer", "shape", "emits", "weights", "bytes", "MACs",
    "utilization", "depth", "null", "gini", "units", "fan-in", "dead",
)  # fmt: skip
_DISPENSABLE = ("fan-in", "bytes", "shape", "emits", "weights", "dead", "units", "MACs", "gini", "depth")
_LEFT = ("shape", "emits", "depth")
_MARK = "*"
Columns = Mapping[str, Mapping[str, float]]
"""Further columns of a table: a number for each path, by the heading of the column."""


def render(
    report: Snapshot,
    shown: Sequence[int] | None = None,
    width: int = WIDTH,
    top: int | None = None,
    *,
    blocks: bool = False,
    columns: Columns | None = None,
) -> str:
    """Render a row per layer in forward order, the model, the share that was analyzed, and recommendations.

    In a table of more than 20 layers, those that differ only in the number of their block share a row.

    Args:
        shown: indices of the layers to show, in that order; all layers by default. The text below the rows
            always covers all of them.
        width: of the lines, in columns.
        top: number of rows and of recommendations to show; all by default.
        blocks: whether each block has a row of its own.
        columns: more numbers of the layers.
    """
    more = columns or {}
    folded = fold(report.rows, range(len(report.rows)) if shown is None else shown, blocks)
    kept = folded[:top]
    table = [
        (*HEADER, *more),
        *((*line(report.rows, each), *_more(report.rows, each, more)) for each in kept),
    ]
    lines = aligned(table, width, dispensable=_DISPENSABLE, left=_LEFT) if kept else []
    layers = sum(len(each.members) for each in kept)
    lines += (
        left_out(len(report.rows), layers, "layers") if report.rows else wrapped(no_weights(report), width)
    )
    lines += [each for text in legend(kept) for each in wrapped(text, width)]
    lines += ["", *(line for text in model(report) for line in wrapped(text, width))]
    lines += [*_attentions(report, width), *_notes(report, width), *_recommendations(report, width, top)]
    return "\n".join(lines)


def fold(rows: Sequence[Row], shown: Sequence[int], blocks: bool = False) -> list[Stack]:
    """Return what each row of the table holds: a stack of layers at the place of its first, or a single layer.

    Args:
        shown: indices of the layers to show, in that order.
        blocks: whether each layer has a row of its own, however many there are.
    """
    # Members are places among what is shown.
    return [
        stack._replace(members=tuple(shown[place] for place in stack.members))
        for stack in rows_of([named(rows[index]) for index in shown], blocks)
    ]


def legend(folded: Sequence[Stack]) -> list[str]:
    """Return the sentence that explains rows of several layers; nothing if there are none."""
    holds = "the lowest and the highest number, sums of weights, bytes, MACs and dead units, and utilization over depth"
    return explained(folded, holds, "report.table(blocks=True)")


def line(rows: Sequence[LayerReport], stack: Stack) -> tuple[str, ...]:
    """Return the cells of a row of one or several layers, one per word of HEADER."""
    members = [rows[index] for index in stack.members]
    return cells(members[0]) if len(members) == 1 else _cells_of(stack, members)


def _more(rows: Sequence[LayerReport], stack: Stack, columns: Columns) -> list[str]:
    """Return the cells of a row in further columns."""
    paths = [rows[index].path for index in stack.members]
    found = [[float(column[path]) for path in paths if path in column] for column in columns.values()]
    return [ranged(values, number) if values else UNKNOWN for values in found]


def check_columns(report: Snapshot, columns: Columns) -> None:
    """Raise a ValueError for a column that holds no number of any layer."""
    paths = {row.path for row in report.rows}
    for name, column in columns.items():
        if paths and not paths & column.keys():
            raise ValueError(
                f"`columns` {name!r} has a number for no layer of this report: its keys must be paths, such as "
                f"{report.rows[0].path!r}"
            )


def _cells_of(stack: Stack, rows: Sequence[LayerReport]) -> tuple[str, ...]:
    first = rows[0]
    macs = [row.macs for row in rows if row.macs is not None]
    dead = [float(row.activity.dead) for row in rows if row.activity is not None]
    nulls = [float(row.null.utilization) for row in rows if row.null is not None]
    used = [float(row.metrics.utilization) for row in rows]
    return (
        stack.label + (_MARK if any(row.note for row in rows) else ""),
        "x".join(map(str, first.shape)),
        first.nonlinearity or UNKNOWN,
        number(sum(row.size for row in rows)),
        number(sum(row.bytes for row in rows)),
        number(sum(macs)) if len(macs) == len(rows) else UNKNOWN,
        ranged(used, percent),
        sparkline(used),
        ranged(nulls, percent) if nulls else UNKNOWN,
        ranged([float(row.metrics.gini) for row in rows], decimal),
        f"{ranged([float(row.effective_units) for row in rows], number)}/{number(first.unit_count)}",
        ranged([float(row.effective_fan_in) for row in rows], number),
        number(sum(dead)) if dead else UNKNOWN,
    )


def lead(report: Snapshot) -> str:
    """Return a sentence on what the numbers can say of this model, and the call that measures what they cannot."""
    known = [row for row in report.rows if row.null is not None]
    told = sum(
        abs(float(row.metrics.utilization) - float(row.null.utilization)) > LIMITS.of_noise(row.size)
        for row in known
        if row.null is not None
    )
    apart = (
        f" ({told} of {len(known)} layers {'differs' if told == 1 else 'differ'} from noise)" if known else ""
    )
    call = "jaxeff.advise(params, apply_fn, batch, loss_fn=..., targets=...)"
    return f"The table shows where importance lies{apart}, not how much can go: `{call}` measures that."


def of_several(members: int, layers: int) -> str:
    """Return the text of a report of several models (from `vmap`) or steps (from `scan`), which has no table."""
    return (
        f"Report of {members} models or steps, {layers} layers each. "
        "jax.tree.map(lambda x: x[0], report) is the first."
    )


def no_weights(report: Snapshot) -> str:
    """Return the sentence that replaces the rows of a report without any."""
    arrays = [(other.path, other.shape, other.role.removesuffix(" array")) for other in report.others]
    return f"No weights: no floating leaf of two axes or more multiplies data.{whole_numbers(arrays)}"


def cells(row: LayerReport) -> tuple[str, ...]:
    """Return the cells of the row of one layer, one per word of HEADER."""
    dead = "" if row.activity is None else number(float(row.activity.dead))
    return (
        row.path + (_MARK if row.note else ""),
        "x".join(map(str, row.shape)),
        row.nonlinearity or UNKNOWN,
        number(row.size),
        number(row.bytes),
        UNKNOWN if row.macs is None else number(row.macs),
        percent(float(row.metrics.utilization)),
        UNKNOWN,
        percent(float(row.null.utilization)) if row.null is not None else UNKNOWN,
        decimal(float(row.metrics.gini)),
        f"{number(float(row.effective_units))}/{number(row.unit_count)}",
        number(float(row.effective_fan_in)),
        dead or UNKNOWN,
    )


def model(report: Snapshot) -> list[str]:
    """Return sentences on the model as a whole, the first on what its numbers can say."""
    model = report.model
    rows = [row for row in report.rows if not row.is_sum]
    counted = sum(row.size for row in rows if math.isfinite(float(row.metrics.effective_params)))
    lines = [lead(report)] if report.rows else []
    lines += [
        f"Model: utilization {percent(float(model.utilization))} ({number(float(model.effective_params))} "
        f"effective of {number(counted)} weights), null {percent(float(model.null_utilization))}. "
        f"Scored by {report.criterion}.",
        f"Parameters: {model.total_params:,} in all; {shares(report)}.",
    ]
    known = [row.macs for row in rows if row.macs is not None]
    if known:
        lines.append(
            f"Cost: {number(sum(known))} multiply-accumulates (MACs) an example in these layers, "
            f"{number(sum(row.bytes for row in rows))} bytes of weights."
        )
    if model.relevance_residual is not None:
        lines.append(
            f"Relevance: {float(model.relevance_residual):.1e} of the winning outputs was neither passed on "
            "to the inputs nor taken by biases."
        )
    if excluded := int(model.excluded):
        verb = "is" if excluded == 1 else "are"
        lines.append(f"{excluded} of {len(report.rows)} layers {verb} not finite and left out of these sums.")
    return lines


def shares(report: Snapshot) -> str:
    """Return which part of all parameters was analyzed, and how."""
    total = max(report.model.total_params, 1)
    analyzed = report.analyzed_params
    others = sum(other.size for other in report.others)
    magnitude = report.model.weights - analyzed
    roles = sorted({other.role for other in report.others})
    named = f" ({', '.join(roles[:4])}{', ...' if len(roles) > 4 else ''})" if roles else ""
    weights = [
        f"{analyzed / total:.1%} analyzed with activations",
        f"{magnitude / total:.1%} by magnitude only",
    ]
    if not ran(report):
        weights = [f"{magnitude / total:.1%} weights"]
    return ", ".join([*weights, f"{others / total:.1%} not weights{named}"])


def ran(report: Snapshot) -> bool:
    """Return whether the report is of a model that ran on a batch, rather than of weights alone."""
    return any(row.activity is not None or row.macs is not None or row.reason for row in report.rows)


def _attentions(report: Snapshot, width: int) -> list[str]:
    return section(width, "Attention:", attentions(report))


def attentions(report: Snapshot) -> list[str]:
    """Return a line per softmax that weighs data, one for blocks that are alike: its heads, or why none were found."""
    found = report.attentions
    if len(report.rows) > PLAIN:
        stacks = folded([(each.path, (each.heads, each.units)) for each in found])
    else:
        stacks = [alone(each.path, index) for index, each in enumerate(found)]
    return [
        *(attention(stack.label, [found[index] for index in stack.members]) for stack in stacks),
        *(f"{each.path or 'model'}: no heads found: {each.reason}" for each in report.headless),
    ]


def attention(label: str, found: Sequence[AttentionReport]) -> str:
    """Return a sentence on the range of the heads' entropies, and of the units' shares of the importance."""
    entropies = [np.asarray(each.entropy) for each in found]
    importances = [np.asarray(each.importance) for each in found]
    shares = [each / np.sum(each, axis=-1, keepdims=True) for each in importances]
    heads, units = found[0].heads, found[0].units
    within, each = ("", "head") if units == heads else (f" in {units} groups", "group")
    return (
        f"{label or 'model'}: {heads} heads{within}, entropy {_between(entropies, decimal)} nats; "
        f"a {each} holds {_between(shares, percent)} of the importance"
    )


def _between(arrays: Sequence[np.ndarray], formatted: Callable[[float], str]) -> str:
    low, high = min(float(each.min()) for each in arrays), max(float(each.max()) for each in arrays)
    return f"{formatted(low)} to {formatted(high)}"


def _notes(report: Snapshot, width: int) -> list[str]:
    return section(width, f"Notes ({_MARK}):", [f"{path}: {note}." for path, note in notes(report)])


def notes(report: Snapshot) -> list[tuple[str, str]]:
    """Return paths, and what readers must know about them."""
    noted = [(row.path, row.note) for row in report.rows if row.note]
    damaged = [
        (o.path, f"{int(o.nonfinite):,} elements are nan or infinite")
        for o in report.others
        if int(o.nonfinite)
    ]
    return [*noted, *damaged]


def _recommendations(report: Snapshot, width: int, top: int | None) -> list[str]:
    advice = [str(each) for each in grouped(recommend(report), report)]
    shown, rest = advice[:top], left_out(len(advice), top, "recommendations")
    return [*(section(width, "Recommendations:", shown) or [""] * len(rest)), *rest]
