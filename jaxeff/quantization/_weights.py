"""Errors of rounding a weight to int8 and fp8, on the host or where the weight lies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import wide
from jaxeff.numerics.quantization import FORMATS, quantized
from jaxeff.numerics.summation import namespace
from jaxeff.quantization._records import WeightErrors

# NumPy is done with fewer weights before XLA has compiled.
_LARGE = 1 << 20


def weight_errors(
    weight: Any, layers: tuple[int, ...], units: tuple[int, ...] | None
) -> list[WeightErrors | str]:
    """Return the errors of each layer of a weight, or the reason why it has none.

    Args:
        layers: axes over which the weight stacks layers, which are quantized one by one.
        units: axes of the outputs, each of which has a scale of its own; None if they are unknown.
    """
    if isinstance(weight, jax.Array) and (weight.size > _LARGE or not weight.is_fully_addressable):
        measured = jax.device_get(_on_device(weight, layers, units))
    else:
        with np.errstate(all="ignore"):
            measured = _measured(np.asarray(weight), layers, units)
    of_layers = zip(*(np.ravel(numbers) for numbers in measured), strict=True)
    return [_of_layer(units is not None, *numbers) for numbers in of_layers]


def _of_layer(by_unit: bool, invalid: int, largest: float, *errors: float) -> WeightErrors | str:
    if invalid:
        return f"{invalid:,} weights are nan or infinite" if invalid > 1 else "1 weight is nan or infinite"
    if largest == 0:
        return "all weights are 0"
    int8, int8_by_unit, fp8, fp8_by_unit = map(float, errors)
    return WeightErrors(int8, int8_by_unit if by_unit else None, fp8, fp8_by_unit if by_unit else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _on_device(weight: jax.Array, layers: tuple[int, ...], units: tuple[int, ...] | None) -> list[jax.Array]:
    return by_compiler(lambda weight: _measured(weight, layers, units), weight)


def _measured(weight: Any, layers: Sequence[int], units: Sequence[int] | None) -> list[Any]:
    """Return for each layer the number of invalid weights, max |w|, and the errors for all formats and scales."""
    xp = namespace(weight)
    x = weight.astype(wide(weight.dtype))
    whole = tuple(axis for axis in range(x.ndim) if axis not in layers)
    of_unit = tuple(axis for axis in whole if axis not in (units or ()))
    largest = xp.max(xp.abs(x), axis=whole, keepdims=True)
    # Relative to the largest, so that squares neither overflow nor vanish.
    y = x / xp.where(largest == 0, 1, largest)
    top = xp.max(xp.abs(y), axis=of_unit, keepdims=True)
    z = y / xp.where(top == 0, 1, top)
    norm = xp.sum(xp.square(y), axis=whole)
    errors = []
    for name in FORMATS:
        for off in (y - quantized(y, name), (z - quantized(z, name)) * top):
            errors.append(xp.sqrt(xp.sum(xp.square(off), axis=whole) / norm))
    invalid = xp.sum(~xp.isfinite(x), axis=whole, dtype=np.int32)
    return [invalid, xp.max(largest, axis=whole), *errors]
