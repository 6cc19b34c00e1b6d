"""Runs a program, and reduces chosen values as soon as they exist.

In: a `Program`, its arguments, and what to look at. Out: the program's outputs and what was seen.
Inside a loop the reductions run in the loop's body, so that a scan over layers or time never keeps
its activations. Imports `program`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from jaxeff.graph.program import Operation, Program, Value, scan_operands


@dataclasses.dataclass(frozen=True)
class Observers:
    """What to look at, and what to keep of it.

    Attributes:
        reductions: for each value a function of its array, which returns a tree of arrays.
        add: joins what two iterations of a `while` returned. Zeros are its neutral element.
    """

    reductions: Mapping[Value, Callable[[Any], Any]]
    add: Callable[[Any, Any], Any]


Observed = dict[Value, Any]
"""What was seen. A scan's body adds a leading axis, the iteration; a `while` adds its iterations up;
a branch not taken gives zeros."""


def evaluate(program: Program, arguments: Sequence[Any], observers: Observers) -> tuple[list[Any], Observed]:
    """Run the program under observation.

    Args:
        program: from `flatten`.
        arguments: one array for each of `program.inputs`.
        observers: what they return is kept; the values themselves are not, so that XLA frees them.

    Returns:
        One array for each of `program.outputs`, and what was seen of each value looked at.
    """
    values: dict[Value, Any] = dict(program.constants)
    observed: Observed = {}

    def read(operand: Value | Literal) -> Any:
        return operand.val if isinstance(operand, Literal) else values[operand]

    def write(value: Value, array: Any) -> None:
        if value in observers.reductions:
            # Made once: XLA would repeat a gelu in front of each of the reductions that look at it.
            array = jax.lax.optimization_barrier(array)
            observed[value] = observers.reductions[value](array)
        values[value] = array

    for value, array in zip(program.inputs, arguments, strict=True):
        write(value, array)
    for operation in program.operations:
        operands = [read(operand) for operand in operation.inputs]
        if any(_watched(body, observers) for body in operation.bodies):
            results, inside = _LOOPS[operation.name](operation, operands, observers)
            observed.update(inside)
        else:
            results = _apply(operation, operands)
        for value, array in zip(operation.outputs, results, strict=True):
            write(value, array)
    return [read(output) for output in program.outputs], observed


def _apply(operation: Operation, operands: list[Any]) -> list[Any]:
    # Some primitives (custom derivatives) are bound with their callees as functions before the operands;
    # older JAX returns the pair, newer JAX folds them into the parameters.
    bound = operation.primitive.get_bind_params(operation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with operation.context.manager:
        results = operation.primitive.bind(*functions, *operands, **params)
    return list(results) if operation.primitive.multiple_results else [results]


def _watched(program: Program, observers: Observers) -> bool:
    return any(value in observers.reductions for value in program.inputs) or any(
        any(value in observers.reductions for value in operation.outputs)
        or any(_watched(body, observers) for body in operation.bodies)
        for operation in program.operations
    )


def _scan(operation: Operation, operands: list[Any], observers: Observers) -> tuple[list[Any], Observed]:
    (body,) = operation.bodies
    params = operation.params
    count, carried = scan_operands(operation)
    constants, carry, scanned = (
        operands[:count],
        operands[count : count + carried],
        operands[count + carried :],
    )
    keys: list[Value] = []

    def step(carry: list[Any], element: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        results, observed = evaluate(body, [*constants, *carry, *element], observers)
        keys[:] = observed
        return results[: len(carry)], (results[len(carry) :], list(observed.values()))

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, seen) = jax.lax.scan(step, carry, scanned, **options)
    return [*carry, *stacked], dict(zip(keys, seen, strict=True))


def _while(operation: Operation, operands: list[Any], observers: Observers) -> tuple[list[Any], Observed]:
    body = operation.bodies[1]
    params = operation.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition = jaxpr_as_fun(params["cond_jaxpr"])
    keys: list[Value] = []

    def once(carry: list[Any]) -> tuple[list[Any], list[Any]]:
        results, observed = evaluate(body, [*operands[split[0] : split[1]], *carry], observers)
        keys[:] = observed
        return results, list(observed.values())

    def step(state: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        carry, seen = state
        results, new = once(carry)
        return results, [observers.add(a, b) for a, b in zip(seen, new, strict=True)]

    carry = operands[split[1] :]
    nothing = _zeros(jax.eval_shape(once, carry)[1])
    carry, seen = jax.lax.while_loop(
        lambda state: condition(*operands[: split[0]], *state[0])[0], step, (carry, nothing)
    )
    return carry, dict(zip(keys, seen, strict=True))


def _cond(operation: Operation, operands: list[Any], observers: Observers) -> tuple[list[Any], Observed]:
    index, *arguments = operands
    shapes: Observed = {}
    for body in operation.bodies:
        shapes.update(_shapes(body, arguments, observers))

    def branch(body: Program) -> Callable[..., tuple[list[Any], list[Any]]]:
        def run(*arguments: Any) -> tuple[list[Any], list[Any]]:
            results, observed = evaluate(body, arguments, observers)
            return results, [observed[key] if key in observed else _zeros(shapes[key]) for key in shapes]

        return run

    results, seen = jax.lax.switch(index, [branch(body) for body in operation.bodies], *arguments)
    return results, dict(zip(shapes, seen, strict=True))


def _shapes(body: Program, arguments: Sequence[Any], observers: Observers) -> Observed:
    keys: list[Value] = []

    def run(*arguments: Any) -> list[Any]:
        _, observed = evaluate(body, arguments, observers)
        keys[:] = observed
        return list(observed.values())

    return dict(zip(keys, jax.eval_shape(run, *arguments), strict=True))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
