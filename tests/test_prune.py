"""Masks against a NumPy oracle, and an optimizer that keeps to them."""

import devices
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from network import normal

import jaxeff
from jaxeff import prune
from jaxeff.numerics.selection import lowest
from jaxeff.prune._allocation import erk, lamp

DRAW = np.random.default_rng(0)
# Few values: most scores are tied with others.
SCORES = {
    "a": DRAW.integers(0, 5, (8, 12)).astype(np.float32),
    "b": DRAW.integers(0, 5, (3, 3, 4, 8)).astype(np.float32),
    "bias": np.float32(0),
}
NAMES = ("a", "b")


def oracle(arrays, count):
    """The `count` lowest of several arrays, equal ones by index: a stable sort."""
    flat = np.concatenate([array.ravel() for array in arrays])
    removed = np.zeros(flat.size, bool)
    removed[np.argsort(flat, kind="stable")[:count]] = True
    return [
        part.reshape(array.shape)
        for part, array in zip(
            np.split(removed, np.cumsum([a.size for a in arrays])[:-1]), arrays, strict=True
        )
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-40, 1.0, 2.0, 3e38]), min_size=12, max_size=12),
    st.integers(0, 12),
)
def test_the_lowest_are_those_of_a_stable_sort(values, count):
    scores = np.array(values, np.float32)
    parts = [scores[:5].reshape(5, 1), scores[5:]]
    for ours, theirs in zip(
        lowest([jnp.asarray(p) for p in parts], count), oracle(parts, count), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.77, 0.99])
def test_masks_by_layer(sparsity):
    masks = prune.masks(SCORES, sparsity)
    for name in NAMES:
        (removed,) = oracle([SCORES[name]], round(sparsity * SCORES[name].size))
        np.testing.assert_array_equal(masks[name], ~removed)
    assert masks["bias"].shape == () and bool(masks["bias"])


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.6])
def test_masks_over_all(sparsity):
    masks = prune.masks(SCORES, sparsity, scope="global")
    arrays = [SCORES[name] for name in NAMES]
    removed = oracle(arrays, round(sparsity * sum(array.size for array in arrays)))
    for name, gone in zip(NAMES, removed, strict=True):
        np.testing.assert_array_equal(masks[name], ~gone)


def test_units_go_whole():
    masks = prune.masks(SCORES, 0.5, pattern=prune.Units(axis=-1))
    for name in NAMES:
        sums = SCORES[name].reshape(-1, SCORES[name].shape[-1]).sum(0)
        (removed,) = oracle([sums], round(0.5 * sums.size))
        np.testing.assert_array_equal(masks[name], np.broadcast_to(~removed, SCORES[name].shape))


def test_blocks_go_whole():
    masks = prune.masks(SCORES, 0.5, pattern=prune.Block((2, 4)))
    sums = SCORES["a"].reshape(4, 2, 3, 4).sum((1, 3))
    (removed,) = oracle([sums], 6)
    np.testing.assert_array_equal(masks["a"], np.kron(~removed, np.ones((2, 4), bool)))
    assert prune.sparsity(masks) == 0.5


LAST_TWO = {"a": prune.Axes((0,), (1,)), "b": prune.Axes((2,), (3,))}


@pytest.mark.parametrize(
    ("axis", "axes", "number"), [("input", LAST_TWO, -2), ("output", LAST_TWO, -1), (-2, None, -2)]
)
def test_n_of_m_stay_along_the_axis(axis, axes, number):
    masks = prune.masks(SCORES, pattern=prune.NByM(2, 4, axis=axis, axes=axes))
    for name in NAMES:
        rows = np.moveaxis(SCORES[name], number, -1)
        fours = rows.reshape(-1, 4)
        expected = np.ones_like(fours, bool)
        for row, four in zip(expected, fours, strict=True):
            row[np.argsort(four, kind="stable")[:2]] = False
        np.testing.assert_array_equal(masks[name], np.moveaxis(expected.reshape(rows.shape), -1, number))


def test_a_layer_keeps_what_it_must_and_others_make_up_for_it():
    scores = {"weak": jnp.linspace(0, 0.1, 20), "strong": jnp.linspace(1, 2, 20)}
    masks = prune.masks(scores, 0.5, scope="global", max_sparsity={"weak": 0.75})
    assert (int(masks["weak"].sum()), int(masks["strong"].sum())) == (5, 15)
    assert int(prune.masks(scores, 0.5, max_sparsity=0.25)["weak"].sum()) == 15
    assert prune.sparsity(prune.masks(scores, 0.5, max_sparsity=0.0)) == 0


def test_a_layer_that_vanishes_is_named():
    scores = {"weak": jnp.linspace(0, 0.1, 20), "strong": jnp.linspace(1, 2, 20)}
    with pytest.warns(UserWarning, match="nothing of 'weak' is left"):
        _ = prune.masks(scores, 0.6, scope="global")
    kept = prune.masks(scores, 0.6, scope="global", allocation="lamp")
    assert all(bool(mask.any()) for mask in kept.values())


def test_lamp_is_its_definition():
    scores = DRAW.random(50).astype(np.float32)
    squares = np.square(scores.astype(np.float64))
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(lamp(jnp.asarray(scores)), expected, rtol=1e-5)


def test_erk_removes_as_much_in_all_and_leaves_small_layers_denser():
    shapes = {"small": (4, 4), "middle": (64, 32), "large": (512, 256)}
    found = {name: float(share) for name, share in erk(shapes, 0.9).items()}
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    assert sum(found[name] * sizes[name] for name in shapes) == pytest.approx(
        0.9 * sum(sizes.values()), rel=1e-5
    )
    assert found["small"] == 0 and found["middle"] < found["large"]
    density = {name: 1 - found[name] for name in ("middle", "large")}
    ratio = (96 / 2048) / (768 / 131072)
    assert density["middle"] / density["large"] == pytest.approx(ratio, rel=1e-4)


def test_masks_of_a_criterion_on_activations():
    model, batch = nn.Dense(6), jnp.ones((4, 5)).at[:, 0].set(0)
    variables = model.init(jax.random.key(0), batch)
    statistics = jaxeff.collect(variables, model.apply, batch, criterion="wanda")
    masks = prune.masks(prune.scored(variables, statistics, "wanda"), 0.2)
    # A fifth of the weights hangs on an input that is always 0.
    np.testing.assert_array_equal(masks["params"]["kernel"][0], False)
    pruned = prune.apply(variables, masks)
    np.testing.assert_array_equal(model.apply(pruned, batch), model.apply(variables, batch))


def test_packed_masks_come_back():
    masks = prune.masks(SCORES, 0.5)
    packed = prune.pack(masks)
    assert packed["a"].bits.nbytes == SCORES["a"].size // 8
    jax.tree.map(np.testing.assert_array_equal, prune.unpack(packed), masks)


def test_packed_masks_go_through_the_msgpack_of_flax():
    masks = {
        "w": normal(3, 5) > 0,
        "deep": [normal(17) > 0, jnp.asarray(True)],
        "none": jnp.zeros((0, 3), bool),
    }
    packed = prune.pack(masks)
    data = flax.serialization.to_bytes(packed)
    # 15, 17 and 1 weights, and none, in whole bytes.
    stored = flax.serialization.msgpack_restore(data)
    assert [stored["w"]["bits"].nbytes, stored["deep"]["0"]["bits"].nbytes] == [2, 3]
    everything = prune.pack(jax.tree.map(jnp.ones_like, masks))
    restored = flax.serialization.from_bytes(everything, data)
    assert jax.tree.structure(restored) == jax.tree.structure(packed)
    jax.tree.map(np.testing.assert_array_equal, prune.unpack(restored), masks)
    state = TrainState.create(apply_fn=None, params={}, tx=optax.set_to_zero()).replace(params=packed)
    saved = flax.serialization.to_bytes(state)
    state = flax.serialization.from_bytes(state.replace(params=everything), saved)
    jax.tree.map(np.testing.assert_array_equal, prune.unpack(state.params), masks)


def test_packed_masks_of_another_shape_are_refused():
    saved = flax.serialization.to_bytes(prune.pack({"w": jnp.ones((3, 5), bool)}))
    # As many bytes, and so not told apart by them.
    target = prune.pack({"w": jnp.ones((5, 3), bool)})
    with pytest.raises(ValueError, match=r"the saved mask has shape \(3, 5\), and the target \(5, 3\)"):
        _ = flax.serialization.from_bytes(target, saved)


W = jnp.ones((2, 2))
OF_W = jaxeff.collect({"w": W}, lambda params, x: x @ params["w"], jnp.ones((3, 2)))
WRONG = {
    "sparsity 1": (lambda: prune.masks(SCORES, 1.0), "`sparsity` must be in"),
    "no sparsity": (lambda: prune.masks(SCORES), "`sparsity` must be in"),
    "scope": (lambda: prune.masks(SCORES, 0.5, scope="model"), "`scope` must be"),
    "allocation": (lambda: prune.masks(SCORES, 0.5, allocation="owl"), "`allocation` with scope"),
    "allocation by path": (lambda: prune.masks(SCORES, 0.5, allocation={"a": 0.5}), "'b'"),
    "allocation of 1": (
        lambda: prune.masks(SCORES, 0.5, allocation={"a": 1.0, "b": 0.5}),
        r"`allocation` must be in \[0, 1\), got 1.0 for 'a'",
    ),
    "limit": (lambda: prune.masks(SCORES, 0.5, max_sparsity={"c": 0.5}), "'c', which is not pruned"),
    "block": (lambda: prune.masks(SCORES, 0.5, pattern=prune.Block((5, 1))), "does not divide 'a'"),
    "n of m": (
        lambda: prune.masks(SCORES, pattern=prune.NByM(2, 3, axis=-2)),
        "does not divide axis 0 of 'a'",
    ),
    "n": (lambda: prune.NByM(5, 4), "`n` must be"),
    "part of n": (lambda: prune.NByM(1.5, 4), "both whole numbers, got n=1.5"),
    "none of m": (lambda: prune.NByM(0, 4), "`n` must be from 1"),
    "nan": (lambda: prune.masks({"a": jnp.array([1.0, jnp.nan])}, 0.5), "`importance` of 'a' holds nan"),
    "negative": (lambda: prune.masks({"a": jnp.array([1.0, -1.0])}, 0.5), "`importance` of 'a' holds nan"),
    "other params": (lambda: prune.apply({"w": jnp.ones(2)}, {"v": jnp.ones(2, bool)}), "must match the params"),
    "other shapes": (lambda: prune.apply({"w": jnp.ones(2)}, {"w": jnp.ones(3, bool)}), "params: 'w'"),
    "statistics of others": (lambda: prune.scored({"v": W}, OF_W, "wanda"), "with other `params`: 'v'"),
    "statistics of other shapes": (lambda: prune.scored({"w": W[:, :1]}, OF_W, "wanda"), "with other `params`: 'w'"),
    "prunable": (lambda: prune.scored({"w": jnp.ones((2, 2))}, prunable={"v": True}), "names 'v'"),
    "statistics": (lambda: prune.scored({"w": jnp.ones((2, 2))}, criterion="wanda"), "`statistics` are"),
    "every": (lambda: prune.cubic(0.5, 0, 10, 0), "`every` must be"),
    "end": (lambda: prune.periodic(0.5, 10, 0, 1), "`begin` and `end`"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The optimizer


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(32)(x)))


X, Y = (
    jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32) for shape in ((64, 8), (64, 4))
)


def trained(optimizer, steps, params=None, state=None):
    params = Network().init(jax.random.key(0), X)["params"] if params is None else params
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.mean(jnp.square(Network().apply({"params": p}, X) - Y)))(
                params
            )
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=steps)[0]

    return run(params, state)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_at_exactly_0(name):
    optimizer = prune.sparsify(OPTIMIZERS[name], prune.cubic(0.8, 10, 200, 10))
    params, state = trained(optimizer, 1000)
    for layer in ("Dense_0", "Dense_1"):
        kernel, mask = params[layer]["kernel"], state.masks[layer]["kernel"]
        assert int((kernel == 0).sum()) == round(0.8 * kernel.size) == int((~mask).sum())
        assert bool((params[layer]["bias"] != 0).all())


MOVING = {"key": jax.random.key(0), "end": 25, "every": 4, "allocation": "uniform"}
# Half of each layer, from the first update on.
HALVED = {
    "sparsify": lambda optimizer: prune.sparsify(optimizer, prune.one_shot(0.5)),
    "rigl": lambda optimizer: prune.rigl(optimizer, 0.5, **MOVING),
    "sparse_evolution": lambda optimizer: prune.sparse_evolution(optimizer, 0.5, **MOVING),
}
halved = pytest.mark.parametrize("half", HALVED.values(), ids=HALVED)


@halved
def test_variables_are_trained_as_they_are(half):
    optimizer = half(optax.sgd(0.1))
    variables = {**Network().init(jax.random.key(0), X), "batch_stats": {"mean": jnp.ones((3, 3))}}
    updates, _ = optimizer.update(variables, optimizer.init(variables), variables)
    after = optax.apply_updates(variables, updates)
    assert int((after["params"]["Dense_0"]["kernel"] == 0).sum()) == 64
    assert bool((after["batch_stats"]["mean"] != 0).all())


@halved
def test_accumulated_steps_keep_to_the_masks(half):
    optimizer = optax.MultiSteps(half(optax.adam(1e-2)), every_k_schedule=3)
    params, state = trained(optimizer, 30)
    kernel, mask = (tree["Dense_0"]["kernel"] for tree in (params, state.inner_opt_state.masks))
    np.testing.assert_array_equal(kernel != 0, mask)
    assert int(mask.sum()) == 64


@halved
def test_in_a_chain_and_with_injected_hyperparams(half):
    inner = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), half(inner))
    params, state = trained(optimizer, 30)
    np.testing.assert_array_equal(params["Dense_0"]["kernel"] != 0, state[1].masks["Dense_0"]["kernel"])
    assert prune.sparsity(state[1].masks) == 0.5


@halved
def test_masks_come_back_from_a_checkpoint(half, tmp_path):
    optimizer = half(optax.adamw(1e-2))
    params, state = trained(optimizer, 10)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", (params, state))
    whole = trained(optimizer, 20, params, state)
    again = trained(optimizer, 20, *restored)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert int((again[0]["Dense_0"]["kernel"] == 0).sum()) == 64


def test_a_schedule_is_met():
    optimizer = prune.sparsify(optax.sgd(1e-2), prune.cubic(0.9, 0, 20, 5), scope="global")
    for steps, expected in ((1, 0.0), (11, 0.9 * (1 - 0.5**3)), (21, 0.9)):
        assert prune.sparsity(trained(optimizer, steps)[1].masks) == pytest.approx(expected, abs=1 / 384)


def test_scores_of_gradients_may_bring_weights_back():
    saliency = lambda params, gradients: jax.tree.map(  # noqa: E731
        lambda p, g: jnp.abs(g) if p.ndim > 1 else jnp.zeros(()), params, gradients
    )
    optimizer = prune.sparsify(optax.sgd(1e-2), prune.periodic(0.5, 0, 40, 10), importance=saliency)
    first, last = (trained(optimizer, steps)[1].masks["Dense_0"]["kernel"] for steps in (1, 41))
    assert bool((last & ~first).any())


def test_n_of_m_in_training():
    optimizer = prune.sparsify(optax.adam(1e-2), prune.one_shot(0.5), pattern=prune.NByM(2, 4))
    kernel = trained(optimizer, 10)[0]["Dense_0"]["kernel"]
    assert bool(((kernel.reshape(8, 4, 4) == 0).sum(1) == 2).all())


@halved
def test_params_are_asked_for(half):
    optimizer = half(optax.sgd(0.1))
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="`params` is missing"):
        optimizer.update(params, optimizer.init(params))


_ON_EIGHT = """
import json, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxeff import prune
mesh = Mesh(np.array(jax.devices()), ("d",))
scores = np.random.default_rng(0).integers(0, 50, (64, 128)).astype(np.float32)
trees = [{"a": jax.device_put(scores, NamedSharding(mesh, spec))} for spec in (P("d"), P(None, "d"))]
one = prune.masks({"a": jax.numpy.asarray(scores)}, 0.7, scope="global")["a"]
program = jax.jit(lambda tree: prune.masks(tree, 0.7, scope="global"))
for tree in trees:
    text = program.lower(tree).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(program(tree)["a"], one)
"""


def test_masks_on_eight_devices_are_those_of_one_and_gather_nothing():
    devices.run(_ON_EIGHT, 8)


@pytest.mark.parametrize("scope", ["layer", "unit", "global"])
@pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec(None, "d")], ids=str)
def test_masks_on_a_mesh_of_one_device_are_those_without(spec, scope):
    """The axes of an explicit mesh refuse a reshape across them, even those of size 1."""
    scores = DRAW.integers(0, 9, (40, 30)).astype(np.float32)
    expected = prune.masks({"kernel": scores}, 0.4, scope=scope)["kernel"]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        laid = {"kernel": jax.device_put(scores, NamedSharding(mesh, spec))}
        for run in (prune.masks, jax.jit(prune.masks, static_argnames="scope")):
            np.testing.assert_array_equal(run(laid, 0.4, scope=scope)["kernel"], expected)


def test_arrays_that_multiply_no_data_have_no_scores_of_statistics():
    params = {"positions": normal(4, 3), "w": normal(3, 2)}
    statistics = jaxeff.collect(params, lambda p, x: (x + p["positions"][None]) @ p["w"], normal(8, 4, 3))
    scores = prune.scored(params, statistics, "activation")
    assert scores["positions"].shape == () and scores["w"].shape == (3, 2)
    for prunable in ({"positions": True}, lambda path, leaf: True):
        with pytest.raises(ValueError, match="`prunable` asks for 'positions', which multiplies no data"):
            _ = prune.scored(params, statistics, "activation", prunable=prunable)
