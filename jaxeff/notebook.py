"""A report as notebooks show it: one small table, without style or script of its own. Imports `table`.

The page that `Report.to_html` writes has more; a notebook strips scripts from what it has not run itself.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxeff import table

if TYPE_CHECKING:
    from jaxeff.report import Report

SHOWN = 60
"""Rows at most: the first ones, and how many were left out."""


def render(report: Report) -> str:
    """HTML in which every name is escaped. A report of several models or steps is shown as its text."""
    if report.model.utilization.ndim:
        return f"<pre>{html.escape(str(report))}</pre>"
    concrete = report.single()
    rows = concrete.rows
    body = "".join(_line("td", table.cells(row)) for row in rows[:SHOWN])
    parts = [
        f"<table><thead>{_line('th', table.HEADER)}</thead><tbody>{body}</tbody></table>",
        _paragraphs([] if rows else [table.no_weights(concrete)]),
        _paragraphs([f"{len(rows) - SHOWN:,} more layers."] if len(rows) > SHOWN else []),
        _paragraphs(table.model(concrete)),
        _listed("Notes", [f"{path}: {note}." for path, note in table.notes(concrete)]),
        _listed("Recommendations", [str(advice) for advice in concrete.recommendations()]),
    ]
    return f"<div>{''.join(parts)}</div>"


def _line(kind: str, cells: Sequence[str]) -> str:
    scope = ' scope="col"' if kind == "th" else ""
    return f"<tr>{''.join(f'<{kind}{scope}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _listed(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts[:SHOWN])
    return f"<details open><summary>{title}</summary><ul>{items}</ul></details>" if texts else ""
