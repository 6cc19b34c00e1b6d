"""Which elements of which groups are to go: a `Plan`, which is JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.output.shown import Shown
from jaxeff.output.stacks import folded_cells
from jaxeff.output.text import aligned
from jaxeff.prune import _plan_text as plan_text
from jaxeff.prune._dead import dead_elements
from jaxeff.prune._groups import Group, Groups, Shapes
from jaxeff.prune._named import map_named, named_variables, stand_in
from jaxeff.report import Report


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan(Shown):
    """What to remove from a model, and all that is needed to remove it.

    Attributes:
        groups: those that lose elements.
        removed: the elements that each loses, by name, ascending; of a group with blocks those of each
            block, nested as `Group.blocks` says.
        params, state: shapes of the model's leaves by path, as `Groups` has them.
    """

    groups: tuple[Group, ...]
    removed: Mapping[str, tuple[Any, ...]]
    params: Shapes
    state: Shapes

    @property
    def shapes(self) -> Shapes:
        return {**self.params, **self.state}

    @classmethod
    def of(cls, groups: Groups, removed: Mapping[str, Sequence[Any]]) -> Plan:
        """Return the plan that removes these elements of these groups.

        Args:
            groups: of `prune.groups`.
            removed: elements by group's name. Of a group with blocks either those of each block, equally
                many, or one list for all blocks.

        Raises:
            ValueError: no such group, a locked one, an element that it does not have, all of them, or more experts
                than their router can spare.

        >>> import jax, jax.numpy as jnp
        >>> from jaxeff import prune
        >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> Plan.of(prune.groups(params, model, jnp.ones((8, 3))), {"a:1": [0, 2]}).widths()
        {'a': {1: 2}, 'b': {0: 2}}
        """
        known = {group.name: group for group in groups}
        for name in removed:
            if name not in known:
                raise ValueError(
                    f"`removed` names {name!r}, which is not a group: print the groups to see their names"
                )
            if known[name].locked is not None:
                raise ValueError(f"`removed` names {name!r}, which is locked: {known[name].locked}")
        chosen = {
            name: elements
            for name, group in known.items()
            if (elements := _elements(name, group.size, group.blocks, group.routed, removed.get(name, ())))
        }
        kept = tuple(dataclasses.replace(known[name], importance=None) for name in chosen)
        return cls(kept, chosen, groups.params, groups.state)

    @classmethod
    def dead(cls, groups: Groups, report: Report) -> Plan:
        """Return the plan that removes units which emitted only 0 on the report's batch.

        What a unit feeds reads 0 with and without it, so on this batch the smaller model computes the same. A unit
        that several weights feed counts as dead if all of them emitted only 0. A gated unit, a product, is dead
        already if one of its factors is: `prune.fluctuation` finds these too. Blocks lose equally many.

        Args:
            groups: of `prune.groups`.
            report: from `jaxeff.analyze`, of the same model, on as much data as a unit should be silent on.

        Raises:
            TypeError: `groups` and `report` are something else.
            ValueError: the report is of another model, or holds several models or steps.

        >>> import jax, jax.numpy as jnp, jaxeff
        >>> from jaxeff import prune
        >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.array([[1.0, -1.0, 2.0]]), "b": jnp.ones((3, 2))}
        >>> report, found = (f(params, model, jnp.ones((8, 1))) for f in (jaxeff.analyze, prune.groups))
        >>> Plan.dead(found, report).removed
        {'a:1': (1,)}
        """
        return cls.of(groups, dead_elements(groups, report))

    def left_out(self) -> tuple[str, ...]:
        """Return the names of the blocks that go as a whole: the modules that a rebuilt model is to leave out."""
        return tuple(
            group.names[element]
            for group in self.groups
            if group.leaves
            for element in self.removed[group.name]
        )

    def leaves_left_out(self) -> frozenset[str]:
        """Return the paths of the leaves of these blocks."""
        return frozenset(
            path
            for group in self.groups
            if group.leaves
            for element in self.removed[group.name]
            for path in group.leaves[element]
        )

    def widths(self) -> dict[str, dict[int, int]]:
        """Return the new size of every axis that changes, by path and axis: to build the smaller module with."""
        return {
            path: {axis: _left(gone, axis) for axis, gone in axes.items()}
            for path, axes in self.gone().items()
        }

    def sizes(self) -> dict[str, int]:
        """Return how many elements each group that loses any keeps, by name, in each of its blocks."""
        return {group.name: group.size - np.shape(self.removed[group.name])[-1] for group in self.groups}

    def of_each_block(self) -> list[Plan]:
        """Return for each block of the stacks a plan that removes from all of them what this one removes from it.

        Without stacks, this plan alone. The blocks of shorter stacks are repeated.
        """
        count = max((math.prod(group.blocks) for group in self.groups), default=1)

        def of(block: int) -> Plan:
            removed = {}
            for group in self.groups:
                gone = np.asarray(self.removed[group.name])
                # Blocks within blocks: those that are no further divided change the slowest.
                rows = gone.reshape(-1, gone.shape[-1])
                row = rows[block * len(rows) // count]
                removed[group.name] = _nested(np.broadcast_to(row, gone.shape).tolist())
            return dataclasses.replace(self, removed=removed)

        return [of(block) for block in range(count)] if count > 1 else [self]

    def kept(self) -> dict[str, dict[int, np.ndarray]]:
        """Return the indices that stay, ascending, by path and axis, of every axis that changes.

        A list of them, or, where each block keeps its own, an array for `jnp.take_along_axis`: of the leaf's
        rank, with size 1 on axes that make no difference.
        """
        return {
            path: {axis: _indices(gone, axis) for axis, gone in axes.items()}
            for path, axes in self.gone().items()
        }

    def gone(self) -> dict[str, dict[int, np.ndarray]]:
        """Return by path and axis an array that broadcasts against the leaf: True where an index goes.

        Without the leaves of blocks that are left out.
        """
        shapes, left_out = self.shapes, self.leaves_left_out()
        gone: dict[str, dict[int, np.ndarray]] = {}
        for group in self.groups:
            removed = np.asarray(self.removed[group.name])
            for member in group.members:
                axes, shape = gone.setdefault(member.path, {}), shapes[member.path]
                along = np.zeros((*group.blocks, shape[member.axis]), bool)
                held = member.indices[removed].reshape(*group.blocks, -1)
                np.put_along_axis(along, held, True, axis=-1)
                along = laid_out(along, (*member.block_axes, member.axis), len(shape))
                axes[member.axis] = axes.get(member.axis, np.False_) | along
        return {
            path: dict(sorted(axes.items())) for path, axes in sorted(gone.items()) if path not in left_out
        }

    def __str__(self) -> str:
        """A row for each group that loses elements: what a smaller module has to be given."""
        kept = self.sizes()
        rows = [
            (group.name, group.kind, f"{group.size} to {kept[group.name]}{_each(group)}")
            for group in self.groups
        ]
        names = {(each.path, each.axis): each.name for group in self.groups for each in group.members}
        leaves = [
            (names[path, axis], "", f"{self.shapes[path][axis]} to {size}")
            for path, axes in self.widths().items()
            for axis, size in axes.items()
        ]
        if not rows:
            return "Nothing is removed."
        header = ("group", "kind", "size")
        lines = aligned([header, *folded_cells(rows)], left=header, gap=2)
        if left_out := self.left_out():
            lines += ["", f"Without {', '.join(left_out)}"]
        if leaves:
            lines += [
                "",
                *aligned([("leaf:axis", "", "size"), *folded_cells(leaves)], left=("", "size"), gap=2),
            ]
        return "\n".join(lines)

    def masks(self, params: Any) -> Any:
        """Return the plan as masks for `prune.apply`, True = kept; a single True for a leaf that stays whole.

        The large model with these masks computes what the small one does.

        Raises:
            ValueError: the plan removes experts that a router chooses among: with a logit of 0 they would still be
                chosen. Or it is of another model.
        """
        self.check(params)
        if routed := [group.name for group in self.groups if group.routed]:
            raise ValueError(
                f"the plan removes experts of {routed[0]!r}, and no mask keeps a router from choosing them: compare "
                "with the model whose logits for them are -inf, or run what `prune.compact` makes"
            )
        gone, left_out = self.gone(), self.leaves_left_out()

        def mask(path: str, leaf: Any) -> jax.Array:
            shape = jnp.shape(leaf)
            return jnp.zeros(shape, bool) if path in left_out else _mask(shape, gone.get(path, {}))

        return map_named(mask, params)

    def check(self, params: Any) -> None:
        """Raise unless these are the params of the plan's model, its state, or both."""
        shapes = {
            path: jnp.shape(leaf) for path, leaf in named_variables(jax.tree.map(stand_in, params)).items()
        }
        parts = [part for part in (self.params, self.state) if part and part.keys() == shapes.keys()]
        expected = parts[0] if parts else self.shapes
        if different := sorted(shapes.keys() ^ expected.keys()):
            where = "`params`" if different[0] in shapes else "the plan"
            raise ValueError(f"the plan is of another model: {different[0]!r} is in {where} alone")
        for path, shape in shapes.items():
            if shape != tuple(expected[path]):
                raise ValueError(
                    f"the plan is of another model: {path!r} has shape {tuple(expected[path])} there and "
                    f"{shape} here"
                )

    def to_json(self) -> str:
        """Return the plan as text that `Plan.from_json` reads in any process."""
        return plan_text.write(self.groups, self.removed, self.params, self.state)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        What is removed may have been edited; the description of the model may not.

        Raises:
            ValueError: it is not a plan, is of another version, was damaged, or removes what a group does not
                have or all that it has.
        """
        found = plan_text.read(text)
        chosen = {
            name: elements
            for name, group in found.groups.items()
            if (
                elements := _elements(
                    name, group.size, group.blocks, group.routed, found.removed.get(name, ())
                )
            )
        }
        return cls(tuple(found.groups[name] for name in chosen), chosen, found.params, found.state)


def _each(group: Group) -> str:
    return f" in each of {' x '.join(map(str, group.blocks))} blocks" if group.blocks else ""


def laid_out(along: Any, axes: Sequence[int], rank: int) -> Any:
    """An array whose dimensions are these axes of a leaf, with size 1 on all others."""
    sizes = dict(zip(axes, along.shape, strict=True))
    return along.transpose(np.argsort(axes)).reshape([sizes.get(axis, 1) for axis in range(rank)])


def _left(gone: np.ndarray, axis: int) -> int:
    """How many indices of an axis stay: in all blocks as many."""
    return gone.shape[axis] - int(np.count_nonzero(gone, axis=axis).flat[0])


def _indices(gone: np.ndarray, axis: int) -> np.ndarray:
    # False comes first, and a stable sort keeps the order of the indices.
    kept = np.argsort(gone, axis=axis, kind="stable").take(range(_left(gone, axis)), axis=axis)
    return kept.ravel() if kept.size == kept.shape[axis] else kept


def _mask(shape: tuple[int, ...], gone: Mapping[int, np.ndarray]) -> jax.Array:
    if not gone:
        return jnp.asarray(True)
    return jnp.asarray(np.broadcast_to(~functools.reduce(np.logical_or, gone.values()), shape))


def _elements(name: str, size: int, blocks: tuple[int, ...], routed: int, elements: Any) -> tuple[Any, ...]:
    """Check and sort the elements to remove from a group, by block if it has blocks; () for nothing."""
    rows = _rows(elements, len(blocks))
    if rows is None:
        per_block = f", or {blocks} such lists, equally long" if blocks else ""
        raise ValueError(
            f"the elements to remove of {name!r} must be a list of whole numbers{per_block}, got "
            f"{reprlib.repr(elements)}"
        )
    if not rows.size:
        return ()
    if rows.ndim > 1 and rows.shape[:-1] != blocks:
        raise ValueError(f"{name!r} has {blocks} blocks, and elements of {rows.shape[:-1]} are to be removed")
    wrong = rows[(rows < 0) | (rows >= size)]
    if wrong.size:
        raise ValueError(f"{name!r} has elements 0 to {size - 1}, and {wrong[0]} is to be removed")
    rows = np.sort(np.broadcast_to(rows, (*blocks, rows.shape[-1])), axis=-1)
    if (np.diff(rows, axis=-1) == 0).any():
        raise ValueError(f"an element of {name!r} is to be removed twice")
    if rows.shape[-1] == size:
        raise ValueError(f"all {size} elements of {name!r} are to be removed: a group cannot be emptied")
    if (left := size - rows.shape[-1]) < routed:
        raise ValueError(
            f"{left} experts of {name!r} would be left, and the router chooses {routed} for each token: remove at "
            f"most {size - routed} of {size}"
        )
    return _nested(rows.tolist())


def _rows(elements: Any, blocks: int) -> np.ndarray | None:
    """[n] or, of each block, [*blocks, n]; None where elements are something else."""
    if not isinstance(elements, (Sequence, np.ndarray)) or isinstance(elements, str):
        return None
    try:
        rows = np.asarray(elements)
    except ValueError:
        return None
    whole = rows.dtype.kind in "iu" or not rows.size
    return rows if whole and rows.ndim in (1, 1 + blocks) else None


def _nested(rows: Any) -> Any:
    return tuple(map(_nested, rows)) if isinstance(rows, list) else rows
