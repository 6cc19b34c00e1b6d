"""Costs as text, as wide as the terminal, from 50 to 100 columns. Imports `table`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxeff.table import WIDTH, number, percent, shorten_all

if TYPE_CHECKING:
    from jaxeff.cost.compiling import Compiled
    from jaxeff.cost.footprint import Memory, Size
    from jaxeff.cost.records import Cost
    from jaxeff.cost.timing import Latency
    from jaxeff.cost.work import Work

# Operators below this share of everything are one row together.
_SHOWN = 0.0005


def width() -> int:
    return max(50, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def of_cost(cost: Cost) -> str:
    """The totals, a row per layer, a row per operator, and what was not counted."""
    lines = [*wrapped(_headline(cost)), ""]
    share = cost.total.weight
    if cost.layers:
        lines += [*rows(("layer", *_COLUMNS), _cells(cost.layers, share)), ""]
    lines += rows(("operator", *_COLUMNS), _cells(_with_rest(cost.operators, share), share))
    if cost.statements:
        lines += ["", "Not in these numbers, or assumed:"]
        lines += [line for statement in _merged(cost) for line in wrapped(statement, "- ", "  ")]
    return "\n".join(lines)


_COLUMNS = ("MACs", "FLOPs", "transc.", "share")


def _headline(cost: Cost) -> str:
    total = cost.total
    each = cost.per_example
    batch = f" for a batch of {cost.batch_size:,}" if cost.batch_size is not None else ""
    parts = [f"{_amounts(total)}{batch}"]
    if each is not None and cost.batch_size != 1:
        parts.append(f"{_amounts(each)} per example")
    if len(cost.phases) > 1:
        parts += [f"{phase} {_amounts(work)}" for phase, work in cost.phases.items()]
    if cost.devices > 1:
        share = cost.per_device
        known = "divided as XLA decides" if share is None else f"{_amounts(share)} on each"
        parts.append(f"{cost.devices:,} devices, {known}")
    if total.padding_macs:
        parts.append(f"{percent(total.padding_macs / total.macs)} of the MACs meet padding")
    return "; ".join(parts) + "."


def _amounts(work: Work) -> str:
    return f"{number(work.macs)} MACs, {number(work.flops)} FLOPs"


def _cells(works: dict[str, Work], whole: int) -> list[tuple[str, ...]]:
    return [
        (
            name,
            number(work.macs),
            number(work.flops),
            number(work.transcendentals),
            percent(work.weight / whole) if whole else "–",
        )
        for name, work in works.items()
    ]


def _with_rest(works: dict[str, Work], whole: int) -> dict[str, Work]:
    shown = {name: work for name, work in works.items() if work.weight >= _SHOWN * whole and work.weight}
    rest = [work for name, work in works.items() if name not in shown and work.weight]
    return {**shown, f"({len(rest)} more)": sum(rest[1:], rest[0])} if rest else shown


def _merged(cost: Cost) -> list[str]:
    """One sentence an operator and reason, whichever modules it stands in."""
    runs: dict[tuple[str, str, str, str], int] = {}
    for found in cost.statements:
        key = found.phase, found.operator, found.kind, found.reason
        runs[key] = runs.get(key, 0) + found.runs
    return [
        f"{operator} ({count:,} x {phase}), {kind}: {reason}."
        for (phase, operator, kind, reason), count in runs.items()
    ]


def rows(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table: names to the left, shortened where the line is full, numbers to the right."""
    lines = [header, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(1, len(header))]
    first = min(max(len(line[0]) for line in lines), max(width() - sum(widths) - len(widths), 8))
    names = [header[0], *shorten_all([line[0] for line in cells], first)]

    def line(name: str, found: Sequence[str]) -> str:
        numbers = [cell.rjust(size) for cell, size in zip(found[1:], widths, strict=True)]
        return " ".join([name.ljust(first), *numbers]).rstrip()

    top, *rest = map(line, names, lines)
    return [top, "-" * len(top), *rest]


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, width(), initial_indent=first, subsequent_indent=rest)


def of_latency(latency: Latency) -> str:
    """What was timed, and what bounds it."""
    compiled, shown = latency.compiled, latency.seconds
    lines = [
        f"{duration(latency.median)} a run (10th percentile {duration(latency.percentile_10)}, 90th "
        f"{duration(latency.percentile_90)}, {len(shown)} runs); compiled before in "
        f"{duration(compiled.lower_seconds + compiled.compile_seconds)}.",
        f"{_amounts(latency.cost.total)}: {number(latency.flops_per_second)} FLOPs a second.",
    ]
    if latency.arithmetic_intensity is not None:
        lines[-1] += f" At most {latency.arithmetic_intensity:.3g} FLOPs a byte."
    peak = latency.peak
    if peak is not None and latency.compute_share is not None and latency.memory_share is not None:
        bound = "by neither" if latency.bound == "neither" else f"by {latency.bound}"
        lines.append(
            f"{percent(latency.compute_share)} of the arithmetic and {percent(latency.memory_share)} of the "
            f"memory traffic that {peak.device} reaches in {peak.dtype}: bounded {bound}."
        )
    if not latency.cost.complete:
        lines.append("Not all of it is in these numbers: see `cost.statements`.")
    return "\n".join(line for text in lines for line in wrapped(text))


def duration(seconds: float) -> str:
    """Three digits and a unit.

    >>> duration(0.00123), duration(4.0)
    ('1.23 ms', '4 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def of_memory(memory: Memory) -> str:
    """A row for each part, and one for each pruned weight."""
    parts = [*_of_sizes("parameters", memory.parameters), *_of_sizes("state", memory.state)]
    if memory.parameter_bytes_per_device not in (None, memory.parameter_bytes):
        parts.append(("parameters, on one device", _bytes(memory.parameter_bytes_per_device)))
    parts += _of_sizes("optimizer state", memory.optimizer_state or {})
    if memory.forward is not None:
        parts += _of_compiled("forward", memory.forward)
    remat = "gradient with its remat" if memory.own_remat else "gradient under checkpoint"
    for name, gradient in (("gradient without remat", memory.without_remat), (remat, memory.with_remat)):
        if gradient is not None:
            parts.append((f"{name}, activations kept", _bytes(gradient.kept_bytes)))
            parts += [] if gradient.compiled is None else _of_compiled(name, gradient.compiled)
    lines = rows(("memory", "bytes"), parts)
    if memory.storage:
        forms = ("dense", "masked", "packed", "compressed")
        cells = [
            (path, percent(1 - found.kept / found.size), *(_bytes(getattr(found, form)) for form in forms))
            for path, found in memory.storage.items()
        ]
        lines += ["", *rows(("weight", "sparsity", *forms), cells)]
    return "\n".join(lines)


def _of_sizes(name: str, sizes: dict[str, Size]) -> list[tuple[str, str]]:
    described = sizes.items()
    return [(f"{name}, {dtype} ({number(size.elements)})", _bytes(size.bytes)) for dtype, size in described]


def _of_compiled(name: str, found: Compiled) -> list[tuple[str, str]]:
    parts = {"peak": found.peak_bytes, "scratch": found.scratch_bytes}
    return [(f"{name}, {part} (XLA)", _bytes(count)) for part, count in parts.items()]


def _bytes(count: int | None) -> str:
    return "–" if count is None else f"{number(count)}B"
