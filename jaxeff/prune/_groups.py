"""Which axes of which leaves have to shrink together, and which may.

In: `params`, `apply_fn` and `batch` as `jaxeff.analyze` takes them. Out: `Groups`, which hold importance
once they are `scored`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import graph
from jaxeff.graph.coupling import UNREAD, couple
from jaxeff.graph.coupling_labels import KINDS
from jaxeff.graph.coupling_work import Amount
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import StatefulApply, from_apply
from jaxeff.model.functions import TracedFunction
from jaxeff.model.params import Params, is_variables, named_leaves
from jaxeff.numerics.precision import widened
from jaxeff.output.shown import Shown
from jaxeff.output.text import aligned

Shapes = Mapping[str, tuple[int, ...]]
WHOLE = ("head_size", "block")
"""Kinds of which a plan removes nothing unless it is asked to."""

_PLURALS = {
    "unit": "units", "channel": "channels", "head": "heads", "kv_head": "key-value heads",
    "query": "query heads for each key-value head", "head_size": "numbers in each head", "expert": "experts",
    "block": "blocks", "stream": "channels of the residual stream",
}  # fmt: skip
REDUCTIONS: Mapping[str, Callable[..., Any]] = {"sum": jnp.sum, "mean": jnp.sum, "max": jnp.max}
NORMALIZATIONS: Mapping[str, Callable[[np.ndarray], float]] = {
    "none": lambda importance: 1.0,
    "mean": lambda importance: float(np.mean(importance)),
    "max": lambda importance: float(np.max(importance)),
    "sum": lambda importance: float(np.sum(importance)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An axis of a leaf in a group.

    Attributes:
        path: of the leaf.
        axis: of the leaf.
        indices: [size of the group, m]: the m indices along the axis that each element holds.
        block_axes: axes of the leaf that the group's blocks lie along.
    """

    path: str
    axis: int
    indices: np.ndarray
    block_axes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.path}:{self.axis}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Elements (channels, hidden units, heads) of which each is removed with all of its members.

    Attributes:
        name: of its first member, 'path:axis'; where several groups share that, a number follows.
        size: number of elements.
        members: in the order in which the model uses their leaves.
        locked: why none may be removed; None where they may.
        importance: [*blocks, size], of each element; None where no member has a score.
        blocks: where weights are stacked (scanned blocks, experts), how many blocks there are along each
            stacked axis. Each block loses elements of its own, equally many.
        kind: what its elements are. 'unit' or 'channel'; 'head', or 'kv_head' and 'query' where several query heads
            share a key and value; 'head_size', each element a part of every head; 'expert'; 'block', an iteration
            of a scan over stacked weights; 'stream', what residual branches add to.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    locked: str | None
    importance: np.ndarray | None = None
    kind: str = "unit"
    blocks: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Group({self.name!r}, kind={self.kind!r}, size={self.size}, locked={self.locked!r})"

    def __str__(self) -> str:
        """What it is, such as 'layers/attention: 9 heads in each of 30 blocks'."""
        parts = [member.path.split("/")[:-1] for member in self.members]
        place = "/".join(os.path.commonprefix(parts) or parts[0]) or self.members[0].path
        stacked = f" in each of {' x '.join(map(str, self.blocks))} blocks" if self.blocks else ""
        return f"{place}: {self.size} {_PLURALS[self.kind]}{stacked}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Groups(Shown):
    """All axes of all leaves of a model, in groups.

    Attributes:
        groups: in the order in which the model uses them.
        params: shapes of the leaves of `params`, by path.
        state: shapes of all other variables, by path: 'batch_stats/norm/mean'.
        amounts: what `costs` evaluates.
    """

    groups: tuple[Group, ...]
    params: Shapes
    state: Shapes
    amounts: Mapping[str, Amount] = dataclasses.field(default_factory=dict)

    @property
    def unlocked(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.locked is None)

    @property
    def shapes(self) -> Shapes:
        return {**self.params, **self.state}

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __getitem__(self, name: str) -> Group:
        """The group of this name, or the one that holds this axis of a leaf, 'path:axis'."""
        for group in self.groups:
            if group.name == name:
                return group
        holding = [group for group in self.groups if any(member.name == name for member in group.members)]
        if len(holding) != 1:
            raise KeyError(f"{len(holding)} groups hold {name!r}: print the groups to see their names")
        return holding[0]

    def weights(self, group: Group) -> int:
        """How many numbers an element of a group holds in all blocks, those of two axes counted for both."""
        return sum(
            member.indices.shape[1]
            * math.prod(self.shapes[member.path])
            // self.shapes[member.path][member.axis]
            for member in group.members
        )

    def costs(self, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """What the model costs with so many elements of each group, by `prune.compact`; nothing is traced.

        Args:
            sizes: elements that are left by group's name, as `Plan.sizes` gives them; the others stay whole.

        Returns:
            'params' and their 'bytes', without state; 'macs' of the whole batch, as `cost.count` has them (of a `cond`
            those of the branch that has most before anything is removed, and none inside `shard_map`); and, where
            there is attention, 'kv_cache': the numbers that a cache of keys and values holds for each position,
            in all blocks.

        Raises:
            ValueError: no such group, or more or fewer elements than it can have.

        >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> found = groups({"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, model, jnp.ones((8, 3)))
        >>> found.costs(), found.costs({"a:1": 1})
        ({'macs': 160, 'params': 20, 'bytes': 80}, {'macs': 40, 'params': 5, 'bytes': 20})
        """
        given, unlocked = sizes or {}, {group.name: group for group in self.unlocked}
        for name, size in given.items():
            if name not in unlocked:
                raise ValueError(
                    f"`sizes` names {name!r}, which is no group that may shrink: {', '.join(unlocked)}"
                )
            if not 1 <= size <= unlocked[name].size or size != int(size):
                raise ValueError(f"`sizes` must be from 1 to {unlocked[name].size} for {name!r}, got {size}")
        left = np.array([given.get(group.name, group.size) for group in self.groups])
        return {name: round(float(amount(left))) for name, amount in self.amounts.items()}

    def scored(self, importance: Any, *, reduce: str = "sum", normalize: str = "none") -> Groups:
        """The groups with the importance of their elements, of the scores of the weights that they hold.

        Args:
            importance: a tree of non-negative scores shaped like `params`, as `prune.scored` gives, or a
                mapping of them by path. A leaf without scores, or with a single number, takes no part. An
                entry under the name of a group is the importance of its elements, [*blocks, size], as
                `prune.block_influence` gives it.
            reduce: 'sum', 'mean' or 'max' of the scores of all members of an element. A score that lies in
                two members (the diagonal of a recurrent kernel) counts in both.
            normalize: divide by the group's 'mean', 'max' or 'sum', so that groups compare; 'none' does not.
                A group whose scores are all 0 stays 0.

        Raises:
            ValueError: scores of another model, or nan or negative ones; an unknown `reduce` or `normalize`.
        """
        _known("reduce", reduce, REDUCTIONS)
        _known("normalize", normalize, NORMALIZATIONS)
        names = {group.name for group in self.groups}
        own = (
            {name: importance[name] for name in names & set(importance)}
            if isinstance(importance, Mapping)
            else {}
        )
        rest = {name: each for name, each in importance.items() if name not in own} if own else importance
        scores = _scores(rest, self.shapes) if rest or not own else {}
        scored = []
        for group in self.groups:
            raw = (
                _of_elements(group, own[group.name]) if group.name in own else _reduced(group, scores, reduce)
            )
            scale = 0.0 if raw is None else NORMALIZATIONS[normalize](raw)
            scored.append(
                dataclasses.replace(group, importance=raw / scale if raw is not None and scale else raw)
            )
        return dataclasses.replace(self, groups=tuple(scored))

    def __str__(self) -> str:
        free = [
            (group.name, group.kind, _size(group), str(self.weights(group)), *_summary(group))
            for group in self.unlocked
        ]
        locked = [(group.name, str(group.size), group.locked or "") for group in self.groups if group.locked]
        within = [group.name for group in self.unlocked if group.kind in WHOLE]
        whole = [f"Whole in a plan unless named or their kind is: {', '.join(within)}", ""] if within else []
        return "\n".join(
            [
                *aligned([_FREE, *free], left=_FREE, gap=2),
                "",
                *whole,
                *aligned([_LOCKED, *locked], left=_LOCKED, gap=2),
            ]
        )


_FREE = ("group", "kind", "size", "weights of each", "importance", "members")
_LOCKED = ("locked", "size", "why")


def _size(group: Group) -> str:
    return " x ".join(map(str, (*group.blocks, group.size)))


def _summary(group: Group) -> tuple[str, str]:
    importance = group.importance
    ranged = "-" if importance is None else f"{importance.min():.3g} to {importance.max():.3g}"
    return ranged, " ".join(member.name for member in group.members)


def groups(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    allow: Iterable[str] = (),
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Groups:
    """Which axes of which leaves have to shrink together.

    The model is traced, and nothing is computed. Removing an element takes out its indices of all members;
    what the smaller model computes is then what the model computes with these indices set to 0
    (docs/structured.md has the rules). What is not known to be so is locked.

    Args:
        params: as `jaxeff.analyze` takes them: Linen variables, with all collections, or any tree of
            arrays; also of `jax.ShapeDtypeStruct`. Or a model that `jaxeff.functional` takes, followed by the batch.
        apply_fn: `model.apply`, a function `f(params, *batch)`, or what `jaxeff.functional` gives.
        batch: the model's input, or a tuple of several; also of `jax.ShapeDtypeStruct`.
        allow: kinds of locks to leave out: 'statistics', over which data are summed, such as the residual
            stream under LayerNorm: the smaller model then differs from the masked one; 'scale', the size of
            queries and keys: right where the module keeps its scale at that of the larger size; 'replay', all
            that `prune.compact` can remove and a rebuilt module cannot: the size of queries and keys, and
            sums over what is 0 where it is removed, such as the stream under RMSNorm.
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
    count = len(named) + len(of_state)
    coupled, amounts = couple(program, [i < count for i in range(len(program.inputs))], allowed, len(named))
    paths = [*named, *of_state]
    found = _named([_group(one, paths) for one in coupled])
    _check_state(found, of_state)
    shapes, state_shapes = (
        {path: jnp.shape(leaf) for path, leaf in tree.items()} for tree in (named, of_state)
    )
    return Groups(found, shapes, state_shapes, amounts)


def stand_in(leaf: Any) -> Any:
    """An array of the shape and dtype asked for that takes no memory."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _group(coupled: Any, paths: list[str]) -> Group:
    block_axes = coupled.block_axes or [()] * len(coupled.members)
    members = tuple(
        Member(paths[leaf], axis, indices, axes)
        for (leaf, axis, indices), axes in zip(coupled.members, block_axes, strict=True)
    )
    locked = "; ".join(coupled.reasons) or None
    return Group(members[0].name, coupled.size, members, locked, None, coupled.kind, coupled.blocks)


def _named(found: list[Group]) -> tuple[Group, ...]:
    counts: dict[str, int] = {}
    named = []
    for group in found:
        counts[group.name] = number = counts.get(group.name, 0) + 1
        named.append(group if number == 1 else dataclasses.replace(group, name=f"{group.name}#{number}"))
    return tuple(named)


def _check_state(found: Iterable[Group], state: Mapping[str, Any]) -> None:
    for group in found:
        path = group.members[0].path
        if group.locked == UNREAD and path in state:
            raise ValueError(
                f"the model does not read {path!r}, whose size would stay unknown: run it as "
                "it serves (`train=False`, `use_running_average=True`, `jaxeff.functional(model)` without `training`), "
                "or leave the collection out"
            )


def named_variables(tree: Any) -> dict[str, Any]:
    """The leaves of params, of variables or of a state by the paths that `Groups` gives them, in order."""
    named = named_leaves(tree)
    if not is_variables(tree):
        return named
    bare = {path.removeprefix("params/"): leaf for path, leaf in named.items()}
    if len(bare) < len(named):
        raise ValueError("`params` and another collection have a path in common")
    return bare


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` on every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    paths = named_variables(jax.tree.map(stand_in, tree))
    return jax.tree.unflatten(structure, [function(*pair) for pair in zip(paths, leaves, strict=True)])


def _scores(importance: Any, shapes: Shapes) -> dict[str, jax.Array]:
    named = {path: score for path, score in named_variables(importance).items() if jnp.ndim(score)}
    for path, score in named.items():
        if path not in shapes:
            raise ValueError(f"`importance` is of another model: {path!r} is no leaf of this one")
        if jnp.shape(score) != shapes[path]:
            raise ValueError(
                f"`importance` of {path!r} has shape {jnp.shape(score)}, and the leaf has {shapes[path]}"
            )
        if not bool(jnp.all(score >= 0)):
            raise ValueError(
                f"`importance` of {path!r} holds nan or negative scores: pass non-negative numbers"
            )
    return named


def _of_elements(group: Group, given: Any) -> np.ndarray:
    found, shape = np.asarray(given, np.float64), (*group.blocks, group.size)
    if found.shape != shape:
        raise ValueError(f"`importance` of {group.name!r} has shape {found.shape}, and its elements {shape}")
    if not (found >= 0).all():
        raise ValueError(
            f"`importance` of {group.name!r} holds nan or negative scores: pass non-negative numbers"
        )
    return found


def _reduced(group: Group, scores: Mapping[str, jax.Array], reduce: str) -> np.ndarray | None:
    """[*blocks, size], one number an element, over all members with scores."""
    reduction, parts, count = REDUCTIONS[reduce], [], 0
    for member in group.members:
        if member.path not in scores:
            continue
        score = widened(jnp.asarray(scores[member.path]))
        kept = (*member.block_axes, member.axis)
        others = tuple(axis for axis in range(score.ndim) if axis not in kept)
        along = np.transpose(np.asarray(reduction(score, others)), np.argsort(np.argsort(kept)))
        along = np.asarray(along, np.float64)[..., member.indices]
        parts.append(along.max(axis=-1) if reduce == "max" else along.sum(axis=-1))
        count += member.indices.shape[1] * score.size // math.prod(score.shape[axis] for axis in kept)
    if not parts:
        return None
    joined = np.max(parts, axis=0) if reduce == "max" else np.sum(parts, axis=0)
    return joined / count if reduce == "mean" else joined


def _known(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}")
