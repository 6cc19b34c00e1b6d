"""A report as text, 100 columns wide or as wide as a terminal. Imports `records`."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxeff.records import AttentionReport, LayerReport

if TYPE_CHECKING:
    from jaxeff.report import Report

WIDTH = 100
HEADER = (
    "layer", "shape", "emits", "weights", "bytes", "MACs",
    "utilization", "null", "gini", "units", "fan-in", "dead",
)  # fmt: skip
_DISPENSABLE = ("fan-in", "bytes", "shape", "emits", "weights", "dead", "units", "MACs", "gini")
_LEFT = ("shape", "emits")
_NAME = 16  # what names have to be shortened to before columns are left out
_MARK = "*"
_UNKNOWN = "–"


def render(
    report: Report, shown: Sequence[int] | None = None, width: int = WIDTH, advised: int | None = None
) -> str:
    """The table: a row per layer in forward order, the model, what was analysed, what to do.

    Args:
        shown: numbers of the rows to show, in that order; all of them unless given. What follows the rows
            speaks of all.
        width: of the lines, in columns.
        advised: how many recommendations to show, the first of them; all unless given.

    A report of several models (from `vmap` or `scan`) is not one table: it says how to pick one.
    """
    if np.ndim(report.model.utilization):
        members = np.shape(report.model.utilization)
        return (
            f"Report of {math.prod(members)} models or steps, {len(report.rows)} layers each. "
            "jax.tree.map(lambda x: x[0], report) is the first."
        )
    report = report.single()
    rows = report.rows
    chosen = rows if shown is None else [rows[index] for index in shown]
    lines = aligned([HEADER, *map(cells, chosen)], width, _DISPENSABLE) if chosen else []
    lines += left_out(len(rows), len(chosen), "layers") if rows else wrapped(no_weights(report), width)
    lines += ["", *(line for text in model(report) for line in wrapped(text, width))]
    lines += [*_attentions(report, width), *_notes(report, width), *_recommendations(report, width, advised)]
    return "\n".join(lines)


def no_weights(report: Report) -> str:
    """What is said in place of the rows of a report that has none."""
    # Here and not above: it imports Flax, which a checkpoint's report need not wait for.
    from jaxeff import leaves

    others = report.other_structure
    arrays = [(other.path, other.shape, other.role.removesuffix(" array")) for other in others]
    return f"No weights: no floating leaf of two axes or more multiplies data.{leaves.whole_numbers(arrays)}"


def aligned(lines: Sequence[Sequence[str]], width: int, dispensable: Sequence[str]) -> list[str]:
    """Lines of cells, the first of them headers, in columns; names take what is left of the width.

    A column without a number in any row has nothing to show, and is not there.

    Args:
        dispensable: headers of columns to leave out until names have room, the first of them first; a last
            line says so.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    headers, untold, gone = list(lines[0]), empty(lines), []
    kept = [index for index in range(1, len(widths)) if headers[index] not in untold]
    for header in dispensable:
        room = width - sum(widths[index] + 1 for index in kept)
        if header not in untold and room < min(widths[0], _NAME):
            gone.append(header)
            kept.remove(headers.index(header))
    first = max(min(widths[0], width - sum(widths[index] + 1 for index in kept)), 1)
    names = [lines[0][0], *shorten_all([line[0] for line in lines[1:]], first)]
    texts = [
        " ".join(
            [
                shorten(name, first).ljust(first),
                *(_placed(line[index], widths[index], lines[0][index]) for index in kept),
            ]
        ).rstrip()
        for name, line in zip(names, lines, strict=True)
    ]
    said = wrapped(f"(columns left out for want of width: {', '.join(gone)})", width) if gone else []
    return [texts[0], "-" * max(map(len, texts)), *texts[1:], *said]


def empty(lines: Sequence[Sequence[str]]) -> list[str]:
    """Headers of columns in which nothing is known of any row."""
    _, *columns = zip(*lines, strict=True)
    return [header for header, *column in columns if set(column) == {_UNKNOWN}]


def _placed(cell: str, width: int, header: str) -> str:
    """Names and shapes to the left, numbers to the right."""
    return cell.ljust(width) if header in _LEFT else cell.rjust(width)


def shorten(path: str, width: int) -> str:
    """The path in at most `width` characters, the middle left out: both its ends tell layers apart.

    >>> shorten("encoder/block_11/attention/query/kernel", 24)
    'encoder/bl…/query/kernel'
    """
    if len(path) <= width:
        return path
    end = max(width - 1 - (width - 1) * 2 // 5 - 1, 1)
    return f"{path[: width - 1 - end]}…{path[-end:]}"


def shorten_all(names: Sequence[str], width: int) -> list[str]:
    """Names in at most `width` characters each, so shortened that they stay apart where they can.

    They lose the words of the path that all begin with, then the word that all end with, and then a middle.

    >>> shorten_all([f"encoder.layer.{index}.attention.self.query.weight" for index in (2, 3)], 24)
    ['…2.attention.self.query…', '…3.attention.self.query…']
    """
    if max(map(len, names), default=0) <= width:
        return list(names)
    if len(names) > 1:
        names = _without_common_ends(names, width)
    best: list[str] = []
    for head in sorted(range(width), key=lambda head: abs(head - 0.4 * width)):
        shortened = [_without_middle(name, head, width) for name in names]
        best = max(best, shortened, key=lambda each: len(set(each)))
        if len(set(best)) == len(set(names)):
            break
    return best


def _without_common_ends(names: Sequence[str], width: int) -> list[str]:
    start = os.path.commonprefix(names)
    start = start[: max(start.rfind("/"), start.rfind(".")) + 1]
    names = [f"…{name[len(start) :]}" for name in names] if start else list(names)
    if max(map(len, names)) <= width:
        return names
    # The last word at most, as in `kernel` or `weight`.
    end = max(names[0].rfind("/"), names[0].rfind("."))
    last = names[0][end:] if end > 1 else ""
    return [f"{name.removesuffix(last)}…" for name in names] if last and _all_end(names, last) else names


def _all_end(names: Sequence[str], last: str) -> bool:
    return all(name.endswith(last) and len(name) > len(last) + 1 for name in names)


def _without_middle(name: str, head: int, width: int) -> str:
    tail = width - 1 - head
    return name if len(name) <= width else f"{name[:head]}…{name[len(name) - tail :]}"


def cells(row: LayerReport) -> tuple[str, ...]:
    """What stands under each word of HEADER."""
    dead = "" if row.activity is None else number(float(row.activity.dead))
    return (
        row.path + (_MARK if row.note else ""),
        "x".join(map(str, row.shape)),
        row.nonlinearity or _UNKNOWN,
        number(row.size),
        number(row.bytes),
        _UNKNOWN if row.macs is None else number(row.macs),
        percent(float(row.metrics.utilization)),
        percent(float(row.null.utilization)) if row.null is not None else _UNKNOWN,
        decimal(float(row.metrics.gini)),
        f"{number(float(row.effective_units))}/{number(row.unit_count)}",
        number(float(row.effective_fan_in)),
        dead or _UNKNOWN,
    )


def model(report: Report) -> list[str]:
    """What is said of the model as a whole, in sentences."""
    model = report.model
    counted = sum(row.size for row in report.rows if math.isfinite(float(row.metrics.effective_params)))
    lines = [
        f"Model: utilization {percent(float(model.utilization))} ({number(float(model.effective_params))} "
        f"effective of {number(counted)} weights), null {percent(float(model.null_utilization))}. "
        f"Scored by {report.criterion}.",
        f"Parameters: {model.total_params:,} in all; {shares(report)}.",
    ]
    known = [row.macs for row in report.rows if row.macs is not None]
    if known:
        lines.append(
            f"Cost: {number(sum(known))} multiply-accumulates (MACs) an example in these layers, "
            f"{number(sum(row.bytes for row in report.rows))} bytes of weights."
        )
    if model.relevance_residual is not None:
        lines.append(
            f"Relevance: {float(model.relevance_residual):.1e} of the winning outputs was neither passed on "
            "to the inputs nor taken by biases."
        )
    if int(model.excluded):
        lines.append(
            f"{int(model.excluded)} of {len(report.rows)} layers are not finite and left out of these sums."
        )
    return lines


def shares(report: Report) -> str:
    """What part of all parameters was analysed, and how."""
    total = max(report.model.total_params, 1)
    analysed = report.analysed_params
    others = sum(other.size for other in report.others)
    magnitude = report.model.weights - analysed
    roles = sorted({other.role for other in report.others})
    named = f" ({', '.join(roles[:4])}{', ...' if len(roles) > 4 else ''})" if roles else ""
    read = [f"{analysed / total:.1%} analysed with activations", f"{magnitude / total:.1%} by magnitude only"]
    unread = [f"{magnitude / total:.1%} weights"]
    return ", ".join([*(read if ran(report) else unread), f"{others / total:.1%} not weights{named}"])


def ran(report: Report) -> bool:
    """Whether the report is of a model that ran on a batch, and not of its weights alone."""
    return any(row.activity is not None or row.macs is not None or row.reason for row in report.rows)


def _attentions(report: Report, width: int) -> list[str]:
    return section(width, "Attention:", attentions(report))


def attentions(report: Report) -> list[str]:
    """A line for every softmax that weighs data: its heads, or why none were found."""
    return [
        *(attention(found) for found in report.attentions),
        *(f"{each.path or 'model'}: no heads found: {each.reason}" for each in report.headless),
    ]


def attention(found: AttentionReport) -> str:
    """The spread of the heads' entropies, and of the units' shares of the importance."""
    entropy, importance = np.asarray(found.entropy), np.asarray(found.importance)
    shares = importance / np.sum(importance, axis=-1, keepdims=True)
    units = "" if found.units == found.heads else f" in {found.units} groups"
    each = "head" if found.units == found.heads else "group"
    return (
        f"{found.path or 'model'}: {found.heads} heads{units}, entropy {decimal(float(entropy.min()))} to "
        f"{decimal(float(entropy.max()))} nats; a {each} holds {percent(float(shares.min()))} to "
        f"{percent(float(shares.max()))} of the importance"
    )


def _notes(report: Report, width: int) -> list[str]:
    return section(width, f"Notes ({_MARK}):", [f"{path}: {note}." for path, note in notes(report)])


def notes(report: Report) -> list[tuple[str, str]]:
    """Paths and what a reader must know of them."""
    noted = [(row.path, row.note) for row in report.rows if row.note]
    damaged = [
        (o.path, f"{int(o.nonfinite):,} elements are nan or infinite")
        for o in report.others
        if int(o.nonfinite)
    ]
    return [*noted, *damaged]


def _recommendations(report: Report, width: int, advised: int | None) -> list[str]:
    advice = [str(each) for each in report.recommendations()]
    shown, rest = advice[:advised], left_out(len(advice), advised, "recommendations")
    return [*(section(width, "Recommendations:", shown) or [""] * len(rest)), *rest]


def left_out(count: int, shown: int | None, what: str) -> list[str]:
    """A line that says how many were not shown; none where all were."""
    return [] if shown is None or count <= shown else [f"... {count - shown:,} of {count:,} {what} left out."]


def section(width: int, title: str, items: Sequence[str]) -> list[str]:
    """A list under a title; nothing where there are no items."""
    lines = [line for item in items for line in wrapped(item, width, "- ")]
    return ["", title, *lines] if lines else []


def wrapped(text: str, width: int, bullet: str = "") -> list[str]:
    """Lines of whole words, but for a word that is longer than a line; a path with a hyphen is one word."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,
    )


def number(value: float) -> str:
    """Three digits and a unit; '?' for nan.

    >>> number(590592), number(12), number(float("nan"))
    ('591k', '12', '?')
    """
    if math.isnan(value):
        return "?"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value / size < 999.5 else f"{value / size:.0f}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A fraction in percent; '?' for nan.

    >>> percent(0.7534)
    '75.3%'
    """
    return "?" if math.isnan(value) else f"{value:.1%}"


def decimal(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.3f}"
