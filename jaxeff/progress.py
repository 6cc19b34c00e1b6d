"""A progress bar on standard error, for what takes seconds. Imports nothing of jaxeff."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

ONE_LINE = Column(no_wrap=True)
_SHORTEST, _LONGEST = 4, 40  # a bar
_TIME = 7


class Part(NamedTuple):
    """A column of a bar, and how wide what it shows may be."""

    column: ProgressColumn
    width: int


@contextmanager
def progress_bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. Shows nothing where standard error is no terminal."""
    with _bar(title, total, shown, counted(total), _remaining(), elapsed()) as advance:
        yield lambda: advance(1)


@contextmanager
def bytes_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """The same of bytes, with their rate: gives a function to call with those of each step."""
    done = Part(DownloadColumn(table_column=ONE_LINE), len("100.0/1000.0 MB"))
    rate = Part(TransferSpeedColumn(table_column=ONE_LINE), len("1000.0 MB/s"))
    with _bar(title, total, shown, done, _remaining(), rate) as advance:
        yield advance


@contextmanager
def _bar(
    title: str, total: int | None, shown: bool, done: Part, *others: Part
) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda count: None
        return
    with Progress(*fitted(console.width, title, done, *others), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def fitted(width: int, title: str, done: Part, *others: Part) -> list[ProgressColumn]:
    """Columns that stay on one line: the title, a bar, what is done, and as many of the others as have room.

    Args:
        width: of the terminal.
        others: the most telling first.
    """
    room = width - len(title) - _SHORTEST - done.width - 2
    kept = []
    for other in others:
        if other.width < room:
            kept.append(other.column)
            room -= other.width + 1
    bar = BarColumn(min(_SHORTEST + max(room, 0), _LONGEST), table_column=ONE_LINE)
    return [TextColumn("{task.description}", table_column=ONE_LINE), bar, done.column, *kept]


def counted(total: int | None) -> Part:
    """How many of how many."""
    digits = 6 if total is None else len(str(total))
    return Part(MofNCompleteColumn(table_column=ONE_LINE), 2 * digits + 1)


def elapsed() -> Part:
    return Part(TimeElapsedColumn(table_column=ONE_LINE), _TIME)


def _remaining() -> Part:
    return Part(TimeRemainingColumn(table_column=ONE_LINE), _TIME)
