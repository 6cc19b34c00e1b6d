"""Every primitive of the installed JAX has a rule in each pass, or is named there as unknown on purpose."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import normal

import jaxeff
from jaxeff import cost, graph
from jaxeff.cost.operations import COUNTED, UNKNOWN
from jaxeff.graph import axes
from jaxeff.graph.primitives import LOCKED, UNCOUNTED, UNPAIRED
from jaxeff.graph.provenance import FOLLOWED
from jaxeff.graph.rules import COUPLED

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
