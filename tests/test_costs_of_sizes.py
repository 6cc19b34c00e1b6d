"""What a model costs at smaller sizes is known before it is made smaller."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from network import normal
from shrinkable import NETWORKS
from test_depth import MODELS, PARAMS, X
from test_structure import large, random_plan

from jaxeff import cost, prune


def sizes_of(tree):
    leaves = jax.tree.leaves(tree)
    return {"params": sum(leaf.size for leaf in leaves), "bytes": sum(leaf.nbytes for leaf in leaves)}


def check(groups, params, apply_fn, batch, seeds=range(3)):
    """The costs are those of the function that `compact` makes, and nothing was removed for the first."""
    for plan in [prune.Plan.of(groups, {}), *(random_plan(groups, seed) for seed in seeds)]:
        small, small_apply = prune.compact(params, apply_fn, batch, plan)
        found = groups.costs(plan.sizes())
        assert found["macs"] == cost.count(small, small_apply, batch).macs
        own = small["params"] if isinstance(small, dict) and "params" in small else small
        assert {name: found[name] for name in ("params", "bytes")} == sizes_of(own)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_smaller_network(name):
    network, variables, groups = large(name)
    check(pickle.loads(pickle.dumps(groups)), variables, network.module.apply, network.batch)


@pytest.mark.parametrize("name", ["vit", "gpt", "scanned transformer"])
def test_so_they_are_where_streams_and_queries_may_go(name):
    network, variables, _ = large(name)
    groups = prune.groups(variables, network.module.apply, network.batch, allow="replay")
    check(groups, variables, network.module.apply, network.batch)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_go_take_their_iterations_along(name):
    with jax.numpy_rank_promotion("allow"):
        groups = prune.groups(PARAMS, MODELS[name], X)
        assert "block" in {group.kind for group in groups.unlocked}
        check(groups, PARAMS, MODELS[name], X)


def gram(params, x):
    """Every pair of units has a row in b, a unit with itself too."""
    y = jnp.tanh(x @ params["a"])
    return (y[:, :, None] * y[:, None, :]).reshape(len(x), -1) @ params["b"]


def twice(params, x):
    y = x @ params["a"]
    return jnp.concatenate([y, jnp.tanh(y)], -1) @ params["b"]


def branches(params, x):
    y = x @ params["a"]
    return jax.lax.cond(x[0, 0] > 0, lambda y: y @ params["b"], lambda y: (y @ params["c"]) @ params["b"], y)


OTHERS = {
    "pairs of units": (gram, {"a": normal(4, 5), "b": normal(25, 3)}),
    "units twice": (twice, {"a": normal(4, 5), "b": normal(10, 3)}),
    "branches": (branches, {"a": normal(4, 5), "b": normal(5, 3), "c": normal(5, 5)}),
    "half precision": (
        lambda params, x: x @ params["a"].astype(jnp.float32) @ params["b"],
        {"a": jnp.ones((4, 5), jnp.bfloat16), "b": normal(5, 3)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_programs(name):
    apply_fn, params = OTHERS[name]
    groups = prune.groups(params, apply_fn, normal(8, 4))
    assert groups.unlocked
    check(groups, jax.tree.map(jnp.asarray, params), apply_fn, normal(8, 4))


def cache_of(keys, size, value, blocks=1):
    return blocks * keys * (size + value)


def test_the_cache_of_keys_and_values():
    assert large("vit")[2].costs()["kv_cache"] == cache_of(3, 4, 5)
    _, variables, groups = large("scanned transformer")
    assert groups.costs()["kv_cache"] == cache_of(3, 4, 5, 3)
    sizes = {
        "layers/block/norm0/scale:0": 2,
        "layers/block/attention/query/kernel:2": 1,
        "layers/block/attention/value/kernel:3": 2,
    }
    assert groups.costs(sizes)["kv_cache"] == cache_of(1, 4, 2, 2)
    # Several queries share a key and a value: fewer of them make the cache no smaller.
    _, _, groups = large("gpt")
    kinds = {group.kind: group.name for group in groups.unlocked}
    (value,) = (group.name for group in groups.unlocked if group.kind == "head_size")
    assert groups.costs()["kv_cache"] == cache_of(3, 4, 5)
    assert groups.costs({kinds["query"]: 1})["kv_cache"] == cache_of(3, 4, 5)
    assert groups.costs({kinds["kv_head"]: 1, value: 3})["kv_cache"] == cache_of(1, 4, 3)
    assert "kv_cache" not in large("mlp")[2].costs()


class Repeated(nn.Module):
    """Each of two keys and values is copied for three query heads."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((6, 4), name="q")(x)
        k = jnp.repeat(nn.RMSNorm(name="norm")(nn.DenseGeneral((2, 4), name="k")(x)), 3, axis=-2)
        v = jnp.repeat(nn.DenseGeneral((2, 5), name="v")(x), 3, axis=-2)
        weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return nn.DenseGeneral(12, axis=(-2, -1), name="out")(jnp.einsum("bhts,bshd->bthd", weights, v))


def test_copies_of_keys_and_values_are_not_in_the_cache():
    x = normal(2, 5, 12)
    groups = prune.groups(Repeated().init(jax.random.key(0), x), Repeated().apply, x)
    assert groups.costs()["kv_cache"] == cache_of(2, 4, 5)


def test_sizes_that_cannot_be():
    groups = large("mlp")[2]
    with pytest.raises(
        ValueError, match="`sizes` names 'Dense_2/kernel:1', which is not a group that may shrink"
    ):
        groups.costs({"Dense_2/kernel:1": 2})
    for size in (0, 10, 2.5):
        with pytest.raises(ValueError, match="must be from 1 to 9 for 'Dense_0/kernel:1', got"):
            groups.costs({"Dense_0/kernel:1": size})
