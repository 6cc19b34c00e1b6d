"""Groups and their importance -> a `Plan`: which elements are worth least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from jaxeff.graph.coupling_kinds import GROUP_KINDS
from jaxeff.prune._groups import Group, Groups
from jaxeff.prune._plans import Plan
from jaxeff.prune._targets import FITS, Budget, Choices, best_places

Shares = float | Mapping[str, float]
Widths = int | Mapping[str, int]


def plan(
    groups: Groups,
    importance: Any,
    sparsity: Shares | None = None,
    *,
    target: Mapping[str, float] | None = None,
    kinds: Iterable[str] | None = None,
    reduce: str = "sum",
    normalize: str = "mean",
    scope: str = "layer",
    round_to: Widths = 1,
    minimum: Widths = 1,
    max_sparsity: Shares = 1.0,
    evaluate: Callable[[Plan], Any] | None = None,
    candidates: int = 4,
) -> Plan:
    """Plan to remove the least important elements of the groups that are not locked.

    Say how much goes by either `sparsity` or `target`.

    With a target, all groups of `kinds` share one budget. The plan meets it, and would exceed it with one more
    element (or `round_to` of them) of any group. It loses the least importance, summed over all that it removes: of
    all plans where there are few, and otherwise of those that a search finds. An element of a group with blocks is
    one in each block.

    Args:
        groups: of `prune.groups`.
        importance: scores of the weights, shaped like `params`, as `prune.scored` gives by any criterion. Entries
            under the names of groups are the importance of their elements; see `Groups.scored`.
        sparsity: the fraction of elements to remove, in [0, 1): one number for all groups of `kinds`, or a
            mapping by group's name with scope 'layer', where the groups not named stay whole.
        target: fractions of the whole model, in (0, 1), that the smaller one has at most: of its 'params', their
            'bytes', its 'macs' or its 'kv_cache', as `Groups.costs` has them. All of several are met.
        kinds: of the groups to remove from (`Group.kind`). By default all but 'head_size', since no attention
            module can be built with heads of fewer queries and keys than values, and 'block' and 'expert' behind a
            router, whose importance the scores of weights do not tell: see `prune.block_influence` and
            `prune.expert_importance`.
        reduce, normalize: how the scores of an element's weights make its importance; see `Groups.scored`.
            Where groups compare, `normalize` counts: with scope 'global', and with a target. 'sum' lets
            groups of few elements, such as blocks, count as much as those of many.
        scope: of `sparsity`. 'layer' removes so much of each group, 'global' of all groups together in one order.
        round_to: what stays is rounded up to a multiple of this (8, 128), or to the whole group. By kind, such as
            `{"unit": 128}`, groups of other kinds are not rounded.
        minimum: elements that a group keeps at least; all that it has, if that is fewer. Experts keep as many as
            their router chooses for each token, whatever is asked.
        max_sparsity: at most so much of a group goes; with scope 'global' others make up for it.
            `minimum` and `max_sparsity` may be by group's name, for those named.
        evaluate: with a target, gives a number for a plan, the lower the better, such as the loss of what
            `prune.compact` makes by it. The best plan is returned.
        candidates: how many plans `evaluate` is asked about at most, those that lose the least importance.

    Raises:
        ValueError: an argument is out of range, names no group or a locked one, or a group has no scores; both or
            neither of `sparsity` and `target`; a target is out of reach (the message says what can be reached).

    >>> import jax, jax.numpy as jnp
    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params = {"a": jnp.array([[1.0, 3.0, 0.5, 2.0]]), "b": jnp.ones((4, 2))}
    >>> found = prune.groups(params, model, jnp.ones((8, 1)))
    >>> prune.plan(found, prune.scored(params), 0.5).removed
    {'a:1': (0, 2)}
    >>> prune.plan(found, prune.scored(params), target={"macs": 0.8}).sizes()
    {'a:1': 3}
    """
    if not isinstance(groups, Groups):
        raise TypeError(f"`groups` must be what `prune.groups` gives, got {type(groups).__name__}")
    if (sparsity is None) == (target is None):
        both = "both" if target is not None else "neither"
        raise ValueError(f"pass either `sparsity` or `target`, got {both}")
    if evaluate is not None and target is None:
        raise ValueError("`evaluate` chooses among plans for a `target`, and there is none")
    unlocked = {group.name: group for group in groups.unlocked}
    limits = _limits(unlocked, minimum, max_sparsity)
    chosen = _chosen(unlocked, sparsity, kinds)
    steps = _steps(unlocked, round_to)
    _check_arguments(unlocked, chosen, sparsity, scope)
    ranked = _ranked(groups.scored(importance, reduce=reduce, normalize=normalize), chosen, limits)
    if sparsity is None:
        number = 1 if evaluate is None else candidates
        plans = _plans_for(groups, ranked, target or {}, limits, steps, number)
        return plans[0] if evaluate is None else _best(plans, evaluate)
    # A mapping is only allowed with scope 'layer'.
    if scope == "layer" or isinstance(sparsity, Mapping):
        counts = _of_each(ranked, sparsity)
    else:
        counts = _of_all(ranked, float(sparsity), limits)
    kept = {}
    for name, found in ranked.items():
        size = found.shape[-1]
        least = max(size - counts[name], size - limits[name])
        kept[name] = min(size, math.ceil(least / steps[name]) * steps[name])
    return _plan_of(groups, ranked, kept)


def _plan_of(groups: Groups, ranked: Mapping[str, np.ndarray], kept: Mapping[str, int]) -> Plan:
    removed: dict[str, Any] = {
        name: np.argsort(found, axis=-1, kind="stable")[..., : found.shape[-1] - kept[name]]
        for name, found in ranked.items()
    }
    return Plan.of(groups, removed)


def _ranked(scored: Groups, chosen: Set[str], limits: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The importance of the elements of each group that may lose some."""
    ranked: dict[str, np.ndarray] = {}
    for group in scored.unlocked:
        if group.name not in chosen or not limits[group.name]:
            continue
        if group.importance is None:
            raise ValueError(
                f"`importance` has no scores for {group.name!r}: score one of its leaves (`prunable` of "
                "`prune.scored`), or leave it whole with `max_sparsity={" + repr(group.name) + ": 0}`"
            )
        ranked[group.name] = group.importance
    return ranked


def _plans_for(
    groups: Groups,
    ranked: Mapping[str, np.ndarray],
    target: Mapping[str, float],
    limits: Mapping[str, int],
    steps: Mapping[str, int],
    candidates: int,
) -> list[Plan]:
    """Plans that meet a target, the one that loses the least importance first."""
    if candidates < 1:
        raise ValueError(f"`candidates` must be at least 1, got {candidates}")
    _check_target(groups, target)
    whole = np.concatenate([np.full(group.variables, group.size / group.variables, int) for group in groups])
    first = np.cumsum([0, *(group.variables for group in groups)])
    amounts = [groups.amounts[key] for key in target]
    full = np.array([float(amount(whole)) for amount in amounts])
    choices = Choices.of(
        [
            (int(first[number]), group.kind, *_sizes(ranked[name], group.size - limits[name], steps[name]))
            for number, group in enumerate(groups)
            if (name := group.name) in ranked
        ]
    )
    blocks = {
        place: (int(choices.groups[place]), np.argsort(np.argsort(ranked[name], kind="stable")))
        for place, name in enumerate(ranked)
        if groups[name].leaves
    }
    budget = Budget(whole, amounts, full * np.array([*target.values()]), blocks)
    for key, share in zip(target, budget.shares(choices, np.zeros_like(choices.tops)), strict=True):
        if share > FITS:
            raise ValueError(
                f"`target` of {target[key]:g} of the {key!r} is out of reach: "
                f"{math.ceil(1e4 * share * target[key]) / 1e4:g} is the least that these `kinds`, `minimum`, "
                "`max_sparsity` and `round_to` allow"
            )
    return [
        _plan_of(groups, ranked, dict(zip(ranked, choices.sizes_at(places).tolist(), strict=True)))
        for places in best_places(choices, budget, candidates)
    ]


def _sizes(importance: np.ndarray, least: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The sizes that a group may have, ascending, and the importance of what is removed at each."""
    size = importance.shape[-1]
    sizes = np.append(np.arange(math.ceil(least / step) * step, size, step), size)
    lowest = np.sort(importance, axis=-1).reshape(-1, size).sum(axis=0)
    return sizes, np.concatenate([[0.0], np.cumsum(lowest)])[size - sizes]


def _best(plans: Sequence[Plan], evaluate: Callable[[Plan], Any]) -> Plan:
    found = [float(evaluate(plan)) for plan in plans]
    if np.isnan(found).all():
        raise ValueError(f"`evaluate` gave nan for each of {len(plans)} plans")
    return plans[int(np.nanargmin(found))]


def _check_target(groups: Groups, target: Mapping[str, float]) -> None:
    if not isinstance(target, Mapping) or not target:
        raise ValueError(f"`target` must be a mapping such as {{'macs': 0.5}}, got {target!r}")
    for key, fraction in target.items():
        if key not in _TARGETS:
            raise ValueError(f"`target` may hold {', '.join(map(repr, _TARGETS))}, got {key!r}")
        if key not in groups.amounts:
            raise ValueError(f"`target` holds {key!r}, and the model has {_TARGETS[key]}")
        if not 0 < fraction < 1:
            raise ValueError(
                f"`target` must be in (0, 1), the fraction of the {key!r} that may stay, got {fraction}"
            )


_TARGETS = {
    "params": "no params",
    "bytes": "no params",
    "macs": "no multiply-accumulates",
    "kv_cache": "no attention whose heads are known",
}


def _chosen(unlocked: Mapping[str, Group], sparsity: Shares | None, kinds: Iterable[str] | None) -> set[str]:
    """The names of the groups to remove from."""
    if isinstance(sparsity, Mapping):
        if kinds is not None:
            raise ValueError("`kinds` is for one `sparsity` of all groups; by name pass those that you mean")
        return set(sparsity)
    if kinds is None:
        return {name for name, group in unlocked.items() if not group.left_whole}
    wanted = {kinds} if isinstance(kinds, str) else set(kinds)
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
        name: max(0, min(group.size - max(int(least[name]), group.routed), round(most[name] * group.size)))
        for name, group in unlocked.items()
    }


def _steps(unlocked: Mapping[str, Group], round_to: Widths) -> dict[str, int]:
    """Return the multiple that the size of each group is rounded up to."""
    by_kind = round_to if isinstance(round_to, Mapping) else {kind: round_to for kind in GROUP_KINDS}
    for kind, step in by_kind.items():
        if kind not in GROUP_KINDS:
            raise ValueError(f"`round_to` may be by kind, {', '.join(map(repr, GROUP_KINDS))}, got {kind!r}")
        if step < 1 or step != int(step):
            raise ValueError(f"`round_to` must be whole and at least 1, got {step}")
    return {name: int(by_kind.get(group.kind, 1)) for name, group in unlocked.items()}


def _by_group(argument: str, value: Any, unlocked: Mapping[str, Group], default: float) -> dict[str, Any]:
    given = value if isinstance(value, Mapping) else dict.fromkeys(unlocked, value)
    if unknown := given.keys() - unlocked.keys():
        raise ValueError(
            f"`{argument}` names {sorted(unknown)[0]!r}, which is not a group that may shrink: "
            f"{', '.join(unlocked)}"
        )
    return {name: given.get(name, default) for name in unlocked}


def _check_arguments(
    unlocked: Mapping[str, Group], chosen: Set[str], sparsity: Shares | None, scope: str
) -> None:
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}")
    if isinstance(sparsity, Mapping) and scope == "global":
        raise ValueError("`sparsity` by group is for scope 'layer'")
    for name, share in _by_group("sparsity", sparsity or 0.0, unlocked, 0.0).items():
        if isinstance(share, str) or not 0 <= share < 1:
            raise ValueError(
                f"`sparsity` must be in [0, 1), the fraction to remove, got {share!r} for {name!r}"
            )
    if not unlocked:
        raise ValueError("`groups` has none that may shrink: print the groups to see why")
    if not isinstance(sparsity, Mapping) and not chosen:
        others = ", ".join(map(repr, sorted({group.kind for group in unlocked.values()})))
        named = "" if sparsity is None else f", or name them, {{{next(iter(unlocked))!r}: {sparsity:g}}}"
        raise ValueError(
            f"no group of `kinds` may shrink, and those that may are of kind {others}: pass `kinds`{named}"
        )
