"""Arrays read in pieces, or whole if they are small."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np

from jaxeff.checkpoints._stored import Stored

PIECE = 1 << 20  # elements to read at once
_BATCH = 1 << 14  # elements to measure at once, which stay in a core's cache
_WAITING = 1 << 22  # elements that may wait for others of their kind

Progress = Callable[[int], None]  # bytes
T = TypeVar("T")


class Piece(NamedTuple):
    """Consecutive elements of an array, in C order."""

    start: int
    elements: np.ndarray


def pieces(stored: Stored, progress: Progress = lambda count: None) -> Iterator[Piece]:
    """Yield the pieces of an array from its first element to its last; call `progress` with the bytes of each."""
    with stored.open() as read:
        for start in range(0, stored.size, PIECE):
            elements = read(start, min(start + PIECE, stored.size))
            yield Piece(start, narrowed(elements))
            progress(elements.nbytes)


def whole(stored: Stored, progress: Progress) -> np.ndarray:
    """Read a small array as [n]."""
    with stored.open() as read:
        elements = read(0, stored.size)
    progress(elements.nbytes)
    return narrowed(elements)


def narrowed(elements: np.ndarray) -> np.ndarray:
    """Return float64 as float32, in which it is measured."""
    if elements.dtype != np.float64:
        return elements
    with np.errstate(over="ignore"):
        return elements.astype(np.float32)


def batches(items: Iterable[tuple[Hashable, int, T]]) -> Iterator[list[T]]:
    """Yield items of one key, several at a time.

    Args:
        items: each with its key, its number of elements, which is the same for all items of the key, and the
            value to yield.
    """
    waiting: defaultdict[Hashable, list[T]] = defaultdict(list)
    in_all = 0
    for key, size, item in items:
        group = waiting[key]
        group.append(item)
        in_all += size
        if size * len(group) >= _BATCH:
            in_all -= size * len(group)
            yield waiting.pop(key)
        elif in_all >= _WAITING:
            yield from waiting.values()
            waiting.clear()
            in_all = 0
    yield from waiting.values()


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Progress]:
    """Yield a function to call with the bytes of each step."""
    if not (shown and sys.stderr.isatty()):
        yield lambda count: None
        return
    # Imported here, because only a visible progress bar needs Rich.
    from jaxeff.output.progress import bytes_bar

    with bytes_bar(title, total, shown) as advance:
        yield advance
