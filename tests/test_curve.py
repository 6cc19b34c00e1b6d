"""How importance is spread over weights, in cells: three ways to count, against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxeff
from jaxeff.metrics import Distribution, _order, sketch
from jaxeff.metrics._curve import CELLS, EDGES, cells_of, lorenz

SIZE = 16_000
DRAWS = {
    "normal": lambda r: np.abs(r.standard_normal(SIZE)),
    "lognormal": lambda r: np.exp(3 * r.standard_normal(SIZE)),
    "mostly zero": lambda r: r.standard_normal(SIZE) ** 2 * (r.random(SIZE) < 0.1),
    "one holds all": lambda r: np.where(np.arange(SIZE) == 7, 1.0, 0.0),
    "constant": lambda r: np.full(SIZE, 3.0),
    "ternary": lambda r: r.choice([0.0, 0.01, 2.0], SIZE),
    "large": lambda r: np.abs(r.standard_normal(SIZE)) * 1e37,
    "small": lambda r: np.abs(r.standard_normal(SIZE)) * 1e-30,
}


def _on_host(x):
    with np.errstate(all="ignore"):
        whole = jax.tree.map(np.asarray, sketch.count(x))
        return cells_of(sketch.spread_of(whole, np.float64))


COUNTED = {
    "sorted": jax.jit(lambda x: cells_of(_order.spread_of(jnp.pad(x, (0, 384)), x.size))),
    "counted": jax.jit(lambda x: cells_of(sketch.spread_of(sketch.count(x)))),
    "on the host": _on_host,
}


def _oracle(x):
    cells = np.searchsorted(EDGES.astype(np.float64), x / x.mean(), side="right")
    weights = np.bincount(cells, minlength=CELLS) / x.size
    return np.stack([weights, np.bincount(cells, x, minlength=CELLS) / x.sum()], axis=1)


@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_cells_hold_what_sorting_says(draw, count):
    x = draw(np.random.default_rng(0)).astype(np.float32)
    ours, truth = np.asarray(count(jnp.asarray(x)), np.float64), _oracle(x.astype(np.float64))
    # A bin, 2^-8 wide, may lie across an edge: then all of it is on one side, up to the next cell.
    apart = np.abs(np.cumsum(ours, axis=0) - np.cumsum(truth, axis=0))
    near = truth + np.roll(truth, 1, axis=0) + np.roll(truth, -1, axis=0)
    assert (apart <= 0.04 * near + 1e-5).all() or np.unique(x).size < 4
    assert np.allclose(ours.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_lorenz_curve_is_that_of_the_gini(draw, count):
    x = draw(np.random.default_rng(1)).astype(np.float32)
    weights, importance = lorenz(Distribution(*np.asarray(count(jnp.asarray(x))).T))
    area = float(np.sum(np.diff(weights) * (importance[1:] + importance[:-1]) / 2))
    # Chords lie above the curve: Gini comes out low, by less than a cell's width, 1/4, over 40.
    gini = reference.gini(x.astype(np.float64))
    assert gini - 0.007 <= 1 - 2 * area <= gini + 1e-4
    assert (np.diff(weights) >= 0).all() and (np.diff(importance) >= -1e-7).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED)
def test_what_is_no_importance_makes_all_cells_nan(bad, count):
    x = jnp.arange(float(SIZE)).at[3].set(bad)
    assert np.isnan(count(x)).all()


@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED)
def test_a_layer_without_importance_has_no_distribution(count):
    assert np.isnan(count(jnp.zeros(SIZE))).all()


def test_a_report_has_one_for_each_layer_however_it_was_counted():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "small": jax.random.normal(keys[0], (30, 20)),
        "large": jax.random.normal(keys[1], (300, 300)),
        "zeros": jnp.zeros((4, 4)),
        "deep": {"kernel": jax.random.normal(keys[2], (10, 10)) ** 3},
    }
    report = jaxeff.analyze(params, curves=True)
    assert report.numbers.distribution.weights.shape == (CELLS, 4)
    for row in report.rows[1:]:
        x = np.abs(np.asarray(jax.tree.leaves(params[row.path.split("/")[0]])[0], np.float64)).ravel()
        if row.path == "zeros":
            assert np.isnan(row.distribution.weights).all()
        else:
            assert np.allclose(row.distribution.weights, _oracle(x)[:, 0], atol=0.002)


def test_it_goes_through_vmap_and_grad():
    def gain(params):
        return jaxeff.analyze(params, curves=True).model.utilization

    params = {"kernel": jax.random.normal(jax.random.key(1), (130, 130))}
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf**3]), params)
    assert np.isfinite(jax.vmap(jax.grad(gain))(both)["kernel"]).all()
    reports = jax.vmap(lambda params: jaxeff.analyze(params, curves=True))(both)
    assert reports.numbers.distribution.weights.shape == (2, CELLS, 1)
    alone = jaxeff.analyze({"kernel": params["kernel"] ** 3}, curves=True)
    second = jax.tree.map(lambda leaf: leaf[1], reports)["kernel"].distribution
    assert np.allclose(second.weights, alone["kernel"].distribution.weights, atol=1e-6)


def test_without_being_asked_a_report_has_none():
    report = jaxeff.analyze({"kernel": jnp.ones((3, 4))})
    assert report.numbers.distribution is None and report["kernel"].distribution is None
