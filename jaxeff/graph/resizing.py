"""Runs a traced program without some of the indices of its inputs, at the sizes that are left.

In: a `Program`, and which indices of each of its inputs stay. `remaining` finds the same for every other value;
each operation then runs on what is left, with the sizes among its parameters rewritten. Numbers in the program
(1/n, 1/sqrt(d)) stay those that it was traced with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxeff.graph.coupling_labels import DATA
from jaxeff.graph.evaluation import apply
from jaxeff.graph.program import Call, Operation, Program, Step, Value, flatten, scan_operands
from jaxeff.graph.remaining import Input, MisfitError, Remaining

Arrays = Sequence[Any]


class Resized:
    """A program at the sizes that are left of its inputs: `resized(arrays) -> arrays`.

    Args:
        program, inputs, outputs, derivative: as `Remaining` takes them.

    Raises:
        MisfitError: what is removed cannot be left out. The message names the operation.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Input],
        outputs: Sequence[Input | None],
        derivative: bool = False,
    ):
        self.program = program
        self.remaining = Remaining(program, inputs, outputs, derivative)
        self._constants = self.remaining.constants(program)

    def __call__(self, arguments: Arrays, scope: str = "") -> list[Any]:
        """The outputs, of inputs of the sizes that are left.

        Args:
            scope: leave this out of the names around operations.
        """
        return self._run(self.program, arguments, scope)

    # --- Running it ------------------------------------------------------------------------------------

    def _run(self, program: Program, arguments: Arrays, scope: str) -> list[Any]:
        """The outputs of the program, or of a body of one of its loops, which stands in a scope."""
        constants = self._constants if program is self.program else self.remaining.constants(program)
        values = {**constants, **dict(zip(program.inputs, arguments, strict=True))}
        return self._steps(program.steps, values, program.outputs, scope)

    def _steps(
        self, steps: Sequence[Step], values: dict[Value, Any], outputs: Sequence[Value | Literal], scope: str
    ) -> list[Any]:
        def read(operand: Value | Literal) -> Any:
            return operand.val if isinstance(operand, Literal) else values[operand]

        for step in steps:
            operation = step.whole if isinstance(step, Call) else step
            operands = [read(operand) for operand in operation.inputs]
            made = self.remaining.made(operation)
            with jax.named_scope(_inside(operation.scope, scope)):
                results = self._results(step, operation, made, operands, values)
            for value, array in zip(made, results, strict=True):
                if jnp.shape(array) != (shape := self.remaining.shape(value)):
                    why = f"of a result of {value.shape}, {shape} should be left, and {jnp.shape(array)} is"
                    raise MisfitError(why, operation)
                values[value] = array
        return [read(output) for output in outputs]

    def _results(
        self, step: Step, operation: Operation, made: list[Value], operands: Arrays, values: dict[Value, Any]
    ) -> Arrays:
        if self.remaining.is_whole(*operation.inputs, *made):
            results = dict(zip(operation.outputs, apply(operation, operands), strict=True))
            return [results[output] for output in made]
        try:
            if isinstance(step, Call):
                return _CALLS[operation.name](self, step, operands, values)
            if operation.name in _WITH_BODIES:
                with operation.context.manager:
                    return _WITH_BODIES[operation.name](self, operation, operands)
            if operation.name == "slice":
                return [self._slice(operation, operands[0])]
            rewritten = _REWRITES.get(operation.name, _unchanged)(self.remaining, operation)
            params = {**operation.params, **rewritten}
            return apply(dataclasses.replace(operation, params=params), operands)
        except MisfitError:
            raise
        except (TypeError, ValueError) as error:
            raise MisfitError(str(error), operation) from error

    def _slice(self, operation: Operation, array: Any) -> Any:
        """What is left of a slice: another slice where that is evenly spaced, else taken one by one."""
        params, kept = operation.params, self.remaining.kept(operation.inputs[0])
        in_blocks = self.remaining.in_blocks(operation.inputs[0])
        strides: Sequence[int] = params["strides"] or (1,) * len(kept)
        starts, ends, steps = list(params["start_indices"]), list(params["limit_indices"]), list(strides)
        chosen: dict[int, np.ndarray] = {}
        for axis, mask in enumerate(kept):
            window = np.arange(starts[axis], ends[axis], steps[axis])
            places = _places(mask, window)
            if any(not np.array_equal(places, _places(block[axis], window)) for block in in_blocks):
                raise MisfitError(
                    "stacked blocks lose elements at other places of a slice in each", operation
                )
            gaps = np.unique(np.diff(places))
            if len(places) and len(gaps) < 2:
                starts[axis], ends[axis] = int(places[0]), int(places[-1]) + 1
                steps[axis] = int(gaps[0]) if len(gaps) else 1
            else:
                starts[axis], ends[axis], steps[axis] = 0, int(mask.sum()), 1
                chosen[axis] = places
        array = jax.lax.slice(array, starts, ends, steps)
        for axis, places in chosen.items():
            array = jnp.take(array, places, axis)
        return array

    # --- Loops and branches ----------------------------------------------------------------------------

    def _scan(self, operation: Operation, operands: Arrays) -> Arrays:
        (body,) = operation.bodies
        count, carried = scan_operands(operation)
        operands = _strong(operands[: count + carried], body.inputs) + list(operands[count + carried :])

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            arguments = [*operands[:count], *carry, *slices]
            results = self._run(body, arguments, operation.scope)
            return _strong(results[:carried], body.inputs[count:]), results[carried:]

        options = {name: operation.params[name] for name in ("length", "reverse", "unroll")}
        if len(operands) > count + carried:
            options["length"] = len(operands[-1])
        carry, stacked = jax.lax.scan(
            step, operands[count : count + carried], operands[count + carried :], **options
        )
        return [*carry, *stacked]

    def _while(self, operation: Operation, operands: Arrays) -> Arrays:
        test, body = operation.bodies
        of_test, of_body = operation.params["cond_nconsts"], operation.params["body_nconsts"]
        for_test, for_body = operands[:of_test], operands[of_test : of_test + of_body]
        carried = body.inputs[of_body:]

        def once(carry: list[Any]) -> list[Any]:
            return _strong(self._run(body, [*for_body, *carry], operation.scope), carried)

        return jax.lax.while_loop(
            lambda carry: self._run(test, [*for_test, *carry], operation.scope)[0],
            once,
            _strong(operands[of_test + of_body :], carried),
        )

    def _cond(self, operation: Operation, operands: Arrays) -> Arrays:
        def branch(body: Program) -> Callable[..., list[Any]]:
            def run(*arguments: Any) -> list[Any]:
                return _strong(self._run(body, arguments, operation.scope), operation.outputs)

            return run

        return jax.lax.switch(operands[0], [branch(body) for body in operation.bodies], *operands[1:])

    # --- Remat and custom derivatives ------------------------------------------------------------------
    #
    # JAX holds a rule as a function of arrays of the original sizes. It is traced at these when something
    # is differentiated, and what comes of that is resized in turn.

    def _body(self, call: Call, values: dict[Value, Any]) -> Callable[..., tuple[Any, ...]]:
        outer = dict(values)  # of the program that the call stands in, which may be a loop's body
        outputs = self.remaining.made(call.whole)

        def run(*arguments: Any) -> tuple[Any, ...]:
            taken = zip(call.whole.inputs, arguments, strict=True)
            own = {operand: array for operand, array in taken if isinstance(operand, Value)}
            return tuple(self._steps(call.steps, {**outer, **own}, outputs, call.whole.scope))

        return run

    def _remat(self, call: Call, operands: Arrays, values: dict[Value, Any]) -> Arrays:
        options = {name: call.whole.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(self._body(call, values), **options)(*operands)

    def _inputs(self, operands: Sequence[Value | Literal]) -> list[Input]:
        found = self.remaining
        return [
            Input(found.kept(one), DATA, blocks=found.in_blocks(one), routed=found.routed(one))
            for one in operands
        ]

    def _custom_jvp(self, call: Call, operands: Arrays, values: dict[Value, Any]) -> Arrays:
        inputs, outputs = call.whole.inputs, self.remaining.made(call.whole)
        moving, moved = _Floating(inputs), _Floating(outputs)
        function = jax.custom_jvp(self._body(call, values))

        def derivative(arguments: Arrays, tangents: Arrays) -> tuple[Any, Any]:
            original = moving.function_of(_original(call, outputs), arguments)
            results, tangents = jax.jvp(original, moving.among(arguments), list(tangents))
            return results, moved.among(tangents)

        @function.defjvp
        def _rule(primals: Arrays, tangents: Arrays) -> tuple[Any, Any]:
            large = list(map(_abstract, inputs))
            program = flatten(jax.make_jaxpr(derivative)(large, moving.among(large)))
            given, asked = [*inputs, *moving.among(inputs)], [*outputs, *moved.among(outputs)]
            resized = Resized(program, self._inputs(given), self._inputs(asked), derivative=True)
            results = resized([*primals, *moving.among(tangents)])
            nothing = [_no_tangent(self.remaining.shape(output)) for output in outputs]
            primal, tangent = results[: len(outputs)], results[len(outputs) :]
            return tuple(primal), tuple(moved.put_into(nothing, tangent))

        return function(*operands)

    def _custom_vjp(self, call: Call, operands: Arrays, values: dict[Value, Any]) -> Arrays:
        inputs, outputs = call.whole.inputs, self.remaining.made(call.whole)
        moving, moved = _Floating(inputs), _Floating(outputs)
        function = jax.custom_vjp(self._body(call, values))
        structures: list[Any] = []

        def forward(arguments: Arrays) -> tuple[Any, list[Any]]:
            original = moving.function_of(_original(call, outputs), arguments)
            results, pull = jax.vjp(original, *moving.among(arguments))
            residuals, structure = jax.tree.flatten(pull)
            structures[:] = [structure]
            return results, residuals

        def backward(residuals: Arrays, cotangents: Arrays) -> Any:
            nothing = [_no_tangent(output.shape) for output in outputs]
            pull = jax.tree.unflatten(structures[0], residuals)
            return pull(tuple(moved.put_into(nothing, cotangents)))

        @functools.cache
        def resized_forward() -> Resized:
            program = flatten(jax.make_jaxpr(forward)(list(map(_abstract, inputs))))
            free: list[Input | None] = [None] * (len(program.outputs) - len(outputs))
            return Resized(program, self._inputs(inputs), [*self._inputs(outputs), *free], derivative=True)

        def run_forward(*arguments: Any) -> tuple[Any, Any]:
            results = resized_forward()(arguments)
            return tuple(results[: len(outputs)]), results[len(outputs) :]

        def run_backward(residuals: Arrays, cotangents: Arrays) -> tuple[Any, ...]:
            before = resized_forward()
            held, pulled = before.program.outputs[len(outputs) :], moved.among(outputs)
            program = flatten(
                jax.make_jaxpr(backward)(list(map(_abstract, held)), list(map(_abstract, pulled)))
            )
            given = [*before._inputs(held), *self._inputs(pulled)]
            resized = Resized(program, given, self._inputs(moving.among(inputs)), derivative=True)
            results = resized([*residuals, *moved.among(cotangents)])
            return tuple(moving.put_into([None] * len(inputs), results))

        _ = function.defvjp(run_forward, run_backward)
        return function(*operands)


class _Floating:
    """Which of some operands can be differentiated: those that are floating."""

    def __init__(self, operands: Sequence[Value | Literal]):
        dtypes = [_abstract(operand).dtype for operand in operands]
        self.places = [i for i, dtype in enumerate(dtypes) if jnp.issubdtype(dtype, jnp.inexact)]

    def among(self, every: Sequence[Any]) -> list[Any]:
        return [every[place] for place in self.places]

    def put_into(self, every: Sequence[Any], floating: Arrays) -> list[Any]:
        changed = list(every)
        for place, array in zip(self.places, floating, strict=True):
            changed[place] = array
        return changed

    def function_of(self, function: Callable[[Arrays], Any], arguments: Arrays) -> Callable[..., Any]:
        """The function of its floating arguments alone."""
        return lambda *floating: function(self.put_into(arguments, floating))


def _original(call: Call, wanted: Sequence[Value]) -> Callable[[Arrays], tuple[Any, ...]]:
    """A call whole, at its original sizes."""

    def run(arguments: Arrays) -> tuple[Any, ...]:
        results = dict(zip(call.whole.outputs, apply(call.whole, arguments), strict=True))
        return tuple(results[output] for output in wanted)

    return run


def _no_tangent(shape: Sequence[int]) -> np.ndarray:
    """The tangent of whole numbers."""
    return np.zeros(shape, jax.dtypes.float0)


def _places(mask: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Where indices that are taken stand among those that stay."""
    return (np.cumsum(mask) - 1)[taken[mask[taken]]]


def _strong(arrays: Arrays, values: Sequence[Value]) -> list[Any]:
    """Arrays of exactly the dtypes that a loop carries: what a literal is made into has a weak one."""
    return [
        array
        if jnp.issubdtype(jnp.result_type(array), jax.dtypes.extended)
        else jnp.asarray(array, value.dtype)
        for array, value in zip(arrays, values, strict=False)
    ]


def _abstract(operand: Value | Literal) -> jax.ShapeDtypeStruct:
    if isinstance(operand, Literal):
        return jax.ShapeDtypeStruct(np.shape(operand.val), jnp.result_type(operand.val))
    return jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=operand.sharding)


def _inside(scope: str, outer: str) -> str:
    """A scope as it is called within an outer one."""
    return scope.removeprefix(outer).removeprefix("/") if outer else scope


# --- Sizes among the parameters of primitives ----------------------------------------------------------

Rewrite = Callable[[Remaining, Operation], Mapping[str, Any]]
"""The parameters that change, of an operation of which not all remains."""


def _unchanged(remaining: Remaining, operation: Operation) -> Mapping[str, Any]:
    return {}


def _shape_of_output(name: str) -> Rewrite:
    return lambda remaining, operation: {name: remaining.shape(operation.outputs[0])}


def _split(remaining: Remaining, operation: Operation) -> Mapping[str, Any]:
    axis = operation.params["axis"]
    return {"sizes": tuple(remaining.shape(output)[axis] for output in operation.outputs)}


def _gather(remaining: Remaining, operation: Operation) -> Mapping[str, Any]:
    """What is taken whole is taken whole; of all else no index goes."""
    sizes = zip(operation.params["slice_sizes"], remaining.kept(operation.inputs[0]), strict=True)
    return {"slice_sizes": tuple(int(mask.sum()) if size == len(mask) else size for size, mask in sizes)}


def _convolution(remaining: Remaining, operation: Operation) -> Mapping[str, Any]:
    numbers = operation.params["dimension_numbers"]
    data, kernel = map(remaining.shape, operation.inputs)
    return {"feature_group_count": data[numbers.lhs_spec[1]] // kernel[numbers.rhs_spec[1]]}


def _tile(remaining: Remaining, operation: Operation) -> Mapping[str, Any]:
    """Whole copies go, and the same elements of every copy that stays, since copies have a label of their own."""
    before, after = map(remaining.shape, (operation.inputs[0], operation.outputs[0]))
    return {"reps": tuple(size // max(each, 1) for each, size in zip(before, after, strict=True))}


_REWRITES: Mapping[str, Rewrite] = {
    "broadcast_in_dim": _shape_of_output("shape"),
    "conv_general_dilated": _convolution,
    "dynamic_slice": _shape_of_output("slice_sizes"),
    "empty": _shape_of_output("shape"),
    "gather": _gather,
    "iota": _shape_of_output("shape"),
    "reshape": _shape_of_output("new_sizes"),
    "split": _split,
    "tile": _tile,
}
_WITH_BODIES = {"scan": Resized._scan, "while": Resized._while, "cond": Resized._cond}
_CALLS = {
    "checkpoint": Resized._remat,
    "remat2": Resized._remat,
    "custom_jvp_call": Resized._custom_jvp,
    "custom_vjp_call": Resized._custom_vjp,
    "custom_vjp_call_jaxpr": Resized._custom_vjp,
}
