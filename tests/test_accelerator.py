"""The forms that accelerators run, with all rows at once in place of loops, on whatever machine there is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxeff
from jaxeff import exact, pairs, sketch

SUMMARIES = {"exact": exact.summarize, "sketch": lambda x: sketch.summarize_array(x)[0]}


@pytest.fixture
def at_once(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(pairs, "in_rows", lambda: False)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("method", SUMMARIES)
def test_metrics_are_those_of_float64(at_once, method):
    x = np.random.default_rng(0).lognormal(sigma=2, size=100_003).astype(np.float32)
    x[:1000] = 0
    expected = reference.metrics(x)
    found = SUMMARIES[method](jnp.asarray(x))
    for field in dataclasses.fields(found):
        # A sketch's bound at this size; sorting is good to 1e-6.
        tolerance = 3e-6 if method == "sketch" else 1e-6
        value = getattr(found, field.name)
        np.testing.assert_allclose(value, expected[field.name], rtol=tolerance, err_msg=field.name)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_a_report_is_that_of_loops(monkeypatch, request, wide):
    if wide:
        request.getfixturevalue("x64")
    # The first is counted by bins, the others are sorted.
    draw = np.random.default_rng(1).standard_normal
    params = {name: draw(shape, np.float32) for name, shape in
              {"a": (200, 300), "b": (300,), "c": (300, 7), "d": (20, 20)}.items()}  # fmt: skip
    in_loops = jaxeff.analyze(params)
    jax.clear_caches()
    monkeypatch.setattr(pairs, "in_rows", lambda: False)
    at_once = jaxeff.analyze(params)
    jax.clear_caches()
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(at_once), jax.tree.leaves(in_loops), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, err_msg=jax.tree_util.keystr(path))
