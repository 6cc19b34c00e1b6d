"""Numbers of leaves of `params` that are not weights: biases, scales, integers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff.model.roles import ParamInfo
from jaxeff.numerics import placement
from jaxeff.numerics.meshes import gathered
from jaxeff.numerics.precision import wide
from jaxeff.numerics.summation import namespace
from jaxeff.report import OtherNumbers, OtherStructure, none_of

_SHORT = 1 << 14


def structure(info: ParamInfo) -> OtherStructure:
    return OtherStructure(info.path, info.role, info.shape)


def measure(leaves: Sequence[Any]) -> OtherNumbers:
    """Measure each leaf; return the numbers stacked in the order of the leaves.

    Small concrete leaves are measured on the host. In a trace all short ones are rows of one array, so that one
    kernel serves them whatever their number and shapes.
    """
    if not leaves:
        return none_of(OtherNumbers)
    here = [placement.on_host_if_concrete(leaf) if leaf.size <= _SHORT else leaf for leaf in leaves]
    kinds: dict[Hashable, list[int]] = {}
    for index, leaf in enumerate(here):
        kinds.setdefault(_kind(leaf), []).append(index)
    measured = [_measure([here[index] for index in group]) for group in kinds.values()]
    traced = any(isinstance(number, Tracer) for number in jax.tree.leaves(measured))
    xp = jnp if traced else np
    back = np.argsort([index for group in kinds.values() for index in group])
    return jax.tree.map(lambda *parts: xp.concatenate(parts)[back], *placement.on_host_if_concrete(measured))


def _kind(leaf: Any) -> Hashable:
    """Return a key that is equal for leaves to be measured together."""
    if not jnp.issubdtype(leaf.dtype, jnp.number) or not leaf.size:
        return "unknown"
    return namespace(leaf), wide(leaf.dtype), leaf.size if leaf.size > _SHORT else None


def _measure(leaves: Sequence[Any]) -> OtherNumbers:
    """Measure leaves of one kind."""
    if _kind(leaves[0]) == "unknown":
        nan: Any = np.full(len(leaves), np.nan, np.float32)
        none: Any = np.zeros(len(leaves), np.int32)
        return OtherNumbers(nan, nan, nan, none, none)
    if isinstance(leaves[0], jax.Array) and not isinstance(leaves[0], Tracer):
        return _measure_on_device(leaves)
    return _measure_rows(leaves)


@np.errstate(all="ignore")
def _measure_rows(leaves: Sequence[Any]) -> OtherNumbers:
    xp = namespace(leaves[0])
    sizes = np.asarray([leaf.size for leaf in leaves], np.int32)
    longest = int(sizes.max())
    flat = [_sizes(xp, _whole(leaf)).astype(wide(leaf.dtype)).reshape(-1) for leaf in leaves]
    rows = xp.stack([xp.pad(row, (0, longest - row.size)) for row in flat])
    magnitude = xp.abs(rows)
    count = sizes.astype(rows.dtype)
    return OtherNumbers(
        xp.sum(magnitude, 1) / count,
        xp.sqrt(xp.sum(xp.square(rows), 1) / count),
        xp.max(magnitude, 1),
        xp.sum(rows == 0, 1, dtype=np.int32) - (longest - sizes),
        xp.sum(~xp.isfinite(rows), 1, dtype=np.int32),
    )


_measure_on_device = jax.jit(_measure_rows)


def _sizes(xp: Any, leaf: Any) -> Any:
    """Return a leaf; of complex numbers, their absolute values, from which all of these numbers follow."""
    return xp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else leaf


def _whole(leaf: Any) -> Any:
    return leaf if isinstance(leaf, np.ndarray) else gathered(leaf)
