"""Text for a terminal: the layout of tables, and the formatting of numbers."""

from __future__ import annotations

import fnmatch
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Collection, Sequence

WIDTH = 100
UNKNOWN = "–"
_NARROWEST = 50
_NAME = 16  # columns are left out only until names have this many characters


def terminal_width() -> int:
    """Return the columns of the terminal, from 50 to 100."""
    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def aligned(
    lines: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    dispensable: Sequence[str] = (),
    left: Collection[str] = (),
    gap: int = 1,
) -> list[str]:
    """Lay out lines of cells in columns, with the first line as headers above a rule.

    A column that is unknown in every row is not shown.

    Args:
        width: of the lines, in columns. The names, which are the first cells, are shortened to what the other
            columns leave. None for no limit.
        dispensable: headers of columns to leave out, the first of them first, until names have room. A last line
            says which were left out.
        left: headers of columns to align left, as names are; all others align right.
        gap: spaces between columns.

    >>> print("\\n".join(aligned([("layer", "size"), ("kernel", "12")])))
    layer  size
    -----------
    kernel   12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    headers, unknown, gone = list(lines[0]), empty(lines), []
    kept = [index for index in range(1, len(widths)) if headers[index] not in unknown]

    def room() -> int:
        return widths[0] if width is None else width - sum(widths[index] + gap for index in kept)

    for header in dispensable:
        if header not in unknown and room() < min(widths[0], _NAME):
            gone.append(header)
            kept.remove(headers.index(header))
    first = max(min(widths[0], room()), 1)
    names = [*shorten([headers[0]], first), *shorten([line[0] for line in lines[1:]], first)]
    texts = [
        (" " * gap)
        .join(
            [
                name.ljust(first),
                *(_placed(line[index], widths[index], headers[index] in left) for index in kept),
            ]
        )
        .rstrip()
        for name, line in zip(names, lines, strict=True)
    ]
    said = wrapped(f"(columns left out for want of width: {', '.join(gone)})", width or WIDTH) if gone else []
    rule = "-" * min(max(map(len, texts)), width or WIDTH)
    return [texts[0], rule, *texts[1:], *said]


def empty(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the headers of columns that are unknown in every row."""
    _, *columns = zip(*lines, strict=True)
    return [header for header, *column in columns if set(column) == {UNKNOWN}]


def _placed(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Shorten names together to at most `width` characters each, so that they stay distinct where they can.

    They lose the leading words that all share, then the last word if all share it, and then a middle.

    >>> shorten([f"encoder.layer.{index}.attention.self.query.weight" for index in (2, 3)], 24)
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
    # Only the last word, such as `kernel` or `weight`.
    end = max(names[0].rfind("/"), names[0].rfind("."))
    last = names[0][end:] if end > 1 else ""
    return [f"{name.removesuffix(last)}…" for name in names] if last and _all_end(names, last) else names


def _all_end(names: Sequence[str], last: str) -> bool:
    return all(name.endswith(last) and len(name) > len(last) + 1 for name in names)


def _without_middle(name: str, head: int, width: int) -> str:
    tail = width - 1 - head
    return name if len(name) <= width else f"{name[:head]}…{name[len(name) - tail :]}"


def section(width: int, title: str, items: Sequence[str]) -> list[str]:
    """Return a list under a title; nothing if there are no items."""
    lines = [line for item in items for line in wrapped(item, width, "- ")]
    return ["", title, *lines] if lines else []


def matches(name: str, pattern: str) -> bool:
    """Return whether a name matches a pattern, in which * stands for any text and ? for one character.

    Brackets stand for themselves, since paths have them.

    >>> matches("blocks/query[3]", "*/query[*]"), matches("blocks/query[3]", "query")
    (True, False)
    """
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def matching(paths: Sequence[str], pattern: str) -> list[int]:
    """Return the indices of the layers whose paths match a pattern, as in `matches`.

    Raises:
        TypeError: the pattern is not a string.
        ValueError: no layer matches, though there are layers.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"`pattern` must be a string, such as '*/attention/*', got {pattern!r}")
    found = [index for index, path in enumerate(paths) if matches(path, pattern)]
    if paths and not found:
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(f"no layer matches {pattern!r}, where * stands for anything; there are {shown}")
    return found


def some(names: Sequence[str], most: int = 3) -> str:
    """Join the first of several names, and say how many there are besides.

    >>> some(["a", "b"]), some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def left_out(count: int, shown: int | None, what: str) -> list[str]:
    """Return a line that says how many were not shown; nothing if all were."""
    return [] if shown is None or count <= shown else [f"... {count - shown:,} of {count:,} {what} left out."]


def wrapped(text: str, width: int, bullet: str = "") -> list[str]:
    """Wrap text at whole words, except words longer than a line. A path with a hyphen is one word."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_on_hyphens=False,
    )


def number(value: float) -> str:
    """Format with three digits and a unit; '?' for nan.

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
    """Format a fraction in percent; '?' for nan.

    >>> percent(0.7534)
    '75.3%'
    """
    return "?" if math.isnan(value) else f"{value:.1%}"


def decimal(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.3f}"


def ranged(values: Sequence[float], formatted: Callable[[float], str], between: str = "–") -> str:
    """Format the lowest and the highest of several numbers; one number if they look the same.

    >>> ranged([0.3, 0.25, 0.4], percent), ranged([2.0, 2.0], number)
    ('25.0–40.0%', '2')
    """
    finite = [value for value in values if not math.isnan(value)] or [math.nan]
    low, high = formatted(min(finite)), formatted(max(finite))
    return low if low == high else f"{low.removesuffix('%')}{between}{high}"


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """Draw numbers as bars of a line of text, from the lowest to the highest of them.

    More numbers than `width` are averaged with their neighbors; what is nan or infinite is a dot.

    >>> sparkline([1, 2, 3, 2, 8]), sparkline([1, 1, math.nan, math.inf]), len(sparkline(range(100)))
    ('▁▂▃▂█', '▄▄··', 8)
    """
    count = min(len(values), width)
    edges = [round(part * len(values) / max(count, 1)) for part in range(count + 1)]
    means = [_mean(values[low:high]) for low, high in zip(edges, edges[1:], strict=False)]
    finite = [mean for mean in means if not math.isnan(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join("·" if math.isnan(mean) else _level(mean, low, high) for mean in means)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _level(value: float, low: float, high: float) -> str:
    # What differs by less than the table prints is flat.
    if high - low <= 1e-3 * abs(high):
        return _LEVELS[3]
    return _LEVELS[round((value - low) / (high - low) * (len(_LEVELS) - 1))]


def duration(seconds: float) -> str:
    """Format seconds with three digits and a unit.

    >>> duration(0.00123), duration(4.0)
    ('1.23 ms', '4 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
