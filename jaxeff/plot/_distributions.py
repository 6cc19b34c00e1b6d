"""Plots of how the importance of layers is distributed over their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxeff.metrics import _curve
from jaxeff.metrics._curve import EDGES, Distribution
from jaxeff.plot._canvas import (
    COLORS,
    NO_IMPORTANCE,
    NO_LAYER,
    SMALL,
    any_finite,
    axes_or_new,
    chosen,
    finish,
    line_style,
    name_lines,
    plain_logarithms,
    say,
    single,
)
from jaxeff.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_VISIBLE = 0.01  # of the highest bar; lower ones are not seen above the axis


def importances(report: Report, paths: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw a histogram per layer of the importance of its weights, relative to their mean.

    Heights are fractions of the weights per octave. The axis is limited to the importances there are, from 2^-10 of
    the mean on; the legend gives the fraction of the weights that lie below, zeros included.

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
    weights = [np.asarray(_spread(row).weights) for row in rows]
    lines = [
        drawn.stairs(each[1:-1] / widths, EDGES, **line_style(index)) for index, each in enumerate(weights)
    ]
    drawn.set_xscale("log")
    heights = np.nan_to_num(np.stack(weights)[:, 1:-1] / widths).max(axis=0)
    seen = np.flatnonzero(heights > _VISIBLE * heights.max())
    if seen.size:
        _ = drawn.set_xlim(float(EDGES[seen[0]]), float(EDGES[seen[-1] + 1]))
    _ = drawn.set_ylim(bottom=0)
    plain_logarithms(drawn.xaxis)
    _ = finish(drawn, "importance over the layer's mean", "fraction of weights per octave")
    below = [f" ({each[0]:.0%} below)" if each[0] >= 0.005 else "" for each in weights]
    name_lines(drawn, lines, [row.path + said for row, said in zip(rows, below, strict=True)])
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
    units = np.sort(np.asarray(row.units, np.float64).ravel())
    if not 0 < units.sum() < math.inf:
        return say(drawn, NO_IMPORTANCE)
    _ = drawn.plot((0, 1), (0, 1), color="gray", linestyle=":", label="all equal")
    if row.distribution is not None:
        _ = drawn.plot(*_curve.lorenz(row.distribution), color=COLORS[0], label="weights")
    label = None if row.distribution is not None else "weights"
    _ = drawn.plot(*_covered(row.metrics), "o", color=COLORS[0], label=label)
    shares = np.concatenate([[0.0], np.cumsum(units)])
    _ = drawn.plot(np.linspace(0, 1, shares.size), shares / shares[-1], "--", color=COLORS[2], label="units")
    if row.null is not None:
        _ = drawn.plot(*_covered(row.null), "D", color=COLORS[3], fillstyle="none", label="noise")
    _ = drawn.set(xlim=(0, 1), ylim=(0, 1))
    _ = finish(drawn, "fraction of weights, faintest first", "share of the importance", path)
    # All curves lie below the diagonal.
    _ = drawn.legend(loc="upper left", fontsize=SMALL, frameon=False)
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
    curves = [_curve.lorenz(_spread(row)) for row in rows]
    lines = [
        drawn.plot(1 - weights[::-1], 1 - shares[::-1], **line_style(index))[0]
        for index, (weights, shares) in enumerate(curves)
    ]
    _ = drawn.set(xlim=(0, 1), ylim=(0, 1))
    _ = finish(drawn, "fraction of weights, most important first", "share of the importance")
    name_lines(drawn, lines, [row.path for row in rows])
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
