"""Plots of measurements: sensitivity, speed-ups, criteria, and pathways."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeff._compare_criteria import Comparison
from jaxeff._pathways import Pathways
from jaxeff.advice import Advice
from jaxeff.plot._canvas import (
    COLORS,
    NO_LAYER,
    any_finite,
    axes_or_new,
    check_kind,
    finish,
    legend_above,
    line_style,
    name_lines,
    plain_logarithms,
    say,
    shortened,
    tick_names,
    zoom_to_losses,
)
from jaxeff.prune import BeforeAndAfter, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sensitivity(sensitivity: Sensitivity, ax: Axes | None = None) -> Axes:
    """Draw the loss over the sparsity of each layer alone, a line per layer from 0; the dashed line is the dense loss.

    Args:
        sensitivity: from `jaxeff.prune.sensitivity`.
        ax: axes to draw on; those of a new pyplot figure by default.

    Returns:
        The axes, for labels and limits of your own; `axes.figure.savefig(path)` saves them.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
    """
    check_kind("sensitivity", sensitivity, Sensitivity, "jaxeff.prune.sensitivity")
    drawn = axes_or_new(ax)
    if not any_finite(sensitivity.losses):
        return say(drawn, "No loss is finite." if sensitivity.paths else NO_LAYER)
    sparsities = (0.0, *sensitivity.sparsities)
    dense = float(sensitivity.dense)
    lines = [
        drawn.plot(sparsities, (dense, *losses), marker=".", **line_style(index))[0]
        for index, losses in enumerate(np.asarray(sensitivity.losses).tolist())
    ]
    _ = drawn.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    zoom_to_losses(drawn, dense, sensitivity.losses)
    _ = finish(drawn, "sparsity of the layer alone", "loss")
    name_lines(drawn, lines, sensitivity.paths)
    return drawn


def speedups(found: Mapping[float | str, BeforeAndAfter], ax: Axes | None = None) -> Axes:
    """Draw how many times faster the smaller networks ran, a line per batch size.

    A bar reaches from the 10th to the 90th percentile of the runs. Dashed lines show the ratio of
    multiply-accumulates, which would be the speed-up if nothing else took time.

    Args:
        found: measurements by their position on the horizontal axis: the fraction removed, or a name. All need
            the same batches.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ValueError: there is nothing to draw, or the batches differ in size.
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
    """
    check_kind("found", found, Mapping, "{0.5: jaxeff.prune.before_and_after(...), ...}")
    for place, each in found.items():
        check_kind(f"found[{place!r}]", each, BeforeAndAfter, "jaxeff.prune.before_and_after")
    sizes = {each.batch_sizes for each in found.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"`found` must hold measurements of the same batches, got sizes {sorted(sizes, key=str)}"
        )
    drawn = axes_or_new(ax)
    places: list[Any] = [*found]
    for index, size in enumerate(sizes.pop()):
        low, median, high = np.array([each.speedups[index] for each in found.values()]).T
        label = "one batch" if size is None else f"batch of {size}"
        bars = (median - low, high - median)
        _ = drawn.errorbar(places, median, bars, marker=".", capsize=3, label=label, **line_style(index))
    macs = [each.before.macs[0] / max(each.after.macs[0], 1) for each in found.values()]
    _ = drawn.plot(places, macs, color="black", linestyle="--", linewidth=1, label="multiply-accumulates")
    _ = drawn.axhline(1, color="gray", linewidth=1)
    _ = drawn.set_yscale("log")
    plain_logarithms(drawn.yaxis, "×")
    named = any(isinstance(place, str) for place in places)
    _ = finish(drawn, "smaller network" if named else "fraction removed", "before / after")
    legend_above(drawn)
    return drawn


def criteria(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Draw the loss over the fraction of weights removed, a line per criterion; gray lines are removal at random.

    Args:
        comparison: from `jaxeff.compare_criteria`.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
    """
    check_kind("comparison", comparison, Comparison, "jaxeff.compare_criteria")
    drawn = axes_or_new(ax)
    if not any_finite(comparison.loss):
        return say(drawn, "No loss is finite." if comparison.criteria else "There is no criterion to draw.")
    fractions = np.asarray(comparison.fractions)
    for number, losses in enumerate(np.asarray(comparison.random_loss)):
        label = "random" if number == 0 else None
        _ = drawn.plot(fractions, losses, color="0.75", linewidth=1, label=label)
    for index, (name, losses) in enumerate(
        zip(comparison.criteria, np.asarray(comparison.loss), strict=True)
    ):
        _ = drawn.plot(fractions, losses, label=name, **line_style(index))
    _ = finish(
        drawn, f"fraction of the weights removed{' of each layer' * (comparison.scope == 'layer')}", "loss"
    )
    legend_above(drawn)
    return drawn


_WIDEST, _THINNEST = 6.0, 0.4  # points


def pathways(pathways: Pathways, ax: Axes | None = None) -> Axes:
    """Draw the strongest routes as lines from the first units, left, to the last, right.

    Each group of units is a column, with its first unit on top. The width of a step is the strength of all drawn
    routes that take it, as a share of that of the widest.

    Args:
        pathways: from `jaxeff.pathways`.
        ax: axes to draw on; those of a new pyplot figure by default.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument has the wrong type.
    """
    check_kind("pathways", pathways, Pathways, "jaxeff.pathways")
    drawn = axes_or_new(ax)
    if not pathways.routes:
        return say(drawn, "No route has a strength above 0.")
    shares: dict[tuple[tuple[int, int], tuple[int, int]], float] = defaultdict(float)
    for route in pathways.routes:
        for step in itertools.pairwise(route.units):
            shares[step] += route.strength
    most = max(shares.values(), default=1.0)
    height = {
        (group, unit): 1 - (unit + 0.5) / pathways.sizes[group]
        for route in pathways.routes
        for group, unit in route.units
    }
    # The strongest are drawn last, on top.
    for (start, end), share in sorted(shares.items(), key=lambda pair: pair[1]):
        _ = drawn.plot(
            (start[0], end[0]),
            (height[start], height[end]),
            color=COLORS[0],
            alpha=0.7,
            linewidth=max(_WIDEST * share / most, _THINNEST),
            solid_capstyle="round",
        )
    columns, heights = zip(*((group, at) for (group, _), at in height.items()), strict=True)
    _ = drawn.scatter(columns, heights, s=8, color="black", zorder=3, linewidths=0)
    _ = finish(drawn, "group of units (their number)", "unit, the first on top")
    names = shortened(drawn, pathways.groups, 0.4)
    labels = [f"{name} ({size})" for name, size in zip(names, pathways.sizes, strict=True)]
    tick_names(drawn.xaxis, range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    _ = drawn.set_yticks([])
    _ = drawn.set_ylim(0, 1)
    return drawn


def advice(advice: Advice, ax: Axes | None = None) -> Axes:
    """A line for each allocation, by the chosen criterion: the loss over the fraction of weights at 0.

    A star marks what was chosen, and a line what weights at random cost.

    Gray dots are what the search tried from there on, and the dashed line is the tolerance. The losses are those of
    the examples of the search; the axis shows them near the tolerance, above which they may rise without bound.

    Args:
        advice: from `jaxeff.advise`.
        ax: to draw on; those of a new pyplot figure unless given.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is not of its kind.
    """
    check_kind("advice", advice, Advice, "jaxeff.advise")
    drawn = axes_or_new(ax)
    criterion = None if advice.weights is None else advice.weights.criterion
    tried = [
        dataclasses.replace(point, start="at random" if point.criterion == "random" else point.start)
        for point in advice.tried
        if point.what == "weights" and (criterion is None or point.criterion in (criterion, "random"))
    ]
    if not any_finite([point.loss for point in tried]):
        return say(drawn, "No loss was measured.")
    scale = 1.0 if advice.by_score else abs(advice.dense)
    allowed = advice.dense + advice.tolerance * scale
    sign = -1.0 if advice.by_score else 1.0
    starts = [*dict.fromkeys(point.start for point in tried if not point.searched)]
    for index, start in enumerate(starts):
        ordered = sorted(
            (point.fraction, sign * point.loss)
            for point in tried
            if point.start == start and not point.searched
        )
        fractions, losses = zip((0.0, sign * advice.dense), *ordered, strict=True)
        _ = drawn.plot(fractions, losses, marker=".", label=start, **line_style(index))
    searched = [(point.fraction, sign * point.loss) for point in tried if point.searched]
    if searched:
        _ = drawn.scatter(*zip(*searched, strict=True), s=8, color="0.6", label="search")
    if advice.weights is not None:
        loss = advice.dense + advice.weights.search_rise * (scale if advice.dense else 1.0)
        _ = drawn.plot(
            [advice.weights.fraction], [sign * loss], "*", color="black", markersize=12, label="chosen"
        )
    _ = drawn.axhline(sign * allowed, color="black", linestyle="--", linewidth=1, label="tolerance")
    room = 8 * max(allowed - advice.dense, 0.002 * max(abs(advice.dense), 1e-12))
    _ = drawn.set_ylim(*sorted((sign * (advice.dense - room / 4), sign * (advice.dense + room))))
    shown = [point.fraction for point in tried if abs(point.loss - advice.dense) <= room]
    _ = drawn.set_xlim(0, min(1.1 * max(shown, default=1.0), 1.0) or 1.0)
    _ = finish(drawn, "fraction of the weights at 0", "score" if advice.by_score else "loss")
    legend_above(drawn)
    return drawn
