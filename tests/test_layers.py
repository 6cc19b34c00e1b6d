"""Layers that are counted and layers that are sorted, in one report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxeff
from jaxeff import metrics

DRAW = np.random.default_rng(0)
PARAMS = {
    name: DRAW.normal(size=shape).astype(np.float32)
    for name, shape in {"counted": (130, 150), "sorted": (150, 5)}.items()
}
BATCH = DRAW.normal(size=(64, 130)).astype(np.float32)


def _own(weight, site):
    return jnp.abs(weight) * site.post.mean_absolute


def _network(params, x):
    return jnp.tanh(x @ params["counted"] / 20) @ params["sorted"]


def test_large_and_small_layers_stand_in_one_report():
    report = jaxeff.analyze(PARAMS, _network, BATCH, criterion=_own)
    hidden = np.tanh(BATCH.astype(np.float64) @ PARAMS["counted"] / 20)
    outputs = hidden @ PARAMS["sorted"]
    for name, emitted in (("counted", hidden), ("sorted", outputs)):
        scores = np.abs(PARAMS[name]) * np.abs(emitted).mean(0)
        expected = reference.metrics(scores)
        for field in ("utilization", "gini", "mean", "std", "max"):
            assert float(getattr(report[name].metrics, field)) == pytest.approx(expected[field], rel=1e-5)
        np.testing.assert_allclose(report[name].units, scores.sum(0), rtol=1e-5)
        units = np.exp(reference.entropy(scores.sum(0)))
        assert float(report[name].effective_units) == pytest.approx(units, rel=1e-5)


def test_the_derivative_of_a_counted_layers_metric_is_that_of_sorting():
    def gini(counted):
        return jaxeff.analyze({"counted": counted})["counted"].metrics.gini

    ours = jax.grad(gini)(PARAMS["counted"])
    theirs = jax.grad(lambda w: metrics.gini(jnp.abs(w)))(PARAMS["counted"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-10)
