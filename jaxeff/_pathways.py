"""The strongest routes from unit to unit through a network.

`prune.groups` says which axes of which weights are tied, and a report says which of them are units. Two weights
are connected if the traced program ties an axis of one to an axis of the other; names do not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxeff.graph.coupling import INPUT, OUTPUT
from jaxeff.output.shown import Shown
from jaxeff.prune import Group, Groups, Member
from jaxeff.prune._named import named_variables
from jaxeff.report import Report


@dataclasses.dataclass(frozen=True)
class Route:
    """A chain of units, each as (index of its group, index in the group), and its strength."""

    units: tuple[tuple[int, int], ...]
    strength: float


@dataclasses.dataclass(frozen=True, repr=False)
class Pathways(Shown):
    """Routes through a network, strongest first.

    Attributes:
        groups: names of the groups of units that weights connect, in the order in which the model uses them.
        sizes: number of units in each group.
        routes: chains of units, whose group indices refer to `groups`.
        left_out: weights on no route because they lead back into an earlier group, such as those of a
            residual stream or recurrent state.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    routes: tuple[Route, ...]
    left_out: tuple[str, ...]


def pathways(report: Report, groups: Groups, importance: Any, count: int = 20) -> Pathways:
    """Find the strongest routes from the model's first units to its last.

    The strength of a step from one unit to the next is the importance of the weights between them, as a share
    of the importance of all weights into the second. The strength of a route is the product of its steps, so
    the strengths of all routes into one unit sum to 1. This is a heuristic of magnitudes: it ignores signs and
    does not imply that the network would fail without the route.

    Args:
        report: a report of the same model, which says which axes of a weight are its units.
        groups: from `jaxeff.prune.groups`.
        importance: scores shaped like `params`, from `jaxeff.importance.scores` (by path) or
            `jaxeff.prune.scored`.
        count: number of routes to return.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `count` is below 1, the arguments belong to different models, scores are negative or not
            finite, or no weight connects two groups.

    >>> import jax, jax.numpy as jnp, jaxeff
    >>> from jaxeff import prune
    >>> params = {"a": jnp.array([[1.0, 3.0], [1.0, 1.0]]), "b": jnp.array([[1.0, 0.0], [1.0, 4.0]])}
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> batch = jnp.ones((4, 2))
    >>> found = pathways(
    ...     jaxeff.analyze(params, model, batch), prune.groups(params, model, batch), prune.scored(params)
    ... )
    >>> found.groups
    ('a:0', 'a:1', 'b:1')
    >>> found.routes[0]
    Route(units=((0, 0), (1, 1), (2, 1)), strength=0.75)
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    _check_one_model(report, groups, named_variables(importance))
    into, left_out = _connections(report, groups, named_variables(importance))
    if not into:
        raise ValueError("there is no route, because no weight with a score connects two groups of units")
    used = sorted({*into, *(source for sources in into.values() for source in sources)})
    best: dict[int, list[list[Route]]] = {}
    for target in used:
        best[target] = _routes_into(target, into.get(target, {}), best, groups.groups[target].size, count)
    ends = [route for group in _last(groups, into, used) for unit in best[group] for route in unit]
    place = {group: number for number, group in enumerate(used)}
    routes = [
        Route(tuple((place[group], unit) for group, unit in route.units), route.strength)
        for route in sorted(ends, key=lambda route: -route.strength)[:count]
    ]
    chosen = [groups.groups[group] for group in used]
    return Pathways(
        tuple(group.name for group in chosen),
        tuple(group.size for group in chosen),
        tuple(routes),
        tuple(left_out),
    )


def _check_one_model(report: Any, groups: Any, scores: Mapping[str, Any]) -> None:
    if not isinstance(report, Report) or not isinstance(groups, Groups):
        raise TypeError(
            "pass a report, groups and importance in this order, got "
            f"{type(report).__name__} and {type(groups).__name__} for the first two"
        )
    shapes = {row.path: row.shape for row in report.structure if not row.is_sum}
    for path, score in scores.items():
        if path in shapes and np.ndim(score) and np.shape(score) != shapes[path]:
            raise ValueError(
                f"`importance` of {path!r} has shape {np.shape(score)}, the report's weight {shapes[path]}: "
                "pass scores of the same model"
            )
        if path in shapes and not np.all(np.isfinite(score) & (np.asarray(score) >= 0)):
            raise ValueError(
                f"`importance` of {path!r} is negative or not finite: pass `jaxeff.prune.scored(params)` or "
                "`jaxeff.importance.scores`, not the weights"
            )
    for group in groups.groups:
        for member in group.members:
            shape = shapes.get(member.path)
            if shape is not None and int(np.max(member.indices, initial=0)) >= shape[member.axis]:
                raise ValueError(f"`groups` belong to another model: {member.path!r} has shape {shape} here")


Connections = dict[int, dict[int, np.ndarray]]
"""Group -> each group before it -> [units there, units here], the importance of the weights between them."""


def _connections(report: Report, groups: Groups, scores: Mapping[str, Any]) -> tuple[Connections, list[str]]:
    unit_axes = {row.path: row.unit_axes for row in report.structure}
    ends: dict[str, list[tuple[int, Member]]] = {}
    for number, group in enumerate(groups.groups):
        for member in group.members if _holds_units(group) else ():
            ends.setdefault(member.path, []).append((number, member))
    into: Connections = {}
    left_out = []
    for path, found in ends.items():
        if path not in unit_axes or path not in scores:
            continue
        outputs = [end for end in found if end[1].axis in unit_axes[path]]
        inputs = [end for end in found if end[1].axis not in unit_axes[path]]
        for target, there in outputs:
            for source, here in inputs:
                if source >= target:
                    left_out += [path] if path not in left_out else []
                    continue
                between = _between(np.asarray(scores[path], np.float64), here, there)
                before = into.setdefault(target, {})
                before[source] = before[source] + between if source in before else between
    return into, left_out


def _last(groups: Groups, into: Connections, used: Sequence[int]) -> list[int]:
    """Return the groups of the model's outputs, or, if there are none, those that lead nowhere."""
    sources = {source for before in into.values() for source in before}
    ends = [group for group in used if group not in sources]
    outputs = [group for group in ends if OUTPUT in (groups.groups[group].locked or "")]
    return outputs or ends


def _holds_units(group: Group) -> bool:
    """Return whether a group holds units. The sliding axes of a kernel do not; nothing else is tied to them."""
    ends = (INPUT, OUTPUT)
    return len(group.members) > 1 or group.locked is None or any(end in group.locked for end in ends)


def _between(score: np.ndarray, here: Member, there: Member) -> np.ndarray:
    """Return the importance of the weights from each unit of one group to each unit of the other."""
    others = tuple(axis for axis in range(score.ndim) if axis not in (here.axis, there.axis))
    flat = score.sum(axis=others)
    flat = flat if here.axis < there.axis else flat.T
    rows = flat[here.indices].sum(axis=1)
    return rows[:, there.indices].sum(axis=2)


def _routes_into(
    target: int,
    before: Mapping[int, np.ndarray],
    best: Mapping[int, list[list[Route]]],
    size: int,
    count: int,
) -> list[list[Route]]:
    """Find the `count` strongest routes into each unit of a group."""
    if not before:
        return [[Route(((target, unit),), 1.0)] for unit in range(size)]
    totals = np.sum([between.sum(axis=0) for between in before.values()], axis=0)
    origins = [
        (source, unit, route)
        for source in before
        for unit, found in enumerate(best[source])
        for route in found
    ]
    strengths = np.array([route.strength for _, _, route in origins])
    parts = {source: between / np.where(totals > 0, totals, 1) for source, between in before.items()}
    found: list[list[Route]] = []
    for unit in range(size):
        leading = np.array([parts[source][start, unit] for source, start, _ in origins]) * strengths
        strongest = np.argsort(-leading, kind="stable")[:count]
        found.append(
            [
                Route((*origins[at][2].units, (target, unit)), float(leading[at]))
                for at in strongest
                if leading[at] > 0
            ]
        )
    return found
