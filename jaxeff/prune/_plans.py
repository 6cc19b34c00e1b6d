"""Which elements of which groups are to go: groups and their importance -> a `Plan`, which is JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.prune._groups import Group, Groups, Member, Shapes, map_named, named_variables, stand_in

_VERSION = 1
Shares = float | Mapping[str, float]
Widths = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What to remove from a model, and all that is needed to remove it.

    Attributes:
        groups: those that lose elements.
        removed: the elements that each loses, by name, ascending.
        params, state: shapes of the model's leaves by path, as `Groups` has them.
    """

    groups: tuple[Group, ...]
    removed: Mapping[str, tuple[int, ...]]
    params: Shapes
    state: Shapes

    @property
    def shapes(self) -> Shapes:
        return {**self.params, **self.state}

    @classmethod
    def of(cls, groups: Groups, removed: Mapping[str, Sequence[int]]) -> Plan:
        """The plan that removes these elements of these groups.

        Raises:
            ValueError: no such group, a locked one, an element that it does not have, or all of them.

        >>> import jax, jax.numpy as jnp
        >>> from jaxeff import prune
        >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> Plan.of(prune.groups(params, model, jnp.ones((8, 3))), {"a:1": [0, 2]}).widths()
        {'a': {1: 2}, 'b': {0: 2}}
        """
        known = {group.name: group for group in groups}
        for name in removed:
            if name not in known:
                raise ValueError(
                    f"`removed` names {name!r}, which is no group: print the groups to see their names"
                )
            if known[name].locked is not None:
                raise ValueError(f"`removed` names {name!r}, which is locked: {known[name].locked}")
            _check_elements(name, known[name].size, removed[name])
        chosen = {
            name: tuple(sorted(map(int, removed[name]))) for name in known if len(removed.get(name, ()))
        }
        kept = tuple(dataclasses.replace(known[name], importance=None) for name in chosen)
        return cls(kept, chosen, groups.params, groups.state)

    def widths(self) -> dict[str, dict[int, int]]:
        """The new size of every axis that changes, by path and axis: to build the smaller module with."""
        shapes = self.shapes
        gone = self._gone()
        return {
            path: {axis: shapes[path][axis] - len(indices) for axis, indices in axes.items()}
            for path, axes in gone.items()
        }

    def sizes(self) -> dict[str, int]:
        """How many elements each group that loses any keeps, by name."""
        return {group.name: group.size - len(self.removed[group.name]) for group in self.groups}

    def kept(self) -> dict[str, dict[int, np.ndarray]]:
        """The indices that stay, ascending, by path and axis, of every axis that changes."""
        shapes = self.shapes
        return {
            path: {
                axis: np.setdiff1d(np.arange(shapes[path][axis]), indices) for axis, indices in axes.items()
            }
            for path, axes in self._gone().items()
        }

    def _gone(self) -> dict[str, dict[int, np.ndarray]]:
        gone: dict[str, dict[int, np.ndarray]] = {}
        for group in self.groups:
            elements = list(self.removed[group.name])
            for member in group.members:
                axes = gone.setdefault(member.path, {})
                before = axes.get(member.axis, np.array([], int))
                axes[member.axis] = np.union1d(before, member.indices[elements])
        return {path: dict(sorted(axes.items())) for path, axes in sorted(gone.items())}

    def masks(self, params: Any) -> Any:
        """The plan as masks for `prune.apply`, True = kept; a single True for a leaf that stays whole.

        The large model with these masks computes what the small one does.
        """
        self.check(params)
        kept = self.kept()
        return map_named(lambda path, leaf: _mask(jnp.shape(leaf), kept.get(path, {})), params)

    def check(self, params: Any) -> None:
        """That these are of the plan's model: its params, its state, or both."""
        shapes = {
            path: jnp.shape(leaf) for path, leaf in named_variables(jax.tree.map(stand_in, params)).items()
        }
        parts = [part for part in (self.params, self.state) if part and part.keys() == shapes.keys()]
        expected = parts[0] if parts else self.shapes
        if different := sorted(shapes.keys() ^ expected.keys()):
            where = "`params`" if different[0] in shapes else "the plan"
            raise ValueError(f"the plan is of another model: {different[0]!r} is in {where} alone")
        for path, shape in shapes.items():
            if shape != tuple(expected[path]):
                raise ValueError(
                    f"the plan is of another model: {path!r} has shape {tuple(expected[path])} there and "
                    f"{shape} here"
                )

    def to_json(self) -> str:
        """The plan as text that `Plan.from_json` reads in any process."""
        model = self._model()
        removed = {name: list(elements) for name, elements in self.removed.items()}
        return json.dumps({"version": _VERSION, "signature": _signature(model), "removed": removed, **model})

    def _model(self) -> dict[str, Any]:
        return {
            "params": {path: list(shape) for path, shape in self.params.items()},
            "state": {path: list(shape) for path, shape in self.state.items()},
            "groups": {
                group.name: {
                    "size": group.size,
                    "members": [
                        [m.path, m.axis, [_encoded(column) for column in m.indices.T]] for m in group.members
                    ],
                }
                for group in self.groups
            },
        }

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        What is removed may have been edited; the description of the model may not.

        Raises:
            ValueError: it is no plan, is of another version, was damaged, or removes what a group does not
                have or all that it has.
        """
        found = _parsed(text)
        model = {name: found[name] for name in ("params", "state", "groups")}
        if found["signature"] != _signature(model):
            raise ValueError(
                "the plan's description of the model was changed, and its signature no longer fits: edit "
                "'removed' alone, or make a new plan"
            )
        removed = found["removed"]
        if not isinstance(removed, dict) or removed.keys() - model["groups"].keys():
            unknown = (
                sorted(removed.keys() - model["groups"].keys())[0] if isinstance(removed, dict) else removed
            )
            raise ValueError(
                f"the plan removes of {unknown!r}, which is none of its groups: {[*model['groups']]}"
            )
        for name, elements in removed.items():
            _check_elements(name, model["groups"][name]["size"], elements)
        chosen = {name: tuple(sorted(removed[name])) for name in model["groups"] if removed.get(name)}
        groups = tuple(_decoded_group(name, model["groups"][name]) for name in chosen)
        shapes = ({path: tuple(shape) for path, shape in model[name].items()} for name in ("params", "state"))
        return cls(groups, chosen, *shapes)


def _mask(shape: tuple[int, ...], axes: Mapping[int, np.ndarray]) -> jax.Array:
    if not axes:
        return jnp.asarray(True)
    mask = np.ones(shape, bool)
    for axis, indices in axes.items():
        along = np.isin(np.arange(shape[axis]), indices)
        mask &= along.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return jnp.asarray(mask)


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`text` is no JSON: {error}") from error
    names = ("version", "signature", "removed", "params", "state", "groups")
    missing = [name for name in names if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"`text` is no plan: {missing[0]!r} is missing")
    if found["version"] != _VERSION:
        raise ValueError(f"the plan is of version {found['version']!r}, and this jaxeff reads {_VERSION}")
    return found


def _signature(model: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _encoded(column: np.ndarray) -> list[int]:
    """[start, step] where indices are evenly spaced, else ['at', ...] all of them."""
    steps = np.diff(column)
    step = int(steps[0]) if len(steps) else 1
    if (steps == step).all():
        return [int(column[0]), step]
    return [int(column[0]), 0, *column.tolist()]


def _decoded(encoded: Sequence[int], size: int) -> np.ndarray:
    start, step, *every = encoded
    return np.array(every) if every else start + step * np.arange(size)


def _decoded_group(name: str, found: Mapping[str, Any]) -> Group:
    size = found["size"]
    members = tuple(
        Member(path, axis, np.stack([_decoded(column, size) for column in columns], axis=1))
        for path, axis, columns in found["members"]
    )
    return Group(name, size, members, None)


def _check_elements(name: str, size: int, elements: Any) -> None:
    whole = isinstance(elements, (Sequence, np.ndarray)) and not isinstance(elements, str)
    if not whole or any(isinstance(e, bool) or not isinstance(e, (int, np.integer)) for e in elements):
        raise ValueError(
            f"the elements to remove of {name!r} must be a list of whole numbers, got {elements!r}"
        )
    wrong = [int(element) for element in elements if not 0 <= int(element) < size]
    if wrong:
        raise ValueError(f"{name!r} has elements 0 to {size - 1}, and {wrong[0]} is to be removed")
    if len(set(map(int, elements))) != len(elements):
        raise ValueError(f"an element of {name!r} is to be removed twice")
    if len(elements) == size:
        raise ValueError(f"all {size} elements of {name!r} are to be removed: a group cannot be emptied")


def plan(
    groups: Groups,
    importance: Any,
    sparsity: Shares,
    *,
    reduce: str = "sum",
    normalize: str = "mean",
    scope: str = "layer",
    round_to: int = 1,
    minimum: Widths = 1,
    max_sparsity: Shares = 1.0,
) -> Plan:
    """The plan that removes the least important elements of the groups that are not locked.

    Args:
        groups: of `prune.groups`.
        importance: scores of the weights, shaped like `params`, as `prune.scored` gives by any criterion.
        sparsity: the fraction of elements to remove, in [0, 1); by group's name with scope 'layer', where the
            groups not named stay whole. One number is for all groups but those within heads
            (`Group.within_head`): heads of fewer queries and keys than values are what no attention module
            can be built with. Name such a group to remove of it.
        reduce, normalize: how the scores of an element's weights make its importance; see `Groups.scored`.
        scope: 'layer' removes so much of each group, 'global' of all groups together in one order. With
            'global' groups compare, so `normalize` counts.
        round_to: what stays is rounded up to a multiple of this (8, 128), or to the whole group.
        minimum: elements that a group keeps at least; all that it has, if that is fewer.
        max_sparsity: at most so much of a group goes; with scope 'global' others make up for it.
            `minimum` and `max_sparsity` may be by group's name, for those named.

    Raises:
        ValueError: an argument is out of range, names no group or a locked one, or a group has no scores.

    >>> import jax, jax.numpy as jnp
    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params = {"a": jnp.array([[1.0, 3.0, 0.5, 2.0]]), "b": jnp.ones((4, 2))}
    >>> found = prune.groups(params, model, jnp.ones((8, 1)))
    >>> prune.plan(found, prune.scored(params), 0.5).removed
    {'a:1': (0, 2)}
    """
    unlocked = {group.name: group for group in groups.unlocked}
    limits = _limits(unlocked, minimum, max_sparsity)
    _check_arguments(groups, unlocked, sparsity, scope, round_to)
    scored = {
        group.name: group.importance
        for group in groups.scored(importance, reduce=reduce, normalize=normalize).unlocked
        if limits[group.name]
        and (group.name in sparsity if isinstance(sparsity, Mapping) else not group.within_head)
    }
    ranked: dict[str, np.ndarray] = {}
    for name, found in scored.items():
        if found is None:
            raise ValueError(
                f"`importance` has no scores for {name!r}: score one of its leaves (`prunable` of "
                "`prune.scored`), or leave it whole with `max_sparsity={" + repr(name) + ": 0}`"
            )
        ranked[name] = found
    counts = _of_each(ranked, sparsity) if scope == "layer" else _of_all(ranked, float(sparsity), limits)  # pyright: ignore
    removed = {}
    for name, found in ranked.items():
        kept = max(found.size - counts[name], found.size - limits[name])
        kept = min(found.size, math.ceil(kept / round_to) * round_to)
        removed[name] = np.sort(np.argsort(found, kind="stable")[: found.size - kept])
    return Plan.of(groups, removed)


def _of_each(ranked: Mapping[str, np.ndarray], sparsity: Shares) -> dict[str, int]:
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(ranked, sparsity)
    return {name: round(shares[name] * found.size) for name, found in ranked.items()}


def _of_all(ranked: Mapping[str, np.ndarray], sparsity: float, limits: Mapping[str, int]) -> dict[str, int]:
    """How many of each group are among the lowest of all, where none loses more than its limit."""
    total = round(sparsity * sum(found.size for found in ranked.values()))
    lowest = [(np.sort(found, kind="stable")[: limits[name]], name) for name, found in ranked.items()]
    owners = np.repeat(np.arange(len(lowest)), [len(found) for found, _ in lowest])
    order = np.argsort(np.concatenate([found for found, _ in lowest]), kind="stable") if lowest else owners
    counts = np.bincount(owners[order[:total]], minlength=len(lowest))
    return {name: int(count) for (_, name), count in zip(lowest, counts, strict=True)}


def _limits(unlocked: Mapping[str, Group], minimum: Widths, max_sparsity: Shares) -> dict[str, int]:
    """How many elements of each group may go at most."""
    least = _by_group("minimum", minimum, unlocked, 1)
    most = _by_group("max_sparsity", max_sparsity, unlocked, 1.0)
    for name, value in least.items():
        if value < 1 or value != int(value):
            raise ValueError(f"`minimum` must be whole and at least 1, got {value} for {name!r}")
    for name, value in most.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`max_sparsity` must be in [0, 1], got {value} for {name!r}")
    return {
        name: max(0, min(group.size - int(least[name]), round(most[name] * group.size)))
        for name, group in unlocked.items()
    }


def _by_group(argument: str, value: Any, unlocked: Mapping[str, Group], default: float) -> dict[str, Any]:
    given = value if isinstance(value, Mapping) else dict.fromkeys(unlocked, value)
    if unknown := given.keys() - unlocked.keys():
        raise ValueError(
            f"`{argument}` names {sorted(unknown)[0]!r}, which is no group that may shrink: "
            f"{', '.join(unlocked)}"
        )
    return {name: given.get(name, default) for name in unlocked}


def _check_arguments(
    groups: Groups, unlocked: Mapping[str, Group], sparsity: Shares, scope: str, round_to: int
) -> None:
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}")
    if isinstance(sparsity, Mapping) and scope == "global":
        raise ValueError("`sparsity` by group is for scope 'layer'")
    for name, share in _by_group("sparsity", sparsity, unlocked, 0.0).items():
        if not 0 <= share < 1:
            raise ValueError(
                f"`sparsity` must be in [0, 1), the fraction to remove, got {share} for {name!r}"
            )
    if not unlocked:
        raise ValueError("`groups` has none that may shrink: print the groups to see why")
    if not isinstance(sparsity, Mapping) and all(group.within_head for group in unlocked.values()):
        raise ValueError(
            f"`sparsity` as one number leaves the size of heads whole, and `groups` has no others that may "
            f"shrink: name them, {{{next(iter(unlocked))!r}: {sparsity:g}}}"
        )
    if round_to < 1 or round_to != int(round_to):
        raise ValueError(f"`round_to` must be whole and at least 1, got {round_to}")
