"""Axes to draw on, and colours that all people tell apart. Imports nothing of jaxeff."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
"""Okabe and Ito, Color Universal Design, 2008; yellow, which is faint on white, left out."""
DASHES = ("-", "--", ":", "-.")


def axes_or_new(axes: Axes | None, **subplot: Any) -> Axes:
    """
    Raises:
        ImportError: Matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("jaxeff.plot needs Matplotlib: pip install 'jaxeff[plot]'") from error
    return pyplot.subplots(subplot_kw=subplot, layout="constrained")[1]


def line_style(index: int) -> dict[str, Any]:
    """Of the line of this number: no two of 28 are alike, and neighbours differ in colour and dash."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
