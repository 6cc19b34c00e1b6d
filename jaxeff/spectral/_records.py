"""The numbers of one matrix."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned, number
from jaxeff.spectral._null import LAWS, SpectralNull, utilization
from jaxeff.spectral._power_law import alpha

RANDOM = "indistinguishable from random numbers"


@dataclasses.dataclass(frozen=True, repr=False)
class Spectrum(Shown):
    """The singular values s of one matrix, and what they say. Numbers without a value are nan, with a `reason`.

    Attributes:
        path: of the layer, 'blocks/kernel[3]' for a block of a scan, with ' head 2' at the end for a head.
        shape: of the layer's weight.
        rows, columns: of its matrix: inputs and units. Taps of a convolution are inputs.
        singular_values: [min(rows, columns)], descending, in float64.
        utilization: exp(H) / N of the magnitudes of its elements, as in a report.
        effective_rank: exp(-sum p ln p) with p = s / sum s (Roy and Vetterli, 2007).
        stable_rank: sum s^2 / max s^2.
        energy_beyond_edge: share of sum s^2 in values beyond sqrt(v) (sqrt(rows) + sqrt(columns)), the Marchenko-Pastur
            edge of independent elements with the mean square v of these.
        null: the same numbers of a matrix of independent normal elements.
        output_rank: least rank that keeps `Spectra.share` of the squared outputs on the batch; None if unknown.
        reason: why there are no numbers, or no verdict; None if there are.
        note: what was assumed, or why there is no `output_rank`.
    """

    path: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    singular_values: np.ndarray
    utilization: float
    effective_rank: float
    stable_rank: float
    energy_beyond_edge: float
    null: SpectralNull
    output_rank: int | None = None
    reason: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        lines = [("number", "value", "random numbers")]
        for field in dataclasses.fields(self.null):
            expected = getattr(self.null, field.name)
            bounds = f"{number(expected.low)} to {number(expected.high)}"
            lines.append((field.name.replace("_", " "), number(getattr(self, field.name)), bounds))
        rank = [] if self.output_rank is None else [f"output rank {self.output_rank:,}"]
        facts = [*rank, *(text for text in (self.verdict, self.reason, self.note) if text)]
        return "\n".join([f"{self.path}: {self.rows:,} x {self.columns:,}", *aligned(lines), *facts])

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def effective_rank_ratio(self) -> float:
        """Effective rank over that of random numbers: 1 for noise, lower the more structure there is."""
        return self.effective_rank / self.null.effective_rank.mean

    @property
    def stable_rank_ratio(self) -> float:
        """Stable rank over that of random numbers."""
        return self.stable_rank / self.null.stable_rank.mean

    @property
    def utilization_ratio(self) -> float:
        """Utilization over that of normal random numbers."""
        return self.utilization / self.null.utilization.mean

    @functools.cached_property
    def alpha(self) -> float:
        """Exponent of the power law that fits the largest s^2 best, WeightWatcher's alpha; nan if none was fitted."""
        return alpha(self.singular_values) if self.singular_values.size else math.nan

    @property
    def law(self) -> str | None:
        """The law of random numbers that the matrix cannot be told from: 'normal', 'truncated normal' or 'uniform'.

        None unless effective rank, stable rank and utilization all lie where 95 % of random matrices do.
        """
        spectral = (
            self.effective_rank in self.null.effective_rank and self.stable_rank in self.null.stable_rank
        )
        if not spectral or self.reason is not None:
            return None
        return next((law for law in LAWS if self.utilization in utilization(law, self.size)), None)

    @property
    def verdict(self) -> str | None:
        """'indistinguishable from random numbers', with their law; None if it differs from them or has a `reason`."""
        return f"{RANDOM} ({self.law})" if self.law else None

    @property
    def factored_size(self) -> int | None:
        """Weights of two factors of `output_rank`, r (rows + columns); None if it is unknown."""
        return None if self.output_rank is None else self.output_rank * (self.rows + self.columns)

    @property
    def factored_saving(self) -> float | None:
        """Share of the weights, and of the MACs, that two factors would save; 0 if they would be more."""
        return None if self.factored_size is None else max(1 - self.factored_size / self.size, 0.0)

    def to_record(self) -> dict[str, Any]:
        """Return plain Python data without the singular values; nan becomes None."""
        numbers = (
            "utilization", "effective_rank", "stable_rank", "energy_beyond_edge",
            "utilization_ratio", "effective_rank_ratio", "stable_rank_ratio", "alpha",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in numbers}
        expected = {
            f"null_{field.name}_{bound}": getattr(getattr(self.null, field.name), bound)
            for field in dataclasses.fields(self.null)
            for bound in ("mean", "low", "high")
        }
        return {
            "path": self.path,
            "shape": list(self.shape),
            "rows": self.rows,
            "columns": self.columns,
            **{name: value if math.isfinite(value) else None for name, value in found.items()},
            **expected,
            "output_rank": self.output_rank,
            "factored_saving": self.factored_saving,
            "verdict": self.verdict,
            "reason": self.reason,
            "note": self.note,
        }
