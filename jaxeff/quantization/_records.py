"""The records of `jaxeff.outliers`, with their numbers on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxeff.metrics._histogram import BINS, COLUMNS, INVALID_BIN, PLACE_BITS, ZERO_BIN
from jaxeff.output.shown import Shown

_NUMBERS = BINS - COLUMNS  # bins that hold numbers above 0


@dataclasses.dataclass(frozen=True, repr=False)
class WeightErrors(Shown):
    """||W - Q(W)|| / ||W||, in the Frobenius norm, of a weight rounded to a format with symmetric scales.

    A scale is 127 (int8) or 448 (fp8: float8_e4m3fn) over the largest |w| of what shares it.

    Attributes:
        int8, fp8: with one scale for the whole weight.
        int8_by_unit, fp8_by_unit: with a scale for each output; None if it is unknown which axes these are.
    """

    int8: float
    int8_by_unit: float | None
    fp8: float
    fp8_by_unit: float | None


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class InputRanges(Shown):
    """Sizes of the inputs of a layer over all examples and positions.

    Attributes:
        largest: max |a|.
        median: of |a| over the inputs that are not 0, which a relu makes many of; rounded down to 9 bits after the
            leading one, so exact for bfloat16.
        kurtosis: mean a^4 / (mean a^2)^2: 3 for normal inputs, 1.8 for uniform ones around 0.
        zeros: fraction of inputs that are 0.
        int8, fp8: ||A - Q(A)|| / ||A|| of the inputs rounded with one scale: 127 or 448 over their largest in each run
            of the layer.
        channels: [inputs], max |a| of each channel.
        shape: of the channels: (768,), or (12, 64) for heads and their features.
        counts: [131072], inputs by the first 17 bits of |a|, as in `jaxeff.statistics.Ranges`.
    """

    largest: float
    median: float
    kurtosis: float
    zeros: float
    int8: float
    fp8: float
    channels: np.ndarray
    shape: tuple[int, ...]
    counts: np.ndarray

    @property
    def ratio(self) -> float:
        """max |a| over the median."""
        return self.largest / self.median

    def outlier_channels(self, count: int = 3) -> list[tuple[tuple[int, ...], float]]:
        """Return the channels with the largest inputs and their max |a| over the median, largest first."""
        order = np.argsort(-self.channels, kind="stable")[:count]
        return [
            (
                tuple(int(i) for i in np.unravel_index(index, self.shape)),
                float(self.channels[index]) / self.median,
            )
            for index in order
        ]

    def below(self, threshold: float) -> float:
        """Return the fraction of inputs with |a| < threshold, or 0: those that TEAL would leave out.

        The threshold is rounded down to 9 bits after the leading one, and the fraction of that is exact.

        Raises:
            ValueError: the threshold is negative or nan.
        """
        if not threshold >= 0:
            raise ValueError(f"`threshold` must be a number from 0 up, got {threshold}")
        at = int(np.float32(threshold).view(np.uint32)) >> PLACE_BITS
        return float(self._running()[min(at, _NUMBERS)])

    def threshold(self, fraction: float) -> float:
        """Return the smallest threshold, of 9 bits after the leading one, with `below(threshold) >= fraction`.

        Raises:
            ValueError: the fraction is not from 0 to 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"`fraction` must be from 0 to 1, got {fraction}")
        return _edge(int(np.argmax(self._running() >= fraction)))

    def _running(self) -> np.ndarray:
        """[bins + 1], the fraction of inputs below the start of each bin."""
        counts = np.concatenate([self.counts[ZERO_BIN : ZERO_BIN + 1], self.counts[:_NUMBERS]])
        running = np.cumsum(counts.astype(np.int64))
        return running / running[-1]


def median_of(counts: np.ndarray) -> float:
    """Return the median of the numbers above 0, each rounded down to the start of its bin.

    >>> counts = np.zeros(BINS, np.uint32)
    >>> counts[np.array([1.0, 2.0, 3.0, 5.0], np.float32).view(np.uint32) >> PLACE_BITS] = 1
    >>> median_of(counts)
    2.5
    """
    running = np.cumsum(counts[:_NUMBERS].astype(np.int64))
    middle = [(int(running[-1]) - 1) // 2, int(running[-1]) // 2]
    low, high = np.searchsorted(running, middle, side="right")
    return (_edge(int(low)) + _edge(int(high))) / 2


def _edge(index: int) -> float:
    """Return the smallest number of a bin."""
    return float(np.uint32(index << PLACE_BITS).view(np.float32))


def invalid_count(counts: np.ndarray) -> int:
    return int(counts[INVALID_BIN])


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LayerOutliers(Shown):
    """One weight, or one layer of stacked weights.

    Attributes:
        path: as in a report, with an index if a scan stacks several layers in one array.
        kind, shape, dtype, nonlinearity: as in a report.
        weight: the errors of rounding the weight; None if it has none.
        inputs: the sizes of its inputs; None if they were not read.
        reasons: why `weight` or `inputs`, or a part of them, has no numbers.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nonlinearity: str | None
    weight: WeightErrors | None
    inputs: InputRanges | None
    reasons: tuple[str, ...] = ()
