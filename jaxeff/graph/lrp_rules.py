"""Layer-wise relevance propagation as a change of the program, so that its gradients are relevances.

Run with the `Rules` of this module, a program computes the same outputs, but the gradient c of the outputs with
respect to any value a is such that a c is the relevance of a. Rules replace the plain gradient wherever it would
not conserve relevance.

- A nonlinearity y = f(x) passes all relevance on: y = x (y / x), with the ratio held fixed.
- In a product of data, a gate (a value in [0, 1], a softmax, a normalizer) takes nothing; two factors that are not
  gates take half each.
- A weight's contraction passes relevance on by shares x w / z (the epsilon rule), or by positive and negative
  shares separately (the alpha-beta rule).
- Summands take their shares, and so do biases and constants.

Only structure is found here.

References:
    Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
    Propagation, 2015, doi:10.1371/journal.pone.0130140
    Arras et al., Explaining Recurrent Neural Network Predictions in Sentiment Analysis, 2017 (gates)
    Ali et al., XAI for Transformers: Better Explanations through Conservative Propagation, 2022
    Achtibat et al., AttnLRP, 2024 (products of data)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.evaluation import Read, Rule, apply, on_mesh
from jaxeff.graph.flow import Flow
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import CONTRACTIONS, Provenance, is_carried, operands_of_bodies
from jaxeff.graph.sites import Graph

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Propagation:
    """How a weight's contraction passes relevance on.

    Attributes:
        alpha: weight of the positive shares in the alpha-beta rule, with beta = alpha - 1 for the negative ones;
            None for the epsilon rule.
    """

    alpha: float | None = None


ScaledRule = Callable[[jax.Array], Rule]
"""A rule, given the scale of the origins.

The scale is 1 and multiplies everything in which relevance ends (inputs, looked-up rows, biases, constants). The
slope of the outputs with respect to it is all the relevance that was accounted for.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """Changes of a program.

    Attributes:
        sources: the inputs that carry relevance, to be scaled like the other origins.
        operations: rules of the operations for which the plain gradient does not conserve relevance.
    """

    sources: frozenset[Value]
    operations: Mapping[Operation, ScaledRule]


def relevance_rules(found: Graph, propagation: Propagation) -> Rules:
    """Find the rules for a whole program and the bodies of its loops."""
    batch = found.provenance.batch
    sources = frozenset(value for value in found.program.inputs if value in batch and _floating(value))
    pre = frozenset(site.activation.pre for site in found.sites)
    rules: dict[Operation, ScaledRule] = {}
    _ = _Plan(found.program, found.provenance, sources, pre, propagation, rules)
    return Rules(sources, rules)


def _floating(value: Value | Literal) -> bool:
    dtype = value.dtype if isinstance(value, Value) else jnp.result_type(value.val)
    return bool(jnp.issubdtype(dtype, jnp.floating))


class _Plan:
    """Which values of one program carry relevance, and what each operation does with it.

    Attributes:
        roots: for each value that carries relevance, the value of which it is an elementwise function, apart from
            constants.
        nonlinear: values that are not an affine function of their root.
        statistics: reductions and the values that they reduce, which may become normalizers.
        gates: values that scale others and take no relevance.
    """

    def __init__(
        self,
        program: Program,
        provenance: Provenance,
        carriers: Iterable[Value],
        pre: frozenset[Value],
        propagation: Propagation,
        rules: dict[Operation, ScaledRule],
    ):
        self.flow, self.provenance = Flow(program, provenance), provenance
        self.pre, self.propagation, self.rules = pre, propagation, rules
        self.roots: dict[Value, Value] = {value: value for value in carriers}
        self.nonlinear: set[Value] = set()
        self.statistics: dict[Value, frozenset[Value]] = {}
        self.gates: set[Value] = set()
        for operation in program.operations:
            self._visit(operation)
        for operation in program.operations:
            self._close(operation)

    def _visit(self, operation: Operation) -> None:
        if operation.bodies:
            self._enter(operation)
        elif self._own(operation):
            self._follow(operation)
        elif self._originates(operation):
            self._carry(operation)
            self.rules[operation] = lambda scale: _scaled_results(operation, scale)

    def _carries(self, operand: Value | Literal) -> bool:
        return isinstance(operand, Value) and operand in self.roots

    def _own(self, operation: Operation) -> list[Value]:
        """Return the operands that carry relevance."""
        return [x for x in operation.inputs if isinstance(x, Value) and x in self.roots]

    def _originates(self, operation: Operation) -> bool:
        """Return whether weights meet data that carry no relevance: rows looked up, one-hot numbers."""
        held = any(map(self.provenance.holds, operation.inputs))
        return held and any(map(self.provenance.is_data, operation.inputs)) and operation.name in CONTRACTIONS

    def _carry(self, operation: Operation) -> None:
        self.roots.update({output: output for output in operation.outputs if _floating(output)})

    def _enter(self, operation: Operation) -> None:
        for body, first in operands_of_bodies(operation):
            carriers = [
                value
                for operand, value in enumerate(body.inputs, start=first)
                if _floating(value)
                and (self._carries(operation.inputs[operand]) or is_carried(operation, operand))
            ]
            _ = _Plan(body, self.provenance, carriers, self.pre, self.propagation, self.rules)
        self._carry(operation)

    def _follow(self, operation: Operation) -> None:
        if operation.name == "stop_gradient":
            return
        if axes.moves(operation) or nonlinearities.unchanged(operation):
            self._move(operation)
        elif operation.name.startswith("reduce_") and "axes" in operation.params:
            self._carry(operation)
            (source,) = self._own(operation)
            self.statistics[operation.outputs[0]] = self.statistics.get(source, frozenset()) | {source}
        elif nonlinearities.pointwise(operation):
            if _floating(operation.outputs[0]):
                self._combine(operation, operation.outputs[0])
        else:
            self._carry(operation)
            self._contract(operation)

    def _move(self, operation: Operation) -> None:
        self._carry(operation)
        (source,) = self._own(operation)
        if source in self.statistics:
            self.statistics.update(dict.fromkeys(operation.outputs, self.statistics[source]))
        if source in self.gates:
            self.gates.update(operation.outputs)

    def _combine(self, operation: Operation, output: Value) -> None:
        """Handle a pointwise operation: a step of a function of one root, or a meeting of several."""
        own = self._own(operation)
        statistics = [operand for operand in own if operand in self.statistics]
        self.roots[output] = output
        if len(statistics) == len(own):
            self.statistics[output] = frozenset().union(*(self.statistics[x] for x in own))
        elif statistics:
            self._normalize(operation, output, own, statistics)
            return
        held = any(map(self.provenance.holds, operation.inputs))
        if len({self.roots[operand] for operand in own}) == 1 and not held:
            self._step(operation, output, own)
        elif len(own) == 1:
            self._absorb(operation)
        elif operation.name in ("mul", "div"):
            self._multiply(operation)
        if len(own) == 1 and own[0] in self.gates:
            self.gates.add(output)

    def _step(self, operation: Operation, output: Value, own: Sequence[Value]) -> None:
        root = self.roots[output] = self.roots[own[0]]
        affine = nonlinearities.affine(operation.name, [*map(self._carries, operation.inputs)])
        if affine and not any(operand in self.nonlinear for operand in own):
            self._absorb(operation)
            return
        self.nonlinear.add(output)
        steps = self.flow.between(root, output, lambda value: self.roots.get(value) is root)
        if nonlinearities.within_0_and_1(steps, root, output, self.flow.program.constants):
            self.gates.add(output)

    def _normalize(
        self, operation: Operation, output: Value, own: Sequence[Value], statistics: Sequence[Value]
    ) -> None:
        """Handle scaling by a statistic, which takes nothing, or shifting by one, where both take their share."""
        if operation.name not in ("mul", "div") and not self._shifts_exponent(operation):
            return
        self.rules[operation] = lambda scale: _holding(
            operation, [i for i, operand in enumerate(operation.inputs) if operand in statistics]
        )
        others = [operand for operand in own if operand not in statistics]
        if len(others) == 1:
            self.roots[output] = self.roots[others[0]]
            if others[0] in self.nonlinear:
                self.nonlinear.add(output)
        summed = frozenset().union(*(self.statistics[operand] for operand in statistics))
        if operation.name == "div" and {self.roots[x] for x in summed} & {self.roots[x] for x in others}:
            self.gates.add(output)

    def _shifts_exponent(self, operation: Operation) -> bool:
        """Return whether this subtracts a softmax's maximum before the exponential, which changes nothing."""
        readers = self.flow.readers(operation.outputs[0])
        return operation.name == "sub" and bool(readers) and all(reader.name == "exp" for reader in readers)

    def _absorb(self, operation: Operation) -> None:
        """Let added biases and constants, which carry no relevance, take their share."""
        if operation.name in ("add", "sub", "add_any"):
            others = [i for i, operand in enumerate(operation.inputs) if not self._carries(operand)]
            self.rules[operation] = lambda scale: _scaled_operands(operation, others, scale)

    def _multiply(self, operation: Operation) -> None:
        """Handle a product of two that carry: a gate or divisor takes nothing, two of a kind half each."""
        gates = [i for i in (0, 1) if operation.inputs[i] in self.gates]
        if operation.name == "div":
            gates = [1]
        if len(gates) == 1:
            self.rules[operation] = lambda scale: _holding(operation, gates)
        else:
            self.rules[operation] = lambda scale: _halving(operation)

    def _contract(self, operation: Operation) -> None:
        if operation.name not in ("dot_general", "conv_general_dilated"):
            return
        alpha = self.propagation.alpha
        if len(self._own(operation)) > 1:
            self._multiply(operation)
        elif alpha is not None and any(map(self.provenance.holds, operation.inputs)):
            self.rules[operation] = lambda scale: _by_sign(operation, alpha)

    def _close(self, operation: Operation) -> None:
        """End a nonlinearity, passing all relevance on to its root; keep a layer's output away from 0."""
        for output in operation.outputs:
            if output in self.nonlinear and self._ends(output):
                root = self.roots[output]
                self.rules[operation] = lambda scale, root=root: _passing_on(operation, root)
            elif output in self.pre and output in self.roots and self.propagation.alpha is None:
                inner = self.rules.get(operation)
                self.rules[operation] = lambda scale, inner=inner: _stabilised(
                    operation, inner(scale) if inner else None
                )

    def _ends(self, value: Value) -> bool:
        """Return whether anything reads the value other than further steps of the same function."""
        root = self.roots[value]
        return value in self.flow.outputs or any(
            self.roots.get(output) is not root and _floating(output)
            for operation in self.flow.readers(value)
            for output in operation.outputs
        )


def _run(operation: Operation, change: Callable[[list[Any]], list[Any]]) -> Rule:
    return lambda operands, read: apply(operation, change(operands))


def _scaled_results(operation: Operation, scale: jax.Array) -> Rule:
    return lambda operands, read: [_scaled(result, scale) for result in apply(operation, operands)]


def _scaled_operands(operation: Operation, which: Sequence[int], scale: jax.Array) -> Rule:
    return _run(operation, lambda xs: [_scaled(x, scale) if i in which else x for i, x in enumerate(xs)])


def _scaled(array: Any, scale: jax.Array) -> jax.Array:
    return array * on_mesh(jax.typeof(array).sharding.mesh, scale).astype(jnp.result_type(array))


def _holding(operation: Operation, which: Sequence[int]) -> Rule:
    return _run(
        operation, lambda xs: [jax.lax.stop_gradient(x) if i in which else x for i, x in enumerate(xs)]
    )


def _halving(operation: Operation) -> Rule:
    def rule(operands: list[Any], read: Read) -> list[Any]:
        first, second, *rest = operands
        (by_first,) = apply(operation, [first, jax.lax.stop_gradient(second), *rest])
        (by_second,) = apply(operation, [jax.lax.stop_gradient(first), second, *rest])
        return [(by_first + by_second) / 2]

    return rule


def _by_sign(operation: Operation, alpha: float) -> Rule:
    """Return alpha times the positive shares less (alpha - 1) times the negative ones; a lone sign takes all."""

    def rule(operands: list[Any], read: Read) -> list[Any]:
        high = [jnp.maximum(operand, 0) for operand in operands]
        low = [jnp.minimum(operand, 0) for operand in operands]
        positive = apply(operation, high)[0] + apply(operation, low)[0]
        negative = apply(operation, [high[0], low[1]])[0] + apply(operation, [low[0], high[1]])[0]
        output = jax.lax.stop_gradient(positive + negative)
        up = jnp.where(negative < 0, alpha, 1.0) * output / jnp.where(positive > 0, positive, 1)
        down = jnp.where(positive > 0, 1 - alpha, 1.0) * output / jnp.where(negative < 0, negative, 1)
        return [positive * jax.lax.stop_gradient(up) + negative * jax.lax.stop_gradient(down)]

    return rule


def _passing_on(operation: Operation, root: Value) -> Rule:
    return lambda operands, read: [_sharing(read(root), apply(operation, operands)[0])]


def _stabilised(operation: Operation, inner: Rule | None) -> Rule:
    def rule(operands: list[Any], read: Read) -> list[Any]:
        results = inner(operands, read) if inner else apply(operation, operands)
        return [_sharing(result, result) for result in results]

    return rule


def _sharing(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return y, whose gradient with respect to x is the fixed ratio y / (x + epsilon)."""
    finite = jnp.where(jnp.isfinite(x), x, 0)
    epsilon = EPSILON * jnp.mean(jnp.abs(finite)) + jnp.finfo(x.dtype).tiny
    ratio = jax.lax.stop_gradient(y / (finite + jnp.where(finite < 0, -epsilon, epsilon)))
    passed = finite * ratio
    return passed + jax.lax.stop_gradient(y - passed)
