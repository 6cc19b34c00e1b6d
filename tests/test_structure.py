"""Smaller networks compute what the large ones do under the plan's masks."""

import functools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from network import drawn, normal
from shrinkable import NETWORKS

import jaxeff
from jaxeff import prune


@functools.cache
def large(name):
    """A network, its variables and its groups."""
    network = NETWORKS[name]()
    variables = drawn(network.module, *network.batch)
    return network, variables, prune.groups(variables, network.module.apply, network.batch)


def random_plan(groups, seed):
    """Of each block other elements, where there are blocks. Experts stay that a router chooses among."""
    draw = np.random.default_rng(seed)
    removed = {}
    for group in groups.unlocked:
        if group.routed:
            continue
        count = draw.integers(1, group.size)
        blocks = np.broadcast_to(np.arange(group.size), (*group.blocks, group.size))
        removed[group.name] = draw.permuted(blocks, axis=-1)[..., :count].tolist()
    return prune.Plan.of(groups, removed)


def width_of(plan):
    """`width(path, axis)` after the plan."""
    widths, shapes = plan.widths(), plan.shapes
    return lambda path, axis: widths.get(path, {}).get(axis, shapes[path][axis])


def close(small, large):
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_these_groups_may_shrink(name):
    network, variables, groups = large(name)
    assert {group.name: group.size for group in groups.unlocked} == network.free
    # Every index of every axis is in some group, once for each factor of it.
    held = {}
    for group in groups:
        for member in group.members:
            assert member.indices.shape[0] == group.size
            held.setdefault((member.path, member.axis), set()).update(member.indices.ravel().tolist())
    for path, shape in groups.shapes.items():
        for axis, size in enumerate(shape):
            assert size == 1 or held[path, axis] == set(range(size))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_computes_what_the_masked_one_does(name, seed):
    network, variables, groups = large(name)
    plan = random_plan(groups, seed)
    small = prune.shrink(variables, plan)
    module = network.build(width_of(plan))
    asked = jax.eval_shape(module.init, jax.random.key(0), *network.batch)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, asked)
    masked = prune.apply(variables, plan.masks(variables))
    expected = jax.jit(network.module.apply)(masked, *network.batch)
    assert np.ptp(expected) > 1e-3
    close(jax.jit(module.apply)(small, *network.batch), expected)


WHY = {
    "swiglu": {"gate/kernel:0": "input of the model", "down/kernel:1": "output of the model"},
    "scanned": {"stack/dense/kernel:0": "the iterations of a scan"},
    "dropout": {"second/kernel:1": "random numbers"},
    "experts": {"up:0": "output of the model"},
    "normalized": {"layer/kernel:1": "reduce_sum over it"},
    "fused": {"stacked/kernel:1": "one element is taken by its position"},
    "mixed": {"forgotten:1": "not read by the model"},
    "local": {"local/kernel:0": "positions of a convolution"},
    "weight norm": {"dense/kernel:0": "input of the model; reduce_sum over it"},
}


@pytest.mark.parametrize("name", WHY)
def test_what_is_locked_says_why(name):
    network = networks.NETWORKS[name]()
    groups = prune.groups(*network.arguments, **network.keywords)
    for member, why in WHY[name].items():
        holding = [group for group in groups if any(one.name == member for one in group.members)]
        assert any((group.locked or "").startswith(why) for group in holding), groups
        assert why in str(groups)


def two_layers(between):
    """A group of 6 between two matrices, of which `between` makes what it may."""
    params = {"a": normal(4, 6), "b": normal(6, 3), "c": normal(6)}
    return params, lambda params, x: between(x @ params["a"], params["c"]) @ params["b"]


@jax.custom_batching.custom_vmap
def _batched_by_hand(y, c):
    return jnp.tanh(y) * c


@_batched_by_hand.def_vmap
def _batch_by_hand(size, batched, y, c):
    return jnp.tanh(y) * c, True


# Of each operation whether units go through it one by one.
PASSES = {
    "bias": lambda y, c: jnp.tanh(y + c),
    "a scalar is no unit": lambda y, c: jnp.where(jnp.max(c * 0) > 1, 0.0, y),
    "clip": lambda y, c: jnp.clip(y, -1, 1),
    "twice": lambda y, c: sum(jnp.split(jnp.concatenate([y * c, y], -1), 2, axis=-1)),
    "reversed twice": lambda y, c: y[:, ::-1][:, ::-1],
    "reversed with its bias": lambda y, c: (y[:, ::-1] + c[::-1])[:, ::-1],
    "cumulative over examples": lambda y, c: jnp.cumsum(y, axis=0),
    "sorted over examples": lambda y, c: jnp.sort(y, axis=0),
    "cond": lambda y, c: jax.lax.cond(True, lambda z: z + c, jnp.sin, y),
    "loop": lambda y, c: jax.lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z) + c, y),
    "while": lambda y, c: jax.lax.while_loop(
        lambda z: (z[0] < 3).all(), lambda z: (z[0] + 1, z[1] * c), (0, y)
    )[1],
    "jit and remat": lambda y, c: jax.jit(jax.checkpoint(lambda z: z * c))(y),
    "custom gradient": lambda y, c: nn.relu(jax.nn.silu(y)),
    "normalized over examples": lambda y, c: (y - y.mean(0)[None]) / jnp.sqrt(y.var(0)[None] + 1),
    "updated": lambda y, c: jax.lax.dynamic_update_slice(y, y[:1] * c, (1, 0)),
    "a mask of all": lambda y, c: jnp.where(np.ones(y.shape[1], bool), y, 0),
    "stacked and unstacked": lambda y, c: sum(jnp.unstack(jnp.stack([y * c, y], axis=-1), axis=-1)),
    "stacked with examples": lambda y, c: jnp.unstack(jnp.stack([y, jnp.tanh(y) * c]))[1],
    "tiled": lambda y, c: jnp.tile(y, (1, 2)).reshape(len(y), 2, -1).sum(1) * c,
    "rows added to": lambda y, c: jnp.asarray(y).at[np.array([0, 2])].add(c),
    "rows replaced": lambda y, c: jnp.asarray(y).at[np.array([1, 3])].set(jnp.tanh(y[:2])),
    "summed after an update": lambda y, c: (
        y * (jax.lax.dynamic_update_slice(y, jnp.sin(y[:1]), (1, 0)) @ jnp.exp(c))[:, None]
    ),
    "padded in front and cut again": lambda y, c: jnp.pad(y, ((0, 0), (2, 0)))[:, 2:] * c,
    "rows summed by segments": lambda y, c: jax.ops.segment_sum(y * c, np.arange(8) // 2, 4),
    "a composite": lambda y, c: jax.lax.composite(lambda z: jnp.tanh(z) * 2, "own.tanh")(y) * c,
    "a batching rule of its own": lambda y, c: _batched_by_hand(y, c),
    "unit weights": lambda y, c: y * jnp.exp(c),
}
LOCKS = {
    "one of them": lambda y, c: jnp.tanh(y) * y[:, 2:3],
    "softmax": lambda y, c: jax.nn.softmax(y),
    "cumulative": lambda y, c: jnp.cumsum(y, axis=1),
    "sorted": lambda y, c: jnp.sort(y, axis=1),
    "a mask of some": lambda y, c: jnp.where(np.arange(6) > 2, y, 0),
    "a constant array": lambda y, c: y * jnp.arange(6.0),
    "a constant of one number is none": lambda y, c: y + np.r_[np.ones(5), 2].astype(np.float32),
    "no rule": lambda y, c: jnp.real(jnp.fft.fft(y)),
    "a callback": lambda y, c: jax.pure_callback(lambda z: z, jax.ShapeDtypeStruct(y.shape, y.dtype), y),
    "shifted": lambda y, c: jnp.pad(y, ((0, 0), (1, 0)))[:, :-1] + y,
    "looked up": lambda y, c: y[:, np.array([0, 2, 1, 3, 5, 4])],
    "norm": lambda y, c: y / jnp.linalg.norm(y, axis=1, keepdims=True),
    "largest": lambda y, c: y - y.max(1, keepdims=True),
    "noise": lambda y, c: y + jax.random.normal(jax.random.key(0), y.shape),
    "unstacked": lambda y, c: y * jnp.unstack(y, axis=1)[2][:, None],
    "columns added to": lambda y, c: jnp.asarray(y).at[:, np.array([0, 2])].add(1.0),
    "summed after an update that is not 0": lambda y, c: (
        y * (jax.lax.dynamic_update_slice(y, jnp.cos(y[:1]), (1, 0)) @ jnp.exp(c))[:, None]
    ),
    "matrix of constants": lambda y, c: y @ np.eye(6, dtype=np.float32),
}


@pytest.mark.parametrize("name", PASSES)
def test_units_pass(name):
    params, model = two_layers(PASSES[name])
    x = normal(8, 4)
    with jax.numpy_rank_promotion("allow"):
        groups = prune.groups(params, model, x)
        plan = prune.Plan.of(groups, {groups["a:1"].name: [1, 4]})
        masked, small = prune.apply(params, plan.masks(params)), prune.shrink(params, plan)
        assert small["b"].shape == (4, 3)
        close(model(small, x), model(masked, x))


def test_rows_that_weights_place_may_go_where_they_are_added_and_not_where_they_replace():
    params, x = {"at": normal(5, 8), "row": normal(5, 3)}, normal(4, 8)

    def adds(p, x):
        return x @ jnp.ones((8, 3)).at[jnp.argmax(p["at"], 1)].add(p["row"])

    def replaces(p, x):
        return x @ jnp.ones((8, 3)).at[jnp.argmax(p["at"], 1)].set(p["row"])

    plan = prune.Plan.of(prune.groups(params, adds, x), {"at:0": [1, 3]})
    masked, small = prune.apply(params, plan.masks(params)), prune.shrink(params, plan)
    close(adds(small, x), adds(masked, x))
    assert prune.groups(params, replaces, x)["at:0"].locked == "written to by a scatter"


@pytest.mark.parametrize("name", LOCKS)
def test_units_are_locked(name):
    params, model = two_layers(LOCKS[name])
    with jax.numpy_rank_promotion("allow"):
        groups = prune.groups(params, model, normal(8, 4))
    assert groups["b:0"].locked is not None and not groups.unlocked


def test_a_sum_over_what_is_not_zero_when_removed_is_locked():
    params = {"q": normal(4, 6), "k": normal(4, 6)}

    def linear_attention(feature, params, x):
        return feature(x @ params["q"]) @ feature(x @ params["k"]).T

    for feature, locked in ((jnp.tanh, False), (jnp.exp, True)):
        groups = prune.groups(
            params, functools.partial(linear_attention, feature), normal(8, 4), allow="scale"
        )
        assert (groups["q:1"].locked is not None) == locked
    assert (
        "scale by its size"
        in prune.groups(params, functools.partial(linear_attention, jnp.tanh), normal(8, 4))["q:1"].locked
    )


@pytest.mark.parametrize(("value", "locked"), [(0.0, False), (1.0, True)])
def test_padding_with_another_number_is_not_zero(value, locked):
    params = {"q": normal(4, 6), "k": normal(4, 6)}

    def padded(params, x):
        query, key = (jnp.pad(x @ params[k], ((0, 2), (0, 0)), constant_values=value) for k in "qk")
        return query @ key.T

    groups = prune.groups(params, padded, normal(8, 4), allow="scale")
    assert (groups["q:1"].locked is not None) == locked


def test_a_weight_that_is_not_zero_when_masked_is_locked():
    params = {"a": normal(4, 6), "b": normal(6, 3)}
    groups = prune.groups(params, lambda p, x: (jnp.exp(x @ p["a"])) @ jnp.exp(p["b"]), normal(8, 4))
    assert "neither side is 0" in groups["a:1"].locked
    groups = prune.groups(params, lambda p, x: (jnp.tanh(x @ p["a"])) @ jnp.exp(p["b"]), normal(8, 4))
    assert groups["a:1"].locked is None


def test_locks_that_may_be_left_out():
    network, variables, groups = large("gpt")
    assert groups["embed/embedding:0"].locked == "looked up by a gather; output of the model"
    assert groups["embed/embedding:1"].locked.startswith("reduce_sum over it")
    assert groups["attention/qkv/kernel:1"].locked.startswith("data multiplies data")
    find = functools.partial(prune.groups, variables, network.module.apply, network.batch)
    found = find(allow=("statistics", "scale"))
    assert {group.name for group in found.unlocked} == set(network.free) | {
        "embed/embedding:1",
        "attention/qkv/kernel:1",
    }
    assert find(allow="scale")["embed/embedding:1"].locked is not None
    with pytest.raises(
        ValueError, match="`allow` may hold 'depth', 'replay', 'scale', 'statistics', got 'all'"
    ):
        _ = find(allow="all")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), st.integers(0, 99))
def test_reshapes_there_and_back_keep_units_apart(shape, seed):
    size = math.prod(shape)
    params = {"a": normal(4, size), "b": normal(size, 3)}
    order = np.random.default_rng(seed).permutation(len(shape))

    def model(params, x, shape=shape):
        y = (x @ params["a"]).reshape(-1, *shape).transpose(0, *(1 + order))
        return y.reshape(x.shape[0], -1) @ params["b"]

    groups = prune.groups(params, model, normal(8, 4))
    assert sorted(group.size for group in groups.unlocked) == sorted(n for n in shape if n > 1)
    for group in groups.unlocked:
        (member,) = (member for member in group.members if member.name == "a:1")
        places = np.unravel_index(member.indices, shape)
        own = np.arange(group.size)[:, None]
        (axis,) = (i for i, place in enumerate(places) if shape[i] > 1 and (place == own).all())
        plan = prune.Plan.of(groups, {group.name: [seed % group.size]})
        masked, small = prune.apply(params, plan.masks(params)), prune.shrink(params, plan)
        kept = [n - (i == axis) for i, n in enumerate(shape)]
        close(model(small, normal(8, 4), kept), model(masked, normal(8, 4)))


def test_parts_of_a_split_are_groups_of_their_own():
    params, model = two_layers(lambda y, c: jnp.concatenate(jnp.split(y, 3, axis=-1)[::-1], -1))
    groups = prune.groups(params, model, normal(8, 4))
    assert [(group.name, group.size) for group in groups.unlocked] == [("a:1", 2), ("a:1#2", 2), ("a:1#3", 2)]
    assert [group.members[1].indices.ravel().tolist() for group in groups.unlocked] == [
        [4, 5],
        [2, 3],
        [0, 1],
    ]


# --- Models as users have them -------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_nnx():
    model, x = Net(6, nnx.Rngs(0)), normal(2, 5, 5, 3)
    averages = jax.tree.map(lambda leaf: leaf + np.arange(6) / np.float32(6), nnx.state(model, nnx.BatchStat))
    nnx.update(model, averages)
    model.eval()
    params, apply_fn = jaxeff.functional(model)
    groups = prune.groups(params, apply_fn, x)
    assert {group.name: group.size for group in groups.unlocked} == {"conv/kernel:3": 6}
    assert {member.path for member in groups["conv/kernel:3"].members} >= {
        "norm/mean",
        "norm/var",
        "norm/scale",
    }
    plan = prune.plan(groups, prune.scored(params), 0.5)
    small = Net(plan.widths()["conv/kernel"][3], nnx.Rngs(1))
    small.eval()
    nnx.update(small, prune.shrink(params, plan))
    nnx.update(small, prune.shrink(apply_fn.state, plan))
    masked = prune.apply(params, plan.masks(params))
    small_params, small_apply = jaxeff.functional(small)
    close(jax.jit(small_apply)(small_params, x), jax.jit(apply_fn)(masked, x))


def test_a_train_state_shrinks_and_trains_on():
    network, variables, _ = large("mlp")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = TrainState.create(apply_fn=network.module.apply, params=variables["params"], tx=optimizer)
    gradients = jax.tree.map(lambda leaf: jnp.sin(leaf), state.params)
    state = jax.jit(lambda state: state.apply_gradients(grads=gradients))(state)
    found = prune.groups({"params": state.params}, state.apply_fn, network.batch)
    plan = prune.plan(found, prune.scored(state.params), 0.5)
    params, opt_state = prune.shrink(state.params, plan, state.opt_state)
    assert jax.tree.map(jnp.shape, opt_state) == jax.tree.map(jnp.shape, optimizer.init(params))
    # The moments that stay are those of the params that stay.
    expected = prune.shrink(state.opt_state[1][0].mu, plan)
    jax.tree.map(np.testing.assert_array_equal, opt_state[1][0].mu, expected)
    updates, _ = jax.jit(optimizer.update)(prune.shrink(gradients, plan), opt_state, params)
    assert jax.tree.map(jnp.shape, optax.apply_updates(params, updates)) == jax.tree.map(jnp.shape, params)


def test_optimizers_with_masks_and_without_layout():
    params = {"a": normal(4, 6), "b": normal(6, 3)}
    plan = prune.Plan.of(groups_of(params), {"a:1": [0, 5]})
    for optimizer in (
        optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
        prune.sparsify(optax.sgd(0.1, momentum=0.9), prune.one_shot(0.5)),
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    ):
        small, state = prune.shrink(params, plan, optimizer.init(params))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(small))
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    with pytest.raises(ValueError, match="`opt_state` holds an array of shape .* at .*start anew"):
        _ = prune.shrink(params, plan, factored.init(params))


def groups_of(params, between=jnp.tanh):
    return prune.groups(params, lambda p, x: between(x @ p["a"]) @ p["b"], jnp.ones((8, 4)))


def test_shapes_alone_are_enough():
    network, variables, groups = large("resnet")
    abstract = jax.eval_shape(lambda: variables)
    batch = jax.eval_shape(lambda: network.batch)
    found = prune.groups(abstract, network.module.apply, batch)
    assert str(found) == str(groups)
    plan = random_plan(found, 0)
    shrunk = prune.shrink(abstract, plan)
    assert shrunk == jax.eval_shape(functools.partial(prune.shrink, plan=plan), variables)


def test_a_function_of_the_users_and_a_jitted_apply():
    network, variables, groups = large("cnn with flatten")
    for apply_fn in (jax.jit(network.module.apply), lambda v, x: network.module.apply(v, x)):
        assert str(prune.groups(variables, apply_fn, network.batch)) == str(groups)
    bare = lambda params, x: network.module.apply({"params": params}, x)  # noqa: E731
    assert str(prune.groups(variables["params"], bare, network.batch)) == str(groups)


def test_nothing_is_compiled(compilations):
    network, variables, _ = large("mlp")
    with compilations() as compiled:
        _ = prune.groups(variables, network.module.apply, network.batch)
    assert compiled.count == 0


def test_dtypes_and_x64(x64):
    params = {"a": jnp.asarray(normal(4, 6), jnp.bfloat16), "b": jnp.asarray(normal(6, 3), jnp.float64)}
    plan = prune.plan(groups_of(params), prune.scored(params), 0.5)
    small = prune.shrink(params, plan)
    assert (small["a"].dtype, small["b"].dtype) == (jnp.bfloat16, jnp.float64)


def test_state_that_the_model_does_not_read():
    module, x = networks.CNN(), normal(2, 8, 8, 3)
    with pytest.raises(ValueError, match="the model does not read 'batch_stats/norm0/mean'.*as it serves"):
        _ = prune.groups(drawn(module, x), module.apply, x, train=True, mutable=["batch_stats"])


def test_state_that_the_model_does_not_read_and_that_no_group_sizes():
    """Three blocks in a row, and three numbers that nothing reads: each is a size of its own."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            _ = self.variable("constants", "numbers", jnp.ones, (3,))
            x = nn.Dense(8)(x)
            for _ in range(3):
                x = x + nn.Dense(8)(nn.relu(nn.Dense(12)(x)))
            return nn.Dense(2)(x)

    module, x = Model(), normal(2, 5)
    groups = prune.groups(drawn(module, x), module.apply, x)
    assert [group.size for group in groups if group.kind == "block"] == [3]
    assert [group.name for group in groups if group.size == 3 and group.members] == ["constants/numbers:0"]


# --- Importance and plans ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("normalize", ["none", "mean", "max", "sum"])
def test_importance_of_elements(reduce, normalize):
    _, variables, groups = large("cnn with flatten")
    scores = prune.scored(variables, prunable=lambda path, leaf: True)
    found = groups.scored(scores, reduce=reduce, normalize=normalize)["Conv_1/kernel:3"].importance
    conv, bias = (np.asarray(scores["params"]["Conv_1"][name], np.float64) for name in ("kernel", "bias"))
    dense = np.asarray(scores["params"]["Dense_0"]["kernel"], np.float64).reshape(9, 8, 4)
    every = [np.concatenate([conv[..., k].ravel(), bias[k : k + 1], dense[:, k].ravel()]) for k in range(8)]
    expected = np.array([getattr(np, reduce)(each) for each in every])
    divisor = {"none": 1, "mean": expected.mean(), "max": expected.max(), "sum": expected.sum()}[normalize]
    np.testing.assert_allclose(found, expected / divisor, rtol=1e-5)


def test_a_group_without_scores_is_unknown_and_not_zero():
    params = {"a": normal(4, 6), "b": normal(6, 3)}
    groups = groups_of(params)
    scores = {"a": np.zeros(()), "b": np.zeros(())}
    assert groups.scored(scores)["a:1"].importance is None
    with pytest.raises(ValueError, match="`importance` has no scores for 'a:1'"):
        _ = prune.plan(groups, scores, 0.5)
    assert prune.plan(groups, scores, 0.5, max_sparsity={"a:1": 0}).removed == {}
    zeros = groups.scored({"a": np.zeros((4, 6))}, normalize="mean")["a:1"].importance
    np.testing.assert_array_equal(zeros, np.zeros(6))


def chain(*widths):
    """Layers of these widths, whose units' scores are given by their column alone."""
    sizes = (2, *widths, 2)
    params = {
        f"w{i}": np.ones(pair, np.float32) for i, pair in enumerate(zip(sizes, sizes[1:], strict=False))
    }

    def model(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return x

    return prune.groups(params, model, jnp.ones((3, 2)))


def scores_of(importance):
    """Scores of the leaves into the first layer and out of the second, of which these are the sums."""
    first, second = (np.asarray(rank, np.float32) / 2 for rank in importance)
    return {"w0": np.tile(first, (2, 1)), "w2": np.tile(second[:, None], (1, 2))}


def test_plans_by_layer_and_over_all():
    groups = chain(4, 6)
    scores = scores_of(([4, 3, 2, 1], [10, 10, 0.5, 0.5, 10, 10]))
    make = functools.partial(prune.plan, groups, scores, normalize="none")
    assert make(0.5).removed == {"w0:1": (2, 3), "w1:1": (0, 2, 3)}  # Of equal ones the first.
    assert make(0.5, scope="global").removed == {"w0:1": (1, 2, 3), "w1:1": (2, 3)}
    assert make(0.7, scope="global", minimum=2).removed == {"w0:1": (2, 3), "w1:1": (0, 1, 2, 3)}
    assert make(0.5, scope="global", max_sparsity={"w0:1": 0.5}).removed == {
        "w0:1": (2, 3),
        "w1:1": (0, 2, 3),
    }
    assert make(0.5, round_to=4).removed == {"w1:1": (2, 3)}
    assert make(0.5, max_sparsity={"w1:1": 0.2}).removed == {"w0:1": (2, 3), "w1:1": (2,)}
    assert make({"w1:1": 0.3}).removed == {"w1:1": (2, 3)}
    assert make(0.99).sizes() == {"w0:1": 1, "w1:1": 1}
    assert make(0.99, minimum=3).sizes() == {"w0:1": 3, "w1:1": 3}
    assert make(0).removed == {} and make(0).widths() == {}
    # Normalized, both groups count alike.
    assert prune.plan(groups, scores, 0.4, scope="global").removed == {"w0:1": (2, 3), "w1:1": (2, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be in"),
        ({"sparsity": float("nan")}, "`sparsity` must be in"),
        ({"sparsity": "0.5"}, "`sparsity` must be in .*, got '0.5'"),
        ({"sparsity": {"w9:1": 0.5}}, "`sparsity` names 'w9:1', which is not a group that may shrink: w0:1"),
        ({"sparsity": {"w0:1": 0.5}, "scope": "global"}, "`sparsity` by group is for scope 'layer'"),
        ({"scope": "all"}, "`scope` must be 'layer' or 'global'"),
        ({"round_to": 0}, "`round_to` must be whole and at least 1"),
        ({"minimum": 0}, "`minimum` must be whole and at least 1"),
        ({"minimum": {"w0:0": 2}}, "`minimum` names 'w0:0'"),
        ({"max_sparsity": 1.5}, "`max_sparsity` must be in"),
        ({"reduce": "median"}, "`reduce` must be one of 'sum', 'mean', 'max', got 'median'"),
        ({"normalize": "lamp"}, "`normalize` must be one of"),
        ({"importance": {"w7": np.ones((2, 2))}}, "`importance` is of another model: 'w7'"),
        ({"importance": {"w0": np.ones((2, 2))}}, "`importance` of 'w0' has shape"),
        ({"importance": {"w0": np.full((2, 4), np.nan)}}, "nan or negative"),
    ],
)
def test_wrong_arguments(arguments, message):
    groups = chain(4, 6)
    given = {"importance": scores_of((range(4), range(6))), "sparsity": 0.5, **arguments}
    with pytest.raises(ValueError, match=message):
        _ = prune.plan(groups, **given)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"w0:1": [4]}, "'w0:1' has elements 0 to 3, and 4 is to be removed"),
        ({"w0:1": [-1]}, "elements 0 to 3, and -1"),
        ({"w0:1": [0, 0]}, "removed twice"),
        ({"w0:1": [0, 1, 2, 3]}, "all 4 elements of 'w0:1' are to be removed"),
        ({"w0:1": [0.5]}, "must be a list of whole numbers"),
        ({"w0:1": "01"}, "must be a list of whole numbers"),
        ({"w0:1": 3}, "must be a list of whole numbers"),
        ({"w0:0": [0]}, "'w0:0', which is locked: input of the model"),
        ({"nothing": [0]}, "'nothing', which is not a group"),
    ],
)
def test_elements_that_cannot_go(removed, message):
    groups = chain(4, 6)
    with pytest.raises(ValueError, match=message):
        _ = prune.Plan.of(groups, removed)
    # The same by hand, in JSON.
    if next(iter(removed)) == "w0:1":
        found = json.loads(prune.Plan.of(groups, {"w0:1": [1]}).to_json())
        with pytest.raises(ValueError, match=message):
            _ = prune.Plan.from_json(json.dumps({**found, "removed": removed}))


def edited(change):
    groups = chain(4, 6)
    found = json.loads(prune.Plan.of(groups, {"w0:1": [1], "w1:1": [0, 5]}).to_json())
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "`text` is not JSON"),
        ("[]", "`text` is not a plan: 'version' is missing"),
        ("{}", "`text` is not a plan: 'version' is missing"),
        (edited(lambda plan: plan.pop("removed")), "`text` is not a plan: 'removed' is missing"),
        (edited(lambda plan: plan.update(version=1)), "version 1"),
        (edited(lambda plan: plan["params"].update(w0=[2, 5])), "signature no longer fits"),
        (edited(lambda plan: plan["groups"]["w0:1"]["members"].pop()), "signature no longer fits"),
        (edited(lambda plan: plan["groups"]["w0:1"].update(size=99)), "signature no longer fits"),
        (edited(lambda plan: plan["removed"].update({"w9:1": [0]})), "removes of 'w9:1'"),
        (edited(lambda plan: plan.update(removed=[1])), "the plan removes of"),
        (edited(lambda plan: plan["removed"].update({"w0:1": None})), "must be a list of whole numbers"),
        (edited(lambda plan: plan["removed"].update({"w0:1": [True]})), "must be a list of whole numbers"),
    ],
)
def test_a_plan_edited_into_nonsense(text, message):
    with pytest.raises(ValueError, match=message):
        _ = prune.Plan.from_json(text)


def test_what_is_removed_may_be_edited():
    plan = prune.Plan.from_json(edited(lambda plan: plan["removed"].update({"w0:1": [3, 0], "w1:1": []})))
    assert plan.removed == {"w0:1": (0, 3)} and plan.widths() == {"w0": {1: 2}, "w1": {0: 2}}


@pytest.mark.parametrize("other", ["cnn with flatten", "resnet"])
def test_a_plan_of_another_model(other):
    plan = random_plan(large("mlp")[2], 0)
    _, variables, _ = large(other)
    with pytest.raises(ValueError, match="the plan is of another model: .* is in .* alone"):
        _ = prune.shrink(variables, plan)
    with pytest.raises(ValueError, match="the plan is of another model"):
        _ = plan.masks(variables)
    with pytest.raises(TypeError, match=r"`plan` must be what `prune.plan` makes, a `prune.Plan`, got dict"):
        _ = prune.shrink(plan, variables)


def test_a_plan_is_not_carried_out_twice():
    _, variables, groups = large("mlp")
    plan = random_plan(groups, 0)
    with pytest.raises(ValueError, match="another model: 'Dense_0/bias' has shape .* there and .* here"):
        _ = prune.shrink(prune.shrink(variables, plan), plan)


def test_iterative_steps():
    network, variables, groups = large("mlp")
    module = network.module
    for _ in range(2):
        plan = prune.plan(groups, prune.scored(variables), 0.3)
        masked = prune.apply(variables, plan.masks(variables))
        expected = jax.jit(module.apply)(masked, *network.batch)
        variables, module = prune.shrink(variables, plan), network.build(width_of(plan))
        close(jax.jit(module.apply)(variables, *network.batch), expected)
        groups = prune.groups(variables, module.apply, network.batch)
    assert [group.size for group in groups.unlocked] == [4, 3]


REPLAY = """
import pickle, sys
import numpy as np
from jaxeff import prune
plan = prune.Plan.from_json(open(sys.argv[1]).read())
small = prune.shrink(pickle.load(open(sys.argv[2], "rb")), plan)
pickle.dump((small, plan.widths()), open(sys.argv[3], "wb"))
"""


def test_a_plan_is_replayed_in_another_process(tmp_path):
    _, variables, groups = large("scanned transformer")
    plan = random_plan(groups, 3)
    fresh = jax.tree.map(lambda leaf: np.random.default_rng(5).normal(size=leaf.shape), variables)
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "fresh").write_bytes(pickle.dumps(fresh))
    arguments = [str(tmp_path / name) for name in ("plan.json", "fresh", "small")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    _ = subprocess.run([sys.executable, "-c", REPLAY, *arguments], check=True, env=environment)
    small, widths = pickle.loads((tmp_path / "small").read_bytes())
    assert widths == plan.widths()
    jax.tree.map(np.testing.assert_array_equal, small, prune.shrink(fresh, plan))


@pytest.mark.parametrize("name", NETWORKS)
def test_json_keeps_all_of_a_plan(name):
    _, variables, groups = large(name)
    plan = random_plan(groups, 1)
    read = prune.Plan.from_json(plan.to_json())
    assert read.to_json() == plan.to_json() and read.widths() == plan.widths()
    for path, axes in read.kept().items():
        for axis, indices in axes.items():
            np.testing.assert_array_equal(indices, plan.kept()[path][axis])


def test_the_first_example_in_the_docs_gives_what_the_masked_network_gives():
    text = (Path(__file__).parents[1] / "docs" / "structured.md").read_text(encoding="utf-8")
    example: dict[str, Any] = {"__name__": "docs"}
    exec(compile(text.split("```python\n")[1].split("```")[0], "structured.md", "exec"), example)
    model, params, x = (example[name] for name in ("model", "params", "x"))
    masked = prune.apply(params, example["plan"].masks(params))
    assert example["small"].width == 8
    close(example["small"].apply(example["small_params"], x), model.apply(masked, x))


def test_dead_units_are_a_plan_in_one_call():
    def model(params, x):
        def block(h, w):
            return h + jax.nn.relu(h @ w["up"] + w["bias"]) @ w["down"], None

        return jax.lax.scan(block, x, params)[0]

    random = np.random.default_rng(0)
    params = {
        "up": random.normal(size=(3, 4, 6)).astype(np.float32),
        "bias": np.zeros((3, 6), np.float32),
        "down": random.normal(size=(3, 6, 4)).astype(np.float32),
    }
    x = random.normal(size=(50, 4)).astype(np.float32)
    for block, units in enumerate([(0, 3), (1, 2, 5), (4, 5)]):
        params["bias"][block, list(units)] = -1e3
    with jax.numpy_rank_promotion("allow"):
        groups, report = prune.groups(params, model, x), jaxeff.analyze(params, model, x)
        plan = prune.Plan.dead(groups, report)
        # Blocks lose equally many.
        assert plan.removed == {"up:2": ((0, 3), (1, 2), (4, 5))}
        small, small_apply = prune.compact(params, model, x, plan)
        np.testing.assert_allclose(small_apply(small, x), model(params, x), rtol=1e-5, atol=1e-5)


def test_dead_units_of_another_model_are_refused():
    model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    other = {"c": jnp.ones((3, 4))}
    report = jaxeff.analyze(other, lambda params, x: x @ params["c"], jnp.ones((8, 3)))
    with pytest.raises(ValueError, match="another model: 'c'"):
        _ = prune.Plan.dead(prune.groups(params, model, jnp.ones((8, 3))), report)
