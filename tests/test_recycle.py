"""`prune.recycle`: outputs stay, units live again, and the optimizer forgets them and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import normal

import jaxeff
from jaxeff import demo, prune


def _model(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["bias"][None])
    return hidden @ params["b"] + params["end"][None]


def _params(dead=(1, 4)):
    params = {
        "a": normal(6, 8),
        "bias": normal(8, seed=1) / 4,
        "b": normal(8, 3, seed=2),
        "end": normal(3, seed=3),
    }
    params["bias"][list(dead)] = -100
    return params


def _recycled(params, model, x, state=None, tau=0.0, **options):
    report = jaxeff.analyze(params, model, x)
    options = {"key": jax.random.key(0)} | options
    return prune.recycle(params, prune.groups(params, model, x), report, state, tau=tau, **options)


def test_outputs_stay_and_the_units_fire_and_learn():
    params, x = _params(), normal(64, 6, seed=4)
    found = _recycled(params, _model, x)
    assert {name: list(units) for name, units in found.units.items()} == {"a:1": [1, 4]}
    # Both by JAX: the products of NumPy differ in their last bits.
    dense = _model(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    np.testing.assert_array_equal(_model(found.params, jnp.asarray(x)), dense)
    for path, axis in (("a", 1), ("bias", 0), ("b", 0)):
        old, new = (np.moveaxis(np.asarray(tree[path]), axis, 0) for tree in (params, found.params))
        np.testing.assert_array_equal(np.delete(new, [1, 4], 0), np.delete(old, [1, 4], 0))
    assert not np.any(found.params["b"][jnp.array([1, 4])]) and not np.any(
        found.params["bias"][jnp.array([1, 4])]
    )
    np.testing.assert_array_equal(found.params["end"], params["end"])
    activity = jaxeff.analyze(found.params, _model, x)["a"].activity
    assert int(activity.dead) == 0

    def loss(params):
        return jnp.mean(jnp.square(_model(params, x) - 1))

    gradients, before = jax.grad(loss)(found.params), jax.grad(loss)(params)
    assert np.all(np.any(np.asarray(gradients["b"])[[1, 4]] != 0, axis=1))
    assert not np.any(np.asarray(before["b"])[[1, 4]])
    stepped = jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, found.params, gradients)
    assert np.all(np.any(np.asarray(jax.grad(loss)(stepped)["a"])[:, [1, 4]] != 0, axis=0))


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0])
def test_units_are_those_at_most_tau_of_the_layers_mean(tau):
    params, x = _params(), normal(64, 6, seed=4)
    params["a"][:, 2] *= 0.02
    params["bias"][2] = 0
    emitted = np.maximum(x.astype(np.float64) @ params["a"] + params["bias"], 0).mean(axis=0)
    expected = np.flatnonzero(emitted / emitted.mean() <= tau)
    found = _recycled(params, _model, x, tau=tau)
    assert found.units["a:1"].tolist() == expected.tolist()
    assert 2 in expected or not tau


def test_moments_are_0_where_a_number_changed_and_nowhere_else():
    params, x = jax.tree.map(jnp.asarray, _params()), normal(64, 6, seed=4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    state = jax.tree.map(jnp.ones_like, optimizer.init(params))
    found = _recycled(params, _model, x, state)
    (adam,) = [each for each in jax.tree.leaves(found.opt_state, is_leaf=_is_adam) if _is_adam(each)]
    gone = np.isin(np.arange(8), [1, 4])
    for moments in (adam.mu, adam.nu):
        np.testing.assert_array_equal(moments["a"], np.broadcast_to(~gone[None], (6, 8)))
        np.testing.assert_array_equal(moments["bias"], ~gone)
        np.testing.assert_array_equal(moments["b"], np.broadcast_to(~gone[:, None], (8, 3)))
        np.testing.assert_array_equal(moments["end"], np.ones(3))
    assert int(adam.count) == 1 and jax.tree.structure(found.opt_state) == jax.tree.structure(state)
    # It goes on training.
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), found.opt_state, found.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_new_weights_have_the_layers_own_distribution():
    """LeCun normal: variance 1 / fan-in, whichever axis the inputs are."""
    x = normal(8, 500, seed=1)
    for flipped in (False, True):
        model = lambda p, x, t=flipped: jax.nn.relu(x @ (p["a"].T if t else p["a"])) @ p["b"]  # noqa: E731
        weight = np.zeros((500, 40), np.float32)
        params = {"a": weight.T if flipped else weight, "b": normal(40, 3)}
        found = _recycled(params, model, x)
        new = np.asarray(found.params["a"])
        assert new.std() == pytest.approx(500**-0.5, rel=0.03) and abs(new.mean()) < 0.002
        assert np.abs(new).max() < 2.4 * 500**-0.5  # truncated
    params = {"a": weight, "b": normal(40, 3)}
    model = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    found = _recycled(params, model, x, initializer=jax.nn.initializers.constant(0.5))
    assert np.all(np.asarray(found.params["a"]) == 0.5)
    one, same, other = (
        _recycled(params, model, x, key=jax.random.key(seed)).params["a"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(6, (3, 3), name="first")(x)))
        x = nn.relu(nn.Conv(4, (3, 3), name="second")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def test_convolutions_with_norms_and_variables():
    x, model = normal(4, 5, 5, 2), Convolutions()
    variables = jax.tree.map(np.array, model.init(jax.random.key(0), x))
    variables["params"]["norm"]["bias"][2] = -50
    variables["params"]["norm"]["scale"][2] = 3
    variables["batch_stats"]["norm"]["mean"][2] = 7
    variables["batch_stats"]["norm"]["var"][2] = 5
    variables["params"]["second"]["bias"][1] = -50
    optimizer = optax.adam(0.1)
    state = jax.tree.map(jnp.ones_like, optimizer.init(variables["params"]))
    found = _recycled(variables, model.apply, x, state)
    assert {name: list(units) for name, units in found.units.items()} == {
        "first/kernel:3": [2],
        "second/kernel:3": [1],
    }
    np.testing.assert_allclose(model.apply(found.params, x), model.apply(variables, x), rtol=1e-6, atol=1e-6)
    norm, averages = found.params["params"]["norm"], found.params["batch_stats"]["norm"]
    assert (norm["scale"][2], norm["bias"][2], averages["mean"][2], averages["var"][2]) == (1, 0, 0, 1)
    assert not np.any(found.params["params"]["second"]["kernel"][:, :, 2])
    # All positions of the recycled channel.
    head = np.asarray(found.params["params"]["head"]["kernel"]).reshape(5, 5, 4, 3)
    assert not np.any(head[:, :, 1]) and np.all(np.any(head[:, :, [0, 2, 3]] != 0, axis=(0, 1, 3)))
    mu = found.opt_state[0].mu
    assert not np.any(mu["first"]["kernel"][..., 2]) and np.sum(mu["norm"]["bias"]) == 5
    report = jaxeff.analyze(found.params, model.apply, x)
    assert int(report["first/kernel"].activity.dead) == int(report["second/kernel"].activity.dead) == 0


def test_each_stacked_block_has_units_of_its_own():
    params = {"up": normal(3, 4, 8), "bias": normal(3, 8, seed=1) / 4, "down": normal(3, 8, 4, seed=2)}
    params["bias"][0, 2], params["bias"][2, [5, 6]] = -100, -100
    x = normal(256, 4, seed=3)

    def model(params, x):
        def block(x, w):
            return x + jax.nn.relu(x @ w["up"] + w["bias"][None]) @ w["down"], None

        return jax.lax.scan(block, x, params)[0]

    state = jax.tree.map(jnp.ones_like, optax.sgd(0.1, momentum=0.9).init(params))
    found = _recycled(params, model, x, state)
    expected = np.zeros((3, 8), bool)
    expected[0, 2], expected[2, [5, 6]] = True, True
    np.testing.assert_array_equal(found.units["up:2"], expected)
    np.testing.assert_array_equal(np.all(np.asarray(found.params["down"]) == 0, axis=2), expected)
    np.testing.assert_array_equal(np.any(np.asarray(found.params["up"]) != params["up"], axis=1), expected)
    np.testing.assert_array_equal(np.asarray(found.opt_state[0].trace["bias"]) == 0, expected)
    np.testing.assert_allclose(model(found.params, x), model(params, x), rtol=1e-5, atol=1e-5)
    drawn = np.asarray(found.params["up"])
    assert np.any(drawn[2, :, 5] != drawn[2, :, 6]) and np.any(drawn[0, :, 2] != drawn[2, :, 5])


def test_bfloat16_stays():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), _params())
    x = jnp.asarray(normal(64, 6, seed=4), jnp.bfloat16)
    found = _recycled(params, _model, x, optax.adam(0.1).init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(_model(found.params, x), _model(params, x))


def test_nnx():
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 2, rngs=nnx.Rngs(1)))
    model.layers[0].bias[...] = model.layers[0].bias[...].at[3].set(-100)
    params, apply_fn = jaxeff.functional(model)
    x = normal(16, 5)
    optimizer = optax.adam(0.1)
    state = jax.tree.map(jnp.ones_like, optimizer.init(params))
    found = _recycled(params, apply_fn, x, state)
    assert [units.tolist() for units in found.units.values()] == [[3]]
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    np.testing.assert_allclose(apply_fn(found.params, x), apply_fn(params, x), rtol=1e-6)
    zeros = [int(np.sum(np.asarray(leaf) == 0)) for leaf in jax.tree.leaves(found.opt_state[0].mu)]
    assert sorted(zeros) == sorted([5, 1, 2, 0])


def test_named_units():
    params, x = _params(dead=()), normal(64, 6, seed=4)
    for units in ([0, 3], np.isin(np.arange(8), [0, 3])):
        found = _recycled(params, _model, x, units={"a:1": units})
        assert found.units["a:1"].tolist() == [0, 3]
        assert np.flatnonzero(~np.any(np.asarray(found.params["b"]), axis=1)).tolist() == [0, 3]


def test_nothing_to_recycle():
    params, x = _params(dead=()), normal(64, 6, seed=4)
    state = optax.adam(0.1).init(params)
    found = _recycled(params, _model, x, state)
    assert not found.units
    for ours, theirs in zip(
        jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves((params, state)), strict=True
    ):
        assert ours is theirs
    assert _recycled(params, _model, x).opt_state is None


def test_a_layer_that_is_silent_as_a_whole_is_recycled_as_a_whole():
    params, x = _params(dead=range(8)), normal(64, 6, seed=4)
    found = _recycled(params, _model, x)
    assert found.units["a:1"].tolist() == list(range(8))
    np.testing.assert_array_equal(_model(found.params, x), _model(params, x))


def test_layers_without_a_nonlinearity_are_left_alone():
    params = {"a": np.zeros((6, 8), np.float32), "b": normal(8, 3)}
    found = _recycled(params, lambda p, x: x @ p["a"] @ p["b"], normal(5, 6))
    assert not found.units


def test_bad_input():
    params, x = _params(), normal(64, 6, seed=4)
    report, groups = jaxeff.analyze(params, _model, x), prune.groups(params, _model, x)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="pass groups from `prune.groups`, then a report"):
        prune.recycle(params, report, groups, key=key)
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`tau` must be from 0 to 1"):
            prune.recycle(params, groups, report, key=key, tau=tau)
    with pytest.raises(ValueError, match="'end:0', which is not a group of units"):
        prune.recycle(params, groups, report, key=key, units={"end:0": [0]})
    for units in ([8], [-1], [0.5], np.ones(7, bool), np.ones((1, 8), bool)):
        with pytest.raises(ValueError, match="or indices below 8"):
            prune.recycle(params, groups, report, key=key, units={"a:1": units})
    other = jaxeff.analyze({"w": normal(6, 3)}, lambda p, x: x @ p["w"], x)
    with pytest.raises(ValueError, match="of another model"):
        prune.recycle(params, groups, other, key=key)
    with pytest.raises(ValueError, match="`params` is of another model: .* has shape None there"):
        prune.recycle({"w": normal(6, 3)}, groups, report, key=key)
    with pytest.raises(TypeError, match="`units` must map names of groups to elements, got list"):
        prune.recycle(params, groups, report, key=key, units=[0])


def test_an_old_key_gives_what_a_new_one_gives():
    params, x = _params(), normal(64, 6, seed=4)
    old, new = (
        _recycled(params, _model, x, key=key).params["a"]
        for key in (jax.random.PRNGKey(3), jax.random.key(3))
    )
    np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy():
    state, _ = demo.train(seed=0, epochs=5)
    training, test = demo.split(demo.digits())
    params = {"params": state.params}
    report = jaxeff.analyze(params, state.apply_fn, training.images)
    groups = prune.groups(params, state.apply_fn, training.images[:2])
    found = prune.recycle(params, groups, report, state.opt_state, tau=0.05, key=jax.random.key(0))
    assert sum(units.size for units in found.units.values()) > 0
    after = state.replace(params=found.params["params"], opt_state=found.opt_state)
    assert demo.accuracy(after, test) > demo.accuracy(state, test) - 0.02
