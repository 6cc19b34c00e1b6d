"""Counts of large arrays by bit pattern, in pieces and on the host.

NumPy counts about as fast as a compiled scatter (a float32 in 5.5 ns, 16 bits in 1.6 ns), compiles nothing, and
leaves accelerators to others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from jaxeff.metrics._histogram import BINS, COLUMNS, INVALID_BIN, LIMITS, PLACE_BITS
from jaxeff.metrics._weighted import Spread, Weighted

_BLOCK = 1 << 17  # weights at a time, which stay in a core's cache
_PACKED = 36
"""A bin sums 2^36 and the position of each weight: exact in float64 for a block, and in int64 for a run."""
_RUN = 1 << 21
_TINY = 1e-300  # below the smallest float32


class Counted(NamedTuple):
    """Counts of the weights of an array.

    Attributes:
        spread: of single weights or of bins.
        integers: [3], numbers of zeros, of invalid importances, and of all weights.
        squares: sum (v - mean)^2 relative to the largest; None if the spread determines it.
    """

    spread: Spread
    integers: np.ndarray
    squares: float | None = None


class Counts(Protocol):
    """Running counts of magnitudes, to which pieces of an array are added."""

    def add(self, elements: np.ndarray) -> None: ...

    def result(self) -> Counted: ...


def counts_of(dtype: np.dtype) -> Counts:
    """Return the empty counts for an array of this dtype."""
    return PatternCounts(dtype) if dtype.itemsize <= 2 else BinCounts()


class PatternCounts:
    """Exact counts of every number that a float of 8 or 16 bits can be."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype, self.bits = dtype, np.dtype(f"u{dtype.itemsize}")
        self.counts = np.zeros(1 << 8 * dtype.itemsize, np.int64)

    def add(self, elements: np.ndarray) -> None:
        for block in _blocks(elements.view(self.bits)):
            self.counts += np.bincount(block, minlength=self.counts.size)

    def result(self) -> Counted:
        used = np.flatnonzero(self.counts)
        values, counts = np.abs(used.astype(self.bits).view(self.dtype).astype(np.float32)), self.counts[used]
        order = np.flatnonzero(np.isfinite(values))
        order = order[np.argsort(values[order])[::-1]]
        invalid = int(counts.sum() - counts[order].sum())
        values, counts = values[order], counts[order]
        below = [int(counts[values.view(np.uint32) < limit].sum()) for limit in (1, *LIMITS)]
        largest = values[0] if values.size else np.float32(0)
        return _counted(Weighted(values.astype(np.float64), counts, None, None, largest), invalid, below)


class BinCounts:
    """Counts of float32 bit patterns in the bins of `jaxeff.sketch`, with the mean of each bin."""

    def __init__(self) -> None:
        self.packed, self.size = np.zeros(BINS, np.int64), 0  # of what was added since counts and places
        self.counts, self.places = np.zeros((2, BINS), np.int64)
        self.below: list[int] = [0, 0, 0]  # 1, the smallest pattern of any number but 0, and the limits
        self.largest = np.uint32(0)
        self.pivot, self.off, self.square = None, 0.0, 0.0

    def add(self, elements: np.ndarray) -> None:
        at, places = np.empty(_BLOCK, np.int64), np.empty(_BLOCK)
        for block in _blocks(elements.view(np.uint32)):
            block = block & np.uint32(0x7FFFFFFF)
            here, place = at[: block.size], places[: block.size]
            _ = np.right_shift(block, PLACE_BITS, out=here)
            _ = np.bitwise_and(block, (1 << PLACE_BITS) - 1, out=place, casting="unsafe", dtype=np.uint32)
            place += float(1 << _PACKED)
            sums = np.bincount(here, weights=place)
            self.packed[: sums.size] += sums.astype(np.int64)
            self.size += block.size
            if self.size >= _RUN:
                self._unpack()
            hits = [int(np.count_nonzero(block < limit)) for limit in (1, *LIMITS)]
            self.below = [below + more for below, more in zip(self.below, hits, strict=True)]
            self.largest = np.maximum(self.largest, block.max())
            self._add_squares(block.view(np.float32), place)

    def _unpack(self) -> None:
        used = np.flatnonzero(self.packed)
        sums = self.packed[used]
        self.counts[used] += sums >> _PACKED
        self.places[used] += sums & ((1 << _PACKED) - 1)
        self.packed[used], self.size = 0, 0

    def _add_squares(self, magnitudes: np.ndarray, buffer: np.ndarray) -> None:
        """Sum squares about one of the weights, to keep digits of nearly equal ones; unused if one is not finite."""
        if self.pivot is None:
            self.pivot = float(magnitudes[0])
        with np.errstate(over="ignore", invalid="ignore"):
            apart = np.subtract(magnitudes, self.pivot, out=buffer, dtype=np.float64)
            self.off += float(apart.sum())
            # BLAS is not used, as its threads wait for each other longer than they multiply.
            self.square += float(np.einsum("i,i", apart, apart))

    def result(self) -> Counted:
        self._unpack()
        used = np.flatnonzero(self.counts[:INVALID_BIN])[::-1]
        counts = self.counts[used]
        start = (used << PLACE_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        width = np.ldexp(1.0, np.maximum(used // COLUMNS, 1) - 127) / COLUMNS
        values = start + width * (self.places[used] / counts) / (1 << PLACE_BITS)
        invalid = int(self.counts[INVALID_BIN:].sum())
        largest = self.largest.view(np.float32)
        found = _counted(Weighted(values, counts, start, width, largest), invalid, self.below)
        if invalid:
            return found
        squares = max(self.square - self.off / counts.sum() * self.off, 0.0)
        scale = max(float(largest), _TINY)
        return found._replace(squares=squares / scale / scale)


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, x.size, _BLOCK):
        yield x[start : start + _BLOCK]


def _counted(found: Weighted, invalid: int, below: list[int]) -> Counted:
    """Scale descending importances by the largest; an invalid one makes every metric nan."""
    size = int(found.counts.sum()) + invalid
    zeros, *tallied = below
    if not found.values.size:
        found = Weighted(np.zeros(1), np.ones(1), None, None, np.float32(0))
    scale = max(float(found.largest), _TINY)
    values, low, width = (
        part if part is None else part / scale for part in (found.values, found.low, found.width)
    )
    weighted = Weighted(values, found.counts.astype(np.float64), low, width, np.float64(found.largest))
    first, second, third, fourth = (np.full(1, count, np.float64) for count in (zeros, invalid, *tallied))
    return Counted(Spread(weighted, (first, second, third, fourth)), np.asarray([zeros, invalid, size]))
