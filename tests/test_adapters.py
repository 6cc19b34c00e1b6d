"""One network, written in each library, is one network to jaxeff; each library's tests are skipped where it is not
installed."""

import os
import subprocess
import sys

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
    small, small_apply = smaller(model, batch)
    expected = smaller(WEIGHTS, plain, X)
    assert sorted(leaf.size for leaf in jax.tree.leaves(small)) == sorted(
        leaf.size for leaf in jax.tree.leaves(expected[0])
    )
    np.testing.assert_allclose(
        array(small_apply(small, batch)), expected[1](expected[0], X), rtol=1e-5, atol=1e-5
    )


def smaller(*model_and_batch):
    params = model_and_batch[0] if len(model_and_batch) == 3 else jaxeff.functional(model_and_batch[0])[0]
    plan = prune.plan(prune.groups(*model_and_batch), prune.scored(params), 0.5)
    return prune.compact(*model_and_batch, plan)


def test_compact_resolves_a_model_as_functional_does(net):
    model, batch, _, _ = net
    params, apply_fn = jaxeff.functional(model)
    plan = prune.plan(prune.groups(model, batch), prune.scored(params), 0.5)
    small, small_apply = prune.compact(params, apply_fn, batch, plan)
    for given in ((model, batch, plan), (model, (batch,), plan)):
        ours, our_apply = prune.compact(*given)
        jax.tree.map(np.testing.assert_array_equal, ours, small)
        np.testing.assert_array_equal(array(our_apply(ours, batch)), array(small_apply(small, batch)))
    named, _ = prune.compact(model, batch, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, named, small)


def test_masks_hold_in_the_loops_of_each_library(net):
    """The update of `prune.sparsify` on the params of any library is that on the params of the plain network."""
    model, batch, _, _ = net
    _, apply_fn = jaxeff.functional(model)
    (ours, masks), (theirs, _) = train(*jaxeff.functional(model), batch), train(WEIGHTS, plain, X)
    jax.tree.map(np.testing.assert_array_equal, prune.apply(ours, masks), ours)
    np.testing.assert_allclose(array(apply_fn(ours, batch)), plain(theirs, X), rtol=1e-4, atol=1e-4)


def train(params, apply_fn, batch):
    masks = prune.masks(prune.scored(params), 0.5)
    optimizer = prune.sparsify(optax.sgd(0.01), masks=masks)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda params: loss(apply_fn(params, batch), TARGETS).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    return params, masks


def test_a_keras_callback_holds_masks_while_keras_trains():
    keras = pytest.importorskip("keras")
    model = keras_net()
    before, _ = jaxeff.functional(model)
    masks = prune.masks(prune.scored(before), 0.5)
    # Momentum moves pruned weights too.
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    history = model.fit(
        X, TARGETS, batch_size=8, epochs=2, verbose=0, callbacks=[prune.keras_callback(masks)]
    )
    after, _ = jaxeff.functional(model)
    jax.tree.map(np.testing.assert_array_equal, prune.apply(after, masks), after)
    assert not np.allclose(after["net/first/kernel"], prune.apply(before, masks)["net/first/kernel"])
    assert history.history["loss"][1] < history.history["loss"][0]


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("numpy", "ValueError: Keras runs on numpy: set the environment variable KERAS_BACKEND to 'jax'"),
        ("tensorflow", "ImportError: Keras cannot import its backend ("),
    ],
)
def test_keras_without_jax_says_what_to_set(backend, error):
    pytest.importorskip("keras")
    # Keras imports a backend once in a process. TensorFlow, its default, is hidden.
    script = """
import sys
from jaxeff import prune
sys.modules["tensorflow"] = None
try:
    prune.keras_callback({})
except (ImportError, ValueError) as error:
    print(f"{type(error).__name__}: {error}")
"""
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    assert said.stdout.startswith(error), said.stderr


def test_a_keras_call_without_a_training_argument_is_run_without_one():
    keras = pytest.importorskip("keras")

    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.first = keras.layers.Dense(HIDDEN, activation="relu", name="first")
            self.dropout = keras.layers.Dropout(0.5)
            self.second = keras.layers.Dense(CLASSES, name="second")

        def call(self, inputs):
            return self.second(self.dropout(self.first(inputs)))

    model = Net()
    with pytest.raises(ValueError, match="'net' is not built"):
        jaxeff.functional(model)
    _ = model(X)
    for training in (False, True):
        params, apply_fn = jaxeff.functional(model, training=training)
        given = dict(zip(params, WEIGHTS.values(), strict=True))
        np.testing.assert_allclose(apply_fn(given, X), plain(WEIGHTS, X), rtol=1e-5, atol=1e-5)


def test_nnx_optimizers_hold_masks():
    model = whole_net()
    params, _ = jaxeff.functional(model)
    masks = prune.masks(prune.scored(params), 0.5)
    optimizer = nnx.Optimizer(model, prune.sparsify(optax.adam(0.01), masks=masks), wrt=nnx.Param)
    for _ in range(2):
        gradients = nnx.grad(lambda model: loss(model(X), TARGETS).mean())(model)
        optimizer.update(model, gradients)
    after, _ = jaxeff.functional(model)
    jax.tree.map(np.testing.assert_array_equal, prune.apply(after, masks), after)
    assert int((after["first"]["kernel"][...] == 0).sum()) >= 16


# What comes in


def test_a_model_is_taken_by_every_verb_that_takes_a_batch():
    model = NNXNet(nnx.Rngs(0))
    params, apply_fn = jaxeff.functional(model)
    given = {"loss_fn": loss, "targets": TARGETS}
    for verb, options in (
        (jaxeff.collect, {}),
        (jaxeff.calibrate, {"progress": False}),
        (jaxeff.compare_criteria, {"criteria": ("magnitude",), **given}),
        (jaxeff.cost.count, {}),
        (jaxeff.cost.memory, {"compile": False}),
        (prune.groups, {}),
        (prune.layout, {}),
        (prune.sensitivity, {"sparsities": (0.5,), **given}),
    ):
        batch = [X, X, X, X] if verb is jaxeff.calibrate else X
        ours, theirs = verb(model, batch, **options), verb(params, apply_fn, batch, **options)
        if verb in (jaxeff.collect, jaxeff.calibrate):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        else:
            assert str(ours) == str(theirs)


def test_a_model_is_advised_on():
    found = jaxeff.advise(
        NNXNet(nnx.Rngs(0)),
        X,
        loss_fn=loss,
        targets=TARGETS,
        criteria=("magnitude",),
        max_runs=100,
        progress=False,
    )
    assert found.report["first/kernel"].shape == (FEATURES, HIDDEN)


def test_a_model_without_a_batch_is_scored_by_magnitude():
    model = NNXNet(nnx.Rngs(0))
    assert jaxeff.analyze(model).criterion == "magnitude"
    by_name = jaxeff.analyze(model, batch=X)
    assert by_name.criterion == "activation"


@pytest.mark.parametrize(
    "value", [nn.Dense(3), object(), [1.0], lambda x: x], ids=["linen", "object", "list", "function"]
)
def test_what_is_no_model_is_named_with_the_ways_in(value):
    for call in (
        lambda: jaxeff.functional(value),
        lambda: jaxeff.analyze(value, X),
        lambda: prune.groups(value, X),
    ):
        with pytest.raises(TypeError) as raised:
            _ = call()
        assert type(value).__name__ in str(raised.value)
        assert "(variables, model.apply, batch)" in str(raised.value) or all(
            way in str(raised.value)
            for way in ("nnx", "equinox", "keras", "Penzai", "Haliax", "TrainState", "f(params")
        )


def test_verbs_say_what_is_missing():
    with pytest.raises(
        TypeError, match="`batch` is missing: pass .model, batch. or .params, apply_fn, batch."
    ):
        jaxeff.collect(NNXNet(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="`batch` is missing"):
        jaxeff.cost.count(WEIGHTS, plain)
    with pytest.raises(TypeError, match="NNXNet came with two more arguments.*in one tuple.*`targets`"):
        jaxeff.analyze(NNXNet(nnx.Rngs(0)), X, X)


@pytest.mark.parametrize("make", [of_nnx, of_equinox, of_keras, of_penzai])
def test_a_whole_model_in_place_of_its_params_is_told_what_to_pass(make):
    model, batch, *_ = make()
    for call in (lambda: prune.scored(model), lambda: jaxeff.analyze(model, lambda params, x: x, batch)):
        with pytest.raises(
            TypeError, match=f"is the module {type(model).__name__} itself.*jaxeff.functional"
        ):
            call()


def test_equinox_modules_of_arrays_alone_are_params():
    eqx = pytest.importorskip("equinox")
    model, batch, *_ = of_equinox()
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    apply_fn = lambda arrays, x: jax.vmap(eqx.nn.inference_mode(eqx.combine(arrays, static)))(x)  # noqa: E731
    assert str(jaxeff.analyze(arrays, apply_fn, batch)) == str(jaxeff.analyze(model, batch))


def test_leaves_that_are_no_numbers_are_named():
    state = nnx.state(NNXNet(nnx.Rngs(0)))
    with pytest.raises(
        TypeError, match=r"holds a random key at 'dropout/rngs/.*nnx.state\(model, nnx.Param\)"
    ):
        jaxeff.analyze(state)
    with pytest.raises(TypeError, match="`params` is a str.*analyze_checkpoint"):
        jaxeff.analyze("model.safetensors")


def test_restore_keeps_names_and_shapes():
    model = NNXNet(nnx.Rngs(0))
    params, apply_fn = jaxeff.functional(model)
    small, _ = smaller(params, apply_fn, X)
    with pytest.raises(ValueError, match=r"'first/bias' has shape \(4,\), and \(8,\) in the model.*compact"):
        jaxeff.restore(model, small)
    with pytest.raises(ValueError, match="`params` has no 'first/bias'"):
        jaxeff.restore(model, {"first": {"kernel": params["first"]["kernel"]}})
    with pytest.raises(ValueError, match="`params` has a leaf 'third'"):
        jaxeff.restore(model, {**nnx.to_pure_dict(params), "third": X})


def test_importing_jaxeff_imports_none_of_them():
    script = """
import jax, flax.linen, flax.nnx, sys
import jaxeff
jaxeff.analyze, jaxeff.functional
params = {"w": jax.numpy.ones((3, 2))}
jaxeff.analyze(params, lambda params, x: x @ params["w"], jax.numpy.ones((4, 3)))
found = {"equinox", "keras", "penzai", "haliax", "levanter", "qwix", "torch", "tensorflow"} & sys.modules.keys()
assert not found, found
"""
    _ = subprocess.run([sys.executable, "-c", script], check=True)


def test_a_train_state_brings_its_running_averages():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(HIDDEN)(x))
            return nn.Dense(CLASSES)(nn.relu(x))

    class State(TrainState):
        batch_stats: dict

    variables = Net().init(jax.random.key(0), X)
    averages = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    state = State.create(
        apply_fn=Net().apply, params=variables["params"], tx=optax.sgd(0.1), batch_stats=averages
    )
    whole = {"params": state.params, "batch_stats": averages}
    assert str(jaxeff.analyze(state, X)) == str(jaxeff.analyze(whole, Net().apply, X))
    params, apply_fn = jaxeff.functional(state)
    restored = jaxeff.restore(state, jax.tree.map(jnp.zeros_like, params))
    assert (
        float(jnp.abs(restored.apply_fn({"params": restored.params, "batch_stats": averages}, X)).max()) == 0
    )
    assert apply_fn(params, X).shape == (32, CLASSES)


# State and modes


def test_keras_variables_that_are_not_trained():
    keras = pytest.importorskip("keras")
    model = keras.Sequential([
        keras.Input((FEATURES,)),
        keras.layers.Dense(HIDDEN, name="first"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Activation("relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(CLASSES, name="second"),
    ], name="net")  # fmt: skip
    _ = model(X, training=True)
    model.get_layer("first").trainable = False
    params, apply_fn = jaxeff.functional(model)
    # A frozen matrix is a weight; averages are not. Streams of random numbers are neither.
    assert {"net/first/kernel", "net/norm/gamma", "net/second/kernel"} <= params.keys()
    assert apply_fn.state.keys() == {"net/first/bias", "net/norm/moving_mean", "net/norm/moving_variance"}
    np.testing.assert_allclose(apply_fn(params, X), model(X), rtol=1e-5, atol=1e-6)
    plan = prune.plan(prune.groups(model, X), prune.scored(params), 0.5)
    small, small_apply = prune.compact(params, apply_fn, X, plan)
    assert small_apply.state["net/norm/moving_mean"].shape == (4,)
    masked = apply_fn(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-5, atol=1e-5)
    _, training = jaxeff.functional(model, training=True)
    assert not np.allclose(training(params, X), training(params, X[:, ::-1]))
    assert not np.allclose(training(params, X), apply_fn(params, X))


def test_a_keras_model_is_built_first():
    keras = pytest.importorskip("keras")
    with pytest.raises(ValueError, match="not built: call it on a batch first"):
        jaxeff.functional(keras.Sequential([keras.layers.Dense(3)]))


def test_keras_models_of_several_inputs():
    keras = pytest.importorskip("keras")
    inputs = [keras.Input((FEATURES,)), keras.Input((CLASSES,))]
    joined = keras.layers.Concatenate()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(joined))
    report = jaxeff.analyze(model, [X, TARGETS])
    assert [row.shape for row in report.rows] == [(FEATURES + CLASSES, 2)]


def test_equinox_models_with_a_state_come_as_a_pair():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        second: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(FEATURES, HIDDEN, key=key)
            self.norm = eqx.nn.BatchNorm(HIDDEN, "batch", mode="batch")
            self.second = eqx.nn.Linear(HIDDEN, CLASSES, key=key)

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            return self.second(jax.nn.relu(x)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = batched(X, state)
    params, apply_fn = jaxeff.functional((model, state))
    served = jax.vmap(eqx.nn.inference_mode(model), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    np.testing.assert_allclose(apply_fn(params, X), served(X, state)[0], rtol=1e-5, atol=1e-6)
    report = jaxeff.analyze((model, state), X)
    assert [row.nonlinearity for row in report.rows] == ["relu", "identity"]
    small, small_apply = smaller(params, apply_fn, X)
    plan = prune.plan(prune.groups((model, state), X), prune.scored(params), 0.5)
    masked = apply_fn(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-5, atol=1e-5)
    restored, same = jaxeff.restore((model, state), jax.tree.map(jnp.zeros_like, params))
    assert same is state and float(jnp.abs(restored.second.weight).max()) == 0


def test_equinox_models_get_smaller_whether_or_not_they_take_a_state():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(FEATURES, CLASSES, HIDDEN, depth=1, key=jax.random.key(0))
    params, apply_fn = jaxeff.functional(model)
    plan = prune.plan(prune.groups(model, X), prune.scored(params, prunable=prune.layout(model, X)), 0.5)
    small, small_apply = prune.compact(params, apply_fn, X, plan)
    masked = apply_fn(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-5, atol=1e-5)
    # A function does not print the arrays that it holds.
    assert len(f"{apply_fn} {small_apply}") < 600


def test_an_equinox_model_in_training_takes_a_key():
    eqx = pytest.importorskip("equinox")
    first, second = jax.random.split(jax.random.key(0))
    model = eqx.nn.Sequential([eqx.nn.Linear(FEATURES, 64, key=first), eqx.nn.Dropout(0.5)])
    params, apply_fn = jaxeff.functional(model, training=True)
    dropped = apply_fn(params, X, key=second) == 0
    assert 0.4 < float(dropped.mean()) < 0.6
    # Each example has its own.
    assert not bool((dropped == dropped[:1]).all())


# Quantized weights


QUANTIZATIONS = {
    "int8": {"weight_qtype": jnp.int8},
    "int8, activations too": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
    "int8 in tiles": {"weight_qtype": jnp.int8, "tile_size": 2},
    "int4": {"weight_qtype": jnp.int4},
    "fp8": {"weight_qtype": jnp.float8_e4m3fn},
}
# The largest difference in utilization that rounding to this many bits makes here, several times over.
ROUNDING = {"int4": 0.05, "fp8": 0.02}


def quantized(name):
    qwix = pytest.importorskip("qwix")
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **QUANTIZATIONS[name])])
    return qwix.quantize_model(whole_net(), provider, X)


def whole_net():
    model = NNXNet(nnx.Rngs(0))
    names = ["first/kernel", "first/bias", "second/kernel", "second/bias"]
    model = jaxeff.restore(
        model, filled(jaxeff.functional(model)[0], dict(zip(names, WEIGHTS.values(), strict=True)))
    )
    model.eval()
    return model


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantized_model_has_the_report_of_its_float_form(name):
    report, expected = jaxeff.analyze(quantized(name), X), jaxeff.analyze(whole_net(), X)
    assert list(report.layers) == list(expected.layers) == ["first/kernel", "second/kernel"]
    for ours, theirs in zip(report.rows, expected.rows, strict=True):
        assert (ours.nonlinearity, ours.macs, ours.shape) == (theirs.nonlinearity, theirs.macs, theirs.shape)
        rounding = ROUNDING.get(name, 0.005)
        np.testing.assert_allclose(ours.metrics.utilization, theirs.metrics.utilization, atol=rounding)
        np.testing.assert_allclose(ours.units, theirs.units, atol=10 * rounding * theirs.units.max())


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_is_masked_of_a_quantized_model_goes_back_exactly(name):
    model = quantized(name)
    params, apply_fn = jaxeff.functional(model)
    np.testing.assert_array_equal(apply_fn(params, X), model(X))
    masked = prune.apply(params, prune.masks(prune.scored(params), 0.5))
    expected = apply_fn(masked, X)
    np.testing.assert_array_equal(jaxeff.restore(model, masked)(X), expected)
    assert model.first.kernel.array.qvalue.dtype == QUANTIZATIONS[name]["weight_qtype"]
    with pytest.raises(ValueError, match="'first/kernel' is quantized.*between the steps"):
        jaxeff.restore(model, jax.tree.map(lambda leaf: leaf * 1.01, params))


def test_units_of_a_quantized_model_go_with_their_scales():
    params, apply_fn = jaxeff.functional(quantized("int8"))
    plan = prune.plan(prune.groups(params, apply_fn, X), prune.scored(params), 0.5)
    small, small_apply = prune.compact(params, apply_fn, X, plan)
    assert small_apply.state["scales"]["first/kernel"].shape == (1, 4)
    masked = apply_fn(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-5, atol=1e-5)


def test_gradients_of_quantized_weights_are_refused():
    with pytest.raises(ValueError, match="quantized weights pass no gradient"):
        jaxeff.analyze(quantized("int8"), X, criterion="fisher", loss_fn=loss, targets=TARGETS)


def test_quantized_linen_variables_are_read_in_place():
    qwix = pytest.importorskip("qwix")
    module = nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(CLASSES)])
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)])
    module = qwix.quantize_model(module, provider)
    variables = module.init(jax.random.key(0), X)
    for given in (variables, variables["params"]):
        report = jaxeff.analyze(given, module.apply, X)
        assert list(report.layers) == ["layers_0/kernel", "layers_2/kernel"]
    params, apply_fn = jaxeff.functional((variables, module.apply))
    np.testing.assert_array_equal(apply_fn(params, X), module.apply(variables, X))
    restored, apply = jaxeff.restore((variables, module.apply), jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(apply(restored, X), jnp.zeros((32, CLASSES)))


def test_a_zero_point_is_taken_off():
    pair = {"w": {"qvalue": jnp.array([[3, 1], [5, 9]], jnp.uint8), "scale": jnp.array([[0.5, 2.0]])}}
    pair["w"]["zero_point"] = jnp.array([[1, 1]], jnp.uint8)

    def apply(params, x):
        parts = {name: leaf.astype(jnp.float32) for name, leaf in params["w"].items()}
        return x @ ((parts["qvalue"] - parts["zero_point"]) * parts["scale"])

    params, apply_fn = jaxeff.functional((pair, apply))
    np.testing.assert_array_equal(params["w"], [[1.0, 0.0], [2.0, 16.0]])
    np.testing.assert_array_equal(apply_fn(params, jnp.eye(2)), params["w"])
    np.testing.assert_array_equal(
        jaxeff.restore((pair, apply), params)[0]["w"]["qvalue"], pair["w"]["qvalue"]
    )
    assert list(jaxeff.analyze(pair, apply, jnp.eye(2)).layers) == ["w"]


def keras_net():
    keras = pytest.importorskip("keras")
    model = keras.Sequential([
        keras.Input((FEATURES,)),
        keras.layers.Dense(HIDDEN, activation="relu", name="first"),
        keras.layers.Dense(CLASSES, name="second"),
    ], name="net")  # fmt: skip
    given = dict(zip(jaxeff.functional(model)[0], WEIGHTS.values(), strict=True))
    return jaxeff.restore(model, given)


def test_a_quantized_keras_model_is_scored_in_units_of_its_weights():
    model = keras_net()
    expected = jaxeff.analyze(model, X)
    model.quantize("int8")
    report = jaxeff.analyze(model, X)
    assert list(report.layers) == list(expected.layers)
    for ours, theirs in zip(report.rows, expected.rows, strict=True):
        np.testing.assert_allclose(ours.metrics.utilization, theirs.metrics.utilization, atol=0.005)
        np.testing.assert_allclose(ours.units, theirs.units, rtol=0.05, atol=0.05 * theirs.units.max())
    params, apply_fn = jaxeff.functional(model)
    np.testing.assert_array_equal(apply_fn(params, X), model(X))
    masked = prune.apply(params, prune.masks(prune.scored(params), 0.5))
    expected = apply_fn(masked, X)
    np.testing.assert_allclose(jaxeff.restore(model, masked)(X), expected, rtol=1e-6)


def test_a_keras_model_quantized_otherwise_is_refused():
    model = keras_net()
    model.quantize("int4")
    with pytest.raises(
        ValueError, match="'first' is quantized to int4, and jaxeff reads int8: .* before it is quant"
    ):
        jaxeff.functional(model)


# Low-rank updates


def of_qwix_lora():
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path="first", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(whole_net(), provider, X, rngs=nnx.Rngs(1))
    model.first.kernel_lora_b[...] = drawn(2, HIDDEN)
    a, b = (getattr(model.first, name)[...] for name in ("kernel_lora_a", "kernel_lora_b"))
    return model, "first/kernel", WEIGHTS["first"] + 1.5 * a @ b


def of_nnx_lora():
    first = nnx.LoRALinear(FEATURES, HIDDEN, lora_rank=2, rngs=nnx.Rngs(0))
    first.lora.lora_b[...] = drawn(2, HIDDEN)
    model = nnx.Sequential(first, nnx.relu, nnx.Linear(HIDDEN, CLASSES, rngs=nnx.Rngs(1)))
    return model, "layers/0/kernel", first.kernel[...] + first.lora.lora_a[...] @ first.lora.lora_b[...]


def of_keras_lora():
    model = keras_net()
    first = model.get_layer("first")
    first.enable_lora(2, lora_alpha=3)
    first.lora_kernel_a.assign(drawn(FEATURES, 2))
    first.lora_kernel_b.assign(drawn(2, HIDDEN))
    return model, "net/first/kernel", first.kernel.value if hasattr(first.kernel, "value") else first.kernel


@pytest.mark.parametrize("make", [of_qwix_lora, of_nnx_lora, of_keras_lora])
def test_a_weight_with_a_low_rank_update_has_one_more_row_of_their_sum(make):
    model, path, summed = make()
    report = jaxeff.analyze(model, X)
    row, weight = report[f"{path} + lora"], report[path]
    # By the same activations as the weight alone.
    scores = jnp.abs(summed) * jnp.asarray(weight.activity.mean_absolute)
    np.testing.assert_allclose(row.units, scores.sum(0), rtol=1e-4)
    expected = jaxeff.metrics.utilization(scores)
    np.testing.assert_allclose(row.metrics.utilization, expected, rtol=1e-4)
    assert (row.shape, row.nonlinearity, row.macs) == (weight.shape, "relu", weight.macs)
    assert abs(float(row.metrics.utilization) - float(weight.metrics.utilization)) > 1e-3


def test_no_total_counts_the_sum(tmp_path):
    model, path, _ = of_nnx_lora()
    report = jaxeff.analyze(model, X)
    sizes = sum(row.size for row in report.rows if not row.path.endswith("lora"))
    assert report.model.weights == sizes == FEATURES * HIDDEN + 2 * (FEATURES + HIDDEN) + HIDDEN * CLASSES
    parts = [row for row in report.rows if row.path != f"{path} + lora"]
    effective = sum(float(row.metrics.effective_params) for row in parts)
    np.testing.assert_allclose(report.model.effective_params, effective, rtol=1e-6)
    assert f"{sum(row.bytes for row in parts):,} bytes of weights" in str(report)
    assert jaxeff.Report.from_json(report.to_json())[f"{path} + lora"].is_sum
    report.to_html(tmp_path / "report.html")
    assert f"{path} + lora" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_factors_that_are_not_of_a_sum_make_no_row():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) + jnp.sin(x @ params["w_lora_a"] @ params["w_lora_b"])

    params = {"w": WEIGHTS["first"], "w_lora_a": drawn(FEATURES, 2), "w_lora_b": drawn(2, HIDDEN)}
    assert list(jaxeff.analyze(params, apply, X).layers) == ["w", "w_lora_a", "w_lora_b"]


# Larger networks of two libraries


def test_stacked_haliax_blocks_are_layers_and_get_smaller():
    hax = pytest.importorskip("haliax")
    eqx = pytest.importorskip("equinox")
    width, hidden, layers, vocabulary = (
        hax.Axis(name, size) for name, size in (("embed", 8), ("mlp", 16), ("layers", 3), ("vocab", 11))
    )

    class Block(eqx.Module):
        up: hax.nn.Linear
        down: hax.nn.Linear

        @staticmethod
        def init(key):
            up, down = jax.random.split(key)
            return Block(
                hax.nn.Linear.init(width, hidden, key=up), hax.nn.Linear.init(hidden, width, key=down)
            )

        def __call__(self, x):
            return x + self.down(hax.nn.gelu(self.up(x)))

    class Network(eqx.Module):
        embedding: hax.nn.Embedding
        blocks: hax.nn.Stacked

        def __call__(self, tokens):
            return self.embedding.unembed(self.blocks.fold(self.embedding(tokens)))

    first, second, third = jax.random.split(jax.random.key(0), 3)
    blocks = hax.nn.Stacked.init(layers, Block)(key=jax.random.split(first, 3))
    model = Network(hax.nn.Embedding.init(vocabulary, width, key=second), blocks)
    tokens = hax.random.randint(third, (hax.Axis("batch", 4), hax.Axis("position", 5)), 0, 11)
    report = jaxeff.analyze(model, tokens)
    assert report["blocks/stacked/up/weight[2]"].nonlinearity == "gelu_tanh" and not report.unpaired
    params, apply_fn = jaxeff.functional(model)
    scores = prune.scored(params, prunable=prune.layout(model, tokens))
    groups = prune.groups(model, tokens)
    plan = prune.plan(groups, scores, {"blocks/stacked/up/weight:mlp": 0.5})
    small, small_apply = prune.compact(params, apply_fn, tokens, plan)
    assert small["blocks/stacked/up/weight"].size == params["blocks/stacked/up/weight"].size // 2
    masked = apply_fn(prune.apply(params, plan.masks(params)), tokens)
    np.testing.assert_allclose(small_apply(small, tokens).array, masked.array, rtol=1e-4, atol=1e-5)
    names = [group.name for group in groups]
    stacked = "blocks/stacked/up/weight"
    assert names == [
        "embedding/weight:vocab",
        "embedding/weight:embed",
        f"{stacked}:layers",
        f"{stacked}:mlp",
    ]
    assert [group.name for group in prune.groups(small, small_apply, tokens)] == names
    assert str(prune.Plan.from_json(plan.to_json())) == str(plan)
    assert groups[f"{stacked}:1"] is groups[f"{stacked}:mlp"]
    assert ["blocks/stacked/down/weight:mlp", "16", "to", "8"] in [
        line.split() for line in str(plan).splitlines()
    ]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        # Haliax's weights lie (out, in).
        (of_haliax, ["first/weight:h", "first/weight:f", "second/weight:c"]),
        (
            of_penzai,
            [
                "net/Affine_0/Linear.weights:features",
                "net/Affine_0/Linear.weights:features_out",
                "net/Affine_1/Linear.weights:features_out",
            ],
        ),
    ],
)
def test_groups_are_named_by_the_axes_of_named_arrays(make, names):
    model, batch, _, _, _ = make()
    groups = prune.groups(model, batch)
    assert [group.name for group in groups] == names
    for group in groups:
        for member in group.members:
            assert groups[f"{member.path}:{member.axis}"] is groups[member.name] is group


def of_levanter():
    """A GPT-2 as Levanter writes it: a fold over rematerialized blocks, queries, keys and values along one axis."""
    hax = pytest.importorskip("haliax")
    eqx = pytest.importorskip("equinox")
    vocab, embed, mlp, heads, size, qkv, layers, position = (
        hax.Axis(name, length)
        for name, length in (
            ("vocab", 11), ("embed", 8), ("mlp", 12), ("heads", 2), ("head_size", 4), ("qkv", 3), ("layers", 3),
            ("position", 5),
        )
    )  # fmt: skip

    class Block(eqx.Module):
        norm: hax.nn.LayerNorm
        attn: hax.nn.Linear
        proj: hax.nn.Linear
        up: hax.nn.Linear
        down: hax.nn.Linear

        @staticmethod
        def init(key):
            attn, proj, up, down = jax.random.split(key, 4)
            return Block(
                hax.nn.LayerNorm.init(embed),
                hax.nn.Linear.init(embed, (qkv, heads, size), key=attn, out_first=False),
                hax.nn.Linear.init((heads, size), embed, key=proj, out_first=False),
                hax.nn.Linear.init(embed, mlp, key=up, out_first=False),
                hax.nn.Linear.init(mlp, embed, key=down, out_first=False),
            )

        def __call__(self, x, mask):
            query, key, value = self.attn(self.norm(x)).unbind("qkv")
            key, value = (one.rename({"position": "key_position"}) for one in (key, value))
            mixed = hax.nn.attention.dot_product_attention(
                "key_position", "head_size", query, key, value, mask=mask
            )
            x = x + self.proj(mixed)
            return x + self.down(hax.nn.gelu(self.up(self.norm(x))))

    class Model(eqx.Module):
        tokens: hax.nn.Embedding
        positions: hax.nn.Embedding
        blocks: hax.nn.Stacked
        norm: hax.nn.LayerNorm

        def __call__(self, tokens):
            mask = hax.nn.attention.causal_mask(position, position.alias("key_position"))
            x = self.tokens(tokens) + self.positions(hax.arange(position))
            return self.tokens.unembed(self.norm(self.blocks.fold(x, mask)))

    first, second, third, fourth = jax.random.split(jax.random.key(0), 4)
    stacked = hax.nn.Stacked.init(layers, Block, gradient_checkpointing=True)
    model = Model(
        hax.nn.Embedding.init(vocab, embed, key=first),
        hax.nn.Embedding.init(position, embed, key=second),
        stacked(key=jax.random.split(third, 3)),
        hax.nn.LayerNorm.init(embed),
    )
    return model, hax.random.randint(fourth, (hax.Axis("batch", 4), position), 0, 11)


def test_a_language_model_of_levanters_shape_is_read_and_gets_smaller():
    model, tokens = of_levanter()
    report = jaxeff.analyze(model, tokens)
    assert not report.unpaired and not report.headless and len(report.rows) == 2 + 4 * 3
    assert [found.heads for found in report.attentions] == [2]
    groups = prune.groups(model, tokens)
    kinds = {group.name.removeprefix("blocks/stacked/"): group.kind for group in groups.unlocked}
    assert kinds == {"norm/weight:layers": "block", "attn/weight:heads": "head", "up/weight:mlp": "unit"}
    params, apply_fn = jaxeff.functional(model)
    scores = prune.scored(params, prunable=prune.layout(model, tokens))
    plan = prune.plan(groups, scores, 0.5)
    small, small_apply = prune.compact(model, tokens, plan)
    masked = apply_fn(prune.apply(params, plan.masks(params)), tokens)
    np.testing.assert_allclose(small_apply(small, tokens).array, masked.array, rtol=1e-4, atol=1e-5)
    masked = prune.apply(params, prune.masks(scores, 0.5))
    restored = jaxeff.restore(model, masked)
    np.testing.assert_array_equal(restored(tokens).array, apply_fn(masked, tokens).array)


def test_penzai_arrays_whose_axes_lie_in_another_order_have_the_right_names():
    pytest.importorskip("penzai")
    from penzai import pz

    @pz.pytree_dataclass
    class Product(pz.nn.Layer):
        weight: pz.Parameter

        def __call__(self, x, **side):
            weight = self.weight.value
            weight = weight.tag("h") if weight.positional_shape else weight
            return pz.nx.nmap(jnp.dot)(x.untag("f"), weight.untag("f", "h")).tag("h")

    batch = pz.nx.wrap(X).tag("batch", "f")
    named = pz.nx.wrap(WEIGHTS["first"]).tag("f", "h")
    # Axes that lost their names stay where they are, and `order_as` moves named ones.
    for value, names in (
        (named, ["w:f", "w:h"]),
        (named.order_as("h", "f"), ["w:h", "w:f"]),
        (named.untag("h"), ["w:f", "w:1"]),
    ):
        groups = prune.groups(Product(pz.Parameter(value=value, label="w")), batch)
        assert [group.name for group in groups] == names
        assert [group.size for group in groups] == [{"w:f": FEATURES}.get(name, HIDDEN) for name in names]


def test_keras_layers_of_every_kind_are_read():
    keras = pytest.importorskip("keras")
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, padding="same", name="conv")(image)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Reshape((64, 6))(x)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.LSTM(5)(keras.layers.LayerNormalization()(x))
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Dropout(0.5)(x)))
    batch = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    report = jaxeff.analyze(model, batch)
    assert len(report.rows) == 8 and not report.unpaired
    assert [found.heads for found in report.attentions] == [2]
    kinds = {group.kind for group in prune.groups(model, batch).unlocked}
    assert kinds == {"channel", "head", "head_size", "unit"}
