"""Describes every value of a program, operation by operation, also inside the bodies of its loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxeff.graph.coupling_labels import (
    ANY,
    CONSTANT,
    DATA,
    DEPTH,
    FRACTION,
    NONNEGATIVE,
    NOTHING,
    ROUTED,
    UNIFORM,
    UNKNOWN,
    WEIGHT,
    Described,
    Dim,
    Labels,
)
from jaxeff.graph.coupling_routing import settle
from jaxeff.graph.coupling_rules import through
from jaxeff.graph.coupling_skips import skipped_by_zeros
from jaxeff.graph.coupling_stacks import Seen
from jaxeff.graph.program import Operation, Program, Value, scan_operands

_ITERATIONS = "the iterations of a scan"


class Walk:
    """Describes the values of a program, operation by operation.

    Attributes:
        described: every value so far, also inside the bodies of loops.
        iterations: scans, with the labels of the blocks that each goes through.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self.seen = Seen([], [])
        self.described: dict[Value, Described] = {}
        self.iterations: list[tuple[Operation, np.ndarray]] = []
        self._constants: dict[Value, Any] = {}
        self._iterations: tuple[np.ndarray, ...] = ()

    def run(self, program: Program, inputs: Sequence[Described]) -> list[Described]:
        self.described.update(zip(program.inputs, inputs, strict=True))
        self._constants.update(program.constants)
        self._see(inputs)
        around = self.labels.during
        for operation in program.operations:
            self.labels.during = operation
            operands, locked = [self._read(operand) for operand in operation.inputs], len(self.labels.locks)
            results = self._step(operation, operands)
            self._see(results)
            if operation.name not in _LOOPS:
                dims = [dim for described in (*operands, *results) for dim in described.dims]
                new = (lock for lock in self.labels.locks[locked:] if lock.only != ROUTED)
                self.seen.locked.extend((dims, lock.labels) for lock in new)
            self.described.update(zip(operation.outputs, results, strict=True))
        self.labels.during = around
        return [self._read(output) for output in program.outputs]

    def _read(self, operand: Value | Literal) -> Described:
        if isinstance(operand, Literal):
            return self._constant(operand.val)
        if operand not in self.described:
            # Here, and not at first, so that what it locks names the operation that reads it.
            self.described[operand] = self._constant(self._constants[operand])
        return self.described[operand]

    def _see(self, arrays: Sequence[Described]) -> None:
        # What is the same all along an axis is so in every block.
        kept = (described.dims for described in arrays if described.made_of != CONSTANT)
        self.seen.arrays.extend((dims, self._iterations) for dims in kept)

    def _constant(self, constant: Any) -> Described:
        shape = np.shape(constant)
        if isinstance(constant, (int, float)):
            return Described((), CONSTANT, constant == 0, _sign(np.asarray(constant)))
        kind = getattr(constant, "dtype", None)
        numeric = kind is not None and (jnp.issubdtype(kind, np.number) or jnp.issubdtype(kind, bool))
        if isinstance(constant, Tracer) or not numeric:
            dims = tuple(self.labels.dim(size, False, "an array that is no number") for size in shape)
            return Described(dims, CONSTANT, False)
        array = np.asarray(constant)
        zero = not array.any()
        dims = []
        for axis, size in enumerate(shape):
            uniform = size < 2 or bool((array == array.take([0], axis)).all())
            dim = self.labels.dim(size, zero, None if uniform else "a constant array")
            dims.append(dim._replace(unrouted=NOTHING if zero else UNIFORM if uniform else UNKNOWN))
        return Described(tuple(dims), CONSTANT, zero, _sign(array))

    def _step(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        if operation.name in _LOOPS:
            return _LOOPS[operation.name](self, operation, inputs)
        return through(self.labels, operation, inputs)

    def scan(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        constants, carried = scan_operands(operation)
        initial, stacked = inputs[constants : constants + carried], inputs[constants + carried :]
        if not all(operand.made_of == WEIGHT for operand in stacked) or not skipped_by_zeros(operation):
            self.labels.lock_dims([operand.dims[0] for operand in stacked], _ITERATIONS, DEPTH)
        time = self._iterated([operand.dims[0] for operand in stacked if operand.made_of == WEIGHT])
        time = time or self.labels.dim(int(operation.params["length"]), False, _ITERATIONS)
        slices = [operand._replace(dims=operand.dims[1:]) for operand in stacked]

        def body(carry: Sequence[Described]) -> list[Described]:
            return self.run(operation.bodies[0], [*inputs[:constants], *carry, *slices])

        outside = self._iterations
        if len(time.factors) == 1:
            self.iterations.append((operation, time.factors[0]))
            self._iterations = (*outside, time.factors[0])
        ends, results = self._repeated(body, initial)
        self._iterations = outside
        time = time._replace(zero=False, unrouted=UNKNOWN)
        return ends + [result._replace(dims=(time, *result.dims)) for result in results[carried:]]

    def _iterated(self, leading: Sequence[Dim]) -> Dim | None:
        """The dimension that a scan goes along, of all weights that it takes apart."""
        return functools.reduce(self.labels.match, leading) if leading else None

    def loop(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        test, body = operation.bodies
        for_test, for_body = operation.params["cond_nconsts"], operation.params["body_nconsts"]
        initial = inputs[for_test + for_body :]

        def once(carry: Sequence[Described]) -> list[Described]:
            _ = self.run(test, [*inputs[:for_test], *carry])
            return self.run(body, [*inputs[for_test : for_test + for_body], *carry])

        return self._repeated(once, initial)[0]

    def _repeated(
        self, body: Callable[[Sequence[Described]], list[Described]], initial: Sequence[Described]
    ) -> tuple[list[Described], list[Described]]:
        """Return the final carry of a loop, and everything that its body returns.

        What it carries is 0 somewhere if it is so at first, and each iteration leaves it so.
        """
        carry = [self._carried(operand)._replace(made_of=DATA) for operand in initial]
        while True:
            results = body(carry)
            ends = self._tied(carry, results[: len(carry)])
            if list(map(_zeros, ends)) == list(map(_zeros, carry)):
                return ends, results
            carry = ends

    def branches(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        _ = settle(self.labels, inputs[0])
        first, *others = [self.run(body, inputs[1:]) for body in operation.bodies]
        first = list(map(self._carried, first))
        for other in others:
            first = self._tied(first, other)
        return [described._replace(made_of=max(described.made_of, inputs[0].made_of)) for described in first]

    def _carried(self, described: Described) -> Described:
        """An array in whose place another may stand, of which it is not known what experts leave in it."""
        dims = tuple(dim._replace(unrouted=UNKNOWN) for dim in described.dims)
        return Described(dims, settle(self.labels, described).made_of, described.zero)

    def _tied(self, ones: Sequence[Described], others: Sequence[Described]) -> list[Described]:
        """Arrays of which either may stand in the same place."""
        others = list(map(self._carried, others))
        return [
            Described(
                tuple(
                    self.labels.match(a, b)._replace(zero=a.zero and b.zero)
                    for a, b in zip(one.dims, other.dims, strict=True)
                ),
                max(one.made_of, other.made_of),
                one.zero and other.zero,
            )
            for one, other in zip(ones, others, strict=True)
        ]


def _sign(array: np.ndarray) -> int:
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or not ((array >= 0) | (array == -np.inf)).all():
        return ANY
    return FRACTION if (array <= 1).all() else NONNEGATIVE


def _zeros(described: Described) -> tuple[bool, ...]:
    """Where it is 0: everywhere, and where labels of each dimension are removed."""
    return (described.zero, *(dim.zero for dim in described.dims))


_LOOPS = {"scan": Walk.scan, "while": Walk.loop, "cond": Walk.branches}
