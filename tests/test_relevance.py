"""Layer-wise relevance propagation: by its formulas in NumPy, and conserved on every network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, drawn, normal

import jaxeff
from jaxeff import importance

RULES = {"relevance": "lrp", "relevance_alpha_beta": "lrp_alpha_beta"}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(7, name="first")(x))
        x = jnp.tanh(nn.Dense(6, name="second")(x))
        return nn.Dense(4, name="third")(x)


NAMES = ("first", "second", "third")


def _by_hand(variables, x, rule):
    """Relevance through each weight of `Net`, layer by layer in float64, as Bach et al. write it."""
    layers = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"][n]) for n in NAMES]
    inputs, outputs = [x.astype(np.float64)], []
    for layer, f in zip(layers, (lambda z: np.maximum(z, 0), np.tanh, lambda z: z), strict=True):
        outputs.append(inputs[-1] @ layer["kernel"] + layer["bias"])
        inputs.append(f(outputs[-1]))
    z = outputs[-1]
    relevance = np.where(z == z.max(-1, keepdims=True), z, 0)
    found = {}
    for name, layer, taken, z in reversed(list(zip(NAMES, layers, inputs[:-1], outputs, strict=True))):
        parts = taken[:, :, None] * layer["kernel"]
        # What a bias takes of a unit's relevance does not reach its weights.
        relevance = relevance * (z - layer["bias"]) / z
        if rule == "relevance":
            shares = parts / parts.sum(1, keepdims=True)
        else:
            high, low = np.maximum(parts, 0), np.minimum(parts, 0)
            p, n = high.sum(1, keepdims=True), low.sum(1, keepdims=True)
            up, down = high / np.where(p > 0, p, 1), low / np.where(n < 0, n, 1)
            # One sign alone takes all.
            shares = np.where(n < 0, np.where(p > 0, 2 * up - down, down), up)
        passed = shares * relevance[:, None, :]
        found[f"{name}/kernel"] = passed.mean(0)
        relevance = passed.sum(2)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_relevance_through_each_weight_is_that_of_the_published_formula(rule):
    x = normal(9, 5)
    variables = drawn(Net(), x)
    statistics = jaxeff.collect(variables, Net().apply, x, criterion=RULES[rule])
    expected = _by_hand(variables, x, rule)
    for path, derivatives in statistics.derivatives.items():
        found = getattr(derivatives, rule).mean
        # The stabiliser is 1e-6 of a layer's mean output: felt where an output is near 0.
        np.testing.assert_allclose(found, expected[path], rtol=1e-3, atol=1e-5 * np.abs(expected[path]).max())
    scores = importance.scores(variables, statistics, RULES[rule])
    np.testing.assert_allclose(scores["first/kernel"], np.abs(expected["first/kernel"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_is_conserved(name):
    network = NETWORKS[name]()
    statistics = jaxeff.collect(*network.arguments, criterion=tuple(RULES.values()), **network.keywords)
    assert statistics.conservation.keys() == RULES.keys()
    for found in statistics.conservation.values():
        assert float(found.residual) < 1e-4


def test_the_network_itself_is_not_changed():
    """The winning outputs are those of the plain network."""
    network = NETWORKS["transformer"]()
    statistics = jaxeff.collect(*network.arguments, criterion="lrp")
    outputs = network.module.apply(network.variables, *network.batch)
    total = statistics.conservation["relevance"].total
    assert float(total) == pytest.approx(float(outputs.max(-1).sum()), rel=1e-5)


def test_gates_take_no_relevance():
    """An attention's weights and an LSTM's gates scale what passes; the values carry it."""
    network = NETWORKS["transformer"]()
    found = jaxeff.collect(*network.arguments, criterion="lrp").derivatives
    size = {path: float(jnp.abs(d.relevance.mean).sum()) for path, d in found.items()}
    for name in ("query", "key"):
        assert size[f"block/attention/{name}/kernel"] == 0
    assert size["block/attention/value/kernel"] > 0 and size["block/attention/out/kernel"] > 0
    network = NETWORKS["lstm"]()
    found = jaxeff.collect(*network.arguments, criterion="lrp").derivatives
    size = {path: float(jnp.abs(d.relevance.mean).sum()) for path, d in found.items()}
    assert all((size[f"cell/{side}{gate}/kernel"] > 0) == (gate == "g") for side in "ih" for gate in "ifgo")


SOFTMAX = {
    "flax": nn.softmax,
    "spelled out": lambda z: (
        jnp.exp(z - z.max(-1, keepdims=True)) / jnp.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
}


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
def test_a_hand_written_attention_conserves_relevance(softmax):
    def attend(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        weights = softmax(jnp.einsum("btd,bsd->bts", q, k) / 2.0)
        return jnp.einsum("bts,bsd->btd", weights, v) @ p["o"] + x

    params = {name: normal(4, 4, seed=seed) for seed, name in enumerate("qkvo")}
    found = jaxeff.collect(params, attend, normal(3, 5, 4), criterion="lrp")
    assert float(found.conservation["relevance"].residual) < 1e-4
    assert float(jnp.abs(found.derivatives["q"].relevance.mean).max()) == 0


def test_a_report_states_what_was_lost():
    network = NETWORKS["mlp"]()
    report = jaxeff.analyze(*network.arguments, criterion="lrp")
    assert float(report.model.relevance_residual) < 1e-4
    assert "was neither passed on to the inputs nor taken by biases" in " ".join(str(report).split())
    assert jaxeff.Report.from_json(report.to_json()).model.relevance_residual is not None
    assert jaxeff.analyze(*network.arguments).model.relevance_residual is None


def test_relevance_of_many_batches_is_that_of_one():
    network = NETWORKS["mlp"]()
    (x,) = network.batch
    whole = jaxeff.collect(*network.arguments, criterion="lrp")
    halves = [
        jaxeff.collect(network.variables, network.module.apply, part, criterion="lrp")
        for part in (x[:8], x[8:])
    ]
    merged = jaxeff.merge(*halves)
    for path, ours in merged.derivatives.items():
        theirs = whole.derivatives[path].relevance.mean
        np.testing.assert_allclose(ours.relevance.mean, theirs, rtol=1e-3, atol=1e-4)
    total = merged.conservation["relevance"].total
    np.testing.assert_allclose(total, whole.conservation["relevance"].total, rtol=1e-5)
