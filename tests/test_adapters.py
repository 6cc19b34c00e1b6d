"""One network, written in each library, is one network to jaxeff; each library's tests are skipped where it is not
installed."""

import os
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxeff
from jaxeff import prune
from jaxeff.model.params import leaves_by_path

# The other libraries lag behind JAX and NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

FEATURES, HIDDEN, CLASSES = 6, 8, 3


@pytest.fixture(autouse=True, scope="module")
def _as_libraries_are_written():
    with jax.numpy_rank_promotion("allow"):
        yield


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


WEIGHTS = {
    "first": drawn(FEATURES, HIDDEN),
    "first bias": drawn(HIDDEN),
    "second": drawn(HIDDEN, CLASSES),
    "second bias": drawn(CLASSES),
}
X, TARGETS = drawn(32, FEATURES), drawn(32, CLASSES)


def plain(params, x):
    return jax.nn.relu(x @ params["first"] + params["first bias"]) @ params["second"] + params["second bias"]


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


# For each library: the untrained network, its batch, its weights by name in the order of WEIGHTS, whether they lie
# (out, in), and how its users call it.


def of_nnx():
    names = ["first/kernel", "first/bias", "second/kernel", "second/bias"]
    return NNXNet(nnx.Rngs(0)), X, names, False, call_nnx


def call_nnx(model, x):
    served = nnx.merge(*nnx.split(model))
    served.eval()
    return served(x)


def of_train_state():
    model = nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(CLASSES)])
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    names = ["layers_0/kernel", "layers_0/bias", "layers_2/kernel", "layers_2/bias"]
    return state, X, names, False, lambda state, x: state.apply_fn({"params": state.params}, x)


def of_equinox():
    eqx = pytest.importorskip("equinox")
    first, second = jax.random.split(jax.random.key(0))
    model = eqx.nn.Sequential([
        eqx.nn.Linear(FEATURES, HIDDEN, key=first),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Dropout(0.5),
        eqx.nn.Linear(HIDDEN, CLASSES, key=second),
    ])  # fmt: skip
    names = ["layers/0/weight", "layers/0/bias", "layers/3/weight", "layers/3/bias"]
    return model, X, names, True, lambda model, x: jax.vmap(eqx.nn.inference_mode(model))(x)


def of_keras():
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(HIDDEN, activation="relu", name="first"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(CLASSES, name="second"),
        ],
        name="net",
    )
    names = ["net/first/kernel", "net/first/bias", "net/second/kernel", "net/second/bias"]
    return model, X, names, False, lambda model, x: model(x)


def of_penzai():
    pytest.importorskip("penzai")
    from penzai import pz
    from penzai.models import simple_mlp

    mlp = simple_mlp.MLP.from_config(
        name="net", init_base_rng=jax.random.key(0), feature_sizes=[FEATURES, HIDDEN, CLASSES]
    )
    mlp = mlp.select().at_instances_of(pz.nn.Elementwise).insert_after(pz.nn.StochasticDropout(0.5))
    names = [f"net/Affine_{i}/{leaf}" for i in range(2) for leaf in ("Linear.weights", "AddBias.bias")]

    def call(model, x):
        dropped = model.select().at_instances_of(pz.nn.StochasticDropout)
        return dropped.apply(lambda layer: layer.disable())(x)

    return mlp, pz.nx.wrap(X).tag("batch", "features"), names, False, call


def of_haliax():
    hax = pytest.importorskip("haliax")
    eqx = pytest.importorskip("equinox")
    axes = {name: hax.Axis(name, size) for name, size in zip("fhc", (FEATURES, HIDDEN, CLASSES), strict=True)}

    class Net(eqx.Module):
        first: hax.nn.Linear
        dropout: hax.nn.Dropout
        second: hax.nn.Linear

        def __call__(self, x, *, key=None):
            return self.second(self.dropout(hax.nn.relu(self.first(x)), key=key))

    keys = jax.random.split(jax.random.key(0))
    model = Net(
        hax.nn.Linear.init(axes["f"], axes["h"], key=keys[0]),
        hax.nn.Dropout(0.5),
        hax.nn.Linear.init(axes["h"], axes["c"], key=keys[1]),
    )
    names = ["first/weight", "first/bias", "second/weight", "second/bias"]
    batch = hax.named(X, (hax.Axis("batch", 32), axes["f"]))
    return model, batch, names, True, lambda model, x: eqx.nn.inference_mode(model)(x)


MAKES = {make.__name__: make for make in (of_nnx, of_train_state, of_equinox, of_keras, of_penzai, of_haliax)}


def array(outputs):
    """The plain array in outputs of named axes."""
    return getattr(outputs, "array", getattr(outputs, "data_array", outputs))


@pytest.fixture(scope="module", params=MAKES.values(), ids=MAKES)
def net(request):
    """A network of one library with the weights above."""
    model, batch, names, is_transposed, call = request.param()
    params, _ = jaxeff.functional(model)
    given = {
        name: value.T if is_transposed else value for name, value in zip(names, WEIGHTS.values(), strict=True)
    }
    return jaxeff.restore(model, filled(params, given)), batch, names, call


def filled(params, given):
    """`params` with the arrays of `given`, by name."""
    paths = [path.removeprefix("params/") for path, _ in leaves_by_path(params)]
    assert sorted(paths) == sorted(given)
    return jax.tree.unflatten(jax.tree.structure(params), [given[path] for path in paths])


def loss(outputs, targets):
    return jnp.mean((array(outputs) - targets) ** 2, axis=1)


@pytest.mark.parametrize("criterion", ["activation", "fisher"])
def test_the_report_is_that_of_the_plain_network(net, criterion):
    model, batch, names, _ = net
    options = {"criterion": criterion, "loss_fn": loss, "targets": TARGETS}
    expected = jaxeff.analyze(WEIGHTS, plain, X, **options)
    report = jaxeff.analyze(model, batch, **options)
    assert list(report.layers) == names[::2]
    for ours, theirs in zip(report.rows, expected.rows, strict=True):
        assert (ours.nonlinearity, ours.macs) == (theirs.nonlinearity, theirs.macs)
        np.testing.assert_allclose(ours.metrics.utilization, theirs.metrics.utilization, rtol=1e-5)
        np.testing.assert_allclose(ours.units, theirs.units, rtol=1e-5)


def test_the_cost_is_that_of_the_plain_network(net):
    model, batch, _, _ = net
    assert jaxeff.cost.count(model, batch).macs == jaxeff.cost.count(WEIGHTS, plain, X).macs


def test_masked_weights_go_back_into_the_model(net):
    model, batch, _, call = net
    params, apply_fn = jaxeff.functional(model)
    masked = prune.apply(params, prune.masks(prune.scored(params), 0.5))
    expected = plain(prune.apply(WEIGHTS, prune.masks(prune.scored(WEIGHTS), 0.5)), X)
    np.testing.assert_allclose(array(apply_fn(masked, batch)), expected, rtol=1e-5, atol=1e-5)
    pruned = jaxeff.restore(model, masked)
    np.testing.assert_allclose(array(call(pruned, batch)), expected, rtol=1e-5, atol=1e-5)
    whole = jaxeff.restore(model, params)
    np.testing.assert_allclose(array(call(whole, batch)), plain(WEIGHTS, X), rtol=1e-5, atol=1e-5)


def test_the_smaller_network_computes_what_the_masked_one_does(net):
    model, batch, _, _ = net
    params, apply_fn = jaxeff.functional(model)
    small, small_apply = smaller(params, apply_fn, batch)
    expected = smaller(WEIGHTS, plain, X)
    assert sorted(leaf.size for leaf in jax.tree.leaves(small)) == sorted(
        leaf.size for leaf in jax.tree.leaves(expected[0])
    )
    np.testing.assert_allclose(array(small_apply(small, batch)), expected[1](expected[0], X), rtol=1e-5, atol=1e-5)


def smaller(params, apply_fn, batch):
    plan = prune.plan(prune.groups(params, apply_fn, batch), prune.scored(params), 0.5)
    return prune.compact(params, apply_fn, batch, plan)
