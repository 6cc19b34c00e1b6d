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


def _stacks(params, x):
    """A scan over blocks of a layer small enough to be sorted and one large enough to be counted."""

    def block(carried, weights):
        wide, narrow = carried
        return (jnp.tanh(wide @ weights["large"]), jnp.tanh(narrow @ weights["small"])), None

    wide, narrow = jax.lax.scan(block, (x, x[:, :20]), params["blocks"])[0]
    return wide @ params["last"] + narrow[:, :1]


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_that_a_scan_stacks_are_reported_alike_in_jit_and_out_of_it(depth):
    draw = np.random.default_rng(0).standard_normal
    blocks = {"small": draw((depth, 20, 20)), "large": draw((depth, 150, 150)) / 8}
    params = {"blocks": blocks, "last": draw((150, 150))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = jnp.asarray(draw((8, 150)), jnp.float32)
    eager = jaxeff.analyze(params, _stacks, x)
    traced = jax.jit(lambda params: jaxeff.analyze(params, _stacks, x))(params)
    assert list(eager) == list(traced) and f"blocks/large[{depth - 1}]" in eager
    pairs = zip(jax.tree.leaves_with_path(traced), jax.tree.leaves(eager), strict=True)
    for (path, ours), theirs in pairs:
        # One of the 4,096 numbers that stand for noise, where a sum in float32 meets a share.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=3e-4, err_msg=jax.tree_util.keystr(path))
