"""SparseGPT and least squares on the support of a mask: against NumPy in float64, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network import normal

import jaxeff
from jaxeff import prune

BLOCKS, WIDTH = 3, 8
MIX = np.eye(WIDTH) + 0.4 * normal(WIDTH, WIDTH, seed=7)  # inputs that depend on each other


def dense(params, x):
    return x @ params["kernel"]


def layer(inputs=16, units=6, tokens=64, dtype=jnp.float32):
    """One layer on inputs that depend on each other."""
    mix = np.eye(inputs) + 0.3 * normal(inputs, inputs, seed=3)
    x = jnp.asarray(normal(tokens, inputs, seed=2) @ mix, dtype)
    params = {"kernel": jnp.asarray(normal(inputs, units, seed=1), dtype)}
    return (
        params,
        jaxeff.collect(params, dense, x, criterion="wanda", hessians=True),
        np.asarray(x, np.float64),
    )


def white(inputs=16, units=6):
    """One layer whose inputs have X^T X = 4 I."""
    params = {"kernel": jnp.asarray(normal(inputs, units, seed=1))}
    return params, jaxeff.collect(params, dense, 2 * jnp.eye(inputs), hessians=True)


def stack_of_blocks(params, x):
    def step(x, block):
        heads = jnp.einsum("nd,dhk->nhk", x, block["q"])
        mixed = jnp.einsum("nhk,hkd->nd", jnp.tanh(heads), block["o"])
        return x + mixed, None

    return jax.lax.scan(step, x @ MIX, params["blocks"])[0] @ params["head"]


STACK = {
    "blocks": {"q": normal(BLOCKS, WIDTH, 2, 4, seed=1), "o": normal(BLOCKS, 2, 4, WIDTH, seed=2)},
    "head": normal(WIDTH, 5, seed=3),
}
STACK = jax.tree.map(jnp.float32, STACK)
STACKED = jaxeff.collect(STACK, stack_of_blocks, normal(40, WIDTH, seed=4), hessians=True)


def matrices(tree):
    """By layer, [inputs, units]."""
    blocks = tree["blocks"]
    found = {f"q{i}": np.reshape(blocks["q"][i], (WIDTH, 8)) for i in range(BLOCKS)}
    found |= {f"o{i}": np.reshape(blocks["o"][i], (8, WIDTH)) for i in range(BLOCKS)}
    return {**found, "head": np.asarray(tree["head"])}


def moments(statistics=STACKED):
    sites = {site.path: np.asarray(site.second_moments.sum, np.float64) for site in statistics.sites}
    found = {f"{name}{i}": sites[f"blocks/{name}"][i] for name in ("q", "o") for i in range(BLOCKS)}
    return {**found, "head": sites["head"]}


def damped(products, damping=0.01):
    return products + damping * np.mean(np.diag(products)) * np.eye(len(products))


def errors(products, difference):
    return np.einsum("iu,ij,ju->u", difference, products, difference)


def closed_form(products, weights, kept, damping=0.01):
    """Least squares on the support of each unit, from the normal equations."""
    products, found = damped(products, damping), np.zeros_like(weights, np.float64)
    for unit in range(weights.shape[1]):
        (own,) = np.nonzero(kept[:, unit])
        found[own, unit] = np.linalg.solve(products[np.ix_(own, own)], products[own] @ weights[:, unit])
    return found


def published(products, weights, sparsity, *, block, scope="unit", n_of_m=None, damping=0.01):
    """SparseGPT as its code has it, in float64: weights are rows there, and inputs columns."""
    w = np.array(weights, np.float64).T
    units, inputs = w.shape
    upper = np.linalg.cholesky(np.linalg.inv(damped(products, damping))).T
    kept = np.ones_like(w, bool)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        own, inner = w[:, start:end], upper[start:end, start:end]
        error = np.zeros_like(own)

        def choose(first, last, count, axis, own=own, inner=inner, start=start):
            cost = (own[:, first:last] / np.diag(inner)[first:last]) ** 2
            if axis is None:
                removed = np.zeros(cost.size, bool)
                # The order in which equal costs go does not matter here: there are none.
                removed[np.argsort(cost.ravel())[:count]] = True
                kept[:, start + first : start + last] = ~removed.reshape(cost.shape)
            else:
                order = np.argsort(np.argsort(cost, 1), 1)
                kept[:, start + first : start + last] = order >= count

        if n_of_m is None and scope == "unit":
            choose(0, end - start, round(sparsity * end) - round(sparsity * start), 1)
        elif n_of_m is None:
            choose(0, end - start, round(sparsity * end * units) - round(sparsity * start * units), None)
        for i in range(end - start):
            if n_of_m is not None and i % n_of_m[1] == 0:
                choose(i, i + n_of_m[1], n_of_m[1] - n_of_m[0], 1)
            error[:, i] = np.where(kept[:, start + i], 0, own[:, i]) / inner[i, i]
            own[:, i:] -= np.outer(error[:, i], inner[i, i:])
        w[:, end:] -= error @ upper[start:end, end:]
    return np.where(kept, w, 0).T, kept.T


@pytest.mark.parametrize("scope", ["unit", "layer"])
@pytest.mark.parametrize("block", [4, 5, 128])
def test_sparsegpt_is_the_published_algorithm(block, scope):
    params, statistics, x = layer()
    found, masks = prune.sparsegpt(params, statistics, 0.6, block=block, scope=scope)
    weights, kept = published(x.T @ x, params["kernel"], 0.6, block=block, scope=scope)
    assert np.array_equal(masks["kernel"], kept)
    np.testing.assert_allclose(found["kernel"], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [8, 128])
def test_two_of_four_stay_along_the_inputs(block):
    params, statistics, x = layer()
    found, masks = prune.sparsegpt(params, statistics, pattern=prune.NByM(2, 4), block=block)
    weights, kept = published(x.T @ x, params["kernel"], 0.5, block=block, n_of_m=(2, 4))
    assert np.all(np.sum(np.reshape(masks["kernel"], (4, 4, 6)), 1) == 2)
    assert np.array_equal(masks["kernel"], kept)
    np.testing.assert_allclose(found["kernel"], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_with_independent_inputs_sparsegpt_is_magnitude_without_an_update(sparsity):
    params, statistics = white()
    found, masks = prune.sparsegpt(params, statistics, sparsity)
    scores = prune.scored(params, statistics, "magnitude")
    expected = prune.masks(scores, sparsity, scope="unit")
    assert np.array_equal(masks["kernel"], expected["kernel"])
    np.testing.assert_allclose(found["kernel"], prune.apply(params, expected)["kernel"], rtol=1e-6)


def test_each_layer_of_a_stack_is_pruned_alone_along_its_inputs():
    found, masks = prune.sparsegpt(STACK, STACKED, 0.5)
    assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, STACK)
    products, weights, kept = moments(), matrices(found), matrices(masks)
    for name, before in matrices(STACK).items():
        want, under = published(products[name], before, 0.5, block=128)
        assert np.array_equal(kept[name], under), name
        np.testing.assert_allclose(weights[name], want, rtol=2e-3, atol=2e-3, err_msg=name)


def test_layers_may_lose_fractions_of_their_own():
    shares = {"blocks/q[0]": 0.25, "blocks/q": 0.5, "blocks/o": 0.75, "head": 0.0}
    found, masks = prune.sparsegpt(STACK, STACKED, shares)
    lost = {name: 1 - np.mean(mask) for name, mask in matrices(masks).items()}
    assert lost == {"q0": 0.25, "q1": 0.5, "q2": 0.5, "o0": 0.75, "o1": 0.75, "o2": 0.75, "head": 0}
    np.testing.assert_array_equal(found["head"], STACK["head"])


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_reconstruction_is_least_squares_on_the_support(sparsity):
    masks = prune.masks(prune.scored(STACK, STACKED), sparsity, scope="unit")
    found = matrices(prune.reconstruct(STACK, masks, STACKED))
    products, kept = moments(), matrices(masks)
    for name, before in matrices(STACK).items():
        want = closed_form(products[name], before, kept[name])
        assert np.all(found[name][~kept[name]] == 0)
        assert np.linalg.norm(found[name] - want) <= 1e-4 * np.linalg.norm(want), name


@pytest.mark.parametrize("iterations", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reconstruction_never_emits_worse_than_the_masked_layer(dtype, iterations):
    params, statistics, x = layer(dtype=dtype)
    products = np.asarray(statistics.sites[0].second_moments.sum, np.float64)
    np.testing.assert_allclose(products, x.T @ x, rtol=1e-3, atol=1e-3 * np.abs(products).max())
    before = np.asarray(params["kernel"], np.float64)
    for seed in range(5):
        masks = {"kernel": jnp.asarray(normal(*before.shape, seed=seed) > -0.5)}
        found = prune.reconstruct(params, masks, statistics, iterations=iterations)["kernel"]
        assert found.dtype == dtype and np.all(np.asarray(found)[~masks["kernel"]] == 0)
        ours = errors(products, before - np.asarray(found, np.float64))
        theirs = errors(products, before - np.where(masks["kernel"], before, 0))
        assert np.all(ours <= theirs * (1 + 1e-5))
        assert np.sum(ours) < 0.9 * np.sum(theirs)


def test_the_types_of_small_floats_stay():
    params, statistics, _ = layer(dtype=jnp.bfloat16)
    found, masks = prune.sparsegpt(params, statistics, 0.5)
    assert found["kernel"].dtype == jnp.bfloat16 and masks["kernel"].dtype == bool
    assert np.array_equal(found["kernel"] != 0, masks["kernel"])
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    want, under = prune.sparsegpt(wide, statistics, 0.5)
    assert np.array_equal(masks["kernel"], under["kernel"])
    np.testing.assert_array_equal(found["kernel"], want["kernel"].astype(jnp.bfloat16))


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens):
    params, statistics, x = layer(tokens=tokens)
    found, masks = prune.sparsegpt(params, statistics, 0.5)
    assert np.all(np.isfinite(found["kernel"])) and np.all(np.sum(masks["kernel"], 0) == 8)
    again = prune.reconstruct(params, masks, statistics)["kernel"]
    want = closed_form(x.T @ x, np.asarray(params["kernel"]), np.asarray(masks["kernel"]))
    assert np.linalg.norm(again - want) <= 1e-3 * np.linalg.norm(want)


def test_weights_on_inputs_that_are_always_0_go_first():
    params = {"kernel": jnp.asarray(normal(8, 4, seed=1))}
    x = normal(32, 8, seed=2)
    x[:, [1, 5]] = 0
    statistics = jaxeff.collect(params, dense, x, hessians=True)
    found, masks = prune.sparsegpt(params, statistics, 0.25)
    assert not np.any(masks["kernel"][np.array([1, 5])]) and np.all(np.sum(masks["kernel"], 0) == 6)
    # The outputs stay what they were.
    np.testing.assert_allclose(x @ found["kernel"], x @ params["kernel"], rtol=1e-5, atol=1e-5)
    again = prune.reconstruct(params, masks, statistics)
    np.testing.assert_allclose(again["kernel"], found["kernel"], rtol=1e-5)


def test_a_layer_that_saw_nothing_but_0_stays_finite():
    params = {"kernel": jnp.asarray(normal(8, 4, seed=1))}
    statistics = jaxeff.collect(params, dense, np.zeros((5, 8), np.float32), hessians=True)
    found, masks = prune.sparsegpt(params, statistics, 0.5)
    assert np.all(np.sum(masks["kernel"], 0) == 4)
    expected = prune.apply(params, masks)["kernel"]
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        prune.reconstruct(params, masks, statistics)["kernel"], found["kernel"], rtol=1e-6
    )


@pytest.mark.parametrize("scope", ["unit", "layer"])
@pytest.mark.parametrize(("of_inputs", "of_weights"), [(2.0**59, 1), (1, 2.0**70), (1, 2.0**-100)])
def test_the_scale_of_inputs_and_weights_does_not_matter(of_inputs, of_weights, scope):
    """Up to where the squares of the inputs, which the statistics hold, overflow themselves."""
    params, statistics, x = layer()
    scaled = {"kernel": params["kernel"] * of_weights}
    large = jaxeff.collect(params, dense, np.float32(x * of_inputs), hessians=True)
    found, masks = prune.sparsegpt(scaled, large, 0.6, scope=scope)
    expected, under = prune.sparsegpt(params, statistics, 0.6, scope=scope)
    assert np.array_equal(masks["kernel"], under["kernel"])
    np.testing.assert_allclose(found["kernel"] / of_weights, expected["kernel"], rtol=1e-3, atol=1e-4)
    again = prune.reconstruct(scaled, masks, large)["kernel"] / of_weights
    np.testing.assert_allclose(
        again, prune.reconstruct(params, masks, statistics)["kernel"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 1e30])
def test_inputs_whose_squares_are_not_finite_are_refused(spoiled):
    params, _, x = layer()
    x[3, 2] = spoiled
    statistics = jaxeff.collect(params, dense, np.float32(x), hessians=True)
    for call in (
        lambda: prune.sparsegpt(params, statistics, 0.5),
        lambda: prune.reconstruct(params, {"kernel": params["kernel"] > 0}, statistics),
    ):
        with pytest.raises(ValueError, match="second moments of 'kernel' hold nan or infinity"):
            _ = call()


def test_all_or_nothing_under_a_mask():
    params, statistics, _ = layer()
    for kept in (True, False):
        masks = {"kernel": jnp.full((16, 6), kept)}
        found = prune.reconstruct(params, masks, statistics)["kernel"]
        np.testing.assert_array_equal(found, params["kernel"] if kept else np.zeros((16, 6)))


def test_a_weight_without_units_stays_as_it_is():
    params = {"kernel": jnp.ones((3, 0))}
    statistics = jaxeff.collect(params, dense, normal(4, 3), hessians=True)
    masks = {"kernel": jnp.ones((3, 0), bool)}
    assert prune.reconstruct(params, masks, statistics)["kernel"].shape == (3, 0)


def test_variables_and_leaves_that_are_no_matrices_stay_as_they_are():
    params, statistics, _ = layer()
    variables = {"params": {**params, "bias": jnp.arange(6.0)}, "batch_stats": {"mean": jnp.ones(3)}}

    def model(variables, x):
        return x @ variables["params"]["kernel"] + variables["params"]["bias"][None]

    statistics = jaxeff.collect(variables, model, normal(20, 16), hessians=True)
    found, masks = prune.sparsegpt(variables, statistics, 0.5)
    assert masks["params"]["bias"].shape == masks["batch_stats"]["mean"].shape == ()
    for tree in (found, prune.reconstruct(variables, masks, statistics)):
        np.testing.assert_array_equal(tree["params"]["bias"], np.arange(6))
        np.testing.assert_array_equal(tree["batch_stats"]["mean"], np.ones(3))
        assert np.mean(tree["params"]["kernel"] == 0) == 0.5


def _two(params, x):
    return jax.lax.conv(x, params["conv"], (1,), "SAME")[:, :, 0] @ params["last"]


TWO = {"conv": jnp.ones((4, 2, 3)), "last": jnp.ones((4, 3))}
OF_TWO = jaxeff.collect(TWO, _two, normal(5, 2, 6), hessians=True)
WITHOUT = jaxeff.collect(TWO, _two, normal(5, 2, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.sparsegpt(TWO, OF_TWO, 0.5), "second moments for 'conv', as it is a convolution"),
        (
            lambda: prune.sparsegpt(TWO, WITHOUT, 0.5, prunable={"conv": False}),
            r"second moments for 'last', as .* not collected with `jaxeff.collect\(..., hessians=True\)`",
        ),
        (
            lambda: prune.reconstruct(TWO, jax.tree.map(lambda leaf: leaf > 0, TWO), OF_TWO),
            "second moments for 'conv', as it is a convolution",
        ),
        (lambda: prune.sparsegpt(STACK, STACKED, 1), r"`sparsity` must be in \[0, 1\)"),
        (lambda: prune.sparsegpt(STACK, STACKED), r"`sparsity` must be in \[0, 1\)"),
        (lambda: prune.sparsegpt(STACK, STACKED, {"head": 0.5}), "`allocation` must name each layer"),
        (
            lambda: prune.sparsegpt(STACK, STACKED, 0.5, pattern=prune.Units()),
            "`pattern` must be None or NByM",
        ),
        (
            lambda: prune.sparsegpt(STACK, STACKED, pattern=prune.NByM(1, 3), block=9),
            "3 does not divide the 8 inputs",
        ),
        (lambda: prune.sparsegpt(STACK, STACKED, pattern=prune.NByM(2, 4), block=6), "that 4 divides, got 6"),
        (
            lambda: prune.sparsegpt(STACK, STACKED, 0.5, scope="global"),
            "`scope` must be one of 'unit', 'layer'",
        ),
        (
            lambda: prune.sparsegpt(STACK, STACKED, 0.5, damping=0),
            "`damping` must be positive and finite, got 0",
        ),
        (lambda: prune.reconstruct(STACK, STACK, STACKED, iterations=0), "`iterations` must be at least 1"),
        (lambda: prune.reconstruct(STACK, {"head": True}, STACKED), "`masks` must match the params"),
        (lambda: prune.sparsegpt(TWO, STACKED, 0.5), "with other `params`: 'blocks/o'"),
        (
            lambda: prune.reconstruct(
                {"conv": TWO["conv"], "last": TWO["last"].T}, {"conv": True, "last": True}, OF_TWO
            ),
            "with other `params`: 'last'",
        ),
        (
            lambda: prune.sparsegpt({**STACK, "head": STACK["head"] * jnp.nan}, STACKED, 0.5),
            "the weights of 'head' are no longer finite",
        ),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_neither_masks_nor_statistics_is_named():
    with pytest.raises(ValueError, match="`masks` must be True or 1 .* 'blocks/o' holds other numbers"):
        _ = prune.reconstruct(STACK, prune.scored(STACK, STACKED), STACKED)
    every = jax.tree.map(lambda leaf: True, STACK)
    for call in (
        lambda: prune.sparsegpt(STACK, None, 0.5),
        lambda: prune.reconstruct(STACK, every, jaxeff.analyze(STACK)),
    ):
        with pytest.raises(TypeError, match="`statistics` must be Statistics from `jaxeff.collect`, got"):
            _ = call()
