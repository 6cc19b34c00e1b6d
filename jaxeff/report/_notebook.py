"""The HTML of a report in notebooks: one small table, without colors or scripts.

`Report.to_html` writes a page with more. Notebooks strip scripts from cells that they have not run themselves.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from jaxeff.output.text import empty
from jaxeff.report import _table as table
from jaxeff.report._recommendations import grouped, recommend
from jaxeff.report._records import Snapshot

SHOWN = 60
"""Maximum number of rows; a line below says how many were left out."""
_UNFOLDED = 5  # lists of at most this many items are open from the start
_BOX = '<div tabindex="0" style="max-height: 32em; overflow: auto">'


def render(report: Snapshot) -> str:
    """Return HTML in which every name is escaped."""
    rows = report.rows
    folded = table.fold(rows, range(len(rows)))
    lines = [table.HEADER, *(table.line(rows, each) for each in folded[:SHOWN])]
    unknown = empty(lines)
    kept = [index for index, header in enumerate(table.HEADER) if header not in unknown]
    more = "{:,} more rows: print(report) and the page of report.to_html have all."
    parts = [
        table_of([[line[index] for index in kept] for line in lines]),
        paragraphs([] if rows else [table.no_weights(report)]),
        paragraphs([more.format(len(folded) - SHOWN)] if len(folded) > SHOWN else []),
        paragraphs(table.legend(folded[:SHOWN])),
        paragraphs(table.model(report)),
        listed("Notes", [f"{path}: {note}." for path, note in table.notes(report)]),
        listed("Recommendations", [str(advice) for advice in grouped(recommend(report), report)]),
    ]
    return f"<div>{''.join(parts)}</div>"


def table_of(lines: Sequence[Sequence[str]]) -> str:
    """Return a table, whose first line has the headers and whose first cells are names."""
    header, *rows = lines
    body = "".join(_line(_ROW, row) for row in rows)
    return f"{_BOX}<table><thead>{_line(_HEADER, header)}</thead><tbody>{body}</tbody></table></div>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


# Notebooks align all cells to the right, where paths are hard to tell apart.
_HEADER = ('<th scope="col" style="text-align: left">', '<th scope="col">', "</th>")
_ROW = ('<th scope="row" style="text-align: left; font-weight: normal">', "<td>", "</td>")


def _line(tags: tuple[str, str, str], cells: Sequence[str]) -> str:
    """Return a table row, from the tags that open its first cell, open the others, and close those."""
    named, opened, closed = tags
    first, *others = map(html.escape, cells)
    return f"<tr>{named}{first}</th>{''.join(f'{opened}{cell}{closed}' for cell in others)}</tr>"


def paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def listed(title: str, texts: Sequence[str]) -> str:
    """Return a list under a title, folded if it is long."""
    if not texts:
        return ""
    more = [f"{len(texts) - SHOWN:,} more."] if len(texts) > SHOWN else []
    items = "".join(f"<li>{html.escape(text)}</li>" for text in [*texts[:SHOWN], *more])
    state = " open" if len(texts) <= _UNFOLDED else ""
    summary = f"<summary>{title} ({len(texts):,})</summary>"
    return f"<details{state}>{summary}{_BOX}<ul>{items}</ul></div></details>"
