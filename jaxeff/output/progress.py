"""Progress bars on standard error, for work that takes seconds."""

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
_SHORTEST, _LONGEST = 4, 40  # columns of a bar
_TIME = 7
_ENOUGH = 1.0  # seconds of steps needed to estimate the time of others
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Part(NamedTuple):
    """A column of a bar, and its maximum width."""

    column: ProgressColumn
    width: int


@contextmanager
def progress_bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. Show nothing if stderr is not a terminal."""
    with _bar(title, total, shown, counted(total), _remaining(), elapsed()) as advance:
        yield lambda: advance(1)


@contextmanager
def bytes_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes of each step; show their rate."""
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
    """Duration of a step, from the steps in which no program was compiled.

    The first steps compile programs that the others only run, and may take a thousand times as long.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._seconds, self._done = 0.0, 0
        self.compiled = False

    def advance(self, count: int) -> None:
        """Record the end of a step of `count` items."""
        now = self._clock()
        if not self.compiled:
            self._seconds += now - self._last
            self._done += count
        self._last, self.compiled = now, False

    def remaining(self, left: float) -> float | None:
        """Return the seconds left; None until they can be estimated."""
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
    # Added once and never removed: the oldest supported jax can add listeners but not remove them.
    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == _COMPILED:
        for pace in _timing:
            pace.compiled = True


class _RemainingColumn(ProgressColumn):
    """The time left; dashes until it can be estimated."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = None if task.remaining is None else task.fields["pace"].remaining(task.remaining)
        if task.finished:
            seconds = 0.0
        return Text("-:--:--" if seconds is None else _clocked(seconds), style="progress.remaining")


def _clocked(seconds: float) -> str:
    """Format hours, minutes and seconds.

    >>> _clocked(3725.2)
    '1:02:06'
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def fitted(width: int, title: str, done: Part, *others: Part) -> list[ProgressColumn]:
    """Return columns that fit on one line: the title, a bar, the count, and as many others as have room.

    Args:
        width: of the terminal.
        others: the most informative first.
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
    """Format how many of how many."""
    digits = 6 if total is None else len(str(total))
    return Part(MofNCompleteColumn(table_column=ONE_LINE), 2 * digits + 1)


def elapsed() -> Part:
    return Part(TimeElapsedColumn(table_column=ONE_LINE), _TIME)


def _remaining() -> Part:
    return Part(_RemainingColumn(table_column=ONE_LINE), _TIME)
