"""Pictures of what was measured. Matplotlib is imported when one is drawn, and nothing is shown or saved.

In: a `Sensitivity`. Out: the Matplotlib axes that it was drawn on. Imports `prune`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np

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


def _new_axes() -> Axes:
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("jaxeff.plot needs Matplotlib: pip install 'jaxeff[plot]'") from error
    return pyplot.subplots()[1]
