"""Stacked blocks lose units of their own wherever no unit of one block meets one of another, and only there.

Every model computes from the shapes of its params, so that it runs with the smaller ones: what they give must
be what the masked large ones give, for random plans.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeff import prune

BLOCKS, WIDTH, HIDDEN, EXPERTS = 3, 4, 6, 2


@pytest.fixture(autouse=True)
def biases_without_axes():
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def block(carry, w):
    return carry + nn.gelu(carry @ w["up"] + w["bias"]) @ w["down"], None


def stack(seed=0, blocks=BLOCKS):
    return {
        "up": normal(blocks, WIDTH, HIDDEN, seed=seed),
        "bias": normal(blocks, HIDDEN, seed=seed + 1),
        "down": normal(blocks, HIDDEN, WIDTH, seed=seed + 2),
    }


def scanned(params, x):
    return jax.lax.scan(block, x, params)[0]


def reversed_scan(params, x):
    return jax.lax.scan(block, x, params, reverse=True)[0]


def remat(params, x):
    return jax.lax.scan(jax.checkpoint(block), x, params)[0]


def without_bias(params, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None), x, params)[0]


def second_axis(params, x):
    return jax.lax.scan(block, x, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), params))[0]


def side_by_side(params, x):
    every = jax.vmap(lambda w: nn.gelu(x @ w["up"] + w["bias"]) @ w["down"])(params)
    return every.sum(0)


def summed_over_both(params, x):
    hidden = nn.gelu(jnp.einsum("td,edf->tef", x, params["up"]) + params["bias"])
    return jnp.einsum("tef,efd->td", hidden, params["down"])


def experts_in_blocks(params, x):
    def one(h, w):
        hidden = nn.relu(jnp.einsum("td,edf->tef", h, w["up"]))
        return h + jnp.einsum("tef,efd->td", hidden, w["down"]), None

    return jax.lax.scan(one, x, params)[0]


def routed_in_blocks(params, x):
    def one(h, w):
        hidden = nn.relu(jnp.einsum("td,edf->tef", h, w["up"]))
        return h + jnp.einsum("tef,efd,te->td", hidden, w["down"], nn.softmax(h @ w["router"])), None

    return jax.lax.scan(one, x, params)[0]


def shared_bias(params, x):
    def one(h, w):
        return h + nn.gelu(h @ w["up"] + params["shared"]) @ w["down"], None

    return jax.lax.scan(one, x, {name: params[name] for name in ("up", "down")})[0]


def carried(params, x):
    """The hidden units of a block are added to those of the block before."""

    def one(carry, w):
        h, units = carry
        units = units + jnp.tanh(h @ w["up"])
        return (h + units @ w["down"], units), None

    start = x, jnp.zeros((*x.shape[:-1], params["up"].shape[-1]))
    return jax.lax.scan(one, start, params)[0][0]


def running_sum(params, x):
    hidden = nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd->td", jnp.cumsum(hidden, axis=0), params["down"])


def neighbor(params, x):
    """Each expert reads the units of the next one."""
    hidden = nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd->td", jnp.roll(hidden, 1, axis=0), params["down"])


def backwards(params, x):
    hidden = nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd->td", hidden[::-1], params["down"])


def gated_backwards(params, x):
    hidden = nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd->td", hidden * hidden[::-1], params["down"])


def normalized(params, x):
    hidden = nn.softmax(jnp.einsum("td,edf->etf", x, params["up"]), axis=0)
    return jnp.einsum("etf,efd->td", hidden, params["down"])


def summed_first(params, x):
    hidden = nn.relu(jnp.einsum("td,edf->tf", x, params["up"]))
    return jnp.einsum("tf,efd->td", hidden, params["down"])


def two_scans(params, x):
    first, rest = ({name: leaf[part] for name, leaf in params.items()} for part in (slice(1), slice(1, None)))
    return jax.lax.scan(block, jax.lax.scan(block, x, first)[0], rest)[0]


def merged(params, x):
    """The units of all experts on one axis."""
    hidden = nn.relu(jnp.einsum("td,edf->tef", x, params["up"]))
    return hidden.reshape(len(x), -1) @ params["out"]


def _experts(*axes):
    return {"up": normal(*axes, WIDTH, HIDDEN), "down": normal(*axes, HIDDEN, WIDTH, seed=1)}


# Of each model its params, and the blocks of its hidden units.
MODELS = {
    scanned: (stack(), (BLOCKS,)),
    reversed_scan: (stack(), (BLOCKS,)),
    remat: (stack(), (BLOCKS,)),
    without_bias: (_experts(BLOCKS), (BLOCKS,)),
    second_axis: (jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, 1), stack()), (BLOCKS,)),
    side_by_side: (stack(), (BLOCKS,)),
    # Nothing tells which of the two axes are experts.
    summed_over_both: (stack() | {"bias": normal(BLOCKS, HIDDEN)}, ()),
    experts_in_blocks: (_experts(BLOCKS, EXPERTS), (BLOCKS,)),
    routed_in_blocks: (
        _experts(BLOCKS, EXPERTS) | {"router": normal(BLOCKS, WIDTH, EXPERTS)},
        (BLOCKS, EXPERTS),
    ),
    shared_bias: (_experts(BLOCKS) | {"shared": normal(HIDDEN)}, ()),
    carried: (_experts(BLOCKS), ()),
    running_sum: (_experts(BLOCKS), ()),
    neighbor: (_experts(BLOCKS), ()),
    backwards: (_experts(BLOCKS), ()),
    gated_backwards: (_experts(BLOCKS), ()),
    normalized: (_experts(BLOCKS), ()),
    summed_first: (_experts(BLOCKS), ()),
    two_scans: (stack(), ()),
    merged: ({"up": normal(BLOCKS, WIDTH, HIDDEN), "out": normal(BLOCKS * HIDDEN, WIDTH)}, ()),
}
MODEL = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)


def _magnitudes(params):
    return jax.tree.map(jnp.abs, params)


def hidden_of(groups):
    return [group for group in groups.unlocked if group.size == HIDDEN]


def found(model):
    params, _ = MODELS[model]
    return params, prune.groups(params, model, normal(5, WIDTH))


@MODEL
def test_hidden_units_have_blocks_where_those_do_not_meet(model):
    _, expected = MODELS[model]
    groups = hidden_of(found(model)[1])
    assert [group.blocks for group in groups] == [expected]


@MODEL
@pytest.mark.parametrize("seed", range(3))
def test_the_smaller_model_gives_what_the_masked_one_gives(model, seed):
    params, groups = found(model)
    draw, removed = np.random.default_rng(seed), {}
    for group in groups.unlocked:
        if group.routed:
            continue
        every = np.broadcast_to(np.arange(group.size), (*group.blocks, group.size))
        removed[group.name] = draw.permuted(every, axis=-1)[..., : draw.integers(1, group.size)]
    plan, x = prune.Plan.of(groups, removed), normal(5, WIDTH, seed=9)
    plan = prune.Plan.from_json(plan.to_json())
    masked = model(prune.apply(params, plan.masks(params)), x)
    np.testing.assert_allclose(model(prune.shrink(params, plan), x), masked, rtol=1e-5, atol=1e-5)


def test_each_block_loses_its_own_least_important_units():
    params = jax.tree.map(np.ones_like, stack())
    faint = [[0, 1], [2, 3], [4, 5]]
    for at, units in enumerate(faint):
        params["down"][at, units] = 0.1
    groups = prune.groups(params, scanned, normal(5, WIDTH))
    (group,) = hidden_of(groups)
    plan = prune.plan(groups, _magnitudes(params), 1 / 3)
    assert plan.removed == {group.name: tuple(map(tuple, faint))}
    scores = groups.scored(_magnitudes(params))[group.name].importance
    assert scores.shape == (BLOCKS, HIDDEN)
    np.testing.assert_allclose(scores.sum(), sum(leaf.sum() for leaf in params.values()), rtol=1e-6)


def test_scanned_blocks_are_pruned_as_the_same_blocks_in_a_list():
    params, x = stack(), normal(5, WIDTH)
    listed = {f"block{i}": {name: leaf[i] for name, leaf in params.items()} for i in range(BLOCKS)}

    def in_turn(params, x):
        for i in range(BLOCKS):
            x, _ = block(x, params[f"block{i}"])
        return x

    one = prune.plan(prune.groups(params, scanned, x), _magnitudes(params), 0.5)
    other = prune.plan(prune.groups(listed, in_turn, x), _magnitudes(listed), 0.5)
    expected = in_turn(prune.shrink(listed, other), x)
    np.testing.assert_allclose(scanned(prune.shrink(params, one), x), expected, rtol=1e-6, atol=1e-6)


def test_one_order_of_all_groups_takes_equally_many_of_each_block():
    params = stack() | {"head": normal(WIDTH, 8, seed=5), "out": normal(8, 2, seed=6)}

    def model(params, x):
        x = scanned({name: params[name] for name in ("up", "bias", "down")}, x)
        return nn.relu(x @ params["head"]) @ params["out"]

    groups = prune.groups(params, model, normal(5, WIDTH))
    plan = prune.plan(groups, _magnitudes(params), 0.5, scope="global")
    (group,) = hidden_of(groups)
    kept = plan.sizes()
    assert BLOCKS * kept[group.name] + kept["head:1"] == (BLOCKS * HIDDEN + 8) / 2
    importance = groups.scored(_magnitudes(params))[group.name].importance
    for scores, removed in zip(importance, plan.removed[group.name], strict=True):
        assert set(removed) == set(np.argsort(scores)[: len(removed)].tolist())


def test_one_list_of_elements_is_for_all_blocks():
    _, groups = found(scanned)
    (group,) = hidden_of(groups)
    assert prune.Plan.of(groups, {group.name: [4, 1]}).removed == {group.name: ((1, 4),) * BLOCKS}


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([[0], [1]], r"has \(3,\) blocks, and elements of \(2,\) are to be removed"),
        ([[0], [1, 2], [3]], r"or \(3,\) such lists, equally long"),
        ([[0], [1], [6]], "has elements 0 to 5, and 6 is to be removed"),
        ([[0, 0], [1, 2], [3, 4]], "to be removed twice"),
        ([[*range(6)]] * 3, "all 6 elements"),
    ],
)
def test_elements_of_blocks_that_do_not_fit(elements, message):
    _, groups = found(scanned)
    with pytest.raises(ValueError, match=message):
        prune.Plan.of(groups, {"up:2": elements})


def test_the_optimizer_state_shrinks_block_by_block():
    params, groups = found(scanned)
    plan = prune.plan(groups, _magnitudes(params), 0.5)
    state = optax.adam(1e-3).init(params)
    state = jax.tree.map(lambda leaf: leaf + 0, state)
    moved = state[0]._replace(mu=params)
    small, (shrunk, _) = prune.shrink(params, plan, (moved, state[1]))
    jax.tree.map(np.testing.assert_array_equal, shrunk.mu, small)
