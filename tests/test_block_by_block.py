"""Blocks pruned in sequence: against the sequence written out by hand, scanned and listed, and what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import drawn, normal

import jaxeff
from jaxeff import prune

BLOCKS, WIDTH, HIDDEN, WORDS = 3, 8, 16, 11
TWO_OF_FOUR = prune.NByM(2, 4)
SHAPES = {
    **{name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
    **{"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "norm": (WIDTH,)},
}
STACK = {
    name: jnp.asarray(normal(BLOCKS, *shape, seed=seed) / 2, jnp.float32)
    for seed, (name, shape) in enumerate(SHAPES.items())
}
EMBEDDING = jnp.asarray(normal(WORDS, WIDTH, seed=9), jnp.float32)
STACKED = {"embedding": EMBEDDING, "blocks": STACK}
OF_BLOCKS = [{name: leaf[i] for name, leaf in STACK.items()} for i in range(BLOCKS)]
LISTED = {"embedding": EMBEDDING, "blocks": OF_BLOCKS}
NAMES = [f"blocks/{i}" for i in range(BLOCKS)]
BATCHES = [np.random.default_rng(seed).integers(0, WORDS, (4, 6)) for seed in range(3)]


def block(p, x):
    length = x.shape[1]
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["norm"][None, None]
    scores = h @ p["query"] @ jnp.swapaxes(h @ p["key"], 1, 2) / 3
    scores = jnp.where(jnp.tril(jnp.ones((1, length, length), bool)), scores, -1e30)
    x = x + jax.nn.softmax(scores, -1) @ (h @ p["value"]) @ p["out"]
    return x + nn.gelu(x @ p["up"]) @ p["down"]


def scanned(params, tokens):
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), params["embedding"][tokens], params["blocks"])
    return x @ params["embedding"].T


def unrolled(params, tokens):
    x = params["embedding"][tokens]
    for p in params["blocks"]:
        x = block(p, x)
    return x @ params["embedding"].T


def by_wanda(params, statistics):
    masks = prune.masks(prune.scored(params, statistics, "wanda"), 0.5, scope="unit")
    return prune.apply(params, masks), masks


def by_ria_and_pattern(params, statistics):
    masks = prune.masks(prune.scored(params, statistics, "ria"), pattern=TWO_OF_FOUR)
    return prune.apply(params, masks), masks


def reconstructed(params, statistics):
    _, masks = by_wanda(params, statistics)
    return prune.reconstruct(params, masks, statistics), masks


by_sparsegpt = functools.partial(prune.sparsegpt, sparsity=0.5)
WAYS = [by_wanda, by_ria_and_pattern, by_sparsegpt, reconstructed]


def by_hand(prune_block):
    """The sequence as it is published: of each block its params and masks."""
    states = [EMBEDDING[tokens] for tokens in BATCHES]
    found = []
    for p in OF_BLOCKS:
        collected = [jaxeff.collect(p, block, x, hessians=True) for x in states]
        pruned, masks = prune_block(p, functools.reduce(jaxeff.merge, collected))
        states = [block(pruned, x) for x in states]
        found.append((pruned, masks))
    return found


def _assert_same(found, expected):
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("prune_block", WAYS, ids=["wanda", "ria of a pattern", "sparsegpt", "reconstruct"])
def test_scanned_and_listed_blocks_are_pruned_as_by_hand(prune_block):
    expected = by_hand(prune_block)
    pruned, masks = prune.block_by_block(STACKED, scanned, BATCHES, prune_block)
    in_list, masks_in_list = prune.block_by_block(LISTED, unrolled, BATCHES, prune_block, blocks=NAMES)
    assert pruned["embedding"] is EMBEDDING and masks["embedding"].shape == ()
    assert jax.tree.structure(in_list) == jax.tree.structure(LISTED) == jax.tree.structure(masks_in_list)
    for i, (params, kept) in enumerate(expected):
        _assert_same({name: leaf[i] for name, leaf in pruned["blocks"].items()}, params)
        _assert_same(in_list["blocks"][i], params)
        for name, mask in kept.items():
            np.testing.assert_array_equal(masks_in_list["blocks"][i][name], mask)
            stacked = masks["blocks"][name]
            np.testing.assert_array_equal(stacked[i] if stacked.ndim else stacked, mask)


def test_wanda_scores_what_the_pruned_blocks_emit():
    """|w| times the norm of each input, in NumPy, for a chain of products whose inputs are plain to see."""
    weights = {"w": jnp.asarray(normal(4, 6, 6, seed=1), jnp.float32)}
    batches = [normal(5, 6, seed=seed) for seed in (2, 3)]
    _, masks = prune.block_by_block(
        weights, lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], batches, by_wanda
    )
    x = np.concatenate(batches).astype(np.float64)
    for w, mask in zip(np.asarray(weights["w"], np.float64), masks["w"], strict=True):
        scores = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
        np.testing.assert_array_equal(mask, scores > np.sort(scores, axis=0)[2])
        x = x @ np.where(mask, w, 0)


def test_the_first_block_is_pruned_as_by_dense_statistics_and_later_ones_otherwise():
    statistics = functools.reduce(jaxeff.merge, (jaxeff.collect(STACKED, scanned, each) for each in BATCHES))
    scores = prune.scored(STACKED, statistics, "wanda", prunable={"embedding": False})
    dense = prune.masks(scores, 0.5, scope="unit")["blocks"]["value"]
    masks = prune.block_by_block(STACKED, scanned, BATCHES, by_wanda)[1]["blocks"]["value"]
    np.testing.assert_array_equal(dense[0], masks[0])
    assert not bool((dense[2] == masks[2]).all())


def test_one_program_serves_all_blocks(compilations):
    def compiled(repeats):
        blocks = {name: jnp.tile(leaf, (repeats, *(1,) * (leaf.ndim - 1))) for name, leaf in STACK.items()}
        params = {"embedding": EMBEDDING, "blocks": blocks}
        with compilations() as found:
            _ = prune.block_by_block(params, scanned, BATCHES, by_sparsegpt)
        return found.count

    _ = compiled(1)
    # What remains are slices of leaves of another length.
    assert compiled(2) == compiled(4)


def test_equal_blocks_with_leaves_of_their_own_share_programs(compilations):
    _ = prune.block_by_block(LISTED, unrolled, BATCHES, by_sparsegpt, blocks=NAMES)
    deeper = {**LISTED, "blocks": OF_BLOCKS * 2}
    names = [f"blocks/{i}" for i in range(2 * BLOCKS)]
    with compilations() as compiled:
        _ = prune.block_by_block(deeper, unrolled, BATCHES, by_sparsegpt, blocks=names)
    # What lies before the blocks is compiled again.
    assert compiled.count <= 1


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm()(x) * mask[..., None]
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(h))), None


class Network(nn.Module):
    """A stem and a head around blocks, scanned or listed; a mask made of the batch that all of them read."""

    layers: int = 2
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        mask = (jnp.sum(x, -1) > 0).astype(x.dtype)
        x = nn.Dense(WIDTH, name="stem")(x)
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scan:
            stack = nn.scan(
                layer, {"params": 0}, in_axes=nn.broadcast, length=self.layers, split_rngs={"params": True}
            )
            x, _ = stack(name="layers")(x, mask)
        else:
            for i in range(self.layers):
                x, _ = layer(name=f"layer_{i}")(x, mask)
        return nn.Dense(3, name="head")(x)


def kernels_by_wanda(params, statistics):
    masks = prune.masks(prune.scored(params, statistics, "wanda"), 0.5, scope="unit")
    return prune.apply(params, masks), masks


@pytest.mark.parametrize("remat", [False, True])
def test_flax_modules_scanned_and_listed_agree(remat):
    batches = [normal(5, 4, seed=seed) for seed in (1, 2)]
    scan, plain = Network(scan=True, remat=remat), Network(remat=remat)
    variables = drawn(scan, batches[0])
    outer = {name: leaf for name, leaf in variables["params"].items() if name != "layers"}
    apart = {
        f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layers"]) for i in (0, 1)
    }
    pruned, masks = prune.block_by_block(variables, scan.apply, batches, kernels_by_wanda)
    listed, _ = prune.block_by_block(
        {"params": {**outer, **apart}}, plain.apply, batches, kernels_by_wanda, blocks=["layer_1", "layer_0"]
    )
    # By the kernels alone: half of each unit's weights.
    assert prune.sparsity(masks) == 0.5 and masks["params"]["stem"]["kernel"].ndim == 0
    for i in (0, 1):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], pruned["params"]["layers"])
        jax.tree.map(np.testing.assert_array_equal, own, listed["params"][f"layer_{i}"])
    assert listed["params"]["stem"]["kernel"] is outer["stem"]["kernel"]


def test_an_nnx_model_with_state():
    class Blocks(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
            self.norm = nnx.BatchNorm(6, rngs=rngs)

        def __call__(self, x):
            return self.second(self.norm(nnx.relu(self.first(x))))

    model = Blocks(nnx.Rngs(0))
    model.eval()
    params, apply_fn = jaxeff.functional(model)
    pruned, masks = prune.block_by_block(
        params, apply_fn, [normal(4, 6)], by_wanda, blocks=["first", "second"]
    )
    assert type(pruned) is type(params) and prune.sparsity(masks) == 0.5
    assert pruned["norm"]["scale"].get_value() is params["norm"]["scale"].get_value()


def test_a_scan_with_outputs_inputs_of_its_own_and_weights_in_another_dtype():
    """Backwards, over bfloat16 copies, with a factor for each block, and an output of each that is read later."""
    params = {"w": STACK["up"][:, :, :WIDTH] / 2, "out": jnp.eye(WIDTH)}
    factors = jnp.asarray([0.5, 1.0, 2.0])

    def model(params, x):
        def step(x, own):
            w, factor = own
            x = x + factor * jnp.tanh(x @ w.astype(x.dtype))
            return x, jnp.sum(x, 0)

        x, sums = jax.lax.scan(step, x, (params["w"].astype(jnp.bfloat16), factors), reverse=True)
        return x @ params["out"] + jnp.sum(sums, 0, keepdims=True)

    x = normal(5, WIDTH)
    pruned, masks = prune.block_by_block(params, model, [x], by_wanda)
    assert pruned["w"].dtype == jnp.float32
    state, expected = jnp.asarray(x), {}
    for i in (2, 1, 0):
        scores = np.abs(params["w"][i]) * np.linalg.norm(state, axis=0)[:, None]
        expected[i] = scores > np.sort(scores, axis=0)[WIDTH // 2 - 1]
        w = jnp.where(expected[i], params["w"][i], 0).astype(jnp.bfloat16)
        state = state + factors[i] * jnp.tanh(state @ w.astype(state.dtype))
    np.testing.assert_array_equal(masks["w"], np.stack([expected[i] for i in range(3)]))


def test_two_scans_are_pruned_in_turn():
    """The second one starts from what the pruned first one leaves, with the sums that each of its blocks emitted."""
    params = {"a": STACK["query"] / 2, "b": STACK["key"] / 2, "mix": jnp.eye(WIDTH) * 0.5}

    def step(x, w):
        x = x + jnp.tanh(x @ w)
        return x, jnp.mean(x, 0)

    def model(params, x):
        x, means = jax.lax.scan(step, x, params["a"])
        return jax.lax.scan(step, nn.relu(x @ params["mix"]) + jnp.sum(means, 0, keepdims=True), params["b"])[
            0
        ]

    batches = [normal(5, WIDTH, seed=seed) for seed in (1, 2)]
    pruned, masks = prune.block_by_block(params, model, batches, by_wanda)
    halfway = {**params, "a": pruned["a"]}
    statistics = functools.reduce(jaxeff.merge, (jaxeff.collect(halfway, model, x) for x in batches))
    expected = prune.masks(
        prune.scored(halfway, statistics, "wanda", prunable={"mix": False}), 0.5, scope="unit"
    )
    np.testing.assert_array_equal(masks["b"][0], expected["b"][0])
    assert masks["mix"].ndim == 0


@pytest.mark.parametrize("model", ["scanned", "listed"])
def test_padding_does_not_count(model):
    """What is pruned is what batches without the padding give; the blocks are causal."""
    params, apply_fn, blocks = {
        "scanned": (STACKED, scanned, None),
        "listed": (LISTED, unrolled, NAMES),
    }[model]
    padded = [np.pad(tokens[:, :4], ((0, 0), (0, 2)), constant_values=0) for tokens in BATCHES]
    run = functools.partial(prune.block_by_block, params, apply_fn, prune_block=by_sparsegpt, blocks=blocks)
    found, masks = run([*padded], where=lambda tokens: np.arange(6) < 4 + 0 * tokens)
    expected, expected_masks = run([tokens[:, :4] for tokens in BATCHES])
    jax.tree.map(np.testing.assert_array_equal, masks, expected_masks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


def test_blocks_that_are_left_as_they_are():
    """The first block is whole, as some papers have it; the others are pruned."""
    sparsities = iter([0.0, 0.5, 0.75])

    def in_turn(params, statistics):
        sparsity = next(sparsities)
        if not sparsity:
            return params, jax.tree.map(lambda leaf: True, params)
        return prune.sparsegpt(params, statistics, sparsity)

    pruned, masks = prune.block_by_block(STACKED, scanned, BATCHES, in_turn)
    for name in ("query", "up"):
        np.testing.assert_array_equal(pruned["blocks"][name][0], STACK[name][0])
        assert np.asarray(masks["blocks"][name]).mean((1, 2)).tolist() == [1.0, 0.5, 0.25]


def _chain(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


CHAIN = {"w": STACK["query"]}
X = [normal(4, WIDTH)]
LIST = LISTED, unrolled, BATCHES, by_wanda
INTERLEAVED = {"blocks": ["embedding", "blocks/1"]}


def _transposed(params, x):
    return _chain({"w": jnp.swapaxes(params["w"], 1, 2)}, x)


def _renamed(params, statistics):
    return {"v": params["w"]}, params


def _swapped(params, statistics):
    return by_wanda(params, statistics)[::-1]


def _not_pruned(params, statistics):
    return params, by_wanda(params, statistics)[1]


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (TypeError, "`batches` must be an iterable", (CHAIN, _chain, X[0], by_wanda), {}),
        (ValueError, "`batches` is empty", (CHAIN, _chain, [], by_wanda), {}),
        (ValueError, "batch 1 of `batches`", (CHAIN, _chain, [X[0], X[0][:2]], by_wanda), {}),
        (ValueError, "no scan over stacked weights", LIST, {}),
        (ValueError, "`blocks` must be paths", LIST, {"blocks": "blocks"}),
        (ValueError, "'layers', but no leaf", LIST, {"blocks": ["layers"]}),
        (ValueError, "do not run one after the other", LIST, INTERLEAVED),
        (TypeError, "`prune_block` must be a function", (CHAIN, _chain, X, "wanda"), {}),
        (TypeError, "must return a tuple", (CHAIN, _chain, X, lambda params, statistics: params), {}),
        (ValueError, "params of prune_block", (CHAIN, _chain, X, _renamed), {}),
        (ValueError, "`masks of prune_block` must be True or 1", (CHAIN, _chain, X, _swapped), {}),
        (ValueError, "must be 0 where its masks are False, and 'w'", (CHAIN, _chain, X, _not_pruned), {}),
        (ValueError, "as it is stored", (CHAIN, _transposed, X, by_wanda), {}),
        (ValueError, "used outside it", (CHAIN, lambda p, x: _chain(p, x) @ p["w"][0], X, by_wanda), {}),
    ],
)  # fmt: skip
def test_what_is_refused(error, message, arguments, keywords):
    with pytest.raises(error, match=message):
        _ = prune.block_by_block(*arguments, **keywords)
