"""A plan carried out on a model that nobody rebuilds: its traced program runs at the sizes that are left.

In: `params`, `apply_fn` and `batch` as `prune.groups` takes them, and a `Plan`. Out: smaller params, and a
function of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.graph.blocks import blocks_by_leaves
from jaxeff.graph.program import Program, flatten
from jaxeff.graph.remaining import Input, Kept
from jaxeff.graph.resizing import Resized
from jaxeff.graph.skipping import without
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import StatefulApply, called, check_apply, has_array
from jaxeff.model.functions import bound_module, check_keywords, content, named_misfit
from jaxeff.prune._named import GONE, in_modules, map_named, named_variables, stand_in, without_leaves
from jaxeff.prune._plans import Plan
from jaxeff.prune._shrinking import shrink


@dataclasses.dataclass(frozen=True, eq=False)
class CompactApply(StatefulApply):
    """`small_apply(small_params, *batch)`: what `apply_fn` computes, at the sizes that a plan leaves.

    Attributes:
        apply_fn: of the large model.
        plan: what was removed.
        keywords: passed to `apply_fn`; those of a call are passed besides.
        large: the params and the state of the large model, as shapes and dtypes.
        state: of an NNX model, made smaller.
    """

    apply_fn: Callable
    plan: Plan = dataclasses.field(repr=False)
    keywords: Mapping[str, Any]
    large: tuple[Any, Any] = dataclasses.field(repr=False)
    state: Any = dataclasses.field(repr=False)

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        keywords = {**self.keywords, **keywords}
        arrays = {name: value for name, value in keywords.items() if has_array(value)}
        statics = {name: value for name, value in keywords.items() if name not in arrays}
        return self._compiled(_Statics.of(statics), params, self.state, batch, arrays)

    def model_call(self, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        return called(self.apply_fn, keywords)

    def axis_name(self, path: str, axis: int) -> str | None:
        if not isinstance(self.apply_fn, StatefulApply) or path not in self._renamed:
            return None
        return self.apply_fn.axis_name(self._renamed[path], axis)

    @functools.cached_property
    def _compiled(self) -> Callable:
        # Traced anew for other shapes, and under other settings of JAX, as all that is jitted is.
        return jax.jit(self._replayed, static_argnums=0)

    def _replayed(self, statics: _Statics, params: Any, state: Any, batch: tuple, arrays: Any) -> Any:
        """The large model's program, traced at its own sizes and run at those that are left."""
        leaves = [*self._leaves(params), *self._leaves(state)]
        given, structure = jax.tree.flatten((params, state, batch, arrays))
        shapes = [tuple(map(len, blocks[0])) for _, blocks in leaves] + list(
            map(jnp.shape, given[len(leaves) :])
        )
        for shape in shapes:
            if not all(isinstance(size, int) for size in shape):
                raise ValueError(
                    f"`batch` holds an array of shape {shape}, and a compacted model is traced at whole numbers: "
                    "for a symbolic batch size, map a function of one example, "
                    "`jax.vmap(lambda x: small_apply(small_params, x[None])[0])`"
                )
        large = list(map(_abstract, given, shapes))
        known = {path: leaf for (path, _), leaf in zip(leaves, large, strict=False)}
        arguments = self._with_blocks(jax.tree.unflatten(structure, large), known)
        function = functools.partial(self._large, statics.keywords)
        closed, outputs = jax.make_jaxpr(function, return_shape=True)(*arguments)
        program, outputs = self._without_blocks(flatten(closed), statics.keywords, outputs)
        routed = self._routed
        inputs = [Input.of_weights(path, blocks, routed.get(path, frozenset())) for path, blocks in leaves]
        inputs += [Input.of_data(shape) for shape in shapes[len(leaves) :]]
        wanted = self._wanted(statics.keywords, outputs)
        resized = Resized(program, inputs, wanted)
        return jax.tree.unflatten(jax.tree.structure(outputs), resized(given, self._root()))

    def _large(self, keywords: Mapping[str, Any], params: Any, state: Any, batch: tuple, arrays: Any) -> Any:
        apply_fn = self.apply_fn
        if isinstance(apply_fn, StatefulApply):
            apply_fn = apply_fn.with_state(state)
        return named_misfit(functools.partial(apply_fn, **keywords, **arrays), params, batch)

    def _with_blocks(self, arguments: tuple[Any, ...], known: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments, with the leaves of the blocks that are left out."""
        if not self._left_out:
            return arguments
        before = [
            leaf for tree in self.large for leaf in zip(_paths(tree), jax.tree.leaves(tree), strict=True)
        ]
        # A model that was cast to another type is one in all of its blocks.
        dtypes = {leaf.dtype: known[path].dtype for path, leaf in before if path in known}

        def leaf_of(path: str, leaf: Any) -> Any:
            return known[path] if path in known else leaf.update(dtype=dtypes.get(leaf.dtype, leaf.dtype))

        params, state = (map_named(leaf_of, tree) if jax.tree.leaves(tree) else tree for tree in self.large)
        return (params, state, *arguments[2:])

    def _without_blocks(
        self, program: Program, keywords: Mapping[str, Any], outputs: Any
    ) -> tuple[Program, Any]:
        """The program without the blocks that are left out, and what it returns."""
        if not self._left_out:
            return program, outputs
        if self._updates(keywords) and jax.tree.leaves(outputs[1]):
            results, collections = outputs
            marked = map_named(lambda path, leaf: GONE if path in self._left_out else leaf, collections)
            stays = [leaf is not GONE for leaf in jax.tree.leaves((results, marked))]
            program = dataclasses.replace(program, outputs=tuple(itertools.compress(program.outputs, stays)))
            outputs = results, without_leaves(marked)
        paths = [path for tree in self.large for path in _paths(tree)]
        found = blocks_by_leaves(program, in_modules(paths, self.plan.params))
        numbers = {path: number for number, path in enumerate(paths)}
        blocks = []
        for group in self.plan.groups:
            for element in self.plan.removed[group.name] if group.leaves else ():
                block = found.get(frozenset(numbers[path] for path in group.leaves[element]))
                if block is None:
                    raise ValueError(
                        f"`plan` leaves out {group.names[element]!r}, which is not a residual block of what `apply_fn` "
                        "computes for this batch and these keyword arguments"
                    )
                blocks.append(block)
        return without(program, blocks), outputs

    @functools.cached_property
    def _left_out(self) -> frozenset[str]:
        return self.plan.leaves_left_out()

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """The path in the large model of each leaf of the small one: where lists are shorter, others follow."""
        if not self._left_out:
            return {path: path for path in self.plan.shapes}
        pairs = {}
        for tree in filter(jax.tree.leaves, self.large):
            left = [path for path in _paths(tree) if path not in self._left_out]
            small = map_named(lambda path, leaf: GONE if path in self._left_out else leaf, tree)
            pairs |= dict(zip(_paths(without_leaves(small)), left, strict=True))
        return pairs

    def _leaves(self, tree: Any) -> list[tuple[str, list[Kept]]]:
        """The path of every leaf of params or state, and which indices of the large one each block holds."""
        if not jax.tree.leaves(tree):
            return []
        leaves = []
        for path, leaf in named_variables(tree).items():
            if path not in self._renamed:
                raise ValueError(
                    f"`params` holds {path!r}, which the model that was made smaller did not have"
                )
            blocks = self._kept[self._renamed[path]]
            if jnp.shape(leaf) != (asked := tuple(int(mask.sum()) for mask in blocks[0])):
                raise ValueError(
                    f"{path!r} has shape {jnp.shape(leaf)}, and {asked} is what `prune.compact` left of it: "
                    "pass the smaller params that it returned"
                )
            leaves.append((self._renamed[path], blocks))
        return leaves

    @functools.cached_property
    def _kept(self) -> dict[str, list[Kept]]:
        """By path, which indices stay in each block; one entry where they are the same in all."""
        plans = [plan.kept() for plan in self.plan.of_each_block()]
        return {
            path: [
                tuple(
                    np.isin(np.arange(size), kept.get(path, {}).get(axis, np.arange(size)))
                    for axis, size in enumerate(shape)
                )
                for kept in plans
            ]
            for path, shape in self.plan.shapes.items()
        }

    @property
    def _routed(self) -> dict[str, frozenset[int]]:
        """By path, the axes along which experts go that a router chooses among."""
        axes: dict[str, set[int]] = {}
        for group in self.plan.groups:
            for member in group.members if group.routed else ():
                axes.setdefault(member.path, set()).add(member.axis)
        return {path: frozenset(found) for path, found in axes.items()}

    def _root(self) -> str:
        """How a Linen module names itself in the names around its operations."""
        module, _ = bound_module(self.apply_fn)
        return "" if module is None else module.name or type(module).__name__

    def _updates(self, keywords: Mapping[str, Any]) -> bool:
        """Whether a Linen module returns updated collections beside its results."""
        module, bound = bound_module(self.apply_fn)
        return module is not None and {**bound, **keywords}.get("mutable", False) is not False

    def _wanted(self, keywords: Mapping[str, Any], outputs: Any) -> list[Input | None]:
        """What is left of each output: all of it, but a Linen model's updated collections shrink."""
        wanted: list[Input | None] = [Input.of_data(output.shape) for output in jax.tree.leaves(outputs)]
        if self._updates(keywords):
            results, _ = outputs
            start = len(jax.tree.leaves(results))
            wanted[start:] = [None] * (len(wanted) - start)
        return wanted


@dataclasses.dataclass(frozen=True)
class _Statics:
    """Keyword arguments that are no arrays, which jit compares by their content."""

    keywords: Mapping[str, Any] = dataclasses.field(compare=False)
    identity: Any

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> _Statics:
        return cls(keywords, content(tuple(sorted(keywords.items()))))


def _paths(tree: Any) -> list[str]:
    return [*named_variables(jax.tree.map(stand_in, tree))] if jax.tree.leaves(tree) else []


def _abstract(leaf: Any, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """An array like this one, of another shape."""
    kind = jax.typeof(leaf)
    weak = getattr(kind, "weak_type", False)
    sharding = kind.sharding if any(names is not None for names in kind.sharding.spec) else None
    return jax.ShapeDtypeStruct(tuple(shape), kind.dtype, weak_type=weak, sharding=sharding)


def compact(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    plan: Plan | None = None,
    *,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> tuple[Any, CompactApply]:
    """Carry out a plan without rebuilding the module.

    `small_apply` traces the large model and runs its program at the sizes that the plan leaves. Use it for models
    whose module cannot be built at these sizes, or only with work: those of Keras, Equinox, or a library.

    It computes what `apply_fn` computes with `prune.apply(params, plan.masks(params))`, or, without experts behind a
    router, with their logits at -inf. Of a block that the plan leaves out, the output is its input. Numbers that the
    model takes from its widths (1/n, 1/sqrt(d)) stay those of the large model, so a plan may also remove what
    `prune.groups(..., allow="replay")` opens.

    Args:
        params, apply_fn, rngs, apply_kwargs: as `prune.groups` takes them. Or a model, followed by the batch and the
            plan: `compact(model, batch, plan)`.
        batch: to check the smaller model with, as `prune.groups` takes it. Batches of other shapes are traced anew,
            as `jax.jit` does.
        plan: from `prune.plan`, for this model.

    Returns:
        The smaller params, as `prune.shrink` makes them, and `small_apply(small_params, *batch, **apply_kwargs)`,
        a jitted function that can be transformed, exported, timed and analyzed like `apply_fn`. It returns what
        `apply_fn` returns; the collections that a Linen module with `mutable` updates are smaller.

    Raises:
        TypeError: an argument has the wrong type or is missing.
        ValueError: the plan is of another model, or the program cannot run without what the plan removes, for
            example because a size is written into the code. The message names the operation and its line. Or
            something is returned that was made inside a block that the plan leaves out.

    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((8, 3))
    >>> plan = prune.Plan.of(prune.groups(params, model, x), {"a:1": [0, 2]})
    >>> small_params, small_apply = compact(params, model, x, plan)
    >>> small_params["a"].shape, small_apply(small_params, x).shape
    ((3, 2), (8, 2))
    """
    if plan is None and isinstance(batch, Plan):
        batch, plan = None, batch
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`plan` must be what `prune.plan` makes, a `prune.Plan`, got {type(plan).__name__}: pass (params, "
            "apply_fn, batch, plan) or (model, batch, plan)"
        )
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    check_apply(apply_fn)
    check_keywords(called(apply_fn, apply_kwargs))
    large_state: Any = apply_fn.state if isinstance(apply_fn, StatefulApply) else {}
    state = large_state  # Without arrays in it, it is passed on as it is: an Equinox model without state has None.
    if isinstance(apply_fn, StatefulApply) and jax.tree.leaves(large_state):
        state = shrink(large_state, plan)
        apply_fn = apply_fn.with_state(None)  # The large state would be kept alive, and is never used.
    small_params = shrink(params, plan)
    large = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), (params, large_state)
    )
    keywords = {**apply_kwargs, **({} if rngs is None else {"rngs": rngs})}
    small_apply = CompactApply(apply_fn, plan, keywords, large, state)
    batch = batch if isinstance(batch, tuple) else (batch,)
    # What cannot be is said here, and not at the first call.
    _ = jax.eval_shape(small_apply, small_params, *batch)
    return small_params, small_apply
