"""Checks of arguments, axes to draw on, and colours that are distinguishable for the colour-blind."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
"""Okabe and Ito, Color Universal Design, 2008, without yellow, which is faint on white."""
DASHES = ("-", "--", ":", "-.")

NO_LAYER = "There is no layer to draw."
NO_IMPORTANCE = "No weight has a finite importance above 0."


def check_kind(name: str, given: Any, kind: type, source: str) -> None:
    """Check the type of an argument.

    Args:
        name: of the argument.
        given: its value.
        kind: its required type.
        source: the function that makes one.

    Raises:
        TypeError: it has another type.
    """
    if not isinstance(given, kind):
        came = "None" if given is None else type(given).__name__
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"`{name}` must be {article} {kind.__name__}, from `{source}`; got {came}")


def single(report: Report) -> Report:
    """Return the report with its numbers on the host.

    Raises:
        TypeError: it is not a report.
        ValueError: it holds several models.
    """
    check_kind("report", report, Report, "jaxeff.analyze")
    return report.single()


def chosen(report: Report, paths: Sequence[str] | None) -> list[LayerReport]:
    """Return the layers of these paths; all by default.

    Raises:
        KeyError: the report has no such path.
        TypeError: an argument has the wrong type.
        ValueError: the report holds several models.
    """
    concrete = single(report)
    if paths is None:
        return list(concrete.rows)
    if isinstance(paths, str) or not isinstance(paths, Sequence):
        raise TypeError(
            f"`paths` must be a list of paths, such as {list(concrete)[:1]}; got {type(paths).__name__}"
        )
    return [concrete[path] for path in paths]


def axes_or_new(ax: Axes | None, **subplot: Any) -> Axes:
    """Return `ax`, or the axes of a new pyplot figure.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: `ax` is not a Matplotlib Axes.
    """
    if ax is None:
        return _matplotlib("pyplot").subplots(subplot_kw=subplot, layout="constrained")[1]
    check_kind("ax", ax, _matplotlib("axes").Axes, "pyplot.subplots()[1]")
    return ax


def _matplotlib(part: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError("jaxeff.plot needs Matplotlib: pip install matplotlib") from error


def say(axes: Axes, sentence: str) -> Axes:
    """Write a sentence on axes that would otherwise be blank, and return them."""
    _ = axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", wrap=True)
    _ = axes.set_xticks([])
    _ = axes.set_yticks([])
    return axes


def any_finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, np.float64)).any())


def outlined() -> list[Any]:
    """Return a white edge, as `path_effects`, which sets a mark apart from a bar below it, in grey too."""
    effects = _matplotlib("patheffects")
    return [effects.withStroke(linewidth=5, foreground="white")]


def line_style(index: int) -> dict[str, Any]:
    """Return the style of line number `index`: 28 styles differ, and neighbours differ in colour and dash."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
