"""A plan carried out on a model that nobody rebuilds: its traced program runs at the sizes that are left.

In: `params`, `apply_fn` and `batch` as `prune.groups` takes them, and a `Plan`. Out: smaller params, and a
function of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.graph.program import flatten
from jaxeff.graph.remaining import Input, Kept
from jaxeff.graph.resizing import Resized
from jaxeff.model.apply import StatefulApply, check_apply, has_array
from jaxeff.model.functions import bound_module, content, named_misfit
from jaxeff.prune._groups import named_variables
from jaxeff.prune._plans import Plan
from jaxeff.prune._shrinking import shrink


@dataclasses.dataclass(frozen=True, eq=False)
class CompactApply(StatefulApply):
    """`small_apply(small_params, *batch)`: what `apply_fn` computes, at the sizes that a plan leaves.

    Attributes:
        apply_fn: of the large model.
        plan: what was removed.
        keywords: passed to `apply_fn`; those of a call are passed besides.
        state: of an NNX model, made smaller.
    """

    apply_fn: Callable
    plan: Plan
    keywords: Mapping[str, Any]
    state: Any

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        keywords = {**self.keywords, **keywords}
        arrays = {name: value for name, value in keywords.items() if has_array(value)}
        statics = {name: value for name, value in keywords.items() if name not in arrays}
        return self._compiled(_Statics.of(statics), params, self.state, batch, arrays)

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
        large = jax.tree.unflatten(structure, list(map(_abstract, given, shapes)))
        function = functools.partial(self._large, statics.keywords)
        closed, outputs = jax.make_jaxpr(function, return_shape=True)(*large)
        routed = self._routed
        inputs = [Input.of_weights(path, blocks, routed.get(path, frozenset())) for path, blocks in leaves]
        inputs += [Input.of_data(shape) for shape in shapes[len(leaves) :]]
        wanted = self._wanted(statics.keywords, outputs)
        resized = Resized(flatten(closed), inputs, wanted)
        return jax.tree.unflatten(jax.tree.structure(outputs), resized(given, self._root()))

    def _large(self, keywords: Mapping[str, Any], params: Any, state: Any, batch: tuple, arrays: Any) -> Any:
        apply_fn = self.apply_fn
        if isinstance(apply_fn, StatefulApply):
            apply_fn = apply_fn.with_state(state)
        return named_misfit(functools.partial(apply_fn, **keywords, **arrays), params, batch)

    def _leaves(self, tree: Any) -> list[tuple[str, list[Kept]]]:
        """The path of every leaf of params or state, and which indices of the large one each block holds."""
        if not jax.tree.leaves(tree):
            return []
        leaves = []
        for path, leaf in named_variables(tree).items():
            if path not in self._kept:
                raise ValueError(
                    f"`params` holds {path!r}, which the model that was made smaller did not have"
                )
            blocks = self._kept[path]
            if jnp.shape(leaf) != (asked := tuple(int(mask.sum()) for mask in blocks[0])):
                raise ValueError(
                    f"{path!r} has shape {jnp.shape(leaf)}, and {asked} is what `prune.compact` left of it: "
                    "pass the smaller params that it returned"
                )
            leaves.append((path, blocks))
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

    def _wanted(self, keywords: Mapping[str, Any], outputs: Any) -> list[Input | None]:
        """What is left of each output: all of it, but a Linen model's updated collections shrink."""
        wanted: list[Input | None] = [Input.of_data(output.shape) for output in jax.tree.leaves(outputs)]
        module, bound = bound_module(self.apply_fn)
        if module is not None and {**bound, **keywords}.get("mutable", False) is not False:
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


def _abstract(leaf: Any, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """An array like this one, of another shape."""
    kind = jax.typeof(leaf)
    weak = getattr(kind, "weak_type", False)
    sharding = kind.sharding if any(names is not None for names in kind.sharding.spec) else None
    return jax.ShapeDtypeStruct(tuple(shape), kind.dtype, weak_type=weak, sharding=sharding)


def compact(
    params: Any,
    apply_fn: Callable,
    batch: Any,
    plan: Plan,
    *,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> tuple[Any, CompactApply]:
    """Carry out a plan without rebuilding the module.

    `small_apply` traces the large model and runs its program at the sizes that the plan leaves. Use it for models
    whose module cannot be built at these sizes, or only with work: those of Keras, Equinox, or a library.

    It computes what `apply_fn` computes with `prune.apply(params, plan.masks(params))`, or, without experts behind a
    router, with their logits at -inf. Numbers that the model takes from its widths (1/n, 1/sqrt(d)) stay those of the
    large model, so a plan may also remove what `prune.groups(..., allow="replay")` opens.

    Args:
        params, apply_fn, rngs, apply_kwargs: as `prune.groups` takes them.
        batch: to check the smaller model with, as `prune.groups` takes it. Batches of other shapes are traced anew,
            as `jax.jit` does.
        plan: from `prune.plan`, for this model.

    Returns:
        The smaller params, as `prune.shrink` makes them, and `small_apply(small_params, *batch, **apply_kwargs)`,
        a jitted function that can be transformed, exported, timed and analyzed like `apply_fn`. It returns what
        `apply_fn` returns; the collections that a Linen module with `mutable` updates are smaller.

    Raises:
        ValueError: the plan is of another model, or the program cannot run without what the plan removes, for
            example because a size is written into the code. The message names the operation and its line.

    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((8, 3))
    >>> plan = prune.Plan.of(prune.groups(params, model, x), {"a:1": [0, 2]})
    >>> small_params, small_apply = compact(params, model, x, plan)
    >>> small_params["a"].shape, small_apply(small_params, x).shape
    ((3, 2), (8, 2))
    """
    check_apply(apply_fn)
    state: Any = {}
    if isinstance(apply_fn, StatefulApply) and jax.tree.leaves(apply_fn.state):
        state = shrink(apply_fn.state, plan)
        apply_fn = apply_fn.with_state(None)  # The large state would be kept alive, and is never used.
    small_params = shrink(params, plan)
    keywords = {**apply_kwargs, **({} if rngs is None else {"rngs": rngs})}
    small_apply = CompactApply(apply_fn, plan, keywords, state)
    batch = batch if isinstance(batch, tuple) else (batch,)
    # What cannot be is said here, and not at the first call.
    _ = jax.eval_shape(small_apply, small_params, *batch)
    return small_params, small_apply
