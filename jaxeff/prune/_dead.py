"""Which elements of groups emitted nothing, by a report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxeff.prune._groups import Group, Groups, Member
from jaxeff.report import LayerReport, Report


def dead_elements(groups: Groups, report: Report) -> dict[str, Any]:
    """Return by group's name the elements whose units emitted only 0 in the report, for `Plan.of`.

    Raises:
        ValueError: the report is of another model.
    """
    rows: dict[str, list[LayerReport]] = {}
    for row in report.single().rows:
        rows.setdefault(re.sub(r"\[[\d,]+\]$", "", row.path), []).append(row)
    if unknown := sorted(rows.keys() - groups.params.keys()):
        raise ValueError(f"`report` is of another model: {unknown[0]!r} is no leaf of the groups'")
    found = {
        group.name: _removable(_dead(group, rows)).reshape(*group.blocks, -1)
        for group in groups.unlocked
        if not group.routed
    }
    return {name: elements for name, elements in found.items() if np.size(elements)}


def _dead(group: Group, rows: Mapping[str, list[LayerReport]]) -> np.ndarray:
    """[blocks, size], True where all weights that feed an element emitted only 0."""
    emitting = [
        _emitted_nothing(member, rows[member.path], group)
        for member in group.members
        if member.path in rows and _unit_axis(member) in rows[member.path][0].unit_axes
    ]
    nothing = np.zeros((math.prod(group.blocks), group.size), bool)
    return np.logical_and.reduce(emitting) if emitting else nothing


def _unit_axis(member: Member) -> int:
    """The member's axis in the shape of one layer."""
    return member.axis - sum(axis < member.axis for axis in member.block_axes)


def _emitted_nothing(member: Member, rows: list[LayerReport], group: Group) -> np.ndarray:
    blocks = math.prod(group.blocks)
    if len(rows) != blocks or any(row.activity is None or row.nonlinearity == "identity" for row in rows):
        return np.zeros((blocks, group.size), bool)
    dead = []
    for row in rows:
        assert row.activity is not None
        largest = np.asarray(row.activity.maximum)
        place = row.unit_axes.index(_unit_axis(member))
        others = tuple(axis for axis in range(largest.ndim) if axis != place)
        silent = largest.max(axis=others) == 0
        dead.append(silent[member.indices].all(axis=1))
    return np.stack(dead)


def _removable(dead: np.ndarray) -> np.ndarray:
    """[blocks, n], dead elements of each block, as many in each, and never all."""
    count = min(int(dead.sum(axis=1).min()), dead.shape[1] - 1)
    return np.stack([np.flatnonzero(row)[:count] for row in dead])
