"""A progress bar on standard error, for what takes seconds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

ONE_LINE = Column(no_wrap=True)
_SHORTEST, _LONGEST = 4, 40  # a bar
_TIME = 7
_ENOUGH = 1.0  # seconds of steps to tell the time of others from
_COMPILED = "/jax/core/compile/backend_compile_duration"


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
        with _timed() as pace:
            task = bar.add_task(title, total=total, pace=pace)

            def advance(count: int) -> None:
                pace.advance(count)
                bar.advance(task, count)

            yield advance


class Pace:
    """How long a step takes, from the steps in which no program was compiled.

    The first steps compile what the others only run, and may take a thousand times as long.

    Args:
        clock: tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._seconds, self._done = 0.0, 0
        self.compiled = False

    def advance(self, count: int) -> None:
        """A step has ended, in which `count` things were done."""
        now = self._clock()
        if not self.compiled:
            self._seconds += now - self._last
            self._done += count
        self._last, self.compiled = now, False

    def remaining(self, left: float) -> float | None:
        """Seconds for what is left; None until there is something to tell it from."""
        if not self._done or self._seconds < _ENOUGH:
            return None
        return left * self._seconds / self._done


_timing: list[Pace] = []


@contextmanager
def _timed() -> Iterator[Pace]:
    _listen()
    pace = Pace()
    _timing.append(pace)
    try:
        yield pace
    finally:
        _timing.remove(pace)


@functools.cache
def _listen() -> None:
    # Once and for good: the oldest supported jax can add a listener but not take one away.
    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _COMPILED:
        for pace in _timing:
            pace.compiled = True


class _RemainingColumn(ProgressColumn):
    """The time that is left; dashes until it can be told."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = None if task.remaining is None else task.fields["pace"].remaining(task.remaining)
        if task.finished:
            seconds = 0.0
        return Text("-:--:--" if seconds is None else _clocked(seconds), style="progress.remaining")


def _clocked(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clocked(3725.2)
    '1:02:06'
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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
    return Part(_RemainingColumn(table_column=ONE_LINE), _TIME)
