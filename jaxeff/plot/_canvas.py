"""What is asked for, axes to draw it on, and colours that all people tell apart."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
"""Okabe and Ito, Color Universal Design, 2008; yellow, which is faint on white, left out."""
DASHES = ("-", "--", ":", "-.")

NO_LAYER = "There is no layer to draw."
NO_IMPORTANCE = "No weight has a finite importance above 0."


def check_kind(name: str, given: Any, kind: type, source: str) -> None:
    """
    Args:
        name: of the argument.
        given: for it.
        kind: what it must be.
        source: where one comes from.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(given, kind):
        came = "None" if given is None else type(given).__name__
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"`{name}` must be {article} {kind.__name__}, from `{source}`; got {came}")


def single(report: Report) -> Report:
    """The report with its numbers on the host.

    Raises:
        TypeError: it is none.
        ValueError: it is of several models.
    """
    check_kind("report", report, Report, "jaxeff.analyze")
    return report.single()


def chosen(report: Report, paths: Sequence[str] | None) -> list[LayerReport]:
    """The layers of these paths; all unless given.

    Raises:
        KeyError: a path is none of the report's.
        TypeError: an argument is not of its kind.
        ValueError: the report is of several models.
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
    """
    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: `ax` is something else.
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
    """The axes with a sentence in place of a drawing, which would be blank."""
    _ = axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", wrap=True)
    _ = axes.set_xticks([])
    _ = axes.set_yticks([])
    return axes


def any_finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, np.float64)).any())


def outlined() -> list[Any]:
    """What sets a mark apart from a bar that it lies on, in grey too: a white edge, as `path_effects`."""
    effects = _matplotlib("patheffects")
    return [effects.withStroke(linewidth=5, foreground="white")]


def line_style(index: int) -> dict[str, Any]:
    """Of the line of this number: no two of 28 are alike, and neighbours differ in colour and dash."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
