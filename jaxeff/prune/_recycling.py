"""Dormant units start again: new weights in, zeros out, and an optimizer that remembers neither."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.model.params import leaves_by_path, split_variables
from jaxeff.model.roles import last_name
from jaxeff.numerics.meshes import by_compiler
from jaxeff.prune._groups import Group, Groups, Member
from jaxeff.prune._named import map_named, named_variables
from jaxeff.prune._optimizer import by_keys, of_state
from jaxeff.report import LayerReport, Report

Initializer = Callable[..., jax.Array]
"""`f(key, shape, dtype)`, as in `jax.nn.initializers`."""


class Recycled(NamedTuple):
    """What `prune.recycle` returns.

    Attributes:
        params: as they were given, with new weights for the recycled units.
        opt_state: as it was given, with moments of 0 for these weights.
        units: by group's name the elements that were recycled, [n], or [*blocks, size] as booleans for stacked blocks.
    """

    params: Any
    opt_state: Any
    units: dict[str, np.ndarray]


def recycle(
    params: Any,
    groups: Groups,
    report: Report,
    opt_state: Any = None,
    *,
    key: jax.Array,
    tau: float = 0.1,
    units: Mapping[str, Any] | None = None,
    initializer: Initializer | None = None,
) -> Recycled:
    """Start dormant units again (ReDo): draw their incoming weights anew, and set their outgoing weights to 0.

    A unit is tau-dormant if its mean |a| is at most tau times the mean of that over its layer; with tau = 0 it emitted
    only 0. Since its outgoing weights are 0, a recycled unit adds nothing at first: with tau = 0 the outputs on the
    report's batch do not change. The first step gives it outgoing weights, and the next ones train it as a whole.

    The biases of these units become 0 and scales of a norm 1; if `params` are variables that hold them, running means
    become 0 and variances 1. The moments of all these numbers become 0 in the optimizer's state: arrays of a leaf's
    path and shape, as in `prune.sparsify`. Its count of steps stays.

    Args:
        params: of the model: params or variables.
        groups: from `prune.groups`, which says what belongs to each unit. Units of locked groups are left alone, and so
            are those whose layer has no nonlinearity.
        report: from `jaxeff.analyze`, with activations.
        opt_state: of the optimizer, for these params.
        key: for the new weights.
        tau: from 0 to 1.
        units: instead of those below tau: by group's name the elements to recycle, as indices, or as booleans,
            [*blocks, size].
        initializer: `f(key, shape, dtype)` for the weight of one layer; by default LeCun normal, of variance
            1 / fan-in.

    Raises:
        TypeError: `groups`, `report` or `units` is something else.
        ValueError: an argument is invalid, or the arguments belong to different models.

    References:
        Sokar, Agarwal, Castro and Evci, The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023,
        arXiv:2302.12902

    >>> import jaxeff
    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params = {"a": jnp.array([[1.0, -1.0], [1.0, -1.0]]), "b": jnp.ones((2, 1))}
    >>> x = jnp.ones((4, 2))
    >>> report = jaxeff.analyze(params, model, x)
    >>> found = recycle(params, prune.groups(params, model, x), report, tau=0.0, key=jax.random.key(0))
    >>> found.units, found.params["b"].ravel()
    ({'a:1': array([1])}, Array([1., 0.], dtype=float32))
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"`tau` must be from 0 to 1, got {tau}")
    rows = rows_by_path(groups, report)
    own = {path: jnp.shape(leaf) for path, leaf in named_variables(params).items()}
    for path, shape in groups.params.items():
        if own.get(path) != tuple(shape):
            raise ValueError(
                f"`params` is of another model: {path!r} has shape {own.get(path)} there and {tuple(shape)} here"
            )
    if units is not None and not isinstance(units, Mapping):
        raise TypeError(f"`units` must map names of groups to elements, got {type(units).__name__}")
    if units is None:
        free = [group for group in groups.unlocked if not group.routed]
        chosen = {group.name: dormant_elements(group, rows, tau) for group in free if _clear(group, rows)}
    else:
        chosen = {name: _given(groups, name, elements, rows) for name, elements in units.items()}
    chosen = {name: mask for name, mask in chosen.items() if mask.any()}
    changes = _Changes()
    scales = {other.path for other in report.others if other.role == "scale"}
    for name, mask in chosen.items():
        for member in groups[name].members:
            changes.add(
                member, groups.shapes[member.path], mask.reshape(*groups[name].blocks, -1), rows, scales
            )
    drawn = _Drawn(initializer, rows)
    new = map_named(lambda path, leaf: changes.applied(path, leaf, drawn, key), params)
    state = opt_state if opt_state is None else _forgotten(opt_state, params, changes)
    return Recycled(new, state, {name: _shown(groups[name], mask) for name, mask in chosen.items()})


def rows_by_path(groups: Groups, report: Report) -> dict[str, list[LayerReport]]:
    """Return the rows of each leaf, in the order of its stacked layers.

    Raises:
        TypeError: `groups` and `report` are something else.
        ValueError: the report is of another model.
    """
    if not isinstance(groups, Groups) or not isinstance(report, Report):
        kinds = f"{type(groups).__name__} and {type(report).__name__}"
        raise TypeError(f"pass groups from `prune.groups`, then a report from `jaxeff.analyze`, got {kinds}")
    rows: dict[str, list[LayerReport]] = {}
    for row in report.single().rows:
        rows.setdefault(re.sub(r"\[[\d,]+\]$", "", row.path), []).append(row)
    if unknown := sorted(rows.keys() - groups.params.keys()):
        raise ValueError(f"`report` is of another model: {unknown[0]!r} is not a leaf of the groups'")
    return rows


def dormant_elements(group: Group, rows: Mapping[str, Sequence[LayerReport]], tau: float) -> np.ndarray:
    """[blocks, size], True where all weights that feed an element emitted at most tau of their layer's mean |a|."""
    emitting = [
        _dormant(member, rows[member.path], group, tau)
        for member in group.members
        if member.path in rows and unit_axis(member) in rows[member.path][0].unit_axes
    ]
    nothing = np.zeros((math.prod(group.blocks), group.size), bool)
    return np.logical_and.reduce(emitting) if emitting else nothing


def unit_axis(member: Member) -> int:
    """The member's axis in the shape of one layer."""
    return member.axis - sum(axis < member.axis for axis in member.block_axes)


def _dormant(member: Member, rows: Sequence[LayerReport], group: Group, tau: float) -> np.ndarray:
    blocks = math.prod(group.blocks)
    if len(rows) != blocks or any(
        row.activity is None or row.nonlinearity == "identity" or not row.activity.count for row in rows
    ):
        return np.zeros((blocks, group.size), bool)
    found = []
    for row in rows:
        assert row.activity is not None
        emitted = np.asarray(row.activity.mean_absolute, np.float64)
        place = row.unit_axes.index(unit_axis(member))
        others = tuple(axis for axis in range(emitted.ndim) if axis != place)
        # With tau = 0 whatever the mean, which may be infinite.
        silent = np.all(emitted <= (tau * emitted.mean() if tau else 0), axis=others)
        found.append(silent[member.indices].all(axis=1))
    return np.stack(found)


def _clear(group: Group, rows: Mapping[str, Sequence[LayerReport]]) -> bool:
    """Return whether it is known which weights lead into the units, and which lead out of them; there are both."""
    weights = [member for member in group.members if member.path in rows]
    known = all(
        rows[member.path][0].reason is None and len(rows[member.path]) == math.prod(group.blocks)
        for member in weights
    )
    return known and len({_leads_in(member, rows) for member in weights}) == 2


def _leads_in(member: Member, rows: Mapping[str, Sequence[LayerReport]]) -> bool:
    return unit_axis(member) in rows[member.path][0].unit_axes


def _given(groups: Groups, name: str, elements: Any, rows: Mapping[str, Sequence[LayerReport]]) -> np.ndarray:
    """Return the elements that a caller named, [blocks, size]."""
    group = next((group for group in groups.unlocked if group.name == name and not group.routed), None)
    if group is None:
        raise ValueError(
            f"`units` names {name!r}, which is not a group of units that may be recycled: print the groups"
        )
    if not _clear(group, rows):
        raise ValueError(
            f"`units` names {name!r}, of which the report does not say what leads into its units and out"
        )
    given, shape = np.asarray(elements), (*group.blocks, group.size)
    if given.dtype == bool and given.shape == shape:
        return given.reshape(-1, group.size)
    whole = given.ndim == 1 and (given.dtype.kind in "iu" or not given.size)
    if group.blocks or not whole or not ((given >= 0) & (given < group.size)).all():
        raise ValueError(
            f"`units` of {name!r} must be booleans of shape {shape}"
            + ("" if group.blocks else f", or indices below {group.size}")
            + f", got {given.dtype} of shape {given.shape}"
        )
    return np.isin(np.arange(group.size), given)[None]


def _shown(group: Group, mask: np.ndarray) -> np.ndarray:
    return mask.reshape(*group.blocks, -1) if group.blocks else np.flatnonzero(mask)


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
    """Draws a leaf anew, each of its stacked layers by itself."""

    initializer: Initializer | None
    rows: Mapping[str, Sequence[LayerReport]]

    def __call__(self, key: jax.Array, path: str, leaf: Any, layers: tuple[int, ...]) -> jax.Array:
        row = self.rows[path][0]
        others = tuple(axis for axis in range(len(row.shape)) if axis not in row.unit_axes)
        initializer = self.initializer or jax.nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=others, out_axis=row.unit_axes
        )
        number = list(self.rows).index(path)
        stacked = tuple(leaf.shape[axis] for axis in layers)
        keys = jax.random.split(jax.random.fold_in(key, number), math.prod(stacked))
        drawn = jax.vmap(lambda key: initializer(key, row.shape, leaf.dtype))(keys)
        return jnp.moveaxis(drawn.reshape(*stacked, *row.shape), range(len(layers)), layers)


class _Changes:
    """What becomes of each leaf: masks of its rank that broadcast to its shape, True = changes."""

    def __init__(self) -> None:
        self._anew: dict[str, np.ndarray] = {}
        self._layers: dict[str, tuple[int, ...]] = {}
        self._set: dict[str, list[tuple[np.ndarray, float]]] = {}

    def add(
        self,
        member: Member,
        shape: Sequence[int],
        elements: np.ndarray,
        rows: Mapping[str, Sequence[LayerReport]],
        scales: set[str],
    ) -> None:
        """Add what becomes of the part of a leaf that belongs to elements, [*blocks, size]."""
        path, mask = member.path, _along(member, shape, elements)
        if path not in rows:
            self._set.setdefault(path, []).append(
                (mask, 1.0 if path in scales or last_name(path) == "var" else 0.0)
            )
        elif _leads_in(member, rows):
            self._anew[path] = self._anew.get(path, np.zeros((1,) * mask.ndim, bool)) | mask
            self._layers[path] = member.block_axes
        else:
            self._set.setdefault(path, []).append((mask, 0.0))

    def applied(self, path: str, leaf: Any, drawn: _Drawn, key: jax.Array) -> Any:
        if path not in self._anew and path not in self._set:
            return leaf

        def changed(leaf: jax.Array, key: jax.Array) -> jax.Array:
            found = leaf
            if path in self._anew:
                found = jnp.where(self._anew[path], drawn(key, path, leaf, self._layers[path]), found)
            # Last, as a weight between two recycled units leads out of the first.
            for mask, value in self._set.get(path, []):
                found = jnp.where(mask, jnp.asarray(value, leaf.dtype), found)
            return found

        return by_compiler(changed, jnp.asarray(leaf), key, like=leaf)

    def touched(self, path: str) -> list[np.ndarray]:
        return [
            *([self._anew[path]] if path in self._anew else []),
            *(mask for mask, _ in self._set.get(path, [])),
        ]


def _along(member: Member, shape: Sequence[int], elements: np.ndarray) -> np.ndarray:
    """Spread [*blocks, size] over the member's axes of a leaf."""
    kept = (*member.block_axes, member.axis)
    along = np.zeros((*elements.shape[:-1], shape[member.axis]), bool)
    along[..., member.indices] = elements[..., None]
    ordered = np.transpose(along, np.argsort(kept))
    return ordered.reshape([size if axis in kept else 1 for axis, size in enumerate(shape)])


def _forgotten(state: Any, params: Any, changes: _Changes) -> Any:
    """Set an optimizer's state to 0 for changed numbers, in floating arrays of the path and shape of a leaf."""
    weights, _ = split_variables(params)
    paths = [path for path, _ in leaves_by_path(weights)]
    leaves = {keys: (path, leaf) for path, (keys, leaf) in zip(paths, by_keys(weights).items(), strict=True)}

    def one(keys: tuple, array: Any) -> Any:
        path, leaf = of_state(leaves, keys) or ("", 0.0)
        masks = changes.touched(path)
        same = (
            masks
            and jnp.shape(leaf) == jnp.shape(array)
            and jnp.issubdtype(jnp.result_type(array), jnp.floating)
        )
        if not same:
            return array

        def cleared(array: jax.Array) -> jax.Array:
            for mask in masks:
                array = jnp.where(mask, jnp.zeros((), array.dtype), array)
            return array

        return by_compiler(cleared, jnp.asarray(array), like=array)

    return jax.tree_util.tree_map_with_path(one, state)
