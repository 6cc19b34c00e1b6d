"""Whether a change of a bias leaf is a change of the outputs it is added to, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxeff.graph import axes
from jaxeff.graph.axes import Dims
from jaxeff.graph.nonlinearities import unchanged
from jaxeff.graph.program import Operation, Program, Value, scan_operands
from jaxeff.graph.provenance import Lost, Use
from jaxeff.graph.sites import Graph, Site


def plain_bias(found: Graph, sites: Sequence[Site]) -> int | None:
    """Return the bias of a weight if its sites alone use it, as it is stored, with axes in the order of the units."""
    bias = sites[0].activation.bias
    if bias is None:
        return None
    uses = {
        use.operation.outputs[0]: use for use in found.provenance.uses if use.leaf == bias and use.operation
    }
    count = sum(use.leaf == bias for use in found.provenance.uses)
    plain = all(
        site.activation.pre in uses and _plain(found, site, uses[site.activation.pre], bias) for site in sites
    )
    return bias if plain and count == len(sites) else None


def _plain(found: Graph, site: Site, use: Use, bias: int) -> bool:
    assert use.operation is not None
    operand, pre = use.operation.inputs[use.operand], site.activation.pre
    if isinstance(use.dims, Lost) or not isinstance(operand, Value):
        return False
    seen = axes.broadcast(use.dims, operand.shape, pre.shape)
    order = _order(seen)
    if order is None or order != _order(site.activation.pre_dims):
        return False
    # Both stack the same layers, in the same order beside the units.
    stacked = [loop.axis for loop in site.loops]
    kept = sorted(site.unit_axes | {axis for axis in stacked if axis is not None})
    if [loop.axis for loop in use.loops] != [None if axis is None else kept.index(axis) for axis in stacked]:
        return False
    return _as_stored(found.program, use, operand, found.program.inputs[bias])


def _as_stored(whole: Program, use: Use, value: Value, leaf: Value) -> bool:
    """Return whether a value is the leaf, moved, repeated or in another dtype, also where scans slice it."""
    program = use.program
    around = {body: (operation, outer) for operation, outer in _loops(whole) for body in operation.bodies}
    while value is not leaf:
        made = next((each for each in program.operations if value in each.outputs), None)
        if made is not None:
            plain = axes.moves(made) or unchanged(made) or made.name == "broadcast_in_dim"
            if not plain or not isinstance(made.inputs[0], Value):
                return False
            value = made.inputs[0]
            continue
        if program not in around or value not in program.inputs:
            return False
        loop, program = around[program]
        at = loop.bodies[0].inputs.index(value)
        operand = loop.inputs[at] if loop.name == "scan" else None
        constants, carried = scan_operands(loop) if loop.name == "scan" else (0, 0)
        if not isinstance(operand, Value) or constants <= at < constants + carried:
            return False
        value = operand
    return True


def _loops(program: Program) -> Iterator[tuple[Operation, Program]]:
    for operation in program.operations:
        for body in operation.bodies:
            yield operation, program
            yield from _loops(body)


def _order(dims: Dims) -> list[tuple[int, int]] | None:
    """The rank of each axis among all, and its size, in the order in which they stand; None if one is split."""
    stand = [(factor.axis, factor.size) for dim in dims for factor in dim if factor.axis is not None]
    known = sorted({axis for axis, _ in stand})
    return [(known.index(axis), size) for axis, size in stand] if len(known) == len(stand) else None
