"""X^T X of what weights multiply: against NumPy, in every layout, under loops and over batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn, normal

import jaxeff
from jaxeff.statistics import check_alike


def _moments(params, model, x):
    return {site.path: site for site in jaxeff.collect(params, model, x, hessians=True).sites}


def _assert_products(site, inputs, rtol=1e-4):
    """Inputs: [positions, inputs]."""
    inputs = np.asarray(inputs, np.float64)
    expected = inputs.T @ inputs
    np.testing.assert_allclose(site.second_moments.sum, expected, rtol, atol=rtol * np.abs(expected).max())
    assert float(site.second_moments.count) == len(inputs)
    # Its diagonal is what the criteria read.
    squares = np.ravel(site.input.square_sum)
    np.testing.assert_allclose(np.diag(site.second_moments.sum), squares, rtol)


class Layouts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(9, 6, name="embed")(x)
        y = nn.relu(nn.DenseGeneral((2, 4), name="heads")(x))
        y = nn.tanh(nn.DenseGeneral(6, axis=(-2, -1), name="out")(y))
        return nn.Dense(3, name="last")(nn.relu(nn.Conv(5, (3,), name="conv")(x + y)))


def test_inputs_along_one_axis_or_several_and_what_has_none():
    tokens = np.arange(14).reshape(2, 7) % 9
    variables = drawn(Layouts(), tokens)
    found = _moments(variables, Layouts().apply, tokens)
    _, seen = Layouts().apply(variables, tokens, capture_intermediates=True)
    outputs = {name: seen["intermediates"][name]["__call__"][0] for name in ("embed", "heads", "conv")}
    _assert_products(found["heads/kernel"], np.reshape(outputs["embed"], (14, 6)))
    _assert_products(found["out/kernel"], np.reshape(nn.relu(outputs["heads"]), (14, 8)))
    _assert_products(found["last/kernel"], np.reshape(nn.relu(outputs["conv"]), (14, 5)))
    for name, reason in {"conv/kernel": "convolution", "embed/embedding": "looked up"}.items():
        assert found[name].second_moments is None and reason in found[name].without_moments
    plain = jaxeff.collect(variables, Layouts().apply, tokens)
    assert all(site.second_moments is None and site.without_moments is None for site in plain.sites)


def test_a_weight_that_lies_outputs_first():
    x = normal(2, 6, 5)
    site = _moments({"w": normal(3, 5, seed=1)}, lambda p, x: jnp.swapaxes(x, 0, 1) @ p["w"].T, x)["w"]
    _assert_products(site, x.reshape(12, 5))


def _hidden(kernels, x):
    inputs = []
    for kernel in kernels:
        inputs.append(x)
        x = np.tanh(x @ kernel)
    return inputs


@pytest.mark.parametrize("axis", [0, 1])
def test_each_stacked_block_has_its_own(axis):
    kernels, x = normal(3, 4, 4, seed=1), normal(6, 4)

    def model(params, x):
        def step(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(step, x, jnp.moveaxis(params["w"], axis, 0))[0]

    found = _moments({"w": np.moveaxis(kernels, 0, axis)}, model, x)["w"].second_moments
    assert found.sum.shape == (3, 4, 4) and np.array_equal(found.count, [6, 6, 6])
    for products, inputs in zip(found.sum, _hidden(kernels, x), strict=True):
        np.testing.assert_allclose(products, inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_blocks_in_two_scans_stand_in_the_order_of_the_weights_axes():
    kernels, x = normal(2, 3, 4, 4, seed=1), normal(6, 4)

    def model(params, x):
        def outer(x, stack):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0], None

        # The outer scan runs over the weight's second axis.
        return jax.lax.scan(outer, x, jnp.swapaxes(params["w"], 0, 1))[0]

    found = _moments({"w": kernels}, model, x)["w"].second_moments
    inputs = _hidden(np.swapaxes(kernels, 0, 1).reshape(6, 4, 4), x)
    for number, own in enumerate(inputs):
        np.testing.assert_allclose(found.sum[number % 2, number // 2], own.T @ own, rtol=1e-4, atol=1e-4)
    assert np.array_equal(found.count, np.full((2, 3), 6))


def test_time_is_summed():
    kernel, x = normal(4, 4, seed=1), normal(3, 5, 4)

    def model(params, x):
        def step(h, now):
            return jnp.tanh((h + now) @ params["w"]), None

        return jax.lax.scan(step, jnp.zeros((3, 4)), jnp.swapaxes(x, 0, 1))[0]

    h, inputs = np.zeros((3, 4)), []
    for now in np.swapaxes(x, 0, 1):
        inputs.append(h + now)
        h = np.tanh(inputs[-1] @ kernel)
    _assert_products(_moments({"w": kernel}, model, x)["w"], np.concatenate(inputs))


def test_experts_side_by_side_have_none():
    def model(params, x):
        return jnp.einsum("etd,edf->etf", x, params["w"])

    site = _moments({"w": normal(2, 4, 3, seed=1)}, model, normal(2, 5, 4))["w"]
    assert site.second_moments is None and "side by side, along axis 0" in site.without_moments


@pytest.mark.parametrize("made", [jnp.tanh, lambda w: 2 * w])
def test_what_is_made_of_the_weight_has_none(made):
    x = normal(5, 4)
    found = jaxeff.collect({"w": normal(4, 3, seed=1)}, lambda p, x: x @ made(p["w"]), x, hessians=True)
    assert found.sites
    for site in found.sites:
        assert site.second_moments is None and "made of the weight" in site.without_moments


def test_small_floats_are_widened():
    x = jnp.asarray(normal(64, 4), jnp.bfloat16)
    site = _moments({"w": jnp.ones((4, 2), jnp.bfloat16)}, lambda p, x: x @ p["w"], x)["w"]
    assert site.second_moments.sum.dtype == jnp.float32
    _assert_products(site, x, rtol=1e-6)


def test_batches_add():
    params, x = {"w": normal(4, 3, seed=1)}, normal(10, 4)

    def collected(x, **keywords):
        return jaxeff.collect(params, lambda p, x: x @ p["w"], x, **keywords)

    parts = [collected(part, hessians=True) for part in (x[:6], x[6:])]
    (site,) = jaxeff.merge(*parts).sites
    _assert_products(site, x)
    with pytest.raises(ValueError, match="`criterion` and `hessians`"):
        check_alike(parts[0], collected(x[6:]))


def test_calibration_adds_them_over_batches_of_any_size():
    params, x = {"w": normal(4, 3, seed=1)}, normal(64, 4)
    batches = [x[:16], x[16:32], x[32:48], x[48:56], x[56:]]
    found = jaxeff.calibrate(
        params, lambda p, x: x @ p["w"], batches, criterion="wanda", hessians=True, progress=False
    )
    _assert_products(found.sites[0], x)
