"""Spectra as text: a row for each matrix, or for the blocks of a deep model."""

from __future__ import annotations

from collections.abc import Sequence

from jaxeff.output.stacks import Stack, rows_of
from jaxeff.output.text import UNKNOWN, aligned, number, percent, ranged, section, some, wrapped
from jaxeff.spectral._records import Spectrum

_HEADER = (
    "matrix", "size", "effective", "e/null", "stable", "s/null", "u/null", "beyond", "b null", "rank", "saves", "alpha",
)  # fmt: skip
_DISPENSABLE = ("b null", "size", "u/null", "beyond", "effective", "stable")


def render(rows: Sequence[Spectrum], share: float | None, width: int, *, blocks: bool, alpha: bool) -> str:
    if not rows:
        return "No matrices: no floating leaf has two axes or more."
    stacks = rows_of([(row.path, (row.shape, row.rows, row.columns)) for row in rows], blocks)
    members = [[rows[index] for index in stack.members] for stack in stacks]
    cells = [_cells(stack.label, rows, alpha) for stack, rows in zip(stacks, members, strict=True)]
    lines = aligned([_HEADER, *cells], width, dispensable=_DISPENSABLE)
    lines += ["", *wrapped(_legend(share), width)]
    random = [text for pair in zip(stacks, members, strict=True) for text in _random(*pair)]
    lines += section(width, "Indistinguishable from random numbers:", random)
    lines += section(width, "Without numbers, or without a verdict:", _by_text(rows, "reason"))
    lines += section(width, "Notes:", _by_text(rows, "note"))
    return "\n".join(lines)


def _legend(share: float | None) -> str:
    rank = f" rank keeps {percent(share)} of the squared outputs on the batch." if share else ""
    return (
        "effective and stable rank, e/null and s/null over those of random numbers, as u/null is for utilization: "
        f"1.00 is noise. beyond: energy beyond the Marchenko-Pastur edge, b null what noise has.{rank}"
    )


def _cells(label: str, rows: Sequence[Spectrum], alpha: bool) -> tuple[str, ...]:
    first = rows[0]
    ranks = [float(row.output_rank) for row in rows if row.output_rank is not None]
    savings = [row.factored_saving for row in rows if row.factored_saving is not None]
    return (
        label,
        f"{first.rows}x{first.columns}",
        ranged([row.effective_rank for row in rows], number),
        ranged([row.effective_rank_ratio for row in rows], _ratio),
        ranged([row.stable_rank for row in rows], number),
        ranged([row.stable_rank_ratio for row in rows], _ratio),
        ranged([row.utilization_ratio for row in rows], _ratio),
        ranged([row.energy_beyond_edge for row in rows], percent),
        percent(first.null.energy_beyond_edge.mean),
        ranged(ranks, number) if ranks else UNKNOWN,
        ranged(savings, percent) if savings else UNKNOWN,
        ranged([row.alpha for row in rows], _ratio) if alpha else UNKNOWN,
    )


def _ratio(value: float) -> str:
    return "?" if value != value else f"{value:.2f}"


def _random(stack: Stack, rows: Sequence[Spectrum]) -> list[str]:
    """Return a line for those of a row's matrices that cannot be told from random numbers, with the law."""
    alike = [place for place, row in enumerate(rows) if row.law is not None]
    if not alike:
        return []
    laws = ", ".join(sorted({str(rows[place].law) for place in alike}))
    return [f"{stack.part(alike)} ({laws})"]


def _by_text(rows: Sequence[Spectrum], name: str) -> list[str]:
    """Return each reason or note once, with the matrices that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if text := getattr(row, name):
            about.setdefault(text, []).append(row.path)
    return [f"{some(paths)}: {text}." for text, paths in about.items()]
