"""Fluctuation of units equals NumPy's in float64, and what is constant moves into the next bias without a change."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxeff
from jaxeff import graph, prune
from jaxeff.statistics.deviations import Deviations, over_iterations

draw = np.random.default_rng(0).standard_normal


def normal(*shape):
    return jnp.asarray(draw(shape), jnp.float32)


X = normal(32, 6)
TOKENS = normal(8, 5, 6)
IMAGES = normal(4, 8, 8, 3)


class Perceptron(nn.Module):
    hidden: int = 8

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(self.hidden, name="units")(x)))


class Convolutions(nn.Module):
    size: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="units")(x))
        return nn.Conv(5, (self.size, self.size), name="head")(x).mean((1, 2))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(3, name="attention")(x, x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(x))), None


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(scan(name="blocks")(x, None)[0])


def with_constants(variables, *paths, units=(1, 4)):
    """The same, where these units have no weights that lead in, but a bias."""
    for path in paths:
        *modules, name = path.split("/")
        module = variables["params"]
        for each in (*modules, name):
            module = module[each]
        kernel, bias = module["kernel"], module["bias"]
        module["kernel"] = kernel.at[..., units, :].set(0) if kernel.ndim > bias.ndim + 1 else kernel
        module["kernel"] = module["kernel"].at[..., units].set(0)
        module["bias"] = bias.at[..., units].set(0.7)
    return variables


def removed_and_compensated(model, variables, x):
    groups, found = (f(variables, model.apply, x) for f in (prune.groups, prune.fluctuation))
    plan = prune.Plan.of(groups, found.constant)
    small, small_apply = prune.compact(found.compensated(variables, plan), model.apply, x, plan)
    return plan, model.apply(variables, x), small_apply(small, x)


def test_importance_is_that_of_numpy():
    """FLAP's equation 5, in float64 from the float32 activations; sums of 32 terms agree to 1e-5."""
    model, variables = Perceptron(), Perceptron().init(jax.random.key(0), X)
    found = prune.fluctuation(variables, model.apply, X)
    params = variables["params"]
    hidden = np.tanh(np.float64(X) @ np.float64(params["units"]["kernel"]))
    expected = hidden.var(0) * np.square(np.float64(params["head"]["kernel"])).sum(1)
    np.testing.assert_allclose(found.importance["units/kernel:1"], expected, 1e-5)
    np.testing.assert_allclose(found.readers["head/kernel"].mean.ravel(), hidden.mean(0), 1e-5, 1e-6)


def test_importance_is_the_error_of_the_compensated_layer():
    model, variables = Perceptron(), Perceptron().init(jax.random.key(0), X)
    groups, found = (f(variables, model.apply, X) for f in (prune.groups, prune.fluctuation))
    for unit in range(8):
        plan = prune.Plan.of(groups, {"units/kernel:1": [unit]})
        small = prune.shrink(found.compensated(variables, plan), plan)
        change = np.asarray(Perceptron(7).apply(small, X) - model.apply(variables, X), np.float64)
        np.testing.assert_allclose(change.mean(0), 0, atol=1e-6)
        # Differences of outputs near 1 in float32.
        np.testing.assert_allclose(
            np.square(change).sum(1).mean(), found.importance["units/kernel:1"][unit], 1e-4
        )


CASES = {
    "dense": (Perceptron(), X, ["units"]),
    "convolution of size 1": (Convolutions(1), IMAGES, ["units"]),
    "scanned blocks": (Blocks(), X, ["blocks/up"]),
}


@pytest.mark.parametrize("case", CASES)
def test_constant_units_go_without_a_change(case):
    model, x, paths = CASES[case]
    variables = with_constants(model.init(jax.random.key(0), x), *paths)
    plan, dense, small = removed_and_compensated(model, variables, x)
    (group,) = plan.groups
    np.testing.assert_array_equal(plan.removed[group.name], np.broadcast_to([1, 4], (*group.blocks, 2)))
    np.testing.assert_allclose(small, dense, 1e-5, 1e-5)


def test_a_head_with_constant_values_goes_without_a_change():
    model = Attention()
    variables = model.init(jax.random.key(0), TOKENS)
    value = variables["params"]["attention"]["value"]
    value["kernel"], value["bias"] = value["kernel"].at[:, 1].set(0), value["bias"].at[1].set(0.7)
    plan, dense, small = removed_and_compensated(model, variables, TOKENS)
    (group,) = plan.groups
    assert (group.kind, plan.removed[group.name]) == ("head", (1,))
    # A softmax adds up to 1 to a few roundings.
    np.testing.assert_allclose(small, dense, 1e-5, 1e-5)


def test_what_a_border_of_zeros_changes_is_not_constant():
    """Of two constant units, one that emits 0 is as 0 as the padding beside it, and one that emits 0.7 is not."""
    model = Convolutions(3)
    variables = with_constants(model.init(jax.random.key(0), IMAGES), "units")
    variables["params"]["units"]["bias"] = variables["params"]["units"]["bias"].at[4].set(-1.0)
    plan, dense, small = removed_and_compensated(model, variables, IMAGES)
    assert list(plan.removed.values()) == [(4,)]
    np.testing.assert_allclose(small, dense, 1e-5, 1e-5)


def test_uses_in_time_count_as_one():
    """A layer that a scan over time repeats reads what it would read at all positions side by side."""
    params = {"a": normal(6, 4), "c": normal(4, 2)}

    def at_once(params, x):
        return jnp.tanh(x @ params["a"]) @ params["c"]

    def in_time(params, x):
        return jax.lax.scan(lambda _, x: (0, at_once(params, x)), 0, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    one, other = (prune.fluctuation(params, f, TOKENS) for f in (at_once, in_time))
    np.testing.assert_allclose(other.importance["a:1"], one.importance["a:1"], 1e-5)
    np.testing.assert_allclose(other.readers["c"].mean, one.readers["c"].mean, 1e-5, 1e-6)


def test_only_iterations_that_use_a_weight_count():
    """One token at a time, of which a condition lets some through: mean and spread are NumPy's of those."""
    used = [1, 2, 4]
    params = {"a": jnp.asarray(draw((6, 4)), jnp.float32), "c": jnp.asarray(draw((4, 2)), jnp.float32)}

    def model(params, x):
        def step(_, each):
            use, x = each
            return 0, jax.lax.cond(
                use, lambda: jnp.tanh(x @ params["a"]) @ params["c"], lambda: jnp.zeros((1, 2))
            )

        return jax.lax.scan(step, 0, (jnp.isin(jnp.arange(5), jnp.array(used)), x[:, None]))[1]

    found = prune.fluctuation(params, model, TOKENS[0])
    hidden = np.tanh(np.float64(TOKENS[0])[used] @ np.float64(params["a"]))
    expected = hidden.var(0) * np.square(np.float64(params["c"])).sum(1)
    np.testing.assert_allclose(found.readers["c"].mean.ravel(), hidden.mean(0), 1e-5, 1e-6)
    np.testing.assert_allclose(found.importance["a:1"], expected, 1e-5, 1e-7)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 1], [0, 0, 0]], ids=str)
def test_deviations_of_parts_add_up_to_those_of_all(counts):
    """Side by side, as a scan leaves them, and one after the other; a part that did not run has zeros."""
    parts = [draw((count, 6)) + 3 for count in counts]
    whole = np.concatenate(parts)

    def of(numbers):
        mean = numbers.sum(0) / max(len(numbers), 1)
        return Deviations(
            *map(jnp.float32, (np.full(1, len(numbers)), mean, np.square(numbers - mean).sum(0)))
        )

    each = [of(part) for part in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    at_once = over_iterations(stacked, [graph.Loop("scan", len(counts), None)])
    for found in (at_once, functools.reduce(operator.add, each)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, of(whole))


def test_an_nnx_model_and_its_own_class():
    class Model(nnx.Module):
        def __init__(self, hidden, rngs):
            self.up, self.down = nnx.Linear(6, hidden, rngs=rngs), nnx.Linear(hidden, 3, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    model = Model(8, nnx.Rngs(0))
    model.up.kernel[...] = model.up.kernel[...].at[:, 2].set(0)
    model.up.bias[...] = model.up.bias[...].at[2].set(0.5)
    groups, found = prune.groups(model, X), prune.fluctuation(model, X)
    plan = prune.Plan.of(groups, found.constant)
    assert list(plan.removed.values()) == [(2,)]
    params, apply_fn = jaxeff.functional(model)
    small, small_apply = prune.compact(found.compensated(params, plan), apply_fn, X, plan)
    np.testing.assert_allclose(small_apply(small, X), model(X), 1e-5, 1e-5)


def softplus_bias(w, h, x):
    return h @ w["c"] + jax.nn.softplus(w["d"])


NOT_ITS_OWN = {
    "shared by two layers": lambda w, h, x: (h @ w["c"] + w["d"], x @ w["e"] + w["d"]),
    "returned as well": lambda w, h, x: (h @ w["c"] + w["d"], w["d"]),
    "doubled": lambda w, h, x: h @ w["c"] + 2 * w["d"],
    "learned at another rate": lambda w, h, x: h @ w["c"] + 0.01 * w["d"],
    "made positive": softplus_bias,
    "a scale as well": lambda w, h, x: (h @ w["c"] + w["d"]) * w["d"],
    "of transposed units": lambda w, h, x: (
        jnp.einsum("ni,iab->nba", h, w["c"].reshape(6, 2, 2)) + w["d"].reshape(1, 2, 2)
    ),
    "none": lambda w, h, x: h @ w["c"],
}


@pytest.mark.parametrize("case", NOT_ITS_OWN)
def test_a_bias_that_is_not_the_layers_own_takes_nothing_over(case):
    w = {"a": normal(6, 6), "b": jnp.zeros((1, 6)).at[0, 2].set(3.0), "c": normal(6, 4), "d": normal(1, 4)}
    w = w | {"a": w["a"].at[:, 2].set(0), "e": normal(6, 4)}

    def model(w, x):
        return NOT_ITS_OWN[case](w, jax.nn.relu(x @ w["a"] + w["b"]), x)

    found = prune.fluctuation(w, model, X)
    plan = prune.Plan.of(prune.groups(w, model, X), {"a:1": [2]})
    with pytest.raises(ValueError, match="'c' reads what the plan removes, and has no bias of its own"):
        found.compensated(w, plan)


@pytest.mark.parametrize("shared", [False, True])
def test_stacked_layers_take_over_each_its_own(shared):
    w = {
        "up": normal(3, 6, 6),
        "b": normal(3, 6),
        "down": normal(3, 6, 6),
        "d": normal(6) if shared else normal(3, 6),
    }
    w = w | {"up": w["up"].at[:, :, 2].set(0), "b": w["b"].at[:, 2].set(jnp.array([1.0, 2.0, 3.0]))}

    def model(w, x):
        def block(x, one):
            hidden = jax.nn.relu(x @ one["up"] + one["b"][None])
            return x + (hidden @ one["down"] + (w["d"] if shared else one["d"])[None]), None

        own = {name: w[name] for name in w if not (shared and name == "d")}
        return jax.lax.scan(block, x, own)[0]

    found = prune.fluctuation(w, model, X)
    plan = prune.Plan.of(prune.groups(w, model, X), {"up:2": [[2]] * 3})
    if shared:
        with pytest.raises(
            ValueError, match="'down' reads what the plan removes, and has no bias of its own"
        ):
            found.compensated(w, plan)
    else:
        small = prune.shrink(found.compensated(w, plan), plan)
        np.testing.assert_allclose(model(small, X), model(w, X), 1e-5, 1e-5)


def test_a_layer_used_twice_has_its_bias_twice():
    w = {"a": normal(6, 6).at[:, 2].set(0), "b": jnp.zeros((1, 6)).at[0, 2].set(3.0), "c": normal(6, 6)}
    w = w | {"d": normal(1, 6)}

    def model(w, x):
        layer = lambda x: jax.nn.relu(x @ w["a"] + w["b"]) @ w["c"] + w["d"]  # noqa: E731
        return layer(jnp.tanh(layer(x)))

    found = prune.fluctuation(w, model, X)
    plan = prune.Plan.of(prune.groups(w, model, X), {"a:1": [2]})
    assert 2 in found.constant["a:1"]
    small = prune.shrink(found.compensated(w, plan), plan)
    np.testing.assert_allclose(model(small, X), model(w, X), 1e-5, 1e-5)


@pytest.mark.parametrize("layer", ["padded", "spread", "valid"])
def test_only_convolutions_that_meet_zeros_tell_constants_from_zeros(layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (1, 1), name="units")(x))
            if layer == "spread":
                return nn.ConvTranspose(5, (1, 1), strides=(2, 2), name="head")(x)
            size, padding = ((1, 1), 1) if layer == "padded" else ((3, 3), "VALID")
            return nn.Conv(5, size, padding=padding, name="head")(x)

    variables = with_constants(Model().init(jax.random.key(0), IMAGES), "units")
    if layer != "valid":
        assert not prune.fluctuation(variables, Model().apply, IMAGES).constant
        return
    plan, dense, small = removed_and_compensated(Model(), variables, IMAGES)
    assert list(plan.removed.values()) == [(1, 4)]
    np.testing.assert_allclose(small, dense, 1e-5, 1e-5)


def test_one_example_and_a_layer_that_does_not_run_tell_nothing():
    def model(w, x):
        hidden = jax.nn.relu(x @ w["a"])
        return jax.lax.cond(x.sum() > 0, lambda h: h @ w["c"], lambda h: jnp.zeros((len(h), 2)), hidden)

    w = {"a": normal(6, 4), "c": normal(4, 2)}
    assert not prune.fluctuation(w, model, -jnp.abs(X)).constant
    with pytest.raises(ValueError, match="`batch` holds one value of each unit"):
        prune.fluctuation(Perceptron().init(jax.random.key(0), X), Perceptron().apply, X[:1])


def test_blocks_and_experts_are_scored_elsewhere():
    variables = Blocks().init(jax.random.key(0), X)
    groups, found = (f(variables, Blocks().apply, X) for f in (prune.groups, prune.fluctuation))
    (blocks,) = [group for group in groups if group.kind == "block"]
    assert "prune.block_influence" in found.skipped[blocks.name]
    plan = prune.Plan.of(groups, {blocks.name: [0]})
    with pytest.raises(ValueError, match="did not score: its elements are whole blocks"):
        found.compensated(variables, plan)


def test_no_bias_is_an_error_unless_what_goes_is_zero():
    def model(params, x):
        return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]

    params = {"a": jnp.zeros((6, 3)), "b": jnp.array([[0.0, 1.0, -1.0]]), "c": jnp.ones((3, 2))}
    groups, found = (f(params, model, X) for f in (prune.groups, prune.fluctuation))
    assert found.constant["a:1"].tolist() == [0, 1]
    dead = prune.Plan.of(groups, {"a:1": [0, 2]})
    jax.tree.map(np.testing.assert_array_equal, found.compensated(params, dead), params)
    with pytest.raises(ValueError, match="'c' reads what the plan removes, and has no bias of its own"):
        found.compensated(params, prune.Plan.of(groups, {"a:1": [1]}))


def test_bad_input_is_named():
    model, variables = Perceptron(), Perceptron().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="the inputs of 'units/kernel' are not finite on this batch"):
        prune.fluctuation(variables, model.apply, X.at[0, 0].set(jnp.nan))
    found = prune.fluctuation(variables, model.apply, X)
    other = Perceptron(9).init(jax.random.key(0), X)
    plan = prune.Plan.of(prune.groups(other, Perceptron(9).apply, X), {"units/kernel:1": [0]})
    with pytest.raises(ValueError, match="of another model"):
        found.compensated(variables, plan)
    with pytest.raises(ValueError, match="of another model: 'units/kernel:1' has elements"):
        found.compensated(other, plan)


def test_groups_of_which_a_reader_is_not_understood_are_named():
    def model(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        return hidden @ (params["b"] / jnp.linalg.norm(params["b"]))

    params = {"a": normal(6, 4), "b": normal(4, 2)}
    groups = prune.groups(params, model, X)
    found = prune.fluctuation(params, model, X)
    for group in groups.unlocked:
        assert (group.name in found.importance) != (group.name in found.skipped)


def test_a_table_that_is_looked_up_twice_reads_nothing():
    """Source and target of a translation share their embeddings."""
    params = {"table": normal(9, 4), "hidden": normal(4, 6), "out": normal(6, 3)}

    def network(p, source, target):
        return jnp.tanh((p["table"][source] + p["table"][target]) @ p["hidden"]) @ p["out"]

    batch = jnp.arange(12).reshape(4, 3) % 9, jnp.arange(12).reshape(4, 3) % 7
    found = prune.fluctuation(params, network, batch)
    assert set(found.importance) == {"table:1", "hidden:1"}
    emitted = np.tanh(np.float64(params["table"][batch[0]] + params["table"][batch[1]]) @ params["hidden"])
    expected = emitted.reshape(12, 6).var(0) * (np.float64(params["out"]) ** 2).sum(1)
    np.testing.assert_allclose(found.importance["hidden:1"], expected, rtol=1e-5)


def test_readers_of_complex_numbers_are_named():
    params = {"up": normal(4, 6), "down": normal(6, 3)}
    found = prune.fluctuation(
        params, lambda p, x: (jnp.tanh(x @ p["up"]) * np.complex64(1j) @ p["down"]).real, normal(8, 4)
    )
    assert found.importance == {} and "its inputs are complex" in found.skipped["up:1"]
