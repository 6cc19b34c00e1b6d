"""The weights of a model -> the numbers of each layer.

Up to SMALL scores are sorted, more are counted by bit pattern: on the host, or where they lie if they are
many.
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
from jaxeff.layers.stacks import structures as structures
from jaxeff.layers.traced import measure_traced
from jaxeff.report import LayerNumbers, none_of


def measure(
    criterion: Criterion, layers: Sequence[Layer], curves: bool
) -> tuple[LayerNumbers, tuple[Any, ...]]:
    """The numbers of all layers, stacked, and the importance of the units of each.

    Args:
        curves: whether to count how the importance of each is spread.
    """
    if not layers:
        return none_of(LayerNumbers), ()
    if is_traced([layer.arrays for layer in layers]):
        return measure_traced(criterion, layers, curves)
    return measure_eagerly(criterion, layers, curves)
