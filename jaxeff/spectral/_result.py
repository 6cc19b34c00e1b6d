"""The result: one row for each matrix, and what shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxeff.output.shown import Shown
from jaxeff.output.text import some, terminal_width
from jaxeff.spectral import _table as table
from jaxeff.spectral._records import Spectrum


@dataclasses.dataclass(frozen=True, repr=False)
class Spectra(Shown):
    """The spectra of a model's weights. `str(spectra)` is a table; `spectra[path]` is one matrix.

    Attributes:
        rows: one for each matrix, in the order of the parameters, or of the program if it is known.
        share: of the squared outputs that each `output_rank` keeps; None if it was not asked for.
    """

    rows: tuple[Spectrum, ...]
    share: float | None = None

    def __getitem__(self, path: str) -> Spectrum:
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no matrix {path!r}; there are {some([*self], 5)}")

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths of the matrices."""
        return (row.path for row in self.rows)

    def __contains__(self, path: object) -> bool:
        return any(row.path == path for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, *, width: int | None = None, blocks: bool = False, alpha: bool = False) -> str:
        """Return a row for each matrix, as text; measured over expected of random numbers is 1.00 for noise.

        Args:
            width: in columns; that of the terminal by default.
            blocks: whether each block of a deep model has a row of its own.
            alpha: whether to add WeightWatcher's alpha.
        """
        return table.render(self.rows, self.share, width or terminal_width(), blocks=blocks, alpha=alpha)

    def __str__(self) -> str:
        return self.table()

    def columns(self) -> dict[str, dict[str, float]]:
        """Return columns for the table of a report: `report.table(columns=spectra.columns())`.

        They are the effective and the stable rank over those of random numbers, and the output rank if it is known.
        """
        found = {
            "e/null": {row.path: row.effective_rank_ratio for row in self.rows},
            "s/null": {row.path: row.stable_rank_ratio for row in self.rows},
        }
        ranks = {row.path: float(row.output_rank) for row in self.rows if row.output_rank is not None}
        return found | ({"rank": ranks} if ranks else {})

    def to_records(self) -> list[dict[str, Any]]:
        """Return a dictionary of plain Python data for each matrix: for pandas, CSV or JSON."""
        return [row.to_record() for row in self.rows]
