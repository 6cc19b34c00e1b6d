"""A progress bar on standard error, for what takes seconds. Imports nothing of jaxeff."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def progress_bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. Shows nothing where standard error is no terminal."""
    with _bar(title, total, shown, MofNCompleteColumn(), TimeElapsedColumn()) as advance:
        yield lambda: advance(1)


@contextmanager
def bytes_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """The same of bytes, with their rate: gives a function to call with those of each step."""
    with _bar(title, total, shown, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def _bar(
    title: str, total: int | None, shown: bool, *columns: ProgressColumn
) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda count: None
        return
    shown_columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown_columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
