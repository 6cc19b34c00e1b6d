"""Straight-through derivatives; dynamic sparse training against a NumPy oracle of one change of masks."""

import devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import prune
from jaxeff.numerics.selection import highest, lowest

# Straight-through

VALUES = np.array([[0.1, -3.0, 2.5], [np.inf, -0.7, 1e-40]], np.float32)
KEPT = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_is_apply_in_value_and_the_identity_in_derivative(dtype):
    params = {"w": jnp.asarray(VALUES, dtype), "bias": jnp.ones(2, dtype)}
    masks = {"w": jnp.asarray(KEPT), "bias": jnp.asarray(True)}
    through = lambda params: prune.straight_through(params, masks)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, through(params), prune.apply(params, masks))
    weights = {"w": jnp.arange(6.0, dtype=dtype).reshape(2, 3), "bias": jnp.full(2, 3, dtype)}
    _, back = jax.vjp(through, params)
    jax.tree.map(np.testing.assert_array_equal, back(weights)[0], weights)
    _, forward = jax.jvp(jax.jit(through), (params,), (weights,))
    jax.tree.map(np.testing.assert_array_equal, forward, weights)


def test_masks_of_the_weights_themselves_bring_weights_back():
    # (w~ - 1)^2: the small weight gains on the other, which only loses.
    def loss(params):
        kept = prune.masks(prune.scored(params), 0.5)
        return jnp.sum(jnp.square(prune.straight_through(params, kept)["w"] - 1))

    params = {"w": jnp.array([[0.5, 3.0]])}
    first = jax.jit(jax.grad(loss))(params)["w"]
    np.testing.assert_array_equal(first, [[-2.0, 4.0]])
    after = jax.tree.map(lambda w, g: w - 0.45 * g, params, {"w": first})
    np.testing.assert_array_equal(prune.masks(prune.scored(after), 0.5)["w"], [[True, False]])


def test_masks_of_other_params_are_refused():
    with pytest.raises(ValueError, match="must match the params"):
        prune.straight_through({"w": jnp.ones(2)}, {"v": jnp.ones(2, bool)})


# Selection

LOWEST, HIGHEST = jax.jit(lowest), jax.jit(highest)
SOME = st.lists(st.sampled_from([0.0, 1e-40, 1.0, 2.0, 3e38, np.inf]), min_size=9, max_size=9)


@settings(max_examples=40, deadline=None)
@given(SOME, st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 9), st.booleans())
def test_the_first_of_a_stable_sort_of_those_to_choose_from(values, among, count, largest):
    scores, among = np.array(values, np.float32), np.array(among)
    count = min(count, int(among.sum()))
    order = np.argsort(-scores if largest else scores, kind="stable")
    expected = np.isin(np.arange(9), order[among[order]][:count])
    (found,) = (HIGHEST if largest else LOWEST)([jnp.asarray(scores)], count, [jnp.asarray(among)])
    np.testing.assert_array_equal(found, expected)


# One change of the masks

SHAPES = {"a": (6, 10), "b": (3, 3, 2, 8), "bias": (8,)}
NAMES = ("a", "b")


def drawn(seed, low, high):
    """Few values: most are tied with others."""
    draw = np.random.default_rng(seed)
    return {name: draw.integers(low, high, shape).astype(np.float32) for name, shape in SHAPES.items()}


def survivors(mask, weight, count):
    """Without the `count` smallest of the active weights."""
    active = np.flatnonzero(mask)
    stays = mask.ravel().copy()
    stays[active[np.argsort(np.abs(weight).ravel()[active], kind="stable")[:count]]] = False
    return stays.reshape(mask.shape)


def oracle(mask, weight, gradient, share):
    """Drop, then grow among all that did not stay; equal ones by index."""
    count = round(share * mask.sum())
    stays = survivors(mask, weight, count).ravel()
    open_ = np.flatnonzero(~stays)
    stays[open_[np.argsort(-np.abs(gradient).ravel()[open_], kind="stable")[:count]]] = True
    return stays.reshape(mask.shape)


def at_a_change(make, inner=None, begin=0):
    inner = inner or optax.sgd(0.125, momentum=0.5)
    optimizer = make(inner, 0.6, key=jax.random.key(3), begin=begin, end=40, every=10)
    params, gradients = drawn(0, -4, 5), drawn(1, -3, 4)
    state = optimizer.init(params)
    params = prune.apply(params, state.masks)
    return jax.jit(optimizer.update), jax.tree.map(jnp.asarray, gradients), state, params


def test_rigl_drops_the_small_and_grows_by_gradient():
    update, gradients, state, params = at_a_change(prune.rigl)
    for step in (10, 20, 40):
        updates, after = update(gradients, state._replace(step=jnp.int32(step)), params)
        params_after = optax.apply_updates(params, updates)
        share = 0.3 / 2 * (1 + np.cos(np.pi * step / 40))
        for name in NAMES:
            old, weight, gradient = (np.asarray(tree[name]) for tree in (state.masks, params, gradients))
            new = oracle(old, weight, gradient, share)
            np.testing.assert_array_equal(after.masks[name], new)
            assert (new != old).any() == (step < 40)
            # Those that stay take the optimizer's step; the grown ones start at 0.
            np.testing.assert_array_equal(params_after[name], np.where(old & new, weight - gradient / 8, 0))
        np.testing.assert_array_equal(params_after["bias"], params["bias"] - gradients["bias"] / 8)


def test_sparse_evolution_drops_the_small_and_grows_at_random():
    update, gradients, state, params = at_a_change(prune.sparse_evolution)
    grown = []
    for step in (10, 11, 20):
        given = state._replace(step=jnp.int32(step))
        after = update(gradients, given, params)[1]
        again = update(jax.tree.map(jnp.zeros_like, gradients), given, params)[1]
        jax.tree.map(np.testing.assert_array_equal, again.masks, after.masks)
        share = 0.3 / 2 * (1 + np.cos(np.pi * step / 40)) * (step != 11)
        for name in NAMES:
            old, new = np.asarray(state.masks[name]), np.asarray(after.masks[name])
            stays = survivors(old, np.asarray(params[name]), round(share * old.sum()))
            assert new.sum() == old.sum() and new[stays].all()
        grown.append(new & ~old)
    assert grown[0].any() and not grown[1].any() and (grown[0] != grown[2]).any()


def test_growth_is_spread_evenly():
    """Of 800 open places, 200 grown at random: as many of each half, within five standard deviations."""
    optimizer = prune.sparse_evolution(
        optax.sgd(0.1), 0.5, key=jax.random.key(0), end=1000, every=1, fraction=1.0
    )
    params = {"w": jnp.ones((40, 40))}
    state = optimizer.init(params)._replace(step=jnp.int32(1))
    mask = optimizer.update(params, state, params)[1].masks["w"]
    assert int(mask.sum()) == 800
    assert abs(int(mask[:20].sum()) - 400) < 5 * np.sqrt(1600 / 16)


@pytest.mark.parametrize(("begin", "step"), [(0, 0), (0, 5), (0, 50), (20, 10)])
def test_masks_stay_where_they_are_not_due(begin, step):
    update, gradients, state, params = at_a_change(prune.rigl, begin=begin)
    after = update(gradients, state._replace(step=jnp.int32(step)), params)[1]
    jax.tree.map(np.testing.assert_array_equal, after.masks, state.masks)


ADAM = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "partitioned": optax.partition({1: optax.adam(0.1), 2: optax.sgd(0.1)}, {"a": 1, "b": 1, "bias": 2}),
    "masked": optax.masked(optax.adam(0.1), {"a": True, "b": True, "bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAM)
def test_the_moments_of_what_is_inactive_or_grown_are_0_and_others_are_left(name):
    update, gradients, state, params = at_a_change(prune.rigl, ADAM[name])
    shapes = [SHAPES[each] for each in NAMES]
    dirty = jax.tree.map(lambda leaf: leaf + 1 if leaf.shape in shapes else leaf, state.inner)
    after = update(gradients, state._replace(step=jnp.int32(10), inner=dirty), params)[1]
    for each in NAMES:
        moments = [leaf for leaf in jax.tree.leaves(after.inner) if leaf.shape == SHAPES[each]]
        grown = np.asarray(after.masks[each] & ~state.masks[each])
        assert len(moments) == 2 and grown.any()
        for moment in moments:
            np.testing.assert_array_equal(moment != 0, state.masks[each] & after.masks[each])


def test_equal_paths_in_two_depths_are_told_apart():
    params = {"w": jnp.ones((4, 4)), "deep": {"w": jnp.ones((4, 4))}}
    optimizer = prune.rigl(
        optax.adam(0.1), 0.5, key=jax.random.key(0), end=40, every=10, allocation={"w": 0.75, "deep/w": 0.5}
    )
    state = optimizer.init(params)._replace(step=jnp.int32(10))
    gradients = jax.tree.map(lambda leaf: jnp.arange(16.0).reshape(4, 4) + 1, params)
    params = prune.apply(params, state.masks)
    dirty = jax.tree.map(lambda leaf: leaf + 1, state.inner)
    after = optimizer.update(gradients, state._replace(inner=dirty), params)[1]
    stayed = jax.tree.map(jnp.logical_and, state.masks, after.masks)
    jax.tree.map(
        lambda moment, mask: np.testing.assert_array_equal(moment != 0, mask), after.inner[0].mu, stayed
    )
    assert bool((stayed["w"] != stayed["deep"]["w"]).any())


# Training

X, Y = (np.random.default_rng(1).standard_normal(shape).astype(np.float32) for shape in ((64, 8), (64, 4)))


class Network(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, param_dtype=self.dtype)(x))
        return nn.Dense(4, param_dtype=self.dtype)(x)


MAKE = {"rigl": prune.rigl, "sparse_evolution": prune.sparse_evolution}


@pytest.mark.parametrize(("name", "dtype"), [("rigl", jnp.bfloat16), ("sparse_evolution", jnp.float32)])
def test_as_many_weights_are_active_at_every_step(name, dtype):
    optimizer = MAKE[name](
        optax.adamw(1e-2, weight_decay=0.1), 0.8, key=jax.random.key(0), end=60, every=3, fraction=0.5
    )
    model = Network(dtype)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=optimizer
    )

    def step(state, _):
        loss = lambda p: jnp.mean(jnp.square(state.apply_fn({"params": p}, X) - Y))  # noqa: E731
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        layers = [(state.params[n]["kernel"], state.opt_state.masks[n]["kernel"]) for n in state.params]
        dead = [jnp.all((kernel == 0) | mask) for kernel, mask in layers]
        return state, ([jnp.sum(mask) for _, mask in layers], dead, [mask for _, mask in layers])

    last, (counts, dead, masks) = jax.jit(lambda state: jax.lax.scan(step, state, None, length=80))(state)
    for layer, count, still, mask in zip(state.params, counts, dead, masks, strict=True):
        first = int(state.opt_state.masks[layer]["kernel"].sum())
        np.testing.assert_array_equal(count, np.full(80, first))
        assert bool(jnp.all(still))
        # They moved, and rest after the end.
        changes = np.asarray((mask[1:] != mask[:-1]).any((1, 2)))
        assert changes[: 60 - 3].any() and not changes[60:].any()
    total = sum(int(jnp.sum(mask)) for mask in (m["kernel"] for m in last.opt_state.masks.values()))
    assert abs(total - 0.2 * (256 + 128)) <= 1


def test_the_key_decides_the_masks():
    params = {"w": jnp.ones((20, 20))}
    masks = [
        prune.rigl(optax.sgd(0.1), 0.9, key=jax.random.key(seed), end=9, every=1).init(params).masks["w"]
        for seed in (0, 0, 1)
    ]
    assert bool((masks[0] == masks[1]).all()) and int(masks[0].sum()) == 40 == int(masks[2].sum())
    assert bool((masks[0] != masks[2]).any())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be in"),
        ({"begin": 50}, "`begin` and `end`"),
        ({"every": 0}, "`every` must be"),
        ({"fraction": 0.0}, "`fraction` must be in"),
        ({"fraction": 1.1}, "`fraction` must be in"),
    ],
)
def test_what_is_wrong_is_named(name, options, message):
    given = {"sparsity": 0.5, "key": jax.random.key(0), "end": 40, "every": 10, **options}
    with pytest.raises(ValueError, match=message):
        MAKE[name](optax.sgd(0.1), **given)


_ON_EIGHT = """
import jax, numpy as np, optax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxeff import prune
mesh = Mesh(np.array(jax.devices()), ("d",))
draw = np.random.default_rng(0)
weights, gradients = (draw.integers(-9, 9, (64, 128)).astype(np.float32) for _ in range(2))
for make in (prune.rigl, prune.sparse_evolution):
    optimizer = make(optax.adam(0.1), 0.7, key=jax.random.key(0), end=40, every=10)
    step = jax.jit(optimizer.update)
    def run(put):
        params = {"w": put(weights)}
        state = optimizer.init(params)
        assert state.masks["w"].sharding == params["w"].sharding
        params = prune.apply(params, state.masks)
        return {"w": put(gradients)}, state._replace(step=jnp.int32(10)), params
    one = step(*run(jnp.asarray))
    for spec in (P("d"), P(None, "d")):
        given = run(lambda array: jax.device_put(array, NamedSharding(mesh, spec)))
        text = step.lower(*given).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
        jax.tree.map(np.testing.assert_array_equal, step(*given), one)
"""


def test_masks_move_on_eight_devices_as_on_one_and_nothing_is_gathered():
    devices.run(_ON_EIGHT, 8)
