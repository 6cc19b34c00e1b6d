"""Which axes of which leaves have to shrink together, which blocks may be left out, and what may not.

In: `params`, `apply_fn` and `batch` as `jaxeff.analyze` takes them. Out: `Groups`, which hold importance
once they are `scored`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph.blocks import Blocks, blocks_of, common_name, common_pattern
from jaxeff.graph.coupling import UNREAD, couple
from jaxeff.graph.coupling_labels import DEPTH, KINDS
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import StatefulApply, from_apply
from jaxeff.model.functions import TracedFunction
from jaxeff.model.params import Params, named_leaves
from jaxeff.prune._groups import Group, Groups, Member
from jaxeff.prune._named import in_modules, stand_in


def groups(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    allow: Iterable[str] = (),
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Groups:
    """Find which axes of which leaves have to shrink together.

    The model is traced, and nothing is computed. Removing an element takes out its indices of all members;
    what the smaller model computes is then what the model computes with these indices set to 0, or, for an expert
    behind a router, with the expert's logit at -inf (docs/structured.md has the rules). What is not known to be so is
    locked.

    Args:
        params: as `jaxeff.analyze` takes them: Linen variables, with all collections, or any tree of
            arrays; also of `jax.ShapeDtypeStruct`. Or a model that `jaxeff.functional` takes, followed by the batch.
        apply_fn: `model.apply`, a function `f(params, *batch)`, or what `jaxeff.functional` gives.
        batch: the model's input, or a tuple of several; also of `jax.ShapeDtypeStruct`.
        allow: kinds of locks to leave out: 'statistics', over which data are summed, such as the residual
            stream under LayerNorm: the smaller model then differs from the masked one; 'scale', the size of
            queries and keys: right where the module keeps its scale at that of the larger size; 'depth', blocks
            that zeros in place of their weights would not skip, such as those with a norm behind the addition:
            the smaller model then differs from the masked one; 'replay', all that `prune.compact` can remove and
            a rebuilt module cannot: the size of queries and keys, and sums over what is 0 where it is removed,
            such as the stream under RMSNorm.
        rngs: passed to a Linen model.
        apply_kwargs: passed to `apply_fn`. The model should run as it serves: dropout off, BatchNorm on
            running averages.

    Raises:
        ValueError: the model does not take this batch, or it does not read some of its state, whose size
            would then be unknown.

    >>> def model(params, x):
    ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> found = groups({"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, model, jnp.ones((8, 3)))
    >>> [(group.name, group.size, group.locked) for group in found]
    [('a:0', 3, 'input of the model'), ('a:1', 4, None), ('b:1', 2, 'output of the model')]
    """
    allowed = frozenset([allow] if isinstance(allow, str) else allow)
    if unknown := allowed - KINDS:
        raise ValueError(
            f"`allow` may hold {', '.join(map(repr, sorted(KINDS)))}, got {sorted(unknown)[0]!r}"
        )
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    if isinstance(apply_fn, StatefulApply):
        apply_fn = apply_fn.with_state(jax.tree.map(stand_in, apply_fn.state))
    params, batch = (jax.tree.map(stand_in, tree) for tree in (params, batch))
    params = Params.of(params)
    named = params.named
    model = from_apply(params, apply_fn, batch, rngs, apply_kwargs)
    function = model.function.without_capture()
    if isinstance(function, TracedFunction):
        (state, *_), _ = model.inputs
        closed = function.closed
    else:
        state, *_ = model.inputs
        closed = jax.make_jaxpr(function)(model.params, model.inputs)
    of_state = named_leaves(state) if jax.tree.leaves(state) else {}
    if shared := named.keys() & of_state.keys():
        raise ValueError(f"`params` and another collection both have the path {sorted(shared)[0]!r}")
    program = graph.flatten(closed)
    paths = [*named, *of_state]
    modules = in_modules(paths, named)
    in_a_row = blocks_of(program, modules, DEPTH in allowed)
    coupled, amounts = couple(
        program,
        [i < len(paths) for i in range(len(program.inputs))],
        allowed,
        len(named),
        [block for one in in_a_row for block in one.blocks],
    )
    axis_name = apply_fn.axis_name if isinstance(apply_fn, StatefulApply) else lambda path, axis: None
    found = [_group(one, paths, axis_name) for one in coupled]
    found = _named([*found, *(_group_of_blocks(one, paths, modules) for one in in_a_row)])
    _check_state(found, of_state)
    shapes, state_shapes = (
        {path: jnp.shape(leaf) for path, leaf in tree.items()} for tree in (named, of_state)
    )
    return Groups(found, shapes, state_shapes, amounts)


class Coupled(NamedTuple):
    """A model's groups, each with what its graph knows of it, and the program that they were found in.

    Attributes:
        arguments: of the program.
        pairs: the groups of coupled indices; those of blocks in a row, which come after them, are not among them.
    """

    groups: Groups
    program: graph.Program
    arguments: list[Any]
    pairs: list[tuple[Group, Any]]


def coupled_groups(
    params: Any, apply_fn: Callable, batch: Any, rngs: Any, keywords: Mapping[str, Any]
) -> Coupled:
    """Return the groups of a model together with a program of its outputs, to be run with hooks."""
    model = from_apply(Params.of(params), apply_fn, batch, rngs, keywords)
    function = model.function.without_capture()
    program = graph.flatten(
        jax.make_jaxpr(lambda params, inputs: function(params, inputs)[0])(model.params, model.inputs)
    )
    found = groups(params, apply_fn, batch, rngs=rngs, **keywords)
    leaves = len(found.params) + len(found.state)
    coupled = couple(program, [i < leaves for i in range(len(program.inputs))]).groups
    pairs = [*zip(found, coupled, strict=False)]
    return Coupled(found, program, jax.tree.leaves((model.params, model.inputs)), pairs)


def _group(coupled: Any, paths: list[str], axis_name: Callable[[str, int], str | None]) -> Group:
    block_axes = coupled.block_axes or [()] * len(coupled.members)
    members = tuple(
        Member(paths[leaf], axis, indices, axes, axis_name(paths[leaf], axis))
        for (leaf, axis, indices), axes in zip(coupled.members, block_axes, strict=True)
    )
    locked = "; ".join(coupled.reasons) or None
    return Group(
        members[0].name, coupled.size, members, locked, None, coupled.kind, coupled.blocks, coupled.routed
    )


def _group_of_blocks(found: Blocks, paths: list[str], in_modules: list[str]) -> Group:
    leaves = tuple(tuple(paths[leaf] for leaf in block.leaves) for block in found.blocks)
    names = [common_name([in_modules[leaf] for leaf in block.leaves]) for block in found.blocks]
    if not all(names) or len(set(names)) < len(names):
        names = [paths[0] for paths in leaves]
    return Group(
        common_pattern(names), len(leaves), (), found.reason, kind="block", leaves=leaves, names=tuple(names)
    )


def _named(found: list[Group]) -> tuple[Group, ...]:
    counts: dict[str, int] = {}
    named = []
    for group in found:
        counts[group.name] = number = counts.get(group.name, 0) + 1
        named.append(group if number == 1 else dataclasses.replace(group, name=f"{group.name}#{number}"))
    return tuple(named)


def _check_state(found: Iterable[Group], state: Mapping[str, Any]) -> None:
    """Refuse state that is not read and may have to shrink: running averages, in a trace of training."""
    found = tuple(found)
    # A group of blocks has as many elements as blocks, which is not the size of an array.
    sizes = {group.size for group in found if group.locked is None and group.members}
    for group in found:
        path = group.members[0].path if group.members else ""
        # Counters and keys of random streams have no units.
        numbers = path in state and jnp.issubdtype(state[path].dtype, jnp.floating)
        if group.locked == UNREAD and numbers and group.size in sizes:
            raise ValueError(
                f"the model does not read {path!r}, whose size would stay unknown: run it as "
                "it serves (`train=False`, `use_running_average=True`, `jaxeff.functional(model)` without `training`), "
                "or leave the collection out"
            )
