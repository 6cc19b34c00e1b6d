"""The numbers of each layer, from the weights of a model.

Layers of up to SMALL scores are sorted, larger ones are counted by bit pattern: on the host, or in place if they are
large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxeff.importance import Criterion
from jaxeff.layers.eager import measure_eagerly
from jaxeff.layers.heads import heads as heads
from jaxeff.layers.reduction import SMALL as SMALL
from jaxeff.layers.reduction import is_traced
from jaxeff.layers.stacks import Arrays as Arrays
from jaxeff.layers.stacks import Layer as Layer
from jaxeff.layers.stacks import activities as activities
from jaxeff.layers.stacks import over_activities as over_activities
from jaxeff.layers.stacks import structures as structures
from jaxeff.layers.traced import measure_traced
from jaxeff.report import LayerNumbers, none_of


def measure(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    """Measure all layers; return their numbers, stacked, and the importance of the units of each.

    Args:
        curves: also record how the importance of each layer is distributed.
    """
    if not layers:
        return none_of(LayerNumbers), ()
    if is_traced([layer.arrays for layer in layers]):
        return measure_traced(criterion, layers, curves)
    return measure_eagerly(criterion, layers, curves)
