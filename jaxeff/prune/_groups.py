"""Groups of what has to go together: `Group`, `Groups`, and the importance of their elements."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.graph.coupling_work import Amount
from jaxeff.numerics.precision import widened
from jaxeff.output.shown import Shown
from jaxeff.output.stacks import folded_cells, rows_of
from jaxeff.output.text import WIDTH, aligned, some, wrapped
from jaxeff.prune._named import named_variables

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
        axis_name: of the axis, in a model of named axes (Haliax, Penzai).
    """

    path: str
    axis: int
    indices: np.ndarray
    block_axes: tuple[int, ...] = ()
    axis_name: str | None = None

    @property
    def name(self) -> str:
        """The leaf and the axis, by its name if it has one, else by its number: 'mlp/up/weight:1'."""
        return f"{self.path}:{self.axis if self.axis_name is None else self.axis_name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Elements (channels, hidden units, heads, blocks) of which each is removed with all that it holds.

    Attributes:
        name: of its first member, 'path:axis', by the axis's name if it has one; where several groups share that, a
            number follows.
        size: number of elements.
        members: in the order in which the model uses their leaves.
        locked: why none may be removed; None where they may.
        importance: [*blocks, size], of each element; None where nothing that it holds has a score.
        blocks: where weights are stacked (scanned blocks, experts), how many blocks there are along each
            stacked axis. Each block loses elements of its own, equally many.
        kind: what its elements are. 'unit' or 'channel'; 'head', or 'kv_head' and 'query' where several query heads
            share a key and value; 'head_size', each element a part of every head; 'expert'; 'block', an iteration
            of a scan over stacked weights, or one of several residual blocks in a row; 'stream', what residual
            branches add to.
        routed: of experts that a router chooses among, how many have to stay, such as the k of its top_k; else 0.
            Without such an expert the model computes what it does if the router never chooses it.
        leaves: of blocks that are not stacked: the paths of the leaves of each, which go as a whole. Such a group has
            no members.
        names: of such blocks, of the modules that hold these leaves: 'block0'.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    locked: str | None
    importance: np.ndarray | None = None
    kind: str = "unit"
    blocks: tuple[int, ...] = ()
    routed: int = 0
    leaves: tuple[tuple[str, ...], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def left_whole(self) -> bool:
        """Whether a plan removes nothing of it unless it is asked to."""
        return self.kind in WHOLE or self.routed > 0

    @property
    def place(self) -> str:
        """The module that holds all of its members, such as 'block0/attention'; '' if there is none."""
        return "/".join(os.path.commonprefix([member.path.split("/")[:-1] for member in self.members]))

    @property
    def variables(self) -> int:
        """How many variables of `Groups.amounts` are this group's: its size, or for each of its blocks 1 or 0."""
        return len(self.leaves) or 1

    def __repr__(self) -> str:
        return f"Group({self.name!r}, kind={self.kind!r}, size={self.size}, locked={self.locked!r})"

    def __str__(self) -> str:
        """What it is, such as 'layers/attention: 9 heads in each of 30 blocks'."""
        if self.leaves:
            return f"{self.name}: {self.size} {_PLURALS[self.kind]}"
        place = self.place or "/".join(self.members[0].path.split("/")[:-1]) or self.members[0].path
        stacked = f" in each of {' x '.join(map(str, self.blocks))} blocks" if self.blocks else ""
        return f"{place}: {self.size} {_PLURALS[self.kind]}{stacked}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Groups(Shown):
    """All axes of all leaves of a model in groups, and then the residual blocks that are not stacked.

    Attributes:
        groups: in the order in which the model uses them.
        params: shapes of the leaves of `params`, by path.
        state: shapes of all other variables, by path: 'batch_stats/norm/mean'.
        amounts: what `costs` evaluates: functions of `Group.variables` variables for each group.
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
        """Return the group of this name, or the one that holds this axis of a leaf, 'path:axis', by name or number."""
        for group in self.groups:
            if group.name == name:
                return group
        holding = [
            group
            for group in self.groups
            if any(name in (member.name, f"{member.path}:{member.axis}") for member in group.members)
        ]
        if len(holding) != 1:
            raise KeyError(f"{len(holding)} groups hold {name!r}: print the groups to see their names")
        return holding[0]

    def weights(self, group: Group) -> int:
        """Return how many numbers an element of a group holds in all blocks, those of two axes counted for both."""
        if group.leaves:
            return sum(math.prod(self.shapes[path]) for path in group.leaves[0])
        return sum(
            member.indices.shape[1]
            * math.prod(self.shapes[member.path])
            // self.shapes[member.path][member.axis]
            for member in group.members
        )

    def costs(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        removed: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, int]:
        """Return what the model made by `prune.compact` costs, given the size of each group; nothing is traced.

        Args:
            sizes: elements that are left by group's name, as `Plan.sizes` gives them; the others stay whole.
            removed: of groups of blocks in a row, which of them are left out, as `Plan.removed` has it. Without it,
                and where the blocks left differ in their own sizes, the costs are those of blocks of the mean.

        Returns:
            'params' and their 'bytes', without state; 'macs' of the whole batch, as `cost.count` has them (of a `cond`
            those of the branch that has most before anything is removed, and none inside `shard_map`); and, where
            there is attention, 'kv_cache': the numbers that a cache of keys and values holds for each position,
            in all blocks.

        Raises:
            ValueError: no such group, or more or fewer elements than it can have.

        >>> from jaxeff import prune
        >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> found = prune.groups({"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, model, jnp.ones((8, 3)))
        >>> found.costs(), found.costs({"a:1": 1})
        ({'macs': 160, 'params': 20, 'bytes': 80}, {'macs': 40, 'params': 5, 'bytes': 20})
        """
        given, unlocked = sizes or {}, {group.name: group for group in self.unlocked}
        for name, size in given.items():
            if name not in unlocked:
                raise ValueError(
                    f"`sizes` names {name!r}, which is not a group that may shrink: {', '.join(unlocked)}"
                )
            if not 1 <= size <= unlocked[name].size or size != int(size):
                raise ValueError(f"`sizes` must be from 1 to {unlocked[name].size} for {name!r}, got {size}")
        out = removed or {}
        left = np.concatenate(
            [
                np.isin(np.arange(group.size), out[group.name], invert=True)
                if group.leaves and group.name in out
                else np.full(group.variables, given.get(group.name, group.size) / group.variables)
                for group in self.groups
            ]
        )
        return {name: round(float(amount(left))) for name, amount in self.amounts.items()}

    def scored(self, importance: Any, *, reduce: str = "sum", normalize: str = "none") -> Groups:
        """Return the groups with the importance of their elements, from the scores of the weights that they hold.

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
            TypeError: `importance` is a result that holds importance.
            ValueError: scores of another model, or nan or negative ones; an unknown `reduce` or `normalize`.
        """
        if isinstance(getattr(importance, "importance", None), Mapping):
            raise TypeError(f"`importance` came as {type(importance).__name__}: pass its `.importance`")
        _known("reduce", reduce, REDUCTIONS)
        _known("normalize", normalize, NORMALIZATIONS)
        names = {group.name for group in self.groups}
        own = (
            {
                name: importance[name]
                for name in names & set(importance)
                if _is_of_elements(importance[name], self.shapes.get(name))
            }
            if isinstance(importance, Mapping)
            else {}
        )
        rest = {name: each for name, each in importance.items() if name not in own} if own else importance
        scores = _scores(rest, self.shapes) if rest or not own else {}
        scored = []
        for group in self.groups:
            raw = (
                _of_elements(group, own[group.name]) if group.name in own else reduced(group, scores, reduce)
            )
            scale = 0.0 if raw is None else NORMALIZATIONS[normalize](raw)
            scored.append(
                dataclasses.replace(group, importance=raw / scale if raw is not None and scale else raw)
            )
        return dataclasses.replace(self, groups=tuple(scored))

    def __str__(self) -> str:
        unlocked = self.unlocked
        alike = [
            (group.name, (group.kind, group.blocks, group.size, len(group.members))) for group in unlocked
        ]
        free = []
        for stack in rows_of(alike):
            groups = [unlocked[index] for index in stack.members]
            label = stack.part(range(len(groups)))
            free.append(
                (label, groups[0].kind, _size(groups[0]), str(self.weights(groups[0])), *_summary(groups))
            )
        locked = [(group.name, str(group.size), group.locked or "") for group in self.groups if group.locked]
        within = [group.name for group in self.unlocked if group.left_whole]
        said = f"Whole in a plan unless named or their kind is: {', '.join(within)}"
        whole = [*wrapped(said, WIDTH), ""] if within else []
        return "\n".join(
            [
                *aligned([_FREE, *free], left=_FREE, gap=2),
                "",
                *whole,
                *aligned([_LOCKED, *folded_cells(locked)], left=_LOCKED, gap=2),
            ]
        )


_FREE = ("group", "kind", "size", "weights of each", "importance", "members")
_LOCKED = ("locked", "size", "why")
_MEMBERS = 48


def _size(group: Group) -> str:
    return " x ".join(map(str, (*group.blocks, group.size)))


def _summary(groups: Sequence[Group]) -> tuple[str, str]:
    """Return the range of importance of groups that share a row, and what the first of them holds."""
    found = [group.importance for group in groups if group.importance is not None]
    low, high = min((each.min() for each in found), default=0), max((each.max() for each in found), default=0)
    names = groups[0].names or [
        member.name.removeprefix(f"{groups[0].place}/") for member in groups[0].members
    ]
    # As many as leave a table of short names within the width of a page.
    most = next((most for most in (3, 2) if len(some(names, most)) <= _MEMBERS), 1)
    return f"{low:.3g} to {high:.3g}" if found else "-", some(names, most)


def _scores(importance: Any, shapes: Shapes) -> dict[str, jax.Array]:
    named = {path: score for path, score in named_variables(importance).items() if jnp.ndim(score)}
    for path, score in named.items():
        if path not in shapes:
            raise ValueError(f"`importance` is of another model: {path!r} is not a leaf of this one")
        if jnp.shape(score) != shapes[path]:
            raise ValueError(
                f"`importance` of {path!r} has shape {jnp.shape(score)}, and the leaf has {shapes[path]}"
            )
        if not bool(jnp.all(score >= 0)):
            raise ValueError(
                f"`importance` of {path!r} holds nan or negative scores: pass non-negative numbers"
            )
    return named


def _is_of_elements(given: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether an entry under a group's name is of its elements, and not the scores of params of that name.

    Args:
        shape: of the leaf of that name; None if there is none.
    """
    if isinstance(given, Mapping):
        return False
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(given)]
    return not any(shapes) or (len(shapes) == 1 and shapes[0] != shape)


def _of_elements(group: Group, given: Any) -> np.ndarray:
    found, shape = np.asarray(given, np.float64), (*group.blocks, group.size)
    if found.shape != shape:
        raise ValueError(f"`importance` of {group.name!r} has shape {found.shape}, and its elements {shape}")
    if not (found >= 0).all():
        raise ValueError(
            f"`importance` of {group.name!r} holds nan or negative scores: pass non-negative numbers"
        )
    return found


def reduced(group: Group, scores: Mapping[str, Any], reduce: str) -> np.ndarray | None:
    """[*blocks, size], one number an element, over all members with scores."""
    if group.leaves:
        return _of_blocks(group, scores, reduce)
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


def _of_blocks(group: Group, scores: Mapping[str, jax.Array], reduce: str) -> np.ndarray | None:
    """[size]: all scores of the leaves of each block as one number."""
    scored = [
        [widened(jnp.asarray(scores[path])) for path in paths if path in scores] for paths in group.leaves
    ]
    if not all(scored):
        return None
    joined = np.array([[float(REDUCTIONS[reduce](score)) for score in each] for each in scored])
    found = joined.max(axis=1) if reduce == "max" else joined.sum(axis=1)
    return found / sum(score.size for score in scored[0]) if reduce == "mean" else found


def _known(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}")
