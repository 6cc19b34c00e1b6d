"""Importance of the experts that a router chooses among: what they add to the output for the tokens that reach them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxeff import graph
from jaxeff.graph.coupling_experts import Gated
from jaxeff.graph.evaluation import Hooks
from jaxeff.model.adapters import resolve_both
from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned
from jaxeff.prune._grouping import coupled_groups


@dataclasses.dataclass(frozen=True, repr=False)
class ExpertImportance(Shown):
    """Importance of experts, and how many tokens reached each.

    Attributes:
        importance: by group, [*blocks, experts], for `prune.plan`; 0 of an expert that no token reached.
        tokens: by group, [*blocks, experts], how many tokens of the batch had a gate other than 0.
    """

    importance: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    @property
    def unreached(self) -> dict[str, list[tuple[int, ...]]]:
        """By group, the (*block, expert) that no token reached: of their importance nothing is known.

        Groups of which every expert was reached are left out.
        """
        found = {
            name: [tuple(map(int, place)) for place in np.argwhere(count == 0)]
            for name, count in self.tokens.items()
        }
        return {name: places for name, places in found.items() if places}

    def __str__(self) -> str:
        rows = [
            (
                name,
                " x ".join(map(str, each.shape)),
                f"{each.min():.3g} to {each.max():.3g}",
                f"{self.tokens[name].min():,} to {self.tokens[name].max():,}",
            )
            for name, each in self.importance.items()
        ]
        lines = aligned([_HEADER, *rows], left=_HEADER, gap=2)
        for name, places in self.unreached.items():
            lines += [
                f"No token reached {_experts(experts)} of {place}."
                for place, experts in _by_block(name, places)
            ]
        return "\n".join(lines)


_HEADER = ("experts", "size", "importance", "tokens")


def _by_block(name: str, places: list[tuple[int, ...]]) -> list[tuple[str, list[int]]]:
    blocks: dict[str, list[int]] = {}
    for *block, expert in places:
        place = f"{name}, block {', '.join(map(str, block))}" if block else name
        blocks.setdefault(place, []).append(expert)
    return [*blocks.items()]


def _experts(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"experts {', '.join(first)} and {last}" if first else f"expert {last}"


def expert_importance(
    params: Any, apply_fn: Callable | Any = None, batch: Any = None, *, rngs: Any = None, **apply_kwargs: Any
) -> ExpertImportance:
    """Return how much each expert behind a router adds to the output, by REAP.

    The importance of expert j is the mean, over the tokens x that reach it, of g_j(x) ||f_j(x)||: its gate times the
    norm of its output. A token reaches an expert if its gate is not 0, so without top_k all of them do.

    Args:
        params, apply_fn, batch, rngs, apply_kwargs: as in `prune.groups`.

    Returns:
        Importance and tokens by the name of the experts' group in `prune.groups`. `prune.plan` takes the `importance`.

    Raises:
        ValueError: the model has no experts that a router chooses among and that may be removed, or the place where
            their outputs are summed is not found.

    References:
        Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, 2025, arXiv:2510.13999

    >>> import jax.numpy as jnp
    >>> def model(w, x):
    ...     gates, chosen = jax.lax.top_k(x @ w["router"], 1)
    ...     gates = (gates[..., None] * jax.nn.one_hot(chosen, w["router"].shape[1])).sum(1)
    ...     hidden = jax.nn.relu(jnp.einsum("td,edh->teh", x, w["up"]))
    ...     return jnp.einsum("te,teh,ehd->td", gates, hidden, w["down"])
    >>> w = {"router": jnp.array([[1.0, 2.0, 0.5]]), "up": jnp.ones((3, 1, 2)), "down": jnp.ones((3, 2, 1))}
    >>> found = expert_importance(w, model, jnp.ones((4, 1)))
    >>> print(found)
    experts   size  importance  tokens
    ----------------------------------
    router:1  3     0 to 4      0 to 4
    No token reached experts 0 and 2 of router:1.
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    _, program, arguments, pairs = coupled_groups(params, apply_fn, batch, rngs, apply_kwargs)
    routed = [(group, one.gated) for group, one in pairs if one.routed]
    if not routed:
        raise ValueError(
            "`apply_fn` has no experts that a router chooses among and that may be removed: `print(prune.groups(...))` "
            "says why"
        )
    sums: dict[str, Gated] = {}
    for group, gated in routed:
        if isinstance(gated, str):
            raise ValueError(f"the importance of the experts of {group.name!r} cannot be measured: {gated}")
        sums[group.name] = gated

    @jax.jit
    def totals(arguments: Any) -> dict[str, Any]:
        readings = {gated.operation: gated.totals for gated in sums.values()}
        _, observed = graph.evaluate(program, arguments, Hooks(readings=readings))
        return {name: observed[gated.operation.outputs[0]] for name, gated in sums.items()}

    measured = totals(arguments)
    importance, tokens = {}, {}
    for group, _ in routed:
        # The passes of a loop whose weights are shared come first, and are further tokens.
        total, count = (
            np.asarray(each).reshape(-1, *group.blocks, group.size).sum(0) for each in measured[group.name]
        )
        importance[group.name], tokens[group.name] = total / np.maximum(count, 1), count
    return ExpertImportance(importance, tokens)
