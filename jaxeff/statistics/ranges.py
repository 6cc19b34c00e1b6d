"""What decides how well the inputs of a weight quantize: their sizes counted by bit pattern, and their outliers.

In: a site, and its input while the program runs. Out: a few sums for the layer, or for each block of a scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import graph
from jaxeff.graph import axes
from jaxeff.graph.axes import Dims
from jaxeff.metrics._histogram import BINS, PLACE_BITS, ZERO_BIN, patterns
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import sized
from jaxeff.numerics.quantization import FORMATS, quantized
from jaxeff.numerics.summation import namespace
from jaxeff.output.shown import Shown
from jaxeff.statistics.counted import cleared, number

FULL = 2**32 - 1
"""A count that stopped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Ranges(Shown):
    """Sizes of the inputs of a weight. Layers that a scan stacks come first, in the order of the weight's `layer_axes`.

    Sums of powers are relative to the largest input, so that they neither overflow nor vanish.

    Attributes:
        counts: [131072], how many inputs have the first 17 bits of their |a| in float32, as in `jaxeff.sketch`; the
            bins of invalid inputs and of zeros stand in the last 512. A count stops at 2^32 - 1.
        channels: [inputs], max |a| of each input of the weight, in the order of its input axes; of each channel of the
            data for a grouped convolution.
        square, fourth: [], sums of (a / largest)^2 and (a / largest)^4.
        int8, fp8: [], sums of ((a - Q(a)) / largest)^2, where Q rounds to int8 or float8_e4m3fn with one scale for all
            inputs of a run: 127 or 448 over their largest.
    """

    counts: jax.Array
    channels: jax.Array
    square: jax.Array
    fourth: jax.Array
    int8: jax.Array
    fp8: jax.Array

    @property
    def largest(self) -> jax.Array:
        """max |a|."""
        return namespace(self.channels).max(self.channels, axis=-1)

    def __add__(self, other: Ranges) -> Ranges:
        xp = namespace(self.channels)
        channels = xp.maximum(self.channels, other.channels)
        counts = self.counts + other.counts
        counts = xp.where(counts < self.counts, np.uint32(FULL), counts)
        whole = xp.max(channels, axis=-1)
        whole = xp.where(whole == 0, 1, whole)
        mine, theirs = self.largest / whole, other.largest / whole

        def added(name: str, power: int) -> jax.Array:
            return getattr(self, name) * mine**power + getattr(other, name) * theirs**power

        powers = {"square": 2, "fourth": 4, "int8": 2, "fp8": 2}
        return Ranges(counts, channels, **{name: added(name, power) for name, power in powers.items()})


def refusal(site: graph.Site, shape: Sequence[int]) -> str | None:
    """Why a site has no ranges; None if it has."""
    if site.kind == "embedding":
        return "its rows are looked up: its inputs are not numbers that could be quantized"
    factors = [factor for dim in site.input_dims for factor in dim if factor.axis in site.input_axes]
    if any(f.axis is not None and f.stride == 1 and f.size > shape[f.axis] for f in factors):
        return "one operation takes the inputs of several weights"
    return None


@dataclasses.dataclass(frozen=True)
class RangeSums:
    """Makes the `Ranges` of an array.

    Attributes:
        dims: where the channels stand in the array.
        kept: axes that are channels.
        shape: in which they are laid out.
    """

    dims: Dims
    kept: frozenset[int]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, site: graph.Site, shape: tuple[int, ...]) -> RangeSums:
        if site.groups == 1:
            return cls(site.input_dims, site.input_axes, shape)
        # The dimension of the channels is (groups, channels of a group).
        (inputs,) = site.input_axes
        dims = tuple(
            tuple(axes.Factor(i, factor.size) for i, factor in enumerate(dim)) if len(dim) == 2 else dim
            for dim in site.input_dims
        )
        return cls(dims, frozenset({0, 1}), (site.groups, shape[inputs]))

    def __call__(self, array: jax.Array, counts: jax.Array | None) -> Ranges:
        found = by_compiler(self._summed, cleared(array, counts))
        if counts is None:
            return found
        # What does not count was cleared, and counted as zeros.
        cleared_away = jnp.asarray(array.size - number(array.size, counts)).astype(jnp.uint32)
        return dataclasses.replace(found, counts=found.counts.at[ZERO_BIN].add(-cleared_away))

    def _summed(self, array: jax.Array) -> Ranges:
        x = jnp.abs(sized(array))
        channels = axes.reduce_to_axes(self.dims, self.kept, self.shape, x, jnp.max)
        largest = jnp.max(channels)
        y = x / jnp.where(largest == 0, 1, largest)
        counts = jnp.zeros(BINS, jnp.uint32).at[patterns(x) >> PLACE_BITS].add(1, mode="promise_in_bounds")
        errors = {name: _sum(jnp.square(y - quantized(y, name))) for name in FORMATS}
        square = jnp.square(y)
        return Ranges(counts, channels.reshape(-1), _sum(square), _sum(jnp.square(square)), **errors)


def _sum(x: jax.Array) -> jax.Array:
    # Axis by axis, which bounds the rounding and leaves arrays that lie in parts where they are.
    while x.ndim:
        x = jnp.sum(x, axis=-1)
    return x


def over_iterations(seen: Ranges, loops: Sequence[graph.Loop]) -> Ranges:
    """Fold the leading axes that scans have added: layers in the order of the weight's axes, time is summed."""
    scans = [loop.axis for loop in loops if loop.name == "scan"]
    in_time = tuple(position for position, axis in enumerate(scans) if axis is None)
    layers = [axis for axis in scans if axis is not None]
    order = sorted(range(len(layers)), key=lambda position: layers[position])

    def laid(array: jax.Array) -> jax.Array:
        return jnp.transpose(array, [*order, *range(len(order), array.ndim)])

    largest = jnp.max(seen.largest, in_time, keepdims=True)
    share = seen.largest / jnp.where(largest == 0, 1, largest)

    def scaled(sums: jax.Array, power: int) -> jax.Array:
        return laid(jnp.sum(sums * share**power, in_time))

    return Ranges(
        laid(jnp.sum(seen.counts, in_time, dtype=jnp.uint32)),
        laid(jnp.max(seen.channels, in_time)),
        scaled(seen.square, 2),
        scaled(seen.fourth, 4),
        scaled(seen.int8, 2),
        scaled(seen.fp8, 2),
    )
