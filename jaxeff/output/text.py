"""Text for a terminal: one layout of tables, and the words for numbers."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Collection, Sequence

WIDTH = 100
UNKNOWN = "–"
_NARROWEST = 50
_NAME = 16  # what names have to be shortened to before columns are left out


def terminal_width() -> int:
    """Columns of the terminal, from 50 to 100."""
    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def aligned(
    lines: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    dispensable: Sequence[str] = (),
    left: Collection[str] = (),
    gap: int = 1,
) -> list[str]:
    """Lay out lines of cells in columns, the first line of them headers with a rule below.

    Args:
        width: of the lines, in columns; names, the first cell of each line, are shortened to what the others
            leave. None for as wide as they are.
        dispensable: headers of columns that are left out until names have room, the first of them first, but
            after those that tell nothing of any row; a last line then says so.
        left: headers of columns that are set to the left, as names are; all others are set to the right.
        gap: spaces between columns.

    >>> print("\\n".join(aligned([("layer", "size"), ("kernel", "12")])))
    layer  size
    -----------
    kernel   12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    headers, kept, gone = list(lines[0]), list(range(1, len(widths))), []

    def room() -> int:
        return widths[0] if width is None else width - sum(widths[index] + gap for index in kept)

    empty = _empty(lines)
    # Names are not shortened for the sake of a column that tells nothing.
    wanted = [(header, widths[0]) for header in empty]
    wanted += [(header, min(widths[0], _NAME)) for header in dispensable if header not in empty]
    for header, least in wanted:
        if room() < least:
            gone.append(header)
            kept.remove(headers.index(header))
    first = max(min(widths[0], room()), 1)
    texts = [
        (" " * gap)
        .join(
            [
                shorten(line[0], first).ljust(first),
                *(_placed(line[index], widths[index], headers[index] in left) for index in kept),
            ]
        )
        .rstrip()
        for line in lines
    ]
    said = wrapped(f"(columns left out for want of width: {', '.join(gone)})", width or WIDTH) if gone else []
    rule = "-" * min(max(map(len, texts)), width or WIDTH)
    return [texts[0], rule, *texts[1:], *said]


def _empty(lines: Sequence[Sequence[str]]) -> list[str]:
    """Headers of columns in which nothing is known of any row."""
    _, *columns = zip(*lines, strict=True)
    return [header for header, *column in columns if set(column) == {UNKNOWN}]


def _placed(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def shorten(path: str, width: int) -> str:
    """The path in at most `width` characters, the middle left out: both its ends tell layers apart.

    >>> shorten("encoder/block_11/attention/query/kernel", 24)
    'encoder/bl…/query/kernel'
    """
    if len(path) <= width:
        return path
    end = max(width - 1 - (width - 1) * 2 // 5 - 1, 1)
    return f"{path[: width - 1 - end]}…{path[-end:]}"


def section(width: int, title: str, items: Sequence[str]) -> list[str]:
    """A list under a title; nothing where there are no items."""
    lines = [line for item in items for line in wrapped(item, width, "- ")]
    return ["", title, *lines] if lines else []


def left_out(count: int, shown: int | None, what: str) -> list[str]:
    """A line that says how many were not shown; none where all were."""
    return [] if shown is None or count <= shown else [f"... {count - shown:,} of {count:,} {what} left out."]


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


def duration(seconds: float) -> str:
    """Three digits and a unit.

    >>> duration(0.00123), duration(4.0)
    ('1.23 ms', '4 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
