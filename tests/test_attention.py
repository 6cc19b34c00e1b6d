"""Heads: which weights are whose, how widely each looks, what each is worth."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, drawn, normal

import jaxeff
from jaxeff import cost, importance

LENGTH, WIDTH, HEADS, GROUPS, SIZE = 5, 24, 6, 2, 4
BATCH = 3
MASK = np.tri(LENGTH, dtype=bool)


def _rotate(x):
    """Rotary positions on [batch, length, heads, size]."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * np.arange(1, half + 1) / 10.0
    cos, sin = (np.tile(f(angle), 2)[None, :, None].astype(np.float32) for f in (np.cos, np.sin))
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin


def _rotate_pairs(x):
    """Rotary positions on neighbors, as LLaMA has them: taken apart and put together again."""
    even, odd = jnp.unstack(x.reshape(*x.shape[:-1], -1, 2), axis=-1)
    angle = np.arange(x.shape[1])[:, None] * np.arange(1, x.shape[-1] // 2 + 1) / 10.0
    cos, sin = (f(angle)[None, :, None].astype(np.float32) for f in (np.cos, np.sin))
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _attend(query, key, value, seen=None):
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(SIZE)
    weights = nn.softmax(jnp.where(MASK[None, None], logits, -1e9))
    if seen is not None:
        seen.append(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(BATCH, LENGTH, -1)


def _split(x, heads=HEADS):
    return x.reshape(BATCH, LENGTH, heads, -1)


def _plain(p, x, seen=None):
    query, key, value = (_split(x @ p[name]) for name in ("query", "key", "value"))
    return _attend(_rotate(query), _rotate(key), value, seen) @ p["out"]


def _rotary(p, x, seen=None):
    query, key, value = (_split(x @ p[name]) for name in ("query", "key", "value"))
    return _attend(_rotate_pairs(query), _rotate_pairs(key), value, seen) @ p["out"]


def _fused(p, x, seen=None):
    query, key, value = map(_split, jnp.split(x @ p["qkv"], 3, -1))
    return _attend(query, key, value, seen) @ p["out"]


def _stacked(p, x, seen=None):
    y = (x @ p["qkv"]).reshape(BATCH, LENGTH, 3, HEADS, SIZE)
    return _attend(_rotate(y[:, :, 0]), _rotate(y[:, :, 1]), y[:, :, 2], seen) @ p["out"]


def _taken(p, x, seen=None):
    """Queries, keys and values lie along an axis, and are looked up there, as Haliax unbinds it."""
    y = jnp.einsum("blw,wchs->blchs", x, p["qkv"])
    return _attend(*(jnp.take(y, i, axis=2) for i in range(3)), seen) @ p["out"]


def _interleaved(p, x, seen=None):
    return _attend(*jnp.split(_split(x @ p["qkv"]), 3, -1), seen) @ p["out"]


def _grouped(p, x, seen=None):
    query = _split(x @ p["query"]).reshape(BATCH, LENGTH, GROUPS, HEADS // GROUPS, SIZE)
    key, value = _split(x @ p["key"], GROUPS), _split(x @ p["value"], GROUPS)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", query, key)
    weights = nn.softmax(logits)
    if seen is not None:
        seen.append(weights.reshape(BATCH, HEADS, LENGTH, LENGTH))
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, value)
    return mixed.reshape(BATCH, LENGTH, -1) @ p["out"]


def _repeated(p, x, seen=None):
    query = _rotate(_split(x @ p["query"]))
    key, value = (_split(x @ p[name], GROUPS) for name in ("key", "value"))
    return _attend(query, *(jnp.repeat(y, HEADS // GROUPS, 2) for y in (key, value)), seen) @ p["out"]


def _multi_query(p, x, seen=None):
    query, key, value = _split(x @ p["query"]), x @ p["key"], x @ p["value"]
    logits = jnp.einsum("bqhd,bsd->bhqs", query, key)
    # Spelled out, with its maximum taken off twice.
    exponentials = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = exponentials / jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    if seen is not None:
        seen.append(weights)
    return jnp.einsum("bhqs,bsd->bqhd", weights, value).reshape(BATCH, LENGTH, -1) @ p["out"]


def _blocks(count, size, *starts):
    """The indices of each of `count` units, in one block of `size` from each start."""
    return tuple(
        tuple(start + size * unit + i for start in starts for i in range(size)) for unit in range(count)
    )


WHOLE, SHARED = (WIDTH, WIDTH), (WIDTH, GROUPS * SIZE)
FUSED = {"qkv": (WIDTH, 3 * WIDTH), "out": WHOLE}
FULL = dict.fromkeys(("query", "key", "value", "out"), WHOLE)
GROUPED = {"query": WHOLE, "key": SHARED, "value": SHARED, "out": WHOLE}
HEAD = _blocks(HEADS, SIZE, 0)
GROUP, KEY = _blocks(GROUPS, WIDTH // GROUPS, 0), _blocks(GROUPS, SIZE, 0)
OF_GROUPS = {"query": (1, GROUP), "key": (1, KEY), "value": (1, KEY), "out": (0, GROUP)}

# name -> the network, the shapes of its weights, its units, and each weight's axis and indices by unit.
ATTENTIONS = {
    "plain": (_plain, FULL, HEADS, {**dict.fromkeys(("query", "key", "value"), (1, HEAD)), "out": (0, HEAD)}),
    "rotary pairs": (
        _rotary,
        FULL,
        HEADS,
        {**dict.fromkeys(("query", "key", "value"), (1, HEAD)), "out": (0, HEAD)},
    ),
    "fused": (
        _fused,
        FUSED,
        HEADS,
        {"qkv": (1, _blocks(HEADS, SIZE, 0, WIDTH, 2 * WIDTH)), "out": (0, HEAD)},
    ),
    "stacked": (
        _stacked,
        FUSED,
        HEADS,
        {"qkv": (1, _blocks(HEADS, SIZE, 0, WIDTH, 2 * WIDTH)), "out": (0, HEAD)},
    ),
    "taken": (
        _taken,
        {"qkv": (WIDTH, 3, HEADS, SIZE), "out": WHOLE},
        HEADS,
        {"qkv": (2, _blocks(HEADS, 1, 0)), "out": (0, HEAD)},
    ),
    "interleaved": (_interleaved, FUSED, HEADS, {"qkv": (1, _blocks(HEADS, 3 * SIZE, 0)), "out": (0, HEAD)}),
    "grouped": (_grouped, GROUPED, GROUPS, OF_GROUPS),
    "grouped by repetition": (_repeated, GROUPED, GROUPS, OF_GROUPS),
    "multi-query": (
        _multi_query,
        {"query": WHOLE, "key": (WIDTH, SIZE), "value": (WIDTH, SIZE), "out": WHOLE},
        HEADS,
        {"query": (1, HEAD), "out": (0, HEAD)},
    ),
}
CASES = pytest.mark.parametrize(("network", "shapes", "units", "slices"), ATTENTIONS.values(), ids=ATTENTIONS)


def _drawn(shapes):
    return {name: normal(*shape, seed=seed) / 5 for seed, (name, shape) in enumerate(shapes.items())}


@CASES
def test_every_unit_has_its_slices_of_the_weights(network, shapes, units, slices):
    (found,) = jaxeff.collect(_drawn(shapes), network, normal(BATCH, LENGTH, WIDTH)).attentions
    assert (found.heads, found.units) == (HEADS, units)
    assert {part.path: (part.axis, part.indices) for part in found.slices} == slices


@CASES
def test_entropy_of_each_head_is_that_of_its_probabilities(network, shapes, units, slices):
    params, x, seen = _drawn(shapes), normal(BATCH, LENGTH, WIDTH), []
    network(params, x, seen)
    p = np.asarray(seen[0], np.float64)
    expected = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1).mean((0, 2))
    (found,) = jaxeff.collect(params, network, x).attentions
    np.testing.assert_allclose(found.entropy, expected, rtol=1e-5, atol=1e-6)


@CASES
def test_importance_of_a_unit_is_the_sum_over_its_slices(network, shapes, units, slices):
    params, x = _drawn(shapes), normal(BATCH, LENGTH, WIDTH)
    statistics = jaxeff.collect(params, network, x)
    weights = importance.scores(params, statistics)
    reduced = {
        name: importance.scores(params, statistics, level="head", reduction=name) for name in ("sum", "max")
    }
    for unit in range(units):
        parts = [np.take(weights[path], indices[unit], axis) for path, (axis, indices) in slices.items()]
        ((total,), (largest,)) = (found.values() for found in reduced.values())
        np.testing.assert_allclose(total[unit], sum(part.sum() for part in parts), rtol=1e-5)
        np.testing.assert_allclose(largest[unit], max(part.max() for part in parts), rtol=1e-6)


def test_rotary_positions_put_together_by_a_stack_cost_their_arithmetic():
    found = cost.count(_drawn(FULL), _rotary, normal(BATCH, LENGTH, WIDTH))
    assert found.complete
    assert found.macs == BATCH * (4 * LENGTH * WIDTH**2 + 2 * LENGTH**2 * WIDTH)


def _transformed(p, x):
    """Queries and keys pass an operation without a rule."""
    query, key, value = (_split(x @ p[name]) for name in ("query", "key", "value"))
    return _attend(jnp.fft.fft(query).real, jnp.fft.fft(key).real, value) @ p["out"]


def _taken_of_one_axis(p, x):
    """Which of the axis's units are looked up is not known: it holds queries, keys and values."""
    y = (x @ p["query"]).reshape(BATCH, LENGTH, 3, 2, SIZE)
    return _attend(*(jnp.take(y, i, axis=2) for i in range(3)))


def _pooled(p, x):
    """One softmax over positions, which weighs the rows of what a weight makes."""
    weights = nn.softmax(jnp.tanh(x @ p["key"]) @ p["query"][0])
    return jnp.einsum("bt,btd->bd", weights, x @ p["value"]) @ p["out"]


def _over_inputs(p, x):
    return jnp.einsum("bqk,bkd->bqd", nn.softmax((x @ p["query"]) @ (x @ p["key"]).mT), x) @ p["out"]


def _of_inputs_alone(p, x):
    return jnp.einsum("bqk,bkd->bqd", nn.softmax(x @ x.mT), x @ p["value"]) @ p["out"]


HEADLESS = {
    "unknown operation": (
        _transformed,
        "units are not followed through fft, on the way to its logits",
    ),
    "part of an axis": (
        _taken_of_one_axis,
        "units are not followed through gather, on the way to its logits",
    ),
    "one head": (_pooled, "one head: no dimension of its probabilities is made of a weight's units"),
    "inputs are weighed": (_over_inputs, "its values come from no weight that could be followed"),
    "inputs weigh": (_of_inputs_alone, "its logits come from no weight that could be followed"),
}


@pytest.mark.parametrize(("network", "expected"), HEADLESS.values(), ids=HEADLESS)
def test_a_softmax_that_weighs_data_without_heads_says_why(network, expected):
    report = jaxeff.analyze(_drawn(FULL), network, normal(BATCH, LENGTH, WIDTH))
    assert report.attentions == ()
    ((path, reason),) = [(found.path, found.reason) for found in report.headless]
    assert reason == expected
    assert f"{path or 'model'}: no heads found: {reason}" in " ".join(str(report).split())
    assert jaxeff.Report.from_json(report.to_json()).headless == report.headless


@CASES
def test_attentions_with_heads_are_not_listed_without(network, shapes, units, slices):
    assert jaxeff.collect(_drawn(shapes), network, normal(BATCH, LENGTH, WIDTH)).headless == ()


def test_flax_attention_with_dropout():
    module = nn.MultiHeadDotProductAttention(num_heads=4, dropout_rate=0.5, deterministic=False)
    x = normal(2, 7, 8)
    variables = drawn(module, x)
    rngs = {"dropout": jax.random.key(0)}
    report = jaxeff.analyze(variables, module.apply, x, rngs=rngs)
    (found,) = report.attentions
    assert (found.heads, found.units, found.entropy.shape) == (4, 4, (4,))
    assert "4 heads, entropy" in str(report) and "attentions/query/kernel/entropy" not in report.scalars("*")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="stack")(x, None)[0]


def test_layers_that_a_scan_stacks_have_heads_of_their_own():
    x = normal(2, 5, 6)
    variables = drawn(Stack(), x)
    report = jaxeff.analyze(variables, Stack().apply, x)
    (found,) = report.attentions
    assert found.entropy.shape == found.importance.shape == (3, 2)
    layer = jax.tree.map(lambda leaf: leaf[0], variables["params"]["stack"])
    alone = jaxeff.analyze({"params": layer}, lambda v, x: Block().apply(v, x, None)[0], x).attentions[0]
    np.testing.assert_allclose(found.entropy[0], alone.entropy, rtol=1e-5)
    np.testing.assert_allclose(found.importance[0], alone.importance, rtol=1e-5)


def test_a_softmax_over_classes_is_no_attention():
    network = lambda p, x: nn.softmax(x @ p["w"])  # noqa: E731
    for statistics in (
        jaxeff.collect({"w": normal(4, 3)}, network, normal(5, 4)),
        jaxeff.collect(*NETWORKS["cnn"]().arguments),
    ):
        assert statistics.attentions == statistics.headless == ()


def _mixture(p, x):
    """Experts side by side, weighed by a router."""
    gates = nn.softmax(x @ p["router"])
    return jnp.einsum("beh,ehd,be->bd", nn.relu(jnp.einsum("bd,edh->beh", x, p["up"])), p["down"], gates)


MIXTURE = {"router": normal(4, 3), "up": normal(3, 4, 5), "down": normal(3, 5, 4)}


def test_a_router_that_weighs_experts_is_not_attention():
    statistics = jaxeff.collect(MIXTURE, _mixture, normal(6, 4))
    assert statistics.attentions == statistics.headless == ()


def test_weights_that_units_give_to_positions_are_one_head():
    """A dense synthesizer (Tay et al. 2020): each token's units are its logits of the positions."""

    def network(p, x):
        weights = nn.softmax(jnp.einsum("bqi,ik->bqk", x, p["logits"]))
        return jnp.einsum("bqk,bkd->bqd", weights, x @ p["value"])

    params = {"logits": normal(4, LENGTH), "value": normal(4, 4)}
    statistics = jaxeff.collect(params, network, normal(BATCH, LENGTH, 4))
    assert statistics.attentions == () and "one head" in statistics.headless[0].reason


# Levels


def test_levels_are_reductions_of_the_weights_scores():
    network = NETWORKS["scanned"]()
    statistics = jaxeff.collect(*network.arguments)
    (score,) = importance.scores(network.variables, statistics).values()
    reductions = {
        "sum": np.sum,
        "mean": np.mean,
        "max": np.max,
        "l2": lambda x, axis: np.sqrt(np.square(x).sum(axis)),
    }
    for name, reduce in reductions.items():
        level = lambda level, name=name: importance.scores(  # noqa: E731
            network.variables, statistics, level=level, reduction=name
        )["stack/dense/kernel"]
        np.testing.assert_allclose(level("unit"), reduce(np.asarray(score), axis=1), rtol=1e-6)
        np.testing.assert_allclose(level("layer"), reduce(np.asarray(score), axis=(1, 2)), rtol=1e-6)


def test_unknown_levels_and_reductions_are_named():
    network = NETWORKS["square"]()
    statistics = jaxeff.collect(*network.arguments)
    with pytest.raises(
        ValueError, match="`level` must be one of 'weight', 'unit', 'head', 'layer', got 'neuron'"
    ):
        importance.scores(network.variables, statistics, level="neuron")
    with pytest.raises(ValueError, match="`reduction` must be one of 'sum', .*, got 'median'"):
        importance.scores(network.variables, statistics, level="unit", reduction="median")


def test_saturated_units_are_counted():
    w, x = jnp.array([[9.0, 0.1, -9.0]]), jnp.ones((4, 1))
    for nonlinearity, saturated in ((jnp.tanh, 2), (nn.sigmoid, 2), (nn.relu, 0)):
        report = jaxeff.analyze(
            {"w": w}, lambda p, x, f=nonlinearity: f(x @ p["w"]), x, criterion="magnitude"
        )
        assert int(report["w"].activity.saturated) == saturated
        assert report.scalars("*/saturated_units")["layers/w/saturated_units"] == saturated


DISTANCE = np.abs(np.arange(8.0)[:, None] - np.arange(8.0)).astype(np.float32)
CAUSAL = np.tril(np.ones((8, 8), bool))
PADDED = (np.arange(8) < 5) & (np.arange(8) < 5)[:, None]


def divided(exponentials):
    return exponentials / jnp.sum(exponentials, -1, keepdims=True)


def shifted_before_it_is_turned(logits):
    turned = logits.swapaxes(-1, -2)
    return divided(jnp.exp((turned - jnp.max(turned, -2, keepdims=True)).swapaxes(-1, -2)))


FORMS = {
    "softmax": jax.nn.softmax,
    "large offset": lambda logits: jax.nn.softmax(logits + 1e5),
    "whole rows masked": lambda logits: jax.nn.softmax(jnp.where(PADDED, logits, -1e30)),
    "causal": lambda logits: jax.nn.softmax(jnp.where(CAUSAL, logits, -jnp.inf)),
    "no maximum": lambda logits: divided(jnp.exp(logits)),
    "another difference": lambda logits: divided(jnp.exp(logits - 2 * DISTANCE)),
    "masked by a difference": lambda logits: divided(jnp.exp(logits - np.where(CAUSAL, 0, np.float32(1e9)))),
    "base 2": lambda logits: divided(jnp.exp2(logits - jnp.max(logits, -1, keepdims=True))),
    "turned": shifted_before_it_is_turned,
    "bfloat16": lambda logits: jax.nn.softmax(logits.astype(jnp.bfloat16)),
    "widened": lambda logits: jax.nn.softmax(logits.astype(jnp.bfloat16).astype(jnp.float32)),
    "widened from 8 bits": lambda logits: jax.nn.softmax(
        logits.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_entropy_is_that_of_the_softmax_however_it_is_written(form, promotion):
    draw = np.random.default_rng(0).standard_normal
    params = {name: jnp.asarray(draw((16, 16)) / 4, jnp.float32) for name in "qkvo"}
    x = jnp.asarray(draw((3, 8, 16)), jnp.float32)

    def attention(params, x, watch=lambda probabilities: None):
        query, key, value = ((x @ params[name]).reshape(3, 8, 4, 4) for name in "qkv")
        probabilities = form(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2)
        watch(probabilities)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(jnp.float32), value)
        return mixed.reshape(3, 8, 16) @ params["o"]

    seen = []
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion(promotion):
        _ = attention(params, x, seen.append)
        (found,) = jaxeff.collect(params, attention, x).attentions
    p = np.asarray(seen[0], np.float64)
    expected = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1).mean((0, 2))
    # Probabilities in bfloat16 have three digits.
    rtol = 1e-2 if seen[0].dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(found.entropy, expected, rtol=rtol)
