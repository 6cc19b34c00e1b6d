"""Importance of each stacked block of a network: its influence, and the loss without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import graph
from jaxeff.graph.coupling import couple
from jaxeff.graph.evaluation import Hooks
from jaxeff.graph.program import Operation, scan_operands
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import StatefulApply, from_apply
from jaxeff.model.params import Params
from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned
from jaxeff.prune._compact import compact
from jaxeff.prune._groups import Group, Groups, groups, map_named
from jaxeff.prune._plans import Plan


def block_influence(
    params: Any, apply_fn: Callable | Any = None, batch: Any = None, *, rngs: Any = None, **apply_kwargs: Any
) -> dict[str, np.ndarray]:
    """Return how much each block of a scan changes the stream that it reads and writes.

    The influence of a block is 1 - mean cos(h, h') over examples and positions, with h the block's input and h' its
    output. If a scan carries several arrays, h is the largest floating one.

    Args:
        params, apply_fn, batch, rngs, apply_kwargs: as in `prune.groups`.

    Returns:
        By the name of the blocks' group in `prune.groups`, [blocks]. `prune.plan` takes it as `importance`.

    Raises:
        ValueError: the model has no scan over stacked weights.

    References:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
        arXiv:2403.03853

    >>> def model(params, x):
    ...     return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["w"])[0]
    >>> params = {"w": jnp.stack([jnp.zeros((2, 2)), jnp.array([[1.0, -1.0], [1.0, -1.0]])])}
    >>> {name: found.round(2).tolist() for name, found in block_influence(params, model, jnp.ones((3, 2))).items()}
    {'w:0': [0.0, 0.28]}
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    model = from_apply(Params.of(params), apply_fn, batch, rngs, apply_kwargs)
    function = model.function.without_capture()
    arguments = jax.tree.leaves((model.params, model.inputs))
    program = graph.flatten(
        jax.make_jaxpr(lambda params, inputs: function(params, inputs)[0])(model.params, model.inputs)
    )
    found = groups(params, apply_fn, batch, rngs=rngs, **apply_kwargs)
    leaves = len(found.params) + len(found.state)
    coupled = couple(program, [i < leaves for i in range(len(program.inputs))]).groups
    scans = {
        group.name: one.scan
        for group, one in zip(found, coupled, strict=True)
        if one.scan is not None and one.scan in program.operations
    }
    if not scans:
        raise ValueError(
            "`apply_fn` has no scan over stacked weights: there are no blocks whose influence to measure"
        )

    def influences(arguments: Sequence[Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        rules = {scan: _watched(name, scan, seen) for name, scan in scans.items()}
        _ = graph.evaluate(program, arguments, Hooks(rules=rules))
        return seen

    return {name: np.asarray(each, np.float64) for name, each in jax.jit(influences)(arguments).items()}


def _watched(name: str, scan: Operation, seen: dict[str, Any]) -> Callable:
    """Return a rule that runs a scan and records the influence of each of its iterations."""
    (body,) = scan.bodies
    constants, carried = scan_operands(scan)

    def run(operands: list[Any], _: Any) -> list[Any]:
        carry = operands[constants : constants + carried]
        floats = [i for i, each in enumerate(carry) if jnp.issubdtype(each.dtype, jnp.floating)]
        stream = max(floats, key=lambda i: carry[i].size)

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], Any]:
            results, _ = graph.evaluate(body, [*operands[:constants], *carry, *slices], Hooks())
            return results[:carried], (results[carried:], _influence(carry[stream], results[stream]))

        options = {option: scan.params[option] for option in ("length", "reverse")}
        carry, (stacked, seen[name]) = lax.scan(step, carry, operands[constants + carried :], **options)
        return [*carry, *stacked]

    return run


def _influence(before: jax.Array, after: jax.Array) -> jax.Array:
    before, after = (each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in (before, after))
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    products = jnp.sum(before * after, axis=-1)
    # Without input or output there is no angle, and the block counts as one that changes nothing.
    cosine = jnp.where(norms > 0, products / jnp.where(norms > 0, norms, 1), 1)
    return jnp.maximum(1 - jnp.mean(cosine), 0)


@dataclasses.dataclass(frozen=True, repr=False)
class BlockOrder(Shown):
    """An order of removal of blocks, each time the block without which the loss is lowest.

    Attributes:
        order: group and index of the removed blocks, the first of them first.
        losses: the loss after each removal.
        dense: the loss of the whole model.
        importance: by group, [blocks], for `prune.plan`: the position of each block in the order. The blocks that were
            not removed follow, ordered by the loss without each of them.
    """

    order: tuple[tuple[str, int], ...]
    losses: tuple[float, ...]
    dense: float
    importance: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        rows = [
            (f"{group}[{block}]", f"{loss:.4g}")
            for (group, block), loss in zip(self.order, self.losses, strict=True)
        ]
        return "\n".join(aligned([("removed, in turn", "loss"), ("nothing", f"{self.dense:.4g}"), *rows]))


def order_blocks(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    loss_fn: Callable[..., Any],
    targets: Any,
    count: int | None = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> BlockOrder:
    """Remove blocks of scans one by one, each time the one without which the measured loss is lowest.

    Each round runs the model once for every remaining block, at its smaller depth, and compiles once.

    Args:
        params, apply_fn, batch, rngs, apply_kwargs: as in `prune.groups`.
        loss_fn: `loss_fn(outputs, targets)`; its mean is minimized.
        targets: passed to `loss_fn`.
        count: number of blocks to remove; all but one of each group by default.

    Raises:
        ValueError: no block may be removed (`print(prune.groups(...))` says why), or fewer than `count`.

    References:
        Song et al., SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
        Blocks, 2024, arXiv:2402.09025

    >>> def model(params, x):
    ...     return jax.lax.scan(lambda h, w: (h + h @ w, None), x, params["w"])[0]
    >>> params = {"w": jnp.stack([jnp.eye(2), jnp.zeros((2, 2)), 0.1 * jnp.eye(2)])}
    >>> x = jnp.ones((3, 2))
    >>> squares = lambda outputs, targets: (outputs - targets) ** 2
    >>> found = order_blocks(params, model, x, loss_fn=squares, targets=model(params, x))
    >>> found.order
    (('w:0', 1), ('w:0', 2))
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    found = groups(params, apply_fn, batch, rngs=rngs, **apply_kwargs)
    removable = [group for group in found.unlocked if group.kind == "block"]
    most = sum(group.size - 1 for group in removable)
    count = most if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"`count` must be from 1 to {most}, the blocks that may be removed, got {count}")
    if isinstance(apply_fn, StatefulApply) and any(
        m.path in found.state for g in removable for m in g.members
    ):
        raise ValueError(
            "blocks with a state of their own cannot be removed one by one: pass it among the `params`"
        )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    inputs = batch if isinstance(batch, tuple) else (batch,)

    def loss_at(depths: Mapping[str, int]) -> Callable[[Mapping[str, Any]], float]:
        """Return the loss as a function of the params, at these numbers of blocks per group."""
        removed = {group.name: [*range(group.size - depths[group.name])] for group in removable}
        plan = Plan.of(found, removed)
        _, small_apply = compact(shapes, apply_fn, batch, plan, rngs=rngs, **apply_kwargs)

        @jax.jit
        def loss(params: Any, inputs: Any, targets: Any, kept: Mapping[str, Any]) -> jax.Array:
            small = map_named(lambda path, leaf: _of_blocks(removable, kept, path, leaf), params)
            return jnp.mean(loss_fn(small_apply(small, *inputs), targets))

        return lambda kept: float(loss(params, inputs, targets, kept))

    kept = {group.name: np.arange(group.size) for group in removable}
    dense = loss_at({name: len(blocks) for name, blocks in kept.items()})(kept)
    order: list[tuple[str, int]] = []
    losses: list[float] = []
    last: dict[tuple[str, int], float] = {}
    while len(order) < count:
        last = {}
        for name in kept:
            if len(kept[name]) == 1:
                continue
            at = loss_at({other: len(blocks) - (other == name) for other, blocks in kept.items()})
            for block in kept[name]:
                last[name, int(block)] = at({**kept, name: kept[name][kept[name] != block]})
        # A loss of nan is the worst.
        chosen = min(last, key=lambda block: (np.isnan(last[block]), last[block]))
        order.append(chosen)
        losses.append(last[chosen])
        kept[chosen[0]] = kept[chosen[0]][kept[chosen[0]] != chosen[1]]
    return BlockOrder(tuple(order), tuple(losses), dense, _places(found, removable, order, last))


def _of_blocks(removable: Sequence[Group], kept: Mapping[str, Any], path: str, leaf: Any) -> Any:
    for group in removable:
        for member in group.members:
            if member.path == path:
                leaf = jnp.take(leaf, kept[group.name], axis=member.axis)
    return leaf


def _places(
    found: Groups,
    removable: Sequence[Group],
    order: Sequence[tuple[str, int]],
    last: Mapping[tuple[str, int], float],
) -> dict[str, np.ndarray]:
    rest = sorted(last.keys() - set(order), key=lambda block: (np.isnan(last[block]), last[block]))
    whole = {(group.name, block) for group in removable for block in range(group.size)}
    ranked = [*order, *rest, *sorted(whole - {*order, *rest})]
    importance = {group.name: np.zeros(group.size) for group in removable}
    for place, (name, block) in enumerate(ranked):
        importance[name][block] = place
    return importance
