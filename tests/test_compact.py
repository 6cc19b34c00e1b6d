"""A compacted model computes what the masked one does, at the sizes that are left, in every transformation of JAX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx
from network import drawn, normal
from shrinkable import NETWORKS
from test_structure import PASSES, Net, large, random_plan, two_layers, width_of

import jaxeff
from jaxeff import prune
from jaxeff.cost import count

P = jax.sharding.PartitionSpec


def close(small, large):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), small, large)


@functools.cache
def compacted(name, allow=()):
    """A network made smaller: plan, masked variables, small variables, small function."""
    network, variables, groups = large(name)
    if allow:
        groups = prune.groups(variables, network.module.apply, network.batch, allow=allow)
    plan = random_plan(groups, 0)
    masked = prune.apply(variables, plan.masks(variables))
    return plan, masked, *prune.compact(variables, network.module.apply, network.batch, plan)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_masked_network_does(name):
    network = large(name)[0]
    plan, masked, small, small_apply = compacted(name)
    jax.tree.map(np.testing.assert_array_equal, small, prune.shrink(large(name)[1], plan))
    expected = jax.jit(network.module.apply)(masked, *network.batch)
    assert np.ptp(expected) > 1e-3
    close(small_apply(small, *network.batch), expected)


@pytest.mark.parametrize("name", ["mobilenet", "grouped convolution", "gpt", "lstm", "scanned transformer"])
def test_its_gradient_is_that_of_the_masked_network_where_weights_are_left(name):
    network = large(name)[0]
    plan, masked, small, small_apply = compacted(name)

    def gradient(apply_fn, variables):
        def loss(params):
            return jnp.mean(apply_fn({**variables, "params": params}, *network.batch) ** 2)

        return {**variables, "params": jax.jit(jax.grad(loss))(variables["params"])}

    close(gradient(small_apply, small), prune.shrink(gradient(network.module.apply, masked), plan))


# Networks in which a program that keeps its numbers can lose more than a module that is rebuilt.
MORE = {
    "vit": {"patches/kernel:3", "block/attention/query/kernel:2"},
    "gpt": {"embed/embedding:1", "attention/qkv/kernel:1"},
    "scanned transformer": {"embed/kernel:1", "layers/block/attention/query/kernel:3"},
}


@pytest.mark.parametrize("name", MORE)
def test_residual_streams_and_the_size_of_queries_may_go_too(name):
    network = large(name)[0]
    plan, masked, small, small_apply = compacted(name, allow="replay")
    assert plan.removed.keys() - network.free.keys() == MORE[name]
    close(small_apply(small, *network.batch), network.module.apply(masked, *network.batch))


@pytest.mark.parametrize("name", PASSES)
def test_operations(name):
    params, model = two_layers(PASSES[name])
    x = normal(8, 4)
    with jax.numpy_rank_promotion("allow"):
        groups = prune.groups(params, model, x)
        plan = prune.Plan.of(groups, {groups["a:1"].name: [1, 4]})
        small, small_apply = prune.compact(params, model, x, plan)
        close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))


@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        "convolutions",
        "dense general",
        "lifted",
        "fused",
        "normalized",
        "transposed",
        "low rank",
        "multi-query",
    ],
)
def test_other_networks(name):
    network = networks.NETWORKS[name]()
    params, apply_fn, batch = network.arguments
    plan = random_plan(prune.groups(params, apply_fn, batch, **network.keywords), 0)
    small, small_apply = prune.compact(params, apply_fn, batch, plan, **network.keywords)
    batch = batch if isinstance(batch, tuple) else (batch,)
    masked = prune.apply(params, plan.masks(params))
    close(small_apply(small, *batch), apply_fn(masked, *batch, **network.keywords))


# --- Slices and sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [[0], [5], [1, 4], [0, 1, 2], [2, 3], [1, 2, 4, 5]])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_slices_take_what_is_left_of_what_they_took(removed, step):
    params = {"a": normal(4, 6), "b": normal(6 // step, 3), "c": normal(6, 3)}

    def model(params, x):
        y = x @ params["a"]
        return y[:, ::step] @ params["b"] + jnp.tanh(y) @ params["c"]

    groups = prune.groups(params, model, normal(8, 4))
    chosen = {}
    for group in groups.unlocked:
        columns = next(member.indices for member in group.members if member.name == "a:1")[:, 0]
        elements = [i for i, column in enumerate(columns) if column in removed]
        chosen[group.name] = elements[: group.size - 1]
    plan = prune.Plan.of(groups, chosen)
    small, small_apply = prune.compact(params, model, normal(8, 4), plan)
    close(small_apply(small, normal(8, 4)), model(prune.apply(params, plan.masks(params)), normal(8, 4)))


def test_parts_of_a_split_may_lose_unequally():
    params = {"a": normal(4, 6), "b": normal(6, 3)}

    def model(params, x):
        left, right = jnp.split(x @ params["a"], 2, axis=-1)
        return jnp.concatenate([jnp.tanh(right), left], -1) @ params["b"]

    groups = prune.groups(params, model, normal(8, 4))
    plan = prune.Plan.of(groups, {"a:1": [0, 2], "a:1#2": [1]})
    small, small_apply = prune.compact(params, model, normal(8, 4), plan)
    assert small["a"].shape == (4, 3)
    close(small_apply(small, normal(8, 4)), model(prune.apply(params, plan.masks(params)), normal(8, 4)))


@pytest.mark.parametrize("removed", [{"a:1": [0, 2]}, {"c:0": [1]}, {"a:1": [3], "c:0": [0, 2]}])
@pytest.mark.parametrize("along", [0, 1])
def test_copies_and_what_is_copied_may_go(along, removed):
    """Three copies of four units, beside each other or in a dimension of their own, as keys of grouped queries."""

    def model(params, x):
        y = jnp.tanh(x @ params["a"])
        copied = jnp.tile(y[:, None], (1, 3, 1)) if along == 0 else jnp.tile(y, (1, 3))
        return (copied.reshape(len(x), 12) * params["c"][None]) @ params["b"]

    params, x = {"a": normal(4, 4), "b": normal(12, 3), "c": normal(12)}, normal(8, 4)
    plan = prune.Plan.of(prune.groups(params, model, x), removed)
    small, small_apply = prune.compact(params, model, x, plan)
    assert small["c"].size == (4 - len(removed.get("a:1", ()))) * (3 - len(removed.get("c:0", ())))
    close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))


def test_numbers_stay_those_of_the_large_model():
    def model(params, x):
        return (x @ params["a"]) @ params["b"] / params["a"].shape[1]

    params, x = {"a": normal(4, 6), "b": normal(6, 3)}, normal(8, 4)
    plan = prune.Plan.of(prune.groups(params, model, x), {"a:1": [0, 2]})
    small, small_apply = prune.compact(params, model, x, plan)
    close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))
    assert float(jnp.abs(model(small, x) - small_apply(small, x)).max()) > 1e-3


# --- Stacked blocks, each of which loses elements of its own -----------------------------------------


def scanned(between):
    """Three stacked blocks, whose 8 columns `between` takes apart and puts together."""

    def model(params, x):
        def block(x, w):
            return x + between(x @ w["a"]) @ w["b"], None

        return jax.lax.scan(block, x, params)[0]

    return {"a": normal(3, 4, 8), "b": normal(3, 8, 4)}, model


def of_its_own_in_each_block(groups):
    removed = {
        group.name: [((np.arange(group.size // 2) + block) % group.size).tolist() for block in range(3)]
        for group in groups.unlocked
        if group.blocks
    }
    return prune.Plan.of(groups, removed)


STACKED = {
    "whole": jnp.tanh,
    "pairs": lambda y: jnp.tanh(y.reshape(-1, 4, 2)).reshape(-1, 8)[:, ::-1],
    "halves": lambda y: jnp.concatenate([jnp.tanh(y[:, :4]), 0.5 * y[:, 4:]], -1),
    "turned": lambda y: jnp.concatenate([0.5 * y[:, 4:], jnp.tanh(y[:, :4])], -1),
    "copied": lambda y: jnp.tile(jnp.tanh(y), (1, 2)).reshape(-1, 2, 8).sum(1),
}


@pytest.mark.parametrize("name", STACKED)
def test_blocks_may_lose_elements_of_their_own(name):
    (params, model), x = scanned(STACKED[name]), normal(5, 4)
    plan = of_its_own_in_each_block(prune.groups(params, model, x))
    small, small_apply = prune.compact(params, model, x, plan)
    close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))


def test_blocks_go_with_elements_of_those_that_stay():
    (params, model), x = scanned(jnp.tanh), normal(5, 4)
    groups = prune.groups(params, model, x)
    plan = prune.Plan.of(groups, {"a:0": [1], "a:2": [[0, 1], [1, 2], [5, 7]]})
    small, small_apply = prune.compact(params, model, x, plan)
    assert jax.tree.map(jnp.shape, small) == {"a": (2, 4, 6), "b": (2, 6, 4)}
    close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))


def test_what_would_stand_elsewhere_in_each_block_is_refused():
    """Even columns and odd ones are groups of their own: where they stand once some are gone is up to the block."""
    params, model = scanned(lambda y: jnp.concatenate([jnp.tanh(y[:, ::2]), 0.5 * y[:, 1::2]], -1))
    x = normal(5, 4)
    groups = prune.groups(params, model, x)
    even, odd = (group.name for group in groups.unlocked if group.blocks)
    plan = prune.Plan.of(groups, {even: [[0, 1], [0, 1], [2, 3]], odd: [[2, 3], [0, 1], [0, 1]]})
    with pytest.raises(ValueError, match=r"at other places of a slice in each \(slice, .*test_compact.py"):
        _ = prune.compact(params, model, x, plan)
    # The same in all blocks can go.
    plan = prune.Plan.of(groups, {even: [[0, 3]] * 3, odd: [[0, 3]] * 3})
    small, small_apply = prune.compact(params, model, x, plan)
    close(small_apply(small, x), model(prune.apply(params, plan.masks(params)), x))


# --- Custom derivatives --------------------------------------------------------------------------------


@jax.custom_jvp
def _scaled(x, count, scale):
    return jnp.sinh(x) * scale, count + 1


@_scaled.defjvp
def _scaled_rule(primals, tangents):
    x, count, scale = primals
    moved = 3 * tangents[0] * scale + jnp.sinh(x) * tangents[2]
    return _scaled(*primals), (moved, np.zeros(count.shape, jax.dtypes.float0))


@jax.custom_vjp
def _summed(x, count, scale):
    return jnp.sinh(x) * scale, count + 1


_summed.defvjp(
    lambda x, count, scale: (_summed(x, count, scale), (x, scale)),
    lambda kept, gradient: (3 * gradient[0] * kept[1], None, (gradient[0] * jnp.sinh(kept[0])).sum(0)),
)


@pytest.mark.parametrize("function", [_scaled, _summed, jax.checkpoint(_summed), jax.jit(_scaled)])
def test_derivatives_of_its_own_stay(function):
    """The rules are not the derivatives, so that their use shows."""

    def model(params, x):
        y, count = function(x @ params["a"], jnp.arange(2), jnp.tanh(params["c"]))
        return y @ params["b"] + count.sum()

    params, x = {"a": normal(4, 6), "b": normal(6, 3), "c": normal(6)}, normal(8, 4)
    with jax.numpy_rank_promotion("allow"):
        plan = prune.Plan.of(prune.groups(params, model, x), {"a:1": [1, 4]})
        small, small_apply = prune.compact(params, model, x, plan)
        gradient = lambda apply_fn, params: jax.grad(lambda params: apply_fn(params, x).sum())(params)  # noqa: E731
        expected = gradient(model, prune.apply(params, plan.masks(params)))
        close(gradient(small_apply, small), prune.shrink(expected, plan))


def _scaled_before(params, x):
    return jax.lax.scan(lambda x, w: (jax.checkpoint(_block)(x, w), None), x * SCALES, params)[0]


def _scaled_within(params, x):
    def block(x, w):
        return jax.checkpoint(lambda x, w: _block(x * SCALES, w))(x, w), None

    return jax.lax.scan(block, x, params)[0]


def _block(x, w):
    return x + jax.nn.gelu(x @ w["up"]) @ w["down"]


SCALES = jnp.linspace(0.5, 1.5, 4)[None]


@pytest.mark.parametrize("model", [_scaled_before, _scaled_within])
def test_remat_inside_a_scan_runs_beside_constants_of_either_program(model):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (3, 4, 6)), "down": jax.random.normal(keys[1], (3, 6, 4))}
    x = jax.random.normal(keys[2], (5, 4))
    plan = prune.Plan.of(prune.groups(params, model, x), {"up:2": [0, 3, 4]})
    small, small_apply = prune.compact(params, model, x, plan)
    expected = model(prune.apply(params, plan.masks(params)), x)
    np.testing.assert_allclose(small_apply(small, x), expected, rtol=1e-5, atol=1e-5)


def test_remat_still_keeps_less():
    def model(params, x):
        for _ in range(4):
            x = jax.checkpoint(lambda y: jnp.tanh(y @ params["a"]) @ params["b"])(x)
        return x

    params, x = {"a": normal(4, 64), "b": normal(64, 4)}, normal(256, 4)
    plan = prune.Plan.of(prune.groups(params, model, x), {"a:1": range(0, 64, 2)})
    small, small_apply = prune.compact(params, model, x, plan)

    def residuals(apply_fn, params):
        _, pull = jax.vjp(lambda params: apply_fn(params, x), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert residuals(small_apply, small) == residuals(model, small)


# --- As any function -----------------------------------------------------------------------------------


def test_other_batches_are_traced_anew():
    network = large("cnn with flatten")[0]
    _, masked, small, small_apply = compacted("cnn with flatten")
    for count_ in (1, 3):
        x = normal(count_, 6, 6, 3)
        close(small_apply(small, x), network.module.apply(masked, x))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    assert small_apply(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_it_compiles_once(compilations):
    network = large("gru")[0]
    _, _, small, small_apply = compacted("gru")
    _ = small_apply(small, *network.batch)
    with compilations() as compiled:
        _ = small_apply(jax.tree.map(lambda leaf: leaf, small), *network.batch)
    assert compiled.count == 0


def test_vmap_and_its_gradient():
    network = large("scanned transformer")[0]
    _, masked, small, small_apply = compacted("scanned transformer")
    x = normal(3, 2, 4, 5)
    close(jax.vmap(small_apply, (None, 0))(small, x), jax.vmap(network.module.apply, (None, 0))(masked, x))
    each = jax.vmap(jax.grad(lambda v, x: small_apply(v, x).sum()), (None, 0))(small, x)
    whole = jax.grad(lambda v: sum(small_apply(v, one).sum() for one in x))(small)
    close(jax.tree.map(lambda leaf: leaf.sum(0), each), whole)


def test_export():
    network = large("gpt")[0]
    _, _, small, small_apply = compacted("gpt")
    exported = jax.export.export(jax.jit(small_apply))(small, *network.batch)
    close(exported.call(small, *network.batch), small_apply(small, *network.batch))


def test_export_of_a_symbolic_batch_is_a_map_over_examples():
    _, _, small, small_apply = compacted("cnn with flatten")
    (size,) = jax.export.symbolic_shape("size")
    shape, x = jax.ShapeDtypeStruct((size, 6, 6, 3), jnp.float32), normal(5, 6, 6, 3)
    with pytest.raises(ValueError, match="map a function of one example"):
        _ = jax.export.export(jax.jit(small_apply))(small, shape)
    each = jax.jit(lambda params, x: jax.vmap(lambda x: small_apply(params, x[None])[0])(x))
    close(jax.export.export(each)(small, shape).call(small, x), small_apply(small, x))


def test_it_is_counted_and_analyzed_as_a_rebuilt_module():
    network = large("scanned transformer")[0]
    plan, _, small, small_apply = compacted("scanned transformer")
    rebuilt = network.build(width_of(plan)).apply
    ours, theirs = (count(small, apply_fn, network.batch) for apply_fn in (small_apply, rebuilt))
    assert (ours.macs, ours.flops) == (theirs.macs, theirs.flops)
    assert {entry.module for entry in ours.entries} == {entry.module for entry in theirs.entries}
    ours, theirs = (jaxeff.analyze(small, apply_fn, network.batch) for apply_fn in (small_apply, rebuilt))
    assert ours.layers.keys() == theirs.layers.keys()
    for path, layer in theirs.layers.items():
        assert ours[path].nonlinearity == layer.nonlinearity
        np.testing.assert_allclose(ours[path].units, layer.units, rtol=1e-4)


def test_it_is_made_smaller_again():
    network = large("gpt")[0]
    _, _, small, small_apply = compacted("gpt", allow="replay")
    plan = random_plan(prune.groups(small, small_apply, network.batch, allow="replay"), 5)
    assert "embed/embedding:1" in plan.removed
    smaller, smaller_apply = prune.compact(small, small_apply, network.batch, plan)
    masked = prune.apply(small, plan.masks(small))
    close(smaller_apply(smaller, *network.batch), small_apply(masked, *network.batch))


def test_shapes_will_do():
    network, variables, groups = large("resnet")
    shapes = jax.eval_shape(lambda: variables)
    batch = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in network.batch)
    plan = random_plan(groups, 0)
    small, small_apply = prune.compact(shapes, network.module.apply, batch, plan)
    assert small == jax.eval_shape(lambda: prune.shrink(variables, plan))
    assert jax.eval_shape(small_apply, small, *batch).shape == (2, 3)


def test_arguments_of_the_model_are_passed_on():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=True, options=None):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(6)(x)))
            return nn.Dense(3)(nn.relu(nn.Dense(5, name="last")(x))) * (options or {"by": 1})["by"]

    model, x, key = Model(), normal(4, 5), {"dropout": jax.random.key(1)}
    variables = drawn(model, x, train=False)
    groups = prune.groups(variables, model.apply, x, rngs=key)
    assert [group.name for group in groups.unlocked] == ["last/kernel:1"]  # dropout locks what it touches
    plan = random_plan(groups, 0)
    masked = prune.apply(variables, plan.masks(variables))
    small, small_apply = prune.compact(variables, model.apply, x, plan, rngs=key)
    close(small_apply(small, x), model.apply(masked, x, rngs=key))
    other = {"rngs": {"dropout": jax.random.key(2)}, "options": {"by": 3}}
    close(small_apply(small, x, **other), model.apply(masked, x, **other))
    close(small_apply(small, x, train=False), model.apply(masked, x, train=False))


def test_running_averages_are_updated_at_their_smaller_size():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
            return nn.Dense(3)(x.mean((1, 2)))

    model, x = Model(), normal(4, 5, 5, 3)
    variables = drawn(model, x)
    plan = random_plan(prune.groups(variables, model.apply, x), 0)
    small, small_apply = prune.compact(variables, model.apply, x, plan)
    training = {"train": True, "mutable": ["batch_stats"]}
    outputs, updated = small_apply(small, x, **training)
    expected, large_updated = model.apply(prune.apply(variables, plan.masks(variables)), x, **training)
    close(outputs, expected)
    close(updated["batch_stats"], prune.shrink({**variables, **large_updated}, plan)["batch_stats"])


def test_it_trains():
    network, _, _ = large("mlp")
    _, _, small, small_apply = compacted("mlp")
    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(variables, state):
        loss, gradient = jax.value_and_grad(lambda v: jnp.mean((small_apply(v, *network.batch) - 1) ** 2))(
            variables
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, loss

    state, losses = optimizer.init(small), []
    for _ in range(20):
        small, state, loss = step(small, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_nnx_and_its_state():
    model, x = Net(6, nnx.Rngs(0)), normal(2, 5, 5, 3)
    nnx.update(
        model, jax.tree.map(lambda leaf: leaf + np.arange(6) / np.float32(6), nnx.state(model, nnx.BatchStat))
    )
    model.eval()
    params, apply_fn = jaxeff.functional(model)
    given = model, x
    for seed in range(2):
        plan = random_plan(prune.groups(*given), seed)
        masked = prune.apply(params, plan.masks(params))
        small, small_apply = prune.compact(*given, plan)
        close(small_apply(small, x), apply_fn(masked, x))
        assert jax.tree.map(jnp.shape, small_apply.state) == jax.tree.map(
            jnp.shape, prune.shrink(apply_fn.state, plan)
        )
        report = jaxeff.analyze(small, small_apply, x)
        assert report["conv/kernel"].shape == small["conv"]["kernel"].shape
        params, apply_fn = small, small_apply
        given = params, apply_fn, x


def test_an_equinox_model_without_a_state():
    eqx = pytest.importorskip("equinox")
    model, x = eqx.nn.MLP(5, 3, 16, 2, key=jax.random.key(0)), normal(4, 5)
    params, apply_fn = jaxeff.functional(model)
    plan = random_plan(prune.groups(model, x), 0)
    small, small_apply = prune.compact(model, x, plan)
    close(small_apply(small, x), apply_fn(prune.apply(params, plan.masks(params)), x))


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key):
            conv, attention, mlp = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=conv)
            self.norm = eqx.nn.GroupNorm(8, 8)
            self.attention = eqx.nn.MultiheadAttention(4, 8, key=attention)
            self.mlp = eqx.nn.MLP(8, 3, 16, 2, key=mlp)

        def __call__(self, x):
            y = jax.nn.relu(self.norm(self.conv(x))).reshape(8, -1).T
            return self.mlp((y + self.attention(y, y, y)).mean(0))

    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)
    x = normal(2, 3, 4, 4)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    plan = random_plan(prune.groups(params, apply_fn, x), 0)
    assert {"attention/query_proj/weight:0#2", "mlp/layers/0/weight:0"} <= plan.removed.keys()
    small, small_apply = prune.compact(params, apply_fn, x, plan)
    close(small_apply(small, x), jax.jit(apply_fn)(prune.apply(params, plan.masks(params)), x))


# --- What cannot be ------------------------------------------------------------------------------------


def linear(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


# What another program does with the columns of `a`, and what the error says.
REFUSED = {
    "softmax": (lambda y, b: jax.nn.softmax(y) @ b, r"reduce_max over it \(reduce_max, .*test_compact.py"),
    "reshaped": (
        lambda y, b: y.reshape(-1, 2, 3).sum(1) @ b[:3],
        r"'a' is tied .* \(reshape, .*test_compact.py",
    ),
    "cut short": (
        lambda y, b: y[:, :4] @ b[2:],
        r"tied to indices that stay \(dot_general, .*test_compact.py",
    ),
    "turned": (
        lambda y, b: y @ jnp.flip(b, 0),
        r"tied to indices that stay \(dot_general, .*test_compact.py",
    ),
    "numbered": (
        lambda y, b: (y + jnp.arange(6.0)) @ b,
        r"numbered by its position \(iota, .*test_compact.py",
    ),
    "a table": (
        lambda y, b: (y + np.arange(6.0, dtype=np.float32)) @ b,
        r"a constant array \(.*test_compact.py",
    ),
    "looked up": (
        lambda y, b: y[:, np.array([1, 0, 2, 3, 4, 5])] @ b,
        r"a constant array \(.*test_compact.py",
    ),
    "returned": (lambda y, b: y, "output of the model"),
    "not zero": (
        lambda y, b: jnp.exp(y) @ jnp.exp(b),
        r"neither side is 0 where it is removed \(dot_general",
    ),
    "a mean of what is not zero": (
        lambda y, b: (jnp.exp(y).sum(1)[:, None] * y) @ b,
        r"reduce_sum over it .*\(reduce_sum",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_names_the_operation(name):
    function, message = REFUSED[name]
    params, x = {"a": normal(4, 6), "b": normal(6, 3)}, normal(8, 4)
    plan = prune.Plan.of(prune.groups(params, linear, x), {"a:1": [1]})
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=f"does not run without .*{message}"),
    ):
        _ = prune.compact(params, lambda params, x: function(x @ params["a"], params["b"]), x, plan)


def test_wrong_arguments():
    params, x = {"a": normal(4, 6), "b": normal(6, 3)}, normal(8, 4)
    plan = prune.Plan.of(prune.groups(params, linear, x), {"a:1": [1]})
    with pytest.raises(ValueError, match="the plan is of another model: 'c'"):
        _ = prune.compact({**params, "c": x}, linear, x, plan)
    with pytest.raises(TypeError, match="`apply_fn` must be callable, got int"):
        _ = prune.compact(params, 3, x, plan)
    for missing in ((params, linear), (params, linear, x), (params, linear, x, {"a:1": [1]})):
        with pytest.raises(TypeError, match=r"`plan` must be .* \(params, apply_fn, batch, plan\) or"):
            _ = prune.compact(*missing)
    with pytest.raises(TypeError, match="`batch` is missing"):
        _ = prune.compact(params, linear, plan)
    with pytest.raises(ValueError, match="`apply_fn` failed on these `params`"):
        _ = prune.compact(params, linear, normal(8, 5), plan)
    small, small_apply = prune.compact(params, linear, x, plan)
    with pytest.raises(
        ValueError, match=r"'a' has shape \(4, 6\), and \(4, 5\) is what `prune.compact` left of it"
    ):
        _ = small_apply(params, x)
    with pytest.raises(ValueError, match="`params` holds 'c'"):
        _ = small_apply({**small, "c": x}, x)
