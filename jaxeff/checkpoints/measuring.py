"""Arrays that stream by in pieces -> their numbers, in memory for a few pieces.

Large arrays are counted by bit pattern on the device, piece by piece, while the host sums the units of the same
piece and reads the next; small ones are sorted on the host. Imports `stored`, `metrics`, `records`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff.checkpoints.stored import Stored
from jaxeff.layers import effective_units
from jaxeff.metrics import Metrics, sketch
from jaxeff.metrics._curve import cells_of
from jaxeff.metrics._records import THRESHOLDS
from jaxeff.metrics._weighted import Spread, Weighted, metrics_of, sums_of
from jaxeff.metrics.sketch import Sketch
from jaxeff.numerics.placement import to_host
from jaxeff.records import OtherNumbers

LARGE, SMALL = 1 << 22, 1 << 18  # a piece: two lengths, so that two programs are compiled
SORTED = 1 << 16  # up to here an array is sorted, on the host

Progress = Callable[[int], None]  # bytes


class Piece(NamedTuple):
    """Elements of an array, in C order from one of them on."""

    start: int
    elements: np.ndarray


def pieces(stored: Stored, progress: Progress = lambda count: None) -> Iterator[Piece]:
    """The array from its first element to its last; calls `progress` with the bytes of each piece."""
    with stored.open() as read:
        start = 0
        while start < stored.size:
            left = stored.size - start
            stop = start + (LARGE if left >= LARGE else min(SMALL, left))
            elements = read(start, stop)
            yield Piece(start, narrowed(elements))
            progress(elements.nbytes)
            start = stop


def narrowed(elements: np.ndarray) -> np.ndarray:
    """Floats as they are counted: float64 as float32, and 8 bits as bfloat16, which holds them exactly."""
    if not jnp.issubdtype(elements.dtype, jnp.floating):
        return elements
    size = elements.dtype.itemsize
    if size == 8:
        with np.errstate(over="ignore"):
            return elements.astype(np.float32)
    return elements.astype(jnp.bfloat16) if size == 1 else elements


def magnitudes(elements: np.ndarray) -> np.ndarray:
    """abs in float32."""
    wide = elements.astype(np.float32)
    return np.abs(wide, out=wide)


class Measured(NamedTuple):
    """What one weight's magnitudes are reduced to.

    Attributes:
        metrics: of all weights.
        units: [units], importance summed over the weights of each.
        effective_units: exp(entropy) of these.
        largest: max |w|, nan where one is.
        cells: how the weights are spread, as `cells_of` has it, where that was asked for.
    """

    metrics: Metrics
    units: np.ndarray
    effective_units: np.ndarray
    largest: np.float32
    cells: np.ndarray | None = None


class Measuring:
    """One weight, as its pieces come.

    A context: an interrupted interpreter must not end while the device still reads a piece.
    """

    def __init__(self, stored: Stored, unit_axis: int) -> None:
        self.stored = stored
        self.units = UnitSums(stored.shape, unit_axis)
        self.largest = np.float32(0)
        self.counts: Sketch | None = None
        self.all: list[np.ndarray] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _ = jax.block_until_ready(self.counts)

    def add(self, piece: Piece) -> None:
        wide = magnitudes(piece.elements)
        if self.stored.size > SORTED:
            # Wait for the piece before: else pieces pile up where the device is slower than the disk.
            self.counts = counted_on(jax.block_until_ready(self.counts), wide)
        else:
            self.all.append(wide)
        self.units.add(piece.start, wide)
        self.largest = np.maximum(self.largest, wide.max())

    def found(self, curves: bool = False) -> Measured:
        integers = None
        if self.counts is None:
            spread = sorted_spread(np.concatenate(self.all))
        else:
            counts = to_host(self.counts)
            spread, integers = sketch.spread_of(counts, np.float64), sketch.integers_of(counts)
        units = self.units.sums
        scale = self.largest if 0 < self.largest < np.inf else 1
        with np.errstate(over="ignore", invalid="ignore"):
            return Measured(
                jax.tree.map(_narrowed, metrics_of(sums_of(spread), integers)),
                units.astype(np.float32),
                np.float32(effective_units(units / scale)),
                self.largest,
                cells_of(spread) if curves else None,
            )


class UnitSums:
    """Importance of each unit, [units] float64, summed as the weights come in C order."""

    def __init__(self, shape: tuple[int, ...], axis: int) -> None:
        self.sums = np.zeros(shape[axis])
        self.last = axis > 0
        self.row = shape[axis] if self.last else int(np.prod(shape[1:], dtype=np.int64))

    def add(self, start: int, x: np.ndarray) -> None:
        """Of the rows that a piece begins and ends in, it may have a part only."""
        row, column = divmod(start, self.row)
        head = min(-column % self.row, x.size)
        whole = (x.size - head) // self.row
        middle, tail = (
            x[head : head + whole * self.row].reshape(whole, self.row),
            x[head + whole * self.row :],
        )
        row_after = row + (column > 0)
        if self.last:
            self.sums[column : column + head] += x[:head]
            self.sums += middle.sum(axis=0, dtype=np.float64)
            self.sums[: tail.size] += tail
        else:
            for index, part in ((row, x[:head]), (row_after + whole, tail)):
                if part.size:
                    self.sums[index] += part.sum(dtype=np.float64)
            self.sums[row_after : row_after + whole] += middle.sum(axis=1, dtype=np.float64)


def counted_on(counts: Sketch | None, magnitudes: np.ndarray) -> Sketch:
    """The counts with those of one more piece [n], n up to LARGE."""
    length = SMALL if magnitudes.size <= SMALL else LARGE
    if magnitudes.size < length:
        magnitudes, given = np.zeros(length, np.float32), magnitudes
        magnitudes[: given.size] = given
        return counted_on_padded(counts, magnitudes, given.size)
    return counted_on_padded(counts, magnitudes, length)


def counted_on_padded(counts: Sketch | None, magnitudes: np.ndarray, size: int) -> Sketch:
    return _counted_on(_nothing() if counts is None else counts, magnitudes, np.int32(size))


@jax.jit
def _counted_on(counts: Sketch, magnitudes: Array, size: Array) -> Sketch:
    return sketch.merge(counts, sketch.count(magnitudes, size))


def _nothing() -> Sketch:
    return Sketch(*(np.zeros(shape, np.uint32) for shape in ((sketch.BINS, 4), (2,), ())))


def sorted_spread(x: np.ndarray) -> Spread:
    """Of [n] importances, float32."""
    invalid = ~((x >= 0) & np.isfinite(x))
    values = np.sort(np.where(invalid, np.float32(0), x))[::-1].astype(np.float64)
    largest = values[0]
    relative = values / (largest if largest > 0 else 1)
    hits = [values == 0, *(values < threshold for threshold in THRESHOLDS.values())]
    zeros, *below = (part.astype(np.float64) for part in hits)
    bad = np.zeros(x.size)
    bad[0] = np.count_nonzero(invalid)
    tallied = zeros - bad, bad, below[0], below[1]
    return Spread(Weighted(relative, np.ones(x.size), relative, np.zeros(x.size), largest), tallied)


def _narrowed(number: np.ndarray) -> np.ndarray:
    number = np.asarray(number)
    return number.astype(np.float32) if number.dtype.kind == "f" else number


# Arrays that are no weights.


def measure_other(stored: Stored, progress: Progress) -> OtherNumbers:
    """The numbers of an array that is no weight; nan where it holds none."""
    if stored.dtype is None or stored.dtype.kind == "b" or not stored.size:
        progress(stored.nbytes)
        return _other(np.nan, np.nan, np.nan, 0, 0)
    total, square, most, zeros, nonfinite = 0.0, 0.0, 0.0, 0, 0
    for _, elements in pieces(stored, progress):
        x = np.abs(elements.astype(np.complex128 if elements.dtype.kind == "c" else np.float64))
        total, square = total + float(x.sum()), square + float(np.dot(x, x))
        most = float(np.maximum(most, x.max()))
        zeros += int(np.count_nonzero(x == 0))
        nonfinite += int(np.count_nonzero(~np.isfinite(x)))
    return _other(total / stored.size, np.sqrt(square / stored.size), most, zeros, nonfinite)


def _other(mean: float, rms: float, maximum: float, zeros: int, nonfinite: int) -> OtherNumbers:
    with np.errstate(over="ignore"):
        floats = [np.asarray(value, np.float32) for value in (mean, rms, maximum)]
    most = np.iinfo(np.int32).max
    return OtherNumbers(*floats, *(np.asarray(min(count, most), np.int32) for count in (zeros, nonfinite)))
