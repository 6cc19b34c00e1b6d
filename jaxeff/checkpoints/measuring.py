"""Arrays that stream by in pieces -> their numbers, in memory for a few pieces.

Counts by bit pattern are merged from piece to piece on the device, while the host sums the units of the
same piece and reads the next. Imports `stored`, `distribution`, `exact`, `sketch`, `importance`, `noise`,
`records`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxeff import distribution, exact, importance, noise, sketch
from jaxeff.checkpoints.stored import Stored
from jaxeff.exact import Metrics
from jaxeff.records import Null, OtherNumbers
from jaxeff.sketch import Refinement, Sketch

LARGE, SMALL = 1 << 22, 1 << 18  # a piece: two lengths, so that few programs are compiled
SORTED = 1 << 16  # up to here an array is sorted
_CLOSE = 1e-5  # a bound that asks for a second pass

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
        cells: how the weights are spread, as `distribution.of` has it, where that was asked for.
    """

    metrics: Metrics
    units: np.ndarray
    effective_units: Array
    largest: np.float32
    cells: Array | None = None


class Measuring:
    """One weight, as its pieces come.

    A context: an interrupted interpreter must not end while the device still reads a piece.
    """

    def __init__(self, stored: Stored, unit_axis: int) -> None:
        self.stored = stored
        self.units = UnitSums(stored.shape, unit_axis)
        self.largest = np.float32(0)
        self.counts: Sketch | None = None
        self.all = np.zeros(0, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _ = jax.block_until_ready(self.counts)

    def add(self, piece: Piece) -> None:
        if self.stored.size > SORTED:
            # Wait for the piece before: else pieces pile up where the device is slower than the disk.
            self.counts = counted_on(jax.block_until_ready(self.counts), piece.elements)
        wide = magnitudes(piece.elements)
        self.units.add(piece.start, wide)
        self.largest = np.maximum(self.largest, wide.max())
        if self.stored.size <= SORTED:
            self.all = wide

    def found(self, curves: bool = False) -> Measured:
        units = self.units.sums
        if self.counts is None:
            found = sorted_metrics(self.all)
        else:
            found = read_counts(self.counts, lambda: pieces(self.stored))
        scale = self.largest if 0 < self.largest < np.inf else 1
        effective = metrics_of((units / scale).astype(np.float32)).effective_params
        with np.errstate(over="ignore"):
            return Measured(
                found,
                units.astype(np.float32),
                effective,
                self.largest,
                self._cells() if curves else None,
            )

    def _cells(self) -> Array:
        return sorted_cells(self.all) if self.counts is None else sketch.distribute(self.counts)


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


# Counts.


def counted_on(counts: Sketch | None, elements: np.ndarray) -> Sketch:
    """The counts with those of one more piece [n], n up to LARGE."""
    if counts is None:
        counts = sketch.sketch(np.zeros(SMALL, elements.dtype), np.int32(0))
    return _counted_on(counts, padded(elements), np.int32(elements.size))


@jax.jit
def _counted_on(counts: Sketch, elements: Array, size: Array) -> Sketch:
    return sketch.merge(counts, sketch.sketch(jnp.abs(elements), size))


def padded(elements: np.ndarray) -> np.ndarray:
    """With zeros, to one of the two lengths of a piece."""
    length = SMALL if elements.size <= SMALL else LARGE
    if elements.size == length:
        return elements
    whole = np.zeros(length, elements.dtype)
    whole[: elements.size] = elements
    return whole


def read_counts(counts: Sketch, again: Callable[[], Iterator[Piece]]) -> Metrics:
    """The metrics, each within 1e-5: where the counts leave more open, a second pass closes it."""
    found, bounds = jax.device_get(sketch.summarize(counts))
    if max(map(float, dataclasses.astuple(bounds))) <= _CLOSE:
        return found
    refinement = functools.reduce(
        lambda sum, piece: _refined_on(sum, counts, padded(piece.elements)), again(), None
    )
    return jax.device_get(sketch.summarize(counts, refinement))[0]


def _refined_on(sum: Refinement | None, counts: Sketch, elements: np.ndarray) -> Refinement:
    one = jax.block_until_ready(_refined(counts, elements))
    return one if sum is None else sketch.merge(sum, one)


@jax.jit
def _refined(counts: Sketch, elements: Array) -> Refinement:
    # Zeros are in no cell and below no limit, those of the padding too.
    return sketch.refine(counts, jnp.abs(elements))


# Metrics of what lies in memory.


def metrics_of(x: np.ndarray) -> Metrics:
    """Of [n] importances, float32."""
    if x.size <= SORTED:
        return sorted_metrics(x)
    in_memory = lambda: (Piece(at, x[at : at + SMALL]) for at in range(0, x.size, SMALL))  # noqa: E731
    counts = functools.reduce(lambda counts, piece: counted_on(counts, piece.elements), in_memory(), None)
    assert counts is not None
    return read_counts(counts, in_memory)


def sorted_metrics(x: np.ndarray) -> Metrics:
    """Of [n] importances, float32, n up to SORTED."""
    return jax.device_get(exact.summarize_padded(_lengthened(x), np.int32(x.size)))


def sorted_cells(x: np.ndarray) -> Array:
    return _cells(_lengthened(x), np.int32(x.size))


_cells = jax.jit(distribution.of_padded)


def _lengthened(x: np.ndarray) -> np.ndarray:
    whole = np.zeros(SORTED, np.float32)
    whole[: x.size] = x
    return whole


def null() -> Null:
    """The metrics of magnitudes of noise, the same for every weight."""
    known = noise.known(importance.named("magnitude"))
    assert known is not None
    values: Any = np.asarray(known, np.float32)
    return Null(*values)


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
        floats = [jnp.asarray(np.float32(value)) for value in (mean, rms, maximum)]
    most = np.iinfo(np.int32).max
    return OtherNumbers(*floats, *(jnp.asarray(min(count, most), jnp.int32) for count in (zeros, nonfinite)))
