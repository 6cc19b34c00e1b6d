"""The traced program under jaxeff's own observers computes what the network does.

`jaxeff.collect` evaluates the program that was traced from the network, and reduces values on the way. If the program
or its evaluation were wrong, every statistic would be of another network.
"""

import jax
import networks
import numpy as np
import pytest
import shrinkable
from network import drawn

import jaxeff
from jaxeff import _collect, graph
from jaxeff.graph import evaluate


def shared(name):
    network = networks.NETWORKS[name]()
    return network.variables, network.module.apply, network.batch, network.keywords


def shrinking(name):
    network = shrinkable.NETWORKS[name]()
    return drawn(network.module, *network.batch), network.module.apply, network.batch, {}


NETWORKS = {
    **{name: (shared, name) for name in networks.NETWORKS},
    **{f"{name}, which may shrink": (shrinking, name) for name in shrinkable.NETWORKS},
}


QUICK = ("square", "lifted", "scanned", "multi-query")


class Evaluated(Exception):
    """Carries what was to be evaluated."""


@pytest.fixture
def observed(monkeypatch):
    """The program of a network with its arguments and all observers, as `jaxeff.collect` makes them."""

    def evaluate(program, arguments, hooks):
        raise Evaluated(program, arguments, hooks)

    def find(variables, apply_fn, batch, keywords):
        with monkeypatch.context() as patch:
            # Not compiled, so that the arguments are arrays, and nothing that was traced before is taken.
            patch.setattr(_collect, "observe", _collect.observe.__wrapped__)
            patch.setattr(graph, "evaluate", evaluate)
            with pytest.raises(Evaluated) as evaluated:
                jaxeff.collect(variables, apply_fn, batch, **keywords)
        return evaluated.value.args

    return find


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.exhaustive]) for name in NETWORKS]
)
def test_the_observed_program_computes_what_the_network_does(name, observed):
    make, of = NETWORKS[name]
    assert_replayed(observed, *make(of))


def assert_replayed(observed, variables, apply_fn, batch, keywords):
    program, arguments, hooks = observed(variables, apply_fn, batch, keywords)
    assert hooks.reductions

    def replayed(arguments):
        outputs, seen = evaluate(program, arguments, hooks)
        return outputs, list(seen.values())

    def plain(variables, batch):
        outputs = apply_fn(variables, *batch, **keywords)
        return jax.tree.leaves(outputs[0] if "mutable" in keywords else outputs)  # without the new averages

    # Operation by operation, nothing is fused, and not a bit may differ.
    with jax.disable_jit():
        expected = plain(variables, batch)
        outputs, _ = replayed(arguments)
    # What Linen's modules returned follows the outputs.
    for found, wanted in zip(outputs, expected, strict=False):
        np.testing.assert_array_equal(found, wanted)
    assert len(outputs) >= len(expected) > 0

    expected = jax.jit(plain)(variables, batch)
    outputs, seen = jax.jit(replayed)(arguments)
    assert len(seen) >= len(hooks.reductions)
    for found, wanted in zip(outputs, expected, strict=False):
        largest = float(np.abs(np.asarray(wanted, np.float32)).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=1e-6, atol=1e-6 * largest
        )
