"""A plan carried out: smaller params, state and optimizer state."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff.model.params import leaves_by_path, own_arrays
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.summation import namespace
from jaxeff.prune._named import GONE, map_named, without_leaves
from jaxeff.prune._plans import Plan

_MISSING = object()


def shrink(params: Any, plan: Plan, opt_state: Any = _MISSING) -> Any:
    """`params` without what the plan removes.

    Args:
        params: what the groups were found for, or new ones of the same shapes: variables with all of their
            collections, the bare params, or, of an NNX model, either of `params` and `apply_fn.state`. Also
            of `jax.ShapeDtypeStruct`.
        plan: of `prune.plan`.
        opt_state: the state of an Optax optimizer of these params. What it holds for a param, under the
            param's path and of its shape, shrinks with it; scalars stay.

    Returns:
        The smaller params; with `opt_state`, a pair of them and the smaller state. What the plan leaves whole
        is copied, so that a step may donate the small model and the large one stays. Blocks that go as a whole are
        missing: their entries in dicts are dropped, and lists of blocks are shorter.

    Raises:
        TypeError: `plan` is not a `Plan`.
        ValueError: the plan is of another model, or the optimizer keeps something of another shape.

    >>> import jax
    >>> from jaxeff import prune
    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> plan = prune.Plan.of(prune.groups(params, model, jnp.ones((8, 3))), {"a:1": [0, 2]})
    >>> jax.tree.map(jnp.shape, shrink(params, plan))
    {'a': (3, 2), 'b': (2, 2)}
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be what `prune.plan` makes, a `prune.Plan`, got {type(plan).__name__}")
    plan.check(params)
    kept, left_out = plan.kept(), plan.leaves_left_out()
    small = without_leaves(
        map_named(lambda path, leaf: GONE if path in left_out else _taken(leaf, kept.get(path, {})), params)
    )
    if opt_state is _MISSING:
        return small
    return small, without_leaves(_shrunk_state(opt_state, plan, kept))


def _taken(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    if not axes:
        return own_arrays(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda array: _taken(array, axes), leaf)
    # What differs from block to block goes first, while all blocks are there.
    order = sorted(axes.items(), key=lambda pair: _blocks(pair[1]), reverse=True)
    if _on_one_device(leaf):
        # Compiling a gather for every shape would take longer than all of the copying.
        array = np.asarray(leaf)
        for axis, indices in order:
            array = _along(indices, axis, array)
        return jax.device_put(array, leaf.sharding if getattr(leaf, "committed", False) else None)
    for axis, indices in order:
        leaf = by_compiler(functools.partial(_along, indices, axis), leaf, like=leaf)
    return leaf


def _on_one_device(leaf: Any) -> bool:
    if isinstance(leaf, Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return isinstance(leaf, np.ndarray) or len(leaf.sharding.device_set) == 1


def _blocks(indices: np.ndarray) -> int:
    """Along how many axes blocks keep indices of their own."""
    return 0 if indices.ndim == 1 else sum(size > 1 for size in indices.shape)


def _along(indices: np.ndarray, axis: int, leaf: Any) -> Any:
    if indices.ndim == 1:
        return leaf.take(indices, axis=axis)
    return namespace(leaf).take_along_axis(leaf, indices, axis=axis)


def _shrunk_state(opt_state: Any, plan: Plan, kept: Mapping[str, Mapping[int, np.ndarray]]) -> Any:
    shapes, left_out = plan.shapes, plan.leaves_left_out()

    def smaller(where: str, leaf: Any) -> Any:
        parts = where.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        path = next((end for end in ends if end in shapes), None)
        shape = jnp.shape(leaf)
        if path in left_out:
            return GONE
        if path is not None and shape == tuple(shapes[path]):
            return _taken(leaf, kept.get(path, {}))
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if not shape or (path not in kept if path is not None else not floating):
            return own_arrays(leaf)
        raise ValueError(
            f"`opt_state` holds an array of shape {shape} at {where!r}, which is not laid "
            "out like the params: start anew with `optimizer.init(small_params)`"
        )

    leaves = [smaller(where, leaf) for where, leaf in leaves_by_path(opt_state)]
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
