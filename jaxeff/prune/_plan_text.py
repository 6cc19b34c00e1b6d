"""A plan as JSON: what it removes, and a description of the model that it belongs to.

What is removed may be edited by hand. The description carries a signature, so that a slip of the hand is noticed.
Neither is trusted: everything is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxeff.graph.coupling_kinds import GROUP_KINDS
from jaxeff.prune._groups import Group, Member, Shapes

VERSION = 4
_MODEL = ("params", "state", "groups")
# Indices of one group, and of all: evenly spaced ones are two numbers in the text, however many they are.
_LONGEST, _MOST = 1 << 24, 1 << 26
_RANK = 64  # as NumPy's


class Read(NamedTuple):
    """What a text says. `removed` holds lists that are still to be checked against their groups."""

    groups: dict[str, Group]
    removed: dict[str, Any]
    params: Shapes
    state: Shapes


def write(groups: Sequence[Group], removed: Mapping[str, Any], params: Shapes, state: Shapes) -> str:
    model = {
        "params": {path: list(shape) for path, shape in params.items()},
        "state": {path: list(shape) for path, shape in state.items()},
        "groups": {group.name: _encoded_group(group) for group in groups},
    }
    elements = {name: np.asarray(each).tolist() for name, each in removed.items()}
    return json.dumps({"version": VERSION, "signature": _signature(model), "removed": elements, **model})


def read(text: str) -> Read:
    """Read what `write` wrote.

    Raises:
        ValueError: it is not a plan, is of another version, or was damaged.
    """
    found = _parsed(text)
    if found["signature"] != _signature({name: found[name] for name in _MODEL}):
        raise ValueError(
            "the plan's description of the model was changed, and its signature no longer fits: edit "
            "'removed' alone, or make a new plan"
        )
    params, state = (
        {path: _shape(shape) for path, shape in _of(dict, found[name]).items()}
        for name in ("params", "state")
    )
    shapes = {**params, **state}
    groups = {name: _decoded_group(name, each, shapes) for name, each in _of(dict, found["groups"]).items()}
    if sum(math.prod(group.blocks) * group.size + _indices(group) for group in groups.values()) > _MOST:
        raise _damaged("more indices than any model has")
    removed = found["removed"]
    unknown = [name for name in removed if name not in groups] if isinstance(removed, dict) else [removed]
    if unknown:
        raise ValueError(
            f"the plan removes of {reprlib.repr(unknown[0])}, which is none of its groups: {reprlib.repr([*groups])}"
        )
    return Read(groups, removed, params, state)


def _damaged(what: str) -> ValueError:
    return ValueError(f"`text` is not a plan, or was damaged: {what}")


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`text` is not JSON: {error}") from error
    names = ("version", "signature", "removed", *_MODEL)
    missing = [name for name in names if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"`text` is not a plan: {missing[0]!r} is missing")
    if found["version"] != VERSION:
        version = reprlib.repr(found["version"])
        raise ValueError(f"the plan is of version {version}, and this jaxeff reads {VERSION}")
    return found


def _signature(model: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _encoded_group(group: Group) -> dict[str, Any]:
    return {
        "size": group.size,
        "kind": group.kind,
        "routed": group.routed,
        "blocks": list(group.blocks),
        "members": [
            [m.path, m.axis, [_encoded(column) for column in m.indices.T], list(m.block_axes), m.axis_name]
            for m in group.members
        ],
        "leaves": [list(paths) for paths in group.leaves],
        "names": list(group.names),
    }


def _decoded_group(name: str, found: Any, shapes: Shapes) -> Group:
    found = _of(dict, found)
    if missing := [
        key for key in ("size", "kind", "routed", "blocks", "members", "leaves", "names") if key not in found
    ]:
        raise _damaged(f"{missing[0]!r} of a group is missing")
    size, routed = _whole(found["size"]), _whole(found["routed"])
    blocks = _shape(found["blocks"])
    members = tuple(_decoded_member(member, size, blocks, shapes) for member in _of(list, found["members"]))
    leaves = tuple(
        tuple(_path(path, shapes) for path in _of(list, paths)) for paths in _of(list, found["leaves"])
    )
    names = tuple(_of(str, each) for each in _of(list, found["names"]))
    if found["kind"] not in GROUP_KINDS or len(leaves) != len(names) or (not members and len(leaves) != size):
        raise _damaged(f"the group {reprlib.repr(name)} of kind {reprlib.repr(found['kind'])}")
    return Group(name, size, members, None, None, found["kind"], blocks, routed, leaves, names)


def _decoded_member(found: Any, size: int, blocks: Sequence[int], shapes: Shapes) -> Member:
    if len(_of(list, found)) != 5:
        raise _damaged(reprlib.repr(found))
    path, axis, columns = _path(found[0], shapes), _whole(found[1]), _of(list, found[2])
    shape, block_axes = shapes[path], _whole_numbers(found[3])
    axis_name = None if found[4] is None else _of(str, found[4])
    fits = max((axis, *block_axes)) < len(shape) and (
        not block_axes or tuple(shape[i] for i in block_axes) == blocks
    )
    if not fits or not columns or not size <= shape[axis] or len(columns) > shape[axis]:
        raise _damaged(f"axis {axis} of {reprlib.repr(path)}")
    indices = np.stack([_decoded(column, size, shape[axis]) for column in columns], axis=1)
    return Member(path, axis, indices, block_axes, axis_name)


def _encoded(column: np.ndarray) -> list[int]:
    """[start, step] where indices are evenly spaced, else ['at', ...] all of them."""
    steps = np.diff(column)
    step = int(steps[0]) if len(steps) else 1
    if (steps == step).all():
        return [int(column[0]), step]
    return [int(column[0]), 0, *column.tolist()]


def _decoded(encoded: Any, size: int, length: int) -> np.ndarray:
    """The indices, each at least 0 and below the length of their axis."""
    start, step, *every = _whole_numbers(encoded, fewest=2, negative=True)
    column = np.array(every) if every else start + step * np.arange(size)
    if len(column) != size or (size and not 0 <= int(column.min()) <= int(column.max()) < length):
        raise _damaged(f"indices {reprlib.repr(encoded)} of an axis of {length}")
    return column


def _indices(group: Group) -> int:
    return sum(member.indices.size for member in group.members)


def _path(found: Any, shapes: Shapes) -> str:
    if _of(str, found) not in shapes:
        raise _damaged(f"{reprlib.repr(found)} is not a leaf")
    return found


def _whole_numbers(found: Any, *, fewest: int = 0, negative: bool = False) -> tuple[int, ...]:
    numbers = tuple(_whole(each, negative=negative) for each in _of(list, found))
    if len(numbers) < fewest:
        raise _damaged(f"{reprlib.repr(found)} is too short")
    return numbers


def _shape(found: Any) -> tuple[int, ...]:
    if len(shape := _whole_numbers(found)) > _RANK:
        raise _damaged(f"the shape {reprlib.repr(found)}")
    return shape


def _whole(found: Any, *, negative: bool = False) -> int:
    if not -_LONGEST * negative <= _of(int, found) <= _LONGEST:
        raise _damaged(f"the number {reprlib.repr(found)}")
    return found


_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def _of(kind: type, found: Any) -> Any:
    if type(found) is not kind:
        raise _damaged(f"{reprlib.repr(found)} in place of {_NAMES[kind]}")
    return found
