"""Runs a program, and reduces chosen values as soon as they exist.

The result is the program's outputs and the observed reductions. Inside a loop the reductions run in the loop's
body, so that a scan over layers or time never keeps its activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, reshard

from jaxeff.graph.program import Call, Operation, Program, Step, Value, operations_of, scan_operands

Read = Callable[[Value | Literal], Any]
"""Reads any earlier array of the same program, by its value."""

Rule = Callable[[list[Any], Read], list[Any]]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to do in addition to running the program.

    Attributes:
        reductions: for each value a function of its array, which returns a tree of arrays to keep.
        add: joins the results of two iterations of a `while`. Zeros are its neutral element.
        rules: what to run in place of an operation: `rule(operands, read) -> results`.
        gates: for each value a function of its array and of the gate passed to `evaluate` for it, which returns the
            array that the rest of the program sees.
        readings: for each operation a function of its operands and of what reads earlier arrays, which returns a tree
            of arrays to keep, observed as that of its first output.
    """

    reductions: Mapping[Value, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    add: Callable[[Any, Any], Any] = lambda first, second: jax.tree.map(jnp.add, first, second)
    rules: Mapping[Operation, Rule] = dataclasses.field(default_factory=dict)
    gates: Mapping[Value, Callable[[Any, Any], Any]] = dataclasses.field(default_factory=dict)
    readings: Mapping[Operation, Callable[[list[Any], Read], Any]] = dataclasses.field(default_factory=dict)

    def touch(self, program: Program) -> bool:
        """Return whether anything is to be done inside the program or the bodies of its loops."""
        return any(map(self._concerns, program.inputs)) or any(
            any(map(self._concerns, operation.outputs)) or self._change(operation)
            for operation in program.operations
        )

    def enter(self, call: Call) -> bool:
        """Return whether anything is to be done inside the call, so that it cannot be run whole."""
        return any(
            self._change(operation)
            or any(self._concerns(output) for output in operation.outputs if output not in call.whole.outputs)
            for operation in operations_of(call.steps)
        )

    def _change(self, operation: Operation) -> bool:
        own = operation in self.rules or operation in self.readings
        return own or any(map(self.touch, operation.bodies))

    def _concerns(self, value: Value) -> bool:
        return value in self.reductions or value in self.gates


Observed = dict[Value, Any]
"""Observations by value. A scan's body adds a leading axis, the iteration; a `while` adds its iterations up;
a branch not taken gives zeros.
"""

Gates = Mapping[Value, Any]
"""Trees of arrays, by the value that they gate; inside a scan, with the iteration as leading axis."""


def evaluate(
    program: Program, arguments: Sequence[Any], hooks: Hooks, gates: Gates | None = None
) -> tuple[list[Any], Observed]:
    """Run the program under observation.

    Args:
        program: from `flatten`.
        arguments: one array for each of `program.inputs`.
        hooks: the results of its reductions are kept; the values themselves are not, so that XLA frees them.
        gates: one for each value of `hooks.gates`.

    Returns:
        One array for each of `program.outputs`, and the observations of each value.
    """
    values: dict[Value, Any] = dict(program.constants)
    observed: Observed = {}
    gates = gates or {}

    def read(operand: Value | Literal) -> Any:
        return operand.val if isinstance(operand, Literal) else values[operand]

    def write(value: Value, array: Any) -> None:
        if value in hooks.gates:
            array = _at_home(hooks.gates[value], array, gates[value])
        if value in hooks.reductions:
            # Made once, since XLA would repeat a gelu before each reduction that reads it.
            array = jax.lax.optimization_barrier(array)
            observed[value] = _brought_out(_at_home(hooks.reductions[value], array))
        values[value] = array

    for value, array in zip(program.inputs, arguments, strict=True):
        write(value, array)
    for operation in _chosen(program.steps, hooks):
        operands = [read(operand) for operand in operation.inputs]
        if operation in hooks.readings:
            observed[operation.outputs[0]] = hooks.readings[operation](operands, read)
        if operation in hooks.rules:
            with operation.context.manager:
                results = hooks.rules[operation](operands, read)
        elif any(map(hooks.touch, operation.bodies)):
            results, inside = _LOOPS[operation.name](operation, operands, hooks, gates)
            observed.update(inside)
        else:
            results = apply(operation, operands)
        for value, array in zip(operation.outputs, results, strict=True):
            write(value, array)
    return [read(output) for output in program.outputs], observed


def _chosen(steps: Sequence[Step], hooks: Hooks) -> Iterator[Operation]:
    """Return the operations to run: calls whole, with their own derivative rule, if nothing inside is requested."""
    for step in steps:
        if not isinstance(step, Call):
            yield step
        elif hooks.enter(step):
            yield from _chosen(step.steps, hooks)
        else:
            yield step.whole


def apply(operation: Operation, operands: Sequence[Any]) -> list[Any]:
    """Run one operation unchanged."""
    # Some primitives (custom derivatives) are bound with their callees as functions before the operands;
    # older JAX returns the pair, newer JAX folds them into the parameters.
    bound = operation.primitive.get_bind_params(operation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with operation.context.manager:
        results = operation.primitive.bind(*functions, *operands, **params)
    return list(results) if operation.primitive.multiple_results else [results]


def _at_home(function: Callable[..., Any], array: Any, *others: Any) -> Any:
    """Run function(array, *others) under the array's own mesh, as parts of a program may run under `auto_axes`."""
    mesh, around = jax.typeof(array).sharding.mesh, jax.sharding.get_abstract_mesh()
    if mesh.empty or around.empty or mesh == around:
        return function(array, *others)
    with jax.sharding.use_abstract_mesh(mesh):
        return function(array, *on_mesh(mesh, others))


def _brought_out(results: Any) -> Any:
    """Return arrays made under another mesh as arrays of the surrounding mesh."""
    return on_mesh(jax.sharding.get_abstract_mesh(), results)


def on_mesh(mesh: AbstractMesh, tree: Any) -> Any:
    """Return arrays of another mesh, whole on every device of this one."""

    def on(leaf: Any) -> Any:
        own = jax.typeof(leaf).sharding.mesh
        alike = mesh.empty or own.empty or own == mesh
        return leaf if alike else reshard(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(on, tree)


def _scan(
    operation: Operation, operands: list[Any], hooks: Hooks, gates: Gates
) -> tuple[list[Any], Observed]:
    (body,) = operation.bodies
    params = operation.params
    count, carried = scan_operands(operation)
    constants, carry, scanned = (
        operands[:count],
        operands[count : count + carried],
        operands[count + carried :],
    )
    inside = [value for value in gates if value in _values(body)]
    keys: list[Value] = []

    def step(carry: list[Any], element: tuple[list[Any], list[Any]]) -> tuple[list[Any], Any]:
        slices, own = element
        own_gates = dict(zip(inside, own, strict=True))
        results, observed = evaluate(body, [*constants, *carry, *slices], hooks, own_gates)
        keys[:] = observed
        return results[: len(carry)], (results[len(carry) :], list(observed.values()))

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    elements = scanned, [gates[value] for value in inside]
    carry, (stacked, seen) = jax.lax.scan(step, carry, elements, **options)
    return [*carry, *stacked], dict(zip(keys, seen, strict=True))


def _values(program: Program) -> set[Value]:
    """Return all values that the program or the bodies of its loops make or take."""
    own = {value for operation in program.operations for value in operation.outputs} | set(program.inputs)
    bodies = [body for operation in program.operations for body in operation.bodies]
    return own.union(*map(_values, bodies))


def _while(
    operation: Operation, operands: list[Any], hooks: Hooks, gates: Gates
) -> tuple[list[Any], Observed]:
    body = operation.bodies[1]
    params = operation.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition = jaxpr_as_fun(params["cond_jaxpr"])
    keys: list[Value] = []

    def once(carry: list[Any]) -> tuple[list[Any], list[Any]]:
        results, observed = evaluate(body, [*operands[split[0] : split[1]], *carry], hooks, gates)
        keys[:] = observed
        return results, list(observed.values())

    def step(state: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        carry, seen = state
        results, new = once(carry)
        return results, [hooks.add(a, b) for a, b in zip(seen, new, strict=True)]

    carry = operands[split[1] :]
    nothing = _zeros(jax.eval_shape(once, carry)[1])
    carry, seen = jax.lax.while_loop(
        lambda state: condition(*operands[: split[0]], *state[0])[0], step, (carry, nothing)
    )
    return carry, dict(zip(keys, seen, strict=True))


def _cond(
    operation: Operation, operands: list[Any], hooks: Hooks, gates: Gates
) -> tuple[list[Any], Observed]:
    index, *arguments = operands
    shapes: Observed = {}
    for body in operation.bodies:
        shapes.update(_shapes(body, arguments, hooks, gates))

    def branch(body: Program) -> Callable[..., tuple[list[Any], list[Any]]]:
        def run(*arguments: Any) -> tuple[list[Any], list[Any]]:
            results, observed = evaluate(body, arguments, hooks, gates)
            return results, [observed[key] if key in observed else _zeros(shapes[key]) for key in shapes]

        return run

    results, seen = jax.lax.switch(index, [branch(body) for body in operation.bodies], *arguments)
    return results, dict(zip(shapes, seen, strict=True))


def _shapes(body: Program, arguments: Sequence[Any], hooks: Hooks, gates: Gates) -> Observed:
    keys: list[Value] = []

    def run(*arguments: Any) -> list[Any]:
        _, observed = evaluate(body, arguments, hooks, gates)
        keys[:] = observed
        return list(observed.values())

    return dict(zip(keys, jax.eval_shape(run, *arguments), strict=True))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
