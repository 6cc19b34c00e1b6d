"""Deletion curves: what is removed, what it costs, and that the criteria beat removal at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import NETWORKS, normal

import jaxeff
from jaxeff import demo

pytestmark = pytest.mark.slow

CRITERIA = ("taylor", "obd", "wanda", "activation")


def cross_entropy(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def squared(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def _linear(p, x):
    return x @ p["a"] @ p["b"]


@pytest.fixture(scope="module")
def linear():
    params = {"a": normal(5, 4), "b": 0.1 * normal(4, 3, seed=8)}
    return params, normal(6, 5), normal(6, 3, seed=9)


def _removed(params, order, count):
    """The parameters without the `count` weights that come first in `order`, an array over all of them."""
    flat = np.concatenate([np.ravel(w) for w in params.values()])
    flat[order[:count]] = 0
    a, b = np.split(flat, [params["a"].size])
    return {"a": a.reshape(params["a"].shape), "b": b.reshape(params["b"].shape)}


def test_a_global_curve_removes_the_smallest_scores_of_the_model(linear):
    params, x, y = linear
    compared = jaxeff.compare_criteria(
        params, _linear, x, targets=y, loss_fn=squared, criteria=("magnitude",), fractions=(0, 0.3, 0.9)
    )
    order = np.argsort(np.concatenate([np.abs(w).ravel() for w in params.values()]))
    expected = [
        squared(_linear(_removed(params, order, k), x), y) for k in (0, round(0.3 * 32), round(0.9 * 32))
    ]
    np.testing.assert_allclose(compared.loss[0], expected, rtol=1e-5)
    area = np.trapezoid(expected, [0, 0.3, 0.9]) / 0.9
    assert float(compared.area[0]) == pytest.approx(area, rel=1e-5)


def test_a_curve_by_layer_removes_the_same_fraction_of_each(linear):
    params, x, y = linear
    compared = jaxeff.compare_criteria(
        params,
        _linear,
        x,
        targets=y,
        loss_fn=squared,
        criteria=("magnitude",),
        fractions=(0, 0.5),
        scope="layer",
    )
    kept = {path: np.where(np.abs(w) >= np.median(np.abs(w)), w, 0) for path, w in params.items()}
    assert float(compared.loss[0, 1]) == pytest.approx(float(squared(_linear(kept, x), y)), rel=1e-5)


def test_layers_that_a_scan_stacks_are_layers_of_their_own():
    network = NETWORKS["scanned"]()
    (x,) = network.batch
    compared = jaxeff.compare_criteria(
        *network.arguments,
        ("magnitude",),
        loss_fn=squared,
        targets=np.zeros((16, 6)),
        fractions=(0, 0.5),
        scope="layer",
    )
    kernel = np.asarray(network.variables["params"]["stack"]["dense"]["kernel"])
    kept = np.stack([np.where(np.abs(w) >= np.median(np.abs(w)), w, 0) for w in kernel])
    params = {"stack": {"dense": {**network.variables["params"]["stack"]["dense"], "kernel": kept}}}
    expected = squared(network.module.apply({"params": params}, x), 0)
    assert float(compared.loss[0, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_equal_scores_go_by_index(linear):
    params, x, y = linear
    same = lambda weight, site: jnp.ones_like(weight)  # noqa: E731
    compared = jaxeff.compare_criteria(
        params, _linear, x, targets=y, loss_fn=squared, criteria=same, fractions=(0, 0.25)
    )
    expected = squared(_linear(_removed(params, np.arange(32), 8), x), y)
    assert float(compared.loss[0, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_rank_correlations_are_spearmans(linear):
    params, x, y = linear
    negative = lambda weight, site: 1 / jnp.abs(weight)  # noqa: E731
    compared = jaxeff.compare_criteria(
        params, _linear, x, targets=y, loss_fn=squared, criteria=("magnitude", negative, "random")
    )
    np.testing.assert_allclose(np.diag(compared.rank_correlation), 1, rtol=1e-6)
    np.testing.assert_allclose(compared.rank_correlation[0, 1], -1, rtol=1e-6)
    assert abs(float(compared.rank_correlation[0, 2])) < 0.6


def test_the_same_seed_gives_the_same_controls(linear):
    params, x, y = linear
    compare = lambda seed: jaxeff.compare_criteria(  # noqa: E731
        params, _linear, x, targets=y, loss_fn=squared, criteria="magnitude", seed=seed
    )
    first, again, other = compare(0), compare(0), compare(1)
    assert np.array_equal(first.random_loss, again.random_loss)
    assert not np.array_equal(first.random_loss, other.random_loss)
    assert "at random" in str(first) and "magnitude" in str(first)


def test_the_loss_may_be_measured_on_other_data(linear):
    params, x, y = linear
    other = normal(3, 5, seed=1), normal(3, 3, seed=2)
    compared = jaxeff.compare_criteria(
        params, _linear, x, targets=y, loss_fn=squared, criteria="taylor", held_out=other
    )
    assert float(compared.loss[0, 0]) == pytest.approx(
        float(squared(_linear(params, other[0]), other[1])), rel=1e-5
    )


BAD = {
    "fractions": ({"fractions": (0.5, 0.1)}, "`fractions` must be two or more ascending"),
    "percent": ({"fractions": (0, 50)}, r"`fractions` must be .* in \[0, 1\]"),
    "scope": ({"scope": "model"}, "`scope` must be 'global' or 'layer', got 'model'"),
    "criterion": ({"criteria": ("magnitude", "tailor")}, "`criterion` must be one of"),
}


@pytest.mark.parametrize(("keywords", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_named(keywords, said, linear):
    params, x, y = linear
    with pytest.raises(ValueError, match=said):
        jaxeff.compare_criteria(params, _linear, x, targets=y, loss_fn=squared, **keywords)


@pytest.mark.parametrize("seed", range(3))
def test_criteria_beat_removal_at_random_on_digits(seed):
    """Each by area under the deletion curve on held-out digits, in both scopes."""
    training, test = demo.split(demo.digits())
    state, _ = demo.train(seed=seed, epochs=10)
    for scope in ("global", "layer"):
        compared = jaxeff.compare_criteria(
            state.params,
            state.apply_fn,
            training.images[:256],
            targets=training.labels[:256],
            loss_fn=cross_entropy,
            criteria=CRITERIA,
            scope=scope,
            held_out=(test.images, test.labels),
        )
        # Below the best of the random orders, not only their mean.
        assert jax.numpy.all(compared.area < compared.random_area.min()), (scope, str(compared))
