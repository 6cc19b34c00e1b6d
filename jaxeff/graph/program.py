"""A traced function as one flat list of operations: what every other pass reads.

In: a ClosedJaxpr. Out: a `Program`, in which calls (jit, remat, closed calls, custom derivatives
around more than pointwise arithmetic) are inlined, so that a weight and the nonlinearity three
wrappers away stand in one list. Loops and branches keep their bodies as programs of their own.
Imports nothing of jaxeff.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

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
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# Inlined only where the callee contracts or loops: around pointwise arithmetic (relu, silu) the call
# carries a derivative rule worth keeping.
_CUSTOM = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_BODIES = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
ENTERED = frozenset({*_INLINED, *_CUSTOM, *_BODIES})
"""Primitives that run a program, which is inlined or kept as a body."""
_CONTRACTIONS = frozenset(
    {"dot_general", "conv_general_dilated", "gather", "ragged_dot_general", "ragged_dot"}
)


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
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Value | Literal, ...]
    outputs: tuple[Value, ...]
    context: Any
    effects: bool
    bodies: tuple[Program, ...]
    scope: str

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Operations in execution order; `constants` are the arrays that the function closed over."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value | Literal, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[Value, Any]


def flatten(closed: ClosedJaxpr, scope: str = "") -> Program:
    """Inline the calls of a traced function, and leave out what no output depends on.

    Args:
        scope: the names around the function.

    >>> import jax, jax.numpy as jnp
    >>> program = flatten(jax.make_jaxpr(jax.jit(lambda x: jnp.tanh(x) + 1))(jnp.ones(3)))
    >>> [operation.name for operation in program.operations]
    ['tanh', 'add']
    """
    operations: list[Operation] = []
    constants: dict[Value, Any] = {}
    inputs = tuple(_value(v) for v in closed.jaxpr.invars)
    outputs = _inline(closed.jaxpr, closed.consts, inputs, operations, constants, scope)
    return Program(inputs, tuple(outputs), _needed(operations, outputs), constants)


def _needed(operations: list[Operation], outputs: Sequence[Value | Literal]) -> tuple[Operation, ...]:
    wanted = {output for output in outputs if isinstance(output, Value)}
    kept: list[Operation] = []
    for operation in reversed(operations):
        if operation.effects or any(output in wanted for output in operation.outputs):
            wanted.update(operand for operand in operation.inputs if isinstance(operand, Value))
            kept.append(operation)
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


def callee(operation: Any) -> ClosedJaxpr | None:
    """The function that a custom-derivative call wraps, else None."""
    key = _CUSTOM.get(operation.primitive.name)
    return _closed(operation.params[key]) if key else None


def _inline(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Value | Literal],
    operations: list[Operation],
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
        called = _inlined_callee(equation)
        # A callee's names begin anew.
        inner = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        if called is not None:
            results = _inline(called.jaxpr, called.consts, operands, operations, constants, inner)
        else:
            results = [_value(variable) for variable in equation.outvars]
            operations.append(
                Operation(
                    equation.primitive,
                    equation.params,
                    operands,
                    tuple(results),
                    equation.ctx,
                    bool(equation.effects),
                    _bodies(equation, inner),
                    inner,
                )
            )
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inlined_callee(equation: Any) -> ClosedJaxpr | None:
    name = equation.primitive.name
    if name in _INLINED:
        return _closed(_parameter(equation, _INLINED[name]))
    called = callee(equation)
    return called if called is not None and _contracts(called.jaxpr) else None


def _contracts(jaxpr: Jaxpr) -> bool:
    return any(
        equation.primitive.name in _CONTRACTIONS
        or equation.primitive.name in _BODIES
        or any(_contracts(inner.jaxpr) for inner in _callees(equation))
        for equation in jaxpr.eqns
    )


def _callees(equation: Any) -> list[ClosedJaxpr]:
    key = {**_INLINED, **_CUSTOM}.get(equation.primitive.name)
    return [_closed(_parameter(equation, key))] if key else []


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
