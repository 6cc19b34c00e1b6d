"""Blocks pruned one after the other, each by the statistics of what the pruned blocks before it emit.

The program is cut into segments. All batches go through one segment before any goes through the next, and between two
segments only the values that are read later are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

from jaxeff import graph
from jaxeff._collect import check_makes_masks, counted
from jaxeff.graph.batch_axes import Axes as MaskAxes
from jaxeff.graph.batch_axes import BatchAxes
from jaxeff.graph.program import Value, scan_operands
from jaxeff.graph.segments import Segments, whole
from jaxeff.model.apply import Model, from_apply
from jaxeff.model.functions import Function, traced
from jaxeff.model.params import Params
from jaxeff.numerics.meshes import laid_like
from jaxeff.output.progress import progress_bar
from jaxeff.prune._block_cuts import Block, Stack, listed, stacks
from jaxeff.prune._layouts import by_path
from jaxeff.prune._masking import check_alike, check_masks
from jaxeff.prune._matrices import rebuilt
from jaxeff.statistics import Statistics, merge
from jaxeff.statistics.counted import mask_axes
from jaxeff.statistics.observe import observe

PruneBlock = Callable[[Any, Statistics], tuple[Any, Any]]


def block_by_block(
    params: Any,
    apply_fn: Callable,
    batches: Iterable[Any],
    prune_block: PruneBlock,
    *,
    blocks: Sequence[str] | None = None,
    hessians: bool = True,
    where: Callable | None = None,
    progress: bool = True,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> tuple[Any, Any]:
    """Prune one block after the other, each by the statistics of what the pruned blocks before it emit.

    This is how SparseGPT and Wanda are published. Statistics of the dense model fit each layer to inputs that it no
    longer gets once the blocks before it are pruned. Here all batches run through a block, it is pruned, and they run
    through it again on their way to the next block. That is two forward passes of the model in all. The statistics of
    one block exist at a time, beside what every batch holds between two blocks.

    Within a block, all layers are pruned by the same statistics. Leaves outside the blocks, such as an embedding or an
    output layer, stay as they are.

    Args:
        params, apply_fn: as in `jaxeff.collect`.
        batches: inputs to calibrate on, all of one shape. They are all held.
        prune_block: `prune_block(params, statistics) -> (params, masks)`, called once for each block, in order.
            It gets a block's own params as a nested dict, with names relative to the block ('attention/query'), one
            layer of each leaf that a scan stacks, and the statistics of `jaxeff.collect` on them. It returns params of
            the same shapes, and masks, True = kept, as `prune.sparsegpt` does.
        blocks: paths of the blocks, such as `["layers_0", "layers_1"]`: all leaves below such a path are one block.
            None for the iterations of each scan over stacked weights.
        hessians: whether the statistics include second moments, which `prune.sparsegpt` and `prune.reconstruct` need.
        where: a function of a batch that returns which of its examples or positions count, as in `jaxeff.collect`.
        progress: show a progress bar if stderr is a terminal.
        rngs, **apply_kwargs: passed to `apply_fn`, the same for each batch.

    Returns:
        Params of the same types; and masks as `prune.masks` gives them, True for each leaf that was not pruned.

    Raises:
        TypeError: an argument, or what `prune_block` returns, has the wrong type.
        ValueError: there are no blocks, they do not run one after the other, a weight is also used outside its block,
            or an argument is invalid.

    References:
        Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023,
        arXiv:2301.00774, section 4
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv:2306.11695, section 3

    >>> from jaxeff import prune
    >>> def model(params, x):
    ...     return jax.lax.scan(lambda x, block: (x + jnp.tanh(x @ block["w"]), None), x, params["blocks"])[0]
    >>> params = {"blocks": {"w": jax.random.normal(jax.random.key(0), (3, 4, 4))}}
    >>> batches = [jax.random.normal(jax.random.key(seed), (8, 4)) for seed in (1, 2)]
    >>> half = lambda params, statistics: prune.sparsegpt(params, statistics, 0.5)
    >>> pruned, masks = block_by_block(params, model, batches, half)
    >>> [float(kept.mean()) for kept in masks["blocks"]["w"]]
    [0.5, 0.5, 0.5]
    """
    if not callable(prune_block):
        raise TypeError(
            "`prune_block` must be a function (params, statistics) -> (params, masks), such as "
            f"functools.partial(prune.sparsegpt, sparsity=0.5), got {prune_block!r}"
        )
    own = Params.of(params)
    batches = _alike(batches)
    check_makes_masks(where)
    model = from_apply(own, apply_fn, batches[0], rngs, apply_kwargs)
    masks = [counted(where, batch) for batch in batches]
    run = _Run(model, [jax.tree.leaves(batch) for batch in batches], masks, prune_block, hessians)
    parts = stacks(run.segments, run.leaves) if blocks is None else listed(run.segments, run.leaves, blocks)
    count = sum(part.length if isinstance(part, Stack) else 1 for part in parts)
    with progress_bar("Pruning blocks", count, progress) as step:
        for part in parts:
            run.advance(part.first)
            if isinstance(part, Stack):
                run.prune_stack(part, step)
            else:
                run.prune_listed(part, step)
    masks = rebuilt(params, run.masks, lambda leaf: jnp.asarray(True))
    return rebuilt(params, run.pruned, lambda leaf: leaf), masks


def _alike(batches: Iterable[Any]) -> list[Any]:
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"`batches` must be an iterable of batches, such as [batch], got {type(batches).__name__}"
        )
    found = list(batches)
    if not found:
        raise ValueError("`batches` is empty: pass at least one batch")
    first, *others = [
        jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), batch) for batch in found
    ]
    for number, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"batch {number} of `batches` has {other}, the first has {first}: pass one shape"
            )
    return found


class _Run:
    """All batches on their way through the model.

    Attributes:
        leaves: the program's inputs that are the params, by path.
        pruned, masks: of the leaves pruned so far, by path.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[list[Any]],
        where: Sequence[Array | None],
        prune_block: PruneBlock,
        hessians: bool,
    ):
        function = model.function.without_capture()
        program = graph.flatten(
            jax.make_jaxpr(lambda params, inputs: function(params, inputs)[0])(model.params, model.inputs)
        )
        origins = ("constant",) * len(model.paths) + model.origins
        self.leaves = dict(zip(model.paths, program.inputs, strict=False))
        self.segments = Segments(program, origins)
        self.pruned: dict[str, Any] = {}
        self.masks: dict[str, Any] = {}
        # What all batches share; and what each batch has made so far that is still read.
        self._arrays = dict(zip(program.inputs, jax.tree.leaves((model.params, model.inputs)), strict=True))
        given = [value for value, origin in zip(program.inputs, origins, strict=True) if origin == "batch"]
        self._states = [dict(zip(given, batch, strict=True)) for batch in batches]
        self._position = 0
        self._where = where
        self._mask_axes: Callable[[Value], MaskAxes] | None = None
        if where[0] is not None:
            shapes, count = [value.shape for value in program.inputs], len(model.paths)
            along = mask_axes(shapes, origins, where[0].shape)
            self._mask_axes = BatchAxes(program, count, along, where[0].shape).axes
        self._batch_size = model.batch_size
        self._prune_block = prune_block
        self._hessians = hessians

    def advance(self, position: int) -> None:
        """Run all batches up to a position."""
        if position == self._position:
            return
        program = self.segments.between(self._position, position)
        run = _compiled(program)
        made = [run(self._read(program.inputs, state)) for state in self._states]
        self._leave(position, program.outputs, made)

    def _read(self, values: Sequence[Any], state: Mapping[Any, Any]) -> list[Any]:
        known = {**self._arrays, **state}
        return [value.val if isinstance(value, Literal) else known[value] for value in values]

    def _leave(self, position: int, values: Sequence[Any], made: Sequence[Sequence[Any]]) -> None:
        """Keep of each batch what is read after a position, of its state and of what a segment made."""
        live = self.segments.live(position)
        known = [
            {**state, **dict(zip(values, new, strict=True))}
            for state, new in zip(self._states, made, strict=True)
        ]
        self._states = [{value: state[value] for value in live} for state in known]
        self._position = position

    def prune_listed(self, block: Block, step: Callable[[], None]) -> None:
        """Prune a block with leaves of its own, and run all batches through it."""
        program = self.segments.between(block.first, block.last)
        tree = _nested({name: self._arrays[self.leaves[path]] for name, path in block.leaves.items()})
        own = [self.leaves[block.leaves[name]] for name in Params.of(tree).paths]
        others = [value for value in program.inputs if value not in own]

        def function(params: Any, inputs: list[Any]) -> list[Any]:
            given = dict(zip((*own, *others), (*jax.tree.leaves(params), *inputs), strict=True))
            return graph.evaluate(program, [given[value] for value in program.inputs], graph.Hooks())[0]

        inputs = [self._read(others, state) for state in self._states]
        pruned, masks, made = self._block(
            function, tree, inputs, [*map(self.segments.origin, others)], self._along(others)
        )
        for name, path in block.leaves.items():
            self.pruned[path], self.masks[path] = pruned[name], masks[name]
            self._arrays[self.leaves[path]] = pruned[name]
        self._leave(block.last, program.outputs, made)
        step()

    def prune_stack(self, stack: Stack, step: Callable[[], None]) -> None:
        """Prune the blocks of a scan one by one, and run all batches through them."""
        scan = whole(self.segments.steps[stack.first])
        (body,) = scan.bodies
        constants, carried = scan_operands(scan)
        before = constants + carried
        others = [operand for i, operand in enumerate(scan.inputs) if i not in stack.operands]
        origins = [
            "batch" if constants <= i < before else self.segments.origin(value)
            for i, value in enumerate(others)
        ]
        along = self._along(others)
        if along is not None:
            along = [*along[:before], *(axes[1:] for axes in along[before:])]
        shared = self._without_batch(others)
        operands = [self._read(others, {**shared, **state}) for state in self._states]
        names = {path: name for name, path in stack.leaves.items()}

        def function(params: Any, inputs: list[Any]) -> list[Any]:
            slices, rest = Params.of(params).named, iter(inputs)
            given = [
                jnp.asarray(slices[names[stack.operands[i]]], value.dtype)
                if i in stack.operands
                else next(rest)
                for i, value in enumerate(body.inputs)
            ]
            return graph.evaluate(body, given, graph.Hooks())[0]

        live = {*self.segments.live(stack.first + 1)}
        emitted = [i for i in range(carried, len(scan.outputs)) if scan.outputs[i] in live]
        pruned, masks, seen = {}, {}, {}
        for index in sorted(range(stack.length), reverse=scan.params["reverse"]):
            tree = _nested(
                {name: self._arrays[self.leaves[path]][index] for name, path in stack.leaves.items()}
            )
            inputs = [[*each[:before], *(array[index] for array in each[before:])] for each in operands]
            pruned[index], masks[index], made = self._block(function, tree, inputs, origins, along)
            for each, found in zip(operands, made, strict=True):
                each[constants:before] = found[:carried]
            seen[index] = [[found[i] for i in emitted] for found in made]
            step()
        blocks = range(stack.length)
        for name, path in stack.leaves.items():
            self.pruned[path] = jnp.stack([pruned[index][name] for index in blocks])
            self.masks[path] = _stacked([masks[index][name] for index in blocks], self.pruned[path].shape)
        values = [*scan.outputs[:carried], *(scan.outputs[i] for i in emitted)]
        made = [
            [
                *each[constants:before],
                *map(jnp.stack, zip(*(seen[index][number] for index in blocks), strict=True)),
            ]
            for number, each in enumerate(operands)
        ]
        self._leave(stack.first + 1, values, made)

    def _along(self, values: Sequence[Value | Literal]) -> list[MaskAxes] | None:
        """Return the axis of the mask of what counts that each dimension of each value is."""
        if self._mask_axes is None:
            return None
        return [
            (None,) * jnp.ndim(value.val) if isinstance(value, Literal) else self._mask_axes(value)
            for value in values
        ]

    def _without_batch(self, values: Sequence[Value | Literal]) -> dict[Value, Any]:
        """Return those of the values that do not depend on the batch."""
        wanted = [v for v in values if isinstance(v, Value) and self.segments.origin(v) != "batch"]
        program = self.segments.without_batch(wanted)
        return dict(zip(wanted, _compiled(program)(self._read(program.inputs, {})), strict=True))

    def _block(
        self,
        function: Callable[[Any, list[Any]], list[Any]],
        tree: Any,
        inputs: Sequence[Any],
        origins: Sequence[str],
        along: list[MaskAxes] | None,
    ) -> tuple[dict[str, Any], dict[str, Any], list[list[Any]]]:
        """Prune one block; return its params and masks by name, and what it then emits of each batch.

        Args:
            along: of each input, the axis of the mask of what counts that each dimension is; None without a mask.
        """
        same, constants = traced(function, tree, inputs[0])
        given = [(each, constants) for each in inputs]
        of_inputs = (*origins, *("constant",) * len(constants))
        paths = Params.of(tree).paths
        others = [(None,) * jnp.ndim(constant) for constant in constants]
        axes = None if along is None else (*along, *others)
        collect = functools.partial(
            observe,
            *(same, paths, of_inputs, self._batch_size, tree),
            hessians=self._hessians,
            axes_of_where=axes,
        )
        statistics = functools.reduce(merge, map(collect, given, self._where))
        pruned, masks = _checked(self._prune_block(tree, statistics), tree)
        return by_path(pruned), by_path(masks), [_emitted(same, pruned, each) for each in given]


def _compiled(program: graph.Program) -> Callable[[list[Any]], list[Any]]:
    return jax.jit(lambda arrays: graph.evaluate(program, arrays, graph.Hooks())[0])


@functools.partial(jax.jit, static_argnums=0)
def _emitted(function: Function, params: Any, inputs: Any) -> Any:
    return function(params, inputs)[0]


def _checked(returned: Any, tree: Any) -> tuple[Any, Any]:
    """Check what `prune_block` returned, and give its params the types that they had."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            "`prune_block` must return a tuple (params, masks), as `prune.sparsegpt` does, got "
            f"{type(returned).__name__}"
        )
    pruned, masks = returned
    check_alike(tree, pruned, "params of prune_block")
    check_masks(tree, masks, "masks of prune_block")
    found = by_path(pruned)
    for path, mask in by_path(masks).items():
        new = found[path]
        if bool(jnp.any(jnp.where(laid_like(jnp.asarray(mask, bool), new), 0, new) != 0)):
            raise ValueError(
                f"`params of prune_block` must be 0 where its masks are False, and {path!r} is not: return "
                "`prune.apply(params, masks), masks`"
            )
    return jax.tree.map(
        lambda old, new: jnp.broadcast_to(new, old.shape).astype(old.dtype), tree, pruned
    ), masks


def _stacked(masks: Sequence[Any], shape: tuple[int, ...]) -> Array:
    """Return the masks of all blocks as one; a single True if nothing was pruned in any."""
    if all(jnp.ndim(mask) == 0 and bool(mask) for mask in masks):
        return jnp.asarray(True)
    return jnp.stack([jnp.broadcast_to(mask, shape[1:]) for mask in masks])


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested dict of leaves by path.

    >>> _nested({"norm": 1, "mlp/up": 2})
    {'norm': 1, 'mlp': {'up': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
