"""How the importance of layers is spread over their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxeff.metrics import _curve
from jaxeff.metrics._curve import EDGES, Distribution
from jaxeff.plot._canvas import (
    COLOURS,
    NO_IMPORTANCE,
    NO_LAYER,
    any_finite,
    axes_or_new,
    chosen,
    line_style,
    say,
    single,
)
from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def importances(report: Report, paths: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """A histogram for each layer: how many weights have so many times the mean importance.

    Heights are fractions of the weights per octave. What is below 2^-10 of the mean, zeros included, is left
    of the axis, and the legend says how much it is.

    Args:
        report: of one model, from `jaxeff.analyze(..., curves=True)`.
        paths: of the layers to draw; all unless given.
        ax: to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: a path is none of the report's.
        TypeError: an argument is not of its kind.
        ValueError: the report has no curves, or is of several models.
    """
    rows, drawn = chosen(report, paths), axes_or_new(ax)
    if why := _nothing(rows):
        return say(drawn, why)
    widths = np.diff(np.log2(EDGES))
    for index, row in enumerate(rows):
        weights = np.asarray(_spread(row).weights)
        below = f" ({weights[0]:.0%} below)" if weights[0] >= 0.005 else ""
        _ = drawn.stairs(weights[1:-1] / widths, EDGES, label=row.path + below, **line_style(index))
    drawn.set_xscale("log")
    _ = drawn.set_xlabel("importance over the layer's mean")
    _ = drawn.set_ylabel("fraction of the weights per octave")
    _ = drawn.legend(fontsize="small")
    return drawn


def lorenz(report: Report, path: str, ax: Axes | None = None) -> Axes:
    """The Lorenz curve of one layer: the share of the importance that the faintest weights hold.

    Beside that of its weights (drawn where the report has curves; else at the three coverages alone), that of
    its units, three points of noise, and the diagonal, on which all weights are equal.

    Args:
        report: of one model.
        path: of the layer.
        ax: to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: the path is none of the report's.
        TypeError: an argument is not of its kind.
        ValueError: the report is of several models.
    """
    row, drawn = single(report)[path], axes_or_new(ax)
    _ = drawn.set_title(path)
    units = np.sort(np.asarray(row.units, np.float64).ravel())
    if not 0 < units.sum() < math.inf:
        return say(drawn, NO_IMPORTANCE)
    _ = drawn.plot((0, 1), (0, 1), color="gray", linestyle=":", label="all equal")
    if row.distribution is not None:
        _ = drawn.plot(*_curve.lorenz(row.distribution), color=COLOURS[0], label="weights")
    label = None if row.distribution is not None else "weights"
    _ = drawn.plot(*_covered(row.metrics), "o", color=COLOURS[0], label=label)
    shares = np.concatenate([[0.0], np.cumsum(units)])
    _ = drawn.plot(np.linspace(0, 1, shares.size), shares / shares[-1], "--", color=COLOURS[2], label="units")
    if row.null is not None:
        _ = drawn.plot(*_covered(row.null), "D", color=COLOURS[3], fillstyle="none", label="noise")
    _ = drawn.set_xlabel("fraction of the weights, the faintest first")
    _ = drawn.set_ylabel("share of the importance")
    _ = drawn.legend()
    return drawn


def cumulative(report: Report, paths: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """For each layer, the share of the importance that its most important weights hold.

    The Lorenz curve from the other end: where a line crosses 80 %, the layer's `coverage_80` is read off.

    Args:
        report: of one model, from `jaxeff.analyze(..., curves=True)`.
        paths: of the layers to draw; all unless given.
        ax: to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError, KeyError, TypeError, ValueError: as of `importances`.
    """
    rows, drawn = chosen(report, paths), axes_or_new(ax)
    if why := _nothing(rows):
        return say(drawn, why)
    for index, row in enumerate(rows):
        weights, shares = _curve.lorenz(_spread(row))
        _ = drawn.plot(1 - weights[::-1], 1 - shares[::-1], label=row.path, **line_style(index))
    _ = drawn.set_xlabel("fraction of the weights, the most important first")
    _ = drawn.set_ylabel("share of the importance")
    _ = drawn.legend(fontsize="small")
    return drawn


def _nothing(rows: Sequence[LayerReport]) -> str:
    """Why there is no curve to draw; nothing where there is one."""
    if not rows:
        return NO_LAYER
    return "" if any(any_finite(_spread(row).weights) for row in rows) else NO_IMPORTANCE


def _spread(row: LayerReport) -> Distribution:
    if row.distribution is None:
        raise ValueError("the report has no curves: pass curves=True to `jaxeff.analyze`")
    return row.distribution


def _covered(metrics: object) -> tuple[list[float], list[float]]:
    """Three points of the Lorenz curve."""
    shares = (50, 80, 90)
    kept = [1 - float(getattr(metrics, f"coverage_{share}")) for share in shares]
    return kept, [1 - share / 100 for share in shares]
