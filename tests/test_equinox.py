"""Equinox models are plain functions, whose weights lie (out, in). Skipped where Equinox is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network import normal, relu

import jaxeff

eqx = pytest.importorskip("equinox")


def test_units_are_the_rows_of_an_equinox_weight():
    model, x = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0)), normal(16, 6)
    params, apply_fn = jaxeff.functional(model)
    report = jaxeff.analyze(params, apply_fn, x)
    first = report["layers/0/weight"]
    assert (first.unit_axes, first.nonlinearity) == ((0,), "relu")
    layer = model.layers[0]
    emitted = relu(x.astype(np.float64) @ np.asarray(layer.weight, np.float64).T + np.asarray(layer.bias))
    expected = np.abs(layer.weight).sum(1) * emitted.mean(0)
    np.testing.assert_allclose(first.units, expected, rtol=1e-5)


def test_every_weight_of_an_equinox_network_is_paired():
    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        cell: eqx.nn.LSTMCell

        def __init__(self, key):
            conv, attention, cell = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=conv)
            self.norm = eqx.nn.LayerNorm(8)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=attention)
            self.cell = eqx.nn.LSTMCell(8, 6, key=cell)

        def __call__(self, x):
            y = jax.nn.relu(self.conv(x)).reshape(8, -1).T
            y = jax.vmap(self.norm)(y)
            y = y + self.attention(y, y, y)
            start = jnp.zeros(6), jnp.zeros(6)
            return jax.lax.scan(lambda state, y: (self.cell(y, state), None), start, y)[0][0]

    params, apply_fn = jaxeff.functional(Network(jax.random.key(0)))
    statistics = jaxeff.collect(params, apply_fn, normal(4, 3, 4, 4), criterion="lrp")
    emits = {site.path: site.nonlinearity for site in statistics.sites}
    projections = [f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")]
    assert emits == {
        "conv/weight": "relu",
        **dict.fromkeys(projections, "identity"),
        **dict.fromkeys(("cell/weight_ih", "cell/weight_hh"), "sigmoid/tanh"),
    }
    assert [found.heads for found in statistics.attentions] == [2]
    assert float(statistics.conservation["relevance"].residual) < 1e-4
