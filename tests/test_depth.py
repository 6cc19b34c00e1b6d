"""Blocks of a scan go where zeros in their place would be skipped, and no others; which matter is measured."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxeff
from jaxeff import cost, prune

BLOCKS, WIDTH, HIDDEN = 4, 6, 5


@pytest.fixture(autouse=True)
def biases_without_axes():
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


PARAMS = {
    "scale": 1 + 0.1 * normal(BLOCKS, WIDTH),
    "up": normal(BLOCKS, WIDTH, HIDDEN),
    "down": 0.5 * normal(BLOCKS, HIDDEN, WIDTH),
    "head": normal(WIDTH, 3),
}
X = normal(7, WIDTH, seed=5)


def norm(h, scale):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * scale


def branch(h, w):
    return nn.gelu(norm(h, w["scale"]) @ w["up"]) @ w["down"]


def scanned(step, start=lambda x: x, end=lambda h: h):
    def model(params, x):
        stacked = {name: leaf for name, leaf in params.items() if name != "head"}
        h, _ = jax.lax.scan(step, start(x), stacked)
        return end(h) @ params["head"]

    return model


residual = scanned(lambda h, w: (h + branch(h, w), None))

MODELS = {
    "residual": residual,
    "branch first": scanned(lambda h, w: (branch(h, w) + h, None)),
    "subtracted": scanned(lambda h, w: (h - branch(h, w), None)),
    "remat": scanned(jax.checkpoint(lambda h, w: (h + branch(h, w), None))),
    "two branches": scanned(lambda h, w: (h + branch(h, w) + jnp.tanh(branch(h, w)), None)),
    "gated": scanned(lambda h, w: (h + branch(h, w) * nn.sigmoid(h), None)),
    "in float32": scanned(
        lambda h, w: ((h.astype(jnp.float32) + branch(h, w)).astype(h.dtype), None),
        lambda x: x.astype(jnp.bfloat16),
        lambda h: h.astype(jnp.float32),
    ),
    "a cache that stays": scanned(
        lambda c, w: ((c[0] + branch(c[0], w), c[1]), None), lambda x: (x, x), lambda c: c[0] + c[1]
    ),
    "a counter that nobody reads": scanned(
        lambda c, w: ((c[0] + branch(c[0], w), c[1] + 1), None), lambda x: (x, 0), lambda c: c[0]
    ),
    "keys that nobody uses": lambda params, x: scanned(lambda h, w: (h + branch(h, w), w["key"]))(
        {**params, "key": jax.random.split(jax.random.key(0), len(params["up"]))}, x
    ),
}
LOCKED = {
    "no residual": scanned(lambda h, w: (branch(h, w), None)),
    "norm behind": scanned(lambda h, w: (norm(h + branch(h, w), w["scale"]), None)),
    "half of it": scanned(lambda h, w: (0.5 * h + branch(h, w), None)),
    "a counter": scanned(
        lambda c, w: ((c[0] + branch(c[0], w), c[1] + 1), None), lambda x: (x, 0), lambda c: c[0] * c[1]
    ),
    "not 0 at 0": scanned(lambda h, w: (h + jnp.exp(branch(h, w)), None)),
    "bias of ones": scanned(lambda h, w: (h + branch(h, w) + 1.0, None)),
    "rounded": scanned(lambda h, w: ((h.astype(jnp.bfloat16) + branch(h, w)).astype(h.dtype), None)),
}


def blocks_of(model, params=PARAMS):
    (group,) = [group for group in prune.groups(params, model, X) if group.kind == "block"]
    return group


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("removed", [[0], [1, 3], [0, 1, 2]])
def test_without_blocks_it_computes_what_it_does_with_zeros_in_their_place(name, removed):
    model, group = MODELS[name], blocks_of(MODELS[name])
    assert group.locked is None and group.size == BLOCKS
    plan = prune.Plan.of(prune.groups(PARAMS, model, X), {group.name: removed})
    masked = model(prune.apply(PARAMS, plan.masks(PARAMS)), X)
    small, small_apply = prune.compact(PARAMS, model, X, plan)
    assert small["up"].shape == (BLOCKS - len(removed), WIDTH, HIDDEN)
    np.testing.assert_allclose(model(small, X), masked, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOCKED)
def test_blocks_that_zeros_do_not_skip_stay(name):
    assert blocks_of(LOCKED[name]).locked == "the iterations of a scan"


@pytest.mark.parametrize("name", ["norm behind", "half of it", "a counter", "not 0 at 0", "bias of ones"])
def test_blocks_that_zeros_do_not_skip_go_where_that_is_allowed(name):
    model = LOCKED[name]
    groups = prune.groups(PARAMS, model, X, allow="depth")
    (group,) = [group for group in groups.unlocked if group.kind == "block"]
    plan = prune.Plan.of(groups, {group.name: [0, 2]})
    small, small_apply = prune.compact(PARAMS, model, X, plan)
    kept = {leaf: PARAMS[leaf] if leaf == "head" else PARAMS[leaf][jnp.array([1, 3])] for leaf in PARAMS}
    np.testing.assert_allclose(model(small, X), model(kept, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(small_apply(small, X), model(kept, X), rtol=1e-5, atol=1e-5)


def test_blocks_stay_where_something_else_goes_through_them():
    def with_data(params, x):
        def step(h, each):
            w, row = each
            return h + branch(h, w) * row, None

        return jax.lax.scan(step, x, (params, x[:BLOCKS]))[0]

    def returned(params, x):
        return jax.lax.scan(lambda h, w: (h + branch(h, w), h), x, params)[1]

    def numbered(params, x):
        step = lambda h, each: (h + branch(h, each[0]) * each[1], None)  # noqa: E731
        return jax.lax.scan(step, x, (params, jnp.arange(float(BLOCKS))))[0]

    params = {name: leaf for name, leaf in PARAMS.items() if name != "head"}
    assert "iterations of a scan" in blocks_of(with_data, params).locked
    assert blocks_of(returned, params).locked == "output of the model"
    assert "iterations of a scan" in blocks_of(numbered, params).locked


def test_n_blocks_fewer_are_n_iterations_fewer():
    group = blocks_of(residual)
    plan = prune.Plan.of(prune.groups(PARAMS, residual, X), {group.name: [1, 2, 3]})
    small, small_apply = prune.compact(PARAMS, residual, X, plan)
    head = len(X) * WIDTH * 3
    whole, less = (cost.count(p, f, X).macs - head for f, p in ((residual, PARAMS), (small_apply, small)))
    assert whole == BLOCKS * less > 0


def test_a_block_that_does_nothing_is_ranked_first_and_missed_by_no_bit():
    params = {**PARAMS, "down": PARAMS["down"].copy()}
    params["down"][2] = 0
    group = blocks_of(residual)
    influence = prune.block_influence(params, residual, X)
    assert influence[group.name][2] == 0 and np.argmin(influence[group.name]) == 2
    found = prune.order_blocks(params, residual, X, loss_fn=_squares, targets=residual(params, X), count=1)
    assert found.order == ((group.name, 2),) and found.losses == (found.dense,)
    groups = prune.groups(params, residual, X)
    for importance in (influence, found.importance):
        plan = prune.plan(groups, importance, 1 / BLOCKS, kinds="block")
        assert plan.removed == {group.name: (2,)}
        np.testing.assert_array_equal(
            jax.jit(residual)(prune.shrink(params, plan), X), jax.jit(residual)(params, X)
        )


def test_influence_is_that_of_a_forward_pass_by_hand():
    h, expected = X.astype(np.float64), []
    for at in range(BLOCKS):
        w = {name: leaf[at] for name, leaf in PARAMS.items() if name != "head"}
        after = h + np.asarray(branch(jnp.asarray(h, jnp.float32), w), np.float64)
        cosine = (h * after).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(after, axis=-1)
        expected.append(1 - cosine.mean())
        h = after
    (found,) = prune.block_influence(PARAMS, residual, X).values()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0**70, 2.0**-80])
def test_influence_does_not_depend_on_the_scale_of_the_stream(scale):
    def linear(params, x):
        return jax.lax.scan(lambda h, w: (h + h @ w, None), x, params["w"])[0]

    params = {"w": jnp.asarray(normal(3, 4, 4) / 3)}
    (expected,) = prune.block_influence(params, linear, normal(5, 4, seed=1)).values()
    (found,) = prune.block_influence(params, linear, normal(5, 4, seed=1) * np.float32(scale)).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.all(expected > 0.01)


def test_influence_is_not_known_where_activations_are_nan():
    """0 would have a plan remove these blocks first."""
    (found,) = prune.block_influence(PARAMS, residual, X * np.nan).values()
    assert np.all(np.isnan(found))


def _squares(outputs, targets):
    return (outputs - targets) ** 2


def test_the_order_is_that_of_brute_force():
    targets = normal(len(X), 3, seed=8)

    def loss_of(kept):
        small = {name: leaf if name == "head" else leaf[list(kept)] for name, leaf in PARAMS.items()}
        return float(jnp.mean(_squares(residual(small, X), targets)))

    kept, order, losses = [*range(BLOCKS)], [], []
    while len(kept) > 1:
        block = min(kept, key=lambda block: loss_of([other for other in kept if other != block]))
        kept.remove(block)
        order.append(block)
        losses.append(loss_of(kept))
    found = prune.order_blocks(PARAMS, residual, X, loss_fn=_squares, targets=targets)
    assert [block for _, block in found.order] == order
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(found.dense, loss_of(range(BLOCKS)), rtol=1e-5)
    (places,) = found.importance.values()
    assert places[kept[0]] == BLOCKS - 1 and [np.argsort(places)[i] for i in range(BLOCKS - 1)] == order
    assert all(f"[{block}]" in str(found) for block in order)


def test_blocks_go_only_where_they_are_asked_for():
    groups = prune.groups(PARAMS, residual, X)
    scores = jax.tree.map(jnp.abs, PARAMS)
    kinds = {group.name: group.kind for group in groups}
    assert {kinds[name] for name in prune.plan(groups, scores, 0.5).removed} == {"unit"}
    both = prune.plan(groups, scores, 0.5, kinds=("unit", "block"))
    assert sorted(kinds[name] for name in both.removed) == ["block", "unit"]
    for kind, plan in itertools.product(("unit", "block"), [both]):
        assert any(kinds[name] == kind for name in plan.sizes())


@pytest.mark.parametrize(
    ("kinds", "message"), [("units", "`kinds` may hold 'unit'"), (("head",), "of kind 'block', 'unit'")]
)
def test_kinds_that_are_not_there(kinds, message):
    groups = prune.groups(PARAMS, residual, X)
    with pytest.raises(ValueError, match=message):
        prune.plan(groups, jax.tree.map(jnp.abs, PARAMS), 0.5, kinds=kinds)


def test_targets_of_another_length_are_refused_by_name():
    with pytest.raises(ValueError, match="`loss_fn` does not accept the model's outputs, .* with `targets`"):
        prune.order_blocks(PARAMS, residual, X, loss_fn=_squares, targets=normal(len(X) - 1, 3))


def test_models_without_blocks():
    model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    params = {"a": normal(6, 4), "b": normal(4, 2)}
    with pytest.raises(ValueError, match="no scan over stacked weights"):
        prune.block_influence(params, model, X)
    with pytest.raises(ValueError, match="no blocks that may be removed"):
        prune.order_blocks(params, model, X, loss_fn=_squares, targets=normal(7, 2), count=1)
    with pytest.raises(
        ValueError, match=r"`importance` of 'scale:0' has shape \(2,\), and its elements \(4,\)"
    ):
        prune.groups(PARAMS, residual, X).scored({"scale:0": np.ones(2)})


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, h):
        return h + self.down(self.dropout(nnx.gelu(self.up(h))))


class Blocks(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(Block, in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=BLOCKS)(make)(rngs)

    def __call__(self, h):
        return nnx.scan(lambda h, block: block(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(h, self.blocks)


def test_random_streams_that_serving_does_not_read_lock_nothing():
    params, apply_fn = jaxeff.functional(Blocks(nnx.Rngs(0)))
    assert jax.tree.leaves(apply_fn.state)
    plan = prune.plan(
        prune.groups(params, apply_fn, X), prune.block_influence(params, apply_fn, X), 0.5, kinds="block"
    )
    small, small_apply = prune.compact(params, apply_fn, X, plan)
    masked = apply_fn(prune.apply(params, plan.masks(params)), X)
    np.testing.assert_allclose(small_apply(small, X), masked, rtol=1e-6)
