"""Nulls: the closed forms, and what a fine grid of noise under the same factors gives."""

from statistics import NormalDist

import numpy as np
import pytest
import reference

from jaxeff import importance
from jaxeff.importance import _null as null
from jaxeff.metrics import _half_normal as half_normal
from jaxeff.metrics._half_normal import Null
from jaxeff.metrics._weighted import Spread, sums_of

# The middles of equally likely cells of |z|.
NOISE = np.array([NormalDist().inv_cdf(0.5 + (i + 0.5) / 4000) for i in range(2000)])
DRAW = np.random.default_rng(0)
FACTORS = {
    "all equal": np.ones(1),
    "uniform": DRAW.random(300),
    "lognormal": np.exp(2 * DRAW.standard_normal(300)),
    "half zero": DRAW.random(300) * (DRAW.random(300) < 0.5),
    "one of many": np.eye(1, 100)[0],
    "one and many": 0.001 + 30 * np.eye(1, 100)[0],
    "faint": 1e-30 * DRAW.random(300),
}


def found_for(criterion: importance.Criterion, factors: np.ndarray, usable: bool = True) -> Null:
    sample = null.sample_of(criterion, factors, usable)
    sums = sums_of(Spread(sample, (np.zeros(null.SIZE),) * 4))
    return null.null_of(criterion, null.utilization_of(factors), usable, sums)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_a_null_is_that_of_noise_under_the_factors(factors: np.ndarray, power: int) -> None:
    criterion = importance.CRITERIA[{1: "wanda", 2: "taylor"}[power]]
    want = reference.metrics(np.outer(factors, NOISE**power))
    found = found_for(criterion, factors)
    assert float(found.utilization) == pytest.approx(want["utilization"], abs=1e-3)
    for name in ("gini", "coverage_50", "coverage_80", "coverage_90"):
        # Where one factor of many holds nearly all, runs of 32 of the 4096 blur it.
        allowed = 3e-3 if np.sort(factors)[-1] > 20 * np.median(factors) else 2e-3
        assert float(getattr(found, name)) == pytest.approx(want[name], abs=allowed), name


def test_the_null_of_magnitudes_is_that_of_a_half_normal() -> None:
    want, known = reference.metrics(NOISE), half_normal.null_of_magnitude()
    for name in ("utilization", "gini", "coverage_50", "coverage_80", "coverage_90"):
        assert float(getattr(known, name)) == pytest.approx(want[name], abs=6e-4), name
    assert float(known.gini) == pytest.approx(2**0.5 - 1)


def test_where_nothing_usable_was_seen_noise_is_that_of_magnitudes() -> None:
    taylor = importance.CRITERIA["taylor"]
    ours, theirs = found_for(taylor, np.ones(1), usable=False), half_normal.null_of_magnitude()
    for name in ("utilization", "gini", "coverage_80"):
        assert float(getattr(ours, name)) == pytest.approx(float(getattr(theirs, name)), abs=2e-3)


def test_factors_of_a_large_layer_are_spread_evenly_over_it() -> None:
    spread = null.profile_of(np.arange(10_000))
    assert spread[0] == 0 and len(spread) == 4096 and {*np.diff(spread).tolist()} == {2, 3}
