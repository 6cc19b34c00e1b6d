"""Each weight as the matrices that its products read: inputs times units."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.model.roles import last_name
from jaxeff.prune import Axes
from jaxeff.prune._layouts import Leaf
from jaxeff.statistics import HeadSlices

_ASSUMED = "which axes are inputs was assumed from its name: pass `apply_fn` and `batch`"
_PROJECTIONS = {"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj"}


class Roles(NamedTuple):
    """What the axes of a weight are in its matrices.

    Attributes:
        batch: axes whose indices are matrices of their own: blocks of a scan, members of a batched product.
        rows, columns: the inputs and the units.
        note: what was assumed, or None.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    note: str | None = None


class Matrix(NamedTuple):
    """One matrix of a weight.

    Attributes:
        path: of the layer, 'blocks/kernel[3]'; with ' head 1' or ' group 1' at the end for a part.
        elements: [rows, columns].
    """

    path: str
    elements: np.ndarray


class Heads(NamedTuple):
    """The parts of a weight that belong to attention heads.

    Attributes:
        slices: of each head, or of each group of heads that share keys and values.
        name: 'head' or 'group'.
    """

    slices: HeadSlices
    name: str


def has_matrices(leaf: Leaf) -> bool:
    return leaf.role in ("weight", "embedding") and 0 not in leaf.shape


def roles(path: str, shape: Sequence[int], axes: Axes | None) -> Roles:
    """Return what the axes of a weight are, from the program where it is known, else from the weight's name.

    Taps of a convolution are inputs. Without a program, the last axis is the units, the first if the name ends in
    'weight' (PyTorch), and all but the first in the projections of attention, [inputs, heads, size].
    """
    layers = axes.layers if axes else ()
    known = axes is not None and axes.inputs is not None and bool(axes.units)
    if axes is not None and known:
        inputs, units = set(axes.inputs or ()), set(axes.units or ())
        batch = tuple(sorted({*layers, *(inputs & units)}))
        columns = tuple(axis for axis in sorted(units) if axis not in batch)
        if columns:
            return Roles(batch, _others(shape, (*batch, *columns)), columns)
    left = _others(shape, layers)
    if last_name(path) == "weight":
        columns = left[:1]
    elif len(left) == 3 and _PROJECTIONS & set(re.split(r"[./]", path)):
        columns = left[1:]
    else:
        columns = left[-1:]
    note = _ASSUMED if len(left) > 2 else None
    return Roles(tuple(layers), _others(shape, (*layers, *columns)), columns, note)


def _others(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(shape)) if axis not in axes)


def stacked(weight: Any, found: Roles) -> Any:
    """Return all matrices of a weight at once, [matrices, rows, columns]."""
    count, columns = (math.prod(weight.shape[axis] for axis in axes) for axes in (found.batch, found.columns))
    return weight.transpose((*found.batch, *found.rows, *found.columns)).reshape(count, -1, columns)


def matrices(path: str, weight: np.ndarray, found: Roles, heads: Heads | None = None) -> Iterator[Matrix]:
    """Return the matrices of a weight one after the other, on the host.

    Args:
        heads: the parts of the heads, for one matrix of each instead of one of all.
    """
    order = (*found.batch, *found.rows, *found.columns)
    for place in itertools.product(*(range(weight.shape[axis]) for axis in found.batch)):
        label = path + (f"[{','.join(map(str, place))}]" if place else "")
        index = [slice(None)] * weight.ndim
        for axis, at in zip(found.batch, place, strict=True):
            index[axis] = slice(at, at + 1)
        for name, part in _parts(label, weight[tuple(index)], heads):
            count = math.prod(part.shape[axis] for axis in found.columns)
            yield Matrix(name, np.transpose(part, order).reshape(-1, count))


def _parts(label: str, part: np.ndarray, heads: Heads | None) -> Iterator[tuple[str, np.ndarray]]:
    if heads is None:
        yield label, part
        return
    for index, indices in enumerate(heads.slices.indices):
        yield f"{label} {heads.name} {index}", np.take(part, indices, axis=heads.slices.axis)
