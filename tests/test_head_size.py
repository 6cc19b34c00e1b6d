"""Plans remove heads, and leave the size of a head alone: a module can be built from what is left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network import normal

import jaxeff
from jaxeff import prune

X = normal(2, 5, 12)
OUTER = {"scope": "layer"}, {"scope": "global"}, {"scope": "global", "normalize": "none", "reduce": "mean"}


class Encoder(nn.Module):
    heads: int = 4
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=8 * self.heads, name="attend")(x, x)
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(self.hidden, name="hidden")(x)))


@pytest.mark.parametrize("allow", [(), "scale"])
@pytest.mark.parametrize("how", OUTER)
def test_an_attention_module_can_be_built_from_what_is_left(allow, how):
    large = Encoder()
    params = large.init(jax.random.key(0), X)
    groups = prune.groups(params, large.apply, X, allow=allow)
    plan = prune.plan(groups, prune.scored(params), 0.5, minimum=2, **how)
    widths = plan.widths()
    assert "attend/query/kernel" in widths
    assert widths["attend/query/kernel"].keys() == widths["attend/value/kernel"].keys() == {1}
    small = Encoder(widths["attend/query/kernel"][1], widths.get("hidden/kernel", {1: 24})[1])
    found = prune.shrink(params, plan)
    expected = jax.eval_shape(small.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    masked = large.apply(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small.apply(found, X), masked, rtol=1e-4, atol=1e-5)


def test_an_nnx_attention_too():
    def attention(heads):
        return nnx.MultiHeadAttention(heads, 12, 8 * heads, decode=False, rngs=nnx.Rngs(0))

    params, apply_fn = jaxeff.functional(attention(4))
    plan = prune.plan(prune.groups(params, apply_fn, X, allow="scale"), prune.scored(params), 0.5)
    expected, _ = jaxeff.functional(attention(2))
    shapes = [
        jax.tree.map(jnp.shape, jax.tree.leaves(tree)) for tree in (prune.shrink(params, plan), expected)
    ]
    assert shapes[0] == shapes[1]


def test_the_size_of_heads_goes_where_its_group_is_named():
    params = Encoder().init(jax.random.key(0), X)
    groups = prune.groups(params, Encoder().apply, X, allow="scale")
    sizes = ["attend/query/kernel:2", "attend/value/kernel:2"]
    assert [group.name for group in groups.unlocked if group.kind == "head_size"] == sizes
    assert f"Whole in a plan unless named or their kind is: {', '.join(sizes)}" in str(groups)
    plan = prune.plan(groups, prune.scored(params), dict.fromkeys(sizes, 0.5))
    assert plan.sizes() == dict.fromkeys(sizes, 4)
    assert plan.widths()["attend/out/kernel"] == {1: 4}
    assert prune.Plan.from_json(plan.to_json()).removed == plan.removed


class Fused(nn.Module):
    """Heads cut out of dense layers."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(32, name=name)(x).reshape(*x.shape[:-1], 4, 8) for name in "qkv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5)
        return nn.Dense(12, name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:-1], 32))


class Shared(nn.Module):
    """Three query heads for each of two keys."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, 3, 4), name="q")(x)
        k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "kv")
        weights = nn.softmax(jnp.einsum("bthgd,bshd->bhgts", q, k))
        heads = jnp.einsum("bhgts,bshd->bthgd", weights, v)
        return nn.DenseGeneral(12, axis=(-3, -2, -1), name="out")(heads)


class OfOneProduct(nn.Module):
    """Queries, keys and values of one product, the values of another size."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(4 * 3 * 4 + 4 * 4 + 4 * 5, name="qkv")(x), [48, 64], axis=-1)
        q, k, v = (
            y.reshape(*x.shape[:-1], *shape) for y, shape in ((q, (4, 3, 4)), (k, (4, 4)), (v, (4, 5)))
        )
        weights = nn.softmax(jnp.einsum("bthgd,bshd->bhgts", q, k))
        return nn.DenseGeneral(12, axis=(-3, -2, -1), name="out")(jnp.einsum("bhgts,bshd->bthgd", weights, v))


class Linear(nn.Module):
    """Attention without a softmax."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((3, 4), use_bias=False, name=name)(x) for name in "qkv")
        state = jnp.einsum("bshd,bshe->bhde", jnp.tanh(k), v)
        heads = jnp.einsum("bthd,bhde->bthe", jnp.tanh(q), state)
        return nn.DenseGeneral(12, axis=(-2, -1), name="out")(heads)


class Pooled(nn.Module):
    """A softmax over positions, without heads: hidden units are no size of any."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(16, name="hidden")(x))
        weights = nn.softmax(nn.Dense(1, name="score")(hidden)[..., 0])
        return nn.Dense(3, name="out")(jnp.einsum("bn,bnd->bd", weights, hidden))


class Gated(nn.Module):
    """Channels scaled by a product of data with data, which sums over nothing."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(16, name="hidden")(x))
        gate = nn.sigmoid(nn.Dense(16, name="gate")(hidden.mean(1)))
        return nn.Dense(3, name="out")(jnp.einsum("bnc,bc->bnc", hidden, gate))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return x + nn.MultiHeadDotProductAttention(4, qkv_features=32, name="attend")(x, x), None

        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(self, x, None)[0]


# By hand: the groups that are the size of heads, locked ones too, and those that may shrink all the same.
STRUCTURES = {
    "cut out": (Fused(), {"q/kernel:1", "v/kernel:1"}, {"q/kernel:1#2"}),
    "shared keys": (Shared(), {"q/kernel:3", "v/kernel:2"}, {"q/kernel:1", "q/kernel:2"}),
    "of one product": (
        OfOneProduct(),
        {"qkv/kernel:1#2", "qkv/kernel:1#4"},
        {"qkv/kernel:1", "qkv/kernel:1#3"},
    ),
    "no softmax": (Linear(), {"q/kernel:2", "v/kernel:2"}, {"q/kernel:1"}),
    "one head": (
        nn.MultiHeadDotProductAttention(1, qkv_features=8),
        {"query/kernel:2", "value/kernel:2"},
        set(),
    ),
    "scanned": (
        Scanned(),
        {"attend/query/kernel:3", "attend/value/kernel:3"},
        {"attend/query/kernel:0", "attend/query/kernel:2"},
    ),
    "pooled": (Pooled(), set(), {"hidden/kernel:1"}),
    "gated": (Gated(), set(), {"hidden/kernel:1"}),
}


@pytest.mark.parametrize(("module", "within", "free"), STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("examples", [1, 2])
def test_which_groups_are_the_size_of_heads(module, within, free, examples):
    x = X[:examples]
    groups = prune.groups(module.init(jax.random.key(0), x), module.apply, x)
    assert {group.name for group in groups if group.kind == "head_size"} == within
    assert {group.name for group in groups.unlocked if group.kind != "head_size"} == free


def test_where_heads_alone_may_shrink_their_size_has_to_be_named():
    module = nn.MultiHeadDotProductAttention(1, qkv_features=8)
    params = module.init(jax.random.key(0), X)
    groups = prune.groups(params, module.apply, X)
    with pytest.raises(
        ValueError, match=r"of kind 'head_size': pass `kinds`, or name them, \{'value/kernel:2': 0.5\}"
    ):
        prune.plan(groups, prune.scored(params), 0.5)
    assert prune.plan(groups, prune.scored(params), {"value/kernel:2": 0.5}).sizes() == {"value/kernel:2": 4}
