"""Every primitive of the installed JAX has a rule in each pass, or is named there as unknown on purpose."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import cost
from jaxeff.cost._operations import COUNTED
from jaxeff.graph import axes, flatten, nonlinearities
from jaxeff.graph.coupling_rules import COUPLED
from jaxeff.graph.primitives import LOCKED, UNCOUNTED, UNPAIRED
from jaxeff.graph.provenance import FOLLOWED

PASSES = {
    "pairing": (FOLLOWED, UNPAIRED),
    "coupling": (COUPLED, LOCKED),
    "counting": (COUNTED, UNCOUNTED),
}
EACH_PASS = pytest.mark.parametrize(("handled", "unknown"), PASSES.values(), ids=PASSES)


@functools.cache
def primitives():
    """In a process of its own: other libraries of this one have primitives, too."""
    program = Path(__file__).with_name("primitives.py")
    ran = subprocess.run([sys.executable, program], check=True, capture_output=True, text=True)
    return frozenset(ran.stdout.split())


def test_the_list_of_primitives_has_those_of_programs_traced_here():
    def function(x):
        return jnp.tanh(x @ x.T).sum(0), jax.random.bits(jax.random.key(0)), jax.lax.while_loop(
            lambda c: c < 3, lambda c: c + 1, 0
        ), jnp.split(x, 2), jax.lax.ragged_dot(x, x[None], jnp.array([4]))  # fmt: skip

    def names(jaxpr):
        return {equation.primitive.name for equation in jaxpr.eqns}

    traced = names(jax.make_jaxpr(function)(jnp.ones((4, 4))).jaxpr)
    assert {"tanh", "dot_general", "random_bits", "while"} <= traced <= primitives()


@EACH_PASS
def test_every_primitive_has_a_rule_or_a_reason_for_having_none(handled, unknown):
    assert sorted(primitives() - handled - unknown.keys()) == []


@EACH_PASS
def test_no_primitive_has_both_a_rule_and_a_reason_for_having_none(handled, unknown):
    assert sorted(handled & unknown.keys()) == []


# Operations of 3 x 4 x 6 arrays that only move their elements, and are one primitive in newer JAX.
MOVES = {
    "unstack, last": lambda x: jnp.unstack(x, axis=-1),
    "unstack, first": lambda x: jnp.unstack(x),
    "unstack a factor": lambda x: jnp.unstack(x.reshape(3, 4, 2, 3), axis=3),
    "tile": lambda x: [jnp.tile(x, (1, 2, 3))],
}


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
def test_axes_are_followed_to_where_their_elements_go(function):
    shape = 3, 4, 6
    numbered = np.indices(shape).reshape(3, -1)
    program = flatten(jax.make_jaxpr(function)(jnp.zeros(shape)))
    known = {program.inputs[0]: axes.of_weight(shape)}
    for operation in program.operations:
        source = known[operation.inputs[0]]
        moved = axes.move(operation, source, operation.inputs[0].shape)
        known.update(zip(operation.outputs, moved, strict=True))
    results = function(jnp.arange(np.prod(shape)).reshape(shape))
    for output, elements in zip(program.outputs, results, strict=True):
        factors = [factor for dim in known[output] for factor in dim]
        steps = np.indices([factor.size for factor in factors])
        for axis in range(3):
            placed = [(f, step) for f, step in zip(factors, steps, strict=True) if f.axis == axis]
            own = [factor.offset + factor.stride * step for factor, step in placed]
            assert output.shape == elements.shape
            if own:
                expected = numbered[axis][np.asarray(elements)]
                np.testing.assert_array_equal(sum(own).reshape(elements.shape), expected)


def test_new_arithmetic_is_counted_and_named():
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    found = cost.count_function(lambda x: jnp.tile(jnp.stack(jnp.unstack(x, axis=1)), (2, 2)), x)
    assert found.complete and found.total == cost.Work()
    tanh = cost.count_function(jax.grad(lambda x: jnp.tanh(x).sum()), x)
    assert tanh.complete and tanh.total.transcendentals == 24
    # `log2` and 1 - x^2 are primitives, or made of others, by the version of JAX.
    assert cost.count_function(jnp.log2, x).complete
    program = flatten(jax.make_jaxpr(lambda x: jnp.log2(1 + jnp.exp2(x)))(x))
    assert all(map(nonlinearities.pointwise, program.operations))
