"""What accelerators run, all rows and weights at once in place of loops, on whatever machine there is."""

import drawn
import jax
import jax.export  # not an attribute of jax before it is imported
import jax.numpy as jnp
import numpy as np
import pytest

import jaxeff
from jaxeff import metrics
from jaxeff.metrics import sketch
from jaxeff.metrics._histogram import histogram
from jaxeff.numerics import placement

LARGE = 2**18 + 3  # beyond it the places of one bin may sum to more than a word
PARAMS = {
    name: np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for name, shape in {"counted": (130, 140), "a": (140,), "b": (140, 7), "c": (20, 20)}.items()
}


def lowered_for_an_accelerator(monkeypatch) -> None:
    """As where the platform is none that a form of its own is kept for."""
    choose = lambda *operands, cpu, default: default(*operands)  # noqa: E731
    monkeypatch.setattr(placement, "lax", type("Lax", (), {"platform_dependent": choose, "map": jax.lax.map}))


@pytest.fixture
def at_once(monkeypatch):
    jax.clear_caches()
    yield lambda: (jax.clear_caches(), lowered_for_an_accelerator(monkeypatch))
    jax.clear_caches()


def test_weights_counted_at_once_are_counted_to_the_bit(at_once):
    arrays = [drawn.draw(name, 0, LARGE) for name in ("normal", "bits", "one bin", "half zero", "smallest")]
    arrays.append(np.pad(drawn.draw("clusters", 0, 1000), (0, LARGE - 1000)))
    sizes = [LARGE] * 5 + [1000]
    in_turn = [jax.jit(histogram)(x, size) for x, size in zip(arrays, sizes, strict=True)]
    at_once()
    for x, size, theirs in zip(arrays, sizes, in_turn, strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(histogram)(x, size), theirs)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("through", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_a_report_is_that_of_loops(at_once, request, through, wide):
    if wide:
        request.getfixturevalue("x64")
    in_loops = through(jaxeff.analyze)(PARAMS)
    at_once()
    found = through(jaxeff.analyze)(PARAMS)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(in_loops), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def analyzed(params, x):
    return jaxeff.analyze(params, lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"], x)


SHAPES = {
    "sorted": (metrics.summarize, (1000,)),
    "counted": (metrics.summarize, (130, 200)),
    "sketch": (lambda x: sketch.summarize(sketch.merge(sketch.count(x), sketch.count(x))), (1000, 7)),
    "gradient": (jax.grad(lambda x: metrics.summarize(x).gini), (130, 200)),
}


@pytest.mark.parametrize("function, shape", SHAPES.values(), ids=SHAPES)
def test_metrics_lower_for_accelerators(function, shape):
    layer = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.export.export(jax.jit(function), platforms=["cuda", "tpu"])(layer).mlir_module_serialized


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_report_in_a_trace_lowers_for_accelerators(platform):
    shapes = {"a": (130, 140), "b": (140, 7)}
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batch = jax.ShapeDtypeStruct((16, 130), jnp.float32)

    def numbers(params, x):
        return analyzed(params, x).numbers.metrics.gini

    program = jax.export.export(jax.jit(numbers), platforms=[platform])(weights, batch)
    assert program.platforms == (platform,) and program.mlir_module_serialized
