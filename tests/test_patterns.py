"""Patterns go along what a product sums over, and along what it gives, however a weight is laid out.

The oracle knows no layouts: a layer without biases is a matrix, whose rows are what it makes of the unit
vectors of its inputs. A mask is right if the masked layer is that matrix, pruned.
"""

import dataclasses
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from network import normal

import jaxeff
from jaxeff import importance, prune


def linen(module, *inputs, **keywords):
    x = jnp.ones((1, *inputs))
    return module.init(jax.random.key(0), x, **keywords), lambda p, x: module.apply(p, x, **keywords), inputs


def of_nnx(module, *inputs):
    return *jaxeff.functional(module), inputs


def of_equinox(module, *inputs):
    arrays, static = eqx.partition(module, eqx.is_array)
    return arrays, lambda p, x: jax.vmap(eqx.combine(p, static))(x), inputs


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(6, 8).attend(x)


VALID = {"padding": "VALID", "use_bias": False}
RNGS = nnx.Rngs(0)
LAYERS = {
    "dense": linen(nn.Dense(6, use_bias=False), 8),
    "query [D, H, K]": linen(nn.DenseGeneral((2, 4), use_bias=False), 8),
    "output [H, K, D]": linen(nn.DenseGeneral(6, axis=(-2, -1), use_bias=False), 3, 4),
    "several inputs and outputs": linen(nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False), 2, 4),
    "nnx, several": of_nnx(nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), use_bias=False, rngs=RNGS), 2, 4),
    "equinox (out, in)": of_equinox(eqx.nn.Linear(8, 6, use_bias=False, key=jax.random.key(0)), 8),
    "equinox convolution": of_equinox(
        eqx.nn.Conv1d(8, 6, 1, use_bias=False, key=jax.random.key(0)), 8, 1
    ),
    "attend": linen(Attend(), 8),
    "einsum (size, inputs, heads)": (
        {"w": normal(3, 8, 2)},
        lambda p, x: jnp.einsum("bi,kih->bkh", x, p["w"]),
        (8,),
    ),
    "convolution": linen(nn.Conv(6, (3,), **VALID), 3, 8),
    "transposed convolution": linen(nn.ConvTranspose(6, (1,), **VALID), 1, 8),
    "transposed, (out, in)": linen(nn.ConvTranspose(6, (1,), transpose_kernel=True, **VALID), 1, 8),
}  # fmt: skip


def matrix(params, apply_fn, inputs):
    """[inputs, outputs], what the layer makes of each unit vector."""
    size = math.prod(inputs)
    return np.asarray(apply_fn(params, jnp.eye(size).reshape(size, *inputs))).reshape(size, -1)


def n_of_m(scores):
    """2 of every 4 rows of a matrix stay, in each column; of equal ones the last."""
    kept = np.zeros(scores.shape, bool)
    for start in range(0, len(scores), 4):
        order = np.argsort(scores[start : start + 4], axis=0, kind="stable")[2:]
        np.put_along_axis(kept, start + order, True, axis=0)
    return kept


def halves(scores):
    """Half of the columns of a matrix stay, those of the largest sums."""
    kept = np.ones(scores.shape, bool)
    kept[:, np.argsort(scores.sum(0), kind="stable")[: scores.shape[1] // 2]] = False
    return kept


PATTERNS = {
    "n of m inputs": (lambda axes: prune.NByM(2, 4, axes=axes), None, n_of_m),
    "units": (lambda axes: prune.Units(axes=axes), 0.5, halves),
    "inputs": (lambda axes: prune.Units("input", axes=axes), 0.5, lambda scores: halves(scores.T).T),
}


PARAMS = {
    "blocks": {"up": normal(2, 8, 16, seed=1), "down": normal(2, 8, 16, seed=2)},
    "head": normal(3, 8, seed=3),
}


def blocks_and_head(params, x):
    """Kernels whose units are their last axis, ones whose inputs are, and a head with its units first."""

    def step(x, own):
        return x + jnp.einsum("nh,dh->nd", jnp.tanh(x @ own["up"]), own["down"]), None

    return jax.lax.scan(step, x, params["blocks"])[0] @ params["head"].T


@pytest.fixture(scope="module")
def of_all_criteria():
    loss = {"loss_fn": optax.softmax_cross_entropy_with_integer_labels, "targets": np.arange(6) % 3}
    criteria = [*importance.CRITERIA]
    return jaxeff.collect(PARAMS, blocks_and_head, normal(6, 8), criterion=criteria, **loss)


@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_n_of_m_inputs_stay_by_the_scores_of_every_criterion(of_all_criteria, criterion):
    scores = prune.scored(PARAMS, of_all_criteria, criterion)
    masks = prune.masks(scores, pattern=prune.NByM(2, 4))
    given, found = jax.tree.map(np.asarray, (nn.unbox(scores), masks))
    for block in range(2):
        up, down = given["blocks"]["up"][block], given["blocks"]["down"][block]
        np.testing.assert_array_equal(found["blocks"]["up"][block], n_of_m(up))
        np.testing.assert_array_equal(found["blocks"]["down"][block], n_of_m(down.T).T)
    np.testing.assert_array_equal(found["head"], n_of_m(given["head"].T).T)


# A channel of a convolution is a row for each position of its window: see the next test.
CASES = [(n, p) for n in LAYERS for p in PATTERNS if n != "convolution" or p == "n of m inputs"]


@pytest.mark.parametrize(("name", "along"), CASES)
def test_a_pattern_is_that_of_the_layers_matrix(name, along):
    params, apply_fn, inputs = LAYERS[name]
    pattern, sparsity, oracle = PATTERNS[along]
    dense = matrix(params, apply_fn, inputs)
    axes = prune.layout(params, apply_fn, jnp.ones((1, *inputs)))
    scores = prune.scored(params, prunable=lambda path, leaf: True)
    masks = prune.masks(scores, sparsity, pattern=pattern(axes))
    found = matrix(prune.apply(params, masks), apply_fn, inputs)
    np.testing.assert_array_equal(found, np.where(oracle(np.abs(dense)), dense, 0))
    # The axes may as well go with the scores.
    known = prune.layout(params, apply_fn, jnp.ones((1, *inputs)), prunable=dict.fromkeys(axes, True))
    again = prune.masks(prune.scored(params, prunable=known), sparsity, pattern=pattern(None))
    jax.tree.map(np.testing.assert_array_equal, masks, again)


def test_channels_of_a_convolution_go_with_all_of_their_window():
    params, apply_fn, inputs = LAYERS["convolution"]
    axes = prune.layout(params, apply_fn, jnp.ones((1, *inputs)))
    kernel = np.abs(params["params"]["kernel"])
    for pattern, dimension in ((prune.Units(axes=axes), 2), (prune.Units("input", axes=axes), 1)):
        kept = prune.masks(prune.scored(params), 0.5, pattern=pattern)["params"]["kernel"]
        sums = np.moveaxis(kernel, dimension, 0).reshape(kernel.shape[dimension], -1).sum(1)
        stays = np.isin(np.arange(len(sums)), np.argsort(sums)[len(sums) // 2 :])
        shape = [-1 if axis == dimension else 1 for axis in range(3)]
        np.testing.assert_array_equal(kept, np.broadcast_to(stays.reshape(shape), kernel.shape))


def test_statistics_say_it_too_and_a_number_of_heads_divides_nothing():
    # 6 heads of 16 inputs each: along the heads, 4 does not divide them.
    model, x = nn.MultiHeadDotProductAttention(6, qkv_features=24), normal(2, 5, 16)
    params = model.init(jax.random.key(0), x)
    statistics = jaxeff.collect(params, model.apply, x, criterion="wanda")
    scores = prune.scored(params, statistics, "wanda")
    masks = prune.masks(scores, pattern=prune.NByM(2, 4, axes=statistics))["params"]
    for name in ("query", "key", "value"):
        fours = np.asarray(masks[name]["kernel"]).reshape(4, 4, 6, 4)
        assert (fours.sum(1) == 2).all()
    # [H, K, D]: 24 inputs in a row.
    assert (np.asarray(masks["out"]["kernel"]).reshape(6, 4, 16).sum(1) == 2).all()
    again = prune.masks(scores, pattern=prune.NByM(2, 4, axes=prune.layout(params, model.apply, x)))["params"]
    jax.tree.map(np.testing.assert_array_equal, masks, again)


def test_units_of_stacked_layers_are_the_layers_own():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8, use_bias=False)(x)), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), normal(4, 8), None)
    axes = prune.layout(params, lambda params, x: stack.apply(params, x, None)[0], normal(4, 8))
    assert axes["Dense_0/kernel"].axes == prune.Axes((1,), (2,), (0,))
    kernel = params["params"]["Dense_0"]["kernel"]
    units = prune.masks(prune.scored(params), 0.5, pattern=prune.Units(axes=axes))
    expected = np.stack([halves(layer) for layer in np.abs(kernel)])
    np.testing.assert_array_equal(units["params"]["Dense_0"]["kernel"], expected)
    rows = prune.masks(prune.scored(params), pattern=prune.NByM(2, 4, axes=axes))
    expected = np.stack([n_of_m(layer) for layer in np.abs(kernel)])
    np.testing.assert_array_equal(rows["params"]["Dense_0"]["kernel"], expected)


def test_the_experts_of_a_batched_product_are_apart():
    model = lambda params, x: jnp.einsum("end,edf->enf", x, params["w"])  # noqa: E731
    params = {"w": normal(3, 8, 6)}
    axes = prune.layout(params, model, normal(3, 5, 8))
    masks = prune.masks(prune.scored(params), pattern=prune.NByM(2, 4, axes=axes))
    np.testing.assert_array_equal(masks["w"], np.stack([n_of_m(expert) for expert in np.abs(params["w"])]))


def test_a_tied_embedding_sums_over_its_features_and_has_no_units_of_its_own():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(6, 8)
            return embed.attend(nn.tanh(embed(tokens)))

    tokens = jnp.arange(6)[None]
    params = Tied().init(jax.random.key(0), tokens)
    axes = prune.layout(params, Tied().apply, tokens)
    scores = prune.scored(params, prunable={"Embed_0/embedding": True})
    embedding = params["params"]["Embed_0"]["embedding"]
    masks = prune.masks(scores, pattern=prune.NByM(2, 4, axes=axes))
    np.testing.assert_array_equal(masks["params"]["Embed_0"]["embedding"], n_of_m(np.abs(embedding).T).T)
    with pytest.raises(ValueError, match="different ones in different uses: name them with `axes="):
        prune.masks(scores, 0.5, pattern=prune.Units(axes=axes))
    columns = prune.Units(axes={**axes, "Embed_0/embedding": prune.Axes((0,), (1,))})
    found = prune.masks(scores, 0.5, pattern=columns)["params"]["Embed_0"]["embedding"]
    np.testing.assert_array_equal(found, halves(np.abs(embedding)))


def test_a_weight_multiplied_both_ways_has_no_inputs_of_its_own():
    params = {"w": normal(8, 4)}
    axes = prune.layout(params, lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"].T, normal(3, 8))
    with pytest.raises(ValueError, match="goes along input axes, of which 'w'.*different ones"):
        prune.masks(prune.scored(params), pattern=prune.NByM(2, 4, axes=axes))


def test_without_a_model_a_kernel_of_two_axes_is_inputs_by_outputs():
    scores = {"Dense_0": {"kernel": jnp.abs(normal(8, 6))}}
    kept = prune.masks(scores, pattern=prune.NByM(2, 4))["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kept, n_of_m(np.asarray(scores["Dense_0"]["kernel"])))
    kept = prune.masks(scores, 0.5, pattern=prune.Units())["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kept, halves(np.asarray(scores["Dense_0"]["kernel"])))


W = normal(8, 8)
UNKNOWN = {
    "another name": {"weight": W},
    "three axes": {"query": {"kernel": normal(8, 4, 4)}},
    "convolution": {"kernel": normal(3, 3, 8, 8)},
    "embedding": {"table": W},
}
ALONG = {"inputs": (None, prune.NByM(2, 4)), "outputs": (0.5, prune.Units())}


@pytest.mark.parametrize("params", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize(("sparsity", "pattern"), ALONG.values(), ids=ALONG)
def test_without_a_model_anything_else_is_refused(params, sparsity, pattern):
    with pytest.raises(ValueError, match=r"which are unknown without a model.*prunable=prune.layout\("):
        prune.masks(prune.scored(params), sparsity, pattern=pattern)


def test_sensitivity_reads_the_axes_of_its_model():
    model = nn.Sequential(
        [nn.DenseGeneral((2, 4), name="heads"), nn.DenseGeneral(3, axis=(-2, -1), name="out")]
    )
    x, y = normal(16, 8), normal(16, 3)
    params = model.init(jax.random.key(0), x)
    loss = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))  # noqa: E731
    pattern = prune.NByM(2, 4)
    found = prune.sensitivity(
        params, model.apply, x, targets=y, loss_fn=loss, sparsities=(0.5,), pattern=pattern
    )
    assert found.pattern == pattern
    axes = prune.layout(params, model.apply, x)
    masks = prune.masks(prune.scored(params), pattern=prune.NByM(2, 4, axes=axes))
    for path, losses in zip(found.paths, found.losses, strict=True):
        name = path.split("/")[0]
        alone = {**params["params"], name: prune.apply(params["params"][name], masks["params"][name])}
        np.testing.assert_allclose(losses[0], loss(model.apply({"params": alone}, x), y), rtol=1e-5)


def test_a_pattern_can_be_replaced_in_part():
    pattern = prune.NByM(2, 4, axes={"w": prune.Axes((1,), (0,))})
    assert dataclasses.replace(pattern, n=1) == prune.NByM(1, 4, axes={"w": prune.Axes((1,), (0,))})


def test_in_training_the_axes_are_those_of_the_model():
    model, x = nn.DenseGeneral((2, 4)), normal(3, 8)
    params = model.init(jax.random.key(0), x)["params"]
    pattern = prune.NByM(2, 4, axes=prune.layout(params, model.apply, x))
    assert hash(pattern) == hash(prune.NByM(2, 4, axes=prune.layout(params, model.apply, x)))
    optimizer = prune.sparsify(optax.sgd(0.1), prune.one_shot(0.5), pattern=pattern)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    kernel = np.asarray(optax.apply_updates(params, updates)["kernel"]).reshape(2, 4, 8)
    assert ((kernel == 0).sum(1) == 2).all()


WRONG = {
    "axis": (ValueError, lambda: prune.NByM(2, 4, axis="rows"), "`axis` must be 'input', 'output' or a"),
    "both": (ValueError, lambda: prune.Units(0, axes={}), "`axes` name the inputs and outputs"),
    "no axes": (TypeError, lambda: prune.Units(axes={"w": (0, 1)}), "`axes` must be a layout from `prune.layout"),
    "not named": (
        ValueError,
        lambda: prune.masks({"kernel": jnp.abs(W)}, 0.5, pattern=prune.Units(axes={})),
        "`axes` that do not name 'kernel'",
    ),
    "no units": (
        ValueError,
        lambda: prune.masks(
            {"w": jnp.abs(W)}, 0.5, pattern=prune.Units(axes={"w": prune.Axes((0, 1), ())})
        ),
        "has none",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(kind, call, message):
    with pytest.raises(kind, match=message):
        call()


def test_n_and_m_may_be_integers_of_numpy():
    scores = {"kernel": np.abs(normal(8, 4))}
    found = prune.masks(scores, pattern=prune.NByM(np.int64(2), np.int32(4)))
    np.testing.assert_array_equal(found["kernel"], prune.masks(scores, pattern=prune.NByM(2, 4))["kernel"])
