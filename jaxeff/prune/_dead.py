"""Which elements of groups emitted nothing, by a report."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxeff.prune._groups import Groups
from jaxeff.prune._recycling import dormant_elements, rows_by_path
from jaxeff.report import Report


def dead_elements(groups: Groups, report: Report) -> dict[str, Any]:
    """Return by group's name the elements whose units emitted only 0 in the report, for `Plan.of`.

    Raises:
        ValueError: the report is of another model.
    """
    rows = rows_by_path(groups, report)
    found = {
        group.name: removable(dormant_elements(group, rows, 0)).reshape(*group.blocks, -1)
        for group in groups.unlocked
        if not group.routed
    }
    return {name: elements for name, elements in found.items() if np.size(elements)}


def removable(dead: np.ndarray) -> np.ndarray:
    """[blocks, n], dead elements of each block, as many in each, and never all."""
    count = min(int(dead.sum(axis=1).min()), dead.shape[1] - 1)
    return np.stack([np.flatnonzero(row)[:count] for row in dead])
