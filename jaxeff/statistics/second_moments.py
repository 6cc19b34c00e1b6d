"""X^T X of what a weight multiplies, made where that is made.

In: a site, and its input while the program runs. Out: one matrix for the layer, one for each block of a scan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxeff import graph
from jaxeff.graph.axes import Dims
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.statistics.counted import cleared
from jaxeff.statistics.records import SecondMoments, SiteStatistics, UnitStatistics


def refusal(site: graph.Site) -> str | None:
    """Why a site has no second moments; None if it has."""
    if site.kind == "conv":
        return "it is a convolution: the inputs of a unit are patches, which the program never makes"
    if site.kind == "embedding":
        return "its rows are looked up: they are not summed over"
    if site.input_axes & site.unit_axes:
        axes = ", ".join(map(str, sorted(site.input_axes & site.unit_axes)))
        return f"it is several products side by side, along axis {axes}, each with inputs of its own"
    if not site.direct:
        return "the operation takes what is made of the weight, and not the weight as it is stored"
    return None


@dataclasses.dataclass(frozen=True)
class Products:
    """Sums the products of each two inputs over all positions.

    Attributes:
        dims: where the weight's axes stand in the array.
        inputs: the weight's input axes, ascending.
        sizes: of these axes.
    """

    dims: Dims
    inputs: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, site: graph.Site, shape: Sequence[int]) -> Products:
        inputs = tuple(sorted(site.input_axes))
        return cls(site.input_dims, inputs, tuple(shape[axis] for axis in inputs))

    def __call__(self, array: jax.Array, counts: jax.Array | None) -> jax.Array:
        return by_compiler(self._summed, cleared(array, counts))

    def _summed(self, array: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(array):  # what a real weight makes of them has the squares of both parts
            return self._summed(jnp.real(array)) + self._summed(jnp.imag(array))
        factors = [factor for dim in self.dims for factor in dim]
        array = widened(array).reshape([factor.size for factor in factors])
        positions = [i for i, factor in enumerate(factors) if factor.axis not in self.inputs]
        kept = [factor for factor in factors if factor.axis in self.inputs]
        # On a GPU the default precision keeps ten digits of a float32's 24.
        products = lax.dot_general(
            array, array, ((positions, positions), ((), ())), precision=lax.Precision.HIGHEST
        )
        # One side and then the other in the order of the weight's axes.
        order = sorted(range(len(kept)), key=lambda i: (kept[i].axis, -kept[i].stride))
        products = jnp.transpose(products, [*order, *(i + len(kept) for i in order)])
        number = math.prod(self.sizes)
        return products.reshape(number, number)


def over_uses(uses: Sequence[SiteStatistics]) -> list[jax.Array] | str:
    """Return X^T X of each use of a weight, [*layers, inputs, inputs], or why there is none."""
    if not uses:
        return "no product of it with data was read"
    if refused := [site.without_moments for site in uses if site.without_moments]:
        return refused[0]
    if len({(site.input_axes, site.unit_axes) for site in uses}) > 1:
        return "it has different inputs in different uses"
    found = [site.second_moments.sum for site in uses if site.second_moments is not None]
    if len(found) < len(uses):
        return "the products of its inputs were not collected with `jaxeff.collect(..., hessians=True)`"
    return found


def over_iterations(products: jax.Array, seen: UnitStatistics, loops: Sequence[graph.Loop]) -> SecondMoments:
    """Fold the leading axes that scans have added: layers in the order of the weight's axes, time is summed.

    Args:
        products: [iterations of each scan, outermost first, inputs, inputs].
        seen: the sums of the same input, with the same leading axes.
    """
    axes = [loop.axis for loop in loops if loop.name == "scan"]
    in_time = tuple(position for position, axis in enumerate(axes) if axis is None)
    layers = [axis for axis in axes if axis is not None]
    order = sorted(range(len(layers)), key=lambda position: layers[position])
    summed = jnp.sum(products, in_time)
    summed = jnp.transpose(summed, [*order, len(layers), len(layers) + 1])
    return SecondMoments(summed, jnp.transpose(jnp.sum(seen.count, in_time), order))
