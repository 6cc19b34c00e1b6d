"""Plots of how the importance of layers is distributed over their weights."""

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
    """Draw a histogram per layer of the importance of its weights, relative to their mean.

    Heights are fractions of the weights per octave. Weights below 2^-10 of the mean, zeros included, are left of
    the axis; the legend gives their fraction.

    Args:
        report: of one model, from `jaxeff.analyze(..., curves=True)`.
        paths: of the layers to draw; all by default.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: the report has no such path.
        TypeError: an argument has the wrong type.
        ValueError: the report has no curves, or holds several models.
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
    """Draw the Lorenz curve of one layer: the share of the importance that its faintest weights hold.

    Shown beside it are the curve of its units, three points of its null, and the diagonal of equal weights. A
    report without curves gives the three coverages instead of the curve of the weights.

    Args:
        report: of one model.
        path: of the layer.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError: Matplotlib is not installed.
        KeyError: the report has no such path.
        TypeError: an argument has the wrong type.
        ValueError: the report holds several models.
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
    """Draw for each layer the share of the importance that its most important weights hold.

    This is the Lorenz curve from the other end: a line crosses 80 % at the layer's `coverage_80`.

    Args:
        report: of one model, from `jaxeff.analyze(..., curves=True)`.
        paths: of the layers to draw; all by default.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError, KeyError, TypeError, ValueError: as in `importances`.
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
    """Return why there is no curve to draw; empty if there is one."""
    if not rows:
        return NO_LAYER
    return "" if any(any_finite(_spread(row).weights) for row in rows) else NO_IMPORTANCE


def _spread(row: LayerReport) -> Distribution:
    if row.distribution is None:
        raise ValueError("the report has no curves: pass curves=True to `jaxeff.analyze`")
    return row.distribution


def _covered(metrics: object) -> tuple[list[float], list[float]]:
    """Return three points of the Lorenz curve."""
    shares = (50, 80, 90)
    kept = [1 - float(getattr(metrics, f"coverage_{share}")) for share in shares]
    return kept, [1 - share / 100 for share in shares]
