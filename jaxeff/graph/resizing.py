"""Runs a traced program without some of the indices of its inputs, at the sizes that are left.

In: a `Program`, and of each of its inputs which indices stay. `coupling` says of every value which indices go
with them; each operation is then run on what is left, with the sizes among its parameters rewritten.
Numbers in the program (1/n, 1/sqrt(d)) stay those that it was traced with. Imports `coupling`, `evaluation`,
`labels`, `program`, `rules`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import source_info_util
from jax.extend.core import Literal

from jaxeff.graph.coupling import INPUT, OUTPUT, Walk, resolved
from jaxeff.graph.evaluation import apply
from jaxeff.graph.labels import Labels
from jaxeff.graph.program import Call, Operation, Program, Step, Value, flatten, scan_operands
from jaxeff.graph.rules import DATA, REPLAY, SCALE, STATISTICS, WEIGHT, Described

Kept = tuple[np.ndarray, ...]
"""Of each dimension of an array, which indices stay: boolean."""

Arrays = Sequence[Any]


class MisfitError(ValueError):
    """The program does not run at these sizes.

    Args:
        why: what does not fit.
        operation: which asks for it.
    """

    def __init__(self, why: str, operation: Operation | None = None):
        super().__init__(f"the program does not run without what is removed: {why}{_place(operation)}")


class Input(NamedTuple):
    """An input of a program that is to be resized.

    Attributes:
        kept: which indices stay.
        made_of: as `Described` has it: DATA or WEIGHT.
        lock: why all of them have to; None where they need not.
        name: in messages.
    """

    kept: Kept
    made_of: int
    lock: str | None = None
    name: str = "an input"

    @classmethod
    def of_data(cls, shape: Sequence[int]) -> Input:
        return cls(whole(shape), DATA, INPUT)

    @classmethod
    def of_weights(cls, kept: Kept, path: str) -> Input:
        return cls(kept, WEIGHT, None, repr(path))


def whole(shape: Sequence[int]) -> Kept:
    return tuple(np.ones(size, bool) for size in shape)


class Resized:
    """A program at the sizes that are left of its inputs: `resized(arrays) -> arrays`.

    Args:
        program: traced at its original sizes.
        inputs: one for each of the program's.
        outputs: of each of the program's outputs which indices stay; None where the program says so.
        derivative: whether the program is a derivative of another that is replayed. What is removed then has
            no influence, and a sum may leave it out.

    Raises:
        MisfitError: what is removed cannot be left out. The message names the operation.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Input],
        outputs: Sequence[Kept | None],
        derivative: bool = False,
    ):
        self.program = program
        allowed = frozenset({SCALE, REPLAY, STATISTICS} if derivative else {SCALE, REPLAY})
        labelled = _Labelled(Labels(allowed), inputs)
        walk = Walk(labelled.labels)
        labelled.tie(walk.run(program, labelled.inputs), outputs)
        self._described, self._gone = walk.described, labelled.gone()
        self._known: dict[Value, Kept] = {}
        for lock in labelled.labels.locks:
            if self._gone[lock.labels].any():
                raise MisfitError(lock.reason, lock.during)
        if found := labelled.tied_to_what_stays(self._gone):
            why = f"axis {found[1]} of {found[0]} is tied to indices that stay"
            raise MisfitError(why, _first_to_tie(program, inputs, allowed))
        constants = {value: array for value, array in program.constants.items() if value in self._described}
        self._constants = {value: self._cut(value, array) for value, array in constants.items()}

    def __call__(self, arguments: Arrays, scope: str = "") -> list[Any]:
        """The outputs, of inputs of the sizes that are left.

        Args:
            scope: leave this out of the names around operations.
        """
        return self._run(self.program, arguments, scope)

    def kept(self, operand: Value | Literal) -> Kept:
        """Which indices of a value stay."""
        if isinstance(operand, Literal):
            return whole(np.shape(operand.val))
        if operand not in self._known:
            masks = []
            for dim, size in zip(self._described[operand].dims, operand.shape, strict=True):
                mask = np.ones(1 if dim.factors else size, bool)
                for factor in dim.factors:
                    mask = np.logical_and.outer(mask, ~self._gone[factor]).ravel()
                masks.append(mask)
            self._known[operand] = tuple(masks)
        return self._known[operand]

    def shape(self, operand: Value | Literal) -> tuple[int, ...]:
        return tuple(int(mask.sum()) for mask in self.kept(operand))

    def is_whole(self, *operands: Value | Literal) -> bool:
        return all(mask.all() for operand in operands for mask in self.kept(operand))

    def made(self, operation: Operation) -> list[Value]:
        """The outputs of an operation that the program has use for."""
        return [output for output in operation.outputs if output in self._described]

    def _cut(self, value: Value, array: Any) -> Any:
        if self.is_whole(value):
            return array
        array = array if isinstance(array, Tracer) else np.asarray(array)
        for axis, mask in enumerate(self.kept(value)):
            array = array if mask.all() else array.take(np.flatnonzero(mask), axis)
        return array

    # --- Running it ------------------------------------------------------------------------------------

    def _run(self, program: Program, arguments: Arrays, scope: str) -> list[Any]:
        """The outputs of the program, or of a body of one of its loops, which stands in a scope."""
        constants = self._constants
        if program is not self.program:
            found = program.constants.items()
            constants = {value: self._cut(value, array) for value, array in found if value in self._described}
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
            made = self.made(operation)
            with jax.named_scope(_inside(operation.scope, scope)):
                results = self._results(step, operation, made, operands, values)
            for value, array in zip(made, results, strict=True):
                if jnp.shape(array) != self.shape(value):
                    raise MisfitError(
                        f"a result of shape {value.shape} should be left with {self.shape(value)}, and has "
                        f"{jnp.shape(array)}",
                        operation,
                    )
                values[value] = array
        return [read(output) for output in outputs]

    def _results(
        self, step: Step, operation: Operation, made: list[Value], operands: Arrays, values: dict[Value, Any]
    ) -> Arrays:
        if self.is_whole(*operation.inputs, *made):
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
            rewritten = _REWRITES.get(operation.name, _unchanged)(self, operation)
            params = {**operation.params, **rewritten}
            return apply(dataclasses.replace(operation, params=params), operands)
        except MisfitError:
            raise
        except (TypeError, ValueError) as error:
            raise MisfitError(str(error), operation) from error

    def _slice(self, operation: Operation, array: Any) -> Any:
        """What is left of a slice: another slice where that is evenly spaced, else taken one by one."""
        params, kept = operation.params, self.kept(operation.inputs[0])
        strides = params["strides"] or (1,) * len(kept)
        starts, ends, steps = list(params["start_indices"]), list(params["limit_indices"]), list(strides)
        chosen = {}
        for axis, mask in enumerate(kept):
            taken = np.arange(starts[axis], ends[axis], steps[axis])
            places = (np.cumsum(mask) - 1)[taken[mask[taken]]]
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

    # --- Custom derivatives ----------------------------------------------------------------------------
    #
    # JAX holds a rule as a function of arrays of the original sizes. It is traced at these when something
    # is differentiated, and what comes of that is resized in turn.

    def _body(self, call: Call, values: dict[Value, Any]) -> Callable[..., tuple[Any, ...]]:
        constants = {value: values[value] for value in self._constants}
        outputs = self.made(call.whole)

        def run(*arguments: Any) -> tuple[Any, ...]:
            taken = zip(call.whole.inputs, arguments, strict=True)
            own = {operand: array for operand, array in taken if isinstance(operand, Value)}
            return tuple(self._steps(call.steps, {**constants, **own}, outputs, call.whole.scope))

        return run

    def _original(self, call: Call, floats: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
        """The call at its original sizes, its floating arguments first: what is to be differentiated."""
        outputs = [output in self._described for output in call.whole.outputs]

        def run(floating: Arrays, arguments: Arrays) -> tuple[Any, ...]:
            mixed = list(arguments)
            for place, array in zip(floats, floating, strict=True):
                mixed[place] = array
            results = apply(call.whole, mixed)
            return tuple(result for result, wanted in zip(results, outputs, strict=True) if wanted)

        return run

    def _inputs(self, operands: Sequence[Value | Literal]) -> list[Input]:
        return [Input(self.kept(operand), DATA) for operand in operands]

    def _custom_jvp(self, call: Call, operands: Arrays, values: dict[Value, Any]) -> Arrays:
        inputs, outputs = call.whole.inputs, [self.kept(output) for output in self.made(call.whole)]
        floats, original = _floats(inputs), self._original(call, _floats(inputs))
        function = jax.custom_jvp(self._body(call, values))

        def derivative(arguments: Arrays, tangents: Arrays) -> tuple[Any, Any]:
            some = [arguments[place] for place in floats]
            return jax.jvp(lambda *some: original(some, arguments), some, list(tangents))

        @function.defjvp
        def _rule(primals: Arrays, tangents: Arrays) -> tuple[Any, Any]:
            large = [_abstract(operand) for operand in inputs]
            program = flatten(jax.make_jaxpr(derivative)(large, [large[place] for place in floats]))
            given = self._inputs([*inputs, *(inputs[place] for place in floats)])
            resized = Resized(program, given, outputs * 2, derivative=True)
            results = resized([*primals, *(tangents[place] for place in floats)])
            return tuple(results[: len(outputs)]), tuple(results[len(outputs) :])

        return function(*operands)

    def _custom_vjp(self, call: Call, operands: Arrays, values: dict[Value, Any]) -> Arrays:
        inputs, made = call.whole.inputs, self.made(call.whole)
        outputs = [self.kept(output) for output in made]
        floats, original = _floats(inputs), self._original(call, _floats(inputs))
        function = jax.custom_vjp(self._body(call, values))
        pulling: list[Any] = []

        def forward(arguments: Arrays) -> tuple[Any, list[Any]]:
            some = [arguments[place] for place in floats]
            results, pull = jax.vjp(lambda *some: original(some, arguments), *some)
            residuals, structure = jax.tree.flatten(pull)
            pulling[:] = [structure]
            return results, residuals

        @functools.cache
        def resized_forward() -> Resized:
            program = flatten(jax.make_jaxpr(forward)([_abstract(operand) for operand in inputs]))
            free: list[Kept | None] = [None] * (len(program.outputs) - len(outputs))
            return Resized(program, self._inputs(inputs), [*outputs, *free], derivative=True)

        def run_forward(*arguments: Any) -> tuple[Any, Any]:
            results = resized_forward()(arguments)
            return tuple(results[: len(outputs)]), results[len(outputs) :]

        def run_backward(residuals: Arrays, cotangents: Arrays) -> tuple[Any, ...]:
            before = resized_forward()
            kept = before.program.outputs[len(outputs) :]

            def backward(residuals: Arrays, cotangents: Arrays) -> Any:
                return jax.tree.unflatten(pulling[0], residuals)(tuple(cotangents))

            closed = jax.make_jaxpr(backward)(*([_abstract(one) for one in part] for part in (kept, made)))
            given = [Input(before.kept(one), DATA) for one in kept] + self._inputs(made)
            asked = [self.kept(inputs[place]) for place in floats]
            results = Resized(flatten(closed), given, asked, derivative=True)([*residuals, *cotangents])
            gradients = dict(zip(floats, results, strict=True))
            return tuple(gradients.get(place) for place in range(len(inputs)))

        function.defvjp(run_forward, run_backward)
        return function(*operands)


class _Labelled:
    """Labels for the inputs of a program, and of which of them it is known whether they stay."""

    def __init__(self, labels: Labels, inputs: Sequence[Input]):
        self.labels, self._named = labels, inputs
        self.inputs = [
            Described(tuple(labels.dim(len(mask), True, one.lock) for mask in one.kept), one.made_of)
            for one in inputs
        ]
        self._known = [
            (dim, mask)
            for described, one in zip(self.inputs, inputs, strict=True)
            for dim, mask in zip(described.dims, one.kept, strict=True)
        ]

    def tie(self, results: Sequence[Described], outputs: Sequence[Kept | None]) -> None:
        """Let results have the indices that are expected of them."""
        for result, expected in zip(results, outputs, strict=True):
            for dim, mask in zip(result.dims, expected or (), strict=expected is not None):
                if mask.all():
                    self.labels.lock_dims([dim], OUTPUT)
                    continue
                asked = self.labels.dim(len(mask), True)
                _ = self.labels.match(dim, asked)
                self._known.append((asked, mask))

    def gone(self) -> np.ndarray:
        """Of every label whether it is removed: it is where it stands at nothing but removed indices."""
        labels = self.labels
        known = [(dim.factors[0], mask) for dim, mask in self._known if dim.factors]
        gone = np.zeros(len(labels), bool)
        if not known:
            return gone
        sizes = [len(mask) for _, mask in known]
        owner = np.repeat(np.arange(len(known)), sizes)
        index = np.concatenate([np.arange(size) for size in sizes])
        found = labels.find(np.concatenate([standing for standing, _ in known]))
        owner, index, atoms = resolved(labels, owner, index, found)
        stays = np.concatenate([mask for _, mask in known])[np.cumsum([0, *sizes])[owner] + index]
        gone[atoms] = True
        gone[atoms[stays]] = False
        # A product goes where either of its parts does.
        root, every = labels.of_all(), np.arange(len(labels))
        products = every[(root == every) & labels.is_product(every)]
        major, minor = (labels.find(part) for part in labels.parts(products))
        before = -1
        while before != (before := int(gone.sum())):
            gone[products] |= gone[major] | gone[minor]
        return gone[root]

    def tied_to_what_stays(self, gone: np.ndarray) -> tuple[str, int] | None:
        """The name and axis of an input that is not left with the indices that it should be."""
        for described, one in zip(self.inputs, self._named, strict=True):
            for axis, (dim, mask) in enumerate(zip(described.dims, one.kept, strict=True)):
                if dim.factors and not np.array_equal(~gone[dim.factors[0]], mask):
                    return one.name, axis
        return None


class _Halted(Exception):
    pass


class _Beginning(Walk):
    """A walk over the first of a program's operations, those in the bodies of loops included.

    Attributes:
        walked: how many, with the last of them.
    """

    def __init__(self, labels: Labels, most: int):
        super().__init__(labels)
        self.most = most
        self.walked: tuple[int, Operation | None] = 0, None

    def _step(self, operation: Operation, inputs: Sequence[Described]) -> list[Described]:
        if self.walked[0] == self.most:
            raise _Halted
        self.walked = self.walked[0] + 1, operation
        return super()._step(operation, inputs)


def _first_to_tie(program: Program, inputs: Sequence[Input], allowed: frozenset[str]) -> Operation | None:
    """The operation that ties what is removed to what stays, found by bisection; None where none does."""

    def walked(most: int) -> tuple[bool, int, Operation | None]:
        labelled = _Labelled(Labels(allowed), inputs)
        walk = _Beginning(labelled.labels, most)
        with contextlib.suppress(_Halted):
            _ = walk.run(program, labelled.inputs)
        return labelled.tied_to_what_stays(labelled.gone()) is not None, *walk.walked

    tied, most, last = walked(sys.maxsize)
    if not tied:
        return None
    least = 0
    while least < most:
        middle = (least + most) // 2
        tied, _, operation = walked(middle)
        if tied:
            most, last = middle, operation
        else:
            least = middle + 1
    return last


def _strong(arrays: Arrays, values: Sequence[Value | Literal]) -> list[Any]:
    """Arrays of exactly the dtypes that a loop carries: what a literal is made into has a weak one."""
    return [
        array
        if jnp.issubdtype(jnp.result_type(array), jax.dtypes.extended)
        else jnp.asarray(array, value.dtype)
        for array, value in zip(arrays, values, strict=False)
    ]


def _floats(operands: Sequence[Value | Literal]) -> list[int]:
    return [i for i, one in enumerate(operands) if jnp.issubdtype(_abstract(one).dtype, jnp.inexact)]


def _abstract(operand: Value | Literal) -> jax.ShapeDtypeStruct:
    if isinstance(operand, Literal):
        return jax.ShapeDtypeStruct(np.shape(operand.val), jnp.result_type(operand.val))
    return jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=operand.sharding)


def _inside(scope: str, outer: str) -> str:
    """A scope as it is called within an outer one."""
    return scope.removeprefix(outer).removeprefix("/") if outer else scope


def _place(operation: Operation | None) -> str:
    if operation is None:
        return ""
    scope = f" in {operation.scope}" if operation.scope else ""
    source = source_info_util.summarize(operation.source_info) if operation.source_info else ""
    return f" ({operation.name}{scope}{', ' + source if source else ''})"


# --- Sizes among the parameters of primitives ----------------------------------------------------------

Rewrite = Callable[[Resized, Operation], Mapping[str, Any]]


def _unchanged(resized: Resized, operation: Operation) -> Mapping[str, Any]:
    return {}


def _output_as(name: str) -> Rewrite:
    """Rewrite one parameter to the shape of the output."""
    return lambda resized, operation: {name: resized.shape(operation.outputs[0])}


def _split(resized: Resized, operation: Operation) -> Mapping[str, Any]:
    axis = operation.params["axis"]
    return {"sizes": tuple(resized.shape(output)[axis] for output in operation.outputs)}


def _gather(resized: Resized, operation: Operation) -> Mapping[str, Any]:
    """What is taken whole is taken whole; of all else no index goes."""
    operand = operation.inputs[0]
    sizes = zip(operation.params["slice_sizes"], resized.kept(operand), strict=True)
    return {"slice_sizes": tuple(int(mask.sum()) if size == len(mask) else size for size, mask in sizes)}


def _convolution(resized: Resized, operation: Operation) -> Mapping[str, Any]:
    numbers = operation.params["dimension_numbers"]
    channels = resized.shape(operation.inputs[0])[numbers.lhs_spec[1]]
    return {"feature_group_count": channels // resized.shape(operation.inputs[1])[numbers.rhs_spec[1]]}


_REWRITES: Mapping[str, Rewrite] = {
    "broadcast_in_dim": _output_as("shape"),
    "conv_general_dilated": _convolution,
    "dynamic_slice": _output_as("slice_sizes"),
    "empty": _output_as("shape"),
    "gather": _gather,
    "iota": _output_as("shape"),
    "reshape": _output_as("new_sizes"),
    "split": _split,
}
_WITH_BODIES = {"scan": Resized._scan, "while": Resized._while, "cond": Resized._cond}
_CALLS = {
    "custom_jvp_call": Resized._custom_jvp,
    "custom_vjp_call": Resized._custom_vjp,
    "custom_vjp_call_jaxpr": Resized._custom_vjp,
}
