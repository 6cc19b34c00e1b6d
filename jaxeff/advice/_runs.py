"""How many runs of the model a search may still spend, and how long it may still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class OutOfRuns(Exception):
    """A stage has spent its runs; the next stage begins."""


class OutOfTime(Exception):
    """The time is up; what has been found so far is the result."""


class Runs:
    """Counts runs of the model, in forward passes: a gradient counts three.

    Args:
        most: that may be spent.
        seconds: that may be spent; None for no limit.
        step: called once for each forward pass.
    """

    def __init__(self, most: int, seconds: float | None, step: Callable[[], None] = lambda: None):
        self.count = 0
        self._limit = most
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._step = step

    @property
    def left(self) -> int:
        """Forward passes that this stage may still spend."""
        return self._limit - self.count

    def spend(self, forwards: int = 1, *, always: bool = False) -> None:
        """Count forward passes before they run.

        Args:
            always: also if the time or the runs are spent, as for what a result cannot do without.

        Raises:
            OutOfTime, OutOfRuns: they may not run.
        """
        if not always:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise OutOfTime
            if self.count + forwards > self._limit:
                raise OutOfRuns
        self.count += forwards
        for _ in range(forwards):
            self._step()

    def keeping(self, forwards: int) -> AbstractContextManager[None]:
        """A stage that leaves this number of runs to those after it."""
        return self.at_most(self.left - forwards)

    @contextmanager
    def at_most(self, forwards: int) -> Iterator[None]:
        """A stage that ends, without an error, once it has spent this number of runs."""
        outer = self._limit
        self._limit = min(outer, self.count + forwards)
        try:
            yield
        except OutOfRuns:
            pass
        finally:
            self._limit = outer
