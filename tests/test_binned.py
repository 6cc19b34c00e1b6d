"""Metrics from counts of bit patterns, against float64 and against the metrics from sorting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxeff
from jaxeff import binned, metrics

SIZE = 300_000
COVERAGES = ("coverage_50", "coverage_80", "coverage_90")
FIELDS = [field.name for field in dataclasses.fields(metrics.Metrics)]


def _drawn():
    generator = np.random.default_rng(0)
    normal = np.abs(generator.normal(size=SIZE))
    narrow = np.asarray(jnp.asarray(normal, jnp.bfloat16).astype(jnp.float32))
    arrays = {
        "normal": 0.02 * normal,
        "squared normal": normal**2,
        "lognormal": np.exp(2 * generator.normal(size=SIZE)),
        "uniform": generator.random(SIZE),
        "heavy tail": generator.random(SIZE) ** -2.0,
        "ternary": 0.013 * generator.integers(0, 3, SIZE),
        "bfloat16": narrow,
        "nearly constant": 1 + 1e-3 * generator.random(SIZE),
        "constant": np.full(SIZE, 0.3),
        "half zero": np.where(generator.random(SIZE) < 0.5, 0, normal),
        "large": 1e37 * normal,
        "small": 1e-36 * normal,
        "subnormal": 1e-40 * normal,
        "one of many": np.eye(1, SIZE, 5)[0],
        "zero": np.zeros(SIZE),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


ARRAYS = _drawn()
summarize = jax.jit(binned.summarize)


@pytest.mark.parametrize("x", ARRAYS.values(), ids=ARRAYS)
def test_metrics_are_those_of_float64(x):
    found = summarize(x)
    for name, expected in reference.metrics(x).items():
        # Which weight of a bin is the last one needed is not known: one more or less.
        atol = 1.5 / SIZE if name in COVERAGES else 2.0**-149
        np.testing.assert_allclose(float(getattr(found, name)), expected, rtol=1e-6, atol=atol, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, 257, elements=st.floats(0, 2.0**100, width=32, allow_subnormal=False)))
def test_any_array_has_the_metrics_of_its_order(x):
    ours, theirs = summarize(x), metrics.summarize(x)
    for name in FIELDS:
        # Two of 257 weights may share a bin, which is at most 2^-8 wide.
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1.5 / 257, err_msg=name
        )


def test_one_weight_beyond_all_others_leaves_every_metric_a_number():
    x = np.full(257, 1.0391705e-08, np.float32)
    x[0] = 8.8388979e29
    found = summarize(x)
    assert all(np.isfinite(np.asarray(getattr(found, name))).all() for name in FIELDS)
    assert float(found.utilization) == pytest.approx(1 / 257)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(64)), st.integers(-20, 20))
def test_order_and_scale_change_nothing(order, exponent):
    x = np.exp(np.random.default_rng(1).normal(size=64)).astype(np.float32)
    ours, theirs = summarize(x[np.array(order)] * np.float32(2.0**exponent)), summarize(x)
    for name in ("entropy", "gini", "utilization", "coverage_80", "relative_sparsity_1e2"):
        assert float(getattr(ours, name)) == float(getattr(theirs, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, -np.nan])
def test_what_is_no_importance_is_counted(bad):
    x = np.ones(1000, np.float32)
    x[7:9] = bad
    found = summarize(x)
    assert int(found.nonfinite) == 2 and np.isnan(float(found.entropy)) and np.isnan(float(found.mean))


def test_negative_zeros_are_zeros():
    found = summarize(np.array([-0.0, 0.0, 1.0], np.float32))
    assert int(found.zeros) == 2 and float(found.utilization) == pytest.approx(1 / 3)


def test_padding_counts_for_nothing():
    x = ARRAYS["normal"][:5000]
    padded = binned.count(jnp.pad(jnp.asarray(x), (0, 3000)), 5000)
    ours, theirs = binned.summarize_bins(padded, 5000), binned.summarize(jnp.asarray(x))
    for name in FIELDS:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-7, err_msg=name)


def test_a_sum_over_pieces_is_that_of_the_whole():
    x = np.random.default_rng(3).random((1 << 20) + 12_345).astype(np.float32)
    found, expected = summarize(x), reference.metrics(x)
    assert float(found.mean) == pytest.approx(expected["mean"], rel=1e-6)
    assert float(found.gini) == pytest.approx(expected["gini"], rel=1e-6)


# In a report


def _own(weight, site):
    return jnp.abs(weight) * site.post.mean_absolute


def _large_and_small():
    generator = np.random.default_rng(0)
    params = {name: generator.normal(size=shape).astype(np.float32) for name, shape in
              {"large": (300, 400), "small": (400, 5)}.items()}  # fmt: skip
    return params, generator.normal(size=(64, 300)).astype(np.float32)


def _network(p, x):
    return jnp.tanh(x @ p["large"] / 20) @ p["small"]


def test_large_and_small_layers_stand_in_one_report():
    params, x = _large_and_small()
    report = jaxeff.analyze(params, _network, x, criterion=_own)
    hidden = np.tanh(x.astype(np.float64) @ params["large"] / 20)
    outputs = hidden @ params["small"]
    for name, emitted in (("large", hidden), ("small", outputs)):
        scores = np.abs(params[name]) * np.abs(emitted).mean(0)
        expected = reference.metrics(scores)
        for field in ("utilization", "gini", "mean", "std", "max"):
            assert float(getattr(report[name].metrics, field)) == pytest.approx(expected[field], rel=1e-5)
        np.testing.assert_allclose(report[name].units, scores.sum(0), rtol=1e-5)
        units = np.exp(reference.entropy(scores.sum(0)))
        assert float(report[name].effective_units) == pytest.approx(units, rel=1e-5)


def test_the_derivative_of_a_large_layers_metric_is_that_of_sorting():
    params, x = _large_and_small()

    def utilization(large):
        return jaxeff.analyze({**params, "large": large}, _network, x, criterion="magnitude")[
            "large"
        ].metrics.gini

    ours = jax.grad(utilization)(params["large"])
    theirs = jax.grad(lambda w: metrics.gini(jnp.abs(w)))(params["large"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-10)
