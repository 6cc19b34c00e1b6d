"""A traced function as one flat list of operations, which all other passes read.

In a `Program`, calls (jit, remat, closed calls, custom derivatives) are inlined, so that a weight and the
nonlinearity three wrappers away are in one list. Contents of remat or a custom derivative are also kept as a `Call`,
for use when the program is run. Loops and branches keep their bodies as programs of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

# Call primitives, by their names in supported JAX versions, and the parameter that holds the callee.
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
# These are inlined too, and kept as a `Call`, since they specify how they are differentiated.
_REMAT = {"remat2": "jaxpr", "checkpoint": "jaxpr"}
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
REMAT = frozenset(_REMAT)
"""Primitives whose derivative alone differs from that of the program they run."""
ENTERED = frozenset({*_INLINED, *_REMAT, *_CUSTOM, *_BODIES})
"""Primitives that run a program, which is inlined or kept as a body."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the program; compared by identity.

    Attributes:
        sharding: how it is laid out over devices, if its type says so; else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One application of a primitive.

    Attributes:
        bodies: programs of a loop or branch.
        scope: the surrounding names, joined by '/': of Flax modules, and of `jax.named_scope`.
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
    """A function with its own rule of differentiation, which may be run whole or step by step.

    Attributes:
        whole: the call itself, remat or a custom derivative. Its outputs are made by `steps`, each once.
        steps: its operations, which carry no rule except those of calls among them.
    """

    whole: Operation
    steps: tuple[Step, ...]


Step = Operation | Call


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function as operations in execution order.

    Attributes:
        steps: the operations, with calls to run whole if nothing inside is observed.
        constants: the arrays that the function closed over.
        operations: all operations, including those inside calls.
        wrapped: the operations inside calls with a derivative rule of their own.
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
    """Return the operations of some steps, including those inside calls."""
    for step in steps:
        if isinstance(step, Call):
            yield from operations_of(step.steps)
        else:
            yield step


def _wrapped(steps: Sequence[Step]) -> Iterator[Operation]:
    for call in (step for step in steps if isinstance(step, Call)):
        yield from (operations_of if call.whole.name in _CUSTOM else _wrapped)(call.steps)


def flatten(closed: ClosedJaxpr, scope: str = "") -> Program:
    """Inline the calls of a traced function, and drop what no output depends on, inside loops and branches too.

    Args:
        scope: the names around the function.

    >>> import jax, jax.numpy as jnp
    >>> program = flatten(jax.make_jaxpr(jax.jit(lambda x: jnp.tanh(x) + 1))(jnp.ones(3)))
    >>> [operation.name for operation in program.operations]
    ['tanh', 'add']
    """
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return _flat(ClosedJaxpr(needed, closed.consts), scope)


def _flat(closed: ClosedJaxpr, scope: str) -> Program:
    steps: list[Step] = []
    constants: dict[Value, Any] = {}
    inputs = tuple(_value(v) for v in closed.jaxpr.invars)
    outputs = _inline(closed.jaxpr, closed.consts, inputs, steps, constants, scope)
    wanted = {output for output in outputs if isinstance(output, Value)}
    return Program(inputs, tuple(outputs), needed(steps, wanted), constants)


def needed(steps: Sequence[Step], wanted: set[Value]) -> tuple[Step, ...]:
    """Return the steps on which the wanted values depend; add all values that these take to `wanted`."""
    kept: list[Step] = []
    for step in reversed(steps):
        whole = step.whole if isinstance(step, Call) else step
        if not whole.effects and wanted.isdisjoint(whole.outputs):
            continue
        # A call that is run whole takes all of its operands, even if only some outputs are wanted.
        wanted.update(operand for operand in whole.inputs if isinstance(operand, Value))
        kept.append(Call(whole, needed(step.steps, wanted)) if isinstance(step, Call) else step)
    return tuple(reversed(kept))


def scan_operands(operation: Operation) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried; the rest is scanned over.

    They are derived from shapes, because the parameters that say so have changed between JAX versions.
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
        # A callee's scope starts afresh.
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
            # Values passed on unchanged get a value of their own, unlike those of an operation without a rule.
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
    """Return a callee, which newer JAX always names `call_jaxpr`."""
    return equation.params[key if key in equation.params else "call_jaxpr"]


def _bodies(equation: Any, scope: str) -> tuple[Program, ...]:
    found: list[Program] = []
    for key in _BODIES.get(equation.primitive.name, ()):
        inner = equation.params[key]
        bodies = inner if isinstance(inner, tuple) else (inner,)
        found.extend(_flat(_closed(body), scope) for body in bodies)
    return tuple(found)


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _value(variable: Any) -> Value:
    sharding = getattr(variable.aval, "sharding", None)
    explicit = sharding is not None and any(names is not None for names in sharding.spec)
    return Value(tuple(variable.aval.shape), variable.aval.dtype, sharding if explicit else None)
