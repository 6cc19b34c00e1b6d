"""Padding that does not count: every sum is that of the batch without it, and what cannot be told is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn, normal

import jaxeff
from jaxeff import prune

LENGTH, WORDS, WIDTH = 7, 9, 8
LENGTHS = (7, 3, 5)
WHERE = np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]
TOKENS = np.where(WHERE, np.random.default_rng(0).integers(1, WORDS, WHERE.shape), 0)
# Summed in another order.
RTOL, ATOL = 1e-5, 1e-6


class Model(nn.Module):
    """A language model of every kind of value: heads, gates, bounded units, positions merged with examples."""

    @nn.compact
    def __call__(self, tokens):
        mask = tokens != 0
        x = nn.Embed(WORDS, WIDTH, name="embed")(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = x + nn.Embed(LENGTH, WIDTH, name="position")(positions)
        for _ in range(2):
            attend = nn.MultiHeadDotProductAttention(2, qkv_features=WIDTH)
            x = x + attend(nn.LayerNorm()(x), mask=mask[:, None, None, :] & mask[:, None, :, None])
            x = x + nn.Dense(WIDTH)(nn.relu(nn.Dense(2 * WIDTH)(x)))
        flat = x.reshape(-1, WIDTH)
        x = nn.Dense(WIDTH, name="merged")(nn.sigmoid(nn.Dense(WIDTH, name="bounded")(flat))).reshape(x.shape)
        x = jnp.swapaxes(nn.tanh(nn.Dense(WIDTH, name="swapped")(jnp.swapaxes(x, 0, 1))), 0, 1)
        pooled = jnp.sum(x * mask[..., None], 1)
        return nn.Dense(3, name="head")(pooled)


def _without_padding(collect, tokens=TOKENS, lengths=LENGTHS):
    """The statistics of each example alone, cut to its own length, added up."""
    each = [collect(tokens[i : i + 1, :length]) for i, length in enumerate(lengths)]
    return functools.reduce(jaxeff.merge, each)


def _assert_same(found, expected):
    assert [site.path for site in found.sites] == [site.path for site in expected.sites]
    pairs = zip(*(jax.tree_util.tree_flatten_with_path(s)[0] for s in (found, expected)), strict=True)
    for (path, one), (_, other) in pairs:
        one, other = np.broadcast_arrays(np.squeeze(one), np.squeeze(other))
        scale = np.abs(other).max(initial=1)
        np.testing.assert_allclose(one, other, RTOL, ATOL * scale, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def variables():
    return drawn(Model(), TOKENS)


def test_padding_counts_in_no_sum_of_any_layer(variables):
    collect = functools.partial(jaxeff.collect, variables, Model().apply, hessians=True)
    found, expected = collect(TOKENS, where=WHERE), _without_padding(collect)
    _assert_same(found, expected)
    assert len(found.attentions) == 2 and found.modules
    (head,) = [site for site in found.sites if site.path == "head/kernel"]
    (bounded,) = [site for site in found.sites if site.path == "bounded/kernel"]
    assert float(head.input.count) == 3 and float(bounded.post.count) == WHERE.sum()
    plain = collect(TOKENS)
    assert float(plain.sites[-2].post.count) != float(found.sites[-2].post.count)


def test_what_padding_holds_does_not_matter(variables):
    """Not even if it is no number."""
    params = {"w": jnp.asarray(normal(4, 3)), "b": jnp.ones(3)}
    x = normal(3, LENGTH, 4, seed=1)
    collect = functools.partial(
        jaxeff.collect, params, lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None, None]), hessians=True
    )
    spoiled = np.where(WHERE[..., None], x, np.nan)
    _assert_same(collect(spoiled, where=WHERE), collect(np.where(WHERE[..., None], x, 0.5), where=WHERE))
    _assert_same(collect(spoiled, where=WHERE), _without_padding(collect, x))


def test_examples_of_a_batch_that_do_not_count():
    params = {"kernel": jnp.asarray(normal(3, 3, 2, 4)), "out": jnp.asarray(normal(4, 5, seed=1))}

    def model(params, images):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(images, params["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        return jnp.mean(nn.relu(x), (1, 2)) @ params["out"]

    images, keep = normal(5, 6, 6, 2, seed=2), np.array([True, False, True, True, False])
    collect = functools.partial(jaxeff.collect, params, model)
    _assert_same(collect(images, where=keep), collect(images[keep]))


@pytest.mark.parametrize("scanned", [False, True])
def test_stacked_blocks_and_grouped_query_attention(scanned):
    shapes = {
        "q": (WIDTH, 4, 3),
        "k": (WIDTH, 2, 3),
        "v": (WIDTH, 2, 3),
        "o": (4, 3, WIDTH),
        "up": (WIDTH, 16),
    }
    shapes["down"] = (16, WIDTH)
    stack = {
        name: jnp.asarray(normal(2, *shape, seed=seed) / 3)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    params = {"embedding": jnp.asarray(normal(WORDS, WIDTH, seed=8)), "blocks": stack}

    def block(x, p, mask):
        q, k, v = (jnp.einsum("bsd,dhk->bshk", x, p[name]) for name in "qkv")
        q = q.reshape(*q.shape[:2], 2, 2, 3)
        scores = jnp.where(mask[:, None, None, None], jnp.einsum("bsgrk,btgk->bgrst", q, k), -1e30)
        mixed = jnp.einsum("bgrst,btgk->bsgrk", jax.nn.softmax(scores, -1), v).reshape(*x.shape[:2], 4, 3)
        x = x + jnp.einsum("bshk,hkd->bsd", mixed, p["o"])
        return x + nn.silu(x @ p["up"]) @ p["down"]

    def model(params, tokens):
        x, mask = params["embedding"][tokens], tokens != 0
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p, mask), None), x, params["blocks"])
        else:
            for i in range(2):
                x = block(x, {name: leaf[i] for name, leaf in params["blocks"].items()}, mask)
        return x @ params["embedding"].T

    if not scanned:
        blocks = [{name: leaf[i] for name, leaf in stack.items()} for i in range(2)]
        params = {**params, "blocks": blocks}

        def model(params, tokens):
            x, mask = params["embedding"][tokens], tokens != 0
            for p in params["blocks"]:
                x = block(x, p, mask)
            return x @ params["embedding"].T

    collect = functools.partial(jaxeff.collect, params, model, criterion="wanda", hessians=True)
    _assert_same(collect(TOKENS, where=WHERE), _without_padding(collect))


def test_inputs_that_are_cut_inside_the_model(variables):
    """A model that drops the last position reads the mask of the others."""
    params = {"embedding": jnp.asarray(normal(WORDS, 4)), "w": jnp.asarray(normal(4, 3, seed=1))}
    collect = functools.partial(
        jaxeff.collect, params, lambda p, tokens: p["embedding"][tokens[:, 1:]] @ p["w"]
    )
    _assert_same(collect(TOKENS, where=WHERE), _without_padding(collect))


def test_calibrate_and_analyze_take_it_too(variables):
    padded = lambda tokens: tokens != 0  # noqa: E731
    batches = [TOKENS[:2], TOKENS[2:]]
    collect = functools.partial(jaxeff.collect, variables, Model().apply)
    found = jaxeff.calibrate(variables, Model().apply, batches, where=padded)
    expected = _without_padding(collect)
    _assert_same(jaxeff.statistics.Statistics(**{**vars(found), "stability": None}), expected)
    report = jaxeff.analyze(variables, Model().apply, TOKENS, criterion="wanda", where=padded)
    again = jaxeff.analyze(variables, criterion="wanda", statistics=expected)
    for name in report.layers:
        np.testing.assert_allclose(report[name].metrics.gini, again[name].metrics.gini, rtol=1e-4, atol=1e-6)


def test_masks_of_other_dtypes_and_one_program_for_all(variables, compilations):
    collect = functools.partial(jaxeff.collect, variables, Model().apply, TOKENS)
    expected = collect(where=WHERE)
    with compilations() as compiled:
        _assert_same(collect(where=WHERE.astype(np.int32)), expected)
        fewer = collect(where=WHERE & (np.arange(3) < 2)[:, None])
    assert compiled.count <= 2
    assert float(fewer.sites[0].post.count) == WHERE[:2].sum()


def _over_time(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h

    return jax.lax.scan(step, jnp.zeros((x.shape[0], 4)), jnp.swapaxes(x, 0, 1))[1] @ params["out"]


def _across(params, x):
    return jnp.swapaxes(x, 1, 2) @ params["w"]


X = normal(3, LENGTH, 4)
SQUARE = {name: jnp.asarray(normal(4, 4, seed=seed)) for seed, name in enumerate(("w", "u", "out"))}
MIXER = {"w": jnp.asarray(normal(LENGTH, LENGTH))}


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (ValueError, "a loop runs over it", (SQUARE, _over_time, X), {"where": WHERE}),
        (ValueError, "'w' count: not each of its", (MIXER, _across, X), {"where": WHERE}),
        (ValueError, "one example", (SQUARE, lambda p, x: jnp.mean(x, 0) @ p["w"], X), {"where": WHERE[:, 0]}),
        (ValueError, "mixed", (SQUARE, lambda p, x: (x + x[:, ::-1]) @ p["w"], X), {"where": WHERE}),
        (ValueError, "`where` has shape", (SQUARE, lambda p, x: x @ p["w"], X), {"where": WHERE.T}),
        (ValueError, "`where` has shape", (SQUARE, lambda p, x: x @ p["w"], X), {"where": np.ones(X.shape, bool)}),
        (TypeError, "mask of booleans", (SQUARE, lambda p, x: x @ p["w"], X), {"where": WHERE * 0.5}),
        (TypeError, "mask of booleans", (SQUARE, lambda p, x: x @ p["w"], X), {"where": "all"}),
    ],
)  # fmt: skip
def test_what_is_refused(error, message, arguments, keywords):
    with pytest.raises(error, match=message):
        _ = jaxeff.collect(*arguments, **keywords)


def test_derivatives_and_masks_of_whole_calibrations_are_refused():
    model, loss = (lambda p, x: x @ p["w"]), {"loss_fn": lambda y, t: (y - t) ** 2, "targets": X}
    with pytest.raises(ValueError, match="criterion 'taylor'"):
        _ = jaxeff.collect(SQUARE, model, X, criterion="taylor", where=WHERE, **loss)
    with pytest.raises(TypeError, match="function of a batch"):
        _ = jaxeff.calibrate(SQUARE, model, [X], where=WHERE)
    with pytest.raises(ValueError, match="`where` says which parts"):
        _ = jaxeff.analyze(SQUARE, where=WHERE)


def test_pruned_by_tokens_alone(variables):
    """Wanda's masks do not depend on how long the padding is."""

    def masks(tokens):
        statistics = jaxeff.collect(variables, Model().apply, tokens, where=tokens != 0)
        return prune.masks(prune.scored(variables, statistics, "wanda"), 0.5)

    shorter, longer = TOKENS[1:, :5], TOKENS[1:]
    jax.tree.map(np.testing.assert_array_equal, masks(shorter), masks(longer))


def test_no_unit_is_dead_where_nothing_counted():
    params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    model = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]  # noqa: E731
    report = jaxeff.analyze(params, model, jnp.ones((5, 3)), where=np.zeros(5, bool))
    activity = report["up"].activity
    assert activity.count == activity.dead == activity.dormant() == 0
    assert not prune.Plan.dead(prune.groups(params, model, jnp.ones((5, 3))), report).removed
