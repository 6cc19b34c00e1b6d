"""Checks of arguments, axes to draw on, and colors that are distinguishable for the color-blind."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeff.output.text import shorten
from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
"""Okabe and Ito, Color Universal Design, 2008, without yellow, which is faint on white."""
DASHES = ("-", "--", ":", "-.")
SMALL = 7.0
"""Points of names and legends, at the size that a journal prints."""

NO_LAYER = "There is no layer to draw."
NO_IMPORTANCE = "No weight has a finite importance above 0."

_DPI = 150  # of a new figure, which is what it is shown and saved with
_NAMED = 10  # lines that a legend can tell apart; more are colored by their order
_LETTER = 0.6  # mean width of a letter over its height


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


def axes_or_new(ax: Axes | None, height: float | None = None) -> Axes:
    """Return `ax`, or the axes of a new pyplot figure of at least 150 dots per inch.

    Args:
        height: of the new figure in inches; that of pyplot's figures by default.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: `ax` is not a Matplotlib Axes.
    """
    if ax is not None:
        check_kind("ax", ax, _matplotlib("axes").Axes, "pyplot.subplots()[1]")
        return ax
    pyplot = _matplotlib("pyplot")
    width, usual = pyplot.rcParams["figure.figsize"]
    return pyplot.subplots(
        figsize=(width, usual if height is None else height),
        dpi=max(_DPI, pyplot.rcParams["figure.dpi"]),
        layout="constrained",
    )[1]


def _matplotlib(part: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError("jaxeff.plot needs Matplotlib: pip install matplotlib") from error


def say(axes: Axes, sentence: str) -> Axes:
    """Write a sentence on axes that would otherwise be blank, and return them."""
    size = text_size(axes)
    text = _wrapped(sentence, _inches(axes)[0], size)
    _ = axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=size)
    _ = axes.set_xticks([])
    _ = axes.set_yticks([])
    return axes


def any_finite(values: Any) -> bool:
    return bool(np.isfinite(np.asarray(values, np.float64)).any())


# Axes.


def _inches(axes: Axes) -> tuple[float, float]:
    """Return the width and height of axes, before a layout that adapts them to their texts."""
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def text_size(axes: Axes) -> float:
    """Return the points of labels: less on narrow axes, and at most what the labels have."""
    return min(float(axes.xaxis.label.get_fontsize()), max(SMALL, 3.1 * _inches(axes)[0]))


def points_high(axes: Axes) -> float:
    return _inches(axes)[1] * 72


def finish(axes: Axes, x: str, y: str, title: str = "") -> Axes:
    """Label the axes, in text that is smaller on narrow ones and wraps where it would be longer than its axis."""
    width, height = _inches(axes)
    size = text_size(axes)
    axes.tick_params(labelsize=size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.offsetText.set_fontsize(size)
    _ = axes.set_xlabel(_wrapped(x, width, size), fontsize=size)
    _ = axes.set_ylabel(_wrapped(y, height, size), fontsize=size)
    if title:
        _ = axes.set_title(shorten([title], max(int(width * 72 / (size * _LETTER)), 12))[0], fontsize=size)
    return axes


def _wrapped(text: str, inches: float, size: float) -> str:
    return textwrap.fill(text, max(int(inches * 72 / (size * _LETTER)), 12))


def tick_names(axis: Any, places: Sequence[int], names: Sequence[str], **style: Any) -> None:
    """Put names at ticks, in small text."""
    _ = axis.set_ticks(places, names, fontsize=SMALL, **style)


def whole_numbers(axis: Any) -> None:
    """Put ticks at whole numbers only, on an axis that counts."""
    ticker = _matplotlib("ticker")
    # At least one tick, since the default of two would put some at halves between neighboring numbers.
    axis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def plain_logarithms(axis: Any, suffix: str = "") -> None:
    """Write the ticks of a logarithmic axis as plain numbers: powers of ten, between them 2 and 5 if there is room."""
    ticker = _matplotlib("ticker")
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}{suffix}"))


def zoom_to_losses(axes: Axes, dense: float, losses: Any) -> None:
    """Limit the vertical axis to losses near the dense one, if some are so far off that these would be a flat line.

    What lies further off than ten times the median is out of the picture; the lines show that they go there.
    """
    finite = np.asarray(losses, np.float64)
    finite = finite[np.isfinite(finite)]
    distances = np.abs(finite - dense)
    middle = float(np.median(distances)) if distances.size else 0.0
    if middle > 0 and float(distances.max()) > 10 * middle:
        top = dense + 10 * middle
        lowest = min(dense, float(finite.min()))
        bottom = lowest - 0.05 * (top - lowest)
        # Above 0 where all losses are, so that the axis may be made logarithmic.
        _ = axes.set_ylim(max(bottom, 0.8 * lowest) if lowest > 0 else bottom, top)


def color_bar(axes: Axes, drawn: Any, label: str) -> Any:
    """Draw a color bar beside finished axes, as tall as they are, whatever becomes of their shape."""
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0.0, 0.04, 1.0)))
    size = text_size(axes)
    bar.ax.tick_params(labelsize=size)
    bar.set_label(_wrapped(label, _inches(axes)[1], size), fontsize=size)
    return bar


# Names.


def shortened(axes: Axes, names: Sequence[str], share: float = 0.5) -> list[str]:
    """Shorten names to a share of the width of the axes, as small text."""
    return shorten(names, max(int(_inches(axes)[0] * share * 72 / (SMALL * _LETTER)), 12))


def name_lines(axes: Axes, lines: Sequence[Any], names: Sequence[str], what: str = "layer") -> None:
    """Name lines of finished axes in a legend above them; more than ten by colors, with a bar that counts them."""
    if len(lines) > _NAMED:
        _color_by_order(axes, lines, what)
    else:
        for line, name in zip(lines, shortened(axes, names), strict=True):
            _ = line.set_label(name)
    if axes.get_legend_handles_labels()[1]:
        legend_above(axes)


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it covers nothing, in as many columns as fit."""
    labels = axes.get_legend_handles_labels()[1]
    width = _inches(axes)[0] * 72
    longest = max(map(len, labels), default=1) * SMALL * _LETTER + 4 * SMALL
    _ = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=max(1, min(len(labels), int(width / longest))),
        frameon=False,
        fontsize=SMALL,
        borderaxespad=0.2,
        columnspacing=1.0,
        handlelength=2.2,
    )


def _color_by_order(axes: Axes, lines: Sequence[Any], what: str) -> None:
    colors = _matplotlib("colors").Normalize(1, len(lines))
    mapped = _matplotlib("cm").ScalarMappable(colors, "viridis")
    for number, line in enumerate(lines, 1):
        line.set(color=mapped.to_rgba(number), linestyle="-", linewidth=0.8)
    bar = color_bar(axes, mapped, f"{what}, first to last")
    whole_numbers(bar.ax.yaxis)


def line_style(index: int) -> dict[str, Any]:
    """Return the style of line number `index`: 28 styles differ, and neighbors differ in color and dash."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
