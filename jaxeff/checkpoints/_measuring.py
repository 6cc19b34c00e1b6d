"""The numbers of a checkpoint's arrays, on the host.

Large arrays are counted piece by piece. Small ones are read whole, and sorted together with others of their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxeff.checkpoints._counting import Counted, counts_of
from jaxeff.checkpoints._reading import Progress, pieces
from jaxeff.checkpoints._stored import Stored
from jaxeff.metrics import Metrics
from jaxeff.metrics._curve import cells_of
from jaxeff.metrics._order import limits
from jaxeff.metrics._weighted import SQUARES, Spread, Weighted, effective_units, metrics_of, sums_of
from jaxeff.report import OtherNumbers

SORTED = 1 << 14  # arrays of up to this many elements are sorted


def magnitudes(elements: np.ndarray) -> np.ndarray:
    """Return abs in float32."""
    wide = elements.astype(np.float32)
    return np.abs(wide, out=wide)


class MeasuredWeight(NamedTuple):
    """The numbers of one weight's magnitudes.

    Attributes:
        sums: [16], from which its metrics are computed.
        integers: [3], as in `metrics_of`.
        cells: its distribution, as in `cells_of`, if curves were asked for.
    """

    sums: np.ndarray
    integers: np.ndarray
    cells: np.ndarray | None = None


class Units(NamedTuple):
    """The units of one weight.

    Attributes:
        sums: [units], sum of the importance of each unit's weights.
        effective: exp(entropy) of these sums.
        largest: max |w|; nan if any weight is nan.
    """

    sums: Any
    effective: float
    largest: np.float32


def measured(counted: Counted, curves: bool = False) -> MeasuredWeight:
    """Return the numbers of a weight that was counted."""
    sums = sums_of(counted.spread)
    if counted.squares is not None:
        sums[SQUARES] = counted.squares
    return MeasuredWeight(sums, counted.integers, cells_of(counted.spread) if curves else None)


def measured_rows(x: np.ndarray, curves: bool = False) -> list[MeasuredWeight]:
    """Measure the weights in the rows of x [weights, n], magnitudes in float32."""
    bits = np.sort(x.view(np.uint32), axis=1)  # in half the time of floats
    ends = [1, *limits(np.float32), np.uint32(0x7F800000)]
    zeros, *below, finite = (np.count_nonzero(bits < end, axis=1) for end in ends)
    if (finite < bits.shape[1]).any():
        bits = np.sort(np.where(bits < ends[-1], bits, 0), axis=1)
    values = bits.view(np.float32)[:, ::-1].astype(np.float64)
    largest = values[:, 0].copy()
    values /= np.where(largest > 0, largest, 1)[:, None]
    count = np.full(len(x), x.shape[1])
    integers = np.stack([zeros, count - finite, count], axis=1)
    tallied: Any = [tally[:, None].astype(np.float64) for tally in (zeros, count - finite, *below)]
    ones = np.ones(values.shape)
    sums = sums_of(Spread(Weighted(values, ones, None, None, largest), tuple(tallied)))
    cells: list[np.ndarray | None] = [None] * len(x)
    if curves:
        rows = zip(values, ones, largest, *tallied, strict=True)
        cells = [
            cells_of(Spread(Weighted(row, one, None, None, most), (a, b, c, d)))
            for row, one, most, a, b, c, d in rows
        ]
    return list(map(MeasuredWeight, sums, integers, cells))


def units_of_rows(x: np.ndarray, shape: tuple[int, ...], axis: int) -> list[Units]:
    """Return the units of the weights in the rows of x [weights, n], each of this shape."""
    x = x.reshape(len(x), *shape)
    others = tuple(1 + other for other in range(len(shape)) if other != axis)
    return units_of(x.sum(axis=others, dtype=np.float64), x.reshape(len(x), -1).max(axis=1))


@np.errstate(over="ignore", invalid="ignore")
def units_of(sums: np.ndarray, largest: np.ndarray) -> list[Units]:
    """Build the units of several weights from their sums [weights, units] and maxima [weights]."""
    scale = np.where((largest > 0) & (largest < np.inf), largest, 1)[:, None]
    return list(map(Units, sums.astype(np.float32), effective_units(sums / scale), largest))


@np.errstate(over="ignore", invalid="ignore")
def metrics_of_all(found: Sequence[MeasuredWeight]) -> Metrics:
    """Stack the metrics of all weights: each field is [weights]."""
    most = np.iinfo(np.int32).max
    integers = np.minimum([each.integers for each in found], most).astype(np.int32)
    metrics = metrics_of(np.stack([each.sums for each in found]), integers)
    return jax.tree.map(_narrowed, metrics)


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else numbers


def measure(stored: Stored, unit_axis: int, progress: Progress, curves: bool) -> tuple[MeasuredWeight, Units]:
    """Measure a large weight in one pass."""
    assert stored.dtype is not None
    counts, units = counts_of(stored.dtype), UnitSums(stored.shape, unit_axis)
    for piece in pieces(stored, progress):
        counts.add(piece.elements)
        units.add(piece.start, magnitudes(piece.elements))
    return measured(counts.result(), curves), units_of(units.sums[None], np.asarray([units.largest]))[0]


class UnitSums:
    """Importance of each unit, [units] float64, summed as the weights come in C order."""

    def __init__(self, shape: tuple[int, ...], axis: int) -> None:
        self.sums, self.largest = np.zeros(shape[axis]), np.float32(0)
        self.last = axis > 0
        self.row = shape[axis] if self.last else int(np.prod(shape[1:], dtype=np.int64))

    def add(self, start: int, x: np.ndarray) -> None:
        """Add a piece, which may begin and end inside rows."""
        self.largest = np.maximum(self.largest, x.max())
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


# Arrays that are not weights.


def measure_other(stored: Stored, progress: Progress) -> OtherNumbers:
    """Return the numbers of an array that is not a weight; nan if it holds none."""
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
        floats: list[Any] = [np.asarray(value, np.float32) for value in (mean, rms, maximum)]
    most = np.iinfo(np.int32).max
    counts: list[Any] = [np.asarray(min(count, most), np.int32) for count in (zeros, nonfinite)]
    return OtherNumbers(*floats, *counts)
