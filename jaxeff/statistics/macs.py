"""The multiply-accumulates that each use of a weight costs an example."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxeff import graph
from jaxeff.graph.program import Value


def macs_of(
    sites: Sequence[graph.Site], leaves: Sequence[graph.Leaf], batch_size: int | None
) -> list[int | None]:
    """Return the multiply-accumulates of each site, per example; None where they are unknown.

    Weights that one product takes together, concatenated or added, share its multiply-accumulates by their sizes, so
    that those of all layers add up to those of the program.
    """
    found = [_per_example(site.macs, batch_size) for site in sites]
    together: dict[Value, list[int]] = {}
    for i, site in enumerate(sites):
        together.setdefault(site.activation.pre, []).append(i)
    for members in together.values():
        whole = found[members[0]]
        if len(members) == 1 or whole is None:
            continue
        stacked = math.prod(loop.length or 1 for loop in sites[members[0]].loops if loop.axis is not None)
        sizes = [math.prod(leaves[sites[i].leaf].shape) for i in members]
        # Rounded so that the shares add up, and are whole for each stacked layer.
        ends = [whole // stacked * sum(sizes[:n]) // sum(sizes) for n in range(len(sizes) + 1)]
        for i, start, end in zip(members, ends[:-1], ends[1:], strict=True):
            found[i] = stacked * (end - start)
    return found


def _per_example(macs: int | None, batch_size: int | None) -> int | None:
    return macs // batch_size if macs is not None and batch_size and macs % batch_size == 0 else None
