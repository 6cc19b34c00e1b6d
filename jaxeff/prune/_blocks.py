"""Importance of each block of a network: its influence, and the loss without it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxeff import graph
from jaxeff.graph.blocks import Block, blocks_of
from jaxeff.graph.evaluation import Hooks
from jaxeff.graph.program import Operation, Program, scan_operands
from jaxeff.graph.skipping import gated
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import StatefulApply, from_apply
from jaxeff.model.objective import objective
from jaxeff.model.params import Params
from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned
from jaxeff.prune._compact import compact
from jaxeff.prune._grouping import coupled_groups, groups
from jaxeff.prune._groups import Group, Groups
from jaxeff.prune._named import in_modules, map_named
from jaxeff.prune._plans import Plan


def block_influence(
    params: Any, apply_fn: Callable | Any = None, batch: Any = None, *, rngs: Any = None, **apply_kwargs: Any
) -> dict[str, np.ndarray]:
    """Return how much each block changes the stream that it reads and writes.

    Blocks are the iterations of a scan over stacked weights, and residual blocks that are written out one after the
    other. The influence of a block is 1 - mean cos(h, h') over examples and positions, with h the block's input and h'
    its output, as vectors along the last axis. If a scan carries several arrays, h is the largest floating one.

    Args:
        params, apply_fn, batch, rngs, apply_kwargs: as in `prune.groups`.

    Returns:
        By the name of the blocks' group in `prune.groups`, [blocks]. `prune.plan` takes it as `importance`.

    Raises:
        ValueError: the model has no blocks.

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
    found, program, arguments, pairs = coupled_groups(params, apply_fn, batch, rngs, apply_kwargs)
    scans = {
        group.name: one.scan
        for group, one in pairs
        if one.scan is not None and one.scan in program.operations
    }
    in_a_row = _blocks_in_a_row(found, program)
    if not scans and not in_a_row:
        raise ValueError(
            "`apply_fn` has no blocks whose influence to measure: no scan over stacked weights, and no residual "
            "blocks that are alike"
        )
    streams = dict.fromkeys(value for each in in_a_row.values() for b in each for value in (b.start, b.end))

    def influences(arguments: Sequence[Any]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        rules = {scan: _watched(name, scan, seen) for name, scan in scans.items()}
        watched = dataclasses.replace(program, outputs=(*program.outputs, *streams))
        results, _ = graph.evaluate(watched, arguments, Hooks(rules=rules))
        arrays = dict(zip(streams, results[len(program.outputs) :], strict=True))
        for name, blocks in in_a_row.items():
            seen[name] = jnp.stack([_influence(arrays[block.start], arrays[block.end]) for block in blocks])
        return seen

    return {name: np.asarray(each, np.float64) for name, each in jax.jit(influences)(arguments).items()}


def _blocks_in_a_row(found: Groups, program: Program) -> dict[str, tuple[Block, ...]]:
    """The blocks of a program that are not stacked, by the name of their group."""
    paths = [*found.params, *found.state]
    every = blocks_of(program, in_modules(paths, found.params))
    named = zip((group for group in found if group.leaves), every, strict=True)
    return {
        group.name: one.blocks for group, one in named if one.blocks[0].start.shape == one.blocks[0].end.shape
    }


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
    before, after = map(_direction, (before, after))
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    products = jnp.sum(before * after, axis=-1)
    # A zero vector has no angle, so the block counts as one that changes nothing there. nan stays nan.
    cosine = jnp.where(norms == 0, 1, products / jnp.where(norms == 0, 1, norms))
    return jnp.maximum(1 - jnp.mean(cosine), 0)


def _direction(vectors: jax.Array) -> jax.Array:
    """The vectors along the last axis, in float32 at least, over their largest element, whose square is finite."""
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(vectors), -1, keepdims=True, initial=0)
    return vectors / jnp.where(largest == 0, 1, largest)


@dataclasses.dataclass(frozen=True, repr=False)
class BlockOrder(Shown):
    """An order of removal of blocks, each time the block without which the loss is lowest.

    Attributes:
        order: group and index of the removed blocks, the first of them first.
        losses: the loss after each removal.
        dense: the loss of the whole model.
        importance: by group, [blocks], for `prune.plan`: the position of each block in the order. The blocks that were
            not removed follow, ordered by the loss without each of them.
        names: of the removed blocks: 'layers/kernel:0[3]' of a scan, or 'layers/3', the module that holds the block.
    """

    order: tuple[tuple[str, int], ...]
    losses: tuple[float, ...]
    dense: float
    importance: Mapping[str, np.ndarray]
    names: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(name, f"{loss:.4g}") for name, loss in zip(self.names, self.losses, strict=True)]
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
    """Remove blocks one by one, each time the one without which the measured loss is lowest.

    Each round runs the model once for every remaining block. Iterations of a scan run at the smaller depth, which
    compiles once a round. Blocks that are written out one after the other all run, with what they add left out, which
    compiles once.

    Args:
        params, apply_fn, batch, rngs, apply_kwargs: as in `prune.groups`.
        loss_fn: `loss_fn(outputs, targets)`; its mean is minimized.
        targets: passed to `loss_fn`.
        count: number of blocks to remove; all but one of each group by default.

    Raises:
        ValueError: no block may be removed (`print(prune.groups(...))` says why), or fewer than `count`; the model
            has blocks of both sorts.

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
    if not removable:
        raise ValueError("`apply_fn` has no blocks that may be removed: `print(prune.groups(...))` says why")
    # Checks the loss before it is traced within other programs.
    _ = objective(from_apply(Params.of(params), apply_fn, batch, rngs, apply_kwargs), loss_fn, targets, ())
    most = sum(group.size - 1 for group in removable)
    count = most if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"`count` must be from 1 to {most}, the blocks that may be removed, got {count}")
    if len({bool(group.leaves) for group in removable}) > 1:
        raise ValueError(
            "`apply_fn` has iterations of a scan and blocks in a row, which are not ordered together: "
            "rank them by `prune.block_influence`"
        )
    losses_of = _losses_in_a_row if removable[0].leaves else _losses_of_scans
    loss_of = losses_of(found, removable, params, apply_fn, batch, (loss_fn, targets), rngs, apply_kwargs)
    kept = {group.name: np.arange(group.size) for group in removable}
    dense = loss_of(kept)
    order: list[tuple[str, int]] = []
    losses: list[float] = []
    last: dict[tuple[str, int], float] = {}
    while len(order) < count:
        last = {}
        for name in kept:
            if len(kept[name]) == 1:
                continue
            for block in kept[name]:
                last[name, int(block)] = loss_of({**kept, name: kept[name][kept[name] != block]})
        # A loss of nan is the worst.
        chosen = min(last, key=lambda block: (np.isnan(last[block]), last[block]))
        order.append(chosen)
        losses.append(last[chosen])
        kept[chosen[0]] = kept[chosen[0]][kept[chosen[0]] != chosen[1]]
    names = tuple(
        found[name].names[block] if found[name].leaves else f"{name}[{block}]" for name, block in order
    )
    return BlockOrder(tuple(order), tuple(losses), dense, _places(found, removable, order, last), names)


LossOf = Callable[[Mapping[str, np.ndarray]], float]
"""The loss with these blocks of each group."""


def _losses_in_a_row(
    found: Groups,
    removable: Sequence[Group],
    params: Any,
    apply_fn: Callable,
    batch: Any,
    loss: tuple[Callable, Any],
    rngs: Any,
    keywords: Mapping[str, Any],
) -> LossOf:
    """One program for all, which passes on the input of a block in place of its output where a gate says so."""
    loss_fn, targets = loss
    model = from_apply(Params.of(params), apply_fn, batch, rngs, keywords)
    function = model.function.without_capture()
    closed, shapes = jax.make_jaxpr(lambda params, inputs: function(params, inputs)[0], return_shape=True)(
        model.params, model.inputs
    )
    program = graph.flatten(closed)
    every = _blocks_in_a_row(found, program)
    blocks = [block for group in removable for block in every[group.name]]

    @jax.jit
    def measured(arguments: Sequence[Any], targets: Any, gates: jax.Array) -> jax.Array:
        outputs, _ = graph.evaluate(program, arguments, Hooks(rules=gated(program, blocks, gates)))
        return jnp.mean(loss_fn(jax.tree.unflatten(jax.tree.structure(shapes), outputs), targets))

    arguments = jax.tree.leaves((model.params, model.inputs))

    def loss_of(kept: Mapping[str, np.ndarray]) -> float:
        gates = [np.isin(np.arange(group.size), kept[group.name]) for group in removable]
        return float(measured(arguments, targets, np.concatenate(gates)))

    return loss_of


def _losses_of_scans(
    found: Groups,
    removable: Sequence[Group],
    params: Any,
    apply_fn: Callable,
    batch: Any,
    loss: tuple[Callable, Any],
    rngs: Any,
    keywords: Mapping[str, Any],
) -> LossOf:
    """A program for each number of iterations, of weights that the blocks are taken from."""
    if isinstance(apply_fn, StatefulApply) and any(
        m.path in found.state for g in removable for m in g.members
    ):
        raise ValueError(
            "blocks with a state of their own cannot be removed one by one: pass it among the `params`"
        )
    loss_fn, targets = loss
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    inputs = batch if isinstance(batch, tuple) else (batch,)

    @functools.cache
    def measured(depths: tuple[int, ...]) -> Callable:
        removed = {
            group.name: [*range(group.size - left)] for group, left in zip(removable, depths, strict=True)
        }
        _, small_apply = compact(shapes, apply_fn, batch, Plan.of(found, removed), rngs=rngs, **keywords)

        @jax.jit
        def loss(params: Any, inputs: Any, targets: Any, kept: Mapping[str, Any]) -> jax.Array:
            small = map_named(lambda path, leaf: _of_blocks(removable, kept, path, leaf), params)
            return jnp.mean(loss_fn(small_apply(small, *inputs), targets))

        return loss

    def loss_of(kept: Mapping[str, np.ndarray]) -> float:
        return float(
            measured(tuple(len(kept[group.name]) for group in removable))(params, inputs, targets, kept)
        )

    return loss_of


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
