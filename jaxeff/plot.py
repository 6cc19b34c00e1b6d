"""Pictures of what was measured. Matplotlib is imported when one is drawn, and nothing is shown or saved.

In: a `Sensitivity`, or some `BeforeAndAfter`. Out: the Matplotlib axes that it was drawn on. Imports `prune`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeff.prune.before_and_after import BeforeAndAfter
from jaxeff.prune.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sensitivity(sensitivity: Sensitivity, axes: Axes | None = None) -> Axes:
    """A line for each layer: the loss over the sparsity of that layer alone, from 0; dashed, the dense loss.

    Args:
        sensitivity: from `jaxeff.prune.sensitivity`.
        axes: to draw on; those of a new pyplot figure unless given.

    Returns:
        The axes, for labels and limits of your own; `axes.figure.savefig(path)` saves them.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    drawn = _new_axes() if axes is None else axes
    sparsities = (0.0, *sensitivity.sparsities)
    dense = float(sensitivity.dense)
    for path, losses in zip(sensitivity.paths, np.asarray(sensitivity.losses).tolist(), strict=True):
        _ = drawn.plot(sparsities, (dense, *losses), marker=".", label=path)
    _ = drawn.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    _ = drawn.set_xlabel("sparsity of the layer, the others whole")
    _ = drawn.set_ylabel("loss")
    _ = drawn.legend(fontsize="small")
    return drawn


def speedups(found: Mapping[float | str, BeforeAndAfter], axes: Axes | None = None) -> Axes:
    """A line for each size of batch: how many times faster the smaller networks ran, measured.

    A bar goes from the 10th to the 90th percentile of the runs; dashed, how many times fewer
    multiply-accumulates they have, which is what the time would fall by if nothing else took any.

    Args:
        found: by where it stands along the axis: the fraction removed, or a name. All of the same batches.
        axes: to draw on; those of a new pyplot figure unless given.

    Returns:
        The axes.

    Raises:
        ValueError: there is nothing to draw, or the batches differ in size.
        ImportError: Matplotlib is not installed.
    """
    sizes = {each.batch_sizes for each in found.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"`found` must hold measurements of the same batches, got sizes {sorted(sizes, key=str)}"
        )
    drawn = _new_axes() if axes is None else axes
    places: list[Any] = [*found]
    for number, size in enumerate(sizes.pop()):
        low, median, high = np.array([each.speedups[number] for each in found.values()]).T
        label = "one batch" if size is None else f"batch of {size}"
        _ = drawn.errorbar(places, median, (median - low, high - median), marker=".", capsize=3, label=label)
    macs = [each.before.macs[0] / max(each.after.macs[0], 1) for each in found.values()]
    _ = drawn.plot(places, macs, color="black", linestyle="--", linewidth=1, label="multiply-accumulates")
    _ = drawn.axhline(1, color="grey", linewidth=1)
    _ = drawn.set_yscale("log")
    _ = drawn.set_ylabel("before / after")
    _ = drawn.legend(fontsize="small")
    return drawn


def _new_axes() -> Axes:
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("jaxeff.plot needs Matplotlib: pip install 'jaxeff[plot]'") from error
    return pyplot.subplots()[1]
