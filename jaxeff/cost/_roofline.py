"""The roofline of a function: the least time that a chip needs for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxeff import graph
from jaxeff.cost._chips import Chip, chip_of
from jaxeff.cost._compiling import check_function
from jaxeff.cost._operations import MOVES, work_of
from jaxeff.cost._records import Statement
from jaxeff.cost._tally import module_path
from jaxeff.cost._timing import Peak
from jaxeff.graph.program import Operation, Value
from jaxeff.model.functions import bound_module
from jaxeff.output import text
from jaxeff.output.shown import Shown


@dataclasses.dataclass(frozen=True)
class FloorEntry:
    """Work of one operator in one module, over all of its runs.

    Attributes:
        module: path of the module; '' for the function itself.
        operator: name of the primitive.
        flops: floating-point operations, and two per multiply-accumulate of integers.
        bytes: of the function's arguments that it is the first to read, and of the results that it writes.
        compute_seconds: flops over the chip's peak.
        memory_seconds: bytes over the chip's bandwidth.
    """

    module: str
    operator: str
    flops: int
    bytes: int
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


@dataclasses.dataclass(frozen=True, repr=False)
class Floor(Shown):
    """The least time that a chip needs for a function. `str(floor)` is a table.

    Attributes:
        chip: the chip.
        entries: by module and operator, in execution order.
        statements: what was not counted, or was assumed.
    """

    chip: Chip
    entries: tuple[FloorEntry, ...]
    statements: tuple[Statement, ...]

    @property
    def flops(self) -> int:
        return sum(entry.flops for entry in self.entries)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def compute_seconds(self) -> float:
        return sum(entry.compute_seconds for entry in self.entries)

    @property
    def memory_seconds(self) -> float:
        return sum(entry.memory_seconds for entry in self.entries)

    @property
    def seconds(self) -> float:
        """max(FLOPs / peak, bytes / bandwidth): no schedule is faster, however much overlaps."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def in_turn_seconds(self) -> float:
        """The sum of the entries' floors: the least time if no two operations overlap."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def bound(self) -> str:
        """'compute' or 'memory', whichever takes longer."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, including the derived numbers."""
        derived = (
            "flops",
            "bytes",
            "compute_seconds",
            "memory_seconds",
            "seconds",
            "in_turn_seconds",
            "bound",
        )
        return {
            **{name: getattr(self, name) for name in derived},
            "chip": dataclasses.asdict(self.chip),
            "entries": [
                {**dataclasses.asdict(entry), "seconds": entry.seconds, "bound": entry.bound}
                for entry in self.entries
            ],
            "statements": [dataclasses.asdict(statement) for statement in self.statements],
        }

    def __str__(self) -> str:
        return _render(self)


_SHOWN = 20


def _render(floor: Floor) -> str:
    """Render the bound, and the operations that contribute most to it."""
    width, duration = text.terminal_width(), text.duration
    cells = [
        (
            f"{entry.module} {entry.operator}".strip(),
            text.number(entry.flops),
            text.number(entry.bytes),
            duration(entry.seconds),
            entry.bound,
        )
        for entry in sorted(floor.entries, key=lambda entry: -entry.seconds)[:_SHOWN]
    ]
    head = (
        f"At least {duration(floor.seconds)} on {floor.chip.name}, bound by {floor.bound}: arithmetic "
        f"{duration(floor.compute_seconds)}, memory {duration(floor.memory_seconds)}, "
        f"{duration(floor.in_turn_seconds)} if nothing overlaps. A floor, not a latency."
    )
    lines = [*text.wrapped(head, width), ""]
    lines += text.aligned([("operation", "FLOPs", "bytes", "at least", "bound"), *cells], width)
    lines += text.left_out(len(floor.entries), len(cells), "operations")
    lines += text.section(width, "Not in these numbers, or assumed:", list(map(str, floor.statements)))
    return "\n".join(lines)


def floor(function: Callable, *arguments: Any, chip: str | Peak | Chip, **keywords: Any) -> Floor:
    """Compute the least time that a chip needs for a function, its roofline, from the traced program alone.

        max(FLOPs / peak, bytes / bandwidth)

    Bytes are the function's arguments, read once, and its results, written once; intermediate values may stay on the
    chip. For an embedding or a slice only the rows taken count, and for an array that is updated in part, only that
    part. FLOPs run at the peak of matrix products for their dtype. A real program is slower: it stores
    intermediate results, launches kernels, and does not fill all of its units. It can be faster only if arguments
    are in a cache when it starts, as small ones are on a CPU.

    Args:
        function: any function of arrays, such as `model.apply`, a training step, or a decoding step with its cache.
        arguments, keywords: of the function; arrays or `jax.ShapeDtypeStruct`.
        chip: 'tpu v5e', 'h100', ...; a measurement of this machine by `cost.peak`; or a `cost.Chip`.

    Raises:
        TypeError: `function` is not a function.
        ValueError: no chip has this name. The message lists the known names.

    Source: Williams, Waterman and Patterson (2009), "Roofline", Communications of the ACM 52(4).

    >>> import jax.numpy as jnp
    >>> x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4096), (4096, 4096)))
    >>> found = floor(jnp.dot, x, w, chip="tpu v5e")
    >>> found.flops, found.bytes, found.bound
    (33554432, 33570816, 'memory')
    """
    check_function(function, "its arguments follow, cost.floor(apply_fn, params, batch, chip=...)")
    found = chip_of(chip)
    closed = jax.make_jaxpr(function)(*arguments, **keywords)
    program = graph.flatten(closed)
    module, _ = bound_module(function)
    root = "" if module is None else module.name or type(module).__name__
    walk = _Walk(found, root)
    unread = {value: _bytes(value) for value in program.inputs}
    unread |= {value: _bytes(value) for value in program.constants}
    results = [value for value in program.outputs if isinstance(value, Value)]
    walk.run(program, unread, {value: _bytes(value) for value in results if value not in program.inputs})
    return Floor(found, walk.entries, tuple(walk.statements))


Bytes = dict[Value, int]


class _Walk:
    """Adds up a program.

    Attributes:
        statements: what was not counted, or was assumed.
    """

    def __init__(self, chip: Chip, root: str):
        self._chip, self._root = chip, root
        self._sums: dict[tuple[str, str], list[Any]] = {}
        self.statements: list[Statement] = []

    @property
    def entries(self) -> tuple[FloorEntry, ...]:
        return tuple(FloorEntry(*key, *sums) for key, sums in self._sums.items() if any(sums))

    @property
    def seconds(self) -> float:
        return max(
            sum(entry.compute_seconds for entry in self.entries), sum(e.memory_seconds for e in self.entries)
        )

    def run(self, program: graph.Program, unread: Bytes, unwritten: Bytes, runs: int = 1) -> None:
        """Charge every byte to the operation that is the first to read it, or that writes it.

        Args:
            unread: bytes of arguments not read yet, over all runs; entries are removed as they are read.
            unwritten: bytes of results.
        """
        for operation in program.operations:
            if operation.name in _LOOPS:
                _LOOPS[operation.name](self, operation, unread, unwritten, runs)
                continue
            work = work_of(operation)
            if isinstance(work, str):
                self._state("uncounted", operation, work, runs)
            # Kernels may skip padding.
            flops = 0 if isinstance(work, str) else (work.flops - 2 * work.padding_macs) * runs
            written = sum(_written(operation, unwritten.pop(one, 0), runs) for one in operation.outputs)
            self._charge(operation, flops, _read(operation, unread, bool(written), runs) + written)

    def _charge(self, operation: Operation, flops: int, moved: int) -> None:
        if not (flops or moved):
            return
        rate = self._chip.rate(*(_dtype(operand) for operand in operation.inputs))
        sums = self._sums.setdefault((self._module(operation), operation.name), [0, 0, 0.0, 0.0])
        added = flops, moved, flops / rate, moved / self._chip.bytes_per_second
        sums[:] = [old + new for old, new in zip(sums, added, strict=True)]

    def _module(self, operation: Operation) -> str:
        return module_path(operation.scope, self._root)

    def _state(self, kind: str, operation: Operation, reason: str, runs: int) -> None:
        self.statements.append(
            Statement("forward", kind, operation.name, self._module(operation), reason, runs)
        )

    def _body(
        self, body: graph.Program, outer: Sequence[Any], outputs: Sequence[Value], unread: Bytes, unwritten: Bytes,
        runs: int,
    ) -> None:  # fmt: skip
        """Add up a body of a loop with these operands as inputs and these values as outputs."""
        pairs = [pair for pair in zip(body.inputs, outer, strict=True) if isinstance(pair[1], Value)]
        inner = {value: unread.pop(operand) for value, operand in pairs if operand in unread}
        asked = zip(body.outputs, outputs, strict=False)
        wanted = {made: unwritten.pop(value, 0) for made, value in asked if isinstance(made, Value)}
        inner |= {value: _bytes(value) for value in body.constants}
        self.run(body, inner, wanted, runs)

    def scan(self, operation: Operation, unread: Bytes, unwritten: Bytes, runs: int) -> None:
        (body,), length = operation.bodies, int(operation.params["length"])
        if length:
            self._body(body, operation.inputs, operation.outputs, unread, unwritten, runs * length)

    def loop(self, operation: Operation, unread: Bytes, unwritten: Bytes, runs: int) -> None:
        self._state(
            "assumed", operation, "how often it runs depends on values: one iteration is counted", runs
        )
        start = operation.params["cond_nconsts"]
        self._body(operation.bodies[1], operation.inputs[start:], operation.outputs, unread, unwritten, runs)

    def branches(self, operation: Operation, unread: Bytes, unwritten: Bytes, runs: int) -> None:
        self._state("assumed", operation, "counted as the fastest of its branches", runs)
        tried = []
        for body in operation.bodies:
            one, left = _Walk(self._chip, self._root), (dict(unread), dict(unwritten))
            one._body(body, operation.inputs[1:], operation.outputs, *left, runs)
            tried.append((one, left))
        fastest, left = min(tried, key=lambda pair: pair[0].seconds)
        for mine, theirs in zip((unread, unwritten), left, strict=True):
            mine.clear()
            mine.update(theirs)
        for key, sums in fastest._sums.items():
            known = self._sums.setdefault(key, [0, 0, 0.0, 0.0])
            known[:] = [old + new for old, new in zip(known, sums, strict=True)]
        self.statements += fastest.statements


_LOOPS = {"scan": _Walk.scan, "while": _Walk.loop, "cond": _Walk.branches}
_PARTS = frozenset({"dynamic_slice", "gather", "slice"})
_IN_PLACE = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}
"""The operand that is written into another."""


def _read(operation: Operation, unread: Bytes, is_result: bool, runs: int) -> int:
    """Return the bytes that an operation is the first to read.

    A value that is only moved, and is not a result, is charged to the operation that calculates with it.
    """
    if not operation.inputs:
        return 0
    first, *others = operation.inputs
    taken = _pop(unread, others)
    if operation.name in _IN_PLACE:
        unread[operation.outputs[0]] = _pop(unread, [first])
        return taken
    if operation.name in _PARTS and isinstance(first, Value) and first in unread:
        part = min(unread[first], _bytes(operation.outputs[0]) * runs)
        unread[first] -= part
        taken += part
    else:
        taken += _pop(unread, [first])
    if operation.name not in MOVES or is_result:
        return taken
    unread[operation.outputs[0]] = taken
    return 0


def _pop(unread: Bytes, operands: Sequence[Value | Literal]) -> int:
    return sum(unread.pop(operand, 0) for operand in operands if isinstance(operand, Value))


def _written(operation: Operation, asked: int, runs: int) -> int:
    """Return the bytes of a result to write; those of the update if it is an argument updated in place."""
    if operation.name not in _IN_PLACE:
        return asked
    return min(asked, _bytes(operation.inputs[_IN_PLACE[operation.name]]) * runs)


def _bytes(operand: Value | Literal) -> int:
    shape = operand.shape if isinstance(operand, Value) else np.shape(operand.val)
    return math.prod(shape) * _dtype(operand).itemsize


def _dtype(operand: Value | Literal) -> Any:
    array: Any = operand if isinstance(operand, Value) else operand.aval
    return array.dtype
