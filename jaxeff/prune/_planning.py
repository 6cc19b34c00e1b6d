"""Groups and their importance -> a `Plan`: which elements are worth least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from jaxeff.graph.coupling_kinds import GROUP_KINDS
from jaxeff.prune._groups import WHOLE, Group, Groups
from jaxeff.prune._plans import Plan

Shares = float | Mapping[str, float]
Widths = int | Mapping[str, int]


def plan(
    groups: Groups,
    importance: Any,
    sparsity: Shares,
    *,
    kinds: Iterable[str] | None = None,
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
        sparsity: the fraction of elements to remove, in [0, 1): one number for all groups of `kinds`, or a
            mapping by group's name with scope 'layer', where the groups not named stay whole.
        kinds: of the groups to remove from (`Group.kind`). By default all but 'head_size', since no attention
            module can be built with heads of fewer queries and keys than values, and 'block', whose importance
            the scores of weights do not tell: see `prune.block_influence`.
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
    chosen = _chosen(unlocked, sparsity, kinds)
    _check_arguments(unlocked, chosen, sparsity, scope, round_to)
    scored = {
        group.name: group.importance
        for group in groups.scored(importance, reduce=reduce, normalize=normalize).unlocked
        if limits[group.name] and group.name in chosen
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
        size = found.shape[-1]
        kept = max(size - counts[name], size - limits[name])
        kept = min(size, math.ceil(kept / round_to) * round_to)
        removed[name] = np.argsort(found, axis=-1, kind="stable")[..., : size - kept]
    return Plan.of(groups, removed)


def _chosen(unlocked: Mapping[str, Group], sparsity: Shares, kinds: Iterable[str] | None) -> set[str]:
    """The names of the groups to remove from."""
    if isinstance(sparsity, Mapping):
        if kinds is not None:
            raise ValueError("`kinds` is for one `sparsity` of all groups; by name pass those that you mean")
        return set(sparsity)
    wanted = (
        set(GROUP_KINDS) - set(WHOLE) if kinds is None else {kinds} if isinstance(kinds, str) else set(kinds)
    )
    if unknown := wanted - set(GROUP_KINDS):
        raise ValueError(f"`kinds` may hold {', '.join(map(repr, GROUP_KINDS))}, got {sorted(unknown)[0]!r}")
    return {name for name, group in unlocked.items() if group.kind in wanted}


def _of_each(ranked: Mapping[str, np.ndarray], sparsity: Shares) -> dict[str, int]:
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(ranked, sparsity)
    return {name: round(shares[name] * found.shape[-1]) for name, found in ranked.items()}


def _of_all(ranked: Mapping[str, np.ndarray], sparsity: float, limits: Mapping[str, int]) -> dict[str, int]:
    """How many of each group are among the lowest of all, where none loses more than its limit.

    Blocks lose equally many: their lowest elements go together, at their mean importance, and so on upwards.
    """
    lowest = [
        np.sort(found, kind="stable").reshape(-1, found.shape[-1]).mean(axis=0)[: limits[name]]
        for name, found in ranked.items()
    ]
    if not lowest:
        return {}
    owners = np.repeat(np.arange(len(lowest)), [len(found) for found in lowest])
    blocks = np.array([found.size // found.shape[-1] for found in ranked.values()])
    order = np.argsort(np.concatenate(lowest), kind="stable")
    total = round(sparsity * sum(found.size for found in ranked.values()))
    taken = order[np.cumsum(blocks[owners[order]]) <= total]
    counts = np.bincount(owners[taken], minlength=len(lowest))
    return dict(zip(ranked, counts.tolist(), strict=True))


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
    unlocked: Mapping[str, Group], chosen: Set[str], sparsity: Shares, scope: str, round_to: int
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
    if not isinstance(sparsity, Mapping) and not chosen:
        others = sorted({group.kind for group in unlocked.values()})
        raise ValueError(
            f"no group of `kinds` may shrink, and those that may are of kind {', '.join(map(repr, others))}: pass "
            f"`kinds`, or name them, {{{next(iter(unlocked))!r}: {sparsity:g}}}"
        )
    if round_to < 1 or round_to != int(round_to):
        raise ValueError(f"`round_to` must be whole and at least 1, got {round_to}")
