"""A traced function as one flat list of operations: what every other pass reads.

In: a ClosedJaxpr. Out: a `Program`, in which calls (jit, remat, closed calls, custom derivatives) are
inlined, so that a weight and the nonlinearity three wrappers away stand in one list. What remat or a custom
derivative wraps is also kept as a `Call`, since what it says is worth keeping when the program is run.
Loops and branches keep their bodies as programs of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Call primitives by the names that supported JAX versions give them, and where the callee stands.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_vmap_call": "call",
    "eval_jaxpr": "call_jaxpr",
}
# Inlined too, and kept as a `Call`: these say how they are differentiated, by keeping less or by a rule.
_REMAT = {"remat2": "jaxpr", "checkpoint": "jaxpr"}
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
ENTERED = frozenset({*_INLINED, *_REMAT, *_CUSTOM, *_BODIES})
"""Primitives that run a program, which is inlined or kept as a body."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the program; compared by identity.

    Attributes:
        sharding: where its type says how it is laid out over devices, else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One primitive application.

    Attributes:
        bodies: the programs of a loop or branch.
        scope: the names around it, joined by '/': of Flax's modules, and of `jax.named_scope`.
        source_info: where it was written, for `jax.extend.source_info_util`.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value | Literal, ...]
    outputs: tuple[Value, ...]
    context: Any
    effects: bool
    bodies: tuple[Program, ...]
    scope: str
    source_info: Any = None

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function that says how it is differentiated, and may be run whole or step by step.

    Attributes:
        whole: the call itself, remat or a custom derivative. Its outputs are made by `steps`, each once.
        steps: what it does. These carry no rule, but for that of a call among them.
    """

    whole: Operation
    steps: tuple[Step, ...]


Step = Operation | Call


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function as operations in execution order.

    Attributes:
        steps: the operations, with calls to run whole where nobody looks inside.
        constants: the arrays that the function closed over.
        operations: all of them, those inside of calls included.
        wrapped: the operations inside of calls with a derivative rule of their own.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value | Literal, ...]
    steps: tuple[Step, ...]
    constants: Mapping[Value, Any]
    operations: tuple[Operation, ...] = dataclasses.field(init=False)
    wrapped: frozenset[Operation] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(operations_of(self.steps)))
        object.__setattr__(self, "wrapped", frozenset(_wrapped(self.steps)))


def operations_of(steps: Sequence[Step]) -> Iterator[Operation]:
    """The operations of some steps, those inside of calls included."""
    for step in steps:
        if isinstance(step, Call):
            yield from operations_of(step.steps)
        else:
            yield step


def _wrapped(steps: Sequence[Step]) -> Iterator[Operation]:
    for call in (step for step in steps if isinstance(step, Call)):
        yield from (operations_of if call.whole.name in _CUSTOM else _wrapped)(call.steps)


def flatten(closed: ClosedJaxpr, scope: str = "") -> Program:
    """Inline the calls of a traced function, and leave out what no output depends on.

    Args:
        scope: the names around the function.

    >>> import jax, jax.numpy as jnp
    >>> program = flatten(jax.make_jaxpr(jax.jit(lambda x: jnp.tanh(x) + 1))(jnp.ones(3)))
    >>> [operation.name for operation in program.operations]
    ['tanh', 'add']
    """
    steps: list[Step] = []
    constants: dict[Value, Any] = {}
    inputs = tuple(_value(v) for v in closed.jaxpr.invars)
    outputs = _inline(closed.jaxpr, closed.consts, inputs, steps, constants, scope)
    wanted = {output for output in outputs if isinstance(output, Value)}
    return Program(inputs, tuple(outputs), _needed(steps, wanted), constants)


def _needed(steps: Sequence[Step], wanted: set[Value]) -> tuple[Step, ...]:
    """The steps that the wanted values depend on; all values that these take are added to `wanted`."""
    kept: list[Step] = []
    for step in reversed(steps):
        whole = step.whole if isinstance(step, Call) else step
        if not whole.effects and wanted.isdisjoint(whole.outputs):
            continue
        # Run whole, a call takes all of its operands, whichever of its outputs are wanted.
        wanted.update(operand for operand in whole.inputs if isinstance(operand, Value))
        kept.append(Call(whole, _needed(step.steps, wanted)) if isinstance(step, Call) else step)
    return tuple(reversed(kept))


def scan_operands(operation: Operation) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried; the rest is scanned over.

    Read off the shapes: the parameters that say so have changed between JAX versions.
    """
    (body,) = operation.bodies
    carried = sum(
        len(outer.shape) == len(_shape(inner))
        for outer, inner in zip(operation.outputs, body.outputs, strict=True)
    )
    scanned = sum(
        len(_shape(outer)) != len(inner.shape)
        for outer, inner in zip(operation.inputs, body.inputs, strict=True)
    )
    return len(operation.inputs) - carried - scanned, carried


def _shape(operand: Value | Literal) -> tuple[int, ...]:
    return operand.shape if isinstance(operand, Value) else np.shape(operand.val)


def _inline(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Value | Literal],
    steps: list[Step],
    constants: dict[Value, Any],
    scope: str,
) -> list[Value | Literal]:
    # Every inlining makes its own values: one cached callee may stand at several places of a jaxpr.
    known: dict[Any, Value | Literal] = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, const in zip(jaxpr.constvars, consts, strict=True):
        value = _value(variable)
        known[variable] = value
        constants[value] = const

    def read(atom: Any) -> Value | Literal:
        return atom if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = tuple(read(atom) for atom in equation.invars)
        name = equation.primitive.name
        # A callee's names begin anew.
        inner = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        if name in _INLINED:
            called = _closed(_parameter(equation, _INLINED[name]))
            results = _inline(called.jaxpr, called.consts, operands, steps, constants, inner)
        elif name in _REMAT or name in _CUSTOM:
            call = _call(equation, operands, constants, inner)
            steps.append(call)
            results = call.whole.outputs
        else:
            results = [_value(variable) for variable in equation.outvars]
            steps.append(_operation(equation, operands, results, inner))
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(
    equation: Any, operands: tuple[Value | Literal, ...], constants: dict[Value, Any], scope: str
) -> Call:
    steps: list[Step] = []
    called = _closed(_parameter(equation, {**_REMAT, **_CUSTOM}[equation.primitive.name]))
    results = _inline(called.jaxpr, called.consts, operands, steps, constants, scope)
    made = {output for operation in operations_of(steps) for output in operation.outputs}
    outputs: list[Value] = []
    for variable, result in zip(equation.outvars, results, strict=True):
        if not isinstance(result, Value) or result not in made or result in outputs:
            # What is passed on as it came gets a value of its own, to tell it from what had no rule.
            copied = _value(variable)
            steps.append(Operation(jax.lax.copy_p, {}, (result,), (copied,), equation.ctx, False, (), scope))
            result = copied
        outputs.append(result)
    return Call(_operation(equation, operands, outputs, scope), tuple(steps))


def _operation(
    equation: Any, operands: tuple[Value | Literal, ...], outputs: Sequence[Value], scope: str
) -> Operation:
    return Operation(
        equation.primitive,
        equation.params,
        operands,
        tuple(outputs),
        equation.ctx,
        bool(equation.effects),
        _bodies(equation, scope),
        scope,
        equation.source_info,
    )


def _parameter(equation: Any, key: str) -> Any:
    """A callee, which newer JAX names `call_jaxpr` wherever it stands."""
    return equation.params[key if key in equation.params else "call_jaxpr"]


def _bodies(equation: Any, scope: str) -> tuple[Program, ...]:
    found: list[Program] = []
    for key in _BODIES.get(equation.primitive.name, ()):
        inner = equation.params[key]
        bodies = inner if isinstance(inner, tuple) else (inner,)
        found.extend(flatten(_closed(body), scope) for body in bodies)
    return tuple(found)


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _value(variable: Any) -> Value:
    sharding = getattr(variable.aval, "sharding", None)
    explicit = sharding is not None and any(names is not None for names in sharding.spec)
    return Value(tuple(variable.aval.shape), variable.aval.dtype, sharding if explicit else None)
